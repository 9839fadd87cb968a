"""Cross-entropy over a vocabulary."""

from __future__ import annotations

from torch import Tensor

from .registry import BackwardContext, differentiable, on_gradient, operator, wide


@operator("cross_entropy")
def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `x @ weight.T + bias` against labels, row by row.

    Args:
        x: (R, H).
        weight, bias: (V, H), and (V,) or None.
        labels: (R,) int64, 0 to V - 1.

    Returns:
        The loss of each row, and the logarithm of the sum of its exponentiated logits, which the backward needs: both
        (R,), float32 or better. Logits are rounded to the dtype of x, as a model's are.
    """
    return x.new_empty(x.shape[0], dtype=wide(x)), x.new_empty(x.shape[0], dtype=wide(x))


@operator("cross_entropy", of_gradients=True)
def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_cross_entropy`: (dx, dweight, dbias), the last empty, (0,), without a bias.

    `grad` (R,) is the gradient with respect to the losses.
    """
    dbias = lse.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save_cross_entropy(ctx: BackwardContext, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _cross_entropy_gradient(ctx: BackwardContext, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    x, weight, bias, labels, lse = ctx.saved_tensors
    dx, dweight, dbias = on_gradient(linear_cross_entropy_backward, grad, x, weight, bias, labels, lse)
    return dx, dweight, None if bias is None else dbias, None


differentiable(linear_cross_entropy, _save_cross_entropy, _cross_entropy_gradient)
