"""XLM-RoBERTa: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from ..encoder import plan_first_call, plan_label_call, plan_span_call
from .family import base_model, bert_like, embeddings, encoder, head, introduce, layer, lm_head, masked_lm

__all__ = [
    "XLMRobertaForCausalLM",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForMultipleChoice",
    "XLMRobertaForQuestionAnswering",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "XLMRobertaModel",
]

XLMRobertaEmbeddings = embeddings(hf.XLMRobertaEmbeddings, __name__)
XLMRobertaLayer = layer(hf.XLMRobertaLayer, __name__, bert_like(hf, "XLMRoberta"))
XLMRobertaEncoder = encoder(hf.XLMRobertaEncoder, __name__)
XLMRobertaModel = base_model(hf.XLMRobertaModel, __name__)
XLMRobertaForCausalLM = head(hf.XLMRobertaForCausalLM, __name__)
XLMRobertaForMaskedLM = masked_lm(hf.XLMRobertaForMaskedLM, __name__, lm_head)
XLMRobertaForMultipleChoice = head(hf.XLMRobertaForMultipleChoice, __name__)
XLMRobertaForQuestionAnswering = head(hf.XLMRobertaForQuestionAnswering, __name__)
XLMRobertaForSequenceClassification = head(hf.XLMRobertaForSequenceClassification, __name__)
XLMRobertaForTokenClassification = head(hf.XLMRobertaForTokenClassification, __name__)

BASE = hf.XLMRobertaModel
ENCODER = hf.XLMRobertaEncoder
HEADS = {
    hf.XLMRobertaForCausalLM: None,
    hf.XLMRobertaForMaskedLM: plan_label_call,
    hf.XLMRobertaForTokenClassification: plan_label_call,
    hf.XLMRobertaForQuestionAnswering: plan_span_call,
    hf.XLMRobertaForSequenceClassification: plan_first_call,
}
LOSS_HEADS = {hf.XLMRobertaForMaskedLM: XLMRobertaForMaskedLM}
CLASSES = {
    hf.XLMRobertaModel: XLMRobertaModel,
    hf.XLMRobertaEmbeddings: XLMRobertaEmbeddings,
    hf.XLMRobertaLayer: XLMRobertaLayer,
    hf.XLMRobertaEncoder: XLMRobertaEncoder,
}

introduce(XLMRobertaModel, hf.XLMRobertaConfig)
