"""fastbert: fused Triton kernels behind a drop-in BERT encoder for PyTorch and Hugging Face transformers.

import fastbert
model = fastbert.fuse(model)   # the same object, the same weights, the same outputs

Nothing is loaded before it is used, torch neither. A program with fastbert's operators in it, as AOTInductor's, takes
`import fastbert.ops`.
"""

# ruff: noqa: I001  (one import of all names, not one each)

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from transformers import (
        AlbertForMaskedLM as AlbertForMaskedLM,
        AlbertForMultipleChoice as AlbertForMultipleChoice,
        AlbertForPreTraining as AlbertForPreTraining,
        AlbertForQuestionAnswering as AlbertForQuestionAnswering,
        AlbertForSequenceClassification as AlbertForSequenceClassification,
        AlbertForTokenClassification as AlbertForTokenClassification,
        AlbertModel as AlbertModel,
        BertForMaskedLM as BertForMaskedLM,
        BertForMultipleChoice as BertForMultipleChoice,
        BertForNextSentencePrediction as BertForNextSentencePrediction,
        BertForPreTraining as BertForPreTraining,
        BertForQuestionAnswering as BertForQuestionAnswering,
        BertForSequenceClassification as BertForSequenceClassification,
        BertForTokenClassification as BertForTokenClassification,
        BertLMHeadModel as BertLMHeadModel,
        BertModel as BertModel,
        CamembertForCausalLM as CamembertForCausalLM,
        CamembertForMaskedLM as CamembertForMaskedLM,
        CamembertForMultipleChoice as CamembertForMultipleChoice,
        CamembertForQuestionAnswering as CamembertForQuestionAnswering,
        CamembertForSequenceClassification as CamembertForSequenceClassification,
        CamembertForTokenClassification as CamembertForTokenClassification,
        CamembertModel as CamembertModel,
        Data2VecTextForCausalLM as Data2VecTextForCausalLM,
        Data2VecTextForMaskedLM as Data2VecTextForMaskedLM,
        Data2VecTextForMultipleChoice as Data2VecTextForMultipleChoice,
        Data2VecTextForQuestionAnswering as Data2VecTextForQuestionAnswering,
        Data2VecTextForSequenceClassification as Data2VecTextForSequenceClassification,
        Data2VecTextForTokenClassification as Data2VecTextForTokenClassification,
        Data2VecTextModel as Data2VecTextModel,
        DistilBertForMaskedLM as DistilBertForMaskedLM,
        DistilBertForMultipleChoice as DistilBertForMultipleChoice,
        DistilBertForQuestionAnswering as DistilBertForQuestionAnswering,
        DistilBertForSequenceClassification as DistilBertForSequenceClassification,
        DistilBertForTokenClassification as DistilBertForTokenClassification,
        DistilBertModel as DistilBertModel,
        ElectraForCausalLM as ElectraForCausalLM,
        ElectraForMaskedLM as ElectraForMaskedLM,
        ElectraForMultipleChoice as ElectraForMultipleChoice,
        ElectraForPreTraining as ElectraForPreTraining,
        ElectraForQuestionAnswering as ElectraForQuestionAnswering,
        ElectraForSequenceClassification as ElectraForSequenceClassification,
        ElectraForTokenClassification as ElectraForTokenClassification,
        ElectraModel as ElectraModel,
        ErnieForCausalLM as ErnieForCausalLM,
        ErnieForMaskedLM as ErnieForMaskedLM,
        ErnieForMultipleChoice as ErnieForMultipleChoice,
        ErnieForNextSentencePrediction as ErnieForNextSentencePrediction,
        ErnieForPreTraining as ErnieForPreTraining,
        ErnieForQuestionAnswering as ErnieForQuestionAnswering,
        ErnieForSequenceClassification as ErnieForSequenceClassification,
        ErnieForTokenClassification as ErnieForTokenClassification,
        ErnieModel as ErnieModel,
        EsmForMaskedLM as EsmForMaskedLM,
        EsmForSequenceClassification as EsmForSequenceClassification,
        EsmForTokenClassification as EsmForTokenClassification,
        EsmModel as EsmModel,
        EuroBertForMaskedLM as EuroBertForMaskedLM,
        EuroBertForSequenceClassification as EuroBertForSequenceClassification,
        EuroBertForTokenClassification as EuroBertForTokenClassification,
        EuroBertModel as EuroBertModel,
        GteForMaskedLM as GteForMaskedLM,
        GteForSequenceClassification as GteForSequenceClassification,
        GteForTokenClassification as GteForTokenClassification,
        GteModel as GteModel,
        JinaEmbeddingsV3ForMaskedLM as JinaEmbeddingsV3ForMaskedLM,
        JinaEmbeddingsV3ForQuestionAnswering as JinaEmbeddingsV3ForQuestionAnswering,
        JinaEmbeddingsV3ForSequenceClassification as JinaEmbeddingsV3ForSequenceClassification,
        JinaEmbeddingsV3ForTokenClassification as JinaEmbeddingsV3ForTokenClassification,
        JinaEmbeddingsV3Model as JinaEmbeddingsV3Model,
        MPNetForMaskedLM as MPNetForMaskedLM,
        MPNetForMultipleChoice as MPNetForMultipleChoice,
        MPNetForQuestionAnswering as MPNetForQuestionAnswering,
        MPNetForSequenceClassification as MPNetForSequenceClassification,
        MPNetForTokenClassification as MPNetForTokenClassification,
        MPNetModel as MPNetModel,
        MegatronBertForCausalLM as MegatronBertForCausalLM,
        MegatronBertForMaskedLM as MegatronBertForMaskedLM,
        MegatronBertForMultipleChoice as MegatronBertForMultipleChoice,
        MegatronBertForNextSentencePrediction as MegatronBertForNextSentencePrediction,
        MegatronBertForPreTraining as MegatronBertForPreTraining,
        MegatronBertForQuestionAnswering as MegatronBertForQuestionAnswering,
        MegatronBertForSequenceClassification as MegatronBertForSequenceClassification,
        MegatronBertForTokenClassification as MegatronBertForTokenClassification,
        MegatronBertModel as MegatronBertModel,
        ModernBertForMaskedLM as ModernBertForMaskedLM,
        ModernBertForMultipleChoice as ModernBertForMultipleChoice,
        ModernBertForQuestionAnswering as ModernBertForQuestionAnswering,
        ModernBertForSequenceClassification as ModernBertForSequenceClassification,
        ModernBertForTokenClassification as ModernBertForTokenClassification,
        ModernBertModel as ModernBertModel,
        NomicBertForMaskedLM as NomicBertForMaskedLM,
        NomicBertForSequenceClassification as NomicBertForSequenceClassification,
        NomicBertForTokenClassification as NomicBertForTokenClassification,
        NomicBertModel as NomicBertModel,
        RobertaForCausalLM as RobertaForCausalLM,
        RobertaForMaskedLM as RobertaForMaskedLM,
        RobertaForMultipleChoice as RobertaForMultipleChoice,
        RobertaForQuestionAnswering as RobertaForQuestionAnswering,
        RobertaForSequenceClassification as RobertaForSequenceClassification,
        RobertaForTokenClassification as RobertaForTokenClassification,
        RobertaModel as RobertaModel,
        RobertaPreLayerNormForCausalLM as RobertaPreLayerNormForCausalLM,
        RobertaPreLayerNormForMaskedLM as RobertaPreLayerNormForMaskedLM,
        RobertaPreLayerNormForMultipleChoice as RobertaPreLayerNormForMultipleChoice,
        RobertaPreLayerNormForQuestionAnswering as RobertaPreLayerNormForQuestionAnswering,
        RobertaPreLayerNormForSequenceClassification as RobertaPreLayerNormForSequenceClassification,
        RobertaPreLayerNormForTokenClassification as RobertaPreLayerNormForTokenClassification,
        RobertaPreLayerNormModel as RobertaPreLayerNormModel,
        XLMRobertaForCausalLM as XLMRobertaForCausalLM,
        XLMRobertaForMaskedLM as XLMRobertaForMaskedLM,
        XLMRobertaForMultipleChoice as XLMRobertaForMultipleChoice,
        XLMRobertaForQuestionAnswering as XLMRobertaForQuestionAnswering,
        XLMRobertaForSequenceClassification as XLMRobertaForSequenceClassification,
        XLMRobertaForTokenClassification as XLMRobertaForTokenClassification,
        XLMRobertaModel as XLMRobertaModel,
        XLMRobertaXLForCausalLM as XLMRobertaXLForCausalLM,
        XLMRobertaXLForMaskedLM as XLMRobertaXLForMaskedLM,
        XLMRobertaXLForMultipleChoice as XLMRobertaXLForMultipleChoice,
        XLMRobertaXLForQuestionAnswering as XLMRobertaXLForQuestionAnswering,
        XLMRobertaXLForSequenceClassification as XLMRobertaXLForSequenceClassification,
        XLMRobertaXLForTokenClassification as XLMRobertaXLForTokenClassification,
        XLMRobertaXLModel as XLMRobertaXLModel,
    )

    from .attention_maps import attention_maps as attention_maps
    from .calibration import Calibration as Calibration, calibrate as calibrate
    from .convert import convert as convert
    from .embed.encode import encode as encode
    from .exporting import fused_export as fused_export
    from .explain import Explanation as Explanation, explain as explain
    from .flatten import flatten as flatten
    from .fuse import UnsupportedModelError as UnsupportedModelError, fuse as fuse, unfuse as unfuse
    from .tuned import set_batch_invariant as set_batch_invariant
    from .verify import verify as verify

# Module: the names it has for users.
_VERBS = {
    "attention_maps": ("attention_maps",),
    "calibration": ("Calibration", "calibrate"),
    "convert": ("convert",),
    "embed.encode": ("encode",),
    "exporting": ("fused_export",),
    "explain": ("Explanation", "explain"),
    "flatten": ("flatten",),
    "fuse": ("UnsupportedModelError", "fuse", "unfuse"),
    "tuned": ("set_batch_invariant",),
    "verify": ("verify",),
}
_COMMON = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "Model",
)
_TAGGING = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model")
# Module of `fastbert.models`: how its classes' names begin, and how they end.
_MODELS = {
    "albert": ("Albert", (*_COMMON, "ForPreTraining")),
    "bert": ("Bert", (*_COMMON, "ForNextSentencePrediction", "ForPreTraining", "LMHeadModel")),
    "camembert": ("Camembert", (*_COMMON, "ForCausalLM")),
    "data2vec": ("Data2VecText", (*_COMMON, "ForCausalLM")),
    "deberta": ("Deberta", tuple(name for name in _COMMON if name != "ForMultipleChoice")),
    "deberta_v2": ("DebertaV2", _COMMON),
    "distilbert": ("DistilBert", _COMMON),
    "electra": ("Electra", (*_COMMON, "ForCausalLM", "ForPreTraining")),
    "ernie": ("Ernie", (*_COMMON, "ForCausalLM", "ForNextSentencePrediction", "ForPreTraining")),
    "modernbert": ("ModernBert", _COMMON),
    "nomic_bert": ("NomicBert", _TAGGING),
    "esm": ("Esm", _TAGGING),
    "eurobert": ("EuroBert", _TAGGING),
    "gte": ("Gte", _TAGGING),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", (*_TAGGING, "ForQuestionAnswering")),
    "megatron_bert": ("MegatronBert", (*_COMMON, "ForCausalLM", "ForNextSentencePrediction", "ForPreTraining")),
    "mpnet": ("MPNet", _COMMON),
    "roberta": ("Roberta", (*_COMMON, "ForCausalLM")),
    "roberta_prelayernorm": ("RobertaPreLayerNorm", (*_COMMON, "ForCausalLM")),
    "xlm_roberta": ("XLMRoberta", (*_COMMON, "ForCausalLM")),
    "xlm_roberta_xl": ("XLMRobertaXL", (*_COMMON, "ForCausalLM")),
}
_TRANSFORMERS = importlib.util.find_spec("transformers")
_FOLDERS = [] if _TRANSFORMERS is None else list(_TRANSFORMERS.submodule_search_locations or ())


def _is_there(family: str) -> bool:
    """Whether the transformers that is installed has that family: by its files, for it is not loaded yet."""
    return any(os.path.isdir(os.path.join(folder, "models", family)) for folder in _FOLDERS)


_PLACES = {name: module for module, names in _VERBS.items() for name in names}
_PLACES |= {
    begin + end: f"models.{module}" for module, (begin, ends) in _MODELS.items() if _is_there(module) for end in ends
}

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("." + _PLACES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`fastbert.fuse` is the function: Python binds a module's name here as it loads it, over what had that name."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, getattr(value, name) if name in _PLACES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
