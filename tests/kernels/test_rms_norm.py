"""The norm by the root of the mean of squares: against float64, no further from it than PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels import cpu, reference
from fastbert.kernels import rms_norm as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes


def check(module: Any, rows: int, width: int, dtype: torch.dtype, device: str, eps: float = 1e-5) -> None:
    generator = torch.Generator().manual_seed(rows * 10000 + width)
    x = (torch.randn(rows, width + 3, generator=generator) + 1).to(device, dtype)[:, :width]
    weight = torch.randn(width, generator=generator).to(device, dtype)
    found = module.rms_norm(x, weight, eps)
    assert found.is_contiguous()
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert_within_policy(found, F.rms_norm(x, (width,), weight, eps), truth)


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (9, 384), (3, 768), (4, 100), (3, 1), (2, 5000)])
def test_kernel(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    check(kernel, rows, width, dtype, device)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twins(module: Any, dtype: torch.dtype) -> None:
    check(module, 37, 100, dtype, "cpu")


def test_small_rows_and_none(device: str) -> None:
    """Where eps is what counts; a row of zeros; a weight of another width."""
    x = torch.tensor([[1e-4, -2e-4], [0.0, 0.0]], device=device)
    weight = torch.tensor([2.0, -3.0], device=device)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(kernel.rms_norm(x, weight, 1e-5), expected)
    assert kernel.rms_norm(x[:0], weight, 1e-5).shape == (0, 2)
    with pytest.raises(ValueError, match=r"^weight has shape \(1,\); expected \(2,\)"):
        kernel.rms_norm(x, weight[:1], 1e-5)
