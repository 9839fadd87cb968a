"""Inference in FP8 or int8: which GEMMs of a layer run so, and their quantized weights.

A layer has four GEMMs (GEMMS). Residuals, LayerNorm and attention stay in the model's dtype. Anything but inference
runs in the model's dtype. What is FP8's own is in `fastbert.layers.fp8`, what is int8's in `fastbert.layers.int8`.

Quantized weights stand beside the model, not in it: no parameter or buffer, no part of `state_dict`, of a copy or of a
pickle. They are made where they are first needed, and again once a weight is another one or has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..runtime.support import is_hooked, is_plain
from .derived import Derived
from .gemm import PLAIN, Gemm, Quantized, plain
from .layer import Bound, FusedLayer

Kind = TypeVar("Kind", bound="LowPrecision")

GEMMS = ("qkv", "context", "up", "down")
"""The GEMMs of a layer: queries, keys and values; attention's output; both linear layers of the feed-forward."""

Key = tuple[int, str]
"""A GEMM of a model: its layer, and its name."""

Layers = Sequence[Any]

Found = float | str
"""What calibration found for one GEMM: in FP8 the scale of what it multiplies, in int8 factors, see `int8.factors`."""

LayerFound = Mapping[str, Found | None]
"""Of one layer, by GEMM; None: it stays in the model's dtype."""


class QuantizedGemm(Gemm):
    """A GEMM of quantized numbers: the linear layers of a group, side by side."""

    is_static = True

    def nbytes(self) -> int:
        """What it holds beside the model."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


def side_by_side(group: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and bias (N,) of linear layers taken as one."""
    weights: list[Tensor] = [linear.weight.detach() for linear in group]
    biases = [linear.bias for linear in group]
    bias: Tensor | None = None
    if any(b is not None for b in biases):
        filled: list[Tensor] = [
            w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)
        ]
        bias = filled[0].detach() if len(filled) == 1 else torch.cat(filled).detach()
    return weights[0] if len(weights) == 1 else torch.cat(weights), bias


Gemms = dict[str, "QuantizedGemm | None"]
"""Of one layer, by name; None: that one stays in the model's dtype."""


class LowPrecision:
    """What `fuse(model, precision=...)` leaves on an encoder. Copies and pickles hold what was calibrated alone."""

    name: ClassVar[str]
    """As `fuse` takes it."""
    title: ClassVar[str]
    """In sentences."""
    expected: ClassVar[str]
    """What calibration writes for a GEMM, in a sentence."""

    def __init__(self, found: Sequence[LayerFound] | None) -> None:
        self.found = found
        """Layer by layer, what `fastbert.calibrate` left in the model's config; None: it did not run."""
        self.derived = Derived()

    def make(self, group: Sequence[nn.Linear], found: Found | None) -> QuantizedGemm:
        """The GEMM of some linear layers; `found` for it by calibration, None: that did not run."""
        raise NotImplementedError

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Why it can't run on `device`."""
        raise NotImplementedError

    @staticmethod
    def is_found(value: object) -> bool:
        """Whether calibration may have written it for a GEMM."""
        raise NotImplementedError

    def rounded(self, x: Tensor) -> Tensor:
        """What a linear layer multiplies, rounded the plain way."""
        raise NotImplementedError

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The weight of a linear layer, rounded the plain way."""
        raise NotImplementedError

    def told(self, device: torch.device) -> str:
        """How it quantizes, in a line."""
        raise NotImplementedError

    @classmethod
    def of(cls: type[Kind], config: Any) -> Kind:
        """By what `fastbert.calibrate` left in a model's config, if it ran.

        Raises:
            ValueError: it is not what `calibrate` writes, or the model has another number of layers now.
        """
        found = getattr(config, "fastbert", None)
        found = found.get(cls.name) if isinstance(found, Mapping) else found
        if found is None:
            return cls(None)
        where = f"model.config.fastbert[{cls.name!r}]"
        layers = found.get("layers") if isinstance(found, Mapping) else None
        if not isinstance(layers, list) or not all(
            isinstance(layer, Mapping)
            and set(layer) == set(GEMMS)
            and all(value is None or cls.is_found(value) for value in layer.values())
            for layer in layers
        ):
            raise ValueError(
                f"{where}: expected what fastbert.calibrate writes, a list 'layers' of {cls.expected} "
                f"(null: not in {cls.title}) of {', '.join(GEMMS)}; run it again, or delete model.config.fastbert"
            )
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"{where} is of {len(layers)} layers, the model has {config.num_hidden_layers}; run "
                "fastbert.calibrate again, or delete model.config.fastbert"
            )
        return cls(layers)

    def drop(self) -> None:
        """Frees the quantized weights; the next forward makes them again."""
        self.derived.drop()

    def memory(self) -> int:
        """Bytes of the quantized weights that stand beside the model at this moment."""
        gemms = (gemm for made in list(self.derived.made.values()) for gemm in made.value.values())
        return sum(gemm.nbytes() for gemm in gemms if gemm is not None)

    def __getstate__(self) -> dict[str, object]:
        return {"found": self.found}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["found"])  # type: ignore[misc]

    def _unsupported(self, group: Sequence[nn.Linear]) -> str | None:
        """Why a GEMM can't run so, by its linear layers."""
        for linear in group:
            if not is_plain(linear, nn.Linear):
                watched = " that is hooked or sharded" if type(linear) is nn.Linear else ""
                return f"a {type(linear).__name__}{watched}"
            if linear.in_features % 16:
                return f"{linear.in_features} input features; {self.title} takes a multiple of 16"
            if linear.weight.is_inference():
                return "its weight was made under torch.inference_mode, where writing to it leaves no trace"
        return None

    def reasons(self, layers: Layers, classes: Mapping[Any, Any]) -> dict[Key, str]:
        """The GEMMs that don't run so, by layer and name, and why; `classes` are fused ones by stock ones."""
        reasons = {}
        for index, layer in enumerate(layers):
            found = self._found_of(index, len(layers))
            kind = classes.get(type(layer), type(layer))
            stock = None if issubclass(kind, FusedLayer) else f"it is in a custom {kind.__name__}"
            groups = {} if stock else kind.layout.gemms(layer)
            for name in GEMMS:
                reason = stock or self._unsupported(groups[name])
                if reason is None and found is not None and found[name] is None:
                    reason = "calibration keeps it"
                if reason is not None:
                    reasons[index, name] = reason
        return reasons

    def groups(self, layers: Layers) -> dict[Key, Sequence[Any]]:
        """The linear layers of every GEMM that runs so; `layers` are fused."""
        reasons = self.reasons(layers, {})
        found = [layer.layout.gemms(layer) if isinstance(layer, FusedLayer) else {} for layer in layers]
        return {
            (i, name): groups[name]
            for i, groups in enumerate(found)
            for name in GEMMS
            if groups and (i, name) not in reasons
        }

    def _found_of(self, index: int, layers: int) -> LayerFound | None:
        # Layers may have been dropped since; which ones stayed isn't known.
        return None if self.found is None or len(self.found) != layers else self.found[index]

    def gemms(self, index: int, layer: Any, layers: int) -> Gemms:
        """The quantized GEMMs of layer `index` of `layers`."""
        linears = layer.layout.gemms(layer)
        groups = {name: linears[name] if self._unsupported(linears[name]) is None else () for name in GEMMS}
        tensors = [x for group in groups.values() for linear in group for x in (linear.weight, linear.bias)]
        found = self._found_of(index, layers)

        def make() -> Gemms:
            made: Gemms = {}
            for name, group in groups.items():
                own = None if found is None else found[name]
                made[name] = self.make(group, own) if group and (found is None or own is not None) else None
            return made

        return self.derived.get(index, tensors, make)

    def runs(self, layers: Layers, sample: Tensor) -> bool:
        """Whether it is for a forward of `layers` at this moment, over activations like `sample`."""
        off = torch.is_grad_enabled() or torch.is_autocast_enabled(sample.device.type) or torch.compiler.is_compiling()
        off = off or any(layer.training for layer in layers)
        return not off and type(sample) in (Tensor, nn.Parameter) and self.unsupported(sample.device) is None

    def bind(self, layers: Layers, stock: Sequence[bool]) -> list[Bound | None]:
        """The layers of one forward, bound, or None where no GEMM of one runs so; where `runs` says so.

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
