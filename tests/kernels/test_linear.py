"""Linear layers, kernel and reference: against float64, no further from it than PyTorch's own in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import launch, reference
from fastbert.kernels import linear as kernel
from fastbert.numerics import assert_within_policy
from tests.conftest import kernel_dtypes


def stock_qkv(x: Tensor, *weights_and_biases: Tensor | None) -> Tensor:
    pairs = zip(weights_and_biases[::2], weights_and_biases[1::2], strict=True)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], dim=1)


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
    assert out.is_contiguous()
    truth = STOCK[op](*(a if a is None else a.double() for a in args), *rest)
    assert_within_policy(out, STOCK[op](*args, *rest), truth, what=op)
    return out


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
    assert torch.equal(out[0], torch.cat(args[2::2]))


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
def test_reference(op: str, rest: tuple[str, ...], bias: bool, dtype: torch.dtype) -> None:
    for t, n, k in ((1, 384, 128), (37, 100, 70), (129, 384, 384), (0, 48, 64)):
        check(reference, op, make_args(op, t, n, k, dtype, "cpu", bias), rest)
