"""What every kernel test runs under: memory nobody wrote is NaN, and none is touched that a kernel wasn't given."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GUARD = 64


def guard_empty(monkeypatch: pytest.MonkeyPatch, bands: list[tuple[Tensor, Tensor]]) -> None:
    """Makes torch.empty give NaN in place of whatever was there, between two of `bands`, each with a copy of itself."""
    empty = torch.empty

    def guarded(*args: Any, **kwargs: Any) -> Tensor:
        asked = empty(*args, **kwargs)
        if asked.is_meta:  # of PyTorch's own shape functions: there is no memory
            return asked
        if not asked.is_contiguous():
            raise NotImplementedError("torch.empty of another memory format")
        buffer = empty(asked.numel() + 2 * GUARD, dtype=asked.dtype, device=asked.device)
        buffer.fill_(math.nan if asked.is_floating_point() else 77)
        bands.extend((band, band.clone()) for band in (buffer[:GUARD], buffer[-GUARD:]))
        return buffer[GUARD:-GUARD].view(asked.shape)

    monkeypatch.setattr(torch, "empty", guarded)


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a device, too: an element never written is one that fails, and so is a store past either end of a buffer."""
    bands: list[tuple[Tensor, Tensor]] = []
    guard_empty(monkeypatch, bands)
    yield
    for band, before in bands:
        assert torch.equal(band.view(torch.uint8), before.view(torch.uint8)), "a kernel wrote beside its buffer"


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of `x`, and of the first past its end, whatever its strides."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


class Watched:
    """Triton's interpreter of memory, which lets a launch read and write nothing but the tensors it was given."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.extents: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _check(self, pointers: Any, mask: Any, size: int) -> None:
        found = np.asarray(pointers)[np.asarray(mask).astype(bool)].astype(np.int64)
        if not found.size:
            return
        low, high = int(found.min()), int(found.max()) + size
        if any(begin <= low and high <= end for begin, end in self.extents):
            return
        inside = np.zeros(found.shape, bool)
        for begin, end in self.extents:
            inside |= (found >= begin) & (found + size <= end)
        if not inside.all():
            raise MemoryError(f"{(~inside).sum()} of {found.size} addresses lie in none of the tensors of this launch")

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(pointers, mask, np.dtype(dtype).itemsize)
        # Of a block and a scalar of program_id Triton 3.9 interprets a mask of integers, which it then refuses.
        return self._real.load(pointers, np.asarray(mask, bool), other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._check(pointers, mask, value.dtype.itemsize)
        return self._real.store(pointers, value, np.asarray(mask, bool))

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        self._check(pointers, mask, value.dtype.itemsize)
        return self._real.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers: Any, compared: Any, value: Any, order: Any) -> Any:
        self._check(pointers, np.ones_like(pointers, dtype=bool), value.dtype.itemsize)
        return self._real.atomic_cas(pointers, compared, value, order)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched | None:
    """In the interpreter: a read or write outside of the tensors a kernel is given is an error, wherever it lands."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from triton.runtime import interpreter

    memory = Watched(interpreter._interpreter)
    begin = interpreter.GridExecutor._init_args_hst

    def launch(self: Any, args: Any, kwargs: Any) -> Any:
        found = begin(self, args, kwargs)
        given = [getattr(x, "base", x) for x in (*found[0], *found[1].values())]  # of a TensorDescriptor its tensor
        memory.extents = [extent(x) for x in given if isinstance(x, Tensor)]
        return found

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", launch)
    monkeypatch.setattr(interpreter, "_interpreter", memory)
    return memory
