"""Linear layers in FP8: GEMMs of e4m3 rows and e4m3 weights, with their epilogue, in one launch; inference alone.

`linear_fp8`, `linear_gelu_fp8` and `linear_add_fp8` are the Triton twins of the functions of those names in
`reference_fp8`, documented at the operators, in fastbert/ops. They share one kernel.

The epilogue runs in float32, with one rounding at the store. Hopper is reported to add products of FP8 numbers up in
some 14 bits; here no more than EXACT_K of them before the sum is taken over into float32. That costs registers and
additions. What is left is an error of 1.2e-4 (`reference_fp8.mm_on_hopper`), which tests on a GPU hold it to: less than
a tenth of a rounding to bfloat16, and 1/300 of what `quantize_fp8` loses.

K is never split, and is added up in one order whatever the tile, so a row of the result is bitwise the same whatever
other rows are in the batch; `launch.LINEAR_FP8_TILES` says what that takes.
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
from .quantize_fp8 import INTERPRETED, from_e4m3, to_e4m3


# m is not specialized: one compiled kernel for every number of rows.
@triton.jit(do_not_specialize=["m", "inverse_scale"])
def linear_fp8_kernel(
    x_ptr,  # (m, k) e4m3, contiguous
    w_ptr,  # (n, k) e4m3, contiguous
    row_scale_ptr,  # (m,) float32, or None
    col_scale_ptr,  # (n,) float32
    bias_ptr,  # (n,) or None
    residual_ptr,  # (m, n), rows stride_rm apart, or None
    out_ptr,  # (m, n), contiguous; e4m3 in units of a scale, or any other dtype
    m,
    n,
    k,
    stride_rm,
    inverse_scale,  # of an e4m3 result
    GELU: tl.constexpr,  # "", "none" (erf) or "tanh"
    EVEN_K: tl.constexpr,
    EXACT_K: tl.constexpr,  # products added up before the sum goes to float32, at most BLOCK_K; 0: all of them
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

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = (offs_k < k - start_k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            w = tl.load(w_ptrs, mask=mask_k, other=0.0)
        if INTERPRETED:
            acc += tl.dot(from_e4m3(x), from_e4m3(w).T, input_precision="ieee")
        elif EXACT_K:
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=EXACT_K)  # [BLOCK_M, BLOCK_N]
        else:
            acc = tl.dot(x, w.T, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    row_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + start_m + offs_m, mask=start_m + offs_m < m, other=0.0)
    # In two halves of the columns, one after the other: with the whole tile's epilogue at once registers spill.
    HALF_N: tl.constexpr = BLOCK_N // 2
    acc0, acc1 = tl.split(acc.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    for half in tl.static_range(2):
        offs_h = tl.arange(0, HALF_N)
        start_h = start_n + half * HALF_N
        cols = start_h + offs_h
        mask_n = cols < n
        col_scale = tl.load(col_scale_ptr + cols, mask=mask_n, other=0.0)
        y = (acc0 if half == 0 else acc1) * col_scale[None, :]
        if row_scale_ptr is not None:
            y *= row_scale[:, None]
        y += load_bias(bias_ptr, cols, mask_n, HALF_N)[None, :]
        if GELU == "none" and out_ptr.dtype.element_ty == tl.float32:
            y = gelu_erf(y)
        elif GELU == "none":
            y = gelu_erf_16(y)
        elif GELU == "tanh":
            y = gelu_tanh(y)
        mask = (start_m + offs_m < m)[:, None] & mask_n[None, :]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + start_m.to(tl.int64) * stride_rm + start_h
            offs = offs_m[:, None] * stride_rm + offs_h[None, :]
            y += tl.load(residual_ptrs + offs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + start_m.to(tl.int64) * n + start_h + (offs_m[:, None] * n + offs_h[None, :])
        if out_ptr.dtype.element_ty == tl.float8e4nv:
            tl.store(out_ptrs, to_e4m3(y * inverse_scale, INTERPRETED), mask=mask)
        else:
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@launch.planned
def _plan(
    choose: launch.Choose, arch: str, n: int, k: int, rows: int, multiprocessors: int, gelu: str, early: bool
) -> tuple[int, launch.Config, Constants]:
    """How a GEMM is launched: (rows of the first launch, configuration, constants)."""
    config: launch.Config = choose(arch, n, k, rows, multiprocessors)
    whole = launch.full_waves(config, arch, 1, n, k, 1, rows, multiprocessors)
    exact_k = min(launch.FP8_EXACT_K, config.block_k)
    constants = {"GELU": gelu, "EXACT_K": exact_k, **launch.gemm_constants(config, k), **launch.dependent(arch)}
    return whole, config, Constants(constants)


def _launch(
    x: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    gelu: str = "",
    scale: float | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.float8_e4m3fn")
    if weight.shape != (n, k) or k % 16:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(n, k)}, and {k} a multiple of 16")
    row_scale = None if row_scale is None or not row_scale.numel() else row_scale
    if row_scale is not None and row_scale.shape != (m,):
        raise ValueError(f"row_scale has shape {tuple(row_scale.shape)}; expected {(m,)}, or (0,) for none")
    for name, vector in (("col_scale", col_scale), ("bias", bias)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected {(n,)}")
    if residual is not None and residual.shape != (m, n):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(m, n)}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if out is None:
        out = x.new_empty((m, n), dtype=dtype if scale is None else torch.float8_e4m3fn)
    if not m or not n:
        return out
    arch = launch.architecture(x.device)
    shape = n, k, launch.round_rows(m), launch.multiprocessors(x.device)
    whole, config, constants = _plan(launch.linear_fp8_config, arch, *shape, gelu, launch.is_dependent(arch))
    if whole < m and m >= launch.SPLIT_ROWS:
        for rows in (slice(whole), slice(whole, m)):  # as in linear.py
            scales, added, part = (None if each is None else each[rows] for each in (row_scale, residual, out))
            _launch(x[rows], scales, weight, col_scale, bias, dtype, gelu, scale, added, part)
        return out
    stride_rm = 0
    if residual is not None:
        residual = launch.contiguous_rows(residual)
        stride_rm = residual.stride(0)
    arguments = (
        launch.contiguous(x),
        launch.contiguous(weight),
        None if row_scale is None else launch.contiguous(row_scale),
        launch.contiguous(col_scale),
        None if bias is None else launch.contiguous(bias),
        residual,
        out,
        m,
        n,
        k,
        stride_rm,
        1.0 if scale is None else 1 / scale,
    )
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    run(linear_fp8_kernel, (tiles, 1, 1), arguments, constants)
    return out


def linear_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x @ weight.T) * row_scale[:, None] * col_scale + bias`, in float32, rounded to `dtype`: (T, N).

    Raises:
        ValueError: shapes that don't fit together, or another dtype than float8_e4m3fn.
    """
    return _launch(x, row_scale, weight, col_scale, bias, dtype)


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

    Raises:
        ValueError: as `linear_fp8`; another `approximate`; `scale` is not positive.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate is {approximate!r}; expected "none" or "tanh"')
    return _launch(x, row_scale, weight, col_scale, bias, dtype, approximate, scale)


def linear_add_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """`linear_fp8(...) + residual`, residual (T, N), in the dtype of the residual, rounded once -> (T, N).

    Raises:
        ValueError: as `linear_fp8`; `residual` of another shape.
    """
    return _launch(x, row_scale, weight, col_scale, bias, residual.dtype, residual=residual)
