"""NVIDIA's compute-sanitizer over the kernels' tests: reads and writes out of bounds, on the device.

    python benchmarks/sanitize.py [TEST ...]

Without the tool on PATH, or without a GPU, it says so and ends with status 0. torch's cache of memory is off, so that
every tensor is an allocation of its own and the tool sees past each of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FAULT = 86
"""Exit status where the tool found something."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=["tests/kernels/test_properties.py"], metavar="TEST", help="files")
    given = parser.parse_args(argv)
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        print(f"not run: {'compute-sanitizer is not on PATH' if tool is None else 'there is no GPU'}")
        return 0
    watched = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", str(FAULT)]
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", *given.tests]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run([*watched, *tests], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
