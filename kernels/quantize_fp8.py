"""Rows in FP8 (e4m3, torch.float8_e4m3fn), with or without LayerNorm first, in one launch.

`quantize_fp8` and `layer_norm_fp8` are the Triton twins of the functions of those names in `reference_fp8`, documented
at the operators, in fastbert/ops. One program takes one row, held in registers: its largest magnitude, and so a scale
of its own, costs no second pass, and a row's result depends on that row alone.

A row's own scale makes its largest magnitude 448, the largest number there is: where one outlier is most of a row, as
in BERT's residuals, it comes out exact. What a given scale leaves beyond 448 is saturated. Infinity and NaN become NaN,
never a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import run
from .dependent import wait_for_previous
from .layer_norm import _plan, normalize

# The interpreter truncates where it should round to e4m3, makes a number of its NaN, and multiplies no FP8 numbers:
# there conversions are spelled out, and float32 is multiplied.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_e4m3(x, SPELLED_OUT: tl.constexpr):
    """x float32, in units of the scale, as e4m3: to nearest, ties to even, saturated; NaN where x is not finite.

    SPELLED_OUT is INTERPRETED, which a function that kernels call can't read itself: see tests/kernels/cache_keys.py.
    """
    x = tl.where(tl.abs(x) < float("inf"), tl.clamp(x, -448.0, 448.0), float("nan"))
    if SPELLED_OUT:
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below the smallest normal number, multiples of 2^-9: 1.5 * 2^23 leaves no bit for a fraction.
        subnormal = (tl.abs(x) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
        code = tl.where(x == x, code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80), 0x7F)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def from_e4m3(x):
    """x e4m3, as float32; in the interpreter."""
    code = x.to(tl.uint8, bitcast=True).to(tl.int32)
    size = code & 0x7F
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(code > 0x7F, -value, value)


@triton.jit
def own_scale(largest):
    """The scale in which `largest`, float32, is 448, and its inverse; both finite where it is zero."""
    largest = tl.maximum(largest, 1e-30)
    return tl.div_rn(largest, 448.0), tl.div_rn(448.0, largest)


@triton.jit(do_not_specialize=["eps", "inverse_scale"])
def quantize_fp8_kernel(
    x_ptr,  # (T, width), rows stride_xm apart
    weight_ptr,  # (width,) of LayerNorm, or None: no LayerNorm
    bias_ptr,  # (width,), or None
    normal_ptr,  # (T, width), contiguous: LayerNorm's result, or None
    out_ptr,  # (T, width) e4m3, contiguous
    scale_ptr,  # (T,) float32, or None: the scale is given
    width,
    stride_xm,
    eps,
    inverse_scale,  # where it is given
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
    if scale_ptr is not None:
        scale, inverse_scale = own_scale(tl.max(tl.where(mask & (x == x), tl.abs(x), 0.0), 0))  # of NaN none
        tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + cols, to_e4m3(x * inverse_scale, INTERPRETED), mask=mask)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; expected {(width,)} for x of shape {(rows, width)}"
            )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    normal = torch.empty((0,) if weight is None else (rows, width), dtype=x.dtype, device=x.device)
    scales = torch.empty(rows if scale is None else 0, dtype=torch.float32, device=x.device)
    if out.numel():
        arch = launch.architecture(x.device)
        constants = _plan(launch.row_config, arch, x.dtype, width, launch.is_dependent(arch))
        x = launch.contiguous_rows(x)
        arguments = (
            x,
            None if weight is None else launch.contiguous(weight),
            None if bias is None else launch.contiguous(bias),
            None if weight is None else normal,
            out,
            scales if scale is None else None,
            width,
            x.stride(0),
            float(eps),
            1.0 if scale is None else 1 / scale,
        )
        run(quantize_fp8_kernel, (rows, 1, 1), arguments, constants)
    return normal, out, scales


def quantize_fp8(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """x (T, H) in units of `scale`, or of one of each row's own, in FP8; and those of the rows, (T,) or (0,).

    Raises:
        ValueError: `scale` is not positive.
    """
    _, out, scales = _launch(x, None, None, 0.0, scale)
    return out, scales


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_fp8` of that.

    Raises:
        ValueError: shapes that don't fit together; `scale` is not positive.
    """
    return _launch(x, weight, bias, eps, scale)
