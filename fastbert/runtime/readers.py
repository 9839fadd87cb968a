"""Who reads what a base model returns: packing is right only if every one of them leaves padding alone.

Packed rows come back with zeros at padding, where stock has values. So of all that stands in what `fuse` was given,
around the base model or beside it, every module must be known to ignore those rows, its children too. What is known is
data, one row a class: here, and in each family's heads and parts. A class without a row, one that overrides code of the
class it is known as, one whose forward has been replaced, and a hook that sees the rows may all read padding: then the
layout is dense, which is exact everywhere, and `explain` names who it is.

A row speaks of the code that its class had when it was first met, and only if that came with the class's own package.
Modules are looked at anew in every call: what is replaced after `fuse` counts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .known import ELEMENTWISE, loss_is_replaced, methods_used
from .registry import REGISTERED, family_of
from .support import ROWWISE_LINEARS, is_harmless, is_placed, is_rowwise
from .wrappers import is_transparent, is_wrapper

HOLDS = "_fastbert"
"""Attribute of a module that holds base models: its `Holder`."""

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Call = tuple[Args, Kwargs]
Hook = Callable[..., "Call | None"]


class Maps(NamedTuple):
    """Which attention maps a call is to compute."""

    layers: frozenset[int]
    heads: list[int] | None = None
    """Of each of these layers; None: all."""
    take: Callable[[int, Tensor, Tensor | None], None] | None = None
    """Called with a layer, its map, (B, heads, S, S), as it is made, and the key mask of a dense layout.

    None: the model returns maps, as stock does.
    """
    alone: bool = False
    """Whether nothing else of the call is wanted: layers after the last of these needn't run."""


class Reads(NamedTuple):
    """What a call of a head reads beyond real tokens: arguments that its hook adds, which `plan_call` takes out."""

    padded_labels: Tensor | None = None
    """(B, S), labels of a loss over labelled tokens."""
    reads_padding: bool = False
    """Whether it takes in every row."""
    told: bool = False
    """Whether the hook of whoever has one has run: its forward may be called past it."""
    maps: Maps | None = None
    """Those of `fastbert.attention_maps`; no hook adds it."""


class Reader(NamedTuple):
    """What is known of a class: that it ignores padding, on these conditions."""

    hook: Hook | None = None
    """Forward pre-hook that says of a call what it reads (`Reads`); None: it never reads padding."""
    first: Callable[..., bool] | None = None
    """Whether a module of this class reads position 0 of every sequence, real or not; None: it does not."""
    unless: Callable[..., str | None] | None = None
    """Why a module of this class may read padding after all."""
    children: tuple[str, ...] | None = None
    """Which of its children meet the rows, and so must be known; None: all but `apart`."""
    apart: tuple[str, ...] = ()
    """Children that don't meet the rows."""
    around: bool = False
    """Whether it is called with what goes into the base model, so that its pre-hooks don't see the rows."""
    derived: bool = False
    """Whether classes derived from it count, whatever they override, while they keep its forward."""
    forward: Callable[..., object] | None = None
    """Its forward, as it was when the class was first met."""
    methods: Mapping[str, object] = {}
    """Other methods of the class that its forward calls, as they were then: a replaced one may read padding."""


@functools.cache
def parameter_names(kind: Any) -> tuple[str, ...]:
    """Of the forward of a class, without self."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def named_arguments(kind: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Kwargs:
    """The arguments of a call of `kind.forward`, all by name."""
    return {**dict(zip(parameter_names(kind), args, strict=False)), **kwargs}


@functools.cache
def _takes_any(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class takes keyword arguments of any name."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def _is_overtaken(module: nn.Module, hook: Hook, positional: bool = False) -> bool:
    """Whether pre-hooks that came after `hook` may change what it tells of: arguments by name, or `positional` ones."""
    hooks, named = list(module._forward_pre_hooks.items()), module._forward_pre_hooks_with_kwargs
    place = next((i for i, (_, each) in enumerate(hooks) if each is hook), len(hooks))
    later = [each for key, each in hooks[place + 1 :] if positional or key in named]
    return not all(is_harmless(each, called=True) for each in later)


def _tells(module: nn.Module, hook: Hook, args: Args) -> bool:
    """Whether `hook`, which runs, sees the call as it will be; if not, it comes last from the next call on."""
    if not _is_overtaken(module, hook, positional=bool(args)):
        return True
    if not torch.compiler.is_compiling():
        hooks: Any = module._forward_pre_hooks
        hooks.move_to_end(next(key for key, value in hooks.items() if value is hook))
    return False


_ASIDE = threading.local()


def _tell(model: nn.Module, reads: Reads, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
    """Has the base model of a head know what the call reads: by arguments of names that only `plan_call` knows.

    transformers hands these on. Heads that don't (`Family.run`), or take no such arguments, have them laid aside, for
    the next call in this thread that is given the same tensor.
    """
    kind: Any = type(model)
    if family_of(model.base_model).run is None and _takes_any(kind):
        return args, {**kwargs, **reads._asdict()}
    _lay_aside(named_arguments(type(model), args, kwargs), reads)
    return args, kwargs


def _lay_aside(call: Mapping[str, object], reads: Reads) -> None:
    if not torch.compiler.is_compiling():  # compiled, calls are dense
        given = _first(call)
        _ASIDE.last = (weakref.ref(given), reads) if isinstance(given, Tensor) else None


def _first(call: Mapping[str, object]) -> object:
    return call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]


def told_aside(call: Mapping[str, object]) -> Reads | None:
    """What was laid aside for a call of a base model, by its arguments; it is gone after that."""
    last = getattr(_ASIDE, "last", None)
    if last is None:
        return None
    _ASIDE.last = None
    reads: Reads = last[1]
    return reads if last[0]() is _first(call) else None


def _once_told_names(hook: Hook) -> Hook:
    """A hook that says nothing where torch gives it no arguments by name.

    So it does in another thread while `fuse` adds the hook, or `unfuse` takes it away: of a hook, and of what it is to
    be given, torch keeps two dictionaries. A base model that is told nothing is dense, if it runs fused at all.
    """

    @functools.wraps(hook)
    def tell(module: nn.Module, args: Args, kwargs: Kwargs | None = None) -> Call | None:
        return None if kwargs is None else hook(module, args, kwargs)

    return tell


@_once_told_names
def tell_labels(model: nn.Module, args: Args, kwargs: Kwargs) -> Call:
    """Of a head with a loss over labelled tokens: shows its base model the labels, or that the loss is another."""
    labels = named_arguments(type(model), args, kwargs).get("labels")
    other = labels is not None and not torch.compiler.is_compiling() and loss_is_replaced(model)
    return _tell(model, Reads(labels, other, told=_tells(model, tell_labels, args)), args, kwargs)


@_once_told_names
def tell_spans(model: nn.Module, args: Args, kwargs: Kwargs) -> Call:
    """Of a head with a loss that takes in padding: tells its base model so when there is a loss."""
    call = named_arguments(type(model), args, kwargs)
    loss = call.get("labels") is not None or call.get("start_positions") is not None
    return _tell(model, Reads(reads_padding=loss, told=_tells(model, tell_spans, args)), args, kwargs)


_LOSSES = ("labels", "start_positions", "end_positions")


@_once_told_names
def tell_features(module: nn.Module, args: Args, kwargs: Kwargs) -> Call | None:
    """Of sentence-transformers' Transformer, which calls the forward of its model past the hooks.

    Tokens that expand a query have mask 0 unless they are attended to, and are scored.
    """
    features = {**(args[0] if args else {}), **kwargs}
    expands = features.get("query_expansion_positions") is not None and not _attends(module)
    told = all(features.get(name) is None for name in _LOSSES) and _tells(module, tell_features, args)
    _lay_aside(features, Reads(reads_padding=expands, told=told))  # for a model that doesn't hand names on
    if getattr(module, "model_forward_params", ()) is not None:
        return None
    return args, {**kwargs, "reads_padding": expands, "told": told}


def _attends(module: nn.Module) -> bool:
    """Whether the tokens that expand a query of sentence-transformers are attended to: then they are real ones."""
    return bool((getattr(module, "query_expansion", None) or {}).get("attend"))


HOOKS: tuple[Hook, ...] = (tell_labels, tell_spans, tell_features)

# What a head says of itself, in its family's heads.
REAL = Reader(around=True)
"""It reads real tokens, and what the pooler of its base model makes of the first."""
FIRST = Reader(around=True, first=lambda head: True)
"""It reads the first row of every sequence, which may be padding."""
LABELS = Reader(around=True, hook=tell_labels)
"""Its loss is taken over labelled tokens, wherever they are."""
SPANS = Reader(around=True, hook=tell_spans)
"""Its loss takes in padding."""
SUMMARY = Reader(
    around=True,
    first=lambda head: True,
    unless=lambda head: (
        None if getattr(head.config, "summary_type", "last") == "first" else "it summarises rows, padding too"
    ),
)
"""It reads a summary of the rows: of the first, or of others, padding too (`config.summary_type`)."""


def _longer(module: nn.Module) -> str | None:
    """Of sentence-transformers' Transformer: whether its mask is not that of the rows that are read."""
    adapters = getattr(module._modules.get("model"), "peft_config", None) or {}
    if isinstance(adapters, dict) and any(getattr(each, "is_prompt_learning", False) for each in adapters.values()):
        return "its prompts make sequences longer than the mask, and then all rows are pooled"
    if getattr(module, "query_expansion", None) is None or _attends(module) or module.model_forward_params is None:
        return None
    return "it expands queries with tokens of mask 0, which are scored"


def _activation(module: nn.Module) -> str | None:
    function = module.activation_function
    return None if isinstance(function, nn.Module) else f"its activation is {function!r}, not a module"


def _decoder(module: nn.Module) -> str | None:
    kind = type(module.decoder)
    if kind.__module__.startswith("transformers.models.") and _is_original(kind, "forward"):
        return None
    return f"its decoder is {a(kind)}"


def _layer_norm(module: nn.LayerNorm) -> str | None:
    return None if len(module.normalized_shape) == 1 else "it normalises over more than the last dimension"


def _past_hooks(module: nn.Module) -> str | None:
    """Of PEFT's AdaLoraModel, which calls the forward of its model past the hooks."""
    hooks = module.model._forward_pre_hooks.values()
    if not any(hook in HOOKS for hook in hooks):
        return None
    return "it calls the head past the hook that tells what is read"


def _rowwise(module: nn.Module) -> str | None:
    return None if is_rowwise(module, sharded=True) else "it is no adapter of a plain linear layer"


_ROWS = Reader()  # each row from the same row of its input alone
_AROUND = Reader(around=True)
_WRAPPER = Reader(
    around=True, unless=lambda module: None if is_wrapper(module) else "its checkpoint_fn is a custom one"
)
_PEFT = Reader(around=True, children=("base_model",))  # beside it, what makes prompts

# By class: torch's.
_KNOWN: dict[type[nn.Module], Reader] = {
    **dict.fromkeys((nn.Linear, nn.Dropout, nn.Identity, nn.Sequential, *ELEMENTWISE), _ROWS),
    nn.LayerNorm: Reader(unless=_layer_norm),
    **dict.fromkeys((nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict), _ROWS),
    nn.Embedding: Reader(children=()),
    nn.CrossEntropyLoss: Reader(children=()),  # DistilBERT's: of logits and labels that its head tells
    nn.DataParallel: _AROUND,
    nn.parallel.DistributedDataParallel: _AROUND,
}
# By where it is defined; without a module, anywhere in the package, as sentence-transformers moves its modules about.
_NAMED: dict[str, Reader] = {
    "torch.distributed.fsdp.fully_sharded_data_parallel:FullyShardedDataParallel": _AROUND,
    "torch._dynamo.eval_frame:OptimizedModule": _AROUND,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:CheckpointWrapper": _WRAPPER,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:OffloadWrapper": _WRAPPER,
    "torch.optim.swa_utils:AveragedModel": _AROUND,
    # The decoder attends to rows of the encoder by its mask.
    "transformers:EncoderDecoderModel": Reader(
        around=True,
        first=lambda model: True,  # of a sequence without a real token it takes the mean
        unless=_decoder,
        children=("encoder", "enc_to_dec_proj"),
    ),
    # PEFT: what hands its arguments on, with prompts before them in the mask, too; and wrappers around a head's layers.
    "peft:PeftModel": _PEFT,
    "peft:PeftModelForSequenceClassification": _PEFT,
    "peft:PeftModelForTokenClassification": _PEFT,
    "peft:PeftModelForQuestionAnswering": _PEFT,
    "peft:PeftModelForFeatureExtraction": _PEFT,
    "peft:BaseTuner": Reader(around=True, derived=True),
    "peft:AdaLoraModel": Reader(around=True, unless=_past_hooks),
    "peft:ModulesToSaveWrapper": _ROWS,
    # sentence-transformers: the models, and what can stand in them; as of 6.2.0.
    "sentence_transformers:SentenceTransformer": _AROUND,
    "sentence_transformers:CrossEncoder": _AROUND,
    "sentence_transformers:SparseEncoder": _AROUND,
    "sentence_transformers:MultiVectorEncoder": _AROUND,
    "sentence_transformers:Router": _AROUND,
    "sentence_transformers:Transformer": Reader(around=True, hook=tell_features, unless=_longer),
    "sentence_transformers:MLMTransformer": Reader(around=True, hook=tell_features, unless=_longer),
    "sentence_transformers:Pooling": Reader(first=lambda pooling: "cls" in pooling.pooling_mode),  # others by the mask
    "sentence_transformers:Normalize": _ROWS,
    "sentence_transformers:Dense": Reader(unless=_activation),
    "sentence_transformers:Dropout": _ROWS,
    "sentence_transformers:LayerNorm": _ROWS,
    "sentence_transformers:WordWeights": _ROWS,
    "sentence_transformers:WeightedLayerPooling": _ROWS,
    "sentence_transformers:SpladePooling": Reader(),  # logits times the mask
    "sentence_transformers:SparseAutoEncoder": Reader(children=()),  # of the sentence's embedding
    "sentence_transformers:MultiVectorMask": Reader(),  # scores the mask and what expands queries
    "sentence_transformers:HierarchicalTokenPooling": Reader(),  # of tokens by the mask, as the next
    "sentence_transformers:LambdaTokenPooling": Reader(),
    "sentence_transformers:StaticEmbedding": Reader(children=()),  # of ids
    "sentence_transformers:SparseStaticEmbedding": Reader(children=()),
    "sentence_transformers:_Float32Linear": _ROWS,
}
# What a class derived from a known one may define anew: nothing of it runs in a forward.
_HARMLESS = {
    "is_custom_code",
    "_apply",
    "train",
    "_init_weights",
    "init_weights",
    "post_init",
    "save_pretrained",
    "load",
    "save",
}
_CALLS = {"__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl"}


def know(
    bases: Iterable[type],
    before: Iterable[str],
    heads: Mapping[type, Reader],
    parts: Iterable[type],
    fused: Mapping[type, type],
) -> None:
    """Makes the classes of a family known: its base models, heads and parts, and heads that return their loss.

    `before`: the children of a base model that the rows come from; all others may read them.
    """
    _KNOWN.update(dict.fromkeys(bases, Reader(around=True, apart=tuple(before))))
    _KNOWN.update(dict.fromkeys(parts, _ROWS))
    _KNOWN.update(heads)
    _KNOWN.update({own: heads[plain] for plain, own in fused.items()})
    for kind in (*bases, *heads, *parts, *fused.values()):
        _MET.pop(kind, None)  # of an earlier description, which was refused
        reader_of(kind)  # keeps its forward


_MET: dict[type[nn.Module], Reader] = {}
"""Classes met so far that are known."""


def reader_of(kind: type[nn.Module]) -> Reader | str:
    """What is known of a class, or why nothing is."""
    found = _MET.get(kind)
    if found is not None and kind.forward is found.forward:
        replaced = [name for name, method in found.methods.items() if getattr(kind, name, None) is not method]
        return f"whose {_listed(replaced)} has been replaced, and may read padding" if replaced else found
    known: Any = next((each for each in kind.__mro__ if _row(each) is not None), None)
    row = None if known is None else _row(known)
    if row is None:
        return "which may read padding"
    if row.derived:
        changed = [] if kind.forward is known.forward else ["forward"]
    else:
        changed = [name for own in kind.__mro__[: kind.__mro__.index(known)] for name in _overridden(own, known)]
    if changed:
        return f"{a(known)} with {_listed(changed)} of its own, which may read padding"
    used = methods_used(known)
    made = "family" in vars(known)  # a fused class, whose forward is fastbert's
    replaced = [] if made else [name for name in used if not _is_original(known, name)]
    if found is not None or replaced:  # met with another forward before, or with one that its package has not
        return f"whose {_listed(replaced) or 'forward'} has been replaced, and may read padding"
    _MET[kind] = row._replace(
        forward=kind.forward, methods={name: getattr(kind, name) for name in used if name != "forward"}
    )
    return _MET[kind]


def _row(kind: type) -> Reader | None:
    if kind in _KNOWN:
        return _KNOWN[kind]
    if not issubclass(kind, nn.Module):
        return None
    if kind.__module__ == "transformers.activations":
        return _ROWS
    if kind.__module__ in ROWWISE_LINEARS:
        return Reader(unless=_rowwise, children=())
    package = kind.__module__.partition(".")[0]
    return _NAMED.get(f"{package}:{kind.__qualname__}") or _NAMED.get(f"{kind.__module__}:{kind.__qualname__}")


def _overridden(own: type, known: type) -> list[str]:
    """The functions of `known` that `own`, further down, has in their place."""
    names = [n for n in vars(own) if n in _CALLS or not (n.startswith("__") or n in _HARMLESS)]
    kinds = (FunctionType, property, classmethod, staticmethod)
    return [name for name in names if isinstance(inspect.getattr_static(known, name, None), kinds)]


def a(kind: type) -> str:
    """The name of a class with its article."""
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _is_original(kind: type, name: str) -> bool:
    """Whether a method of a class, and all that it wraps, was written in the package of who defines it, or in torch.

    Decorators of transformers are its heads' own, whoever wrote them.
    """
    definer = next((each for each in kind.__mro__ if name in vars(each)), kind)

    def folders(*names: str) -> tuple[str, ...]:
        packages = (sys.modules.get(package) for package in names)
        return tuple(os.path.dirname(str(package.__file__)) + os.sep for package in packages if package is not None)

    own = (*folders(definer.__module__.partition(".")[0], "torch"), contextlib.__file__)  # its decorators
    around = own + folders("transformers")
    function = getattr(kind, name)
    while function is not None:
        code, inner = getattr(function, "__code__", None), getattr(function, "__wrapped__", None)
        if code is None or not code.co_filename.startswith(own if inner is None else around):
            return False
        function = inner
    return True


class Readings(NamedTuple):
    """What reads the output of a base model."""

    unknown: tuple[nn.Module, str] | None = None
    """A module that may read padding, and what it is."""
    first: bool = False
    """Whether position 0 of every sequence is read, real or not."""
    tells: nn.Module | None = None
    """A module that says of each call what it reads, by a hook."""


def readings(root: nn.Module) -> Readings:
    """Looks at every module of `root` that may meet the output of a base model in it, or at a base model alone."""
    first, tells = False, None
    todo: list[nn.Module] = [root]
    while todo:
        module = todo.pop()
        kind = type(module)
        row = _MET.get(kind)
        if row is None or kind.forward is not row.forward:
            judged = reader_of(kind)
            if isinstance(judged, str):
                return Readings((module, f"{a(kind)}, {judged}"))
            row = judged
        attributes = module.__dict__
        if attributes["_forward_hooks"] or attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
            if not all(is_harmless(hook, called=True) for hook in attributes["_forward_hooks"].values()):
                return Readings((module, "hooked: what sees its output may read padding"))
            if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
                return Readings((module, "hooked: what sees its gradients may read padding"))
        before = attributes["_forward_pre_hooks"]
        if row.hook is not None and before and _is_overtaken(module, row.hook):
            return Readings((module, "hooked after fuse: what a hook adds to its call may read padding"))
        if (
            before
            and not (row.around and _holds_base_model(module))
            and not all(is_harmless(hook, called=True) for hook in before.values())
        ):
            return Readings((module, "hooked: what sees its input may read padding"))
        if "forward" in attributes and not _hands_on(module):
            return Readings((module, "given a forward of its own, which may read padding"))
        if own := sorted(row.methods.keys() & attributes.keys()):
            return Readings((module, f"given {_listed(own)} of its own, which may read padding"))
        if row.unless is not None and (why := row.unless(module)) is not None:
            return Readings((module, f"{a(kind)}: {why}"))
        first = first or (row.first is not None and row.first(module))
        tells = module if row.hook is not None and tells is None else tells
        children = attributes["_modules"]
        if row.children is None:
            todo += [each for name, each in children.items() if each is not None and name not in row.apart]
        else:
            todo += [children[name] for name in row.children if children.get(name) is not None]
    return Readings(None, first, tells)


def _holds_base_model(module: nn.Module) -> bool:
    """Whether a module is a base model, or around one: it is called with what goes into that."""
    bases = tuple(REGISTERED)
    return any(isinstance(each, bases) for each in module.modules())


def _hands_on(module: nn.Module) -> bool:
    """Whether the forward of a module itself hands on to that of its class."""
    if is_placed(module) or type(module).__module__ == "torch._dynamo.eval_frame":
        return True
    return is_transparent(module.__dict__["forward"], type(module).forward)


class Holder:
    """Ties a module that holds base models to what `fuse` left on those; copied and pickled together with it.

    A base model knows by it what it stands in, without holding it: a base model that is copied, pickled or kept
    alone comes alone. A shallow copy of the module shares it: by its references that is told, and by outliving its
    module.
    """

    def __init__(self, module: nn.Module, depth: int, settings: list[Any]) -> None:
        self.module, self.depth, self.settings = weakref.ref(module), depth, settings
        for each in settings:
            each.holders.add(Held(self, each.holders))

    def hand_on(self, before: Any, settings: Any) -> None:
        """Ties its module, if it still has this one, to what a later `fuse`, of less than that, leaves there."""
        module = self.module()
        if module is not None and module.__dict__.get(HOLDS) is self:
            self.settings = [settings if each is before else each for each in self.settings]
            settings.holders.add(Held(self, settings.holders))

    def __getstate__(self) -> Args:
        return self.module(), self.depth, self.settings

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class Held(weakref.ref[Holder]):
    """A weak reference to a `Holder`, with what that knows; it leaves the set that it is in as that dies."""

    __slots__ = ("depth", "module")

    def __new__(cls, holder: Holder, held: set[Held]) -> Held:
        return super().__new__(cls, holder, held.discard)

    def __init__(self, holder: Holder, held: set[Held]) -> None:
        super().__init__(holder, held.discard)  # type: ignore[call-arg]
        self.depth, self.module = holder.depth, holder.module


def _references(holders: Iterable[Held]) -> list[int]:
    """How many references there are to each. In C alone: no other thread sees those that this takes."""
    return list(map(sys.getrefcount, map(weakref.ref.__call__, holders)))


class ShallowCopy(nn.Module):
    """Of what `fuse` was given there is a shallow copy, which can't be looked at: no known reader."""


_KEPT = {HOLDS: Holder(ShallowCopy(), 0, [])}
_ONE = _references([Held(_KEPT[HOLDS], set())])[0]
"""`_references` of one that a single module has."""


def outermost(base: nn.Module, holders: Iterable[Held]) -> list[nn.Module]:
    """What `fuse` was given, if there still is such a thing, or what is left of it around the base model."""
    around = tuple(holders)
    if any(references > _ONE for references in _references(around)):
        return [ShallowCopy()]
    alive = [(each.depth, each.module()) for each in around]
    if any(module is None for _, module in alive):
        return [ShallowCopy()]
    first = min((depth for depth, _ in alive), default=0)
    found = [module for depth, module in alive if depth == first and module is not None]
    if not found or "forward" in base.__dict__:  # a shallow copy of the base model may have that alone
        found.append(base)
    return found


def readings_of(roots: list[nn.Module]) -> Readings:
    """`readings` of all that a base model stands in."""
    found = Readings()
    for each in map(readings, roots):
        if each.unknown is not None:
            return each
        tells = each.tells if found.tells is None else found.tells
        found = Readings(None, found.first or each.first, tells)
    return found


def unknown_reader(roots: list[nn.Module]) -> str | None:
    """Why padded calls of a base model in `roots` are dense under padding="auto", for a reader to read."""
    for root in roots:
        if (found := readings(root).unknown) is not None:
            module, why = found
            name = next((name for name, each in root.named_modules() if each is module), "")
            return f"{name or 'the model itself'} is {why}"
    return None
