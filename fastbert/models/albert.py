"""ALBERT: layers that are shared, in groups; embeddings narrower than layers, projected by the encoder."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert as hf

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.readers import LABELS, REAL, SPANS
from .classes import register
from .family import Family, Given
from .heads import Vocabulary

_LINEARS: Given = {name: ("attention", name) for name in ("query", "key", "value")}
_LAYOUT = Layer(
    Attention(
        module=("attention",),
        **_LINEARS,
        output=("attention", "dense"),
        output_dropout=("attention", "output_dropout"),
        norm=("attention", "LayerNorm"),
        dropout="attention_dropout",
        kinds={("attention",): hf.AlbertAttention},
    ),
    FeedForward(
        up=("ffn",),
        activation=("activation",),
        down=("ffn_output",),
        down_dropout=None,  # its `dropout` is never called
        norm=("full_layer_layer_norm",),
    ),
)


def _order(encoder: hf.AlbertTransformer) -> list[str]:
    groups, config = encoder.albert_layer_groups, encoder.config
    called = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return [f"{i}.albert_layers.{j}" for i in called for j in range(len(groups[i].albert_layers))]


def _vocabulary(model: PreTrainedModel) -> Vocabulary:
    found = model.predictions
    return Vocabulary(lambda x: found.LayerNorm(found.activation(found.dense(x))), found.decoder, (found,))


FAMILY = register(
    Family(
        hf,
        hf.AlbertModel,
        hf.AlbertTransformer,
        hf.AlbertLayer,
        _LAYOUT,
        hf.AlbertEmbeddings,
        hf.AlbertConfig,
        fuses_embeddings=True,
        stack=("encoder", "albert_layer_groups"),
        order=_order,
        group=hf.AlbertLayerGroup,
        projection="embedding_hidden_mapping_in",
        output=BaseModelOutput,
        heads={
            hf.AlbertForMaskedLM: LABELS,
            hf.AlbertForMultipleChoice: REAL,
            hf.AlbertForPreTraining: LABELS,
            hf.AlbertForQuestionAnswering: SPANS,
            hf.AlbertForSequenceClassification: REAL,
            hf.AlbertForTokenClassification: LABELS,
        },
        parts=(hf.AlbertMLMHead, hf.AlbertSOPHead),
        vocabularies={hf.AlbertForMaskedLM: _vocabulary},
        sizes={
            **{"vocab_size": 16, "embedding_size": 32, "hidden_size": 48, "intermediate_size": 64, "pad_token_id": 0},
            **{"num_hidden_layers": 3, "num_hidden_groups": 2, "num_attention_heads": 3},
        },
    ),
    __name__,
)
