"""Disentangled attention, kernel and reference: no further from float64 than plain operations in the same dtype."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.kernels import attention, cpu, launch, reference
from fastbert.kernels import disentangled as kernel
from fastbert.numerics import assert_within_policy, relative_error
from tests.conftest import in_turn, kernel_dtypes
from tests.kernels.philox import keep
from tests.kernels.test_attention import cumulative, make_mask, make_qkv

SEED = 0x1234567890


def make_slots(kind: str, reach: int, number: int) -> Tensor:
    """Of distances 1 - reach to reach - 1."""
    distances = torch.arange(1 - reach, reach)
    if kind == "clamped":
        return (distances + number // 2).clamp(1, number - 1).int()
    if kind == "buckets":  # coarser, the further apart
        buckets = (distances.abs() + 1).log2().mul(2).floor() * distances.sign()
        return (buckets + number // 2).clamp(0, number - 1).int()
    return torch.randint(number, distances.shape, generator=torch.Generator().manual_seed(0)).int()


def make(
    lengths: list[int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    kinds: str = "c2p p2c",
    slots: str = "clamped",
    room: int = 3,
    number: int = 24,
    heads: int = 2,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """qkv, both tables and the slots, with `room` for distances that no sequence has; below 0, all beyond are one."""
    qkv = torch.stack(make_qkv(sum(lengths), heads, head_dim, dtype, device), 1)
    draw = (
        torch.randn(2, number, heads, head_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1.5
    )
    c2p, p2c = draw.to(device, dtype)
    chosen = make_slots(slots, max(lengths) + room, number).to(device)
    return qkv, c2p if "c2p" in kinds else None, p2c if "p2c" in kinds else None, chosen


def weigh(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    lengths: list[int],
    mask: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """The probabilities of each sequence, (heads, S, S), in plain operations, every pair with its rows."""
    found, row = [], 0
    for i, length in enumerate(lengths):
        q, k, _ = qkv[row : row + length].permute(1, 2, 0, 3)  # [heads, S, D]
        places = torch.arange(length, device=qkv.device)
        furthest = len(slots) // 2
        chosen = slots.long()[furthest + (places[:, None] - places[None, :]).clamp(-furthest, furthest)]
        scores = (q @ k.transpose(1, 2)) * scale
        if c2p is not None:
            scores = scores + (q.unsqueeze(2) * c2p[chosen].permute(2, 0, 1, 3)).sum(3) * scale
        if p2c is not None:
            scores = scores + (k.unsqueeze(1) * p2c[chosen].permute(2, 0, 1, 3)).sum(3) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[i], float("-inf"))
        found.append(scores.softmax(-1) if mask is None or mask[i].any() else torch.zeros_like(scores))
        row += length
    return found


def attend(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    lengths: list[int],
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """The formula in plain operations, differentiable, in the dtype of its inputs."""
    parts, row = [], 0
    for weights in weigh(qkv, c2p, p2c, slots, lengths, mask, scale):
        length = weights.shape[-1]
        v = qkv[row : row + length, 2].transpose(0, 1)
        if dropout:
            rows, cols = torch.arange(row, row + length), torch.arange(length)
            kept = torch.stack([keep(SEED, rows, cols, head, dropout) for head in range(len(v))])
            weights = weights * kept.to(weights) / (1 - dropout)
        parts.append((weights @ v).transpose(0, 1))
        row += length
    return torch.cat(parts)


def check(
    lengths: list[int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    kinds: str = "c2p p2c",
    slots: str = "clamped",
    dropout: float = 0.0,
    mask: Tensor | None = None,
    packed: bool = True,
    heads: int = 2,
    room: int = 3,
) -> None:
    """Holds output and gradients to the policy."""
    inputs = make(lengths, head_dim, dtype, device, kinds, slots, room, heads=heads)
    scale, rows = (head_dim * (1 + len(kinds.split()))) ** -0.5, sum(lengths)
    grad = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    seed = torch.tensor([SEED], device=device) if dropout else None
    starts = cumulative(lengths, device) if packed else None
    tiles = attention.attention_tiles(starts, rows) if packed else None
    layout = (starts, mask, max(lengths), scale, dropout, seed, tiles)
    out, stats = kernel.disentangled_attention(*inputs, *layout)
    found = kernel.disentangled_attention_backward(grad, *inputs, out, stats, *layout)
    assert out.is_contiguous()
    results = []
    for to in (dtype, torch.float64):
        leaves = [None if x is None else x.to(to).requires_grad_() for x in inputs[:3]]
        plain = attend(*leaves, inputs[3], lengths, mask, scale, dropout)
        given = [x for x in leaves if x is not None]
        results.append((plain.detach(), *torch.autograd.grad(plain, given, grad.to(to))))
    stock, truth = results
    assert_within_policy(out, stock[0], truth[0], "out")
    for i, name in enumerate("qkv"):
        assert_within_policy(found[0][:, i], stock[1][:, i], truth[1][:, i], f"d{name}")
    given = [(x, name) for x, name in zip(found[1:], ("dc2p", "dp2c"), strict=True) if name[1:] in kinds]
    for i, (x, name) in enumerate(given, 2):
        assert_within_policy(x, stock[i], truth[i], name)
    for x, table in zip(found[1:], inputs[1:3], strict=True):
        assert x.shape == ((0,) if table is None else table.shape)


@pytest.mark.parametrize(
    ("lengths", "head_dim", "kinds", "slots", "dropout", "dtype"),
    in_turn(
        ([1, 37, 0, 64], 16, "c2p p2c", "clamped", 0.3),
        ([129], 32, "c2p p2c", "buckets", 0.0),
        ([37, 5], 40, "c2p", "any", 0.3),
        ([5, 34], 16, "p2c", "any", 0.0),
    ),
)
def test_packed(
    lengths: list[int], head_dim: int, kinds: str, slots: str, dropout: float, dtype: torch.dtype, device: str
) -> None:
    """Also where a slot has distances that don't lie side by side."""
    check(lengths, head_dim, dtype, device, kinds, slots, dropout, heads=1 if len(lengths) == 1 else 2)


@pytest.mark.parametrize(("head_dim", "dtype"), in_turn(64, 80, 128))
def test_larger_heads(head_dim: int, dtype: torch.dtype, device: str) -> None:
    check([20, 3], head_dim, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 511, 512, 700])
@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_long_sequences(dtype: torch.dtype, length: int, device: str) -> None:
    check([length], 16, dtype, device, slots="buckets", heads=1)


@pytest.mark.parametrize(
    ("lengths", "reach", "kinds", "slots", "mask", "dropout", "dtype"),
    in_turn(
        ([193, 1, 0, 64], 33, "c2p p2c", "any", None, 0.3),
        ([257, 130], 65, "c2p p2c", "clamped", None, 0.0),
        ([194, 65], 1, "c2p", "any", None, 0.0),
        ([300], 7, "p2c", "any", None, 0.3),
        ([200, 200], 50, "c2p p2c", "any", "holes", 0.0),
        ([200, 200], 50, "p2c", "any", "all-masked row", 0.3),
    ),
)
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_beyond_a_band(
    lengths: list[int],
    reach: int,
    kinds: str,
    slots: str,
    mask: str | None,
    dropout: float,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Sequences that end in every part of it, and some that have none."""
    room = reach - max(lengths)
    assert kernel._band(make(lengths, 16, dtype, device, room=room)[3], max(lengths)) == (64 if reach > 1 else 0)
    masked = None if mask is None else make_mask(mask, len(lengths), lengths[0], device)
    check(lengths, 16, dtype, device, kinds, slots, dropout, masked, mask is None, 1, room)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_sequences(dtype: torch.dtype, head_dim: int, dropout: float) -> None:
    """Of more tiles than the interpreter has time for."""
    check([1, 37, 128, 129, 511, 512, 700, 64], head_dim, dtype, "cuda", "c2p p2c", "buckets", dropout, heads=1)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(("kind", "dropout", "dtype"), in_turn((None, 0.3), ("holes", 0.0), ("all-masked row", 0.0)))
def test_dense(kind: str | None, dropout: float, dtype: torch.dtype, device: str) -> None:
    mask = None if kind is None else make_mask(kind, 2, 20, device)
    check([20] * 2, 16, dtype, device, dropout=dropout, mask=mask, packed=False)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_a_sequence_is_bitwise_the_same_in_any_company(dtype: torch.dtype, device: str) -> None:
    """Also with a list of tiles or none, with slots for more distances, and where every key takes part by a mask."""
    lengths, scale = [37, 66, 1], 0.2
    qkv, c2p, p2c, slots = make(lengths, 16, dtype, device, heads=1)
    starts, rest = cumulative(lengths, device), (scale, 0.0, None)
    together, stats = kernel.disentangled_attention(qkv, c2p, p2c, slots, starts, None, 66, *rest, None)
    tiles = attention.attention_tiles(starts, sum(lengths))
    listed, same = kernel.disentangled_attention(qkv, c2p, p2c, slots, starts, None, 66, *rest, tiles)
    assert torch.equal(listed, together) and torch.equal(stats, same)
    begin = 0
    for length in lengths:
        part = qkv[begin : begin + length]
        near = make_slots("clamped", length, 24).to(device)
        everyone = torch.ones(1, length, dtype=torch.bool, device=device)
        for own, mask in ((slots, None), (near, everyone)):
            alone, _ = kernel.disentangled_attention(part, c2p, p2c, own, None, mask, length, *rest, None)
            assert torch.equal(alone, together[begin : begin + length])
        begin += length


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_no_bit_of_a_sequence_hangs_on_whether_its_company_has_a_band(dtype: torch.dtype, device: str) -> None:
    lengths, reach = [190, 193], 60
    qkv, c2p, p2c, slots = make(lengths, 16, dtype, device, slots="any", room=reach - 193, heads=1)
    rest = (0.2, 0.0, None, None)
    together, _ = kernel.disentangled_attention(qkv, c2p, p2c, slots, cumulative(lengths, device), None, 193, *rest)
    alone, _ = kernel.disentangled_attention(qkv[:190], c2p, p2c, slots, None, None, 190, *rest)
    assert kernel._band(slots, 193) == 64 and kernel._band(slots, 190) is None
    assert torch.equal(together[:190], alone)


def test_more_sequences_than_a_grid_has_room_for_change_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another run. Tables that are summed up in fewer parts have their sums in another order."""
    inputs = make([20] * 3, 16, torch.float32, device, heads=1)
    layout = (None, None, 20, 0.2, 0.3, torch.tensor([7], device=device), None)
    results = []
    for most, programs in ((65535, 2048), (65535, 2048), (2, 1)):
        monkeypatch.setattr(attention, "GRID_SEQUENCES", most)
        monkeypatch.setattr(kernel, "POSITION_PROGRAMS", programs)
        out, stats = kernel.disentangled_attention(*inputs, *layout)
        results.append((out, *kernel.disentangled_attention_backward(out, *inputs, out, stats, *layout)))
    first, again, second = results
    assert all(map(torch.equal, first, again)) and all(map(torch.equal, first[:2], second[:2]))
    for one, other in zip(first[2:], second[2:], strict=True):
        assert one.abs().max() > 0 and relative_error(one, other.double()) < 1e-6


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:invalid value encountered")
def test_neighbours_and_rows_of_tables_that_nobody_looks_at_do_not_leak(device: str) -> None:
    qkv, c2p, p2c, slots = make([37, 28], 16, torch.float32, device, slots="any", number=200, heads=1)
    used = slots[len(slots) // 2 - 36 : len(slots) // 2 + 37].long()
    rest = (0.2, 0.0, None, None)
    plain, stats = kernel.disentangled_attention(qkv[:37], c2p, p2c, slots, None, None, 37, *rest)
    expected = kernel.disentangled_attention_backward(
        plain, qkv[:37], c2p, p2c, slots, plain, stats, None, None, 37, *rest
    )
    qkv[37:] = math.nan
    for table in (c2p, p2c):
        unused = torch.ones(200, dtype=torch.bool, device=device)
        unused[used] = False
        assert unused.any()
        table[unused] = math.nan
    out, stats = kernel.disentangled_attention(qkv, c2p, p2c, slots, cumulative([37, 28], device), None, 37, *rest)
    assert torch.equal(out[:37], plain) and out[37:].isnan().all()
    alone, stats = kernel.disentangled_attention(qkv[:37], c2p, p2c, slots, None, None, 37, *rest)
    found = kernel.disentangled_attention_backward(
        plain, qkv[:37], c2p, p2c, slots, alone, stats, None, None, 37, *rest
    )
    assert torch.equal(alone, plain) and all(map(torch.equal, found, expected))
    assert found[1][unused].eq(0).all() and found[1].ne(0).any()


@pytest.mark.parametrize("kind", ["c2p", "p2c"])
def test_scores_beyond_float16_before_they_are_scaled(kind: str, device: str) -> None:
    """By a power of two more, and the scale by as much less: no bit is another."""
    qkv, c2p, p2c, slots = make([20], 16, torch.float16, device, kind)
    large, by_key = qkv.clone(), kind == "p2c"
    large[:, int(by_key)] *= 2**13
    table = p2c if by_key else c2p
    assert (large[:, int(by_key)].float().transpose(0, 1) @ table.float().permute(1, 2, 0)).abs().max() > 1e5
    results = [
        kernel.disentangled_attention(x, c2p, p2c, slots, None, None, 20, scale, 0.0, None, None)[0]
        for x, scale in ((qkv, 0.2), (large, 0.2 / 2**13))
    ]
    assert torch.equal(*results) and results[0].isfinite().all()


def test_strides_apart_and_an_expanded_gradient(device: str) -> None:
    lengths = [9, 12]
    qkv, c2p, p2c, slots = make(lengths, 16, torch.float32, device)
    rest = (cumulative(lengths, device), None, 12, 0.2, 0.5, torch.tensor([SEED], device=device), None)
    out, stats = kernel.disentangled_attention(qkv, c2p, p2c, slots, *rest)
    apart = torch.full((21, 130), math.nan, device=device)[:, :96].view(21, 3, 2, 16)
    apart.copy_(qkv)
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    wide = [torch.stack((table, table), 1)[:, 0] for table in (c2p, p2c)]
    ones = torch.ones(1, 1, 1, device=device).expand(21, 2, 16)
    tables = c2p, p2c, slots
    expected = kernel.disentangled_attention_backward(torch.ones_like(out), qkv, *tables, out, stats, *rest)
    for strided, given in ((apart, tables), (turned, (*wide, slots))):
        assert torch.equal(kernel.disentangled_attention(strided, *given, *rest)[0], out)
        found = kernel.disentangled_attention_backward(ones, strided, *given, out, stats, *rest)
        assert all(map(torch.equal, found, expected))


def test_all_dropped(device: str) -> None:
    inputs = make([9], 16, torch.float32, device)
    layout = (None, None, 9, 0.25, 1.0, torch.tensor([SEED], device=device), None)
    out, stats = kernel.disentangled_attention(*inputs, *layout)
    assert out.eq(0).all()
    for x in kernel.disentangled_attention_backward(torch.ones_like(out), *inputs, out, stats, *layout):
        assert x.numel() and x.eq(0).all()


def test_no_rows(device: str) -> None:
    _, c2p, p2c, slots = make([3], 16, torch.float32, device)
    qkv, layout = torch.empty(0, 3, 2, 16, device=device), (cumulative([0], device), None, 0, 0.2, 0.0, None, None)
    out, stats = kernel.disentangled_attention(qkv, c2p, p2c, slots, *layout)
    dqkv, dc2p, dp2c = kernel.disentangled_attention_backward(out, qkv, c2p, p2c, slots, out, stats, *layout)
    assert out.shape == (0, 2, 16) and dqkv.shape == qkv.shape
    assert dc2p.eq(0).all() and dp2c.eq(0).all() and dc2p.shape == c2p.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c2p": None, "p2c": None}, "c2p and p2c are None"),
        ({"c2p": torch.zeros(24, 2, 8)}, "c2p has shape"),
        ({"p2c": torch.zeros(24, 2, 16).half()}, "p2c has shape"),
        ({"p2c": torch.zeros(25, 2, 16)}, "expected the same"),
        ({"slots": torch.zeros(16, dtype=torch.int32)}, "slots has shape"),
        ({"slots": torch.zeros(15, dtype=torch.int64)}, "slots has shape"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"dropout": 0.5}, "seed"),
        ({"max_seqlen": 5}, "max_seqlen"),
        ({"qkv": torch.zeros(8, 2, 2, 16)}, "qkv has shape"),
        ({"qkv": torch.zeros(8, 3, 2, 144), "c2p": torch.zeros(24, 2, 144), "p2c": None}, "head_dim"),
    ],
)
def test_what_would_give_a_wrong_number_is_refused(changes: dict[str, Any], message: str, device: str) -> None:
    names = ("qkv", "c2p", "p2c", "slots")
    given = dict(zip(names, make([8], 16, torch.float32, device), strict=True))
    given |= {"cu_seqlens": None, "key_mask": None, "max_seqlen": 8, "scale": 0.2, "dropout": 0.0, "seed": None}
    given |= {name: x.to(device) if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        kernel.disentangled_attention(**given, tiles=None)


def test_a_gradient_of_another_shape_is_refused(device: str) -> None:
    inputs, layout = make([8], 16, torch.float32, device), (None, None, 8, 0.2, 0.0, None, None)
    out, stats = kernel.disentangled_attention(*inputs, *layout)
    with pytest.raises(ValueError, match="grad has shape"):
        kernel.disentangled_attention_backward(out[:4], *inputs, out, stats, *layout)


@pytest.mark.parametrize("kinds", ["c2p p2c", "c2p", "p2c"])
@pytest.mark.parametrize("layout", ["packed", "dense", "holes", "all-masked row"])
@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
def test_backends_are_the_formula(backend: Any, layout: str, kinds: str) -> None:
    """And their gradients are autograd's; with dropout, of probabilities that fewer remain of."""
    lengths = [37, 1, 0, 20] if layout == "packed" else [20] * 3
    mask = None if layout in ("packed", "dense") else make_mask(layout, 3, 20, "cpu")
    inputs = make(lengths, 16, torch.float64, "cpu", kinds, "any")
    sequences = (cumulative(lengths, "cpu") if layout == "packed" else None, mask, max(lengths), 0.3)
    out, stats = backend.disentangled_attention(*inputs, *sequences, 0.0, None, None)
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs[:3]]
    plain = attend(*leaves, inputs[3], lengths, mask, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = torch.autograd.grad(plain, [x for x in leaves if x is not None], grad)
    found = backend.disentangled_attention_backward(grad, *inputs, out, stats, *sequences, 0.0, None, None)
    assert [x.numel() == 0 for x in found] == [x is None for x in leaves]
    for one, other in zip((out, *(x for x in found if x.numel())), (plain.detach(), *expected), strict=True):
        assert relative_error(one, other) < 1e-13
    dropped, _ = backend.disentangled_attention(*inputs, *sequences, 0.5, torch.tensor([SEED]), None)
    assert relative_error(dropped, out) > 0.1


def test_configurations_fit_the_pitch_and_the_list_of_tiles() -> None:
    """Scores by position are read in whole blocks, none of which may be larger than what their rows are padded to."""
    for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        for dtype in (torch.float32, torch.float16):
            for head_dim in (16, 32, 40, 64, 128):
                for choose in (launch.disentangled_config, launch.disentangled_backward_config):
                    config = choose(arch, dtype, head_dim)
                    assert attention.PITCH.value % config.block_m == 0 == attention.PITCH.value % config.block_n
                position = launch.position_config(arch, dtype, head_dim)
                assert attention.TILE_ROWS.value % position.block_m == 0 == position.block_m % position.block_n
                assert position.block_n % launch.position_slots_config(arch, dtype, head_dim).block_n == 0


def test_a_mask_decides_of_stages_alone() -> None:
    """Which load ahead: the tile and the warps, and so the bits, are the same with a mask and without."""
    found = set()
    for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"):
        for dtype in (torch.float32, torch.float16):
            for head_dim in (16, 32, 40, 64, 80, 128):
                for choose in (launch.disentangled_config, launch.disentangled_backward_config):
                    config = choose(arch, dtype, head_dim)
                    masked = launch.of_mask(config, arch)
                    assert dataclasses.replace(masked, num_stages=config.num_stages) == config
                    if masked != config:
                        found.add(arch)
    assert found == {"sm_100", "sm_103"}
    plain, masked = (
        kernel._plan(launch.disentangled_config, "sm_100", torch.float16, 64, "ieee", masked=masked)[1]
        for masked in (False, True)
    )
    assert {name for name in plain if plain[name] != masked[name]} == {"num_stages"}


def test_a_call_with_a_mask_is_planned_as_one(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Attention and dQ; a call without one, not."""
    asked: list[launch.Config] = []
    monkeypatch.setattr(kernel, "of_mask", lambda config, arch: asked.append(config) or config)
    inputs, mask = make([9], 16, torch.float32, device), torch.ones(1, 9, dtype=torch.bool, device=device)
    launch.use({})  # plans are made anew
    for key_mask, count in ((None, 0), (mask, 1)):
        layout = None, key_mask, 9, 0.2, 0.0, None, None
        out, stats = kernel.disentangled_attention(*inputs, *layout)
        assert len(asked) == count
        kernel.disentangled_attention_backward(out, *inputs, out, stats, *layout)
        assert len(asked) == 2 * count
    launch.use({})
