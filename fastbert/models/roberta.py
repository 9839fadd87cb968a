"""RoBERTa: BERT's layers after renaming; positions start after the padding's and count real tokens."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta as hf

from ..runtime.readers import FIRST, LABELS, REAL, SPANS, know
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
RobertaModel = base_model(hf.RobertaModel, __name__, RobertaEmbeddings)
RobertaForCausalLM = head(hf.RobertaForCausalLM, __name__)
RobertaForMaskedLM = masked_lm(hf.RobertaForMaskedLM, __name__, lm_head)
RobertaForMultipleChoice = head(hf.RobertaForMultipleChoice, __name__)
RobertaForQuestionAnswering = head(hf.RobertaForQuestionAnswering, __name__)
RobertaForSequenceClassification = head(hf.RobertaForSequenceClassification, __name__)
RobertaForTokenClassification = head(hf.RobertaForTokenClassification, __name__)

BASE = hf.RobertaModel
ENCODER = hf.RobertaEncoder
HEADS = {
    hf.RobertaForMaskedLM: LABELS,
    hf.RobertaForMultipleChoice: REAL,
    hf.RobertaForQuestionAnswering: SPANS,
    hf.RobertaForSequenceClassification: FIRST,
    hf.RobertaForTokenClassification: LABELS,
}
PARTS = (
    hf.RobertaClassificationHead,
    hf.RobertaLMHead,
    hf.RobertaPooler,
)
LOSS_HEADS = {hf.RobertaForMaskedLM: RobertaForMaskedLM}
CLASSES = {
    hf.RobertaModel: RobertaModel,
    hf.RobertaEmbeddings: RobertaEmbeddings,
    hf.RobertaLayer: RobertaLayer,
    hf.RobertaEncoder: RobertaEncoder,
}

know((hf.RobertaModel, RobertaModel), HEADS, PARTS, LOSS_HEADS)
introduce(RobertaModel, hf.RobertaConfig)
