"""The embedding layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import BackwardContext, differentiable, on_gradient, operator


@operator("embedding")
def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
    position_padding_idx: int,
) -> Tensor:
    """`layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])`, sums in float32.

    Ids are (T,) int64; the tables (vocabulary, H), (types, H), (positions, H); weight and bias (H,) -> (T, H).
    `padding_idx` and `position_padding_idx` are the rows of `word` and `position` that get no gradient, -1: none.
    """
    return word.new_empty(input_ids.shape[0], word.shape[1])


@operator("embedding", of_gradients=True)
def embedding_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `embedding_layer_norm` by the sum of the three rows, (T, H), the weight and the bias."""
    total = word.new_empty(input_ids.shape[0], word.shape[1])
    return total, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_embedding(ctx: BackwardContext, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, eps, padding_idx, position_padding_idx = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = eps, padding_idx, position_padding_idx
    ctx.bias_dtype = bias.dtype


def _embedding_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    *ids, word, token_type, position, weight = ctx.saved_tensors
    eps, padding_idx, position_padding_idx = ctx.numbers
    total, dweight, dbias = on_gradient(
        embedding_layer_norm_backward, grad, *ids, word, token_type, position, weight, eps
    )
    tables = [
        torch.ops.aten.embedding_dense_backward(total, rows, table.shape[0], skipped, False) if needed else None
        for rows, table, skipped, needed in zip(
            ids,
            (word, token_type, position),
            (padding_idx, -1, position_padding_idx),
            ctx.needs_input_grad[3:6],
            strict=True,
        )
    ]
    return None, None, None, *tables, dweight, dbias.to(ctx.bias_dtype), None, None, None


differentiable(embedding_layer_norm, _save_embedding, _embedding_gradient)
