"""What a machine is and what it can do: its name and versions, time, memory, and the rates it reaches at best."""

from __future__ import annotations

import ctypes
import datetime
import gc
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import tuned
from ..runtime.support import gpu_is_unsuitable
from ..version import VERSION
from .counts import Cost

# Of matmuls in bfloat16 and float16, without sparsity, by the name torch gives the GPU; FLOPs a second.
# From NVIDIA's datasheets of the H100 (SXM5), H200, A100, L40S and B200.
DATASHEET = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA B200": 2250e12,
}

PACKAGE = Path(__file__).resolve().parent.parent
NOTED = PACKAGE.parent / "benchmarks" / "commit.txt"
"""The commit of a tree that was copied without its .git, and the hash of its sources."""


class Rates(NamedTuple):
    """What a machine does at best in one dtype, measured."""

    flops_per_s: float
    bytes_per_s: float

    def floor(self, cost: Cost) -> float:
        """The least time a cost takes, in seconds."""
        return max(cost.flops / self.flops_per_s, cost.bytes / self.bytes_per_s)


def datasheet(name: str, dtype: torch.dtype) -> float | None:
    """FLOPs a second by the GPU's datasheet, of which MFU is a fraction; None where the table has none."""
    return DATASHEET.get(name) if dtype.itemsize == 2 else None


class Machine:
    """What `device` can do at best, measured: the rates of the roofline."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._matmul_rates: dict[torch.dtype, float] = {}
        source = torch.ones((1 << 28) // 4, device=device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(5))

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Of a square matmul; on a CPU that is slower in 16-bit dtypes than in float32, float32's rate."""
        if dtype not in self._matmul_rates:
            n = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            rate = 2 * n**3 / min(timed(lambda: a @ b, self.device) for _ in range(3))
            if self.device.type == "cpu" and dtype != torch.float32:
                rate = max(rate, self.flops_per_s(torch.float32))
            self._matmul_rates[dtype] = rate
        return self._matmul_rates[dtype]

    def rates(self, dtype: torch.dtype) -> Rates:
        """Of matmuls in `dtype`, and of copying."""
        return Rates(self.flops_per_s(dtype), self.bytes_per_s)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000


def quantiles(samples: Sequence[float]) -> list[float]:
    """p20, median and p80: 20 %, 50 % and 80 % of the samples lie below."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found: list[float] = torch.tensor(samples, dtype=torch.float64).quantile(shares).tolist()
    return found


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which one call raises the peak of memory in use, above what is in use before it; None where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    # Memory freed earlier but still held by the allocator would hide what the call needs: give it back first.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts over from the present resident set
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def commit() -> str:
    """The commit this code runs from, "-dirty" where files differ from it.

    Where it is no checkout, the environment's FASTBERT_COMMIT; what benchmarks/commit.txt notes, written before a tree
    is copied without its .git; or the version and a hash of the sources.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=30, check=False)

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode == 0:
            dirty = bool(git("status", "--porcelain", "--untracked-files=no").stdout)
            return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
    except FileNotFoundError:
        pass  # no git
    if named := os.environ.get("FASTBERT_COMMIT"):
        return named
    if NOTED.is_file():
        noted, sources = NOTED.read_text(encoding="utf-8").split()
        return noted if sources == sources_hash() or noted.endswith("-dirty") else f"{noted}-dirty"
    return f"v{VERSION}-{sources_hash()}"


def note_commit() -> str:
    """Notes the commit for copies of this tree, and returns it."""
    found = commit()
    NOTED.write_text(f"{found} {sources_hash()}\n", encoding="utf-8")
    return found


def sources_hash() -> str:
    """Of every source of the package."""
    found = hashlib.sha256()
    files = {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")}  # a symlink, which rglob does not follow
    for file in sorted(files):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


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
    found: dict[str, str | None] = {"fastbert": VERSION, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
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


def environment(device: torch.device) -> dict[str, object]:
    """What every record says about where it was measured."""
    installed = versions()
    return {
        "device": device.type,
        "device_name": device_name(device),
        "driver": driver(device),
        "torch": torch.__version__,
        "triton": installed["triton"],
        "transformers": installed["transformers"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": backend(device),
        "num_threads": torch.get_num_threads(),
    }
