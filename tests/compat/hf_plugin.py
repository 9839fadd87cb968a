"""The pytest plugin of hf_suite.py: fuses every model as it is built, and records what became of each test."""

from __future__ import annotations

import functools
import importlib
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

import fastbert
import fastbert.runtime.settings
from fastbert.fuse import FAMILIES, code_of

# From best to worst: a test whose phases or subtests end differently counts as the worst of them.
OUTCOMES = ("passed", "skipped", "failed")


class Recorder:
    """What one run did; written as JSON at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.why: dict[str, str] = {}
        """Of every test that failed, or was skipped: the last line that says why."""
        self.forwards: Counter[str] = Counter()
        """Forwards of encoders, by way, layout or reason, and whether gradients were on."""
        self.fused_tests: set[str] = set()
        """Tests in which at least one forward ran fused."""
        self.running = ""

    def count(self, way: str, key: str) -> None:
        gradients = "gradients" if torch.is_grad_enabled() else "no gradients"
        self.forwards[f"{way}, {gradients}: {key}"] += 1
        if way == "fused":
            self.fused_tests.add(self.running)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.running = item.name
        # Weights are drawn, and some inputs: the same ones, stock and fused.
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::")[-1]
        before = self.outcomes.get(name, "passed")
        self.outcomes[name] = max(before, report.outcome, key=OUTCOMES.index)
        if report.outcome != "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext.splitlines()[-1]
            self.why[name] = reason

    def pytest_sessionfinish(self) -> None:
        written = {
            "outcomes": self.outcomes,
            "why": self.why,
            "forwards": self.forwards,
            "fused_tests": sorted(self.fused_tests),
        }
        self.path.write_text(json.dumps(written, indent=1), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="the JSON file to write")
    parser.addoption("--fuse", choices=FAMILIES, help="the family of which every model is fused as it is built")


def pytest_configure(config: pytest.Config) -> None:
    recorder = Recorder(config.getoption("--record"))
    config.pluginmanager.register(recorder)
    if family := config.getoption("--fuse"):
        module = importlib.import_module(code_of(family))
        importlib.import_module(f"fastbert.models.{family}")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.__module__ == module.__name__:
                fuse_when_built(kind)
        count_forwards(recorder)


building = threading.local()


def fuse_when_built(kind: Any) -> None:
    """Makes constructing a `kind` end in `fastbert.fuse`: once, of the whole model, not of the encoder inside one."""
    stock = kind.__init__

    @functools.wraps(stock)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        building.depth = getattr(building, "depth", 0) + 1
        try:
            stock(self, *args, **kwargs)
        finally:
            building.depth -= 1
        if not building.depth:
            try:
                fastbert.fuse(self)
            except fastbert.UnsupportedModelError as refused:
                print(refused)

    if "__init__" in vars(kind):  # else it is a parent's, which is wrapped
        kind.__init__ = build


def count_forwards(recorder: Recorder) -> None:
    """Has every count that fastbert takes of a forward taken by `recorder`, too."""
    add = fastbert.runtime.settings.Counts.add

    def count(self: Any, which: Counter[str], key: str) -> None:
        add(self, which, key)
        if not torch.compiler.is_compiling():
            recorder.count("fused" if which is self.fused else "stock", key)

    fastbert.runtime.settings.Counts.add = count  # type: ignore[method-assign]
