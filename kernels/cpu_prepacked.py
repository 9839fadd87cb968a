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


class Prepacked(NamedTuple):
    """A weight (N, K)."""

    values: Tensor
    """Laid out: opaque."""
    like: Tensor
    """Of its shape and of the dtype that is multiplied, with one element."""

    @property
    def fewest(self) -> int:
        """Rows at least that are to be multiplied by it.

        Of fewer than 16, oneMKL sums up a weight that is not laid out in another order, to a third of the error.
        """
        return 16 if self.like.dtype is torch.float32 else 1

    def nbytes(self) -> int:
        """What it takes beside the weight, but for what a library adds."""
        return self.like.numel() * self.like.element_size()


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
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(80, 96, generator=generator, dtype=torch.float32)
        packed = pack(weight)
        for rows in (1, 2, 7, 16, 33, 128, ROWS, ROWS + 9):
            x = torch.randn(rows, 96, generator=generator, dtype=torch.float32)
            if not torch.allclose(_product(x, packed, None), x @ weight.T, rtol=1e-4, atol=1e-4):
                return False
    return True


def pack(weight: Tensor) -> Prepacked:
    """Lays out a weight (N, K); see `unsupported`."""
    dtype = _multiplied(weight.dtype)
    weight = weight.detach().to(dtype).contiguous()
    like = weight.new_empty(1, 1).expand(weight.shape)
    if dtype is torch.float32:
        return Prepacked(torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS), like)
    return Prepacked(torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), like)


def _product(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """In the dtype of the product: a new tensor, for an epilogue to change in place."""
    dtype = weight.like.dtype
    x, bias = cpu._rounded(x, dtype), None if bias is None else cpu._rounded(bias, dtype)
    # The last argument says that x has the number of rows laid out for; `like` is read where it has not.
    product: Tensor = torch.ops.mkl._mkl_linear(x, weight.values, weight.like, None, x.shape[0])
    return product if bias is None else product.add_(bias)  # as `cpu._mm_add`


def linear(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """x (T, K), T at least `weight.fewest` -> (T, N), as `cpu.linear`."""
    if weight.like.dtype is torch.float32:
        return cpu._rounded(_product(x, weight, bias), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.values, bias, "none", [], "")
    return fused


def linear_gelu(x: Tensor, weight: Prepacked, bias: Tensor | None, approximate: str) -> Tensor:
    """The same, as `cpu.linear_gelu`."""
    if weight.like.dtype is torch.float32:
        return cpu._rounded(cpu._gelu_(_product(x, weight, bias), approximate=approximate), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.values, bias, "gelu", [], approximate)
    return fused


def linear_add(x: Tensor, weight: Prepacked, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The same, as `cpu.linear_add`; residual (T, N)."""
    if weight.like.dtype is torch.float32:
        return cpu._rounded(_product(x, weight, bias).add_(residual), x.dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight.values, bias, "add")
    return fused
