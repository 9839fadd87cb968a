"""ERNIE: BERT's layers after renaming; types of tasks may be embedded, too (config.use_task_id)."""

from __future__ import annotations

from transformers.models.ernie import modeling_ernie as hf

from ..runtime.readers import LABELS, REAL, SPANS, know
from .family import (
    base_model,
    bert_like,
    embeddings,
    encoder,
    head,
    introduce,
    layer,
    masked_lm,
    pre_training,
    predictions,
)

__all__ = [
    "ErnieForCausalLM",
    "ErnieForMaskedLM",
    "ErnieForMultipleChoice",
    "ErnieForNextSentencePrediction",
    "ErnieForPreTraining",
    "ErnieForQuestionAnswering",
    "ErnieForSequenceClassification",
    "ErnieForTokenClassification",
    "ErnieModel",
]

ErnieEmbeddings = embeddings(hf.ErnieEmbeddings, __name__)
ErnieLayer = layer(hf.ErnieLayer, __name__, bert_like(hf, "Ernie"))
ErnieEncoder = encoder(hf.ErnieEncoder, __name__)
ErnieModel = base_model(hf.ErnieModel, __name__, ErnieEmbeddings)
ErnieForCausalLM = head(hf.ErnieForCausalLM, __name__)
ErnieForMaskedLM = masked_lm(hf.ErnieForMaskedLM, __name__, predictions)
ErnieForMultipleChoice = head(hf.ErnieForMultipleChoice, __name__)
ErnieForNextSentencePrediction = head(hf.ErnieForNextSentencePrediction, __name__)
ErnieForPreTraining = pre_training(hf.ErnieForPreTraining, __name__, hf.ErnieForPreTrainingOutput)
ErnieForQuestionAnswering = head(hf.ErnieForQuestionAnswering, __name__)
ErnieForSequenceClassification = head(hf.ErnieForSequenceClassification, __name__)
ErnieForTokenClassification = head(hf.ErnieForTokenClassification, __name__)

BASE = hf.ErnieModel
ENCODER = hf.ErnieEncoder
HEADS = {
    hf.ErnieForMaskedLM: LABELS,
    hf.ErnieForMultipleChoice: REAL,
    hf.ErnieForNextSentencePrediction: REAL,
    hf.ErnieForPreTraining: LABELS,
    hf.ErnieForQuestionAnswering: SPANS,
    hf.ErnieForSequenceClassification: REAL,
    hf.ErnieForTokenClassification: LABELS,
}
PARTS = (
    hf.ErnieLMPredictionHead,
    hf.ErnieOnlyMLMHead,
    hf.ErnieOnlyNSPHead,
    hf.ErniePooler,
    hf.ErniePreTrainingHeads,
    hf.ErniePredictionHeadTransform,
)
LOSS_HEADS = {
    hf.ErnieForMaskedLM: ErnieForMaskedLM,
    hf.ErnieForPreTraining: ErnieForPreTraining,
}
CLASSES = {
    hf.ErnieModel: ErnieModel,
    hf.ErnieEmbeddings: ErnieEmbeddings,
    hf.ErnieLayer: ErnieLayer,
    hf.ErnieEncoder: ErnieEncoder,
}

know((hf.ErnieModel, ErnieModel), HEADS, PARTS, LOSS_HEADS)
introduce(ErnieModel, hf.ErnieConfig)
