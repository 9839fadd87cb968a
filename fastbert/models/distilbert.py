"""DistilBERT: BERT's arithmetic under other names, with one dropout fewer, no types of tokens and no pooler."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from ..layers.layer import Shape
from ..runtime.readers import FIRST, LABELS, SPANS, know
from .family import base_model, encoder, head, introduce, layer, masked_lm
from .heads import Vocabulary

__all__ = [
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
]

_SHAPE = Shape(
    attention=("attention",),
    query=("attention", "q_lin"),
    key=("attention", "k_lin"),
    value=("attention", "v_lin"),
    context=("attention", "out_lin"),
    context_dropout=None,
    context_norm=("sa_layer_norm",),
    up=("ffn", "lin1"),
    activation=("ffn", "activation"),
    down=("ffn", "lin2"),
    down_dropout=("ffn", "dropout"),
    down_norm=("output_layer_norm",),
    chunk=("ffn", "ff_chunk"),
)


def _vocabulary(model: Any) -> Vocabulary:
    return Vocabulary(
        lambda x: model.vocab_layer_norm(model.activation(model.vocab_transform(x))), model.vocab_projector
    )


TransformerBlock = layer(
    hf.TransformerBlock, __name__, {("attention",): hf.DistilBertSelfAttention, ("ffn",): hf.FFN}, _SHAPE
)
Transformer = encoder(hf.Transformer, __name__, output=BaseModelOutput)
DistilBertModel = base_model(hf.DistilBertModel, __name__, hf.Embeddings)
DistilBertForMaskedLM = masked_lm(hf.DistilBertForMaskedLM, __name__, _vocabulary)
DistilBertForMultipleChoice = head(hf.DistilBertForMultipleChoice, __name__)
DistilBertForQuestionAnswering = head(hf.DistilBertForQuestionAnswering, __name__)
DistilBertForSequenceClassification = head(hf.DistilBertForSequenceClassification, __name__)
DistilBertForTokenClassification = head(hf.DistilBertForTokenClassification, __name__)

BASE = hf.DistilBertModel
ENCODER = hf.Transformer
HEADS = {
    hf.DistilBertForMaskedLM: LABELS,
    hf.DistilBertForMultipleChoice: FIRST,
    hf.DistilBertForQuestionAnswering: SPANS,
    hf.DistilBertForSequenceClassification: FIRST,
    hf.DistilBertForTokenClassification: LABELS,
}
PARTS = ()
LOSS_HEADS = {hf.DistilBertForMaskedLM: DistilBertForMaskedLM}
CLASSES = {
    hf.DistilBertModel: DistilBertModel,
    hf.TransformerBlock: TransformerBlock,
    hf.Transformer: Transformer,
}

know((hf.DistilBertModel, DistilBertModel), HEADS, PARTS, LOSS_HEADS)
introduce(DistilBertModel, hf.DistilBertConfig)
