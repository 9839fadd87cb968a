"""The loss of masked language models, of labelled rows alone; in its place, by way of all their logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]

VOCABULARY, LABELLED = 30522, 0.15


def bench_linear_cross_entropy(case: Case, compare: Compare) -> None:
    rows = max(1, round(LABELLED * case.tokens))
    labels = torch.randint(VOCABULARY, (rows,), device=case.device)
    arguments = case.normal(rows, case.hidden), *case.linear(VOCABULARY, case.hidden), labels

    def peer(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="none")

    compare("linear_cross_entropy", lambda *given: ops.linear_cross_entropy(*given)[0], peer, arguments)
