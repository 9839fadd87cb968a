"""GTE: NomicBERT with biases, types or none, and dropout inside the gated feed-forward."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gte import modeling_gte as hf

from ..runtime.readers import LABELS, REAL
from .classes import lm_head, register
from .rotary import AFTER, EMBEDDED, GATED, kin

FAMILY = register(
    kin(
        hf,
        "Gte",
        AFTER[0],
        {**GATED, **AFTER[1], "between_dropout": ("mlp", "dropout")},
        ids=EMBEDDED,
        output=BaseModelOutputWithPooling,
        heads={"ForMaskedLM": LABELS, "ForSequenceClassification": REAL, "ForTokenClassification": LABELS},
        parts=("LMHead", "Pooler"),
        vocabularies={"ForMaskedLM": lm_head},
    ),
    __name__,
)
