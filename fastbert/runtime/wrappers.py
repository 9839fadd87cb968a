"""What is put around modules and around their forwards, and hands on what it is given.

Modules: a checkpointed, compiled or sharded layer is called as the layer is, and asked what the layer is asked. Those
known to do no more than that are in `_WRAPPERS`; any other is a custom module.

Forwards: accelerate's mixed precision, torch.compile and decorators leave on a module a forward that ends in the one
its class had. `redirect` makes one like it that ends in another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

# Modules that call the one inside with their arguments, whatever these are: by name the attribute it is under.
_WRAPPERS = {
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "OffloadWrapper"): "_checkpoint_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
}
# Packages, and a module of accelerate's, whose wrappers of a forward read nothing of what they hand on.
_TRANSPARENT = ("fastbert", "torch", "transformers")
_MIXED_PRECISION = "accelerate.utils.operations"


def _inside(module: nn.Module) -> str | None:
    """The attribute that a module, if it is known to hand its arguments on, has the one inside under."""
    name = _WRAPPERS.get((type(module).__module__, type(module).__qualname__))
    if name is None:
        return None
    by = module.__dict__.get("checkpoint_fn")  # torch's, or a custom one, which may change anything
    by = getattr(by, "func", by)
    return name if by is None or str(getattr(by, "__module__", "")).startswith("torch.") else None


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` is known to hand its arguments on to the one inside."""
    return _inside(module) is not None


def is_rewritten(module: nn.Module) -> bool:
    """Whether a wrapper has a forward of its own that does more than hand on; compiled ones come with one."""
    forward = module.__dict__.get("forward")
    if forward is None or type(module).__module__ == "torch._dynamo.eval_frame":
        return False
    return not is_transparent(forward, type(module).forward)


def unwrapped(module: nn.Module) -> Any:
    """The module that wrappers, if there are any, are around."""
    while (name := _inside(module)) is not None:
        module = module.__dict__["_modules"][name]
    return module


def wrapped(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and what is inside of it as far as it is known to be a wrapper; the module itself first."""
    yield module
    while (name := _inside(module)) is not None:
        module = module.__dict__["_modules"][name]
        yield module


def _is_followed(value: object) -> bool:
    if isinstance(value, (FunctionType, MethodType, functools.partial)):
        return True
    # An object of Python's, all of which is in its attributes.
    kind = type(value)
    plain = kind.__new__ is object.__new__ and not any(vars(c).get("__slots__") for c in kind.__mro__)
    return callable(value) and plain and not isinstance(value, (type, nn.Module)) and hasattr(value, "__dict__")


def redirect(
    function: object, to: Mapping[object, object], seen: dict[int, tuple[object, object]] | None = None
) -> object:
    """`function` with those functions that it ends in replaced: a copy, or itself where it ends in none of them.

    It is followed through bound methods, partials, closures, defaults and attributes. None of these is changed.

    Args:
        function: a callable, or anything else, which is returned.
        to: by function, the one in its place.
        seen: those met so far, by id.
    """
    seen = {} if seen is None else seen
    if not _is_followed(function):
        return function
    if id(function) in seen:
        return seen[id(function)][1]
    seen[id(function)] = function, function  # kept, so that no other has its id

    def new(value: object) -> Any:
        return redirect(value, to, seen)

    result = function
    if isinstance(function, FunctionType) and function in to:
        result = to[function]
    elif isinstance(function, MethodType):
        if (inner := new(function.__func__)) is not function.__func__:
            result = MethodType(inner, function.__self__)
        elif (owner := new(function.__self__)) is not function.__self__:
            result = MethodType(function.__func__, owner)
    elif isinstance(function, functools.partial):
        inner, args = new(function.func), tuple(map(new, function.args))
        keywords = {name: new(value) for name, value in function.keywords.items()}
        before = (function.func, *function.args, *function.keywords.values())
        after = (inner, *args, *keywords.values())
        attributes = {name: new(value) for name, value in vars(function).items()}
        if _differ(before, after) or _differ(vars(function).values(), attributes.values()):
            result = functools.partial(inner, *args, **keywords)
            vars(result).update(attributes)
    elif isinstance(function, FunctionType):
        contents = [*map(_content, function.__closure__ or ()), *(function.__defaults__ or ())]
        inside = list(map(new, contents))
        named = function.__kwdefaults__ or {}
        keywords = {name: new(value) for name, value in named.items()}
        attributes = {name: new(value) for name, value in vars(function).items()}
        before = (*contents, *named.values(), *vars(function).values())
        if _differ(before, (*inside, *keywords.values(), *attributes.values())):
            cells = [
                cell if value is content else CellType(value)
                for cell, content, value in zip(function.__closure__ or (), contents, inside, strict=False)
            ]
            arguments = function.__globals__, function.__name__, tuple(inside[len(cells) :]) or None, tuple(cells)
            result = FunctionType(function.__code__, *arguments)
            result.__kwdefaults__, result.__qualname__ = keywords or None, function.__qualname__
            result.__module__, result.__doc__ = function.__module__, function.__doc__
            vars(result).update(attributes)
    else:
        attributes = {name: new(value) for name, value in vars(function).items()}
        if _differ(vars(function).values(), attributes.values()):
            result = object.__new__(type(function))  # not by copy: accelerate's refuse to be pickled
            vars(result).update(attributes)
    seen[id(function)] = function, result
    return result


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty: a name that has no value yet
        return None


def _differ(before: Iterable[object], after: Iterable[object]) -> bool:
    return any(a is not b for a, b in zip(before, after, strict=True))


def reached(function: object, seen: dict[int, object] | None = None) -> Iterator[object]:
    """Every function that a callable ends in or passes, as `redirect` follows it."""
    seen = {} if seen is None else seen
    if not _is_followed(function) or id(function) in seen:
        return
    seen[id(function)] = function
    yield function
    inside: list[object] = list(getattr(function, "__dict__", {}).values())
    if isinstance(function, MethodType):
        inside = [function.__func__, function.__self__]
    elif isinstance(function, functools.partial):
        inside += [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, FunctionType):
        inside += map(_content, function.__closure__ or ())
        inside += (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for value in inside:
        yield from reached(value, seen)


@torch.compiler.assume_constant_result  # a compiler that looks into the cells of a function can't call it after that
def is_transparent(forward: object, own: object) -> bool:
    """Whether a forward on a module does no more than hand its arguments on to `own`, its class's."""
    found = list(reached(forward))
    for each in found:
        if isinstance(each, functools.partial) and (each.args or each.keywords) and own in reached(each.func):
            return False  # it adds arguments
    # A method is its function and its object; what any other object does, its class says.
    around = [_code_of(f) for f in found if f is not own and not isinstance(f, (MethodType, functools.partial))]
    return own in found and all(n == _MIXED_PRECISION or n.partition(".")[0] in _TRANSPARENT for n in around)


def _code_of(function: object) -> str:
    """The module whose code runs where a function, or an object, is called."""
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__", ""))
    return type(function).__module__
