"""Where the tests run: kernels on the GPU where there is one, else in Triton's interpreter, on the same tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Workers of pytest-xdist share the cores. Read as torch is imported, and by what tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
import torch

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# What kernels are tested in. The interpreter multiplies bfloat16 by its raw bits, so that one takes a GPU.
kernel_dtypes = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--data", type=Path, metavar="FOLDER", help="run the tests on data sets, too, which lie there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, or runs on one where there is one; `-m gpu` selects these")
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")
    config.addinivalue_line(
        "markers", "xdist_group(name): shares a costly fixture; one pytest-xdist worker runs them all"
    )
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import HealthCheck, Phase, settings

        # The same examples at every run, so that a red test is red again; with --slow others each time, and more.
        slow = config.getoption("--slow")
        settings.register_profile(
            "fastbert",
            max_examples=200 if slow else 20,
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
    unwanted = [item for item in items if item.get_closest_marker("slow")] if not config.getoption("--slow") else []
    if config.getoption("--data") is None:
        unwanted += [item for item in items if "data_folder" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Path:
    """Where the data sets lie; tests that ask for it run with --data alone."""
    folder: Path = request.config.getoption("--data")
    return folder.resolve()


@pytest.fixture
def device() -> str:
    """Where kernels run: "cuda", or "cpu" in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
