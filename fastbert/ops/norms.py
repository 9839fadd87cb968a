"""LayerNorm, and the norm by the root of the mean of squares."""

from __future__ import annotations

from torch import Tensor

from .registry import BackwardContext, differentiable, on_gradient, operator


@operator("layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x (T, H), weight and bias (H,), eps added to the variance -> (T, H)."""
    return x.new_empty(x.shape)


@operator("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension: x (T, H), weight (H,) -> (T, H)."""
    return x.new_empty(x.shape)


@operator("layer_norm")
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """`layer_norm(dropout(x) + residual)`, the sum taken in float32: x and residual (T, H), weight and bias (H,).

    Args:
        x: any dtype; the other three may be float32 where x is not.
        dropout: rate, 0 to 1, at which elements of x are dropped; the others are scaled by 1 / (1 - dropout).
        seed: int64 tensor of one element, which decides the dropped ones; None where `dropout` is 0.

    Returns:
        (T, H) in the dtype of `residual`.
    """
    return residual.new_empty(x.shape)


@operator("layer_norm", of_gradients=True)
def add_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `add_layer_norm`: (dx, dresidual, dweight, dbias), each in the dtype of what it belongs to.

    `dx` is empty, (0,), where it equals dresidual: without dropout, in one dtype.
    """
    dx = x.new_empty(0 if not dropout and x.dtype == residual.dtype else x.shape)
    return dx, residual.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_add_layer_norm(
    ctx: BackwardContext,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, float, float, Tensor | None],
    output: Tensor,
) -> None:
    x, residual, weight, bias, eps, dropout, seed = inputs
    ctx.save_for_backward(x, residual, weight, seed)
    ctx.numbers = eps, dropout
    ctx.bias_dtype = bias.dtype


def _add_layer_norm_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight, seed = ctx.saved_tensors
    eps, dropout = ctx.numbers
    dx, dresidual, dweight, dbias = on_gradient(add_layer_norm_backward, grad, x, residual, weight, eps, dropout, seed)
    if not dropout and x.dtype == residual.dtype:
        dx = dresidual
    return dx, dresidual, dweight, dbias.to(ctx.bias_dtype), None, None, None


differentiable(add_layer_norm, _save_add_layer_norm, _add_layer_norm_gradient)
