"""LayerNorm over rows, with or without a residual added first, in one launch.

`layer_norm` and `add_layer_norm` are the Triton twins of the functions of those names in `reference`. One program
normalizes one row, held in registers in float32, so rows are read once and a row's result depends on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps):
    """LayerNorm of one row: x float32, zero where not `mask`.

    The mean is refined once: a row far from zero carries the rounding of its sum into the first mean, and what is left
    of it after centring is small enough to be summed without loss. A constant row comes out as exactly the bias.
    """
    count = width * 1.0
    centred = tl.where(mask, x - tl.div_rn(tl.sum(x, 0), count), 0.0)
    centred = tl.where(mask, centred - tl.div_rn(tl.sum(centred, 0), count), 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0), count)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return centred * scale * weight + bias


@triton.jit
def layer_norm_kernel(
    x_ptr,  # (T, width), rows stride_xm apart
    residual_ptr,  # (T, width), rows stride_rm apart, or None
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    out_ptr,  # (T, width), contiguous
    width,
    stride_xm,
    stride_rm,
    eps,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0).to(tl.float32)
    y = normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps)
    tl.store(out_ptr + row * width + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows, width = x.shape
    if weight.shape != (width,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(width,)} for x of shape {(rows, width)}")
    if bias.shape != (width,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(width,)} for x of shape {(rows, width)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(rows, width)}, the shape of x")
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = launch.row_config(x.dtype, width)
    x = launch.contiguous_rows(x)
    residual = None if residual is None else launch.contiguous_rows(residual)
    layer_norm_kernel[(rows,)](
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        out,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        BLOCK_H=config.block_n,
        num_warps=config.num_warps,
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x (T, H), weight and bias (H,), eps added to the variance -> (T, H).

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, None, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm(x + residual)`, the sum taken in float32: x and residual (T, H), weight and bias (H,) -> (T, H).

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, residual, weight, bias, eps)
