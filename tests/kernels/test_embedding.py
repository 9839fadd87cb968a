"""The embedding layer, kernel and reference: against float64, no further from it than PyTorch in the same dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, reference
from fastbert.kernels import embedding as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes

WORDS, TYPES, POSITIONS, EPS = 50, 2, 40, 1e-12


def make_args(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 10000 + width)
    ids = [torch.randint(n, (rows,), generator=generator) for n in (WORDS, TYPES, POSITIONS)]
    if rows > 1:
        ids[0][:2] = torch.tensor([0, WORDS - 1])
    shapes = ((WORDS, width), (TYPES, width), (POSITIONS, width), (width,), (width,))
    floats = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.to(device) for t in (*ids, *floats)]


def stock_of(ids: Tensor, types: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
    word, token_type, position, weight, bias = rest
    total = F.embedding(ids, word) + F.embedding(types, token_type) + F.embedding(positions, position)
    return F.layer_norm(total, weight.shape, weight, bias, EPS)


def check(module: object, args: list[Tensor]) -> Tensor:
    out: Tensor = module.embedding_layer_norm(*args, EPS)
    assert out.is_contiguous()
    truth = stock_of(*args[:3], *(t.double() for t in args[3:]))
    assert_within_policy(out, stock_of(*args), truth)
    return out


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (37, 100), (9, 384)])
def test_kernel(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    check(kernel, make_args(rows, width, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_at_the_shapes_of_models(dtype: torch.dtype, device: str) -> None:
    for rows, width in ((128, 384), (129, 768), (10000, 1024)):
        check(kernel, make_args(rows, width, dtype, device))


def test_tensors_apart(device: str) -> None:
    """Ids with a stride and tables that are views give what contiguous copies of them give."""
    args = make_args(9, 100, torch.float32, device)
    expected = kernel.embedding_layer_norm(*args, EPS)
    apart = [t.repeat_interleave(2)[::2] if t.ndim == 1 else t.t().contiguous().t() for t in args]
    assert torch.equal(kernel.embedding_layer_norm(*apart, EPS), expected)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_a_row_is_bitwise_the_same_in_any_company(dtype: torch.dtype, device: str) -> None:
    args = make_args(9, 384, dtype, device)
    together = kernel.embedding_layer_norm(*args, EPS)
    alone = kernel.embedding_layer_norm(*(t[3:5] for t in args[:3]), *args[3:], EPS)
    assert torch.equal(alone, together[3:5])


def test_no_rows(device: str) -> None:
    assert kernel.embedding_layer_norm(*make_args(0, 384, torch.float32, device), EPS).shape == (0, 384)


NAMES = ["input_ids", "token_type_ids", "position_ids"]
OUT_OF_RANGE = [(0, -1), (0, WORDS), (1, TYPES), (1, -(2**40)), (2, POSITIONS), (2, 2**40)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion that fails on a GPU ends the process's use of it")
@pytest.mark.parametrize(("which", "value"), OUT_OF_RANGE)
def test_an_id_out_of_range_is_asserted_and_never_read(
    which: int, value: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    args = make_args(3, 100, torch.float32, device)
    args[which][1] = value
    # The interpreter leaves assertions out: the row is NaN, the others are untouched.
    out = kernel.embedding_layer_norm(*args, EPS)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    debugging = replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", debugging)
    with pytest.raises(interpreter.InterpreterError, match=NAMES[which]):
        kernel.embedding_layer_norm(*args, EPS)


FAILING = """
import torch
from fastbert.kernels.embedding import embedding_layer_norm
ids = [torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(3)]
ids[{which}][2] = {value}
tables = [torch.ones(n, 128, device="cuda") for n in ({words}, {types}, {positions})]
embedding_layer_norm(*ids, *tables, torch.ones(128, device="cuda"), torch.ones(128, device="cuda"), 1e-12)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("which", "value"), [(0, WORDS), (1, -1), (2, 2**40)])
def test_an_id_out_of_range_fails_on_the_device(which: int, value: int) -> None:
    code = FAILING.format(which=which, value=value, words=WORDS, types=TYPES, positions=POSITIONS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode != 0
    assert NAMES[which] in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("wrong", "shape", "name"),
    [
        (1, (4,), "token_type_ids"),
        (2, (3, 1), "position_ids"),
        (4, (TYPES, 99), "token_type"),
        (5, (100,), "position"),
        (6, (99,), "weight"),
        (7, (100, 1), "bias"),
    ],
)
def test_wrong_shapes_are_refused(wrong: int, shape: tuple[int, ...], name: str, device: str) -> None:
    args = make_args(3, 100, torch.float32, device)
    args[wrong] = torch.zeros(shape, dtype=args[wrong].dtype, device=device)
    with pytest.raises(ValueError, match=f"^{name} "):
        kernel.embedding_layer_norm(*args, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (37, 100), (129, 384), (0, 384)])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins(module: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    check(module, make_args(rows, width, dtype, "cpu"))


def check_backward(module: object, args: list[Tensor]) -> None:
    *ids, word, token_type, position, weight, _ = args
    grad = torch.randn(len(ids[0]), word.shape[1], generator=torch.Generator().manual_seed(1)).to(word)
    found = module.embedding_layer_norm_backward(grad, *ids, word, token_type, position, weight, EPS)
    results = []
    for convert in (lambda t: t, lambda t: t.double()):
        word, token_type, position, weight, bias = (convert(t) for t in args[3:])
        total = F.embedding(ids[0], word) + F.embedding(ids[1], token_type) + F.embedding(ids[2], position)
        leaves = [t.detach().clone().requires_grad_() for t in (total, weight, bias)]
        results.append(
            torch.autograd.grad(F.layer_norm(leaves[0], weight.shape, *leaves[1:], EPS), leaves, convert(grad))
        )
    for name, mine, stock, truth in zip(("dsum", "dweight", "dbias"), found, *results, strict=True):
        assert_within_policy(mine, stock, truth, name)


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("rows", "width"), [(17, 1024), (37, 100), (33, 384)])
def test_backward(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    check_backward(kernel, make_args(rows, width, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_backward_of_the_twins(module: Any, dtype: torch.dtype) -> None:
    check_backward(module, make_args(37, 384, dtype, "cpu"))


def test_backward_refuses_wrong_shapes(device: str) -> None:
    *ids, word, token_type, position, weight, _ = make_args(9, 384, torch.float32, device)
    with pytest.raises(ValueError, match="grad has shape"):
        kernel.embedding_layer_norm_backward(word[:8], *ids, word, token_type, position, weight, EPS)
