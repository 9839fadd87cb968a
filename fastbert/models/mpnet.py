"""MPNet: BERT's layers under other names; attention adds a bias by the distance of key and query, one for all layers.

Inference runs fused; training, autocast and hidden states run stock. Its model hands no arguments of ours on, so that
the fused one has a forward of its own, and heads can't tell what they read: under padding="auto" they are dense.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from ..layers.layer import Shape
from ..runtime.encoder import Plan, plan_call
from ..runtime.readers import REAL, know, parameter_names
from .family import base_model, encoder, head, introduce, layer

__all__ = [
    "MPNetForMaskedLM",
    "MPNetForMultipleChoice",
    "MPNetForQuestionAnswering",
    "MPNetForSequenceClassification",
    "MPNetForTokenClassification",
    "MPNetModel",
]

_SHAPE = Shape(
    attention=("attention", "attn"),
    query=("attention", "attn", "q"),
    key=("attention", "attn", "k"),
    value=("attention", "attn", "v"),
    context=("attention", "attn", "o"),
    context_dropout=("attention", "dropout"),
    context_norm=("attention", "LayerNorm"),
)
_KINDS = {
    ("attention",): hf.MPNetAttention,
    ("attention", "attn"): hf.MPNetSelfAttention,
    ("intermediate",): hf.MPNetIntermediate,
    ("output",): hf.MPNetOutput,
}


def _relative_bias(self: Any, length: int) -> Tensor:
    distances = torch.arange(1 - length, length)
    buckets = self.relative_position_bucket(distances)  # of 32, whatever the config says: so has stock
    found: Tensor = self.relative_attention_bias(buckets.to(self.relative_attention_bias.weight.device))
    return found.t().float().contiguous()


@functools.wraps(hf.MPNetModel.forward)
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = plan_call(self, parameter_names(hf.MPNetModel), args, kwargs)
    plan = kwargs.pop("plan", None)
    if not isinstance(plan, Plan):
        settings = getattr(self.encoder, "fastbert", None)
        if plan is not None and settings is not None:
            settings.counts.add(settings.counts.stock, plan)
        return hf.MPNetModel.forward(self, *args, **kwargs)
    given = {name: kwargs.get(name) for name in ("input_ids", "position_ids", "inputs_embeds")}
    hidden = self.encoder(self.embeddings(**given), plan=plan).last_hidden_state
    pooled = None if self.pooler is None else self.pooler(hidden)
    whole = kwargs.get("return_dict")
    if not (self.config.return_dict if whole is None else whole):
        return hidden, pooled
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


MPNetLayer = layer(hf.MPNetLayer, __name__, _KINDS, _SHAPE)
MPNetEncoder = encoder(hf.MPNetEncoder, __name__, output=BaseModelOutput, relative=True, relative_bias=_relative_bias)
MPNetModel = base_model(hf.MPNetModel, __name__, hf.MPNetEmbeddings, _forward)
MPNetForMaskedLM = head(hf.MPNetForMaskedLM, __name__)
MPNetForMultipleChoice = head(hf.MPNetForMultipleChoice, __name__)
MPNetForQuestionAnswering = head(hf.MPNetForQuestionAnswering, __name__)
MPNetForSequenceClassification = head(hf.MPNetForSequenceClassification, __name__)
MPNetForTokenClassification = head(hf.MPNetForTokenClassification, __name__)

BASE = hf.MPNetModel
ENCODER = hf.MPNetEncoder
HEADS = {
    hf.MPNetForMultipleChoice: REAL,
}
PARTS = (hf.MPNetPooler,)
LOSS_HEADS: dict[Any, Any] = {}
CLASSES = {
    hf.MPNetModel: MPNetModel,
    hf.MPNetLayer: MPNetLayer,
    hf.MPNetEncoder: MPNetEncoder,
}

know((hf.MPNetModel, MPNetModel), HEADS, PARTS, LOSS_HEADS)
introduce(MPNetModel, hf.MPNetConfig, probes=False)
