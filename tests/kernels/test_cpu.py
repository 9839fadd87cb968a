"""The CPU backend against the oracle: every operator, on one sound call, and bitwise where numbers are only moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.kernels import cpu, cpu_prepacked, reference, reference_fp8, reference_int8
from fastbert.numerics import assert_within_policy, relative_error
from tests.fastbert.test_ops import arguments

EXACT = ("attention_tiles", "mask_layout", "pack", "unpack")


def test_signatures_are_those_of_the_oracle() -> None:
    for name in ops.OPERATORS:
        module = {"fp8": reference_fp8, "int8": reference_int8}.get(name.rpartition("_")[2], reference)
        oracle = getattr(module, name)
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(oracle), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if not name.endswith(("_fp8", "_int8"))])
def test_cpu_is_the_oracle(name: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, dropout=0.0)[name]
    found, truth = getattr(cpu, name)(*args), getattr(reference, name)(*args)
    for mine, its in zip(*([x] if isinstance(x, Tensor) else x for x in (found, truth)), strict=True):
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
        if name in EXACT:
            assert torch.equal(mine, its)
        elif its.numel():
            # Both round once or twice to the dtype: within eight units in the last place of the largest number.
            assert (mine - its).abs().max() <= 8 * torch.finfo(dtype).eps * its.abs().max()


@pytest.mark.parametrize("width", [None, 512, 1040])
@pytest.mark.parametrize("rows", [15, 16, 48, 49])
def test_few_rows_by_a_large_weight(rows: int, width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the transposed problem, whole or in parts, with and without a bias, into a tensor and into a new one."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(cpu, "_transposed_width", lambda *shape: asked.append(shape) or width)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 1040), (48, 1040), (48,)))
    for b in (bias, None):
        truth = F.linear(x.double(), weight.double(), None if b is None else bias.double())
        out = torch.full((3, rows, 48), torch.nan)
        for found in (cpu.linear(x, weight, b), cpu._mm_add(x, weight, b, out[1])):
            assert found.is_contiguous()
            assert_within_policy(found, F.linear(x, weight, b), truth)
        assert torch.equal(out[1], found)
        assert out[::2].isnan().all()
        assert torch.equal(cpu.linear_add(x, weight, b, found), cpu.linear(x, weight, b) + found)
    assert asked == ([(48, 1040, torch.get_num_threads())] * 8 if 16 <= rows <= 48 else [])
    wide = cpu.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(wide, F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta")],
    ids=["inference", "autocast", "device"],
)
def test_what_is_tried_once_is_tried_alike_in_every_mode(mode: Callable[[], AbstractContextManager[None]]) -> None:
    def multiply(x: Tensor, weight: Tensor, width: int) -> Tensor:
        return x @ weight.t() * (1 + (width > 64) * 1e-5)

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with mode():
            assert cpu.exact_width(80, 128, (64,), (16,), multiply) == 64
            assert cpu_prepacked._mkl_works.__wrapped__() == cpu_prepacked._mkl_works()
    finally:
        torch.set_default_dtype(before)


def test_the_transposed_problem_is_as_exact() -> None:
    """Where it is taken, by its own measure."""
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 1024, generator=generator)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (16, 40):
                x = torch.randn(rows, 1024, generator=generator)
                truth = x.double() @ weight.double().t()
                assert relative_error(cpu.linear(x, weight, None), truth) <= 1.1 * relative_error(x @ weight.t(), truth)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["attention_forward", "add_layer_norm"])
def test_the_oracle_drops_the_same_again_in_the_backward(name: str) -> None:
    """Its backward, with dropout, against finite differences of its forward."""
    args = arguments(torch.float64, dropout=0.3)
    given = args[name]
    x = given[0]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(x: Tensor) -> Tensor:
        result = getattr(reference, name)(x, *given[1:])
        return result[0] if isinstance(result, tuple) else result

    grad = torch.randn(out(x).shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    step = 1e-6
    slope = ((out(x + step * direction) - out(x - step * direction)) * grad).sum() / (2 * step)
    if name == "attention_forward":
        dx, _ = reference.attention_backward(grad, x, *reference.attention_forward(*given), *given[1:])
    else:
        dx = reference.add_layer_norm_backward(grad, x, given[1], given[2], *given[4:])[0]
    torch.testing.assert_close((dx * direction).sum(), slope, rtol=1e-6, atol=1e-6)
    plain = out(x), getattr(reference, name)(*given[:5], 0.0, None)
    assert not torch.equal(plain[0], plain[1][0] if isinstance(plain[1], tuple) else plain[1])


def _disentangled(lengths: list[int], longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv, both tables, slots and a gradient."""
    generator = torch.Generator().manual_seed(len(lengths))
    qkv, grad, *tables = (
        torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
        for shape in ((sum(lengths), 3, 3), (sum(lengths), 3), (24, 3), (24, 3))
    )
    return qkv, *tables, torch.arange(1 - longest, longest).clamp(-12, 11).add(12).int(), grad


@pytest.mark.parametrize("mask", [None, "ragged", "empty"])
@pytest.mark.parametrize("scores", [1, 2 * 140**2, 10**9])
@pytest.mark.parametrize("reach", [150, 20, 7, 1])  # of 7 the slots at the edge of the band differ
def test_disentangled_attention_in_parts(
    monkeypatch: pytest.MonkeyPatch, reach: int, scores: int, mask: str | None
) -> None:
    """Of one head and sequence, of two sequences of three, and all at once: more rows than a block has, or a band."""
    monkeypatch.setattr(cpu, "_SCORES", scores)
    monkeypatch.setattr(cpu, "_POSITION_ROWS", 128 if reach == 150 else 16)
    qkv, *given, grad = _disentangled([140] * 3, reach)
    keys = None
    if mask is not None:
        keys = torch.arange(140) < torch.tensor([140, 9 if mask == "ragged" else 0, 77])[:, None]
    layout = None, keys, 140, 0.2, 0.0, None, None
    out, stats = cpu.disentangled_attention(qkv, *given, *layout)
    truth, _ = reference.disentangled_attention(qkv, *given, *layout)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    found = cpu.disentangled_attention_backward(grad, qkv, *given, out, stats, *layout)
    expected = reference.disentangled_attention_backward(grad, qkv, *given, truth, stats, *layout)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


def test_tables_by_distance_are_made_again_when_they_must_be() -> None:
    """They are kept beside the tables by slot: for shorter sequences, not for longer ones, other slots or values."""
    qkv, c2p, p2c, slots, _ = _disentangled([30], 40)
    changed = slots.clone()
    changed[3:50] = 5

    def check(slots: Tensor, length: int) -> None:
        given = qkv[:length], c2p, p2c, slots, None, None, length, 0.2, 0.0, None, None
        torch.testing.assert_close(
            cpu.disentangled_attention(*given)[0], reference.disentangled_attention(*given)[0], rtol=1e-12, atol=1e-12
        )

    check(slots, 20)
    kept = cpu._TABLES[0][c2p].table
    check(slots, 11)
    assert cpu._TABLES[0][c2p].table is kept
    check(slots, 30)
    check(changed, 30)
    p2c.mul_(-1)
    check(changed, 30)
    with torch.inference_mode():
        check(slots, 30)
        c2p = c2p.clone()
        check(slots, 30)
        c2p.neg_()
        check(slots, 30)


def test_disentangled_attention_of_no_rows() -> None:
    *given, grad = _disentangled([], 4)
    layout = torch.zeros(1, dtype=torch.int32), None, 0, 0.2, 0.0, None, None
    out, stats = cpu.disentangled_attention(*given, *layout)
    dqkv, dc2p, dp2c = cpu.disentangled_attention_backward(grad, *given, out, stats, *layout)
    assert out.shape == (0, 3, 16) and dqkv.shape == given[0].shape
    assert dc2p.shape == given[1].shape and dc2p.eq(0).all() and dp2c.shape == given[2].shape and dp2c.eq(0).all()


def test_gradients_of_attention_are_as_precise_as_those_of_eager_attention() -> None:
    """Where values have much in common, gradients of queries and keys are small differences."""
    lengths, heads, scale = [128, 100, 300], 8, 0.125
    qkv, grad = torch.randn(sum(lengths), 3, heads, 64), torch.randn(sum(lengths), heads, 64)
    qkv[:, 2] += 3 * torch.randn(heads, 64)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()

    def eager(dtype: torch.dtype) -> Tensor:
        leaf = qkv.detach().to(dtype, copy=True).requires_grad_()
        for one, slope in zip(leaf.split(lengths), grad.to(dtype).split(lengths), strict=True):
            q, k, v = (x.transpose(0, 1) for x in one.unbind(1))
            ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).transpose(0, 1).backward(slope, retain_graph=True)
        assert leaf.grad is not None
        return leaf.grad

    out, stats = cpu.attention_forward(qkv, starts, None, max(lengths), scale, 0.0, None)
    dqkv, _ = cpu.attention_backward(grad, qkv, out, stats, starts, None, max(lengths), scale, 0.0, None)
    for found, stock, truth in zip(
        dqkv.unbind(1), *(eager(d).unbind(1) for d in (torch.float32, torch.float64)), strict=True
    ):
        assert_within_policy(found, stock, truth)


@pytest.mark.parametrize("positions", [False, True])
def test_what_is_dropped_hangs_on_no_number_of_threads(positions: bool) -> None:
    qkv, grad = torch.randn(900, 3, 2, 16, dtype=torch.float64), torch.randn(900, 2, 16, dtype=torch.float64)
    layout = None, None, 300, 0.25, 0.3, torch.tensor([7])
    more: tuple[Tensor, ...] = ()
    forward: Any = cpu.attention_forward
    backward: Any = cpu.attention_backward
    if positions:
        table = torch.randn(8, 2, 16, dtype=torch.float64)
        more = table, table, (torch.arange(-299, 300) // 8).clamp(-4, 3) + 4
        forward, backward = cpu.disentangled_attention, cpu.disentangled_attention_backward
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = (*layout, None) if positions else layout
            out, stats = forward(qkv, *more, *given)
            torch.set_num_threads(4 - threads)
            found += [(out, backward(grad, qkv, *more, out, stats, *given)[0])]
    finally:
        torch.set_num_threads(before)
    for out, dqkv in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dqkv, found[0][1], rtol=1e-12, atol=1e-12)
