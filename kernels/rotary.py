"""Rotary positions of queries and keys, in one launch.

    out = x * cosines + (-right, left) * sines,  x = (left, right) the two halves of a head

`rotate` is the Triton twin of the function of that name in `reference`. It stands beside attention, which would turn
every key once for each block of queries, and beside the GEMM, whose tiles hold no whole heads: it reads and writes each
element once. A program takes some rows of queries, keys or values and walks their heads; values are copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run
from .dependent import wait_for_previous


@triton.jit(do_not_specialize=["rows", "heads"])
def rotate_kernel(
    qkv_ptr,  # (rows, 3, heads, 2 * HALF), the last two dimensions contiguous
    cosines_ptr,  # (rows, 2 * HALF)
    sines_ptr,
    out_ptr,  # (rows, 3, heads, 2 * HALF), contiguous
    rows,
    heads,
    stride_t,
    stride_third,
    HALF: tl.constexpr,
    BACK: tl.constexpr,  # whether to turn by the transpose
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, HALF or more
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    third = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row + offs_m < rows) & (offs_d < HALF)
    table_offs = (row + offs_m) * 2 * HALF + offs_d
    is_turned = mask & (third < 2)
    left_cosine = tl.load(cosines_ptr + table_offs, mask=is_turned, other=1.0).to(tl.float32)
    right_cosine = tl.load(cosines_ptr + table_offs + HALF, mask=is_turned, other=1.0).to(tl.float32)
    left_sine = tl.load(sines_ptr + table_offs, mask=is_turned, other=0.0).to(tl.float32)
    right_sine = tl.load(sines_ptr + table_offs + HALF, mask=is_turned, other=0.0).to(tl.float32)
    if BACK:
        left_sine, right_sine = -right_sine, -left_sine
    qkv_ptr += row * stride_t + third * stride_third
    out_ptr += (row * 3 + third) * heads * 2 * HALF
    offs = offs_m * stride_t + offs_d
    out_offs = offs_m * 3 * heads * 2 * HALF + offs_d
    for _ in range(0, heads):
        left = tl.load(qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(qkv_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)
        turned_left = left * left_cosine - right * left_sine
        turned_right = right * right_cosine + left * right_sine
        tl.store(out_ptr + out_offs, turned_left.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + out_offs + HALF, turned_right.to(out_ptr.dtype.element_ty), mask=mask)
        qkv_ptr += 2 * HALF
        out_ptr += 2 * HALF


@launch.planned
def _plan(choose: launch.Choose, arch: str, dtype: torch.dtype, half: int, back: bool) -> tuple[int, Constants]:
    config = choose(dtype, half)
    constants = {"HALF": half, "BACK": back, "BLOCK_M": config.block_m, "BLOCK_D": config.block_n}
    return config.block_m, Constants(constants, num_warps=config.num_warps, **launch.dependent(arch))


def rotate(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """Rotary positions: of x = (left, right), the halves of a head, x * cosines + (-right, left) * sines.

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; head_dim even.
        cosines, sines: (T, head_dim), one dtype.
        back: whether to turn as the gradient does: by the transpose, the other way round.

    Returns:
        (T, 3, heads, head_dim), contiguous: queries and keys turned, in float32 and rounded once; values as they are.

    Raises:
        ValueError: shapes that don't fit together; an odd head_dim.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (T, 3, heads, head_dim), head_dim even")
    rows, _, heads, head_dim = qkv.shape
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table.shape != (rows, head_dim):
            raise ValueError(f"{name} has shape {tuple(table.shape)}; expected {(rows, head_dim)}")
    if qkv.stride()[2:] != (head_dim, 1):
        qkv = qkv.contiguous()
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        block, constants = _plan(launch.rotary_config, launch.architecture(qkv.device), qkv.dtype, head_dim // 2, back)
        given = qkv, launch.contiguous(cosines), launch.contiguous(sines), out
        numbers = rows, heads, qkv.stride(0), qkv.stride(1)
        run(rotate_kernel, (-(-rows // block), 3, 1), (*given, *numbers), constants)
    return out
