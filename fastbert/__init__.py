"""fastbert: fused Triton kernels behind a drop-in BERT encoder for PyTorch and Hugging Face transformers.

import fastbert
model = fastbert.fuse(model)   # the same object, the same weights, the same outputs
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import transformers

# These two modules share their names with the functions in them: bound here, at once, the functions win.
from .calibration import Calibration, calibrate
from .exporting import fused_export
from .fuse import Explanation, UnsupportedModelError, explain, fuse, unfuse
from .tuned import set_batch_invariant
from .verify import verify
from .version import VERSION, warn_of_newer

__version__ = VERSION

warn_of_newer("transformers", transformers.__version__)

if TYPE_CHECKING:
    from transformers import (
        BertForMaskedLM as BertForMaskedLM,
    )
    from transformers import (
        BertForMultipleChoice as BertForMultipleChoice,
    )
    from transformers import (
        BertForNextSentencePrediction as BertForNextSentencePrediction,
    )
    from transformers import (
        BertForPreTraining as BertForPreTraining,
    )
    from transformers import (
        BertForQuestionAnswering as BertForQuestionAnswering,
    )
    from transformers import (
        BertForSequenceClassification as BertForSequenceClassification,
    )
    from transformers import (
        BertForTokenClassification as BertForTokenClassification,
    )
    from transformers import (
        BertLMHeadModel as BertLMHeadModel,
    )
    from transformers import (
        BertModel as BertModel,
    )
    from transformers import (
        CamembertForCausalLM as CamembertForCausalLM,
    )
    from transformers import (
        CamembertForMaskedLM as CamembertForMaskedLM,
    )
    from transformers import (
        CamembertForMultipleChoice as CamembertForMultipleChoice,
    )
    from transformers import (
        CamembertForQuestionAnswering as CamembertForQuestionAnswering,
    )
    from transformers import (
        CamembertForSequenceClassification as CamembertForSequenceClassification,
    )
    from transformers import (
        CamembertForTokenClassification as CamembertForTokenClassification,
    )
    from transformers import (
        CamembertModel as CamembertModel,
    )
    from transformers import (
        DistilBertForMaskedLM as DistilBertForMaskedLM,
    )
    from transformers import (
        DistilBertForMultipleChoice as DistilBertForMultipleChoice,
    )
    from transformers import (
        DistilBertForQuestionAnswering as DistilBertForQuestionAnswering,
    )
    from transformers import (
        DistilBertForSequenceClassification as DistilBertForSequenceClassification,
    )
    from transformers import (
        DistilBertForTokenClassification as DistilBertForTokenClassification,
    )
    from transformers import (
        DistilBertModel as DistilBertModel,
    )
    from transformers import (
        ElectraForCausalLM as ElectraForCausalLM,
    )
    from transformers import (
        ElectraForMaskedLM as ElectraForMaskedLM,
    )
    from transformers import (
        ElectraForMultipleChoice as ElectraForMultipleChoice,
    )
    from transformers import (
        ElectraForPreTraining as ElectraForPreTraining,
    )
    from transformers import (
        ElectraForQuestionAnswering as ElectraForQuestionAnswering,
    )
    from transformers import (
        ElectraForSequenceClassification as ElectraForSequenceClassification,
    )
    from transformers import (
        ElectraForTokenClassification as ElectraForTokenClassification,
    )
    from transformers import (
        ElectraModel as ElectraModel,
    )
    from transformers import (
        ErnieForCausalLM as ErnieForCausalLM,
    )
    from transformers import (
        ErnieForMaskedLM as ErnieForMaskedLM,
    )
    from transformers import (
        ErnieForMultipleChoice as ErnieForMultipleChoice,
    )
    from transformers import (
        ErnieForNextSentencePrediction as ErnieForNextSentencePrediction,
    )
    from transformers import (
        ErnieForPreTraining as ErnieForPreTraining,
    )
    from transformers import (
        ErnieForQuestionAnswering as ErnieForQuestionAnswering,
    )
    from transformers import (
        ErnieForSequenceClassification as ErnieForSequenceClassification,
    )
    from transformers import (
        ErnieForTokenClassification as ErnieForTokenClassification,
    )
    from transformers import (
        ErnieModel as ErnieModel,
    )
    from transformers import (
        MPNetForMaskedLM as MPNetForMaskedLM,
    )
    from transformers import (
        MPNetForMultipleChoice as MPNetForMultipleChoice,
    )
    from transformers import (
        MPNetForQuestionAnswering as MPNetForQuestionAnswering,
    )
    from transformers import (
        MPNetForSequenceClassification as MPNetForSequenceClassification,
    )
    from transformers import (
        MPNetForTokenClassification as MPNetForTokenClassification,
    )
    from transformers import (
        MPNetModel as MPNetModel,
    )
    from transformers import (
        RobertaForCausalLM as RobertaForCausalLM,
    )
    from transformers import (
        RobertaForMaskedLM as RobertaForMaskedLM,
    )
    from transformers import (
        RobertaForMultipleChoice as RobertaForMultipleChoice,
    )
    from transformers import (
        RobertaForQuestionAnswering as RobertaForQuestionAnswering,
    )
    from transformers import (
        RobertaForSequenceClassification as RobertaForSequenceClassification,
    )
    from transformers import (
        RobertaForTokenClassification as RobertaForTokenClassification,
    )
    from transformers import (
        RobertaModel as RobertaModel,
    )
    from transformers import (
        XLMRobertaForCausalLM as XLMRobertaForCausalLM,
    )
    from transformers import (
        XLMRobertaForMaskedLM as XLMRobertaForMaskedLM,
    )
    from transformers import (
        XLMRobertaForMultipleChoice as XLMRobertaForMultipleChoice,
    )
    from transformers import (
        XLMRobertaForQuestionAnswering as XLMRobertaForQuestionAnswering,
    )
    from transformers import (
        XLMRobertaForSequenceClassification as XLMRobertaForSequenceClassification,
    )
    from transformers import (
        XLMRobertaForTokenClassification as XLMRobertaForTokenClassification,
    )
    from transformers import (
        XLMRobertaModel as XLMRobertaModel,
    )

_COMMON = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "Model",
)
# Module of `fastbert.models`: how its classes' names begin, and how they end.
_MODELS = {
    "bert": ("Bert", (*_COMMON, "ForNextSentencePrediction", "ForPreTraining", "LMHeadModel")),
    "camembert": ("Camembert", (*_COMMON, "ForCausalLM")),
    "distilbert": ("DistilBert", _COMMON),
    "electra": ("Electra", (*_COMMON, "ForCausalLM", "ForPreTraining")),
    "ernie": ("Ernie", (*_COMMON, "ForCausalLM", "ForNextSentencePrediction", "ForPreTraining")),
    "mpnet": ("MPNet", _COMMON),
    "roberta": ("Roberta", (*_COMMON, "ForCausalLM")),
    "xlm_roberta": ("XLMRoberta", (*_COMMON, "ForCausalLM")),
}
_CLASSES = {begin + end: module for module, (begin, ends) in _MODELS.items() for end in ends}

__all__ = [
    "Calibration",
    "Explanation",
    "UnsupportedModelError",
    "calibrate",
    "explain",
    "fuse",
    "fused_export",
    "set_batch_invariant",
    "unfuse",
    "verify",
    *sorted(_CLASSES),
]


def __getattr__(name: str) -> Any:
    # The model classes load on first use: they bring in transformers' own model code.
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".models.{_CLASSES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
