"""Two linear layers of one input, of which one, activated, multiplies the other: GeGLU and SwiGLU, in one launch.

`linear_gated` and `gated_feed_forward` are the Triton twins of the functions of those names in `reference`, documented
at the operators, in fastbert/ops; `linear_gated_backward` is, too, by the kernel of `linear_gelu_backward`. A program
holds the same tile of both GEMMs, so each tile of the input is loaded once and neither result is written, but for
a backward; sums are those of `linear`: K in one order, in float32, whatever other rows are in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run
from .dependent import wait_for_previous
from .linear import activation_backward, gelu_erf, gelu_erf_16, gelu_tanh, linear, load_bias, order_tiles
from .reference import GATES


@triton.jit
def add_product(acc, x, w, INPUT_PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + x @ w.T, summed as `linear_kernel` does."""
    if x.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        acc += tl.dot(x, w.T, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
    else:
        acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
    return acc


# m is not specialized: one compiled kernel for every number of rows.
@triton.jit(do_not_specialize=["m"])
def linear_gated_kernel(
    x_ptr,  # (m, k), rows stride_xm apart
    gate_ptr,  # (n, k), contiguous
    gate_bias_ptr,  # (n,) or None
    up_ptr,  # (n, k), contiguous
    up_bias_ptr,  # (n,) or None
    pre_ptr,  # (m, 2 n), contiguous: both products, side by side, or None
    out_ptr,  # (m, n), contiguous
    m,
    n,
    k,
    stride_xm,
    ACTIVATION: tl.constexpr,  # "gelu", "gelu_tanh" or "silu"
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    tile_m, tile_n = order_tiles(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N

    # The tile's corner in int64; offsets within the tile fit int32. Rows past the end repeat the last one.
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows_x = tl.minimum(offs_m, m - 1 - start_m)
    rows_w = tl.minimum(offs_n, n - 1 - start_n)
    x_ptrs = x_ptr + start_m.to(tl.int64) * stride_xm + (rows_x[:, None] * stride_xm + offs_k[None, :])
    offs_w = rows_w[:, None] * k + offs_k[None, :]
    gate_ptrs = gate_ptr + start_n.to(tl.int64) * k + offs_w
    up_ptrs = up_ptr + start_n.to(tl.int64) * k + offs_w

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate_w = tl.load(gate_ptrs)
            up_w = tl.load(up_ptrs)
        else:
            mask_k = (offs_k < k - start_k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            gate_w = tl.load(gate_ptrs, mask=mask_k, other=0.0)
            up_w = tl.load(up_ptrs, mask=mask_k, other=0.0)
        gate = add_product(gate, x, gate_w, INPUT_PRECISION, BLOCK_K)
        up = add_product(up, x, up_w, INPUT_PRECISION, BLOCK_K)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K

    # In two halves of the columns, one after the other: where products are kept registers spill with all at once.
    HALF_N: tl.constexpr = BLOCK_N // 2
    gate0, gate1 = tl.split(gate.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    up0, up1 = tl.split(up.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    offs_h = tl.arange(0, HALF_N)
    for half in tl.static_range(2):
        start_h = start_n + half * HALF_N
        cols = start_h + offs_h
        mask_n = cols < n
        mask = (start_m + offs_m < m)[:, None] & mask_n[None, :]
        y = (gate0 if half == 0 else gate1) + load_bias(gate_bias_ptr, cols, mask_n, HALF_N)[None, :]
        factor = (up0 if half == 0 else up1) + load_bias(up_bias_ptr, cols, mask_n, HALF_N)[None, :]
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + start_m.to(tl.int64) * (2 * n) + start_h
            pre_ptrs += offs_m[:, None] * (2 * n) + offs_h[None, :]
            tl.store(pre_ptrs, y.to(pre_ptr.dtype.element_ty), mask=mask)
            tl.store(pre_ptrs + n, factor.to(pre_ptr.dtype.element_ty), mask=mask)
        if ACTIVATION == "silu":
            y *= tl.sigmoid(y)
        elif ACTIVATION == "gelu_tanh":
            y = gelu_tanh(y)
        else:
            y = gelu_erf(y) if out_ptr.dtype.element_ty == tl.float32 else gelu_erf_16(y)
        out_ptrs = out_ptr + start_m.to(tl.int64) * n + start_h + (offs_m[:, None] * n + offs_h[None, :])
        tl.store(out_ptrs, (y * factor).to(out_ptr.dtype.element_ty), mask=mask)


@launch.planned
def _plan(
    choose: launch.Choose, arch: str, dtype: torch.dtype, n: int, k: int, activation: str, precision: str, early: bool
) -> tuple[launch.Config, Constants]:
    """How it is launched: (configuration, constants)."""
    config: launch.Config = choose(arch, dtype, n, k)
    constants = {"ACTIVATION": activation, **launch.gemm_constants(config, k), **launch.dependent(arch)}
    return config, Constants(constants, INPUT_PRECISION=precision)


def linear_gated(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """`activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)` -> (T, N); both of `gate` where `up` is None.

    Raises:
        ValueError: shapes that don't fit together; another `activation`.
    """
    return _launch(x, gate, gate_bias, up, up_bias, activation, False)[0]


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
    """`linear_gated` and the linear layer behind it, down (H, N) -> (T, H); and what both give, (T, 2 N).

    Raises:
        ValueError: shapes that don't fit together; another `activation`.
    """
    gated, pre = _launch(x, gate, gate_bias, up, up_bias, activation, True)
    return linear(gated, down, down_bias), pre


_GELU = {"gelu": "none", "gelu_tanh": "tanh", "silu": "silu"}


def linear_gated_backward(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Back through `(activation(a) * b) @ weight.T`: grad (T, H), weight (H, N), pre (T, 2 N), a beside b.

    Returns:
        The gradient of `pre`, (T, 2 N); and activation(a) * b, (T, N).

    Raises:
        ValueError: shapes that don't fit together.
    """
    return activation_backward(grad, weight, pre, _GELU[activation], True)


def _launch(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_gated`; and what both linear layers give, where that is to be kept, else (0,)."""
    if activation not in GATES:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(GATES)}")
    if up is None:
        if len(gate) % 2:
            raise ValueError(f"gate has shape {tuple(gate.shape)}; expected an even number of rows where up is None")
        gate, up = gate.chunk(2)
        gate_bias, up_bias = (None, None) if gate_bias is None else gate_bias.chunk(2)
    (m, k), n, dtype = x.shape, gate.shape[0], x.dtype
    for name, weight in (("gate", gate), ("up", up)):
        if weight.shape != (n, k):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected {(n, k)} for x of shape {(m, k)}")
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected {(n,)}")
    out, pre = x.new_empty((m, n)), x.new_empty((m, 2 * n) if keep else 0)
    if not m or not n:
        return out, pre
    arch = launch.architecture(x.device)
    how = launch.input_precision(dtype), launch.is_dependent(arch)
    config, constants = _plan(launch.linear_gated_config, arch, dtype, n, k, activation, *how)
    x = launch.contiguous_rows(x)
    operands = [None if each is None else launch.operand(each, dtype) for each in (gate, gate_bias, up, up_bias)]
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    run(linear_gated_kernel, (tiles, 1, 1), (x, *operands, pre if keep else None, out, m, n, k, x.stride(0)), constants)
    return out, pre
