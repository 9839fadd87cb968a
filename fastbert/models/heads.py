"""Losses of a fused model's heads: over the vocabulary, from the labelled tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import ops
from ..runtime import known
from ..runtime.readers import readings
from ..runtime.registry import encoder_of, family_of
from ..runtime.support import foreign_code, is_asked, is_hooked, is_plain, needs_stock


class Vocabulary(NamedTuple):
    """What a masked language model computes from hidden states: a transform of each row, then a linear layer."""

    transform: Callable[[Tensor], Tensor]
    decoder: nn.Module
    modules: tuple[nn.Module, ...] = ()
    """Those in between, which are not called where the loss is taken alone, or with labelled rows."""
    loss: nn.Module | None = None
    """What the head takes its loss by, where that is a module of its own."""
    bias: Tensor | None = None
    """Of the linear layer, where that is not its own."""


def takes_labelled_rows(model: PreTrainedModel, vocabulary: Vocabulary, call: Mapping[str, object]) -> bool:
    """Whether a call of a masked language model is to return its loss alone (`fuse(loss_only=True)`), and can.

    Args:
        model: a head over a base model.
        vocabulary: its vocabulary head.
        call: its arguments by name.
    """
    settings = getattr(encoder_of(model.base_model), "fastbert", None)
    if settings is None or not settings.loss_only or call.get("labels") is None or torch.compiler.is_compiling():
        return False
    if any(call.get(name) is not None for name in known.LOSS_ARGUMENTS) or known.loss_is_replaced(model):
        return False  # another loss than `labelled_loss`
    code = family_of(model.base_model).code.__name__
    stock = next(kind for kind in type(model).__mro__ if kind.__module__ == code)
    if not known.is_stock_class(stock, stock.__module__) or foreign_code(model.base_model) is not None:
        return False  # somebody has replaced code of the head, or what it calls
    if vocabulary.loss is not None and not _is_the_mean(vocabulary.loss):
        return False
    if any(readings(module).unknown is not None for module in vocabulary.modules):
        return False  # something in there may need every row
    if any(map(is_hooked, vocabulary.modules)) or not is_plain(vocabulary.decoder, nn.Linear):
        return False
    if needs_stock(vocabulary.decoder.weight):  # type: ignore[arg-type]
        return False
    return not is_asked(model, call, "output_attentions")


def _is_the_mean(loss: nn.Module) -> bool:
    """Whether a loss is that of `labelled_loss`."""
    if type(loss) is not nn.CrossEntropyLoss or is_hooked(loss):
        return False
    return (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing) == (None, -100, "mean", 0.0)


def labelled_loss(vocabulary: Vocabulary, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over tokens whose label is not -100, as the stock head has it, without the other logits.

    Args:
        vocabulary: a vocabulary head.
        hidden_states: (B, S, H).
        labels: (B, S) int64, -100 where a token has none; what they are costs one host synchronisation.

    Returns:
        A scalar in float32, NaN where no token is labelled.

    Raises:
        ValueError: labels of another shape.
    """
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(hidden_states.shape[:2])}")
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    x = vocabulary.transform(hidden_states.flatten(0, 1)[rows])
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    decoder: Any = vocabulary.decoder
    bias = decoder.bias if vocabulary.bias is None else vocabulary.bias
    losses, _ = ops.linear_cross_entropy(x, decoder.weight, bias, labels.flatten()[rows])
    return losses.mean()
