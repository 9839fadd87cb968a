"""ESM: LayerNorm before each half; rotary positions, or a table; embeddings scaled by how many tokens are masked."""

from __future__ import annotations

from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.models.esm import modeling_esm as hf

from ..runtime.readers import FIRST, LABELS
from .classes import bert_like, lm_head, register
from .rotary import SIZES

_TURNS = "position_embeddings"
FAMILY = register(
    bert_like(
        hf,
        "Esm",
        heads={"ForMaskedLM": LABELS, "ForSequenceClassification": FIRST, "ForTokenClassification": LABELS},
        parts=("ClassificationHead", "ContactPredictionHead", "LMHead", "Pooler", "RotaryEmbedding"),
        vocabularies={"ForMaskedLM": lm_head},
        attention={"norm": ("attention", "LayerNorm"), "rotary": _TURNS, "scales_first": True},
        feed_forward={"norm": ("LayerNorm",), "activation": (), "function": GELUActivation()},
        pre_norm=True,
        fuses_embeddings=False,
        embeds_padded=True,
        ids={"input_ids": "word_embeddings", "position_ids": None},
        final_norm="emb_layer_norm_after",
        output=BaseModelOutputWithCrossAttentions,
        handed=_TURNS,
        shared=lambda encoder: {"position_embedding_type": encoder.config.position_embedding_type},
        sizes={**SIZES, "mask_token_id": 3, "position_embedding_type": "rotary"},
    ),
    __name__,
)
