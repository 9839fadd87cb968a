"""What every half of a layer reads alike: its LayerNorm, and the rate of its dropout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime import known
from ..runtime.support import is_hooked, named
from .gemm import Norm, Path, child


class RmsNorm(NamedTuple):
    """A norm that divides by the root of the mean of squares, and adds nothing."""

    weight: Tensor
    eps: float


def _zeros_like(weight: Tensor) -> Tensor:
    """Zeros for any forward, whatever mode this one runs in: they are kept with what a layer reads."""
    if torch.compiler.is_compiling():
        return torch.zeros_like(weight)
    with torch.inference_mode(False), _disable_current_modes():
        return torch.zeros_like(weight)


def norm_of(module: Any) -> Norm | RmsNorm | None:
    """A plain norm's weight, bias (zeros where a LayerNorm has none) and eps; None where it is an nn.Identity."""
    if isinstance(module, nn.Identity):
        return None
    weight = module.weight
    if "bias" not in module._parameters:
        return RmsNorm(weight, module.variance_epsilon)  # as transformers' have it
    bias = module.bias
    eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon  # as DeBERTa v1 calls it
    return Norm(weight, _zeros_like(weight) if bias is None else bias, eps)


def rate_of(layer: nn.Module, path: Path | None) -> float:
    """The rate at which the dropout there now drops, a module's or an attribute; 0 where there is none."""
    if path is None:
        return 0.0
    holder = child(layer, *path[:-1])
    dropout = holder.__dict__["_modules"].get(path[-1])
    if dropout is not None:
        return float(dropout.p) if dropout.training and not isinstance(dropout, nn.Identity) else 0.0
    return float(getattr(holder, path[-1])) if holder.training else 0.0


def part_is_replaced(place: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why what stands at a place of a layer computes something else than a `kind`, by its code."""
    if type(module) is not kind:
        return f"{place} is a {named(module)}"
    if is_hooked(module):
        return f"{place} has hooks"
    name = known.replaced_on(module, kind)
    return None if name is None else f"{place}.{name} has been replaced"


def dropouts_at(layer: nn.Module, paths: Iterable[Path | None]) -> Iterator[tuple[Path, nn.Module, type[nn.Module]]]:
    """(path, submodule, class) of those paths at which there is a module, not a rate alone: an nn.Dropout, or none."""
    for path in paths:
        if path is not None:
            dropout = getattr(child(layer, *path[:-1]), path[-1])
            if isinstance(dropout, nn.Module):
                yield path, dropout, nn.Identity if isinstance(dropout, nn.Identity) else nn.Dropout
