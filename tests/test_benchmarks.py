"""The benchmark suites, whole, at a reduced size: everything runs, and is checked before it is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import records

ROOT = Path(__file__).resolve().parent.parent
# On a CPU as its users run it, not in the interpreter.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(arguments: str, *paths: str) -> None:
    command = [sys.executable, "-m", *arguments.split(), *paths]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    command = f"pytest benchmarks -q --size minilm --workload search --dtype {dtype}"
    run(command, f"--benchmark-json={file}", "--records", str(tmp_path / "records"))
    found = json.loads(file.read_text())["benchmarks"]
    groups = {one["group"].split(",")[0] for one in found}
    assert len(found) == 2 * len(groups) >= 26
    for one in found:
        assert one["stats"]["median"] > 0
        assert one["extra_info"]["bytes"] > 0
        assert (one["extra_info"]["flops"] > 0) == one["group"].startswith(("linear", "attention", "qkv"))
    (kept,) = (tmp_path / "records").rglob("*.json")
    written = records.load(kept)
    assert sorted(r["what"].removeprefix("operator ") for r in written) == sorted(2 * list(groups))
    medians = {one["stats"]["median"] for one in found}
    assert {r["median_s"] for r in written} == medians
    assert all(r["ratio_to_stock"] == 1 for r in written if r["candidate"] == "stock")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["", "--train"])
def test_models(step: str, tmp_path: Path) -> None:
    peers = "eager" if step else "all"  # compiling a training step for a CPU takes minutes
    arguments = f"--size minilm --repeats 3 --workload search --batch 1 16 --peers {peers} {step} --output"
    run(f"fastbert.cli bench {arguments}", str(tmp_path))
    (file,) = tmp_path.rglob("*.json")
    timed = {(r["workload"], r["candidate"]) for r in records.load(file) if r["status"] == "ok"}
    ways = ["stock", "fused", "stock eager"] + ([] if step else ["stock + torch.compile", "ONNX Runtime", "OpenVINO"])
    assert timed >= {(workload, way) for workload in ("search b1", "search b16") for way in ways}


@pytest.mark.slow
def test_encode(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/encode.py", "--batch", "4", "--repeats", "3", "--output", str(tmp_path)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = records.load(next(tmp_path.rglob("*.json")))
    ways = [("corpus", "stock"), ("corpus", "fused"), ("calls", "stock"), ("calls", "fused")]
    assert [(r["what"].split(", ")[1], r["candidate"]) for r in found] == ways
    assert all(r["ideal_ratio"] > 1 and r["repeats"] == 3 for r in found)
    assert found[0]["ideal_ratio"] < found[2]["ideal_ratio"]  # sorted by length there is less padding


@pytest.fixture
def suite() -> Any:
    """The module benchmarks/suite.py."""
    spec = importlib.util.spec_from_file_location("suite", ROOT / "benchmarks" / "suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def steps(suite: Any, file: Path, **codes: str) -> tuple[Any, ...]:
    """Steps that append their names to `file`, and then run some code."""

    def noted(name: str, code: str) -> str:
        return shlex.join(["-c", f"open({str(file)!r}, 'a').write('{name} ')\n{code}"])

    return tuple(suite.Step(name, 1.0, noted(name, code)) for name, code in codes.items())


def test_every_step_is_a_command(suite: Any, tmp_path: Path) -> None:
    """Each is one that its parser takes."""
    from fastbert.cli.__main__ import parser

    for step in (*suite.ON_A_GPU, *suite.ON_A_CPU):
        words = suite.command(step, 1.0, tmp_path)
        if words[1] == "benchmarks/encode.py":
            continue  # test_encode runs it
        assert words[1] == "-m"
        if words[2] == "fastbert.cli":
            parser().parse_args(words[3:])
        else:
            assert words[2:4] == ["pytest", "-q"]
            assert (ROOT / words[4]).is_dir()
    assert suite.ON_A_GPU[0].name == suite.TESTS


def test_the_suite_goes_on_where_it_stopped(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    flag = tmp_path / "flag"
    fails = f"import os, sys; sys.exit(not os.path.exists({str(flag)!r}))"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, tests="pass", one="pass", two=fails, three="pass"))
    arguments = ["--output", str(tmp_path / "out"), "--minutes", "2"]
    assert suite.main(arguments) == 1
    assert ran.read_text() == "tests one two three "
    flag.touch()
    assert suite.main(arguments) == 0
    assert ran.read_text() == "tests one two three two "
    assert suite.main([*arguments, "--only", "three"]) == 0
    assert ran.read_text() == "tests one two three two three "
    monkeypatch.setattr(suite, "fingerprint", lambda: "other sources")
    assert suite.main([*arguments, "--only", "one"]) == 0
    assert ran.read_text() == "tests one two three two three tests one "


def test_nothing_is_timed_on_a_red_test(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, tests="import sys; sys.exit(1)", one="pass"))
    for only in ([], ["--only", "one"]):
        assert suite.main(["--output", str(tmp_path / "out"), *only]) == 1
    assert ran.read_text() == "tests tests "


def test_the_suite_keeps_to_its_time(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    waits = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open({str(ran)!r}, 'a').write('kept ')"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, one=waits, two="pass"))
    assert suite.main(["--output", str(tmp_path / "out"), "--minutes", "0.25"]) == 3
    assert ran.read_text() == "one kept "
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["steps"] == {"one": "cut"}


def test_ending_the_suite_ends_its_step(tmp_path: Path) -> None:
    """A benchmark that is measuring is interrupted, and has kept what it wrote."""
    arguments = ["--only", "cold", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "benchmarks/suite.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"== cold"):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
