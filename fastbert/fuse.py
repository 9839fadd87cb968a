"""`fuse` and `unfuse`: the way in and the way out."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import transformers
from torch import nn
from transformers import PreTrainedModel

from .layers.copies import GEMMS, Copies
from .layers.fp8 import Fp8
from .layers.int8 import Int8
from .layers.layer import STOCK, Mixin
from .layers.low_precision import LowPrecision
from .layers.prepacked import Prepack
from .runtime.readers import HOLDS, HOOKS, Holder, Hook, reader_of
from .runtime.registry import REGISTERED, encoder_of, layers_of
from .runtime.settings import PADDINGS, Padding, Running, Settings
from .runtime.support import model_is_unsupported
from .runtime.wrappers import redirect
from .version import TRIED, is_newer, minor

FAMILIES = (
    "bert",
    "roberta",
    "xlm_roberta",
    "camembert",
    "data2vec",
    "roberta_prelayernorm",
    "xlm_roberta_xl",
    "albert",
    "electra",
    "ernie",
    "megatron_bert",
    "distilbert",
    "mpnet",
    "deberta",
    "deberta_v2",
    "modernbert",
    "nomic_bert",
    "eurobert",
    "gte",
    "jina_embeddings_v3",
    "esm",
)
"""Modules of `fastbert.models`, each named as transformers names the family's."""

_CODE = {"data2vec": "data2vec_text"}


def code_of(family: str) -> str:
    """The module of transformers that defines a family of FAMILIES."""
    return f"transformers.models.{family}.modeling_{_CODE.get(family, family)}"


LATE = frozenset(("modernbert", "nomic_bert", "eurobert", "gte", "jina_embeddings_v3", "esm"))
"""Those that transformers has changed or added since the oldest supported: where they can't be made, they run stock."""


Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(ValueError):
    """Nothing in a model could be fused; the message says why. The model has not been changed."""


def _families() -> list[Any]:
    """The families of which there may be a model: of fastbert's own, those whose code has been imported."""
    for name in FAMILIES:
        if code_of(name) in sys.modules and name not in _GONE:
            _import_family(name)
    return list(REGISTERED.values())


def _import_family(name: str) -> None:
    """Registers a family, unless a transformers newer than those tried has not what it is made of."""
    try:
        importlib.import_module(f".models.{name}", __package__)
    except Exception as error:
        tried = minor(transformers.__version__) == minor(TRIED["transformers"][1])
        if not is_newer("transformers", transformers.__version__) and (tried or name not in LATE):
            raise
        _GONE.add(name)
        warnings.warn(
            f"fastbert runs models of {name} on their stock code, which is another in transformers "
            f"{transformers.__version__}: {error}",
            RuntimeWarning,
            stacklevel=4,
        )


_GONE: set[str] = set()
"""The families that could not be made."""


def base_models(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """Every base model of a registered family inside `model`: (name, module, family)."""
    if isinstance(model, type):
        given = model.__name__
        raise TypeError(f"model is the class {given}; expected an instance, as {given}.from_pretrained(...) makes one")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected a torch.nn.Module that holds a BERT encoder"
        )
    found, families = [], _families()
    for name, module in model.named_modules():
        family = next((f for f in families if isinstance(module, f.base)), None)
        if family is not None:
            found.append((name or type(module).__name__, module, family))
    return found


Precision = Literal["fp8", "int8"]
PRECISIONS: dict[str, type[LowPrecision]] = {kind.name: kind for kind in (Fp8, Int8)}
"""By what `fuse` takes, beside None."""


def fuse(
    model: Model,
    *,
    padding: Padding = "auto",
    loss_only: bool = False,
    cuda_graphs: bool = False,
    precision: Precision | None = None,
    prepack: bool = False,
) -> Model:
    """Makes every supported encoder inside `model` run fused, in place.

    Parameters, names, `state_dict()`, saving, copying and moving stay as they are; at real tokens every output equals
    stock's within the numerical policy. A call the fast path does not cover runs the stock code: see `explain`.

    Args:
        model: any torch.nn.Module that holds a Hugging Face model of BERT's family (FAMILIES): one with any head, a
            SentenceTransformer, a CrossEncoder, a PEFT or DDP wrapper.
        padding: "packed" computes real tokens only, and returns zeros at padding, at the price of one host
            synchronisation a forward; "dense" computes every row, exactly as stock does, with none; "auto" packs where
            every module that may read the output of the base model, inside `model`, is known to leave padding alone
            (`fastbert.runtime.readers`), and is dense elsewhere, as where the model itself reads padding (a pooler over
            a masked first position, a loss taken over padding): `explain` says why. Calls whose hidden states are asked
            for or watched by hooks are dense under any of them. A base model alone packs: zeros at padding are in what
            `pipeline("feature-extraction")` returns of a batch, too, and `row / row.norm()` of such a row is NaN. What
            stands outside `model` is not seen: fuse the whole model, not the encoder of one.
        loss_only: whether a masked language model given labels returns its loss without logits (they are None), taken
            from the labelled tokens alone: the (batch, tokens, vocabulary) logits are never made.
        cuda_graphs: whether inference on a GPU launches the layers of small batches as one CUDA graph, by buckets of
            their sizes: see docs/latency.md. Elsewhere it changes nothing; `explain` says why.
        precision: None: that of the model's dtype. "fp8": inference multiplies weights and activations of FP8
            (e4m3), by the scales that `calibrate` left in the model's config, or else one of each row's own; see
            docs/fp8.md. It takes compute capability 8.9; on a CPU it is simulated. "int8": of int8, for CPUs and
            GPUs of compute capability 8.0 to 9.0; see docs/int8.md. Both are outside the numerical policy. Training,
            calls with gradients enabled, autocast and torch.compile run in the model's dtype.
        prepack: whether inference on a CPU keeps a second copy of the weights of GEMMs, in the order in which they are
            read, for one text of 16 tokens or more at a time; it takes as much memory again: see docs/latency.md.
            Copies follow weights that are written to; a write past torch's versions, as by `weight.data`, to less than
            the whole of a weight is not seen. Elsewhere it changes nothing; `explain` says why.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: nothing in `model` could be fused, or not in this `precision`; nothing was changed:
            whatever fails, or is interrupted, leaves the model as it was.
        ValueError: `padding` or `precision` is none of those; what the config says of it doesn't fit the model;
            `prepack` is asked for beside a `precision`, which keeps copies of its own.
        TypeError: `model` is not a torch.nn.Module, or `cuda_graphs` or `prepack` not a bool.
    """
    for name, value in (("cuda_graphs", cuda_graphs), ("prepack", prepack)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False")
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; expected one of {', '.join(map(repr, PADDINGS))}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, (None, *PRECISIONS)))}")
    if prepack and precision is not None:
        raise ValueError(
            f"prepack is True with precision={precision!r}, which keeps copies of its own; expected one of both"
        )
    found = base_models(model)
    reasons = [model_is_unsupported(base) for _, base, _ in found]
    if all(reasons):
        why = "; ".join(f"{name}: {reason}" for (name, _, _), reason in zip(found, reasons, strict=True))
        none = f"it holds no encoder of a supported family ({', '.join(FAMILIES)}; "
        none += "fastbert.models.classes.register adds one)"
        raise UnsupportedModelError(f"nothing in this {type(model).__name__} can be fused: {why or none}")
    supported = []
    for (name, base, family), reason in zip(found, reasons, strict=True):
        if reason is None:
            copies: Copies | None = Prepack() if prepack else None
            if precision is not None:
                copies = _low_precision(precision, name, base, family)
            supported.append((base, family, Settings(padding, loss_only, cuda_graphs, copies)))
    with _all_or_nothing(model):
        _fuse(model, supported, loss_only)
    return model


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts every module back as it was where what is done within breaks off, by Ctrl-C too."""
    names = ("fastbert", *_FORWARDS, HOLDS, STOCK)
    before = [
        (
            m,
            type(m),
            {name: m.__dict__[name] for name in names if name in m.__dict__},
            m._forward_pre_hooks.copy(),
            m._forward_pre_hooks_with_kwargs.copy(),
        )
        for m in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, hooks, with_kwargs in before:
            if type(module) is not kind:
                module.__class__ = kind
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)
            module._forward_pre_hooks.clear()  # the very object: handles of hooks refer to it
            module._forward_pre_hooks.update(hooks)
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_pre_hooks_with_kwargs.update(with_kwargs)
        raise


def _fuse(model: nn.Module, supported: list[tuple[PreTrainedModel, Any, Settings]], loss_only: bool) -> None:
    for base, family, _ in supported:
        for module in base.modules():
            if type(module) in family.fused:
                _become(module, family.fused[type(module)])
    fused = {id(base): settings for base, _, settings in supported}
    families = _families()
    bases = tuple(family.base for family in families)
    for name, module in list(model.named_modules()):
        for family in families if loss_only else ():
            if type(module) in family.loss_heads and id(module.base_model) in fused:
                _become(module, family.loss_heads[type(module)])
        held = [each for each in module.modules() if isinstance(each, bases)]
        own = [fused[id(base)] for base in held if id(base) in fused]
        if own and module not in held:
            module.__dict__[HOLDS] = Holder(module, name.count(".") + bool(name), own)
            reader = reader_of(type(module))
            if not isinstance(reader, str) and reader.hook is not None and len(own) == len(held):
                _add_hook(module, reader.hook)
    for base, _, settings in supported:  # last: until then every call runs stock, of other threads, too
        encoder = encoder_of(base)
        if (before := getattr(encoder, "fastbert", None)) is not None:  # fused before: goes on counting
            settings.counts, settings.running = before.counts, before.running
            for held in list(before.holders):
                if (holder := held()) is not None:
                    holder.hand_on(before, settings)
        encoder.fastbert = settings


def _low_precision(precision: Precision, name: str, base: PreTrainedModel, family: Any) -> LowPrecision:
    """What inference of a base model in a precision needs; raises where there can be none."""
    kind, refused = PRECISIONS[precision], f"{name} can't be fused with precision={precision!r}:"
    if reason := kind.unsupported(next(encoder_of(base).parameters()).device):
        raise UnsupportedModelError(f"{refused} {reason}")
    layers = layers_of(base)
    state: LowPrecision = kind.of(base.config, len(layers))
    if len(reasons := state.reasons(layers, family.fused)) == len(GEMMS) * len(layers):
        (index, gemm), why = next(iter(reasons.items()))
        raise UnsupportedModelError(f"{refused} no GEMM can run in {kind.title}; layer {index} {gemm}: {why}")
    return state


# What a module may hold its forward as: accelerate keeps the one before its hooks, and before its mixed precision.
_FORWARDS = ("forward", "_old_forward", "_original_forward")


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes `module` one of another class; a forward of its own that ends in the class's then ends in the new one's.

    What it ended in is what its stock code is from then on, whatever becomes of the class.
    """
    own, held = type(module).forward, module.__dict__.pop(STOCK, None)
    target = kind.forward if held is None else held
    seen: dict[int, tuple[object, object]] = {}
    for name in _FORWARDS:
        if (before := module.__dict__.get(name)) is not None:
            module.__dict__[name] = redirect(before, {own: target}, seen)
            if held is None and module.__dict__[name] is not before:
                module.__dict__[STOCK] = own
    module.__class__ = kind


def _add_hook(module: nn.Module, hook: Hook) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def unfuse(model: Model) -> Model:
    """Restores the stock forward of everything `fuse` changed inside `model`, in place; returns the same object.

    Other threads may be calling `model` meanwhile, and `fuse` may be called so, too: a forward ends as it began. This
    waits for those under way; those that begin meanwhile run stock.

    Raises:
        RuntimeError: it is called within a forward of `model`, by a hook say, for which it would have to wait. Nothing
            was changed.
    """
    found = base_models(model)
    with _all_or_nothing(model):
        _unfuse(model, found)
    return model


def _unfuse(model: nn.Module, found: list[tuple[str, nn.Module, Any]]) -> None:
    found = [each for each in found if hasattr(encoder_of(each[1]), "fastbert")]
    running = [encoder_of(base).fastbert.running for _, base, _ in found]
    for _, base, _ in found:
        del encoder_of(base).fastbert  # first: calls that begin from here on run stock
    if found:
        _wait_for_forwards(model, running)
    for _, base, family in found:
        stock = {fused: plain for plain, fused in family.fused.items()}
        for module in base.modules():
            if type(module) in stock:
                _become(module, stock[type(module)])
    families = _families()
    for module in model.modules():
        module.__dict__.pop(HOLDS, None)
        for hook in HOOKS:
            _remove_hook(module, hook)
        for family in families:
            for plain, fused in family.loss_heads.items():
                if type(module) is fused:
                    _become(module, plain)


def _wait_for_forwards(model: nn.Module, running: list[Running]) -> None:
    """Waits for the forwards of base models inside `model` that other threads are in at this moment."""
    if any(threading.get_ident() in each.threads for each in running):
        raise RuntimeError(
            f"unfuse is called within a forward of this {type(model).__name__}; call it once that is done"
        )
    while not {thread.ident for thread in threading.enumerate()}.isdisjoint(
        t for each in running for t in each.threads
    ):
        time.sleep(0.001)


def _remove_hook(module: nn.Module, hook: object) -> None:
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


class FusedModel(Mixin):
    """Fuses a model as it is built; one that can't be (a decoder) stays stock, and `explain` says why."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if any(model_is_unsupported(base) is None for _, base, _ in base_models(self)):
            fuse(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As transformers asks: for its own classes alone it converts the names that checkpoints of them have."""
        kinds = (
            kind
            for kind in cls.__mro__
            if issubclass(kind, transformers.PreTrainedModel) and not issubclass(kind, FusedModel)
        )
        stock: Any = next(kinds)
        return bool(stock.is_custom_code())
