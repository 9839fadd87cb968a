"""Attention, kernel and reference: no further from float64 than PyTorch's own attention in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import attention as kernel
from fastbert.kernels import cpu, launch, reference
from fastbert.numerics import assert_within_policy, relative_error
from tests.conftest import in_turn, kernel_dtypes, thorough
from tests.kernels.philox import keep


def make_qkv(rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views into one (rows, 3 * heads * head_dim) buffer, as the QKV projection leaves it."""
    generator = torch.Generator().manual_seed(rows * 1000 + head_dim)
    buffer = torch.randn(rows, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    # Scores of a deviation around 3, so that the softmax has something to decide.
    buffer[:, : 2 * heads * head_dim] *= 3**0.5
    q, k, v = buffer.to(device, dtype).view(rows, 3, heads, head_dim).unbind(1)
    return q, k, v


def cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def truth_of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, *rest: float) -> Tensor:
    return reference.attention(q.double(), k.double(), v.double(), cu_seqlens, mask, *rest)


def stock_of(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention in the dtype of its inputs, one sequence at a time; `mask` (B, S) with S for every length."""
    parts = []
    for i, views in enumerate(zip(*(t.split(lengths) for t in (q, k, v)), strict=True)):
        heads = [t.transpose(0, 1)[None] for t in views]  # [1, H, S, D]
        attn_mask = None if mask is None else mask[i][None, None, None]
        parts.append(F.scaled_dot_product_attention(*heads, attn_mask=attn_mask, scale=scale)[0].transpose(0, 1))
    out = torch.cat(parts)
    assert out.isfinite().all()  # it sets the bound
    return out


def make_mask(kind: str, batch: int, length: int, device: str) -> Tensor:
    positions = torch.arange(length).expand(batch, length)
    real = torch.tensor([length // (i + 1) for i in range(batch)])[:, None]
    mask = {
        "right": positions < real,
        "left": positions >= length - real,
        "holes": torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.5,
        "all-masked row": positions < real * (torch.arange(batch)[:, None] != 1),
    }[kind]
    return mask.to(device)


@pytest.mark.parametrize(("head_dim", "dtype"), in_turn(16, 32, 40, 64, 80, 128))
def test_packed(head_dim: int, dtype: torch.dtype, device: str) -> None:
    lengths = [1, 37, 128, 129] if head_dim in (40, 64) else [37, 65]
    cu_seqlens, scale = cumulative(lengths, device), head_dim**-0.5
    q, k, v = make_qkv(sum(lengths), 2, head_dim, dtype, device)
    fused = kernel.attention(q, k, v, cu_seqlens, None, max(lengths), scale)
    assert fused.is_contiguous()
    truth = truth_of(q, k, v, cu_seqlens, None, max(lengths), scale)
    assert_within_policy(fused, stock_of(q, k, v, lengths, None, scale), truth)


@pytest.mark.parametrize(("kind", "dtype"), in_turn(None, "right", "left", "holes", "all-masked row"))
def test_dense(kind: str | None, dtype: torch.dtype, device: str) -> None:
    batch, length, head_dim, scale = 3, 129, 32, 0.2
    q, k, v = make_qkv(batch * length, 2, head_dim, dtype, device)
    mask = None if kind is None else make_mask(kind, batch, length, device)
    fused = kernel.attention(q, k, v, None, mask, length, scale)
    if kind == "all-masked row":
        assert torch.equal(fused[length : 2 * length], torch.zeros_like(fused[:length]))
    truth = truth_of(q, k, v, None, mask, length, scale)
    assert_within_policy(fused, stock_of(q, k, v, [length] * batch, mask, scale), truth)


@pytest.mark.parametrize(("layout", "dtype"), in_turn("packed", "dense", "right", "all-masked row"))
def test_bias_by_distance(layout: str, dtype: torch.dtype, device: str) -> None:
    """Beside PyTorch's attention with the same numbers added to the scores, laid out for every pair."""
    lengths, heads, head_dim, scale = [37, 70, 1], 2, 32, 0.2
    if layout != "packed":
        lengths = [70, 70, 70]
    mask = None if layout in ("packed", "dense") else make_mask(layout, 3, 70, device)
    q, k, v = make_qkv(sum(lengths), heads, head_dim, dtype, device)
    bias = torch.randn(heads, 2 * 80 - 1, generator=torch.Generator().manual_seed(0)).to(device)  # room for 80
    starts = cumulative(lengths, device) if layout == "packed" else None
    fused = kernel.attention(q, k, v, starts, mask, max(lengths), scale, bias)
    truth = reference.attention(q.double(), k.double(), v.double(), starts, mask, max(lengths), scale, bias.double())

    def alone(i: int, *views: Tensor) -> Tensor:
        n = views[0].shape[0]
        places = torch.arange(n, device=device)
        added = bias[:, 79 + places[None, :] - places[:, None]].to(views[0].dtype)
        if mask is not None:
            added = added.masked_fill(~mask[i], float("-inf"))
        found = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in views), attn_mask=added, scale=scale)
        return found[0].transpose(0, 1)

    parts = list(zip(*(t.split(lengths) for t in (q, k, v)), strict=True))
    exact = torch.cat([alone(i, *(t.double() for t in views)) for i, views in enumerate(parts)])
    stock = torch.cat([alone(i, *views) for i, views in enumerate(parts)])
    real = torch.ones(len(q), dtype=torch.bool, device=device)
    if layout == "all-masked row":
        real[70:140] = False
        assert fused[70:140].eq(0).all() and truth[70:140].eq(0).all()
    torch.testing.assert_close(truth[real], exact[real])  # the twin, by another way
    assert_within_policy(fused[real], stock[real], truth[real])


def test_bias_is_checked(device: str) -> None:
    q, k, v = make_qkv(8, 2, 16, torch.float32, device)
    for bias in (torch.zeros(2, 14), torch.zeros(2, 13), torch.zeros(1, 15), torch.zeros(2, 15).half()):
        with pytest.raises(ValueError, match=r"bias has shape .* expected a contiguous float32 tensor"):
            kernel.attention(q, k, v, None, None, 8, 1.0, bias.to(device))


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_a_sequence_is_bitwise_the_same_in_any_company(dtype: torch.dtype, device: str) -> None:
    lengths, head_dim, scale = [37, 100, 5, 70], 64, 0.125
    q, k, v = make_qkv(sum(lengths), 2, head_dim, dtype, device)
    together = kernel.attention(q, k, v, cumulative(lengths, device), None, max(lengths), scale)

    longest = max(lengths)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = [t.new_full((mask.numel(), *t.shape[1:]), 7.0) for t in (q, k, v)]
    for target, source in zip(padded, (q, k, v), strict=True):
        target[mask.flatten()] = source
    dense = kernel.attention(*padded, None, mask, longest, scale)
    assert torch.equal(dense[mask.flatten()], together)

    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        views = [t[start : start + length] for t in (q, k, v)]
        alone = kernel.attention(*views, None, None, length, scale)
        assert torch.equal(alone, together[start : start + length])


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_extreme_scores_stay_finite(dtype: torch.dtype, device: str) -> None:
    q, k, v = make_qkv(70, 1, 16, dtype, device)
    q, k = q.clone(), k.clone()
    q[3], k[5], k[69] = 200.0, 50.0, -50.0  # scores of 1.6e5 and its negative, before the scale
    q[4] = -200.0
    mask = torch.ones(1, 70, dtype=torch.bool, device=device)
    mask[0, :66] = False  # row 3 sees little but the least of its scores
    for key_mask in (None, mask):
        fused = kernel.attention(q, k, v, None, key_mask, 70, 0.0625)
        truth = truth_of(q, k, v, None, key_mask, 70, 0.0625)
        assert_within_policy(fused, stock_of(q, k, v, [70], key_mask, 0.0625), truth)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum
def test_neighbours_do_not_leak(device: str) -> None:
    q, k, v = make_qkv(80, 1, 32, torch.float32, device)
    alone = kernel.attention(q[:37], k[:37], v[:37], None, None, 37, 0.2)
    for t in (q, k, v):
        t[37:] = math.nan
    fused = kernel.attention(q, k, v, cumulative([37, 43], device), None, 43, 0.2)
    assert torch.equal(fused[:37], alone)
    assert fused[37:].isnan().all()


def test_any_strides_and_an_empty_sequence(device: str) -> None:
    lengths, scale = [20, 0, 50], 0.3
    cu_seqlens = cumulative(lengths, device)
    q, k, v = make_qkv(70, 3, 24, torch.float32, device)
    expected = kernel.attention(q, k, v, cu_seqlens, None, 50, scale)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)  # heads outermost
    v = v.contiguous()
    assert torch.equal(kernel.attention(q, k, v, cu_seqlens, None, 50, scale), expected)


def test_no_rows(device: str) -> None:
    q, k, v = make_qkv(0, 2, 32, torch.float32, device)
    for cu_seqlens in (None, cumulative([], device)):
        assert kernel.attention(q, k, v, cu_seqlens, None, 0, 0.2).shape == (0, 2, 32)


def _bad(**changes: object) -> Callable[[str], dict[str, object]]:
    def arguments(device: str) -> dict[str, object]:
        q, k, v = make_qkv(12, 2, 16, torch.float32, device)
        good = {"q": q, "k": k, "v": v, "cu_seqlens": None, "key_mask": None, "max_seqlen": 6, "scale": 0.25}
        return good | {name: change(good[name]) for name, change in changes.items()}  # type: ignore[operator]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_bad(k=lambda k: k[:6]), "k has shape"),
        (_bad(v=lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)), "v has shape"),
        (_bad(scale=lambda _: 0.0), "scale is 0.0"),
        (_bad(max_seqlen=lambda _: 5), "max_seqlen"),
        (_bad(key_mask=lambda _: torch.ones(2, 5, dtype=torch.bool)), "key_mask has shape"),
        (_bad(key_mask=lambda _: torch.ones(2, 6)), "key_mask has shape"),
        (
            _bad(
                key_mask=lambda _: torch.ones(2, 6, dtype=torch.bool),
                cu_seqlens=lambda _: torch.tensor([0, 6, 12], dtype=torch.int32),
            ),
            "key_mask is given together with cu_seqlens",
        ),
        (_bad(q=lambda q: q.repeat(1, 1, 9), k=lambda k: k.repeat(1, 1, 9), v=lambda v: v.repeat(1, 1, 9)), "head_dim"),
    ],
)
def test_what_would_give_a_wrong_number_is_refused(
    arguments: Callable[[str], dict[str, object]], message: str, device: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.attention(**arguments(device))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [None, "holes", "all-masked row"])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins_dense_are_the_formula(module: Any, kind: str | None) -> None:
    batch, length, scale = 3, 37, 0.3
    q, k, v = make_qkv(batch * length, 2, 16, torch.float64, "cpu")
    mask = None if kind is None else make_mask(kind, batch, length, "cpu")
    scores = torch.einsum("bihd,bjhd->bhij", *(t.unflatten(0, (batch, length)) for t in (q, k))) * scale
    weights = torch.ones(batch, length) if mask is None else mask
    weights = weights[:, None, None, :] * (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.unflatten(0, (batch, length))).flatten(0, 1)
    actual = module.attention(q, k, v, None, mask, length, scale)
    assert relative_error(actual, expected) < 1e-14


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins_packed_are_each_sequence_alone(module: Any) -> None:
    lengths = [5, 0, 37, 1]
    q, k, v = make_qkv(43, 2, 16, torch.float64, "cpu")
    actual = module.attention(q, k, v, cumulative(lengths, "cpu"), None, 37, 0.3)
    start = 0
    for length in lengths:
        views = [t[start : start + length] for t in (q, k, v)]
        expected = module.attention(*views, None, None, length, 0.3)
        assert relative_error(actual[start : start + length], expected) < 1e-14
        start += length


LENGTHS = [
    [1],
    [128, 129, 0, 300, 5, 129, 127],
    [64] * 70,
    [*range(150, 80, -1)],
    [0, 0],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(len(lengths)))
def test_tiles_are_all_rows_the_longest_sequences_first(lengths: list[int], device: str) -> None:
    cu_seqlens, rows = cumulative(lengths, device), sum(lengths)
    tiles = kernel.attention_tiles(cu_seqlens, rows)
    assert torch.equal(tiles, reference.attention_tiles(cu_seqlens, rows))
    assert torch.equal(tiles, cpu.attention_tiles(cu_seqlens, rows))
    expected = [
        [sum(lengths[:i]), lengths[i], start, i]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        for start in range(0, lengths[i], 128)
    ]
    assert tiles.dtype == torch.int32
    assert tiles.tolist() == expected + [[0] * 4] * (rows // 128 + len(lengths) - len(expected))


@pytest.mark.parametrize("dtype", in_turn(()))
def test_tiles_change_no_bit(dtype: torch.dtype, device: str) -> None:
    """Forward, in inference and in training, and backward."""
    lengths, heads, scale = [3, 0, 130], 2, 0.25
    q, k, v = make_qkv(sum(lengths), heads, 16, dtype, device)
    sequences = (cumulative(lengths, device), None, max(lengths), scale)
    tiles = kernel.attention_tiles(sequences[0], sum(lengths))
    qkv, drop = torch.stack((q, k, v), 1), (0.3, torch.tensor([SEED], device=device))
    found = [
        (
            kernel.attention(q, k, v, *sequences, None, each),
            *(trained := kernel.attention_forward(qkv, *sequences, *drop, each)),
            *kernel.attention_backward(q, qkv, *trained, *sequences, *drop, each),
        )
        for each in (None, tiles)
    ]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("layout", "dropout"),
    [
        *(("packed", 0.3), ("dense", 0.0), ("masked", 0.3)),
        *(pytest.param(*case, marks=thorough) for case in (("packed", 0.0), ("dense", 0.3), ("masked", 0.0))),
    ],
)
def test_more_sequences_than_a_grid_has_room_for_change_no_bit(
    layout: str, dropout: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, length = 5, 20
    qkv = torch.stack(make_qkv(batch * length, 2, 16, torch.float16, device), 1)
    cu_seqlens = cumulative([20, 3, 0, 37, 40], device) if layout == "packed" else None
    mask = make_mask("holes", batch, length, device) if layout == "masked" else None
    sequences = cu_seqlens, mask, 40 if layout == "packed" else length, 0.3
    seed = torch.tensor([7], device=device) if dropout else None
    results: list[tuple[Tensor, ...]] = []
    grids: list[tuple[int, int, int]] = []
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda each, grid, *rest: (grids.append(grid), run(each, grid, *rest)))
    for most in (65535, 4):
        monkeypatch.setattr(kernel, "GRID_SEQUENCES", most)
        grids.clear()
        out, stats = kernel.attention_forward(qkv, *sequences, dropout, seed)
        results.append((out, stats, *kernel.attention_backward(out, qkv, out, stats, *sequences, dropout, seed)))
        assert all(max(grid[1:]) <= most for grid in grids) and len(grids) >= 3
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert results[0][2].abs().max() > 0


def test_tiles_are_checked(device: str) -> None:
    q, k, v = make_qkv(8, 2, 16, torch.float32, device)
    cu_seqlens = cumulative([3, 5], device)
    tiles = kernel.attention_tiles(cu_seqlens, 8)
    for starts, wrong in ((cu_seqlens, tiles[:1]), (cu_seqlens, tiles.long()), (None, tiles)):
        with pytest.raises(ValueError, match="tiles"):
            kernel.attention(q, k, v, starts, None, 8, 1.0, None, wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_tiles_give_the_same_bits(dtype: torch.dtype) -> None:
    """A short sequence alone, and beside a long one, which sets the tile; what fails here leaves `SHORT_TILES`."""
    q, k, v = make_qkv(launch.SHORT + 513, 4, 64, dtype, "cuda")
    for length in (1, 37, launch.SHORT):
        lengths = [length, 513]
        many = sum(lengths)
        both = kernel.attention(q[:many], k[:many], v[:many], cumulative(lengths, "cuda"), None, 513, 0.125)
        alone = kernel.attention(q[:length], k[:length], v[:length], cumulative([length], "cuda"), None, length, 0.125)
        assert torch.equal(both[:length], alone)


def test_short_tiles_differ_in_the_rows_of_a_program_alone() -> None:
    for usual, short in launch.SHORT_TILES.items():
        assert usual.block_n == short.block_n
        for config in (usual, short):
            assert config.block_m == 16 * config.num_warps
        assert launch.of_length(usual, launch.SHORT) == short
        assert launch.of_length(usual, launch.SHORT + 1) == usual
    assert launch.attention_config("sm_90", torch.float16, 64) in launch.SHORT_TILES


def test_configuration_is_the_table_of_the_architecture_or_portable() -> None:
    portable = launch.attention_config("portable", torch.float16, 64)
    assert launch.attention_config("sm_75", torch.float16, 64) == portable
    for arch, like in launch.LIKE.items():
        for dtype in (torch.float32, torch.float16):
            config = launch.attention_config(arch, dtype, 128)
            assert config == launch.attention_config(like, dtype, 128)
            assert launch.of_bias(config, arch) == launch.of_bias(config, like)
            assert launch.attention_dbias_config(arch, dtype, 64) == launch.attention_dbias_config(like, dtype, 64)
            assert launch.attention_backward_config(arch, dtype, 16) == launch.attention_backward_config(
                like, dtype, 16
            )
            one, other = (launch.linear_config(a, dtype, 4096, 1024, multiprocessors=100) for a in (arch, like))
            assert one == other
    assert launch.attention_config("sm_90", torch.float16, 64) != portable
    assert launch.attention_config("sm_80", torch.bfloat16, 33) == launch.attention_config("sm_80", torch.float16, 64)


SEED = 0x1234567890


def attend(
    qkv: Tensor,
    lengths: list[int],
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention in plain operations, differentiable, with the dropout of the kernels, in the dtype of its inputs."""
    parts, row = [], 0
    for i, length in enumerate(lengths):
        q, k, v = qkv[row : row + length].permute(1, 2, 0, 3)  # [heads, S, D]
        scores = (q @ k.transpose(1, 2)) * scale
        if bias is not None:
            places = torch.arange(length, device=qkv.device)
            scores = scores + bias[:, bias.shape[1] // 2 + places[None, :] - places[:, None]]
        there = torch.ones(length, length, dtype=torch.bool, device=qkv.device)
        if mask is not None:
            there &= mask[i]
        if window is not None:
            there &= (torch.arange(length)[:, None] - torch.arange(length)).abs().to(qkv.device) <= window
        without = ~there.any(1, keepdim=True)
        scores = scores.masked_fill(~there, float("-inf")).masked_fill(without, 0.0)
        weights = scores.softmax(-1).masked_fill(without, 0.0)
        if dropout:
            rows, cols = torch.arange(row, row + length), torch.arange(length)
            kept = torch.stack([keep(SEED, rows, cols, head, dropout) for head in range(len(q))])
            weights = weights * kept.to(weights) / (1 - dropout)
        parts.append((weights @ v).transpose(0, 1))
        row += length
    return torch.cat(parts)


def check_training(
    lengths: list[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    mask: Tensor | None,
    dropout: float,
    room: int = 0,
    window: int | None = None,
) -> None:
    """Holds output and gradients, with dropout, to the policy; with a bias by distance that has `room` to spare."""
    rows, longest, scale = sum(lengths), max(lengths), head_dim**-0.5
    q, k, v = make_qkv(rows, heads, head_dim, dtype, device)
    qkv = torch.stack((q, k, v), 1)
    grad = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    seed = torch.tensor([SEED], device=device) if dropout else None
    layout = (None if mask is not None else cumulative(lengths, device), mask, longest, scale, dropout, seed)
    bias = None
    if room:
        span = longest + room - 1
        bias = torch.randn(heads, 2 * span - 1, generator=torch.Generator().manual_seed(2)).to(device)
        layout += (kernel.attention_tiles(layout[0], rows) if mask is None else None, bias)
    out, stats = kernel.attention_forward(qkv, *layout, window=window)
    dqkv, dbias = kernel.attention_backward(grad, qkv, out, stats, *layout, window=window)
    results = []
    for x in (qkv, qkv.double()):
        leaf, added = x.clone().requires_grad_(), None if bias is None else bias.to(x).requires_grad_()
        plain = attend(leaf, lengths, mask, scale, dropout, added, window)
        # Of a sequence without keys softmax's own gradient is NaN; the truth is zero.
        kept = torch.ones(len(x), 1, 1, dtype=torch.bool, device=device)
        if mask is not None:
            kept = mask.any(1).repeat_interleave(longest)[:, None, None]
        given = [leaf] if added is None else [leaf, added]
        found = torch.autograd.grad(plain.masked_fill(~kept, 0.0), given, grad.to(x))
        results.append((plain.detach(), *found))
    stock, truth = results
    assert_within_policy(out, stock[0], truth[0], "out")
    for i, name in enumerate("qkv"):
        assert_within_policy(dqkv[:, i], stock[1][:, i], truth[1][:, i], f"d{name}")
    if bias is None:
        assert dbias.shape == (0,)
    else:
        assert_within_policy(dbias, stock[2].float(), truth[2], "dbias")
        assert dbias[:, : room - 1].eq(0).all() and dbias[:, 2 * span - room :].eq(0).all()  # no pair is so far apart
    if not dropout and mask is None:
        assert torch.equal(out, kernel.attention(q, k, v, *layout[:4], bias, window=window))
    if device == "cuda":  # the interpreter runs programs one after the other, the same each time
        again = kernel.attention_backward(grad, qkv, out, stats, *layout, window=window)
        assert torch.equal(dqkv, again[0]) and torch.equal(dbias, again[1])


@pytest.mark.parametrize(
    ("head_dim", "dropout", "dtype"), in_turn((16, 0.0), (40, 0.3), (64, 0.0), (64, 0.3), (128, 0.0))
)
def test_training_packed(head_dim: int, dropout: float, dtype: torch.dtype, device: str) -> None:
    lengths = [37, 65]
    if head_dim == 64:
        lengths = [1, 37, 0, 128, 129] if device == "cuda" else [1, 37, 0, 129] if dropout else [1, 37, 0, 65]
    check_training(lengths, 2, head_dim, dtype, device, None, dropout)


# Of keys that take no part, what is thrown away at the end overflows in 16 bits.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("kind", "dropout", "dtype"), in_turn(("right", 0.0), ("left", 0.3), ("holes", 0.3), ("all-masked row", 0.0))
)
def test_training_dense(kind: str, dropout: float, dtype: torch.dtype, device: str) -> None:
    check_training([67] * 2, 2, 32, dtype, device, make_mask(kind, 2, 67, device), dropout)


@pytest.mark.parametrize(("head_dim", "dropout", "dtype"), in_turn((16, 0.3), (40, 0.0), (64, 0.3), (128, 0.3)))
def test_training_packed_with_a_bias(
    head_dim: int, dropout: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program takes tiles of many sequences."""
    lengths = [37, 65, 64]
    if head_dim == 64:
        lengths = [1, 37, 0, 128, 129] if device == "cuda" else [1, 37, 0, 129]
    monkeypatch.setattr(kernel, "DBIAS_PROGRAMS", {16: 1, 64: 20}.get(head_dim, 2048))
    check_training(lengths, 2, head_dim, dtype, device, None, dropout, 1 if head_dim == 40 else 70)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("kind", "dropout", "dtype"), in_turn(("right", 0.3), ("left", 0.0), ("holes", 0.0), ("all-masked row", 0.3))
)
def test_training_dense_with_a_bias(kind: str, dropout: float, dtype: torch.dtype, device: str) -> None:
    check_training([67] * 2, 2, 32, dtype, device, make_mask(kind, 2, 67, device), dropout, 3)


@pytest.mark.parametrize("seeds", [None, [SEED]])
def test_a_bias_of_zeros_and_one_without_a_gradient(seeds: list[int] | None, device: str) -> None:
    """The one changes no bit, and the gradient of the other isn't computed; no sequence has one at a distance."""
    qkv = torch.randn(20, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    seed = None if seeds is None else torch.tensor(seeds, device=device)
    layout = (cumulative([1, 19], device), None, 19, 0.25, 0.5 if seeds else 0.0, seed)
    bias = torch.zeros(2, 37, device=device)
    plain = kernel.attention_forward(qkv, *layout)
    found = kernel.attention_forward(qkv, *layout, None, bias)
    assert all(map(torch.equal, plain, found))
    grad = plain[0] + 1
    dqkv, none = kernel.attention_backward(grad, qkv, *plain, *layout)
    same, dbias = kernel.attention_backward(grad, qkv, *found, *layout, None, bias)
    other, unwanted = kernel.attention_backward(grad, qkv, *found, *layout, None, bias, False)
    assert torch.equal(dqkv, same) and torch.equal(dqkv, other)
    assert none.shape == unwanted.shape == (0,) and dbias.shape == bias.shape
    # Scores of a row that all grow alike change nothing: what is gained at one distance is lost at another.
    assert dbias.abs().max() > 0.1 and dbias.sum(1).abs().max() < 1e-4
    short = torch.full((2, 39), math.nan, device=device)
    with pytest.raises(ValueError, match="bias has shape"):
        kernel.attention_forward(qkv, *layout, None, short[:, :35])
    with pytest.raises(ValueError, match="bias has shape"):
        kernel.attention_backward(grad, qkv, *found, *layout, None, short[:, :35])


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "oracle"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["packed", "dense", "right", "all-masked row"])
def test_training_of_the_cpu_with_a_bias_is_the_formula(layout: str, dropout: float, backend: Any) -> None:
    """Against autograd; what is dropped is seen where values pick out the probabilities."""
    lengths, heads, scale = [37, 1, 0, 20] if layout == "packed" else [20] * 3, 2, 0.3
    mask = make_mask(layout, 3, 20, "cpu") if layout not in ("packed", "dense") else None
    qkv = torch.stack(make_qkv(sum(lengths), heads, 40, torch.float64, "cpu"), 1)
    starts = cumulative(lengths, "cpu") if layout == "packed" else None
    bias = torch.randn(heads, 79, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sequences = (starts, mask, max(lengths), scale, dropout, torch.tensor([SEED]) if dropout else None, None, bias)
    out, stats = backend.attention_forward(qkv, *sequences)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    dqkv, dbias = backend.attention_backward(grad, qkv, out, stats, *sequences)
    leaf, added = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    if dropout:
        # Of one seed, one place and one number of sequences: the same elements.
        eye = torch.cat([torch.eye(40, dtype=torch.float64)[:length] for length in lengths])
        chosen = torch.stack((*qkv.unbind(1)[:2], eye[:, None].expand(-1, heads, -1)), 1)
        dropped, everything = (
            backend.attention_forward(chosen, *sequences[:4], rate, *sequences[5:])[0] for rate in (dropout, 0.0)
        )
        weights = attend(
            torch.cat((leaf[:, :2], eye[:, None, None].expand(-1, 1, heads, -1)), 1), lengths, mask, scale, 0.0, added
        )
        weights = weights * (dropped / everything).nan_to_num(0.0)
        parts = zip(weights.split(lengths), leaf[:, 2].split(lengths), strict=True)
        plain = torch.cat([torch.einsum("ihj,jhd->ihd", w[..., : len(v)], v) for w, v in parts])
    else:
        plain = attend(leaf, lengths, mask, scale, 0.0, added)
    there = torch.ones(len(qkv)) if mask is None else mask.any(1).repeat_interleave(20)
    plain = plain.masked_fill(~there.bool()[:, None, None], 0.0)
    expected = torch.autograd.grad(plain, (leaf, added), grad)
    for one, other in zip((out, dqkv, dbias), (plain.detach(), *expected), strict=True):
        assert relative_error(one, other) < 1e-13
    other, unwanted = backend.attention_backward(grad, qkv, out, stats, *sequences, False)
    assert relative_error(other, dqkv) < 1e-13 and unwanted.shape == (0,)


@pytest.mark.parametrize(
    ("head_dim", "window", "dropout", "dtype"),
    [
        *in_turn((16, 1, 0.0), (64, 8, 0.3), (40, 64, 0.0)),
        *(
            pytest.param(64, 64, 0.0, *each.values, marks=[*each.marks, thorough] if thorough else each.marks)
            for each in in_turn(())
        ),
    ],
)
def test_training_packed_with_a_window(
    head_dim: int, window: int, dropout: float, dtype: torch.dtype, device: str
) -> None:
    """Sequences as long as the window and the tokens at its edges, and some that it skips whole blocks of."""
    lengths = [1, window + 1, window + 2, 0, 2 * window + 1, 3 * window + 70]
    check_training(lengths, 2, head_dim, dtype, device, None, dropout, window=window)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("kind", "window", "dtype"), in_turn(("right", 5), ("left", 20), ("holes", 2), ("all-masked row", 31))
)
def test_training_dense_with_a_window(kind: str, window: int, dtype: torch.dtype, device: str) -> None:
    """Tokens out of reach of all keys that take part are zeros."""
    check_training([97] * 3, 2, 32, dtype, device, make_mask(kind, 3, 97, device), 0.0, window=window)


def test_a_window_changes_no_bit_of_a_sequence_in_company(device: str) -> None:
    lengths, head_dim = [37, 300, 5, 170], 64
    q, k, v = make_qkv(sum(lengths), 2, head_dim, torch.float16, device)
    starts = cumulative(lengths, device)
    together = kernel.attention(q, k, v, starts, None, 300, 0.125, window=40)
    tiles = kernel.attention_tiles(starts, sum(lengths))
    assert torch.equal(kernel.attention(q, k, v, starts, None, 300, 0.125, None, tiles, 40), together)
    for one, *views in zip(*(t.split(lengths) for t in (together, q, k, v)), strict=True):
        assert torch.equal(kernel.attention(*views, None, None, len(one), 0.125, window=40), one)


@pytest.mark.parametrize("window", [0, 7, 64, 257])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["packed", "dense", "right", "holes"])
def test_training_of_the_cpu_with_a_window_is_the_oracle(layout: str, dropout: float, window: int) -> None:
    """Long sequences are cut; with dropout, of which each draws its own, by differences along a line."""
    lengths = [300, 1, 0, 129, 192] if layout == "packed" else [300] * 3
    mask = make_mask(layout, 3, 300, "cpu") if layout not in ("packed", "dense") else None
    qkv = torch.stack(make_qkv(sum(lengths), 2, 16, torch.float64, "cpu"), 1)
    starts = cumulative(lengths, "cpu") if layout == "packed" else None
    given = (starts, mask, 300, 0.25, dropout, torch.tensor([SEED]) if dropout else None)
    grad, along = (torch.randn(len(qkv), *rest, 2, 16, dtype=torch.float64) for rest in ((), (3,)))
    out, stats = cpu.attention_forward(qkv, *given, window=window)
    dqkv, _ = cpu.attention_backward(grad, qkv, out, stats, *given, window=window)
    if dropout:
        ahead, behind = (cpu.attention_forward(qkv + s * along, *given, window=window)[0] for s in (1e-6, -1e-6))
        slope = ((ahead - behind) / 2e-6 * grad).sum()
        assert relative_error((dqkv * along).sum()[None], slope[None]) < 1e-6
        return
    expected = reference.attention(*qkv.unbind(1), *given[:4], window=window)
    found = cpu.attention(*qkv.unbind(1), *given[:4], window=window)
    slopes, _ = reference.attention_backward(grad, qkv, out, stats, *given, window=window)
    for one, other in ((out, expected), (found, expected), (dqkv, slopes)):
        assert relative_error(one, other) < 1e-13


def test_a_windows_bias_has_no_gradient(device: str) -> None:
    qkv, bias = torch.randn(9, 3, 2, 16, device=device), torch.zeros(2, 17, device=device)
    layout = (None, None, 9, 0.25, 0.0, None, None, bias)
    out, stats = kernel.attention_forward(qkv, *layout, window=3)
    with pytest.raises(ValueError, match=r"^window is 3; expected None where the gradient of bias is wanted"):
        kernel.attention_backward(out, qkv, out, stats, *layout, window=3)


def test_training_with_all_dropped(device: str) -> None:
    qkv = torch.randn(9, 3, 2, 16, device=device)
    layout = (None, None, 9, 0.25, 1.0, torch.tensor([SEED], device=device))
    out, stats = kernel.attention_forward(qkv, *layout)
    assert out.eq(0).all()
    assert kernel.attention_backward(torch.ones_like(out), qkv, out, stats, *layout)[0].eq(0).all()


def test_training_by_seed(device: str) -> None:
    """The same seed gives the same bits, forward and backward; another seed, other ones."""
    qkv = torch.randn(20, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    ones = torch.ones(20, 2, 16, device=device)
    results = []
    for number in (SEED, SEED, SEED + 1, SEED + 2**32):  # in either half of Philox's key
        layout = (None, None, 20, 0.25, 0.5, torch.tensor([number], device=device))
        out, stats = kernel.attention_forward(qkv, *layout)
        results.append((out, kernel.attention_backward(ones, qkv, out, stats, *layout)[0]))
    first, same, *others = results
    for i in range(2):
        assert torch.equal(first[i], same[i])
        assert all(not torch.equal(first[i], other[i]) for other in others)


def test_training_with_strides_apart(device: str) -> None:
    """Rows of qkv any distance apart, heads that aren't side by side, and a gradient that was expanded."""
    qkv = torch.randn(21, 3, 2, 16, device=device)
    layout = (cumulative([9, 12], device), None, 12, 0.25, 0.5, torch.tensor([SEED], device=device))
    out, stats = kernel.attention_forward(qkv, *layout)
    apart = torch.full((21, 130), math.nan, device=device)[:, :96].view(21, 3, 2, 16)
    apart.copy_(qkv)
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones(1, 1, 1, device=device).expand(21, 2, 16)
    expected, _ = kernel.attention_backward(torch.ones_like(out), qkv, out, stats, *layout)
    for strided in (apart, turned):
        assert torch.equal(kernel.attention_forward(strided, *layout)[0], out)
        assert torch.equal(kernel.attention_backward(ones, strided, out, stats, *layout)[0], expected)


def test_training_refuses(device: str) -> None:
    qkv = torch.randn(8, 3, 2, 16, device=device)
    seed = torch.tensor([SEED], device=device)
    out, stats = kernel.attention_forward(qkv, None, None, 8, 0.25, 0.0, None)
    with pytest.raises(ValueError, match="qkv has shape"):
        kernel.attention_forward(qkv[:, :2], None, None, 8, 0.25, 0.0, None)
    with pytest.raises(ValueError, match="dropout is 1"):
        kernel.attention_forward(qkv, None, None, 8, 0.25, 1.5, seed)
    with pytest.raises(ValueError, match="seed"):
        kernel.attention_forward(qkv, None, None, 8, 0.25, 0.5, None)
    with pytest.raises(ValueError, match="grad has shape"):
        kernel.attention_backward(out[:4], qkv, out, stats, None, None, 8, 0.25, 0.0, None)


def test_training_without_rows(device: str) -> None:
    qkv = torch.randn(0, 3, 2, 16, device=device)
    layout = (cumulative([0], device), None, 0, 0.25, 0.0, None)
    out, stats = kernel.attention_forward(qkv, *layout)
    bias = torch.full((2, 5), math.nan, device=device)
    dqkv, dbias = kernel.attention_backward(out, qkv, out, stats, *layout, None, bias)
    assert dqkv.shape == (0, 3, 2, 16) and torch.equal(dbias, torch.zeros_like(bias))
