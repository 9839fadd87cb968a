"""XLM-RoBERTa: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS, know
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
XLMRobertaModel = base_model(hf.XLMRobertaModel, __name__, XLMRobertaEmbeddings)
XLMRobertaForCausalLM = head(hf.XLMRobertaForCausalLM, __name__)
XLMRobertaForMaskedLM = masked_lm(hf.XLMRobertaForMaskedLM, __name__, lm_head)
XLMRobertaForMultipleChoice = head(hf.XLMRobertaForMultipleChoice, __name__)
XLMRobertaForQuestionAnswering = head(hf.XLMRobertaForQuestionAnswering, __name__)
XLMRobertaForSequenceClassification = head(hf.XLMRobertaForSequenceClassification, __name__)
XLMRobertaForTokenClassification = head(hf.XLMRobertaForTokenClassification, __name__)

BASE = hf.XLMRobertaModel
ENCODER = hf.XLMRobertaEncoder
HEADS = {
    hf.XLMRobertaForMaskedLM: LABELS,
    hf.XLMRobertaForMultipleChoice: REAL,
    hf.XLMRobertaForQuestionAnswering: SPANS,
    hf.XLMRobertaForSequenceClassification: FIRST,
    hf.XLMRobertaForTokenClassification: LABELS,
}
PARTS = (
    hf.XLMRobertaClassificationHead,
    hf.XLMRobertaLMHead,
    hf.XLMRobertaPooler,
)
LOSS_HEADS = {hf.XLMRobertaForMaskedLM: XLMRobertaForMaskedLM}
CLASSES = {
    hf.XLMRobertaModel: XLMRobertaModel,
    hf.XLMRobertaEmbeddings: XLMRobertaEmbeddings,
    hf.XLMRobertaLayer: XLMRobertaLayer,
    hf.XLMRobertaEncoder: XLMRobertaEncoder,
}

know((hf.XLMRobertaModel, XLMRobertaModel), HEADS, PARTS, LOSS_HEADS)
introduce(XLMRobertaModel, hf.XLMRobertaConfig)
