"""Between the padded and the packed layout: rows gathered by index, missing ones as zeros.

`pack` and `unpack` are the Triton twins of the functions of those names in `reference`: one kernel, one launch each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


# debug: the device assertion is compiled in.
@triton.jit(debug=True, do_not_specialize=["rows"])
def gather_rows_kernel(
    x_ptr,  # (rows, width), rows stride_xm apart
    index_ptr,  # (R,) int64
    out_ptr,  # (R, width), contiguous
    rows,
    width,
    stride_xm,
    FIRST: tl.constexpr,  # the smallest index allowed: 0, or -1 where that stands for a row of zeros
    BLOCK_H: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + out_row)
    tl.device_assert((row >= FIRST) & (row < rows), "indices: a row index is out of range")
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    value = tl.load(x_ptr + row * stride_xm + cols, mask=mask & (row >= 0) & (row < rows), other=0.0)
    tl.store(out_ptr + out_row * width + cols, value, mask=mask)


def _launch(x: Tensor, index: Tensor, first: int) -> Tensor:
    rows, width = x.shape
    out = torch.empty(index.shape[0], width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = launch.row_config(x.dtype, width)
    x = launch.contiguous_rows(x)
    gather_rows_kernel[(out.shape[0],)](
        x,
        index.contiguous(),
        out,
        rows,
        width,
        x.stride(0),
        FIRST=first,
        BLOCK_H=config.block_n,
        num_warps=config.num_warps,
        # debug also turns on a check of every integer addition; the assertion above is the only one wanted.
        sanitize_overflow=False,
    )
    return out


def pack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Rows of the padded layout that hold real tokens: x (R, H), indices (T,) int64 into its rows -> (T, H).

    An index out of range fails an assertion on the device.
    """
    return _launch(x, indices, 0)


def unpack(x: Tensor, indices: Tensor, inverse: Tensor) -> Tensor:
    """Packed rows back in the padded layout: x (T, H), inverse (R,) int64, the packed row of each or -1 -> (R, H).

    Rows whose inverse is -1 come back as zeros. An index below -1 or not below T fails an assertion on the device.
    """
    return _launch(x, inverse, -1)
