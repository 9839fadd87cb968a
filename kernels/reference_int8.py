"""Plain-PyTorch twins of the int8 kernels: the same signatures, the same quantized numbers. Shapes and dtypes are
documented at the operators of those names, in fastbert/ops.

They are the oracle: integers are multiplied and added up exactly, in float64, and rounded once to float32, or not at
all where a result in float64 is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import layer_norm

STEPS = 254.99
"""Of a row from its least to its largest number: with 0 among them, and each rounded, at most 255."""


def row_scales(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, its inverse, what stands for 0) of rows between `low` and `high`, float32; NaN where not finite."""
    low = low.clamp(max=0)
    reach = high.clamp(min=0).sub_(low)
    reach = reach.add_(reach - reach).clamp_(min=1e-30)  # infinity less itself is NaN
    inverse = reach.reciprocal().mul_(STEPS)
    return reach.div_(STEPS), inverse, low.mul_(inverse).round_().add_(128).neg_()


def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K), its columns times `factors`, in int8; scales of the rows (T,), and what stands for 0 in them, (T,)."""
    x = x.float() if factors is None else x.float() * factors
    scale, inverse, zero = row_scales(x.amin(1), x.amax(1))
    values = (x * inverse[:, None]).round_().add_(zero[:, None])
    return values.nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), scale, zero.nan_to_num_(0.0).to(torch.int32)


def layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_int8` of that."""
    normal = layer_norm(x, weight, bias, eps)
    return normal, *quantize_int8(normal, factors)


def _affine(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The GEMM in float32, or float64 where that is asked for: a new tensor, for an epilogue to change in place."""
    total = torch.mm(x.double(), weight.double().t()).sub_(row_zero.double()[:, None] * col_sum.double())
    out = total.to(torch.promote_types(dtype, torch.float32)).mul_(col_scale).mul_(row_scale[:, None])
    return out if bias is None else out.add_(bias)


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
    """`((x - row_zero[:, None]) @ weight.T) * col_scale * row_scale[:, None] + bias`, rounded to `dtype`: (T, N)."""
    return _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias, dtype).to(dtype)


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
    out = _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias, dtype)
    return F.gelu(out, approximate=approximate).to(dtype)


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
    raised = linear_gelu_int8(x, row_scale, row_zero, weight, col_scale, col_sum, bias, dtype, approximate)
    return quantize_int8(raised, factors)


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
    out = _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias, residual.dtype)
    return out.add_(residual).to(residual.dtype)
