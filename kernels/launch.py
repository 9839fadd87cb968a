"""Launch configurations: data, per architecture, each with its reason; and the pure functions that choose one.

Nothing here touches a device except `architecture`. No autotuning: the same shape always gets the same configuration, and
a configuration never depends on the number of rows, so a row's result doesn't depend on what it is batched with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """One launch configuration of a tiled kernel. Tile sizes are in elements; `block_k` is 0 where a kernel has none."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "portable"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """The name the tables below know `device` by: "sm_90" and so on, or "portable" where it is no NVIDIA GPU."""
    if device.type != "cuda":
        return "portable"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


# Attention: by architecture, then (bytes an element, head_dim rounded up to a power of two). None is measured yet: all are
# counted from registers and shared memory a program, as the ahead-of-time compilation reports them.
_ATTENTION: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        (2, 16): Config(64, 64, 0, 4, 3),
        (2, 32): Config(64, 64, 0, 4, 3),
        (2, 64): Config(64, 64, 0, 4, 3),
        (2, 128): Config(64, 64, 0, 4, 2),
        (4, 16): Config(32, 32, 0, 4, 2),
        (4, 32): Config(32, 32, 0, 4, 2),
        (4, 64): Config(32, 32, 0, 4, 2),
        (4, 128): Config(32, 32, 0, 4, 2),
    },
    "sm_90": {
        (2, 16): Config(64, 64, 0, 4, 3),
        (2, 32): Config(64, 64, 0, 4, 3),
        (2, 64): Config(64, 64, 0, 4, 3),
        (2, 128): Config(64, 64, 0, 4, 2),
        (4, 16): Config(32, 32, 0, 4, 2),
        (4, 32): Config(32, 32, 0, 4, 2),
        (4, 64): Config(32, 32, 0, 4, 2),
        (4, 128): Config(32, 32, 0, 4, 2),
    },
    "portable": {
        (2, 16): Config(64, 32, 0, 4, 2),
        (2, 32): Config(64, 32, 0, 4, 2),
        (2, 64): Config(64, 32, 0, 4, 2),
        (2, 128): Config(64, 32, 0, 4, 2),
        (4, 16): Config(32, 32, 0, 4, 1),
        (4, 32): Config(32, 32, 0, 4, 1),
        (4, 64): Config(32, 32, 0, 4, 1),
        (4, 128): Config(32, 32, 0, 4, 1),
    },
}


def attention_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of attention: `block_m` queries by `block_n` keys. Never of lengths or batch: that would break invariance.

    Args:
        arch: as `architecture` names it; one without a table gets "portable".
        dtype: of the operands.
        head_dim: 1 to 128.

    Raises:
        ValueError: `head_dim` is out of range.
    """
    if not 1 <= head_dim <= 128:
        raise ValueError(f"head_dim is {head_dim}; expected 1 to 128")
    padded = max(16, 1 << (head_dim - 1).bit_length())
    return _ATTENTION.get(arch, _ATTENTION["portable"])[dtype.itemsize, padded]
