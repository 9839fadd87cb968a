"""DeBERTa v1: v2's attention, without buckets; one linear layer gives queries, keys and values, head by head."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta import modeling_deberta as hf

from ..layers.disentangled import Disentangled
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.packing import Packing
from ..runtime.readers import FIRST, LABELS, SPANS
from .classes import register
from .deberta_v2 import SIZES, made_in_a_graph, refuses, relative, run, vocabulary
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
    FeedForward(kinds={("intermediate",): hf.DebertaIntermediate, ("output",): hf.DebertaOutput}),
    norm=hf.DebertaLayerNorm,
)


def _tables(
    encoder: hf.DebertaEncoder, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None
) -> dict[str, object]:
    """As v2's, without buckets."""
    if not encoder.relative_attention:
        return {"relative": None}
    return {"relative": relative(encoder, -1, hidden_states.device, packing.max_seqlen)}


def _graph_tables(
    encoder: hf.DebertaEncoder, device: torch.device, longest: int
) -> Callable[..., Mapping[str, object]] | None:
    """`Family.graph_tables`."""
    return made_in_a_graph(encoder, -1, device, longest)


def _shared(encoder: hf.DebertaEncoder) -> dict[str, object]:
    """`Family.shared`."""
    if not encoder.relative_attention:
        return {"relative_attention": False}
    return {"relative_attention": True, "max_relative_positions": encoder.max_relative_positions}


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
        tables=_tables,
        graph_tables=_graph_tables,
        shared=_shared,
        run=run,
        takes_square_mask=False,
        refuses=refuses,
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
