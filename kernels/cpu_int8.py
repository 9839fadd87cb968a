"""int8 on a CPU: GEMMs by oneDNN or FBGEMM, which multiply integers, and the rest by PyTorch, a few rows at a time.

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

_MULTIPLIED_AT_ONCE = 2**20
"""Elements that a GEMM makes at a time: enough rows that reading the weight is no matter."""

_CHANGED_AT_ONCE = 2**18
"""Elements that an epilogue or the quantizing pass works on at a time: 1 MB in float32."""


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
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed.weight, packed.scale, packed.zero, None, 1.0, 0, torch.float32, "none", [], ""
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


def _parts(rows: int, width: int, at_once: int) -> Iterator[slice]:
    step = max(32, at_once // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Rows(NamedTuple):
    """Rows in int8, filled in a few after the others: what `quantize_int8` returns."""

    values: Tensor
    row_scale: Tensor
    row_zero: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> _Rows:
        values = torch.empty(rows, width, dtype=torch.int8)
        return cls(values, torch.empty(rows), torch.empty(rows, dtype=torch.int32))

    def fill(self, rows: slice, x: Tensor, factors: Tensor | None, spent: bool = False) -> None:
        """Quantizes `x`, which may be written to where it is `spent`, for these rows."""
        if x.dtype is not torch.float32:
            x, spent = x.float(), True
        if factors is not None:
            x, spent = torch.mul(x, factors, out=x if spent else None), True
        scale, inverse, zero = reference_int8.row_scales(x.amin(1), x.amax(1))
        steps = torch.mul(x, inverse[:, None], out=x if spent else None)
        self.values[rows] = steps.round_().add_(zero[:, None])
        self.row_scale[rows], self.row_zero[rows] = scale, zero


def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    made = _Rows.empty(x.shape[0], x.shape[1])
    for rows in _parts(x.shape[0], x.shape[1], _CHANGED_AT_ONCE):
        made.fill(rows, x[rows], factors)
    return made


def layer_norm_int8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normal, made = torch.empty(x.shape, dtype=x.dtype), _Rows.empty(x.shape[0], x.shape[1])
    for rows in _parts(x.shape[0], x.shape[1], _CHANGED_AT_ONCE):
        few = reference.layer_norm(x[rows], weight, bias, eps)
        normal[rows] = few
        made.fill(rows, few, factors, spent=True)
    return normal, *made


def _affine(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The GEMM's rows in float32, a few after the others: in `out` where that is in float32, else by themselves."""
    inside = out is not None and out.dtype is torch.float32
    name = engine()
    if name is None:
        y = reference_int8.linear_int8(x, row_scale, row_zero, weight, col_scale, col_sum, bias, torch.float32)
        yield slice(0, len(x)), out.copy_(y) if out is not None and inside else y
        return
    packed = _packed(weight, col_scale, col_sum, _ENGINES[name])
    zero, row_scale = row_zero.float()[:, None], row_scale[:, None]
    bias = None if bias is None else bias.float()
    for many in _parts(x.shape[0], weight.shape[0], _MULTIPLIED_AT_ONCE):
        product = _ENGINES[name].multiply(x[many], packed)
        for few in _parts(product.shape[0], product.shape[1], _CHANGED_AT_ONCE):
            y, rows = product[few], slice(many.start + few.start, many.start + few.stop)
            y.addcmul_(zero[rows], packed.offset, value=-1)
            to = out[rows] if out is not None and inside else y
            if bias is None:
                torch.mul(y, row_scale[rows], out=to)
            else:
                torch.addcmul(bias, y, row_scale[rows], out=to)
            yield rows, to


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""The first seven of every GEMM."""


def _linear(given: Arguments, dtype: torch.dtype, last: Callable[[Tensor, slice], object] | None = None) -> Tensor:
    """A GEMM, of whose rows `last` makes what they are to be, in place."""
    out = torch.empty(given[0].shape[0], given[3].shape[0], dtype=dtype)
    for rows, y in _affine(*given, out):
        if last is not None:
            last(y, rows)
        if y.dtype is not dtype:
            out[rows] = y
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
    made = _Rows.empty(x.shape[0], weight.shape[0])
    for rows, y in _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias, None):
        made.fill(rows, _gelu_(y, approximate).to(dtype), factors, spent=True)
    return made


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
    return _linear(given, residual.dtype, lambda y, rows: y.add_(residual[rows]))


def packed_bytes(weight: Tensor) -> int:
    """Of a weight as a library has it, beside itself."""
    return weight.nbytes if weight in _PACKED else 0
