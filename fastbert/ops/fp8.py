"""Inference in FP8 (e4m3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import operator


@operator("quantize_fp8")
def quantize_fp8(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """x (T, H) in units of `scale`, or of one of each row's own, in FP8; and those of the rows.

    Args:
        x: (T, H), any floating dtype.
        scale: of all rows; what is beyond 448 of it is saturated. None: for each row that in which
            its largest magnitude is 448, or, where it is below 1e-30, that is.

    Returns:
        (T, H) float8_e4m3fn, NaN where x is not finite; and the scales of the rows, (T,) float32, or (0,) where `scale`
        is given.
    """
    row_scale = x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), row_scale


@operator("quantize_fp8")
def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_fp8` of that."""
    row_scale = x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float8_e4m3fn), row_scale


@operator("attention")
def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    tiles: Tensor | None,
    out_scale: float,
) -> Tensor:
    """`attention(...)`, rounded to its dtype, in units of `out_scale` as float8_e4m3fn, saturated.

    Returns:
        (T, heads, head_dim), contiguous: bitwise what `quantize_fp8` makes of attention's result, by `out_scale`.
    """
    return q.new_empty(q.shape, dtype=torch.float8_e4m3fn)


@operator("linear_fp8")
def linear_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x @ weight.T) * row_scale[:, None] * col_scale + bias`, in float32 or better, rounded to `dtype`.

    Args:
        x: (T, K) float8_e4m3fn, K a multiple of 16.
        row_scale: (T,) float32; or (0,) or None: none.
        weight: (N, K) float8_e4m3fn.
        col_scale: (N,) float32: scales of the weight's rows, times that of x where all rows of x share one.
        bias: (N,), any dtype; or None.
        dtype: of the result.

    Returns:
        (T, N).
    """
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@operator("linear_fp8")
def linear_gelu_fp8(
    x: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    scale: float | None,
) -> Tensor:
    """`gelu(linear_fp8(...))`, by torch.nn.functional.gelu's `approximate`, "none" or "tanh" -> (T, N).

    With a `scale`, in units of it as float8_e4m3fn, saturated; else in `dtype`.
    """
    out = dtype if scale is None else torch.float8_e4m3fn
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out)


@operator("linear_fp8")
def linear_add_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """`linear_fp8(...) + residual`, residual (T, N), in the dtype of the residual, rounded once -> (T, N)."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=residual.dtype)
