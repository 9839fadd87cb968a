"""RoBERTa: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta as hf

from ..encoder import plan_first_call, plan_label_call, plan_span_call
from .family import base_model, bert_like, embeddings, encoder, head, introduce, layer, lm_head, masked_lm

__all__ = [
    "RobertaForCausalLM",
    "RobertaForMaskedLM",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaModel",
]

RobertaEmbeddings = embeddings(hf.RobertaEmbeddings, __name__)
RobertaLayer = layer(hf.RobertaLayer, __name__, bert_like(hf, "Roberta"))
RobertaEncoder = encoder(hf.RobertaEncoder, __name__)
RobertaModel = base_model(hf.RobertaModel, __name__)
RobertaForCausalLM = head(hf.RobertaForCausalLM, __name__)
RobertaForMaskedLM = masked_lm(hf.RobertaForMaskedLM, __name__, lm_head)
RobertaForMultipleChoice = head(hf.RobertaForMultipleChoice, __name__)
RobertaForQuestionAnswering = head(hf.RobertaForQuestionAnswering, __name__)
RobertaForSequenceClassification = head(hf.RobertaForSequenceClassification, __name__)
RobertaForTokenClassification = head(hf.RobertaForTokenClassification, __name__)

BASE = hf.RobertaModel
ENCODER = hf.RobertaEncoder
HEADS = {
    hf.RobertaForCausalLM: None,
    hf.RobertaForMaskedLM: plan_label_call,
    hf.RobertaForTokenClassification: plan_label_call,
    hf.RobertaForQuestionAnswering: plan_span_call,
    hf.RobertaForSequenceClassification: plan_first_call,
}
LOSS_HEADS = {hf.RobertaForMaskedLM: RobertaForMaskedLM}
CLASSES = {
    hf.RobertaModel: RobertaModel,
    hf.RobertaEmbeddings: RobertaEmbeddings,
    hf.RobertaLayer: RobertaLayer,
    hf.RobertaEncoder: RobertaEncoder,
}

introduce(RobertaModel, hf.RobertaConfig)
