"""XLM-R XL: RoBERTa with LayerNorm before each half and after the last, none in its embeddings; one dropout fewer."""

from __future__ import annotations

from transformers.models.xlm_roberta_xl import modeling_xlm_roberta_xl as hf

from .classes import register
from .roberta import kin

FAMILY = register(
    kin(
        hf,
        "XLMRobertaXL",
        attention={"norm": ("attention", "self_attn_layer_norm")},
        feed_forward={"norm": ("LayerNorm",), "down_dropout": None},
        pre_norm=True,
        final_norm="LayerNorm",
        fuses_embeddings=False,
    ),
    __name__,
)
