"""int8: weights have a scale for every output channel, activations a scale and an offset for every row, found as the
row is made. `fastbert.calibrate` finds factors by which columns of activations are multiplied, and weights divided, so
that neither has outliers (SmoothQuant, arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import numerics, ops
from ..runtime.support import int8_is_unsupported
from .copies import CopiedGemm, Found, side_by_side
from .gemm import Form, Norm, Quantized
from .low_precision import LowPrecision

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_MIDDLE, _OCTAVE = 32, 4


def written(factors: Tensor) -> str:
    """Factors (K,), to the nearest quarter of an octave, a letter each; as a config keeps them."""
    steps = (factors.double().log2() * _OCTAVE).round().clamp(-_MIDDLE, _MIDDLE - 1).long() + _MIDDLE
    return "".join(_LETTERS[i] for i in steps.tolist())


def factors_of(text: str) -> Tensor:
    """Factors (K,) float32, as `written` has written them."""
    steps = torch.tensor([_LETTERS.index(letter) - _MIDDLE for letter in text], dtype=torch.float64)
    return torch.exp2(steps / _OCTAVE).float()


def quantize_weight(weight: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) float32 as int8, of magnitudes up to `limit`, and the scales of its rows (N,) float32.

    The scale of a row that is not finite is NaN.
    """
    largest = weight.abs().amax(1).clamp_(min=1e-30)
    values = (weight * (limit / largest)[:, None]).round_().nan_to_num_(0.0, 0.0, 0.0)
    return values.to(torch.int8), (largest + (largest - largest)) / limit


class Int8Gemm(CopiedGemm):
    """A GEMM of int8 numbers."""

    def __init__(self, group: Sequence[nn.Linear], factors: str | None) -> None:
        """`factors` are those of the columns that it multiplies; None or empty: 1."""
        with torch.no_grad():
            weight, self.bias = side_by_side(group)
            wide = weight.float()
            self.factors: Tensor | None = None
            if factors:
                if len(factors) != weight.shape[1]:
                    raise ValueError(
                        f"model.config.fastbert['int8'] has {len(factors)} factors for {weight.shape[1]} input "
                        "features; run fastbert.calibrate again, or delete model.config.fastbert"
                    )
                self.factors = factors_of(factors).to(weight.device)
                wide = wide / self.factors
            # (N, K) int8; the scales of its rows (N,) float32, NaN where one is not finite; and their sums (N,) int32.
            self.weight, self.col_scale = quantize_weight(wide, ops.int8_weight_limit(weight.device))
            self.col_sum = self.weight.sum(1, dtype=torch.int32)

    def nbytes(self) -> int:
        return super().nbytes() + ops.int8_packed_bytes(self.weight)

    def quantized(self, x: Tensor) -> Quantized:
        return Quantized(*ops.quantize_int8(x, self.factors))

    def layer_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
        x, *quantized = ops.layer_norm_int8(x, *norm, self.factors)
        return x, Quantized(*quantized)

    def _factors(
        self, x: Tensor, quantized: Quantized | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The first seven arguments of an operator."""
        rows = self.quantized(x) if quantized is None else quantized
        assert rows.scale is not None and rows.zero is not None
        return rows.values, rows.scale, rows.zero, self.weight, self.col_scale, self.col_sum, self.bias

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        return ops.linear_int8(*self._factors(x, quantized), x.dtype)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        given = (*self._factors(x, quantized), x.dtype, approximate)
        if isinstance(following, Int8Gemm):
            rows = Quantized(*ops.linear_gelu_quantize_int8(*given, following.factors))
            return rows.values, rows
        raised = ops.linear_gelu_int8(*given)
        return raised, following.quantized(raised)

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        return ops.linear_add_int8(*self._factors(x, quantized), residual)


class Int8(LowPrecision):
    """int8, each row by a scale and an offset of its own; smoothed where `fastbert.calibrate` ran."""

    name, title = "int8", "int8"
    expected = "factors, a letter for each input"
    unsupported = staticmethod(int8_is_unsupported)

    def make(self, group: Sequence[nn.Linear], found: Found | None) -> Int8Gemm:
        assert not isinstance(found, float)
        return Int8Gemm(group, found)

    @staticmethod
    def is_found(value: object) -> bool:
        return isinstance(value, str) and set(value) <= set(_LETTERS)

    def rounded(self, x: Tensor) -> Tensor:
        return numerics.as_int8(x)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        return numerics.weight_as_int8(weight, ops.int8_weight_limit(weight.device))

    def told(self, device: torch.device) -> str:
        limit = ops.int8_weight_limit(device)
        how = "a scale and an offset of each row's own" + ("" if self.found is None else ", smoothed by calibration")
        return how + (f", weights to {limit}: this CPU has neither VNNI nor AMX" if limit < 127 else "")
