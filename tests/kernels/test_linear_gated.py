"""Gated linear layers in one launch, against float64 by the numerical policy: GeGLU, by erf and tanh, and SwiGLU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, linear_gated, reference
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes

GATES = tuple(reference.GATES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stock(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, name: str) -> Tensor:
    """As transformers has it: each product rounded, and what is made of them."""
    return reference.GATES[name](F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)


def stock64(args: list[Any], name: str) -> Tensor:
    return stock(*(a if a is None else a.double() for a in args), name)


def arguments(t: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu", bias: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(t * 10000 + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    given = [normal(t, k)]
    for _ in range(2):
        given += [normal(n, k) / k**0.5, normal(n) if bias else None]
    return given


def check(module: Any, args: list[Any], name: str) -> Tensor:
    out: Tensor = module.linear_gated(*args, name)
    truth = stock64(args, name)
    assert (out.dtype, out.shape) == (args[0].dtype, truth.shape)
    assert_within_policy(out, stock(*args, name), truth, what=f"linear_gated {name}")
    return out


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 192, 64), (37, 100, 70), (150, 144, 48)])
def test_kernel(name: str, t: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(linear_gated, arguments(t, n, k, dtype, device), name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 129, 1000])
def test_kernel_at_the_shapes_of_models(name: str, t: int, dtype: torch.dtype, device: str) -> None:
    for n, k in ((1152, 768), (2624, 1024)):
        check(linear_gated, arguments(t, n, k, dtype, device, bias=False), name)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_without_bias_and_with_one(dtype: torch.dtype, device: str) -> None:
    for without in ((2, 4), (2,), (4,)):
        args = arguments(37, 48, 64, dtype, device)
        for place in without:
            args[place] = None
        check(linear_gated, args, "gelu")


def test_halves_of_one_weight_and_rows_apart(device: str) -> None:
    """As a layer has them: views of one tensor; rows of x lie further apart than they are wide."""
    x, gate, gate_bias, up, up_bias = arguments(37, 48, 64, torch.float32, device)
    whole, biases = torch.cat([gate, up]), torch.cat([gate_bias, up_bias])
    apart = torch.full((37, 96), math.nan, device=device)[:, :64]
    apart.copy_(x)
    expected = linear_gated.linear_gated(x, gate, gate_bias, up, up_bias, "silu")
    assert torch.equal(linear_gated.linear_gated(apart, whole, biases, None, None, "silu"), expected)
    without = linear_gated.linear_gated(x, whole, None, None, None, "silu")
    assert torch.equal(without, linear_gated.linear_gated(x, gate, None, up, None, "silu"))


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, device: str) -> None:
    x, *rest = arguments(150, 144, 48, dtype, device)
    whole = linear_gated.linear_gated(x, *rest, "gelu")
    for some in (slice(0, 1), slice(70, 80), slice(149, 150)):
        assert torch.equal(linear_gated.linear_gated(x[some], *rest, "gelu"), whole[some])


def test_what_is_not_finite_stays_in_its_row(device: str) -> None:
    for module in (linear_gated, cpu) if device == "cpu" else (linear_gated,):
        for name in GATES:
            args = arguments(6, 48, 64, torch.float32, device)
            clean = module.linear_gated(*args, name)
            args[0][2, 5] = math.nan
            found = module.linear_gated(*args, name)
            assert found[2].isnan().all()
            assert torch.equal(found[3:], clean[3:])


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(name: str, dtype: torch.dtype) -> None:
    for t, n, k, bias in ((1, 192, 64, True), (37, 100, 70, False), (129, 144, 48, True)):
        check(cpu, arguments(t, n, k, dtype, bias=bias), name)
        x, gate, gate_bias, up, up_bias = args = arguments(t, n, k, dtype, bias=bias)
        both = [torch.cat([gate, up]), torch.cat([gate_bias, up_bias]) if bias else None, None, None]
        assert_within_policy(cpu.linear_gated(x, *both, name), stock(*args, name), stock64(args, name))
        args, both = ([a if a is None else a.double() for a in given] for given in (args, both))
        assert torch.equal(reference.linear_gated(*args, name), stock(*args, name))
        torch.testing.assert_close(reference.linear_gated(args[0], *both, name), stock(*args, name))


def test_nothing_in_nothing_out(device: str) -> None:
    args = arguments(0, 48, 64, torch.float32, device)
    assert linear_gated.linear_gated(*args, "gelu").shape == (0, 48)


def test_what_does_not_fit_is_refused(device: str) -> None:
    args = arguments(5, 48, 64, torch.float32, device)
    for place, bad, message in (
        (3, args[3][:, :32], r"^up has shape \(48, 32\); expected \(48, 64\) for x of shape \(5, 64\)"),
        (1, args[1][:, :32], r"^gate has shape \(48, 32\); expected \(48, 64\)"),
        (3, args[3][:16], r"^up has shape \(16, 64\); expected \(48, 64\)"),
        (4, args[4][:7], r"^up_bias has shape \(7,\); expected \(48,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_gated.linear_gated(*args[:place], bad, *args[place + 1 :], "gelu")
    with pytest.raises(ValueError, match=r"^gate has shape \(47, 64\); expected an even number of rows"):
        linear_gated.linear_gated(args[0], args[1][:47], None, None, None, "gelu")
    with pytest.raises(ValueError, match=r"^activation is 'relu'; expected one of gelu, gelu_tanh, silu"):
        linear_gated.linear_gated(*args, "relu")


def check_training(module: Any, args: list[Any], name: str, joined: bool) -> None:
    """`gated_feed_forward` and its backward, of gates in one weight or in two."""
    x, gate, gate_bias, up, up_bias = args
    t, n = len(x), len(gate)
    down = torch.randn(40, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x) / n**0.5
    bias = torch.linspace(-1, 1, 40).to(x)
    gates = [gate, gate_bias, up, up_bias]
    if joined:
        gates = [torch.cat([gate, up]), None if gate_bias is None else torch.cat([gate_bias, up_bias]), None, None]
    out, pre = module.gated_feed_forward(x, *gates, down, bias, name)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    dpre, gated = module.linear_gated_backward(grad, down, pre, name)
    assert (out.shape, pre.shape, dpre.shape, gated.shape) == ((t, 40), (t, 2 * n), (t, 2 * n), (t, n))
    assert {each.dtype for each in (out, pre, dpre, gated)} == {x.dtype}
    results = []
    for convert in (lambda each: each, lambda each: each if each is None else each.double()):
        given = [convert(each) for each in args]
        products = torch.cat([F.linear(given[0], *given[1:3]), F.linear(given[0], *given[3:])], 1)
        leaf = convert(pre).clone().requires_grad_()
        activated, factor = leaf.chunk(2, 1)
        between = reference.GATES[name](activated) * factor
        (gradient,) = torch.autograd.grad(between, leaf, convert(grad) @ convert(down))
        whole = F.linear(stock(*given, name), convert(down), convert(bias))
        results.append((whole, products, gradient, between.detach()))
    for what, mine, plain, truth in zip(
        ("out", "pre", "dpre", "gated"), (out, pre, dpre, gated), *results, strict=True
    ):
        assert_within_policy(mine, plain, truth, f"{what} {name}")


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("t", "n", "k", "bias"), [(1, 192, 64, True), (37, 100, 70, False), (150, 144, 48, True)])
def test_training_kernel(t: int, n: int, k: int, bias: bool, name: str, dtype: torch.dtype, device: str) -> None:
    check_training(linear_gated, arguments(t, n, k, dtype, device, bias), name, joined=t == 37)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_training_twins(module: Any, dtype: torch.dtype, name: str) -> None:
    for t, joined in ((37, False), (129, True)):
        check_training(module, arguments(t, 144, 48, dtype, bias=not joined), name, joined)


@pytest.mark.parametrize("name", GATES)
def test_the_derivative_has_the_right_limits(name: str, device: str) -> None:
    activated = torch.tensor([[-65504.0, 0.0, 65504.0] * 16], device=device)
    pre, weight = torch.cat([activated, torch.full_like(activated, 3.0)], 1), torch.eye(16, 48, device=device)
    grad = torch.ones(1, 16, device=device)
    dpre, gated = linear_gated.linear_gated_backward(grad, weight, pre, name)
    assert torch.equal(dpre[0, :3], torch.tensor([0.0, 1.5, 3.0], device=device))
    assert torch.equal(dpre[0, 48:51], activated[0, :3].clamp(min=0))
    assert torch.equal(gated, 3 * activated.clamp(min=0))
    with pytest.raises(ValueError, match=r"^weight has shape \(16, 48\) and pre \(1, 48\); expected .* and \(1, 96\)"):
        linear_gated.linear_gated_backward(grad, weight, activated, name)
