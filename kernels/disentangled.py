"""Disentangled attention, DeBERTa's: scores of contents, and of contents with how far key and query lie apart.

    score[i, j] = scale * (q[i] . k[j] + q[i] . c2p[slot(i - j)] + k[j] . p2c[slot(i - j)])

Tables by position: `position_scores_kernel` multiplies a block of rows with the table's rows of a block of distances,
and stores what it finds by position, so that each element lies at (query, key), or at (key, query), where attention
looks for it. The kernels of `attention.py` then add two ordinary tiles: no list of slots and no gather in their loop.

Backward, those kernels leave the gradients of scores by query and by key. `position_rows_kernel` adds to dQ and dK what
comes by the tables, one program a row. `position_table_kernel` sums for every distance, in parts, and
`position_slots_kernel` adds up parts and the distances of each slot. No atomics: the same bits every time.

The tables are 2 heads T L numbers, L the longest length, and their gradients half as many again: each part of a pair is
stored once. The attention is that of DeBERTa (He et al., 2020, https://arxiv.org/abs/2006.03654).
"""

from __future__ import annotations

from typing import Any

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
    locate,
)
from .compiled import Constants, run
from .dropout import checked_seed, draw_threshold, keep_scale
from .launch import (
    POSITION_PROGRAMS,
    Config,
    architecture,
    contiguous,
    disentangled_backward_config,
    disentangled_config,
    input_precision,
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
    c2p_scores_ptr,  # (heads, rows, pitch), written here, as attention_kernel has it; or None
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
    pitch = tl.cdiv(max_seqlen, PITCH) * PITCH
    scores_ptr = choose(by_key, c2p_scores_ptr, p2c_scores_ptr) + (head * rows + row + start_m) * pitch
    columns = tl.cdiv(length, PITCH) * PITCH  # past the sequence they are zeros: attention looks at whole blocks
    # Row start_m + m and column m + n lie start_m - n apart, whatever m is.
    for start_n in range(-BLOCK_M, columns, BLOCK_N):
        distance = start_m - start_n - offs_n
        table = load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM, offs_d)
        scores = tl.dot(x, tl.trans(table), input_precision=INPUT_PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        column = start_n + offs_n[None, :] + offs_m[:, None]
        scores = tl.where(column < length, scores, 0.0).to(scores_ptr.dtype.element_ty)
        mask = valid_m & (column >= 0) & (column < columns)
        tl.store(scores_ptr + (offs_m[:, None] * pitch + column), scores, mask=mask)


@triton.jit(
    do_not_specialize=["heads", "rows", "max_seqlen", "reach", "factor"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr"],
)
def position_rows_kernel(
    dqkv_ptr,  # (rows, 3, heads, HEAD_DIM), contiguous; to its first two thirds is added
    c2p_ptr,  # as in position_scores_kernel
    p2c_ptr,
    slots_ptr,
    c2p_grad_ptr,  # (heads, rows, pitch): the gradients of scores, at (query, key), not yet scaled; or None
    p2c_grad_ptr,  # the same at (key, query)
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
    pitch = tl.cdiv(max_seqlen, PITCH) * PITCH
    grad_ptr = choose(by_key, c2p_grad_ptr, p2c_grad_ptr) + (head * rows + row + start_m) * pitch
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(-BLOCK_M, length, BLOCK_N):  # as in position_scores_kernel
        distance = start_m - start_n - offs_n
        table = load_table(table_ptr, slots_ptr, distance, length, by_key, head, heads, reach, HEAD_DIM, offs_d)
        column = start_n + offs_n[None, :] + offs_m[:, None]
        mask = valid_m & (column >= 0) & (column < length)
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
):
    # Blocks of distances: 0, -1, 1, -2, 2, ... Those with the most pairs begin first.
    block = (tl.program_id(0) + 1) // 2
    block = tl.where(tl.program_id(0) % 2 == 1, -block, block)
    by_key, head = kind_of(tl.program_id(1).to(tl.int64), heads, c2p_grad_ptr, p2c_grad_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    pitch = tl.cdiv(max_seqlen, PITCH) * PITCH
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
            grad = tl.load(tile_ptr + (offs_m[:, None] * pitch + column), mask=mask, other=0.0)
            x_ptr = qkv_ptr + (row + start_m) * stride_qt + (by_key * heads + head) * HEAD_DIM
            x = tl.load(
                x_ptr + (offs_m[:, None] * stride_qt + offs_d[None, :]), mask=valid_m[:, None] & mask_d, other=0.0
            )
            acc = tl.dot(tl.trans(grad), x, acc, input_precision=INPUT_PRECISION)
    distances = tl.num_programs(0) * BLOCK_N
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * distances + distances // 2 + first
    tl.store(partial_ptr + place * HEAD_DIM + (offs_n[:, None] * HEAD_DIM + offs_d[None, :]), acc, mask=mask_d)


@triton.jit(do_not_specialize=["chunks", "distances", "heads", "slots", "max_seqlen", "reach", "factor"])
def position_slots_kernel(
    slots_ptr,
    dc2p_ptr,  # (slots, heads, HEAD_DIM), written here; or None
    dp2c_ptr,
    partial_ptr,  # (chunks, kinds * heads, distances, HEAD_DIM) float32, as position_table_kernel wrote it
    chunks,
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
    out_ptr = choose(by_key, dc2p_ptr, dp2c_ptr) + head * HEAD_DIM
    out = (acc * factor).to(out_ptr.dtype.element_ty)
    out_offs = own[:, None] * (heads * HEAD_DIM) + offs_d[None, :]
    tl.store(out_ptr + out_offs, out, mask=(own < slots)[:, None] & mask_d)


@planned
def _plan(
    choose_config: Any, arch: str, dtype: torch.dtype, head_dim: int, precision: str | None, swapped: bool = False
) -> tuple[Config, Constants]:
    """A configuration and its constants; `swapped`: BLOCK_N is block_m, of the kernel that holds keys."""
    config: Config = choose_config(arch, dtype, head_dim)
    held, walked = ("BLOCK_N", "BLOCK_M") if swapped else ("BLOCK_M", "BLOCK_N")
    constants = {
        "HEAD_DIM": head_dim,
        held: config.block_m,
        walked: config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        **({} if precision is None else {"INPUT_PRECISION": precision}),
        **options(config),
    }
    return config, Constants(constants)


def _tables(qkv: Tensor, c2p: Tensor | None, p2c: Tensor | None, slots: Tensor, max_seqlen: int) -> list[Tensor | None]:
    """The tables, contiguous. Raises ValueError as `disentangled_attention` says of them and of `slots`."""
    if c2p is None and p2c is None:
        raise ValueError("c2p and p2c are None; expected a table, or attention without one")
    for name, table in (("c2p", c2p), ("p2c", p2c)):
        if table is not None and (table.ndim != 3 or table.shape[1:] != qkv.shape[2:] or table.dtype != qkv.dtype):
            expected = f"expected (slots, {qkv.shape[2]}, {qkv.shape[3]}) and {qkv.dtype}, as qkv is"
            raise ValueError(f"{name} has shape {tuple(table.shape)} and dtype {table.dtype}; {expected}")
    if c2p is not None and p2c is not None and c2p.shape != p2c.shape:
        raise ValueError(f"c2p has shape {tuple(c2p.shape)}, p2c {tuple(p2c.shape)}; expected the same")
    least = 2 * max_seqlen - 1
    if slots.ndim != 1 or not slots.shape[0] % 2 or slots.shape[0] < least or slots.dtype != torch.int32:
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and dtype {slots.dtype}; expected int32 of (2 R - 1,), "
            f"R at least {max_seqlen}"
        )
    return [None if table is None else contiguous(table) for table in (c2p, p2c)]


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
) -> None:
    """Writes `scores`, as the kernels of attention read them."""
    rows, _, heads, head_dim = qkv.shape
    arch, precision = architecture(qkv.device), input_precision(qkv.dtype)
    config, constants = _plan(position_config, arch, qkv.dtype, head_dim, precision)
    grid = _grid(config.block_m, max_seqlen, heads * (2 - tables.count(None)), batch, tiles)
    sizes = heads, rows, max_seqlen, (slots.shape[0] + 1) // 2, float(scale), qkv.stride(0)
    run(position_scores_kernel, grid, (qkv, *tables, slots, *scores, cu_seqlens, tiles, *sizes), constants)


def _empty_scores(qkv: Tensor, max_seqlen: int) -> Tensor:
    pitch = -(-max_seqlen // PITCH.value) * PITCH.value
    return torch.empty((qkv.shape[2], qkv.shape[0], pitch), dtype=qkv.dtype, device=qkv.device)


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
        slots: (2 R - 1,) int32, R at least max_seqlen: slots[R - 1 + i - j] is the row of query i and key j.
        cu_seqlens, key_mask, max_seqlen, scale, tiles: as `attention` has them; `scale` is of all three products.
        dropout, seed: as `attention_forward` has them.

    Returns:
        What `attention_forward` returns. Two launches.

    Raises:
        ValueError: as in `attention_forward`; `c2p`, `p2c` or `slots` of another shape or dtype. That `slots` lie
            within the tables isn't looked at.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    tables = _tables(qkv, c2p, p2c, slots, max_seqlen)
    rows, _, heads, head_dim = qkv.shape
    batch, key_mask, tiles = _checked(rows, cu_seqlens, key_mask, max_seqlen, scale, tiles, qkv.device)
    planes = 2 if qkv.dtype == torch.float32 else 1
    stats = torch.empty((planes, heads, rows), dtype=torch.float32, device=qkv.device)
    out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return out, stats
    scores = [None if table is None else _empty_scores(qkv, max_seqlen) for table in tables]
    _position_scores(qkv, tables, slots, scores, cu_seqlens, max_seqlen, scale, batch, tiles)
    arch, precision = architecture(qkv.device), input_precision(qkv.dtype)
    config, constants = _plan(disentangled_config, arch, qkv.dtype, head_dim, precision)
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
        that isn't given. Deterministic: the same bits every time. Six launches.

    Raises:
        ValueError: as in `disentangled_attention`; `grad` of another shape than `out`.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    tables = _tables(qkv, c2p, p2c, slots, max_seqlen)
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
    delta = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    scores = [None if table is None else _empty_scores(qkv, max_seqlen) for table in tables]
    _position_scores(qkv, tables, slots, scores, cu_seqlens, max_seqlen, scale, batch, tiles)
    # Of queries the gradients of scores go beside the scores, which are read once more; of keys they replace them.
    gradients = [None if tables[0] is None else _empty_scores(qkv, max_seqlen), scores[1]]

    arch, dtype, precision = architecture(qkv.device), qkv.dtype, input_precision(qkv.dtype)
    config, by_queries = _plan(disentangled_backward_config, arch, dtype, head_dim, precision)
    _, by_keys = _plan(disentangled_backward_config, arch, dtype, head_dim, precision, True)
    grid = _grid(config.block_m, max_seqlen, heads, batch, tiles)
    layout = cu_seqlens, key_mask, seed, None, tiles, *scores
    sizes = heads, rows, max_seqlen, draw_threshold(dropout), keep_scale(dropout)
    last = float(scale), scale * LOG2E, qkv.stride(0), 0, 1 / scale
    queries = (qkv, grad, out, stats, delta, dqkv, *layout, gradients[0], *sizes, 1.0 - dropout, *last)
    run(attention_backward_q_kernel, grid, queries, by_queries)
    run(attention_backward_kv_kernel, grid, (qkv, grad, stats, delta, dqkv, *layout, *sizes, *last), by_keys)

    kinds, reach, factor = 2 - tables.count(None), (slots.shape[0] + 1) // 2, scale * keep_scale(dropout)
    config, constants = _plan(position_config, arch, dtype, head_dim, precision)
    arguments = dqkv, *tables, slots, *gradients, cu_seqlens, tiles, heads, rows, max_seqlen, reach, factor
    run(position_rows_kernel, _grid(config.block_m, max_seqlen, heads * kinds, batch, tiles), arguments, constants)
    config, constants = _plan(position_config, arch, dtype, head_dim, precision)
    blocks = 2 * -(-max_seqlen // config.block_n)
    chunks = max(1, min(batch, POSITION_PROGRAMS // (heads * kinds * blocks)))
    distances = blocks * config.block_n
    partial = torch.empty(chunks, kinds * heads, distances, head_dim, dtype=torch.float32, device=qkv.device)
    sums = qkv, *gradients, partial, cu_seqlens, batch, heads, rows, max_seqlen, qkv.stride(0)
    run(position_table_kernel, (blocks, kinds * heads, chunks), sums, constants)
    config, constants = _plan(position_slots_config, arch, dtype, head_dim, None)
    number = next(table.shape[0] for table in tables if table is not None)
    folded = slots, *dtables, partial, chunks, distances, heads, number, max_seqlen, reach, factor
    run(position_slots_kernel, (-(-number // config.block_m), kinds * heads, 1), folded, constants)
    return dqkv, dc2p, dp2c
