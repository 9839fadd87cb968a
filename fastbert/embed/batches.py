"""Batches of texts by how many tokens they have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..runtime.support import MAX_SEQUENCES


def batch_tokens_on(device: torch.device) -> int:
    """Tokens in a forward, where nothing else is asked for."""
    return 65536 if device.type == "cuda" else 2048


def batches_of(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences, the longest first, in batches of `batch_tokens` at most, or of one."""
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    start = total = 0
    for i, index in enumerate(order):
        if i > start and (total + lengths[index] > batch_tokens or i - start == MAX_SEQUENCES):
            yield order[start:i]
            start, total = i, 0
        total += int(lengths[index])
    if len(order) > start:
        yield order[start:]
