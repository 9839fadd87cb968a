"""FP8 (e4m3): weights have a scale for every output channel, and activations one for every row, found as the row is
made, or one for all rows that `fastbert.calibrate` found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import numerics, ops
from ..runtime.support import fp8_is_unsupported
from .copies import CopiedGemm, Found, side_by_side
from .gemm import Form, Norm, Quantized
from .low_precision import LowPrecision


class Fp8Gemm(CopiedGemm):
    """A GEMM of FP8 (e4m3) numbers."""

    def __init__(self, group: Sequence[nn.Linear], scale: float | None) -> None:
        """`scale` is that of the rows that it multiplies; None: each has its own."""
        with torch.no_grad():
            weight, self.bias = side_by_side(group)
            # (N, K) float8_e4m3fn, and the scales of its rows, (N,) float32, times `scale` where there is one.
            self.weight, col_scale = ops.quantize_fp8(weight, None)
            self.col_scale = col_scale if scale is None else col_scale * scale
        self.scale = scale

    def quantized(self, x: Tensor) -> Quantized:
        return Quantized(*ops.quantize_fp8(x, self.scale))

    def layer_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
        x, values, row_scale = ops.layer_norm_fp8(x, *norm, self.scale)
        return x, Quantized(values, row_scale)

    def attention(self, *arguments: Any) -> tuple[Tensor, Quantized | None]:
        if self.scale is None or len(arguments) > 9:  # with a window
            return super().attention(*arguments)
        given: tuple[Any, ...] = (*arguments, self.scale)
        attended = ops.attention_fp8(*given).flatten(1)
        return attended, Quantized(attended)

    def _factors(
        self, x: Tensor, quantized: Quantized | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """The first five arguments of an operator."""
        rows = self.quantized(x) if quantized is None else quantized
        return rows.values, rows.scale, self.weight, self.col_scale, self.bias

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        return ops.linear_fp8(*self._factors(x, quantized), x.dtype)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        factors, scale = self._factors(x, quantized), following.scale
        raised = ops.linear_gelu_fp8(*factors, x.dtype, approximate, scale)
        return raised, None if scale is None else Quantized(raised)

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        return ops.linear_add_fp8(*self._factors(x, quantized), residual)


class Fp8(LowPrecision):
    """FP8, by scales of calibration, or each row by its own."""

    name, title, expected = "fp8", "FP8", "positive scales"
    unsupported = staticmethod(fp8_is_unsupported)

    def make(self, group: Sequence[nn.Linear], found: Found | None) -> Fp8Gemm:
        assert not isinstance(found, str)
        return Fp8Gemm(group, found)

    @staticmethod
    def is_found(value: object) -> bool:
        """Whether kernels can take it, and its inverse, in float32, where what is below `least` may count as zero."""
        least = torch.finfo(torch.float32).tiny
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= 1 / least

    def rounded(self, x: Tensor) -> Tensor:
        return numerics.as_fp8(x)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        return numerics.as_fp8(weight)

    def told(self, device: torch.device) -> str:
        how = "a scale of each row's own" if self.found is None else "scales from calibration"
        return how + (", simulated" if device.type == "cpu" else "")
