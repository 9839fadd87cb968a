"""BERT."""

from __future__ import annotations

from transformers.models.bert import modeling_bert as hf

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
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
]

BertEmbeddings = embeddings(hf.BertEmbeddings, __name__)
BertLayer = layer(hf.BertLayer, __name__, bert_like(hf, "Bert"))
BertEncoder = encoder(hf.BertEncoder, __name__)
BertModel = base_model(hf.BertModel, __name__, BertEmbeddings)
BertForMaskedLM = masked_lm(hf.BertForMaskedLM, __name__, predictions)
BertForMultipleChoice = head(hf.BertForMultipleChoice, __name__)
BertForNextSentencePrediction = head(hf.BertForNextSentencePrediction, __name__)
BertForPreTraining = pre_training(hf.BertForPreTraining, __name__, hf.BertForPreTrainingOutput)
BertForQuestionAnswering = head(hf.BertForQuestionAnswering, __name__)
BertForSequenceClassification = head(hf.BertForSequenceClassification, __name__)
BertForTokenClassification = head(hf.BertForTokenClassification, __name__)
BertLMHeadModel = head(hf.BertLMHeadModel, __name__)

BASE = hf.BertModel
ENCODER = hf.BertEncoder
HEADS = {
    hf.BertForMaskedLM: LABELS,
    hf.BertForMultipleChoice: REAL,
    hf.BertForNextSentencePrediction: REAL,
    hf.BertForPreTraining: LABELS,
    hf.BertForQuestionAnswering: SPANS,
    hf.BertForSequenceClassification: REAL,
    hf.BertForTokenClassification: LABELS,
}
PARTS = (
    hf.BertLMPredictionHead,
    hf.BertOnlyMLMHead,
    hf.BertOnlyNSPHead,
    hf.BertPooler,
    hf.BertPreTrainingHeads,
    hf.BertPredictionHeadTransform,
)
LOSS_HEADS = {
    hf.BertForMaskedLM: BertForMaskedLM,
    hf.BertForPreTraining: BertForPreTraining,
}
CLASSES = {
    hf.BertModel: BertModel,
    hf.BertEmbeddings: BertEmbeddings,
    hf.BertLayer: BertLayer,
    hf.BertEncoder: BertEncoder,
}

know((hf.BertModel, BertModel), HEADS, PARTS, LOSS_HEADS)
introduce(BertModel, hf.BertConfig)
