"""LayerNorm over rows, with or without a residual added first, in one launch; and its backward.

`layer_norm`, `add_layer_norm` and `add_layer_norm_backward` are the Triton twins of the functions of those names in
`reference`, but for which elements dropout drops: see `dropout`. One program normalizes one row, held in registers in
float32, so rows are read once and a row's result depends on that row alone. The backward computes the sum, its
statistics and dropout again, a few rows a program, and adds up the gradients of weight and bias without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run
from .dependent import wait_for_previous
from .dropout import checked_seed, draw_threshold, keep_row, keep_scale


@triton.jit
def _centred(x, mask, width, eps):
    """A row without its mean, and what scales it to unit variance.

    The mean is refined once: a row far from zero carries the rounding of its sum into the first mean, and what is left
    of it after centring is small enough to be summed without loss.
    """
    count = width * 1.0
    centred = tl.where(mask, x - tl.div_rn(tl.sum(x, 0), count), 0.0)
    centred = tl.where(mask, centred - tl.div_rn(tl.sum(centred, 0), count), 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0), count)
    return centred, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps):
    """LayerNorm of one row: x float32, zero where not `mask`. A constant row comes out as exactly the bias."""
    centred, scale = _centred(x, mask, width, eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return centred * scale * weight + bias


@triton.jit
def normalize_backward(x, grad, mask, weight, width, eps):
    """Gradients of `normalize` by x and, of this row alone, by the weight: float32, zero where not `mask`."""
    centred, scale = _centred(x, mask, width, eps)
    normal = centred * scale
    count = width * 1.0
    dnormal = grad * weight
    mean = tl.sum(dnormal, 0) / count
    slope = tl.sum(dnormal * normal, 0) / count
    return tl.where(mask, (dnormal - mean - normal * slope) * scale, 0.0), grad * normal


@triton.jit
def _total(x_ptr, residual_ptr, row, cols, mask, stride_xm, stride_rm, keep, kept_scale, DROPS: tl.constexpr):
    """`dropout(x) + residual` of one row, in float32."""
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if DROPS:
        x = tl.where(keep, x * kept_scale, 0.0)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(
    do_not_specialize=["eps", "threshold", "kept_scale"],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def layer_norm_kernel(
    x_ptr,  # (T, width), rows stride_xm apart
    residual_ptr,  # (T, width), rows stride_rm apart, or None
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    seed_ptr,  # of dropout, or None
    out_ptr,  # (T, width), contiguous
    width,
    stride_xm,
    stride_rm,
    eps,
    threshold,  # of dropout, as is
    kept_scale,
    BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    DROPS: tl.constexpr = seed_ptr is not None
    keep = mask
    if DROPS:
        keep = keep_row(tl.load(seed_ptr), row, threshold, BLOCK_H)
    x = _total(x_ptr, residual_ptr, row, cols, mask, stride_xm, stride_rm, keep, kept_scale, DROPS)
    y = normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps)
    tl.store(out_ptr + row * width + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "eps", "threshold", "kept_scale"],
    do_not_specialize_on_alignment=["seed_ptr"],
)
def add_layer_norm_backward_kernel(
    grad_ptr,  # (rows, width), contiguous
    x_ptr,  # (rows, width), rows stride_xm apart
    residual_ptr,  # (rows, width), rows stride_rm apart
    weight_ptr,  # (width,)
    seed_ptr,  # of dropout, or None
    dx_ptr,  # (rows, width), contiguous, or None where it equals dresidual
    dresidual_ptr,  # (rows, width), contiguous
    dweight_ptr,  # (programs, width) float32: sums over the rows of a program
    dbias_ptr,  # the same
    rows,
    width,
    stride_xm,
    stride_rm,
    eps,
    threshold,  # of dropout, as is
    kept_scale,
    ROWS: tl.constexpr,  # of a program
    BLOCK_H: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_H], tl.float32)
    DROPS: tl.constexpr = seed_ptr is not None
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(0, tl.minimum(rows - first, ROWS).to(tl.int32)):
        row = first + i
        keep = mask
        if DROPS:
            keep = keep_row(tl.load(seed_ptr), row, threshold, BLOCK_H)
        x = _total(x_ptr, residual_ptr, row, cols, mask, stride_xm, stride_rm, keep, kept_scale, DROPS)
        grad = tl.load(grad_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        dtotal, of_weight = normalize_backward(x, grad, mask, weight, width, eps)
        dweight += of_weight
        dbias += grad
        offs = row * width + cols
        tl.store(dresidual_ptr + offs, dtotal.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            dx = dtotal
            if DROPS:
                dx = tl.where(keep, dtotal * kept_scale, 0.0)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    offs = tl.program_id(0).to(tl.int64) * width + cols
    tl.store(dweight_ptr + offs, dweight, mask=mask)
    tl.store(dbias_ptr + offs, dbias, mask=mask)


def _check(x: Tensor, residual: Tensor | None, *vectors: tuple[str, Tensor]) -> None:
    rows, width = x.shape
    expected = (width,)
    for name, vector in vectors:
        if vector.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}; expected {(width,)} for x of shape {(rows, width)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(rows, width)}, the shape of x")


@launch.planned
def _plan(choose: launch.Choose, arch: str, dtype: torch.dtype, width: int, early: bool) -> Constants:
    config = choose(dtype, width)
    return Constants(BLOCK_H=config.block_n, num_warps=config.num_warps, **launch.dependent(arch))


@launch.planned
def _backward_plan(choose: launch.Choose, dtype: torch.dtype, width: int) -> tuple[launch.Config, Constants]:
    config: launch.Config = choose(dtype, width)
    return config, Constants(ROWS=config.block_m, BLOCK_H=config.block_n, num_warps=config.num_warps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> Tensor:
    _check(x, residual, ("weight", weight), ("bias", bias))
    seed = checked_seed(dropout, seed)
    rows, width = x.shape
    out = (x if residual is None else residual).new_empty((rows, width))
    if not rows or not width:
        return out
    arch = launch.architecture(x.device)
    constants = _plan(launch.row_config, arch, x.dtype, width, launch.is_dependent(arch))
    x, stride_rm = launch.contiguous_rows(x), 0
    if residual is not None:
        residual = launch.contiguous_rows(residual)
        stride_rm = residual.stride(0)
    tensors = x, residual, launch.contiguous(weight), launch.contiguous(bias), seed, out
    numbers = width, x.stride(0), stride_rm, float(eps), draw_threshold(dropout), keep_scale(dropout)
    run(layer_norm_kernel, (rows, 1, 1), (*tensors, *numbers), constants)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x (T, H), weight and bias (H,), eps added to the variance -> (T, H).

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, None, weight, bias, eps, 0.0, None)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`layer_norm(dropout(x) + residual)`, the sum taken in float32: x and residual (T, H), weight and bias (H,).

    Args:
        x: any dtype; the other three may be float32 where x is not.
        dropout: rate, 0 to 1, at which elements of x are dropped; the others are scaled by 1 / (1 - dropout).
        seed: int64 tensor of one element, on the device, which decides the dropped ones; None where `dropout` is 0.

    Returns:
        (T, H) in the dtype of `residual`.

    Raises:
        ValueError: shapes that don't fit together; `dropout` out of range, or without a seed.
    """
    return _launch(x, residual, weight, bias, eps, dropout, seed)


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `add_layer_norm`: (dx, dresidual, dweight, dbias), each in the dtype of what it belongs to.

    `dx` is empty, (0,), where it equals dresidual: without dropout, in one dtype. Deterministic.

    Raises:
        ValueError: as in `add_layer_norm`; `grad` of another shape than x.
    """
    _check(x, residual, ("weight", weight))
    seed = checked_seed(dropout, seed)
    rows, width = x.shape
    if grad.shape != x.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected {(rows, width)}, the shape of x")
    same = seed is None and x.dtype == residual.dtype
    dx = torch.empty((0,) if same else (rows, width), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(rows, width, dtype=residual.dtype, device=x.device)
    config, constants = _backward_plan(launch.row_backward_config, x.dtype, width)
    programs = -(-rows // config.block_m)
    dweight, dbias = (torch.empty(programs, width, dtype=torch.float32, device=x.device) for _ in range(2))
    if dresidual.numel():
        x, residual = launch.contiguous_rows(x), launch.contiguous_rows(residual)
        given = launch.contiguous(grad), x, residual, launch.contiguous(weight), seed
        made = None if same else dx, dresidual, dweight, dbias
        numbers = rows, width, x.stride(0), residual.stride(0), float(eps), draw_threshold(dropout), keep_scale(dropout)
        run(add_layer_norm_backward_kernel, (programs, 1, 1), (*given, *made, *numbers), constants)
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)
