"""Cross-entropy over a vocabulary, kernel and reference: against float64, no further from it than PyTorch's."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, reference
from fastbert.kernels import cross_entropy as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes

modules = [pytest.param(kernel, id="kernel"), pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]


def make_args(rows: int, width: int, words: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + words)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, width), (words, width), (words,)))
    labels = torch.randint(0, words, (rows,), generator=generator)
    return x.to(device, dtype), (3 * weight / width**0.5).to(device, dtype), bias.to(device, dtype), labels.to(device)


def check(module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    loss, lse = module.linear_cross_entropy(x, weight, bias, labels)
    assert loss.dtype == lse.dtype == torch.float32
    grad = torch.randn(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    found = module.linear_cross_entropy_backward(grad, x, weight, bias, labels, lse)
    results = []
    for convert in (lambda t: t, lambda t: t.double()):
        leaves = [convert(t).clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        logits = F.linear(leaves[0], leaves[1].to(leaves[0]), None if bias is None else leaves[2].to(leaves[0]))
        plain = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
        results.append((plain.detach(), *torch.autograd.grad(plain, leaves, grad.to(plain))))
    if bias is None:
        assert found[2].shape == (0,)
    names = ("loss", "dx", "dweight", "dbias")[: len(results[0])]
    for name, mine, stock, truth in zip(names, (loss, *found), *results, strict=False):
        assert_within_policy(mine, stock, truth, name)


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("rows", "width", "words"), [(1, 64, 7), (37, 64, 5003), (20, 100, 4096)])
def test_kernel(rows: int, width: int, words: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias, labels = make_args(rows, width, words, dtype, device)
    check(kernel, x, weight, bias, labels)
    check(kernel, x, weight, None, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins(module: Any, dtype: torch.dtype) -> None:
    x, weight, bias, labels = make_args(300, 64, 503, dtype, "cpu")
    check(module, x, weight, bias, labels)
    check(module, x, weight, None, labels)


@pytest.mark.parametrize("module", [kernel, cpu], ids=["kernel", "cpu"])
def test_rows_are_taken_some_at_a_time(module: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(module, "ROWS" if module is kernel else "_LOSS_ROWS", 8)
    check(module, *make_args(77, 64, 100, torch.float32, device))


@pytest.mark.parametrize("module", modules)
def test_float32_parameters_of_16_bit_hidden_states(module: ModuleType, device: str) -> None:
    x, weight, bias, labels = make_args(37, 64, 100, torch.float32, device)
    check(module, x.half(), weight, bias, labels)


def test_logits_far_apart(device: str) -> None:
    x, weight, bias, labels = make_args(9, 64, 5000, torch.float32, device)
    check(kernel, 300 * x, weight, bias, labels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed assertion leaves the device unusable")
def test_a_label_out_of_range_is_nan_in_the_interpreter() -> None:
    x, weight, bias, labels = make_args(3, 64, 100, torch.float32, "cpu")
    labels[1] = 100
    loss, _ = kernel.linear_cross_entropy(x, weight, bias, labels)
    assert loss.isnan().tolist() == [False, True, False]


def test_no_rows(device: str) -> None:
    x, weight, bias, labels = make_args(0, 64, 100, torch.float32, device)
    loss, lse = kernel.linear_cross_entropy(x, weight, bias, labels)
    dx, dweight, dbias = kernel.linear_cross_entropy_backward(loss, x, weight, bias, labels, lse)
    assert (loss.shape, dx.shape) == ((0,), (0, 64))
    assert dweight.eq(0).all() and dbias.eq(0).all()


@pytest.mark.parametrize(
    ("wrong", "value", "name"),
    [(1, torch.zeros(100, 63), "weight"), (2, torch.zeros(99), "bias"), (3, torch.zeros(8).long(), "labels")],
)
def test_wrong_shapes_are_refused(wrong: int, value: Tensor, name: str, device: str) -> None:
    args = [*make_args(9, 64, 100, torch.float32, device)]
    args[wrong] = value.to(device)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        kernel.linear_cross_entropy(*args)
