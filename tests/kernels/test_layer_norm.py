"""LayerNorm, kernel and reference: against float64, no further from it than PyTorch's own in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, reference
from fastbert.kernels import layer_norm as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import in_turn, kernel_dtypes
from tests.kernels.philox import keep_row

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
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins(module: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias = make_args(rows, width, dtype, "cpu")
    check(module, x, None, weight, bias)
    check(module, x, residual, weight, bias)


SEED = 0x1234567890


def check_training(
    module: object, args: list[Tensor], dropout: float, grad: Tensor, kept: Tensor | None, eps: float = EPS
) -> tuple[Tensor, ...]:
    """Holds `add_layer_norm` with dropout, and its gradients, to the policy: stock drops what `kept` says."""
    seed = torch.tensor([SEED], device=grad.device) if dropout else None
    x, residual, weight, _ = args
    out = module.add_layer_norm(*args, eps, dropout, seed)
    assert out.dtype == residual.dtype
    dx, *others = module.add_layer_norm_backward(grad, x, residual, weight, eps, dropout, seed)
    if not dropout and x.dtype == residual.dtype:
        assert dx.shape == (0,)
        dx = others[0]
    results = []
    for convert in (lambda t: t, lambda t: t.double()):
        leaves = [convert(t).clone().requires_grad_() for t in args]
        added = leaves[0] if kept is None else leaves[0] * kept.to(leaves[0]) / (1 - dropout)
        plain = F.layer_norm(added + leaves[1], weight.shape, *leaves[2:], eps)
        results.append((plain.detach(), *torch.autograd.grad(plain, leaves, convert(grad).to(plain.dtype))))
    for name, mine, stock, truth in zip(
        ("out", "dx", "dresidual", "dweight", "dbias"), (out, dx, *others), *results, strict=True
    ):
        assert_within_policy(mine, stock, truth, name)
    return out, dx, *others


@pytest.mark.parametrize(
    ("rows", "width", "dropout", "dtype"),
    in_turn(
        *(
            (*shape, dropout)
            for dropout in (0.0, 0.3)
            for shape in ((37, 128), (33, 384), (17, 1000), (16, 1024), (40, 5))
        ),
        dtypes=(torch.float32, torch.float16, "autocast"),
    ),
)
def test_training_kernel(rows: int, width: int, dropout: float, dtype: torch.dtype | str, device: str) -> None:
    args = make_args(rows, width, torch.float32 if dtype == "autocast" else dtype, device)
    if dtype == "autocast":
        args[0] = args[0].half()
    grad = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(args[1])
    kept = keep_row(SEED, torch.arange(rows), torch.arange(width), dropout).to(device) if dropout else None
    first = check_training(kernel, args, dropout, grad, kept)
    if device == "cuda":  # the interpreter runs programs one after the other, the same each time
        assert all(map(torch.equal, first, check_training(kernel, args, dropout, grad, kept)))


@pytest.mark.parametrize("dtype", [*dtypes, "autocast"])
@pytest.mark.parametrize(("rows", "width"), [(37, 384), (129, 100)])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_training_twins(module: Any, rows: int, width: int, dtype: torch.dtype | str) -> None:
    args = make_args(rows, width, torch.float32 if dtype == "autocast" else dtype, "cpu")
    if dtype == "autocast":
        args[0] = args[0].bfloat16()
    grad = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(args[1])
    check_training(module, args, 0.0, grad, None)


def test_training_with_rows_apart(device: str) -> None:
    args = make_args(19, 384, torch.float32, device)
    seed = torch.tensor([SEED], device=device)
    x, residual, weight, _ = args
    ones = torch.ones_like(x)
    expected = kernel.add_layer_norm_backward(ones, x, residual, weight, EPS, 0.3, seed)
    apart = torch.full((19, 400), math.nan, device=device)[:, :384]
    apart.copy_(x)
    found = kernel.add_layer_norm_backward(ones[:1, :1].expand(19, 384), apart, residual, weight, EPS, 0.3, seed)
    assert all(map(torch.equal, found, expected))


def test_training_without_rows(device: str) -> None:
    x, residual, weight, _ = make_args(0, 384, torch.float32, device)
    dx, dresidual, dweight, dbias = kernel.add_layer_norm_backward(x, x, residual, weight, EPS, 0.0, None)
    assert (dx.shape, dresidual.shape) == ((0,), (0, 384))
    assert dweight.eq(0).all() and dbias.eq(0).all()


def test_training_refuses_wrong_shapes(device: str) -> None:
    x, residual, weight, _ = make_args(9, 384, torch.float32, device)
    for wrong, name in (((x[:8], x, residual, weight), "grad"), ((x, x, residual, weight[:5]), "weight")):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            kernel.add_layer_norm_backward(*wrong, EPS, 0.0, None)
    with pytest.raises(ValueError, match="seed"):
        kernel.add_layer_norm(x, residual, weight, weight, EPS, 0.5)
