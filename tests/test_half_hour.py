"""The first half hour on a GPU, without one: what is measured is kept, whatever hangs, fails or is killed."""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import archive, first, gates, report
from fastbert.measure import records
from fastbert.measure.gates import FORWARD
from tests import fresh

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}

MEASURES = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import first
given = sys.argv[1:]
spent = json.loads(given[given.index("--spent") + 1])
steps = first.Steps(Path({output!r}), "k", spent)
def hang():
    time.sleep(600)
def crash():
    os._exit(7)
def fail():
    raise AssertionError("wrong")
for section, name, call in [{steps}]:
    if steps.spent.get(section, 0.0) < first.LIMITS[section]:
        steps.run(section, name, call, 0.5 if call is hang else 20.0)
"""


def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, minutes: float = 1.0) -> tuple[int, Any]:
    """The exit status of a run whose process takes those steps, and how each ended."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURES.format(root=str(ROOT), output=str(tmp_path), steps=steps))
    monkeypatch.setattr(first, "__file__", str(script))
    monkeypatch.setattr(archive, "CARRIED", tmp_path / "none")
    status = first.watch(argparse.Namespace(output=tmp_path, minutes=minutes), [])
    found = first.lines(tmp_path / "first.jsonl")
    return status, {line["step"]: line.get("status", line.get("why")) for line in found if "step" in line}


def test_what_hangs_or_crashes_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        "('gates', 'a', list), ('gates', 'b', hang), ('gates', 'c', crash), ('gates', 'd', fail), ('rates', 'e', list)"
    )
    status, found = watched(tmp_path, monkeypatch, steps)
    ends = {"a": "ok", "b": "no end in the step's time", "c": "ended its process, status 7", "d": "FAILED: wrong"}
    assert (status, found) == (1, ends | {"e": "ok"})
    monkeypatch.setattr(first, "Child", None)  # none may be started: the same command has nothing left to do


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    file = tmp_path / "first.jsonl"
    first.append(file, {"a": 1})
    file.write_bytes(file.read_bytes() + b'{"b": ')
    for value in (2, 3):
        first.append(file, {"c": value})
    assert first.lines(file) == [{"a": 1}, {"c": 2}, {"c": 3}]


def test_a_section_has_a_deadline_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(first.LIMITS, "gates", 1.0)
    slow = "lambda: time.sleep(0.7)"
    steps = ", ".join(f"('gates', '{i}', {slow})" for i in range(6)) + ", ('rates', 'r', list)"
    status, found = watched(tmp_path, monkeypatch, steps)
    assert (status, found["0"], found["r"]) == (1, "ok", "ok")
    assert "no end in its section's time" in found.values()
    assert len(found) < 5


def test_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    status, found = watched(tmp_path, monkeypatch, "('gates', 'a', list), ('gates', 'b', lambda: time.sleep(60))", 0.1)
    assert (status, found) == (3, {"a": "ok", "b": "out of time"})
    with tarfile.open(tmp_path / "out" / archive.MEASURED) as packed:
        assert "first.jsonl" in packed.getnames()


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "first.py"), "--dry", "--output", str(output), *more]


def started(output: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, "OUT": str(output / "out"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command(output, *more), env=environment, stdout=subprocess.PIPE, text=True)


def way(record: dict[str, Any]) -> tuple[str, str]:
    return record["workload"], record["candidate"]


def count(file: Path, event: str) -> int:
    return sum(line["event"] == event for line in first.lines(file))


KILLS = (("step", 20, 0.5, signal.SIGTERM), ("record", 7, 0, signal.SIGKILL))


@pytest.mark.parametrize(
    "kills", [KILLS[1:], pytest.param((("step", 3, 0.5, signal.SIGKILL), *KILLS), marks=pytest.mark.slow)], ids=len
)
def test_killed_at_any_second_it_goes_on(kills: tuple[tuple[Any, ...], ...], tmp_path: Path) -> None:
    """On a CPU at tiny sizes: gates, rates and whole models; killed at moments drawn at random, by force or not."""
    sections = ["--sections", "gates", "rates", "forwards"]
    chance, file, before = random.Random(0), tmp_path / "first.jsonl", []
    for event, least, seconds, number in kills:
        run = started(tmp_path, *sections)
        while run.poll() is None and count(file, event) < least:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, seconds))
        run.send_signal(number)
        run.communicate(timeout=60)
        found = first.lines(file)
        assert found[: len(before)] == before
        before = found
        if number == signal.SIGTERM:
            assert (tmp_path / "out" / archive.MEASURED).is_file()
    assert ("forwards", "squad b2") in {(line["section"], line["step"]) for line in before if line["event"] == "step"}
    said = started(tmp_path, *sections).communicate(timeout=300)[0]
    found = first.lines(tmp_path / "first.jsonl")
    assert found[: len(before)] == before
    steps = [(line["section"], line["step"]) for line in found if line["event"] == "step"]
    assert len(steps) == len(set(steps))  # nothing was done twice
    assert {section for section, _ in steps} == {"gates", "rates", "forwards"}
    assert "0 not right" in said
    verdicts = gates.verdicts(tmp_path / "gates.jsonl")
    assert set(verdicts.values()) == {gates.GREEN}
    assert {f"{name}.bfloat16" for name in FORWARD} == set(verdicts)
    (file,) = tmp_path.glob("*/20*.json")
    kept = records.load(file)
    logged = list({way(line["record"]): line["record"] for line in found if line["event"] == "record"}.values())
    told = {r["gates"] for r in logged if r["candidate"] == "fused"}
    assert told == {"not run: model.bfloat16"}  # and judged again once that was known
    assert [{**a, "gates": b["gates"]} for a, b in zip(logged, kept, strict=True)] == kept
    workloads = ("squad b2", "dense512 b2", "dense128 b1")
    timed = {(r["workload"], r["candidate"]) for r in kept if r["status"] == "ok"}
    assert timed == {(name, way) for name in workloads for way in ("stock", "fused")}
    assert len({(r["workload"], r["candidate"]) for r in kept}) == len(kept) == 12
    assert {r["gates"] for r in kept if r["candidate"] == "fused"} == {gates.GREEN}
    assert all(f"| {name} |" in report.readme(kept) for name in workloads)
    with tarfile.open(tmp_path / "out" / archive.MEASURED) as packed:
        assert {"first.jsonl", "gates.jsonl", f"{file.parent.name}/{file.name}"} <= set(packed.getnames())


def test_gates_cover_every_operation_of_bert_but_fp8() -> None:
    """Not DeBERTa's, rotary encoders', int8's, nor those of attention maps, which no headline is of: the tests are
    their gates."""
    from fastbert import ops

    found = set()
    for train in (False, True):
        shape = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
        found |= {case.operation for case in first.cases(shape, 37, first_device(), train)}
    bert = {name for name in ops.OPERATORS if not name.startswith("disentangled") and not name.endswith("_map")}
    others = {name for name in bert if "gated" in name or name.endswith(("_fp8", "_int8"))} | {"rotate", "rms_norm"}
    assert bert - others <= found


def first_device() -> Any:
    import torch

    return torch.device("cpu")


def test_a_wrong_operation_is_a_red_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastbert import ops
    from fastbert.kernels import cpu

    layer_norm = cpu.layer_norm
    monkeypatch.setitem(ops.CPU_BACKEND, "layer_norm", lambda *args: layer_norm(*args) * 1.01)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    steps = first.Steps(tmp_path, "k", {})
    first.gate(steps, "gates", shape, (37,), torch.device("cpu"), tmp_path)
    verdicts = gates.verdicts(tmp_path / "gates.jsonl")
    red = {gate for gate, verdict in verdicts.items() if verdict == gates.RED}
    assert red == {"layer_norm.bfloat16"}
    assert json.loads((tmp_path / "first.jsonl").read_text().splitlines()[0])["status"] == "ok"


def test_the_page_names_steps_there_are() -> None:
    """Four calls of less than ten minutes, half an hour in all; each a command whose steps the suite has.

    Every step of DeBERTa, ModernBERT and training is in one. The first call and any other take less than 13 minutes.
    """
    from benchmarks import suite

    text = (ROOT / "benchmarks" / "GPU.md").read_text()
    calls = re.findall(r"^export FASTBERT_COMMIT=X+; (.*)$", text, re.MULTILINE)
    minutes, steps, called = [], {step.name for step in suite.ON_A_GPU}, set()
    for call in calls:
        words = shlex.split(call)
        minutes.append(float(words[words.index("--minutes") + 1]))
        if "--only" in words:
            called |= set(words[words.index("--only") + 1 :])
        assert len(call) < 1900
    assert called <= steps
    assert {name for name in steps if name.startswith(("deberta", "modernbert", "training"))} <= called
    for line in text.splitlines():
        if files := re.findall(r"`(tests/\S+\.py)`", line):
            told = "".join((ROOT / file).read_text() for file in files)
            assert all(f"def {name}(" in told for name in re.findall(r"`(test_\w+)`", line)), line
    assert len(calls) == 4
    assert max(minutes) < 10
    assert sum(minutes) < 28
    assert minutes[0] + max(minutes[1:]) < 13


BARE = {
    "huggingface_hub",
    "numpy",
    "packaging",
    "pytest",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}
OWN = {"benchmarks", "examples", "fastbert", "kernels", "tests"}


@pytest.mark.parametrize("folder", ["tests/kernels", "tests/fastbert", "tests/examples", "tests"])
def test_tests_are_collected_on_a_bare_machine(folder: str) -> None:
    """What a test module imports beyond torch and transformers, and what these need, is asked for by who uses it."""
    pattern, allowed = "test_*.py", BARE | OWN | set(sys.stdlib_module_names)
    for file in sorted((ROOT / folder).glob(pattern)):
        nodes = ast.parse(file.read_bytes()).body
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        skips = re.findall(r'^(?:\w+ = )?pytest\.importorskip\("(\w+)"\)', file.read_text(), re.MULTILINE)
        assert {name.partition(".")[0] for name in names} - allowed - set(skips) == set(), file


def dry(
    tmp_path: Path, *command: str, options: tuple[str, ...] = ("--small",), ends: tuple[int, ...] = (0,), **more: str
) -> str:
    """What a command says that runs as on a GPU that isn't there; it has to end well."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OUT": str(tmp_path / "out"), **more}
    words = [sys.executable, "-m", "benchmarks.dry", *options, sys.executable, *command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in ends, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_call_as_on_a_gpu(tmp_path: Path) -> None:
    """All sections, as on a device: what a call there could trip over in Python, it trips over here."""
    said = dry(tmp_path, "benchmarks/first.py", "--dry", "--slack", "20", "--minutes", "60", "--output", str(tmp_path))
    assert ", 0 not right" in said
    (file,) = tmp_path.glob("no-gpu-dry/20*.json")
    kept = records.load(file)
    ways = {(r["workload"], r["candidate"]) for r in kept if r["status"] == "ok"}
    models = ("stock", "fused", "fused + CUDA graphs", "stock packed, torch varlen")
    assert ways >= {(name, way) for name in ("squad b2", "dense512 b2", "dense128 b1") for way in models}
    products = {r["candidate"] for r in kept if r["what"] == "variant qkv" and r["workload"] == "2048 rows"}
    assert {"stock", "fused"} <= products
    assert any("library" in name for name in products)
    assert any("persistent" in name for name in products)


@pytest.mark.slow
def test_a_prebuilt_kernel_is_found(tmp_path: Path) -> None:
    """What prebuild.py compiles from a list is what a launch looks for: it compiles nothing more."""
    listed, cache = tmp_path / "list.jsonl", tmp_path / "cache"
    code = (
        "import torch; from fastbert import ops; x = torch.ones(3, 64, device='cuda', dtype=torch.bfloat16); "
        "torch.set_grad_enabled(False); ops.layer_norm(x, x[0], x[1], 1e-12); print(ops.linear(x, x, x[0, :3]).shape)"
    )
    more = {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    assert "[3, 3]" in dry(tmp_path, "-c", code, options=("--list", str(listed)), **more)
    lines = listed.read_text().splitlines()
    assert [json.loads(line)["kernel"] for line in lines] == ["layer_norm_kernel", "linear_kernel"]
    compile_all = (
        "import sys; from benchmarks import prebuild; print([prebuild.compile_one(line) for line in open(sys.argv[1])])"
    )
    done = fresh.run("-c", compile_all, listed, env=fresh.environment(**more))
    assert done.returncode == 0, done.stderr
    found = done.stdout
    before = sorted(path.name for path in cache.iterdir())
    assert len(before) == 2
    assert all(name in found for name in before)
    dry(tmp_path, "-c", code, options=("--compiles",), **more)
    assert sorted(path.name for path in cache.iterdir()) == before
    assert {".cubin", ".json"} <= {path.suffix for path in cache.glob("*/*")}


@pytest.mark.slow
def test_every_test_for_a_gpu_as_on_one(tmp_path: Path) -> None:
    """Collected, its launches chosen and left out; what asserts something of values says nothing."""
    said = dry(tmp_path, "-m", "pytest", "-q", "-m", "gpu", "tests", options=())
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", said.splitlines()[-1])}
    assert counts["passed"] > 900 and not counts.keys() & {"failed", "error", "errors"}


def steps_of_the_suite() -> list[str]:
    from benchmarks import suite

    return [step.name for step in suite.ON_A_GPU]


@pytest.mark.slow
@pytest.mark.parametrize("step", steps_of_the_suite())
def test_every_step_as_on_a_gpu(step: str, tmp_path: Path) -> None:
    """Through the suite, by its own command; of tests a few, what searches for as long as it may for some minutes."""
    searches = step.startswith(("tune", "variants")) and step != "tuned"
    time_limits = ["--minutes", "6"] if searches else ["--minutes", "60", "--slack", "20"]
    few = {"PYTEST_ADDOPTS": "-k 'layer_norm or graphs'"} if step.startswith("tests: ") else {}
    by_times = step == "embed"  # ends so where it is slow beside what it runs, and here no time says anything
    command = "benchmarks/suite.py", "--only", step, *time_limits, "--output", str(tmp_path)
    said = dry(tmp_path, *command, ends=(0, 1) if by_times else (0,), **few)
    with tarfile.open(tmp_path / "out" / archive.MEASURED) as packed:
        names = packed.getnames()
    progress = json.loads((tmp_path / "progress.json").read_text())["steps"]
    assert progress[step] in ("done", "left out") or (by_times and " of the bare encoder's " in said)
    assert "progress.json" in names
    for file in tmp_path.glob("no-gpu-dry/20*.json"):
        broken = [r for r in records.load(file) if r["status"].startswith(("ERROR", "FAILED"))]
        assert broken == []
