"""What an operator is: `operator` makes one of a function; its gradient, if it has one, is given by `differentiable`.

The function is the record: its signature is the schema, its docstring the contract, and its body says what a call
returns under fake tensors, which is what compilers and exporters see. A CUDA or ROCm tensor runs the function of the
same name in a module of `fastbert.kernels`, a CPU tensor that in `fastbert.kernels.cpu`.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .. import tuned
from ..kernels import cpu

P = ParamSpec("P")
R = TypeVar("R")


class BackwardContext(Protocol):
    """What a forward keeps for its backward: `ctx` of torch.autograd.Function, to which anything may be added."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


class Operator(NamedTuple):
    module: str
    """In `fastbert.kernels`, that of the Triton launcher."""
    fake: Callable[..., object]
    """Empty results of the right shapes and dtypes."""
    of_gradients: bool
    """Whether it runs in a backward: there it is differentiated no more, and takes batches one by one."""


OPERATORS: dict[str, Operator] = {}

CPU_BACKEND: dict[str, Callable[..., Any]] = {}
"""What runs on CPU tensors, by operator. Tests put the Triton kernels here, to run models through the interpreter."""

DIFFERENTIABLE: set[str] = set()
"""The operators that have a gradient; what else needs one is refused."""

_LIBRARY = torch.library.Library("fastbert", "DEF")


@functools.cache
def kernel(name: str) -> Callable[..., Any]:
    """The Triton launcher of an operator; imported at its first call, so that fastbert imports without triton."""
    tuned.apply()
    module = importlib.import_module(f"fastbert.kernels.{OPERATORS[name].module}")
    launcher: Callable[..., Any] = getattr(module, name)
    return launcher


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether an error came up as a kernel was compiled or loaded: triton's, ptxas', of a missing C compiler."""
    places = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(place.startswith(("triton.compiler", "triton.runtime.build")) for place in places)


def run_kernel(name: str, args: Sequence[Any]) -> Any:
    """Launches the kernel of an operator; RuntimeError, with a way out, where it can't be compiled."""
    try:
        return kernel(name)(*args)
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RuntimeError(
            f"the kernel of fastbert::{name} could not be compiled for {args[0].device} ({args[0].dtype}): {first}; "
            "FASTBERT_DISABLE=1 in the environment, or fastbert.unfuse(model), runs the stock code"
        ) from error


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_grad_enabled, _dispatch_modes = torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
_is_autocast_enabled = torch.is_autocast_enabled


def _on_cuda(name: str, args: Sequence[Any]) -> Any:
    first = args[0]
    if first.get_device() == _current_device() and not _is_autocast_enabled("cuda"):
        return run_kernel(name, args)
    with torch.cuda.device(first.device), torch.autocast("cuda", enabled=False):
        return run_kernel(name, args)


def _on_cpu(name: str, args: Sequence[object]) -> Any:
    with torch.autocast("cpu", enabled=False):  # dtypes have been chosen by now
        return CPU_BACKEND[name](*args)


def _dispatched(name: str, backend: Callable[[str, Sequence[object]], object]) -> Callable[..., object]:
    """What torch's dispatcher calls: a backend that refuses to be differentiated."""

    def run(*args: object) -> object:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            again = name.endswith("_backward")
            what = "second derivatives are not implemented" if again else "it is for inference"
            raise NotImplementedError(
                f"fastbert::{name} can't be differentiated: {what}; fastbert.unfuse(model) runs the stock code"
            )
        return backend(name, args)

    return run


def operator(module: str, *, of_gradients: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes `fastbert::NAME` of a function NAME: see above; the arguments are those of `Operator`.

    Returns a function of the same signature. In plain eager inference that calls the backend itself, which spares the
    dispatcher's own time: dozens of microseconds for each of the 168 operators of a BERT-large, as much as a small
    batch takes. All else, training, compilers, modes and transforms, goes through torch's dispatcher.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        OPERATORS[name] = Operator(module, function, of_gradients)
        CPU_BACKEND[name] = getattr(cpu, name)
        function.__annotations__ = typing.get_type_hints(function)
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _dispatched(name, _on_cpu), "CPU")
        _LIBRARY.impl(name, _dispatched(name, _on_cuda), "CUDA")
        torch.library.register_fake(f"fastbert::{name}", function, lib=_LIBRARY)
        if of_gradients:
            torch.library.register_vmap(f"fastbert::{name}", _one_by_one(name), lib=_LIBRARY)
        dispatcher = getattr(torch.ops.fastbert, name).default

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Of the two, torch.compile knows this one too, and it is one frame less.
            if not (torch.compiler.is_dynamo_compiling() or _is_grad_enabled() or _dispatch_modes() or kwargs):
                first = args[0]
                if type(first) is Tensor:
                    if first.is_cpu:
                        result: R = _on_cpu(name, args) if _is_autocast_enabled("cpu") else CPU_BACKEND[name](*args)
                        return result
                    if first.is_cuda:
                        launched: R = _on_cuda(name, args)
                        return launched
            dispatched: R = dispatcher(*args, **kwargs)
            return dispatched

        return call

    return register


# Torch's TorchDispatchModes that take any operator: what traces, fakes values, or keeps them for a checkpoint. Not so
# its counter of FLOPs, to which fastbert's operators cost nothing. A mode that knows them says `knows_fastbert = True`.
_TRACING = {
    "torch._subclasses.fake_tensor",
    "torch._subclasses.functional_tensor",
    "torch.fx.experimental.proxy_tensor",
    "torch.utils.checkpoint",
}


def foreign_dispatch_mode() -> TorchDispatchMode | None:
    """A TorchDispatchMode that is active and may count or replace torch's operators; not while a compiler looks."""
    if torch.compiler.is_compiling() or not _dispatch_modes():  # which a compiler cannot trace
        return None
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__module__ not in _TRACING and not getattr(mode, "knows_fastbert", False):
            return mode
    return None


def differentiable(function: Callable[..., object], save: Callable[..., None], backward: Callable[..., object]) -> None:
    """Gives an operator its gradient: what it saves, and the backward, of torch's operators and `on_gradient`."""
    name = function.__name__
    DIFFERENTIABLE.add(name)

    @functools.wraps(backward)
    def checked(*args: object) -> object:
        if (mode := foreign_dispatch_mode()) is not None:
            raise RuntimeError(
                f"the backward of fastbert::{name} is under a {type(mode).__module__}.{type(mode).__qualname__}, which "
                "may count or replace torch's operators, and its forward was not; enter the mode before the forward, "
                "which then runs stock, or call fastbert.unfuse(model)"
            )
        return backward(*args)

    torch.library.register_autograd(f"fastbert::{name}", checked, setup_context=save, lib=_LIBRARY)


def on_gradient(function: Callable[..., R], grad: Tensor, *args: object) -> R:
    """An operator on a gradient: through torch's dispatcher where that is a batch of gradients, which it takes apart.

    As `torch.autograd.grad(is_grads_batched=True)`, `jacobian(vectorize=True)` and a vmap of `torch.autograd.grad` have
    them. All else in a backward is torch's own operators, which know such batches.
    """
    name = function.__name__
    result: R
    if torch._C._functorch.is_batchedtensor(grad):
        result = getattr(torch.ops.fastbert, name)(grad, *args)
    elif torch._C._functorch.is_legacy_batchedtensor(grad):
        # Random numbers are forbidden there; dropout draws those of the forward again, by its seed.
        key: Any = torch._C._parse_dispatch_key("VmapMode")
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            result = getattr(torch.ops.fastbert, name)(grad, *args)
    else:
        result = getattr(sys.modules[__package__], name)(grad, *args)  # where `fastbert profile` names calls
    return result


def _one_by_one(name: str) -> Callable[..., object]:
    """The rule by which torch.vmap runs an operator: on one after the other."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[object, object]:
        def each(i: int) -> Any:
            given = (a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True))
            return getattr(torch.ops.fastbert, name)(*given)

        results = [each(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums over x are kept in: float32, or float64 where x is that."""
    return torch.promote_types(x.dtype, torch.float32)
