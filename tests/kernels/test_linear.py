"""Linear layers, kernel and reference: against float64, no further from it than PyTorch's own in the same dtype."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, launch, reference
from fastbert.kernels import linear as kernel
from fastbert.numerics import assert_within_policy, relative_error
from tests.conftest import kernel_dtypes


def stock_qkv(x: Tensor, *weights_and_biases: Tensor | None) -> Tensor:
    pairs = zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True)
    return torch.stack([F.linear(x, weight, bias) for weight, bias in pairs], dim=1)


STOCK: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "linear_gelu": lambda x, weight, bias, approximate="none": F.gelu(
        F.linear(x, weight, bias), approximate=approximate
    ),
    "linear_add": lambda x, weight, bias, residual: F.linear(x, weight, bias) + residual,
    "qkv_linear": stock_qkv,
}
OPS = [("linear", ()), ("linear_gelu", ("none",)), ("linear_gelu", ("tanh",)), ("linear_add", ()), ("qkv_linear", ())]
OP_NAMES = ["-".join((op, *rest)) for op, rest in OPS]


def make_args(
    op: str, t: int, n: int, k: int, dtype: torch.dtype, device: str, bias: bool = True
) -> list[Tensor | None]:
    """Arguments of `op` up to the residual: x and weights scaled so that pre-activations have a deviation around 1."""
    generator = torch.Generator().manual_seed(t * 10000 + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    args: list[Tensor | None] = [normal(t, k)]
    for _ in range(3 if op == "qkv_linear" else 1):
        args += [(normal(n, k) / k**0.5), normal(n) if bias else None]
    return args + ([normal(t, n)] if op == "linear_add" else [])


def check(module: object, op: str, args: list[Tensor | None], rest: tuple[str, ...] = ()) -> Tensor:
    """Holds `op` of `module` to the policy on these arguments, and returns its result."""
    out: Tensor = getattr(module, op)(*args, *rest)
    assert out.is_contiguous() or module is cpu or op == "qkv_linear"
    truth = STOCK[op](*(a if a is None else a.double() for a in args), *rest)
    assert_within_policy(out, stock_of(op, args, rest, truth), truth, what=op)
    return out


COMPANY = 2048
"""Rows with which cuBLAS has no reason to split K."""


def stock_of(op: str, args: list[Tensor | None], rest: tuple[str, ...], truth: Tensor) -> Tensor:
    """What stock makes of these rows, which sets the bound; on a GPU in float32, alone or in company, the less exact.

    cuBLAS adds a row's products up in another order for every number of rows: of one row, or few, in many partial sums,
    whose error is a fraction of that of a sum in one go, which it makes of many. A kernel that gives a row the same
    bits in any company has one error for all of them, and is held to the largest that stock has for that very row: at K
    4096, 1.62e-7 against a limit of 1.48e-7 to 1.59e-7 by one row's luck. In 16 bits the rounding of the result hides
    the order, and on a CPU the interpreter's sums are exact: there the bound is that of the call itself.
    """
    own = STOCK[op](*args, *rest)
    x = args[0]
    assert x is not None
    if not by_cublas(own) or own.dtype != torch.float32 or not 0 < x.shape[0] < COMPANY:
        return own
    return less_exact(op, args, rest, truth, own)


def by_cublas(result: Tensor) -> bool:
    return result.is_cuda


def less_exact(op: str, args: list[Tensor | None], rest: tuple[str, ...], truth: Tensor, own: Tensor) -> Tensor:
    """Of `own` and what stock makes of the same rows among COMPANY, repeated, the one further from the truth."""
    many = list(args)
    for i in (0, 3) if op == "linear_add" else (0,):
        rows = args[i]
        assert rows is not None
        many[i] = rows.repeat(-(-COMPANY // rows.shape[0]), 1)[:COMPANY]
    other = STOCK[op](*many, *rest)[: own.shape[0]]
    return max(own, other, key=lambda result: relative_error(result, truth))


def in_partial_sums(x: Tensor, weight: Tensor, bias: Tensor | None = None, split: int = 1) -> Tensor:
    """F.linear in float32, K in `split` parts, each added up one product after another."""
    products = x[:, None] * weight  # [t, n, k]
    parts = products.view(*products.shape[:2], split, -1).unbind(-1)
    out = functools.reduce(torch.add, functools.reduce(torch.add, parts).unbind(-1))
    return out if bias is None else out + bias


def test_one_row_is_held_to_stocks_error_for_that_row_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stock that splits K for few rows, as cuBLAS does: a sum in one go passes; one further off does not."""
    monkeypatch.setitem(STOCK, "linear", lambda *args: in_partial_sums(*args, split=64 if len(args[0]) < 64 else 1))
    monkeypatch.setattr(sys.modules[__name__], "COMPANY", 64)
    monkeypatch.setattr(sys.modules[__name__], "by_cublas", lambda result: True)
    args = make_args("linear", 1, 24, 4096, torch.float32, "cpu", bias=False)
    truth = F.linear(args[0].double(), args[1].double())
    alone, fused = STOCK["linear"](*args), in_partial_sums(*args)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_within_policy(fused, alone, truth)
    stock = stock_of("linear", args, (), truth)
    assert_within_policy(fused, stock, truth)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_within_policy((truth + 1.5 * (fused - truth)).float(), stock, truth)
    # Where the call itself is the less exact, it stays what sets the bound.
    assert less_exact("linear", args, (), truth, fused) is fused or torch.equal(stock, fused)
    worse = (truth + 3 * (fused - truth)).float()
    assert less_exact("linear", args, (), truth, worse) is worse


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 384, 64), (37, 100, 70), (129, 144, 48)])
def test_kernel(op: str, rest: tuple[str, ...], t: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(kernel, op, make_args(op, t, n, k, dtype, device), rest)


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_kernel_along_a_wide_row(dtype: torch.dtype, device: str) -> None:
    check(kernel, "linear_add", make_args("linear_add", 3, 128, 1024, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
@pytest.mark.parametrize("t", [1, 37, 128, 129, 1000])
def test_kernel_at_the_shapes_of_models(
    op: str, rest: tuple[str, ...], t: int, dtype: torch.dtype, device: str
) -> None:
    for n, k in ((384, 384), (1536, 384), (1024, 1024), (4096, 1024), (1024, 4096)):
        check(kernel, op, make_args(op, t, n, k, dtype, device), rest)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(device: str) -> None:
    """(T, 3 N) of more than 2^31 elements: int32 offsets would wrap."""
    t, n, k = 2**31 // (3 * 1024) + 1000, 1024, 16
    args = make_args("qkv_linear", 64, n, k, torch.bfloat16, device)
    x = torch.zeros(t, k, dtype=torch.bfloat16, device=device)
    x[-64:] = args[0]
    out = kernel.qkv_linear(x, *args[1:])
    assert torch.equal(out[-64:], kernel.qkv_linear(*args))
    assert torch.equal(out[0], torch.stack(args[2::2]))


@pytest.mark.parametrize("op", STOCK)
@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_without_bias(dtype: torch.dtype, op: str, device: str) -> None:
    check(kernel, op, make_args(op, 37, 48, 64, dtype, device, bias=False))


def test_qkv_with_a_bias_on_some(device: str) -> None:
    args = make_args("qkv_linear", 37, 48, 64, torch.float32, device)
    check(kernel, "qkv_linear", [*args[:4], None, *args[5:]])
    check(kernel, "qkv_linear", [args[0], args[1], None, *args[3:]])


@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_rows_apart(dtype: torch.dtype, device: str) -> None:
    """x and residual whose rows lie further apart than they are wide; what is between is not read."""
    x, weight, bias, residual = make_args("linear_add", 37, 48, 64, dtype, device)
    apart = [torch.full((37, 96), math.nan, dtype=dtype, device=device)[:, :width] for width in (64, 48)]
    apart[0].copy_(x)
    apart[1].copy_(residual)
    out = check(kernel, "linear_add", [apart[0], weight, bias, apart[1]])
    assert torch.equal(out, kernel.linear_add(x, weight, bias, residual))


def test_columns_apart(device: str) -> None:
    """Tensors that aren't contiguous in the last dimension are copied, not misread."""
    x, weight, bias, residual = make_args("linear_add", 37, 48, 64, torch.float32, device)
    transposed = [a.t().contiguous().t() for a in (x, weight, residual)]
    bias_apart = bias.repeat_interleave(2)[::2]
    out = kernel.linear_add(transposed[0], transposed[1], bias_apart, transposed[2])
    assert torch.equal(out, kernel.linear_add(x, weight, bias, residual))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's, where exp gives inf
@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_far_from_zero(approximate: str, dtype: torch.dtype, device: str) -> None:
    x, weight, _ = make_args("linear_gelu", 37, 48, 64, dtype, device)
    for magnitude in (30.0, 1e4) if dtype == torch.float16 else (30.0, 1e4, 1e15):
        out = check(kernel, "linear_gelu", [x * magnitude, weight, None], (approximate,))
        assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_gelu_near_every_number(dtype: torch.dtype, device: str) -> None:
    """Within the policy on every stretch, the far end below zero too, where results are thousandths; NaN stays NaN."""
    x = torch.linspace(-5.0, 5.0, 64 * 16).to(device, dtype).view(64, 16)
    out = kernel.linear_gelu(x, torch.eye(16, dtype=dtype, device=device), None)
    for rows in range(0, 64, 4):
        part, truth = x[rows : rows + 4], F.gelu(x[rows : rows + 4].double())
        assert_within_policy(out[rows : rows + 4], F.gelu(part), truth, f"GELU from {part.min()}")
    bias = torch.tensor([math.nan, math.inf] * 8, dtype=dtype, device=device)
    out = kernel.linear_gelu(torch.zeros_like(x), torch.zeros(16, 16, dtype=dtype, device=device), bias)
    assert out[:, 0].isnan().all()
    assert out[:, 1].eq(math.inf).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", kernel_dtypes)
def test_overflow_is_where_stock_overflows(dtype: torch.dtype, device: str) -> None:
    """16 * 5000 is more than float16 holds and is infinite there; nothing else is."""
    x = torch.ones(2, 16, dtype=dtype, device=device)
    x[1] = -1.0
    weight = torch.full((3, 16), 5000.0, dtype=dtype, device=device)
    assert torch.equal(kernel.linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("op", STOCK)
def test_a_row_is_bitwise_the_same_in_any_company(op: str, dtype: torch.dtype, device: str) -> None:
    args = make_args(op, 150, 48, 70, dtype, device)
    together = getattr(kernel, op)(*args)
    # The interpreter multiplies by BLAS, whose rounding depends on a row's place in the tile: there, rows keep theirs.
    moved = ((140, 150), (3, 131), (100, 116)) if device == "cuda" else ()
    for start, stop in ((0, 1), (128, 150), *moved):
        part = list(args)
        for i in (0, 3) if op == "linear_add" else (0,):
            part[i] = args[i][start:stop]
        assert torch.equal(getattr(kernel, op)(*part), together[start:stop])
    args[0][:70] = 1e3
    assert torch.equal(getattr(kernel, op)(*args)[70:], together[70:])


@pytest.mark.parametrize("config", dict.fromkeys(c for tiles in launch.LINEAR_TILES.values() for c in tiles), ids=str)
def test_every_tile(config: launch.Config, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "linear_config", lambda *_: config)
    check(kernel, "linear_gelu", make_args("linear_gelu", 37, 144, 160, torch.float16, device), ("none",))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the name of every kernel launched from here on."""
    names: list[str] = []
    for name in ("linear_kernel", "linear_persistent_kernel"):
        run = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, Recorded(run, names))
    return names


class Recorded:
    """A kernel that tells when it is launched."""

    def __init__(self, kernel: Any, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid: Any) -> Any:
        self.names.append(self.kernel.__name__)
        return self.kernel[grid]


PERSISTENT = launch.Config(64, 32, 32, 4, 3, variant="persistent", group_m=2, programs=1)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
def test_persistent(
    op: str,
    rest: tuple[str, ...],
    programs: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
) -> None:
    """Programs that walk through tiles of one and three segments; rows, columns and k end inside a tile."""
    config = dataclasses.replace(PERSISTENT, programs=programs)
    monkeypatch.setattr(launch, "linear_config", lambda *_: config)
    args = make_args(op, 150, 72, 40, dtype, device)
    check(kernel, op, args, rest)
    apart = torch.full((150, 48), math.nan, dtype=dtype, device=device)[:, :40]
    check(kernel, op, [apart.copy_(args[0]), *args[1:]], rest)
    assert launched == ["linear_persistent_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_descriptors_cannot_read_goes_by_pointers(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """In the tiles for rows at any address, which are compiled for that; so does what would spill."""
    monkeypatch.setattr(launch, "linear_config", lambda *_: PERSISTENT)
    used: list[dict[str, Any]] = []
    run = kernel.linear_kernel

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: (used.append(options), run[grid](*args, **options))

    monkeypatch.setattr(kernel, "linear_kernel", Watched())
    x, weight, bias = make_args("linear", 9, 48, 64, dtype, device)
    shifted = torch.full((9 * 64 + 1,), math.nan, dtype=dtype, device=device)[1:].view(9, 64)
    apart = torch.full((9, 65), math.nan, dtype=dtype, device=device)[:, :64]
    for each in (shifted.copy_(x), apart.copy_(x), x[:1].expand(9, 64)):
        check(kernel, "linear", [each, weight, bias])
    check(kernel, "linear", make_args("linear", 9, 48, 68, dtype, device))
    assert launched == ["linear_kernel"] * 4
    large = launch.Config(128, 128, 32, 4, 3)
    monkeypatch.setattr(launch, "linear_config", lambda *_: large)
    for each in (x, shifted):
        check(kernel, "linear", [each, weight, bias])

    def tile(config: launch.Config) -> tuple[int, ...]:
        return config.block_m, config.block_n, config.block_k, config.num_warps

    found = [tuple(each[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")) for each in used]
    last = [tile(large), tile(launch.UNALIGNED if dtype == torch.float16 else large)]
    assert found == [tile(launch.UNALIGNED)] * 4 + last


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_persistent_feed_forward(gelu: str, device: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(launch, "linear_config", lambda *_: PERSISTENT)
    check_training(kernel, make_feed_forward(37, 64, 160, torch.float16, device, True), gelu)
    assert set(launched) == {"linear_persistent_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_by_library(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Every epilogue of the kernels, after PyTorch's GEMMs."""
    monkeypatch.setattr(launch, "linear_config", lambda *_: dataclasses.replace(PERSISTENT, variant=launch.LIBRARY))
    for (op, rest), bias in itertools.product(OPS, (True, False)):
        check(kernel, op, make_args(op, 37, 72, 40, dtype, device, bias), rest)
    x, w1, b1, w2, b2 = make_feed_forward(37, 64, 160, dtype, device, True)
    out, pre = kernel.feed_forward(x, w1, b1, w2, b2, "none")
    assert torch.equal(pre, F.linear(x, w1, b1))
    assert torch.equal(out, F.linear(F.gelu(pre), w2, b2))
    assert not launched


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
def test_a_row_is_the_same_in_every_tile(
    op: str, rest: tuple[str, ...], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, by pointers and by descriptors: only so may the number of rows decide on the tile."""
    arch = launch.architecture(torch.device(device))
    if arch not in launch.LINEAR_TILES:
        pytest.skip("one tile a weight")
    for n, k in ((1024, 1024), (1024, 4096), (384, 1040)):
        args, results = make_args(op, 300, n, k, dtype, device), []
        for config in (*launch.LINEAR_TILES[arch], *launch.LINEAR_CANDIDATES.get(arch, ()), launch.UNALIGNED):
            monkeypatch.setattr(launch, "linear_config", lambda *_, config=config: config)
            results.append(getattr(kernel, op)(*args, *rest))
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
def test_rows_beyond_whole_waves_take_a_launch_of_their_own(
    op: str,
    rest: tuple[str, ...],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
) -> None:
    """And come out where they belong, with their own residual."""
    monkeypatch.setattr(launch, "SPLIT_ROWS", 100)
    monkeypatch.setattr(launch, "linear_config", lambda *given: PERSISTENT if given[5] > 64 else launch.UNALIGNED)
    monkeypatch.setattr(launch, "full_waves", lambda config, *given: 128 if given[5] == 192 else given[5])
    args = make_args(op, 150, 72, 48, dtype, device)
    check(kernel, op, args, rest)
    assert launched == ["linear_persistent_kernel", "linear_kernel"]
    launched.clear()
    x, w1, b1, w2, b2 = make_feed_forward(150, 64, 160, dtype, device, True)
    check_training(kernel, [x, w1, b1, w2, b2], "none")
    assert launched[:4] == ["linear_persistent_kernel", "linear_kernel"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
def test_a_row_is_the_same_beyond_whole_waves(op: str, rest: tuple[str, ...], device: str) -> None:
    """Bitwise, in whichever of the two launches, and alone."""
    args = make_args(op, 21222, 1024, 1024, torch.bfloat16, device)
    together = getattr(kernel, op)(*args, *rest)
    for rows in (slice(0, 128), slice(21000, 21222), slice(21121, 21122), slice(21221, 21222)):
        part = [arg[rows] if arg is not None and len(arg) == 21222 else arg for arg in args]
        assert torch.equal(getattr(kernel, op)(*part, *rest), together[rows])


def cycles(config: launch.Config, arch: str, rows: int, n: int, k: int, segments: int = 1) -> float:
    rates = launch.RATES[launch.LIKE.get(arch, arch)]
    return launch.tile_cycles(config, rates, rows, n, k, segments, launch.MULTIPROCESSORS[arch])


SHAPES = ((1024, 1024, 3), (4096, 1024, 1), (1024, 4096, 1), (1024, 1024, 1), (384, 1536, 1))


@pytest.mark.parametrize("arch", launch.LINEAR_TILES)
def test_the_tile_is_chosen_at_the_exact_rows(arch: str) -> None:
    """None of the others is faster by more than the model can tell; few rows take smaller ones, to have enough."""
    multiprocessors = launch.MULTIPROCESSORS[arch]
    for n, k, segments in SHAPES:
        for rows in (1, 64, 100, 300, 1000, 3000, 8192, 21222, 65536):
            config = launch.linear_config(arch, torch.float16, n, k, segments, rows)
            best = min(cycles(tile, arch, rows, n, k, segments) for tile in launch.LINEAR_TILES[arch])
            assert cycles(config, arch, rows, n, k, segments) <= launch.SLACK * best
            assert config == launch.linear_config(arch, torch.bfloat16, n, k, segments, rows, multiprocessors)
        few, many = (launch.linear_config(arch, torch.float16, n, k, segments, rows) for rows in (64, 65536))
        assert 4 * few.block_m * few.block_n <= many.block_m * many.block_n
        alone = launch.linear_config(arch, torch.float32, n, k, segments, 64)
        assert alone == launch.linear_config(arch, torch.float32, n, k, segments, 65536)


def test_the_cycles_of_tiles() -> None:
    """By hand: 100 SMs of 1,024 multiply-adds, a tile of 128 x 128 x 1000: 16,000 clocks, and 256 x 1000 x 2 bytes."""
    rates = launch.Rates(1024, 64, 64 << 10, fill_bytes=128, start=1000, finish=0.125, launch=0)
    tile = launch.Config(128, 128, 32, 4, 4)  # 64 KiB: alone on its SM
    ends = 1000 + 128 * 128 / 8

    def cycles(rows: int, columns: int, rates: launch.Rates = rates, config: launch.Config = tile) -> float:
        return launch.tile_cycles(config, rates, 128 * rows, 128 * columns, 1000, 1, 100)

    assert cycles(1, 1) == cycles(10, 10) == cycles(9, 11) == 16000 + ends
    assert cycles(101, 1) == cycles(20, 10) == 2 * (16000 + ends)
    assert launch.tile_cycles(tile, rates, 1, 128, 1000, 100, 100) == 16000 + ends
    assert launch.tile_cycles(tile, rates, 1, 129, 1000, 100, 100) == 2 * (16000 + ends)  # a column of each segment
    assert launch.tile_cycles(tile, rates, 128, 128, 1000, 1, 100, itemsize=1) == 8000 + ends
    # By the cache: a full wave at 16 bytes a clock and SM; a tile alone at 128, 50 at 32.
    slow = rates._replace(l2_bytes=16)
    assert cycles(10, 10, slow) == 32000 + ends
    assert (cycles(101, 1, slow), cycles(15, 10, slow)) == (48000 + 2 * ends, 48000 + 2 * ends)
    assert cycles(10, 19, slow) == pytest.approx(32000 + 512000 / (1600 / 90) + 2 * ends)
    # Two programs an SM have their ends together; a persistent one starts once; pointers may be slower.
    assert cycles(20, 10, rates._replace(shared_bytes=128 << 10)) == 2 * 16000 + ends
    persistent = dataclasses.replace(tile, variant="persistent")
    assert cycles(20, 10, config=persistent) == 2 * (16000 + ends) - 1000
    assert cycles(20, 10, rates._replace(pointers=0.5)) == 2 * (32000 + ends)
    assert cycles(20, 10, rates._replace(pointers=0.5), persistent) == 2 * (16000 + ends) - 1000


@pytest.mark.parametrize("arch", launch.LINEAR_TILES)
def test_few_kernels_are_compiled_for_a_weight(arch: str) -> None:
    """Whatever the rows: no more tiles than are in the table; and rows of one 64 share a choice."""
    for n, k, segments in SHAPES:
        chosen = {launch.linear_config(arch, torch.float16, n, k, segments, rows) for rows in range(64, 40000, 64)}
        assert chosen <= set(launch.LINEAR_TILES[arch])
    assert [launch.round_rows(m) for m in (1, 64, 65, 21222)] == [64, 64, 128, 21248]
    assert [launch.row_class(m) for m in (1, 64, 65, 300, 10**6)] == [64, 64, 128, 512, launch.MANY_ROWS]


def test_many_rows_on_hopper_go_through_descriptors() -> None:
    for n, k, segments in SHAPES[:4]:
        assert launch.linear_config("sm_90", torch.bfloat16, n, k, segments, 21222).variant == "persistent"
        assert launch.linear_config("sm_90", torch.bfloat16, n, k, segments, 128).variant == ""
    assert launch.linear_config("sm_90", torch.bfloat16, 1000, 1024, 1, 21222) == launch.UNALIGNED
    assert launch.linear_config("sm_90", torch.float32, 1024, 1024, 1, 21222).variant == ""


def test_whole_waves() -> None:
    """The headline, of 166 rows of 128: 132 SMs are full after 165, for 4, 12 and 16 tiles a row."""

    def first(n: int, k: int, segments: int, rows: int, multiprocessors: int = 132, dtype: Any = torch.bfloat16) -> int:
        config = launch.linear_config("sm_90", dtype, n, k, segments, rows, multiprocessors)
        return launch.full_waves(config, "sm_90", dtype.itemsize, n, k, segments, rows, multiprocessors)

    for n, k, segments in SHAPES[:4]:
        assert first(n, k, segments, 21222) == first(n, k, segments, launch.round_rows(21222)) == 165 * 128
        assert first(n, k, segments, 165 * 128) == 165 * 128
    assert first(1024, 1024, 1, 166 * 128, 166) == 166 * 128  # four waves
    assert first(1024, 1024, 1, 197 * 128) == 197 * 128  # 4 tiles are missing in the last wave, not 128
    assert first(1024, 1024, 1, 21222, dtype=torch.float32) == 21222
    assert first(1000, 1024, 1, 21222) == 21222
    library = dataclasses.replace(PERSISTENT, variant=launch.LIBRARY)
    assert launch.full_waves(library, "sm_90", 2, 1024, 1024, 1, 21222, 132) == 21222
    assert launch.full_waves(launch.Config(128, 256, 64, 8, 4), "sm_100", 2, 1024, 1024, 1, 21222, 148) == 21222
    config = launch.linear_fp8_config("sm_90", 1024, 4096, 21222, 132)
    assert launch.full_waves(config, "sm_90", 1, 1024, 4096, 1, 21222, 132) == 165 * 128


def test_the_library_is_for_those_who_ask() -> None:
    """A row of cuBLAS's depends on its batch: neither a table nor what was tuned brings it in by itself."""
    key = ("linear", "sm_90", torch.bfloat16, 1024, 4096, 1, launch.MANY_ROWS)
    launch.use({}, library=[key])
    try:
        for allowed in (False, True):
            found = {
                shape: launch.linear_config("sm_90", torch.bfloat16, *shape, 132, not allowed).variant
                for shape in (
                    (1024, 1024, 3, 21222),
                    (1024, 4096, 1, 21222),
                    (1024, 4096, 1, 300),
                    (4096, 1024, 1, 21222),
                )
            }
            by_library = [shape for shape, variant in found.items() if variant == launch.LIBRARY]
            assert by_library == ([(1024, 1024, 3, 21222), (1024, 4096, 1, 21222)] if allowed else [])
        assert launch.linear_config("sm_90", torch.float32, 1024, 1024, 3, 21222, 132, False).variant == ""
    finally:
        launch.use({})
    assert launch.linear_config("sm_90", torch.bfloat16, 1024, 4096, 1, 21222, 132, False).variant == "persistent"


@pytest.mark.parametrize("op", ["qkv_linear", "linear_add"])
def test_batch_invariance_is_given_up_by_one_call(op: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(launch, "linear_config", lambda *given: (asked.append(given[-1]), PERSISTENT)[1])
    args = make_args(op, 9, 48, 64, torch.float16, device)
    try:
        for enabled in (True, False, True):
            launch.set_batch_invariant(enabled)
            getattr(kernel, op)(*args)
    finally:
        launch.set_batch_invariant(True)
    assert asked == [True, False]  # the first is kept
    with pytest.raises(TypeError, match="enabled is 1; expected True or False"):
        launch.set_batch_invariant(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", STOCK)
def test_no_rows(op: str, device: str) -> None:
    args = make_args(op, 0, 48, 64, torch.float32, device)
    assert getattr(kernel, op)(*args).shape == STOCK[op](*args).shape


@pytest.mark.parametrize(
    ("op", "wrong", "shape", "message"),
    [
        ("linear", 1, (48, 63), "weight"),
        ("linear", 2, (47,), "bias"),
        ("linear_gelu", 2, (48, 1), "bias"),
        ("linear_add", 3, (36, 48), "residual"),
        ("qkv_linear", 3, (47, 64), "weight"),
        ("qkv_linear", 6, (1,), "bias"),
    ],
)
def test_wrong_shapes_are_refused(op: str, wrong: int, shape: tuple[int, ...], message: str, device: str) -> None:
    args = make_args(op, 37, 48, 64, torch.float32, device)
    args[wrong] = torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=message):
        getattr(kernel, op)(*args)


def test_another_gelu_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="approximate"):
        kernel.linear_gelu(*make_args("linear_gelu", 1, 48, 64, torch.float32, device), approximate="sigmoid")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_shape_has_a_configuration(arch: str, dtype: torch.dtype) -> None:
    for n in (1, 100, 384, 1024, 4096, 30522):
        config = launch.linear_config(arch, dtype, n, 1024)
        assert min(config.block_m, config.block_n, config.block_k) >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("op", "rest"), OPS, ids=OP_NAMES)
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_twins(module: Any, op: str, rest: tuple[str, ...], bias: bool, dtype: torch.dtype) -> None:
    for t, n, k in ((1, 384, 128), (37, 100, 70), (129, 384, 384), (0, 48, 64)):
        check(module, op, make_args(op, t, n, k, dtype, "cpu", bias), rest)


def plain_feed_forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gelu: str) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=gelu), w2, b2)


def make_feed_forward(t: int, k: int, i: int, dtype: torch.dtype, device: str, bias: bool) -> list[Tensor | None]:
    x, w1, b1 = make_args("linear", t, i, k, dtype, device, bias)
    _, w2, b2 = make_args("linear", t + 1, k, i, dtype, device, bias)
    return [x, w1, b1, w2, b2]


def check_training(module: object, args: list[Tensor | None], gelu: str) -> None:
    """Holds a feed-forward, and the gradients of what its GELU is taken of and of its second weight, to the policy."""
    out, pre = module.feed_forward(*args, gelu)
    x, w1, b1, w2, _ = args
    assert torch.equal(pre, module.linear(x, w1, b1))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    dpre, act = module.linear_gelu_backward(grad, w2, pre, gelu)
    results = []
    for convert in (lambda t: t, lambda t: None if t is None else t.double()):
        leaf = convert(pre).clone().requires_grad_()
        plain = F.gelu(leaf, approximate=gelu)
        (gradient,) = torch.autograd.grad(plain, leaf, convert(grad) @ convert(w2))
        whole = plain_feed_forward(*(convert(a) for a in args), gelu)
        results.append((whole, gradient, plain.detach()))
    for name, mine, stock, truth in zip(("out", "dpre", "act"), (out, dpre, act), *results, strict=True):
        assert_within_policy(mine, stock, truth, name)


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize(("t", "k", "i", "bias"), [(37, 64, 160, True), (129, 128, 256, False), (5, 100, 70, True)])
def test_training_kernel(t: int, k: int, i: int, bias: bool, gelu: str, dtype: torch.dtype, device: str) -> None:
    check_training(kernel, make_feed_forward(t, k, i, dtype, device, bias), gelu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_training_twins(module: Any, gelu: str, dtype: torch.dtype) -> None:
    check_training(module, make_feed_forward(37, 128, 256, dtype, "cpu", True), gelu)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_the_derivative_has_the_right_limits(gelu: str, device: str) -> None:
    pre = torch.tensor([[-65504.0, -100.0, -20.0, 0.0, 20.0, 100.0, 65504.0] * 16], device=device)
    dpre, act = kernel.linear_gelu_backward(
        torch.ones(1, 16, device=device), torch.eye(16, 112, device=device), pre, gelu
    )
    limits = torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=device)
    assert torch.equal(dpre[0, :7], limits)
    assert torch.equal(act, pre.clamp(min=0) + 0.0)


@pytest.mark.parametrize("op", ["linear", "linear_gelu", "qkv_linear", "feed_forward", "linear_gelu_backward"])
def test_weights_are_rounded_to_the_dtype_of_the_input(op: str, device: str) -> None:
    """As under autocast: 16-bit activations, float32 parameters."""
    args = make_feed_forward(9, 64, 64, torch.float32, device, True)
    call = {
        "linear": (args[0], args[1], args[2]),
        "linear_gelu": (args[0], args[1], args[2], "none"),
        "qkv_linear": (args[0], *args[1:3], *args[1:3], *args[3:5]),
        "feed_forward": (*args, "none"),
        "linear_gelu_backward": (args[0], args[1], args[0], "none"),
    }[op]
    rounded = tuple(a.half() if isinstance(a, Tensor) else a for a in call)
    activations = 3 if op == "linear_gelu_backward" else 1
    mixed = tuple(a.half() if isinstance(a, Tensor) and (i != 1 and i < activations) else a for i, a in enumerate(call))
    expected, found = (getattr(kernel, op)(*each) for each in (rounded, mixed))
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, found)), strict=True):
        assert a.dtype == b.dtype == torch.float16
        assert torch.equal(a, b)


def test_training_refuses_wrong_shapes(device: str) -> None:
    x, w1, b1, w2, b2 = make_feed_forward(9, 64, 32, torch.float32, device, True)
    with pytest.raises(ValueError, match="approximate"):
        kernel.feed_forward(x, w1, b1, w2, b2, "erf")
    with pytest.raises(ValueError, match="weight has shape"):
        kernel.linear_gelu_backward(x, w1.t()[:, :5], torch.zeros(9, 32, device=device), "none")
