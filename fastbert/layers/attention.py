"""The attention half of a layer: queries, keys and values, softmax attention, and the linear layer behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..runtime.support import PLAIN_ATTENTION
from .context import Context
from .gemm import Gemm, Norm, Path, Precision, Quantized, child
from .norm import dropouts_at, norm_of, part_is_replaced, rate_of


@dataclass(frozen=True)
class Attention:
    """Where the layers of a family keep their attention, and what is its own about it. The defaults are BERT's."""

    module: Path = ("attention", "self")
    """Says `head_dim`, may say `scaling` (else head_dim ** -0.5), and has the dropout of the probabilities."""
    query: Path = ("attention", "self", "query")
    key: Path = ("attention", "self", "key")
    value: Path = ("attention", "self", "value")
    qkv: Path | None = None
    """One linear layer in place of those three, if it gives queries, then keys, then values."""
    output: Path = ("attention", "output", "dense")
    output_dropout: Path | None = ("attention", "output", "dropout")
    """An nn.Dropout, or an attribute that is a rate, of what the half adds; None where nothing of it is dropped."""
    norm: Path = ("attention", "output", "LayerNorm")
    head_dim: str = "attention_head_size"
    dropout: str | None = "dropout"
    """An nn.Dropout of `module`, or its attribute that is a rate; None where no probability is dropped."""
    bias: str | None = None
    """Of `Context.tables`, what is added to scores by the distance of key and query."""
    rotary: str | None = None
    """Of `Context.tables`, the rotation of queries and keys."""
    kinds: Mapping[Path, type[nn.Module]] = field(default_factory=dict)
    """Submodules whose code the fused layer stands in for, each with the class that code is known for."""

    spreads_padding: ClassVar[bool] = False
    """Whether a row of padding attends evenly to all rows of its sequence, those of padding too."""

    @property
    def by_distance(self) -> bool:
        """Whether scores depend on the distance of query and key in the padded layout."""
        return self.bias is not None

    def gemms(self) -> dict[str, tuple[Path, ...]]:
        """The linear layers of each GEMM, side by side."""
        return {
            "qkv": (self.query, self.key, self.value) if self.qkv is None else (self.qkv,),
            "context": (self.output,),
        }

    def dropout_paths(self) -> tuple[Path | None, ...]:
        """Where the dropouts are, of probabilities and of the result."""
        return None if self.dropout is None else (*self.module, self.dropout), self.output_dropout

    def parts(self, layer: nn.Module) -> Iterator[tuple[Path, nn.Module, type[nn.Module]]]:
        """(path, submodule, class) of all whose code is known: `kinds`, and the dropouts."""
        for path, kind in self.kinds.items():
            yield path, child(layer, *path), kind
        yield from dropouts_at(layer, self.dropout_paths())

    def parameters(self, layer: nn.Module) -> Iterator[Tensor]:
        """Those it reads beside its linear layers' and its norm's."""
        return iter(())

    def unsupported(self, layer: nn.Module, name: str, sharded: bool = False) -> str | None:
        """Why a layer of that name can't run fused, by what is this half's own; `sharded` as `is_plain` has it."""
        for path, module, kind in self.parts(layer):
            place = ".".join((name, *path))
            if reason := part_is_replaced(place, module, kind):
                return reason
            for flag in ("is_causal", "is_cross_attention"):
                if module.__dict__.get(flag):
                    return f"{place}.{flag} is set"
            implementation = getattr(module.__dict__.get("config"), "_attn_implementation", None)
            if implementation not in PLAIN_ATTENTION:
                return f"{place} has a config of its own, of attention {implementation!r}"
        return None

    def bind(self, layer: nn.Module, precision: Precision) -> BoundAttention:
        """The half of a layer with all that it reads looked up."""
        qkv, output = (
            precision(name, tuple([child(layer, *path) for path in paths])) for name, paths in self.gemms().items()
        )
        module = child(layer, *self.module)
        head_dim = getattr(module, self.head_dim)
        scale = float(getattr(module, "scaling", head_dim**-0.5))
        return BoundAttention(qkv, output, norm_of(child(layer, *self.norm)), head_dim, scale, self.bias, self.rotary)

    def dropouts(self, layer: nn.Module) -> tuple[float, float]:
        """Rates at which dropout now drops: of probabilities, and of the result."""
        module, probabilities = child(layer, *self.module), 0.0
        if self.dropout is not None and module.training:  # as stock: the flag of the attention, the rate of its dropout
            dropout = getattr(module, self.dropout)
            probabilities = float(getattr(dropout, "p", dropout))
        return probabilities, rate_of(layer, self.output_dropout)


class BoundAttention(NamedTuple):
    """The attention half of one layer."""

    first: Gemm
    """Of queries, keys and values."""
    last: Gemm
    norm: Norm
    head_dim: int
    scale: float
    bias: str | None
    rotary: str | None

    @property
    def is_static(self) -> bool:
        """Whether tensors say all that it computes."""
        return self.first.is_static and self.last.is_static

    def infer(self, x: Tensor, quantized: Quantized | None, context: Context) -> tuple[Tensor, Quantized | None]:
        """x (T, H) -> what the last GEMM multiplies, (T, heads * head_dim)."""
        qkv = self.first(x, quantized).view(x.shape[0], 3, -1, self.head_dim)
        del quantized
        q, k, v = qkv.unbind(1)  # [T, heads, head_dim]
        tables = context.tables
        if self.rotary is not None:
            q, k = _rotated(q, tables[self.rotary]), _rotated(k, tables[self.rotary])
        bias = None if self.bias is None else tables[self.bias]
        if context.map is not None:
            context.map.found = self._map(q, k, bias, context, context.map.heads)
        return self.last.attention(q, k, v, *context.sequences(), self.scale, bias, context.packing.tiles)

    def _map(self, q: Tensor, k: Tensor, bias: Tensor | None, context: Context, heads: list[int] | None) -> Tensor:
        """The map of some heads, (B, heads, S, S)."""
        if heads is not None:
            q, k, bias = q[:, heads], k[:, heads], None if bias is None else bias[heads]
        layout = *context.sequences(), self.scale, *context.places(q.device)
        return ops.attention_map(q, k, *layout, bias, context.packing.tiles)

    def train(self, x: Tensor, context: Context, rate: float, seed: Tensor | None) -> Tensor:
        """x (T, H) -> (T, H), the last GEMM's result; differentiable, with dropout of the probabilities."""
        qkv = self.first(x).view(x.shape[0], 3, -1, self.head_dim)
        tables = context.tables
        if self.rotary is not None:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack((_rotated(q, tables[self.rotary]), _rotated(k, tables[self.rotary]), v), 1)
        bias = () if self.bias is None else (tables[self.bias],)
        attended, _ = ops.attention_forward(
            qkv, *context.sequences(), self.scale, rate, seed, context.packing.tiles, *bias
        )
        return self.last(attended.flatten(1))


def _rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (T, heads, head_dim), turned by (cosines, sines), each (T, head_dim): in float32, rounded once."""
    cosine, sine = (part[:, None].float() for part in table)
    rows, half = x.float(), x.shape[2] // 2
    turned = torch.cat((-rows[..., half:], rows[..., :half]), 2)
    return (rows * cosine + turned * sine).to(x.dtype)
