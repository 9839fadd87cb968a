"""Jina embeddings v3: XLM-R with rotary positions."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.jina_embeddings_v3 import modeling_jina_embeddings_v3 as hf

from ..runtime.readers import FIRST, LABELS, SPANS
from .classes import lm_head, register
from .rotary import AFTER, EMBEDDED, kin

if "gather" in hf.JinaEmbeddingsV3Embeddings.forward.__code__.co_names:
    raise ImportError("its embeddings look types up by position, of which a row of packed texts may have too many")

FAMILY = register(
    kin(
        hf,
        "JinaEmbeddingsV3",
        AFTER[0],
        {"up": ("mlp", "fc1"), "activation": ("mlp", "activation_fn"), "down": ("mlp", "fc2"), **AFTER[1]},
        ids=EMBEDDED,
        output=BaseModelOutputWithPooling,
        heads={
            **{"ForMaskedLM": LABELS, "ForQuestionAnswering": SPANS},
            **{"ForSequenceClassification": FIRST, "ForTokenClassification": LABELS},
        },
        parts=("ClassificationHead", "LMHead", "Pooler"),
        vocabularies={"ForMaskedLM": lm_head},
    ),
    __name__,
)
