"""benchmarks/variants.py over a device made of arithmetic: what is tried, what is recorded, what is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import variants
from fastbert.cli import UsageError, records, report
from fastbert.cli.cases import workload
from fastbert.cli.machine import Rates, environment
from fastbert.cli.problems import Problem, Sizes, problems
from fastbert.cli.tune import OK, Candidate
from fastbert.kernels import launch
from fastbert.kernels.launch import Config

SIZES = Sizes(64, 2048, 2)
CPU = torch.device("cpu")


class Arithmetic:
    """Peers take 10 us, what is shipped 5, everything else as many as its tile is wide; 8 warps fail."""

    shared_limit = 227 * 1024

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        for candidate in candidates:
            if candidate.config != candidate.problem.shipped() and candidate.config.num_warps == 8:
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
        if config.num_stages == 6:
            raise RuntimeError("out of\nmemory")
        return [1e-6 * (5 if config == problem.shipped() else config.block_n)] * 3


def run(rows: Sequence[int], minutes: float = 1.0) -> list[dict[str, Any]]:
    work = problems(SIZES, torch.bfloat16, "sm_90", train=True)
    work += [p for p in problems(SIZES, torch.bfloat16, "sm_90", precision="fp8") if p.key[0] == "linear_fp8"]
    work = [p for p in work if p.function != "attention_backward"]  # what that is given comes from a kernel
    about, rates = environment(CPU), Rates(1e12, 1e12)
    case = {"size": "large", "dtype": torch.bfloat16}
    deadline = time.monotonic() + 60 * minutes
    original = variants.peers

    def here(problem: Problem) -> Any:  # the others are CUDA's
        return {name: peer for name, peer in original(problem).items() if not name.startswith("torch")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "peers", here)
        return list(variants.measure(work, rows, Arithmetic(), rates, about, case, deadline))


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
        assert next(r for r in run if r["candidate"] == "fused")["ratio_to_stock"] == pytest.approx(2)
        assert run[0]["bytes"] > 0
    assert {r["candidate"] for r in found} >= {"F.linear alone"}
    records.write(tmp_path / "records.json", found)
    assert records.load(tmp_path / "records.json") == found
    assert "### Launch configurations" in report.measured(found)


def test_every_table_and_variant_is_tried(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    work = problems(SIZES, torch.bfloat16, "sm_90")
    problem = next(p for p in work if p.function == "linear_gelu" and p.rows[0] == 512)
    monkeypatch.setattr(launch, "VARIANTS", (*launch.VARIANTS, "another"))
    tried = variants.configurations(problem, work, 227 * 1024)
    assert tried[0] == problem.shipped()
    assert len(set(tried)) == len(tried)
    assert {c.variant for c in tried} == {*launch.VARIANTS, launch.LIBRARY}
    assert {c.programs for c in tried if c.variant} == {0, 1, 2}
    assert set(launch.LINEAR_CANDIDATES["sm_90"]) <= set(tried)
    for arch in ("sm_80", "sm_90"):
        for rows in (64, 8192):
            shipped = launch.linear_config(arch, torch.bfloat16, 2048, 64, 1, rows)
            assert shipped in tried, (arch, rows)


def test_what_is_not_right_has_no_time(found: list[dict[str, Any]]) -> None:
    wrong = [r for r in found if r["status"] == "FAILED: wrong"]
    broken = [r for r in found if r["status"] == "ERROR: RuntimeError: out of memory"]
    other = [r for r in found if r["candidate"].endswith(", other bits")]
    assert wrong
    assert broken
    assert other
    assert all(r["median_s"] is None for r in (*wrong, *broken))
    assert any(r["median_s"] for r in other)
    assert all(" w8 " in r["candidate"] for r in wrong)


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
