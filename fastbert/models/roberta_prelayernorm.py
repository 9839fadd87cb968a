"""RoBERTa-PreLayerNorm: RoBERTa with LayerNorm before each half, and one more that its base model calls last."""

from __future__ import annotations

from transformers.models.roberta_prelayernorm import modeling_roberta_prelayernorm as hf

from .classes import register
from .roberta import kin

FAMILY = register(
    kin(
        hf,
        "RobertaPreLayerNorm",
        attention={"norm": ("attention", "LayerNorm")},
        feed_forward={"norm": ("intermediate", "LayerNorm")},
        pre_norm=True,
        norm_after=True,
    ),
    __name__,
)
