"""What would run on a device, and with which launch configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import tuned
from ..checkpoints import default_device
from ..kernels import cpu_int8, launch
from ..runtime.support import DTYPES, fp8_is_unsupported, int8_is_unsupported, triton_is_unsuitable
from .machine import backend, device_name, driver, versions


def launch_table(device: torch.device) -> list[dict[str, object]]:
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


def eight_bits(device: torch.device) -> dict[str, str]:
    """How FP8 and int8 run on `device`, or why they don't."""
    found = {}
    for name, why in (("fp8", fp8_is_unsupported(device)), ("int8", int8_is_unsupported(device))):
        found[name] = "as Triton kernels" if why is None else f"no: {why}"
    if device.type == "cpu":
        library = {"onednn": "oneDNN", "fbgemm": "FBGEMM", None: "no library, in float64"}[cpu_int8.engine()]
        found = {"fp8": "simulated", "int8": f"by {library}, weights to {cpu_int8.weight_limit()}"}
    return found


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
        **eight_bits(device),
        "launch_table": launch_table(device),
    }
