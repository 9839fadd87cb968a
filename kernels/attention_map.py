"""The probabilities of attention, which attention itself never writes: one map for each head of each sequence.

    out[b, h, i, j] = softmax_j(scale * q[i, h] . k[j, h]), j over the keys of i's own sequence that take part

One program takes BLOCK_M queries of one head of one sequence, as `attention_kernel` does, and walks the keys twice: for
the maximum and the sum of each row, then to write what they make of its scores. The second matmul costs less than the
map's own bytes, so that attention keeps no statistics for this, and a forward is the same with maps or without.

Where tokens were packed, `places` says at which row and column of its map each of them stands; the rest is zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LOG2E,
    PITCH,
    TILE_ROWS,
    _check_inference,
    _checked,
    _grid,
    _rows_of,
    add_bias,
    constants_of,
    is_near,
    load_positions,
    locate,
    score_row,
    sum_positions,
)
from .compiled import Constants, run
from .disentangled import _empty_scores, _position_scores, _tables
from .launch import (
    Choose,
    Config,
    architecture,
    attention_map_config,
    contiguous,
    input_precision,
    planned,
)


@triton.jit
def score_tile(
    q,
    k_tile_ptr,
    k_offs,
    c2p_ptr,
    p2c_ptr,
    bias_ptr,
    key_mask_ptr,
    start_m,
    start_n,
    head,
    length,
    pitch,
    bias_span,
    inverse_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Scores of BLOCK_M queries and the BLOCK_N keys from start_n on, -inf where there is no key: as attention's."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keep = offs_n < length
    mask_kv = keep[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    if key_mask_ptr is not None:
        keep = tl.load(key_mask_ptr + offs_n, mask=keep, other=False)
    keep = keep[None, :]
    if WINDOW is not None:
        keep &= is_near(offs_m[:, None], offs_n[None, :], WINDOW)
    k = tl.load(k_tile_ptr + k_offs, mask=mask_kv, other=0.0)
    c2p = load_positions(c2p_ptr, pitch, offs_m < length, BLOCK_M, BLOCK_N)
    p2c = load_positions(p2c_ptr, pitch, offs_n < length, BLOCK_N, BLOCK_M)
    scores = tl.dot(q, tl.trans(k), sum_positions(c2p, p2c, inverse_scale), input_precision=INPUT_PRECISION)
    if bias_ptr is not None:
        scores = add_bias(scores, bias_ptr, bias_span, inverse_scale, head, offs_m[:, None], offs_n[None, :], length)
    return tl.where(keep, scores, float("-inf"))  # [BLOCK_M, BLOCK_N]


@triton.jit(
    do_not_specialize=["heads", "max_seqlen", "scale_log2e", "rows", "width", "bias_span", "inverse_scale"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "key_mask_ptr", "places_ptr"],
)
def attention_map_kernel(
    q_ptr,
    k_ptr,
    out_ptr,  # (sequences, heads, width, width), contiguous
    cu_seqlens_ptr,  # as in attention_kernel, with the next three
    key_mask_ptr,
    bias_ptr,
    tiles_ptr,
    places_ptr,  # (rows,) int64: row and column of a map, of each token; None: in order
    c2p_ptr,  # as in attention_kernel
    p2c_ptr,
    heads,
    max_seqlen,
    scale_log2e,  # scale * log2(e)
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    rows,
    width,
    bias_span,  # of a bias alone
    inverse_scale,  # of a bias, or of scores by position
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, HEAD_DIM or more
    INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = None,  # as in attention_kernel
):
    head, sequence, row, length, start_m = locate(cu_seqlens_ptr, tiles_ptr, heads, max_seqlen, BLOCK_M, TILE_ROWS)
    if start_m >= length:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    valid_m = start_m + offs_m < length
    q_tile_ptr = q_ptr + (row + start_m) * stride_qt + head * stride_qh
    q_offs = offs_m[:, None] * stride_qt + offs_d[None, :]
    q = tl.load(q_tile_ptr + q_offs, mask=valid_m[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
    k_ptr += row * stride_kt + head * stride_kh
    k_offs = offs_n[:, None] * stride_kt + offs_d[None, :]
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * max_seqlen
    pitch = tl.cdiv(max_seqlen, PITCH) * PITCH
    c2p_ptr = score_row(c2p_ptr, head, rows, row + start_m, pitch)
    p2c_ptr = score_row(p2c_ptr, head, rows, row, pitch)
    if p2c_ptr is not None:
        p2c_ptr += start_m // BLOCK_M * BLOCK_M  # start_m; from a list of tiles, the compiler knows no multiple of it

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for walk in tl.static_range(2):
        norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)  # all keys masked: zeros
        found_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        own = (start_m + offs_m).to(tl.int64)
        if places_ptr is not None and walk == 1:
            own = tl.load(places_ptr + row + start_m + offs_m, mask=valid_m, other=0)
        out_tile_ptr = out_ptr + (sequence * heads + head) * width * width
        k_tile_ptr = k_ptr
        c2p_tile_ptr = c2p_ptr
        p2c_tile_ptr = p2c_ptr
        for start_n in range(0, length, BLOCK_N):
            scores = score_tile(
                q,
                k_tile_ptr,
                k_offs,
                c2p_tile_ptr,
                p2c_tile_ptr,
                bias_ptr,
                key_mask_ptr,
                start_m,
                start_n,
                head,
                length,
                pitch,
                bias_span,
                inverse_scale,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                INPUT_PRECISION,
                WINDOW,
            )
            if walk == 0:
                new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
                # Without a key so far the maximum is -inf, and -inf - -inf is NaN.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2(tl.fma(scores, scale_log2e, -shift[:, None]))
                row_sum = tl.fma(row_sum, tl.exp2(row_max - shift), tl.sum(p, 1))
                row_max = new_max
            else:
                p = tl.exp2(tl.fma(scores, scale_log2e, -found_max[:, None])) * norm[:, None]
                valid_n = start_n + offs_n < length
                other = (start_n + offs_n).to(tl.int64)
                if places_ptr is not None:
                    other = tl.load(places_ptr + row + start_n + offs_n, mask=valid_n, other=0)
                out = p.to(out_ptr.dtype.element_ty)
                mask = valid_m[:, None] & valid_n[None, :]
                tl.store(out_tile_ptr + own[:, None] * width + other[None, :], out, mask=mask)
            k_tile_ptr += BLOCK_N * stride_kt
            if c2p_tile_ptr is not None:
                c2p_tile_ptr += BLOCK_N
            if p2c_tile_ptr is not None:
                p2c_tile_ptr += BLOCK_N * pitch


@planned
def _plan(
    choose: Choose, arch: str, dtype: torch.dtype, head_dim: int, precision: str, window: int | None
) -> tuple[Config, Constants]:
    """The configuration of `attention_map_kernel` and its constants."""
    config: Config = choose(arch, dtype, head_dim)
    constants = constants_of(config, head_dim, precision, window)
    return config, Constants(constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n)


def _write(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    places: Tensor | None,
    width: int,
    bias: Tensor | None,
    tiles: Tensor | None,
    batch: int,
    c2p: Tensor | None = None,
    p2c: Tensor | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """The launch, of arguments that have been looked at; `c2p` and `p2c` are scores by position."""
    rows, heads, head_dim = q.shape
    if width < max_seqlen or (cu_seqlens is None and (places is not None or width != max_seqlen)):
        expected = f"max_seqlen, {max_seqlen}" + ("" if cu_seqlens is None else ", or more")
        raise ValueError(f"width is {width}; expected {expected}, and places of packed sequences alone")
    if places is not None and (places.shape != (rows,) or places.dtype != torch.int64):
        raise ValueError(
            f"places has shape {tuple(places.shape)} and dtype {places.dtype}; expected {(rows,)} and torch.int64"
        )
    shape = batch, heads, width, width
    out = q.new_zeros(shape) if cu_seqlens is not None else q.new_empty(shape)  # dense, all of it is written
    if rows == 0:
        return out
    arch, precision = architecture(q.device), input_precision(q.dtype)
    config, constants = _plan(attention_map_config, arch, q.dtype, head_dim, precision, window)
    arguments = (
        *(q, k, out, cu_seqlens, key_mask, bias, tiles, None if places is None else contiguous(places), c2p, p2c),
        *(heads, max_seqlen, scale * LOG2E, *q.stride()[:2], *k.stride()[:2], rows, width),
        *(0 if bias is None else (bias.shape[1] + 1) // 2, 1 / scale),
    )
    run(attention_map_kernel, _grid(config.block_m, max_seqlen, heads, batch, tiles), arguments, constants)
    return out


def attention_map(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    places: Tensor | None,
    width: int,
    bias: Tensor | None = None,
    tiles: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The probabilities by which `attention` weighs values; never waits for the device.

    Args:
        q, k, cu_seqlens, key_mask, max_seqlen, scale, bias, tiles, window: as `attention` has them.
        places: (T,) int64, 0 to width - 1: at which row and column of its sequence's map each token stands; packed
            layout only. None: in order, from 0 on.
        width: rows and columns of a map: max_seqlen, or more in the packed layout.

    Returns:
        (B, heads, width, width), contiguous, the dtype of q: of every query, what it gives to each key. Zeros where no
        token is, outside a window, and in rows whose keys are all masked.

    Raises:
        ValueError: as `attention`; `places` or `width` is not as above.
    """
    _check_inference(q, k, q, max_seqlen, bias)
    batch, key_mask, tiles = _checked(q.shape[0], cu_seqlens, key_mask, max_seqlen, scale, tiles, q.device)
    return _write(q, k, cu_seqlens, key_mask, max_seqlen, scale, places, width, bias, tiles, batch, window=window)


def disentangled_attention_map(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    places: Tensor | None,
    width: int,
    tiles: Tensor | None,
) -> Tensor:
    """The probabilities by which `disentangled_attention` weighs values: two launches.

    Args:
        qkv, c2p, p2c, slots, cu_seqlens, key_mask, max_seqlen, scale, tiles: as `disentangled_attention` has them.
        places, width: as `attention_map` has them, which says what is returned, too.

    Raises:
        ValueError: as `disentangled_attention`, and as `attention_map`.
    """
    qkv = _rows_of(qkv)
    tables = _tables(qkv, c2p, p2c, slots)
    batch, key_mask, tiles = _checked(qkv.shape[0], cu_seqlens, key_mask, max_seqlen, scale, tiles, qkv.device)
    scores = [None if table is None else _empty_scores(qkv, max_seqlen, None) for table in tables]
    if qkv.shape[0]:
        _position_scores(qkv, tables, slots, scores, cu_seqlens, max_seqlen, scale, batch, tiles, None)
    q, k, _ = qkv.unbind(1)
    return _write(q, k, cu_seqlens, key_mask, max_seqlen, scale, places, width, None, tiles, batch, *scores)
