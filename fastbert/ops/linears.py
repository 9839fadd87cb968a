"""Linear layers and what is fused with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.cpu import matmul
from .registry import BackwardContext, differentiable, on_gradient, operator


@operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,) or None -> (T, N)."""
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("linear")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """`gelu(x @ weight.T + bias)`: x (T, K), weight (N, K), bias (N,) or None -> (T, N).

    `approximate` is "none" (exact, erf) or "tanh", as in torch.nn.functional.gelu.
    """
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("linear")
def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x @ weight.T + bias + residual`: x (T, K), weight (N, K), residual (T, N) -> (T, N)."""
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("linear_gated")
def linear_gated(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """`activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)` -> (T, N).

    Args:
        x: (T, K).
        gate, up: (N, K). Where `up` is None, `gate` is both, (2 N, K), one after the other.
        gate_bias, up_bias: (N,) or None; with both in `gate`, (2 N,) or None, and None.
        activation: "gelu" (exact, erf), "gelu_tanh" or "silu".
    """
    return x.new_empty(x.shape[0], gate.shape[0] if up is not None else gate.shape[0] // 2)


@operator("linear_gated")
def gated_feed_forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`linear_gated` and the linear layer behind it: down (H, N), down_bias (H,) or None.

    Returns:
        The result, (T, H); and what the backward needs, (T, 2 N): what is activated, then what that is multiplied by.
    """
    inner = gate.shape[0] * (1 if up is None else 2)
    return x.new_empty(x.shape[0], down.shape[0]), x.new_empty(x.shape[0], inner)


@operator("linear_gated", of_gradients=True)
def linear_gated_backward(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Back through `(activation(a) * b) @ weight.T`: grad (T, H), weight (H, N), pre (T, 2 N), a beside b.

    Returns:
        The gradient of `pre`, (T, 2 N); and activation(a) * b, (T, N), which the gradient of `weight` is a GEMM with.
    """
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[0], weight.shape[1])


@operator("linear")
def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> Tensor:
    """Query, key and value projections: x (T, K), weights (N, K), biases (N,) or None -> (T, 3, N)."""
    rows, width = x.shape[0], q_weight.shape[0]
    if x.device.type == "cpu":  # one after the other in memory; a kernel lays them side by side
        return x.new_empty(3, rows, width).transpose(0, 1)
    return x.new_empty(rows, 3, width)


@operator("linear")
def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Both linear layers of a feed-forward: x (T, K), weight1 (I, K), bias1 (I,), weight2 (N, I), bias2 (N,).

    Returns:
        gelu(pre) @ weight2.T + bias2, (T, N); and what the backward needs, pre = x @ weight1.T + bias1, (T, I).
    """
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


@operator("linear", of_gradients=True)
def linear_gelu_backward(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Back through `gelu(pre) @ weight.T`: grad (T, N), weight (N, I), pre (T, I).

    Returns:
        (grad @ weight) * gelu'(pre), (T, I); and gelu(pre), (T, I), which the gradient of `weight` is a GEMM with.
    """
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape)


def _linear_gradients(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `x @ weight.T + bias` with respect to the three, where needed."""
    dx = matmul(grad, weight.to(grad.dtype), x.dtype) if needs[0] else None
    dweight = matmul(grad.t(), x, weight.dtype) if needs[1] else None
    dbias = grad.sum(0, dtype=bias_dtype) if needs[2] and bias_dtype is not None else None
    return dx, dweight, dbias


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


def _save_linear(ctx: BackwardContext, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = _dtype(bias)


def _linear_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return _linear_gradients(ctx.needs_input_grad, grad, x, weight, ctx.bias_dtype)


def _save_qkv_linear(ctx: BackwardContext, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, *parameters = inputs
    ctx.save_for_backward(x, *parameters[::2])
    ctx.bias_dtypes = [_dtype(bias) for bias in parameters[1::2]]


def _qkv_linear_gradient(ctx: BackwardContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    grad = grad.reshape(grad.shape[0], -1)  # [T, 3 N]; batches of gradients can't be flattened
    return _gradients_side_by_side(ctx.needs_input_grad, grad, x, weights, ctx.bias_dtypes)


def _gradients_side_by_side(
    needs: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    bias_dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of `x`, and of each weight and its bias, where needed, of several linear layers of one x."""
    dx = None
    if needs[0]:
        dx = matmul(grad, torch.cat([weight.to(grad.dtype) for weight in weights]), x.dtype)
    grads: list[Tensor | None] = []
    # One GEMM for all where all are trained, as they usually are; else one for each that is.
    together = all(needs[1::2]) and len({weight.dtype for weight in weights}) == 1
    parts = len(weights)
    dweights = matmul(grad.t(), x, weights[0].dtype).chunk(parts) if together else (None,) * parts
    for i, columns in enumerate(grad.chunk(parts, 1)):
        needed = (False, needs[1 + 2 * i] and not together, needs[2 + 2 * i])
        _, dweight, dbias = _linear_gradients(needed, columns, x, weights[i], bias_dtypes[i])
        grads += [dweights[i] if together else dweight, dbias]
    return dx, *grads


def _save_feed_forward(
    ctx: BackwardContext,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str],
    output: tuple[Tensor, Tensor],
) -> None:
    x, weight1, bias1, weight2, bias2, approximate = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, weight1, weight2, pre)
    ctx.bias_dtypes = _dtype(bias1), _dtype(bias2)
    ctx.approximate = approximate


def _feed_forward_gradient(ctx: BackwardContext, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    x, weight1, weight2, pre = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dpre, act = on_gradient(linear_gelu_backward, grad, weight2, pre, ctx.approximate)
    _, dweight2, dbias2 = _linear_gradients((False, *needs[3:5]), grad, act, weight2, ctx.bias_dtypes[1])
    del act
    dx, dweight1, dbias1 = _linear_gradients(needs[:3], dpre, x, weight1, ctx.bias_dtypes[0])
    return dx, dweight1, dbias1, dweight2, dbias2, None


_Gated = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None, str]


def _save_gated_feed_forward(ctx: BackwardContext, inputs: _Gated, output: tuple[Tensor, Tensor]) -> None:
    x, gate, gate_bias, up, up_bias, down, down_bias, activation = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, gate, up, down, pre)
    ctx.bias_dtypes = _dtype(gate_bias), _dtype(up_bias), _dtype(down_bias)
    ctx.activation = activation


def _gated_feed_forward_gradient(ctx: BackwardContext, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    x, gate, up, down, pre = ctx.saved_tensors
    needs, bias_dtypes = ctx.needs_input_grad, ctx.bias_dtypes
    dpre, gated = on_gradient(linear_gated_backward, grad, down, pre, ctx.activation)
    _, ddown, ddown_bias = _linear_gradients((False, *needs[5:7]), grad, gated, down, bias_dtypes[2])
    del gated
    if up is None:
        first = *_linear_gradients(needs[:3], dpre, x, gate, bias_dtypes[0]), None, None
    else:
        first = _gradients_side_by_side(needs[:5], dpre, x, (gate, up), bias_dtypes[:2])
    return *first, ddown, ddown_bias, None


differentiable(gated_feed_forward, _save_gated_feed_forward, _gated_feed_forward_gradient)
differentiable(linear, _save_linear, _linear_gradient)
differentiable(qkv_linear, _save_qkv_linear, _qkv_linear_gradient)
differentiable(feed_forward, _save_feed_forward, _feed_forward_gradient)
