"""Plain-PyTorch twins of the FP8 kernels: the same signatures, the same quantized numbers. Shapes and dtypes are
documented at the operators of those names, in fastbert/ops.

They are the oracle: asked for a result in float64 they give the exact GEMM of the quantized numbers, but for
float64's own rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import attention, layer_norm

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def to_e4m3(x: Tensor) -> Tensor:
    """x, in units of the scale, as float8_e4m3fn: to nearest, ties to even, saturated; NaN where x is not finite.

    torch's own conversion makes NaN of what is too large.
    """
    return x.clamp(-LARGEST, LARGEST).sub_(x - x).to(torch.float8_e4m3fn)  # infinity less itself is NaN


def own_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The scale in which `largest`, float32, is 448, and its inverse; both finite where it is zero."""
    largest = largest.clamp(min=1e-30)
    return largest / LARGEST, LARGEST / largest


def quantize_fp8(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """x (T, H) in units of `scale`, or of one of each row's own, in FP8; and those of the rows, (T,) or (0,)."""
    x = x.float()
    if scale is not None:
        return to_e4m3(x * (1 / scale)), x.new_empty(0)
    largest = x.abs().nan_to_num(0.0, float("inf")).amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scales, inverse = own_scale(largest)
    return to_e4m3(x * inverse[:, None]), scales


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm(x, weight, bias, eps)`, (T, H), in the dtype of x, and `quantize_fp8` of that."""
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
    """`attention(...)`, rounded to its dtype, in units of `out_scale` as float8_e4m3fn, saturated.

    Returns:
        (T, heads, head_dim), contiguous: bitwise what `quantize_fp8` makes of attention's result, by `out_scale`.
    """
    out = attention(q, k, v, cu_seqlens, key_mask, max_seqlen, scale, bias, tiles)
    return to_e4m3(out.float() * (1 / out_scale))


def mm_on_hopper(x: Tensor, weight: Tensor, exact_k: int, fraction_bits: int = 13) -> Tensor:
    """`x @ weight.T` as Hopper's tensor cores add up products of e4m3 numbers, `exact_k` of them before float32 does.

    An instruction adds 32 products to what it has: each of these 33 numbers is cut off, toward zero, below
    2^-fraction_bits of the largest one's power of two. 13 bits and the leading one are what is reported of H100 and
    H800 (arXiv:2412.19437, 3.3.2: "around 14 bits"); NVIDIA documents nothing. Of normal numbers the relative error is
    1.0e-4 to 1.25e-4 at exact_k 128, and 1.4e-3 for sums of 4,096, against 7e-8 in float32.
    Ada (sm_89) may sum so, too (arXiv:2411.10958): that is not certain, and nothing here goes by it.

    Args:
        x: (T, K) float8_e4m3fn.
        weight: (N, K) float8_e4m3fn.
        exact_k: products added up before their sum goes to float32, a multiple of 32.
        fraction_bits: of the largest number of a sum, those that are kept.

    Returns:
        (T, N) float32.
    """
    (t, k), n = x.shape, weight.shape[0]
    out = torch.zeros(t, n, device=x.device)
    rows = max(1, (1 << 26) // (32 * max(n, 1)))
    for top in range(0, t, rows):
        part, total = x[top : top + rows].float(), out[top : top + rows]
        for start in range(0, k, exact_k):
            acc = torch.zeros_like(total)[..., None]
            for low in range(start, min(start + exact_k, k), 32):
                high = min(low + 32, start + exact_k)
                products = part[:, None, low:high] * weight[None, :, low:high].float()
                terms = torch.cat([acc, products], -1)  # [rows, n, 33]
                _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))  # 1 above that of the leading bit
                unit = torch.ldexp(torch.ones_like(acc), exponent - 1 - fraction_bits)
                acc = (terms / unit).trunc().sum(-1, keepdim=True) * unit  # integers of 19 bits: exact
            total += acc[..., 0]
    return out


def _affine(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The GEMM in float32, or float64 where that is asked for: a new tensor, for an epilogue to change in place."""
    inner = torch.promote_types(dtype, torch.float32)
    out = torch.mm(x.to(inner), weight.to(inner).t()).mul_(col_scale)
    if row_scale is not None and row_scale.numel():
        out.mul_(row_scale[:, None])
    return out if bias is None else out.add_(bias)


def linear_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x @ weight.T) * row_scale[:, None] * col_scale + bias`, in float32 or better, rounded to `dtype`: (T, N)."""
    return _affine(x, row_scale, weight, col_scale, bias, dtype).to(dtype)


def linear_gelu_fp8(
    x: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    scale: float | None,
) -> Tensor:
    """`gelu(linear_fp8(...))`, by torch.nn.functional.gelu's `approximate`, "none" or "tanh" -> (T, N).

    With a `scale`, in units of it as float8_e4m3fn, saturated; else in `dtype`.
    """
    out = F.gelu(_affine(x, row_scale, weight, col_scale, bias, dtype), approximate=approximate)
    return out.to(dtype) if scale is None else to_e4m3(out * (1 / scale))


def linear_add_fp8(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, col_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """`linear_fp8(...) + residual`, residual (T, N), in the dtype of the residual, rounded once -> (T, N)."""
    return _affine(x, row_scale, weight, col_scale, bias, residual.dtype).add_(residual).to(residual.dtype)
