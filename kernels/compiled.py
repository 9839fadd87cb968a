"""Launches of compiled kernels: what Triton asks at each launch, asked once for each kind of launch.

`kernel[grid](...)` binds the arguments, specializes them and looks up what they were compiled to: some 60 microseconds
of Python where there are two dozen. `run` keeps the answer, by all that it depends on, and calls the compiled kernel's
own launcher. Whenever there may be more to it, `run` is `kernel[grid](...)`: in the interpreter, on AMD GPUs, under
launch hooks (profilers) and Triton's debug settings, and with a Triton whose insides are others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor


class Constants(dict[str, object]):
    """Constexprs by name, and options of the compiler. Equal ones are one object, known by its identity."""

    _made: ClassVar[dict[tuple[object, ...], Constants]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Constants:
        values = sorted(dict(*args, **kwargs).items())
        return cls._made.setdefault(tuple((name, type(value), value) for name, value in values), super().__new__(cls))

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Descriptor:
    """A tensor descriptor: what Triton's has, which is checked where the kernel is compiled, not at each launch.

    Args:
        base: two-dimensional, contiguous in its last dimension; its rows start at multiples of 16 bytes.
        block_shape: what the kernel loads at a time.
    """

    __slots__ = (
        *("base", "shape", "strides", "block_shape", "padding", "round_f32_to_tf32"),
        *("dtype", "data_ptr", "get_device"),
    )

    def __init__(self, base: Tensor, block_shape: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, base.shape, base.stride(), block_shape
        self.dtype, self.data_ptr, self.get_device = base.dtype, base.data_ptr, base.get_device
        self.padding, self.round_f32_to_tf32 = "zero", False

    def checked(self) -> TensorDescriptor:
        """Triton's own."""
        return TensorDescriptor(self.base, [*self.shape], [*self.strides], self.block_shape)


def _write(
    names: list[str], tensors: int, descriptors: int, specialized: list[str]
) -> Callable[..., tuple[object, ...] | None]:
    """The function that launches what is known to be compiled, written out for a kernel: loops would double its time.

    Args:
        names: of the parameters, but for constexprs: `descriptors`, then pointers, `tensors` together, then numbers.
        tensors: how many of them are tensors or None.
        descriptors: how many of those are Descriptors or None.
        specialized: the numbers whose values are compiled in.

    Returns:
        A function of the arguments, the grid, the constants, what is known, and Triton's driver. It returns None where
        it has launched; else the key of what is to be known, or () where that is not to be kept.
    """
    first, *rest = given = names[:tensors]
    numbers = names[tensors:]
    lines = [f"place, {first}_at, {first}_is = {first}.get_device(), {first}.data_ptr(), {first}.dtype"]
    for name in rest:
        lines += [
            f"if {name} is None: {name}_at = {name}_is = None",
            f"elif {name}.get_device() != place: return ()",  # Triton's to say
            f"else: {name}_at, {name}_is = {name}.data_ptr(), {name}.dtype",
        ]
    lines += [f"if {name} > {2**31 - 1}: return ()" for name in numbers if name not in specialized]  # of 64 bits
    union = " | ".join(f"({name}_at or 0)" for name in given)
    each = ", ".join(f"not ({name}_at or 0) & 15" for name in given)
    key = ", ".join([f"{name}_is" for name in given] + specialized)
    passed = ", ".join([*given[:descriptors], *(f"{name}_at" for name in given[descriptors:]), *numbers])
    lines += [
        f"aligned = not ({union}) & 15 or ({each},)",
        "device = driver.get_current_device()",
        f"key = constants, device, place, aligned, {key}",
        "known = launches.get(key)",
        "if known is None: return key",
        "run, function, metadata, constexprs = known",
        "stream = driver.get_current_stream(device)",
        f"run(*grid, stream, function, metadata, None, None, None, {passed}, *constexprs)",
    ]
    space: dict[str, Any] = {}
    exec("\n    ".join([f"def launch({', '.join(names)}, grid, constants, launches, driver):", *lines]), space)
    launch: Callable[..., tuple[object, ...] | None] = space["launch"]
    return launch


class _Kernel:
    """What launches of one kernel depend on, and what they were compiled to."""

    def __init__(self, kernel: KernelInterface) -> None:
        self.kernel = kernel  # which goes by its id, and so has to live on
        self.launches: dict[tuple[object, ...], tuple[object, ...]] = {}
        self.launch: Callable[..., tuple[object, ...] | None] | None = None
        if isinstance(kernel, JITFunction) and not torch.version.hip:
            self._learn()

    def _learn(self) -> None:
        """Sets `launch`, where Triton's insides are as expected, and the kernel's parameters: tensors, then numbers."""
        try:
            parameters = [p for p in self.kernel.params if not p.is_constexpr]
            self.constexprs = [(p.name, p.default) for p in self.kernel.params if p.is_constexpr]
            typed = any(p.annotation_type or p.is_const for p in parameters)
            names, loose = [p.name for p in parameters], [p.do_not_specialize for p in parameters]
        except AttributeError:
            return
        kinds = [0 if name.endswith("_desc") else 1 if name.endswith("_ptr") else 2 for name in names]
        tensors = len(kinds) - kinds.count(2)
        specialized = [name for name in names[tensors:] if not loose[names.index(name)]]
        if kinds == sorted(kinds) and tensors and not typed:
            self.launch = _write(names, tensors, kinds.count(0), specialized)

    def remember(self, key: tuple[Any, ...], compiled: Any, constants: Constants) -> None:
        """Keeps what a launch was compiled to, where it ran on the device that its tensors are on."""
        place = key[2]
        try:
            entry = compiled.run, compiled.function, compiled.packed_metadata
            there = driver.active.get_active_torch_device().type == ("cpu" if place < 0 else "cuda")
        except AttributeError:
            self.launch = None
            return
        if there:
            self.launches[key] = *entry, tuple(constants.get(name, default) for name, default in self.constexprs)


_kernels: dict[int, _Kernel] = {}


def forget() -> None:
    """Forgets what was compiled: the next launch of every kernel asks Triton."""
    _kernels.clear()


def _is_watched(kernel: KernelInterface) -> bool:
    """Whether something sees launches, or has kernels compiled in another way."""
    runtime = knobs.runtime
    try:
        return bool(
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or knobs.compilation.instrumentation_mode
            or kernel.pre_run_hooks
        )
    except AttributeError:  # a hook put there as it is, or another Triton
        return True


def _by_triton(
    kernel: KernelInterface, grid: tuple[int, int, int], arguments: tuple[object, ...], constants: Constants
) -> Any:
    given = (x.checked() if type(x) is Descriptor else x for x in arguments)
    return kernel[grid](*given, **constants)


def run(
    kernel: KernelInterface, grid: tuple[int, int, int], arguments: tuple[object, ...], constants: Constants
) -> None:
    """Launches `kernel` over `grid`, as `kernel[grid](*arguments, **constants)`, on the current device and stream.

    Args:
        kernel: by the names of its parameters, first come descriptors (`_desc`), then pointers (`_ptr`), numbers and
            constexprs. Numbers that a batch changes, and floating-point ones, are in its `do_not_specialize`.
        grid: programs along each axis.
        arguments: in the order of the parameters, but for constexprs: Descriptors, tensors, None for those that are
            absent (not for the first), integers and floats.
        constants: of the kernel and of the compiler.
    """
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel(kernel)
    if known.launch is None or _is_watched(kernel):
        _by_triton(kernel, grid, arguments, constants)
        return
    key = known.launch(*arguments, grid, constants, known.launches, driver.active)
    if key is not None:
        compiled = _by_triton(kernel, grid, arguments, constants)
        if key:
            known.remember(key, compiled, constants)
