"""The CPU backend: every operator as fast as PyTorch makes it there, with the signature and the result of `reference`.

No padding, in-place epilogues, one attention call per sequence. GEMMs in 16-bit dtypes run in float32 on processors
without native instructions for them, where PyTorch's own are several times slower; there weights stay unrounded. In
FP8, GEMMs are those of the oracle: they are there for accuracy, and every weight is turned into float32 at every call.
int8's are in `cpu_int8`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import cpu_int8, reference, reference_fp8

_gelu_ = torch._C._nn.gelu_  # type: ignore[attr-defined]  # torch.ops.aten.gelu_ without its Python


@functools.cache
def _has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` by instructions this CPU has for it.

    Both are asked: oneDNN takes 16 bits on CPUs that have to convert them, and may be told to leave instructions alone.
    """
    if dtype.itemsize != 2:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_amx_fp16_supported() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _matmul_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type != "cpu" or _has_native_matmul(x.dtype) else torch.float32


@functools.cache
def _has_fused_epilogues(dtype: torch.dtype) -> bool:
    """Whether oneDNN's GEMMs with an epilogue are here and worth it: in 16 bits, where passes over memory count."""
    return dtype.itemsize == 2 and _has_native_matmul(dtype)


def _fuses_epilogue(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype and x.numel() > 0 and _has_fused_epilogues(x.dtype)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the dtype matmuls run in: a new tensor, for an epilogue to change in place."""
    dtype = _matmul_dtype(x) if x.dtype.itemsize == 2 else x.dtype
    if x.dtype is dtype and weight.dtype is dtype and (bias is None or bias.dtype is dtype):
        # Of one short text casts that change nothing are a fiftieth of the time.
        return F.linear(x, weight, bias) if dtype.itemsize == 2 else _mm_add(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """What is tried once is not of the modes in which it is first asked for."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def exact_width(
    rows: int,
    columns: int,
    widths: Sequence[int],
    numbers: Sequence[int],
    multiply: Callable[[Tensor, Tensor, int], Tensor],
) -> int | None:
    """The most columns of a weight (rows, columns) that `multiply(x, weight, width)` may sum up at a time: all, or one
    of `widths`, from the largest, so that its error is that of `x @ weight.T`; None: none of them.

    oneMKL sums up blocks of up to 384 columns, and fewer where it shares out columns, too, among threads: by the shape,
    the `numbers` of rows of x and of threads. It is tried, in float32, on random numbers that are always the same.
    """
    with untouched():
        generator = torch.Generator().manual_seed(0)
        weight = torch.empty(rows, columns, dtype=torch.float32).uniform_(-1, 1, generator=generator)
        some = weight[:256].double().t()
        candidates = [columns, *(width for width in widths if width < columns)]
        for number in numbers:
            x = torch.empty(number, columns, dtype=torch.float32).uniform_(-1, 1, generator=generator)
            truth = x.double() @ some
            bound = _NOT_WORSE * (torch.mm(x, weight.t())[:, :256] - truth).norm()
            while candidates and (multiply(x, weight, candidates[0])[:, :256] - truth).norm() > bound:
                del candidates[0]
    return candidates[0] if candidates else None


_NOT_WORSE = 1.05
"""Times an error: half of what the numerical policy leaves."""


def _mm_transposed(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """`x @ weight.T` as `(weight @ x.T).T`, summed up `width` columns at a time."""
    x = x.t()
    product = torch.mm(weight[:, :width], x[:width])
    for start in range(width, weight.shape[1], width):
        product.addmm_(weight[:, start : start + width], x[start : start + width])
    return product.t()


@functools.cache
def _transposed_width(rows: int, columns: int, threads: int) -> int | None:
    """The width for `_mm_transposed`; None: `x @ weight.T` as it is."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None  # it has only been measured there
    return exact_width(rows, columns, (512,), (16, 48), _mm_transposed)


def _mm_add(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, of more than 16 bits.

    A bias that is there before the GEMM costs up to a tenth of it: it is read once more. Of 16 to 48 rows in float32,
    oneMKL's GEMM takes 1.2 to 1.7 times as long as that of the transposed problem, where K is 1,024 or more. Of fewer
    rows the transposed one is less exact.
    """
    if 16 <= x.shape[0] <= 48 and x.shape[1] >= 1024 and x.dtype is torch.float32 and x.device.type == "cpu":
        width = _transposed_width(*weight.shape, torch.get_num_threads())
        if width is not None:
            out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
            product = _mm_transposed(x, weight, width)
            return out.copy_(product) if bias is None else torch.add(product, bias, out=out)
    product = torch.mm(x, weight.t(), out=out)
    return product if bias is None else product.add_(bias)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b`, (M, K) and (K, N) of one dtype, accumulated in float32 or better and rounded to `dtype` -> (M, N)."""
    if a.is_cuda and a.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)  # from the accumulator at once
    inner = _matmul_dtype(a)
    return torch.mm(a.to(inner), b.to(inner)).to(dtype)


def _keep(shape: tuple[int, ...], dropout: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies with: 0 with probability `dropout`, to 16 bits, else 1 / (1 - dropout).

    Four elements share the 64 bits of a draw: several times as fast as torch's own draws from a Bernoulli distribution.
    """
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    # As signed integers, of which 2**15 would not be one.
    kept = draws.view(torch.int16)[:count].view(shape) >= min(round(dropout * 2**16), 2**16 - 1) - 2**15
    return kept.to(dtype).mul_(0.0 if dropout == 1 else 1 / (1 - dropout))


def _generator(seed: Tensor | None) -> torch.Generator:
    return torch.Generator().manual_seed(0 if seed is None else int(seed))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _rounded(_affine(x, weight, bias), x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    if x.dtype.itemsize == 2 and _fuses_epilogue(x, weight):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
        return fused
    return _rounded(_gelu_(_affine(x, weight, bias), approximate=approximate), x.dtype)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    if x.dtype.itemsize == 2 and _fuses_epilogue(x, weight):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return fused
    # Added after the GEMM: accumulating onto the residual would round every partial sum to its magnitude.
    return _rounded(_affine(x, weight, bias).add_(residual), x.dtype)


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu_,
    "gelu_tanh": functools.partial(_gelu_, approximate="tanh"),
    "silu": functools.partial(F.silu, inplace=True),
}
_ONEDNN_GATES: dict[str, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}


def gate_rows(x: Tensor, width: int, multiply: Callable[[Tensor], tuple[Tensor, ...]], activation: str) -> Tensor:
    """x (T, K) -> (T, width): of what `multiply` makes of its rows, the first, activated, times the second.

    Some rows at a time: a GEMM takes no longer so, and their memory is used again. Tens of megabytes would come from
    the system, page by page, in every layer: up to a tenth of the time.
    """
    out, step = x.new_empty(x.shape[0], width), 512 * torch.get_num_threads()
    for some, own in zip(x.split(step), out.split(step), strict=True):
        activated, factor = multiply(some)
        torch.mul(_GATES[activation](activated), factor, out=own)
    return out


def linear_gated(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    if up is None:
        return gate_rows(x, gate.shape[0] // 2, lambda some: _affine(some, gate, gate_bias).chunk(2, 1), activation)
    if _fuses_epilogue(x, gate) and _fuses_epilogue(x, up):
        activated = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, *_ONEDNN_GATES[activation])
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, activated, up, up_bias, "mul")
        return fused

    def multiply(some: Tensor) -> tuple[Tensor, Tensor]:
        return _affine(some, gate, gate_bias), _affine(some, up, up_bias)

    return gate_rows(x, gate.shape[0], multiply, activation)


def gated_feed_forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    if up is None:
        inner = _affine(x, gate, gate_bias)
    else:
        wide = _rounded(x, _matmul_dtype(x))
        inner = wide.new_empty(x.shape[0], 2 * gate.shape[0])
        for part, weight, bias in zip(inner.chunk(2, 1), (gate, up), (gate_bias, up_bias), strict=True):
            weight = _rounded(weight, wide.dtype).t()
            if bias is None:
                torch.mm(wide, weight, out=part)
            else:
                torch.addmm(_rounded(bias, wide.dtype), wide, weight, out=part)
    activated, factor = inner.chunk(2, 1)
    gated = reference.GATES[activation](activated).mul_(factor)
    pre = inner.to(x.dtype)
    return _affine(gated, down, down_bias).to(x.dtype), pre


_GATES_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.grad_input,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward.grad_input,
}


def linear_gated_backward(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    inner = _matmul_dtype(grad)
    dgated = torch.mm(grad.to(inner), weight.to(inner))
    activated, factor = pre.to(inner).chunk(2, 1)
    gated, dpre = reference.GATES[activation](activated), dgated.new_empty(pre.shape)
    dactivated, dfactor = dpre.chunk(2, 1)
    torch.mul(dgated, gated, out=dfactor)
    _GATES_BACKWARD[activation](dgated.mul_(factor), activated, grad_input=dactivated)
    return dpre.to(pre.dtype), gated.mul_(factor).to(pre.dtype)


def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> Tensor:
    """In memory the three are one after the other; the kernel lays them side by side."""
    out, native = x.new_empty(3, x.shape[0], q_weight.shape[0]), _matmul_dtype(x) == x.dtype
    for each, weight, bias in zip(out, (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), strict=True):
        if x.dtype is weight.dtype and (bias is None or bias.dtype is x.dtype) and x.dtype.itemsize > 2:
            _mm_add(x, weight, bias, each)
        elif bias is not None and native:
            torch.addmm(_rounded(bias, x.dtype), x, _rounded(weight, x.dtype).t(), out=each)
        else:
            each.copy_(_affine(x, weight, bias))
    return out.transpose(0, 1)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    inner = _affine(x, weight1, bias1)
    pre = inner.to(x.dtype)
    # Not in place where `pre` is `inner` itself.
    act = F.gelu(inner, approximate=approximate) if pre is inner else _gelu_(inner, approximate=approximate)
    return _affine(act, weight2, bias2).to(x.dtype), pre


def linear_gelu_backward(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dact = torch.mm(grad.to(inner := _matmul_dtype(grad)), weight.to(inner))
    dpre = torch.ops.aten.gelu_backward(dact, pre.to(inner), approximate=approximate)
    return dpre.to(pre.dtype), F.gelu(pre, approximate=approximate)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None = None,
    tiles: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    dtype = _matmul_dtype(q)
    if window is not None:
        return _attend_locally(q, k, v, cu_seqlens, key_mask, max_seqlen, scale, bias, window)

    def attend(qkv: Sequence[Tensor], batch: int, mask: Tensor | None) -> Tensor:
        # [B, heads, S, D]
        shape = batch, qkv[0].shape[0] // batch, *q.shape[1:]
        query, key, value = [_rounded(t.view(shape).transpose(1, 2), dtype) for t in qkv]
        whole = slice(0, query.shape[2])
        added = mask if bias is None else _biased(bias.to(dtype), whole, whole, mask)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
        if bias is not None and mask is not None:  # without a key it is NaN
            result = result.where(mask.any(-1, keepdim=True), 0.0)
        return _rounded(result.transpose(1, 2).flatten(0, 1), q.dtype)  # [B * S, heads, D]

    if cu_seqlens is None and q.shape[0]:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return attend((q, k, v), q.shape[0] // max_seqlen, mask).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if cu_seqlens is not None:
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            if end > start:
                out[start:end] = attend([t[start:end] for t in (q, k, v)], 1, None)
    return out


WINDOW_ROWS = 128
"""Queries that are given their keys together, where each attends to those of a window."""


def _windows(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of the queries of a sequence, each with the keys that some of them attend to."""
    if window is None or length <= window + WINDOW_ROWS:
        yield slice(0, length), slice(0, length)
        return
    for start in range(0, length, WINDOW_ROWS):
        end = min(start + WINDOW_ROWS, length)
        yield slice(start, end), slice(max(start - window, 0), min(end + window, length))


@functools.lru_cache(4)
def _distances(window: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores, 0 or -inf, for a query in each row: from `window` keys before row 0 on."""
    with untouched():
        rows = window + WINDOW_ROWS  # no block has more
        distances = torch.arange(rows)[:, None] + window - torch.arange(rows + 2 * window)
        return torch.zeros(distances.shape, dtype=dtype).masked_fill_(distances.abs() > window, float("-inf"))


_KEPT_WINDOW = 256
"""Of wider windows that table is not kept: it grows with the square, its part in the time does not."""


def _within(queries: slice, keys: slice, mask: Tensor | None, window: int | None) -> Tensor | None:
    """Which keys take part, (B or 1, 1, queries or 1, keys) bool, by a mask (B, 1, 1, S) and a window; None: all."""
    part = None if mask is None else mask[..., keys]
    if window is None or _all_near(queries, keys, window):
        return part
    places = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
    near = (places.abs() <= window)[None, None]
    return near if part is None else part & near


def _all_near(queries: slice, keys: slice, window: int) -> bool:
    return max(queries.stop - keys.start, keys.stop - queries.start) - 1 <= window


def _added(
    dtype: torch.dtype, queries: slice, keys: slice, mask: Tensor | None, window: int | None, bias: Tensor | None
) -> Tensor | None:
    """A bias by distance and which keys take part, as what is added to scores: (B, heads, queries, keys), each or 1."""
    if mask is None and bias is None and window is not None and window <= _KEPT_WINDOW:
        if _all_near(queries, keys, window):
            return None
        rows, first = queries.stop - queries.start, window - queries.start + keys.start
        return _distances(window, dtype)[None, None, :rows, first : first + keys.stop - keys.start]
    within = _within(queries, keys, mask, window)
    if bias is not None:
        return _biased(bias.to(dtype), queries, keys, within)
    return None if within is None else torch.zeros(within.shape, dtype=dtype).masked_fill_(~within, float("-inf"))


def _attend_locally(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
) -> Tensor:
    """`attention` with a window: of long sequences some queries at a time, with the keys that these attend to."""
    dtype, out = _matmul_dtype(q), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group, batch, mask in _sequences(q.shape[0], cu_seqlens, key_mask, max_seqlen):
        rows = [t[group].unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v)]  # [B, heads, S, D]
        result = out[group].unflatten(0, (batch, -1)).transpose(1, 2)
        for queries, keys in _windows(rows[0].shape[2], window):
            query, key, value = [
                _rounded(t[:, :, own], dtype) for t, own in zip(rows, (queries, keys, keys), strict=True)
            ]
            added = _added(dtype, queries, keys, mask, window, bias)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
            if bias is not None and mask is not None and (within := _within(queries, keys, mask, window)) is not None:
                found = found.where(within.any(-1, keepdim=True), 0.0)
            result[:, :, queries] = found
    return out


def rotate(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    out, dtype = torch.empty(qkv.shape, dtype=qkv.dtype), torch.promote_types(qkv.dtype, torch.float32)
    half = qkv.shape[3] // 2
    cosine, sine = (_rounded(table, dtype)[:, None, None] for table in (cosines, sines))
    own, (first, second) = _rounded(qkv[:, :2], dtype), sine.split(half, 3)
    turned = out[:, :2] if out.dtype is dtype else torch.empty_like(own)
    if back:
        first, second = second, first
    torch.mul(own, cosine, out=turned)
    turned[..., :half].addcmul_(own[..., half:], first, value=1 if back else -1)
    turned[..., half:].addcmul_(own[..., :half], second, value=-1 if back else 1)
    if turned.dtype is not out.dtype:
        out[:, :2] = turned
    out[:, 2] = qkv[:, 2]
    return out


def attention_tiles(cu_seqlens: Tensor, rows: int) -> Tensor:
    lengths = cu_seqlens.diff()
    order = lengths.argsort(descending=True, stable=True)
    counts = (lengths[order] + 127) // 128
    ends = counts.cumsum(0)
    blocks = torch.arange(rows // 128 + len(lengths), device=cu_seqlens.device)
    rank = torch.searchsorted(ends, blocks, right=True)
    there = rank < len(lengths)
    rank = rank.clamp(max=len(lengths) - 1)
    sequence = order[rank]
    start = (blocks - (ends - counts)[rank]) * 128
    tiles = torch.stack([cu_seqlens[sequence], lengths[sequence], start, sequence], 1)
    return (tiles * there[:, None]).to(torch.int32)


def _biased(bias: Tensor, queries: slice, keys: slice, mask: Tensor | None) -> Tensor:
    """What is added to the scores of sequences of one length, (1 or B, heads, S, S): -inf where a key is masked."""
    rows, columns = (torch.arange(own.start, own.stop, device=bias.device) for own in (queries, keys))
    added = bias[:, bias.shape[1] // 2 + columns[None, :] - rows[:, None]][None]
    return added if mask is None else added.masked_fill(~mask, float("-inf"))


def _sequences(
    rows: int, cu_seqlens: Tensor | None, key_mask: Tensor | None, max_seqlen: int
) -> Iterator[tuple[slice, int, Tensor | None]]:
    """Groups of sequences of one length: (rows of the group, sequences in it, key mask (B, 1, 1, S) or None)."""
    if cu_seqlens is None:
        if rows:
            yield slice(None), rows // max_seqlen, None if key_mask is None else key_mask[:, None, None, :]
        return
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > start:
            yield slice(start, end), 1, None


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    """`scale * query @ key.T`, and what is added, in float32 or better, -inf where masked: (B, heads, S, S)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
    if bias is not None:
        scores += bias
    return scores if mask is None else scores.masked_fill_(~mask, float("-inf"))


def attention_map(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    places: Tensor | None,
    width: int,
    bias: Tensor | None = None,
    tiles: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    dtype = _matmul_dtype(q)

    def score(group: slice, batch: int, heads: slice) -> Tensor:
        query, key = (t[group, heads].unflatten(0, (batch, -1)).permute(0, 2, 1, 3).to(dtype) for t in (q, k))
        scores = _scaled(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), scale).view(*query.shape[:3], -1)
        whole = slice(0, scores.shape[-1])
        return scores if bias is None else scores + _biased(bias[heads].to(scores.dtype), whole, whole, None)

    return _mapped(q, cu_seqlens, key_mask, max_seqlen, places, width, score, window)


def _mapped(
    q: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    places: Tensor | None,
    width: int,
    score: Callable[[slice, int, slice], Tensor],
    window: int | None = None,
) -> Tensor:
    """Attention maps, as `attention_map` has them, of what `score` gives of rows, sequences in them and heads.

    That is (sequences, heads, S, S), which is written to.
    """
    rows, heads, _ = q.shape
    batch = rows // max(max_seqlen, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    maps = (q.new_empty if cu_seqlens is None else q.new_zeros)(batch, heads, width, width)
    starts = None if cu_seqlens is None else {start: i for i, start in enumerate(cu_seqlens.tolist())}
    for group, count, some, mask in _parts(rows, heads, cu_seqlens, key_mask, max_seqlen, _limit()):
        scores = score(group, count, some)
        whole = slice(0, scores.shape[-1])
        there = _within(whole, whole, None if mask is None else mask[:, None], window)
        if there is not None:
            scores = scores.masked_fill_(~there, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if there is not None:  # without a key they are all alike
            weights.mul_(there)
        length = weights.shape[-1]
        first = group.start // length if starts is None else starts[group.start]
        own = maps[first : first + count, some]
        where = None if places is None else places[group]
        if where is None or int(where[-1] - where[0]) == length - 1:  # one after the other
            at = 0 if where is None else int(where[0])
            own[..., at : at + length, at : at + length] = weights
        else:
            own[..., where[:, None], where] = weights.to(own.dtype)
    return maps


def _by_distance(pairs: Tensor) -> Tensor:
    """Sums over all (i, i + d) of the last two dimensions, (..., S, S), for d from 1 - S to S - 1: (..., 2 S - 1)."""
    size = pairs.shape[-1]
    # The last row first; in rows that are one element shorter, each is then one further to the right.
    wide = F.pad(pairs.flip(-2), (0, size)).flatten(-2)
    return wide[..., :-size].unflatten(-1, (size, 2 * size - 1)).sum(-2)


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, _ = qkv.shape
    dtype, generator = _matmul_dtype(qkv), _generator(seed)
    out = qkv.new_empty(rows, *qkv.shape[2:])
    planes = 2 if qkv.dtype.itemsize > 2 else 1
    stats = qkv.new_ones(planes, heads, rows, dtype=torch.promote_types(qkv.dtype, torch.float32))
    limit = _limit(dropout) if dropout else _ALL
    for group, batch, some, mask in _parts(rows, heads, cu_seqlens, key_mask, max_seqlen, limit, window):
        own = qkv[group, :, some].unflatten(0, (batch, -1)).permute(2, 0, 3, 1, 4).to(dtype)  # [3, B, heads, S, D]
        own_out = out[group, some].unflatten(0, (batch, -1)).transpose(1, 2)
        sums = stats[0, some, group].unflatten(1, (batch, -1)).transpose(0, 1)  # [B, heads, S]
        mask, part = None if mask is None else mask[:, None], None if bias is None else bias[some]
        for queries, keys in _windows(own.shape[3], window):
            query, key, value = own[0, :, :, queries], own[1, :, :, keys], own[2, :, :, keys]
            if dropout:
                biased = None if part is None else _biased(part, queries, keys, None)
                scores = _scores(query, key, _within(queries, keys, mask, window), scale, biased)
                # Without a key all scores are -inf: there a maximum of 0 makes every weight 0, and no NaN.
                top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                total.masked_fill_(total == 0, 1.0)
                logsumexp = top.add_(total.log()).squeeze(-1)
                weights.mul_(_keep(weights.shape, dropout, generator, weights.dtype)).div_(total)
                result = torch.matmul(weights.to(dtype), value)
            else:
                added = _additive(query, queries, keys, mask, window, part)
                result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query, key, value, attn_mask=added, scale=scale
                )
            own_out[:, :, queries] = result
            sums[:, :, queries] = logsumexp
    return out, stats


def _additive(
    query: Tensor, queries: slice, keys: slice, mask: Tensor | None, window: int | None, bias: Tensor | None
) -> Tensor | None:
    """`_added`, of the shape that scores of `query`, (B, heads, S, D), need."""
    added = _added(query.dtype, queries, keys, mask, window, bias)
    return added if added is None else added.expand(len(query), -1, query.shape[2], -1)


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, generator = _matmul_dtype(qkv), _generator(seed)
    dqkv, heads = torch.empty(qkv.shape, dtype=qkv.dtype), qkv.shape[2]
    dbias = stats.new_zeros(0) if bias is None or not bias_grad else torch.zeros_like(bias)
    flash = dtype.itemsize == 2 and not dropout and not dbias.numel()
    limit = _ALL if flash else _limit(dropout)
    for group, batch, some, mask in _parts(qkv.shape[0], heads, cu_seqlens, key_mask, max_seqlen, limit, window):
        own = qkv[group, :, some].unflatten(0, (batch, -1)).permute(2, 0, 3, 1, 4).to(dtype)  # [3, B, heads, S, D]
        douts, results = (t[group, some].unflatten(0, (batch, -1)).transpose(1, 2) for t in (grad, out))
        sums = stats[0, some, group].unflatten(1, (batch, -1))
        mask, part = None if mask is None else mask[:, None], None if bias is None else bias[some]
        blocks = list(_windows(own.shape[3], window))
        total = torch.zeros(own.shape, dtype=sums.dtype) if len(blocks) > 1 else None  # a key is in several
        for queries, keys in blocks:
            query, key, value = own[0, :, :, queries], own[1, :, :, keys], own[2, :, :, keys]
            dout = douts[:, :, queries].to(dtype)
            if flash:
                added, result = _additive(query, queries, keys, mask, window, part), results[:, :, queries]
                # It wants queries between heads and rows in memory: [B, S, heads] transposed.
                logsumexp = sums[:, :, queries].permute(1, 2, 0).contiguous().transpose(1, 2)
                grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    dout, query, key, value, result, logsumexp, 0.0, False, attn_mask=added, scale=scale
                )
            else:
                # Of the scores, not by `stats` and `out`: as precise as eager attention, where flash has 1.6 times the
                # error in queries and keys. A few heads at a time it takes hardly longer.
                biased = None if part is None else _biased(part, queries, keys, None)
                weights = _weights(query, key, _within(queries, keys, mask, window), scale, biased)
                dweights = torch.matmul(dout, value.transpose(-1, -2)).to(weights.dtype)
                kept = weights
                if dropout:
                    keep = _keep(weights.shape, dropout, generator, weights.dtype)
                    dweights.mul_(keep)
                    kept = weights * keep
                dvalue = torch.matmul(kept.to(dtype).transpose(-1, -2), dout)
                dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
                if dbias.numel():
                    places = (queries.start - keys.start, keys.stop - queries.stop)
                    found = _by_distance(F.pad(dscores.sum(0), (0, 0, *places)))
                    dbias[some].narrow(1, (dbias.shape[1] - found.shape[1]) // 2, found.shape[1]).add_(found)
                dscores = dscores.to(dtype).flatten(0, 1)
                dquery = _scaled(dscores, key.flatten(0, 1), scale).view(query.shape)
                dkey = _scaled(dscores.transpose(1, 2), query.flatten(0, 1), scale).view(key.shape)
                grads = dquery, dkey, dvalue
            if total is None:
                for i, each in enumerate(grads):
                    dqkv[group, i, some] = each.transpose(1, 2).flatten(0, 1)
                continue
            for sum_, each, place in zip(total, grads, (queries, keys, keys), strict=True):
                sum_[:, :, place] += each
        if total is not None:
            dqkv[group, :, some] = total.permute(1, 3, 0, 2, 4).flatten(0, 1)
    return dqkv, dbias


def _weights(query: Tensor, key: Tensor, within: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    """Probabilities (B, heads, queries, keys), in float32 or better; zeros in rows without a key."""
    flat = _scaled(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), scale)
    scores = flat.view(*query.shape[:3], -1).to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None:
        scores += bias
    if within is not None:
        scores.masked_fill_(~within, torch.finfo(scores.dtype).min)
    torch.softmax(scores, -1, out=scores)
    return scores if within is None else scores.mul_(within)  # without a key they are all alike


def _by_place(scores: Tensor) -> Tensor:
    """(..., R, R + S - 1), by row and distance -> (..., R, S), by row and place: a view, of [r, R - 1 - r + j]."""
    rows, columns = scores.shape[-2:]
    place = scores.storage_offset() + rows - 1
    return scores.as_strided((*scores.shape[:-1], columns - rows + 1), (*scores.stride()[:-2], columns - 1, 1), place)


_POSITION_ROWS = 128
"""Rows at a time that are multiplied with positions: each with as many more distances as there are rows."""


def _table(table: Tensor, slots: Tensor, dtype: torch.dtype, kept: MutableMapping[Tensor, _Table]) -> Tensor:
    """table (P, heads, D) -> (heads, D, 2 S - 1), by the slots of all distances; in `kept` for the next call."""
    # A gradient's table lives for a step, and writing to one made in inference mode leaves no trace.
    is_kept = not table.requires_grad and not table.is_inference()
    found = kept.get(table) if is_kept else None
    if found is not None and found.version == table._version:
        part = found.part(slots, dtype)
        if part is not None:
            return part
    rows = table.to(dtype).flatten(1).index_select(0, slots).view(-1, *table.shape[1:])
    made = rows.permute(1, 2, 0).contiguous()
    if is_kept:
        kept[table] = _Table(table._version, slots, made)
    return made


class _Table(NamedTuple):
    version: int
    slots: Tensor
    table: Tensor

    def part(self, slots: Tensor, dtype: torch.dtype) -> Tensor | None:
        """That of these slots, if it has them in its middle."""
        start = (self.slots.shape[0] - slots.shape[0]) // 2
        some = slice(start, start + slots.shape[0])
        fits = start >= 0 and self.table.dtype == dtype and torch.equal(self.slots[some], slots)
        return self.table[..., some] if fits else None


_TABLES: tuple[MutableMapping[Tensor, _Table], MutableMapping[Tensor, _Table]] = (
    WeakIdKeyDictionary(),
    WeakIdKeyDictionary(),
)
"""Of tables by slot, while these live: the same by distance, of queries and of keys."""


class _Positions:
    """The tables of `disentangled_attention`, by distance: for sequences of any length, a slice of them.

    Beyond `band`, the distances that `slots` has, there is one score of each row before it and one behind it.
    """

    def __init__(self, c2p: Tensor | None, p2c: Tensor | None, slots: Tensor, length: int, dtype: torch.dtype) -> None:
        self.band = middle = slots.shape[0] // 2
        self.most = most = min(length, middle + _POSITION_ROWS)  # of a block of rows some reach further than others
        # Distances 1 - S to S - 1 of query and key: of a key's row from left to right, of a query's from right to left.
        if most > middle + 1:
            slots = slots[torch.arange(1 - most, most).clamp(-middle, middle) + middle]
        else:
            slots = slots[middle - most + 1 : middle + most]
        self.slots = slots.flip(0), slots
        self.tables = tuple(
            None if table is None else _table(table, order, dtype, kept)
            for table, order, kept in zip((c2p, p2c), self.slots, _TABLES, strict=True)
        )
        """[heads, D, 2 S - 1]"""

    def blocks(self, length: int) -> Iterator[tuple[slice, slice, slice]]:
        """Rows of a sequence of that length, the columns of their band, and their distances in the tables."""
        for start in range(0, length, _POSITION_ROWS):
            end = min(start + _POSITION_ROWS, length)
            first, last = max(start - self.band, 0), min(end + self.band, length)
            yield slice(start, end), slice(first, last), slice(self.most - end + first, self.most - start + last - 1)

    def ends(self, length: int) -> Iterator[tuple[int, slice, slice]]:
        """Which distance of the tables rows have beyond their band, these rows and their columns."""
        for rows, columns, _ in self.blocks(length):
            if columns.start:
                yield 0, rows, slice(columns.start)
            if columns.stop < length:
                yield 2 * self.most - 2, rows, slice(columns.stop, length)

    def scores(self, query: Tensor, key: Tensor, heads: slice, scale: float) -> Tensor:
        """query, key (heads, B, S, D), those of `heads` -> the scores, (heads, B, S, S), in their dtype."""
        count, batch, length, _ = query.shape
        scores = _scaled(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), scale)
        scores = scores.view(count, batch, length, length)
        for table, x, own in zip(self.tables, (query, key), (scores, scores.transpose(2, 3)), strict=True):
            if table is not None:
                for rows, columns, distances in self.blocks(length):
                    found = _scaled(x[:, :, rows].flatten(1, 2), table[heads, :, distances], scale)
                    own[:, :, rows, columns] += _by_place(found.unflatten(1, (batch, -1)))
                for distance, rows, columns in self.ends(length):
                    found = _scaled(x[:, :, rows].flatten(1, 2), table[heads, :, distance, None], scale)
                    own[:, :, rows, columns] += found.unflatten(1, (batch, -1))
        return scores

    def gradients(
        self, dscores: Tensor, query: Tensor, key: Tensor, heads: slice, dtables: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Of `dscores`, scaled, those of query and key; those of tables are added to `dtables`, by distance."""
        transposed = dscores.transpose(2, 3)
        dquery, dkey = torch.matmul(dscores, key), torch.matmul(transposed, query)
        places: dict[tuple[int, int], Tensor] = {}  # zeros but where scores are, by the number of rows and distances
        for table, dtable, x, dx, own in zip(
            self.tables, dtables, (query, key), (dquery, dkey), (dscores, transposed), strict=True
        ):
            if table is None or dtable is None:
                continue
            for rows, columns, distances in self.blocks(query.shape[2]):
                some, size = x[:, :, rows], (rows.stop - rows.start, distances.stop - distances.start)
                if size not in places:
                    places[size] = dscores.new_zeros(*some.shape[:3], size[1])
                _by_place(places[size]).copy_(own[:, :, rows, columns])
                together = places[size].flatten(1, 2)
                dx[:, :, rows] += torch.bmm(together, table[heads, :, distances].transpose(1, 2)).view(some.shape)
                found = torch.bmm(together.transpose(1, 2), some.flatten(1, 2))
                dtable[heads, distances] += found
            for distance, rows, columns in self.ends(query.shape[2]):
                some, total = x[:, :, rows].flatten(1, 2), own[:, :, rows, columns].sum(-1).flatten(1, 2)[:, None]
                dx[:, :, rows] += (total.transpose(1, 2) * table[heads, None, :, distance]).view(dx[:, :, rows].shape)
                dtable[heads, distance] += torch.bmm(total, some)[:, 0]
        return dquery, dkey

    def by_slot(
        self, dtables: Sequence[Tensor | None], like: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Sums over the distances of each slot, (P, heads, D); (0,) where there is no table."""
        for dtable, table, slots in zip(dtables, like, self.slots, strict=True):
            if dtable is None or table is None:
                yield torch.empty(0, dtype=dtype)
            else:
                total = dtable.new_zeros(table.shape)
                yield total.index_add_(0, slots, dtable.transpose(0, 1)).to(dtype)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * (a @ b)` of batches, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


_SCORES = 2**18
"""Scores at a time for each thread: as many as caches hold, of `disentangled_attention` with those by distance."""
_ALL = 2**62
"""All that has one length."""


def _limit(dropout: float = 0.0) -> int:
    """Scores at a time; with dropout, drawn again in the backward, whatever the number of threads is by then."""
    return _SCORES if dropout else torch.get_num_threads() * _SCORES


def _parts(
    rows: int,
    heads: int,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    limit: int,
    window: int | None = None,
) -> Iterator[tuple[slice, int, slice, Tensor | None]]:
    """What is taken together: rows, the number of sequences in them, all of one length, heads, their (B, 1, S) mask."""
    for group, batch, mask in _sequences(rows, cu_seqlens, key_mask, max_seqlen):
        first, length = (0, max_seqlen) if cu_seqlens is None else (group.start, group.stop - group.start)
        queries, keys = max(_windows(length, window), key=lambda block: block[1].stop - block[1].start)
        scores = (queries.stop - queries.start) * (keys.stop - keys.start)
        sequences = max(1, min(batch, limit // scores))
        step = max(1, min(heads, limit // (sequences * scores)))
        for start in range(0, batch, sequences):
            end = min(start + sequences, batch)
            some = slice(first + start * length, first + end * length)
            for head in range(0, heads, step):
                yield some, end - start, slice(head, head + step), None if mask is None else mask[start:end, 0]


def _of_heads(x: Tensor, batch: int) -> Tensor:
    """(B S, heads, D) -> (heads, B, S, D)."""
    return x.unflatten(0, (batch, -1)).permute(2, 0, 1, 3)


def disentangled_attention(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, _ = qkv.shape
    dtype, generator = _matmul_dtype(qkv), _generator(seed)
    out = qkv.new_empty(rows, *qkv.shape[2:])
    planes = 2 if qkv.dtype.itemsize > 2 else 1
    stats = qkv.new_ones(planes, heads, rows, dtype=torch.promote_types(qkv.dtype, torch.float32))
    positions = _Positions(c2p, p2c, slots, max_seqlen, dtype)
    for group, batch, some, mask in _parts(rows, heads, cu_seqlens, key_mask, max_seqlen, _limit(dropout)):
        query, key, value = (_of_heads(x[:, some], batch).to(dtype) for x in qkv[group].unbind(1))
        scores = positions.scores(query, key, some, scale).to(stats.dtype)
        if mask is not None:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        if mask is not None:  # without a key they were all 1
            weights.mul_(mask)
        total = weights.sum(-1, keepdim=True).clamp_(min=1.0)
        if dropout:
            weights.mul_(_keep(weights.shape, dropout, generator, weights.dtype))
        result = torch.matmul(weights.to(dtype), value).div_(total)
        out[group, some] = result.permute(1, 2, 0, 3).flatten(0, 1).to(out.dtype)
        stats[0, some, group] = top.add_(total.log()).flatten(1)
    return out, stats


def disentangled_attention_map(
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    places: Tensor | None,
    width: int,
    tiles: Tensor | None,
) -> Tensor:
    q, k, _ = qkv.unbind(1)
    dtype = _matmul_dtype(qkv)
    positions = _Positions(c2p, p2c, slots, max_seqlen, dtype)

    def score(group: slice, batch: int, heads: slice) -> Tensor:
        query, key = (_of_heads(t[group, heads], batch).to(dtype) for t in (q, k))
        return positions.scores(query, key, heads, scale).transpose(0, 1)

    return _mapped(q, cu_seqlens, key_mask, max_seqlen, places, width, score)


def disentangled_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    c2p: Tensor | None,
    p2c: Tensor | None,
    slots: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, heads, _ = qkv.shape
    dtype, generator = _matmul_dtype(qkv), _generator(seed)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    positions = _Positions(c2p, p2c, slots, max_seqlen, dtype)
    distances = positions.slots[0].shape[0]
    dtables = [None if t is None else stats.new_zeros(heads, distances, t.shape[-1]) for t in (c2p, p2c)]
    for group, batch, some, mask in _parts(rows, heads, cu_seqlens, key_mask, max_seqlen, _limit(dropout)):
        query, key, value = (_of_heads(x[:, some], batch).to(dtype) for x in qkv[group].unbind(1))
        dout = _of_heads(grad[group, some], batch).to(dtype)
        # The softmax anew, not by `stats`, and its gradient from these, not from `out`: as precise as stock's.
        scores = positions.scores(query, key, some, scale).to(stats.dtype)
        if mask is None:
            weights = scores.softmax(-1)
        else:  # without a key they are all zero
            weights = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(-1).mul_(mask)
        dweights, kept = torch.matmul(dout, value.transpose(2, 3)).to(stats.dtype), weights
        if dropout:
            keep = _keep(weights.shape, dropout, generator, weights.dtype)
            dweights.mul_(keep)
            kept = weights * keep
        dvalue = torch.matmul(kept.to(dtype).transpose(2, 3), dout)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale).to(dtype)
        found = *positions.gradients(dscores, query, key, some, dtables), dvalue
        for i, each in enumerate(found):
            dqkv[group, i, some] = each.permute(1, 2, 0, 3).flatten(0, 1).to(dqkv.dtype)
    dc2p, dp2c = positions.by_slot(dtables, (c2p, p2c), qkv.dtype)
    return dqkv, dc2p, dp2c


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.layer_norm(x, weight.shape, weight, bias, eps)  # F.layer_norm without its Python


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, weight.shape, weight, eps)


def _total(x: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
    """`dropout(x) + residual` in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    return (x.to(dtype) if keep is None else x * keep) + residual


def _keep_rows(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _keep(x.shape, dropout, _generator(seed), dtype) if dropout else None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    total = _total(x, residual, _keep_rows(x, dropout, seed))
    return torch.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps).to(residual.dtype)


def _layer_norm_backward(grad: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm over `total`, in its dtype, with respect to it, the weight and the bias."""
    dtype, shape = total.dtype, weight.shape
    weight = weight.to(dtype)
    _, mean, rstd = torch.ops.aten.native_layer_norm(total, shape, None, None, eps)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), total, shape, mean, rstd, weight, weight, [True, True, True]
    )
    return grads


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = _keep_rows(x, dropout, seed)
    dtotal, dweight, dbias = _layer_norm_backward(grad, _total(x, residual, keep), weight, eps)
    if keep is not None:
        dx = keep.mul_(dtotal).to(x.dtype)
    else:
        dx = x.new_empty(0) if x.dtype == residual.dtype else dtotal.to(x.dtype)
    return dx, dtotal.to(residual.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _embed(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
    total = F.embedding(ids[0], tables[0]).to(torch.promote_types(tables[0].dtype, torch.float32))
    for each, table in zip(ids[1:], tables[1:], strict=True):
        total += F.embedding(each, table)
    return total


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int = -1,
    position_padding_idx: int = -1,
) -> Tensor:
    total = _embed((input_ids, token_type_ids, position_ids), (word, token_type, position))
    return torch.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps).to(word.dtype)


def embedding_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total = _embed((input_ids, token_type_ids, position_ids), (word, token_type, position))
    dtotal, dweight, dbias = _layer_norm_backward(grad, total, weight, eps)
    return dtotal.to(word.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


# Rows whose logits over the vocabulary are held at once.
_LOSS_ROWS = 256


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Logits rounded to the dtype of x, as a model's are, in `dtype`."""
    return _affine(x, weight, bias).to(x.dtype).to(dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    lse, chosen = x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)
    for start in range(0, x.shape[0], _LOSS_ROWS):
        rows = slice(start, start + _LOSS_ROWS)
        logits = _logits(x[rows], weight, bias, dtype)
        lse[rows] = logits.logsumexp(1)
        chosen[rows] = logits.gather(1, labels[rows, None]).squeeze(1)
    return lse - chosen, lse


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    dweight = torch.zeros(weight.shape, dtype=lse.dtype)
    dbias = torch.zeros(0 if bias is None else weight.shape[0], dtype=lse.dtype)
    for start in range(0, x.shape[0], _LOSS_ROWS):
        rows = slice(start, start + _LOSS_ROWS)
        dlogits = _logits(x[rows], weight, bias, lse.dtype).sub_(lse[rows, None]).exp_().mul_(grad[rows, None])
        dlogits.scatter_add_(1, labels[rows, None], -grad[rows, None].to(dlogits.dtype))
        if bias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(x.dtype)
        dx[rows] = matmul(dlogits, weight.to(x.dtype), x.dtype)
        dweight += matmul(dlogits.t(), x[rows], lse.dtype)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def mask_layout(mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = mask.flatten()
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    before = real.cumsum(0) - real.long()
    rows = torch.arange(real.numel(), device=mask.device)
    slots = torch.where(real, before, real.numel() - 1 - (rows - before))
    labelled = mask.new_zeros(()) if labels is None else ((labels != -100) & ~mask).any()
    begins = mask[:, 0].to(torch.int32) + (mask[:, 1:] & ~mask[:, :-1]).sum(1, dtype=torch.int32)
    totals = [cu_seqlens[-1], lengths.max(), mask[:, 0].all(), labelled, (begins > 1).any()]
    return (
        cu_seqlens,
        torch.empty_like(rows).scatter_(0, slots, rows),
        torch.where(real, before, -1),
        torch.stack([total.to(torch.int64) for total in totals]),
    )


def pack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, indices)


def unpack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    return x.new_zeros(inverse.shape[0], x.shape[1]).index_copy_(0, indices, x)


quantize_fp8 = reference_fp8.quantize_fp8
linear_fp8 = reference_fp8.linear_fp8
linear_gelu_fp8 = reference_fp8.linear_gelu_fp8
linear_add_fp8 = reference_fp8.linear_add_fp8


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    normal = layer_norm(x, weight, bias, eps)
    return normal, *quantize_fp8(normal, scale)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    tiles: Tensor | None,
    out_scale: float,
) -> Tensor:
    out = attention(q, k, v, cu_seqlens, key_mask, max_seqlen, scale, bias, tiles)
    return reference_fp8.to_e4m3(out.float() * (1 / out_scale))


quantize_int8 = cpu_int8.quantize_int8
linear_int8 = cpu_int8.linear_int8
linear_gelu_int8 = cpu_int8.linear_gelu_int8
linear_add_int8 = cpu_int8.linear_add_int8
linear_gelu_quantize_int8 = cpu_int8.linear_gelu_quantize_int8
layer_norm_int8 = cpu_int8.layer_norm_int8
