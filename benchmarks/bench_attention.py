"""Attention within each sequence of a packed batch; in its place, attention over the padded batch with a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Case
from fastbert import ops

Compare = Callable[..., None]


def padded(case: Case, rows: Tensor) -> Tensor:
    """(T, ...) -> (batch, longest, ...), zeros at padding."""
    mask = case.mask()
    out = rows.new_zeros(*mask.shape, *rows.shape[1:])
    out[mask] = rows
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Stock's: (batch, longest, heads, head_dim) each -> the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)


def qkv(case: Case) -> Tensor:
    return case.normal(case.tokens, 3, case.heads, case.hidden // case.heads)


def sequences(case: Case) -> tuple[Tensor | None, Tensor | None, int, float]:
    packing = case.packing()
    return packing.cu_seqlens, packing.key_mask, packing.max_seqlen, (case.hidden // case.heads) ** -0.5


def bench_attention(case: Case, compare: Compare) -> None:
    rows = qkv(case)
    given = (*padded(case, rows).unbind(2), case.mask())
    arguments = (*rows.unbind(1), *sequences(case))
    compare("attention", ops.attention, sdpa, arguments, given, lambda out: out[case.mask()])


def bench_attention_backward(case: Case, compare: Compare) -> None:
    """Of a forward made before; in its place, autograd's."""
    rows, grad = qkv(case), case.normal(case.tokens, case.heads, case.hidden // case.heads)
    out, stats = ops.attention_forward(rows, *sequences(case), 0.0, None)
    arguments = (grad, rows, out, stats, *sequences(case), 0.0, None)
    forwards: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def fused(*arguments: Any) -> Tensor:
        return ops.attention_backward(*arguments)[0]

    def peer(grad: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        with torch.enable_grad():
            if rows.dtype not in forwards:
                leaf = rows.clone().requires_grad_()
                forwards[rows.dtype] = leaf, sdpa(*leaf.unbind(2), mask)
            leaf, result = forwards[rows.dtype]
            return torch.autograd.grad(result, leaf, grad, retain_graph=True)[0]

    given = padded(case, grad), padded(case, rows), case.mask()
    compare("attention_backward", fused, peer, arguments, given, lambda found: found[case.mask()])
