"""DeBERTa's attention half: content attends to content, and to positions, by the distance of query and key.

Positions have embeddings, one for all layers; every layer makes keys and queries of its own of them. In inference these
are made once, and again when a weight has been written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..runtime.support import is_plain, is_readable, is_rowwise, named, oddity
from .attention import Attention
from .context import Context
from .derived import Derived, directions
from .gemm import Called, Gemm, Linear, Norm, Path, Precision, Quantized, Stacked, child, plain
from .norm import dropouts_at, norm_of


class Relative(NamedTuple):
    """Of `Context.tables`: positions, as one forward has them."""

    embeddings: Tensor
    """(P, H), one for each slot."""
    slots: Tensor
    """As `ops.disentangled_attention` has them."""
    derived: Derived | None
    """Where keys and queries of positions are kept; None: they are made anew."""


@dataclass(frozen=True)
class Disentangled(Attention):
    """Where the layers of a family keep such attention. `module` says which terms there are, and has their linears."""

    relative: str = "relative"
    """Of `Context.tables`, a `Relative`, or None where there are no positions."""
    position_key: Path = ("attention", "self", "pos_key_proj")
    position_query: Path = ("attention", "self", "pos_query_proj")
    is_by_head: bool = False
    """Whether `qkv` gives query, key and value of each head side by side, and `module` has q_bias and v_bias."""
    spreads_padding = True
    by_distance = True

    def dropout_paths(self) -> tuple[Path | None, ...]:
        """Also where that of the position embeddings is; layers without positions have none."""
        return *super().dropout_paths(), (*self.module, "pos_dropout")

    def parts(self, layer: nn.Module) -> Iterator[tuple[Path, nn.Module, type[nn.Module]]]:
        """As `Attention.parts`."""
        for path, kind in self.kinds.items():
            yield path, child(layer, *path), kind
        paths = self.dropout_paths() if child(layer, *self.module).relative_attention else super().dropout_paths()
        yield from dropouts_at(layer, paths)

    def position_linears(self, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """The linear layers that make keys and queries of positions; None where a layer has no such term."""
        module = child(layer, *self.module)
        kinds = module.pos_att_type if module.relative_attention else ()
        shared = not self.is_by_head and module.share_att_key
        keys, queries = (self.key, self.query) if shared else (self.position_key, self.position_query)
        return child(layer, *keys) if "c2p" in kinds else None, child(layer, *queries) if "p2c" in kinds else None

    def parameters(self, layer: nn.Module) -> Iterator[Tensor]:
        """As `Attention.parameters`."""
        for linear in self.position_linears(layer):
            yield from () if linear is None else linear.parameters()
        if self.is_by_head:
            module = child(layer, *self.module)
            yield from (module.q_bias, module.v_bias)

    def unsupported(self, layer: nn.Module, name: str, sharded: bool = False) -> str | None:
        """As `Attention.unsupported`; also by the linear layers of positions."""
        if reason := super().unsupported(layer, name, sharded):
            return reason
        module, path = child(layer, *self.module), self.gemms()["qkv"][0]
        for own in ("head_logits_proj", "head_weights_proj"):
            if getattr(module, own, None) is not None:
                return f"{'.'.join((name, *self.module))} has talking heads"
        width = module.num_attention_heads * getattr(module, self.head_dim) * (3 if self.is_by_head else 1)
        if getattr(child(layer, *path), "out_features", None) != width:
            return f"{'.'.join((name, *self.module))} says of its heads what its linear layers do not"
        if self.is_by_head:
            weight = child(layer, *path)._parameters.get("weight")
            biases = module._parameters.get("q_bias"), module._parameters.get("v_bias")
            if not all(is_readable(p, sharded) for p in biases):
                return f"{'.'.join((name, *self.module))} has biases that are no parameters of its own"
            if weight is not None and any(p.dtype is not weight.dtype for p in biases):
                return f"{'.'.join((name, *self.module))} has biases of another dtype"
        for linear in self.position_linears(layer):
            if linear is not None and not is_plain(linear, nn.Linear, sharded) and not is_rowwise(linear, sharded):
                return f"{'.'.join((name, *self.module))} makes positions by a {named(linear)}{oddity(linear)}"
        return None

    def bind(self, layer: nn.Module, precision: Precision) -> Any:
        """The half of a layer with all that it reads looked up."""
        qkv, output = (
            precision(name, tuple([child(layer, *path) for path in paths])) for name, paths in self.gemms().items()
        )
        module = child(layer, *self.module)
        head_dim = getattr(module, self.head_dim)
        if self.is_by_head:
            qkv = ByHead(qkv, module.q_bias, module.v_bias, head_dim)
        kinds = module.pos_att_type
        terms = len(kinds) if self.is_by_head else ("c2p" in kinds) + ("p2c" in kinds)  # as stock counts them
        scale = float((head_dim * (1 + terms)) ** -0.5)
        positions = tuple(
            [None if each is None else plain("positions", (each,)) for each in self.position_linears(layer)]
        )
        dropout = module._modules.get("pos_dropout")
        rate = float(dropout.p) if dropout is not None and dropout.training else 0.0
        relative = self.relative if any(positions) else None  # without a term of them it is plain attention
        norm = norm_of(child(layer, *self.norm))
        assert isinstance(norm, Norm)
        return BoundDisentangled(qkv, output, norm, head_dim, scale, relative, positions, rate)


class ByHead(Gemm):
    """A GEMM of queries, keys and values, head by head, without biases: put in order, with biases."""

    __slots__ = ("gemm", "head_dim", "query_bias", "value_bias")

    def __init__(self, gemm: Gemm, query_bias: Tensor, value_bias: Tensor, head_dim: int) -> None:
        self.gemm, self.query_bias, self.value_bias, self.head_dim = gemm, query_bias, value_bias, head_dim

    @property
    def is_static(self) -> bool:  # type: ignore[override]
        """Whether tensors say all that it computes."""
        return self.gemm.is_static

    def quantized(self, x: Tensor) -> Quantized | None:
        """As the GEMM's."""
        return self.gemm.quantized(x)

    def layer_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Quantized | None]:
        """As the GEMM's."""
        return self.gemm.layer_norm(x, norm)

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        """x (T, K) -> (T, 3 N): all queries, all keys, all values."""
        found = self.gemm(x, quantized).view(x.shape[0], -1, 3, self.head_dim).transpose(1, 2)
        biases = torch.stack((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        return (found + biases.view(3, -1, self.head_dim).to(found.dtype)).flatten(1)


class BoundDisentangled(NamedTuple):
    """Such an attention half of one layer."""

    first: Gemm
    """Of queries, keys and values."""
    last: Gemm
    norm: Norm
    head_dim: int
    scale: float
    relative: str | None
    positions: tuple[Gemm | None, ...]
    """What makes keys and queries of positions; None where there is no such term."""
    dropout: float
    """The rate at which elements of position embeddings are now dropped."""

    @property
    def is_static(self) -> bool:
        """Whether tensors say all that it computes."""
        positions = all(each is None or each.is_static for each in self.positions)
        return self.first.is_static and self.last.is_static and positions

    def infer(self, x: Tensor, quantized: Quantized | None, context: Context) -> tuple[Tensor, Quantized | None]:
        """x (T, H) -> what the last GEMM multiplies, (T, heads * head_dim)."""
        relative = None if self.relative is None else context.tables[self.relative]
        shows = relative is not None and self._shows(x, relative)
        rows = torch.cat((x, directions(x.shape[1])[None])) if shows else x
        qkv = self.first(rows, quantized).view(rows.shape[0], 3, -1, self.head_dim)
        seen: list[tuple[int, Tensor] | None] = [None, None]
        if shows:  # of keys, which c2p has, and of queries
            seen, qkv = [(len(qkv), qkv[-1, 1]), (len(qkv), qkv[-1, 0])], qkv[:-1]
        del quantized, rows
        tables: tuple[Tensor | None, ...] = ()
        if relative is not None:
            tables = tuple([self._made(each, relative, own) for each, own in zip(self.positions, seen, strict=True)])
        if context.map is not None:
            context.map.found = self._map(qkv, relative, tables, context, context.map.heads)
        if relative is None:
            arguments: Any = *qkv.unbind(1), *context.sequences(), self.scale, None, context.packing.tiles
            if context.packing.key_mask is None:
                return self.last.attention(*arguments)
            attended = ops.attention(*arguments)
        else:
            c2p, p2c = tables
            given = relative.slots, *context.sequences(), self.scale, 0.0, None, context.packing.tiles
            attended, _ = ops.disentangled_attention(qkv, c2p, p2c, *given)
        return _spread(attended, qkv[:, 2], context).flatten(1), None

    def _map(
        self,
        qkv: Tensor,
        relative: Relative | None,
        tables: tuple[Tensor | None, ...],
        context: Context,
        heads: list[int] | None,
    ) -> Tensor:
        """The map of some heads, (B, heads, S, S); a row of padding gives the same to every row, of padding, too."""
        some = slice(None) if heads is None else heads
        layout = *context.sequences(), self.scale, *context.places(qkv.device)
        if relative is None:
            q, k, _ = qkv[:, :, some].unbind(1)
            found = ops.attention_map(q, k, *layout, None, context.packing.tiles)
        else:
            c2p, p2c = (None if table is None else table[:, some] for table in tables)
            given = relative.slots, *layout, context.packing.tiles
            found = ops.disentangled_attention_map(qkv[:, :, some], c2p, p2c, *given)
        mask = context.packing.key_mask
        return found if mask is None else found.masked_fill_(~mask[:, None, :, None], 1 / mask.shape[1])

    def _shows(self, x: Tensor, relative: Relative) -> bool:
        """Whether queries and keys are made of one row more, by which a write to their weights is seen, on a CPU.

        Positions are then made by the same weights, which need not be read once more for it.
        """
        if relative.derived is None or x.device.type != "cpu" or x.dtype is not torch.float32:
            return False
        if x.shape[0] > x.shape[1] or not isinstance(self.first, Stacked):  # so many rows cost more to copy
            return False
        query, _, key, *_ = self.first.parameters
        own = zip(self.positions, (key, query), strict=True)
        return all(gemm is None or (isinstance(gemm, Linear) and gemm.weight is weight) for gemm, weight in own)

    def _made(self, gemm: Gemm | None, relative: Relative, seen: tuple[int, Tensor] | None = None) -> Tensor | None:
        """(P, heads, head_dim): keys or queries of positions, in inference; `seen` as `Derived.get` has it."""
        if gemm is None:
            return None

        def make() -> Tensor:
            return gemm(relative.embeddings).view(relative.embeddings.shape[0], -1, self.head_dim)

        def make_to_keep() -> Tensor:
            # In inference mode it would have no version, and a backend could keep nothing that it makes of it.
            with torch.inference_mode(False), torch.no_grad():
                return make()

        if relative.derived is None or isinstance(gemm, Called):
            return make()
        linear: Any = gemm
        place, parameters = id(linear.weight), (linear.weight, linear.bias)  # whatever its data
        return relative.derived.get(place, parameters, make_to_keep, relative.embeddings, True, seen)

    def train(self, x: Tensor, context: Context, rate: float, seed: Tensor | None) -> Tensor:
        """x (T, H) -> (T, H), the last GEMM's result; differentiable, with dropout of probabilities and positions."""
        qkv = self.first(x).view(x.shape[0], 3, -1, self.head_dim)
        sequences, tiles = context.sequences(), context.packing.tiles
        relative = None if self.relative is None else context.tables[self.relative]
        if relative is None and x.is_cpu:  # where its gradients are as precise as those of eager attention, stock's
            slots = torch.zeros(1, dtype=torch.int32)
            attended, _ = ops.disentangled_attention(qkv, None, None, slots, *sequences, self.scale, rate, seed, tiles)
            return self.last(_spread(attended, qkv[:, 2], context, rate, seed).flatten(1))
        if relative is None:
            attended, _ = ops.attention_forward(qkv, *sequences, self.scale, rate, seed, tiles)
            return self.last(_spread(attended, qkv[:, 2], context, rate, seed).flatten(1))
        embeddings = relative.embeddings
        if self.dropout:
            embeddings = F.dropout(embeddings, self.dropout)
        embeddings = embeddings.to(x.dtype)
        c2p, p2c = (
            None if gemm is None else gemm(embeddings).view(embeddings.shape[0], -1, self.head_dim)
            for gemm in self.positions
        )
        attended, _ = ops.disentangled_attention(
            qkv, c2p, p2c, relative.slots, *sequences, self.scale, rate, seed, tiles
        )
        return self.last(_spread(attended, qkv[:, 2], context, rate, seed).flatten(1))


def _spread(attended: Tensor, v: Tensor, context: Context, rate: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """`attended` (T, heads, head_dim), with rows of padding as stock has them: even means of v over their sequence.

    With dropout, at `rate`, of each row's own; it draws what attention has drawn for those rows, which is not used.
    """
    mask, seqlen = context.packing.key_mask, context.packing.seqlen
    if mask is None:
        return attended
    if rate:
        zeros = torch.zeros_like(v)  # queries to which all keys are the same
        even, _ = ops.attention_forward(torch.stack((zeros, zeros, v), 1), None, None, seqlen, 1.0, rate, seed, None)
    else:
        means = v.unflatten(0, (-1, seqlen)).mean(1, keepdim=True)  # [B, 1, heads, head_dim]
        even = means.expand(-1, seqlen, -1, -1).flatten(0, 1)
    return torch.where(mask.flatten()[:, None, None], attended, even)
