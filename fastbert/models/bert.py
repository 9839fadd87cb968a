"""BERT: the fused classes that stand in for transformers', under the same names.

Same names because transformers and accelerate look classes up by `__name__` (which blocks not to split over devices,
what to wrap), and because a saved config records them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from ..encoder import FusedEncoder, named_arguments, plan_call, plan_label_call, plan_span_call
from ..fuse import FusedModel
from ..heads import labelled_loss, takes_labelled_rows
from ..layer import FusedEmbeddings, FusedLayer, child

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


class BertEmbeddings(FusedEmbeddings, hf.BertEmbeddings):
    """transformers' BertEmbeddings, fused."""


class BertLayer(FusedLayer, hf.BertLayer):
    """transformers' BertLayer, fused."""

    def parts(self) -> tuple[tuple[str, nn.Module, type[nn.Module]], ...]:
        """Submodules whose code the fused layer stands in for, each with the class that code is known for."""
        attention = child(self, "attention")
        return (
            ("attention", attention, hf.BertAttention),
            ("attention.self", child(attention, "self"), hf.BertSelfAttention),
            ("attention.self.dropout", child(attention, "self", "dropout"), nn.Dropout),
            ("attention.output", child(attention, "output"), hf.BertSelfOutput),
            ("attention.output.dropout", child(attention, "output", "dropout"), nn.Dropout),
            ("intermediate", child(self, "intermediate"), hf.BertIntermediate),
            ("output", child(self, "output"), hf.BertOutput),
            ("output.dropout", child(self, "output", "dropout"), nn.Dropout),
        )


class BertEncoder(FusedEncoder, hf.BertEncoder):
    """transformers' BertEncoder, fused."""


class BertModel(FusedModel, hf.BertModel):
    """transformers' BertModel, fused from construction or `from_pretrained` on; what `fuse` makes of a stock one."""

    @functools.wraps(hf.BertModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = plan_call(self, args, kwargs)
        return super().forward(*args, **kwargs)


class BertForPreTraining(FusedModel, hf.BertForPreTraining):
    """transformers' BertForPreTraining, fused from construction or `from_pretrained` on."""

    @functools.wraps(hf.BertForPreTraining.forward)
    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = named_arguments(hf.BertForPreTraining, args, kwargs)
        if call.get("next_sentence_label") is None or not takes_labelled_rows(self, call):
            return super().forward(*args, **kwargs)
        labels, next_sentence_label = call.pop("labels"), call.pop("next_sentence_label")
        outputs = self.bert(**call)
        order = self.cls.seq_relationship(outputs.pooler_output)
        order_loss = nn.functional.cross_entropy(order.view(-1, 2), next_sentence_label.view(-1))
        return hf.BertForPreTrainingOutput(
            loss=labelled_loss(self.cls.predictions, outputs.last_hidden_state, labels) + order_loss,
            seq_relationship_logits=order,
            hidden_states=outputs.hidden_states,
        )


class BertForMaskedLM(FusedModel, hf.BertForMaskedLM):
    """transformers' BertForMaskedLM, fused from construction or `from_pretrained` on."""

    @functools.wraps(hf.BertForMaskedLM.forward)
    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = named_arguments(hf.BertForMaskedLM, args, kwargs)
        if not takes_labelled_rows(self, call):
            return super().forward(*args, **kwargs)
        labels = call.pop("labels")
        outputs = self.bert(**call)
        loss = labelled_loss(self.cls.predictions, outputs.last_hidden_state, labels)
        return hf.MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states)


# What `fastbert.fuse` asks of a family: the base model it looks for and its encoder, which class takes the place of
# which, the heads that can give their loss alone, and the hook of every head whose loss is taken over tokens; None:
# what its loss reads can't be told on.
BASE = hf.BertModel
ENCODER = hf.BertEncoder
CLASSES = {
    hf.BertModel: BertModel,
    hf.BertEmbeddings: BertEmbeddings,
    hf.BertLayer: BertLayer,
    hf.BertEncoder: BertEncoder,
}
LOSS_HEADS = {
    hf.BertForPreTraining: BertForPreTraining,
    hf.BertForMaskedLM: BertForMaskedLM,
}
HEADS = {
    hf.BertForPreTraining: plan_label_call,
    hf.BertForMaskedLM: plan_label_call,
    hf.BertForTokenClassification: plan_label_call,
    hf.BertLMHeadModel: None,
    hf.BertForQuestionAnswering: plan_span_call,
}


class BertLMHeadModel(FusedModel, hf.BertLMHeadModel):
    """transformers' BertLMHeadModel, fused unless it is a decoder (config.is_decoder), which runs stock."""


class BertForNextSentencePrediction(FusedModel, hf.BertForNextSentencePrediction):
    """transformers' BertForNextSentencePrediction, fused from construction or `from_pretrained` on."""


class BertForSequenceClassification(FusedModel, hf.BertForSequenceClassification):
    """transformers' BertForSequenceClassification, fused from construction or `from_pretrained` on."""


class BertForMultipleChoice(FusedModel, hf.BertForMultipleChoice):
    """transformers' BertForMultipleChoice, fused from construction or `from_pretrained` on."""


class BertForTokenClassification(FusedModel, hf.BertForTokenClassification):
    """transformers' BertForTokenClassification, fused from construction or `from_pretrained` on."""


class BertForQuestionAnswering(FusedModel, hf.BertForQuestionAnswering):
    """transformers' BertForQuestionAnswering, fused from construction or `from_pretrained` on."""


# transformers records hidden states only of classes it has seen constructed, and a model that `fuse` or unpickling made
# a BertModel of this module was not constructed as one.
with torch.device("meta"):
    BertModel(
        BertConfig(vocab_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    )
