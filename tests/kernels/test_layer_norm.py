"""LayerNorm, kernel and reference: against float64, no further from it than PyTorch's own in the same dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import layer_norm as kernel
from fastbert.kernels import reference
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes

EPS = 1e-12  # BERT's
dtypes = [torch.float32, torch.float16, torch.bfloat16]


def make_args(rows: int, width: int, dtype: torch.dtype, device: str, offset: float = 0.0) -> list[Tensor]:
    """x, residual, weight and bias; the rows' mean is around `offset`, their deviation around 1."""
    generator = torch.Generator().manual_seed(rows * 10000 + width)
    shapes = ((rows, width), (rows, width), (width,), (width,))
    x, residual, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(device, dtype) for t in (x + offset, residual, weight, bias)]


def check(module: object, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Holds `layer_norm` of `module`, or with a residual `add_layer_norm`, to the policy; returns its result."""
    if residual is None:
        what, out = "layer_norm", module.layer_norm(x, weight, bias, eps)
    else:
        what, out = "add_layer_norm", module.add_layer_norm(x, residual, weight, bias, eps)
    assert out.is_contiguous()
    total = x.double() if residual is None else x.double() + residual.double()
    truth = F.layer_norm(total, weight.shape, weight.double(), bias.double(), eps)
    stock = F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)
    assert_within_policy(out, stock, truth, what)
    return out


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (9, 384), (3, 768), (4, 100), (3, 1), (2, 4096), (2, 5000)])
def test_kernel(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = make_args(rows, width, dtype, device)
    check(kernel, x, None, weight, bias)
    check(kernel, x, residual, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("rows", [1, 37, 128, 129, 10000])
def test_kernel_at_the_shapes_of_models(rows: int, dtype: torch.dtype, device: str) -> None:
    for width in (128, 384, 768, 1024):
        x, residual, weight, bias = make_args(rows, width, dtype, device)
        check(kernel, x, None, weight, bias)
        check(kernel, x, residual, weight, bias)


@pytest.mark.parametrize("width", [384, 1000, 1024])
def test_rows_far_from_zero(width: int, device: str) -> None:
    """A mean of 10^4 times the deviation: one float32 rounding of the mean would show."""
    x, residual, weight, bias = make_args(5, width, torch.float32, device, offset=1e4)
    check(kernel, x, None, weight, bias)
    check(kernel, x, residual, weight, bias)


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("width", [384, 1000, 1024])
def test_constant_rows_are_the_bias(width: int, dtype: torch.dtype, device: str) -> None:
    _, _, weight, bias = make_args(1, width, dtype, device)
    values = torch.tensor([0.0, 1.0, 0.1, -3.3, 12345.678], device=device).to(dtype)
    x = values[:, None].expand(-1, width).contiguous()
    assert torch.equal(kernel.layer_norm(x, weight, bias, EPS), bias.expand_as(x))


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_outliers(dtype: torch.dtype, device: str) -> None:
    """A few columns a thousand times the rest, as BERT's hidden states have them."""
    x, residual, weight, bias = make_args(5, 768, dtype, device)
    x[:, 308] = 1000.0
    residual[:, 0] = -3000.0
    check(kernel, x, residual, weight, bias)


def test_eps_is_added_to_the_variance(device: str) -> None:
    x, residual, weight, bias = make_args(5, 384, torch.float32, device)
    check(kernel, x * 1e-3, None, weight, bias, eps=1e-5)
    check(kernel, x * 1e-3, residual * 1e-3, weight, bias, eps=1e-5)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_rows_and_columns_apart(dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = make_args(5, 384, dtype, device)
    expected = kernel.add_layer_norm(x, residual, weight, bias, EPS)
    apart = [torch.full((5, pitch), math.nan, dtype=dtype, device=device)[:, :384] for pitch in (400, 1000)]
    apart[0].copy_(x)
    apart[1].copy_(residual)
    assert torch.equal(kernel.add_layer_norm(*apart, weight, bias, EPS), expected)
    transposed = x.t().contiguous().t()
    weight_apart = weight.repeat_interleave(2)[::2]
    assert torch.equal(kernel.add_layer_norm(transposed, residual, weight_apart, bias, EPS), expected)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_a_row_is_bitwise_the_same_in_any_company(dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = make_args(9, 384, dtype, device)
    together = kernel.add_layer_norm(x, residual, weight, bias, EPS)
    for start, stop in ((0, 1), (5, 9)):
        alone = kernel.add_layer_norm(x[start:stop], residual[start:stop], weight, bias, EPS)
        assert torch.equal(alone, together[start:stop])


def test_no_rows(device: str) -> None:
    x, residual, weight, bias = make_args(0, 384, torch.float32, device)
    assert kernel.layer_norm(x, weight, bias, EPS).shape == (0, 384)
    assert kernel.add_layer_norm(x, residual, weight, bias, EPS).shape == (0, 384)


@pytest.mark.parametrize(
    ("wrong", "shape", "name"), [(1, (36, 384), "residual"), (2, (383,), "weight"), (3, (1, 384), "bias")]
)
def test_wrong_shapes_are_refused(wrong: int, shape: tuple[int, ...], name: str, device: str) -> None:
    args = make_args(37, 384, torch.float32, device)
    args[wrong] = torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=name):
        kernel.add_layer_norm(*args, EPS)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (37, 384), (129, 100), (0, 768)])
def test_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias = make_args(rows, width, dtype, "cpu")
    check(reference, x, None, weight, bias)
    check(reference, x, residual, weight, bias)
