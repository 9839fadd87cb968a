"""Inference in FP8 or int8: what the two have in common.

Anything but inference runs in the model's dtype. What is FP8's own is in `fastbert.layers.fp8`, what is int8's in
`fastbert.layers.int8`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..runtime.support import is_plain
from .copies import GEMMS, Copies, LayerFound

Kind = TypeVar("Kind", bound="LowPrecision")


class LowPrecision(Copies):
    """What `fuse(model, precision=...)` leaves. Copies and pickles hold what was calibrated alone."""

    title: ClassVar[str]
    """In sentences."""
    expected: ClassVar[str]
    """What calibration writes for a GEMM, in a sentence."""

    def __init__(self, found: Sequence[LayerFound] | None) -> None:
        super().__init__()
        self.found = found
        """Layer by layer, what `fastbert.calibrate` left in the model's config; None: it did not run."""

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

    @classmethod
    def of(cls: type[Kind], config: PreTrainedConfig, number: int) -> Kind:
        """By what `fastbert.calibrate` left in the config of a model with that number of layers, if it ran.

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
        if len(layers) != number:
            raise ValueError(
                f"{where} is of {len(layers)} layers, the model has {number}; run "
                "fastbert.calibrate again, or delete model.config.fastbert"
            )
        return cls(layers)

    def __getstate__(self) -> dict[str, object]:
        return {"found": self.found}

    def _unsupported(self, group: Sequence[nn.Linear]) -> str | None:
        for linear in group:
            if is_plain(linear, nn.Linear) and linear.in_features % 16:
                return f"{linear.in_features} input features; {self.title} takes a multiple of 16"
        return super()._unsupported(group)

    def _found_of(self, index: int, layers: int) -> LayerFound | None:
        # Layers may have been dropped since; which ones stayed isn't known.
        return None if self.found is None or len(self.found) != layers else self.found[index]
