"""Between the padded and the packed layout: where rows go, by a mask; rows gathered by index, missing ones as zeros.

`mask_layout`, `pack` and `unpack` are the Triton twins of the functions of those names in `reference`, one launch each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit(do_not_specialize=["batch", "seqlen"])
def mask_layout_kernel(
    mask_ptr,  # (batch, seqlen) bool, contiguous
    labels_ptr,  # (batch, seqlen) int64, contiguous, or None
    cu_seqlens_ptr,  # (batch + 1,) int32
    indices_ptr,  # (batch * seqlen,) int64, as is the next
    inverse_ptr,
    totals_ptr,  # (5,) int64
    batch,
    seqlen,
    BLOCK: tl.constexpr,
):
    # One program: a prefix sum over all rows. Even of a million rows it takes next to nothing of what they cost later.
    rows = batch * seqlen
    offs = tl.arange(0, BLOCK)
    count = 0  # real rows so far
    begins = 0  # runs of real rows
    firsts = 0  # sequences whose first row is real
    labelled = 0  # padding rows with a label
    for start in range(0, rows, BLOCK):
        row = start + offs
        inside = row < rows
        first = row % seqlen == 0
        real = tl.load(mask_ptr + row, mask=inside, other=0).to(tl.int32)
        after_real = tl.load(mask_ptr + row - 1, mask=inside & (first == 0), other=0).to(tl.int32)
        before = count + tl.cumsum(real, 0) - real
        tl.store(inverse_ptr + row, tl.where(real != 0, before, -1).to(tl.int64), mask=inside)
        # Real rows in order from the front, those of padding from the end: every index is written once.
        slot = tl.where(real != 0, before, rows - 1 - (row - before))
        tl.store(indices_ptr + slot, row.to(tl.int64), mask=inside)
        tl.store(cu_seqlens_ptr + row // seqlen, before, mask=inside & first)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + row, mask=inside, other=-100)
            labelled += tl.sum((inside & (real == 0) & (label != -100)).to(tl.int32), 0)
        begins += tl.sum(real * (1 - after_real), 0)
        firsts += tl.sum(tl.where(first, real, 0), 0)
        count += tl.sum(real, 0)
    tl.store(cu_seqlens_ptr + batch, count)
    tl.debug_barrier()  # what other threads of the program have stored

    longest = 0
    filled = 0  # sequences with a real row
    for start in range(0, batch, BLOCK):
        inside = start + offs < batch
        ptrs = cu_seqlens_ptr + start + offs
        length = tl.load(ptrs + 1, mask=inside, other=0) - tl.load(ptrs, mask=inside, other=0)
        longest = tl.maximum(longest, tl.max(length, 0))
        filled += tl.sum((length > 0).to(tl.int32), 0)
    tl.store(totals_ptr, count)
    tl.store(totals_ptr + 1, longest)
    tl.store(totals_ptr + 2, tl.where(firsts == batch, 1, 0))
    tl.store(totals_ptr + 3, tl.where(labelled > 0, 1, 0))
    tl.store(totals_ptr + 4, tl.where(begins > filled, 1, 0))


def mask_layout(mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed layout of a padding mask (B, S) bool, True at real tokens; labels (B, S) int64, -100 for none.

    Returns:
        - (B + 1,) int32, where each sequence starts among the real tokens;
        - (B * S,) int64, the padded rows: those of real tokens in order, then those of padding, the last first;
        - (B * S,) int64, the place of each padded row among the real ones, -1 where it is padding;
        - (5,) int64: real tokens; the longest sequence; and whether every first position is real, a label stands at
          padding, padding stands between real tokens of a sequence.

    Raises:
        ValueError: labels of another shape than the mask.
    """
    batch, seqlen = mask.shape
    if labels is not None and labels.shape != mask.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {(batch, seqlen)}, the shape of mask")
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=mask.device)
    indices, inverse = (torch.empty(batch * seqlen, dtype=torch.int64, device=mask.device) for _ in range(2))
    totals = torch.empty(5, dtype=torch.int64, device=mask.device)
    config = launch.MASK_LAYOUT
    mask_layout_kernel[(1,)](
        mask.contiguous(),
        None if labels is None else labels.contiguous(),
        cu_seqlens,
        indices,
        inverse,
        totals,
        batch,
        seqlen,
        BLOCK=config.block_n,
        num_warps=config.num_warps,
    )
    return cu_seqlens, indices, inverse, totals


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
    # As a number of columns: in a mask, triton 3.9's interpreter takes no condition that is a scalar.
    present = tl.where((row >= 0) & (row < rows), width, 0)
    value = tl.load(x_ptr + row * stride_xm + cols, mask=cols < present, other=0.0)
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
