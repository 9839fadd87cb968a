"""`fastbert info`: what would run here, and with which launch configurations."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from typing import Any

import torch

import fastbert

from .. import tuned
from ..kernels import launch
from ..runtime.support import DTYPES, gpu_is_unsuitable, triton_is_unsuitable
from . import UsageError

PACKAGES = ("torch", "triton", "transformers")


def default_device(name: str | None) -> torch.device:
    """The device a command was told, or the GPU where there is one, or the CPU.

    Raises:
        UsageError: torch knows no such device, or it isn't here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name}: expected cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def backend(device: torch.device) -> str:
    """What computes the operators for tensors on `device`."""
    if device.type == "cpu":
        return "reference (plain PyTorch)"
    if reason := gpu_is_unsuitable(device.index or 0):
        return f"none: forwards run stock: {reason}"
    return "Triton" if tuned.apply() is None else "Triton, tuned launch configurations"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that has no such line
        return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Installed versions by package; None where one is not installed."""
    found: dict[str, str | None] = {"fastbert": fastbert.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # which tells CUDA's builds apart, as a wheel's metadata may not
    return found


def driver(device: torch.device) -> str | None:
    """The GPU driver's version, as nvidia-smi or torch's HIP build tells it; None on a CPU, or where neither does."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split("\n")[0].strip() or None


def launch_table(device: torch.device) -> list[dict[str, Any]]:
    """The configuration of every tiled kernel at BERT-large's and MiniLM's shapes, in each dtype, on `device`."""
    arch = launch.architecture(device)
    rows = []
    for dtype in DTYPES:
        for head_dim in (32, 64):
            rows.append(("attention", f"head_dim {head_dim}", dtype, launch.attention_config(arch, dtype, head_dim)))
        for width, wide in ((384, 1536), (1024, 4096)):
            for n, k in ((width, width), (wide, width), (width, wide)):
                for m in (128, launch.MANY_ROWS):
                    config = launch.linear_config(arch, dtype, n, k, rows=m)
                    rows.append(("linear", f"m {m}, n {n}, k {k}", dtype, config))
            rows.append(("layer_norm", f"width {width}", dtype, launch.row_config(dtype, width)))
    return [
        {"kernel": kernel, "shape": shape, "dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(config)}
        for kernel, shape, dtype, config in rows
    ]


def configurations(device: torch.device) -> str:
    """Which launch configurations are in use on `device`, and what they were measured on."""
    arch = launch.architecture(device)
    shipped = f"shipped for {arch}, " + (
        f"measured on {launch.MEASURED[arch]}" if arch in launch.MEASURED else "not measured"
    )
    found = tuned.apply() if device.type == "cuda" and triton_is_unsuitable() is None else None
    if found is None:
        return shipped
    file, entries = found
    return f"{len(entries)} tuned on this GPU, of {file}; else {shipped}"


def collect() -> dict[str, Any]:
    """Everything `fastbert info` prints."""
    device = default_device(None)
    return {
        "device": str(device),
        "name": device_name(device),
        "backend": backend(device),
        "threads": torch.get_num_threads(),
        "driver": driver(device),
        "versions": versions(),
        "architecture": launch.architecture(device),
        "configurations": configurations(device),
        "launch_table": launch_table(device),
    }


def main(arguments: argparse.Namespace) -> int:
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    table = found.pop("launch_table")
    found["versions"] = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    for key, value in found.items():
        print(f"{key + ':':<16}{'none' if value is None else value}")
    print(f"\nlaunch table, {found['architecture']}:")
    for row in [dict(zip(table[0], table[0], strict=True)), *table]:
        cells = list(map(str, row.values()))
        print(f"  {cells[0]:<12}{cells[1]:<24}{cells[2]:<10}" + "".join(cell.rjust(14) for cell in cells[3:]))
    return 0
