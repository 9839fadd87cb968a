"""Tensors that are made of parameters alone, kept beside the model while the parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class _Made(NamedTuple):
    key: tuple[tuple[int, int] | None, ...]
    """Address and version of every parameter."""
    storages: tuple[StorageWeakRef, ...]
    """While they live, no other parameter can have their address."""
    value: Any


class Derived:
    """What was made of parameters, by place; no part of a copy or of a pickle."""

    def __init__(self) -> None:
        self.made: dict[Hashable, _Made] = {}

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

    def drop(self) -> None:
        """Frees it; the next forward makes it again."""
        self.made = {}

    def get(self, place: Hashable, parameters: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        """What `make` returns: from before, if none of `parameters` is another one or has been written to since."""
        if any(p is not None and p.is_inference() for p in parameters):  # writing to it leaves no trace
            return make()
        key = tuple(None if p is None else (p.data_ptr(), p._version) for p in parameters)
        made = self.made.get(place)
        if made is not None and made.key == key and not any(storage.expired() for storage in made.storages):
            found: T = made.value
            return found
        value = make()
        # What a CUDA graph makes as it is captured is the graph's own, made again at each replay.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            storages = tuple(StorageWeakRef(p.untyped_storage()) for p in parameters if p is not None)
            self.made[place] = _Made(key, storages, value)
        return value
