"""The benchmark suites, whole, at a reduced size: everything runs, and is checked before it is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# On a CPU as its users run it, not in the interpreter.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(arguments: str, *paths: str) -> None:
    command = [sys.executable, "-m", *arguments.split(), *paths]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    run(f"pytest benchmarks -q --size minilm --workload mixed --dtype {dtype}", f"--benchmark-json={file}")
    found = json.loads(file.read_text())["benchmarks"]
    groups = {one["group"].split(",")[0] for one in found}
    assert len(found) == 2 * len(groups) >= 26
    for one in found:
        assert one["stats"]["median"] > 0
        assert one["extra_info"]["bytes"] > 0
        assert (one["extra_info"]["flops"] > 0) == one["group"].startswith(("linear", "attention", "qkv"))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["", "--train"])
def test_models(step: str, tmp_path: Path) -> None:
    peers = "eager" if step else "all"  # compiling a training step for a CPU takes minutes
    arguments = f"--size minilm --repeats 3 --workload mixed single --peers {peers} {step} --output"
    run(f"fastbert.cli bench {arguments}", str(tmp_path))
    (file,) = tmp_path.rglob("*.json")
    records = json.loads(file.read_text())
    timed = {(record["workload"], record["candidate"]) for record in records if record["status"] == "ok"}
    ways = ["stock", "fused", "stock eager"] + ([] if step else ["stock + torch.compile", "ONNX Runtime", "OpenVINO"])
    assert timed >= {(workload, way) for workload in ("mixed b32", "single b1") for way in ways}
