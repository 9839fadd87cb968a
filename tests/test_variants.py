"""benchmarks/variants.py over a device made of arithmetic: what is tried, what is recorded, what is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, variants
from fastbert.kernels import launch
from fastbert.kernels.launch import Config
from fastbert.measure import records
from fastbert.measure.cases import workload
from fastbert.measure.machine import Rates, environment
from fastbert.tune.problems import Problem, Sizes, problems
from fastbert.tune.search import OK, Candidate
from fastbert.usage import UsageError

SIZES = Sizes(64, 2048, 2)
CPU = torch.device("cpu")


class Arithmetic:
    """Peers take 10 us, what is shipped 5, everything else as many as its tile is wide; pointers with 8 warps fail."""

    shared_limit = 227 * 1024

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow
        self.checked: list[Candidate] = []
        self.timed: list[tuple[str, int, Config, float]] = []

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        for candidate in candidates:
            self.checked.append(candidate)
            time.sleep(self.slow)
            if time.monotonic() > deadline:
                return
            if not candidate.config.variant and candidate.config.num_warps == 8:
                yield candidate, "wrong"
            elif candidate.config.block_m == 32:
                yield candidate, "other bits than the shipped configuration's"
            else:
                yield candidate, OK

    def sets(self, problem: Problem, rows: int) -> list[Any]:
        return [problem.arguments(rows, CPU)]

    def measure(self, call: Callable[..., Any], sets: Sequence[Any]) -> list[float]:
        with torch.no_grad():
            call(*sets[0])  # a peer runs on a CPU, too
        return [10e-6] * 3

    def time(self, problem: Problem, rows: int, config: Config) -> list[float]:
        self.timed.append((problem.name, rows, config, launch.SPLIT_ROWS))
        time.sleep(self.slow)
        if config.num_stages == 6:
            raise RuntimeError("out of\nmemory")
        return [1e-6 * (5 if config == problem.shipped(rows) else config.block_n)] * 3


def run(rows: Sequence[int], minutes: float = 60.0, rig: Any = None, planned: float = 60.0) -> list[dict[str, Any]]:
    work = problems(SIZES, torch.bfloat16, "sm_90", train=True)
    work += [p for p in problems(SIZES, torch.bfloat16, "sm_90", precision="fp8") if p.key[0] == "linear_fp8"]
    work = [p for p in work if p.function != "attention_backward"]  # what that is given comes from a kernel
    about, rates = environment(CPU), Rates(1e12, 1e12)
    case = {"size": "large", "dtype": torch.bfloat16}
    original = variants.peers

    def here(problem: Problem) -> Any:  # the others are CUDA's
        return {name: peer for name, peer in original(problem).items() if not name.startswith("torch")}

    rig = rig or Arithmetic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "peers", here)
        chosen = variants.plan(work, rows, rig.shared_limit, 60 * planned, jobs=8)
        return list(variants.measure(chosen, rig, rates, about, case, time.monotonic() + 60 * minutes))


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run([128, 300])


def test_everything_is_measured_beside_its_peers(found: list[dict[str, Any]], tmp_path: Path) -> None:
    cases = {(r["what"], r["workload"]) for r in found}
    operations = {"qkv", "up", "down", "projection", "attention", "LayerNorm", "LayerNorm, backward", "GELU, backward"}
    operations |= {"qkv fp8", "up fp8", "down fp8", "projection fp8"}
    assert cases == {(f"variant {name}", f"{rows} rows") for name in operations for rows in (128, 300)}
    for case in cases:
        run = [r for r in found if (r["what"], r["workload"]) == case]
        names = [r["candidate"] for r in run]
        assert len(set(names)) == len(names)
        assert names[0] == "stock"
        assert names.count("fused") == 1
        (fused,) = (r for r in run if r["candidate"] == "fused")
        assert fused["ratio_to_stock"] == (pytest.approx(2) if fused["status"] == "ok" else None)
        assert not fused["status"].startswith("FAILED: not checked")
        assert run[0]["bytes"] > 0
    assert {r["candidate"] for r in found} >= {"F.linear alone"}
    records.write(tmp_path / "records.json", found)
    assert records.load(tmp_path / "records.json") == found
    assert "### Launch configurations" in report.measured(found)


LARGE = Sizes(1024, 4096, 16)


def test_a_dozen_configurations_with_those_that_decide() -> None:
    """Of hundreds that tables and variants come to; the shipped one, the persistent, 128 x 128 and cuBLAS first."""
    work = problems(LARGE, torch.bfloat16, "sm_90")
    for problem, rows in variants.cases(work, (21222, 65536, 128)):
        first, rest = variants.configurations(problem, rows, work, 227 * 1024)
        assert first[0] == problem.shipped(rows)
        assert len({*first, *rest}) == len(first) + len(rest) <= variants.MOST
        if problem.key[0] != "linear":
            continue
        assert len(first) + len(rest) == variants.MOST
        assert sum(config.variant == launch.LIBRARY for config in first) == 1
        assert any(config.variant == "persistent" for config in first)
        assert any((c.block_m, c.block_n, c.variant) == (128, 128, "") for c in first)
        tiles = [(c.block_m, c.block_n, c.variant) for c in (*first, *rest)]
        assert len(set(tiles)) > variants.MOST / 2
        if rows > 128:
            assert Config(128, 256, 64, 8, 4) in rest  # by pointers


def test_the_largest_come_first() -> None:
    """By the order of the numbers of rows, then by FLOPs; what is no GEMM last."""
    work = problems(LARGE, torch.bfloat16, "sm_90", train=True)
    found = variants.cases(work, (21222, 65536, 128))
    assert list(dict.fromkeys(rows for _, rows in found)) == [21222, 65536, 128]
    names = [problem.name.split(",")[0] for problem, rows in found if rows == 21222]
    assert set(names[:2]) == {"up", "down"}
    assert names[2:4] == ["GELU", "qkv"] or names[:4].count("GELU") == 1
    assert names.index("projection") < names.index("attention")
    flops = [variants.work_of(problem, rows) for problem, rows in found if rows == 21222]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] == 2 * 21222 * 4096 * 1024


def test_minutes_decide_what_is_left_out() -> None:
    """What is always tried stays whatever they are; more time, more of the rest, the largest GEMMs' first."""
    work = problems(LARGE, torch.bfloat16, "sm_90")
    rows = (21222, 65536, 128)
    plans = [variants.plan(work, rows, 227 * 1024, seconds, jobs=8) for seconds in (1.0, 90.0, 180.0, 3600.0)]
    kept = [sum(map(len, plan.rest.values())) for plan in plans]
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert plans[1].dropped
    assert not plans[3].dropped
    for plan in plans:
        assert plan.first == plans[0].first
        assert sum(map(len, plan.rest.values())) + len(plan.dropped) == kept[3]
    first_dropped = next(iter(case for case, _ in plans[1].dropped))
    whole = [case for case, rest in plans[1].rest.items() if len(rest) == len(plans[3].rest[case])]
    assert whole
    order = list(plans[1].rest)
    assert order.index(whole[0]) < order.index(first_dropped)


def test_what_decides_is_measured_of_all_before_the_rest_of_any() -> None:
    """And each compiled once for all numbers of rows of its key."""
    rig = Arithmetic()
    run([300, 500, 128], rig=rig)
    assert len(rig.checked) == len(set(rig.checked))
    order = [(name, rows) for name, rows, _, _ in rig.timed]
    last_to_begin = max(order.index(case) for case in set(order))
    assert order[0] in order[last_to_begin:]  # the rest of the first, after the first of the last


def test_two_launches_are_compared_with_one() -> None:
    rig = Arithmetic()
    rig.sets = lambda problem, rows: []  # type: ignore[method-assign]
    for problem, rows in variants.cases(problems(LARGE, torch.bfloat16, "sm_90"), (21120, 21222)):
        if problem.key[0] == "linear":
            checked = [(Candidate(problem, config), OK) for config in (problem.shipped(rows), launch.BY_LIBRARY)]
            found = {name: call() for name, call, _ in variants.ways(problem, rows, rig, checked, with_peers=False)}
            assert list(found) == ["fused", *(["fused, one launch"] if rows == 21222 else []), "library"]
    splits = [(rows, split) for _, rows, config, split in rig.timed if config.variant != launch.LIBRARY]
    assert splits == [(21120, 8192)] * 4 + [(21222, 8192), (21222, float("inf"))] * 4
    assert launch.SPLIT_ROWS == launch.MANY_ROWS == 8192


def timed(found: Sequence[dict[str, Any]]) -> int:
    return sum(r["median_s"] is not None for r in found)


def test_the_deadline_is_kept() -> None:
    start = time.monotonic()
    found = run([128], minutes=1 / 60, rig=Arithmetic(slow=0.02))
    assert time.monotonic() - start < 20
    assert 0 < timed(found) < timed(run([128]))  # what isn't checked in time has a record, too


def test_what_is_not_right_has_no_time(found: list[dict[str, Any]]) -> None:
    wrong = [r for r in found if r["status"] == "FAILED: wrong"]
    broken = [r for r in found if r["status"] == "ERROR: RuntimeError: out of memory"]
    other = [r for r in found if r["candidate"].endswith(", other bits")]
    assert wrong
    assert broken
    assert other
    assert all(r["median_s"] is None for r in (*wrong, *broken))
    assert any(r["median_s"] for r in other)
    assert all(" w8 " in r["candidate"] or r["candidate"].startswith("fused") for r in wrong)


def test_the_rows_of_the_squad_mix() -> None:
    assert f"--rows {sum(workload('squad', 128).lengths)} " in (variants.__doc__ or "")


def test_the_table(found: list[dict[str, Any]]) -> None:
    lines = list(variants.table(found))
    assert len(lines) == 1 + 2 * 12
    qkv = next(line for line in lines if line.startswith("qkv") and " 128 " in line)
    assert qkv.split()[:4] == ["qkv", "128", "10.0", "5.0"]
    assert "fused 5.0" in qkv


def test_out_of_time() -> None:
    assert run([128], minutes=1e-9) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(UsageError, match="no GPU"):
        variants.main([])


@pytest.mark.slow  # and a step of `make gpu` itself
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "minilm", "--rows", "256", "--minutes", "0.7", "--output", str(tmp_path)]
    assert variants.main(options) == 0
    (file,) = tmp_path.rglob("*.json")
    timed = [r for r in records.load(file) if r["median_s"]]
    assert {"stock", "fused"} <= {r["candidate"] for r in timed}
    assert "fastest" in capsys.readouterr().out
