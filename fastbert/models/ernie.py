"""ERNIE: BERT's layers after renaming; types of tasks may be embedded, too (config.use_task_id)."""

from __future__ import annotations

from transformers.models.ernie import modeling_ernie as hf

from ..encoder import plan_label_call, plan_span_call
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
ErnieModel = base_model(hf.ErnieModel, __name__)
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
    hf.ErnieForPreTraining: plan_label_call,
    hf.ErnieForMaskedLM: plan_label_call,
    hf.ErnieForTokenClassification: plan_label_call,
    hf.ErnieForQuestionAnswering: plan_span_call,
    hf.ErnieForCausalLM: None,
}
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

introduce(ErnieModel, hf.ErnieConfig)
