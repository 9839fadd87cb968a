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
