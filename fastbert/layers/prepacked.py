"""Weights laid out once for the GEMMs of a CPU: the same products, within the numerical policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .copies import GEMMS, CopiedGemm, Copies, Found, side_by_side
from .gemm import Form, Quantized, plain


class PrepackedGemm(CopiedGemm):
    """A GEMM of a weight that is laid out; of few rows, of the weight itself."""

    def __init__(self, group: Sequence[nn.Linear]) -> None:
        with torch.no_grad():
            weight, self.bias = side_by_side(group)
            self.weight = ops.cpu_prepacked.pack(weight)
        self.fewest, self.plain = self.weight.fewest, plain("", tuple(group))

    def nbytes(self) -> int:
        return self.weight.nbytes()

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        if x.shape[0] < self.fewest:
            return self.plain(x)
        return ops.cpu_prepacked.linear(x, self.weight, self.bias)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        if x.shape[0] < self.fewest:
            return self.plain.gelu(x, None, approximate, following)
        return ops.cpu_prepacked.linear_gelu(x, self.weight, self.bias, approximate), None

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        if x.shape[0] < self.fewest:
            return self.plain.add(x, None, residual)
        return ops.cpu_prepacked.linear_add(x, self.weight, self.bias, residual)


class Prepack(Copies):
    """What `fuse(model, prepack=True)` leaves on an encoder."""

    name = "prepacked"
    gemm_names = (*GEMMS, "gate")

    def make(self, group: Sequence[nn.Linear], found: Found | None) -> PrepackedGemm:
        return PrepackedGemm(group)

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"it is for CPUs, and the model is on {device}"

    def _unsupported(self, group: Sequence[nn.Linear]) -> str | None:
        return super()._unsupported(group) or ops.cpu_prepacked.unsupported(group[0].weight.dtype)

    def told(self, device: torch.device) -> str:
        return "weights in the order that they are read in (in float32 for 16 rows or more)"
