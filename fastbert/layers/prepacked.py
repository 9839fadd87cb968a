"""Weights laid out once for the GEMMs of a CPU: the same results, within the numerical policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .copies import GEMMS, CopiedGemm, Copies, Found, side_by_side
from .gemm import Form, Gemm, Quantized, plain


class PrepackedGemm(CopiedGemm):
    """A GEMM of a weight that is laid out, or where that is less exact of the weight itself: see `cpu_prepacked`."""

    def __init__(self, group: Sequence[nn.Linear]) -> None:
        self.group, self.plain = tuple(group), plain("", tuple(group))
        self.by_width: dict[int, ops.cpu_prepacked.Prepacked] = {}
        self.by_threads: dict[int, ops.cpu_prepacked.Prepacked | None] = {}
        self.fewest = ops.cpu_prepacked.fewest(group[0].weight.dtype)
        self._lay_out(torch.get_num_threads())

    def _lay_out(self, threads: int) -> None:
        with torch.no_grad():
            weight, self.bias = side_by_side(self.group)
            widths = [ops.cpu_prepacked.width(linear.weight.shape, weight.dtype) for linear in self.group]
            width = None if None in widths else min(filter(None, widths))
            if width is not None and width not in self.by_width:
                self.by_width[width] = ops.cpu_prepacked.pack(weight, width)
            self.by_threads[threads] = None if width is None else self.by_width[width]

    def nbytes(self) -> int:
        return sum(weight.nbytes() for weight in self.by_width.values())

    def _laid_out(self, x: Tensor) -> ops.cpu_prepacked.Prepacked | None:
        """The weight for as many rows as `x` has, by the threads of this caller; None: itself."""
        if x.shape[0] < self.fewest:
            return None
        threads = torch.get_num_threads()
        if threads not in self.by_threads:
            self._lay_out(threads)
        weight = self.by_threads[threads]
        # To add up parts of many rows takes longer than to lay the weight out.
        few = weight is None or len(weight.parts) == 1 or x.shape[0] <= ops.cpu_prepacked.ROWS
        return weight if few else None

    def __call__(self, x: Tensor, quantized: Quantized | None = None) -> Tensor:
        weight = self._laid_out(x)
        return self.plain(x) if weight is None else ops.cpu_prepacked.linear(x, weight, self.bias)

    def gelu(
        self, x: Tensor, quantized: Quantized | None, approximate: str, following: Form
    ) -> tuple[Tensor, Quantized | None]:
        weight = self._laid_out(x)
        if weight is None:
            return self.plain.gelu(x, None, approximate, following)
        return ops.cpu_prepacked.linear_gelu(x, weight, self.bias, approximate), None

    def gated(self, x: Tensor, gate: Gemm | None, activation: str) -> Tensor | None:
        own = self._laid_out(x)
        if gate is None:
            if own is None:
                return self.plain.gated(x, None, activation)
            return ops.cpu_prepacked.linear_gated(x, own, self.bias, None, None, activation)
        if not isinstance(gate, PrepackedGemm):
            return None
        other = gate._laid_out(x)
        if own is None or other is None:
            return self.plain.gated(x, gate.plain, activation)
        return ops.cpu_prepacked.linear_gated(x, other, gate.bias, own, self.bias, activation)

    def add(self, x: Tensor, quantized: Quantized | None, residual: Tensor) -> Tensor:
        weight = self._laid_out(x)
        if weight is None:
            return self.plain.add(x, None, residual)
        return ops.cpu_prepacked.linear_add(x, weight, self.bias, residual)


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
