"""Bidirectional softmax attention within each sequence, over rows of all sequences laid end to end.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h]) v[j, h],  j over the keys of i's own sequence that take part

One program takes BLOCK_M queries of one head of one sequence and walks that sequence's keys, BLOCK_N at a time,
carrying the softmax along: a running maximum and sum of each row, in float32 and in powers of two. Scores never reach
memory. BLOCK_N depends on dtype and head_dim alone and a program sees one sequence alone, so that the output of a
sequence is bitwise the same in any batch, packed or padded on the right; BLOCK_M says which rows share a program, and
nothing of how one is computed.

Of packed sequences a list, `attention_tiles`, tells each program its rows: those of the longest sequences first, so
that no long one is left for the end, and hardly a program without rows.

In training, dropout zeroes probabilities after the softmax, and what normalises each row is kept. The backward
computes the probabilities again from that, in two kernels without atomics: one holds queries and walks the keys for
dQ, one holds keys and walks the queries for dK and dV. The gradient of a bias by distance takes a third: a program
adds up the square tiles of dS, the gradient of the scores, that lie equally far from the diagonal, element by element,
and only at its end sums along the diagonals of what it has. A fourth adds up what the programs found, in a fixed order.

Scores by position, which `disentangled.py` makes, are two more tiles that the same kernels add to each tile of scores.
With a band, rows have such scores of the columns near to them alone: of those before and of those behind, one number.
The kernels walk the three parts one after the other, in the same order; no bit depends on where they meet.

`attention_fp8` writes what `quantize_fp8` would make of the result: in inference, where a scale is given.

The recurrence and the backward are those of FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import Constants, run
from .dependent import wait_for_previous
from .dropout import checked_seed, draw_threshold, keep_scale, keep_tile, keep_tile_transposed
from .launch import (
    DBIAS_PROGRAMS,
    SHORT,
    Choose,
    Config,
    architecture,
    attention_backward_config,
    attention_config,
    attention_dbias_config,
    contiguous,
    dependent,
    input_precision,
    is_dependent,
    of_bias,
    of_length,
    options,
    planned,
)
from .quantize_fp8 import INTERPRETED, to_e4m3

# Rows of an entry of the list of tiles: every block of rows that a program holds divides it.
TILE_ROWS = tl.constexpr(128)
# Scores by position have rows of a multiple of so many columns, and no block of rows or columns is larger.
PITCH = tl.constexpr(64)
# Sequences that a program of `tiles_kernel` takes at a time.
TILES_BLOCK = 64
# Sequences that a grid of them may have, in its last axis. More go by a list of tiles, which is one axis.
GRID_SEQUENCES = 65535
TILES = Constants(BLOCK=TILES_BLOCK, num_warps=4)
# Distances that a program of `attention_dbias_sum_kernel` takes.
SUM_BLOCK = 128
LOG2E = math.log2(math.e)


@triton.jit(do_not_specialize=["sequences", "entries"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def tiles_kernel(
    cu_seqlens_ptr,  # (sequences + 1,)
    tiles_ptr,  # (entries, 4) int32
    sequences,
    entries,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first_row = tl.load(cu_seqlens_ptr + own, mask=own < sequences, other=0)
    length = tl.load(cu_seqlens_ptr + own + 1, mask=own < sequences, other=0) - first_row
    place = tl.zeros([BLOCK], tl.int32)  # of a sequence's first tile: the tiles of all that come before it
    total = 0
    for start in range(0, sequences, BLOCK):
        other = start + tl.arange(0, BLOCK)
        begin = tl.load(cu_seqlens_ptr + other, mask=other < sequences, other=0)
        other_length = tl.load(cu_seqlens_ptr + other + 1, mask=other < sequences, other=0) - begin
        tiles = tl.cdiv(other_length, TILE_ROWS)
        longer = other_length[None, :] > length[:, None]
        earlier = (other_length[None, :] == length[:, None]) & (other[None, :] < own[:, None])
        place += tl.sum(tl.where(longer | earlier, tiles[None, :], 0), 1)
        total += tl.sum(tiles)
    for start in range(0, tl.max(length), TILE_ROWS):
        entry_ptr = tiles_ptr + (place + start // TILE_ROWS) * 4
        there = start < length
        tl.store(entry_ptr, first_row, mask=there)
        tl.store(entry_ptr + 1, length, mask=there)
        tl.store(entry_ptr + 2, tl.zeros([BLOCK], tl.int32) + start, mask=there)
        tl.store(entry_ptr + 3, own, mask=there)
    # At most as many entries as there are sequences are left over.
    left = tiles_ptr + (total + own[:, None]) * 4 + tl.arange(0, 4)[None, :]
    tl.store(left, tl.zeros([BLOCK, 4], tl.int32), mask=(own < sequences)[:, None] & (total + own < entries)[:, None])


@triton.jit
def locate(cu_seqlens_ptr, tiles_ptr, heads, max_seqlen, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """Of the rows of a program: the head, the sequence, its first row and length, and where in it they start."""
    if tiles_ptr is None:
        start = tl.program_id(0) * BLOCK
        head = tl.program_id(1).to(tl.int64)
        sequence = tl.program_id(2).to(tl.int64)
        if cu_seqlens_ptr is None:
            row = sequence * max_seqlen
            length = max_seqlen
        else:
            row = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            length = (tl.load(cu_seqlens_ptr + sequence + 1) - row).to(tl.int32)
    else:
        tl.static_assert(LISTED % BLOCK == 0)
        PARTS: tl.constexpr = LISTED // BLOCK
        tile = tl.program_id(0) // heads
        head = (tl.program_id(0) % heads).to(tl.int64)
        tiles_ptr += tile // PARTS * 4
        row = tl.load(tiles_ptr).to(tl.int64)
        length = tl.load(tiles_ptr + 1)
        start = tl.load(tiles_ptr + 2) + tile % PARTS * BLOCK
        sequence = tl.load(tiles_ptr + 3).to(tl.int64)
    return head, sequence, row, length, start


@triton.jit
def reached(
    start,
    length,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    BLOCKS: tl.constexpr,  # PITCH
    PART: tl.constexpr,
):
    """Of BLOCK rows from `start` on, where the others that a window lets them reach begin, by steps, and end.

    With a band, of one part: 0, those before it; 1, in it; 2, behind it.
    """
    first = 0
    last = length
    if WINDOW is not None:
        first = tl.maximum(start - WINDOW, 0) // STEP * STEP
        last = tl.minimum(start + BLOCK + WINDOW, length)
    if BAND is not None:
        block = start // BLOCKS
        before = tl.maximum(block - BAND // BLOCKS, 0) * BLOCKS
        behind = tl.minimum(block * BLOCKS + (BLOCKS + BAND), length)
        if PART == 0:
            last = before
        elif PART == 1:
            first = before
            last = behind
        else:
            first = behind
    return first, last


@triton.jit
def pitch_of(max_seqlen, BAND: tl.constexpr, BLOCKS: tl.constexpr):
    """How far the scores by position of two rows lie apart, a multiple of BLOCKS, which is PITCH."""
    if BAND is None:
        pitch = tl.cdiv(max_seqlen, BLOCKS) * BLOCKS
    else:
        pitch = 2 * BAND + BLOCKS
    return pitch


@triton.jit
def band_place(row, column, BAND: tl.constexpr, BLOCKS: tl.constexpr):
    """Where a row, of a block of BLOCKS, which is PITCH, has the score by position of a column."""
    return column - row // BLOCKS * BLOCKS + BAND


@triton.jit
def is_near(queries, keys, window):
    """Whether keys are within the window of queries, which broadcast to a tile."""
    return (keys - queries <= window) & (queries - keys <= window)


@triton.jit
def add_bias(scores, bias_ptr, bias_span, inverse_scale, head, queries, keys, length):
    """`scores` of a tile with the bias, which is scaled as they are; `queries` and `keys` broadcast to its shape."""
    bias_ptr += head * (2 * bias_span - 1) + bias_span - 1
    bias = tl.load(bias_ptr + (keys - queries), mask=(queries < length) & (keys < length), other=0.0)
    return tl.fma(bias, inverse_scale, scores)


@triton.jit
def score_row(scores_ptr, head, rows, row, pitch):
    """Where the scores by position of a row begin, in (heads, rows, pitch); None if there are none."""
    row_ptr = scores_ptr  # Triton 3.6 returns no argument that is None
    if scores_ptr is not None:
        row_ptr += (head * rows + row) * pitch
    return row_ptr


@triton.jit
def ends_row(scores_ptr, head, heads, rows, row, pitch, SIDE: tl.constexpr):
    """Where, after the scores by position, those of a row begin that are before its band, or behind it; or None."""
    row_ptr = scores_ptr  # as above
    if scores_ptr is not None:
        row_ptr += heads.to(tl.int64) * rows * pitch + (SIDE * heads + head) * rows + row
    return row_ptr


@triton.jit
def near_tile(scores_ptr, tile_ptr, head, rows, row, start, columns, pitch, BAND: tl.constexpr, BLOCKS: tl.constexpr):
    """Where the scores of rows from `row` on, `start` of their sequence, have those columns: with a band, not at
    `tile_ptr`; or None."""
    near_ptr = tile_ptr
    if BAND is not None and scores_ptr is not None:
        near_ptr = score_row(scores_ptr, head, rows, row, pitch) + band_place(start, columns, BAND, BLOCKS)
    return near_ptr


@triton.jit
def sums_row(delta_ptr, head, heads, rows, row, plane):
    """Where, after delta, the sums beyond the band begin of a row: of queries in planes 0 and 1, of keys in 2 and 3."""
    return delta_ptr + ((1 + plane) * heads + head) * rows + row


@triton.jit
def load_ends(ptr, valid, N: tl.constexpr):
    """Scores by position, beyond their band, of N rows that are `valid`; None if there are none."""
    ends = None
    if ptr is not None:
        ends = tl.load(ptr + tl.arange(0, N), mask=valid, other=0.0)
    return ends


@triton.jit
def sum_ends(own, other, inverse_scale, M: tl.constexpr, N: tl.constexpr):
    """`sum_positions` of a tile beyond the band, where each row and each column has one score: the same operations."""
    total = None
    if own is not None:
        total = tl.broadcast_to((own.to(tl.float32) * inverse_scale)[:, None], (M, N))
    if other is not None:
        if own is not None:
            total = tl.fma(other.to(tl.float32)[None, :], inverse_scale, total)
        else:
            total = tl.broadcast_to((other.to(tl.float32) * inverse_scale)[None, :], (M, N))
    return total


@triton.jit
def load_positions(ptr, pitch, valid, M: tl.constexpr, N: tl.constexpr):
    """Scores by position of M rows that are `valid`, N columns of each; None if there are none."""
    scores = None
    if ptr is not None:
        offs = tl.arange(0, M)[:, None] * pitch + tl.arange(0, N)[None, :]
        scores = tl.load(ptr + offs, mask=valid[:, None], other=0.0)
    return scores


@triton.jit
def sum_positions(own, other, inverse_scale):
    """What a tile of scores begins at: scores by position, of its rows and of its columns, in units of the others.

    Not added afterwards: the layout they are loaded in would spread from there to what a tile's rows are summed in.
    """
    total = None
    if own is not None:
        total = own.to(tl.float32) * inverse_scale
    if other is not None:
        if own is not None:
            total = tl.fma(tl.trans(other).to(tl.float32), inverse_scale, total)
        else:
            total = tl.trans(other).to(tl.float32) * inverse_scale
    return total


@triton.jit(
    do_not_specialize=[
        *("heads", "max_seqlen", "rows", "threshold", "bias_span"),
        *("scale_log2e", "kept_scale", "inverse_scale", "out_inverse_scale"),
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "key_mask_ptr", "seed_ptr"],
)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # of the dtype of the others, or e4m3 in units of a scale
    stats_ptr,  # (planes, heads, rows) float32, as `attention_forward` returns; or None
    cu_seqlens_ptr,  # None: every sequence has max_seqlen rows
    key_mask_ptr,  # None: every key takes part
    seed_ptr,  # of dropout, or None
    bias_ptr,  # (heads, 2 * bias_span - 1) float32, by how far the key is from the query; or None
    tiles_ptr,  # (entries, 4) int32, as `attention_tiles` returns; None: the grid is of blocks, heads and sequences
    c2p_ptr,  # (heads, rows, pitch): of each query its scaled scores by the positions of keys; or None
    p2c_ptr,  # the same of each key, by the positions of queries; or None. pitch: max_seqlen, up to a multiple of PITCH
    # With a band, pitch is 2 * BAND + PITCH; and (2, heads, rows) behind them: of all keys before and of all behind it
    heads,
    max_seqlen,
    scale_log2e,  # scale * log2(e)
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    rows,  # of training alone, as are the next two: last, so that inference compiles to what it does without them
    threshold,  # of dropout
    kept_scale,
    bias_span,  # of a bias alone
    inverse_scale,  # of a bias, or of scores by position
    out_inverse_scale,  # of an e4m3 result alone
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, HEAD_DIM or more
    INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = None,  # how many tokens before it and after it a query attends to; None: to all
    DEPENDENT: tl.constexpr = False,
    BAND: tl.constexpr = None,  # beyond so many tokens, a multiple of PITCH, a row's score by position is one; or None
):
    wait_for_previous(DEPENDENT)
    head, sequence, row, length, start_m = locate(cu_seqlens_ptr, tiles_ptr, heads, max_seqlen, BLOCK_M, TILE_ROWS)
    if start_m >= length:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    mask_q = (start_m + offs_m[:, None] < length) & mask_d
    # 64-bit scalars carry the rows; offsets inside a tile stay in 32 bits, and out of the loop.
    q_tile_ptr = q_ptr + (row + start_m) * stride_qt + head * stride_qh
    k_tile_ptr = k_ptr + row * stride_kt + head * stride_kh
    v_tile_ptr = v_ptr + row * stride_vt + head * stride_vh
    k_offs = offs_n[:, None] * stride_kt + offs_d[None, :]
    v_offs = offs_n[:, None] * stride_vt + offs_d[None, :]
    q = tl.load(q_tile_ptr + offs_m[:, None] * stride_qt + offs_d[None, :], mask=mask_q, other=0.0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, 8], tl.float32)  # of every eighth column: as threads hold them, so none is exchanged
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    own = start_m // BLOCK_M * BLOCK_M  # start_m; from a list of tiles, the compiler knows no multiple of it
    c2p_tile_ptr = score_row(c2p_ptr, head, rows, row + start_m, pitch)
    p2c_tile_ptr = score_row(p2c_ptr, head, rows, row, pitch)
    if p2c_ptr is not None:
        p2c_tile_ptr += own
    for part in tl.static_range(1 if BAND is None else 0, 2 if BAND is None else 3):
        first, last = reached(start_m, length, WINDOW, BLOCK_M, BLOCK_N, BAND, PITCH, part)
        if WINDOW is not None:
            k_tile_ptr += first.to(tl.int64) * stride_kt
            v_tile_ptr += first.to(tl.int64) * stride_vt
        if BAND is not None:
            if part == 1:
                if c2p_ptr is not None:
                    c2p_tile_ptr += band_place(own, first, BAND, PITCH)
            else:
                c2p_ends_ptr = ends_row(c2p_ptr, head, heads, rows, row + start_m, pitch, part // 2)
                c2p_ends = load_ends(c2p_ends_ptr, start_m + offs_m < length, BLOCK_M)
                p2c_ends_ptr = ends_row(p2c_ptr, head, heads, rows, row + first, pitch, 1 - part // 2)
                p2c_ends = load_ends(p2c_ends_ptr, first + offs_n < last, BLOCK_N)
        for start_n in range(first, last, BLOCK_N):
            keep = offs_n < length - start_n
            mask_kv = keep[:, None] & mask_d
            if key_mask_ptr is not None:  # asked for before the matmul, which hides its latency
                keep = tl.load(key_mask_ptr + sequence * max_seqlen + start_n + offs_n, mask=keep, other=False)
            k = tl.load(k_tile_ptr + k_offs, mask=mask_kv, other=0.0)
            if part == 1:
                p2c_near_ptr = near_tile(
                    p2c_ptr, p2c_tile_ptr, head, rows, row + start_n, start_n, own, pitch, BAND, PITCH
                )
                c2p = load_positions(c2p_tile_ptr, pitch, start_m + offs_m < length, BLOCK_M, BLOCK_N)
                p2c = load_positions(p2c_near_ptr, pitch, start_n + offs_n < length, BLOCK_N, BLOCK_M)
                start = sum_positions(c2p, p2c, inverse_scale)
            else:
                start = sum_ends(c2p_ends, p2c_ends, inverse_scale, BLOCK_M, BLOCK_N)
                if p2c_ptr is not None:  # of the next keys, as early as that
                    p2c_ends_ptr += BLOCK_N
                    p2c_ends = load_ends(p2c_ends_ptr, start_n + BLOCK_N + offs_n < length, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), start, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
            if bias_ptr is not None:
                queries, keys = (start_m + offs_m)[:, None], (start_n + offs_n)[None, :]
                scores = add_bias(scores, bias_ptr, bias_span, inverse_scale, head, queries, keys, length)
            if WINDOW is not None:
                near = is_near((start_m + offs_m)[:, None], (start_n + offs_n)[None, :], WINDOW)
                scores = tl.where(near & keep[None, :], scores, float("-inf"))
            elif key_mask_ptr is not None:
                scores = tl.where(keep[None, :], scores, float("-inf"))
            elif start_n + BLOCK_N > length:
                # In a branch, so that full blocks don't pay; not in a copy of the loop's body for the last block, whose
                # loads nothing would hide. Compared anew: `keep` would be carried here from loads issued blocks ago, at
                # twenty registers a thread.
                scores = tl.where((start_n + offs_n < length)[None, :], scores, float("-inf"))

            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
            shift = new_max
            if key_mask_ptr is not None or WINDOW is not None:
                # Without a key so far the maximum is -inf, and -inf - -inf is NaN.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(tl.fma(scores, scale_log2e, -shift[:, None]))
            correction = tl.exp2(row_max - shift)
            sums = tl.fma(sums, correction[:, None], tl.sum(p.reshape(BLOCK_M, BLOCK_N // 8, 8), 1))
            row_max = new_max

            if seed_ptr is not None:  # the sum is of all, kept or not
                queries = row + start_m + offs_m
                p = tl.where(keep_tile(seed, queries, start_n, head, threshold, BLOCK_M, BLOCK_N), p, 0.0)
            v = tl.load(v_tile_ptr + v_offs, mask=mask_kv, other=0.0)
            acc = acc * correction[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
            k_tile_ptr += BLOCK_N * stride_kt
            v_tile_ptr += BLOCK_N * stride_vt
            if part == 1:
                if c2p_ptr is not None:
                    c2p_tile_ptr += BLOCK_N
                if BAND is None and p2c_ptr is not None:
                    p2c_tile_ptr += BLOCK_N * pitch

    row_sum = tl.sum(sums, 1)
    if key_mask_ptr is not None or WINDOW is not None:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # all keys masked: zero, as acc is
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    norm = 1.0 / row_sum
    if stats_ptr is not None:
        stats_ptr += head * rows + row + start_m + offs_m
        if q_ptr.dtype.element_ty == tl.float32:
            tl.store(stats_ptr + heads.to(tl.int64) * rows, norm, mask=start_m + offs_m < length)
        else:
            row_max += tl.log2(row_sum)
        tl.store(stats_ptr, -row_max, mask=start_m + offs_m < length)
    if seed_ptr is not None:
        norm = norm * kept_scale
    acc = acc * norm[:, None]
    stride_ot = heads * HEAD_DIM
    out_tile_ptr = out_ptr + (row + start_m) * stride_ot + head * HEAD_DIM
    out_offs = offs_m[:, None] * stride_ot + offs_d[None, :]
    out = acc.to(q_ptr.dtype.element_ty)
    if out_ptr.dtype.element_ty == tl.float8e4nv:  # of the rounded result, as it is where that comes from memory
        out = to_e4m3(out.to(tl.float32) * out_inverse_scale, INTERPRETED)
        # Compared anew: for the layout that FP8 is stored in, a mask from above would be carried through the loop.
        mask_q = (offs_m[:, None] < length - start_m) & mask_d
    tl.store(out_tile_ptr + out_offs, out, mask=mask_q)


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "max_seqlen", "threshold", "bias_span"),
        *("kept_scale", "keep_rate", "scale", "scale_log2e", "inverse_scale"),
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "key_mask_ptr", "seed_ptr"],
)
def attention_backward_q_kernel(
    qkv_ptr,  # (rows, 3, heads, HEAD_DIM), rows stride_qt apart
    grad_ptr,  # (rows, heads, HEAD_DIM), contiguous
    out_ptr,  # the same
    stats_ptr,  # (planes, heads, rows)
    # (heads, rows) float32, written here: grad . out of each row, as the other kernel needs it. With a band (5, heads,
    # rows): after these the sums of `ds` before it and behind it, of queries, written here, and of keys, written there
    delta_ptr,
    dqkv_ptr,  # (rows, 3, heads, HEAD_DIM), contiguous; here the first third
    cu_seqlens_ptr,
    key_mask_ptr,
    seed_ptr,
    bias_ptr,  # as in attention_kernel, with the next three
    tiles_ptr,
    c2p_ptr,
    p2c_ptr,
    ds_ptr,  # as c2p, written here where that is given: the gradients of scores, not yet scaled
    heads,
    rows,
    max_seqlen,
    threshold,
    kept_scale,
    keep_rate,  # 1 / kept_scale, or 0
    scale,
    scale_log2e,
    stride_qt,
    bias_span,  # of a bias alone
    inverse_scale,  # of a bias, or of scores by position
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys at a time
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = None,
    BAND: tl.constexpr = None,
):
    head, sequence, row, length, start_m = locate(cu_seqlens_ptr, tiles_ptr, heads, max_seqlen, BLOCK_M, TILE_ROWS)
    if start_m >= length:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    valid_m = start_m + offs_m < length
    mask_q = valid_m[:, None] & mask_d
    third = heads * HEAD_DIM
    q_tile_ptr = qkv_ptr + (row + start_m) * stride_qt + head * HEAD_DIM
    grad_offs = (row + start_m) * third + head * HEAD_DIM + offs_m[:, None] * third + offs_d[None, :]
    q = tl.load(q_tile_ptr + offs_m[:, None] * stride_qt + offs_d[None, :], mask=mask_q, other=0.0)
    grad = tl.load(grad_ptr + grad_offs, mask=mask_q, other=0.0)
    out = tl.load(out_ptr + grad_offs, mask=mask_q, other=0.0)
    # Of what dropout scales up, kept_scale is taken out, here and in all that is multiplied with it, to the very end.
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) * keep_rate
    offs_row = head * rows + row + start_m + offs_m
    tl.store(delta_ptr + offs_row, delta, mask=valid_m)
    shift = tl.load(stats_ptr + offs_row, mask=valid_m, other=0.0)
    if qkv_ptr.dtype.element_ty == tl.float32:
        norm = tl.load(stats_ptr + heads.to(tl.int64) * rows + offs_row, mask=valid_m, other=0.0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    k_tile_ptr = qkv_ptr + row * stride_qt + third + head * HEAD_DIM
    kv_offs = offs_n[:, None] * stride_qt + offs_d[None, :]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    own = start_m // BLOCK_M * BLOCK_M  # as in attention_kernel, with all of the next
    c2p_tile_ptr = score_row(c2p_ptr, head, rows, row + start_m, pitch)
    p2c_tile_ptr = score_row(p2c_ptr, head, rows, row, pitch)
    ds_tile_ptr = score_row(ds_ptr, head, rows, row + start_m, pitch)
    if p2c_ptr is not None:
        p2c_tile_ptr += own
    for part in tl.static_range(1 if BAND is None else 0, 2 if BAND is None else 3):
        first, last = reached(start_m, length, WINDOW, BLOCK_M, BLOCK_N, BAND, PITCH, part)
        if WINDOW is not None:
            k_tile_ptr += first.to(tl.int64) * stride_qt
        if BAND is not None:
            if part == 1:
                if c2p_ptr is not None:
                    c2p_tile_ptr += band_place(own, first, BAND, PITCH)
                    ds_tile_ptr += band_place(own, first, BAND, PITCH)
            else:
                c2p_ends_ptr = ends_row(c2p_ptr, head, heads, rows, row + start_m, pitch, part // 2)
                c2p_ends = load_ends(c2p_ends_ptr, valid_m, BLOCK_M)
                p2c_ends_ptr = ends_row(p2c_ptr, head, heads, rows, row + first, pitch, 1 - part // 2)
                p2c_ends = load_ends(p2c_ends_ptr, first + offs_n < last, BLOCK_N)
                sums = tl.zeros([BLOCK_M, 8], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            takes_part = offs_n < length - start_n
            mask_kv = takes_part[:, None] & mask_d
            if key_mask_ptr is not None:
                takes_part = tl.load(
                    key_mask_ptr + sequence * max_seqlen + start_n + offs_n, mask=takes_part, other=False
                )
            k = tl.load(k_tile_ptr + kv_offs, mask=mask_kv, other=0.0)
            v = tl.load(k_tile_ptr + third + kv_offs, mask=mask_kv, other=0.0)
            if part == 1:
                p2c_near_ptr = near_tile(
                    p2c_ptr, p2c_tile_ptr, head, rows, row + start_n, start_n, own, pitch, BAND, PITCH
                )
                c2p = load_positions(c2p_tile_ptr, pitch, valid_m, BLOCK_M, BLOCK_N)
                p2c = load_positions(p2c_near_ptr, pitch, start_n + offs_n < length, BLOCK_N, BLOCK_M)
                start = sum_positions(c2p, p2c, inverse_scale)
            else:
                start = sum_ends(c2p_ends, p2c_ends, inverse_scale, BLOCK_M, BLOCK_N)
                if p2c_ptr is not None:  # of the next keys, as early as that
                    p2c_ends_ptr += BLOCK_N
                    p2c_ends = load_ends(p2c_ends_ptr, start_n + BLOCK_N + offs_n < length, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), start, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
            if bias_ptr is not None:
                queries, keys = (start_m + offs_m)[:, None], (start_n + offs_n)[None, :]
                scores = add_bias(scores, bias_ptr, bias_span, inverse_scale, head, queries, keys, length)
            p = tl.exp2(tl.fma(scores, scale_log2e, shift[:, None]))
            if qkv_ptr.dtype.element_ty == tl.float32:
                p = p * norm[:, None]
            if WINDOW is not None:
                near = is_near((start_m + offs_m)[:, None], (start_n + offs_n)[None, :], WINDOW)
                p = tl.where(near & takes_part[None, :], p, 0.0)
            elif key_mask_ptr is not None:
                p = tl.where(takes_part[None, :], p, 0.0)
            elif start_n + BLOCK_N > length:  # as in attention_kernel
                p = tl.where((start_n + offs_n < length)[None, :], p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
            if seed_ptr is not None:
                queries = row + start_m + offs_m
                dp = tl.where(keep_tile(seed, queries, start_n, head, threshold, BLOCK_M, BLOCK_N), dp, 0.0)
            ds = p * (dp - delta[:, None])
            if ds_ptr is not None and part != 1:
                sums += tl.sum(ds.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)
            ds = ds.to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=INPUT_PRECISION)
            if ds_ptr is not None and part == 1:  # zeros where there is no key
                tl.store(ds_tile_ptr + (offs_m[:, None] * pitch + offs_n[None, :]), ds, mask=valid_m[:, None])
                ds_tile_ptr += BLOCK_N
            k_tile_ptr += BLOCK_N * stride_qt
            if part == 1:
                if c2p_ptr is not None:
                    c2p_tile_ptr += BLOCK_N
                if BAND is None and p2c_ptr is not None:
                    p2c_tile_ptr += BLOCK_N * pitch
        if ds_ptr is not None and part != 1:
            ends_ptr = sums_row(delta_ptr, head, heads, rows, row + start_m, part // 2)
            tl.store(ends_ptr + offs_m, tl.sum(sums, 1), mask=valid_m)

    out_tile_ptr = dqkv_ptr + (row + start_m) * 3 * third + head * HEAD_DIM
    out_offs = offs_m[:, None] * 3 * third + offs_d[None, :]
    dq = dq * (scale * kept_scale)
    tl.store(out_tile_ptr + out_offs, dq.to(dqkv_ptr.dtype.element_ty), mask=mask_q)


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "max_seqlen", "threshold", "bias_span"),
        *("kept_scale", "scale", "scale_log2e", "inverse_scale"),
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "key_mask_ptr", "seed_ptr"],
)
def attention_backward_kv_kernel(
    qkv_ptr,  # all as in attention_backward_q_kernel
    grad_ptr,
    stats_ptr,
    delta_ptr,  # as that kernel wrote it
    dqkv_ptr,  # here the last two thirds
    cu_seqlens_ptr,
    key_mask_ptr,
    seed_ptr,
    bias_ptr,
    tiles_ptr,
    c2p_ptr,
    p2c_ptr,  # here, once a tile has been read, it is given the gradients of its scores, not yet scaled
    heads,
    rows,
    max_seqlen,
    threshold,
    kept_scale,
    scale,
    scale_log2e,
    stride_qt,
    bias_span,
    inverse_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a program
    BLOCK_M: tl.constexpr,  # queries at a time
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = None,
    BAND: tl.constexpr = None,
):
    head, sequence, row, length, start_n = locate(cu_seqlens_ptr, tiles_ptr, heads, max_seqlen, BLOCK_N, TILE_ROWS)
    if start_n >= length:
        return

    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    mask_kv = (start_n + offs_n < length)[:, None] & mask_d
    third = heads * HEAD_DIM
    k_tile_ptr = qkv_ptr + (row + start_n) * stride_qt + third + head * HEAD_DIM
    kv_offs = offs_n[:, None] * stride_qt + offs_d[None, :]
    k = tl.load(k_tile_ptr + kv_offs, mask=mask_kv, other=0.0)
    v = tl.load(k_tile_ptr + third + kv_offs, mask=mask_kv, other=0.0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    q_tile_ptr = qkv_ptr + row * stride_qt + head * HEAD_DIM
    grad_tile_ptr = grad_ptr + row * third + head * HEAD_DIM
    stats_ptr += head * rows + row
    delta_row_ptr = delta_ptr + head * rows + row
    q_offs = offs_m[:, None] * stride_qt + offs_d[None, :]
    grad_offs = offs_m[:, None] * third + offs_d[None, :]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    pitch = pitch_of(max_seqlen, BAND, PITCH)
    own = start_n // BLOCK_N * BLOCK_N  # as in attention_kernel, with all of the next
    c2p_tile_ptr = score_row(c2p_ptr, head, rows, row, pitch)
    p2c_tile_ptr = score_row(p2c_ptr, head, rows, row + start_n, pitch)
    if c2p_ptr is not None:
        c2p_tile_ptr += own
    if p2c_ptr is not None and key_mask_ptr is not None:
        offs_mask = sequence * max_seqlen + start_n + offs_n
        takes_part = tl.load(key_mask_ptr + offs_mask, mask=start_n + offs_n < length, other=False)
    for part in tl.static_range(1 if BAND is None else 0, 2 if BAND is None else 3):
        first, last = reached(start_n, length, WINDOW, BLOCK_N, BLOCK_M, BAND, PITCH, part)
        if WINDOW is not None:
            q_tile_ptr += first.to(tl.int64) * stride_qt
            grad_tile_ptr += first.to(tl.int64) * third
        if BAND is not None:
            if part == 1:
                if p2c_ptr is not None:
                    p2c_tile_ptr += band_place(own, first, BAND, PITCH)
            else:
                p2c_ends_ptr = ends_row(p2c_ptr, head, heads, rows, row + start_n, pitch, part // 2)
                p2c_ends = load_ends(p2c_ends_ptr, start_n + offs_n < length, BLOCK_N)
                c2p_ends_ptr = ends_row(c2p_ptr, head, heads, rows, row + first, pitch, 1 - part // 2)
                c2p_ends = load_ends(c2p_ends_ptr, first + offs_m < last, BLOCK_M)
                sums = tl.zeros([BLOCK_N, 8], tl.float32)
        for start_m in range(first, last, BLOCK_M):
            valid_m = offs_m < length - start_m
            mask_q = valid_m[:, None] & mask_d
            # Queries past the end are zeros, as are their gradients: what they add to dK and dV is zero.
            q = tl.load(q_tile_ptr + q_offs, mask=mask_q, other=0.0)
            grad = tl.load(grad_tile_ptr + grad_offs, mask=mask_q, other=0.0)
            shift = tl.load(stats_ptr + start_m + offs_m, mask=valid_m, other=0.0)
            delta = tl.load(delta_row_ptr + start_m + offs_m, mask=valid_m, other=0.0)
            if part == 1:
                c2p_near_ptr = near_tile(
                    c2p_ptr, c2p_tile_ptr, head, rows, row + start_m, start_m, own, pitch, BAND, PITCH
                )
                c2p = load_positions(c2p_near_ptr, pitch, valid_m, BLOCK_M, BLOCK_N)
                p2c = load_positions(p2c_tile_ptr, pitch, start_n + offs_n < length, BLOCK_N, BLOCK_M)
                start = sum_positions(p2c, c2p, inverse_scale)
            else:
                start = sum_ends(p2c_ends, c2p_ends, inverse_scale, BLOCK_N, BLOCK_M)
                if c2p_ptr is not None:
                    c2p_ends_ptr += BLOCK_M
                    c2p_ends = load_ends(c2p_ends_ptr, start_m + BLOCK_M + offs_m < length, BLOCK_M)
            scores = tl.dot(k, tl.trans(q), start, input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
            if bias_ptr is not None:
                queries, keys = (start_m + offs_m)[None, :], (start_n + offs_n)[:, None]
                scores = add_bias(scores, bias_ptr, bias_span, inverse_scale, head, queries, keys, length)
            p = tl.exp2(tl.fma(scores, scale_log2e, shift[None, :]))
            if qkv_ptr.dtype.element_ty == tl.float32:
                norm = tl.load(stats_ptr + heads.to(tl.int64) * rows + start_m + offs_m, mask=valid_m, other=0.0)
                p = p * norm[None, :]
            if WINDOW is not None:
                p = tl.where(is_near((start_m + offs_m)[None, :], (start_n + offs_n)[:, None], WINDOW), p, 0.0)
            if p2c_ptr is not None and key_mask_ptr is not None:  # gradients of scores are kept, beyond this program
                p = tl.where(takes_part[:, None], p, 0.0)
            if part == 2 and start_m + BLOCK_M > length:  # a key's own score may be too large for a power of two
                p = tl.where(valid_m[None, :], p, 0.0)
            dp = tl.dot(v, tl.trans(grad), input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
            kept = p
            if seed_ptr is not None:
                queries = row + start_m + offs_m
                keep = keep_tile_transposed(seed, queries, start_n, head, threshold, BLOCK_M, BLOCK_N)
                kept = tl.where(keep, p, 0.0)
                ds = tl.fma(kept, dp, -p * delta[None, :])
            else:
                ds = p * (dp - delta[None, :])
            if p2c_ptr is not None and part != 1:
                sums += tl.sum(ds.reshape(BLOCK_N, BLOCK_M // 8, 8), 1)
            dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision=INPUT_PRECISION)
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=INPUT_PRECISION)
            if part == 1:
                if p2c_ptr is not None:
                    offs_ds = offs_n[:, None] * pitch + offs_m[None, :]
                    tl.store(p2c_tile_ptr + offs_ds, ds, mask=(start_n + offs_n < length)[:, None])
                    p2c_tile_ptr += BLOCK_M
                if BAND is None and c2p_ptr is not None:
                    c2p_tile_ptr += BLOCK_M * pitch
            q_tile_ptr += BLOCK_M * stride_qt
            grad_tile_ptr += BLOCK_M * third
        if p2c_ptr is not None and part != 1:
            ends_ptr = sums_row(delta_ptr, head, heads, rows, row + start_n, 2 + part // 2)
            tl.store(ends_ptr + offs_n, tl.sum(sums, 1), mask=start_n + offs_n < length)

    dk = dk * (scale * kept_scale)
    dv = dv * kept_scale
    if key_mask_ptr is not None:  # of a key that takes no part, nothing above is of use: its probabilities are zero
        offs_mask = sequence * max_seqlen + start_n + offs_n
        takes_part = tl.load(key_mask_ptr + offs_mask, mask=start_n + offs_n < length, other=False)
        dk = tl.where(takes_part[:, None], dk, 0.0)
        dv = tl.where(takes_part[:, None], dv, 0.0)
    out_tile_ptr = dqkv_ptr + (row + start_n) * 3 * third + third + head * HEAD_DIM
    out_offs = offs_n[:, None] * 3 * third + offs_d[None, :]
    tl.store(out_tile_ptr + out_offs, dk.to(dqkv_ptr.dtype.element_ty), mask=mask_kv)
    tl.store(out_tile_ptr + third + out_offs, dv.to(dqkv_ptr.dtype.element_ty), mask=mask_kv)


@triton.jit(
    do_not_specialize=[
        *("sequences", "heads", "rows", "max_seqlen", "threshold", "bias_span"),
        *("kept_scale", "scale_log2e", "inverse_scale"),
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "key_mask_ptr", "seed_ptr"],
)
def attention_dbias_kernel(
    qkv_ptr,  # all as in attention_backward_q_kernel
    grad_ptr,
    stats_ptr,
    delta_ptr,  # as that kernel wrote it
    partial_ptr,  # (chunks, heads, 2, 2 * blocks * BLOCK) float32, by distance from -blocks * BLOCK: see the end
    cu_seqlens_ptr,
    key_mask_ptr,
    seed_ptr,
    bias_ptr,
    sequences,
    heads,
    rows,
    max_seqlen,
    threshold,
    kept_scale,
    scale_log2e,
    stride_qt,
    bias_span,
    inverse_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # queries of a tile, and keys
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # Blocks from a tile's queries to its keys: 0, 1, -1, 2, -2, ... Those with the most tiles begin first.
    away = (tl.program_id(0) + 1) // 2
    away = tl.where(tl.program_id(0) % 2 == 1, away, -away)
    head = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    third = heads * HEAD_DIM
    qkv_offs = offs[:, None] * stride_qt + offs_d[None, :]
    grad_offs = offs[:, None] * third + offs_d[None, :]
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # That of every tile; it needn't go as far as a tile does.
    distance = away * BLOCK + offs[None, :] - offs[:, None]
    mask_bias = (distance > -bias_span) & (distance < bias_span)
    bias_ptr += head * (2 * bias_span - 1) + bias_span - 1
    bias = tl.load(bias_ptr + distance, mask=mask_bias, other=0.0)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for sequence in range(tl.program_id(2), sequences, tl.num_programs(2)):
        if cu_seqlens_ptr is None:
            row = max_seqlen.to(tl.int64) * sequence
            length = max_seqlen
        else:
            row = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            length = (tl.load(cu_seqlens_ptr + sequence + 1) - row).to(tl.int32)
        for start_m in range(tl.maximum(-away, 0) * BLOCK, length - tl.maximum(away, 0) * BLOCK, BLOCK):
            start_n = start_m + away * BLOCK
            takes_part = start_n + offs < length
            mask_kv = takes_part[:, None] & mask_d
            valid_m = start_m + offs < length
            mask_q = valid_m[:, None] & mask_d
            if key_mask_ptr is not None:
                mask_ptr = key_mask_ptr + max_seqlen.to(tl.int64) * sequence + start_n
                takes_part = tl.load(mask_ptr + offs, mask=takes_part, other=False)
            q_tile_ptr = qkv_ptr + (row + start_m) * stride_qt + head * HEAD_DIM
            k_tile_ptr = qkv_ptr + (row + start_n) * stride_qt + third + head * HEAD_DIM
            grad_tile_ptr = grad_ptr + (row + start_m) * third + head * HEAD_DIM
            q = tl.load(q_tile_ptr + qkv_offs, mask=mask_q, other=0.0)
            k = tl.load(k_tile_ptr + qkv_offs, mask=mask_kv, other=0.0)
            grad = tl.load(grad_tile_ptr + grad_offs, mask=mask_q, other=0.0)
            v = tl.load(k_tile_ptr + third + qkv_offs, mask=mask_kv, other=0.0)
            offs_row = head * rows + row + start_m + offs
            shift = tl.load(stats_ptr + offs_row, mask=valid_m, other=0.0)
            delta = tl.load(delta_ptr + offs_row, mask=valid_m, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK]
            scores = tl.fma(bias, inverse_scale, scores)
            p = tl.exp2(tl.fma(scores, scale_log2e, shift[:, None]))
            if qkv_ptr.dtype.element_ty == tl.float32:
                norm = tl.load(stats_ptr + heads.to(tl.int64) * rows + offs_row, mask=valid_m, other=0.0)
                p = p * norm[:, None]
            p = tl.where(takes_part[None, :], p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=INPUT_PRECISION)  # [BLOCK, BLOCK]
            if seed_ptr is not None:
                keep = keep_tile(seed, row + start_m + offs, start_n, head, threshold, BLOCK, BLOCK)
                dp = tl.where(keep, dp, 0.0)
            # Queries past the end are zeros, as are their gradients and delta.
            total += p * (dp - delta[:, None])

    # total[i, j] is of the distance away * BLOCK + j - i. Each row turned by its number, a column c holds that of c,
    # and below, of the rows that ran over the end, that of c - BLOCK.
    columns = offs[:, None] + offs[None, :]
    total = tl.gather(total, columns % BLOCK, 1)
    ahead = tl.sum(tl.where(columns < BLOCK, total, 0.0), 0) * kept_scale
    behind = tl.sum(tl.where(columns < BLOCK, 0.0, total), 0) * kept_scale
    blocks = (tl.num_programs(0) + 1) // 2
    partial_ptr += (tl.program_id(2) * heads + head) * 4 * blocks * BLOCK + (blocks + away) * BLOCK
    tl.store(partial_ptr + offs, ahead)
    tl.store(partial_ptr + (2 * blocks - 1) * BLOCK + offs, behind)


@triton.jit(do_not_specialize=["chunks", "heads", "half", "bias_span"])
def attention_dbias_sum_kernel(
    partial_ptr,  # (chunks, heads, 2, 2 * half) float32, as the kernel above wrote it
    dbias_ptr,  # (heads, 2 * bias_span - 1) float32
    chunks,
    heads,
    half,
    bias_span,
    PART: tl.constexpr,  # BLOCK of the kernel above
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = cols - (bias_span - 1) + half
    # Of the first block nothing lies ahead, of the last nothing behind: nobody wrote there.
    mask_ahead = (place >= PART) & (place < 2 * half)
    mask_behind = (place >= 0) & (place < 2 * half - PART)
    dbias = tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        found_ptr = partial_ptr + (chunk * heads + head) * 4 * half + place
        dbias += tl.load(found_ptr, mask=mask_ahead, other=0.0)
        dbias += tl.load(found_ptr + 2 * half, mask=mask_behind, other=0.0)
    tl.store(dbias_ptr + head * (2 * bias_span - 1) + cols, dbias, mask=cols < 2 * bias_span - 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None = None,
    tiles: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Bidirectional softmax attention within each sequence; never waits for the device.

    Args:
        q, k, v: (T, heads, head_dim), one of float32, float16 and bfloat16, head_dim at most 128; last dimension
            contiguous, rows and heads of any stride.
        cu_seqlens: (B + 1,) int32, where sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] (packed layout); None
            where every sequence has max_seqlen rows (dense layout, B = T / max_seqlen).
        key_mask: (B, max_seqlen) bool, True where a key takes part; dense layout only. None: all take part.
        max_seqlen: length of the longest sequence, in tokens.
        scale: factor on the scores, before the softmax; positive.
        bias: (heads, 2 R - 1) float32, contiguous, R at least max_seqlen: bias[h, R - 1 + j - i] is added to the scaled
            score of query i and key j of a sequence. None: nothing is.
        tiles: `attention_tiles` of cu_seqlens, or None: then sequences come in their own order.
        window: how many tokens before it and after it a query attends to, 0 or more; None: to all of its sequence.

    Returns:
        (T, heads, head_dim), contiguous, the dtype of q. Rows whose keys are all masked are zero.

    Raises:
        ValueError: `q`, `k` or `v` is not contiguous in its last dimension; `key_mask` in the packed layout, or of
            another shape; rows that don't divide by `max_seqlen` in the dense one; `scale` not positive; `bias` or
            `tiles` of another shape or dtype.
    """
    _check_inference(q, k, v, max_seqlen, bias)
    layout = cu_seqlens, key_mask, max_seqlen
    return _launch_forward(q, k, v, None, *layout, scale, 0.0, None, tiles, bias, window=window)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    tiles: Tensor | None,
    out_scale: float,
) -> Tensor:
    """`attention(...)`, rounded to its dtype, in units of `out_scale` as float8_e4m3fn, saturated; in the same launch.

    Returns:
        (T, heads, head_dim), contiguous: bitwise what `quantize_fp8` makes of attention's result, by `out_scale`.

    Raises:
        ValueError: as `attention`; `out_scale` is not positive.
    """
    _check_inference(q, k, v, max_seqlen, bias)
    if not out_scale > 0:
        raise ValueError(f"out_scale is {out_scale}; expected a positive number")
    sequences = cu_seqlens, key_mask, max_seqlen
    return _launch_forward(q, k, v, None, *sequences, scale, 0.0, None, tiles, bias, out_scale)


def _check_bias(bias: Tensor | None, heads: int, max_seqlen: int) -> None:
    """Raises ValueError as `attention` says of its bias."""
    if bias is not None:
        least = 2 * max_seqlen - 1
        fits = bias.dim() == 2 and bias.shape[0] == heads and bias.shape[1] % 2 and bias.shape[1] >= least
        if not fits or bias.dtype != torch.float32 or not bias.is_contiguous():
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; expected a contiguous float32 tensor of "
                f"({heads}, 2 R - 1), R at least {max_seqlen}"
            )


def _check_inference(q: Tensor, k: Tensor, v: Tensor, max_seqlen: int, bias: Tensor | None) -> None:
    """Raises ValueError as `attention` says of its tensors."""
    _check_bias(bias, q.shape[1], max_seqlen)
    shape = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape != shape or x.stride(2) != 1:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; "
                f"expected shape {tuple(q.shape)}, contiguous in the last dimension"
            )


def _checked(
    rows: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    tiles: Tensor | None,
    device: torch.device,
) -> tuple[int, Tensor | None, Tensor | None]:
    """The number of sequences, the mask contiguous, tiles where they help. Raises ValueError as `attention` says."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")  # the maximum is taken before scaling
    if cu_seqlens is not None:
        if key_mask is not None:
            raise ValueError("key_mask is given together with cu_seqlens; packed sequences take none")
        batch = cu_seqlens.shape[0] - 1
        entries = rows // TILE_ROWS.value + batch
        if tiles is not None and (tiles.shape != (entries, 4) or tiles.dtype != torch.int32):
            raise ValueError(
                f"tiles has shape {tuple(tiles.shape)} and dtype {tiles.dtype}; "
                f"expected {(entries, 4)} and torch.int32, as attention_tiles returns"
            )
        if batch > GRID_SEQUENCES:
            return batch, None, attention_tiles(cu_seqlens, rows) if tiles is None else tiles
        return batch, None, tiles if max_seqlen > SHORT else None  # one block a sequence is as good as a list
    if tiles is not None:
        raise ValueError("tiles are given without cu_seqlens, of which they are a list")
    batch = rows // max_seqlen if rows else 0
    if batch * max_seqlen != rows:
        raise ValueError(f"q has {rows} rows; expected a multiple of max_seqlen ({max_seqlen})")
    if batch > GRID_SEQUENCES:
        starts = torch.arange(0, rows + 1, max_seqlen, dtype=torch.int32, device=device)
        tiles = attention_tiles(starts, rows)
    if key_mask is None:
        return batch, None, tiles
    if key_mask.shape != (batch, max_seqlen) or key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}; "
            f"expected {(batch, max_seqlen)} and torch.bool"
        )
    return batch, contiguous(key_mask), tiles


def attention_tiles(cu_seqlens: Tensor, rows: int) -> Tensor:
    """What `attention`, its forward in training and its backward share out among their programs, in this order.

    Args:
        cu_seqlens: (B + 1,) int32, as `attention` has it.
        rows: T, of all sequences.

    Returns:
        (T // 128 + B, 4) int32: for every 128 rows of a sequence, or fewer at its end, its first row, its length, how
        far into it they are and which it is; the longest sequences first. Zeros where there are no more. Made without
        waiting for the device.
    """
    sequences = cu_seqlens.shape[0] - 1
    entries = rows // TILE_ROWS.value + sequences
    tiles = torch.empty((entries, 4), dtype=torch.int32, device=cu_seqlens.device)
    if sequences:
        programs = -(-sequences // TILES_BLOCK)
        run(tiles_kernel, (programs, 1, 1), (cu_seqlens, tiles, sequences, entries), TILES)
    return tiles


def _grid(block: int, max_seqlen: int, heads: int, batch: int, tiles: Tensor | None) -> tuple[int, int, int]:
    """Of programs of `block` rows, as `locate` reads it."""
    if tiles is not None:
        return tiles.shape[0] * (TILE_ROWS.value // block) * heads, 1, 1
    return -(-max_seqlen // block), heads, batch


def constants_of(config: Config, head_dim: int, precision: str, window: int | None = None) -> dict[str, object]:
    """What the kernels of attention are compiled with, but for their blocks."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "INPUT_PRECISION": precision,
        **options(config),
        **({} if window is None else {"WINDOW": window}),
    }


@planned
def _plan(
    choose: Choose,
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    short: bool,
    biased: bool,
    precision: str,
    early: bool,
    window: int | None = None,
) -> tuple[Config, Constants]:
    """The configuration of `attention_kernel` and its constants; `short`: no sequence is longer than SHORT."""
    # Of more queries with a window, fewer of the keys that they reach together are each one's.
    config: Config = of_length(choose(arch, dtype, head_dim), SHORT if short or window is not None else SHORT + 1)
    if biased or window is not None:
        config = of_bias(config, arch)
    constants = constants_of(config, head_dim, precision, window)
    return config, Constants(constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **dependent(arch))


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    rows, heads, head_dim = q.shape
    batch, key_mask, tiles = _checked(rows, cu_seqlens, key_mask, max_seqlen, scale, tiles, q.device)
    if out_scale is None:
        out = q.new_empty((rows, heads, head_dim))
    else:
        out = q.new_empty((rows, heads, head_dim), dtype=torch.float8_e4m3fn)
    if rows == 0:
        return out
    arch, dtype, short = architecture(q.device), q.dtype, max_seqlen <= SHORT
    precision, early = input_precision(dtype), is_dependent(arch)
    kind = short, bias is not None, precision, early, window
    config, constants = _plan(attention_config, arch, dtype, head_dim, *kind)
    (stride_qt, stride_qh, _), (stride_kt, stride_kh, _), (stride_vt, stride_vh, _) = q.stride(), k.stride(), v.stride()
    arguments = (
        q,
        k,
        v,
        out,
        stats,
        cu_seqlens,
        key_mask,
        seed,
        bias,
        tiles,
        None,
        None,
        heads,
        max_seqlen,
        scale * LOG2E,
        stride_qt,
        stride_qh,
        stride_kt,
        stride_kh,
        stride_vt,
        stride_vh,
        rows,
        draw_threshold(dropout),
        keep_scale(dropout),
        0 if bias is None else (bias.shape[1] + 1) // 2,
        1 / scale,
        1.0 if out_scale is None else 1 / out_scale,
    )
    run(attention_kernel, _grid(config.block_m, max_seqlen, heads, batch, tiles), arguments, constants)
    return out


def _rows_of(qkv: Tensor) -> Tensor:
    """`qkv` itself, whose rows may be any distance apart, or a copy where they aren't contiguous."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (T, 3, heads, head_dim)")
    head_dim = qkv.shape[3]
    rows_are = (qkv.shape[2] * head_dim, head_dim, 1)
    return qkv if qkv.stride()[1:] == rows_are else qkv.contiguous()


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` with dropout of the probabilities, and what its backward needs; never waits for the device.

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; dtypes and sizes as in `attention`.
        cu_seqlens, key_mask, max_seqlen, scale: as `attention` has them.
        dropout: rate, 0 to 1, at which probabilities are dropped; the others are scaled by 1 / (1 - dropout).
        seed: int64 tensor of one element, on the device, which decides the dropped ones; None where `dropout` is 0.
        tiles, bias, window: as `attention` has them.

    Returns:
        (T, heads, head_dim), contiguous, zero in rows whose keys are all masked; and (planes, heads, T) float32, what
        makes the scores of each row probabilities again. Of 16 bits, one plane s: exp2(log2(e) * scaled score + s). In
        float32 two, and the probability is that times the second: in one number, a logarithm, there would be a rounding
        of the row's maximum, and in every probability computed from it.

    Raises:
        ValueError: as in `attention`; `dropout` out of range, or without a seed.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    _check_bias(bias, qkv.shape[2], max_seqlen)
    planes = 2 if qkv.dtype == torch.float32 else 1
    stats = torch.empty((planes, qkv.shape[2], qkv.shape[0]), dtype=torch.float32, device=qkv.device)
    q, k, v = qkv.unbind(1)
    layout = cu_seqlens, key_mask, max_seqlen
    out = _launch_forward(q, k, v, stats, *layout, scale, dropout, seed, tiles, bias, window=window)
    return out, stats


@planned
def _backward_plan(
    choose: Choose,
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    biased: bool,
    precision: str,
    window: int | None = None,
) -> tuple[Config, Constants, Constants]:
    """The configuration of the backward, and the constants of its two kernels: who holds block_m walks block_n."""
    config: Config = choose(arch, dtype, head_dim)
    if biased:
        config = of_bias(config, arch, backward=True)
    shared = constants_of(config, head_dim, precision, window)
    by_queries = Constants(shared, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    return config, by_queries, Constants(shared, BLOCK_N=config.block_m, BLOCK_M=config.block_n)


@planned
def _dbias_plan(
    choose: Choose, arch: str, dtype: torch.dtype, head_dim: int, precision: str
) -> tuple[Config, Constants]:
    """The configuration of `attention_dbias_kernel` and its constants."""
    config: Config = choose(arch, dtype, head_dim)
    return config, Constants(constants_of(config, head_dim, precision), BLOCK=config.block_m)


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `attention_forward`, by what that returned.

    Args:
        grad: (T, heads, head_dim), the gradient of its first result.
        out, stats: what it returned; all others what it was given.
        bias_grad: whether the gradient of `bias` is wanted.

    Returns:
        dqkv, (T, 3, heads, head_dim); and dbias, float32, of the shape of `bias`: the sum over all sequences and all
        queries and keys of a distance of the gradients of their scores. Empty, (0,), without a bias or where it isn't
        wanted. Deterministic: the same bits every time. Two launches, and two more for dbias.

    Raises:
        ValueError: as in `attention_forward`; `grad` of another shape than `out`; the gradient of a bias is wanted
            beside a window.
    """
    qkv, seed = _rows_of(qkv), checked_seed(dropout, seed)
    if window is not None and bias is not None and bias_grad:
        raise ValueError(f"window is {window}; expected None where the gradient of bias is wanted")
    rows, _, heads, head_dim = qkv.shape
    batch, key_mask, tiles = _checked(rows, cu_seqlens, key_mask, max_seqlen, scale, tiles, qkv.device)
    _check_bias(bias, heads, max_seqlen)
    if grad.shape != out.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected {tuple(out.shape)}, the shape of out")
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    shape = (0,) if bias is None or not bias_grad else bias.shape
    dbias = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    if rows == 0:
        return dqkv, dbias.zero_()
    grad, out, stats = contiguous(grad), contiguous(out), contiguous(stats)
    delta = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    arch, dtype = architecture(qkv.device), qkv.dtype
    precision = input_precision(dtype)
    config, by_queries, by_keys = _backward_plan(
        attention_backward_config, arch, dtype, head_dim, bias is not None, precision, window
    )
    grid = _grid(config.block_m, max_seqlen, heads, batch, tiles)
    dropped = draw_threshold(dropout), keep_scale(dropout)
    layout = cu_seqlens, key_mask, seed, bias, tiles, None, None
    sizes = heads, rows, max_seqlen, *dropped
    span = 0 if bias is None else (bias.shape[1] + 1) // 2
    last = float(scale), scale * LOG2E, qkv.stride(0), span, 1 / scale
    queries = (qkv, grad, out, stats, delta, dqkv, *layout, None, *sizes, 1.0 - dropout, *last)
    run(attention_backward_q_kernel, grid, queries, by_queries)
    run(attention_backward_kv_kernel, grid, (qkv, grad, stats, delta, dqkv, *layout, *sizes, *last), by_keys)
    if dbias.numel():
        config, constants = _dbias_plan(attention_dbias_config, arch, dtype, head_dim, precision)
        blocks = -(-max_seqlen // config.block_m)
        half = blocks * config.block_m
        chunks = max(1, min(batch, DBIAS_PROGRAMS // (heads * (2 * blocks - 1))))
        partial = torch.empty(chunks, heads, 2, 2 * half, dtype=torch.float32, device=qkv.device)
        tensors = qkv, grad, stats, delta, partial, cu_seqlens, key_mask, seed, bias
        numbers = batch, heads, rows, max_seqlen, *dropped, scale * LOG2E, qkv.stride(0), span, 1 / scale
        run(attention_dbias_kernel, (2 * blocks - 1, heads, chunks), (*tensors, *numbers), constants)
        totals = Constants(PART=config.block_m, BLOCK=SUM_BLOCK, num_warps=4)
        sums = partial, dbias, chunks, heads, half, span
        run(attention_dbias_sum_kernel, (-(-dbias.shape[1] // SUM_BLOCK), heads, 1), sums, totals)
    return dqkv, dbias
