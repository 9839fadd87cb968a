"""ELECTRA: BERT's layers after renaming, no pooler, embeddings that may be narrower and are then projected."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.electra import modeling_electra as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS, SUMMARY
from .classes import bert_like, register
from .heads import Vocabulary


def _generator(model: PreTrainedModel) -> Vocabulary:
    return Vocabulary(model.generator_predictions, model.generator_lm_head, (model.generator_predictions,))


FAMILY = register(
    bert_like(
        hf,
        "Electra",
        heads={
            "ForMaskedLM": LABELS,
            "ForMultipleChoice": SUMMARY,
            "ForPreTraining": REAL,  # its loss leaves padding out by the mask
            "ForQuestionAnswering": SPANS,
            "ForSequenceClassification": FIRST,
            "ForTokenClassification": LABELS,
        },
        others=("ForCausalLM",),
        parts=("ClassificationHead", "DiscriminatorPredictions", "GeneratorPredictions", "SequenceSummary"),
        vocabularies={"ForMaskedLM": _generator},
        between=("embeddings_project",),
    ),
    __name__,
)
