"""Inference in FP8: which GEMMs of a layer run in e4m3, and their quantized weights.

A layer has four GEMMs (GEMMS). In each, weights have a scale for every output channel, and activations one for
every row, found as the row is made, or one for all rows that `fastbert.calibrate` found. Residuals, LayerNorm and
attention stay in the model's dtype. Anything but inference runs without FP8.

Quantized weights stand beside the model, not in it: no parameter or buffer, no part of `state_dict`, of a copy or of a
pickle. They are made where they are first needed, and again once a weight is another one or has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..runtime.support import fp8_is_unsupported, is_hooked, is_plain
from .derived import Derived
from .gemm import PLAIN, Form, Gemm, Norm, Quantized, plain
from .layer import Bound, FusedLayer

GEMMS = ("qkv", "context", "up", "down")
"""The GEMMs of a layer: queries, keys and values; attention's output; both linear layers of the feed-forward."""

Key = tuple[int, str]
"""A GEMM of a model: its layer, and its name."""

Layers = Sequence[Any]

Scales = Mapping[str, float | None]
"""Of one layer, by GEMM: the scale of what it multiplies; None: it stays in the model's dtype."""


class Fp8Gemm(Gemm):
    """A GEMM of FP8 (e4m3) numbers: the linear layers of `group`, side by side."""

    is_static = True

    def __init__(self, group: Sequence[Any], scale: float | None) -> None:
        """`scale` is that of the rows that it multiplies; None: each has its own."""
        with torch.no_grad():
            weights = [linear.weight for linear in group]
            # (N, K) float8_e4m3fn, and the scales of its rows, (N,) float32, times `scale` where there is one.
            self.weight, col_scale = ops.quantize_fp8(weights[0] if len(weights) == 1 else torch.cat(weights), None)
            self.col_scale = col_scale if scale is None else col_scale * scale
            biases = [linear.bias for linear in group]
            self.bias: Tensor | None = None
            if any(b is not None for b in biases):
                filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
                self.bias = filled[0].detach() if len(filled) == 1 else torch.cat(filled)
        self.scale = scale

    def quantized(self, x: Tensor) -> Quantized:
        found: Quantized = ops.quantize_fp8(x, self.scale)
        return found

    def layer_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
        x, values, row_scale = ops.layer_norm_fp8(x, *norm, self.scale)
        return x, (values, row_scale)

    def attention(self, *arguments: Any) -> tuple[Tensor, Quantized | None]:
        if self.scale is None:
            return super().attention(*arguments)
        given: tuple[Any, ...] = (*arguments, self.scale)
        attended = ops.attention_fp8(*given).flatten(1)
        return attended, (attended, None)

    def _factors(
        self, x: Tensor, quantized: Quantized | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """The first five arguments of an operator."""
        values, row_scale = self.quantized(x) if quantized is None else quantized
        return values, row_scale, self.weight, self.col_scale, self.bias

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        return ops.linear_fp8(*self._factors(x, quantized), x.dtype)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        factors, scale = self._factors(x, quantized), following.scale
        raised = ops.linear_gelu_fp8(*factors, x.dtype, approximate, scale)
        return raised, None if scale is None else (raised, None)

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        return ops.linear_add_fp8(*self._factors(x, quantized), residual)


Gemms = dict[str, "Fp8Gemm | None"]
"""Of one layer, by name; None: that one stays in the model's dtype."""


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
        isinstance(layer, Mapping) and set(layer) == set(GEMMS) and all(map(_is_scale, layer.values()))
        for layer in layers
    ):
        raise ValueError(
            "model.config.fastbert['fp8']: expected what fastbert.calibrate writes, a list 'layers' of positive scales "
            f"(null: not in FP8) of {', '.join(GEMMS)}; run it again, or delete model.config.fastbert"
        )
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"model.config.fastbert['fp8'] is of {len(layers)} layers, the model has {config.num_hidden_layers}; run "
            "fastbert.calibrate again, or delete model.config.fastbert"
        )
    return layers


def _is_scale(value: object) -> bool:
    """Whether kernels can take it, and its inverse, in float32, where what is below `least` may count as zero."""
    if value is None:
        return True
    least = torch.finfo(torch.float32).tiny
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= 1 / least


def _unsupported(group: Sequence[Any]) -> str | None:
    """Why a GEMM can't run in FP8, by its linear layers."""
    for linear in group:
        if not is_plain(linear, nn.Linear):
            return f"a {type(linear).__name__}" + (" that is hooked or sharded" if type(linear) is nn.Linear else "")
        if linear.in_features % 16:
            return f"{linear.in_features} input features; FP8 takes a multiple of 16"
        if linear.weight.is_inference():
            return "its weight was made under torch.inference_mode, where writing to it leaves no trace"
    return None


class Fp8:
    """What `fuse(model, precision="fp8")` leaves on an encoder. Copies and pickles hold the scales alone."""

    def __init__(self, scales: Sequence[Scales] | None) -> None:
        self.scales = scales
        """Layer by layer; None: every row has its own."""
        self.derived = Derived()

    def drop(self) -> None:
        """Frees the quantized weights; the next forward makes them again."""
        self.derived.drop()

    def __getstate__(self) -> dict[str, object]:
        return {"scales": self.scales}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["scales"])  # type: ignore[misc]

    def reasons(self, layers: Layers, classes: Mapping[Any, Any]) -> dict[Key, str]:
        """The GEMMs that don't run in FP8, by layer and name, and why; `classes` are fused ones by stock ones."""
        found = {}
        for index, layer in enumerate(layers):
            scales = self._scales_of(index, len(layers))
            kind = classes.get(type(layer), type(layer))
            stock = None if issubclass(kind, FusedLayer) else f"it is in a custom {kind.__name__}"
            groups = {} if stock else kind.layout.gemms(layer)
            for name in GEMMS:
                reason = stock or _unsupported(groups[name])
                if reason is None and scales is not None and scales[name] is None:
                    reason = "calibration keeps it"
                if reason is not None:
                    found[index, name] = reason
        return found

    def groups(self, layers: Layers) -> dict[Key, Sequence[Any]]:
        """The linear layers of every GEMM that runs in FP8; `layers` are fused."""
        reasons = self.reasons(layers, {})
        found = [layer.layout.gemms(layer) if isinstance(layer, FusedLayer) else {} for layer in layers]
        return {
            (i, name): groups[name]
            for i, groups in enumerate(found)
            for name in GEMMS
            if groups and (i, name) not in reasons
        }

    def _scales_of(self, index: int, layers: int) -> Scales | None:
        # Layers may have been dropped since; which ones stayed isn't known.
        return None if self.scales is None or len(self.scales) != layers else self.scales[index]

    def gemms(self, index: int, layer: Any, layers: int) -> Gemms:
        """The GEMMs of layer `index` of `layers` in FP8."""
        found = layer.layout.gemms(layer)
        groups = {name: found[name] if _unsupported(found[name]) is None else () for name in GEMMS}
        tensors = [x for group in groups.values() for linear in group for x in (linear.weight, linear.bias)]
        scales = self._scales_of(index, layers)

        def make() -> Gemms:
            made: Gemms = {}
            for name, group in groups.items():
                scale = None if scales is None else scales[name]
                made[name] = Fp8Gemm(group, scale) if group and (scales is None or scale is not None) else None
            return made

        return self.derived.get(index, tensors, make)

    @staticmethod
    def runs(layers: Layers, sample: Tensor) -> bool:
        """Whether FP8 is for a forward of `layers` at this moment, over activations like `sample`."""
        off = torch.is_grad_enabled() or torch.is_autocast_enabled(sample.device.type) or torch.compiler.is_compiling()
        off = off or any(layer.training for layer in layers)
        return not off and type(sample) in (Tensor, nn.Parameter) and fp8_is_unsupported(sample.device) is None

    def bind(self, layers: Layers, stock: Sequence[bool]) -> list[Bound | None]:
        """The layers of one forward, bound, or None where no GEMM of one runs in FP8; where `runs` says so.

        `stock` says which layers run their stock code.
        """
        gemms: list[Gemms] = [
            {} if is_stock or not isinstance(layer, FusedLayer) else self.gemms(i, layer, len(layers))
            for i, (layer, is_stock) in enumerate(zip(layers, stock, strict=True))
        ]
        # A layer quantizes its result for the next one; where somebody may change that in between, it doesn't.
        watched = [is_hooked(layer) for layer in layers]
        handed: list[tuple[Tensor, Quantized]] = []
        bound: list[Bound | None] = []
        for i, (layer, own) in enumerate(zip(layers, gemms, strict=True)):
            if not any(own.values()):
                bound.append(None)
                continue
            follows = i + 1 < len(gemms) and not watched[i] and not watched[i + 1]
            following = gemms[i + 1].get("qkv") if follows else None
            found = layer.layout.bind(layer, lambda name, group, own=own: own.get(name) or plain(name, group))
            bound.append(found._replace(following=following or PLAIN, handed=handed))
        return bound
