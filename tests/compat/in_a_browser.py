"""The page of `fastbert explain`, opened in a browser that pip brings: Qt's, which is Chromium, without a screen.

    python -m tests.compat.in_a_browser [-k EXPRESSION]

makes an environment of its own for it in build/compat, and runs the tests that open a page. Prints a table; exit status
1 where a test failed or was skipped, or none passed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter

from .environments import BROWSER, CACHE, ROOT, environment, own_python
from .matrix import Row, outcomes, render

TEST = "tests/fastbert/test_seeing.py"


def run(arguments: list[str]) -> Row:
    """Runs the tests, by that browser though another may be installed."""
    python = own_python(CACHE / "browser", BROWSER)
    report, log = CACHE / "browser.xml", CACHE / "browser.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", TEST, *arguments]
    start = time.monotonic()
    with log.open("w") as output:
        variables = environment(ROOT, FASTBERT_TEST_BROWSER=str(python))
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
    ends = outcomes(report) if report.exists() else Counter()
    status = done.returncode or int(ends["skipped"] > 0)
    version = BROWSER[-1].partition("==")[2]
    seconds = time.monotonic() - start
    return Row("qtwebengine", version, "explain", ends["passed"], ends["skipped"], ends["failed"], seconds, status, log)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-k", metavar="EXPRESSION", default="browser", help="of the tests those that pytest chooses by it"
    )
    chosen = parser.parse_args(arguments).k
    CACHE.mkdir(parents=True, exist_ok=True)
    return render(iter([run(["-k", chosen])]))


if __name__ == "__main__":
    sys.exit(main())
