"""The feed-forward half of a layer: a linear layer, an activation, perhaps a gate, and the linear layer behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

from .. import ops
from ..runtime.support import activation_is_unsupported
from .context import Context
from .gemm import Called, Gemm, Linear, Norm, Path, Precision, Quantized, child
from .norm import RmsNorm, dropouts_at, norm_of, part_is_replaced, rate_of

# transformers' activation classes by the value of torch.nn.functional.gelu's `approximate` that computes the same.
_GELU = {
    getattr(activations, name): approximate
    for name, approximate in (
        ("GELUActivation", "none"),
        ("NewGELUActivation", "tanh"),
        ("FastGELUActivation", "tanh"),
        ("PytorchGELUTanh", "tanh"),  # before transformers 5
        ("GELUTanh", "tanh"),
    )
    if hasattr(activations, name)
}


_SILU = (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU))
_GATES = {"none": "gelu", "tanh": "gelu_tanh"}


def gate_of(activation: object) -> str | None:
    """An activation as `ops.linear_gated` names it, where it has that."""
    if activation_is_unsupported(activation) is None and type(activation) in _SILU:
        return "silu"
    return _GATES.get(gelu_of(activation) or "")


def gelu_of(activation: object) -> str | None:
    """`approximate` as torch.nn.functional.gelu has it, where an activation computes that; else None."""
    return _GELU.get(type(activation)) if activation_is_unsupported(activation) is None else None


@dataclass(frozen=True)
class FeedForward:
    """Where the layers of a family keep their feed-forward, and what is its own about it. The defaults are BERT's."""

    up: Path = ("intermediate", "dense")
    gate: Path | None = None
    """A linear layer by whose result, activated, the one of `up` is multiplied."""
    is_gated: bool = False
    """Whether `up` gives both, side by side: first what is activated, then what it is multiplied by."""
    activation: Path = ("intermediate", "intermediate_act_fn")
    """Of a module or a function that works element by element."""
    function: nn.Module | None = None
    """That itself, where stock code calls a function of its file and no path leads to it: `activation` is ()."""
    down: Path = ("output", "dense")
    down_dropout: Path | None = ("output", "dropout")
    """As `Attention.output_dropout`."""
    between_dropout: Path | None = None
    """The same, of what `down` takes."""
    norm: Path = ("output", "LayerNorm")
    kinds: Mapping[Path, type[nn.Module]] = field(default_factory=dict)
    """As `Attention.kinds`."""

    def gemms(self) -> dict[str, tuple[Path, ...]]:
        """The linear layers of each GEMM, side by side."""
        found: dict[str, tuple[Path, ...]] = {"up": (self.up,), "down": (self.down,)}
        return found if self.gate is None else {"gate": (self.gate,), **found}

    def dropout_paths(self) -> tuple[Path | None, Path | None]:
        """Where the dropouts are, of the result and of what the last GEMM takes."""
        return self.down_dropout, self.between_dropout

    def parts(self, layer: nn.Module) -> Iterator[tuple[Path, nn.Module, type[nn.Module]]]:
        """(path, submodule, class) of all whose code is known: `kinds`, and the dropout."""
        for path, kind in self.kinds.items():
            yield path, child(layer, *path), kind
        yield from dropouts_at(layer, self.dropout_paths())

    def activation_of(self, layer: nn.Module) -> Any:
        """What is applied between the two linear layers."""
        if self.function is not None:
            return self.function
        *holder, name = self.activation
        return getattr(child(layer, *holder), name)

    def unsupported(self, layer: nn.Module, name: str, sharded: bool = False) -> str | None:
        """Why a layer of that name can't run fused, by what is this half's own."""
        for path, module, kind in self.parts(layer):
            if reason := part_is_replaced(".".join((name, *path)), module, kind):
                return reason
        if reason := activation_is_unsupported(self.activation_of(layer)):
            return f"{'.'.join((name, *self.activation))} is {reason}"
        return None

    def bind(self, layer: nn.Module, precision: Precision) -> BoundFeedForward:
        """The half of a layer with all that it reads looked up."""
        found = {
            name: precision(name, tuple([child(layer, *path) for path in paths]))
            for name, paths in self.gemms().items()
        }
        activation, up = self.activation_of(layer), found["up"]
        gated = self.is_gated or self.gate is not None
        approximate = None if gated or isinstance(up, Called) else gelu_of(activation)
        norm = norm_of(child(layer, *self.norm))
        gating = gate_of(activation) if gated else None
        found_gate = found.get("gate")
        return BoundFeedForward(up, found["down"], norm, activation, approximate, found_gate, self.is_gated, gating)

    def dropouts(self, layer: nn.Module) -> tuple[float, float]:
        """Rates at which dropout now drops: of the result, and of what the last GEMM takes."""
        return rate_of(layer, self.down_dropout), rate_of(layer, self.between_dropout)


class BoundFeedForward(NamedTuple):
    """The feed-forward half of one layer."""

    first: Gemm
    last: Gemm
    norm: Norm | RmsNorm | None
    activation: Callable[[Tensor], Tensor]
    approximate: str | None
    """As torch.nn.functional.gelu has it, where an epilogue can apply the activation; else None."""
    gate: Gemm | None
    is_gated: bool
    gating: str | None
    """The activation of a gate as `ops.linear_gated` has it; else None."""

    @property
    def is_static(self) -> bool:
        """Whether tensors say all that it computes."""
        static = self.first.is_static and self.last.is_static and (self.gate is None or self.gate.is_static)
        return static and gate_of(self.activation) is not None

    def infer(self, x: Tensor, quantized: Quantized | None, context: Context) -> tuple[Tensor, Quantized | None]:
        """x (T, H) -> what the last GEMM multiplies, (T, I)."""
        if self.approximate is not None:
            return self.first.gelu(x, quantized, self.approximate, self.last)
        if self.gating is not None and (gated := self.first.gated(x, self.gate, self.gating)) is not None:
            return gated, None
        return self._between(x, quantized), None

    def _between(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        raised = self.first(x, quantized)
        if self.gate is None and not self.is_gated:
            return self.activation(raised)
        pair = raised.chunk(2, 1) if self.gate is None else (self.gate(x, quantized), raised)
        activated = self.activation(pair[0])
        # What a known activation makes is new, and nobody else has it.
        in_place = self.gating is not None and not torch.is_grad_enabled() and activated.dtype is pair[1].dtype
        return activated.mul_(pair[1]) if in_place else activated * pair[1]

    def train(self, x: Tensor, rate: float) -> Tensor:
        """x (T, H) -> (T, H), the last GEMM's result; differentiable, with dropout of what that takes."""
        up, down = self.first, self.last
        if not rate and isinstance(up, Linear) and isinstance(down, Linear):
            if self.approximate is not None:
                return ops.feed_forward(x, up.weight, up.bias, down.weight, down.bias, self.approximate)[0]
            if self.gating is not None and (gates := up.gates(self.gate)) is not None:
                return ops.gated_feed_forward(x, *gates, down.weight, down.bias, self.gating)[0]
        between = self._between(x)
        return down(F.dropout(between, rate) if rate else between)
