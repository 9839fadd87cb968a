"""How long attention's programs keep a GPU by the order they are launched in: a model, of counted work alone.

    python benchmarks/schedule.py

A program holds a block of rows and walks its sequence in blocks of 64; a step is the unit. Slots take programs in the
order of their launch, whichever is free first, as a GPU does. Compared are a grid of blocks by heads by sequences, as
long as the longest sequence everywhere, with the list of `attention_tiles`, the longest sequences first. Where none is
longer than 64 tokens attention takes the grid.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from fastbert.measure.cases import workload

HEADS, SMS = 16, 132
WALKED, TILE_ROWS = 64, 128
FIXED = 1.5
"""Steps' worth of time that a program takes to start, load and store."""
EMPTY = 0.3
"""The same of one that finds it has no rows."""
KERNELS = (("forward", 128, 2), ("backward", 64, 3))
"""Each with the rows of a program, and the programs that share an SM."""


def blocks(length: int, size: int) -> int:
    """How many of a size a sequence takes."""
    return -(-length // size)


def makespan(costs: Iterable[float], slots: int) -> float:
    """Until the last of the programs is done."""
    ends = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def grid(lengths: Sequence[int], rows: int) -> Iterator[float]:
    """The cost of each program of a grid of blocks, heads and sequences, the first of them fastest."""
    for length in lengths:
        for _ in range(HEADS):
            for block in range(blocks(max(lengths), rows)):
                yield FIXED + blocks(length, WALKED) if block * rows < length else EMPTY


def listed(lengths: Sequence[int], rows: int) -> Iterator[float]:
    """The same of a list of tiles."""
    tiles = [(n, start) for n in sorted(lengths, reverse=True) for start in range(0, n, TILE_ROWS)]
    tiles += [(0, 0)] * (sum(lengths) // TILE_ROWS + len(lengths) - len(tiles))
    for length, start in tiles:
        for part in range(TILE_ROWS // rows):
            cost = FIXED + blocks(length, WALKED) if start + part * rows < length else EMPTY
            yield from [cost] * HEADS


def main() -> None:
    print(f"{'kernel':<10}{'workload':<16}{'grid':>8}{'list':>8}{'saved':>7}{'at best':>9}")
    for kernel, rows, programs in KERNELS:
        for name in ("squad", "search", "dense512"):
            for batch in (8, 32, 128):
                lengths, slots = workload(name, batch).lengths, SMS * programs
                one, other = makespan(grid(lengths, rows), slots), makespan(listed(lengths, rows), slots)
                work = [cost for cost in grid(lengths, rows) if cost > EMPTY]
                best = max(sum(work) / slots, max(work))
                line = f"{kernel:<10}{name + f' b{batch}':<16}{one:8.1f}{other:8.1f}{1 - other / one:7.0%}{best:9.1f}"
                print(line)


if __name__ == "__main__":
    main()
