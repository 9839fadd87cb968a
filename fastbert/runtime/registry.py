"""The families there are, and where the parts of a base model are by its family.

A family says what is its own as data (`fastbert.models.family.Family`); nothing else in fastbert asks for one by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .wrappers import unwrapped

REGISTERED: dict[type[object], Any] = {}
"""Families by the class of their base models."""


def family_of(model: object) -> Any:
    """The family of a base model, stock or fused.

    Raises:
        LookupError: it is of none.
    """
    for kind in type(model).__mro__:
        if kind in REGISTERED:
            return REGISTERED[kind]
    raise LookupError(f"{type(model).__name__} is no base model of a registered family")


def encoder_of(model: nn.Module) -> Any:
    """The stack of layers of a base model, out of what transparent wrappers it is in."""
    *holder, last = family_of(model).stack
    encoder = model
    for name in holder:
        encoder = encoder.__dict__["_modules"][name]
    return encoder if last in encoder.__dict__["_modules"] else unwrapped(encoder)


def has_fused_encoder(model: nn.Module) -> bool:
    """Whether the encoder of a base model is one that `fuse` has made, and not another in its place."""
    family = family_of(model)
    return isinstance(encoder_of(model), family.fused[family.encoder])


def wrapped_encoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers of a base model with the wrappers that it is in."""
    for name in family_of(model).stack[:-1]:
        model = model.__dict__["_modules"][name]
    return model


class Stack(NamedTuple):
    """The layers of a base model, and in which order a forward calls them."""

    held: Any
    """The nn.ModuleList that holds them, or groups of them."""
    layers: Any
    """Each once, in the order in which they are first called: those that `held` has, where it has no groups."""
    calls: Sequence[int]
    """Which of these is called, one after the other: one that is shared more than once."""
    at: tuple[str, ...]
    """Where the base model has `held`."""
    paths: tuple[str, ...] | None
    """Where `held` has each of the layers; None: by its number."""
    lost: str | None = None
    """Why layers were not found in groups; then these are what `held` has, called once each."""

    def name(self, layer: int) -> str:
        """Where the base model has a layer."""
        return ".".join((*self.at, str(layer) if self.paths is None else self.paths[layer]))

    def groups(self) -> dict[str, nn.Module]:
        """The modules between `held` and the layers, by where the base model has them."""
        parts = [path.split(".") for path in self.paths or ()]
        inside = dict.fromkeys(".".join(each[:end]) for each in parts for end in range(1, len(each)))
        return {".".join((*self.at, path)): self.held.get_submodule(path) for path in inside}


def stack_within(family: Any, encoder: nn.Module) -> Stack:
    """That of an encoder, by its family."""
    held: Any = encoder.__dict__["_modules"][family.stack[-1]]
    if family.order is None:
        return Stack(held, held, range(len(held)), family.stack, None)
    try:
        order = family.order(encoder)
        places = {path: i for i, path in enumerate(dict.fromkeys(order))}
        layers = [held.get_submodule(path) for path in places]
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # somebody's own is in their place
        return Stack(held, held, range(len(held)), family.stack, None, f"{type(error).__name__}: {error}")
    return Stack(held, layers, [places[path] for path in order], family.stack, tuple(places))


def stack_of(model: nn.Module) -> Stack:
    """That of a base model."""
    return stack_within(family_of(model), encoder_of(model))


def stack_in(encoder: Any) -> Stack:
    """That of a fused encoder."""
    return stack_within(type(encoder).family, encoder)


def layers_of(model: nn.Module) -> Any:
    """`Stack.layers` of a base model."""
    return stack_of(model).layers


def layers_in(encoder: Any) -> Any:
    """`Stack.layers` of a fused encoder."""
    return stack_in(encoder).layers


def embeddings_of(model: nn.Module) -> Any:
    """The embeddings of a base model."""
    for name in family_of(model).embeddings_at:
        model = model.__dict__["_modules"][name]
    return model


def table_of(embeddings: nn.Module, name: str | None) -> Any:
    """A table of embeddings by its name, as `Family.ids` has it; None where there is none."""
    return embeddings if name == "" else embeddings.__dict__["_modules"].get(name)


def before_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of a base model that make the first hidden states: its embeddings, and what comes between."""
    modules = model.__dict__["_modules"]
    found = [modules[name] for name in family_of(model).between if modules.get(name) is not None]
    return [embeddings_of(model), *found]


def widen(model: nn.Module) -> None:
    """Has base models in `model`, in float64, compute in float64 throughout: see `Family.widen`."""
    for module in list(model.modules()):
        for kind in type(module).__mro__:
            if kind in REGISTERED and REGISTERED[kind].widen is not None:
                REGISTERED[kind].widen(module)
