"""The versions of dependencies in fastbert/version.py, tried: the oldest of each, the reference and the newest.

    python -m tests.compat.matrix [--only triton transformers] [--versions 3.6.0 ...]

runs the tests that a dependency bears on, under each of its versions, everything else as it is in this environment.
Prints a table; exit status 1 where a test failed or none passed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from fastbert.version import TRIED

from .environments import CACHE, ROOT, environment, overlay

# Of a dependency: what is run, by name, as pytest is told.
TESTS = {
    "triton": {
        "interpreter": ("tests/kernels", "--ignore=tests/kernels/test_aot.py"),
        "ahead of time": ("tests/kernels/test_aot.py",),
    },
    "transformers": {
        "models": tuple(
            f"tests/fastbert/test_{name}.py" for name in ("convert", "encoder", "families", "fuse", "models", "verify")
        ),
        "training": ("tests/fastbert/test_training.py", "tests/fastbert/test_training_stacks.py"),
        "pipelines": ("tests/fastbert/test_pipelines.py",),
    },
}

# What else has to be of another version.
BESIDE = {("triton", "3.6.0"): ("numpy<2.4",)}  # whose interpreter reads numpy's arrays as 2.4 no longer lets it


class Row(NamedTuple):
    """One run of pytest."""

    package: str
    version: str
    tests: str
    passed: int
    skipped: int
    failed: int
    seconds: float
    status: int
    log: Path


def outcomes(report: Path) -> Counter[str]:
    """How many tests of pytest's XML report passed, were skipped and failed."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def run(package: str, version: str, tests: str) -> Row:
    """Runs the tests of that name with that version of a package laid over this environment."""
    beside = BESIDE.get((package, version), ())
    installed = importlib.metadata.version(package) == version
    folders = [] if installed else [overlay(f"{package}=={version}", *beside)]
    name = f"{package}-{version}-{tests.replace(' ', '-')}"
    report, log = CACHE / f"{name}.xml", CACHE / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS[package][tests]]
    start = time.monotonic()
    with log.open("w") as output:
        output.write(f"{package} {seen(package, folders)}\n")
        output.flush()
        done = subprocess.run(
            command, cwd=ROOT, env=environment(ROOT, *folders), stdout=output, stderr=subprocess.STDOUT
        )
    ends = outcomes(report) if report.exists() else Counter()
    seconds = time.monotonic() - start
    return Row(package, version, tests, ends["passed"], ends["skipped"], ends["failed"], seconds, done.returncode, log)


def seen(package: str, folders: list[Path]) -> str:
    """The version that a process with `folders` on its path imports."""
    code = f"import {package}; print({package}.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(ROOT, *folders), capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


def render(rows: Iterator[Row]) -> int:
    """Prints a line a row as it comes; returns the exit status."""
    print("| package | version | tests | passed | skipped | failed | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    status = 0
    for row in rows:
        cells = (row.package, row.version, row.tests, row.passed, row.skipped, row.failed, f"{row.seconds:.0f}")
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if row.status or row.failed or not row.passed:
            print(f"  see {row.log}", flush=True)
            status = 1
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=TESTS, choices=TESTS, metavar="PACKAGE")
    parser.add_argument(
        "--versions", nargs="+", metavar="VERSION", help="of those packages; default: all that are tried"
    )
    options = parser.parse_args(arguments)
    CACHE.mkdir(parents=True, exist_ok=True)
    return render(
        run(package, version, tests)
        for package in options.only
        for version in options.versions or TRIED[package]
        for tests in TESTS[package]
    )


if __name__ == "__main__":
    sys.exit(main())
