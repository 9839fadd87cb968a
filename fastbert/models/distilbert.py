"""DistilBERT: BERT's arithmetic under other names, with one dropout fewer, no types of tokens and no pooler."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.readers import FIRST, LABELS, SPANS
from .classes import register
from .family import Family
from .heads import Vocabulary

_LAYOUT = Layer(
    Attention(
        module=("attention",),
        query=("attention", "q_lin"),
        key=("attention", "k_lin"),
        value=("attention", "v_lin"),
        output=("attention", "out_lin"),
        output_dropout=None,
        norm=("sa_layer_norm",),
        kinds={("attention",): hf.DistilBertSelfAttention},
    ),
    FeedForward(
        up=("ffn", "lin1"),
        activation=("ffn", "activation"),
        down=("ffn", "lin2"),
        down_dropout=("ffn", "dropout"),
        norm=("output_layer_norm",),
        kinds={("ffn",): hf.FFN},
    ),
)


def _vocabulary(model: PreTrainedModel) -> Vocabulary:
    parts = model.vocab_transform, model.activation, model.vocab_layer_norm
    return Vocabulary(lambda x: parts[2](parts[1](parts[0](x))), model.vocab_projector, parts, model.mlm_loss_fct)


FAMILY = register(
    Family(
        hf,
        hf.DistilBertModel,
        hf.Transformer,
        hf.TransformerBlock,
        _LAYOUT,
        hf.Embeddings,
        hf.DistilBertConfig,
        stack=("transformer", "layer"),
        output=BaseModelOutput,
        heads={
            hf.DistilBertForMaskedLM: LABELS,
            hf.DistilBertForMultipleChoice: FIRST,
            hf.DistilBertForQuestionAnswering: SPANS,
            hf.DistilBertForSequenceClassification: FIRST,
            hf.DistilBertForTokenClassification: LABELS,
        },
        vocabularies={hf.DistilBertForMaskedLM: _vocabulary},
    ),
    __name__,
)
