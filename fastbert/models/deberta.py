"""DeBERTa v1: v2's attention, without buckets; one linear layer gives queries, keys and values, head by head."""

from __future__ import annotations

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta import modeling_deberta as hf

from ..layers.disentangled import Disentangled
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.readers import FIRST, LABELS, SPANS
from .classes import register
from .deberta_v2 import SIZES, refuses, run, tables, vocabulary
from .family import Family

_LAYOUT = Layer(
    Disentangled(
        qkv=("attention", "self", "in_proj"),
        is_by_head=True,
        position_key=("attention", "self", "pos_proj"),
        position_query=("attention", "self", "pos_q_proj"),
        kinds={
            ("attention",): hf.DebertaAttention,
            ("attention", "self"): hf.DisentangledSelfAttention,
            ("attention", "output"): hf.DebertaSelfOutput,
        },
    ),
    FeedForward(chunk=None, kinds={("intermediate",): hf.DebertaIntermediate, ("output",): hf.DebertaOutput}),
    norm=hf.DebertaLayerNorm,
)


def _refuses(model: hf.DebertaModel) -> str | None:
    if model.encoder.layer and model.encoder.layer[0].attention.self.talking_head:
        return "talking heads"
    return refuses(model)


def _widen(model: hf.DebertaModel) -> None:
    """Its LayerNorm computes in float32 whatever it is given."""
    for module in model.modules():
        for name, norm in module.named_children():
            if type(norm) is hf.DebertaLayerNorm:
                wide = nn.LayerNorm(norm.weight.shape, norm.variance_epsilon).to(norm.weight)
                wide.weight, wide.bias = norm.weight, norm.bias
                setattr(module, name, wide.train(norm.training))


FAMILY = register(
    Family(
        hf,
        hf.DebertaModel,
        hf.DebertaEncoder,
        hf.DebertaLayer,
        _LAYOUT,
        hf.DebertaEmbeddings,
        hf.DebertaConfig,
        output=BaseModelOutput,
        tables=tables,
        run=run,
        takes_square_mask=False,
        refuses=_refuses,
        widen=_widen,
        heads={
            hf.DebertaForMaskedLM: LABELS,
            hf.DebertaForQuestionAnswering: SPANS,
            hf.DebertaForSequenceClassification: FIRST,
            hf.DebertaForTokenClassification: LABELS,
        },
        parts=(
            hf.ContextPooler,
            hf.DebertaLMPredictionHead,
            hf.DebertaLayerNorm,
            hf.DebertaOnlyMLMHead,
            hf.LegacyDebertaLMPredictionHead,
            hf.LegacyDebertaOnlyMLMHead,
            hf.LegacyDebertaPredictionHeadTransform,
        ),
        vocabularies={hf.DebertaForMaskedLM: vocabulary},
        sizes=SIZES,
    ),
    __name__,
)
