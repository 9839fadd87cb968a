"""Bidirectional softmax attention within each sequence, over rows of all sequences laid end to end.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h]) v[j, h],  j over the keys of i's own sequence that take part

One program takes BLOCK_M queries of one head of one sequence and walks that sequence's keys, BLOCK_N at a time,
carrying the softmax along: a running maximum and sum of each row, in float32 and in powers of two. Scores never reach
memory. Tile shapes depend on dtype and head_dim alone and a program sees one sequence alone, so that the output of a
sequence is bitwise the same in any batch, packed or padded on the right.

The recurrence is that of FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture, attention_config, input_precision


@triton.jit(do_not_specialize=["max_seqlen"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,  # None: every sequence has max_seqlen rows
    key_mask_ptr,  # None: every key takes part
    max_seqlen,
    scale_log2e,  # scale * log2(e)
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, HEAD_DIM or more
    INPUT_PRECISION: tl.constexpr,
):
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    if cu_seqlens_ptr is None:
        row = sequence * max_seqlen
        length = max_seqlen
    else:
        row = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - row).to(tl.int32)
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
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, length, BLOCK_N):
        keep = offs_n < length - start_n
        mask_kv = keep[:, None] & mask_d
        if key_mask_ptr is not None:  # asked for before the product, which hides its latency
            keep = tl.load(key_mask_ptr + sequence * max_seqlen + start_n + offs_n, mask=keep, other=False)
        k = tl.load(k_tile_ptr + k_offs, mask=mask_kv, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        if key_mask_ptr is not None:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        elif start_n + BLOCK_N > length:
            # In a branch, so that full blocks don't pay; not in a copy of the loop's body for the last block, whose
            # loads nothing would hide. Compared anew: `keep` would be carried here from loads issued blocks ago, at
            # twenty registers a thread.
            scores = tl.where((start_n + offs_n < length)[None, :], scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
        shift = new_max
        if key_mask_ptr is not None:
            # Without a key so far the maximum is -inf, and -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(tl.fma(scores, scale_log2e, -shift[:, None]))
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(p, 1)
        row_max = new_max

        v = tl.load(v_tile_ptr + v_offs, mask=mask_kv, other=0.0)
        acc = acc * correction[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
        k_tile_ptr += BLOCK_N * stride_kt
        v_tile_ptr += BLOCK_N * stride_vt

    if key_mask_ptr is not None:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # all keys masked: zero, as acc is
    acc = acc * (1.0 / row_sum)[:, None]
    stride_ot = tl.num_programs(1) * HEAD_DIM
    out_tile_ptr = out_ptr + (row + start_m) * stride_ot + head * HEAD_DIM
    out_offs = offs_m[:, None] * stride_ot + offs_d[None, :]
    tl.store(out_tile_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=mask_q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
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

    Returns:
        (T, heads, head_dim), contiguous, the dtype of q. Rows whose keys are all masked are zero.

    Raises:
        ValueError: `q`, `k` or `v` is not contiguous in its last dimension; `key_mask` in the packed layout, or of
            another shape; rows that don't divide by `max_seqlen` in the dense one; `scale` not positive.
    """
    rows, heads, head_dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape != q.shape or x.stride(2) != 1:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; "
                f"expected shape {tuple(q.shape)}, contiguous in the last dimension"
            )
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")  # the maximum is taken before scaling
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    if cu_seqlens is None:
        batch = rows // max_seqlen
        if batch * max_seqlen != rows:
            raise ValueError(f"q has {rows} rows; expected a multiple of max_seqlen ({max_seqlen})")
        if key_mask is not None:
            if key_mask.shape != (batch, max_seqlen) or key_mask.dtype != torch.bool:
                raise ValueError(
                    f"key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}; "
                    f"expected {(batch, max_seqlen)} and torch.bool"
                )
            key_mask = key_mask.contiguous()
    else:
        if key_mask is not None:
            raise ValueError("key_mask is given together with cu_seqlens; packed sequences take none")
        batch = cu_seqlens.shape[0] - 1

    config = attention_config(architecture(q.device), q.dtype, head_dim)
    attention_kernel[(triton.cdiv(max_seqlen, config.block_m), heads, batch)](
        q,
        k,
        v,
        out,
        cu_seqlens,
        key_mask,
        max_seqlen,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        INPUT_PRECISION=input_precision(q.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
