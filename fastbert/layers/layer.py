"""The fused encoder layer: mixed into a family's own Hugging Face class by `fastbert.models`.

A layer is an attention half, a feed-forward half and a norm order. A fused one keeps its parameters, its names and its
call; it reads its children's weights where they are plain, calls them where they are not, and runs the stock code where
it is not given a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..runtime.support import (
    is_a,
    is_hooked,
    is_placed,
    is_plain,
    is_rowwise,
    named,
    oddity,
    own_method,
    sees_arguments,
)
from ..runtime.wrappers import is_rewritten, is_transparent, is_wrapper, unwrapped, wrapped
from .attention import Attention, BoundAttention
from .context import Context
from .feed_forward import BoundFeedForward, FeedForward
from .gemm import PLAIN, Form, Norm, Path, Precision, Quantized, child, plain
from .norm import RmsNorm

# A mixin has no base of its own at run time: each family adds the Hugging Face class it stands in for.
Mixin: Any = nn.Module if TYPE_CHECKING else object


STOCK = "_fastbert_stock"
"""Attribute of a fused module whose forward on the instance held a function of its stock class: that function."""


def stock_forward(mixin: Any, module: object, *args: object, **kwargs: object) -> Any:
    """Calls the forward of the class that `mixin` is mixed into; of `module`, which may have been unfused meanwhile.

    Where a wrapper on the instance held another function as `fuse` came, it calls that.
    """
    held = getattr(module, STOCK, None) if "forward" in module.__dict__ else None
    if held is not None:
        return held(module, *args, **kwargs)
    if torch.compiler.is_compiling():
        return super(mixin, module).forward(*args, **kwargs)
    kind: Any = type(module)  # once: another thread may unfuse it
    forward = super(mixin, kind).forward if issubclass(kind, mixin) else kind.forward
    return forward(module, *args, **kwargs)


@dataclass(frozen=True)
class Layer:
    """What the layers of a family are made of. The defaults are BERT's."""

    attention: Attention = field(default_factory=Attention)
    feed_forward: FeedForward = field(default_factory=FeedForward)
    pre_norm: bool = False
    """Whether the norm comes before each half, x + half(norm(x)), and not after it, norm(x + half(x))."""
    norm: type[nn.Module] = nn.LayerNorm
    """The class of its norms: that, or another that computes the same; or, before halves, one without a bias that
    divides by the root of the mean of squares. An nn.Identity before a half is none."""

    def halves(self) -> tuple[Attention, FeedForward]:
        """Both, in order."""
        return self.attention, self.feed_forward

    def linears(self, layer: nn.Module) -> Iterator[tuple[Path, Any]]:
        """All linear layers, by path."""
        gemms = {**self.attention.gemms(), **self.feed_forward.gemms()}
        return ((path, child(layer, *path)) for path in chain.from_iterable(gemms.values()))

    def gemms(self, layer: nn.Module) -> dict[str, tuple[Any, ...]]:
        """The linear layers of each GEMM, side by side, by its name."""
        gemms = {**self.attention.gemms(), **self.feed_forward.gemms()}
        return {name: tuple(child(layer, *path) for path in paths) for name, paths in gemms.items()}

    def norms(self, layer: nn.Module) -> Iterator[tuple[Path, Any]]:
        """The two LayerNorms, by path."""
        return ((path, child(layer, *path)) for path in (self.attention.norm, self.feed_forward.norm))

    def bind(self, layer: nn.Module, precision: Precision = plain) -> Bound:
        """A layer with all that it reads looked up, as it is now. It must be covered."""
        return Bound(self.attention.bind(layer, precision), self.feed_forward.bind(layer, precision), self.pre_norm)

    def dropouts(self, layer: nn.Module) -> tuple[float, ...]:
        """Rates at which dropout now drops: of probabilities, of what both halves add, of what the last GEMM takes."""
        return *self.attention.dropouts(layer), *self.feed_forward.dropouts(layer)


class Bound(NamedTuple):
    """A layer with all that it reads looked up."""

    attention: BoundAttention
    feed_forward: BoundFeedForward
    pre_norm: bool
    following: Form = PLAIN
    """The form that the next layer takes up the result in."""
    handed: list[tuple[Tensor, Quantized]] | None = None
    """What the layer before has left: its result, and that quantized. In its place comes this one's."""

    def is_static(self) -> bool:
        """Whether tensors say all that it computes in inference: no adapters, no activation with a state."""
        return self.attention.is_static and self.feed_forward.is_static

    def infer(self, x: Tensor, context: Context) -> Tensor:
        """x (T, H) -> (T, H), nothing kept: seven launches where LayerNorm comes last."""
        quantized = self._taken_up(x)
        attention, feed_forward = self.attention, self.feed_forward
        if context.map is not None and context.map.ends:
            rows, quantized = _normed(x, attention) if self.pre_norm else (x, quantized)
            attention.infer(rows, quantized, context)
            return x
        if self.pre_norm:
            for half in (attention, feed_forward):
                rows, quantized = _normed(x, half)
                x = half.last.add(*half.infer(rows, quantized, context), x)
            return x
        assert isinstance(attention.norm, Norm) and isinstance(feed_forward.norm, Norm)
        x, quantized = attention.last.add_layer_norm(
            *attention.infer(x, quantized, context), x, attention.norm, feed_forward.first
        )
        x, quantized = feed_forward.last.add_layer_norm(
            *feed_forward.infer(x, quantized, context), x, feed_forward.norm, self.following
        )
        if quantized is not None and self.handed is not None:
            self.handed[:] = [(x, quantized)]
        return x

    def _taken_up(self, x: Tensor) -> Quantized | None:
        """`x` quantized, if that is what the layer before has left."""
        if not self.handed:
            return None
        left, quantized = self.handed.pop()
        return quantized if (left.data_ptr(), left.shape) == (x.data_ptr(), x.shape) else None

    def train(self, x: Tensor, context: Context, rates: tuple[float, ...], seeds: Tensor | None) -> Tensor:
        """The same with dropout and gradients, and under autocast; residuals keep the dtype of x.

        `rates` are as `Layer.dropouts` has them, `seeds`, (3,) int64, of the first three, or None where none drops
        anything.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        seed = (None,) * 3 if seeds is None else seeds.unbind(0)
        attention, feed_forward = self.attention, self.feed_forward
        added = attention.train(self._taken(x, attention, dtype), context, rates[0], seed[0])
        x = self._added(x, attention, added, rates[1], seed[1])
        added = feed_forward.train(self._taken(x, feed_forward, dtype), rates[3])
        return self._added(x, feed_forward, added, rates[2], seed[2])

    def _taken(self, x: Tensor, half: BoundAttention | BoundFeedForward, dtype: torch.dtype) -> Tensor:
        """What a half computes from, in training."""
        if self.pre_norm and isinstance(half.norm, RmsNorm):
            x = F.rms_norm(x, x.shape[1:], *half.norm)
        elif self.pre_norm and half.norm is not None:
            x = F.layer_norm(x, x.shape[1:], *half.norm)
        return x.to(dtype)

    def _added(
        self, x: Tensor, half: BoundAttention | BoundFeedForward, added: Tensor, rate: float, seed: Tensor | None
    ) -> Tensor:
        """x and what a half has computed, in training."""
        if self.pre_norm:
            return x + (F.dropout(added, rate) if rate else added)
        assert isinstance(half.norm, Norm)
        return ops.add_layer_norm(added, x, *half.norm, rate, seed)


def _normed(x: Tensor, half: BoundAttention | BoundFeedForward) -> tuple[Tensor, Quantized | None]:
    """What a half computes from, in inference, where its norm comes first; in the form that its first GEMM takes."""
    if isinstance(half.norm, Norm):
        return half.first.layer_norm(x, half.norm)
    rows = x if half.norm is None else ops.rms_norm(x, *half.norm)
    return rows, half.first.quantized(rows)


class FusedLayer(Mixin):
    """A layer in a handful of launches."""

    layout: ClassVar[Layer] = Layer()
    """What it is made of."""
    called: ClassVar[tuple[str, ...]]
    """Methods that the stock forward calls."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        context: Context | None = None,
        seeds: Tensor | None = None,
        bound: Bound | None = None,
        **kwargs: object,
    ) -> Tensor:
        """hidden_states (1, T, H) or (B, S, H), as `context` lays out -> the same; stock without a `context`.

        `seeds`, (3,) int64, are those of the three dropouts; None where none drops anything. `bound` is the layer with
        what it reads looked up already, or None.
        """
        if context is None:
            stock: Tensor = stock_forward(FusedLayer, self, hidden_states, *args, **kwargs)
            return stock
        x = hidden_states.flatten(0, 1)  # [T, H]
        layout = type(self).layout
        bound = layout.bind(self) if bound is None else bound
        trains = (self.training or seeds is not None or torch.is_grad_enabled()) and context.map is None
        if trains or torch.is_autocast_enabled(x.device.type):
            x = bound.train(x, context, (0.0,) * 4 if seeds is None else layout.dropouts(self), seeds)
        else:
            x = bound.infer(x, context)
        return x.view_as(hidden_states)


def layer_is_unsupported(layer: nn.Module, name: str, shared: Mapping[str, object]) -> str | None:
    """Why a layer, of that name, runs its stock code: a submodule replaced or watched, or parameters of mixed kinds.

    `shared` are attributes that its attention must have, with their values: see `Family.shared`.
    """
    try:
        return _is_unsupported(layer, name, shared)
    except KeyError as missing:  # of a submodule; stock code says so
        return f"{name} has no {missing.args[0]}"


def _is_unsupported(layer: nn.Module, name: str, shared: Mapping[str, object]) -> str | None:
    seen = next((module for module in wrapped(layer) if sees_arguments(module)), None)
    if any(is_rewritten(module) for module in wrapped(layer) if is_wrapper(module)):
        return f"{name} is in a wrapper whose forward has been replaced"
    layer = unwrapped(layer)
    sharded = is_a(layer, "torch.distributed.fsdp", "FSDPModule")
    if not isinstance(layer, FusedLayer):
        return "fully_shard came before fuse" if sharded else f"{name} is a custom {named(layer)}"
    layout, own, forward = type(layer).layout, type(layer).forward, layer.__dict__.get("forward")
    if forward is not None and not is_placed(layer) and not is_transparent(forward, own):
        return f"{name}.forward has been replaced (accelerate does so to offload)"
    if seen is not None:
        return f"{name} has a hook that sees its arguments"
    if (method := own_method(layer, type(layer).called)) is not None:
        return f"{name}.{method} has been replaced"
    for half in layout.halves():
        if reason := half.unsupported(layer, name, sharded):
            return reason
    module = child(layer, *layout.attention.module)
    for attribute, value in shared.items():
        if getattr(module, attribute, None) != value:
            return f"{attribute} of {'.'.join((name, *layout.attention.module))} is not as its encoder says, {value}"
    weights: list[Tensor] = []
    for path, linear in layout.linears(layer):
        if is_plain(linear, nn.Linear, sharded):
            weights += [p for p in linear._parameters.values() if p is not None]
        elif not is_rowwise(linear, sharded):
            return f"{'.'.join((name, *path))} is a {named(linear)}{oddity(linear)}"
    for path, norm in layout.norms(layer):
        if layout.pre_norm and type(norm) is nn.Identity and not is_hooked(norm):
            continue
        if not is_plain(norm, layout.norm, sharded) or norm.weight is None:
            kind = "nn.LayerNorm" if layout.norm is nn.LayerNorm else layout.norm.__name__
            return f"{'.'.join((name, *path))} is a {named(norm)}{oddity(norm)}, not a plain {kind} with a weight"
        weights += [p for p in norm._parameters.values() if p is not None]
    dtype, device = weights[0].dtype, weights[0].device
    for weight in weights:
        if weight.dtype is not dtype or weight.device != device:
            return f"the parameters of {name} differ in dtype or device"
    return _widths_are_unsupported(layout, layer, name)


def _widths_are_unsupported(layout: Layer, layer: nn.Module, name: str) -> str | None:
    """Which linear layer or norm is not of the shape that kernels take it to have; stock code may broadcast."""
    attention, feed_forward = layout.halves()
    norms = {
        path: tuple(getattr(norm, "normalized_shape", None) or norm.weight.shape)
        for path, norm in layout.norms(layer)
        if type(norm) is not nn.Identity
    }
    hidden = norms[feed_forward.norm][-1] if feed_forward.norm in norms else _shape(child(layer, *feed_forward.down))[0]
    for path, shape in norms.items():
        if shape != (hidden,):
            return f"{'.'.join((name, *path))} normalises over {shape}; expected ({hidden},)"
    attended, raised = (_shape(child(layer, *path))[1] for path in (attention.output, feed_forward.down))
    head_dim = getattr(child(layer, *attention.module), attention.head_dim)
    if attended % head_dim:
        return f"{name} attends to {attended} columns in heads of {head_dim}"
    expected = {
        **dict.fromkeys((attention.query, attention.key, attention.value), (attended, hidden)),
        **({} if attention.qkv is None else {attention.qkv: (3 * attended, hidden)}),
        attention.output: (hidden, attended),
        feed_forward.up: (raised * (2 if feed_forward.is_gated else 1), hidden),
        feed_forward.down: (hidden, raised),
        **({} if feed_forward.gate is None else {feed_forward.gate: (raised, hidden)}),
    }
    for path, linear in layout.linears(layer):
        if (shape := _shape(linear)) != expected[path]:
            return f"{'.'.join((name, *path))} is of shape {shape}; expected {expected[path]}"
        bias = getattr(linear, "base_layer", linear).bias
        if bias is not None and bias.dim() == 1 and bias.numel() == 1 < shape[0]:
            return f"{'.'.join((name, *path))} has a bias of one value for {shape[0]} columns"
    return None


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(columns that a linear layer gives, columns it takes): by its weight where that is whole, and by what it says."""
    base = cast(nn.Linear, getattr(linear, "base_layer", linear))
    if base.weight.dim() != 2:  # a shard
        return base.out_features, base.in_features
    return base.weight.shape[0], base.weight.shape[1]
