"""Launches by what is known of earlier ones; in a process of their own, with kernels compiled, not interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_launches() -> None:
    checks = re.findall(r"^def check_(\w+)", (ROOT / "tests/kernels/launches.py").read_text(), re.M)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launches", *checks]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == checks and done.returncode == 0, done.stderr


def test_a_kernels_place_in_the_cache_does_not_hang_on_what_was_compiled_before() -> None:
    """Or kernels compiled ahead, and those of an earlier process, are compiled again."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cache_keys"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.endswith(" ok")] == []
