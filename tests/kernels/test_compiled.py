"""Launches by what is known of earlier ones; in a process of their own, with kernels compiled, not interpreted."""

from __future__ import annotations

import re
from pathlib import Path

from tests import fresh

ROOT = Path(__file__).resolve().parents[2]


def test_launches() -> None:
    checks = re.findall(r"^def check_(\w+)", (ROOT / "tests/kernels/launches.py").read_text(), re.M)
    done = fresh.run("-m", "tests.kernels.launches", *checks)
    assert done.stdout.split() == checks and done.returncode == 0, done.stderr


def test_a_kernels_place_in_the_cache_does_not_hang_on_what_was_compiled_before() -> None:
    """Or kernels compiled ahead, and those of an earlier process, are compiled again."""
    done = fresh.run("-m", "tests.kernels.cache_keys")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.endswith(" ok")] == []
