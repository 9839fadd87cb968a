"""int8 on a CPU: GEMMs by oneDNN or FBGEMM, which multiply integers, and the rest by PyTorch, some rows at a time.

Neither library has scales by row: both are asked for the integers' own product, in float32, times the scale of the
column; offset, scale of the row, bias and what follows are an epilogue, over rows that are still in the cache.

**Both add up products in pairs of 16 bits on CPUs without VNNI or AMX, and saturate there without a word**: to half of
what should come out. `weight_limit` tries the worst there is and says how large a weight may be: 127, or 64, of which
two products never saturate.

All that torch has to pack and to multiply is in `_ENGINES`: its quantized tensors are to go (pytorch#184982), and
FBGEMM with them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import reference, reference_int8

_AT_ONCE = 2**21
"""Elements that are made at a time: few enough for a cache, and many enough that reading the weight is no matter."""


class _Packed(NamedTuple):
    """A weight as a library has it."""

    weight: object
    scale: Tensor
    """(N,) float32."""
    offset: Tensor
    """(1, N) float32: what is taken off for each step that stands for 0."""
    zero: Tensor
    """(N,) int32, of zeros."""


def _pack_onednn(weight: Tensor, scale: Tensor) -> object:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def _multiply_onednn(x: Tensor, packed: _Packed) -> Tensor:
    # Without AMX oneDNN has kernels for unsigned inputs alone: of signed ones its reference takes thousands of times as
    # long. With the sign bit turned they are 128 more, which is what stands for 0, and integers are still exact.
    unsigned = x.view(torch.uint8).bitwise_xor(128)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed.weight, packed.scale, packed.zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _pack_fbgemm(weight: Tensor, scale: Tensor) -> object:
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Qq]uantized.*")  # that they are to go
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _multiply_fbgemm(x: Tensor, packed: _Packed) -> Tensor:
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    product: Tensor = multiply(x.float(), 1.0, 128, packed.weight)  # which turns integers into integers again
    return product


class _Engine(NamedTuple):
    pack: Callable[[Tensor, Tensor], object]
    multiply: Callable[[Tensor, _Packed], Tensor]


_ENGINES = {
    "onednn": _Engine(_pack_onednn, _multiply_onednn),
    "fbgemm": _Engine(_pack_fbgemm, _multiply_fbgemm),
}


def _worst(engine: _Engine, limit: int) -> bool:
    """Whether a library is exact on what saturates first: the largest inputs times the largest weights."""
    weight = torch.full((16, 64), limit, dtype=torch.int8)
    weight[1::2] = -limit
    x = torch.full((2, 64), 127, dtype=torch.int8)
    x[1] = -128
    ones = torch.ones(16)
    packed = _Packed(engine.pack(weight, ones), ones, ones, torch.zeros(16, dtype=torch.int32))
    return torch.equal(engine.multiply(x, packed).double(), x.double() @ weight.double().t())


@functools.cache
def engine() -> str | None:
    """The library that multiplies: the faster one on this CPU; None: neither is there.

    oneDNN where there is AMX or VNNI, at any number of rows; else FBGEMM, 1.2 to 1.7 times as fast there.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    has_vnni = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    if not has_vnni and torch.backends.quantized.engine in ("fbgemm", "x86"):
        return "fbgemm"
    return "onednn"


@functools.cache
def weight_limit() -> int:
    """The largest magnitude of a weight at which GEMMs here are exact: 127, or 64 without VNNI and AMX."""
    name = engine()
    return 127 if name is None or _worst(_ENGINES[name], 127) else 64


_PACKED: MutableMapping[Tensor, _Packed] = WeakIdKeyDictionary()
"""By weight, while that lives."""


def _packed(weight: Tensor, col_scale: Tensor, col_sum: Tensor, using: _Engine) -> _Packed:
    found = _PACKED.get(weight)
    if found is None:
        offset, zero = (col_sum * col_scale)[None], torch.zeros(col_scale.shape, dtype=torch.int32)
        found = _PACKED[weight] = _Packed(using.pack(weight, col_scale), col_scale, offset, zero)
    return found


def _parts(rows: int, width: int) -> Iterator[slice | None]:
    """Rows, some after the others; None: all of them."""
    if rows * width <= 2 * _AT_ONCE:
        return iter((None,))
    step = max(32, _AT_ONCE // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _some(x: Tensor, rows: slice | None) -> Tensor:
    """Of one short text slices are a tenth of the time."""
    return x if rows is None else x[rows]


def _quantized(x: Tensor, factors: Tensor | None, spent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_int8` returns, the values and what stands for 0 in float32; x, where `spent`, is written to."""
    if x.dtype is not torch.float32:
        x, spent = x.float(), True
    if factors is not None:
        x, spent = torch.mul(x, factors, out=x if spent else None), True
    scale, inverse, zero = reference_int8.row_scales(x.amin(1), x.amax(1))
    steps = torch.mul(x, inverse[:, None], out=x if spent else None)
    return steps.round_().add_(zero[:, None]), scale, zero


class _Rows:
    """Rows in int8, filled in some after the others: what `quantize_int8` returns."""

    def __init__(self, rows: int, width: int) -> None:
        self.shape = rows, width
        self.made: tuple[Tensor, Tensor, Tensor] | None = None

    def fill(self, rows: slice | None, x: Tensor, factors: Tensor | None, spent: bool = False) -> None:
        """Quantizes `x`, which may be written to where it is `spent`, for these rows."""
        values, scale, zero = _quantized(x, factors, spent)
        if rows is None:
            self.made = values.to(torch.int8), scale, zero.to(torch.int32)
            return
        if self.made is None:
            number = self.shape[0]
            empty = torch.empty(self.shape, dtype=torch.int8)
            self.made = empty, torch.empty(number), torch.empty(number, dtype=torch.int32)
        for whole, part in zip(self.made, (values, scale, zero), strict=True):
            whole[rows] = part

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.made is not None
        return self.made


def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    made = _Rows(x.shape[0], x.shape[1])
    for rows in _parts(x.shape[0], x.shape[1]):
        made.fill(rows, _some(x, rows), factors)
    return made.whole()


def layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normal, made = torch.empty(x.shape, dtype=x.dtype), _Rows(x.shape[0], x.shape[1])
    for rows in _parts(x.shape[0], x.shape[1]):
        few = reference.layer_norm(_some(x, rows), weight, bias, eps)
        if rows is None:
            normal = few
        else:
            normal[rows] = few
        made.fill(rows, few, factors, spent=rows is not None)
    return normal, *made.whole()


def _affine(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
) -> Iterator[tuple[slice | None, Tensor]]:
    """The GEMM's rows in float32, some after the others, to be written to; None: all of them."""
    name = engine()
    if name is None:
        yield None, reference_int8.linear_int8(x, row_scale, row_zero, weight, col_scale, col_sum, bias, torch.float32)
        return
    packed = _packed(weight, col_scale, col_sum, _ENGINES[name])
    zero, row_scale = row_zero.float()[:, None], row_scale[:, None]
    bias = None if bias is None else bias.float()
    for rows in _parts(x.shape[0], weight.shape[0]):
        y, scale = _ENGINES[name].multiply(_some(x, rows), packed), _some(row_scale, rows)
        y.addcmul_(_some(zero, rows), packed.offset, value=-1)
        yield rows, y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""The first seven of every GEMM."""


def _linear(
    given: Arguments, dtype: torch.dtype, last: Callable[[Tensor, slice | None], object] | None = None
) -> Tensor:
    """A GEMM, of whose rows `last` makes what they are to be, in place."""
    out: Tensor | None = None
    for rows, y in _affine(*given):
        if last is not None:
            last(y, rows)
        if rows is None:
            return y.to(dtype)
        if out is None:
            out = torch.empty(given[0].shape[0], given[3].shape[0], dtype=dtype)
        out[rows] = y
    assert out is not None
    return out


def linear_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return _linear((x, row_scale, row_zero, weight, col_scale, col_sum, bias), dtype)


def _gelu_(x: Tensor, approximate: str) -> Tensor:
    changed: Tensor = torch._C._nn.gelu_(x, approximate=approximate)  # type: ignore[attr-defined]
    return changed


def linear_gelu_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
) -> Tensor:
    given = x, row_scale, row_zero, weight, col_scale, col_sum, bias
    return _linear(given, dtype, lambda y, rows: _gelu_(y, approximate))


def linear_gelu_quantize_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    made = _Rows(x.shape[0], weight.shape[0])
    for rows, y in _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias):
        made.fill(rows, _gelu_(y, approximate).to(dtype), factors, spent=True)
    return made.whole()


def linear_add_int8(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    given = x, row_scale, row_zero, weight, col_scale, col_sum, bias
    return _linear(given, residual.dtype, lambda y, rows: y.add_(_some(residual, rows)))


def packed_bytes(weight: Tensor) -> int:
    """Of a weight as a library has it, beside itself."""
    return weight.nbytes if weight in _PACKED else 0
