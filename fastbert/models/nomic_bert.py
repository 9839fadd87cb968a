"""NomicBERT: BERT with rotary positions, a gated feed-forward, and no biases in its layers."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.nomic_bert import modeling_nomic_bert as hf

from ..runtime.readers import LABELS, REAL
from .classes import predictions, register
from .rotary import AFTER, EMBEDDED, GATED, kin

FAMILY = register(
    kin(
        hf,
        "NomicBert",
        AFTER[0],
        {**GATED, **AFTER[1]},
        ids=EMBEDDED,
        output=BaseModelOutputWithPooling,
        heads={"ForMaskedLM": LABELS, "ForSequenceClassification": REAL, "ForTokenClassification": LABELS},
        parts=("LMPredictionHead", "OnlyMLMHead", "Pooler", "PredictionHeadTransform"),
        vocabularies={"ForMaskedLM": predictions},
    ),
    __name__,
)
