"""DeBERTa's attention: scores of content with content, of content with position, and of position with content."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attentions import sequences_of
from .registry import BackwardContext, differentiable, on_gradient, operator, wide


@operator("disentangled")
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
    """Softmax attention within each sequence; the score of query i and key j is

        scale * (q_i . k_j + q_i . c2p[slots(i - j)] + k_j . p2c[slots(i - j)])

    Args:
        qkv: (T, 3, heads, head_dim): queries, keys and values; rows of any stride, the rest contiguous.
        c2p: (P, heads, head_dim), contiguous, of the dtype of qkv: keys of positions. None: no such term.
        p2c: the same: queries of positions. On a GPU one of the two is there.
        slots: (2 R - 1,) int32: element R - 1 + d is the row of c2p and p2c for keys that stand d tokens before the
            query; the first and the last are also those of keys that are further away.
        cu_seqlens, max_seqlen, tiles: as `attention` has them.
        key_mask: as `attention` has it.
        dropout, seed: as `attention_forward` has them.

    Returns:
        (T, heads, head_dim), contiguous; and what says the softmax of each row again, as `attention_forward` has it.

    Source: He et al., 2021, https://arxiv.org/abs/2006.03654.
    """
    rows, _, heads, _ = qkv.shape
    stats = qkv.new_empty(2 if qkv.dtype.itemsize > 2 else 1, heads, rows, dtype=wide(qkv))
    return qkv.new_empty(rows, *qkv.shape[2:]), stats


@operator("attention_map")
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
    """The probabilities by which `disentangled_attention` weighs values.

    Args:
        qkv, c2p, p2c, slots, cu_seqlens, key_mask, max_seqlen, scale, tiles: as `disentangled_attention` has them.
        places, width: as `attention_map` has them, which says what is returned, too.
    """
    return qkv.new_empty(sequences_of(qkv, cu_seqlens, max_seqlen), qkv.shape[2], width, width)


@operator("disentangled", of_gradients=True)
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
    """The gradients of `disentangled_attention`: dqkv, dc2p and dp2c, (0,) where there is no such table."""
    dc2p, dp2c = (qkv.new_empty(0 if table is None else table.shape) for table in (c2p, p2c))
    return qkv.new_empty(qkv.shape), dc2p, dp2c


def _save(ctx: BackwardContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, c2p, p2c, slots, cu_seqlens, key_mask, max_seqlen, scale, dropout, seed, tiles = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(qkv, c2p, p2c, slots, out, stats, cu_seqlens, key_mask, seed, tiles)
    ctx.numbers = max_seqlen, scale, dropout


def _gradient(ctx: BackwardContext, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    *given, cu_seqlens, key_mask, seed, tiles = ctx.saved_tensors
    sequences = cu_seqlens, key_mask, *ctx.numbers, seed, tiles
    dqkv, dc2p, dp2c = on_gradient(disentangled_attention_backward, grad, *given, *sequences)
    return dqkv, None if given[1] is None else dc2p, None if given[2] is None else dp2c, *(None,) * 8


differentiable(disentangled_attention, _save, _gradient)
