"""The benchmark suites, whole, at a reduced size: everything runs, and is checked before it is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
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
def test_the_host() -> None:
    run("benchmarks.host --layers 2 --calls 4")


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


@pytest.mark.slow
def test_embed() -> None:
    """The command and its bare encoder take turns, to the end; a run this short says nothing about their ratio."""
    command = [sys.executable, "benchmarks/embed.py", "--size", "minilm", "--lines", "300"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert re.match(r"300 rows, 27,957 tokens, float32, cpu, .* of the bare encoder's .* resident ", done.stdout)


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
    """Steps that append their names to `file`, and then run some code; "tests" is one that has to pass."""

    def noted(name: str, code: str) -> str:
        return shlex.join(["-c", f"open({str(file)!r}, 'a').write('{name} ')\n{code}"])

    return tuple(
        suite.Step(f"{suite.TESTS}{name}" if name == "tests" else name, 1.0, noted(name, code))
        for name, code in codes.items()
    )


def test_every_step_is_a_command(suite: Any, tmp_path: Path) -> None:
    """Each is one that its parser takes."""
    from fastbert.cli.__main__ import parser

    for step in (*suite.ON_A_GPU, *suite.ON_A_CPU):
        words = suite.command(step, 1.0, tmp_path)
        if words[1].startswith("benchmarks/"):
            assert (ROOT / words[1]).is_file()  # whose tests run it
            continue
        assert words[1] == "-m"
        if words[2] == "fastbert.cli":
            parser().parse_args(words[3:])
        else:
            assert words[2:4] == ["pytest", "-q"]
            assert any((ROOT / word).is_dir() for word in words[4:])
    assert [step.name.startswith(suite.TESTS) for step in suite.ON_A_GPU[:3]] == [True, True, False]
    assert len({step.name for step in suite.ON_A_GPU}) == len(suite.ON_A_GPU)


def test_every_gpu_test_is_in_a_step(suite: Any) -> None:
    """The steps of tests take all folders: one by name, the other all but that one."""
    paths = [shlex.split(step.command) for step in suite.ON_A_GPU if step.name.startswith(suite.TESTS)]
    assert [words[words.index("gpu") + 1 :] for words in paths] == [
        ["tests/kernels"],
        ["tests", "--ignore", "tests/kernels"],
    ]


@pytest.mark.slow
def test_the_steps_of_a_gpu_run(suite: Any, tmp_path: Path) -> None:
    """Their commands, at a reduced size, on this machine: what can't run here says so, and records are written."""
    ran = 0
    for step in suite.ON_A_GPU:
        words = suite.command(step, 0.5, tmp_path)
        if words[2:4] not in (["fastbert.cli", "bench"], ["fastbert.cli", "profile"]):
            continue
        less = ["--dtype", "float32", "--batch", "2"] if "--lengths" not in words else ["--dtype", "float32"]
        less += ["--size", "minilm", "--device", "cpu"]
        less += ["--repeats", "3"] if "bench" in words and "--cold" not in words else []
        if "--peers" in words:  # compiling takes minutes here
            less += ["--peers", "torch-varlen"]
        done = subprocess.run(
            [*words, *less], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{step.name}: {done.stdout}{done.stderr}"
        ran += 1
    assert ran > 10
    assert len(list(tmp_path.glob("profile-*.json"))) == 4
    assert len(list(tmp_path.rglob("*/*.json"))) >= 1


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


def test_nothing_is_timed_on_a_red_test(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, tests="import sys; sys.exit(1)", one="pass"))
    for only in ([], ["--only", "one"]):
        assert suite.main(["--output", str(tmp_path / "out"), *only]) == 1
    assert ran.read_text() == "tests tests "
    assert "not green: tests: tests" in capsys.readouterr().err


def test_all_tests_run_before_a_red_one_stops_the_rest(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    red, green, one = steps(suite, ran, tests="import sys; sys.exit(1)", more="pass", one="pass")
    more = suite.Step("tests: more", 1.0, green.command)
    monkeypatch.setattr(suite, "ON_A_CPU", (red, more, one))
    assert suite.main(["--output", str(tmp_path / "out")]) == 1
    assert ran.read_text() == "tests more "
    assert suite.main(["--output", str(tmp_path / "out")]) == 1
    assert ran.read_text() == "tests more tests "  # a green one is not run again


def test_steps_have_caches_of_their_own_and_logs(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    told = "import os; print(os.environ['XDG_CACHE_HOME'], os.environ['TRITON_CACHE_DIR'])"
    one, two = steps(suite, tmp_path / "ran", one=told, two=told)
    monkeypatch.setattr(suite, "ON_A_CPU", (one, dataclasses.replace(two, cache="tuned")))
    assert suite.main(["--output", str(out)]) == 0
    shared = out / "cache" / "triton"
    assert (out / "logs" / "one.log").read_text().split() == [str(out / "cache" / "shipped"), str(shared)]
    assert (out / "logs" / "two.log").read_text().split() == [str(out / "cache" / "tuned"), str(shared)]
    tuning = {step.name: step.cache for step in suite.ON_A_GPU if step.cache != "shipped"}
    assert tuning == {"tune": "tuned", "tuned": "tuned"}


def test_the_suite_goes_on_elsewhere_by_its_progress_file(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, one="pass", two="import sys; sys.exit(1)"))
    assert suite.main(["--output", str(tmp_path / "here")]) == 1
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "progress.json").write_bytes((tmp_path / "here" / "progress.json").read_bytes())
    assert suite.main(["--output", str(tmp_path / "there")]) == 1
    assert ran.read_text() == "one two two "
    (tmp_path / "there" / "progress.json").write_text("cut o")
    assert suite.main(["--output", str(tmp_path / "there")]) == 1  # unreadable: all over again
    assert ran.read_text() == "one two two one two "


def test_list(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: True)
    assert suite.main(["--list", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(suite.ON_A_GPU)
    assert all("not begun" in line for line in said)
    assert said[0].startswith("tests: kernels")


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


def test_the_sanitizer_is_asked_for_the_kernels_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that notes what it is given; without it, or a GPU, the step says so and is done."""
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "benchmarks" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 0
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/given\nexit {sanitize.FAULT}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["tests/kernels"]) == sanitize.FAULT
    given = (tmp_path / "given").read_text().split()
    assert given[:3] == ["1", "--tool", "memcheck"]
    assert given[-3:] == ["-m", "gpu", "tests/kernels"]
