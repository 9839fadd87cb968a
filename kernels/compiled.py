"""Launches of compiled kernels: what Triton asks at each launch, asked once for each kind of launch.

`kernel[grid](...)` binds the arguments, specializes them and looks up what they were compiled to: some 60 microseconds
of Python where there are two dozen. `run` keeps the answer, by all that it depends on, and calls the compiled kernel's
own launcher. Whenever there may be more to it, `run` is `kernel[grid](...)`: in the interpreter, on AMD GPUs, under
launch hooks (profilers) and Triton's debug settings, and with a Triton whose insides are others.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Constants(dict[str, Any]):
    """Constexprs by name, and options of the compiler. Known by identity: made once for a configuration, and kept."""

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


def _items(indices: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    """What picks these items of a sequence."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda sequence: tuple(sequence[i] for i in indices)


class _Kernel:
    """What launches of one kernel depend on, and what they were compiled to."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # which goes by its id, and so has to live on
        self.launches: dict[Any, Any] = {}
        self.is_known = isinstance(kernel, JITFunction) and not torch.version.hip and self._learn()

    def _learn(self) -> bool:
        """Whether Triton's insides are as expected, and the kernel's parameters: tensors, numbers, constexprs."""
        try:
            parameters = [p for p in self.kernel.params if not p.is_constexpr]
            self.constexprs = [(p.name, p.default) for p in self.kernel.params if p.is_constexpr]
            typed = any(p.annotation_type or p.is_const for p in parameters)
            loose = [p.do_not_specialize for p in parameters]
        except AttributeError:
            return False
        names = [p.name for p in parameters]
        kinds = [0 if name.endswith("_desc") else 1 if name.endswith("_ptr") else 2 for name in names]
        self.descriptors, self.tensors = kinds.count(0), len(kinds) - kinds.count(2)
        numbers = range(self.tensors, len(names))
        self.specialized = _items([i for i in numbers if not loose[i]])
        self.others = _items([i for i in numbers if loose[i]])
        return kinds == sorted(kinds) and not typed and self.tensors > 0

    def remember(self, key: Any, compiled: Any, place: int, constants: Constants) -> None:
        """Keeps what a launch was compiled to, where it ran on the device that its tensors are on."""
        try:
            entry = compiled.run, compiled.function, compiled.packed_metadata
            there = driver.active.get_active_torch_device().type == ("cpu" if place < 0 else "cuda")
        except AttributeError:
            self.is_known = False
            return
        if there:
            self.launches[key] = *entry, tuple(constants.get(name, default) for name, default in self.constexprs)


_kernels: dict[int, _Kernel] = {}
_LARGEST = 2**31 - 1


def forget() -> None:
    """Forgets what was compiled: the next launch of every kernel asks Triton."""
    _kernels.clear()


def _is_watched(kernel: Any) -> bool:
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


def _by_triton(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: Constants) -> Any:
    given = (x.checked() if type(x) is Descriptor else x for x in arguments)
    return kernel[grid](*given, **constants)


def run(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: Constants) -> None:
    """Launches `kernel` over `grid`, as `kernel[grid](*arguments, **constants)`, on the current device and stream.

    Args:
        kernel: by the names of its parameters, first come descriptors (`_desc`), then pointers (`_ptr`), numbers and
            constexprs. Numbers that a batch changes, and floating-point ones, are in its `do_not_specialize`.
        grid: programs along each axis.
        arguments: in the order of the parameters, but for constexprs: Descriptors, tensors, None for those that are
            absent (not for the first), integers and floats.
        constants: the same object for the same values, or each launch asks Triton.
    """
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel(kernel)
    if not known.is_known or _is_watched(kernel):
        _by_triton(kernel, grid, arguments, constants)
        return
    place = arguments[0].get_device()
    union = 0
    addresses: list[Any] = []
    dtypes: list[Any] = []
    for x in arguments[: known.tensors]:
        if x is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = x.data_ptr()
            union |= address
            addresses.append(address)
            dtypes.append(x.dtype)
            if x.get_device() != place:
                union = -1
    others = known.others(arguments)
    if union < 0 or (others and max(others) > _LARGEST):  # tensors of several devices; a number of 64 bits
        _by_triton(kernel, grid, arguments, constants)
        return
    aligned = not union & 15 or tuple(address is None or not address & 15 for address in addresses)
    active = driver.active
    device = active.get_current_device()
    key = constants, device, place, aligned, tuple(dtypes), known.specialized(arguments)
    entry = known.launches.get(key)
    if entry is None:
        known.remember(key, _by_triton(kernel, grid, arguments, constants), place, constants)
        return
    launch, function, metadata, constexprs = entry
    addresses[: known.descriptors] = arguments[: known.descriptors]
    stream = active.get_current_stream(device)
    numbers = arguments[known.tensors :]
    launch(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constexprs)
