"""The numerical policy, stated once: every test and `fastbert verify` judge by these functions and no others.

Truth is the stock model (or plain PyTorch operator) in float64, on inputs and weights that were first rounded to the
working dtype. A fused result may be no further from the truth than stock itself is in the same dtype, with 10 % slack,
plus one rounding of the stored result:

    error(fused) <= 1.1 * error(stock, same dtype) + unit roundoff of the dtype

There is no absolute tolerance and no cosine gate.

In FP8 and int8 (`fuse(model, precision=...)`) the same holds with another stock: one whose linear layers multiply what
`as_fp8`, or `as_int8`, makes of their weights and inputs, and a slack of SLACKS. It says that nothing but the
precision itself is lost; what that costs a task is reported beside it (`fastbert.quality`), and not judged.

A single GEMM of FP8 numbers is judged by a stock GEMM of the same numbers in float32. Hopper's tensor cores add such
products up in fewer bits than float32 has: there stock is `reference_fp8.mm_on_hopper`, which has such sums, each taken
over into float32 after `launch.FP8_EXACT_K` products. What adds up more of them, or in fewer bits, exceeds the bound.
"""

from __future__ import annotations

import torch

SLACK = 1.1

FP8_SLACK = 1.25
"""In FP8: one scale for all rows rounds the outliers that a row's own scale, as stock has it there, makes exact.

That costs a tenth on all-MiniLM-L6-v2 (docs/fp8.md); a scale that saturates costs several times as much.
"""


SLACKS = {None: SLACK, "fp8": FP8_SLACK, "int8": SLACK}
"""By what `fuse` takes as precision."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding one number to `dtype`: half of its machine epsilon."""
    return torch.finfo(dtype).eps / 2


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    """x (..., K) after each row has been rounded to FP8 (e4m3) in the scale that makes its largest magnitude 448."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def as_int8(x: torch.Tensor) -> torch.Tensor:
    """x (..., K) after each row has been rounded to 255 steps from its least number, or 0, to its largest, or 0."""
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low).clamp(min=1e-30) / 255
    zero = (low / step).round()
    return (((wide / step).round() - zero).clamp(0, 255).add(zero) * step).to(x.dtype)


def weight_as_int8(weight: torch.Tensor, limit: int) -> torch.Tensor:
    """weight (N, K) after each row has been rounded to steps of which its largest magnitude is `limit`."""
    wide = weight.float()
    step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / limit
    return ((wide / step).round() * step).to(weight.dtype)


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """`||actual - truth|| / ||truth||` (Frobenius norm, in float64, where `truth` lies).

    Args:
        actual: any shape, any floating dtype.
        truth: the same shape, float64.

    Returns:
        The relative error; the absolute one where truth is zero; infinity where either holds NaN, or where they differ
        in a position that is infinite.

    Raises:
        ValueError: the shapes differ, or `truth` is not float64.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, truth has {tuple(truth.shape)}; expected the same")
    if truth.dtype != torch.float64:
        raise ValueError(f"truth has dtype {truth.dtype}; expected torch.float64")
    actual, truth = actual.detach().to(truth.device).double(), truth.detach()
    if actual.numel() == 0:
        return 0.0
    difference = (actual - truth).norm()
    if not torch.isfinite(difference):  # infinite in the same places, with the same sign, they differ by nothing there
        difference = torch.where(actual == truth, 0.0, actual - truth).norm()
    if not torch.isfinite(difference):
        return float("inf")
    scale = truth.norm()
    return (difference / scale if 0 < scale < float("inf") else difference).item()


def bound(stock_error: float, dtype: torch.dtype, slack: float = SLACK) -> float:
    """The largest error the policy allows a fused result whose stock counterpart, in `dtype`, has `stock_error`."""
    return slack * stock_error + unit_roundoff(dtype)


def assert_within_policy(
    fused: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, what: str = "output"
) -> tuple[float, float]:
    """Raises AssertionError naming `what` unless `fused` is within the policy's bound; returns both errors.

    A stock result that isn't finite sets no bound, and nothing passes by it.

    Args:
        fused: the result under test, in the working dtype.
        stock: what stock computes in the same dtype; it sets the bound.
        truth: the float64 result, same shape.
        what: how the message names it.

    Returns:
        (error of fused, error of stock), both relative to `truth`.
    """
    if fused.dtype != stock.dtype:
        raise AssertionError(f"{what}: fused has dtype {fused.dtype}, stock has {stock.dtype}")
    fused_error, stock_error = relative_error(fused, truth), relative_error(stock, truth)
    if stock_error == float("inf"):
        raise AssertionError(
            f"{what}: stock's own result holds NaN or infinity where the truth doesn't; it sets no bound"
        )
    limit = bound(stock_error, stock.dtype)
    if not fused_error <= limit:
        raise AssertionError(
            f"{what}: error {fused_error:.3e} exceeds the bound {limit:.3e} (stock's own error: {stock_error:.3e})"
        )
    return fused_error, stock_error
