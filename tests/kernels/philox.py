"""Philox4x32 in NumPy, and by it which elements dropout keeps: what the kernels are held to, written on its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int], rounds: int) -> tuple[np.ndarray, ...]:
    """Four 32-bit words of each counter of four 32-bit words, in uint64."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    keys = [np.uint64(part) for part in key]
    for _ in range(rounds):
        left, right = np.uint64(MULTIPLIERS[0]) * a, np.uint64(MULTIPLIERS[1]) * c
        a, b, c, d = (
            (right >> np.uint64(32)) ^ b ^ keys[0],
            right & WORD,
            (left >> np.uint64(32)) ^ d ^ keys[1],
            left & WORD,
        )
        keys = [(part + np.uint64(step)) & WORD for part, step in zip(keys, KEY_STEPS, strict=True)]
    return a, b, c, d


def keep(seed: int, rows: Tensor, cols: Tensor, stream: int, dropout: float) -> Tensor:
    """(len(rows), len(cols)) bool: what dropout keeps of a matrix, as kernels/dropout.py defines it."""
    row, col = (np.asarray(x, np.uint64) for x in torch.meshgrid(rows, cols, indexing="ij"))
    place = col % np.uint64(8)
    counter = col // np.uint64(32) * np.uint64(4) + place // np.uint64(2)
    return _kept(seed, row, counter, stream, col % np.uint64(32) // np.uint64(8), place % np.uint64(2), dropout)


def keep_row(seed: int, rows: Tensor, cols: Tensor, dropout: float) -> Tensor:
    """The same of rows on their own."""
    row, col = (np.asarray(x, np.uint64) for x in torch.meshgrid(rows, cols, indexing="ij"))
    place = col % np.uint64(8)
    return _kept(seed, row, col // np.uint64(8), 0, place // np.uint64(2), place % np.uint64(2), dropout)


def _kept(
    seed: int, row: np.ndarray, counter: np.ndarray, stream: int, word: np.ndarray, half: np.ndarray, dropout: float
) -> Tensor:
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    words = np.stack(philox((row, counter, np.full_like(row, stream), np.zeros_like(row)), key, 7), -1)
    chosen = np.take_along_axis(words, word[..., None].astype(np.int64), -1)[..., 0]
    draw = chosen >> (half * np.uint64(16)) & np.uint64(0xFFFF)
    return torch.from_numpy(draw >= np.uint64(min(round(dropout * 65536), 65535)))
