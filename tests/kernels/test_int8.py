"""int8 kernels and their twins: rounding against exact rationals, GEMMs against exact integers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import cpu, cpu_int8, linear_int8, quantize_int8, reference_int8
from fastbert.numerics import assert_within_policy
from fastbert.runtime import support
from tests.conftest import kernel_dtypes

BACKENDS = [reference_int8, cpu]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(t: int, k: int) -> Tensor:
    """Of all sizes, and around all sorts of means; of zeros, of one sign, and of one number."""
    x = (normal(t, k) + normal(t, 1, seed=1) * 3) * torch.logspace(-4, 4, t, dtype=torch.float64)[:, None]
    if t > 8:
        x[5], x[6], x[7], x[8] = 0, x[6].abs(), -x[7].abs(), 3.7
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_quantize(backend: Any, dtype: torch.dtype, smooth: bool) -> None:
    """Every number within half a step of what stands for it, 0 exact, and all of -128 to 127 in use."""
    x = rows(37, 80).clamp(-6e4, 6e4).to(dtype)
    factors = torch.exp2(normal(80, seed=2)).float() if smooth else None
    values, scale, zero = backend.quantize_int8(x, factors)
    assert (values.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    exact = x.float().double() if factors is None else (x.float() * factors).double()
    reach = exact.amax(1).clamp(min=0) - exact.amin(1).clamp(max=0)
    torch.testing.assert_close(scale.double(), reach.clamp(min=1e-30) / reference_int8.STEPS, rtol=1e-6, atol=0)
    back = (values.double() - zero[:, None]) * scale.double()[:, None]
    assert ((back - exact).abs() <= scale.double()[:, None] * 0.5001).all()
    assert zero.min() >= -128 and zero.max() <= 127
    assert not back[5].any()
    most, least = (pick(torch.cat([values.int(), zero[:, None]], 1), 1) for pick in (torch.amax, torch.amin))
    assert ((most - least >= 254) | ~exact.any(1)).all()


def test_the_extremes_of_a_row_fit() -> None:
    """Whatever its least and its largest number round to."""
    share = torch.linspace(0, 1, 20_001)
    x = torch.stack([-share, 1 - share, torch.zeros_like(share)], 1)
    for backend in BACKENDS:
        values, _, zero = backend.quantize_int8(x, None)
        exact = (x / (1 / reference_int8.STEPS)).round() + zero[:, None]
        assert torch.equal(values.float(), exact)  # none has been taken modulo 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_no_number(backend: Any) -> None:
    """Every output of such a row is NaN, and none of another row; of such a row of a weight, too."""
    x = normal(6, 64).float()
    x[1, 3], x[2, 5], x[3, 7] = math.nan, math.inf, -math.inf
    x[4, 2], x[4, 9] = math.inf, -math.inf
    args = product_args(x, normal(48, 64).float())
    out = backend.linear_int8(*args, torch.float32)
    assert out[1:5].isnan().all()
    assert out[0].isfinite().all() and out[5].isfinite().all()


def product_args(x: Tensor, weight: Tensor, limit: int | None = None, bias: Tensor | None = None) -> list[Any]:
    """x and a weight, quantized as the CPU has it."""
    limit = cpu_int8.weight_limit() if limit is None else limit
    scale = weight.abs().amax(1) / limit
    values = (weight / scale[:, None]).round().to(torch.int8)
    return [*reference_int8.quantize_int8(x, None), values, scale, values.sum(1, dtype=torch.int32), bias]


def exact(args: list[Any]) -> Tensor:
    """By integers, then float64."""
    x, row_scale, row_zero, weight, col_scale, _, bias = args
    total = (x.long() - row_zero.long()[:, None]) @ weight.long().t()
    y = total.double() * row_scale.double()[:, None] * col_scale.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 144, 64), (37, 100, 80), (129, 48, 208)])
def test_products(backend: Any, t: int, n: int, k: int, dtype: torch.dtype) -> None:
    """All epilogues: no further from exact integers than float32 of the same numbers, rounded once."""
    bias = normal(n, seed=1).float()
    args = product_args(normal(t, k).float(), normal(n, k, seed=n).float() / k**0.5, bias=bias)
    truth = exact(args)
    x, row_scale, row_zero, weight, col_scale, _, _ = args
    wide = F.linear((x - row_zero[:, None]).float() * row_scale[:, None], weight.float() * col_scale[:, None], bias)
    assert_within_policy(backend.linear_int8(*args, dtype), wide.to(dtype), truth, "linear_int8")
    residual = normal(t, n, seed=3).to(dtype)
    out = backend.linear_add_int8(*args, residual)
    assert_within_policy(out, (wide + residual).to(dtype), truth + residual.double(), "linear_add_int8")
    for approximate in ("none", "tanh"):
        out = backend.linear_gelu_int8(*args, dtype, approximate)
        quantized = backend.linear_gelu_quantize_int8(*args, dtype, approximate, None)
        assert all(map(torch.equal, quantized, backend.quantize_int8(out, None)))
        wide_gelu, true_gelu = (F.gelu(y, approximate=approximate) for y in (wide, truth))
        assert_within_policy(out, wide_gelu.to(dtype), true_gelu, f"linear_gelu_int8 {approximate}")
    assert reference_int8.linear_int8(*args, torch.float64).sub(truth).abs().max() < 1e-12


@pytest.mark.parametrize("k", [64, 1024, 4096])
@pytest.mark.parametrize("t", [1, 16, 150])
def test_the_worst_case_is_exact(t: int, k: int) -> None:
    """The largest inputs times the largest weights there may be here: where a library would saturate."""
    limit = cpu_int8.weight_limit()
    x = torch.full((t, k), 127, dtype=torch.int8)
    x[:, ::3] = -128
    x[t // 2 :] = -128
    weight = torch.randint(-limit, limit + 1, (64, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2, ::2] = limit, -limit, limit
    sums, ones = weight.sum(1, dtype=torch.int32), torch.ones(64)
    args = [x, torch.ones(t), torch.zeros(t, dtype=torch.int32), weight, ones, sums, None]
    truth = x.double() @ weight.double().t()
    # Sums beyond 2^24 are rounded to float32, once.
    assert torch.equal(cpu.linear_int8(*args, torch.float32), truth.float())
    assert torch.equal(reference_int8.linear_int8(*args, torch.float64), truth)


IN_A_NARROW_CPU = """
import torch
from fastbert.kernels import cpu_int8
cpu_int8.engine = lambda: "onednn"
worst = [cpu_int8._worst(cpu_int8._ENGINES["onednn"], limit) for limit in (127, 64)]
print(worst, cpu_int8.weight_limit())
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this CPU's torch has no oneDNN")
def test_a_cpu_that_saturates_has_weights_of_7_bits() -> None:
    """oneDNN held to AVX2, which adds up in 16 bits."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", IN_A_NARROW_CPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[False, True] 64"


@pytest.mark.parametrize("name", cpu_int8._ENGINES)
def test_what_torch_has_for_it_is_there(name: str) -> None:
    """torch's quantized tensors are to go (pytorch#184982): where this fails, their engine goes from `_ENGINES`."""
    if name == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this CPU's torch has no FBGEMM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_int8._worst(cpu_int8._ENGINES[name], 64)


@pytest.mark.skipif(cpu_int8.engine() != "onednn", reason="oneDNN does not multiply on this CPU")
@pytest.mark.parametrize("t", [1, 64])
def test_onednn_has_a_kernel_for_it(t: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Not its reference, which it falls back to without a word and which takes thousands of times as long."""
    args = product_args(normal(t, 256).float(), normal(128, 256, seed=1).float())
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        cpu.linear_int8(*args, torch.float32)
    told = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line and ",matmul," in line]
    assert told
    assert not any(",ref" in line for line in told), told


@pytest.mark.parametrize("name", cpu_int8._ENGINES)
def test_engines_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = product_args(normal(70, 96).float(), normal(48, 96, seed=1).float(), 64, normal(48, seed=2).float())
    monkeypatch.setattr(cpu_int8, "engine", lambda: name)
    found = cpu.linear_int8(*args, torch.float32)
    torch.testing.assert_close(found.double(), exact(args), rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(cpu_int8, "engine", lambda: None)  # of a CPU that has neither library
    torch.testing.assert_close(cpu.linear_int8(*args, torch.float32).double(), exact(args), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("at_once", [2**15, cpu_int8._AT_ONCE], ids=["in parts", "whole"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_row_is_the_same_in_any_batch(approximate: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: alone, among a few, and where rows are taken in parts."""
    x = normal(700, 128).float()
    monkeypatch.setattr(cpu_int8, "_AT_ONCE", at_once)
    assert len(list(cpu_int8._parts(700, 128))) == (1 if at_once > 2**15 else 3)
    weight, bias = normal(1024, 128, seed=1).float(), normal(1024, seed=2).float()
    args = product_args(x, weight, bias=bias)
    residual = normal(700, 1024, seed=3).float()
    whole = [
        cpu.linear_int8(*args, torch.float32),
        cpu.linear_gelu_int8(*args, torch.float32, approximate),
        cpu.linear_add_int8(*args, residual),
    ]
    half = cpu.linear_add_int8(*args, residual.bfloat16())
    normalized = cpu.layer_norm_int8(x, weight[0], bias[:128], 1e-5, None)
    factors = torch.exp2(normal(1024, seed=4)).float()
    raised = cpu.linear_gelu_quantize_int8(*args, torch.float32, approximate, factors)
    assert all(map(torch.equal, raised, cpu.quantize_int8(whole[1], factors)))
    for some in (slice(0, 1), slice(3, 20), slice(650, 700)):
        quantized = cpu.quantize_int8(x[some], None)
        assert all(map(torch.equal, quantized, (each[some] for each in args[:3])))
        own = [*quantized, *args[3:]]
        assert torch.equal(cpu.linear_int8(*own, torch.float32), whole[0][some])
        assert torch.equal(cpu.linear_gelu_int8(*own, torch.float32, approximate), whole[1][some])
        assert torch.equal(cpu.linear_add_int8(*own, residual[some]), whole[2][some])
        assert torch.equal(cpu.linear_add_int8(*own, residual[some].bfloat16()), half[some])
        found = cpu.layer_norm_int8(x[some], weight[0], bias[:128], 1e-5, None)
        assert all(torch.equal(mine, its[some]) for mine, its in zip(found, normalized, strict=True))
        found = cpu.linear_gelu_quantize_int8(*own, torch.float32, approximate, factors)
        assert all(map(torch.equal, found, (each[some] for each in raised)))


def test_layer_norm() -> None:
    """The normalized rows as `layer_norm` has them, and those quantized as `quantize_int8` has it."""
    x, weight, bias = normal(37, 48).float(), normal(48, seed=1).float(), normal(48, seed=2).float()
    factors = torch.exp2(normal(48, seed=4)).float()
    truth = F.layer_norm(x.double(), (48,), weight.double(), bias.double(), 1e-5)
    for module in BACKENDS:
        normalized, *quantized = module.layer_norm_int8(x, weight, bias, 1e-5, factors)
        assert_within_policy(normalized, F.layer_norm(x, (48,), weight, bias, 1e-5), truth)
        assert all(map(torch.equal, quantized, reference_int8.quantize_int8(normalized, factors)))


def test_packed_weights_go_with_the_weight() -> None:
    args = product_args(normal(4, 64).float(), normal(48, 64).float())
    before = len(cpu_int8._PACKED)
    cpu.linear_int8(*args, torch.float32)
    if cpu_int8.engine() is not None:
        assert len(cpu_int8._PACKED) == before + 1
        assert cpu_int8.packed_bytes(args[3]) == 48 * 64
    del args
    assert len(cpu_int8._PACKED) == before


@pytest.fixture
def int8_device(device: str) -> str:
    if device == "cuda" and support.int8_is_unsupported(torch.device(device)):
        pytest.skip("this GPU is none for int8")
    return device


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("smooth", [False, True])
def test_kernels_quantize_as_their_twins(smooth: bool, dtype: torch.dtype, int8_device: str) -> None:
    """Bitwise in the interpreter; on a device a number at a tie may be one off, by a multiply-add rounded once."""
    x = rows(37, 80).clamp(-6e4, 6e4).to(int8_device, dtype)
    x[1, 3], x[2, 5] = math.nan, math.inf
    factors = torch.exp2(normal(80, seed=2)).float().to(int8_device) if smooth else None
    apart = torch.full((37, 160), math.nan, dtype=dtype, device=int8_device)[:, :80].copy_(x)
    found = quantize_int8.quantize_int8(apart, factors)
    assert found[1][1:3].isnan().all()
    finite = torch.tensor([i not in (1, 2) for i in range(37)], device=int8_device)
    same(found, reference_int8.quantize_int8(x, factors), finite)

    weight, bias = normal(80, seed=1).to(int8_device, dtype), normal(80, seed=2).to(int8_device, dtype)
    normalized, *quantized = quantize_int8.layer_norm_int8(apart, weight, bias, 1e-5, factors)
    truth = F.layer_norm(x.double(), (80,), weight.double(), bias.double(), 1e-5)
    stock = F.layer_norm(x, (80,), weight, bias, 1e-5)
    assert_within_policy(normalized[finite], stock[finite], truth[finite])
    same(quantized, quantize_int8.quantize_int8(normalized, factors), finite)
    with pytest.raises(ValueError, match=r"^factors has shape \(79,\); expected \(80,\)"):
        quantize_int8.quantize_int8(x, weight.float()[1:])


def same(found: Any, expected: Any, which: Tensor) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == its.dtype
        if mine.device.type == "cpu":
            assert torch.equal(mine[which], its[which])
        else:
            assert (mine[which].double() - its[which].double()).abs().max() <= 1


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 144, 64), (37, 100, 80), (129, 48, 208)])
def test_kernels_multiply_as_their_twins(t: int, n: int, k: int, dtype: torch.dtype, int8_device: str) -> None:
    """Bitwise in the interpreter, but for GELU's own rounding; on a device multiply-adds are rounded once."""
    bias = normal(n, seed=1).to(dtype)
    args = product_args(normal(t, k).float(), normal(n, k, seed=n).float() / k**0.5, 127, bias)
    args[0][:1], args[3][:2] = -128, 127  # the largest sums
    args[5] = args[3].sum(1, dtype=torch.int32)
    args = [a.to(int8_device) for a in args]
    found = linear_int8.linear_int8(*args, dtype)
    expected = reference_int8.linear_int8(*args, dtype)
    truth = reference_int8.linear_int8(*args, torch.float64)
    residual = normal(t, n, seed=3).to(int8_device, dtype)
    added = linear_int8.linear_add_int8(*args, residual)
    if int8_device == "cpu" and dtype != torch.bfloat16:  # which the interpreter truncates to
        assert torch.equal(found, expected)
        assert torch.equal(added, reference_int8.linear_add_int8(*args, residual))
    if int8_device == "cuda" or dtype != torch.bfloat16:
        assert_within_policy(found, expected, truth)
        assert_within_policy(added, reference_int8.linear_add_int8(*args, residual), truth + residual.double())
    for approximate in ("none", "tanh"):
        out = linear_int8.linear_gelu_int8(*args, dtype, approximate)
        stock = reference_int8.linear_gelu_int8(*args, dtype, approximate)
        if int8_device == "cuda" or dtype != torch.bfloat16:
            assert_within_policy(out, stock, F.gelu(truth, approximate=approximate))
        factors = torch.exp2(normal(n, seed=4)).float().to(int8_device)
        quantized = linear_int8.linear_gelu_quantize_int8(*args, dtype, approximate, factors)
        assert all(map(torch.equal, quantized, quantize_int8.quantize_int8(out, factors)))


def test_kernels_refuse_what_they_cannot_take(int8_device: str) -> None:
    args = [a.to(int8_device) for a in product_args(normal(2, 32).float(), normal(48, 32).float(), bias=normal(48))]
    for place, bad, message in (
        (0, args[0].float(), r"^x has dtype torch.float32; expected torch.int8"),
        (1, args[1][:1], r"^row_scale has shape \(1,\); expected \(2,\)"),
        (5, args[5][:1], r"^col_sum has shape \(1,\); expected \(48,\)"),
        (3, args[3][:, :16], r"^weight has shape \(48, 16\); expected \(48, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_int8.linear_int8(*args[:place], bad, *args[place + 1 :], torch.float32)
    with pytest.raises(ValueError, match=r'^approximate is \'erf\'; expected "none" or "tanh"'):
        linear_int8.linear_gelu_int8(*args, torch.float32, "erf")
