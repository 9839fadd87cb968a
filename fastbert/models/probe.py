"""What a family is tried on as it is registered: whether a plan reaches its encoder, whether fused is stock."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from ..explain import explain
from ..fuse import fuse
from ..numerics import relative_error
from ..runtime import known
from ..runtime.registry import encoder_of
from .family import Family

_TOLERANCE = 1e-4
"""Relative, in float32, where a wrong layer is off by tenths."""


def hands_nothing_on(model: Any, family: Family) -> str | None:
    """Why a base model on the meta device can't be given a plan: its stock forward keeps it from its encoder.

    None, too, where that can't be tried: then `check_taken` finds it, in a call.
    """
    seen: list[Any] = []
    hook = encoder_of(model).register_forward_pre_hook(
        lambda encoder, args, kwargs: seen.append(kwargs.get("plan")), with_kwargs=True
    )
    error: Exception | None = None
    ids = {next(iter(family.ids)): torch.zeros(1, 2, dtype=torch.int64, device="meta")}
    stock: Any = family.base
    try:
        with torch.no_grad():
            stock.forward(model, **ids, plan="of a probe")
    except Exception as raised:  # whatever it raises: it looked at values, which there are none of, or takes no names
        error = raised
    finally:
        hook.remove()
    if seen == ["of a probe"] or (not seen and not isinstance(error, TypeError)):
        return None
    kind = stock.__name__
    where = f"the {kind} of transformers {transformers.__version__}" if known.is_transformers(stock) else f"{kind}"
    why = "" if error is None else f": {error}"
    return f"{where} does not hand its keyword arguments on to its encoder{why}"


def try_family(family: Family) -> None:
    """Compares a small model with random weights fused and stock: hidden states and gradients, in both layouts.

    Raises:
        ValueError: they differ, or nothing of it runs fused.
    """
    name = family.base.__name__
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        stock: Any = family.base(family.config(**family.sizes)).float().eval()
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.dim() == 1))
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
        ids = torch.randint(1, 16, mask.shape) * mask
        # A LayerNorm's sum over a row says nothing of the row.
        weights = torch.randn(stock.config.hidden_size) * mask[..., None]
        expected, gradients = _results(stock, family, ids, mask, weights)
        for padding in ("packed", "dense"):
            fused = fuse(copy.deepcopy(stock), padding=padding)
            found, own = _results(fused, family, ids, mask, weights)
            (encoder,) = explain(fused).encoders
            if not encoder.fused_calls:
                raise ValueError(f"{name} was registered, and runs stock: {encoder.stock_calls or encoder.reason}")
            error = relative_error(found, expected.double())
            if error > _TOLERANCE:
                raise ValueError(
                    f"{name} was registered, and departs from stock: its hidden states by {error:.1e}, {padding}; "
                    f"its layout, tables or final_norm says something else than its code"
                )
            largest = max(gradient.norm().item() for gradient in gradients.values())
            for key, gradient in gradients.items():
                # Some are zero but for rounding, as that of the keys' bias.
                size = max(gradient.norm().item(), largest / 1000)
                error = ((own[key] - gradient).norm() / size).item() if key in own else 1.0
                if error > 10 * _TOLERANCE:
                    what = f"the gradient of {key} by {error:.1e}, {padding}"
                    raise ValueError(f"{name} was registered, and departs from stock: {what}")


def _results(
    model: Any, family: Family, ids: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states at real tokens, and gradients of a weighted sum of them."""
    call = {next(iter(family.ids)): ids, "attention_mask": mask}
    with torch.no_grad():
        found = model(**call)[0][mask.bool()]
    with torch.enable_grad():
        (model(**call)[0] * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    return found, gradients
