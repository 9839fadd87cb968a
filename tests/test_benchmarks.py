"""The benchmark suites, whole, at a reduced size: everything runs, and is checked before it is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.cli.__main__ import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
# On a CPU as its users run it, not in the interpreter.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, seconds: int = 900) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    run(
        "pytest",
        "benchmarks",
        "-q",
        "--size",
        "minilm",
        "--dtype",
        dtype,
        "--workload",
        "mixed",
        f"--benchmark-json={file}",
    )
    found = json.loads(file.read_text())["benchmarks"]
    groups = {one["group"].split(",")[0] for one in found}
    assert len(found) == 2 * len(groups) >= 26
    assert all(one["stats"]["median"] > 0 and one["extra_info"]["bytes"] > 0 for one in found)
    assert all(
        one["extra_info"]["flops"] > 0 for one in found if one["group"].startswith(("linear", "attention", "qkv"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_models(train: bool, tmp_path: Path) -> None:
    arguments = [
        "--size",
        "minilm",
        "--repeats",
        "3",
        "--dtype",
        "float32",
        "--peers",
        "all",
        "--output",
        str(tmp_path),
    ]
    run("fastbert.cli", "bench", *arguments, *(["--train"] if train else []))
    (file,) = tmp_path.rglob("*.json")
    records = json.loads(file.read_text())
    assert len({record["workload"] for record in records}) == len(WORKLOADS)
    assert {record["candidate"] for record in records if record["status"] == "ok"} >= {
        "stock",
        "fused",
        "stock eager",
        "stock + torch.compile",
    } | (set() if train else {"ONNX Runtime", "OpenVINO"})
