"""A plugin of pytest: notes what tests cover and how they end, goes on where they stopped, leaves a broken device.

    python -m pytest -m gpu --gates FILE [--covering '*.bfloat16'] [-n 8] tests

What a test covers is an operation in a dtype (benchmarks/gates.py), told by the test itself: the operation by its
file, "linear" of test_linear.py, with "_training" where its name speaks of gradients; the dtype by its parameter
`dtype`, else "any". A marker says otherwise: `@pytest.mark.gates("linear.float32")`.

Tests that passed by the sources they have are left out; those that failed come last, so that one which ends its process
again is no obstacle to the others. Under pytest-xdist the process that hands tests out writes, crashes of others too.

After each test the device is waited for: what a kernel did wrong is that test's failure, and a device that has failed
for good fails no other test: its process ends, and pytest-xdist starts another.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gates

SUITE = "tests"
# Where the name of the file is not that of the operation.
OPERATIONS = {"tests/fastbert/test_encoder.py": "model", "tests/kernels/test_properties.py": "properties"}
OF_GRADIENTS = re.compile("training|backward|gradient|derivative|grad_?check")
BROKEN = 70
"""The exit status of a process whose device has failed."""


class DeviceFailed(Exception):
    """The device is of no more use to this process."""


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--gates", type=Path, metavar="FILE", help="note outcomes there, and leave out what passed")
    parser.addoption(
        "--covering", action="append", metavar="PATTERN", help="of gates, as 'linear.*': run the tests of these alone"
    )


def covered(item: pytest.Item) -> list[str]:
    """The gates of a test."""
    marker = item.get_closest_marker("gates")
    if marker is not None:
        return sorted(marker.args)
    file, _, rest = item.nodeid.partition("::")
    operation = OPERATIONS.get(file, Path(file).stem.removeprefix("test_"))
    name = rest.partition("[")[0]
    dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
    kind = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else "any"
    return [f"{operation}{'_training' if OF_GRADIENTS.search(name) else ''}.{kind}"]


def device_failure() -> str | None:
    """Why the device can't be used by this process any more; None where it can, or was not used."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


class Gates:
    """What is noted in one file; where tests are handed out, and where they run."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--gates")
        self.log = gates.Log(self.path, SUITE)
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        self.known: dict[str, dict[str, Any]] = {}
        self.broken = False
        self.outcomes: dict[str, tuple[str, float]] = {}
        # As they were at the start: a worker that replaces another has to collect the same tests as the others.
        if self.worker is None:
            self.passed, self.failed = (gates.outcomes(self.path, outcome) for outcome in ("passed", "failed"))
        else:
            self.passed, self.failed = (set(self.worker[f"gates {outcome}"]) for outcome in ("passed", "failed"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["gates passed"] = sorted(self.passed)
        node.workerinput["gates failed"] = sorted(self.failed)

    @pytest.hookimpl(trylast=True)  # what is selected by other means
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        found = {item.nodeid: covered(item) for item in items}
        patterns = config.getoption("--covering")
        wanted = [
            item
            for item in items
            if patterns is None or any(fnmatch.fnmatch(gate, p) for gate in found[item.nodeid] for p in patterns)
        ]
        if self.worker is None or self.worker["workerid"] == "gw0":
            self.log.plan({item.nodeid: found[item.nodeid] for item in wanted})
        kept = [item for item in wanted if item.nodeid not in self.passed]
        kept.sort(key=lambda item: item.nodeid in self.failed)
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            if failure := device_failure():
                self.broken = True
                raise DeviceFailed(failure)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.worker is not None:
            return  # by the process that hands tests out
        outcome, seconds = self.outcomes.get(report.nodeid, (gates.PASSED, 0.0))
        seconds += report.duration
        if report.failed:
            outcome = gates.FAILED
        elif report.skipped and outcome == gates.PASSED:  # a failure that is expected proves nothing, either
            outcome = gates.SKIPPED
        self.outcomes[report.nodeid] = outcome, seconds
        if report.when not in ("setup", "call"):  # "teardown", or "???" of one whose process ended
            if report.nodeid not in self.known:
                self.known = gates.read(self.path)
            self.log.note(report.nodeid, outcome, gates=self.known[report.nodeid]["gates"], seconds=seconds)

    @pytest.hookimpl(trylast=True)  # after it was told
    def pytest_runtest_logfinish(self) -> None:
        if self.broken and self.worker is not None:
            os._exit(BROKEN)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if self.broken:
            item.session.shouldstop = "the device has failed; the same command goes on with the other tests"
        return result

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK  # all passed before
