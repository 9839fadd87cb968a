"""Dropping the rows of padding, and putting them back as zeros."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]


def bench_pack(case: Case, compare: Compare) -> None:
    packing, rows = case.packing(), case.mask().numel()
    arguments = case.normal(rows, case.hidden), packing.indices, packing.inverse
    compare("pack", ops.pack, lambda x, indices, inverse: x[indices], arguments)


def bench_unpack(case: Case, compare: Compare) -> None:
    packing = case.packing()
    arguments = case.normal(case.tokens, case.hidden), packing.indices, packing.inverse

    def peer(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
        out = x.new_zeros(inverse.shape[0], x.shape[1])
        return out.index_copy_(0, indices, x)

    compare("unpack", ops.unpack, peer, arguments)
