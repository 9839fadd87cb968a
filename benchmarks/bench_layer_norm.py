"""LayerNorm, after a residual and without, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]

EPS = 1e-12


def bench_layer_norm(case: Case, compare: Compare) -> None:
    arguments = case.normal(case.tokens, case.hidden), case.normal(case.hidden), case.normal(case.hidden), EPS
    compare("layer_norm", ops.layer_norm, lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps), arguments)


def bench_add_layer_norm(case: Case, compare: Compare) -> None:
    x, residual = (case.normal(case.tokens, case.hidden) for _ in range(2))
    arguments = x, residual, case.normal(case.hidden), case.normal(case.hidden), EPS, 0.0, None

    def peer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *dropout: object) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias, eps)

    compare("add_layer_norm", ops.add_layer_norm, peer, arguments)


def bench_add_layer_norm_backward(case: Case, compare: Compare) -> None:
    """Statistics are taken again from the sum; in its place, autograd's backward, which kept them."""
    grad, x, residual = (case.normal(case.tokens, case.hidden) for _ in range(3))
    weight = case.normal(case.hidden)

    def fused(*arguments: object) -> tuple[Tensor, ...]:
        return ops.add_layer_norm_backward(*arguments)[1:]  # the gradient of x is that of the residual

    def peer(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *dropout: object) -> list[Tensor]:
        total, shape = x + residual, weight.shape
        _, mean, rstd = torch.ops.aten.native_layer_norm(total, shape, None, None, eps)
        back = torch.ops.aten.native_layer_norm_backward
        found: list[Tensor] = back(grad, total, shape, mean, rstd, weight, weight, [True] * 3)
        return found

    compare("add_layer_norm_backward", fused, peer, (grad, x, residual, weight, EPS, 0.0, None))
