"""What every half of a layer reads alike: its LayerNorm, and the rate of its dropout."""

from __future__ import annotations

from typing import Any

import torch

from .gemm import Norm, Path, child


def norm_of(module: Any) -> Norm:
    """A plain nn.LayerNorm's weight, bias (zeros where it has none) and eps."""
    weight, bias = module.weight, module.bias
    return Norm(weight, torch.zeros_like(weight) if bias is None else bias, module.eps)


def rate_of(layer: Any, path: Path | None) -> float:
    """The rate at which the dropout there now drops; 0 where there is none."""
    dropout = None if path is None else child(layer, *path)
    return float(dropout.p) if dropout is not None and dropout.training else 0.0
