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
    from .models.bert import *  # noqa: F403
    from .models.camembert import *  # noqa: F403
    from .models.distilbert import *  # noqa: F403
    from .models.electra import *  # noqa: F403
    from .models.ernie import *  # noqa: F403
    from .models.mpnet import *  # noqa: F403
    from .models.roberta import *  # noqa: F403
    from .models.xlm_roberta import *  # noqa: F403

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
