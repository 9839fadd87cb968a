"""Rows in int8, with or without LayerNorm first, in one launch.

`quantize_int8` and `layer_norm_int8` are the Triton twins of the functions of those names in `reference_int8`,
documented at the operators, in fastbert/ops. One program takes one row, held in registers: its least and its largest
number cost no second pass, and a row's result depends on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, reference_int8
from .compiled import run
from .dependent import wait_for_previous
from .layer_norm import _plan, normalize

STEPS = tl.constexpr(reference_int8.STEPS)
# 1.5 * 2^23 leaves no bit for a fraction: what it is added to is rounded to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def to_integer(x, ROUND: tl.constexpr, BITS: tl.constexpr):
    """x float32, of a magnitude below 2^22, to the nearest integer, ties to even, as int32; NaN to some integer."""
    return (x + ROUND).to(tl.int32, bitcast=True) - BITS


@triton.jit(do_not_specialize=["eps"])
def quantize_int8_kernel(
    x_ptr,  # (T, width), rows stride_xm apart
    weight_ptr,  # (width,) of LayerNorm, or None: no LayerNorm
    bias_ptr,  # (width,), or None
    factors_ptr,  # (width,) float32, or None: 1
    normal_ptr,  # (T, width), contiguous: LayerNorm's result, or None
    out_ptr,  # (T, width) int8, contiguous
    scale_ptr,  # (T,) float32
    zero_ptr,  # (T,) int32
    width,
    stride_xm,
    eps,
    BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        normal = normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps).to(normal_ptr.dtype.element_ty)
        tl.store(normal_ptr + row * width + cols, normal, mask=mask)
        x = normal.to(tl.float32)  # what is quantized is the rounded row, as it is where it comes from elsewhere
    if factors_ptr is not None:
        x *= tl.load(factors_ptr + cols, mask=mask, other=0.0)
    x = tl.where(mask, x, 0.0)
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite, x, 0.0)
    low, high = tl.minimum(tl.min(x, 0), 0.0), tl.maximum(tl.max(x, 0), 0.0)
    reach = tl.maximum(high - low, 1e-30)
    inverse = tl.div_rn(STEPS, reach)
    zero = -128 - to_integer(low * inverse, _ROUND, _ROUND_BITS)
    values = to_integer(x * inverse, _ROUND, _ROUND_BITS) + zero
    odd = tl.max((~finite).to(tl.int32), 0) > 0
    tl.store(scale_ptr + row, tl.where(odd, float("nan"), tl.div_rn(reach, STEPS)))
    tl.store(zero_ptr + row, zero)
    tl.store(out_ptr + row * width + cols, values.to(tl.int8), mask=mask)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias), ("factors", factors)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; expected {(width,)} for x of shape {(rows, width)}"
            )
    out = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    normal = torch.empty((0,) if weight is None else (rows, width), dtype=x.dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    zeros = torch.empty(rows, dtype=torch.int32, device=x.device)
    if out.numel():
        arch = launch.architecture(x.device)
        constants = _plan(launch.row_config, arch, x.dtype, width, launch.is_dependent(arch))
        x = launch.contiguous_rows(x)
        arguments = (
            x,
            None if weight is None else launch.contiguous(weight),
            None if bias is None else launch.contiguous(bias),
            None if factors is None else launch.contiguous(factors),
            None if weight is None else normal,
            out,
            scales,
            zeros,
            width,
            x.stride(0),
            float(eps),
        )
        run(quantize_int8_kernel, (rows, 1, 1), arguments, constants)
    return normal, out, scales, zeros


def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K), its columns times `factors`, in int8; scales of the rows (T,), and what stands for 0 in them, (T,).

    Raises:
        ValueError: `factors` of another shape.
    """
    _, out, scales, zeros = _launch(x, None, None, 0.0, factors)
    return out, scales, zeros


def layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_int8` of that.

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, weight, bias, eps, factors)
