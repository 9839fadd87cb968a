"""What `fuse` leaves on an encoder: what was asked of it, how many forwards ran which way, who is in one."""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Literal, get_args

import torch

from ..exporting import tell_of_stock
from ..layers.copies import Copies
from .coverage import Coverage
from .graphs import Graphs
from .readers import Held

Padding = Literal["auto", "packed", "dense"]
PADDINGS: tuple[Padding, ...] = get_args(Padding)


# Of all counts: held for an addition. A process that is forked meanwhile would wait for it forever.
_COUNTING = threading.Lock()


def _renew_lock() -> None:
    global _COUNTING
    _COUNTING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class Counts:
    """How many forwards ran which way; safe to share between threads, to fork, to copy and to pickle."""

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()
        """Forwards that ran fused, by layout: "packed" or "dense"; in another precision "packed, fp8" and so on."""
        self.stock: Counter[str] = Counter()
        """Forwards that ran stock, by reason."""
        self.graphs: Counter[str] = Counter()
        """What came of CUDA graphs, of those that ran fused where they are asked for."""

    def add(self, which: Counter[str], key: str) -> None:
        """Counts one forward; none that is compiled, nor one that a backward runs, as checkpointing runs it again."""
        if which is self.stock:
            tell_of_stock("the model", key)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            with _COUNTING:
                which[key] += 1


class Running:
    """The threads that are in a forward of a fused base model at this moment. A copy of it begins with none."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()


class Settings:
    """What `fuse` leaves on an encoder: what was asked of it, counts, and what its base model stood in."""

    def __init__(self, padding: str, loss_only: bool, cuda_graphs: bool, precision: Copies | None) -> None:
        self.padding = padding
        self.loss_only = loss_only
        self.graphs = Graphs() if cuda_graphs else None
        self.precision = precision
        """What its GEMMs are of in inference; None: the model's own weights."""
        self.holders: set[Held] = set()
        """What the base model stood in."""
        self.counts = Counts()
        self.running = Running()
        self.coverage = Coverage()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "holders"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.holders = set()  # those that are copied, too, come back by themselves
