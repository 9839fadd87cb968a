"""Three embedding tables and their LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]

VOCABULARY, POSITIONS, TYPES = 30522, 512, 2


def bench_embedding_layer_norm(case: Case, compare: Compare) -> None:
    ids = [torch.randint(high, (case.tokens,), device=case.device) for high in (VOCABULARY, TYPES, POSITIONS)]
    tables = [case.normal(rows, case.hidden) for rows in (VOCABULARY, TYPES, POSITIONS)]
    norm = case.normal(case.hidden), case.normal(case.hidden), 1e-12

    def peer(*arguments: Tensor) -> Tensor:
        words, types, positions = map(F.embedding, arguments[:3], arguments[3:6])
        weight, bias = arguments[6:8]
        return F.layer_norm(words + types + positions, weight.shape, weight, bias, 1e-12)

    compare("embedding_layer_norm", ops.embedding_layer_norm, peer, (*ids, *tables, *norm, -1))
