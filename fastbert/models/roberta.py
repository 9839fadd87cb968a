"""RoBERTa: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers.models.roberta import modeling_roberta as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS
from .classes import bert_like, lm_head, register
from .family import Family


def kin(code: ModuleType, prefix: str, **differences: Any) -> Family:
    """A family that is RoBERTa after renaming: its classes are in `code`, their names begin with `prefix`.

    `differences` are as `bert_like` has them.
    """
    return bert_like(
        code,
        prefix,
        heads={
            "ForMaskedLM": LABELS,
            "ForMultipleChoice": REAL,
            "ForQuestionAnswering": SPANS,
            "ForSequenceClassification": FIRST,
            "ForTokenClassification": LABELS,
        },
        others=("ForCausalLM",),
        parts=("ClassificationHead", "LMHead", "Pooler"),
        vocabularies={"ForMaskedLM": lm_head},
        **differences,
    )


FAMILY = register(kin(hf, "Roberta"), __name__)
