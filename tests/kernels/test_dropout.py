"""Which elements dropout keeps: those of Philox, at its rate, and others for each row, stream and seed."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import dropout
from tests.kernels.philox import keep, keep_row, philox


@triton.jit
def tile_kernel(seed_ptr, out_ptr, first_row, first_col, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = first_row + tl.arange(0, ROWS)
    seed = tl.load(seed_ptr)
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offs, dropout.keep_tile(seed, rows, first_col, stream, threshold, ROWS, COLS))
    turned = dropout.keep_tile_transposed(seed, rows, first_col, stream, threshold, ROWS, COLS)
    tl.store(out_ptr + ROWS * COLS + offs, tl.trans(turned))


@triton.jit
def row_kernel(seed_ptr, out_ptr, row, threshold, COLS: tl.constexpr):
    kept = dropout.keep_row(tl.load(seed_ptr), row + tl.program_id(0), threshold, COLS)
    tl.store(out_ptr + tl.program_id(0) * COLS + tl.arange(0, COLS), kept)


def tile(
    seed: int, row: int, col: int, stream: int, rate: float, device: str, rows: int = 32, cols: int = 64
) -> Tensor:
    out = torch.zeros(2, rows, cols, dtype=torch.bool, device=device)
    number = torch.tensor([seed], device=device)
    tile_kernel[(1,)](number, out, row, col, stream, dropout.draw_threshold(rate), ROWS=rows, COLS=cols)
    assert torch.equal(out[0], out[1])  # as itself and as its transpose
    return out[0].cpu()


def test_the_oracle_is_philox() -> None:
    """Random123's known answers, of ten rounds."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        assert tuple(int(w) for w in philox(counter, key, 10)) == words


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9999999, 1.0])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 0x123456789ABCDEF])
def test_kernels_keep_what_the_oracle_keeps(seed: int, rate: float, device: str) -> None:
    places = (0, 0, 0, 64), (1000, 64, 3, 64), (2**20, 32, 15, 32), (3, 16, 1, 16), (3, 32, 1, 16)
    for row, col, stream, width in places:
        rows, cols = torch.arange(row, row + 32), torch.arange(col, col + width)
        kept = tile(seed, row, col, stream, rate, device, cols=width)
        assert torch.equal(kept, keep(seed, rows, cols, stream, rate))
    out = torch.zeros(3, 128, dtype=torch.bool, device=device)
    number = torch.tensor([seed], device=device)
    row_kernel[(3,)](number, out, 5, dropout.draw_threshold(rate), COLS=128)
    assert torch.equal(out.cpu(), keep_row(seed, torch.arange(5, 8), torch.arange(128), rate))


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_rate_and_independence(rate: float, device: str) -> None:
    """Within four standard deviations of 32,768 draws; and agreement of two masks, of what independence gives."""

    def draws(seed: int, row: int, stream: int) -> Tensor:
        return tile(seed, row, 0, stream, rate, device, 128, 256)

    first = draws(1, 0, 0)
    agree = rate**2 + (1 - rate) ** 2
    for other, expected in (
        (None, 1 - rate),
        (draws(2, 0, 0), agree),
        (draws(1, 128, 0), agree),
        (draws(1, 0, 1), agree),
        (first.roll(1, 1), agree),
        (first.roll(1, 0), agree),
    ):
        seen = (first if other is None else first == other).double().mean().item()
        assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / first.numel())


def test_scale() -> None:
    assert dropout.keep_scale(0.75) == 4
    assert dropout.keep_scale(0.0) == 1
    assert dropout.keep_scale(1.0) == 0


def test_a_rate_needs_a_seed() -> None:
    assert dropout.checked_seed(0.0, None) is None
    with pytest.raises(ValueError, match="dropout is -0"):
        dropout.checked_seed(-0.1, None)
    for seed in (None, torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="seed"):
            dropout.checked_seed(0.5, seed)
