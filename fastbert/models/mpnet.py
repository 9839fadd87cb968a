"""MPNet: BERT's layers under other names; attention adds a bias by the distance of key and query, one for all layers.

Its model hands no arguments of ours on to its encoder, so that the fused one has a forward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.packing import Packing
from ..runtime.readers import FIRST, LABELS, REAL, SPANS
from ..runtime.registry import encoder_of
from ..runtime.support import is_plain, named, oddity
from .classes import lm_head, register, run_as_bert
from .family import Family

_LAYOUT = Layer(
    Attention(
        module=("attention", "attn"),
        query=("attention", "attn", "q"),
        key=("attention", "attn", "k"),
        value=("attention", "attn", "v"),
        output=("attention", "attn", "o"),
        output_dropout=("attention", "dropout"),
        norm=("attention", "LayerNorm"),
        bias="distance",
        kinds={("attention",): hf.MPNetAttention, ("attention", "attn"): hf.MPNetSelfAttention},
    ),
    FeedForward(kinds={("intermediate",): hf.MPNetIntermediate, ("output",): hf.MPNetOutput}),
)


def _tables(encoder: Any, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None) -> dict[str, Tensor]:
    """The bias by distance, (heads, 2 R - 1) float32; whatever the positions are, as stock."""
    table = encoder.relative_attention_bias
    distances = torch.arange(1 - packing.max_seqlen, packing.max_seqlen)
    buckets = encoder.relative_position_bucket(distances)  # of 32, whatever the config says: so has stock
    buckets = buckets.to(hidden_states.device)
    if is_plain(table, nn.Embedding):  # gradients of a bucket are summed up in float32
        bias = nn.functional.embedding(buckets, table.weight.float())
    else:
        bias = table(buckets).float()
    return {"distance": bias.t().contiguous()}


def _refuses(model: hf.MPNetModel) -> str | None:
    """Stock looks up a table of queries and keys, fastbert one of distances: who sees the two sees the difference."""
    table = encoder_of(model).__dict__["_modules"].get("relative_attention_bias")
    if not is_plain(table, nn.Embedding, sharded=True):
        return f"relative_attention_bias of the encoder is a {named(table)}{oddity(table)}, not a plain nn.Embedding"
    own = table.max_norm is not None or table.padding_idx is not None or table.scale_grad_by_freq or table.sparse
    return "relative_attention_bias of the encoder renormalises its rows, or scales their gradients" if own else None


FAMILY = register(
    Family(
        hf,
        hf.MPNetModel,
        hf.MPNetEncoder,
        hf.MPNetLayer,
        _LAYOUT,
        hf.MPNetEmbeddings,
        hf.MPNetConfig,
        output=BaseModelOutput,
        tables=_tables,
        run=run_as_bert(BaseModelOutputWithPooling),
        refuses=_refuses,
        heads={
            hf.MPNetForMaskedLM: LABELS,
            hf.MPNetForMultipleChoice: REAL,
            hf.MPNetForQuestionAnswering: SPANS,
            hf.MPNetForSequenceClassification: FIRST,
            hf.MPNetForTokenClassification: LABELS,
        },
        parts=(hf.MPNetClassificationHead, hf.MPNetLMHead, hf.MPNetPooler),
        vocabularies={hf.MPNetForMaskedLM: lm_head},
    ),
    __name__,
)
