"""benchmarks/schedule.py: times by hand, and its list is that of the kernel."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from benchmarks import schedule
from fastbert.kernels import reference


def test_programs_take_the_first_free_slot() -> None:
    assert schedule.makespan([3, 1, 1, 1, 4], 2) == 7
    assert schedule.makespan([4, 3, 1, 1, 1], 2) == 5  # the longest first


def test_both_orders_hold_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "HEADS", 1)
    one, several, empty = schedule.FIXED + 1, schedule.FIXED + 3, schedule.EMPTY
    assert list(schedule.grid([10, 140], 128)) == [one, empty, several, several]
    assert list(schedule.listed([10, 140], 128)) == [several, several, one]
    assert list(schedule.listed([10, 140], 64)) == [several, several, several, empty, one, empty]


def test_the_list_is_the_kernels() -> None:
    lengths = [300, 5, 128, 0, 129]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tiles = reference.attention_tiles(starts, sum(lengths))
    costs = [schedule.FIXED + schedule.blocks(n, 64) if n else schedule.EMPTY for n in tiles[:, 1].tolist()]
    assert list(schedule.listed(lengths, schedule.TILE_ROWS)) == [cost for cost in costs for _ in range(schedule.HEADS)]
