"""`make compat` and `make hf-suite` tell right from wrong; and the package supports what they try."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from setuptools.config.pyprojecttoml import read_configuration

import fastbert
import fastbert.runtime.settings
from fastbert.version import TRIED
from tests import models
from tests.compat import hf_plugin, hf_suite, matrix
from tests.compat.environments import ROOT

STOCK = {
    "outcomes": {"test_a": "passed", "test_b": "skipped", "test_c": "failed"},
    "why": {"test_b": "no GPU", "test_c": "no network"},
    "forwards": {},
    "fused_tests": [],
}
FUSED = {
    **STOCK,
    "forwards": {"fused, gradients: packed": 2, "fused, no gradients: dense": 1, "stock, gradients: x": 1},
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FUSED), **changes}


def test_the_same_outcomes_are_no_difference() -> None:
    assert hf_suite.differences(STOCK, FUSED) == []


@pytest.mark.parametrize(
    ("test", "now"), [("test_a", "failed"), ("test_a", "skipped"), ("test_b", "passed"), ("test_c", "passed")]
)
def test_another_outcome_is_a_difference_and_says_why(test: str, now: str) -> None:
    outcomes = {**FUSED["outcomes"], "test_d": "passed", test: now}
    wrong = hf_suite.differences(STOCK, changed(outcomes=outcomes, why={test: "AssertionError: 1 != 2"}))
    assert wrong == [
        f"{test}: {STOCK['outcomes'][test]} stock, {now} fused (AssertionError: 1 != 2)",
        "test_d: missing stock, passed fused ()",
    ]


def test_a_test_that_is_gone_is_a_difference() -> None:
    outcomes = {key: value for key, value in FUSED["outcomes"].items() if key != "test_c"}
    assert hf_suite.differences(STOCK, changed(outcomes=outcomes)) == [
        "test_c: failed stock, missing fused (no network)"
    ]


def test_fallbacks_alone_are_wrong() -> None:
    stock_only = changed(forwards={"stock, gradients: x": 5, "fused, no gradients: packed": 1})
    assert hf_suite.never_fused(FUSED, "bert") == []
    assert hf_suite.never_fused(stock_only, "bert") == ["no forward ran fused with gradients"]
    assert hf_suite.never_fused(stock_only, "mpnet") == []  # fused in inference alone
    assert hf_suite.never_fused(changed(forwards={}), "mpnet") == ["no forward ran fused with no gradients"]


def test_nothing_passed_is_wrong() -> None:
    skipped = dict.fromkeys(FUSED["outcomes"], "skipped")
    assert hf_suite.differences({**STOCK, "outcomes": skipped}, changed(outcomes=skipped)) == ["no test passed"]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("failed", 1)])
def test_the_exit_status_of_the_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: str, status: int
) -> None:
    after = changed(outcomes={**FUSED["outcomes"], "test_a": outcome})
    monkeypatch.setattr(hf_suite, "prepare", lambda version: ())
    monkeypatch.setattr(hf_suite, "run", lambda version, family, fused, only: after if fused else STOCK)
    assert hf_suite.main(["--transformers", "5.17.0", "5.4.0", "--family", "bert"]) == status
    printed = capsys.readouterr().out
    assert "       4 fused, gradients: packed" in printed  # summed over both versions
    assert ("5.4.0 bert: test_a: passed stock, failed fused" in printed) == bool(status)


def test_what_the_distribution_leaves_out_is_filled_in(tmp_path: Path) -> None:
    (tmp_path / "there.py").write_text("x = 1\n")
    hf_suite.fill_in(tmp_path, "import os\nfrom .there import x\nfrom .gone.deep import A, B\nfrom torch import nn\n")
    assert (tmp_path / "there.py").read_text() == "x = 1\n"
    assert (tmp_path / "gone" / "deep.py").read_text() == "class A:\n    pass\nclass B:\n    pass\n"


def test_a_test_counts_as_its_worst_phase(tmp_path: Path) -> None:
    recorder = hf_plugin.Recorder(tmp_path / "record.json")
    for name, outcome in [("a", "passed"), ("a", "passed"), ("b", "skipped"), ("b", "passed"), ("c", "failed")]:
        text = {"longrepr": ("file", 1, "Skipped: no"), "longreprtext": "x\nE  AssertionError: 1 != 2"}
        text |= {} if outcome == "skipped" else {"longrepr": None}
        recorder.pytest_runtest_logreport(SimpleNamespace(nodeid=f"f.py::T::{name}", outcome=outcome, **text))
    assert recorder.outcomes == {"a": "passed", "b": "skipped", "c": "failed"}
    assert recorder.why == {"b": "Skipped: no", "c": "E  AssertionError: 1 != 2"}


def test_the_plugin_fuses_what_is_built_once_and_counts_its_forwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Whole(models.hf.BertForMaskedLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.was_fused = fastbert.explain(self).encoders[0].fused

    fused = []
    monkeypatch.setattr(fastbert, "fuse", lambda model, fuse=fastbert.fuse: fused.append(type(model)) or fuse(model))
    monkeypatch.setattr(
        fastbert.runtime.settings.Counts, "add", fastbert.runtime.settings.Counts.add
    )  # put back afterwards
    monkeypatch.setattr(models.hf.BertModel, "__init__", models.hf.BertModel.__init__)
    hf_plugin.fuse_when_built(Whole)
    hf_plugin.fuse_when_built(models.hf.BertModel)
    model = Whole(models.config()).eval()
    assert not model.was_fused
    assert fused == [Whole]
    recorder = hf_plugin.Recorder(tmp_path / "record.json")
    hf_plugin.count_forwards(recorder)
    recorder.running = "test_x"
    model(models.ids(2, 5))
    with torch.inference_mode():
        model(models.ids(2, 5), attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))
        model(models.ids(2, 5), output_attentions=True)
    assert recorder.forwards == {
        "fused, gradients: dense": 1,
        "fused, no gradients: packed": 1,
        "stock, no gradients: output_attentions, of which 'sdpa' attention gives none": 1,
    }
    assert recorder.fused_tests == {"test_x"}


REPORT = """<testsuites><testsuite>
<testcase name="a" /><testcase name="b"><skipped /></testcase>
<testcase name="c"><failure /></testcase><testcase name="d"><error /></testcase><testcase name="e" />
</testsuite></testsuites>"""


def test_outcomes_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert matrix.outcomes(tmp_path / "report.xml") == Counter(passed=2, skipped=1, failed=2)


@pytest.mark.parametrize(
    ("passed", "failed", "code", "status"), [(3, 0, 0, 0), (3, 1, 1, 1), (0, 0, 5, 1), (0, 0, 0, 1), (3, 0, 3, 1)]
)
def test_the_exit_status_of_the_matrix(
    capsys: pytest.CaptureFixture[str], passed: int, failed: int, code: int, status: int
) -> None:
    row = matrix.Row("triton", "3.6.0", "interpreter", passed, 2, failed, 1.5, code, Path("some.log"))
    assert matrix.render(iter([row])) == status
    printed = capsys.readouterr().out
    assert f"| triton | 3.6.0 | interpreter | {passed} | 2 | {failed} | 2 |" in printed
    assert ("see some.log" in printed) == bool(status)


def test_what_the_matrix_runs_exists() -> None:
    for runs in matrix.TESTS.values():
        for arguments in runs.values():
            for argument in arguments:
                assert (ROOT / argument.removeprefix("--ignore=")).exists(), argument


def test_the_package_takes_the_oldest_tried_and_refuses_nothing_newer() -> None:
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    supported = {r.name: r.specifier for r in map(Requirement, wanted)}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name, versions in TRIED.items():
        oldest, *_, newest = map(Version, versions)
        least, below = f">={oldest.major}.{oldest.minor}", f"<{newest.major}.{newest.minor + 1}"
        # A bound above would have pip replace a user's newer torch, and refuse a transformers for its number alone.
        # triton is the tests' own: users have that of their torch.
        assert supported[name] == SpecifierSet(f"{least},{below}" if name == "triton" else least)
        assert any(f"{name}=={version}" in pinned for version in versions), f"{name}: the reference is not tried"
