"""What TensorFlow itself has written, converted.

    python -m tests.compat.from_tensorflow [-k EXPRESSION]

lays TensorFlow over this environment, has transformers 4 write files in an environment of its own, and runs the tests
of `fastbert convert`. Prints a table; exit status 1 where a test failed or was skipped, or none passed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from .environments import CACHE, ROOT, TENSORFLOW, TRANSFORMERS_4, environment, overlay, own_python
from .matrix import Row, outcomes, render

TESTS = ("tests/fastbert/test_convert.py", "tests/fastbert/test_convert_tensorflow.py")
WRITTEN = CACHE / "tf4"


def write() -> None:
    """Has transformers 4 write its files, once."""
    partial = WRITTEN.with_name("tf4.partial")
    if WRITTEN.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    script = Path(__file__).with_name("tf4_files.py")
    variables = {"TF_USE_LEGACY_KERAS": "1", "USE_TORCH": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    python = own_python(CACHE / "transformers4", TRANSFORMERS_4)
    subprocess.run([str(python), str(script), str(partial)], env=environment(**variables), check=True)
    partial.rename(WRITTEN)


def run(arguments: list[str]) -> Row:
    """Runs the tests, the slow ones too."""
    folder = overlay(*TENSORFLOW)
    report, log = CACHE / "tensorflow.xml", CACHE / "tensorflow.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--slow", f"--junitxml={report}", *TESTS, *arguments]
    start = time.monotonic()
    with log.open("w") as output:
        variables = environment(ROOT, folder)
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
    ends = outcomes(report) if report.exists() else Counter()
    status = done.returncode or int(ends["skipped"] > 0)
    version = TENSORFLOW[0].partition("==")[2]
    seconds = time.monotonic() - start
    return Row("tensorflow", version, "convert", ends["passed"], ends["skipped"], ends["failed"], seconds, status, log)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="EXPRESSION", help="of the tests those that pytest chooses by it")
    chosen = parser.parse_args(arguments).k
    CACHE.mkdir(parents=True, exist_ok=True)
    write()
    return render(iter([run(["-k", chosen] if chosen else [])]))


if __name__ == "__main__":
    sys.exit(main())
