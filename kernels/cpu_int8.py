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

from . import reference_int8

_AT_ONCE = 2**19
"""Elements that an epilogue or the quantizing pass works on at a time: 2 MB in float32."""


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


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(32, _AT_ONCE // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def quantize_int8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.int8)
    row_scale, row_zero = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.int32)
    for rows in _parts(*x.shape):
        part = x[rows].float() if factors is None else x[rows].float() * factors
        scale, inverse, zero = reference_int8.row_scales(part.amin(1), part.amax(1))
        part = torch.mul(part, inverse[:, None]).round_().add_(zero[:, None])
        values[rows], row_scale[rows], row_zero[rows] = part, scale, zero
    return values, row_scale, row_zero


def _affine(
    x: Tensor,
    row_scale: Tensor,
    row_zero: Tensor,
    weight: Tensor,
    col_scale: Tensor,
    col_sum: Tensor,
    bias: Tensor | None,
    last: Callable[[Tensor, slice], object],
) -> None:
    """Hands the GEMM's rows in float32, a part after the other, to `last`."""
    name = engine()
    if name is None:
        given = (row_scale, row_zero, weight, col_scale, col_sum, bias, torch.float32)
        last(reference_int8.linear_int8(x, *given), slice(None))
        return
    packed = _packed(weight, col_scale, col_sum, _ENGINES[name])
    zero, row_scale = row_zero.float()[:, None], row_scale[:, None]
    for rows in _parts(x.shape[0], weight.shape[0]):
        y = _ENGINES[name].multiply(x[rows], packed)
        y.addcmul_(zero[rows], packed.offset, value=-1).mul_(row_scale[rows])
        last(y if bias is None else y.add_(bias), rows)


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
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    _affine(x, row_scale, row_zero, weight, col_scale, col_sum, bias, lambda y, rows: out[rows].copy_(y))
    return out


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
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    gelu = functools.partial(torch._C._nn.gelu_, approximate=approximate)  # type: ignore[attr-defined]
    given = (x, row_scale, row_zero, weight, col_scale, col_sum, bias)
    _affine(*given, lambda y, rows: out[rows].copy_(gelu(y)))
    return out


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
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    given = (x, row_scale, row_zero, weight, col_scale, col_sum, bias)
    _affine(*given, lambda y, rows: out[rows].copy_(y.add_(residual[rows])))
    return out


def packed_bytes(weight: Tensor) -> int:
    """Of a weight as a library has it, beside itself."""
    return weight.nbytes if weight in _PACKED else 0
