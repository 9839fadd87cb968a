"""CamemBERT: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from transformers.models.camembert import modeling_camembert as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS, know
from .family import base_model, bert_like, embeddings, encoder, head, introduce, layer, lm_head, masked_lm

__all__ = [
    "CamembertForCausalLM",
    "CamembertForMaskedLM",
    "CamembertForMultipleChoice",
    "CamembertForQuestionAnswering",
    "CamembertForSequenceClassification",
    "CamembertForTokenClassification",
    "CamembertModel",
]

CamembertEmbeddings = embeddings(hf.CamembertEmbeddings, __name__)
CamembertLayer = layer(hf.CamembertLayer, __name__, bert_like(hf, "Camembert"))
CamembertEncoder = encoder(hf.CamembertEncoder, __name__)
CamembertModel = base_model(hf.CamembertModel, __name__, CamembertEmbeddings)
CamembertForCausalLM = head(hf.CamembertForCausalLM, __name__)
CamembertForMaskedLM = masked_lm(hf.CamembertForMaskedLM, __name__, lm_head)
CamembertForMultipleChoice = head(hf.CamembertForMultipleChoice, __name__)
CamembertForQuestionAnswering = head(hf.CamembertForQuestionAnswering, __name__)
CamembertForSequenceClassification = head(hf.CamembertForSequenceClassification, __name__)
CamembertForTokenClassification = head(hf.CamembertForTokenClassification, __name__)

BASE = hf.CamembertModel
ENCODER = hf.CamembertEncoder
HEADS = {
    hf.CamembertForMaskedLM: LABELS,
    hf.CamembertForMultipleChoice: REAL,
    hf.CamembertForQuestionAnswering: SPANS,
    hf.CamembertForSequenceClassification: FIRST,
    hf.CamembertForTokenClassification: LABELS,
}
PARTS = (
    hf.CamembertClassificationHead,
    hf.CamembertLMHead,
    hf.CamembertPooler,
)
LOSS_HEADS = {hf.CamembertForMaskedLM: CamembertForMaskedLM}
CLASSES = {
    hf.CamembertModel: CamembertModel,
    hf.CamembertEmbeddings: CamembertEmbeddings,
    hf.CamembertLayer: CamembertLayer,
    hf.CamembertEncoder: CamembertEncoder,
}

know((hf.CamembertModel, CamembertModel), HEADS, PARTS, LOSS_HEADS)
introduce(CamembertModel, hf.CamembertConfig)
