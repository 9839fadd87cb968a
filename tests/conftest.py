"""Where the tests run: kernels on the GPU where there is one, else in Triton's interpreter, on the same tests."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Workers of pytest-xdist share the cores. Read as torch is imported, and by what tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
import torch

from tests import gates, interpreter, quick

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# What kernels are tested in. The interpreter multiplies bfloat16 by its raw bits, so that one takes a GPU.
kernel_dtypes = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# Of parameters that cross no edge that others don't: in the interpreter a launch takes seconds.
thorough = () if torch.cuda.is_available() else pytest.mark.slow


def in_turn(*cases: Any, dtypes: tuple[Any, ...] = (torch.float32, torch.float16)) -> list[Any]:
    """(*case, dtype) for each case and dtype; interpreted, without --slow, each case is run in one of them, in turn."""
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        for j, dtype in enumerate(dtypes):
            found.append(pytest.param(*values, dtype, marks=() if i % len(dtypes) == j else thorough))
        found.append(pytest.param(*values, torch.bfloat16, marks=pytest.mark.gpu))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="run the tests of what has changed, few of each; see quick.py"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--data", type=Path, metavar="FOLDER", help="run the tests on data sets, too, which lie there")
    gates.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, or runs on one where there is one; `-m gpu` selects these")
    config.addinivalue_line("markers", "slow: takes minutes, or tries once more what others do; runs only with --slow")
    config.addinivalue_line(
        "markers", "gates(*names): what it covers, where its file and dtype don't tell; see gates.py"
    )
    if config.getoption("--gates") is not None:
        config.pluginmanager.register(gates.Gates(config), "gates")
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import HealthCheck, Phase, settings

        # The same examples at every run, so that a red test is red again; with --slow others each time, and more.
        slow, few = config.getoption("--slow"), config.getoption("--quick")
        settings.register_profile(
            "fastbert",
            max_examples=200 if slow else 4 if few else 20,
            derandomize=not slow,
            phases=set(Phase) if slow else (Phase.explicit, Phase.generate),  # to shrink an example takes minutes
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        settings.load_profile("fastbert")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One for each core this process may use; past eight their memory costs more than they save."""
    return min(8, len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    for item in items:
        if has_gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
    unwanted = {item for item in items if item.get_closest_marker("slow")} if not config.getoption("--slow") else set()
    if config.getoption("--data") is None:
        unwanted |= {item for item in items if "data_folder" in getattr(item, "fixturenames", ())}
    kept = [item for item in items if item not in unwanted]
    if config.getoption("--quick"):
        kept = quick.select(kept)
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    # The longest first, so that workers end together: to compile takes a minute, in processes of its own.
    items[:] = sorted(kept, key=lambda item: item.path.name != "test_aot.py")


def pytest_collection_finish() -> None:
    """What is imported by now stays: else each collection of garbage looks through all of it, for a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_cold_in_a_quick_run(request: pytest.FixtureRequest) -> Iterator[None]:
    with quick.nothing_cold() if request.config.getoption("--quick") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_of_tests() -> Iterator[None]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
    with interpreter.patched() if interpreted else contextlib.nullcontext():
        yield


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Path:
    """Where the data sets lie; tests that ask for it run with --data alone."""
    folder: Path = request.config.getoption("--data")
    return folder.resolve()


@pytest.fixture
def device() -> str:
    """Where kernels run: "cuda", or "cpu" in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
