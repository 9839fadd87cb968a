"""The norm by the root of the mean of squares, over rows, in one launch.

`rms_norm` is the Triton twin of the function of that name in `reference`. One program normalizes one row, held in
registers in float32, as in `layer_norm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import run
from .dependent import wait_for_previous
from .layer_norm import _plan


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(
    x_ptr,  # (T, width), rows stride_xm apart
    weight_ptr,  # (width,)
    out_ptr,  # (T, width), contiguous
    width,
    stride_xm,
    eps,
    BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    square = tl.div_rn(tl.sum(x * x, 0), width * 1.0)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(square + eps)) * weight
    tl.store(out_ptr + row * width + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension: x (T, H), weight (H,) -> (T, H).

    Raises:
        ValueError: shapes that don't fit together.
    """
    rows, width = x.shape
    if weight.shape != (width,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(width,)} for x of {(rows, width)}")
    out = x.new_empty((rows, width))
    if rows and width:
        arch = launch.architecture(x.device)
        constants = _plan(launch.row_config, arch, x.dtype, width, launch.is_dependent(arch))
        x = launch.contiguous_rows(x)
        given = x, launch.contiguous(weight), out, width, x.stride(0), float(eps)
        run(rms_norm_kernel, (rows, 1, 1), given, constants)
    return out
