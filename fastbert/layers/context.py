"""What goes with the rows of one forward through every layer: where they lie, and what attention asks of the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.packing import Packing


class Map:
    """Where a layer leaves its attention map: an object, which copies of a context (FSDP's, of arguments) share."""

    def __init__(self, heads: list[int] | None, ends: bool) -> None:
        self.ends = ends
        """Whether nothing that comes after it is wanted."""
        self.heads = heads
        """Those whose maps are wanted, in that order; None: all."""
        self.found: Tensor | None = None
        """(B, heads, S, S), S as the caller knows it, zeros where no token is."""


class Context(NamedTuple):
    """A NamedTuple of tensors and integers: it travels through module calls, hooks and torch.compile as data."""

    packing: Packing
    tables: Mapping[str, Any] = {}
    """What a family makes once a forward, by name (`Family.tables`); halves say which they read.

    A bias by distance: (heads, 2 R - 1) float32, for keys 1 - R to R - 1 tokens after the query.
    A rotation: cosines and sines, each (T, head_dim), of the two halves of every head.
    """

    map: Map | None = None
    """Where the map of this layer is wanted; None: it is not."""

    def sequences(self) -> tuple[Tensor | None, Tensor | None, int]:
        """As operators of attention take them: cu_seqlens, key_mask and the length of the longest."""
        return self.packing.cu_seqlens, self.packing.key_mask, self.packing.max_seqlen

    def places(self, device: torch.device) -> tuple[Tensor | None, int]:
        """As operators of attention maps take them: of each row its place in a map, and the width of one."""
        packing = self.packing
        return None if packing.cu_seqlens is None else packing.positions(device), packing.seqlen
