"""A GPU that isn't there: Triton's driver stubbed, so that launchers run over CPU tensors and launch nothing.

    with stub.device("sm_90") as gpu:
        ...  # a fused model in inference or training, or launchers themselves, on CPU tensors
    gpu.compilations, gpu.launches

Inside, fastbert's operators call their Triton launchers for CPU tensors, which choose what they would on that
architecture. Results are whatever memory held, but `mask_layout`'s, which say how a call goes on. Two modes:

- `device(arch)`: nothing is compiled either; `gpu.compilations` says what would have been. Takes microseconds a kernel.
- `device(arch, compiles=True)`: Triton compiles for the architecture, into its cache (TRITON_CACHE_DIR) and by the keys
  that a GPU would ask for; only loading and launching do nothing. NVIDIA's ptxas comes with Triton.

A process with TRITON_INTERPRET set interprets kernels, and can't use this. CUDA itself is not stubbed: no tensor says
`is_cuda`, and CUDA graphs aren't captured.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles and launches nothing")

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastbert import ops
from fastbert.kernels import compiled, cpu
from fastbert.runtime import arguments, packing

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_103": 160, "sm_120": 170}
"""Of an A100, A40, L40S, H100 or H200, B200, B300 and RTX 5090; of others, 48 as a GB10 has."""
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99}
"""Shared memory that a program may have, in KiB; of others, 99."""


def target(arch: str) -> Any:
    """What Triton compiles for, by the name that `kernels/launch.py` gives an NVIDIA GPU, or by a gfx number."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@dataclass
class Compilation:
    """One kernel compiled, or that would have been."""

    kernel: str
    constexprs: dict[str, str]
    """By name, the constants among them that arguments are specialized to: 1 and None."""
    options: Any
    """Of the compiler: num_warps, num_stages, launch_pdl and so on."""
    key: Any
    """What Triton tells specializations of a kernel apart by."""
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    """The arguments of each of its launches as a compiled kernel takes them, the grid's three and the stream first;
    where they are kept, and nothing is compiled."""


@dataclass
class Gpu:
    """What came to pass on the device that isn't there."""

    arch: str
    compilations: list[Compilation] = field(default_factory=list)
    launches: int = 0
    keeps_arguments: bool = False

    def launch(self, *args: Any) -> None:
        """In place of a compiled kernel's launch."""
        self.launches += 1


class Utilities:
    """In place of the driver's C module."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared, count = SHARED.get(self.gpu.arch, 99) * 1024, MULTIPROCESSORS.get(self.gpu.arch, 48)
        return {"max_shared_mem": shared, "multiprocessor_count": count, "warpSize": target(self.gpu.arch).warp_size}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads that a program may have

    def unload_module(self, *args: Any) -> None:
        pass

    def fill_tma_descriptor_tiled(self, *args: Any) -> int:
        return 0


class Driver:
    """A device that nothing runs on."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.utils, self.target = gpu, Utilities(gpu), target(gpu.arch)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel: nothing does."""
        return self.gpu.launch


class Compiled:
    """In place of a compiled kernel that isn't compiled."""

    packed_metadata = None
    function = 1

    def __init__(self, gpu: Gpu, compilation: Compilation) -> None:
        self.gpu, self.compilation = gpu, compilation

    def run(self, *args: Any) -> None:
        self.gpu.launches += 1
        if self.gpu.keeps_arguments:
            self.compilation.launches.append(args)

    def launch_metadata(self, *args: Any) -> None:
        pass


def _forget() -> None:
    """Makes every kernel forget what it was compiled to, and for which device."""
    compiled.forget()
    for module in _kernels():
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def _kernels() -> list[Any]:
    names = {operator.module for operator in ops.OPERATORS.values()} | {"launch"}
    for name in names:
        importlib.import_module(f"fastbert.kernels.{name}")
    return [module for name, module in list(sys.modules.items()) if name.startswith("fastbert.kernels.")]


def _mask_layout(mask: torch.Tensor, labels: torch.Tensor | None) -> Any:
    ops.registry.kernel("mask_layout")(mask, labels)
    return cpu.mask_layout(mask, labels)


@contextlib.contextmanager
def device(arch: str = "sm_90", compiles: bool = False) -> Iterator[Gpu]:
    """Until it is left, fastbert's operators on CPU tensors launch their Triton kernels on an `arch` that isn't there.

    Args:
        arch: "sm_90" and so on, or "gfx942" and its kin.
        compiles: whether Triton compiles what is launched.

    Yields:
        What is compiled and launched, as it goes.
    """
    gpu, compile_it = Gpu(arch), JITFunction._do_compile
    known_as = "portable" if arch.startswith("gfx") else arch

    def record(self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, *rest: Any) -> Any:
        values = {str(self.arg_names[path[0]]): str(value) for path, value in constexprs.items()}
        compilation = Compilation(self.__name__, values, options, key)
        gpu.compilations.append(compilation)
        if compiles:
            return compile_it(self, key, signature, device, constexprs, options, *rest)
        kernel = self.device_caches[device][0][key] = Compiled(gpu, compilation)
        return kernel

    stubs = {"architecture": lambda _: known_as, "multiprocessors": lambda _: MULTIPROCESSORS.get(arch, 48)}
    places: list[tuple[Any, str, Any]] = [
        (JITFunction, "_do_compile", record),
        (arguments, "_is_readable", lambda ids: False),  # as on a GPU, like the next
        (packing, "tiles_of", lambda cu_seqlens, tokens: ops.attention_tiles(cu_seqlens, tokens)),
    ]
    places += [(m, name, value) for m in _kernels() for name, value in stubs.items() if hasattr(m, name)]
    held = [(place, name, getattr(place, name)) for place, name, _ in places]
    backend, active = dict(ops.CPU_BACKEND), driver._active
    _forget()
    try:
        driver.set_active(Driver(gpu))
        for place, name, value in places:
            setattr(place, name, value)
        for name in ops.CPU_BACKEND:
            ops.CPU_BACKEND[name] = ops.registry.kernel(name)
        ops.CPU_BACKEND["mask_layout"] = _mask_layout
        yield gpu
    finally:
        for place, name, value in held:
            setattr(place, name, value)
        ops.CPU_BACKEND.update(backend)
        driver._active = active
        _forget()
