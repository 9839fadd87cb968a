"""What the goals on a Hopper GPU take, estimated from counted FLOPs and bytes. Nothing in it was measured by this code.

    python benchmarks/estimate.py [--gpu "NVIDIA H200"] [--write]

prints tables for BERT-large: the goals, where the time of each goes, and what each step of optimisation brings; --write
puts them into benchmarks/NOTES.md. A launch takes the longest of its arithmetic, its bytes from memory, and its tiles'
way from the L2 cache into the multiprocessors, wave by wave; then what nothing overlaps: the start and the end of a
tile, and the gap to the next launch. What a chip can do is in CHIPS, with its source; what kernels make of it is
assumed: ASSUMED.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import MARKERS, splice
from fastbert.measure.cases import SHAPES, workload
from fastbert.measure.machine import DATASHEET

NOTES = Path(__file__).with_name("NOTES.md")
SHAPE = SHAPES["large"]
HIDDEN, WIDE = SHAPE["hidden_size"], SHAPE["intermediate_size"]
HEADS, LAYERS = SHAPE["num_attention_heads"], SHAPE["num_hidden_layers"]


@dataclass(frozen=True)
class Chip:
    """What a GPU can do: rates a second."""

    peak: dict[str, float]
    """FLOPs of GEMMs, by the datasheet: what MFU is a fraction of."""
    gemm: dict[str, float]
    """FLOPs of a square GEMM of 8192, as measured through PyTorch."""
    copy: float
    """Bytes, read and written, of a large copy, as measured."""
    multiprocessors: int = 132
    clock: float = 1.755e9
    l2_bytes: float = 5120 * 1.755e9
    """NVIDIA gives 5120 bytes a clock for the A100's L2 cache and nothing for Hopper's: taken to be the same."""
    fill_bytes: float = 64 * 1.755e9
    """From L2 into one multiprocessor: 64 bytes a clock."""


# FP8's GEMM: 1,453 TFLOP/s is a public figure for an H100. The rest: read off such GPUs through PyTorch.
CHIPS = {
    "NVIDIA H200": Chip({"bf16": DATASHEET["NVIDIA H200"], "fp8": 1978.9e12}, {"bf16": 788e12, "fp8": 1453e12}, 4.3e12),
    "NVIDIA H100 80GB HBM3": Chip(
        {"bf16": DATASHEET["NVIDIA H100 80GB HBM3"], "fp8": 1978.9e12}, {"bf16": 798e12, "fp8": 1453e12}, 3.0e12
    ),
}


@dataclass(frozen=True)
class Assumed:
    """What kernels and the host make of a chip. None of it is measured: change it as soon as it is."""

    main_loop: float = 0.9
    """Of the measured GEMM's rate, within the main loop of a GEMM with its operands in shared memory."""
    tile_s: float = 2e-6
    """Start and end of a tile or a block of rows: first loads, epilogue. Persistent kernels hide part of it."""
    attention: float = 340e12
    """FLOPs a second forward, head_dim 64: a public figure of a Triton kernel at 512 tokens."""
    attention_backward: float = 250e12
    """As public kernels have it, which reach 198 to 272."""
    rows: float = 0.9
    """Of the copy's rate, where nothing but rows are read and written."""
    gap_s: float = 1e-6
    """Between two launches that wait for each other, in a stream with the host ahead or in a graph."""
    persistent: float = 0.4
    """Of tile_s, what a program of 16 bits hides that goes on to its next tile: first loads, but no epilogue."""
    split: bool = True
    """Whether rows beyond whole waves of tiles may take a launch of their own, in smaller tiles."""
    tiles: tuple[tuple[int, int], ...] = ((128, 256), (256, 128), (128, 128), (64, 128), (64, 64), (64, 32))
    """Of a GEMM; the fastest is taken."""
    folded: bool = False
    """Whether LayerNorms are part of the GEMMs around them."""
    overlap: float = 0.0
    """Of tile_s and gap_s, what programmatic dependent launch hides."""
    host_launch_s: float = 10e-6
    """The host's time for one launch from Python."""
    host_call_s: float = 300e-6
    """The host's time for one forward, beyond its launches."""
    compile_s: float = 0.35
    """To compile one kernel: CPU seconds of `compile_one` in tests/kernels/aot.py, on a server's core, were 0.1 to 0.8
    for those in KERNELS, in bfloat16 for sm_90."""
    import_s: float = 1.0
    """To import triton, and to build what launches kernels."""


ASSUMED = Assumed()
OVERLAP = 1 / 3
"""Of programmatic dependent launch: the gap. A kernel waits for the one before before it loads anything."""
BLOCK = 64
"""Queries and keys of a block of attention: what a sequence is rounded up to."""


@dataclass(frozen=True)
class Launch:
    """One launch of a layer, or one a forward."""

    name: str
    kind: str  # "GEMM", "attention" or "rows"
    bytes: int
    gemm: tuple[int, int, int] = (0, 0, 0)  # rows, columns and depth
    pairs: int = 0  # of a query and a key of the same sequence
    block_pairs: int = 0  # the same, with sequences rounded up to blocks
    matmuls: int = 2  # of attention
    width: int = 2  # bytes of an operand of a GEMM

    @property
    def flops(self) -> int:
        """As counts.py has them."""
        m, n, k = self.gemm
        return 2 * m * n * k + self.matmuls * 2 * HIDDEN * self.pairs


def _gemm(name: str, m: int, n: int, k: int, width: int, moved: int) -> Launch:
    """`moved`: bytes beyond the two operands."""
    return Launch(name, "GEMM", (m * k + n * k) * width + moved, (m, n, k), width=width)


def _attention(name: str, lengths: Sequence[int], moved: int, matmuls: int) -> Launch:
    rounded = [-(-n // BLOCK) * BLOCK for n in lengths]
    pairs, block_pairs = sum(n * n for n in lengths), sum(n * n for n in rounded)
    return Launch(name, "attention", moved, pairs=pairs, block_pairs=block_pairs, matmuls=matmuls)


def layer(lengths: Sequence[int], precision: str) -> list[Launch]:
    """The seven launches of a layer in inference. In FP8 all four GEMMs take e4m3 operands.

    LayerNorm, GELU and, as after calibration, attention make them of their results.
    """
    t, h, i = sum(lengths), HIDDEN, WIDE
    b = 1 if precision == "fp8" else 2
    row, starts = t * h, 4 * (len(lengths) + 1)
    norm = Launch("LayerNorm", "rows", 2 * row * 2 + 2 * h * 2 + (row if precision == "fp8" else 0))
    return [
        _gemm("qkv", t, 3 * h, h, b, 3 * row * 2 + 3 * h * 2),
        _attention("attention", lengths, 3 * row * 2 + row * b + starts, 2),
        _gemm("projection + residual", t, h, h, b, 2 * row * 2 + h * 2),
        norm,
        _gemm("up + GELU", t, i, h, b, t * i * b + i * 2),
        _gemm("down + residual", t, h, i, b, 2 * row * 2 + h * 2),
        norm,
    ]


def training_layer(lengths: Sequence[int]) -> list[Launch]:
    """The launches of a layer in a training step, in bf16, with dropout."""
    t, h, i = sum(lengths), HIDDEN, WIDE
    row, wide, starts, seed = t * h * 2, t * i * 2, 4 * (len(lengths) + 1), 8
    stats = HEADS * t * 4
    norm = Launch("dropout + add + LayerNorm", "rows", 3 * row + 2 * h * 2 + seed)
    back = Launch("its backward", "rows", 5 * row + 3 * h * 2 + seed)

    def gradient(m: int, n: int, k: int) -> Launch:
        return _gemm("gradient", m, n, k, 2, m * n * 2)

    return [
        _gemm("qkv", t, 3 * h, h, 2, 3 * row + 3 * h * 2),
        _attention("attention", lengths, 4 * row + stats + starts + seed, 2),
        _gemm("projection", t, h, h, 2, row + h * 2),
        norm,
        _gemm("up + GELU", t, i, h, 2, 2 * wide + i * 2),
        _gemm("down", t, h, i, 2, row + h * 2),
        norm,
        back,
        _gemm("GELU's backward", t, i, h, 2, 3 * wide),
        gradient(h, i, t),
        gradient(t, h, i),
        gradient(i, h, t),
        back,
        gradient(t, h, h),
        gradient(h, h, t),
        _attention("attention's backward", lengths, 8 * row + stats + starts + seed, 5),
        gradient(t, h, 3 * h),
        gradient(3 * h, h, t),
        Launch("gradients of biases", "rows", 5 * h * 2 + i * 2),
    ]


def ends(lengths: Sequence[int]) -> list[Launch]:
    """The layout of the mask, embeddings, and rows back to their padded places, once a forward."""
    t, h, padded = sum(lengths), HIDDEN, len(lengths) * max(lengths)
    return [
        Launch("mask layout", "rows", (padded + t) * 8),
        Launch("embedding", "rows", 4 * t * h * 2),
        Launch("unpack", "rows", (t + padded) * h * 2),
    ]


def seconds(launch: Launch, chip: Chip, assumed: Assumed) -> tuple[float, float]:
    """(work, what nothing overlaps) of one launch."""
    fixed = (assumed.gap_s + assumed.tile_s) * (1 - assumed.overlap)
    if launch.kind == "rows":
        return launch.bytes / (chip.copy * assumed.rows), fixed
    if launch.kind == "attention":
        rate = assumed.attention if launch.matmuls == 2 else assumed.attention_backward
        return max(launch.matmuls * 2 * HIDDEN * launch.block_pairs / rate, launch.bytes / chip.copy), fixed
    m, n, _ = launch.gemm
    work = min(_tiled(launch, m, tile, chip, assumed) for tile in assumed.tiles)
    for tile in assumed.tiles if assumed.split else ():
        columns = math.ceil(n / tile[1])
        waves = math.ceil(m / tile[0]) * columns // chip.multiprocessors
        first = waves * chip.multiprocessors // columns * tile[0]
        if 0 < first < m:
            rest = min(_tiled(launch, m - first, other, chip, assumed) for other in assumed.tiles)
            work = min(work, _tiled(launch, first, tile, chip, assumed) + fixed + rest)
    return max(work, launch.bytes / chip.copy), fixed


def _tiled(launch: Launch, rows: int, tile: tuple[int, int], chip: Chip, assumed: Assumed) -> float:
    """Seconds of so many rows of a GEMM in tiles of one size; the first one's start and the last one's end apart."""
    (block_m, block_n), (_, n, k) = tile, launch.gemm
    rate = chip.gemm["fp8" if launch.width == 1 else "bf16"] * assumed.main_loop
    loaded = (block_m + block_n) * k * launch.width
    alone = max(2 * block_m * block_n * k / (rate / chip.multiprocessors), loaded / chip.fill_bytes)
    waves, rest = divmod(math.ceil(rows / block_m) * math.ceil(n / block_n), chip.multiprocessors)
    work = waves * max(alone, chip.multiprocessors * loaded / chip.l2_bytes)
    if rest:
        work += max(alone, rest * loaded / chip.l2_bytes)
        waves += 1
    hidden = assumed.persistent if launch.width == 2 else 0.0  # there is no persistent kernel of FP8
    return work + (waves - 1) * assumed.tile_s * (1 - hidden)


@dataclass(frozen=True)
class Row:
    """A goal: so many sequences a second, or, of latency, so many milliseconds."""

    name: str
    lengths: tuple[int, ...]
    precision: str
    goal: float
    stretch: float
    way: str = ""  # "eager", "graph" or "graph, PDL" where one sequence's latency is the goal
    train: bool = False

    def time(self, goal: float) -> float:
        """Seconds of the batch that a goal asks for."""
        return goal * 1e-3 if self.way else len(self.lengths) / goal


SQUAD, DENSE, ONE = workload("squad", 128).lengths, (512,) * 128, (128,)
MIXED = workload("uniform254", 64).lengths
ROWS = (
    Row("dense 512", DENSE, "bf16", 1600, 1800),
    Row("dense 512", DENSE, "fp8", 2250, 2600),
    Row("SQuAD mix", SQUAD, "bf16", 5200, 5800),
    Row("SQuAD mix", SQUAD, "fp8", 7500, 8200),
    *(Row("1 x 128", ONE, "bf16", 0.70, 0.50, way) for way in ("eager", "graph", "graph, PDL")),
    *(Row("1 x 128", ONE, "fp8", 0.55, 0.40, way) for way in ("eager", "graph", "graph, PDL")),
    Row("training, mean 254", MIXED, "bf16", 1000, 1100, train=True),
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one batch, and what they are made of."""

    work: dict[str, float]
    """By kind of launch."""
    fixed: float
    """Starts, ends and gaps."""
    host: float
    """What the host takes; the device waits for it where it is longer."""
    launches: int
    flops: int
    gemm_flops: int

    @property
    def device(self) -> float:
        """Seconds of the device, with a host that is ahead."""
        return sum(self.work.values()) + self.fixed

    @property
    def total(self) -> float:
        """Seconds of the batch."""
        return max(self.device, self.host)


def estimate(row: Row, chip: Chip, assumed: Assumed = ASSUMED) -> Estimate:
    """What a row takes; pure arithmetic."""
    if row.way == "graph, PDL":
        assumed = replace(assumed, overlap=OVERLAP)
    each = training_layer(row.lengths) if row.train else layer(row.lengths, row.precision)
    if assumed.folded:
        each = [launch for launch in each if "LayerNorm" not in launch.name]
    launches = each * LAYERS + ends(row.lengths)
    work = {"GEMM": 0.0, "attention": 0.0, "rows": 0.0}
    fixed = 0.0
    for launch in launches:
        working, waiting = seconds(launch, chip, assumed)
        work[launch.kind] += working
        fixed += waiting
    host = assumed.host_call_s + len(launches) * assumed.host_launch_s
    if row.way.startswith("graph"):
        host = 0.0  # one launch, and copying ids into place
    flops = [launch.flops for launch in launches]
    gemms = sum(launch.flops for launch in launches if launch.kind == "GEMM")
    return Estimate(work, fixed, host, len(launches), sum(flops), gemms)


def needed(row: Row, goal: float, chip: Chip, found: Estimate) -> float:
    """What reaches `goal` with all else as assumed.

    Of a throughput, the rate of the GEMMs as a fraction of the measured one; infinite where what is left takes
    longer than the goal. Of a latency, the seconds that a launch may take beyond its work; negative likewise.
    """
    if row.way:
        return (row.time(goal) - sum(found.work.values())) / found.launches
    left = row.time(goal) - (found.device - found.work["GEMM"])
    return found.gemm_flops / left / chip.gemm[row.precision] if left > 0 else math.inf


def verdict(row: Row, goal: float, chip: Chip, found: Estimate) -> str:
    """Whether a goal is plausible."""
    if found.total <= row.time(goal):
        return "within"
    if row.way == "eager":
        return "no: the host" if found.host > row.time(goal) else "no"
    ask = needed(row, goal, chip, found)
    if row.way:
        return "beyond the assumptions" if ask > 0.5e-6 else "no: the work alone"
    return "beyond the assumptions" if ask <= 0.9 else "no: GEMMs would have to be at the ceiling"


KERNELS = ("mask layout", "embedding", "qkv", "attention", "GEMM + residual", "LayerNorm", "GELU", "unpack")
"""What a first forward compiles: each GEMM once, as its depth is no part of the kernel."""


def cold_start(assumed: Assumed = ASSUMED) -> float:
    """Seconds before the first result beyond stock's, with nothing compiled before."""
    return assumed.import_s + len(KERNELS) * assumed.compile_s


def _speed(row: Row, seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if row.way else f"{len(row.lengths) / seconds:,.0f}"


def _ask(row: Row, goal: float, chip: Chip, found: Estimate) -> str:
    ask = needed(row, goal, chip, found)
    if row.way:
        return f"{1e6 * ask:.1f} us a launch"
    return "-" if ask == math.inf else f"GEMMs at {ask:.0%}"


def tables(name: str) -> str:
    """Both tables for a chip, in Markdown."""
    chip = CHIPS[name]
    peak, gemm = (" and ".join(f"{rates[p] / 1e12:,.0f}" for p in ("bf16", "fp8")) for rates in (chip.peak, chip.gemm))
    lines = [
        f"{name}. MFU is of the datasheet's {peak} TFLOP/s, in bf16 and fp8. *Takes* is what reaches the goal with all",
        f"else as assumed: the rate of the GEMMs, of {gemm} TFLOP/s as measured at 8192; or what a launch may",
        "cost beyond its work.",
        "",
        "| goal | precision | estimate | MFU | goal, stretch | takes | plausible | stretch takes | plausible |",
        "|---|---|---:|---:|---:|---|---|---|---|",
    ]
    parts = [
        "",
        "| goal | precision | GEMMs | attention | rows | starts, ends, gaps | launches | host | most of it |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in ROWS:
        found = estimate(row, chip)
        title = row.name + (f", {row.way}" if row.way else "")
        mfu = found.flops / found.total / chip.peak[row.precision]
        goals = f"{row.goal:,.2f}, {row.stretch:,.2f}" if row.way else f"{row.goal:,.0f}, {row.stretch:,.0f}"
        asks = [
            cell
            for goal in (row.goal, row.stretch)
            for cell in (_ask(row, goal, chip, found), verdict(row, goal, chip, found))
        ]
        cells = [title, row.precision, _speed(row, found.total), f"{mfu:.0%}", goals, *asks]
        lines.append("| " + " | ".join(cells) + " |")
        terms = {**found.work, "starts, ends, gaps": found.fixed}
        most = "host" if found.host > found.device else max(terms, key=lambda term: terms[term])
        shares = [f"{share / found.device:.0%}" for share in terms.values()]
        host = f"{found.host / found.total:.0%}"
        parts.append("| " + " | ".join([title, row.precision, *shares, str(found.launches), host, most]) + " |")
    rows = [row for row in ROWS if row.precision == "bf16" and row.way in ("", "eager")]
    gains = [
        "",
        "With each step and all above it:",
        "",
        "| step | " + " | ".join(row.name for row in rows) + " |",
        "|---|" + "---:|" * len(rows),
    ]
    for step, times in steps(chip):
        gains.append("| " + " | ".join([step, *map(_speed, rows, times)]) + " |")
    cold = (
        f"Cold start: {len(KERNELS)} kernels at {ASSUMED.compile_s} s each and {ASSUMED.import_s:.0f} s to begin with "
        f"are {cold_start():.1f} s beyond stock's; the goal is 10."
    )
    return "\n".join([*lines, *parts, *gains, "", cold, ""])


# What each step changes, one after the other; the largest gain in what it is for comes first.
BEGAN = replace(ASSUMED, main_loop=0.8, tiles=((128, 256), (128, 128)), persistent=0.0, split=False)
"""Tiles read through pointers: a public sweep of fp16 GEMMs has 13 % more by descriptors."""
STEPS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (  # name, changes to what is assumed, and to the row
    ("CUDA graphs", {}, {"way": "graph"}),
    ("tiles for few rows", {"tiles": ASSUMED.tiles}, {}),
    ("programmatic dependent launch", {"overlap": OVERLAP}, {}),
    ("TMA descriptors", {"main_loop": ASSUMED.main_loop}, {}),
    ("persistent, first loads hidden", {"persistent": ASSUMED.persistent}, {}),
    ("whole waves", {"split": True}, {}),
    ("persistent, epilogue overlapped", {"persistent": 0.75}, {}),
    ("LayerNorm in the GEMMs", {"folded": True}, {}),
    ("attention at 400, backward at 300 TFLOP/s", {"attention": 400e12, "attention_backward": 300e12}, {}),
    ("fp8", {}, {"precision": "fp8"}),
)


def steps(chip: Chip) -> list[tuple[str, list[float]]]:
    """(step, seconds of one batch of each of four workloads with it and all before)."""
    rows = [row for row in ROWS if row.precision == "bf16" and row.way in ("", "eager")]
    assumed, done = BEGAN, [("as it began", [estimate(row, chip, BEGAN).total for row in rows])]
    for name, changes, change in STEPS:
        assumed = replace(assumed, **changes)
        rows = [row if row.train or ("way" in change and not row.way) else replace(row, **change) for row in rows]
        done.append((name, [estimate(row, chip, assumed).total for row in rows]))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(CHIPS), default="NVIDIA H200")
    parser.add_argument("--write", action="store_true", help=f"between {' and '.join(MARKERS)} of benchmarks/NOTES.md")
    given = parser.parse_args(argv)
    found = tables(given.gpu)
    if given.write:
        NOTES.write_text(splice(NOTES.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(found, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
