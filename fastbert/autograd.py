"""Gradients of the operators: what each saves for its backward, and the products and kernels that make it up.

As little as possible is saved: no attention matrix, no GELU output, no dropout mask, no LayerNorm statistics but what
the inputs say again. Products between two matrices are torch's; gradients of weights and biases are accumulated in
float32 and rounded once, to the dtype of the parameter. An operator is differentiable once: see `ops`.

Operators without a formula here are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .kernels.cpu import matmul


def _run(name: str, grad: Tensor, *args: Any) -> Any:
    """An operator on a gradient: through torch's dispatcher where that is a batch of gradients, which it takes apart.

    As `torch.autograd.grad(is_grads_batched=True)`, `jacobian(vectorize=True)` and a vmap of `torch.autograd.grad` have
    them. All else in this file is torch's own operators, which know such batches.
    """
    if torch._C._functorch.is_batchedtensor(grad):
        return getattr(torch.ops.fastbert, name)(grad, *args)
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        # Random numbers are forbidden there; dropout draws those of the forward again, by its seed.
        key: Any = torch._C._parse_dispatch_key("VmapMode")
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return getattr(torch.ops.fastbert, name)(grad, *args)
    return getattr(ops, name)(grad, *args)


def _linear_gradients(
    needs: tuple[bool, bool, bool], grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `x @ weight.T + bias` with respect to the three, where needed."""
    dx = matmul(grad, weight.to(grad.dtype), x.dtype) if needs[0] else None
    dweight = matmul(grad.t(), x, weight.dtype) if needs[1] else None
    dbias = grad.sum(0, dtype=bias_dtype) if needs[2] and bias_dtype is not None else None
    return dx, dweight, dbias


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = _dtype(bias)


def _linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return _linear_gradients(ctx.needs_input_grad, grad, x, weight, ctx.bias_dtype)


def _save_qkv_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *parameters = inputs
    ctx.save_for_backward(x, *parameters[::2])
    ctx.bias_dtypes = [_dtype(bias) for bias in parameters[1::2]]


def _qkv_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = grad.reshape(grad.shape[0], -1)  # [T, 3 N]; batches of gradients can't be flattened
    dx = None
    if needs[0]:
        dx = matmul(grad, torch.cat([weight.to(grad.dtype) for weight in weights]), x.dtype)
    grads: list[Tensor | None] = []
    # One product for all three where all are trained, as they usually are; else one for each that is.
    together = all(needs[1::2]) and len({weight.dtype for weight in weights}) == 1
    dweights = matmul(grad.t(), x, weights[0].dtype).chunk(3) if together else (None, None, None)
    for i, columns in enumerate(grad.chunk(3, 1)):
        needed = (False, needs[1 + 2 * i] and not together, needs[2 + 2 * i])
        _, dweight, dbias = _linear_gradients(needed, columns, x, weights[i], ctx.bias_dtypes[i])
        grads += [dweights[i] if together else dweight, dbias]
    return dx, *grads


def _save_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight1, bias1, weight2, bias2, approximate = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, weight1, weight2, pre)
    ctx.bias_dtypes = _dtype(bias1), _dtype(bias2)
    ctx.approximate = approximate


def _feed_forward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight1, weight2, pre = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dpre, act = _run("linear_gelu_backward", grad, weight2, pre, ctx.approximate)
    _, dweight2, dbias2 = _linear_gradients((False, *needs[3:5]), grad, act, weight2, ctx.bias_dtypes[1])
    del act
    dx, dweight1, dbias1 = _linear_gradients(needs[:3], dpre, x, weight1, ctx.bias_dtypes[0])
    return dx, dweight1, dbias1, dweight2, dbias2, None


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, key_mask, max_seqlen, scale, dropout, seed, tiles, bias = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(qkv, out, stats, cu_seqlens, key_mask, seed, tiles, bias)
    ctx.numbers = max_seqlen, scale, dropout


def _attention(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    qkv, out, stats, cu_seqlens, key_mask, seed, tiles, bias = ctx.saved_tensors
    sequences = cu_seqlens, key_mask, *ctx.numbers, seed, tiles
    wanted = bias is not None and ctx.needs_input_grad[8]  # arguments left out are not among those
    dqkv, dbias = _run("attention_backward", grad, qkv, out, stats, *sequences, bias, wanted)
    return dqkv, *(None,) * 7, dbias if wanted else None


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, bias, eps, dropout, seed = inputs
    ctx.save_for_backward(x, residual, weight, seed)
    ctx.numbers = eps, dropout
    ctx.bias_dtype = bias.dtype


def _add_layer_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight, seed = ctx.saved_tensors
    eps, dropout = ctx.numbers
    dx, dresidual, dweight, dbias = _run("add_layer_norm_backward", grad, x, residual, weight, eps, dropout, seed)
    if not dropout and x.dtype == residual.dtype:
        dx = dresidual
    return dx, dresidual, dweight, dbias.to(ctx.bias_dtype), None, None, None


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, eps, padding_idx, position_padding_idx = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = eps, padding_idx, position_padding_idx
    ctx.bias_dtype = bias.dtype


def _embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *ids, word, token_type, position, weight = ctx.saved_tensors
    eps, padding_idx, position_padding_idx = ctx.numbers
    total, dweight, dbias = _run("embedding_layer_norm_backward", grad, *ids, word, token_type, position, weight, eps)
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


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _cross_entropy(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, labels, lse = ctx.saved_tensors
    dx, dweight, dbias = _run("linear_cross_entropy_backward", grad, x, weight, bias, labels, lse)
    return dx, dweight, None if bias is None else dbias, None


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _pack(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _run("unpack", grad, *ctx.saved_tensors), None, None


def _unpack(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _run("pack", grad, *ctx.saved_tensors), None, None


_FORMULAS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "linear": (_save_linear, _linear),
    "qkv_linear": (_save_qkv_linear, _qkv_linear),
    "feed_forward": (_save_feed_forward, _feed_forward),
    "attention_forward": (_save_attention, _attention),
    "add_layer_norm": (_save_add_layer_norm, _add_layer_norm),
    "embedding_layer_norm": (_save_embedding, _embedding),
    "linear_cross_entropy": (_save_cross_entropy, _cross_entropy),
    "pack": (_save_indices, _pack),
    "unpack": (_save_indices, _unpack),
}

for _name, (_save, _backward) in _FORMULAS.items():
    torch.library.register_autograd(f"fastbert::{_name}", _backward, setup_context=_save, lib=ops._LIBRARY)


def _one_by_one(name: str) -> Callable[..., Any]:
    """The rule by which torch.vmap runs an operator: on one after the other."""
    operator = getattr(torch.ops.fastbert, name)

    def rule(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def each(i: int) -> Any:
            return operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)))

        results = [each(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


for _name in ("pack", "unpack", *(name for name in ops._OPERATORS if name.endswith("_backward"))):
    torch.library.register_vmap(f"fastbert::{_name}", _one_by_one(_name), lib=ops._LIBRARY)
