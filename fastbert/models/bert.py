"""BERT."""

from __future__ import annotations

from transformers.models.bert import modeling_bert as hf

from ..runtime.readers import LABELS, REAL, SPANS
from .classes import bert_like, predictions, register

HEADS = {
    "ForMaskedLM": LABELS,
    "ForMultipleChoice": REAL,
    "ForNextSentencePrediction": REAL,
    "ForPreTraining": LABELS,
    "ForQuestionAnswering": SPANS,
    "ForSequenceClassification": REAL,
    "ForTokenClassification": LABELS,
}
PARTS = ("LMPredictionHead", "OnlyMLMHead", "OnlyNSPHead", "Pooler", "PreTrainingHeads", "PredictionHeadTransform")
VOCABULARIES = {"ForMaskedLM": predictions, "ForPreTraining": predictions}

FAMILY = register(
    bert_like(hf, "Bert", HEADS, others=("LMHeadModel",), parts=PARTS, vocabularies=VOCABULARIES), __name__
)
