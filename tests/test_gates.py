"""What is green, red and not run; which sources an outcome hangs on; what a kill leaves of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gates
from benchmarks.gates import FAILED, GREEN, NOT_RUN, PASSED, PLANNED, RED, SKIPPED, Log

ROOT = Path(__file__).resolve().parent.parent
LINEAR, FP8 = "tests/kernels/test_linear.py", "tests/kernels/test_fp8.py"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gates.jsonl"


def test_red_closes_its_own_gate_alone(file: Path) -> None:
    log = Log(file, "tests")
    log.plan({f"{LINEAR}::a": ["linear.bfloat16"], f"{LINEAR}::b": ["linear.float32"], f"{FP8}::c": ["fp8.float8"]})
    assert gates.verdicts(file) == dict.fromkeys(("linear.bfloat16", "linear.float32", "fp8.float8"), NOT_RUN)
    log.note(f"{LINEAR}::a", PASSED, seconds=0.5)
    log.note(f"{FP8}::c", FAILED)
    assert gates.verdicts(file) == {"linear.bfloat16": GREEN, "linear.float32": NOT_RUN, "fp8.float8": RED}
    log.note(f"{FP8}::c", PASSED)  # mended, or run again
    log.note(f"{LINEAR}::b", SKIPPED)
    assert gates.verdicts(file) == {"linear.bfloat16": GREEN, "linear.float32": NOT_RUN, "fp8.float8": GREEN}
    assert gates.outcomes(file, PASSED) == {f"{LINEAR}::a", f"{FP8}::c"}


def test_all_that_one_suite_planned_makes_green(file: Path) -> None:
    first, tests = Log(file, "first", ROOT / "tests" / "test_gates.py"), Log(file, "tests")
    first.plan({"linear, 128 rows": ["linear.bfloat16"], "linear, 2048 rows": ["linear.bfloat16"]})
    first.note("linear, 128 rows", PASSED)
    assert gates.verdicts(file) == {"linear.bfloat16": NOT_RUN}
    first.note("linear, 2048 rows", PASSED)
    tests.plan({f"{LINEAR}::a": ["linear.bfloat16"]})
    assert gates.verdicts(file) == {"linear.bfloat16": GREEN}
    tests.note(f"{LINEAR}::a", FAILED)
    assert gates.verdicts(file) == {"linear.bfloat16": RED}


def test_planning_again_forgets_nothing(file: Path) -> None:
    """A suite that was cut plans anew: what passed stays passed, unless it covers something else now."""
    plan = {f"{LINEAR}::a": ["linear.bfloat16"], f"{LINEAR}::b": ["linear.bfloat16"]}
    for _ in range(2):
        Log(file, "tests").plan(plan)
        Log(file, "tests").note(f"{LINEAR}::a", PASSED, gates=["linear.bfloat16"])
    assert {check: line["outcome"] for check, line in gates.current(file).items()} == {
        f"{LINEAR}::a": PASSED,
        f"{LINEAR}::b": PLANNED,
    }
    Log(file, "tests").plan({f"{LINEAR}::a": ["linear.float16"]})
    assert gates.outcomes(file, PASSED) == set()


def test_other_sources_or_another_gpu_know_nothing_of_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(file, "tests")
    log.plan({f"{LINEAR}::a": ["linear.bfloat16"]})
    log.note(f"{LINEAR}::a", PASSED)
    with monkeypatch.context() as patch:
        patch.setattr(gates, "key", lambda file: "other sources")
        assert gates.verdicts(file) == {}
    with monkeypatch.context() as patch:
        gates.key.cache_clear()
        patch.setattr(gates, "place", lambda: "another GPU")
        assert gates.verdicts(file) == {}
    gates.key.cache_clear()
    assert gates.verdicts(file) == {"linear.bfloat16": GREEN}


def sources(name: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in gates.sources(ROOT / name)}


def test_an_edit_of_a_kernel_reaches_its_dependents_alone() -> None:
    """By name, by `from . import`, in a function, by a name made at run time; not for being in the same package."""
    linear, padding = sources(LINEAR), sources("tests/kernels/test_padding.py")
    assert {"kernels/linear.py", "kernels/launch.py", "fastbert/numerics.py"} <= linear
    assert {"tests/conftest.py", "tests/kernels/conftest.py", LINEAR} <= linear
    assert not {"kernels/attention.py", "kernels/linear_fp8.py", "fastbert/__init__.py", "fastbert/fuse.py"} & linear
    assert "kernels/padding.py" in padding
    assert "kernels/linear.py" not in padding
    assert {"kernels/quantize_fp8.py", "kernels/linear.py"} <= sources(FP8)  # linear_fp8 shares its GELU
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= sources("fastbert/cli/problems.py")  # which imports them by import_module(f"...")
    assert kernels <= sources("tests/fastbert/test_encoder.py")
    assert not gates.MACHINERY & sources("tests/kernels/test_linear.py")


def test_lines_of_many_processes_do_not_mix(file: Path) -> None:
    code = "import sys; from benchmarks.gates import *; from pathlib import Path\nfor i in range(200): "
    code += "append(Path(sys.argv[1]), [{'check': f'{sys.argv[2]} {i}', 'long': 'x' * 5000}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(file), str(n)], env=environment) for n in range(3)]
    assert [each.wait(60) for each in started] == [0, 0, 0]
    assert set(gates.read(file)) == {f"{n} {i}" for n in range(3) for i in range(200)}


def test_a_line_that_was_cut_off_takes_no_other_along(file: Path) -> None:
    gates.append(file, [{"check": "a", "outcome": PASSED}])
    with file.open("a") as torn:
        torn.write(json.dumps({"check": "b", "outcome": PASSED})[:12])
    gates.append(file, [{"check": "c", "outcome": PASSED}])
    assert set(gates.read(file)) == {"a", "c"}
