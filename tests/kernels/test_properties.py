"""What holds of the kernels at any shape: drawn by hypothesis, bitwise, so that no tolerance can hide a difference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.kernels import attention, layer_norm, linear, padding, reference
from fastbert.numerics import relative_error

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=max(8, settings().max_examples // 3))  # the interpreter takes a second for each

pytestmark = pytest.mark.usefixtures("device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.float16])
LENGTHS = st.lists(st.integers(0, 40) | st.sampled_from([64, 65]), min_size=1, max_size=3).filter(any)
HEAD_DIMS = st.sampled_from([16, 24, 32, 40, 64])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(seed: int, *shape: int) -> Tensor:
    """-3 to 3: their products and sums of some hundred are exact in float32, and their sums in float16."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def walled(x: Tensor, after: int) -> Tensor:
    """`x` with NaN before and after it, and after each of its rows: what is read beyond it shows."""
    rows = x.flatten(1)
    buffer = torch.full((rows.shape[0] + 2, rows.shape[1] + after), math.nan, dtype=x.dtype, device=DEVICE)
    inner = buffer[1:-1, : rows.shape[1]]
    inner.copy_(rows)
    return inner.unflatten(1, x.shape[1:]) if x.dim() > 2 else inner


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), DTYPES, st.booleans(), st.integers(0, 9))
def test_a_product_of_integers_is_exact(t: int, n: int, k: int, dtype: torch.dtype, bias: bool, gap: int) -> None:
    x, weight, residual = integers(1, t, k), integers(2, n, k), integers(3, t, n)
    added = integers(4, n) if bias else None
    exact = x @ weight.t() + residual + (0 if added is None else added)
    found = linear.linear_add(
        walled(x.to(dtype), gap), weight.to(dtype), None if added is None else added.to(dtype), residual.to(dtype)
    )
    assert torch.equal(found, exact.to(dtype))


@FEW
@given(LENGTHS, HEAD_DIMS, st.integers(1, 3), DTYPES, st.integers(0, 2**31), st.integers(0, 9), st.booleans())
def test_attention_of_a_sequence_hangs_on_nothing_else(
    lengths: list[int], head_dim: int, heads: int, dtype: torch.dtype, seed: int, gap: int, with_bias: bool
) -> None:
    """Alone, among others, and padded on the right with its keys masked, it is the same to the bit; and right."""
    qkv, scale = normal(seed, sum(lengths), 3, heads, head_dim).to(dtype), head_dim**-0.5
    bias = normal(seed + 1, heads, 2 * 80 - 1) if with_bias else None
    longest = max(lengths)
    packed = attention.attention(*walled(qkv, gap).unbind(1), starts_of(lengths), None, longest, scale, bias)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(DEVICE)
    padded = torch.full((len(lengths), longest, 3, heads, head_dim), 7.0, dtype=dtype, device=DEVICE)
    padded[mask] = qkv
    dense = attention.attention(*padded.flatten(0, 1).unbind(1), None, mask, longest, scale, bias)
    assert torch.equal(packed, dense[mask.flatten()])
    for part, found in zip(qkv.split(lengths), packed.split(lengths), strict=True):
        if len(part):
            alone = attention.attention(*part.unbind(1), starts_of([len(part)]), None, len(part), scale, bias)
            assert torch.equal(alone, found)
    exact_bias = None if bias is None else bias.double()
    exact = reference.attention(*qkv.double().unbind(1), starts_of(lengths), None, longest, scale, exact_bias)
    # Not the policy, which needs many numbers: that the sequences, heads and strides are the right ones.
    assert relative_error(packed, exact) < 0.01


@FEW
@given(LENGTHS, HEAD_DIMS, st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.integers(-(2**63), 2**63 - 1))
def test_gradients_of_attention_stay_in_their_sequence(
    lengths: list[int], head_dim: int, dropout: float, seed: int
) -> None:
    """A gradient that enters one sequence leaves by it alone; a second time, by the same numbers."""
    qkv, scale, which = normal(0, sum(lengths), 3, 2, head_dim), head_dim**-0.5, lengths.index(max(lengths))
    starts, longest, seeds = starts_of(lengths), max(lengths), torch.tensor([seed], device=DEVICE)
    out, stats = attention.attention_forward(qkv, starts, None, longest, scale, dropout, seeds)
    inside = torch.zeros(len(qkv), dtype=torch.bool, device=DEVICE)
    inside[int(starts[which]) : int(starts[which + 1])] = True
    grad = normal(1, *out.shape) * inside[:, None, None]
    found = [
        attention.attention_backward(grad, qkv, out, stats, starts, None, longest, scale, dropout, seeds)[0]
        for _ in range(2)
    ]
    assert torch.equal(found[0], found[1])
    assert not found[0][~inside].any()
    assert bool(found[0][inside].any()) == (dropout < 1 and bool(out[inside].any()))
    if not dropout:
        exact = reference.attention_forward(qkv.double(), starts, None, longest, scale, 0.0, None)
        truth, _ = reference.attention_backward(
            grad.double(), qkv.double(), *exact, starts, None, longest, scale, 0.0, None
        )
        assert relative_error(found[0], truth) < 1e-4


@given(st.integers(1, 20), st.integers(1, 200), DTYPES, st.sampled_from([1e-12, 1e-5, 1.0]), st.integers(0, 9))
def test_a_row_is_normalized_by_itself(rows: int, width: int, dtype: torch.dtype, eps: float, gap: int) -> None:
    x, residual = (normal(seed, rows, width).to(dtype) for seed in (1, 2))
    weight, bias = normal(3, width).to(dtype), normal(4, width).to(dtype)
    found = layer_norm.add_layer_norm(walled(x, gap), walled(residual, gap), weight, bias, eps, 0.0, None)
    for row in range(rows):
        one = slice(row, row + 1)
        assert torch.equal(found[one], layer_norm.add_layer_norm(x[one], residual[one], weight, bias, eps, 0.0, None))
    exact = reference.add_layer_norm(x.double(), residual.double(), weight.double(), bias.double(), eps, 0.0, None)
    assert relative_error(found, exact) < 0.01


@given(st.data(), DTYPES)
def test_packing_and_back(data: Any, dtype: torch.dtype) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=60)), device=DEVICE)
    x = normal(0, len(mask), data.draw(st.integers(1, 40))).to(dtype)
    indices = mask.nonzero().flatten()
    inverse = torch.where(mask, mask.cumsum(0) - 1, -1)
    packed = padding.pack(walled(x, 3), indices, inverse)
    assert torch.equal(packed, x[mask])
    assert torch.equal(padding.unpack(packed, indices, inverse), x * mask[:, None])
