"""The code of torch and of transformers that the fast path stands in for, and whether it is still theirs.

Tools replace it: a method on a class, a function in a module, a class in a module, an attention function in its
registry. What they put in its place is to run, so nothing is known by the identity of a class. A function is its
class's own where it and everything wrapped around it was defined in torch or transformers, it in the class's module and
under the class's name. That holds for a patch that was there before fastbert, too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from gc import get_referents
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations, masking_utils
from transformers.loss import loss_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_OWNERS = ("torch", "transformers")
_MODULES: set[str] = set()
"""Modules of families that are not transformers'."""

# Functions of torch, by module, that stock layers and attention call, and that kernels compute in their place.
_FUNCTIONS = {
    "torch.nn.functional": (
        "dropout",
        "embedding",
        "gelu",
        "layer_norm",
        "linear",
        "scaled_dot_product_attention",
        "softmax",
    ),
    "torch": ("matmul", "pow", "tanh"),
    "torch._C._nn": ("silu",),  # which torch.nn.functional's calls; its gelu is this module's
    "torch.nn": ("CrossEntropyLoss",),  # which heads read as they are called
    "math": (),
}
# And what of these the code reads besides, a family's and fastbert's own; and of methods of tensors. Operators of
# Python are methods that no code names.
_BINARY = ("add", "and", "floordiv", "matmul", "mod", "mul", "or", "pow", "sub", "truediv", "xor")
_OPERATORS = {f"__{kind}{name}__" for kind in ("", "r", "i") for name in _BINARY}
_OPERATORS |= {f"__{name}__" for name in ("bool", "eq", "ge", "getitem", "gt", "invert", "le", "lt", "ne", "neg")}
_OPERATORS |= {"__rdiv__", "__setitem__"}
# Modules of fastbert that compute.
_OURS = (".kernels.cpu", ".kernels.reference", ".layers.", ".models.", ".ops.", ".runtime.encoder", ".runtime.packing")
# What decides how any module is called. torch.fx and torch.export put their own in its place as they trace.
_CALLS = ("__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl")
# Methods that take no part in a forward.
_ASIDE = {"__init__", "__repr__", "__setstate__", "extra_repr", "reset_parameters", "prune_heads"}

# torch's activations that work element by element, as all of transformers' own do.
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Sigmoid)
_KINDS_OF_FUNCTIONS = (BuiltinFunctionType, FunctionType)
_PLAIN = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.Identity, *ELEMENTWISE)

# Where stock code finds attention and its mask by the name of an implementation; and what these objects are.
_REGISTRIES: dict[str, Any] = {
    "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS,
    "ALL_MASK_ATTENTION_FUNCTIONS": ALL_MASK_ATTENTION_FUNCTIONS,
}
_REGISTRY_KINDS = tuple(
    dict.fromkeys(
        kind
        for each in _REGISTRIES.values()
        for kind in type(each).__mro__
        if kind.__module__.startswith("transformers.")
    )
)


def _defined_in(function: object) -> str:
    """The module whose code a function is, whatever it says of itself: decorators copy what it says."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _is_owned(module: str) -> bool:
    return module.partition(".")[0] in _OWNERS or module in _MODULES


def _layers_of(function: object) -> Iterator[Any]:
    """A function, and what it is wrapped around, the innermost last."""
    while function is not None:
        function = getattr(function, "_torchdynamo_inline", function)  # what torch.jit.script has compiled
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_own(function: object, module: str, name: str) -> bool:
    """Whether `function` is the one that `module` defines under `name`, in nothing but its owners' decorators."""
    if isinstance(function, BuiltinFunctionType):
        return function.__name__ == name
    *outer, inner = _layers_of(function)
    if not all(isinstance(f, FunctionType) and _is_owned(_defined_in(f)) for f in (*outer, inner)):
        return False
    return _defined_in(inner) == module and inner.__qualname__ == name


@functools.lru_cache(256)
def _is_theirs(function: object) -> bool:
    """Whether a function was defined in torch or transformers, and everything that is wrapped around it."""
    return all(_is_owned(_defined_in(f)) for f in _layers_of(function))


def _is_left(function: object, name: str, first: object) -> bool:
    """Whether what stands under a name in torch or Tensor is theirs; `first` is what stood there before.

    Around what is built in there may be functions of Python's. Some, and some operators, have other names of their own.
    """
    function = function.fget if isinstance(function, property) else function
    layers = list(_layers_of(function))
    built_in = (BuiltinFunctionType, MethodDescriptorType)
    theirs = [_is_owned(_defined_in(f)) if isinstance(f, FunctionType) else isinstance(f, built_in) for f in layers]
    if not layers or not all(theirs):
        return False
    first = first.fget if isinstance(first, property) else first
    named = getattr(layers[-1], "__name__", None) == name
    return named or (function is first and (isinstance(layers[0], FunctionType) or name.startswith("__")))


def _is_exporters(function: object) -> bool:
    """Whether torch.export has put a function in another's place for as long as it traces: one for numbers that it
    traces as symbols. Stock code is recorded by the same."""
    return torch.compiler.is_exporting() and _defined_in(function).startswith(("torch._export.", "torch.export."))


def _made_of(function: FunctionType) -> list[object]:
    """What decides what a function computes: its code, its defaults, and what is in the cells of its closure."""
    named, cells = function.__kwdefaults__ or {}, function.__closure__ or ()
    return [function.__code__, *(function.__defaults__ or ()), *named, *named.values(), *get_referents(*cells)]


def is_own_act(act: object) -> bool:
    """Whether what an activation of transformers calls is one of torch's functions, or a method of its own."""
    act = act.func if isinstance(act, functools.partial) else getattr(act, "__func__", act)
    return isinstance(act, BuiltinFunctionType) or _is_theirs(act)


def is_stock_class(kind: type[object], owner: str) -> bool:
    """Whether a class is one of `owner`'s ("transformers.activations"), with the code it came with."""
    return kind.__module__ == owner and _foreign_method(kind) is None


def _methods_that_count(kind: type[object]) -> Iterator[tuple[str, object]]:
    """The methods of `kind` itself that may take part in a forward."""
    used = methods_used(kind)  # none of a class that is no module
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        aside = name in _ASIDE or (used and name.startswith(("get_", "set_")) and name not in used)
        if name == "forward" or (not aside and callable(function) and not isinstance(function, type)):
            yield name, function


def _foreign_method(kind: type[object]) -> str | None:
    """The name of a method of `kind` that takes part in a forward and is not its own."""
    if called := next((name for name in vars(kind) if name in _CALLS), None):
        return called
    for name, function in _methods_that_count(kind):
        if not _is_own(function, kind.__module__, f"{kind.__qualname__}.{name}"):
            return name
    return None


def _is_called(value: object) -> bool:
    """Whether code may call what a module has under a name: a function, what is in another module, a loss."""
    if isinstance(value, type):
        return issubclass(value, nn.Module)
    return isinstance(value, (FunctionType, ModuleType, torch.jit.ScriptFunction, nn.Module))


def _names(code: CodeType) -> Iterator[str]:
    """The names that code reads, those of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _reads(function: object) -> Iterator[str]:
    """The names that a function's own code reads, without what is wrapped around it."""
    inner = [*_layers_of(function)][-1]
    return _names(inner.__code__) if isinstance(inner, FunctionType) else iter(())


def _read(module: ModuleType, functions: Iterable[object]) -> set[str]:
    """The names that those of `functions` read which a module defines, without what is wrapped around them."""
    inner = [list(_layers_of(getattr(f, "__func__", f)))[-1:] for f in functions]
    return {n for (f,) in filter(None, inner) if _defined_in(f) == module.__name__ for n in _names(f.__code__)}


@functools.cache
def _read_by_us() -> set[str]:
    """The names that fastbert's own code reads where it computes."""
    package, found = str(__package__).partition(".")[0], set()
    for name, module in list(sys.modules.items()):
        if module is not None and f"{name}.".startswith(tuple(package + each for each in _OURS)):
            values = [*vars(module).values()]
            values += [each for kind in values if isinstance(kind, type) for each in vars(kind).values()]
            values = [getattr(each, "__func__", getattr(each, "fget", each)) for each in values]
            found |= _read(module, [each for each in values if isinstance(each, FunctionType)])
    return found


def methods_used(kind: object) -> list[str]:
    """The methods of a class that its forward calls, directly or not, and forward itself."""
    names, todo = [], ["forward"]
    while todo:
        name = todo.pop()
        if name not in names and isinstance(inspect.getattr_static(kind, name, None), (FunctionType, staticmethod)):
            names.append(name)
            todo += inspect.unwrap(getattr(kind, name)).__code__.co_names
    return names


def methods_called(kind: object) -> tuple[str, ...]:
    """The methods of a class that its forward calls, directly or not."""
    return tuple(name for name in methods_used(kind) if name != "forward")


_CALLED: dict[object, tuple[str, ...]] = {}
"""`methods_called` of classes that `keep` was given."""


def replaced_on(module: object, kind: object) -> str | None:
    """The first of the methods that the forward of `kind` calls which `module` has for its own; or None."""
    return next((name for name in _CALLED.get(kind, ()) if name in vars(module)), None)


def said(value: object) -> str:
    """How an error names a function or a class: by its module, too."""
    value = inspect.unwrap(value) if callable(value) else value
    module = _defined_in(value) or getattr(value, "__module__", None) or type(value).__module__
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def is_transformers(kind: type[object]) -> bool:
    """Whether a class is one of transformers'."""
    return kind.__module__.partition(".")[0] == "transformers"


def _is_theirs_class(kind: type[object]) -> bool:
    return is_transformers(kind) or kind.__module__ in _MODULES


def _masking() -> tuple[str, ...]:
    """Functions of transformers' module of masks that take part in one of BERT's, by name."""
    space, found = vars(masking_utils), set()
    todo = {"create_bidirectional_mask", "create_bidirectional_sliding_window_mask"}
    todo |= {getattr(f, "__name__", "") for f in ALL_MASK_ATTENTION_FUNCTIONS.values()}
    while todo:
        function = space.get(name := todo.pop())
        if isinstance(function, FunctionType) and name not in found:
            found.add(name)
            todo |= set(_names(inspect.unwrap(function).__code__)) & space.keys()
    return tuple(sorted(found | (_REGISTRIES.keys() & space.keys())))


# Of transformers' losses, those that take labelled rows alone, and what they call.
_LOSSES = (loss_utils.ForMaskedLMLoss, loss_utils.ForTokenClassification)
_LOSS_NAMES = ("ForMaskedLMLoss", "ForTokenClassification", "fixed_cross_entropy")
LOSS_ARGUMENTS = ("ignore_index", "num_items_in_batch")
"""Arguments of a head that go on to its loss, and change it."""


@functools.cache
def _asks_for_its_loss(forward: Callable[..., object]) -> bool:
    return "loss_function" in inspect.unwrap(forward).__code__.co_names


def loss_is_replaced(head: nn.Module) -> bool:
    """Whether a head takes its loss by its `loss_function`, and that may read rows without a label."""
    return _asks_for_its_loss(type(head).forward) and head.loss_function not in _LOSSES


_THREAD = threading.local()


class Moment:
    """What this thread has found as a forward began."""

    embeddings: object = None
    """Embeddings that run fused."""


def vouch_for(embeddings: nn.Module) -> None:
    """Says that these embeddings run fused in the forward under way."""
    if (moment := getattr(_THREAD, "moment", None)) is not None:
        moment.embeddings = embeddings


def are_vouched_for(embeddings: nn.Module) -> bool:
    """Whether `vouch_for` was told so."""
    moment = getattr(_THREAD, "moment", None)
    return moment is not None and moment.embeddings is embeddings


@contextlib.contextmanager
def looking_once() -> Iterator[None]:
    """Within, this thread looks once at the code of a family, and takes it to stay as it is."""
    before, _THREAD.moment = getattr(_THREAD, "moment", None), Moment()
    try:
        yield
    finally:
        _THREAD.moment = before


class Code:
    """What fused classes of one family stand in for."""

    def __init__(
        self, module: ModuleType, classes: Iterable[type[object]], readers: Iterable[type[object]] = ()
    ) -> None:
        """`module` is transformers' of the family, `classes` those whose code is stood in for, the model's first.

        `readers` are those that read what the model returns: of them counts what they call, as a loss.
        """
        self._module = module
        self._classes = tuple(dict.fromkeys(classes))
        own = activations.__name__
        theirs = [x for x in vars(activations).values() if isinstance(x, type) and x.__module__ == own]
        self._kinds = (
            *self._classes,
            *_PLAIN,
            nn.CrossEntropyLoss,
            *dict.fromkeys(theirs),
            *_REGISTRY_KINDS,
            ModelOutput,
        )
        # Those that they are derived from, of which what decides how they are called is looked at.
        self._bases = {base for kind in self._kinds for base in kind.__mro__ if _is_theirs_class(base)} - {*self._kinds}
        # A class shows its dictionary through a proxy; that refers to nothing else.
        dictionaries = [get_referents(vars(kind))[0] for kind in (*self._kinds, Tensor)]
        names, read = self._globals(readers)
        read |= {name for kind in (*_PLAIN, *theirs) for _, f in _methods_that_count(kind) for name in _reads(f)}
        self._names: dict[ModuleType, tuple[str, ...]] = {
            module: names,
            masking_utils: _masking(),
            loss_utils: _LOSS_NAMES,
        }
        read |= _read_by_us()
        owners = {importlib.import_module(owner): names for owner, names in _FUNCTIONS.items()}
        for owner, names in owners.items():
            more = {name for name in read if isinstance(vars(owner).get(name), _KINDS_OF_FUNCTIONS)}
            self._names[owner] = tuple(sorted({*names, *more}))
        self._methods = read | _OPERATORS
        self._first: dict[tuple[object, str], object]
        self._first = {(m, name): vars(m).get(name) for m, names in self._names.items() for name in names}
        self._first |= {(Tensor, name): value for name, value in vars(Tensor).items()}
        self._kept = {f: _made_of(f) for f in self._functions()}
        cells = [cell for f in self._kept for cell in f.__closure__ or ()]
        named = [f.__kwdefaults__ for f in self._kept if f.__kwdefaults__]
        self._refers = [*dictionaries, *map(vars, _REGISTRIES.values()), *self._kept, *cells, *named]
        self._picks = [(vars(m), itemgetter(*names, names[0])) for m, names in self._names.items() if names]
        self._last: tuple[list[object], str | None, bool] = ([], None, True)
        self._moment: object = None

    def foreign(self) -> tuple[str | None, bool]:
        """What is not torch's or transformers' own any more, or None; and whether the model's own forward is.

        It takes a few microseconds where nothing has changed. Within one forward (`looking_once`) it is looked at once.
        """
        moment = getattr(_THREAD, "moment", None)
        if moment is not None and moment is self._moment:
            return self._last[1:]
        found = get_referents(*self._refers)
        found += map(vars(nn.Module).get, _CALLS)
        try:
            for space, pick in self._picks:
                found += pick(space)
        except KeyError:  # one that has been removed
            found.append(None)
        found += map(attrgetter("__call__"), self._classes)  # of what they are derived from, too
        seen, reason, takes_plan = self._last
        if self._differ(found, seen):
            model = self._classes[0]
            reason, takes_plan = self._look(), is_stock_class(model, self._module.__name__)
            self._last = found, reason, takes_plan
        self._moment = moment
        return reason, takes_plan

    @staticmethod
    def _differ(found: list[object], seen: list[object]) -> bool:
        try:
            return found != seen
        except Exception:  # two others, which can't say in one word whether they are equal: tensors, arrays
            return True

    def _functions(self) -> Iterator[Any]:
        """The Python functions that are stood in for, and what is wrapped around them."""
        values = [function for kind in self._kinds for _, function in _methods_that_count(kind)]
        values += [vars(module).get(name) for module, names in self._names.items() for name in names]
        values += [vars(kind).get(name) for kind in (nn.Module, *self._bases) for name in _CALLS]
        values += [ALL_ATTENTION_FUNCTIONS.get(name) for name in ALL_ATTENTION_FUNCTIONS.valid_keys()]
        for value in values:
            yield from (each for each in _layers_of(value) if isinstance(each, FunctionType))

    def _globals(self, readers: Iterable[type[object]]) -> tuple[tuple[str, ...], set[str]]:
        """What the code of the classes and of `readers` calls of its module, by name; and all names that it reads."""
        space, found = vars(self._module), {"eager_attention_forward"}
        kinds = (*self._classes, *readers)
        used = [inspect.getattr_static(kind, name) for kind in kinds for name in methods_used(kind)]
        read = _read(self._module, [*used, space.get("eager_attention_forward")])
        while todo := (read & space.keys()) - found:
            found |= todo
            read |= _read(self._module, map(space.get, todo))
        found |= _REGISTRIES.keys() & read & space.keys()
        return tuple(sorted(n for n in found if n in _REGISTRIES or _is_called(space.get(n)))), read

    def _look(self) -> str | None:
        owner = self._module.__name__
        for kind in self._classes:
            if kind.__module__ != owner:
                return f"{owner}.{kind.__qualname__} is {said(kind)}"
        for kind in self._kinds:
            if name := _foreign_method(kind):
                return f"{kind.__qualname__}.{name} is {said(vars(kind)[name])}"
        for kind in (nn.Module, *self._bases):
            for name in _CALLS:
                value = vars(kind).get(name)
                if value is not None and not _is_theirs(value):
                    owner = "torch.nn.Module" if kind is nn.Module else kind.__qualname__
                    return f"{owner}.{name} is {said(value)}"
        for name, registry in _REGISTRIES.items():
            if own := next((n for n in vars(registry) if hasattr(type(registry), n)), None):
                return f"{name}.{own} is {said(vars(registry)[own])}"
        for module, names in self._names.items():
            for name in names:
                value = vars(module).get(name)
                if name in _REGISTRIES:
                    own = value is _REGISTRIES[name]
                elif isinstance(value, ModuleType):
                    own = value.__name__ == name or value.__name__.partition(".")[0] in _OWNERS
                    own = own and value is sys.modules.get(value.__name__)
                elif isinstance(value, type):
                    own = _is_owned(value.__module__) and value.__name__ == name
                elif isinstance(value, nn.Module):
                    own = type(value).__module__ == activations.__name__
                elif module in (self._module, masking_utils, loss_utils):  # defined there, or imported from elsewhere
                    own = _is_theirs(value) and getattr([None, *_layers_of(value)][-1], "__name__", None) == name
                elif name in _FUNCTIONS[module.__name__]:
                    own = _is_own(value, module.__name__, name)
                else:
                    own = _is_left(value, name, self._first[module, name])
                if not own and not _is_exporters(value):
                    return f"{module.__name__}.{name} is {said(value)}"
        methods = [
            n for n, x in vars(Tensor).items() if n in self._methods and (callable(x) or isinstance(x, property))
        ]
        for name in methods:
            if not _is_left(vars(Tensor)[name], name, self._first.get((Tensor, name))):
                return f"Tensor.{name} is {said(vars(Tensor)[name])}"
        for function, parts in self._kept.items():
            made = _made_of(function)
            if len(made) != len(parts) or not all(map(is_, made, parts)):
                return f"the code of {said(function)}, its defaults or what its closure holds has been replaced"
        return None


_CODES: dict[str, Code] = {}


def keep(
    family: str, module: ModuleType, classes: Iterable[type[object]], readers: Iterable[type[object]] = ()
) -> None:
    """Introduces the code of a family, by its name; as `Code` has it."""
    if not module.__name__.startswith("transformers."):
        _MODULES.add(module.__name__)
        _is_theirs.cache_clear()
    classes = tuple(classes)
    _CALLED.update({kind: methods_called(kind) for kind in classes})
    _CODES[family] = Code(module, classes, readers)


@torch.compiler.assume_constant_result
def foreign(family: str, implementation: str | None) -> str | None:
    """Why the code of a family is not what the fast path stands in for, at this moment; None where it is.

    Args:
        family: by its name.
        implementation: of attention, as the model's config names it.
    """
    if (reason := _CODES[family].foreign()[0]) is not None:
        return reason
    for what, registry in (
        ("attention", ALL_ATTENTION_FUNCTIONS),
        ("the mask of attention", ALL_MASK_ATTENTION_FUNCTIONS),
    ):
        function = registry.get(implementation)
        if function is not None and not _is_theirs(function):
            return f"{what} {implementation!r} is {said(function)}"
    return None


@torch.compiler.assume_constant_result
def takes_plan(family: str) -> bool:
    """Whether the stock forward of a family's base model is its own, which hands on to the encoder what it is given."""
    return _CODES[family].foreign()[1]
