"""ModernBERT: LayerNorm before each half, none before the first; gated, rotary; most layers see a window alone."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert import modeling_modernbert as hf

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.readers import LABELS, SPANS, Reader
from .classes import register
from .family import Family
from .heads import Vocabulary
from .rotary import SIZES, graph_tables, refuses, tables_by_kind, window

_LAYOUT = Layer(
    Attention(
        module=("attn",),
        qkv=("attn", "Wqkv"),
        output=("attn", "Wo"),
        output_dropout=("attn", "out_drop"),
        norm=("attn_norm",),
        head_dim="head_dim",
        dropout="attention_dropout",
        rotary="rotary",
        window="window",
        kind="attention_type",
        kinds={("attn",): hf.ModernBertAttention},
    ),
    FeedForward(
        up=("mlp", "Wi"),
        is_gated=True,
        activation=("mlp", "act"),
        down=("mlp", "Wo"),
        down_dropout=None,
        between_dropout=("mlp", "drop"),
        norm=("mlp_norm",),
        kinds={("mlp",): hf.ModernBertMLP},
    ),
    pre_norm=True,
)


def _pools_first(head: hf.ModernBertForSequenceClassification) -> bool:
    return bool(head.config.classifier_pooling == "cls")


_POOLED = Reader(around=True, first=_pools_first)
"""The first row, or the mean of those that its mask names, times that mask."""


def _counts_others(head: hf.ModernBertForMaskedLM) -> str | None:
    config = head.config
    other = config.sparse_prediction and config.sparse_pred_ignore_index != -100
    return f"it predicts tokens whose label is not {config.sparse_pred_ignore_index}" if other else None


def _vocabulary(model: hf.ModernBertForMaskedLM) -> Vocabulary:
    if _counts_others(model):  # not from labelled rows alone
        return Vocabulary(model.head, model.head)
    return Vocabulary(model.head, model.decoder, (model.head,))


FAMILY = register(
    Family(
        hf,
        hf.ModernBertModel,
        hf.ModernBertModel,
        hf.ModernBertEncoderLayer,
        _LAYOUT,
        hf.ModernBertEmbeddings,
        hf.ModernBertConfig,
        stack=("layers",),
        ids={"input_ids": "tok_embeddings", "position_ids": None},
        final_norm="final_norm",
        output=BaseModelOutput,
        tables=tables_by_kind,
        graph_tables=graph_tables(tables_by_kind),
        makes_tables={"rotary_emb": hf.ModernBertRotaryEmbedding},
        window=window,
        takes_square_mask=False,
        refuses=refuses,
        heads={
            hf.ModernBertForMaskedLM: LABELS._replace(unless=_counts_others),
            hf.ModernBertForMultipleChoice: _POOLED,
            hf.ModernBertForQuestionAnswering: SPANS,
            hf.ModernBertForSequenceClassification: _POOLED,
            hf.ModernBertForTokenClassification: LABELS,
        },
        parts=(hf.ModernBertPredictionHead,),
        vocabularies={hf.ModernBertForMaskedLM: _vocabulary},
        sizes=SIZES,
    ),
    __name__,
)
