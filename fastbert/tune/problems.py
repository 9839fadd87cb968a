"""What launch configurations are chosen for, as problems to try them on: arguments, the call, and stock's way to do it.

A problem is one key of a table of kernels/launch.py at the sizes of a model. Adding one: a function below that yields
it, in `problems`; its key is made of the facts it states, by the names of the parameters of the function that chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import launch
from ..kernels.launch import Config
from ..kernels.reference import GATES
from ..kernels.reference_fp8 import mm_on_hopper
from ..measure.cases import workload
from ..tuned import Key

ODD_LENGTHS = (1, 37, 128, 129)
CHECKED_ROWS = sum(ODD_LENGTHS)
EPS = 1e-12


class Sizes(NamedTuple):
    """Of a model: what its kernels' shapes come from."""

    hidden: int
    intermediate: int
    heads: int
    biased: bool = False
    """Whether attention adds a bias by distance, which training moves, as MPNet's does."""
    disentangled: bool = False
    """Whether attention is DeBERTa's."""
    gated: bool = False
    """Whether the feed-forward is, as ModernBERT's."""
    joined: bool = False
    """Whether one linear layer gives queries, keys and values."""


class Problem(NamedTuple):
    """One key, and how to try configurations for it."""

    name: str
    key: Key
    module: str
    """Of fastbert.kernels; the function in it that is called, and stock's way, which takes the same arguments.

    Of the function's results those are judged that stock has: its first ones."""
    function: str
    peer: Callable[..., object]
    arguments: Callable[[int, torch.device], tuple[object, ...]]
    """Of so many rows, from torch's generator."""
    shared: Callable[[Config], int]
    """Bytes of shared memory that a configuration's operands take."""
    held: Callable[[Config], float]
    """float32 numbers that a thread holds."""
    rows: tuple[int, ...] = (2048, 32768)
    """Numbers of rows to time at."""
    same_bits: bool = False
    """Whether results have to be those of the shipped configuration, bit by bit: it depends on the number of rows."""
    multiprocessors: int = 0
    """SMs that the shipped configuration is chosen for; 0: as many as the architecture's usual device has."""

    def call(self, *arguments: object) -> object:
        """The kernel, with the configuration in use."""
        return getattr(importlib.import_module(f"fastbert.kernels.{self.module}"), self.function)(*arguments)

    @property
    def checked_rows(self) -> int:
        """Rows that results are checked at: of a class of numbers of rows, the least, which is odd."""
        return self.rows[0] // 2 + 1 if self.same_bits else CHECKED_ROWS

    def shipped(self, rows: int | None = None) -> Config:
        """What the tables have: for the key, or for so many rows where it depends on their number."""
        operation = launch.OPERATIONS[self.key[0]]
        given = dict(zip(operation.parameters(), self.key[1:], strict=True))
        if "rows" in given:
            given["rows"] = launch.round_rows(rows or given["rows"])
            given["multiprocessors"] = self.multiprocessors
        return operation.choose(**given)


_Call = tuple[str, str, Callable[..., object], Callable[..., tuple[object, ...]]]
"""The fields of a Problem from its module to its arguments."""
_Room = tuple[Callable[[Config], int], Callable[[Config], float]]
"""Those that come next: what is shared, and held."""


def key(operation: str, arch: str, dtype: torch.dtype, **facts: int) -> Key:
    """The key of an operation, from facts by name; those its function does not ask for are left out."""
    facts_known: dict[str, object] = {"arch": arch, "dtype": dtype, **facts}
    return (operation, *(facts_known[name] for name in launch.OPERATIONS[operation].parameters()))


def timed_rows(rows: int) -> tuple[int, ...]:
    """What a configuration for a class of numbers of rows is timed at: where tiles fill their last wave, and elsewhere.

    It holds for all of the class, where the shipped one is chosen at the exact number.
    """
    if rows == launch.MANY_ROWS:
        return rows, sum(workload("squad", 128).lengths), 4 * rows
    return (rows, 3 * rows // 4) if rows > 64 else (rows,)


def lengths_of(rows: int) -> tuple[int, ...]:
    """Lengths of sequences, `rows` tokens in all: odd ones, or where there are many rows those of SQuAD's pairs."""
    found: list[int] = []
    for length in cycle(ODD_LENGTHS if rows < 1024 else workload("squad", 128).lengths):
        found.append(min(length, rows - sum(found)))
        if sum(found) == rows:
            return tuple(found)
    raise AssertionError("unreachable")


def _normal(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype)


def _of_tiles(dtype: torch.dtype, weights: int = 1, tiles: int = 1) -> _Room:
    """`Problem.shared` and `.held` of a GEMM by so many weights, of which a thread holds parts of so many tiles."""
    return (
        lambda c: c.num_stages * (c.block_m + weights * c.block_n) * c.block_k * dtype.itemsize,
        lambda c: tiles * c.block_m * c.block_n / (32 * c.num_warps),
    )


def _by_rows(
    name: str, key_at: Callable[..., Key], call: _Call, room: _Room, multiprocessors: int
) -> Iterator[Problem]:
    """The problems of a GEMM, one for each class of numbers of rows, which `key_at` is given; the largest first."""
    for rows in sorted({launch.row_class(1 << power) for power in range(31)}, reverse=True):
        more = "+" if rows == launch.MANY_ROWS else ""
        named = f"{name}, {rows}{more} rows"
        yield Problem(named, key_at(rows=rows), *call, *room, timed_rows(rows), True, multiprocessors)


def _gemms(sizes: Sizes, dtype: torch.dtype, arch: str, multiprocessors: int) -> Iterator[Problem]:
    h, i = sizes.hidden, sizes.intermediate

    def stock_qkv(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.stack([F.linear(x, *rest[j : j + 2]) for j in (0, 2, 4)], 1)

    def gates(rows: int, device: torch.device) -> tuple[object, ...]:
        gate, up = (_normal(device, dtype, i, h, scale=h**-0.5) for _ in range(2))
        return _normal(device, dtype, rows, h), gate, None, up, None, "gelu"

    def stock_gated(x: Tensor, gate: Tensor, _: None, up: Tensor, __: None, how: str) -> Tensor:
        return GATES[how](F.linear(x, gate)) * F.linear(x, up)

    def added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + residual

    def arguments(rows: int, device: torch.device, n: int, k: int, segments: int, function: str) -> tuple[object, ...]:
        normal = partial(_normal, device, dtype)
        weights = [each for _ in range(segments) for each in (normal(n, k, scale=k**-0.5), normal(n))]
        more = {"linear_gelu": ("none",), "linear_add": (normal(rows, n),)}.get(function, ())
        return (normal(rows, k), *weights, *more)

    if sizes.gated:
        call = "linear_gated", "linear_gated", stock_gated, gates
        yield Problem("gate", key("linear_gated", arch, dtype, n=i, k=h), *call, *_of_tiles(dtype, 2, 2))
    first = ("qkv", "linear", F.linear, 3 * h, h, 1) if sizes.joined else ("qkv", "qkv_linear", stock_qkv, h, h, 3)
    up = ("up", "linear_gelu", lambda x, w, b, how: F.gelu(F.linear(x, w, b), approximate=how), i, h, 1)
    for name, function, peer, n, k, segments in (
        first,
        *(() if sizes.gated else (up,)),
        ("down", "linear_add", added, h, i, 1),
        ("projection", "linear_add", added, h, h, 1),
    ):
        given = partial(arguments, n=n, k=k, segments=segments, function=function)
        keys = partial(key, "linear", arch, dtype, n=n, k=k, segments=segments)
        yield from _by_rows(name, keys, ("linear", function, peer, given), _of_tiles(dtype), multiprocessors)


def _gemms_fp8(sizes: Sizes, dtype: torch.dtype, arch: str, multiprocessors: int) -> Iterator[Problem]:
    h, i, eight = sizes.hidden, sizes.intermediate, torch.float8_e4m3fn
    unit = 2**-4  # of a result in FP8

    def gemm(x: Tensor, rows: None, weight: Tensor, scale: Tensor, bias: Tensor, *rest: object) -> Tensor:
        """In the dtype of the bias, which holds FP8 numbers exactly; in float32 with the sums that Hopper has."""
        if arch == "sm_90" and bias.dtype == torch.float32:
            return mm_on_hopper(x.to(eight), weight.to(eight), launch.FP8_EXACT_K) * scale + bias
        return F.linear(x.to(bias.dtype), weight.to(bias.dtype)) * scale.to(bias.dtype) + bias

    def gelu(*arguments: Any) -> Tensor:
        found = F.gelu(gemm(*arguments[:5]), approximate=arguments[6]) / arguments[7]
        return found if found.dtype == torch.float64 else found.clamp(-448, 448).to(eight)

    def added(*arguments: Any) -> Tensor:
        return gemm(*arguments[:5]) + arguments[5]

    def arguments(rows: int, device: torch.device, n: int, k: int, function: str) -> tuple[object, ...]:
        x, weight = (_normal(device, torch.float32, count, k).to(eight) for count in (rows, n))
        scale = torch.rand(n, device=device) * k**-0.5
        more = {
            "linear_fp8": (dtype,),
            "linear_gelu_fp8": (dtype, "none", unit),
            "linear_add_fp8": (_normal(device, dtype, rows, n),),
        }[function]
        return (x, None, weight, scale, _normal(device, dtype, n), *more)

    for name, function, peer, n, k in (
        ("qkv fp8", "linear_fp8", gemm, 3 * h, h),
        ("up fp8", "linear_gelu_fp8", gelu, i, h),
        ("down fp8", "linear_add_fp8", added, h, i),
        ("projection fp8", "linear_add_fp8", added, h, h),
    ):
        call = "linear_fp8", function, peer, partial(arguments, n=n, k=k, function=function)
        keys = partial(key, "linear_fp8", arch, dtype, n=n, k=k)
        # Exact sums hold a tile twice.
        yield from _by_rows(name, keys, call, _of_tiles(eight, tiles=2), multiprocessors)


def _sequences(rows: int, device: torch.device) -> tuple[Tensor, None, int]:
    lengths = lengths_of(rows)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return starts, None, max(lengths)


def _stock_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    mask: None,
    longest: int,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Sequence by sequence; q, k and v (T, heads, head_dim), bias (heads, 2 * span - 1)."""
    lengths = starts.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    each = []
    for q, k, v in parts:
        added, places = None, torch.arange(q.shape[1], device=q.device)
        if bias is not None:
            added = bias[:, bias.shape[1] // 2 + places - places[:, None]]
        each.append(F.scaled_dot_product_attention(q, k, v, added, scale=scale).transpose(0, 1))
    return torch.cat(each)


def _stock_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    starts: Tensor,
    mask: None,
    longest: int,
    scale: float,
    dropout: float,
    seed: None,
    tiles: None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [qkv.detach().clone().requires_grad_()]
        leaves += [] if bias is None else [bias.to(qkv.dtype).requires_grad_()]
        q, k, v = leaves[0].unbind(1)
        result = _stock_attention(q, k, v, starts, mask, longest, scale, *leaves[1:])
        dqkv, *dbias = torch.autograd.grad(result, leaves, grad)
        return dqkv, torch.empty_like(stats[:0, 0, 0]) if bias is None else dbias[0].to(bias.dtype)


def _of_heads(
    sizes: Sizes, dtype: torch.dtype, scores: int
) -> tuple[int, Callable[[Config], int], Callable[[Config], float]]:
    """The width of a head; and `Problem.shared` and `.held` of attention, of which a thread holds so many scores."""
    head_dim = sizes.hidden // sizes.heads
    return (
        head_dim,
        lambda c: (c.block_m + 2 * c.num_stages * c.block_n) * head_dim * dtype.itemsize,
        lambda c: c.block_m * (head_dim + scores * c.block_n) / (32 * c.num_warps),
    )


def _attention(sizes: Sizes, dtype: torch.dtype, arch: str, train: bool) -> Iterator[Problem]:
    heads = sizes.heads
    head_dim, shared, held = _of_heads(sizes, dtype, 1)
    scale = head_dim**-0.5
    kernels = importlib.import_module("fastbert.kernels.attention")

    def forward(rows: int, device: torch.device) -> tuple[object, ...]:
        qkv = _normal(device, dtype, rows, 3, heads, head_dim)
        return (*qkv.unbind(1), *_sequences(rows, device), scale)

    def backward(rows: int, device: torch.device) -> tuple[object, ...]:
        qkv, grad = _normal(device, dtype, rows, 3, heads, head_dim), _normal(device, dtype, rows, heads, head_dim)
        sequences = (*_sequences(rows, device), scale, 0.0, None)
        return (grad, qkv, *kernels.attention_forward(qkv, *sequences), *sequences)

    def bias_backward(rows: int, device: torch.device) -> tuple[object, ...]:
        grad, qkv, _, _, *sequences = backward(rows, device)
        bias = _normal(device, dtype, heads, 2 * max(lengths_of(rows)) - 1).float()
        return (grad, qkv, *kernels.attention_forward(qkv, *sequences, None, bias), *sequences, None, bias)

    keys = partial(key, arch=arch, dtype=dtype, head_dim=head_dim)
    yield Problem("attention", keys("attention"), "attention", "attention", _stock_attention, forward, shared, held)
    back = "attention", "attention_backward", _stock_attention_backward
    if train:
        name = "attention, backward"
        yield Problem(name, keys("attention_backward"), *back, backward, shared, lambda c: 2 * held(c))
    if train and sizes.biased:
        yield Problem(
            "attention, bias's gradient",
            keys("attention_dbias"),
            *back,
            bias_backward,
            lambda c: 4 * c.num_stages * c.block_m * head_dim * dtype.itemsize,
            lambda c: 3 * c.block_m**2 / (32 * c.num_warps),
        )


def _stock_disentangled(
    qkv: Tensor,
    c2p: Tensor,
    p2c: Tensor,
    slots: Tensor,
    starts: Tensor,
    mask: None,
    longest: int,
    scale: float,
    *_: object,
) -> Tensor:
    """Sequence by sequence."""
    each = []
    for rows in qkv.split(starts.diff().tolist()):
        q, k, v = rows.permute(1, 2, 0, 3)  # [heads, S, D]
        places = torch.arange(q.shape[1], device=q.device)
        chosen = slots.long()[slots.shape[0] // 2 + places[:, None] - places].expand(q.shape[0], -1, -1)
        by_query, by_key = (x @ table.permute(1, 2, 0) for x, table in ((q, c2p), (k, p2c)))
        scores = q @ k.mT + by_query.gather(2, chosen) + by_key.gather(2, chosen.mT).mT
        each.append(((scores * scale).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(each)


def _stock_disentangled_backward(
    grad: Tensor, qkv: Tensor, c2p: Tensor, p2c: Tensor, slots: Tensor, out: Tensor, stats: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in (qkv, c2p, p2c)]
        given: tuple[Any, ...] = (*leaves, slots, *rest)
        return torch.autograd.grad(_stock_disentangled(*given), leaves, grad)


def _disentangled(sizes: Sizes, dtype: torch.dtype, arch: str, train: bool) -> Iterator[Problem]:
    heads = sizes.heads
    head_dim, shared, held = _of_heads(sizes, dtype, 2)
    kernels = importlib.import_module("fastbert.kernels.disentangled")

    def forward(rows: int, device: torch.device) -> tuple[object, ...]:
        qkv = _normal(device, dtype, rows, 3, heads, head_dim)
        tables = (_normal(device, dtype, 512, heads, head_dim) for _ in range(2))
        starts, mask, longest = _sequences(rows, device)
        slots = (torch.arange(1 - longest, longest, device=device) + 256).clamp(0, 511).int()
        return qkv, *tables, slots, starts, mask, longest, (3 * head_dim) ** -0.5, 0.0, None, None

    def backward(rows: int, device: torch.device) -> tuple[object, ...]:
        qkv, *tables, slots = (given := forward(rows, device))[:4]
        grad = _normal(device, dtype, rows, heads, head_dim)
        return (grad, qkv, *tables, slots, *kernels.disentangled_attention(*given), *given[4:])

    # Scores by position are told apart from the rest in no launch: the whole operator, of the backward where it is
    # asked for, which makes them and what gradients give rows and tables.
    keys = partial(key, arch=arch, dtype=dtype, head_dim=head_dim)
    ahead: _Call = "disentangled", "disentangled_attention", _stock_disentangled, forward
    back: _Call = "disentangled", "disentangled_attention_backward", _stock_disentangled_backward, backward
    yield Problem("disentangled attention", keys("disentangled"), *ahead, shared, held)
    if train:
        name = "disentangled attention, backward"
        yield Problem(name, keys("disentangled_backward"), *back, shared, lambda c: 2 * held(c))
    yield Problem(
        "scores by position",
        keys("position"),
        *(back if train else ahead),
        lambda c: c.num_stages * (c.block_m + c.block_n) * head_dim * dtype.itemsize,
        lambda c: c.block_m * max(c.block_n, head_dim) / (32 * c.num_warps),
    )


def _rows(sizes: Sizes, dtype: torch.dtype, arch: str, train: bool) -> Iterator[Problem]:
    h, i = sizes.hidden, sizes.intermediate

    def norm(rows: int, device: torch.device) -> tuple[object, ...]:
        return _normal(device, dtype, rows, h), _normal(device, dtype, h), _normal(device, dtype, h), EPS

    def norm_backward(rows: int, device: torch.device) -> tuple[object, ...]:
        grad, x, residual = (_normal(device, dtype, rows, h) for _ in range(3))
        return grad, x, residual, _normal(device, dtype, h), EPS, 0.0, None

    def stock_norm_backward(
        grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *dropout: object
    ) -> tuple[Tensor, ...]:
        total = x + residual
        _, mean, rstd = torch.ops.aten.native_layer_norm(total, weight.shape, None, None, eps)
        back = torch.ops.aten.native_layer_norm_backward
        found = back(grad, total, weight.shape, mean, rstd, weight, weight, [True] * 3)
        return (x.new_empty(0), *found)  # the gradient of x is that of the residual

    def gelu_backward(rows: int, device: torch.device) -> tuple[object, ...]:
        weight = _normal(device, dtype, h, i, scale=h**-0.5)
        return _normal(device, dtype, rows, h), weight, _normal(device, dtype, rows, i), "none"

    def stock_gelu_backward(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
        dpre = torch.ops.aten.gelu_backward(grad @ weight, pre, approximate=approximate)
        return dpre, F.gelu(pre, approximate=approximate)

    def gated_backward(rows: int, device: torch.device) -> tuple[object, ...]:
        grad, weight, *_ = gelu_backward(rows, device)
        return grad, weight, _normal(device, dtype, rows, 2 * i), "gelu"

    def stock_gated_backward(grad: Tensor, weight: Tensor, pre: Tensor, how: str) -> tuple[Tensor, Tensor]:
        activated, factor = pre.chunk(2, 1)
        between, dgated = GATES[how](activated), grad @ weight
        dactivated = torch.ops.aten.gelu_backward(dgated * factor, activated)
        return torch.cat([dactivated, dgated * between], 1), between * factor

    def stock_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def rows_held(rows: int) -> _Room:
        return lambda c: 0, lambda c: rows * c.block_n / (32 * c.num_warps)

    call = "layer_norm", "layer_norm", stock_norm, norm
    yield Problem("LayerNorm", key("row", arch, dtype, width=h), *call, *rows_held(1))
    if train:
        back = "layer_norm", "add_layer_norm_backward", stock_norm_backward, norm_backward
        yield Problem("LayerNorm, backward", key("row_backward", arch, dtype, width=h), *back, *rows_held(6))
        gelu: _Call = "linear", "linear_gelu_backward", stock_gelu_backward, gelu_backward
        gated: _Call = "linear_gated", "linear_gated_backward", stock_gated_backward, gated_backward
        yield Problem(
            "gate, backward" if sizes.gated else "GELU, backward",
            key("linear_backward", arch, dtype, n=i, k=h),
            *(gated if sizes.gated else gelu),
            *_of_tiles(dtype),
        )


def problems(
    sizes: Sizes,
    dtype: torch.dtype,
    arch: str,
    train: bool = False,
    precision: str | None = None,
    multiprocessors: int = 0,
) -> list[Problem]:
    """All there is to tune in a model, what takes most of its time first.

    Args:
        sizes, dtype: of the model.
        arch: as `launch.architecture` names it.
        train: the kernels of the backward, too.
        precision: "fp8": its GEMMs in FP8, with results in `dtype`, in place of those in `dtype`.
        multiprocessors: SMs of the device; 0: as many as the architecture's usual one has.
    """
    gemms = _gemms if precision is None else _gemms_fp8
    attention = _disentangled if sizes.disentangled else _attention
    found = [*gemms(sizes, dtype, arch, multiprocessors), *attention(sizes, dtype, arch, train)]
    found += _rows(sizes, dtype, arch, train)
    return sorted(found, key=lambda each: each.same_bits and each.rows[0] != launch.MANY_ROWS)


def listed(result: Any) -> Sequence[Tensor]:
    """The tensors of a result, one or several."""
    return [result] if isinstance(result, Tensor) else list(result)
