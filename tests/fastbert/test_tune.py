"""fastbert tune: the search over a device made of arithmetic, checks in the interpreter, processes that break."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    JinaEmbeddingsV3Config,
    ModernBertConfig,
    MPNetConfig,
)

from fastbert import checkpoints, tuned
from fastbert.cli.__main__ import main
from fastbert.cli.tune import sizes
from fastbert.kernels import launch
from fastbert.kernels.launch import Config
from fastbert.numerics import relative_error
from fastbert.runtime.support import fp8_is_unsupported
from fastbert.tune import gpu as gpu_module
from fastbert.tune import search as tune
from fastbert.tune.gpu import Checker, Gpu
from fastbert.tune.problems import Problem, Sizes, lengths_of, problems
from fastbert.tune.search import OK, Candidate, Search, beats

SMALL = Sizes(16, 32, 1, biased=True)
LARGE = Sizes(1024, 4096, 16)
MADE_FOR = {"gpu": "a GPU", "architecture": "sm_90", "triton": "3", "fastbert": "0", "kernels": "x"}


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The shipped ones, before and after."""
    launch.use({})
    yield
    launch.use({})


def pick(name: str, dtype: torch.dtype = torch.bfloat16, arch: str = "sm_90") -> Problem:
    return next(p for p in problems(LARGE, dtype, arch, train=True) if p.name.startswith(name))


class Arithmetic:
    """A device on which a launch takes what `cost` says, in seconds, give or take `spread`; some fail."""

    shared_limit = 227 * 1024

    def __init__(
        self,
        cost: Callable[[Config], float],
        spread: float = 0.01,
        fails: Callable[[Config], str | None] = lambda config: None,
    ) -> None:
        self.cost, self.spread, self.fails = cost, spread, fails
        self.timed: list[tuple[str, int, Config]] = []
        self.checked: list[Candidate] = []
        self.interrupt_after = 10**9

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        for candidate in candidates:
            if time.monotonic() < deadline:
                self.checked.append(candidate)
                yield candidate, self.fails(candidate.config) or OK

    def time(self, problem: Problem, rows: int, config: Config) -> list[float]:
        assert self.fails(config) is None, "one that fails is never timed"
        self.timed.append((problem.name, rows, config))
        if len(self.timed) > self.interrupt_after:
            raise KeyboardInterrupt
        middle = self.cost(config) * rows
        return [middle * (1 + self.spread * step) for step in (-1, -0.5, 0, 0.5, 1)]


def steps_away(config: Config) -> float:
    """From 64 x 128 in 8 warps and 2 stages; 1 there."""
    best = {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 2}
    return 1 + sum(abs(math.log2(getattr(config, name) / value)) for name, value in best.items())


def test_the_search_walks_to_the_best() -> None:
    problem = pick("attention")
    rig = Arithmetic(steps_away)
    search = Search([problem], rig)
    search.run(time.monotonic() + 60)
    best = search.best(problem)
    assert (best.block_m, best.block_n, best.num_warps, best.num_stages) == (64, 128, 8, 2)
    (entry,) = search.entries()
    assert (entry.key, entry.config) == (problem.key, best)
    shipped = problem.shipped()
    for rows in problem.rows:
        assert entry.seconds[str(rows)][1] == pytest.approx(rows)
        assert entry.shipped_seconds[str(rows)][1] == pytest.approx(rows * steps_away(shipped))
    assert len(rig.checked) == len({candidate.config for candidate in rig.checked})  # none twice
    assert tuned.problem(*entry[:2]) is None


@functools.cache
def picked(name: str, arch: str) -> Problem:
    return pick(name, arch=arch)


@pytest.mark.parametrize(
    "arch", ["sm_86", "sm_120", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_89", "sm_103", "sm_121"))]
)
def test_the_search_starts_from_every_table(arch: str) -> None:
    """On a GPU that has none of its own, too: what is shipped elsewhere is tried first."""
    for name in ("attention", "attention, backward"):
        problem = picked(name, arch)
        found = tune.seeds(problem, [problem])
        assert found[0] == problem.shipped()
        for other in ("sm_80", "sm_89", "sm_90", "sm_100", "portable"):
            free = launch.OPERATIONS[problem.key[0]].free
            shipped = picked(name, other).shipped()
            tiles = {field: getattr(shipped, field) for field in free}
            assert any({field: getattr(config, field) for field in free} == tiles for config in found)


def test_nothing_is_kept_within_the_spread() -> None:
    problem = pick("attention")
    near = Search([problem], Arithmetic(lambda config: 1 + 0.001 * steps_away(config), spread=0.02))
    near.run(time.monotonic() + 60)
    assert near.best(problem) != problem.shipped()
    assert near.entries() == []
    assert problem.key in near.settled


def test_beats() -> None:
    def samples(middle: float) -> list[float]:
        return [middle * x for x in (0.98, 0.99, 1.0, 1.01, 1.02)]

    old = {1: samples(1.0), 2: samples(1.0)}
    assert beats({1: samples(0.9), 2: samples(0.9)}, old)
    assert beats({1: samples(0.9), 2: samples(1.0)}, old)
    assert not beats({1: samples(0.8), 2: samples(1.1)}, old)  # faster in the mean, but slower somewhere
    assert not beats({1: samples(0.99), 2: samples(0.99)}, old)
    assert not beats(old, old)


def test_what_fails_is_dropped_with_its_reason() -> None:
    """Where it would have been the best, too."""
    problem = pick("attention")
    rig = Arithmetic(steps_away, fails=lambda config: "wrong numbers" if config.block_m == 64 else None)
    search = Search([problem], rig)
    search.run(time.monotonic() + 60)
    assert search.best(problem).block_m != 64
    assert search.dropped
    assert all(c.config.block_m == 64 and why == "wrong numbers" for c, why in search.dropped)
    said = list(tune.lines(search))
    assert sum("wrong numbers" in line for line in said) == len(search.dropped)
    report = tune.report(search, MADE_FOR)
    assert len(report["dropped"]) == len(search.dropped)
    assert sum(each["kept"] for each in report["tried"]) == 1
    assert sum(each["shipped"] for each in report["tried"]) == 1
    json.dumps(report)


def test_a_shipped_configuration_that_is_wrong_is_told_and_nothing_compared_with_it() -> None:
    problem = pick("attention")
    shipped = problem.shipped()
    search = Search([problem], Arithmetic(steps_away, fails=lambda c: "wrong" if c == shipped else None))
    search.run(time.monotonic() + 60)
    assert search.entries() == []
    assert any("not right" in line for line in tune.lines(search))


def test_the_library_is_tried_where_asked_for() -> None:
    """Its bits are its own; where it beats the best tile it is kept beside that, where it doesn't it is not."""

    def cost(config: Config) -> float:
        return 0.5 if config.variant == launch.LIBRARY else steps_away(config)

    def fails(config: Config) -> str | None:
        return f"{tune.OTHER_BITS} than the shipped one's" if config.variant == launch.LIBRARY else None

    problem = pick("down, 512")
    for library, wins in ((False, True), (True, True), (True, False)):
        rig = Arithmetic(cost if wins else steps_away, fails=fails)
        rig.fails = lambda config: None  # when it is timed
        rig.check = lambda candidates, deadline, fails=fails: (  # type: ignore[method-assign]
            (candidate, fails(candidate.config) or OK) for candidate in candidates
        )
        search = Search([problem], rig, library=library)
        search.run(time.monotonic() + 60)
        tile, *rest = search.entries()
        assert tile.config.variant != launch.LIBRARY
        assert (tile.config.block_m, tile.config.block_n) == (64, 128)
        assert [entry.config for entry in rest] == ([launch.BY_LIBRARY] if library and wins else [])
        assert any(config.variant == launch.LIBRARY for *_, config in rig.timed) == library
        said = [line for line in tune.lines(search) if "may depend on the batch" in line]
        assert len(said) == len(rest)
        for entry in rest:
            assert tuned.problem(*entry[:2]) is None
            assert entry.shipped_seconds["512"][1] == pytest.approx(512)  # of the tile that won
            assert entry.seconds["512"][1] == pytest.approx(256)


def test_a_launch_that_breaks_when_timed_is_dropped() -> None:
    problem, rig = pick("attention"), Arithmetic(steps_away)
    whole = rig.time

    def breaks(problem: Problem, rows: int, config: Config) -> list[float]:
        if config.num_stages == 2:
            raise RuntimeError("out of memory")
        return whole(problem, rows, config)

    rig.time = breaks  # type: ignore[method-assign]
    search = Search([problem], rig)
    search.run(time.monotonic() + 60)
    assert {why for _, why in search.dropped} == {"RuntimeError: out of memory"}
    assert search.best(problem).num_stages == 3


def test_it_starts_from_tables_and_from_what_stands_beside_them() -> None:
    work = problems(LARGE, torch.bfloat16, "sm_90")
    problem = next(p for p in work if p.function == "linear_gelu")
    tried = {config for other, config in Search(work, Arithmetic(steps_away)).candidates(True) if other is problem}
    assert problem.shipped() in tried
    assert set(launch.LINEAR_CANDIDATES["sm_90"]) <= tried
    assert {config.programs for config in tried if not config.variant} == {0}  # they walk through no tiles


def test_only_what_could_run_is_compiled() -> None:
    """Within shared memory and registers, of the fields that may differ."""
    work = problems(LARGE, torch.bfloat16, "sm_90", train=True)
    of_deberta = problems(LARGE._replace(disentangled=True), torch.bfloat16, "sm_90", train=True)
    work += [problem for problem in of_deberta if problem.module == "disentangled"]
    rig = Arithmetic(lambda config: 1.0)
    search = Search(work, rig)
    batch = search.candidates(first=True)
    assert len(batch) > 5 * len(work)
    for problem, config in batch:
        shipped = problem.shipped()
        assert problem.shared(config) <= rig.shared_limit
        assert problem.held(config) <= tune.MAX_HELD or config == shipped
        for name, value in dataclasses.asdict(config).items():
            free = launch.OPERATIONS[problem.key[0]].free
            assert name in free or value == getattr(shipped, name)
    attended = [config for problem, config in batch if problem.key[0].startswith("disentangled")]
    assert max(max(config.block_m, config.block_n) for config in attended) == 64  # attention.PITCH
    (key,) = {problem.key for problem, _ in batch if problem.key[0] == "disentangled"}
    larger = dataclasses.replace(launch.disentangled_config(*key[1:]), block_n=128)
    assert tuned.problem(key, larger) == "block_n is 128; expected a power of two from 8 to 64"
    rig.shared_limit = 48 * 1024
    fewer = [c for c in Search(work, rig).candidates(True) if c.config != c.problem.shipped()]
    assert 0 < len(fewer) < len(batch)
    assert all(c.problem.shared(c.config) <= 48 * 1024 for c in fewer)


def run_tune(rig: Any, tmp_path: Path, *work: Problem, minutes: float = 1.0) -> tuple[Search, bool, list[tuned.Entry]]:
    file = tmp_path / "cache" / "tuned.json"
    search, interrupted = tune.tune(list(work), rig, file, MADE_FOR, minutes)
    return search, interrupted, tuned.read(file, MADE_FOR) if file.exists() else []


def test_interrupted_it_keeps_what_is_done(tmp_path: Path) -> None:
    work = [pick("attention"), pick("qkv"), pick("up")]
    rig = Arithmetic(steps_away)
    whole, _, all_of_it = run_tune(rig, tmp_path / "whole", *work)
    assert {entry.key for entry in all_of_it} == {problem.key for problem in work} == set(whole.won)
    rig.interrupt_after, rig.timed = next(i for i, (name, *_) in enumerate(rig.timed) if name.startswith("up")), []
    _, interrupted, kept = run_tune(rig, tmp_path / "cut", *work)
    assert interrupted
    assert {entry.key for entry in kept} == {work[0].key, work[1].key}


def test_out_of_time(tmp_path: Path) -> None:
    search, interrupted, kept = run_tune(Arithmetic(steps_away), tmp_path, pick("attention"), minutes=1e-9)
    assert not interrupted
    assert not search.settled
    assert kept == []


def test_what_was_found_before_stays_where_nothing_new_is_known(tmp_path: Path) -> None:
    one, other = pick("attention"), pick("attention", torch.float16)
    _, _, first = run_tune(Arithmetic(steps_away), tmp_path, one)
    _, _, both = run_tune(Arithmetic(steps_away), tmp_path, other)
    assert {entry.key for entry in both} == {one.key, other.key}
    assert first[0] in both
    _, _, less = run_tune(Arithmetic(lambda config: 1.0), tmp_path, one)  # now nothing is faster there
    assert {entry.key for entry in less} == {other.key}


def test_a_bar_on_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tune._Bar(1).note("something")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = tune._Bar(1)
    bar.note("something")
    bar.close()
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 steps: something" in said.err
    assert said.err.endswith("\r\x1b[K")


class Recorder(dict[Any, Config]):
    """Remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)


def on_this_device(device: str) -> list[Problem]:
    arch = launch.architecture(torch.device(device))
    eight = [] if fp8_is_unsupported(torch.device(device)) else problems(SMALL, torch.float32, arch, precision="fp8")
    known = problems(SMALL, torch.float32, arch, train=True)
    known += [
        problem
        for problem in problems(SMALL._replace(disentangled=True), torch.float32, arch, train=True)
        if problem.module == "disentangled"
    ]
    known += [
        problem
        for problem in problems(Sizes(16, 48, 1, gated=True), torch.float32, arch, train=True)
        if problem.module == "linear_gated"
    ]
    return [*known, *(problem for problem in eight if problem.key[0] == "linear_fp8")]


def test_shipped_configurations_pass_the_check_and_are_asked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the key of their problem; and every operation that has tables is asked for by one."""
    everything = on_this_device(device)
    without = {"linear_fp8"} if fp8_is_unsupported(torch.device(device)) else set()
    assert {problem.key[0] for problem in everything} == set(launch.OPERATIONS) - without
    assert len({problem.key for problem in everything}) == len({each.name for each in everything}) == len(everything)
    work = [problem for problem in everything if not problem.same_bits or problem.rows[0] == 64]
    checker, recorder = Checker(work, torch.device(device)), Recorder()
    use = launch.use

    def recorded(configurations: Any) -> None:
        use(configurations)
        recorder.clear()
        recorder.update(configurations)
        monkeypatch.setattr(launch, "_tuned", recorder)

    monkeypatch.setattr(launch, "use", recorded)
    for problem in work:
        recorder.asked.clear()
        assert checker.check(problem.name, problem.shipped()) == OK, problem.name
        assert problem.key in recorder.asked
    assert recorder == {}


def test_wrong_results_do_not_pass_the_check(device: str) -> None:
    """A peer that differs stands for a kernel that is wrong."""
    by_rows = next(problem for problem in on_this_device(device) if problem.rows == (64,))
    norm = next(problem for problem in on_this_device(device) if problem.name == "LayerNorm")
    off = norm._replace(peer=lambda *args: 1.001 * norm.peer(*args))
    assert "exceeds the bound" in Checker([off], torch.device(device)).check(off.name, off.shipped())
    assert Checker([norm], torch.device(device)).check(norm.name, norm.shipped()) == OK

    config, calls = by_rows.shipped(), []

    class Drifting(Problem):
        def call(self, *arguments: Any) -> Any:
            calls.append(1)
            result = super().call(*arguments)
            if len(calls) == 2:  # one bit of one number
                result.view(torch.int32)[-1, -1, -1] ^= 1
            return result

    drifting = Drifting(*by_rows)
    assert Checker([by_rows], torch.device(device)).check(by_rows.name, config) == OK
    assert "other bits" in Checker([drifting], torch.device(device)).check(drifting.name, config)


def test_a_configuration_that_does_not_compile_does_not_pass(device: str) -> None:
    norm = next(problem for problem in on_this_device(device) if problem.name == "LayerNorm")
    config = dataclasses.replace(norm.shipped(), block_n=3)
    assert Checker([norm], torch.device(device)).check(norm.name, config) not in (OK, "")


def test_tune_judges_by_the_sums_of_its_architecture() -> None:
    """In float32; in 16 bits and in float64 it multiplies in those."""
    for arch, low, high in (("sm_90", 5e-5, 2e-4), ("sm_100", 0.0, 1e-6)):
        work = problems(Sizes(1024, 1024, 16), torch.float32, arch, precision="fp8")
        problem = next(each for each in work if each.name.startswith("qkv fp8, 64"))
        torch.manual_seed(0)
        arguments = problem.arguments(9, torch.device("cpu"))
        truth = problem.peer(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
        assert low <= relative_error(problem.peer(*arguments), truth) < high


def test_processes_that_check(device: str) -> None:
    """Whole: what a process is given, what it runs, what comes back, of a good and of a bad candidate."""
    work = {problem.name: problem for problem in on_this_device(device)}
    rig = Gpu(torch.device(device), SMALL, torch.float32, True)
    norm = work["LayerNorm"]
    good = Candidate(norm, norm.shipped())
    bad = Candidate(norm, dataclasses.replace(norm.shipped(), block_n=3))
    found = dict(rig.check([good, bad], time.monotonic() + 120))
    assert found[good] == OK
    assert found[bad] != OK


# Answers as its name says, candidate by candidate: the configuration's number of stages.
STAND_IN = """
import json, os, sys, time
print("noise", file=sys.stderr)
for name, config in json.load(sys.stdin)["candidates"]:
    if config["num_stages"] == 7:
        print("an illegal memory access", file=sys.stderr, flush=True)
        os._exit(3)
    if config["num_stages"] == 8:
        time.sleep(60)
    print(json.dumps("ok"), flush=True)
"""


def stages(*numbers: int) -> list[Candidate]:
    problem = pick("attention")
    return [
        Candidate(problem, dataclasses.replace(problem.shipped(), num_stages=n, block_m=16 << i))
        for i, n in enumerate(numbers)
    ]


def stand_in(jobs: int, code: str = STAND_IN) -> Gpu:
    rig = Gpu(torch.device("cpu"), SMALL, torch.float32, jobs=jobs)
    rig.command = [sys.executable, "-c", code]
    return rig


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_that_crashes_or_hangs_takes_nothing_along(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "TRIAL_LIMIT_S", 1.0)
    candidates = stages(1, 7, 2, 8, 3)
    found = dict(stand_in(jobs).check(candidates, time.monotonic() + 60))
    assert [found[c] for c in candidates] == [
        OK,
        "ended its process: an illegal memory access",
        OK,
        "no end after 1 s",
        OK,
    ]


def test_processes_that_never_get_anywhere_are_given_up() -> None:
    rig = stand_in(1, "raise SystemExit('no module named fastbert')")
    found = list(rig.check(stages(1, 2, 3, 4, 5), time.monotonic() + 60))
    assert len(found) == 5
    assert all("no module named fastbert" in status for _, status in found)


def test_checks_end_at_the_deadline() -> None:
    start = time.monotonic()
    found = list(stand_in(1).check(stages(1, 8, 2), start + 2))
    assert [status for _, status in found] == [OK]
    assert time.monotonic() - start < 20


def test_lengths() -> None:
    assert lengths_of(295) == (1, 37, 128, 129)
    assert sum(lengths_of(32768)) == 32768
    assert 100 < 32768 / len(lengths_of(32768)) < 250


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--minutes", "1"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "fastbert tune: there is no GPU here, and on a CPU nothing is launched that could be tuned\n"


def test_the_sizes_of_a_checkpoint(tmp_path: Path) -> None:
    """And whether there is a bias by distance, whose gradient is one of the kernels of the backward."""
    own = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
    for i, (config, biased) in enumerate(
        (
            (BertConfig(**own), False),
            (MPNetConfig(**own), True),
            (DistilBertConfig(dim=96, n_heads=3, hidden_dim=160), False),
            (DebertaV2Config(**own, relative_attention=True, pos_att_type=["c2p"]), None),
            (DebertaV2Config(**own), False),  # without positions it is plain attention
            (ModernBertConfig(**own), False),
            (JinaEmbeddingsV3Config(**own), False),
        )
    ):
        config.save_pretrained(tmp_path / str(i))
        found = sizes(argparse.Namespace(model=str(tmp_path / str(i)), size=None))
        gated = isinstance(config, ModernBertConfig)
        assert found == Sizes(96, 160, 3, bool(biased), biased is None, gated, gated)
        names = [problem.name for problem in problems(found, torch.bfloat16, "sm_90", train=True)]
        assert ("attention, bias's gradient" in names) == bool(biased)
        assert ("scores by position" in names) == (biased is None)
        assert ({"gate", "gate, backward"} <= set(names)) == ("up, 64 rows" not in names) == gated
    deberta = sizes(argparse.Namespace(model=None, size="deberta-v3-large"))
    assert deberta == LARGE._replace(disentangled=True)
    assert sizes(argparse.Namespace(model=None, size="large")) == LARGE
    modern = sizes(argparse.Namespace(model=None, size="modernbert-base"))
    assert modern == Sizes(768, 1152, 12, gated=True, joined=True)
    keys = {problem.key for problem in problems(modern, torch.bfloat16, "sm_90")}
    assert ("linear", "sm_90", torch.bfloat16, 2304, 768, 1, 64) in keys  # as Wqkv asks
    assert ("linear_gated", "sm_90", torch.bfloat16, 1152, 768) in keys


def test_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["tune", "--minutes", "0"]) == 2
    assert "--minutes is 0.0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checkpoints, "default_device", lambda name: torch.device("cuda"))
    assert main(["tune", "--model", str(tmp_path)]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.slow  # and a step of `make gpu` itself
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run over a small model: everything checks, something is timed, and the file is one that is used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["tune", "--size", "minilm", "--minutes", "0.7", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert any(each["shipped"] for each in report["tried"])
    assert all(0 < low <= high for each in report["tried"] for low, _, high in each["seconds"].values())
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, arch = torch.cuda.get_device_name(device), launch.architecture(device)
    kept = sum(each["kept"] for each in report["tried"])
    assert len(tuned.read(tuned.path(gpu, arch), tuned.made_for(gpu, arch))) == kept
