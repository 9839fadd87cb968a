"""Which elements dropout keeps: the same again for the same seed, in any kernel and any tile.

Element (row, column) of a stream of a seed is kept where 16 bits drawn for it are not below a threshold. Philox4x32-7,
with the seed as its key, draws those of eight elements at once, from the low half of its first word to the high half of
its fourth: a draw for each would cost more than the attention it is for.

- In a matrix, the eight are those that one thread of a tensor core holds of a row of the result: of each 32 columns,
  columns 2 c + {0, 1} + {0, 8, 16, 24}, for c from 0 to 3. Their counter is (row, 4 (column // 32) + c, stream, 0), and
  nothing is exchanged between threads.
- In a row on its own they lie side by side, as they are loaded: the counter is (row, column // 8, 0, 0).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405,
which has 7 rounds as the fewest that pass all tests of randomness.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _multiply(a, FACTOR: tl.constexpr):
    """High and low half of a product of 32 bits each: of one wide multiplication, where tl.umulhi makes two."""
    product = a.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, a, b, c, d):
    """The four words of the counter (a, b, c, d), uint32 of one shape, under a 64-bit seed."""
    key0 = seed.to(tl.uint64).to(tl.uint32)
    key1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(7):  # rounds
        high0, low0 = _multiply(a, 0xD2511F53)
        high1, low1 = _multiply(c, 0xCD9E8D57)
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def _pair(word, limit, FIRST: tl.constexpr):
    """Whether the two draws of a word are kept, as bits FIRST and FIRST + 1."""
    return ((word << 16 >= limit).to(tl.uint32) << FIRST) | ((word >= limit).to(tl.uint32) << (FIRST + 1))


@triton.jit
def _tile_bits(seed, rows, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS // 8] uint32 (4 where COLS is 16): of each counter of a tile, bit i says whether draw i is kept."""
    COUNTERS: tl.constexpr = COLS // 8 if COLS >= 32 else 4
    counters = first_col // 32 * 4 + tl.arange(0, COUNTERS)
    rows, counters = tl.broadcast(rows[:, None].to(tl.uint32), counters[None, :].to(tl.uint32))
    zero = rows * 0
    word0, word1, word2, word3 = philox(seed, rows, counters, zero + stream.to(tl.uint32), zero)
    limit = threshold.to(tl.uint32) << 16
    return _pair(word0, limit, 0) | _pair(word1, limit, 2) | _pair(word2, limit, 4) | _pair(word3, limit, 6)


@triton.jit
def keep_tile(seed, rows, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] bool: whether (rows[i], first_col + j) is kept. COLS, 16 or more, is a power of two; first_col a
    multiple of it."""
    GROUPS: tl.constexpr = COLS // 32 if COLS >= 32 else 1  # of 32 columns, or a part
    EIGHTS: tl.constexpr = COLS // GROUPS // 8
    bits = _tile_bits(seed, rows, first_col, stream, threshold, ROWS, COLS).reshape(ROWS, GROUPS, 1, 4, 1)
    eights = tl.arange(0, EIGHTS)
    if COLS < 32:
        eights += first_col % 32 // 8
    draws = eights[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
    bits = tl.broadcast_to(bits, (ROWS, GROUPS, EIGHTS, 4, 2)) >> draws.to(tl.uint32)[None, None]
    return (bits & 1).reshape(ROWS, COLS) != 0


@triton.jit
def keep_tile_transposed(seed, rows, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[COLS, ROWS] bool: the transpose of `keep_tile`. Between threads go single bits, in words of 32 columns."""
    GROUPS: tl.constexpr = COLS // 32 if COLS >= 32 else 1
    WIDTH: tl.constexpr = COLS // GROUPS
    bits = _tile_bits(seed, rows, first_col, stream, threshold, ROWS, COLS).reshape(ROWS, GROUPS, 4)
    bits = bits << (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]
    words = tl.trans(tl.sum(bits, 2).to(tl.uint32))  # [GROUPS, ROWS]
    words = tl.broadcast_to(words[:, None, :], (GROUPS, WIDTH, ROWS)).reshape(COLS, ROWS)
    cols = tl.arange(0, COLS)
    if COLS < 32:
        cols += first_col % 32
    bit = cols % 8 // 2 * 8 + cols % 32 // 8 * 2 + cols % 2
    return ((words >> bit.to(tl.uint32)[:, None]) & 1) != 0


@triton.jit
def keep_row(seed, row, threshold, COLS: tl.constexpr):
    """[COLS] bool: whether (row, j) of stream 0 is kept. COLS is a multiple of 8."""
    counters = tl.arange(0, COLS // 8).to(tl.uint32)
    zero = counters * 0
    word0, word1, word2, word3 = philox(seed, zero + row.to(tl.uint32), counters, zero, zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return tl.join(words << 16, words).reshape(COLS) >= threshold.to(tl.uint32) << 16


def draw_threshold(dropout: float) -> int:
    """What 16 bits are compared with, for a rate of 0 to 1: at most 65535. `keep_scale` is 0 where all is dropped."""
    return min(round(dropout * 2**16), 2**16 - 1) if dropout else 0


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - dropout), 0 where none is kept."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


def checked_seed(dropout: float, seed: Tensor | None) -> Tensor | None:
    """`seed`, or None where nothing is dropped.

    Raises:
        ValueError: `dropout` is no rate, or has no seed of one int64 element.
    """
    if dropout == 0:
        return None
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}; expected 0 to 1")
    if seed is None or seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError("seed: expected an int64 tensor of one element where dropout is not 0")
    return seed
