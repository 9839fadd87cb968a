"""The attention half of a layer: queries, keys and values, softmax attention, and the linear layer behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .. import ops
from ..runtime.support import PLAIN_ATTENTION
from .context import Context
from .gemm import Gemm, Norm, Path, Precision, Quantized, child
from .norm import RmsNorm, dropouts_at, norm_of, part_is_replaced, rate_of


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
    scales_first: bool = False
    """Whether queries are multiplied by head_dim ** -0.5 beside that."""
    dropout: str | None = "dropout"
    """An nn.Dropout of `module`, or its attribute that is a rate; None where no probability is dropped."""
    bias: str | None = None
    """Of `Context.tables`, what is added to scores by the distance of key and query."""
    rotary: str | None = None
    """Of `Context.tables`, the rotation of queries and keys; None there: they are not turned."""
    window: str | None = None
    """Of `Context.tables`, how many tokens before it and after it a query attends to, or None: all of its sequence."""
    kind: str | None = None
    """The attribute of a layer that says of which kind it is, where kinds differ in rotation and window: then both are
    in their tables by kind."""
    kinds: Mapping[Path, type[nn.Module]] = field(default_factory=dict)
    """Submodules whose code the fused layer stands in for, each with the class that code is known for."""

    spreads_padding: ClassVar[bool] = False
    """Whether a row of padding attends evenly to all rows of its sequence, those of padding too."""

    @property
    def by_distance(self) -> bool:
        """Whether scores depend on the distance of query and key in the padded layout."""
        return self.bias is not None or self.window is not None

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
        scale = float(getattr(module, "scaling", head_dim**-0.5)) * (head_dim**-0.5 if self.scales_first else 1.0)
        kind = None if self.kind is None else getattr(layer, self.kind)
        norm, tables = norm_of(child(layer, *self.norm)), (self.bias, self.rotary, self.window)
        return BoundAttention(qkv, output, norm, head_dim, scale, *tables, kind)

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
    norm: Norm | RmsNorm | None
    head_dim: int
    scale: float
    bias: str | None
    rotary: str | None
    window: str | None
    kind: str | None

    @property
    def is_static(self) -> bool:
        """Whether tensors say all that it computes."""
        return self.first.is_static and self.last.is_static

    def infer(self, x: Tensor, quantized: Quantized | None, context: Context) -> tuple[Tensor, Quantized | None]:
        """x (T, H) -> what the last GEMM multiplies, (T, heads * head_dim)."""
        qkv = self._turned(self.first(x, quantized), context)
        del quantized
        q, k, v = qkv.unbind(1)  # [T, heads, head_dim]
        bias, window = None if self.bias is None else context.tables[self.bias], self._own(self.window, context)
        if context.map is not None:
            context.map.found = self._map(q, k, bias, window, context)
        near = () if window is None else (window,)
        return self.last.attention(q, k, v, *context.sequences(), self.scale, bias, context.packing.tiles, *near)

    def _own(self, table: str | None, context: Context) -> Any:
        """That of the tables, of the layer's kind; None without one."""
        found = None if table is None else context.tables[table]
        return found if found is None or self.kind is None else found[self.kind]

    def _turned(self, qkv: Tensor, context: Context) -> Tensor:
        """Queries, keys and values side by side -> (T, 3, heads, head_dim), queries and keys by their positions."""
        qkv = qkv.view(qkv.shape[0], 3, -1, self.head_dim)
        turns = self._own(self.rotary, context)
        return qkv if turns is None else ops.rotate(qkv, *turns)

    def _map(self, q: Tensor, k: Tensor, bias: Tensor | None, window: int | None, context: Context) -> Tensor:
        """The map of the heads that are asked for, (B, heads, S, S)."""
        if (heads := context.map.heads) is not None:
            q, k, bias = q[:, heads], k[:, heads], None if bias is None else bias[heads]
        layout = *context.sequences(), self.scale, *context.places(q.device)
        return ops.attention_map(q, k, *layout, bias, context.packing.tiles, window)

    def train(self, x: Tensor, context: Context, rate: float, seed: Tensor | None) -> Tensor:
        """x (T, H) -> (T, H), the last GEMM's result; differentiable, with dropout of the probabilities."""
        qkv, window = self._turned(self.first(x), context), self._own(self.window, context)
        bias = None if self.bias is None else context.tables[self.bias]
        more = (bias, window) if window is not None else () if bias is None else (bias,)
        attended, _ = ops.attention_forward(
            qkv, *context.sequences(), self.scale, rate, seed, context.packing.tiles, *more
        )
        return self.last(attended.flatten(1))
