"""Tensors that are made of parameters alone, kept beside the model while the parameters stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


_SAMPLED = 4


class Watch:
    """Parameters as they were: addresses, versions, and some elements of those that a CPU can read at once."""

    def __init__(self, parameters: Sequence[Tensor | None], sampled: bool) -> None:
        """`sampled`: elements too, which a write to all of a parameter changes."""
        self._key = _key(parameters)
        # While storages live, no other parameter can have their address.
        self._storages = [StorageWeakRef(p.untyped_storage()) for p in parameters if p is not None]
        self._views = [
            torch.as_strided(p.detach(), (_SAMPLED,), (_step(p),))
            for p in parameters
            if sampled and p is not None and p.device.type == "cpu" and p.numel()
        ]
        self._sample = torch.cat(self._views) if self._views else None

    def holds(self, parameters: Sequence[Tensor | None]) -> bool:
        """Whether `parameters` are those, as far as that can tell."""
        if _key(parameters) != self._key or any(storage.expired() for storage in self._storages):
            return False
        if self._sample is None:
            return True
        now = torch.cat(self._views)
        return torch.equal(now, self._sample) or torch.equal(now.view(torch.uint8), self._sample.view(torch.uint8))


def _step(p: Tensor) -> int:
    """From one of `_SAMPLED` elements to the next in memory: along the diagonal, however `p` lies there."""
    return sum(size // _SAMPLED * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _key(parameters: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
    return [None if p is None else (p.data_ptr(), p._version) for p in parameters]


class _Made(NamedTuple):
    parameters: Watch
    source: object
    """What else it was made of: an object, which is kept, so that no other is the same."""
    prints: list[Tensor]
    """`_prints`, where writes that leave no version are looked for."""
    seen: dict[int, Tensor]
    """What GEMMs of so many rows made of `directions`, with the same parameters."""
    value: Any


def _prints(parameters: Sequence[Tensor | None]) -> list[Tensor]:
    """Each parameter's rows times one random vector: another write than one of a rounding's size changes it."""
    found = []
    for p in parameters:
        if p is not None:
            rows = p.detach().view(-1, p.shape[-1]).float()
            found.append(torch.mv(rows, directions(rows.shape[1])))
    return found


@functools.lru_cache(16)
def directions(length: int) -> Tensor:
    """A random vector, always the same."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randn(length, generator=generator, dtype=torch.float32, device="cpu")


_SEEN = 16
"""Of each place, so many of `_Made.seen` are kept: 2 KB each of a base model."""


def _is_as_seen(made: _Made, parameters: Sequence[Tensor | None], seen: tuple[int, Tensor] | None) -> bool:
    """Whether `parameters` hold what they held: by `seen`, or else by reading them."""
    if seen is not None:
        before = made.seen.get(seen[0])
        if before is not None and torch.equal(before, seen[1]):
            return True
    if not all(map(torch.equal, made.prints, _prints(parameters))):
        return False
    if seen is not None:  # a GEMM of another number of rows may round otherwise
        if len(made.seen) >= _SEEN:
            made.seen.clear()
        made.seen[seen[0]] = seen[1].clone()
    return True


class Derived:
    """What was made of parameters, by place; no part of a copy or of a pickle."""

    def __init__(self) -> None:
        self.made: dict[Hashable, _Made] = {}

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

    def drop(self) -> None:
        """Frees it; the next forward makes it again."""
        self.made = {}

    def retain(self, places: Container[Hashable]) -> None:
        """Frees what was made of other places."""
        for place in [each for each in list(self.made) if each not in places]:
            self.made.pop(place, None)

    def get(
        self,
        place: Hashable,
        parameters: Sequence[Tensor | None],
        make: Callable[[], T],
        source: object = None,
        watched: bool = False,
        seen: tuple[int, Tensor] | None = None,
        sampled: bool = False,
    ) -> T:
        """What `make` returns: from before, if none of `parameters` is another one or has been written to since.

        Args:
            place: where it is kept.
            parameters: what it is made of.
            make: makes it.
            source: what else it is made of, the same or equal.
            watched: whether writes that leave no version, by `weight.data`, are to be seen, too: on a CPU, where
                parameters are read for it, and not on a GPU, which the host would have to wait for.
            seen: how many rows a GEMM by the first two of `parameters` had, weight and bias, and what it made of one of
                them, `directions`. The same bits as before: the parameters need not be read.
            sampled: whether writes that leave no version are to be seen where they are to all of a parameter: on a CPU,
                some of its elements are read for it.
        """
        if any(p is not None and p.is_inference() for p in parameters):  # writing to it leaves no trace
            return make()
        watched = watched and all(p is None or p.device.type == "cpu" for p in parameters)
        made = self.made.get(place)
        if made is not None and made.parameters.holds(parameters):
            same = made.source is source or (isinstance(source, tuple) and made.source == source)
            if same and (not watched or _is_as_seen(made, parameters, seen)):
                found: T = made.value
                return found
        seen_now, prints = Watch(parameters, sampled), _prints(parameters) if watched else []
        value = make()
        # What a CUDA graph makes as it is captured is the graph's own, made again at each replay.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.made[place] = _Made(seen_now, source, prints, {}, value)
        return value
