"""Inference in int8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu_int8
from .registry import operator


def int8_weight_limit(device: torch.device) -> int:
    """The largest magnitude of a weight in int8 on `device`: 127, or 64 on a CPU that saturates above."""
    return cpu_int8.weight_limit() if device.type == "cpu" else 127


def int8_packed_bytes(weight: Tensor) -> int:
    """What the CPU backend keeps of a weight beside itself."""
    return cpu_int8.packed_bytes(weight) if weight.device.type == "cpu" else 0


@operator("quantize_int8")
def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K), its columns times `factors`, as int8: each row by a scale and an offset of its own.

    A row goes from its least number, or 0, to its largest, or 0, in 255 steps; 0 is one of them.

    Args:
        x: (T, K), any floating dtype.
        factors: (K,) float32; or None: 1.

    Returns:
        values: (T, K) int8.
        row_scale: (T,) float32, the size of a step; NaN where the row is not finite.
        row_zero: (T,) int32, -128 to 127: the value that stands for 0.
    """
    row_scale, row_zero = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int32))
    return x.new_empty(x.shape, dtype=torch.int8), row_scale, row_zero


@operator("quantize_int8")
def layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_int8` of that."""
    row_scale, row_zero = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int32))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int8), row_scale, row_zero


@operator("linear_int8")
def linear_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`((x - row_zero[:, None]) @ weight.T) * col_scale * row_scale[:, None] + bias`, rounded to `dtype`.

    Integers are multiplied and added up exactly, the rest is done in float32 or better.

    Args:
        x: (T, K) int8, K a multiple of 16.
        row_scale: (T,) float32.
        row_zero: (T,) int32.
        weight: (N, K) int8, not written to while it lives: the CPU backend keeps it packed beside.
        col_scale: (N,) float32, scales of the weight's rows.
        col_sum: (N,) int32, sums of the weight's rows.
        bias: (N,), any dtype; or None.
        dtype: of the result.

    Returns:
        (T, N).
    """
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@operator("linear_int8")
def linear_gelu_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
) -> Tensor:
    """`gelu(linear_int8(...))`, by torch.nn.functional.gelu's `approximate`, "none" or "tanh" -> (T, N)."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@operator("linear_int8")
def linear_gelu_quantize_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_int8(linear_gelu_int8(...), factors)`, factors (N,): (T, N) int8, and (T,) and (T,) of its rows."""
    row_scale, row_zero = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int32))
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.int8), row_scale, row_zero


@operator("linear_int8")
def linear_add_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """`linear_int8(...) + residual`, residual (T, N), in the dtype of the residual, rounded once -> (T, N)."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=residual.dtype)
