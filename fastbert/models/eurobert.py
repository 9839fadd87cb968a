"""EuroBERT: RMSNorm before each half, gated, rotary; no embeddings but those of words."""

from __future__ import annotations

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.eurobert import modeling_eurobert as hf

from ..runtime.readers import LABELS, Reader
from .classes import register
from .heads import Vocabulary
from .rotary import GATED, kin

FAMILY = register(
    kin(
        hf,
        "EuroBert",
        {"output_dropout": None, "norm": ("input_layernorm",)},
        {**GATED, "down_dropout": None, "norm": ("post_attention_layernorm",)},
        layer="DecoderLayer",
        pre_norm=True,
        norm=hf.EuroBertRMSNorm,
        embeddings=nn.Embedding,
        embeddings_at=("embed_tokens",),
        ids={"input_ids": "", "position_ids": None},
        final_norm="norm",
        output=BaseModelOutput,
        heads={
            **{"ForMaskedLM": LABELS, "ForTokenClassification": LABELS},
            "ForSequenceClassification": Reader(
                around=True, first=lambda head: head.classifier_pooling == "bos"
            ),  # others by the mask
        },
        vocabularies={"ForMaskedLM": lambda model: Vocabulary(lambda x: x, model.lm_head)},
    ),
    __name__,
)
