"""Disentangled attention, DeBERTa's: scores of contents, and of contents with how far key and query lie apart.

    score[i, j] = scale * (q[i] . k[j] + q[i] . c2p[slot(i - j)] + k[j] . p2c[slot(i - j)])

Tables by position: `position_scores_kernel` multiplies a block of rows with the table's rows of a block of distances,
and stores what it finds by position, so that each element lies at (query, key), or at (key, query), where attention
looks for it. The kernels of `attention.py` then add two ordinary tiles: no list of slots and no gather in their loop.

Backward, those kernels leave the gradients of scores by query and by key. `position_rows_kernel` adds to dQ and dK what
comes by the tables, one program a row. `position_table_kernel` sums for every distance, in parts, and
`position_slots_kernel` adds up parts and the distances of each slot. No atomics: the same bits every time.

The tables are 2 heads T L numbers, L the longest length, and their gradients half as many again: each part of a pair is
stored once. Beyond the distances that `slots` has, all have its first or its last: where sequences are so long that it
takes less room, L is a band of columns around each row, and one number for all before it and one for all behind.
The attention is that of DeBERTa (He et al., 2020, https://arxiv.org/abs/2006.03654).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LOG2E,
    PITCH,
    TILE_ROWS,
    _checked,
    _grid,
    _rows_of,
    attention_backward_kv_kernel,
    attention_backward_q_kernel,
    attention_kernel,
    band_place,
    ends_row,
    locate,
    pitch_of,
    reached,
    sums_row,
)
from .compiled import Constants, run
from .dropout import checked_seed, draw_threshold, keep_scale
from .launch import (
    POSITION_ENDS,
    POSITION_PROGRAMS,
    Config,
    architecture,
    contiguous,
    disentangled_backward_config,
    disentangled_config,
    input_precision,
    of_mask,
    options,
    planned,
    position_config,
    position_slots_config,
)


@triton.jit
def choose(by_key, c2p, p2c):
    """What belongs to scores by key, `p2c`, or by query, `c2p`: of both that of the program, or the one there is."""
    if c2p is None:
        chosen = p2c
    elif p2c is None:
        chosen = c2p
    else:
        chosen = tl.where(by_key, p2c, c2p)
    return chosen


@triton.jit
def kind_of(head, heads, c2p_ptr, p2c_ptr):
    """Of `head`, counted through both kinds of scores where there are two: whether by key, and the head itself."""
    if c2p_ptr is None:
        by_key = head >= 0
    else:
        by_key = head >= heads
    return by_key, head % heads


@triton.jit
def load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM: tl.constexpr, offs_d):
    """The rows of a table for distances from a row to a column, zeros where no pair of a sequence is so far apart."""
    distance = tl.minimum(tl.maximum(distance, 1 - reach), reach - 1)
    there = (distance > -length) & (distance < length)
    slot = tl.load(slots_ptr + reach - 1 + tl.where(by_key, -distance, distance), mask=there, other=0)
    offs = (slot[:, None] * heads + head.to(tl.int32)) * HEAD_DIM + offs_d[None, :]
    return tl.load(table_ptr + offs, mask=there[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)


@triton.jit(
    do_not_specialize=["heads", "rows", "max_seqlen", "reach", "scale"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def position_scores_kernel(
    qkv_ptr,  # (rows, 3, heads, HEAD_DIM), rows stride_qt apart
    c2p_ptr,  # (slots, heads, HEAD_DIM), or None
    p2c_ptr,  # the same; one of the two is there
    slots_ptr,  # (2 * reach - 1,) int32: the slot of a distance from query to key, from 1 - reach on
    c2p_scores_ptr,  # written here, as attention_kernel has it, with a band or without; or None
    p2c_scores_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    heads,
    rows,
    max_seqlen,
    reach,
    scale,
    stride_qt,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # distances at a time
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BAND: tl.constexpr = None,
):
    KINDS: tl.constexpr = (c2p_ptr is not None) + (p2c_ptr is not None)
    head, _, row, length, start_m = locate(cu_seqlens_ptr, tiles_ptr, heads * KINDS, max_seqlen, BLOCK_M, TILE_ROWS)
    if start_m >= length:
        return

    by_key, head = kind_of(head, heads, c2p_ptr, p2c_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    valid_m = (start_m + offs_m < length)[:, None]
    x_ptr = qkv_ptr + (row + start_m) * stride_qt + (by_key * heads + head) * HEAD_DIM
    mask_x = valid_m & (offs_d[None, :] < HEAD_DIM)
    x = tl.load(x_ptr + (offs_m[:, None] * stride_qt + offs_d[None, :]), mask=mask_x, other=0.0)
    table_ptr = choose(by_key, c2p_ptr, p2c_ptr)
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    tables_ptr = choose(by_key, c2p_scores_ptr, p2c_scores_ptr)
    scores_ptr = tables_ptr + (head * rows + row + start_m) * pitch
    first, last = reached(start_m, length, None, BLOCK_M, BLOCK_N, BAND, PITCH, 1)
    columns = tl.cdiv(last, PITCH) * PITCH  # past the sequence they are zeros: attention looks at whole blocks
    if BAND is not None:
        scores_ptr += band_place(start_m, 0, BAND, PITCH)
    # Row start_m + m and column m + n lie start_m - n apart, whatever m is.
    for start_n in range(first - BLOCK_M, columns, BLOCK_N):
        distance = start_m - start_n - offs_n
        table = load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM, offs_d)
        scores = tl.dot(x, tl.trans(table), input_precision=INPUT_PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        column = start_n + offs_n[None, :] + offs_m[:, None]
        scores = tl.where(column < length, scores, 0.0).to(scores_ptr.dtype.element_ty)
        mask = valid_m & (column >= first) & (column < columns)
        tl.store(scores_ptr + (offs_m[:, None] * pitch + column), scores, mask=mask)
    if BAND is not None:  # by the same dot, so that the same pair has the same bits in a band and beyond one
        # Loaded again: held through the loop, in float32 it spills.
        x = tl.load(x_ptr + (offs_m[:, None] * stride_qt + offs_d[None, :]), mask=mask_x, other=0.0)
        distance = tl.where(offs_n == 0, reach, -reach)
        table = load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM, offs_d)
        scores = tl.dot(x, tl.trans(table), input_precision=INPUT_PRECISION) * scale
        before_ptr = ends_row(tables_ptr, head, heads, rows, row + start_m, pitch, 0)
        ends_ptr = before_ptr + tl.where(offs_n[None, :] == 0, 0, heads.to(tl.int64) * rows) + offs_m[:, None]
        tl.store(ends_ptr, scores.to(scores_ptr.dtype.element_ty), mask=valid_m & (offs_n[None, :] < 2))


@triton.jit(
    do_not_specialize=["heads", "rows", "max_seqlen", "reach", "factor"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def position_rows_kernel(
    dqkv_ptr,  # (rows, 3, heads, HEAD_DIM), contiguous; to its first two thirds is added
    c2p_ptr,  # as in position_scores_kernel
    p2c_ptr,
    slots_ptr,
    c2p_grad_ptr,  # laid out as scores are: their gradients, at (query, key), not yet scaled; or None
    p2c_grad_ptr,  # the same at (key, query)
    delta_ptr,  # with a band, as the kernels of attention wrote it
    cu_seqlens_ptr,
    tiles_ptr,
    heads,
    rows,
    max_seqlen,
    reach,
    factor,  # of what is added
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # distances at a time
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BAND: tl.constexpr = None,
):
    KINDS: tl.constexpr = (c2p_ptr is not None) + (p2c_ptr is not None)
    head, _, row, length, start_m = locate(cu_seqlens_ptr, tiles_ptr, heads * KINDS, max_seqlen, BLOCK_M, TILE_ROWS)
    if start_m >= length:
        return

    by_key, head = kind_of(head, heads, c2p_ptr, p2c_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    valid_m = (start_m + offs_m < length)[:, None]
    table_ptr = choose(by_key, c2p_ptr, p2c_ptr)
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    grad_ptr = choose(by_key, c2p_grad_ptr, p2c_grad_ptr) + (head * rows + row + start_m) * pitch
    first, last = reached(start_m, length, None, BLOCK_M, BLOCK_N, BAND, PITCH, 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BAND is not None:
        grad_ptr += band_place(start_m, 0, BAND, PITCH)
        for side in tl.static_range(2):
            sums_ptr = sums_row(delta_ptr, head, heads, rows, row + start_m, 2 * by_key.to(tl.int64) + side)
            total = tl.load(sums_ptr + offs_m, mask=start_m + offs_m < length, other=0.0)
            slot = tl.load(slots_ptr + tl.where(by_key == (side == 1), 2 * reach - 2, 0))
            there = first > 0 if side == 0 else last < length
            end_ptr = table_ptr + (slot * heads + head.to(tl.int32)) * HEAD_DIM + offs_d
            end = tl.load(end_ptr, mask=(offs_d < HEAD_DIM) & there, other=0.0)
            acc += total[:, None] * end.to(tl.float32)[None, :]
    for start_n in range(first - BLOCK_M, last, BLOCK_N):  # as in position_scores_kernel
        distance = start_m - start_n - offs_n
        table = load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM, offs_d)
        column = start_n + offs_n[None, :] + offs_m[:, None]
        mask = valid_m & (column >= first) & (column < last)
        grad = tl.load(grad_ptr + (offs_m[:, None] * pitch + column), mask=mask, other=0.0)
        acc = tl.dot(grad, table, acc, input_precision=INPUT_PRECISION)
    third = heads * HEAD_DIM
    out_ptr = dqkv_ptr + (row + start_m) * 3 * third + (by_key * heads + head) * HEAD_DIM
    out_ptr += offs_m[:, None] * 3 * third + offs_d[None, :]
    mask_out = valid_m & (offs_d[None, :] < HEAD_DIM)
    total = tl.fma(acc, factor, tl.load(out_ptr, mask=mask_out, other=0.0).to(tl.float32))
    tl.store(out_ptr, total.to(dqkv_ptr.dtype.element_ty), mask=mask_out)


@triton.jit(
    do_not_specialize=["sequences", "heads", "rows", "max_seqlen"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def position_table_kernel(
    qkv_ptr,  # as in position_scores_kernel
    c2p_grad_ptr,  # as in position_rows_kernel; one of the two is there
    p2c_grad_ptr,
    partial_ptr,  # (chunks, kinds * heads, 2 * blocks * BLOCK_N, HEAD_DIM) float32, by distance from -blocks * BLOCK_N
    cu_seqlens_ptr,
    sequences,
    heads,
    rows,
    max_seqlen,
    stride_qt,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows at a time
    BLOCK_N: tl.constexpr,  # distances of a program, from row to column
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BAND: tl.constexpr = None,
):
    # Blocks of distances: 0, -1, 1, -2, 2, ... Those with the most pairs begin first.
    block = (tl.program_id(0) + 1) // 2
    block = tl.where(tl.program_id(0) % 2 == 1, -block, block)
    by_key, head = kind_of(tl.program_id(1).to(tl.int64), heads, c2p_grad_ptr, p2c_grad_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    grad_ptr = choose(by_key, c2p_grad_ptr, p2c_grad_ptr)
    first = block * BLOCK_N
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for sequence in range(tl.program_id(2), sequences, tl.num_programs(2)):
        if cu_seqlens_ptr is None:
            row = max_seqlen.to(tl.int64) * sequence
            length = max_seqlen
        else:
            row = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            length = (tl.load(cu_seqlens_ptr + sequence + 1) - row).to(tl.int32)
        for start_m in range(tl.maximum(first, 0), tl.minimum(length, length + first + BLOCK_N - 1), BLOCK_M):
            valid_m = start_m + offs_m < length
            column = start_m - first + offs_m[:, None] - offs_n[None, :]
            tile_ptr = grad_ptr + (head * rows + row + start_m) * pitch
            mask = valid_m[:, None] & (column >= 0) & (column < length)
            place = column
            if BAND is not None:
                place = band_place(start_m + offs_m[:, None], column, BAND, PITCH)
                mask = mask & (place >= 0) & (place < pitch)
            grad = tl.load(tile_ptr + (offs_m[:, None] * pitch + place), mask=mask, other=0.0)
            x_ptr = qkv_ptr + (row + start_m) * stride_qt + (by_key * heads + head) * HEAD_DIM
            x = tl.load(
                x_ptr + (offs_m[:, None] * stride_qt + offs_d[None, :]), mask=valid_m[:, None] & mask_d, other=0.0
            )
            acc = tl.dot(tl.trans(grad), x, acc, input_precision=INPUT_PRECISION)
    distances = tl.num_programs(0) * BLOCK_N
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * distances + distances // 2 + first
    tl.store(partial_ptr + place * HEAD_DIM + (offs_n[:, None] * HEAD_DIM + offs_d[None, :]), acc, mask=mask_d)


@triton.jit(
    do_not_specialize=["sequences", "heads", "rows"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def position_ends_kernel(
    qkv_ptr,  # as in position_scores_kernel
    delta_ptr,  # as in position_rows_kernel
    ends_ptr,  # (chunks, kinds * heads, 2, HEAD_DIM) float32, written here: sums of distances before and behind a band
    cu_seqlens_ptr,
    sequences,
    heads,
    rows,
    stride_qt,
    FIRST: tl.constexpr,  # the first of `kinds`: 0, by query; 1, by key
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows at a time
    BLOCK_D: tl.constexpr,
):
    kind = FIRST + tl.program_id(1) // heads
    head = (tl.program_id(1) % heads).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    last = rows
    if cu_seqlens_ptr is not None:
        last = tl.load(cu_seqlens_ptr + sequences)
    before = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    behind = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_m in range(tl.program_id(0) * BLOCK_M, last, tl.num_programs(0) * BLOCK_M):
        row = rows.to(tl.int64) * 0 + start_m
        valid_m = start_m + offs_m < last
        x_ptr = qkv_ptr + row * stride_qt + (kind * heads + head) * HEAD_DIM
        mask_x = valid_m[:, None] & (offs_d[None, :] < HEAD_DIM)
        x = tl.load(x_ptr + (offs_m[:, None] * stride_qt + offs_d[None, :]), mask=mask_x, other=0.0).to(tl.float32)
        sums_ptr = sums_row(delta_ptr, head, heads, rows, row, 2 * kind) + offs_m
        before += x * tl.load(sums_ptr, mask=valid_m, other=0.0)[:, None]
        behind += x * tl.load(sums_ptr + heads.to(tl.int64) * rows, mask=valid_m, other=0.0)[:, None]
    ends_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * HEAD_DIM + offs_d
    tl.store(ends_ptr, tl.sum(before, 0), mask=offs_d < HEAD_DIM)
    tl.store(ends_ptr + HEAD_DIM, tl.sum(behind, 0), mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=["chunks", "parts", "distances", "heads", "slots", "max_seqlen", "reach", "factor"])
def position_slots_kernel(
    slots_ptr,
    dc2p_ptr,  # (slots, heads, HEAD_DIM), written here; or None
    dp2c_ptr,
    partial_ptr,  # (chunks, kinds * heads, distances, HEAD_DIM) float32, as position_table_kernel wrote it
    ends_ptr,  # with a band (parts, kinds * heads, 2, HEAD_DIM) float32, as position_ends_kernel wrote it; or None
    chunks,
    parts,
    distances,
    heads,
    slots,
    max_seqlen,
    reach,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # slots of a program
    BLOCK_N: tl.constexpr,  # distances at a time
    BLOCK_D: tl.constexpr,
):
    by_key, head = kind_of(tl.program_id(1).to(tl.int64), heads, dc2p_ptr, dp2c_ptr)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, distances, BLOCK_N):
        distance = start_n + offs_n - distances // 2
        there = (distance > -max_seqlen) & (distance < max_seqlen)
        distance = tl.minimum(tl.maximum(distance, 1 - reach), reach - 1)
        slot = tl.load(slots_ptr + reach - 1 + tl.where(by_key, -distance, distance), mask=there, other=-1)
        same = slot[None, :] == own[:, None]
        if tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
            found_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * distances + start_n) * HEAD_DIM
            total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for _ in range(0, chunks):
                offs = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
                total += tl.load(found_ptr + offs, mask=there[:, None] & mask_d, other=0.0)
                found_ptr += tl.num_programs(1).to(tl.int64) * distances * HEAD_DIM
            acc = tl.dot(same.to(tl.float32), total, acc, input_precision="ieee")
    if ends_ptr is not None:
        for side in tl.static_range(2):
            slot = tl.load(slots_ptr + tl.where(by_key == (side == 1), 2 * reach - 2, 0))
            if slot // BLOCK_M == tl.program_id(0):
                end_ptr = ends_ptr + (tl.program_id(1) * 2 + side) * HEAD_DIM + offs_d
                end = tl.zeros([BLOCK_D], tl.float32)
                for _ in range(0, parts):
                    end += tl.load(end_ptr, mask=offs_d < HEAD_DIM, other=0.0)
                    end_ptr += tl.num_programs(1) * 2 * HEAD_DIM
                acc += tl.where(own == slot, 1.0, 0.0)[:, None] * end[None, :]
    out_ptr = choose(by_key, dc2p_ptr, dp2c_ptr) + head * HEAD_DIM
    out = (acc * factor).to(out_ptr.dtype.element_ty)
    out_offs = own[:, None] * (heads * HEAD_DIM) + offs_d[None, :]
    tl.store(out_ptr + out_offs, out, mask=(own < slots)[:, None] & mask_d)


@planned
def _plan(
    choose_config: Callable[..., Config],
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    precision: str | None,
    band: int | None = None,
    swapped: bool = False,
    masked: bool = False,
) -> tuple[Config, Constants]:
    """A configuration and its constants.

    `swapped`: BLOCK_N is block_m, of the kernel that holds keys; `masked`: of attention or dQ with a mask.
    """
    config: Config = choose_config(arch, dtype, head_dim)
    config = of_mask(config, arch) if masked else config
    held, walked = ("BLOCK_N", "BLOCK_M") if swapped else ("BLOCK_M", "BLOCK_N")
    constants = {
        "HEAD_DIM": head_dim,
        held: config.block_m,
        walked: config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        **({} if precision is None else {"INPUT_PRECISION": precision}),
        **({} if band is None else {"BAND": band}),
        **options(config),
    }
    return config, Constants(constants)


@planned
def _ends_plan(head_dim: int, by_key: bool) -> Constants:
    """The constants of `position_ends_kernel`; `by_key`: there are no scores by query."""
    constants = {
        "FIRST": int(by_key),
        "HEAD_DIM": head_dim,
        "BLOCK_M": POSITION_ENDS.block_m,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        **options(POSITION_ENDS),
    }
    return Constants(constants)


def _tables(qkv: Tensor, c2p: Tensor | None, p2c: Tensor | None, slots: Tensor) -> list[Tensor | None]:
    """The tables, contiguous. Raises ValueError as `disentangled_attention` says of them and of `slots`."""
    if c2p is None and p2c is None:
        raise ValueError("c2p and p2c are None; expected a table, or attention without one")
    for name, table in (("c2p", c2p), ("p2c", p2c)):
        if table is not None and (table.ndim != 3 or table.shape[1:] != qkv.shape[2:] or table.dtype != qkv.dtype):
            expected = f"expected (slots, {qkv.shape[2]}, {qkv.shape[3]}) and {qkv.dtype}, as qkv is"
            raise ValueError(f"{name} has shape {tuple(table.shape)} and dtype {table.dtype}; {expected}")
    if c2p is not None and p2c is not None and c2p.shape != p2c.shape:
        raise ValueError(f"c2p has shape {tuple(c2p.shape)}, p2c {tuple(p2c.shape)}; expected the same")
    if slots.ndim != 1 or not slots.shape[0] % 2 or slots.dtype != torch.int32:
        raise ValueError(f"slots has shape {tuple(slots.shape)} and dtype {slots.dtype}; expected int32 of (2 R - 1,)")
    return [None if table is None else contiguous(table) for table in (c2p, p2c)]


def _band(slots: Tensor, max_seqlen: int) -> int | None:
    """The distance, a multiple of PITCH, beyond which each row has one score before it and one behind it.

    None: no sequence is so long that this would take less room; or by HIP, where three loops spill scalar registers.
    """
    if torch.version.hip is not None:
        return None
    band = -(-(slots.shape[0] // 2) // PITCH.value) * PITCH.value
    return band if 2 * band + PITCH.value < max_seqlen else None


def _position_scores(
    qkv: Tensor,
    tables: list[Tensor | None],
    slots: Tensor,
    scores: list[Tensor | None],
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    batch: int,
    tiles: Tensor | None,
    band: int | None,
) -> None:
    """Writes `scores`, as the kernels of attention read them."""
    rows, _, heads, head_dim = qkv.shape
    arch, precision = architecture(qkv.device), input_precision(qkv.dtype)
    config, constants = _plan(position_config, arch, qkv.dtype, head_dim, precision, band)
    grid = _grid(config.block_m, max_seqlen, heads * (2 - tables.count(None)), batch, tiles)
    sizes = heads, rows, max_seqlen, (slots.shape[0] + 1) // 2, float(scale), qkv.stride(0)
    run(position_scores_kernel, grid, (qkv, *tables, slots, *scores, cu_seqlens, tiles, *sizes), constants)


def _empty_scores(qkv: Tensor, max_seqlen: int, band: int | None) -> Tensor:
    rows, _, heads, _ = qkv.shape
    # With a band, two more numbers a row; a plane of scores and then of these.
    columns = -(-max_seqlen // PITCH.value) * PITCH.value if band is None else 2 * band + PITCH.value + 2
    return torch.empty((heads, rows, columns), dtype=qkv.dtype, device=qkv.device)


def disentangled_attention(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` with scores by position; never waits for the device.

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; dtypes and sizes as in `attention`.
        c2p: (slots, heads, head_dim), of the dtype of qkv: to the product of a query and a key is added that of the
            query and the row of this table which is their distance's. None: nothing is.
        p2c: the same for the product with the key. One of the two is given.
        slots: (2 R - 1,) int32: slots[R - 1 + i - j] is the row of query i and key j; its first or its last for those
            that are further apart.
        cu_seqlens, key_mask, max_seqlen, scale, tiles: as `attention` has them; `scale` is of all three products.
        dropout, seed: as `attention_forward` has them.

    Returns:
        What `attention_forward` returns. Two launches.

    Raises:
        ValueError: as in `attention_forward`; `c2p`, `p2c` or `slots` of another shape or dtype. That `slots` lie
            within the tables isn't looked at.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    tables = _tables(qkv, c2p, p2c, slots)
    rows, _, heads, head_dim = qkv.shape
    batch, key_mask, tiles = _checked(rows, cu_seqlens, key_mask, max_seqlen, scale, tiles, qkv.device)
    planes = 2 if qkv.dtype == torch.float32 else 1
    stats = torch.empty((planes, heads, rows), dtype=torch.float32, device=qkv.device)
    out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return out, stats
    band = _band(slots, max_seqlen)
    scores = [None if table is None else _empty_scores(qkv, max_seqlen, band) for table in tables]
    _position_scores(qkv, tables, slots, scores, cu_seqlens, max_seqlen, scale, batch, tiles, band)
    arch, precision = architecture(qkv.device), input_precision(qkv.dtype)
    masked = key_mask is not None
    config, constants = _plan(disentangled_config, arch, qkv.dtype, head_dim, precision, band, masked=masked)
    q, k, v = qkv.unbind(1)
    pointers = q, k, v, out, stats, cu_seqlens, key_mask, seed, None, tiles, *scores
    strides = (qkv.stride(0), head_dim) * 3
    dropped = draw_threshold(dropout), keep_scale(dropout)
    numbers = heads, max_seqlen, scale * LOG2E, *strides, rows, *dropped, 0, 1 / scale, 1.0
    run(attention_kernel, _grid(config.block_m, max_seqlen, heads, batch, tiles), (*pointers, *numbers), constants)
    return out, stats


def disentangled_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `disentangled_attention`, by what that returned.

    Args:
        grad: (T, heads, head_dim), the gradient of its first result.
        out, stats: what it returned; all others what it was given.

    Returns:
        dqkv, (T, 3, heads, head_dim); and dc2p and dp2c, of the shape and dtype of their tables: empty, (0,), of one
        that isn't given. Deterministic: the same bits every time. Six launches; seven with a band.

    Raises:
        ValueError: as in `disentangled_attention`; `grad` of another shape than `out`.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    tables = _tables(qkv, c2p, p2c, slots)
    rows, _, heads, head_dim = qkv.shape
    batch, key_mask, tiles = _checked(rows, cu_seqlens, key_mask, max_seqlen, scale, tiles, qkv.device)
    if grad.shape != out.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected {tuple(out.shape)}, the shape of out")
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dtables = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tables]
    dc2p, dp2c = (torch.empty(0, dtype=qkv.dtype, device=qkv.device) if t is None else t for t in dtables)
    if rows == 0:
        return dqkv, dc2p.zero_(), dp2c.zero_()
    grad, out, stats = contiguous(grad), contiguous(out), contiguous(stats)
    band = _band(slots, max_seqlen)
    scores = [None if table is None else _empty_scores(qkv, max_seqlen, band) for table in tables]
    _position_scores(qkv, tables, slots, scores, cu_seqlens, max_seqlen, scale, batch, tiles, band)
    # Of queries the gradients of scores go beside the scores, which are read once more; of keys they replace them.
    gradients = [None if tables[0] is None else _empty_scores(qkv, max_seqlen, band), scores[1]]
    delta = torch.empty(1 if band is None else 5, heads, rows, dtype=torch.float32, device=qkv.device)

    arch, dtype, precision = architecture(qkv.device), qkv.dtype, input_precision(qkv.dtype)
    masked = key_mask is not None
    config, by_queries = _plan(disentangled_backward_config, arch, dtype, head_dim, precision, band, masked=masked)
    _, by_keys = _plan(disentangled_backward_config, arch, dtype, head_dim, precision, band, True)
    grid = _grid(config.block_m, max_seqlen, heads, batch, tiles)
    layout = cu_seqlens, key_mask, seed, None, tiles, *scores
    sizes = heads, rows, max_seqlen, draw_threshold(dropout), keep_scale(dropout)
    last = float(scale), scale * LOG2E, qkv.stride(0), 0, 1 / scale
    queries = (qkv, grad, out, stats, delta, dqkv, *layout, gradients[0], *sizes, 1.0 - dropout, *last)
    run(attention_backward_q_kernel, grid, queries, by_queries)
    run(attention_backward_kv_kernel, grid, (qkv, grad, stats, delta, dqkv, *layout, *sizes, *last), by_keys)

    kinds, reach, factor = 2 - tables.count(None), (slots.shape[0] + 1) // 2, scale * keep_scale(dropout)
    config, constants = _plan(position_config, arch, dtype, head_dim, precision, band)
    arguments = dqkv, *tables, slots, *gradients, delta, cu_seqlens, tiles, heads, rows, max_seqlen, reach, factor
    run(position_rows_kernel, _grid(config.block_m, max_seqlen, heads * kinds, batch, tiles), arguments, constants)
    furthest = max_seqlen if band is None else band + PITCH.value
    blocks = 2 * -(-furthest // config.block_n)
    chunks = max(1, min(batch, POSITION_PROGRAMS // (heads * kinds * blocks)))
    distances = blocks * config.block_n
    partial = torch.empty(chunks, kinds * heads, distances, head_dim, dtype=torch.float32, device=qkv.device)
    sums = qkv, *gradients, partial, cu_seqlens, batch, heads, rows, max_seqlen, qkv.stride(0)
    run(position_table_kernel, (blocks, kinds * heads, chunks), sums, constants)
    ends, parts = None, 0
    if band is not None:
        parts = max(1, POSITION_PROGRAMS // (heads * kinds))
        parts = min(parts, -(-rows // POSITION_ENDS.block_m))
        ends = torch.empty(parts, kinds * heads, 2, head_dim, dtype=torch.float32, device=qkv.device)
        given = qkv, delta, ends, cu_seqlens, batch, heads, rows, qkv.stride(0)
        run(position_ends_kernel, (parts, kinds * heads, 1), given, _ends_plan(head_dim, tables[0] is None))
    config, constants = _plan(position_slots_config, arch, dtype, head_dim, None)
    number = next(table.shape[0] for table in tables if table is not None)
    folded = slots, *dtables, partial, ends, chunks, parts, distances, heads, number, max_seqlen, reach, factor
    run(position_slots_kernel, (-(-number // config.block_m), kinds * heads, 1), folded, constants)
    return dqkv, dc2p, dp2c
