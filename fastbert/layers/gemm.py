"""The GEMMs of a layer in the model's own dtype, and the form in which a GEMM takes what it multiplies.

Arithmetic is something that a half of a layer is given: it asks its GEMMs to multiply, and the GEMM that comes next for
the form of what lies between (`Form`), and never knows which kinds these are. Those of quantized numbers are in
`fastbert.layers.fp8` and `fastbert.layers.int8`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..runtime.support import is_plain

Path = tuple[str, ...]
"""Names of submodules, each inside the one before."""


class Quantized(NamedTuple):
    """Rows in fewer bits."""

    values: Tensor
    """(T, K)."""
    scale: Tensor | None = None
    """(T,); or (0,) or None where one scale stands for all rows."""
    zero: Tensor | None = None
    """(T,) int32: what stands for 0; None: 0."""


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


def child(module: nn.Module, *path: str) -> Any:
    """A submodule by its path: `nn.Module.__getattr__` costs several times as much, and a layer is asked for dozens."""
    for name in path:
        module = module.__dict__["_modules"][name]
    return module


class Form:
    """The form in which rows are handed on: here, in the dtype of the model."""

    scale: float | None = None
    """Of the quantized rows that an epilogue may write for it."""

    def layer_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Quantized | None]:
        """x (T, H) -> its LayerNorm (T, H), and that quantized, where it is to be."""
        return ops.layer_norm(x, *norm), None

    def attention(self, *arguments: Any) -> tuple[Tensor, Quantized | None]:
        """What `ops.attention` gives of the arguments, heads side by side, (T, heads * head_dim); or that quantized."""
        return ops.attention(*arguments).flatten(1), None

    def quantized(self, x: Tensor) -> Quantized | None:
        """x (T, K), quantized, where it is to be."""
        return None


PLAIN = Form()


class Gemm(Form):
    """One GEMM. `x` is (T, K), `quantized` the same where the GEMM before has left it so; the result is (T, N)."""

    is_static = False
    """Whether tensors say all that it computes."""

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        """x @ weight.T + bias."""
        raise NotImplementedError

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        """The same and GELU; in the form that `following` takes."""
        raise NotImplementedError

    def gated(self, x: Tensor, gate: Gemm | None, activation: str) -> Tensor | None:
        """By `ops.linear_gated`: what `gate` makes of x, activated, times what this one makes of it.

        Where `gate` is None, the first half of this one's columns, activated, times the second. None where there is no
        launch for it.
        """
        return None

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        """The same and `residual`, (T, N)."""
        return self(x, quantized) + residual

    def add_layer_norm(
        self, x: Tensor, quantized: Quantized | None, residual: Tensor, norm: Norm, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        """The same, `residual` and LayerNorm; also in the form that `following` takes."""
        return following.layer_norm(self.add(x, quantized, residual), norm)


class Linear(Gemm):
    """A linear layer that is its weights and nothing else."""

    is_static = True
    __slots__ = ("bias", "weight")

    def __init__(self, linear: Any) -> None:
        self.weight: Tensor = linear.weight
        self.bias: Tensor | None = linear.bias

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        return ops.linear_gelu(x, self.weight, self.bias, approximate), None

    def gated(self, x: Tensor, gate: Gemm | None, activation: str) -> Tensor | None:
        gates = self.gates(gate)
        return None if gates is None else ops.linear_gated(x, *gates, activation)

    def gates(self, gate: Gemm | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
        """Weights and biases as `ops.linear_gated` takes them; None where `gate` is more than its weights."""
        if gate is None:
            return self.weight, self.bias, None, None
        return (gate.weight, gate.bias, self.weight, self.bias) if isinstance(gate, Linear) else None

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        return ops.linear_add(x, self.weight, self.bias, residual)


class Stacked(Gemm):
    """Three linear layers that are their weights and nothing else, side by side: queries, keys and values."""

    is_static = True
    __slots__ = ("parameters",)

    def __init__(self, linears: Sequence[Any]) -> None:
        self.parameters: tuple[Any, ...] = tuple(p for linear in linears for p in (linear.weight, linear.bias))

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        return ops.qkv_linear(x, *self.parameters)


class Called(Gemm):
    """Linear layers of which one is more than its weights, as an adapter is: they are called."""

    __slots__ = ("linears",)

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = tuple(linears)

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        found: list[Tensor] = [linear(x) for linear in self.linears]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def add_layer_norm(
        self, x: Tensor, quantized: Quantized | None, residual: Tensor, norm: Norm, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        x = ops.add_layer_norm(self(x), residual, *norm, 0.0, None)  # one rounding
        return x, following.quantized(x)


Precision = Callable[[str, "tuple[Any, ...]"], Gemm]
"""What makes a GEMM of its name and its linear layers, side by side."""


def plain(name: str, linears: tuple[Any, ...]) -> Gemm:
    """A GEMM in the dtype of the model."""
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return Called(linears)
    return Linear(linears[0]) if len(linears) == 1 else Stacked(linears)
