"""Where the tests run: kernels on the GPU where there is one, else in Triton's interpreter, on the same tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Workers of pytest-xdist share the cores. Read as torch is imported, and by what tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import numpy as np
import pytest
import torch

from tests import gates, quick

# Before anything imports triton, which reads it once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# What kernels are tested in. The interpreter multiplies bfloat16 by its raw bits, so that one takes a GPU.
kernel_dtypes = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="run the tests of what has changed, few of each; see quick.py"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--data", type=Path, metavar="FOLDER", help="run the tests on data sets, too, which lie there")
    gates.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, or runs on one where there is one; `-m gpu` selects these")
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")
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
    unwanted = [item for item in items if item.get_closest_marker("slow")] if not config.getoption("--slow") else []
    if config.getoption("--data") is None:
        unwanted += [item for item in items if "data_folder" in getattr(item, "fixturenames", ())]
    kept = [item for item in items if item not in unwanted]
    if config.getoption("--quick"):
        kept = quick.select(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def nothing_cold_in_a_quick_run(request: pytest.FixtureRequest) -> Iterator[None]:
    with quick.nothing_cold() if request.config.getoption("--quick") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def matmuls_rounded_once() -> Iterator[None]:
    """The interpreter's matmuls, summed in float64: NumPy's are as exact as the BLAS of this CPU.

    Without AVX-512 they have up to 1.6 times the error of torch's, which sets the bound; a kernel is judged, not they.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        x, y, z = (operand.data for operand in (a, b, accumulator))
        if not all(np.issubdtype(operand.dtype, np.floating) for operand in (x, y, z)):
            return plain(self, a, b, accumulator, *options)  # bits of FP8 numbers or of bfloat16, or integers
        total = np.matmul(x.astype(np.float64), y.astype(np.float64)) + z
        return interpreter.TensorHandle(total.astype(z.dtype), accumulator.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
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
