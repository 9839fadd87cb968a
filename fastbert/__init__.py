"""fastbert: fused Triton kernels behind a drop-in BERT encoder for PyTorch and Hugging Face transformers.

import fastbert
model = fastbert.fuse(model)   # the same object, the same weights, the same outputs
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# These two modules share their names with the functions in them: bound here, at once, the functions win.
from .fuse import Explanation, UnsupportedModelError, explain, fuse, unfuse
from .verify import verify

if TYPE_CHECKING:
    from .models.bert import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
    )

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "Explanation",
    "UnsupportedModelError",
    "explain",
    "fuse",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> Any:
    # The model classes load on first use: they bring in transformers' own model code.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(".models.bert", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
