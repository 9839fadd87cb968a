"""A plain-PyTorch twin of every kernel: the same signature, the same result.

It is two things at once: the oracle (called on float64 tensors it gives the truth) and the CPU backend (written to be
fast there: no padding, in-place epilogues, one attention call per sequence). Matrix products in 16-bit dtypes run in
float32 on processors without native instructions for them, where PyTorch's own are several times slower.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` by instructions of its own."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def _matmul_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type != "cpu" or _has_native_matmul(x.dtype) else torch.float32


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the dtype matrix products run in: a new tensor, for an epilogue to change in place."""
    dtype = _matmul_dtype(x)
    if dtype is x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,) or None -> (T, N), one dtype throughout."""
    return _affine(x, weight, bias).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """`gelu(x @ weight.T + bias)`: x (T, K), weight (N, K), bias (N,) or None -> (T, N), one dtype throughout.

    `approximate` is "none" (exact, erf) or "tanh", as in torch.nn.functional.gelu.
    """
    out = _affine(x, weight, bias)
    return torch.ops.aten.gelu_(out, approximate=approximate).to(x.dtype)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x @ weight.T + bias + residual`: x (T, K), weight (N, K), residual (T, N) -> (T, N), one dtype throughout."""
    # Added after the product: accumulating onto the residual would round every partial sum to its magnitude.
    return _affine(x, weight, bias).add_(residual).to(x.dtype)


def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> Tensor:
    """Query, key and value projections side by side: x (T, K), weights (N, K), biases (N,) or None -> (T, 3 N)."""
    n = q_weight.shape[0]
    out = x.new_empty(x.shape[0], 3 * n)
    for i, (weight, bias) in enumerate(((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))):
        columns = out[:, i * n : (i + 1) * n]
        if bias is not None and _matmul_dtype(x) == x.dtype:
            torch.addmm(bias, x, weight.t(), out=columns)
        else:
            columns.copy_(_affine(x, weight, bias))
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Bidirectional softmax attention within each sequence, over rows of all sequences laid end to end.

    Args:
        q, k, v: (T, heads, head_dim), one dtype; last dimension contiguous, rows and heads of any stride.
        cu_seqlens: (B + 1,) int32, where sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] (packed layout); None
            where every sequence has max_seqlen rows (dense layout, B = T / max_seqlen).
        key_mask: (B, max_seqlen) bool, True where a key takes part; dense layout only. None: all take part.
        max_seqlen: length of the longest sequence, in tokens.
        scale: factor on the scores, before the softmax.

    Returns:
        (T, heads, head_dim), contiguous. Rows whose keys are all masked are zero.
    """
    dtype = _matmul_dtype(q)

    def attend(rows: slice, batch: int, mask: Tensor | None) -> Tensor:
        # [B, heads, S, D]
        query, key, value = (t[rows].unflatten(0, (batch, -1)).transpose(1, 2).to(dtype) for t in (q, k, v))
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return result.transpose(1, 2).flatten(0, 1).to(q.dtype)  # [B * S, heads, D]

    if cu_seqlens is None and q.shape[0]:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return attend(slice(None), q.shape[0] // max_seqlen, mask).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if cu_seqlens is not None:
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            if end > start:
                out[start:end] = attend(slice(start, end), 1, None)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x (T, H), weight and bias (H,), eps added to the variance -> (T, H)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm(x + residual)`, the sum taken in float32: x and residual (T, H), weight and bias (H,) -> (T, H)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.to(dtype) + residual
    return F.layer_norm(total, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


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
) -> Tensor:
    """`layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])`, sums in float32.

    Ids are (T,) int64; the tables (vocabulary, H), (types, H), (positions, H); weight and bias (H,) -> (T, H).
    """
    dtype = torch.promote_types(word.dtype, torch.float32)
    total = F.embedding(input_ids, word).to(dtype)
    total += F.embedding(token_type_ids, token_type)
    total += F.embedding(position_ids, position)
    return F.layer_norm(total, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(word.dtype)


def pack(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of the padded layout that hold real tokens: x (R, H), indices (T,) int64 into its rows -> (T, H)."""
    return x.index_select(0, indices)


def unpack(x: Tensor, inverse: Tensor) -> Tensor:
    """Packed rows back in the padded layout: x (T, H), inverse (R,) int64, the packed row of each or -1 -> (R, H).

    Rows whose inverse is -1 come back as zeros.
    """
    out = x.new_zeros(inverse.shape[0], x.shape[1])
    real = (inverse >= 0).nonzero().squeeze(1)
    return out.index_copy_(0, real, x[inverse[real]])
