"""benchmarks/estimate.py: it counts what counts.py counts; its times, by hand; the notes hold what it prints."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig

from benchmarks import estimate
from benchmarks.report import splice
from fastbert.measure import counts
from fastbert.measure.cases import SHAPES

H200 = estimate.CHIPS["NVIDIA H200"]
# Round figures: a GEMM at 132 TFLOP/s is one at 1 TFLOP/s a multiprocessor.
ROUND = estimate.Chip(
    {"bf16": 2e14, "fp8": 4e14}, {"bf16": 132e12, "fp8": 264e12}, copy=1e12, l2_bytes=1e18, fill_bytes=1e18
)
PLAIN = replace(
    estimate.ASSUMED, main_loop=1.0, rows=1.0, attention=1e12, tile_s=1.0, gap_s=0.5, persistent=0.0, split=False
)


@pytest.mark.parametrize("train", [False, True])
def test_costs_are_those_that_are_counted(train: bool) -> None:
    lengths = (1, 37, 128, 129)
    found = estimate.training_layer(lengths) if train else estimate.layer(lengths, "bf16")
    known = counts.encoder(BertConfig(**SHAPES["large"]), lengths, torch.bfloat16, train)
    assert sum(launch.flops for launch in found) * 24 == known.flops
    assert sum(launch.bytes for launch in found) * 24 == known.bytes


def test_eight_bits_halve_the_operands_of_products() -> None:
    for half, full in zip(estimate.layer((512,), "fp8"), estimate.layer((512,), "bf16"), strict=True):
        assert half.flops == full.flops
        m, n, k = full.gemm
        saved = m * k + n * k if half.kind == "GEMM" else 0
        if full.name == "up + GELU":
            saved += m * n  # its result is an operand
        if full.name == "attention":
            saved = 512 * 1024  # so is its result
        if full.name == "LayerNorm":
            saved = -512 * 1024  # the residual in 16 bits, and an operand in 8
        assert full.bytes - half.bytes == saved, full.name


def test_the_time_of_a_gemm() -> None:
    """132 tiles of 128 x 128 x 1000 are one each: 32.768 MFLOP at 1 TFLOP/s; a 133rd is a second one's time."""
    assumed = replace(PLAIN, tiles=((128, 128),))
    one = estimate.Launch("", "GEMM", 0, (128, 128 * 132, 1000))
    assert estimate.seconds(one, ROUND, assumed) == pytest.approx((32.768e-6, 1.5))
    more = estimate.Launch("", "GEMM", 0, (128, 128 * 132 + 1, 1000))
    assert estimate.seconds(more, ROUND, assumed)[0] == pytest.approx(2 * 32.768e-6 + 1.0)
    hidden = replace(assumed, persistent=0.75, overlap=0.5)
    assert estimate.seconds(more, ROUND, hidden) == pytest.approx((2 * 32.768e-6 + 0.25, 0.75))
    assert estimate.seconds(replace(one, width=1), ROUND, assumed)[0] == pytest.approx(16.384e-6)
    # Bound by memory; by what one multiprocessor is fed, (128 + 128) x 1000 x 2 bytes; by the cache, of all of them.
    assert estimate.seconds(replace(one, bytes=10**9), ROUND, assumed)[0] == pytest.approx(1e-3)
    assert estimate.seconds(one, replace(ROUND, fill_bytes=1e9), assumed)[0] == pytest.approx(512e-6)
    assert estimate.seconds(one, replace(ROUND, l2_bytes=1e9), assumed)[0] == pytest.approx(132 * 512e-6)


def test_the_last_wave() -> None:
    """A tile alone has more of the cache than one of 132; rows beyond a whole wave may take a launch of their own."""
    assumed = replace(PLAIN, tiles=((128, 128),))
    more = estimate.Launch("", "GEMM", 0, (128 * 132 + 1, 128, 1000))
    slow = replace(ROUND, l2_bytes=1e9)
    assert estimate.seconds(more, slow, assumed)[0] == pytest.approx(132 * 512e-6 + 512e-6 + 1.0)
    small = replace(assumed, tiles=((128, 128), (16, 16)))
    assert estimate.seconds(more, ROUND, small)[0] == pytest.approx(2 * 32.768e-6 + 1.0)
    split = replace(small, split=True, gap_s=0.0, tile_s=1e-6)
    # 8 tiles of 16 x 16 x 1000 are 0.512 us, after a start and an end of 1 us.
    assert estimate.seconds(more, ROUND, split)[0] == pytest.approx(32.768e-6 + 1e-6 + 0.512e-6)
    assert estimate.seconds(more, ROUND, replace(split, gap_s=1.0))[0] == pytest.approx(2 * 32.768e-6 + 1e-6)


def test_the_fastest_tile_is_taken() -> None:
    """64 x 64 x 1000: one tile of 128 x 128 has four times the work; of 64 x 32 there are two, on two of them."""
    launch = estimate.Launch("", "GEMM", 0, (64, 64, 1000))
    times = [estimate.seconds(launch, ROUND, replace(PLAIN, tiles=(tile,)))[0] for tile in ((128, 128), (64, 32))]
    assert times == pytest.approx([32.768e-6, 4.096e-6])
    assert estimate.seconds(launch, ROUND, replace(PLAIN, tiles=((128, 128), (64, 32))))[0] == times[1]


def test_the_time_of_attention_and_of_rows() -> None:
    """Lengths 64 and 65: blocks of 64 make that 64 and 128. Two matmuls of 2 x 1024 FLOPs a pair at 1 TFLOP/s."""
    attention = estimate.layer((64, 65), "bf16")[1]
    assert attention.flops == 4096 * (64**2 + 65**2)
    assert estimate.seconds(attention, ROUND, PLAIN)[0] == pytest.approx(4096 * (64**2 + 128**2) / 1e12)
    rows = estimate.layer((100,), "bf16")[3]
    assert estimate.seconds(rows, ROUND, PLAIN)[0] == pytest.approx((2 * 100 * 1024 * 2 + 2 * 1024 * 2) / 1e12)


def row(name: str, precision: str = "bf16", way: str = "") -> estimate.Row:
    return next(r for r in estimate.ROWS if (r.name, r.precision, r.way) == (name, precision, way))


def test_what_a_goal_takes() -> None:
    """With GEMMs at the rate that is asked for, and all else as it was, the batch takes the goal's time."""
    for each in estimate.ROWS:
        found = estimate.estimate(each, H200)
        ask = estimate.needed(each, each.goal, H200, found)
        work = sum(found.work.values())
        if each.way:
            time = work + found.launches * ask
        else:
            gemms = found.gemm_flops / (ask * H200.gemm[each.precision])
            time = gemms + found.device - found.work["GEMM"]
        assert time == pytest.approx(each.goal / 1000 if each.way else len(each.lengths) / each.goal)


def test_verdicts() -> None:
    dense, one = row("dense 512"), row("1 x 128", way="eager")
    found = estimate.estimate(dense, H200)
    reached = len(dense.lengths) / found.total
    assert estimate.verdict(dense, 0.99 * reached, H200, found) == "within"
    assert estimate.verdict(dense, 1.01 * reached, H200, found) == "beyond the assumptions"
    assert estimate.verdict(dense, 1.4 * reached, H200, found).startswith("no")
    assert estimate.needed(dense, 100 * reached, H200, found) == math.inf
    found = estimate.estimate(one, H200)
    assert found.total == found.host == 300e-6 + found.launches * 10e-6 > found.device
    assert estimate.verdict(one, 0.7, H200, found) == "no: the host"


def test_launches_and_what_they_cost() -> None:
    """Seven a layer and three a forward; of the H200's 4.3 TB/s, the weights of one layer of 25.2 MB take 5.9 us."""
    graph = estimate.estimate(row("1 x 128", way="graph"), H200)
    assert graph.launches == 24 * 7 + 3
    assert graph.host == 0
    assert graph.fixed == pytest.approx(171 * 3e-6)
    assert graph.work["GEMM"] > 24 * 25.2e6 / 4.3e12
    hidden = estimate.estimate(row("1 x 128", way="graph, PDL"), H200)
    assert hidden.fixed == pytest.approx(171 * 2e-6)
    # Without PDL 335 GFLOP a sequence of 512 at 989 TFLOP/s would be 2,953 a second.
    dense = estimate.estimate(row("dense 512"), H200)
    assert dense.flops == pytest.approx(128 * 335.0e9, rel=1e-3)


def test_steps_only_help() -> None:
    times = [found for _, found in estimate.steps(H200)]
    for before, after in itertools.pairwise(times):
        assert all(b >= a for b, a in zip(before, after, strict=True))
    assert all(first > last for first, last in zip(times[0], times[-1], strict=True))


def test_cold_start() -> None:
    assert estimate.cold_start(replace(estimate.ASSUMED, compile_s=2.0, import_s=3.0)) == 3 + 8 * 2


def test_the_notes_hold_the_tables() -> None:
    text = estimate.NOTES.read_text(encoding="utf-8")
    assert splice(text, estimate.tables("NVIDIA H200")) == text, "python benchmarks/estimate.py --write"
