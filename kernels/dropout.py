"""Which elements dropout keeps: the same again for the same seed, in any kernel and any tile.

Element (row, column) of a stream of a seed is kept where 16 bits drawn for it are not below a threshold. Philox4x32-10
of the counter (row, column // 8, stream, 0), with the seed as its key, draws those of eight neighbouring columns at
once, element by element from the low half of its first word to the high half of its fourth: a draw for each would cost
more than the attention it is for.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _slices(seed, rows, groups, stream):
    """The eight 16-bit draws of each counter: a tensor with three more dimensions, of two each."""
    counter = rows.to(tl.uint32)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + groups.to(tl.uint32), zero + stream.to(tl.uint32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def keep_tile(seed, rows, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] bool: whether (rows[i], first_col + j) is kept. COLS and first_col are multiples of 8."""
    groups = first_col // 8 + tl.arange(0, COLS // 8)
    rows, groups = tl.broadcast(rows[:, None], groups[None, :])
    return _slices(seed, rows, groups, stream).reshape(ROWS, COLS) >= threshold


@triton.jit
def keep_row(seed, row, threshold, COLS: tl.constexpr):
    """[COLS] bool: whether (row, j) of stream 0 is kept. COLS is a multiple of 8."""
    groups = tl.arange(0, COLS // 8)
    return _slices(seed, groups * 0 + row, groups, row * 0).reshape(COLS) >= threshold


def draw_threshold(dropout: float) -> int:
    """What 16 bits are compared with, for a rate of 0 to 1."""
    return round(dropout * 2**16)


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - dropout), 0 where none is kept."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


def checked_seed(dropout: float, seed: Tensor | None) -> Tensor | None:
    """`seed`, or None where nothing is dropped.

    Raises:
        ValueError: `dropout` is no rate, or has no seed of one int64 element.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; expected 0 to 1")
    if dropout and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError("seed: expected an int64 tensor of one element where dropout is not 0")
    return seed if dropout else None
