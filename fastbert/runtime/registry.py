"""The families there are, and where the parts of a base model are by its family.

A family says what is its own as data (`fastbert.models.family.Family`); nothing else in fastbert asks for one by name.
"""

from __future__ import annotations

from typing import Any

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


def layers_of(model: nn.Module) -> Any:
    """The nn.ModuleList of the layers of a base model."""
    return encoder_of(model).__dict__["_modules"][family_of(model).stack[-1]]


def layers_in(encoder: Any) -> Any:
    """The nn.ModuleList of the layers of a fused encoder."""
    return encoder.__dict__["_modules"][type(encoder).family.stack[-1]]


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
