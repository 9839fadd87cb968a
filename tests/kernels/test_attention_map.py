"""Attention maps, kernel and twins: no further from float64 than PyTorch's softmax in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbert.kernels import attention, cpu, reference
from fastbert.kernels import attention_map as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import in_turn
from tests.kernels.test_attention import cumulative, make_mask, make_qkv
from tests.kernels.test_disentangled import make, weigh

KINDS = ("none", "right", "left", "holes", "all-masked row")


def stock_of(q: Tensor, k: Tensor, lengths: list[int], mask: Tensor | None, scale: float) -> list[Tensor]:
    """Softmax of masked scores, each step in the dtype of its inputs, as eager attention takes them; (heads, S, S)."""
    found = []
    for i, (query, key) in enumerate(zip(q.split(lengths), k.split(lengths), strict=True)):
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[i], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        found.append(weights if mask is None else weights * mask[i].any())
    return found


def placed(maps: list[Tensor], places: list[list[int]], width: int) -> Tensor:
    out = maps[0].new_zeros(len(maps), maps[0].shape[0], width, width)
    for own, each, where in zip(out, maps, places, strict=True):
        for i, place in enumerate(where):
            own[:, place, where] = each[:, i]
    return out


@pytest.mark.parametrize(("head_dim", "dtype"), in_turn(16, 40, 64, 80, 128))
def test_packed(head_dim: int, dtype: torch.dtype, device: str) -> None:
    """At places one after the other, apart, and without: by position in the sequence."""
    lengths = [1, 37, 128, 129] if head_dim == 64 else [37, 0, 65]
    starts, scale, longest = cumulative(lengths, device), head_dim**-0.5, max(lengths)
    q, k, _ = make_qkv(sum(lengths), 2, head_dim, dtype, device)
    exact, stock = stock_of(q.double(), k.double(), lengths, None, scale), stock_of(q, k, lengths, None, scale)
    generator = torch.Generator().manual_seed(0)
    holes = [sorted(torch.randperm(longest + 7, generator=generator)[:n].tolist()) for n in lengths]
    for where, width in (
        (None, longest),
        ([list(range(longest + 3 - n, longest + 3)) for n in lengths], longest + 3),
        (holes, longest + 7),
    ):
        places = where if where is not None else [list(range(n)) for n in lengths]
        given = None if where is None else torch.tensor([place for each in where for place in each], device=device)
        for tiles in (None, attention.attention_tiles(starts, sum(lengths))):
            found = kernel.attention_map(q, k, starts, None, longest, scale, given, width, None, tiles)
            assert (found.dtype, found.is_contiguous()) == (dtype, True)
            assert_within_policy(found, placed(stock, places, width), placed(exact, places, width))
        outside = placed([torch.ones_like(each) for each in exact], places, width) == 0
        assert found[outside].eq(0).all()
        twin = cpu.attention_map(q.cpu(), k.cpu(), starts.cpu(), None, longest, scale, given, width)
        assert_within_policy(twin, placed(stock, places, width), placed(exact, places, width))


@pytest.mark.parametrize(("kind", "dtype"), in_turn(*KINDS))
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_dense(kind: str, dtype: torch.dtype, biased: bool, device: str) -> None:
    batch, length, heads, scale = 3, 129, 2, 0.2
    q, k, _ = make_qkv(batch * length, heads, 32, dtype, device)
    mask = None if kind == "none" else make_mask(kind, batch, length, device)
    bias = torch.randn(heads, 2 * 140 - 1, generator=torch.Generator().manual_seed(0)).to(device) if biased else None
    found = kernel.attention_map(q, k, None, mask, length, scale, None, length, bias)
    wide = None if bias is None else bias.double()
    truth = reference.attention_map(q.double(), k.double(), None, mask, length, scale, None, length, wide)
    if bias is None:
        exact = torch.stack(stock_of(q.double(), k.double(), [length] * batch, mask, scale))
        torch.testing.assert_close(truth, exact)  # the twin, by another way
        stock = torch.stack(stock_of(q, k, [length] * batch, mask, scale))
    else:  # rounded where the bias is added
        places = torch.arange(length, device=device)
        added = bias[:, 139 + places - places[:, None]].to(dtype)
        scores = torch.stack([a @ b * scale + added for a, b in zip(*_heads(q, k, batch), strict=True)])
        some = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        stock = scores.masked_fill(~some[:, None, None], torch.finfo(dtype).min).softmax(-1)
        stock = stock * some.any(1)[:, None, None, None]
    assert_within_policy(found, stock, truth)
    sums = truth.sum(-1)
    there = torch.ones_like(sums) if mask is None else mask.any(1)[:, None, None].expand_as(sums).double()
    torch.testing.assert_close(found.double().sum(-1), there, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-3)
    if mask is not None:
        assert found.masked_select(~mask[:, None, None]).eq(0).all()
    if device == "cpu":
        assert_within_policy(cpu.attention_map(q, k, None, mask, length, scale, None, length, bias), stock, truth)


def _heads(q: Tensor, k: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    query, key = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k))
    return query, key.transpose(2, 3)


@pytest.mark.parametrize(
    ("kinds", "layout", "dtype"),
    in_turn(("c2p p2c", "packed"), ("c2p", "none"), ("p2c", "packed"), *(("c2p p2c", kind) for kind in KINDS)),
)
def test_disentangled(kinds: str, layout: str, dtype: torch.dtype, device: str) -> None:
    lengths, scale = [70, 1, 65] if layout == "packed" else [70] * 3, 0.15
    mask = None if layout in ("packed", "none") else make_mask(layout, 3, 70, device)
    starts = cumulative(lengths, device) if layout == "packed" else None
    qkv, c2p, p2c, slots = make(lengths, 32, dtype, device, kinds)
    tables = c2p, p2c
    where = [list(range(2, 2 + n)) for n in lengths] if starts is not None else [list(range(70))] * 3
    width = 75 if starts is not None else 70
    places = None if starts is None else torch.tensor([p for each in where for p in each], device=device)
    tiles = None if starts is None else attention.attention_tiles(starts, sum(lengths))
    given = starts, mask, 70, scale, places, width
    found = kernel.disentangled_attention_map(qkv, *tables, slots, *given, tiles)
    wide = [None if table is None else table.double() for table in tables]
    exact = placed(weigh(qkv.double(), *wide, slots, lengths, mask, scale), where, width)
    stock = placed(weigh(qkv, *tables, slots, lengths, mask, scale), where, width)
    torch.testing.assert_close(reference.disentangled_attention_map(qkv.double(), *wide, slots, *given, None), exact)
    assert_within_policy(found, stock, exact)
    if device == "cpu":
        assert_within_policy(cpu.disentangled_attention_map(qkv, *tables, slots, *given, None), stock, exact)


@pytest.mark.parametrize(("layout", "dtype"), in_turn("packed", *KINDS))
@pytest.mark.parametrize("window", [0, 5, 64, 200])
def test_windows(window: int, layout: str, dtype: torch.dtype, device: str) -> None:
    """Of some queries no key is left where there is a mask; a tile of keys may be outside of the window of all."""
    lengths, scale = ([130, 1, 65] if layout == "packed" else [130] * 3), 0.2
    q, k, _ = make_qkv(sum(lengths), 2, 32, dtype, device)
    mask = None if layout in ("packed", "none") else make_mask(layout, 3, 130, device)
    starts = cumulative(lengths, device) if layout == "packed" else None
    where = [list(range(2, 2 + n)) for n in lengths] if starts is not None else [list(range(130))] * 3
    places = None if starts is None else torch.tensor([p for each in where for p in each], device=device)
    width = 133 if starts is not None else 130
    given = starts, mask, 130, scale, places, width, None

    def near(i: int, n: int) -> Tensor:
        at = torch.arange(n, device=device)
        found = (at[:, None] - at).abs() <= window
        return found if mask is None else found & mask[i]

    def windowed(query: Tensor, key: Tensor) -> Tensor:
        found = []
        for i, (a, b) in enumerate(zip(query.split(lengths), key.split(lengths), strict=True)):
            there, scores = near(i, len(a)), a.transpose(0, 1) @ b.permute(1, 2, 0) * scale
            weights = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1)
            found.append(weights * there.any(1)[:, None])
        return placed(found, where, width)

    exact, stock = windowed(q.double(), k.double()), windowed(q, k)
    torch.testing.assert_close(reference.attention_map(q.double(), k.double(), *given, window=window), exact)
    there = placed([near(i, n).float().expand(2, -1, -1) for i, n in enumerate(lengths)], where, width).bool()
    tiles = None if starts is None else attention.attention_tiles(starts, sum(lengths))
    found = [kernel.attention_map(q, k, *given, tiles, window)]
    if device == "cpu":
        found.append(cpu.attention_map(q, k, *given, None, window))
    for each in found:
        assert_within_policy(each, stock, exact)
        assert each[~there].eq(0).all() and each.isfinite().all()
    if window == 200:
        whole = kernel.attention_map(q, k, *given, tiles)
        torch.testing.assert_close(found[0], whole)


def test_what_it_is_given_is_checked(device: str) -> None:
    q, k, _ = make_qkv(8, 2, 16, torch.float32, device)
    starts, places = cumulative([3, 5], device), torch.arange(8, device=device)
    for given, error in (
        ((None, None, 8, 1.0, None, 9), r"width is 9; expected max_seqlen, 8, and places of packed"),
        ((None, None, 8, 1.0, places, 8), r"width is 8; expected max_seqlen, 8, and places of packed"),
        ((starts, None, 5, 1.0, None, 4), r"width is 4; expected max_seqlen, 5, or more"),
        ((starts, None, 5, 1.0, places.int(), 9), r"places has shape .* torch.int32; expected \(8,\) and torch.int64"),
        ((None, None, 5, 1.0, None, 5), r"q has 8 rows"),
    ):
        with pytest.raises(ValueError, match=error):
            kernel.attention_map(q, k, *given)


def test_of_no_rows(device: str) -> None:
    q = torch.empty(0, 2, 16, device=device)
    for found in (
        kernel.attention_map(q, q, cumulative([0, 0], device), None, 3, 1.0, None, 4),
        cpu.attention_map(q.cpu(), q.cpu(), cumulative([0, 0], "cpu"), None, 3, 1.0, None, 4),
    ):
        assert found.shape == (2, 2, 4, 4) and found.eq(0).all()
