"""Between the padded and the packed layout: where rows go, by a mask; rows gathered by index, missing ones as zeros.

`mask_layout`, `pack` and `unpack` are the Triton twins of the functions of those names in `reference`, one launch each;
a mask of more than 8,192 rows takes two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run

# Rows that a program takes at least, where there are several, and how many there are at most.
ROWS = 4096
PROGRAMS = 512
MASK_LAYOUT = Constants(BLOCK=launch.MASK_LAYOUT.block_n, PROGRAMS=PROGRAMS, num_warps=launch.MASK_LAYOUT.num_warps)


@triton.jit(do_not_specialize=["batch", "seqlen", "group"], do_not_specialize_on_alignment=["mask_ptr"])
def mask_counts_kernel(
    mask_ptr,  # (batch, seqlen) bool, contiguous
    counts_ptr,  # (programs,) int32: real rows of the sequences of each program
    totals_ptr,  # (5,) int64, of mask_layout_kernel: what its programs begin with
    batch,
    seqlen,
    group,  # sequences of a program
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    begin = tl.program_id(0) * group * seqlen
    end = tl.minimum(begin + group * seqlen, batch * seqlen)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        count += tl.load(mask_ptr + row, mask=row < end, other=0).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count, 0))
    if tl.program_id(0) == 0:
        place = tl.arange(0, 8)
        tl.store(totals_ptr + place, tl.where(place == 2, 1, 0).to(tl.int64), mask=place < 5)


@triton.jit(do_not_specialize=["batch", "seqlen", "group"], do_not_specialize_on_alignment=["mask_ptr", "labels_ptr"])
def mask_layout_kernel(
    mask_ptr,  # (batch, seqlen) bool, contiguous
    labels_ptr,  # (batch, seqlen) int64, contiguous, or None
    counts_ptr,  # as mask_counts_kernel leaves it, with totals; None: one program takes all
    cu_seqlens_ptr,  # (batch + 1,) int32
    indices_ptr,  # (batch * seqlen,) int64, as is the next
    inverse_ptr,
    totals_ptr,  # (5,) int64
    batch,
    seqlen,
    group,  # sequences of a program
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,  # at most
):
    # A prefix sum over the rows of the program's sequences, from what those before it have.
    rows = batch * seqlen
    first_sequence = tl.program_id(0) * group
    sequences = tl.minimum(group, batch - first_sequence)
    end = (first_sequence + sequences) * seqlen
    offs = tl.arange(0, BLOCK)
    count = 0  # real rows so far
    if counts_ptr is not None:
        program = tl.arange(0, PROGRAMS)
        count += tl.sum(tl.load(counts_ptr + program, mask=program < tl.program_id(0), other=0), 0)
    before_it = count
    begins = 0  # runs of real rows
    firsts = 0  # sequences whose first row is real
    labelled = 0  # padding rows with a label
    for start in range(first_sequence * seqlen, end, BLOCK):
        row = start + offs
        inside = row < end
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
    tl.debug_barrier()  # what other threads of the program have stored

    longest = 0
    filled = 0  # sequences with a real row
    for start in range(0, sequences, BLOCK):
        inside = start + offs < sequences
        ptrs = cu_seqlens_ptr + first_sequence + start + offs
        following = tl.load(ptrs + 1, mask=start + offs + 1 < sequences, other=0)
        following = tl.where(start + offs + 1 == sequences, count, following)
        length = tl.where(inside, following - tl.load(ptrs, mask=inside, other=0), 0)
        longest = tl.maximum(longest, tl.max(length, 0))
        filled += tl.sum((length > 0).to(tl.int32), 0)
    if first_sequence + sequences == batch:
        tl.store(cu_seqlens_ptr + batch, count)
    starts_real = tl.where(firsts == sequences, 1, 0).to(tl.int64)
    at_padding = tl.where(labelled > 0, 1, 0).to(tl.int64)
    has_holes = tl.where(begins > filled, 1, 0).to(tl.int64)
    if counts_ptr is None:
        tl.store(totals_ptr, count)
        tl.store(totals_ptr + 1, longest)
        tl.store(totals_ptr + 2, starts_real)
        tl.store(totals_ptr + 3, at_padding)
        tl.store(totals_ptr + 4, has_holes)
    else:  # of integers, and so the same in any order
        tl.atomic_add(totals_ptr, tl.cast(count - before_it, tl.int64), sem="relaxed")
        tl.atomic_max(totals_ptr + 1, tl.cast(longest, tl.int64), sem="relaxed")
        tl.atomic_min(totals_ptr + 2, starts_real, sem="relaxed")
        tl.atomic_max(totals_ptr + 3, at_padding, sem="relaxed")
        tl.atomic_max(totals_ptr + 4, has_holes, sem="relaxed")


def mask_layout(mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed layout of a padding mask (B, S) bool, True at real tokens; labels (B, S) int64, -100 for none.

    Returns:
        - (B + 1,) int32, cumulative lengths: where each sequence starts among the real tokens;
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
    rows = batch * seqlen
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=mask.device)
    indices, inverse = (torch.empty(rows, dtype=torch.int64, device=mask.device) for _ in range(2))
    totals = torch.empty(5, dtype=torch.int64, device=mask.device)
    mask, labels = launch.contiguous(mask), None if labels is None else launch.contiguous(labels)
    group, counts = batch, None
    if rows > 2 * ROWS:
        group = -(-batch // min(PROGRAMS, -(-rows // ROWS)))
    programs = -(-batch // group) if batch else 1
    if programs > 1:
        counts = torch.empty(programs, dtype=torch.int32, device=mask.device)
        run(mask_counts_kernel, (programs, 1, 1), (mask, counts, totals, batch, seqlen, group), MASK_LAYOUT)
    arguments = mask, labels, counts, cu_seqlens, indices, inverse, totals, batch, seqlen, group
    run(mask_layout_kernel, (programs, 1, 1), arguments, MASK_LAYOUT)
    return cu_seqlens, indices, inverse, totals


# debug: the device assertion is compiled in.
@triton.jit(debug=True, do_not_specialize=["rows"], do_not_specialize_on_alignment=["index_ptr"])
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


@launch.planned
def _plan(choose: launch.Choose, dtype: torch.dtype, width: int, first: int) -> Constants:
    config = choose(dtype, width)
    # debug also turns on a check of every integer addition; the assertion above is the only one wanted.
    return Constants(FIRST=first, BLOCK_H=config.block_n, num_warps=config.num_warps, sanitize_overflow=False)


def _launch(x: Tensor, index: Tensor, first: int) -> Tensor:
    rows, width = x.shape
    out = x.new_empty((index.shape[0], width))
    if out.numel() == 0:
        return out
    constants = _plan(launch.row_config, x.dtype, width, first)
    x = launch.contiguous_rows(x)
    arguments = x, launch.contiguous(index), out, rows, width, x.stride(0)
    run(gather_rows_kernel, (index.shape[0], 1, 1), arguments, constants)
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
