"""Linear layers of BERT and their epilogues, over the rows of a packed batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]


def bench_qkv_linear(case: Case, compare: Compare) -> None:
    x, parts = case.normal(case.tokens, case.hidden), [case.linear(case.hidden, case.hidden) for _ in range(3)]

    def peer(x: Tensor, *rest: Tensor) -> list[Tensor]:
        return [F.linear(x, *rest[i : i + 2]) for i in (0, 2, 4)]

    compare("qkv_linear", ops.qkv_linear, peer, (x, *sum(parts, ())), read=lambda rows: torch.stack(rows, 1))


def bench_linear_gelu(case: Case, compare: Compare) -> None:
    arguments = (case.normal(case.tokens, case.hidden), *case.linear(case.intermediate, case.hidden), "none")
    compare("linear_gelu", ops.linear_gelu, lambda x, w, b, how: F.gelu(F.linear(x, w, b), approximate=how), arguments)


def bench_linear_add(case: Case, compare: Compare) -> None:
    x, residual = case.normal(case.tokens, case.intermediate), case.normal(case.tokens, case.hidden)
    arguments = (x, *case.linear(case.hidden, case.intermediate), residual)
    compare("linear_add", ops.linear_add, lambda x, w, b, residual: F.linear(x, w, b) + residual, arguments)


def bench_linear_gelu_backward(case: Case, compare: Compare) -> None:
    weight, _ = case.linear(case.hidden, case.intermediate)
    arguments = case.normal(case.tokens, case.hidden), weight, case.normal(case.tokens, case.intermediate), "none"

    def peer(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
        dpre = torch.ops.aten.gelu_backward(grad @ weight, pre, approximate=approximate)
        return dpre, F.gelu(pre, approximate=approximate)

    compare("linear_gelu_backward", ops.linear_gelu_backward, peer, arguments)
