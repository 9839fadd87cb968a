"""GEMMs of weights that are laid out once, in the order in which the library that multiplies reads them.

PyTorch hands a weight to oneMKL, or in 16 bits to oneDNN, which lays it out anew in every call: of a few rows that may
be a third of the time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu

ROWS = 512
"""Rows that weights are laid out for. Fewer rows are as fast so as laid out for their number, 2,048 nearly."""


class _Part(NamedTuple):
    """Some columns of a weight (N, K)."""

    columns: slice
    values: Tensor
    """Laid out: opaque."""
    like: Tensor
    """Of their shape and of the dtype that is multiplied, with one element."""


class Prepacked(NamedTuple):
    """A weight (N, K)."""

    parts: tuple[_Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That is multiplied."""
        return self.parts[0].like.dtype

    def nbytes(self) -> int:
        """What it takes beside the weight, but for what a library adds."""
        return sum(part.like.numel() * part.like.element_size() for part in self.parts)


def fewest(dtype: torch.dtype) -> int:
    """Rows at least that are to be multiplied by a weight that is laid out.

    Of fewer than 16, oneMKL sums up a weight that is not laid out in another order, to a third of the error.
    """
    return 16 if _multiplied(dtype) is torch.float32 else 1


def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied."""
    return dtype if cpu._has_native_matmul(dtype) else torch.float32


def unsupported(dtype: torch.dtype) -> str | None:
    """Why no weight of `dtype` can be laid out."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weight is {dtype}; expected float32, float16 or bfloat16"
    if not (_mkl_works() if _multiplied(dtype) is torch.float32 else torch.backends.mkldnn.is_available()):
        return "PyTorch has no oneMKL here, or none whose layout serves any number of rows"
    return None


@functools.cache
def _mkl_works() -> bool:
    """Whether oneMKL is there, and what was laid out for ROWS rows multiplies fewer and more as well."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return False
    with cpu.untouched():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(80, 96, generator=generator, dtype=torch.float32)
        packed = pack(weight)
        for rows in (1, 2, 7, 16, 33, 128, ROWS, ROWS + 9):
            x = torch.randn(rows, 96, generator=generator, dtype=torch.float32)
            if not torch.allclose(_product(x, packed, None), x @ weight.T, rtol=1e-4, atol=1e-4):
                return False
    return True


def width(shape: torch.Size, dtype: torch.dtype) -> int | None:
    """How many columns of a weight of `shape` and `dtype` are to be laid out as one, for the threads there are.

    None: it is not to be laid out; see `cpu.exact_width`.
    """
    if _multiplied(dtype) is not torch.float32:
        return shape[1]
    return _width(shape[0], shape[1], torch.get_num_threads())


@functools.cache
def _width(rows: int, columns: int, threads: int) -> int | None:
    def multiply(x: Tensor, weight: Tensor, width: int) -> Tensor:
        return _product(x, pack(weight, width), None)

    return cpu.exact_width(rows, columns, (512, 192), (16, 128, ROWS), multiply)


def pack(weight: Tensor, width: int | None = None) -> Prepacked:
    """Lays out a weight (N, K), in parts of `width` columns, or in one; see `unsupported`."""
    dtype = _multiplied(weight.dtype)
    weight = weight.detach().to(dtype)
    parts, step = [], width or max(weight.shape[1], 1)
    for start in range(0, max(weight.shape[1], 1), step):
        columns = slice(start, min(start + step, weight.shape[1]))
        part = weight[:, columns].contiguous()
        like = part.new_empty(1, 1).expand(part.shape)
        if dtype is torch.float32:
            parts.append(_Part(columns, torch.ops.mkl._mkl_reorder_linear_weight(part, ROWS), like))
        else:
            parts.append(_Part(columns, torch.ops.mkldnn._reorder_linear_weight(part, ROWS), like))
    return Prepacked(tuple(parts))


def _product(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """In the dtype of the product: a new tensor, for an epilogue to change in place."""
    x, bias = cpu._rounded(x, weight.dtype), None if bias is None else cpu._rounded(bias, weight.dtype)
    # The last argument says that x has the number of rows laid out for; `like` is read where it has not.
    multiply, rows = torch.ops.mkl._mkl_linear, x.shape[0]
    if len(weight.parts) == 1:
        _, values, like = weight.parts[0]
        total: Tensor = multiply(x, values, like, None, rows)
    else:
        first, *others = (multiply(x[:, part.columns].contiguous(), *part[1:], None, rows) for part in weight.parts)
        total = functools.reduce(Tensor.add_, others, first)
    return total if bias is None else total.add_(bias)  # as `cpu._mm_add`


def linear(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """x (T, K), T at least `fewest` -> (T, N), as `cpu.linear`."""
    if weight.dtype is torch.float32:
        return cpu._rounded(_product(x, weight, bias), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.parts[0].values, bias, "none", [], "")
    return fused


def linear_gelu(x: Tensor, weight: Prepacked, bias: Tensor | None, approximate: str) -> Tensor:
    """The same, as `cpu.linear_gelu`."""
    if weight.dtype is torch.float32:
        return cpu._rounded(cpu._gelu_(_product(x, weight, bias), approximate=approximate), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.parts[0].values, bias, "gelu", [], approximate)
    return fused


def linear_add(x: Tensor, weight: Prepacked, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The same, as `cpu.linear_add`; residual (T, N)."""
    if weight.dtype is torch.float32:
        return cpu._rounded(_product(x, weight, bias).add_(residual), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight.parts[0].values, bias, "add")
    return fused


def linear_gated(
    x: Tensor,
    gate: Prepacked,
    gate_bias: Tensor | None,
    up: Prepacked | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The same, as `cpu.linear_gated`."""
    multiply = _product if gate.dtype is torch.float32 else linear
    if up is None:
        width = gate.parts[0].like.shape[0] // 2
        return cpu.gate_rows(x, width, lambda some: multiply(some, gate, gate_bias).chunk(2, 1), activation)

    def both(some: Tensor) -> tuple[Tensor, Tensor]:
        return multiply(some, gate, gate_bias), multiply(some, up, up_bias)

    return cpu.gate_rows(x, gate.parts[0].like.shape[0], both, activation)
