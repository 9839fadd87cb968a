"""Linear layers in int8: GEMMs of int8 rows and int8 weights, with their epilogue, in one launch; inference alone.

`linear_int8`, `linear_gelu_int8` and `linear_add_int8` are the Triton twins of the functions of those names in
`reference_int8`, documented at the operators, in fastbert/ops. They share one kernel; `linear_gelu_quantize_int8` is
two launches.

Sums are int32, exact in any order, so a row of the result is bitwise the same whatever other rows are in the batch.
What stands for 0 in a row is taken off by the sums of the weight's rows, in int32, too; the epilogue runs in float32,
with one rounding at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run
from .dependent import wait_for_previous
from .linear import gelu_erf, gelu_erf_16, gelu_tanh, load_bias, order_tiles
from .quantize_int8 import quantize_int8

EXACT_SUMS = 2**16
"""The most inputs K whose sums int32 holds: 255 * 127 * K, at most 2^31."""


# m is not specialized: one compiled kernel for every number of rows.
@triton.jit(do_not_specialize=["m"])
def linear_int8_kernel(
    x_ptr,  # (m, k) int8, contiguous
    w_ptr,  # (n, k) int8, contiguous
    row_scale_ptr,  # (m,) float32
    row_zero_ptr,  # (m,) int32
    col_scale_ptr,  # (n,) float32
    col_sum_ptr,  # (n,) int32
    bias_ptr,  # (n,) or None
    residual_ptr,  # (m, n), rows stride_rm apart, or None
    out_ptr,  # (m, n), contiguous
    m,
    n,
    k,
    stride_rm,
    GELU: tl.constexpr,  # "", "none" (erf) or "tanh"
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    tile_m, tile_n = order_tiles(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)

    # The tile's corner in int64; offsets within the tile fit int32. Rows past the end repeat the last one.
    start_m = tile_m * BLOCK_M
    start_n = tile_n * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows_x = tl.minimum(offs_m, m - 1 - start_m)
    rows_w = tl.minimum(offs_n, n - 1 - start_n)
    x_ptrs = x_ptr + start_m.to(tl.int64) * k + (rows_x[:, None] * k + offs_k[None, :])
    w_ptrs = w_ptr + start_n.to(tl.int64) * k + (rows_w[:, None] * k + offs_k[None, :])

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = (offs_k < k - start_k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0)
            w = tl.load(w_ptrs, mask=mask_k, other=0)
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    mask_m = start_m + offs_m < m
    row_scale = tl.load(row_scale_ptr + start_m + offs_m, mask=mask_m, other=0.0)
    row_zero = tl.load(row_zero_ptr + start_m + offs_m, mask=mask_m, other=0)
    # In two halves of the columns, one after the other: with the whole tile's epilogue at once registers spill.
    HALF_N: tl.constexpr = BLOCK_N // 2
    acc0, acc1 = tl.split(acc.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    for half in tl.static_range(2):
        offs_h = tl.arange(0, HALF_N)
        start_h = start_n + half * HALF_N
        cols = start_h + offs_h
        mask_n = cols < n
        col_scale = tl.load(col_scale_ptr + cols, mask=mask_n, other=0.0)
        col_sum = tl.load(col_sum_ptr + cols, mask=mask_n, other=0)
        total = (acc0 if half == 0 else acc1) - row_zero[:, None] * col_sum[None, :]
        y = total.to(tl.float32) * col_scale[None, :] * row_scale[:, None]
        y += load_bias(bias_ptr, cols, mask_n, HALF_N)[None, :]
        if GELU == "none" and out_ptr.dtype.element_ty == tl.float32:
            y = gelu_erf(y)
        elif GELU == "none":
            y = gelu_erf_16(y)
        elif GELU == "tanh":
            y = gelu_tanh(y)
        mask = mask_m[:, None] & mask_n[None, :]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + start_m.to(tl.int64) * stride_rm + start_h
            offs = offs_m[:, None] * stride_rm + offs_h[None, :]
            y += tl.load(residual_ptrs + offs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + start_m.to(tl.int64) * n + start_h + (offs_m[:, None] * n + offs_h[None, :])
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@launch.planned
def _plan(choose: launch.Choose, arch: str, n: int, k: int, gelu: str, early: bool) -> tuple[launch.Config, Constants]:
    """How a GEMM is launched: (configuration, constants)."""
    config: launch.Config = choose(arch, n, k)
    return config, Constants({"GELU": gelu, **launch.gemm_constants(config, k), **launch.dependent(arch)})


def _launch(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    gelu: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype != torch.int8:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.int8")
    if weight.shape != (n, k) or k % 16 or k > EXACT_SUMS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected {(n, k)}, and {k} a multiple of 16, at most {EXACT_SUMS}"
        )
    for name, vector in (("row_scale", row_scale), ("row_zero", row_zero)):
        if vector.shape != (m,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected {(m,)}")
    columns = {"col_scale": col_scale, "col_sum": col_sum, **({} if bias is None else {"bias": bias})}
    for name, vector in columns.items():
        if vector.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected {(n,)}")
    if residual is not None and residual.shape != (m, n):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(m, n)}")
    out = x.new_empty((m, n), dtype=dtype)
    if not m or not n:
        return out
    arch = launch.architecture(x.device)
    config, constants = _plan(launch.linear_int8_config, arch, n, k, gelu, launch.is_dependent(arch))
    stride_rm = 0
    if residual is not None:
        residual = launch.contiguous_rows(residual)
        stride_rm = residual.stride(0)
    arguments = (
        launch.contiguous(x),
        launch.contiguous(weight),
        launch.contiguous(row_scale),
        launch.contiguous(row_zero),
        launch.contiguous(col_scale),
        launch.contiguous(col_sum),
        None if bias is None else launch.contiguous(bias),
        residual,
        out,
        m,
        n,
        k,
        stride_rm,
    )
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    run(linear_int8_kernel, (tiles, 1, 1), arguments, constants)
    return out


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
    """`((x - row_zero[:, None]) @ weight.T) * col_scale * row_scale[:, None] + bias`, rounded to `dtype`: (T, N).

    Raises:
        ValueError: shapes that don't fit together, or another dtype than int8.
    """
    return _launch(x, row_scale, row_zero, weight, col_scale, col_sum, bias, dtype)


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
    """`gelu(linear_int8(...))`, by torch.nn.functional.gelu's `approximate`, "none" or "tanh" -> (T, N).

    Raises:
        ValueError: as `linear_int8`; another `approximate`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate is {approximate!r}; expected "none" or "tanh"')
    return _launch(x, row_scale, row_zero, weight, col_scale, col_sum, bias, dtype, approximate)


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
    """`quantize_int8(linear_gelu_int8(...), factors)`, factors (N,): (T, N) int8, and (T,) and (T,) of its rows.

    Raises:
        ValueError: as `linear_gelu_int8`; `factors` of another shape.
    """
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
    """`linear_int8(...) + residual`, residual (T, N), in the dtype of the residual, rounded once -> (T, N).

    Raises:
        ValueError: as `linear_int8`; `residual` of another shape.
    """
    return _launch(x, row_scale, row_zero, weight, col_scale, col_sum, bias, residual.dtype, residual=residual)
