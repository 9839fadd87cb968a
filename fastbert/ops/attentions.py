"""Attention within each of many sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import BackwardContext, differentiable, on_gradient, operator, wide


@operator("attention")
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
    """Bidirectional softmax attention within each sequence, over rows of all sequences laid end to end.

    Args:
        q, k, v: (T, heads, head_dim), one dtype; last dimension contiguous, rows and heads of any stride.
        cu_seqlens: (B + 1,) int32, where sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] (packed layout); None
            where every sequence has max_seqlen rows (dense layout, B = T / max_seqlen).
        key_mask: (B, max_seqlen) bool, True where a key takes part; dense layout only. None: all take part.
        max_seqlen: length of the longest sequence, in tokens.
        scale: factor on the scores, before the softmax.
        bias: (heads, 2 R - 1), R at least max_seqlen: bias[h, R - 1 + j - i] is added to the scaled score of query i
            and key j of a sequence. None: nothing is.
        tiles: `attention_tiles`, which the kernel goes by.
        window: how many tokens before it and after it a query attends to; None: to all of its sequence.

    Returns:
        (T, heads, head_dim), contiguous. Rows whose keys are all masked are zero.
    """
    return q.new_empty(q.shape)


@operator("attention")
def attention_tiles(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The blocks of 128 rows, or fewer at the end, of all sequences, the longest first.

    Args:
        cu_seqlens: (B + 1,) int32, cumulative lengths: where each sequence starts.
        rows: T, of all sequences.

    Returns:
        (T // 128 + B, 4) int32: of each block the first row of its sequence, the length of that, where in it the block
        starts, and the number of the sequence; zeros where there are no more blocks.
    """
    return cu_seqlens.new_empty(rows // 128 + cu_seqlens.shape[0] - 1, 4)


@operator("attention_map")
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
    """The probabilities by which `attention` weighs values.

    Args:
        q, k, cu_seqlens, key_mask, max_seqlen, scale, bias, tiles, window: as `attention` has them.
        places: (T,) int64, 0 to width - 1: at which row and column of its sequence's map each token stands; packed
            layout only. None: in order, from 0 on.
        width: rows and columns of a map: max_seqlen, or more in the packed layout.

    Returns:
        (B, heads, width, width), contiguous, the dtype of q: of every query, what it gives to each key. Zeros where no
        token is, outside a window, and in rows whose keys are all masked.
    """
    return q.new_empty(sequences_of(q, cu_seqlens, max_seqlen), q.shape[1], width, width)


def sequences_of(rows: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> int:
    """B, as the operators of attention have it."""
    return rows.shape[0] // max(max_seqlen, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1


@operator("attention")
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
    """`attention` with dropout of the probabilities, and what its backward needs.

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; rows of any stride, the rest contiguous.
        cu_seqlens, key_mask, max_seqlen, scale: as `attention` has them.
        dropout: rate, 0 to 1, at which probabilities are dropped; the others are scaled by 1 / (1 - dropout).
        seed: int64 tensor of one element, which decides the dropped ones; None where `dropout` is 0.
        tiles, bias, window: as `attention` has them.

    Returns:
        (T, heads, head_dim), contiguous, zero in rows whose keys are all masked; and what says the softmax of each row
        again, (1, heads, T) float32 or better, or (2, ...) where qkv isn't of 16 bits: on a CPU the logarithm of the
        sum of exp(scaled score), and ones.
    """
    rows, _, heads, _ = qkv.shape
    stats = qkv.new_empty(2 if qkv.dtype.itemsize > 2 else 1, heads, rows, dtype=wide(qkv))
    return qkv.new_empty(rows, *qkv.shape[2:]), stats


@operator("attention", of_gradients=True)
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
    """The gradients of `attention_forward`: dqkv, (T, 3, heads, head_dim), and dbias, like `bias`.

    dbias is (0,) without a bias, or where `bias_grad` says that it isn't wanted.
    """
    dbias = stats.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return qkv.new_empty(qkv.shape), dbias


def _save_attention(ctx: BackwardContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, key_mask, max_seqlen, scale, dropout, seed, tiles, bias, window = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(qkv, out, stats, cu_seqlens, key_mask, seed, tiles, bias)
    ctx.numbers, ctx.window = (max_seqlen, scale, dropout), window


def _attention_gradient(ctx: BackwardContext, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    qkv, out, stats, cu_seqlens, key_mask, seed, tiles, bias = ctx.saved_tensors
    sequences = cu_seqlens, key_mask, *ctx.numbers, seed, tiles
    wanted = bias is not None and ctx.needs_input_grad[8]  # arguments left out are not among those
    dqkv, dbias = on_gradient(attention_backward, grad, qkv, out, stats, *sequences, bias, wanted, ctx.window)
    return dqkv, *(None,) * 7, dbias if wanted else None, None


differentiable(attention_forward, _save_attention, _attention_gradient)


@operator("rotary", of_gradients=True)
def rotate(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """Rotary positions: of x = (left, right), the halves of a head, x * cosines + (-right, left) * sines.

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; last dimension contiguous.
        cosines, sines: (T, head_dim), contiguous, one dtype.
        back: whether to turn as the gradient does: by the transpose, the other way round.

    Returns:
        (T, 3, heads, head_dim), contiguous: queries and keys turned, in float32 or better and rounded once; values as
        they are.
    """
    return qkv.new_empty(qkv.shape)


def _save_rotate(ctx: BackwardContext, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    qkv, cosines, sines, back = inputs
    learns = cosines.requires_grad or sines.requires_grad
    ctx.save_for_backward(cosines, sines, qkv if learns else None)
    ctx.back = back


def _rotate_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    cosines, sines, qkv = ctx.saved_tensors
    turned = on_gradient(rotate, grad, cosines, sines, not ctx.back)
    if qkv is None:
        return turned, None, None, None
    x, slope = (t[:, :2].to(wide(t)) for t in (qkv, grad))
    (left, right), (left_slope, right_slope) = x.chunk(2, -1), slope.chunk(2, -1)
    crossed = (right_slope * -left, left_slope * right) if ctx.back else (left_slope * -right, right_slope * left)
    dcosines, dsines = (slope * x).sum((1, 2)), torch.cat(crossed, -1).sum((1, 2))
    return turned, dcosines.to(cosines.dtype), dsines.to(sines.dtype), None


differentiable(rotate, _save_rotate, _rotate_gradient)
