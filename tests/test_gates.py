"""What is green, red and not run; which sources an outcome hangs on; what a kill leaves of a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gates, report
from benchmarks.gates import FAILED, GREEN, NOT_RUN, PASSED, PLANNED, RED, SKIPPED, Log
from fastbert.cli.__main__ import main
from fastbert.measure import bench, cases, machine, records
from fastbert.measure import gates as rows
from tests.fastbert.conftest import tiny  # noqa: F401

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
        patch.setattr(gates, "place", lambda: "another GPU")
        assert gates.verdicts(file) == {}
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
    assert kernels <= sources("fastbert/tune/problems.py")  # which imports them by import_module(f"...")
    assert kernels <= sources("tests/fastbert/test_encoder.py")
    assert not gates.MACHINERY & sources("tests/kernels/test_linear.py")


def test_an_outcome_holds_until_a_source_of_its_own_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not until anything at all does."""
    monkeypatch.setattr(gates, "ROOT", tmp_path)
    monkeypatch.setattr(gates, "_key", gates._key.__wrapped__)  # sources change in one process here alone
    folder, key = tmp_path / "tests", gates.key
    folder.mkdir()
    for name, text in {"test_a.py": "from tests import helper", "helper.py": "A = 1", "test_b.py": "B = 1"}.items():
        (folder / name).write_text(text)
    before = key(folder / "test_a.py")
    (folder / "test_b.py").write_text("B = 2")
    assert key(folder / "test_a.py") == before
    (folder / "helper.py").write_text("A = 2")
    assert key(folder / "test_a.py") != before


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


# The plugin, over a device made of a flag, after whose illegal access nothing works any more. PyTorch is as much of it
# as the plugin asks for: each process would take seconds to import the real one.
TORCH = """
__version__ = "stand-in"
broken = []

class dtype:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"

bfloat16, float16 = dtype("bfloat16"), dtype("float16")

class cuda:
    is_available = is_initialized = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda device: "stand-in")

    @staticmethod
    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
STAND_IN = """
import benchmarks.gates, pathlib
from tests import gates

benchmarks.gates.ROOT = pathlib.Path.cwd()
pytest_addoption = gates.add_options

def pytest_configure(config):
    config.addinivalue_line("markers", "gates(*names): ")
    config.pluginmanager.register(gates.Gates(config), "gates")
"""
TESTS = """
import pathlib, time
import pytest, torch

def ran(name):
    with open("ran", "a") as file:
        file.write(f"{name} ")
    torch.cuda.synchronize()

@pytest.mark.parametrize("i", range(4))
def test_before(i):
    ran(f"before{i}")

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_faulty(dtype):
    ran("faulty")
    if dtype == torch.bfloat16 and not pathlib.Path("mended").exists():
        torch.broken.append(1)  # an asynchronous fault: nothing here says so

@pytest.mark.gates("other.float32")
def test_backward():
    ran("after")

@pytest.mark.parametrize("i", range(16))
def test_slow(i):
    time.sleep(0.1)
    ran(f"slow{i}")

def test_hangs():
    if pathlib.Path("hang").exists():
        time.sleep(600)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "triton.py").write_text("__version__ = 'stand-in'\n")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "test_op.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(project), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others' take longer to import than the tests take
    plugins = ["-p", "stand_in", "-p", "xdist", *(("-p", "pytest_timeout") if "--timeout" in arguments else ())]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--gates", "gates.jsonl", *arguments]
    return subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)


def ran(project: Path) -> list[str]:
    """What has run since it was asked last."""
    file = project / "ran"
    found = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def noted(project: Path) -> dict[str, str]:
    return {name.partition("::")[2]: line["outcome"] for name, line in gates.read(project / "gates.jsonl").items()}


def test_a_device_that_has_failed_fails_one_test(project: Path) -> None:
    """The one that broke it, whose own process ends; a new one runs the others. Then that one alone runs again."""
    process = start(project, "-n", "1", "--max-worker-restart", "4")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "DeviceFailed: CUDA error: an illegal memory access" in said
    outcomes = noted(project)
    assert {name for name, outcome in outcomes.items() if outcome != PASSED} == {"test_faulty[dtype0]"}
    assert outcomes["test_faulty[dtype0]"] == FAILED
    assert len(outcomes) == 24
    assert len(ran(project)) == 23
    (project / "mended").touch()
    process = start(project, "-n", "1")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert ran(project) == ["faulty"]
    assert set(noted(project).values()) == {PASSED}
    process = start(project, "-n", "1")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert ran(project) == []


def test_without_workers_the_same_command_goes_on(project: Path) -> None:
    process = start(project)
    assert "the device has failed; the same command goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert ran(project) == ["before0", "before1", "before2", "before3", "faulty"]
    process = start(project)
    process.communicate(timeout=120)
    # What broke it comes last.
    assert ran(project) == ["faulty", "after", *(f"slow{i}" for i in range(16)), "faulty"]
    verdicts = {}
    for line in gates.read(project / "gates.jsonl").values():
        for gate in line["gates"]:
            verdicts.setdefault(gate, set()).add(line["outcome"])
    assert verdicts == {
        "op.any": {PASSED},
        "op.bfloat16": {FAILED},
        "op.float16": {PASSED},
        "other.float32": {PASSED},
    }


def test_tests_of_some_gates_alone(project: Path) -> None:
    start(project, "--covering", "*.float16", "--covering", "other.*").communicate(timeout=120)
    assert ran(project) == ["faulty", "after"]
    assert set(noted(project)) == {"test_faulty[dtype1]", "test_backward"}


EXPECTED = """
import pytest

@pytest.mark.xfail
def test_fails():
    assert False

@pytest.mark.xfail(run=False)
def test_is_not_run():
    pass

@pytest.mark.xfail(strict=True)
def test_passes_against_expectation():
    pass

@pytest.mark.xfail(raises=ValueError)
def test_fails_otherwise():
    raise TypeError

@pytest.mark.xfail
def test_passes():
    pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_expected_failures_prove_nothing(workers: tuple[str, ...], project: Path) -> None:
    """One that is expected to fail, and does, or isn't run, opens no gate; one that breaks its promise closes one."""
    (project / "test_op.py").write_text(EXPECTED)
    process = start(project, *workers)
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert noted(project) == {
        "test_fails": gates.SKIPPED,
        "test_is_not_run": gates.SKIPPED,
        "test_passes_against_expectation": FAILED,
        "test_fails_otherwise": FAILED,
        "test_passes": PASSED,
    }


@pytest.mark.parametrize("workers", [pytest.param((), marks=pytest.mark.slow), ("-n", "1")], ids=["alone", "workers"])
def test_killed_at_any_moment_what_passed_is_kept(workers: tuple[str, ...], project: Path) -> None:
    """Ended by force in the middle, twice: none that was noted runs again. A worker may have run what it was given."""
    (project / "mended").touch()
    times = []
    for count in (6, 5):
        process = start(project, "-k", "slow", *workers)
        while not (project / "ran").exists() or len((project / "ran").read_text().split()) < count:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        time.sleep(1)  # a worker sees that it is alone
        kept = {name for name, outcome in noted(project).items() if outcome == PASSED}
        times.append(ran(project))
        assert len(kept) >= sum(map(len, times)) - 3 * len(times) > 0
    start(project, "-k", "slow", *workers).communicate(timeout=120)
    times.append(ran(project))
    assert {name for each in times for name in each} == {f"slow{i}" for i in range(16)}
    assert sum(map(len, times)) <= 16 + 2 * 3
    assert set(noted(project).values()) == {PASSED}


def test_one_that_hangs_is_ended_and_the_others_run(project: Path) -> None:
    pytest.importorskip("pytest_timeout")
    (project / "mended").touch()
    (project / "hang").touch()
    process = start(
        project, "-n", "1", "--timeout", "5", "--timeout-method", "thread", "-k", "hangs or after or backward"
    )
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert noted(project) == {"test_backward": PASSED, "test_hangs": FAILED}


BF16 = torch.bfloat16
GREEN_IN_BF16 = dict.fromkeys((f"{operation}.bfloat16" for operation in rows.FORWARD), GREEN)


def test_a_row_needs_the_gates_it_uses() -> None:
    def state(candidate: str, what: str = "BertModel forward", dtype: torch.dtype = BF16, **changed: str) -> str:
        verdicts = GREEN_IN_BF16 | {name.replace("_in_", "."): verdict for name, verdict in changed.items()}
        return rows.judge(verdicts, what, candidate, dtype)

    assert state("fused") == GREEN
    assert state("fused", attention_in_bfloat16=RED) == "red: attention.bfloat16"
    assert state("fused", attention_in_float16=RED, fp8_in_bfloat16=RED, linear_training_in_bfloat16=RED) == GREEN
    assert state("fused in fp8", fp8_in_bfloat16=RED) == "red: fp8.bfloat16"
    assert state("fused in fp8") == "not run: fp8.bfloat16"
    assert state("fused in fp8 + CUDA graphs", fp8_in_bfloat16=GREEN, graphs_in_any=GREEN) == GREEN
    assert state("fused + CUDA graphs", graphs_in_any=RED) == "red: graphs.any"
    assert state("fused", linear_in_any=RED) == "red: linear.any"  # of tests in no dtype of their own
    assert state("fused", linear_in_any=NOT_RUN) == GREEN
    assert state("fused", dtype=torch.float16).startswith("not run: embedding.float16, ")
    assert state("fused", what="BertModel training step").startswith("not run: embedding_training.bfloat16, ")
    assert state("fused", what="DebertaV2Model forward", attention_in_bfloat16=RED) == (
        "not run: disentangled.bfloat16, deberta.bfloat16"
    )
    seen = {"disentangled_in_bfloat16": GREEN, "deberta_in_bfloat16": GREEN, "embedding_in_bfloat16": RED}
    assert state("fused", what="DebertaV2Model forward", **seen) == GREEN
    steps = state("fused", what="DebertaV2Model training step", **seen)
    assert steps.startswith("not run: linear_training.bfloat16, disentangled_training.bfloat16, deberta_")
    assert state("fused", what="operator disentangled_attention", **seen) == GREEN
    assert state("fused", what="ModernBertModel forward") == "not run: rotary.bfloat16, families.bfloat16"
    seen = {"rotary_in_bfloat16": GREEN, "families_in_bfloat16": GREEN, "embedding_in_bfloat16": RED}
    assert state("fused", what="ModernBertModel forward", **seen) == GREEN
    assert "families_training.bfloat16" in state("fused", what="ModernBertModel training step", **seen)
    assert state("stock", attention_in_bfloat16=RED) == GREEN
    assert state("fused", what="operator linear_gelu_backward", linear_training_in_bfloat16=RED).startswith("red: ")
    assert state("fused", what="operator linear_gelu", linear_training_in_bfloat16=RED) == GREEN
    assert state("fused", what="operator pack", padding_in_bfloat16=RED) == "red: padding.bfloat16"
    assert state("fused", what="cold start: first result", model_in_bfloat16=RED) == "red: model.bfloat16"


def test_every_operator_that_is_timed_has_its_tests() -> None:
    for file in (ROOT / "benchmarks").glob("bench_*.py"):
        for name in re.findall(r'compare\("(\w+)"', file.read_text()):
            (operation,) = rows.needed(f"operator {name}", "fused")
            assert (ROOT / "tests" / "kernels" / f"test_{operation.removesuffix('_training')}.py").is_file(), name
    for operation in (*rows.FORWARD, *rows.BACKWARD):
        files = {file.stem.removeprefix("test_") for file in (ROOT / "tests" / "kernels").glob("test_*.py")} | {"model"}
        assert operation.removesuffix("_training") in files


def record(candidate: str, samples: list[float]) -> dict[str, Any]:
    about = {**machine.environment(torch.device("cpu")), "date": "2026-01-01T00:00:00+00:00"}
    case = {"what": "BertModel forward", "workload": "squad b16", "size": "large", "shape": {}}
    case |= {"real_tokens": 10, "padded_tokens": 20}
    return records.make(about, case, candidate, BF16, samples, [4.0])


def test_no_time_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gates" not in record("fused", [2.0])
    monkeypatch.setenv(rows.VARIABLE, json.dumps(GREEN_IN_BF16 | {"fp8.bfloat16": RED}))
    assert (record("fused", [2.0])["gates"], record("fused", [2.0])["median_s"]) == (GREEN, 2.0)
    red = record("fused in fp8", [2.0])
    assert (red["gates"], red["median_s"], red["status"]) == (
        "red: fp8.bfloat16",
        None,
        "FAILED: its tests are red: fp8.bfloat16",
    )
    assert record("stock", [2.0])["gates"] == GREEN


def test_what_is_not_green_is_not_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row alone, where others of its run are; the whole run, where fused itself is not. An older run counts then."""
    monkeypatch.setenv(rows.VARIABLE, json.dumps({}))
    stock, fused, fp8 = (record(name, [2.0]) for name in ("stock", "fused", "fused in fp8"))
    assert fused["gates"].startswith("not run: ")
    older = [{**each, "date": "2025-01-01T00:00:00+00:00", "gates": GREEN} for each in (stock, fused)]
    assert records.proven([*older, stock, fused, fp8]) == older
    path = tmp_path / "records.json"
    records.write(path, [stock, fused, fp8])
    assert records.judge_again(path, GREEN_IN_BF16)
    assert not records.judge_again(path, GREEN_IN_BF16)
    now = records.load(path)
    assert [each["candidate"] for each in records.proven(now)] == ["stock", "fused"]
    table = report.readme(records.proven([*older, *now]))
    assert table.count("squad b16") == 1


@pytest.mark.usefixtures("tiny")
def test_the_bench_leaves_out_what_is_red_and_measures_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    green = {f"{operation}.float32": GREEN for operation in rows.FORWARD}
    monkeypatch.setenv(rows.VARIABLE, json.dumps(green | {"attention.float32": RED}))
    item = cases.workload("search", 2)
    found = list(bench.run([item], ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=3, minutes=1))
    assert [(each["candidate"], each["status"]) for each in found] == [
        ("stock", "ok"),
        ("fused", "FAILED: its tests are red: attention.float32"),
    ]
    assert found[0]["median_s"] is not None
    arguments = [
        "bench",
        "--size",
        "minilm",
        "--workload",
        "search",
        "--batch",
        "2",
        "--repeats",
        "3",
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0  # all that could be measured was


def copied(tmp_path: Path) -> Path:
    """A copy of the tree without its .git, as a machine that is lent gets it."""
    for name in ("fastbert", "kernels", "benchmarks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    return tmp_path


COMMITS = """
import os
from pathlib import Path
from fastbert.measure.machine import commit

print(by_sources := commit())
os.environ["FASTBERT_COMMIT"] = "abc1234"
print(commit())
del os.environ["FASTBERT_COMMIT"]
Path("benchmarks/commit.txt").write_text(f"def5678 {by_sources.rpartition('-')[2]}\\n")
print(commit())
with Path("kernels/linear.py").open("a") as file:
    file.write("# edited since\\n")
print(commit())
"""


def test_records_carry_the_commit_where_git_does_not_travel(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tree), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    environment.pop("FASTBERT_COMMIT", None)
    command = [sys.executable, "-c", COMMITS]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    by_sources, *others = done.stdout.split()
    assert re.fullmatch(r"v[\d.]+-[0-9a-f]{12}", by_sources)
    assert others == ["abc1234", "def5678", "def5678-dirty"]


def test_the_commit_is_noted_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NOTED", tmp_path / "commit.txt")
    found = machine.note_commit()
    assert (tmp_path / "commit.txt").read_text().split() == [found, machine.sources_hash()]
    assert found == machine.commit()
