"""ELECTRA: BERT's layers after renaming, no pooler, embeddings that may be narrower and are then projected."""

from __future__ import annotations

from typing import Any

from transformers.models.electra import modeling_electra as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS, SUMMARY, know
from .family import base_model, bert_like, embeddings, encoder, head, introduce, layer, masked_lm
from .heads import Vocabulary

__all__ = [
    "ElectraForCausalLM",
    "ElectraForMaskedLM",
    "ElectraForMultipleChoice",
    "ElectraForPreTraining",
    "ElectraForQuestionAnswering",
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
    "ElectraModel",
]


def _generator(model: Any) -> Vocabulary:
    return Vocabulary(model.generator_predictions, model.generator_lm_head)


ElectraEmbeddings = embeddings(hf.ElectraEmbeddings, __name__)
ElectraLayer = layer(hf.ElectraLayer, __name__, bert_like(hf, "Electra"))
ElectraEncoder = encoder(hf.ElectraEncoder, __name__)
ElectraModel = base_model(hf.ElectraModel, __name__, ElectraEmbeddings)
ElectraForCausalLM = head(hf.ElectraForCausalLM, __name__)
ElectraForMaskedLM = masked_lm(hf.ElectraForMaskedLM, __name__, _generator)
ElectraForMultipleChoice = head(hf.ElectraForMultipleChoice, __name__)
ElectraForPreTraining = head(hf.ElectraForPreTraining, __name__)
ElectraForQuestionAnswering = head(hf.ElectraForQuestionAnswering, __name__)
ElectraForSequenceClassification = head(hf.ElectraForSequenceClassification, __name__)
ElectraForTokenClassification = head(hf.ElectraForTokenClassification, __name__)

BASE = hf.ElectraModel
ENCODER = hf.ElectraEncoder
# ElectraForPreTraining is not among them: its loss leaves padding out by the mask.
HEADS = {
    hf.ElectraForMaskedLM: LABELS,
    hf.ElectraForMultipleChoice: SUMMARY,
    hf.ElectraForPreTraining: REAL,
    hf.ElectraForQuestionAnswering: SPANS,
    hf.ElectraForSequenceClassification: FIRST,
    hf.ElectraForTokenClassification: LABELS,
}
PARTS = (
    hf.ElectraClassificationHead,
    hf.ElectraDiscriminatorPredictions,
    hf.ElectraGeneratorPredictions,
    hf.ElectraSequenceSummary,
)
LOSS_HEADS = {hf.ElectraForMaskedLM: ElectraForMaskedLM}
CLASSES = {
    hf.ElectraModel: ElectraModel,
    hf.ElectraEmbeddings: ElectraEmbeddings,
    hf.ElectraLayer: ElectraLayer,
    hf.ElectraEncoder: ElectraEncoder,
}

know((hf.ElectraModel, ElectraModel), HEADS, PARTS, LOSS_HEADS)
introduce(ElectraModel, hf.ElectraConfig)
