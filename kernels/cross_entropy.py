"""Cross-entropy over a vocabulary, from hidden states, without ever holding all logits.

`linear_cross_entropy` and `linear_cross_entropy_backward` are the Triton twins of the functions of those names in
`reference`. Rows are taken some at a time: their logits are a plain GEMM, torch's, and one program a row walks them,
for the logarithm of their exponentials' sum or, in the backward, to turn them into their own gradients in place.

Labels are checked on the device, as ids are in `embedding`: no row is read out of bounds, and where assertions do
nothing (the interpreter) the loss comes back as NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import Constants, run
from .cpu import matmul
from .launch import VOCABULARY_BLOCK

# Rows whose logits are held at once: for a vocabulary of 30,522 in 16 bits, 125 MB.
ROWS = 2048
BACKWARD = Constants(BLOCK_N=VOCABULARY_BLOCK, num_warps=4)
# debug also turns on a check of every integer addition; the assertion below is the only one wanted.
FORWARD = Constants(BACKWARD, sanitize_overflow=False)


# debug: the device assertion is compiled in.
@triton.jit(debug=True, do_not_specialize_on_alignment=["labels_ptr", "loss_ptr", "lse_ptr"])
def cross_entropy_kernel(
    logits_ptr,  # (R, width), contiguous
    labels_ptr,  # (R,) int64
    loss_ptr,  # (R,) float32
    lse_ptr,  # (R,) float32
    width,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    in_range = (label >= 0) & (label < width)
    tl.device_assert(in_range, "labels: a label is negative or not below the vocabulary size")
    logits_ptr += row * width
    offs = tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_N):
        x = tl.load(logits_ptr + start + offs, mask=start + offs < width, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(row_max, x)
        # A column without a number so far has a maximum of -inf, and -inf - -inf is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - shift) + tl.exp(x - shift)
        row_max = new_max
    top = tl.max(row_max, 0)
    lse = top + tl.log(tl.sum(row_sum * tl.exp(row_max - top), 0))
    chosen = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, lse - chosen)
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "lse_ptr", "grad_ptr"])
def cross_entropy_backward_kernel(
    logits_ptr,  # (R, width), contiguous: logits, and then their gradients
    labels_ptr,  # (R,) int64
    lse_ptr,  # (R,) float32
    grad_ptr,  # (R,) float32
    width,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    grad = tl.load(grad_ptr + row)
    logits_ptr += row * width
    for start in range(0, width, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        x = tl.load(logits_ptr + offs, mask=offs < width, other=float("-inf")).to(tl.float32)
        dx = (tl.exp(x - lse) - tl.where(offs == label, 1.0, 0.0)) * grad
        tl.store(logits_ptr + offs, dx.to(logits_ptr.dtype.element_ty), mask=offs < width)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    rows, width = x.shape
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (_, {width}) for x of shape {(rows, width)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(weight.shape[0],)}")
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected {(rows,)}, torch.int64"
        )


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `x @ weight.T + bias` against labels, row by row, without all logits at once.

    Args:
        x: (R, H).
        weight, bias: (V, H), and (V,) or None; rounded to the dtype of x.
        labels: (R,) int64, 0 to V - 1: one out of range fails an assertion on the device.

    Returns:
        The loss of each row, and the logarithm of the sum of its exponentiated logits, which the backward needs: both
        (R,) float32.

    Raises:
        ValueError: shapes that don't fit together.
    """
    _check(x, weight, bias, labels)
    weight, bias, labels = weight.to(x.dtype), None if bias is None else bias.to(x.dtype), labels.contiguous()
    loss, lse = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    for start in range(0, x.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logits = _logits(x[rows], weight, bias)
        arguments = logits, labels[rows], loss[rows], lse[rows], logits.shape[1]
        run(cross_entropy_kernel, (logits.shape[0], 1, 1), arguments, FORWARD)
    return loss, lse


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_cross_entropy`: (dx, dweight, dbias), the last empty, (0,), without a bias.

    `grad` (R,) is the gradient with respect to the losses. Logits are computed again, some rows at a time, and the
    gradients of weight and bias add up in float32.

    Raises:
        ValueError: shapes that don't fit together.
    """
    _check(x, weight, bias, labels)
    rounded, offset = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    grad, labels = grad.to(torch.float32).contiguous(), labels.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    dbias = torch.zeros(0 if bias is None else weight.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logits = _logits(x[rows], rounded, offset)
        arguments = logits, labels[rows], lse[rows], grad[rows], logits.shape[1]
        run(cross_entropy_backward_kernel, (logits.shape[0], 1, 1), arguments, BACKWARD)
        if bias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
        dx[rows] = matmul(logits, rounded, x.dtype)
        dweight += matmul(logits.t(), x[rows], torch.float32)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)
