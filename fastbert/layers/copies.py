"""Inference by copies of weights: quantized to FP8 or int8, or laid out in the order that a CPU's GEMMs read.

A layer has four GEMMs (GEMMS), one with a gate five. Residuals, LayerNorm and attention stay in the model's dtype.
Anything but inference runs on the model's own weights. What is FP8's own is in `fastbert.layers.fp8`, what is int8's in
`fastbert.layers.int8`, what is the layout's in `fastbert.layers.prepacked`.

Copies stand beside the model, not in it: no parameter or buffer, no part of `state_dict`, of a copy or of a pickle.
They are made where they are first needed, and again once a weight is another one or has been written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime.support import is_faked, is_hooked, is_plain
from .derived import Derived, Watch
from .gemm import PLAIN, Gemm, Quantized, plain
from .layer import Bound, FusedLayer

GEMMS = ("qkv", "context", "up", "down")
"""The GEMMs of a layer: queries, keys and values; attention's output; both linear layers of the feed-forward."""

Key = tuple[int, str]
"""A GEMM of a model: its layer, and its name."""

Layers = Sequence[Any]

Found = float | str
"""What calibration found for one GEMM: in FP8 the scale of what it multiplies, in int8 factors, see `int8.factors`."""

LayerFound = Mapping[str, Found | None]
"""Of one layer, by GEMM; None: it stays in the model's dtype."""


class CopiedGemm(Gemm):
    """A GEMM of copies of weights: those of the linear layers of a group, side by side."""

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


Gemms = dict[str, "CopiedGemm | None"]
"""Of one layer, by name; None: that one runs on the model's own weights."""


class _Kept(NamedTuple):
    """The layers of one model, bound, while what was found of them holds."""

    seen: object
    """`fastbert.runtime.coverage.Seen.bound`, which is another one where other layers run stock."""
    parameters: list[Tensor | None]
    """What its GEMMs are made of."""
    watch: Watch
    """Of the parameters, as they were."""
    calls: Sequence[int]
    bound: list[Bound | None]


class Copies:
    """What `fuse(model, precision=...)` or `prepack=True` leaves on an encoder. No copy or pickle holds a weight."""

    name: ClassVar[str]
    """In counts of calls."""
    gemm_names: ClassVar[tuple[str, ...]] = GEMMS
    """Those that it is for."""

    def __init__(self) -> None:
        self.derived = Derived()
        self._kept: _Kept | None = None

    def make(self, group: Sequence[nn.Linear], found: Found | None) -> CopiedGemm:
        """The GEMM of some linear layers; `found` for it by calibration, None: that did not run."""
        raise NotImplementedError

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Why it can't run on `device`."""
        raise NotImplementedError

    def told(self, device: torch.device) -> str:
        """How it runs, in a line."""
        raise NotImplementedError

    def drop(self) -> None:
        """Frees the copies; the next forward makes them again."""
        self._kept = None
        self.derived.drop()

    def memory(self) -> int:
        """Bytes of the copies that stand beside the model at this moment."""
        gemms = (gemm for made in list(self.derived.made.values()) for gemm in made.value.values())
        return sum(gemm.nbytes() for gemm in gemms if gemm is not None)

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _unsupported(self, group: Sequence[nn.Linear]) -> str | None:
        """Why a GEMM can't run so, by its linear layers."""
        for linear in group:
            if not is_plain(linear, nn.Linear):
                watched = " that is hooked or sharded" if type(linear) is nn.Linear else ""
                return f"a {type(linear).__name__}{watched}"
            for name, tensor in (("weight", linear.weight), ("bias", linear.bias)):
                if tensor is not None and tensor.is_inference():
                    return f"its {name} was made under torch.inference_mode, where writing to it leaves no trace"
        return None

    def reasons(self, layers: Layers, classes: Mapping[type[nn.Module], Any]) -> dict[Key, str]:
        """The GEMMs that don't run so, by layer and name, and why; `classes` are fused ones by stock ones."""
        reasons = {}
        for index, layer in enumerate(layers):
            found = self._found_of(index, len(layers))
            kind = classes.get(type(layer), type(layer))
            stock = None if issubclass(kind, FusedLayer) else f"it is in a custom {kind.__name__}"
            groups = {} if stock else kind.layout.gemms(layer)
            for name in self.gemm_names if stock else self._names(groups):
                reason = stock or self._unsupported(groups[name])
                if reason is None and found is not None and found[name] is None:
                    reason = "calibration keeps it"
                if reason is not None:
                    reasons[index, name] = reason
        return reasons

    def _names(self, groups: Mapping[str, object]) -> list[str]:
        return [name for name in self.gemm_names if name in groups]

    def groups(self, layers: Layers) -> dict[Key, Sequence[Any]]:
        """The linear layers of every GEMM that runs so; `layers` are fused."""
        reasons = self.reasons(layers, {})
        found = [layer.layout.gemms(layer) if isinstance(layer, FusedLayer) else {} for layer in layers]
        return {
            (i, name): groups[name]
            for i, groups in enumerate(found)
            for name in self._names(groups)
            if (i, name) not in reasons
        }

    def _found_of(self, index: int, layers: int) -> LayerFound | None:
        """What calibration found for layer `index` of `layers`; None: it did not run."""
        return None

    def gemms(self, index: int, layer: FusedLayer, layers: int) -> tuple[Sequence[Tensor | None], Gemms]:
        """What the GEMMs of layer `index` of `layers` are made of, and they."""
        linears = layer.layout.gemms(layer)
        names = self._names(linears)
        groups = {name: linears[name] if self._unsupported(linears[name]) is None else () for name in names}
        tensors = [x for group in groups.values() for linear in group for x in (linear.weight, linear.bias)]
        found = self._found_of(index, layers)

        def make() -> Gemms:
            made: Gemms = {}
            for name, group in groups.items():
                own = None if found is None else found[name]
                made[name] = self.make(group, own) if group and (found is None or own is not None) else None
            return made

        return tensors, self.derived.get(index, tensors, make, sampled=True)

    def runs(self, layers: Layers, sample: Tensor) -> bool:
        """Whether it is for a forward of `layers` at this moment, over activations like `sample`."""
        off = torch.is_grad_enabled() or torch.is_autocast_enabled(sample.device.type) or torch.compiler.is_compiling()
        off = off or is_faked() or torch.jit.is_tracing() or any(layer.training for layer in layers)
        return not off and type(sample) in (Tensor, nn.Parameter) and self.unsupported(sample.device) is None

    def bind(
        self, layers: Layers, stock: Sequence[bool], seen: object = None, calls: Sequence[int] | None = None
    ) -> list[Bound | None]:
        """The layers of one forward, bound, or None where no GEMM of one runs so; where `runs` says so.

        `stock` says which layers run their stock code, `calls` which is called, one after the other (None: each once):
        of a layer that is called several times there is one copy. What is bound is kept for other calls in which
        `seen` is the same, `fastbert.runtime.coverage.Seen.bound`: nothing of the layers has changed but, perhaps,
        their weights.
        """
        kept, calls = self._kept, range(len(layers)) if calls is None else calls
        if kept is None or kept.seen is not seen or kept.calls != calls or not kept.watch.holds(kept.parameters):
            gemms: dict[int, Gemms] = {}
            parameters: list[Tensor | None] = []
            for i, (layer, is_stock) in enumerate(zip(layers, stock, strict=True)):
                if not is_stock and isinstance(layer, FusedLayer):
                    own, gemms[i] = self.gemms(i, layer, len(layers))
                    parameters += own
            bound = self._bound(layers, gemms, calls)
            self._kept = None
            self.derived.retain(range(len(layers)))
            if seen is not None:
                self._kept = _Kept(seen, parameters, Watch(parameters, sampled=True), calls, bound)
        else:
            bound = kept.bound
        handed: list[tuple[Tensor, Quantized]] = []
        return [None if own is None else own._replace(handed=handed) for own in bound]

    def _bound(self, layers: Layers, gemms: Mapping[int, Gemms], calls: Sequence[int]) -> list[Bound | None]:
        # A layer quantizes its result for the next one; where somebody may change that in between, it doesn't.
        watched = [is_hooked(layer) for layer in layers]
        bound: list[Bound | None] = []
        for i, after in zip(calls, (*calls[1:], None), strict=True):
            layer, own = layers[i], gemms.get(i, {})
            if not any(own.values()):
                bound.append(None)
                continue
            following = None
            if after is not None and not watched[i] and not watched[after]:
                following = gemms.get(after, {}).get("qkv")
            found = layer.layout.bind(layer, lambda name, group, own=own: own.get(name) or plain(name, group))
            bound.append(found._replace(following=following or PLAIN))
        return bound
