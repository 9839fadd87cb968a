"""The oracle: every operator in plain PyTorch, nothing tuned, on any device. On float64 tensors it gives the truth.

A function has the signature and the result of the kernel of its name, and of its twin in `cpu`; shapes and dtypes are
documented at the operator of that name, in fastbert/ops. All is computed in float32 or better and rounded once, to the
dtype of the result; weights of another dtype than x are rounded to that of x first. A backward is PyTorch's own
autograd through the forward of its name.

Dropout is the one thing in which the three differ: each drops elements with the same probability, by the same seed and
the same again in the backward, but this file and `cpu` draw from a generator of torch's and a kernel from Philox.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums of these are taken in: float32, or float64 where one of them is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, not yet rounded."""
    dtype = _wide(x)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype), None if bias is None else bias.to(x.dtype).to(dtype))


def _gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """What autograd says of a function of `inputs` widened, by `grad`; not yet rounded."""
    with torch.enable_grad():
        leaves = [t.detach().to(_wide(*inputs)).requires_grad_() for t in inputs]
        out = function(*leaves)
        return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def _dropped(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if not dropout or seed is None:
        return x
    draws = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64)
    return torch.where(draws.to(x.device) < dropout, 0.0, x / max(1 - dropout, 1e-30))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,) or None -> (T, N)."""
    return _affine(x, weight, bias).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """`gelu(x @ weight.T + bias)`: x (T, K), weight (N, K), bias (N,) or None -> (T, N)."""
    return F.gelu(_affine(x, weight, bias), approximate=approximate).to(x.dtype)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x @ weight.T + bias + residual`: x (T, K), weight (N, K), residual (T, N) -> (T, N)."""
    return (_affine(x, weight, bias) + residual).to(x.dtype)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""What a gate may apply, by the name that operators take."""


def linear_gated(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """`activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`: x (T, K), gate and up (N, K) -> (T, N).

    Where `up` is None, `gate` (2 N, K) and `gate_bias` (2 N,) are both, one after the other.
    """
    product = _affine(x, gate, gate_bias)
    activated, factor = product.chunk(2, 1) if up is None else (product, _affine(x, up, up_bias))
    return (GATES[activation](activated) * factor).to(x.dtype)


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
    """`linear_gated` and the linear layer behind it, down (H, N) -> (T, H); and what both give, (T, 2 N)."""
    products = [linear(x, gate, gate_bias), *([] if up is None else [linear(x, up, up_bias)])]
    gated = linear_gated(x, gate, gate_bias, up, up_bias, activation)
    return linear(gated, down, down_bias), torch.cat(products, 1)


def linear_gated_backward(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Back through `(activation(a) * b) @ weight.T`: grad (T, H), weight (H, N), pre (T, 2 N), a beside b."""
    weight = weight.to(grad.dtype).to(_wide(pre))

    def gated(pre: Tensor) -> Tensor:
        activated, factor = pre.chunk(2, 1)
        return GATES[activation](activated) * factor

    (dpre,) = _gradients(lambda pre: gated(pre) @ weight.t(), grad, pre)
    return dpre.to(pre.dtype), gated(pre.to(_wide(pre))).to(pre.dtype)


def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> Tensor:
    """Query, key and value projections: x (T, K), weights (N, K), biases (N,) or None -> (T, 3, N)."""
    return torch.stack([linear(x, q_weight, q_bias), linear(x, k_weight, k_bias), linear(x, v_weight, v_bias)], 1)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Both linear layers of a feed-forward: x (T, K), weight1 (I, K), bias1 (I,), weight2 (N, I), bias2 (N,)."""
    return linear(linear_gelu(x, weight1, bias1, approximate), weight2, bias2), linear(x, weight1, bias1)


def linear_gelu_backward(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Back through `gelu(pre) @ weight.T`: grad (T, N), weight (N, I), pre (T, I)."""
    weight = weight.to(grad.dtype).to(_wide(pre))
    (dpre,) = _gradients(lambda pre: F.gelu(pre, approximate=approximate) @ weight.t(), grad, pre)
    return dpre.to(pre.dtype), F.gelu(pre.to(_wide(pre)), approximate=approximate).to(pre.dtype)


def _attend(
    qkv: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    positions: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, one sequence after the other, not rounded; and the logarithm of the sum of each row, (heads, T)."""
    q, k, v = qkv
    outs, sums = [q.new_empty(0, *q.shape[1:], dtype=_wide(q))], [q.new_empty(q.shape[1], 0, dtype=_wide(q))]
    sequences = _scores(q, k, cu_seqlens, key_mask, max_seqlen, scale, bias, positions, window)
    for number, (rows, scores, there) in enumerate(sequences):
        value = v[rows].transpose(0, 1).to(scores.dtype)  # [heads, S, D]
        # Zero, and not alike for all, where every key is masked.
        weights = _dropped(scores.softmax(-1) * there, dropout, None if seed is None else seed + number)
        outs.append((weights @ value).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def _scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None = None,
    positions: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    window: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each sequence its rows, its scores, (heads, S, S), the least number where masked, and which keys there are."""
    starts = range(0, q.shape[0] + 1, max(max_seqlen, 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        query, key = (t[start:end].transpose(0, 1).to(_wide(q)) for t in (q, k))  # [heads, S, D]
        scores = query @ key.transpose(1, 2) * scale
        places = torch.arange(end - start, device=q.device)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)[:, bias.shape[1] // 2 + places - places[:, None]]
        if positions is not None:
            c2p, p2c, slots = positions
            furthest = slots.shape[0] // 2
            away = (places[:, None] - places).clamp(-furthest, furthest)
            chosen = slots[furthest + away].long().expand_as(scores)
            if c2p is not None:
                scores = scores + (query @ c2p.to(query.dtype).permute(1, 2, 0)).gather(2, chosen) * scale
            if p2c is not None:
                by_key = (key @ p2c.to(key.dtype).permute(1, 2, 0)).gather(2, chosen.transpose(1, 2))
                scores = scores + by_key.transpose(1, 2) * scale
        there = torch.ones_like(places, dtype=torch.bool) if key_mask is None else key_mask[number]
        if window is not None:
            there = there & ((places[:, None] - places).abs() <= window)
        yield slice(start, end), scores.masked_fill(~there, torch.finfo(scores.dtype).min), there


def _maps(
    q: Tensor, sequences: Iterator[tuple[slice, Tensor, Tensor]], batch: int, places: Tensor | None, width: int
) -> Tensor:
    """The softmax of `_scores`, each sequence's at its places."""
    maps = q.new_zeros(batch, q.shape[1], width, width)
    for own, (rows, scores, there) in zip(maps, sequences, strict=True):
        where = torch.arange(scores.shape[1], device=q.device) if places is None else places[rows]
        own[:, where[:, None], where] = (scores.softmax(-1) * there).to(q.dtype)
    return maps


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
    """Bidirectional softmax attention within each sequence, over rows of all sequences laid end to end."""
    return _attend((q, k, v), cu_seqlens, key_mask, max_seqlen, scale, bias, window=window)[0].to(q.dtype)


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
) -> Tensor:
    """The probabilities by which `attention` weighs values: (B, heads, width, width)."""
    batch = q.shape[0] // max(max_seqlen, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _maps(q, _scores(q, k, cu_seqlens, key_mask, max_seqlen, scale, bias), batch, places, width)


def attention_tiles(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The blocks of 128 rows, or fewer at the end, of all sequences, the longest first."""
    starts, lengths = cu_seqlens.tolist(), cu_seqlens.diff().tolist()
    longest_first = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    tiles = [[starts[b], lengths[b], start, b] for b in longest_first for start in range(0, lengths[b], 128)]
    tiles += [[0] * 4] * (rows // 128 + len(lengths) - len(tiles))
    return torch.tensor(tiles, dtype=torch.int32, device=cu_seqlens.device).view(-1, 4)


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
    """`attention` with dropout of the probabilities, and what its backward needs."""
    layout = cu_seqlens, key_mask, max_seqlen, scale
    out, sums = _attend(qkv.unbind(1), *layout, bias, dropout, seed, None, window)
    stats = sums[None] if qkv.dtype.itemsize == 2 else torch.stack([sums, torch.ones_like(sums)])
    return out.to(qkv.dtype), stats


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
    """The gradients of `attention_forward`: dqkv, (T, 3, heads, head_dim), and dbias, like `bias`."""

    def attend(qkv: Tensor, bias: Tensor | None = bias) -> Tensor:
        layout = cu_seqlens, key_mask, max_seqlen, scale
        return _attend(qkv.unbind(1), *layout, bias, dropout, seed, None, window)[0]

    if bias is None or not bias_grad:
        (dqkv,) = _gradients(attend, grad, qkv)
        return dqkv.to(qkv.dtype), stats.new_empty(0)
    dqkv, dbias = _gradients(attend, grad, qkv, bias)
    return dqkv.to(qkv.dtype), dbias.to(bias.dtype)


def rotate(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """Rotary positions of queries and keys: qkv (T, 3, heads, head_dim), cosines and sines (T, head_dim)."""
    turned, value = qkv[:, :2].to(_wide(qkv)), qkv[:, 2:]
    left, right = turned.chunk(2, -1)
    if back:  # the transpose
        sines = -sines.roll(left.shape[-1], -1)
    across = torch.cat((-right, left), -1)
    turned = turned * cosines[:, None, None] + across * sines[:, None, None]
    return torch.cat((turned.to(qkv.dtype), value), 1)


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
    """`attention_forward`, its scores with those of queries by the positions of keys, and the other way round."""
    layout = cu_seqlens, key_mask, max_seqlen, scale, None, dropout, seed
    out, sums = _attend(qkv.unbind(1), *layout, (c2p, p2c, slots))
    stats = sums[None] if qkv.dtype.itemsize == 2 else torch.stack([sums, torch.ones_like(sums)])
    return out.to(qkv.dtype), stats


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
    """The probabilities by which `disentangled_attention` weighs values: (B, heads, width, width)."""
    q, k, _ = qkv.unbind(1)
    batch = q.shape[0] // max(max_seqlen, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequences = _scores(q, k, cu_seqlens, key_mask, max_seqlen, scale, None, (c2p, p2c, slots))
    return _maps(q, sequences, batch, places, width)


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
    """The gradients of `disentangled_attention`: dqkv, dc2p and dp2c, empty, (0,), of a table that isn't given."""
    given = [table for table in (c2p, p2c) if table is not None]

    def attend(qkv: Tensor, *tables: Tensor) -> Tensor:
        both = (None if c2p is None else tables[0], None if p2c is None else tables[-1], slots)
        return _attend(qkv.unbind(1), cu_seqlens, key_mask, max_seqlen, scale, None, dropout, seed, both)[0]

    dqkv, *dtables = (g.to(qkv.dtype) for g in _gradients(attend, grad, qkv, *given))
    dc2p, dp2c = (qkv.new_empty(0) if table is None else dtables[i] for i, table in ((0, c2p), (-1, p2c)))
    return dqkv, dc2p, dp2c


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x (T, H), weight and bias (H,), eps added to the variance -> (T, H)."""
    return _layer_norm(x.to(_wide(x)), weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension: x (T, H), weight (H,) -> (T, H)."""
    wide = x.to(_wide(x))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def _layer_norm(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`layer_norm(dropout(x) + residual)`, the sum taken in float32: x and residual (T, H), weight and bias (H,)."""
    total = _dropped(x.to(_wide(x, residual)), dropout, seed) + residual
    return _layer_norm(total, weight, bias, eps).to(residual.dtype)


def add_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `add_layer_norm`: (dx, dresidual, dweight, dbias), each in the dtype of what it belongs to."""
    dx, dresidual, dweight, dbias = _gradients(
        lambda x, residual, weight, bias: _layer_norm(_dropped(x, dropout, seed) + residual, weight, bias, eps),
        grad,
        *(x, residual, weight, torch.zeros_like(weight)),
    )
    same = not dropout and x.dtype == residual.dtype
    dx = x.new_empty(0) if same else dx.to(x.dtype)
    return dx, dresidual.to(residual.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _embed(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
    """The sum of a row of each table."""
    word, token_type, position = (table[rows].to(_wide(*tables)) for rows, table in zip(ids, tables, strict=True))
    return word + token_type + position


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
    """`layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])`, sums in float32."""
    total = _embed((input_ids, token_type_ids, position_ids), (word, token_type, position))
    return _layer_norm(total, weight, bias, eps).to(word.dtype)


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
    """Gradients of `embedding_layer_norm` by the sum of the three rows, (T, H), the weight and the bias."""
    total = _embed((input_ids, token_type_ids, position_ids), (word, token_type, position))
    dtotal, dweight, dbias = _gradients(
        lambda total, weight, bias: _layer_norm(total, weight, bias, eps), grad, total, weight, torch.zeros_like(weight)
    )
    return dtotal.to(word.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `x @ weight.T + bias` against labels, row by row."""
    logits = linear(x, weight, bias).to(_wide(x))
    return F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1)


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_cross_entropy`: (dx, dweight, dbias), the last empty, (0,), without a bias."""
    logits = linear(x, weight, bias).to(lse.dtype)
    (dlogits,) = _gradients(lambda logits: F.cross_entropy(logits, labels, reduction="none"), grad, logits)
    dx = (dlogits @ weight.to(x.dtype).to(lse.dtype)).to(x.dtype)
    dweight = (dlogits.t() @ x.to(lse.dtype)).to(weight.dtype)
    return dx, dweight, lse.new_empty(0) if bias is None else dlogits.sum(0).to(bias.dtype)


def mask_layout(mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed layout of a padding mask (B, S) bool, True at real tokens; labels (B, S) int64, -100 for none."""
    real, lengths = mask.flatten(), mask.sum(1)
    labelled = torch.tensor(False) if labels is None else ((labels != -100) & ~mask).any()
    begins = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)  # runs of real tokens, in each sequence
    facts = real.sum(), lengths.max(), mask[:, 0].all(), labelled, (begins > 1).any()
    return (
        F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        torch.cat([real.nonzero()[:, 0], (~real).nonzero()[:, 0].flip(0)]),
        torch.where(real, real.cumsum(0) - 1, -1),
        torch.tensor([int(fact) for fact in facts], device=mask.device),
    )


def pack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Rows of the padded layout that hold real tokens: x (R, H), indices (T,) int64 into its rows -> (T, H)."""
    return x[indices]


def unpack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Packed rows back in the padded layout: x (T, H), inverse (R,) int64, the packed row of each or -1 -> (R, H)."""
    out = torch.zeros(inverse.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    out[indices] = x
    return out
