"""FP8 kernels and their twins: rounding against a search of all numbers, GEMMs against float64 of what was
quantized."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import attention, cpu, launch, linear_fp8, quantize_fp8, reference, reference_fp8
from fastbert.numerics import SLACK, assert_within_policy
from tests.conftest import kernel_dtypes, thorough

BACKENDS = [reference_fp8, pytest.param(None, id="kernel")]
CODES = torch.arange(256, dtype=torch.uint8)
VALUES = CODES.view(torch.float8_e4m3fn).double()


@pytest.fixture(autouse=True)
def needs_fp8(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 numbers")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """e4m3 codes of finite float64 numbers, by comparison with every code there is; ties go to the even one."""
    positive = VALUES[:127]
    distance = (x.abs().clamp(max=448)[..., None] - positive).abs()
    tied = distance == distance.amin(-1, keepdim=True)
    even = (tied & (CODES[:127] % 2 == 0)).any(-1)
    code = torch.where(even, (tied & (CODES[:127] % 2 == 0)).int().argmax(-1), tied.int().argmax(-1))
    return (code + 128 * torch.signbit(x)).to(torch.uint8)


def quantize(backend: Any, x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = (backend or quantize_fp8).quantize_fp8(x, scale)
    assert result[0].dtype == torch.float8_e4m3fn
    return result


def same_codes(a: Tensor, b: Tensor) -> bool:
    """Bitwise, but for the sign of NaN."""
    codes = (x.cpu().view(torch.uint8) for x in (a, b))
    return torch.equal(*(torch.where(code & 0x7F == 0x7F, 0x7F, code) for code in codes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_round_trips(backend: Any, device: str) -> None:
    """What e4m3 holds comes back by a scale of 1; halfway between two of them, the even one; beyond 448, 448."""
    finite = VALUES[VALUES.isfinite()]
    out, scales = quantize(backend, finite.float().to(device)[None], 1.0)
    assert torch.equal(out.cpu().double()[0], finite)
    assert scales.shape == (0,)
    above = VALUES[:126]
    between = torch.cat([above, -above]) + torch.cat([VALUES[1:127] - above, above - VALUES[1:127]]) / 2
    for x in (between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor([460.0, -1e4, 448.0, 464.0])):
        out, _ = quantize(backend, x.float().to(device)[None], 1.0)
        assert torch.equal(out.cpu().view(torch.uint8)[0], nearest(x.float().double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_quantize(backend: Any, scale: float | None, dtype: torch.dtype, device: str) -> None:
    x = (normal(37, 70) * torch.logspace(-3, 3, 37, dtype=torch.float64)[:, None]).to(device, dtype)
    x[5] = 0
    out, scales = quantize(backend, x, scale)
    exact = x.cpu().double()
    if scale is None:
        largest = x.cpu().float().abs().amax(1).clamp(min=1e-30)
        assert torch.equal(scales.cpu(), largest / 448)
        inverse = 448 / largest
        assert (out.cpu().float().abs().amax(1)[exact.any(1)] == 448).all()
        assert not out[5].float().any()
    else:
        inverse = torch.full((37,), 1 / scale)
    assert torch.equal(out.cpu().view(torch.uint8), nearest((x.cpu().float() * inverse[:, None]).double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_what_is_not_finite_is_no_number(backend: Any, scale: float | None, device: str) -> None:
    """NaN stays, infinity becomes NaN; so every output of that row of a GEMM is NaN, and none of another row."""
    x = normal(4, 64).float().to(device)
    x[1, 3], x[2, 5], x[3, 7] = math.nan, math.inf, -math.inf
    out, row_scale = quantize(backend, x, scale)
    assert torch.equal(out.float().isnan(), ~x.isfinite())
    weight, col_scale = quantize(backend, normal(48, 64).float().to(device), None)
    product = (backend or linear_fp8).linear_fp8(out, row_scale, weight, col_scale, None, torch.float32)
    assert product[0].isfinite().all()
    assert product[1:].isnan().all()


@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize("scale", [None, 1 / 64])
def test_layer_norm(scale: float | None, dtype: torch.dtype, device: str) -> None:
    """The normalized rows as `layer_norm` has them, and those quantized as `quantize_fp8` has it; twins alike."""
    x, weight, bias = (t.to(device, dtype) for t in (normal(37, 48), normal(48, seed=1), normal(48, seed=2)))
    rows = torch.full((37, 96), math.nan, dtype=dtype, device=device)[:, :48].copy_(x)  # apart from each other
    out = quantize_fp8.layer_norm_fp8(rows, weight, bias, 1e-5, scale)
    stock = F.layer_norm(x, (48,), weight, bias, 1e-5)
    truth = F.layer_norm(x.double(), (48,), weight.double(), bias.double(), 1e-5)
    for module, normalized, *quantized in (
        (quantize_fp8, *out),
        (reference_fp8, *reference_fp8.layer_norm_fp8(x, weight, bias, 1e-5, scale)),
        (cpu, *cpu.layer_norm_fp8(x, weight, bias, 1e-5, scale)),
    ):
        assert_within_policy(normalized, stock, truth)
        values, scales = module.quantize_fp8(normalized, scale)
        assert same_codes(quantized[0], values)
        assert torch.equal(quantized[1], scales)
    assert torch.equal(
        reference_fp8.layer_norm_fp8(x, weight, bias, 1e-5, scale)[0], reference.layer_norm(x, weight, bias, 1e-5)
    )


LAYOUTS = [("packed", 40, True), ("packed", 64, False), ("dense", 64, True), ("dense", 40, False), ("masked", 64, True)]


def of_every_layout() -> list[Any]:
    """(layout, head_dim, biased, dtype, twin): the kernel in the interpreter in one dtype of each, in turn."""
    found = []
    for (i, layout), (j, dtype) in itertools.product(
        enumerate(LAYOUTS), enumerate((torch.float32, torch.float16, torch.bfloat16))
    ):
        for twin in (reference_fp8, cpu, None):
            marks = thorough if twin is None and i % 3 != j else ()
            name = twin.__name__.rpartition(".")[2] if twin else "kernel"
            names = "-".join(map(str, (*layout, dtype, name)))
            found.append(pytest.param(*layout, dtype, twin, marks=marks, id=names))
    return found


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(("layout", "head_dim", "biased", "dtype", "twin"), of_every_layout())
def test_attention_to_8_bits(
    layout: str, head_dim: int, biased: bool, dtype: torch.dtype, twin: Any, device: str
) -> None:
    """Bitwise `quantize_fp8` of `attention`'s result, in bfloat16, too: what an interpreter makes wrong, both have.

    Among the rows are some that saturate, one that is not finite, a sequence with infinity and one without a key.
    """
    lengths, heads = {"packed": [70, 1, 37], "dense": [70, 70], "masked": [70, 70, 70]}[layout], 2
    qkv = normal(sum(lengths), 3, heads, head_dim)
    qkv[:, 2] *= torch.logspace(-3, 1, sum(lengths), dtype=torch.float64)[:, None, None]
    qkv[5, 0], qkv[-3, 2, 0, 1] = math.nan, math.inf
    q, k, v = qkv.to(device, dtype).unbind(1)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) if layout == "packed" else None
    mask = None
    if layout == "masked":
        mask = (torch.arange(70) < torch.tensor([70, 0, 50])[:, None]).to(device)
    bias = normal(heads, 2 * 70 - 1, seed=1).float().to(device) if biased else None
    tiles = None if starts is None or twin else attention.attention_tiles(starts, sum(lengths))
    arguments = (q, k, v, starts, mask, 70, head_dim**-0.5, bias, tiles)
    plain = (reference if twin is reference_fp8 else twin or attention).attention(*arguments)
    out_scale = float(plain[plain.isfinite()].abs().max()) / 1000
    out = (twin or attention).attention_fp8(*arguments, out_scale)
    assert out.dtype == torch.float8_e4m3fn
    assert out.shape == plain.shape
    assert out.is_contiguous()
    expected, _ = quantize(twin, plain.flatten(1), out_scale)
    assert same_codes(out.flatten(1), expected)
    if dtype != torch.bfloat16 or twin or device == "cuda":
        assert out[5].float().isnan().all()
        assert out[-3, 0, 1].float().isnan()
        assert torch.equal(out.float().isnan(), ~plain.isfinite())
        if mask is not None:
            assert not out[70:140].float().any()


def product_args(t: int, n: int, k: int, device: str, scale: float | None, bias: bool = True) -> list[Any]:
    """x and a weight, quantized, such that results have a deviation around 1; and a bias in float32."""
    x, row_scale = reference_fp8.quantize_fp8(normal(t, k).float(), scale)
    weight, col_scale = reference_fp8.quantize_fp8(normal(n, k, seed=n).float() / k**0.5, None)
    args = [x, row_scale, weight, col_scale * (scale or 1), normal(n, seed=1).float() if bias else None]
    return [a if a is None else a.to(device) for a in args]


def exact(args: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """What `linear_fp8` computes of the numbers that the arguments stand for, in `dtype`."""
    x, row_scale, weight, col_scale, bias = (a if a is None else a.to(dtype) for a in args)
    return scaled(F.linear(x, weight), row_scale, col_scale, bias)


def scaled(y: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = y * col_scale
    y = y * row_scale[:, None] if row_scale.numel() else y
    return y if bias is None else y + bias


def on_hopper(device: torch.device) -> bool:
    """Whether sums are added up in fewer bits than float32 has: the kernel's, not the twins'."""
    return device.type == "cuda" and launch.architecture(device) == "sm_90"


def stock_of(args: list[Any], module: Any) -> Tensor:
    """What judges `linear_fp8` of `module`: in float32, with the sums of the device it runs on."""
    if module is reference_fp8 or not on_hopper(args[0].device):
        return exact(args, torch.float32)
    x, row_scale, weight, col_scale, bias = args
    return scaled(reference_fp8.mm_on_hopper(x, weight, launch.FP8_EXACT_K), row_scale, col_scale, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes)
@pytest.mark.parametrize(("t", "n", "k", "scale"), [(1, 144, 64, 0.25), (37, 100, 80, None), (129, 48, 208, None)])
def test_products(backend: Any, t: int, n: int, k: int, scale: float | None, dtype: torch.dtype, device: str) -> None:
    """All epilogues to 16 bits and wider: no further from float64 than float32 of the same numbers, summed as there."""
    check_products(backend or linear_fp8, product_args(t, n, k, device, scale), dtype)


def check_products(module: Any, args: list[Any], dtype: torch.dtype) -> None:
    wide, truth = stock_of(args, module), exact(args)
    stock = wide.to(dtype)
    assert_within_policy(module.linear_fp8(*args, dtype), stock, truth, "linear_fp8")
    residual = normal(*truth.shape, seed=3).to(truth.device, dtype)
    out = module.linear_add_fp8(*args, residual)
    assert_within_policy(out, (wide + residual).to(dtype), truth + residual.double(), "linear_add_fp8")
    for approximate in ("none", "tanh"):
        out = module.linear_gelu_fp8(*args, dtype, approximate, None)
        wide_gelu, true_gelu = (F.gelu(y, approximate=approximate) for y in (wide, truth))
        assert_within_policy(out, wide_gelu.to(dtype), true_gelu, f"linear_gelu_fp8 {approximate}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_product_to_8_bits(backend: Any, approximate: str, device: str) -> None:
    """GELU's result in units of a scale: float64's rounded, but where float32 falls on the other side of a tie."""
    args = product_args(65, 48, 208, device, None)
    out = (backend or linear_fp8).linear_gelu_fp8(*args, torch.float16, approximate, 1 / 256)
    assert out.dtype == torch.float8_e4m3fn
    truth = F.gelu(exact(args), approximate=approximate) * 256
    assert (truth > 448).any()  # saturated
    check_codes(out.cpu(), truth.cpu(), F.gelu(stock_of(args, backend), approximate=approximate).cpu() * 256)


def check_codes(out: Tensor, truth: Tensor, stock: Tensor) -> None:
    """Codes of FP8 are those of the truth, but for sums that stand on the other side of a tie, as stock's may."""
    wanted = nearest(truth)
    differs, stock_differs = (codes != wanted for codes in (out.view(torch.uint8), nearest(stock.double())))
    assert differs.double().mean() <= SLACK * stock_differs.double().mean() + 1e-3
    between = (out.double() + wanted.view(torch.float8_e4m3fn).double())[differs] / 2
    error = float((stock - truth).abs().max())
    torch.testing.assert_close(between, truth[differs], rtol=1e-4, atol=1e-4 + (SLACK * error if error > 1e-3 else 0.0))


def sums_of(multiply: Any) -> Any:
    """A module whose GEMMs are those of `multiply`."""

    def linear_fp8(x: Tensor, rows: Any, weight: Tensor, columns: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
        return scaled(multiply(x, weight), rows, columns, bias).to(dtype)

    return SimpleNamespace(
        linear_fp8=linear_fp8,
        linear_add_fp8=lambda *args: (linear_fp8(*args[:5], torch.float32) + args[5]).to(args[5].dtype),
        linear_gelu_fp8=lambda *args: F.gelu(linear_fp8(*args[:5], torch.float32), approximate=args[6]).to(args[5]),
    )


SUMS = {
    "as designed": (lambda x, w: reference_fp8.mm_on_hopper(x, w, 128), True),
    "of float32": (lambda x, w: x.float() @ w.float().t(), True),
    "never taken over into float32": (lambda x, w: reference_fp8.mm_on_hopper(x, w, x.shape[1]), False),
    "taken over half as often": (lambda x, w: reference_fp8.mm_on_hopper(x, w, 256), False),
    "a bit fewer": (lambda x, w: reference_fp8.mm_on_hopper(x, w, 128, 12), False),
    "a product short": (lambda x, w: x[:, 1:].float() @ w[:, 1:].float().t(), False),
}


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("k", [1024, 4096])
def test_the_bound_on_hopper_is_that_of_its_sums(k: int, sums: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: no further from float64 than sums in fewer bits, each taken over into float32 after 128 products."""
    monkeypatch.setattr(sys.modules[__name__], "on_hopper", lambda device: True)
    multiply, right = SUMS[sums]
    args = product_args(9, 48, k, "cpu", None)
    if right:
        check_products(sums_of(multiply), args, torch.float32)
    else:
        with pytest.raises(AssertionError, match="exceeds the bound"):
            check_products(sums_of(multiply), args, torch.float32)
    codes = F.gelu(scaled(multiply(args[0], args[2]), *args[1::2], args[4])) * 256
    given = reference_fp8.to_e4m3(codes), F.gelu(exact(args)) * 256, F.gelu(stock_of(args, None)) * 256
    if right:
        check_codes(*given)
    elif sums == "a product short":
        with pytest.raises(AssertionError):
            check_codes(*given)


def test_sums_on_hopper() -> None:
    """By hand: with 1 among them, what lies below 2^-13 of a sum of 33 is cut off toward zero; 128 later, it is not."""
    x, weight = torch.zeros(1, 256), torch.ones(1, 256)
    x[0, 0], x[0, 1], x[0, 40] = 1.0, 2.0**-7, -(2.0**-6)
    weight[0, 1] = weight[0, 40] = 2.0**-7  # 2^-14 and -2^-13
    x[0, 200] = weight[0, 200] = 2.0**-8
    given = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    assert float(reference_fp8.mm_on_hopper(*given, 128)) == 1 - 2**-13 + 2**-16
    assert float(reference_fp8.mm_on_hopper(*given, 256)) == 1 - 2**-13
    assert float(reference_fp8.mm_on_hopper(*given, 256, 16)) == 1 + 2**-14 - 2**-13 + 2**-16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 37, 128, 1000])
def test_products_at_the_shapes_of_models(t: int, dtype: torch.dtype, device: str) -> None:
    """Here an accumulator of fewer bits than float32 would show."""
    for n, k in ((1152, 384), (1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)):
        check_products(linear_fp8, product_args(t, n, k, device, None), dtype)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_rows_beyond_whole_waves(scale: float | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a launch of their own, with their own scales and residual."""
    asked: list[int] = []

    def whole(config: launch.Config, *given: int) -> int:
        asked.append(given[5])
        return 128 if given[5] == 192 else given[5]

    choose = launch.linear_fp8_config
    monkeypatch.setattr(launch, "SPLIT_ROWS", 100)
    monkeypatch.setattr(launch, "full_waves", whole)
    monkeypatch.setattr(launch, "linear_fp8_config", lambda *given: choose(*given))
    check_products(linear_fp8, product_args(150, 48, 208, device, scale), torch.float16)
    assert set(asked) == {192, 128, 64}
    codes = linear_fp8.linear_gelu_fp8(*product_args(150, 48, 208, device, scale), torch.float16, "none", 1 / 16)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes[128:].float().norm() > 0


@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_row_does_not_depend_on_the_batch(scale: float | None, device: str) -> None:
    args = product_args(150, 48, 208, device, scale)
    whole = linear_fp8.linear_fp8(*args, torch.float16)
    for rows in (slice(0, 1), slice(3, 40), slice(120, 150)):
        part = [args[0][rows], args[1][rows] if scale is None else args[1], *args[2:]]
        assert torch.equal(linear_fp8.linear_fp8(*part, torch.float16), whole[rows])
    x = normal(150, 70).to(device, torch.float16)
    values, scales = quantize_fp8.quantize_fp8(x, scale)
    for rows in (slice(0, 1), slice(3, 40)):
        part_values, part_scales = quantize_fp8.quantize_fp8(x[rows], scale)
        assert same_codes(part_values, values[rows])
        assert torch.equal(part_scales, scales[rows] if scale is None else scales)


def test_without_bias_and_without_rows(device: str) -> None:
    args = product_args(5, 48, 64, device, None, bias=False)
    check_products(linear_fp8, args, torch.float32)
    empty = [args[0][:0], args[1][:0], *args[2:]]
    assert linear_fp8.linear_fp8(*empty, torch.float16).shape == (0, 48)
    assert quantize_fp8.quantize_fp8(torch.empty(0, 64, device=device), None)[0].shape == (0, 64)


def test_bad_arguments_are_named(device: str) -> None:
    x, row_scale, weight, col_scale, bias = product_args(5, 48, 64, device, None)
    dtype = torch.float16
    with pytest.raises(ValueError, match=r"^x has dtype torch.float32; expected torch.float8_e4m3fn"):
        linear_fp8.linear_fp8(x.float(), row_scale, weight, col_scale, bias, dtype)
    with pytest.raises(ValueError, match=r"^weight has shape \(48, 32\); expected \(48, 64\)"):
        linear_fp8.linear_fp8(x, row_scale, weight[:, :32], col_scale, bias, dtype)
    with pytest.raises(ValueError, match=r"56 a multiple of 16"):
        linear_fp8.linear_fp8(x[:, :56], row_scale, weight[:, :56], col_scale, bias, dtype)
    with pytest.raises(ValueError, match=r"^row_scale has shape \(4,\); expected \(5,\)"):
        linear_fp8.linear_fp8(x, row_scale[:4], weight, col_scale, bias, dtype)
    with pytest.raises(ValueError, match=r"^col_scale has shape \(47,\); expected \(48,\)"):
        linear_fp8.linear_fp8(x, row_scale, weight, col_scale[1:], bias, dtype)
    with pytest.raises(ValueError, match=r"^residual has shape \(4, 48\); expected \(5, 48\)"):
        linear_fp8.linear_add_fp8(x, row_scale, weight, col_scale, bias, torch.zeros(4, 48, device=device))
    with pytest.raises(ValueError, match=r"^approximate is 'erf'"):
        linear_fp8.linear_gelu_fp8(x, row_scale, weight, col_scale, bias, dtype, "erf", None)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^scale is .*; expected a positive number"):
            quantize_fp8.quantize_fp8(torch.zeros(2, 16, device=device), scale)
        q = torch.zeros(2, 1, 16, device=device)
        with pytest.raises(ValueError, match=r"^out_scale is .*; expected a positive number"):
            attention.attention_fp8(q, q, q, None, None, 2, 1.0, None, None, scale)


def test_every_architecture_has_tiles() -> None:
    for arch in ("sm_89", "sm_90", "sm_100", "sm_120"):
        config = launch.linear_fp8_config(arch, 1024, 1024)
        stage = (config.block_m + config.block_n) * config.block_k
        assert stage * config.num_stages <= (99 if arch in ("sm_89", "sm_120") else 227) * 1024
