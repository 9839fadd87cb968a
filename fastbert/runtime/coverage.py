"""Which layers the fast path covers, and what they read: looked at once, and again when something has changed.

A module of torch has no version. But what it holds can be listed, and lists of the same objects compare in C: those of
a model of BERT-large's depth, ten thousand, in a tenth of a millisecond. Asking every layer takes half a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from gc import get_referents
from itertools import accumulate
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..layers.derived import Derived
from ..layers.layer import layer_is_unsupported
from .registry import before_layers, embeddings_of, encoder_of, family_of, stack_of, wrapped_encoder_of
from .support import is_hooked, own_method, tables_are_unsupported
from .wrappers import is_wrapper, unwrapped, wrapped

_dtype = Tensor.dtype.__get__  # type: ignore[attr-defined]
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")


class Snapshot:
    """What decides how modules compute, as it was: their classes, attributes, hooks, children and parameters.

    An object is taken to be as it was where it is the same, or equal: of those that count, modules, functions and
    tensors of several elements are equal to none other.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]]) -> None:
        """`groups` of modules, each the one that the others are inside of first."""
        self._modules = [module for group in groups for module in group]
        attributes = list(map(vars, self._modules))
        self._outer = get_referents(*self._modules)
        # Up to Python 3.12 a module refers to its attributes' dictionary, then to its class; later to each attribute.
        alternating = self._outer[::2]
        self._alternates = len(alternating) == len(attributes) and all(map(is_, alternating, attributes))
        self._inner = get_referents(*attributes)
        self.configs = list({id(x): x for x in self._inner if isinstance(x, PreTrainedConfig)}.values())
        """Those that the modules have."""
        self._more = [_MARK, *map(vars, self.configs)]
        end = len(self._inner)
        self._pick = itemgetter(*_positions(groups, end), *range(end + 1, end + len(self._more)))
        self._held = self._holds_what(list(self._inner))
        self.parameters = [p for a in attributes for p in a["_parameters"].values() if p is not None]
        self._kinds = self._look_at_parameters()

    def holds(self) -> bool:
        """Whether nothing of it has changed."""
        try:
            outer = get_referents(*self._modules)
            if outer != self._outer:
                return False
            inner = get_referents(*(outer[::2] if self._alternates else map(vars, self._modules)))
            if inner != self._inner or self._holds_what(inner) != self._held:
                return False
        except Exception:  # two others, which can't say in one word whether they are equal: tensors, arrays
            return False
        return self._look_at_parameters() == self._kinds

    def _holds_what(self, inner: list[object]) -> list[object]:
        """What is in the dictionaries inside those of attributes, whose values are `inner`, and in configs."""
        inner.extend(self._more)
        return get_referents(*self._pick(inner))

    def _look_at_parameters(self) -> tuple[list[object], ...]:
        return tuple([list(map(kind, self.parameters)) for kind in (type, _dtype, Tensor.get_device, Tensor.numel)])


_ASIDE = vars(nn.Module()).keys()
"""What every module has: of those, dictionaries that count are asked for by name."""
_ORDINARY = {*_BACKWARD, *_FORWARD, "_parameters", "_modules"}
_MARK = (object(),)
"""Refers to something that no module holds: put between dictionaries, it tells whose a hook is."""


def _positions(groups: Sequence[Sequence[nn.Module]], end: int) -> Iterable[int]:
    """Where, among the values of all modules' attributes, the dictionaries are that count, and `end`, a mark's place.

    A group's order is: hooks of its first module, then backward hooks of the others, then their forward hooks and what
    they hold. So a hook that moves to where it counts for something else changes its place among the marks.
    """
    modules = [module for group in groups for module in group]
    values = [get_referents(vars(module)) for module in modules]
    starts = accumulate(map(len, values), initial=0)
    places = {id(m): (start, v, vars(m)) for m, start, v in zip(modules, starts, values, strict=False)}

    def find(module: nn.Module, *names: str) -> list[int]:
        start, found, attributes = places[id(module)]
        looked_for = [attributes[name] for name in names]
        return [start + next(i for i, value in enumerate(found) if value is each) for each in looked_for]

    for first, *others in groups:
        for names in (_BACKWARD, _FORWARD):
            yield from (*find(first, *names), end)
        for other in others:
            yield from find(other, *_BACKWARD)
        yield end
        for module in (first, *others):
            attributes = vars(module)
            wanted: tuple[str, ...] = () if module is first else _FORWARD
            if attributes["_parameters"] or isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
                wanted += ("_parameters",)
            if attributes["_modules"]:
                wanted += ("_modules",)
            yield from find(module, *wanted)
            for name, value in attributes.items():
                if type(value) in (list, dict, set) and name not in _ASIDE:
                    yield from (*find(module, name), end)
        yield end


class Seen(NamedTuple):
    """What was found of a base model."""

    reasons: tuple[str | None, ...]
    """For each layer, why it runs stock, or None."""
    stock: tuple[bool, ...]
    """For each layer, whether it does."""
    bound: tuple[object, ...]
    """For each layer its `fastbert.layers.layer.Bound`, or None where it is to be looked up as it runs."""
    watched: bool
    """Whether hooks see the hidden states between embeddings and output."""
    hooked: bool
    """Whether a layer has hooks, which are to see it called as stock code calls it."""
    drops: bool
    """Whether a dropout of a layer that runs fused now drops anything."""
    embeddings: str | None
    """Why the embeddings run stock, by what they are; None where nothing of theirs stands against the kernel."""


UNSEEN = "not looked at"


def _roots(model: nn.Module) -> tuple[Any, ...]:
    """What holds the layers of a base model, and what its encoder has beside it; then what comes before them."""
    family = family_of(model)
    modules = encoder_of(model).__dict__["_modules"]
    beside = [each for name, each in modules.items() if each is not None and name != family.stack[-1]]
    return modules[family.stack[-1]], *beside, *before_layers(model)


def _are(these: tuple[object, ...], those: tuple[object, ...]) -> bool:
    """Whether two tuples hold the same objects."""
    return len(these) == len(those) and all(map(is_, these, those))


def _shared(model: nn.Module) -> Mapping[str, object]:
    shared = family_of(model).shared
    return {} if shared is None else shared(encoder_of(model))


def look(model: nn.Module) -> Seen:
    """What is to be found of a base model, at this moment; what layers read is to be looked up as they run."""
    stack, said = stack_of(model), _shared(model)
    layers = stack.layers
    reasons = tuple([layer_is_unsupported(layer, stack.name(i), said) for i, layer in enumerate(layers)])
    hooked = any(is_hooked(module, called=True) for layer in layers for module in wrapped(layer))
    first = [module for each in before_layers(model) for module in each.modules()]
    watched = hooked or any(is_hooked(module, called=True) for module in first)
    stock = tuple([reason is not None for reason in reasons])
    fused = [unwrapped(layer) for layer, is_stock in zip(layers, stock, strict=True) if not is_stock]
    drops = any(rate for layer in fused for rate in type(layer).layout.dropouts(layer))
    embeddings = embeddings_of(model)
    fuses = hasattr(embeddings, "called") and own_method(embeddings, embeddings.called) is None
    own = tables_are_unsupported(embeddings) if fuses else "stock"
    return Seen(reasons, stock, (None,) * len(reasons), watched, hooked, drops, own)


_REST = 64
"""Calls at most that are not compared, after others that always found something changed."""


def _is_handed_on(layer: nn.Module) -> bool:
    """Whether something stands before a layer's forward, which may compile it or gather its weights."""
    attributes = vars(layer)
    return is_wrapper(layer) or "forward" in attributes or attributes.get("_compiled_call_impl") is not None


class Coverage:
    """What was last found of the layers of one encoder, and what was made of their parameters.

    A copy of it, or one that was pickled, has found nothing yet.

    Threads share it: what one has found is put in its place as a whole.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], Mapping[str, object], Snapshot, Seen] | None = None
        self.derived = Derived()
        self.calls: dict[object, tuple[Seen, object]] = {}
        """What was decided of calls, by what their arguments are, each with what was found then; see `plan`."""
        self._misses = self._rest = 0

    def __reduce__(self) -> tuple[type[Coverage], tuple[()]]:
        return Coverage, ()

    def drop(self) -> None:
        """Forgets, and with it what it keeps alive."""
        self._last = None
        self.calls = {}
        self.derived.drop()

    def watches(self, config: object) -> bool:
        """Whether a config that changes is found to have changed."""
        last = self._last
        return last is not None and any(config is each for each in last[2].configs)

    def still(self, model: nn.Module, seen: Seen) -> bool:
        """Whether that is what was last found of a base model, and nothing of it has changed."""
        last = self._last
        if last is None or last[3] is not seen:
            return False
        return _are(_roots(model), last[0]) and _shared(model) == last[1] and last[2].holds()

    def look(self, model: nn.Module) -> Seen:
        """What is to be found of a base model, at this moment."""
        if torch.compiler.is_compiling():
            return look(model)
        last = self._last
        if last is not None and self.still(model, last[3]):
            self._misses = 0
            return last[3]
        roots, said = _roots(model), _shared(model)
        self.drop()
        if self._rest:  # parameters that are others in each call: sharded, or given to functional_call
            self._rest -= 1
            return look(model)
        self._misses = min(2 * self._misses + 1, _REST)
        self._rest = self._misses - 1
        before = [module for each in roots[1:] for module in each.modules()]
        stack = stack_of(model)
        groups = [[module] for module in (*before, stack.held, *stack.groups().values())]
        groups += [list(layer.modules()) for layer in stack.layers]
        if not all(vars(m).keys() >= _ORDINARY for group in groups for m in group):  # one of torch.jit
            return look(model)
        snapshot = Snapshot(groups)  # first: what changes meanwhile is found at the next call
        seen = look(model)
        hooks = any(vars(m)[name] for m, *_ in groups for name in _FORWARD)  # which might bring other weights
        if not hooks and not is_wrapper(wrapped_encoder_of(model)) and all(p.numel() > 1 for p in snapshot.parameters):
            bound = [
                None if stock or _is_handed_on(layer) else type(layer).layout.bind(layer)
                for layer, stock in zip(stack.layers, seen.stock, strict=True)
            ]
            seen = seen._replace(bound=tuple([b if b is not None and b.is_static() else None for b in bound]))
        self._last = roots, said, snapshot, seen
        return seen

    def holds(self) -> bool:
        """Whether all is as it was last found."""
        last = self._last
        return last is not None and last[2].holds()
