"""Inference in 8 bits: which products of a layer run in e4m3, their quantized weights, and the layer's forward.

A layer has four products (PRODUCTS). In each, weights have a scale for every output channel, and activations one for
every row, found as the row is made, or one for all rows that `fastbert.calibrate` found.
Residuals, LayerNorm and attention stay in the model's dtype. Anything but inference runs without 8 bits.

Quantized weights stand beside the model, not in it: no parameter or buffer, no part of `state_dict`, of a copy or of a
pickle. They are made where they are first needed, and again once a weight is another one or has been written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import ops
from ..runtime.packing import Packing
from ..runtime.support import fp8_is_unsupported, is_hooked, is_plain
from .layer import Shape, child, gelu_of

PRODUCTS = ("qkv", "context", "up", "down")
"""The products of a layer: queries, keys and values; attention's output; both linear layers of the feed-forward."""

Key = tuple[int, str]
"""A product of a model: its layer, and its name."""

Scales = Mapping[str, float | None]
"""Of one layer, by product: the scale of what it multiplies; None: it stays in the model's dtype."""

Rows = tuple[Tensor, Tensor | None]
"""Quantized rows (T, K) and their scales (T,), or (0,) or None where one scale stands for all rows."""


class Product(NamedTuple):
    """One product in 8 bits."""

    weight: Tensor
    """(N, K) float8_e4m3fn."""
    col_scale: Tensor
    """(N,) float32: scales of the weight's rows, times `scale` where there is one."""
    bias: Tensor | None
    """(N,), in the model's dtype."""
    scale: float | None
    """Of the rows that it multiplies; None: each has its own."""

    def rows(self, x: Tensor) -> Rows:
        """x (T, K) as it multiplies them."""
        quantized: Rows = ops.quantize_fp8(x, self.scale)
        return quantized

    def factors(self, rows: Rows) -> tuple[Tensor | None, ...]:
        """The first five arguments of an 8-bit linear operator."""
        return *rows, self.weight, self.col_scale, self.bias


Products = tuple[Product | None, Product | None, Product | None, Product | None]


def calibrated(config: Any) -> list[Scales] | None:
    """What `fastbert.calibrate` left in a model's config, layer by layer; None where it did not run.

    Raises:
        ValueError: it is not what `calibrate` writes, or the model has another number of layers now.
    """
    found = getattr(config, "fastbert", None)
    found = found.get("fp8") if isinstance(found, Mapping) else found
    if found is None:
        return None
    layers = found.get("layers") if isinstance(found, Mapping) else None
    if not isinstance(layers, list) or not all(
        isinstance(layer, Mapping) and set(layer) == set(PRODUCTS) and all(map(_is_scale, layer.values()))
        for layer in layers
    ):
        raise ValueError(
            "model.config.fastbert['fp8']: expected what fastbert.calibrate writes, a list 'layers' of positive scales "
            f"(null: not in 8 bits) of {', '.join(PRODUCTS)}; run it again, or delete model.config.fastbert"
        )
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"model.config.fastbert['fp8'] is of {len(layers)} layers, the model has {config.num_hidden_layers}; run "
            "fastbert.calibrate again, or delete model.config.fastbert"
        )
    return layers


def _is_scale(value: Any) -> bool:
    """Whether kernels can take it, and its inverse, in float32, where what is below `least` may count as zero."""
    if value is None:
        return True
    least = torch.finfo(torch.float32).tiny
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= 1 / least


def linears(layer: Any, shape: Shape) -> tuple[tuple[Any, ...], ...]:
    """The linear layers of each product, in the order of PRODUCTS."""
    paths = ((shape.query, shape.key, shape.value), (shape.context,), (shape.up,), (shape.down,))
    return tuple(tuple(child(layer, *path) for path in each) for each in paths)


def _unsupported(group: Sequence[Any]) -> str | None:
    """Why a product can't run in 8 bits, by its linear layers."""
    for linear in group:
        if not is_plain(linear, nn.Linear):
            return f"a {type(linear).__name__}" + (" that is hooked or sharded" if type(linear) is nn.Linear else "")
        if linear.in_features % 16:
            return f"{linear.in_features} input features; 8 bits take a multiple of 16"
        if linear.weight.is_inference():
            return "its weight was made under torch.inference_mode, where writing to it leaves no trace"
    return None


class _Made(NamedTuple):
    """The products of one layer, and of what they were made."""

    key: tuple[tuple[int, int] | None, ...]
    """Address and version of every weight and bias."""
    storages: tuple[StorageWeakRef, ...]
    """While they live, no other weight can have their address."""
    products: Products

    def is_of(self, key: tuple[tuple[int, int] | None, ...]) -> bool:
        return self.key == key and not any(storage.expired() for storage in self.storages)


class Fp8:
    """What `fuse(model, precision="fp8")` leaves on an encoder. Copies and pickles hold the scales alone."""

    def __init__(self, scales: Sequence[Scales] | None) -> None:
        self.scales = scales
        """Layer by layer; None: every row has its own."""
        self._made: dict[int, _Made] = {}

    def drop(self) -> None:
        """Frees the quantized weights; the next forward makes them again."""
        self._made = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"scales": self.scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["scales"])  # type: ignore[misc]

    def reasons(self, layers: Sequence[Any], classes: Mapping[Any, Any]) -> dict[Key, str]:
        """The products that don't run in 8 bits, by layer and name, and why; `classes` are fused ones by stock ones."""
        found = {}
        for index, layer in enumerate(layers):
            scales = self._scales_of(index, len(layers))
            kind = classes.get(type(layer), type(layer))
            stock = None if hasattr(kind, "shape") else f"it is in a {kind.__name__} of one's own"
            groups = ((),) * len(PRODUCTS) if stock else linears(layer, kind.shape)
            for name, group in zip(PRODUCTS, groups, strict=True):
                reason = stock or _unsupported(group)
                if reason is None and scales is not None and scales[name] is None:
                    reason = "calibration keeps it"
                if reason is not None:
                    found[index, name] = reason
        return found

    def groups(self, layers: Sequence[Any]) -> dict[Key, Sequence[Any]]:
        """The linear layers of every product that runs in 8 bits; `layers` are fused."""
        reasons = self.reasons(layers, {})
        return {
            (i, name): group
            for i, layer in enumerate(layers)
            if hasattr(type(layer), "shape")
            for name, group in zip(PRODUCTS, linears(layer, layer.shape), strict=True)
            if (i, name) not in reasons
        }

    def _scales_of(self, index: int, layers: int) -> Scales | None:
        # Layers may have been dropped since; which ones stayed isn't known.
        return None if self.scales is None or len(self.scales) != layers else self.scales[index]

    def products(self, index: int, layer: Any, layers: int) -> Products:
        """The products of layer `index` of `layers` in 8 bits, in the order of PRODUCTS; None: not that one."""
        groups = [group if _unsupported(group) is None else () for group in linears(layer, layer.shape)]
        tensors = [x for group in groups for linear in group for x in (linear.weight, linear.bias)]
        key = tuple(None if x is None else (x.data_ptr(), x._version) for x in tensors)
        made = self._made.get(index)
        if made is not None and made.is_of(key):
            return made.products
        scales = self._scales_of(index, layers)
        query, context, up, down = (
            _quantize(group, None if scales is None else scales[name])
            if group and (scales is None or scales[name] is not None)
            else None
            for name, group in zip(PRODUCTS, groups, strict=True)
        )
        made = _Made(
            key,
            tuple(StorageWeakRef(x.untyped_storage()) for x in tensors if x is not None),
            (query, context, up, down),
        )
        # What a CUDA graph makes as it is captured is the graph's own, made again at each replay.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._made[index] = made
        return made.products

    @staticmethod
    def runs(layers: Sequence[Any], sample: Tensor) -> bool:
        """Whether 8 bits are for a forward of `layers` at this moment, over activations like `sample`."""
        off = torch.is_grad_enabled() or torch.is_autocast_enabled(sample.device.type) or torch.compiler.is_compiling()
        off = off or any(layer.training for layer in layers)
        return not off and type(sample) in (Tensor, nn.Parameter) and fp8_is_unsupported(sample.device) is None

    def plan(self, layers: Sequence[Any], stock: Sequence[bool]) -> list[Callable[..., Tensor] | None]:
        """For each layer of one forward its `infer`, as `FusedLayer.forward` takes it, or None; where `runs` says so.

        `stock` says which layers run their stock code.
        """
        products: list[Products] = [
            (None,) * 4 if is_stock or not hasattr(type(layer), "shape") else self.products(i, layer, len(layers))
            for i, (layer, is_stock) in enumerate(zip(layers, stock, strict=True))
        ]
        # A layer quantizes its result for the next one; where somebody may change that in between, it doesn't.
        watched = [is_hooked(layer) for layer in layers]
        handed: list[tuple[Tensor, Rows]] = []
        planned: list[Callable[..., Tensor] | None] = []
        for i, own in enumerate(products):
            follows = i + 1 < len(products) and not watched[i] and not watched[i + 1]
            following = products[i + 1][0] if follows else None
            planned.append(partial(_infer, products=own, following=following, handed=handed) if any(own) else None)
        return planned


def _quantize(group: Sequence[Any], scale: float | None) -> Product:
    """The product of the linear layers of `group`, side by side."""
    with torch.no_grad():
        weights = [linear.weight for linear in group]
        values, col_scale = ops.quantize_fp8(weights[0] if len(weights) == 1 else torch.cat(weights), None)
        biases = [linear.bias for linear in group]
        bias = None
        if any(b is not None for b in biases):
            filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = filled[0].detach() if len(filled) == 1 else torch.cat(filled)
        return Product(values, col_scale if scale is None else col_scale * scale, bias, scale)


def _infer(
    layer: Any,
    x: Tensor,
    packing: Packing,
    *,
    products: Products,
    following: Product | None,
    handed: list[tuple[Tensor, Rows]],
) -> Tensor:
    """A layer in inference: `FusedLayer._infer`, with some of its products in 8 bits.

    Args:
        layer: the layer.
        x: (T, H).
        packing: how they are laid out.
        products: of the layer.
        following: the product that takes up the result, in the next layer; None: none does in 8 bits.
        handed: what the layer before has left: its result, and that quantized. In its place comes this one's.
    """
    shape, (qkv, context, up, down) = layer.shape, products
    if qkv is None:
        projected = layer.project(x)
    else:
        given = handed.pop() if handed else None
        rows = (
            given[1]
            if given is not None and (given[0].data_ptr(), given[0].shape) == (x.data_ptr(), x.shape)
            else qkv.rows(x)
        )
        del given
        projected = ops.linear_fp8(*qkv.factors(rows), x.dtype)
        head_dim = child(layer, *shape.attention).attention_head_size
        projected = projected.view(x.shape[0], 3, -1, head_dim)
        del rows
    q, k, v = projected.unbind(1)
    sequences = packing.cu_seqlens, packing.key_mask, packing.max_seqlen
    rest = *sequences, layer.scale(), packing.bias, packing.tiles
    rows_context: Rows | None = None
    if context is None or context.scale is None:
        attended = ops.attention(q, k, v, *rest).flatten(1)
    else:
        attended = ops.attention_fp8(q, k, v, *rest, context.scale).flatten(1)
        rows_context = attended, None
    del projected, q, k, v
    close = child(layer, *shape.context), child(layer, *shape.context_norm)
    x, rows_up = _close(context, *close, attended, rows_context, x, up)
    del attended, rows_context

    dense, activation = child(layer, *shape.up), layer.activation()
    approximate = gelu_of(activation)
    rows_down: Rows | None = None
    if up is not None and rows_up is not None:
        if approximate is None:
            expanded = activation(ops.linear_fp8(*up.factors(rows_up), x.dtype))
        else:
            scale = None if down is None else down.scale
            expanded = ops.linear_gelu_fp8(*up.factors(rows_up), x.dtype, approximate, scale)
            if scale is not None:
                rows_down = expanded, None
        del rows_up
    elif approximate is None or not is_plain(dense, nn.Linear):
        expanded = activation(ops.linear(x, dense.weight, dense.bias) if is_plain(dense, nn.Linear) else dense(x))
    else:
        expanded = ops.linear_gelu(x, dense.weight, dense.bias, approximate)
    close = child(layer, *shape.down), child(layer, *shape.down_norm)
    x, rows_next = _close(down, *close, expanded, rows_down, x, following)
    if rows_next is not None:
        handed[:] = [(x, rows_next)]
    return x


def _close(
    product: Product | None,
    dense: Any,
    norm: Any,
    x: Tensor,
    rows: Rows | None,
    residual: Tensor,
    following: Product | None,
) -> tuple[Tensor, Rows | None]:
    """What ends both halves of a layer: projection, residual and LayerNorm; and that quantized for what follows.

    `rows` is x quantized already; None: it is to be.
    """
    if product is not None:
        total = ops.linear_add_fp8(*product.factors(product.rows(x) if rows is None else rows), residual)
    elif is_plain(dense, nn.Linear):
        total = ops.linear_add(x, dense.weight, dense.bias, residual)
    else:
        x = ops.add_layer_norm(dense(x), residual, norm.weight, norm.bias, norm.eps, 0.0, None)
        return x, None if following is None else following.rows(x)
    if following is None:
        return ops.layer_norm(total, norm.weight, norm.bias, norm.eps), None
    x, values, row_scale = ops.layer_norm_fp8(total, norm.weight, norm.bias, norm.eps, following.scale)
    return x, (values, row_scale)
