"""Rotary positions, kernel, CPU and oracle: against float64, and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.kernels import cpu, reference
from fastbert.kernels import rotary as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import in_turn


def made(rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, its rows apart and thirds far from one another, cosines and sines, of different angles in both halves."""
    generator = torch.Generator().manual_seed(rows + head_dim)
    qkv = torch.randn(3, rows + 2, heads, head_dim, generator=generator).to(device, dtype).transpose(0, 1)[:rows]
    angles = 3 * torch.randn(rows, head_dim, generator=generator)
    return qkv, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def plain(qkv: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """As stock code has it."""
    q, k, v = qkv.unbind(1)
    turned = []
    for x in (q, k):
        left, right = x.chunk(2, -1)
        turned.append(x * cosines[:, None] + torch.cat((-right, left), -1) * sines[:, None])
    return torch.stack((*turned, v), 1)


@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "dtype"), in_turn((1, 1, 16), (37, 2, 64), (129, 3, 40), (70, 1, 128))
)
def test_kernel(rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    given = made(rows, heads, head_dim, dtype, device)
    truth = plain(*(x.double() for x in given))
    found = kernel.rotate(*given)
    assert found.is_contiguous() and torch.equal(found[:, 2], given[0][:, 2])
    assert_within_policy(found, plain(*given), truth)
    other = -given[2].roll(head_dim // 2, -1)
    truth = plain(*(x.double() for x in (*given[:2], other)))
    assert_within_policy(kernel.rotate(*given, True), plain(*given[:2], other), truth)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_twins(module: Any, dtype: torch.dtype) -> None:
    given = made(37, 3, 16, dtype, "cpu")
    for back in (False, True):
        sines = -given[2].roll(8, -1) if back else given[2]
        truth = plain(*(x.double() for x in (*given[:2], sines)))
        assert_within_policy(module.rotate(*given, back), plain(*given[:2], sines), truth)


@pytest.mark.parametrize("module", [kernel, cpu], ids=["kernel", "cpu"])
def test_back_is_the_gradient(module: Any, device: str) -> None:
    if module is cpu and device != "cpu":
        pytest.skip("of the CPU")
    qkv, cosines, sines = made(19, 2, 32, torch.float32, device)
    leaf = qkv.clone().requires_grad_()
    grad = torch.randn_like(qkv)
    (slope,) = torch.autograd.grad(plain(leaf, cosines, sines), leaf, grad)
    torch.testing.assert_close(module.rotate(grad, cosines, sines, True), slope)


def test_what_would_give_a_wrong_number_is_refused(device: str) -> None:
    qkv, cosines, sines = made(9, 2, 16, torch.float32, device)
    for bad, message in (
        ((qkv[..., :15], cosines, sines), r"^qkv has shape"),
        ((qkv[:, :2], cosines, sines), r"^qkv has shape"),
        ((qkv, cosines[:8], sines), r"^cosines has shape"),
        ((qkv, cosines, sines[:, :8]), r"^sines has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.rotate(*bad)
    assert kernel.rotate(qkv[:0], cosines[:0], sines[:0]).shape == (0, 3, 2, 16)
