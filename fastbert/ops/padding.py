"""Between the padded layout and the packed one."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import BackwardContext, differentiable, on_gradient, operator


@operator("padding")
def mask_layout(mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed layout of a padding mask (B, S) bool, True at real tokens; labels (B, S) int64, -100 for none.

    Returns:
        - (B + 1,) int32, cumulative lengths: where each sequence starts among the real tokens;
        - (B * S,) int64, the padded rows: those of real tokens in order, then those of padding, the last first;
        - (B * S,) int64, the place of each padded row among the real ones, -1 where it is padding;
        - (5,) int64: real tokens; the longest sequence; and whether every first position is real, a label stands at
          padding, padding stands between real tokens of a sequence.
    """
    rows, inverse, totals = (mask.new_empty(size, dtype=torch.int64) for size in (mask.numel(), mask.numel(), 5))
    return mask.new_empty(mask.shape[0] + 1, dtype=torch.int32), rows, inverse, totals


@operator("padding", of_gradients=True)
def pack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Rows of the padded layout that hold real tokens: x (R, H), indices (T,) int64 into its rows -> (T, H).

    `inverse`, as `unpack` has it, is for the backward, which is `unpack`.
    """
    return x.new_empty(indices.shape[0], x.shape[1])


@operator("padding", of_gradients=True)
def unpack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Packed rows back in the padded layout: x (T, H), inverse (R,) int64, the packed row of each or -1 -> (R, H).

    Rows whose inverse is -1 come back as zeros. `indices`, as `pack` has them, say the same the other way round.
    """
    return x.new_empty(inverse.shape[0], x.shape[1])


def _save_indices(ctx: BackwardContext, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _pack_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor, None, None]:
    return on_gradient(unpack, grad, *ctx.saved_tensors), None, None


def _unpack_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor, None, None]:
    return on_gradient(pack, grad, *ctx.saved_tensors), None, None


differentiable(pack, _save_indices, _pack_gradient)
differentiable(unpack, _save_indices, _unpack_gradient)
