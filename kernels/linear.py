"""Linear layers: one GEMM with its epilogue (bias, GELU, residual) in one launch.

`linear`, `linear_gelu`, `linear_add`, `qkv_linear` and `feed_forward` are the Triton twins of the functions of those
names in `reference`: same arguments, same result, on a GPU. They share one kernel. `linear_gelu_backward` has its own,
a GEMM whose epilogue is GELU's derivative; the other gradients are plain GEMMs, and torch's.

GEMMs accumulate in float32, the epilogue runs in float32, and there is one rounding, at the store. float32 inputs
are multiplied as PyTorch is set to on CUDA (`launch.float32_precision`): IEEE by default, or TF32.

K is never split, and is added up in one order whatever the tile, so a row of the result is bitwise the same whatever
other rows are in the batch; `launch.LINEAR_TILES` says what that takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, Descriptor, run
from .dependent import wait_for_previous


@triton.jit
def gelu_erf(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def normal_tail(z):
    """The normal distribution's share above z >= 0, to 6e-6 of itself for z up to 6; 0 for large z.

    Its logarithm is near a parabola: a polynomial, fitted for the least largest error, that decreases past 6, too.
    """
    # log2 of the share; Horner's way
    p = -1.83477709e-06 * z + 6.15975805e-05
    p = p * z - 9.3051896e-04
    p = p * z + 8.50786641e-03
    p = p * z - 5.39600141e-02
    p = p * z - 4.58464444e-01
    p = p * z - 1.15125096
    p = p * z - 9.99995291e-01
    return tl.exp2(p)


@triton.jit
def gelu_erf_16(x):
    """GELU for results of 16 bits: a third of the instructions that erf takes, and as exact below 0 as above.

    Where one program has an SM, nothing runs beside its epilogue: erf's took half as long as the GEMM at k 1024.
    """
    z = tl.minimum(tl.abs(x), 16.0)  # past it the tail is 0, and infinity times 0 is not
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - z * normal_tail(z)


@triton.jit
def gelu_tanh(x):
    # 0.5 * (1 + tanh(u)) = sigmoid(2 u); where exp(-2 u) overflows, sigmoid is 1 / inf = 0, the right limit.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def load_bias(bias_ptr, cols, mask_n, BLOCK_N: tl.constexpr):
    if bias_ptr is None:
        bias = tl.zeros([BLOCK_N], tl.float32)
    else:
        bias = tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    return bias


@triton.jit
def gelu_erf_backward(x):
    """GELU of x, and its derivative."""
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_erf_backward_16(x):
    """The same for results of 16 bits, as `gelu_erf_16`."""
    z = tl.minimum(tl.abs(x), 16.0)
    tail = normal_tail(z)
    act = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - z * tail
    return act, tl.where(x > 0.0, 1.0 - tail, tail) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_tanh_backward(x):
    """GELU of x, and its derivative."""
    share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, share + x * share * (1.0 - share) * slope


@triton.jit
def silu_backward(x):
    """SiLU of x, and its derivative."""
    share = tl.sigmoid(x)
    act = x * share
    return act, share + act * (1.0 - share)


@triton.jit
def order_tiles(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The row and the column, in tiles, of tile `index`: GROUP_M rows of tiles go column by column."""
    tiles_in_group = GROUP_M * tiles_n
    first_m = index // tiles_in_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + index % tiles_in_group % group_m, index % tiles_in_group // group_m


@triton.jit
def place_tile(
    index, m, n, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Where a tile is: (first row, first column of its segment, segment).

    A tile lies in one segment of the columns; tiles are counted per segment where n is no multiple of BLOCK_N.
    """
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = order_tiles(index, tl.cdiv(m, BLOCK_M), SEGMENTS * tiles_n, GROUP_M)
    return tile_m * BLOCK_M, tile_n % tiles_n * BLOCK_N, tile_n // tiles_n


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N]
    start_m,
    start_n,
    segment,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    residual_ptr,
    pre_ptr,
    out_ptr,
    m,
    n,
    stride_rm,
    SEGMENTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of a tile, arguments as the kernels have them."""
    # In two halves of the columns, one after the other: with the whole tile's bias and GELU at once registers spill.
    HALF_N: tl.constexpr = BLOCK_N // 2
    acc0, acc1 = tl.split(acc.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    offs_m = tl.arange(0, BLOCK_M)
    for half in tl.static_range(2):
        offs_h = tl.arange(0, HALF_N)
        start_h = start_n + half * HALF_N
        cols = start_h + offs_h
        mask_n = cols < n
        bias = load_bias(b0_ptr, cols, mask_n, HALF_N)
        if SEGMENTS == 3:
            if segment == 1:
                bias = load_bias(b1_ptr, cols, mask_n, HALF_N)
            elif segment == 2:
                bias = load_bias(b2_ptr, cols, mask_n, HALF_N)
        y = (acc0 if half == 0 else acc1) + bias[None, :]
        mask = (start_m + offs_m < m)[:, None] & mask_n[None, :]
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + start_m.to(tl.int64) * n + start_h
            tl.store(pre_ptrs + (offs_m[:, None] * n + offs_h[None, :]), y.to(pre_ptr.dtype.element_ty), mask=mask)
        if GELU == "tanh":
            y = gelu_tanh(y)
        elif GELU == "none":
            y = gelu_erf(y) if out_ptr.dtype.element_ty == tl.float32 else gelu_erf_16(y)

        if residual_ptr is not None:
            residual_ptrs = residual_ptr + start_m.to(tl.int64) * stride_rm + start_h
            offs = offs_m[:, None] * stride_rm + offs_h[None, :]
            y += tl.load(residual_ptrs + offs, mask=mask, other=0.0).to(tl.float32)
        stride_om = n * SEGMENTS
        out_ptrs = out_ptr + start_m.to(tl.int64) * stride_om + segment * n + start_h
        tl.store(out_ptrs + (offs_m[:, None] * stride_om + offs_h[None, :]), y.to(out_ptr.dtype.element_ty), mask=mask)


# m is not specialized: one compiled kernel for every number of rows, so T % 16 can't change a bit of any row.
@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x_ptr,  # (m, k), rows stride_xm apart
    w0_ptr,  # (n, k), contiguous
    w1_ptr,  # with SEGMENTS == 3 the second and third weight, else None
    w2_ptr,
    b0_ptr,  # (n,) or None
    b1_ptr,
    b2_ptr,
    residual_ptr,  # (m, n), rows stride_rm apart, or None
    pre_ptr,  # (m, n), contiguous: what GELU is taken of, or None
    out_ptr,  # (m, SEGMENTS * n), contiguous
    m,
    n,
    k,
    stride_xm,
    stride_rm,
    SEGMENTS: tl.constexpr,
    GELU: tl.constexpr,  # "", "none" (erf) or "tanh"
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    start_m, start_n, segment = place_tile(tl.program_id(0), m, n, SEGMENTS, BLOCK_M, BLOCK_N, GROUP_M)
    w_ptr = w0_ptr
    if SEGMENTS == 3:
        if segment == 1:
            w_ptr = w1_ptr
        elif segment == 2:
            w_ptr = w2_ptr

    # The tile's corner in int64; offsets within the tile fit int32. Rows past the end repeat the last one.
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows_x = tl.minimum(offs_m, m - 1 - start_m)
    rows_w = tl.minimum(offs_n, n - 1 - start_n)
    x_ptrs = x_ptr + start_m.to(tl.int64) * stride_xm + (rows_x[:, None] * stride_xm + offs_k[None, :])
    w_ptrs = w_ptr + start_n.to(tl.int64) * k + (rows_w[:, None] * k + offs_k[None, :])

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = (offs_k < k - start_k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            w = tl.load(w_ptrs, mask=mask_k, other=0.0)
        if x.dtype == tl.float32 and INPUT_PRECISION == "ieee":
            # Each block is summed on its own: one chain of k additions has several times the rounding error, more than
            # stock's. max_num_imprecise_acc keeps the compiler from making one chain of the two again.
            acc += tl.dot(x, w.T, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    finish_tile(
        acc,
        start_m,
        start_n,
        segment,
        b0_ptr,
        b1_ptr,
        b2_ptr,
        residual_ptr,
        pre_ptr,
        out_ptr,
        m,
        n,
        stride_rm,
        SEGMENTS,
        GELU,
        BLOCK_M,
        BLOCK_N,
    )


# A program walks through tiles, and the loops over tiles and over k are one: what the next tile starts with is loaded
# under this one's epilogue. By tensor descriptors, which fill with zeros past the ends. In triton 3.6 and 3.7
# warp_specialize does nothing for this on sm_90 with eight warps, and fails to compile with four.
@triton.jit(do_not_specialize=["m"])
def linear_persistent_kernel(
    x_desc,  # of (m, k), in blocks [BLOCK_M, BLOCK_K]
    w0_desc,  # of (n, k), in blocks [BLOCK_N, BLOCK_K]
    w1_desc,  # from here on as linear_kernel
    w2_desc,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    residual_ptr,
    pre_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_rm,
    SEGMENTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) * SEGMENTS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        start_m, start_n, segment = place_tile(tile, m, n, SEGMENTS, BLOCK_M, BLOCK_N, GROUP_M)
        w_desc = w0_desc
        if SEGMENTS == 3:
            if segment == 1:
                w_desc = w1_desc
            elif segment == 2:
                w_desc = w2_desc
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, k, BLOCK_K):
            x = x_desc.load([start_m, start_k])
            w = w_desc.load([start_n, start_k])
            acc = tl.dot(x, w.T, acc)  # [BLOCK_M, BLOCK_N]
        finish_tile(
            acc,
            start_m,
            start_n,
            segment,
            b0_ptr,
            b1_ptr,
            b2_ptr,
            residual_ptr,
            pre_ptr,
            out_ptr,
            m,
            n,
            stride_rm,
            SEGMENTS,
            GELU,
            BLOCK_M,
            BLOCK_N,
        )


@launch.planned
def _plan(
    choose: launch.Choose,
    arch: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    segments: int,
    rows: int,
    multiprocessors: int,
    batch_invariant: bool,
    gelu: str,
    precision: str,
    early: bool,
) -> tuple[int, launch.Config, Constants, launch.Config, Constants]:
    """How a GEMM is launched: (rows of the first launch, configuration and constants, those of unaligned operands).

    The latter are the first themselves, but where that is `linear_persistent_kernel`, or a tile that would spill.
    """
    config: launch.Config = choose(arch, dtype, n, k, segments, rows, multiprocessors, batch_invariant)
    whole = launch.full_waves(config, arch, dtype.itemsize, n, k, segments, rows, multiprocessors)

    def constants(config: launch.Config) -> Constants:
        found = {"SEGMENTS": segments, "GELU": gelu, **launch.gemm_constants(config, k), **launch.dependent(arch)}
        if config.variant == "persistent":
            del found["EVEN_K"]  # descriptors fill with zeros
            return Constants(found)
        return Constants(found, INPUT_PRECISION=precision)

    small = launch.UNALIGNED.block_m * launch.UNALIGNED.block_n
    larger = dtype.itemsize == 2 and config.block_m * config.block_n > small
    unaligned = launch.UNALIGNED if larger or config.variant == "persistent" else config
    return whole, config, constants(config), unaligned, constants(unaligned)


def _launch(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    gelu: str = "",
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launches the kernel over the columns of `weights`, side by side; `gelu` is "", "none" or "tanh".

    Rows beyond whole waves of tiles take a launch of their own, where `launch.full_waves` has it so.
    """
    m, k = x.shape
    n, segments, dtype = weights[0].shape[0], len(weights), x.dtype
    # As they come from nn.Linear, in one dtype, and from the other operators, nothing below copies anything.
    operands: list[Tensor | None] = []
    for weight in weights:
        if weight.shape != (n, k):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(n, k)} for x of shape {(m, k)}")
        plain = weight.dtype is dtype and weight.is_contiguous()
        operands.append(weight if plain else launch.operand(weight, dtype))
    added: list[Tensor | None] = []
    for bias in biases:
        if bias is None:
            added.append(None)
            continue
        if bias.shape != (n,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(n,)}")
        plain = bias.dtype is dtype and bias.is_contiguous()
        added.append(bias if plain else launch.operand(bias, dtype))
    stride_rm = 0
    if residual is not None:
        if residual.shape != (m, n):
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(m, n)}")
        residual = launch.contiguous_rows(residual)
        stride_rm = residual.stride(0)
    if out is None:
        out = x.new_empty((m, segments * n))
    if not m or not n:
        return out
    arch, multiprocessors = launch.architecture(x.device), launch.multiprocessors(x.device)
    shape = n, k, segments, launch.round_rows(m), multiprocessors
    how = launch.batch_invariant, gelu, launch.input_precision(dtype), launch.is_dependent(arch)
    whole, config, constants, unaligned, others = _plan(launch.linear_config, arch, dtype, *shape, *how)
    if whole < m and m >= launch.SPLIT_ROWS:
        for rows in (slice(whole), slice(whole, m)):
            parts = (None if each is None else each[rows] for each in (residual, pre, out))
            _launch(x[rows], weights, biases, gelu, *parts)
        return out
    x = launch.contiguous_rows(x)
    if segments == 1:
        operands += (None, None)
        added += (None, None)
    if config.variant == launch.LIBRARY:
        return _by_library(x, operands, added, gelu, residual, pre, out)
    if unaligned is not config and not all(w is None or _descriptor_fits(w) for w in (x, *operands)):
        config, constants = unaligned, others
    tiles = -(-m // config.block_m) * -(-n // config.block_n) * segments
    if config.variant == "persistent":
        w_block = [config.block_n, config.block_k]
        descriptors = [None if w is None else Descriptor(w, w_block) for w in operands]
        x_desc = Descriptor(x, [config.block_m, config.block_k])
        programs = min(tiles, config.programs * max(multiprocessors, 1)) if config.programs else tiles
        arguments = (x_desc, *descriptors, *added, residual, pre, out, m, n, k, stride_rm)
        run(linear_persistent_kernel, (programs, 1, 1), arguments, constants)
    else:
        arguments = (x, *operands, *added, residual, pre, out, m, n, k, x.stride(0), stride_rm)
        run(linear_kernel, (tiles, 1, 1), arguments, constants)
    return out


def _by_library(
    x: Tensor,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    gelu: str,
    residual: Tensor | None,
    pre: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The same by PyTorch's GEMMs, into `out`: cuBLAS adds the bias; what else there is takes a pass each."""
    n = out.shape[1] // sum(weight is not None for weight in weights)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight is not None:
            part = out[:, i * n : (i + 1) * n]
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
    if pre is not None:
        pre.copy_(out)
    if gelu:
        torch.ops.aten.gelu.out(out, approximate=gelu, out=out)
    return out if residual is None else out.add_(residual)


def _descriptor_fits(x: Tensor) -> bool:
    """Whether descriptors can read `x`: 16 bits an element, rows that start at 16 bytes and don't overlap."""
    return x.dtype.itemsize == 2 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate is {approximate!r}; expected "none" or "tanh"')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,) or None -> (T, N).

    Here and in all that follows, weights of another dtype are rounded to that of x, which is that of the result.

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, (weight,), (bias,))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """`gelu(x @ weight.T + bias)`: x (T, K), weight (N, K), bias (N,) or None -> (T, N).

    `approximate` is "none" (exact, erf) or "tanh", as in torch.nn.functional.gelu.

    Raises:
        ValueError: shapes that don't fit together, or another `approximate`.
    """
    _check_approximate(approximate)
    return _launch(x, (weight,), (bias,), approximate)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x @ weight.T + bias + residual`: x (T, K), weight (N, K), residual (T, N) -> (T, N).

    Raises:
        ValueError: shapes that don't fit together.
    """
    return _launch(x, (weight,), (bias,), residual=residual)


def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> Tensor:
    """Query, key and value projections: x (T, K), weights (N, K), biases (N,) or None -> (T, 3, N), contiguous.

    One GEMM, in which the three weights are read where they are: nothing is concatenated.

    Raises:
        ValueError: shapes that don't fit together.
    """
    out = _launch(x, (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias))
    return out.view(x.shape[0], 3, q_weight.shape[0])


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Both linear layers of a feed-forward: x (T, K), weight1 (I, K), bias1 (I,), weight2 (N, I), bias2 (N,).

    Returns:
        gelu(pre) @ weight2.T + bias2, (T, N); and what the backward needs, pre = x @ weight1.T + bias1, (T, I).

    Raises:
        ValueError: shapes that don't fit together, or another `approximate` than "none" or "tanh".
    """
    _check_approximate(approximate)
    pre = x.new_empty((x.shape[0], weight1.shape[0]))
    act = _launch(x, (weight1,), (bias1,), approximate, pre=pre)
    return _launch(act, (weight2,), (bias2,)), pre


# As in linear_kernel; the weight is read the other way round.
@triton.jit(do_not_specialize=["m"])
def linear_gelu_backward_kernel(
    grad_ptr,  # (m, k), rows stride_gm apart
    w_ptr,  # (k, n), contiguous
    pre_ptr,  # (m, n), contiguous, as are the next two; (m, 2 n) where GATED: what is activated, then its factor
    dpre_ptr,  # as pre
    act_ptr,  # (m, n)
    m,
    n,
    k,
    stride_gm,
    GELU: tl.constexpr,  # "none" (erf), "tanh" or "silu"
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATED: tl.constexpr = False,
):
    tile_m, tile_n = order_tiles(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    start_m = tile_m * BLOCK_M
    start_n = tile_n * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_m, m - 1 - start_m)
    mask_n = (start_n + offs_n < n)[None, :]
    grad_ptrs = grad_ptr + start_m.to(tl.int64) * stride_gm + (rows[:, None] * stride_gm + offs_k[None, :])
    w_ptrs = w_ptr + start_n + (offs_k[:, None] * n + offs_n[None, :])

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, k, BLOCK_K):
        if EVEN_K:
            grad = tl.load(grad_ptrs)
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
        else:
            keep = offs_k < k - start_k
            grad = tl.load(grad_ptrs, mask=keep[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=keep[:, None] & mask_n, other=0.0)
        if grad.dtype == tl.float32 and INPUT_PRECISION == "ieee":
            acc += tl.dot(grad, w, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(grad, w, acc, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        grad_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * n

    HALF_N: tl.constexpr = BLOCK_N // 2
    acc0, acc1 = tl.split(acc.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1))
    stride_pm = 2 * n if GATED else n
    for half in tl.static_range(2):
        offs_h = tl.arange(0, HALF_N)
        start_h = start_n + half * HALF_N
        corner = start_m.to(tl.int64) * n + start_h
        offs = offs_m[:, None] * n + offs_h[None, :]
        corner_p = start_m.to(tl.int64) * stride_pm + start_h
        offs_p = offs_m[:, None] * stride_pm + offs_h[None, :]
        mask = (start_m + offs_m < m)[:, None] & (start_h + offs_h < n)[None, :]
        x = tl.load(pre_ptr + corner_p + offs_p, mask=mask, other=0.0).to(tl.float32)
        if GELU == "tanh":
            act, slope = gelu_tanh_backward(x)
        elif GELU == "silu":
            act, slope = silu_backward(x)
        elif grad_ptr.dtype.element_ty == tl.float32:
            act, slope = gelu_erf_backward(x)
        else:
            act, slope = gelu_erf_backward_16(x)
        dact = acc0 if half == 0 else acc1
        if GATED:
            factor = tl.load(pre_ptr + corner_p + n + offs_p, mask=mask, other=0.0).to(tl.float32)
            dfactor = (dact * act).to(dpre_ptr.dtype.element_ty)
            tl.store(dpre_ptr + corner_p + n + offs_p, dfactor, mask=mask)
            dact *= factor
            act *= factor
        dpre = dact * slope
        tl.store(dpre_ptr + corner_p + offs_p, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        tl.store(act_ptr + corner + offs, act.to(act_ptr.dtype.element_ty), mask=mask)


@launch.planned
def _backward_plan(
    choose: launch.Choose, arch: str, dtype: torch.dtype, n: int, k: int, gelu: str, gated: bool, precision: str
) -> tuple[launch.Config, Constants]:
    config: launch.Config = choose(arch, dtype, n, k)
    return config, Constants(launch.gemm_constants(config, k), GELU=gelu, GATED=gated, INPUT_PRECISION=precision)


def linear_gelu_backward(grad: Tensor, weight: Tensor, pre: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Back through `gelu(pre) @ weight.T`: grad (T, N), weight (N, I), pre (T, I).

    Returns:
        (grad @ weight) * gelu'(pre), (T, I); and gelu(pre), (T, I), which the gradient of `weight` is a GEMM with.

    Raises:
        ValueError: shapes that don't fit together, or another `approximate` than "none" or "tanh".
    """
    _check_approximate(approximate)
    return activation_backward(grad, weight, pre, approximate, False)


def activation_backward(grad: Tensor, weight: Tensor, pre: Tensor, gelu: str, gated: bool) -> tuple[Tensor, Tensor]:
    """The same; `gelu` "silu", too; gated, pre and its gradient are (T, 2 I), as `linear_gated_backward` has them."""
    (m, k), n = grad.shape, weight.shape[1]
    wide = 2 * n if gated else n
    if weight.shape != (k, n) or pre.shape != (m, wide):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and pre {tuple(pre.shape)}; "
            f"expected {(k, n)} and {(m, wide)} for grad of shape {(m, k)}"
        )
    dpre, act = pre.new_empty((m, wide)), pre.new_empty((m, n))
    if dpre.numel() == 0:
        return dpre, act
    dtype = grad.dtype
    arch, precision = launch.architecture(grad.device), launch.input_precision(dtype)
    config, constants = _backward_plan(launch.linear_backward_config, arch, dtype, n, k, gelu, gated, precision)
    grad = launch.contiguous_rows(grad)
    operands = grad, launch.operand(weight, dtype), launch.contiguous(pre), dpre, act
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    run(linear_gelu_backward_kernel, (tiles, 1, 1), (*operands, m, n, k, grad.stride(0)), constants)
    return dpre, act
