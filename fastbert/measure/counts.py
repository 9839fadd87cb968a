"""What calls cost at least: FLOPs of their matmuls, and bytes they move.

A matmul of (M, K) and (K, N) is 2 M K N FLOPs; arithmetic element by element (GELU, softmax, LayerNorm, dropout) is
none. Attention is its two matmuls within each sequence, masked keys included, and its backward five: scores, and the
gradients of probabilities, queries, keys and values, each once; of DeBERTa's, each term of positions is one more, and
three in the backward. Of bytes, every argument is read once and every result written once, in its own dtype; of tables,
only the rows that are asked for. What stays within a launch costs nothing, and what a cache still holds is counted all
the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from .. import ops
from ..runtime.registry import REGISTERED, layers_of


class Cost(NamedTuple):
    """FLOPs and bytes."""

    flops: int
    bytes: int


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    each = list(costs)
    return Cost(sum(cost.flops for cost in each), sum(cost.bytes for cost in each))


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in an argument or a result: itself, or those of a list or tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _bytes(value: object) -> int:
    """Bytes of the tensors in `value`; of an expanded one, what it holds in memory."""
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in _tensors(value))


def _matmul_flops(*shapes: tuple[int, int, int]) -> int:
    return sum(2 * m * n * k for m, n, k in shapes)


def _linear(x: Tensor, weight: Tensor, *rest: object) -> int:
    return _matmul_flops((x.shape[0], *weight.shape))


def _pairs(rows: int, cu_seqlens: Tensor | None, max_seqlen: int, most: int | None = None) -> int:
    """Pairs of a query and a key of the same sequence, or one of `most`. Reads `cu_seqlens`: on a GPU it waits."""
    if cu_seqlens is None:
        return rows * min(max_seqlen, most or max_seqlen)
    lengths = cu_seqlens.long().diff()
    return int((lengths * lengths.clamp(max=most)).sum()) if most else int(lengths.square().sum())


def _near_pairs(rows: int, cu_seqlens: Tensor | None, max_seqlen: int, window: int) -> int:
    """Pairs of a query and a key that is not further than `window` from it. Reads `cu_seqlens`."""
    lengths = [max_seqlen] * (rows // max(max_seqlen, 1)) if cu_seqlens is None else cu_seqlens.diff().tolist()
    return sum(n * n if n <= window else n * (2 * window + 1) - window * (window + 1) for n in lengths)


def _attention(
    q: Tensor, sequences: Sequence[Any], matmuls: int, most: int | None = None, place: int | None = None
) -> int:
    """Of `matmuls` matmuls over q (T, heads, head_dim) or qkv (T, 3, heads, head_dim); the window is at `place`."""
    cu_seqlens, _, max_seqlen, *_ = sequences
    window = sequences[place] if place is not None and place < len(sequences) else None
    layout = q.shape[0], cu_seqlens, max_seqlen
    pairs = _pairs(*layout, most) if window is None else _near_pairs(*layout, window)
    return matmuls * 2 * q.shape[-2] * q.shape[-1] * pairs


def _disentangled(args: Sequence[Any], matmuls: int, more: int) -> int:
    """The same with `more` of them for each of the tables: of a row by as many distances as keys, or by every slot."""
    qkv, c2p, p2c, _, *sequences = args
    tables = [table for table in (c2p, p2c) if table is not None]
    return _attention(qkv, sequences, matmuls) + sum(_attention(qkv, sequences, more, len(table)) for table in tables)


# FLOPs by operator, from its arguments; operators without matmuls are not in it.
_FLOPS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(
        ("linear_fp8", "linear_gelu_fp8", "linear_add_fp8"), lambda x, scale, weight, *_: _linear(x, weight)
    ),
    **dict.fromkeys(
        ("linear_int8", "linear_gelu_int8", "linear_gelu_quantize_int8", "linear_add_int8"),
        lambda x, scale, zero, weight, *_: _linear(x, weight),
    ),
    "linear": _linear,
    "linear_gelu": _linear,
    "linear_add": _linear,
    "linear_gated": lambda x, gate, gate_bias, up, *_: (1 if up is None else 2) * _linear(x, gate),
    "qkv_linear": lambda x, q_weight, *rest: 3 * _linear(x, q_weight),
    "feed_forward": lambda x, weight1, bias1, weight2, *rest: _linear(x, weight1) + _linear(x, weight2),
    "gated_feed_forward": lambda x, gate, gate_bias, up, up_bias, down, *_: (
        (1 if up is None else 2) * _linear(x, gate) + _linear(x, down)
    ),
    "linear_gelu_backward": _linear,
    "linear_gated_backward": _linear,
    "attention": lambda q, k, v, *sequences: _attention(q, sequences, 2, place=6),
    "attention_fp8": lambda q, k, v, *sequences: _attention(q, sequences, 2),
    "attention_map": lambda q, k, *sequences: _attention(q, sequences, 1, place=8),
    "attention_forward": lambda qkv, *sequences: _attention(qkv, sequences, 2, place=8),
    "attention_backward": lambda grad, qkv, out, stats, *sequences: _attention(qkv, sequences, 5, place=9),
    "disentangled_attention": lambda *args: _disentangled(args, 2, 1),
    "disentangled_attention_map": lambda *args: _disentangled(args, 1, 1),
    "disentangled_attention_backward": lambda grad, *args: _disentangled((*args[:4], *args[6:]), 5, 3),
    "linear_cross_entropy": _linear,
    "linear_cross_entropy_backward": lambda grad, x, weight, *rest: 3 * _linear(x, weight),
}


def _rows(ids: Tensor, table: Tensor) -> int:
    """Bytes of the rows of a table that `ids` ask for, each once. Reads the ids: on a GPU a synchronisation."""
    return ids.unique().numel() * table.shape[1] * table.itemsize


def _embedding(args: Sequence[Any], first: int) -> int:
    """Bytes read by an embedding whose ids are args[first : first + 3] and whose tables are the three after."""
    ids, tables = args[first : first + 3], args[first + 3 : first + 6]
    return _bytes((*args[: first + 3], *args[first + 6 :])) + sum(map(_rows, ids, tables))


# Bytes read by operator, from its arguments, where it does not read all of them, or reads more.
_READ: dict[str, Callable[..., int]] = {
    "embedding_layer_norm": lambda *args: _embedding(args, 0),
    "embedding_layer_norm_backward": lambda *args: _embedding(args, 1),
    "disentangled_attention_map": lambda qkv, *rest: _bytes((qkv[:, :2], *rest)),  # no values
    "pack": lambda x, indices, inverse: _bytes(indices) + indices.numel() * x.shape[1] * x.itemsize,
    "unpack": lambda x, indices, inverse: _bytes((x, inverse)),
    # Two launches: GELU's result is written by the first and read by the second.
    "feed_forward": lambda x, weight1, *rest: (
        _bytes((x, weight1, *rest)) + 2 * x.shape[0] * weight1.shape[0] * x.itemsize
    ),
    "gated_feed_forward": lambda x, *rest: _bytes((x, *rest)) + 2 * x.shape[0] * rest[4].shape[1] * x.itemsize,
}


def cost(name: str, args: Sequence[object], result: object) -> Cost:
    """The least that one call of an operator costs.

    Args:
        name: the operator, without its namespace: one of fastbert's, as "qkv_linear".
        args: what it was called with. Only shapes, strides and dtypes are looked at, but for `cu_seqlens` and the ids
            of embeddings, whose values count.
        result: what it returned: a tensor or a tuple of tensors.

    Raises:
        ValueError: there is no such operator.
    """
    if name not in ops.OPERATORS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(ops.OPERATORS)}")
    read = _READ[name](*args) if name in _READ else _bytes(args)
    return Cost(_FLOPS[name](*args) if name in _FLOPS else 0, read + _bytes(result))


_aten = torch.ops.aten
# As torch.utils.flop_counter has them; attention on a CPU is not in its registry.
_TORCH_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
# Of their first argument they read as much as they return.
_GATHERS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}


def torch_cost(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, object], result: object) -> Cost:
    """The same of an operator of torch's own, a torch._ops.OpOverload; 0 for one that returns a view."""
    packet = operator._overloadpacket
    aliases = [each.alias_info for each in operator._schema.returns]
    if aliases and all(alias is not None and not alias.is_write for alias in aliases):
        return Cost(0, 0)
    flops = int(_TORCH_FLOPS[packet](*args, **kwargs, out_val=result)) if packet in _TORCH_FLOPS else 0
    written = _bytes(result)
    if packet in _GATHERS:
        return Cost(flops, _bytes(args[1:]) + 2 * written)
    return Cost(flops, _bytes(args) + _bytes(list(kwargs.values())) + written)


def _rotary(config: PreTrainedConfig, lengths: Sequence[int], dtype: torch.dtype, train: bool) -> Cost:
    """`encoder` of a family with rotary positions, by what its layers are made of.

    A gate, a residual that is added in training, and the gradients of both and of norms before halves are a pass each.
    """
    family = next(family for family in REGISTERED.values() if family.config is type(config))
    with torch.device("meta"):
        layers = layers_of(family.base(config).to(dtype).train(train))
    layout, tokens, heads = family.layout, sum(lengths), config.num_attention_heads
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    found: list[Cost] = []

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(name: str, *args: object) -> None:
        found.append(cost(name, args, ops.OPERATORS[name].fake(*args)))

    def rows(count: int, width: int) -> None:
        """So many rows a token, of that width, read or written."""
        found.append(Cost(0, count * tokens * width * dtype.itemsize))

    def gradients(linears: Sequence[nn.Linear], of_input: bool = True) -> None:
        """Of the weights of linear layers side by side, and of their input."""
        n, k = sum(each.out_features for each in linears), linears[0].in_features
        for a, b, c in [(n, tokens, k), (tokens, n, k)][: 1 + of_input]:
            found.append(Cost(_matmul_flops((a, c, b)), (a * b + b * c + a * c) * dtype.itemsize))

    for layer, kind in zip(layers, getattr(config, "layer_types", [""] * len(layers)), strict=True):
        gemms, norms = layout.gemms(layer), [norm for _, norm in layout.norms(layer)]
        qkv_weights = [tensor for each in gemms["qkv"] for tensor in (each.weight, each.bias)]
        (out,), (up,), (down,), gate = gemms["context"], gemms["up"], gemms["down"], gemms.get("gate", ())
        h, i, vector = out.out_features, down.in_features, empty(out.out_features)
        x, wide, qkv = empty(tokens, h), empty(tokens, i), empty(tokens, 3, heads, h // heads)
        context, turns = qkv[:, 0].contiguous(), (empty(tokens, h // heads),) * 2
        sequences, near = (starts, None, max(lengths), math.sqrt(heads / h)), kind == "sliding_attention"
        drops = [(rate, seed if rate else None) for rate in layout.dropouts(layer)]
        gated = bool(gate) or layout.feed_forward.is_gated
        gates = [tensor for each in (*gate, up) for tensor in (each.weight, each.bias)] + [None, None] * (not gate)
        if layout.pre_norm:
            for norm in norms:
                if not isinstance(norm, nn.Identity):
                    rms = layout.norm is not nn.LayerNorm
                    call("rms_norm" if rms else "layer_norm", x, *(vector,) * (1 if rms else 2), 0.0)
                    rows(3 * train, h)
        call("linear" if len(gemms["qkv"]) == 1 else "qkv_linear", x, *qkv_weights)
        call("rotate", qkv, *turns)
        window = (None, None, config.sliding_window) if near else ()
        if not train:
            call("attention", context, context, context, *sequences, *window)
            call("linear_add", x, out.weight, out.bias, x)
            if gated:
                call("linear_gated", x, *gates, "silu")
            else:
                call("linear_gelu", x, up.weight, up.bias, "none")
            call("linear_add", wide, down.weight, down.bias, x)
            for _ in () if layout.pre_norm else norms:
                call("layer_norm", x, vector, vector, 0.0)
            continue
        stats = torch.empty(1 + (dtype.itemsize > 2), heads, tokens, dtype=torch.float32, device="meta")
        call("attention_forward", qkv, *sequences, *drops[0], *window)
        call("linear", x, out.weight, out.bias)
        if gated:
            call("gated_feed_forward", x, *gates, down.weight, down.bias, "silu")
            call("linear_gated_backward", x, down.weight, empty(tokens, 2 * i), "silu")
        else:
            call("feed_forward", x, up.weight, up.bias, down.weight, down.bias, "none")
            call("linear_gelu_backward", x, down.weight, wide, "none")
        for drop in drops[1:3]:
            if layout.pre_norm:
                rows(3 + 3, h)
            else:
                call("add_layer_norm", x, x, vector, vector, 0.0, *drop)
                call("add_layer_norm_backward", x, x, x, vector, 0.0, *drop)
        gradients([down], of_input=False)
        gradients([*gate, up])
        gradients([out])
        more = (None, None, False, config.sliding_window) if near else ()
        call("attention_backward", context, qkv, context, stats, *sequences, *drops[0], *more)
        call("rotate", qkv, *turns, True)
        gradients(gemms["qkv"])
    return total(found)


_DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob")


def encoder(config: PreTrainedConfig, lengths: Sequence[int], dtype: torch.dtype, train: bool = False) -> Cost:
    """The least that the layers of a packed encoder cost, without its embeddings and without packing and unpacking.

    A forward is the seven launches of each layer. A training step is the same with what the backward needs written, the
    operators of the backward, and the matmuls that make up the gradients of weights and inputs; DeBERTa's also makes
    keys and queries of positions in every layer, which inference keeps, and their gradients; sums of gradients are
    counted as part of the matmuls that make them, and dropout's rates are the config's.

    Args:
        config: of a model of a supported family; of one with rotary positions, after `fuse` has met one.
        lengths: of the sequences, in tokens.
        dtype: of weights, activations and gradients.
        train: forward and backward, not a forward.
    """
    kind = getattr(config, "position_embedding_type", None)  # ESM's
    if getattr(config, "rope_parameters", None) is not None or kind == "rotary":
        return _rotary(config, lengths, dtype, train)
    tokens, h = sum(lengths), config.hidden_size
    i = config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size  # DistilBERT's name

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(name: str, *args: object) -> Cost:
        return cost(name, args, ops.OPERATORS[name].fake(*args))

    def matmul(m: int, k: int, n: int) -> Cost:
        return Cost(_matmul_flops((m, n, k)), (m * k + k * n + m * n) * dtype.itemsize)

    def positions(calls: int) -> list[Cost]:
        """Of the linear layers that make keys and queries of positions."""
        return [matmul(slots, h, h)] * (calls * len(terms))

    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)  # calls, of ALBERT's groups
    heads, eps = config.num_attention_heads, 0.0
    x, wide, square, up, down = empty(tokens, h), empty(tokens, i), empty(h, h), empty(i, h), empty(h, i)
    vector, long = empty(h), empty(i)
    context, qkv = empty(tokens, heads, h // heads), empty(tokens, 3, heads, h // heads)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    sequences = starts, None, max(lengths), math.sqrt(heads / h)
    terms = (getattr(config, "pos_att_type", None) or []) if getattr(config, "relative_attention", False) else []
    buckets, furthest = getattr(config, "position_buckets", -1), getattr(config, "max_relative_positions", -1)
    slots = 2 * (buckets if buckets > 0 else furthest if furthest > 0 else config.max_position_embeddings)
    tables = [empty(slots, heads, h // heads) if term in terms else None for term in ("c2p", "p2c")]
    relative = *tables, torch.empty(2 * max(lengths) - 1, dtype=torch.int32, device="meta"), *sequences
    reach = getattr(config, "conv_kernel_size", 0)  # of DeBERTa's convolution, once a forward
    convolutions = [matmul(tokens, reach * h, h)] if reach > 0 else []
    if not train:
        each = [
            call("qkv_linear", x, *(square, vector) * 3),
            call("disentangled_attention", qkv, *relative, 0.0, None, None)
            if terms
            else call("attention", context, context, context, *sequences),
            call("linear_add", x, square, vector, x),
            call("layer_norm", x, vector, vector, eps),
            call("linear_gelu", x, up, long, "none"),
            call("linear_add", wide, down, vector, x),
            call("layer_norm", x, vector, vector, eps),
        ]
        return total(each * layers + convolutions)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    names = ("attention_dropout", "dropout") if hasattr(config, "hidden_dim") else _DROPOUTS
    drops = [(rate, seed if rate else None) for rate in (getattr(config, name) for name in names)]
    planes = 2 if dtype.itemsize > 2 else 1
    stats = torch.empty(planes, heads, tokens, dtype=torch.promote_types(dtype, torch.float32), device="meta")
    biases = Cost(0, _bytes([*(vector,) * 5, long]))
    each = [
        call("qkv_linear", x, *(square, vector) * 3),
        call("disentangled_attention", qkv, *relative, *drops[0], None)
        if terms
        else call("attention_forward", qkv, *sequences, *drops[0]),
        *positions(3),
        call("linear", x, square, vector),
        *[call("add_layer_norm", x, x, vector, vector, eps, *drops[1])] * 2,
        call("feed_forward", x, up, long, down, vector, "none"),
        *[call("add_layer_norm_backward", x, x, x, vector, eps, *drops[1])] * 2,
        call("linear_gelu_backward", x, down, wide, "none"),
        matmul(h, tokens, i),
        matmul(tokens, i, h),
        matmul(i, tokens, h),
        matmul(tokens, h, h),
        matmul(h, tokens, h),
        call(
            "disentangled_attention_backward", context, qkv, *relative[:3], context, stats, *sequences, *drops[0], None
        )
        if terms
        else call("attention_backward", context, qkv, context, stats, *sequences, *drops[0]),
        matmul(tokens, 3 * h, h),
        matmul(3 * h, tokens, h),
        biases,
    ]
    return total(each * layers + convolutions * 3)
