"""ESM: LayerNorm before each half; rotary positions, or a table; embeddings scaled by how many tokens are masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.models.esm import modeling_esm as hf

from ..layers.feed_forward import FeedForward
from ..runtime.readers import FIRST, LABELS, parameter_names
from .classes import bert_like, lm_head, register
from .heads import Vocabulary
from .rotary import SIZES

_TURNS = "position_embeddings"
if _TURNS not in parameter_names(hf.EsmEncoder):
    raise ImportError("each of its layers makes a rotation of its own")


class _FeedForward(FeedForward):
    """Whose activation is a function of the module."""

    def activation_of(self, layer: nn.Module) -> nn.Module:
        return _GELU


_GELU = GELUActivation()  # by erf, as that function


def _vocabulary(model: hf.EsmForMaskedLM) -> Vocabulary:
    return lm_head(model)._replace(bias=model.lm_head.bias)


def _shared(encoder: hf.EsmEncoder) -> Mapping[str, object]:
    return {"position_embedding_type": encoder.config.position_embedding_type}


_KIN = bert_like(
    hf,
    "Esm",
    heads={"ForMaskedLM": LABELS, "ForSequenceClassification": FIRST, "ForTokenClassification": LABELS},
    parts=("ClassificationHead", "ContactPredictionHead", "LMHead", "Pooler", "RotaryEmbedding"),
    vocabularies={"ForMaskedLM": _vocabulary},
    fuses_embeddings=False,
    embeds_padded=True,
    ids={"input_ids": "word_embeddings", "position_ids": None},
    final_norm="emb_layer_norm_after",
    output=BaseModelOutputWithCrossAttentions,
    handed=_TURNS,
    shared=_shared,
    sizes={**SIZES, "mask_token_id": 3, "position_embedding_type": "rotary"},
)
_LAYOUT = replace(
    _KIN.layout,
    attention=replace(_KIN.layout.attention, norm=("attention", "LayerNorm"), rotary=_TURNS, scales_first=True),
    feed_forward=_FeedForward(norm=("LayerNorm",), activation=(), kinds=_KIN.layout.feed_forward.kinds),
    pre_norm=True,
)
FAMILY = register(replace(_KIN, layout=_LAYOUT), __name__)
