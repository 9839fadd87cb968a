"""Packing and unpacking, kernel and reference: rows are moved bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.kernels import compiled, cpu, reference
from fastbert.kernels import padding as kernel
from tests.conftest import thorough

# Bits are moved, not multiplied: the interpreter does bfloat16 as well.
dtypes = [torch.float32, torch.float16, torch.bfloat16]
modules = [pytest.param(kernel, id="kernel"), pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]


def make_mask(batch: int, length: int, device: str) -> Tensor:
    """Holes everywhere, and a sequence without a token."""
    mask = torch.rand(batch * length, generator=torch.Generator().manual_seed(length)) < 0.6
    mask[length : 2 * length] = False
    return mask.to(device)


def make_rows(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("width", [1, 100, 384, 5000])
@pytest.mark.parametrize("module", modules)
def test_pack_and_unpack(module: object, width: int, dtype: torch.dtype, device: str) -> None:
    mask = make_mask(3, 13, device)
    indices = mask.nonzero().squeeze(1)
    inverse = torch.where(mask, mask.cumsum(0) - 1, -1)
    x = make_rows(mask.numel(), width, dtype, device)

    packed = module.pack(x, indices, inverse)
    assert torch.equal(packed, x[mask])
    unpacked = module.unpack(packed, indices, inverse)
    assert torch.equal(unpacked, x * mask[:, None])
    assert packed.is_contiguous() and unpacked.is_contiguous()


@pytest.mark.parametrize("module", modules)
def test_rows_and_columns_apart(module: object, device: str) -> None:
    x = make_rows(7, 100, torch.float32, device)
    indices = torch.tensor([5, 0, 3, 6, 1, 4, 2], device=device)
    inverse = indices.argsort()
    for apart in (torch.cat([x, x], dim=1)[:, :100], x.t().contiguous().t()):
        every_other = (t.repeat_interleave(2)[::2] for t in (indices, inverse))
        assert torch.equal(module.pack(apart, *every_other), x[indices])
        assert torch.equal(module.unpack(apart, indices, inverse), x[inverse])


@pytest.mark.parametrize("module", modules)
def test_nothing_to_move(module: object, device: str) -> None:
    x, none = make_rows(7, 100, torch.float32, device), torch.tensor([], dtype=torch.int64, device=device)
    missing = torch.full((7,), -1, device=device)
    assert module.pack(x, none, missing).shape == (0, 100)
    assert module.unpack(x[:0], none, none).shape == (0, 100)
    assert torch.equal(module.unpack(x[:0], none, missing), torch.zeros(7, 100, device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion that fails on a GPU ends the process's use of it")
@pytest.mark.parametrize(("name", "index"), [("pack", -1), ("pack", 7), ("unpack", -2), ("unpack", 7)])
def test_an_index_out_of_range_is_asserted(name: str, index: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    debugging = replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", debugging)
    wrong = torch.tensor([index], device=device)
    with pytest.raises(interpreter.InterpreterError, match="indices"):
        getattr(kernel, name)(make_rows(7, 100, torch.float32, device), wrong, wrong)


@pytest.mark.parametrize("module", modules)
@pytest.mark.parametrize(
    ("shape", "seed"),
    [
        pytest.param(shape, seed, marks=thorough if i > 3 and (i + seed) % 2 else ())
        for i, shape in enumerate([(1, 1), (5, 1), (1, 37), (7, 19), (3, 4096), (70, 130), (9000, 1), (1100, 16)])
        for seed in range(6)
    ],
)
def test_mask_layout(module: object, shape: tuple[int, int], seed: int, device: str) -> None:
    """By boolean indexing, sequence by sequence."""
    generator = torch.Generator().manual_seed(seed)
    if seed < 3:  # without holes: from the left, from the right, or everywhere
        lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
        mask = torch.arange(shape[1]) < (lengths if seed < 2 else shape[1])
        mask = mask.expand(shape).flip(1) if seed == 1 else mask.expand(shape)
    else:
        mask = torch.rand(shape, generator=generator) < (0.0, 0.5, 0.97)[seed - 3]
    labels = torch.full(shape, -100)
    if seed % 2:
        labels[torch.rand(shape, generator=generator) < 0.01] = 3
    cu_seqlens, indices, inverse, totals = module.mask_layout(mask.to(device), labels.to(device))
    rows = mask.flatten().nonzero().flatten()
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert cu_seqlens.dtype == torch.int32
    assert torch.equal(indices[: len(rows)].cpu(), rows)
    assert torch.equal(indices[len(rows) :].cpu(), (~mask).flatten().nonzero().flatten().flip(0))
    expected = torch.full((mask.numel(),), -1)
    expected[rows] = torch.arange(len(rows))
    assert torch.equal(inverse.cpu(), expected)
    runs = ["".join("01"[x] for x in row).split("0") for row in mask.tolist()]
    assert totals.tolist() == [
        len(rows),
        int(mask.sum(1).max()),
        int(mask[:, 0].all()),
        int((labels[~mask] != -100).any()),
        int(any(len([run for run in row if run]) > 1 for row in runs)),
    ]
    without = module.mask_layout(mask.to(device), None)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], (cu_seqlens, indices, inverse), strict=True))
    assert without[3].tolist()[3] == 0


@pytest.mark.parametrize("module", modules)
def test_mask_layout_of_rows_apart(module: object, device: str) -> None:
    mask = make_mask(7, 20, device).view(7, 20)
    wide = torch.cat([mask, mask], 1)[:, :20]
    assert not wide.is_contiguous()
    for a, b in zip(module.mask_layout(wide, None), module.mask_layout(mask, None), strict=True):
        assert torch.equal(a, b)


def test_a_mask_of_many_rows_is_laid_out_by_many_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each takes whole sequences; a small one is left to one launch."""
    grids: list[int] = []

    def run(found: object, grid: tuple[int, int, int], *rest: Any) -> None:
        grids.append(grid[0])
        compiled.run(found, grid, *rest)

    monkeypatch.setattr(kernel, "run", run)
    for batch, seqlen, expected in ((64, 128, [1]), (65, 128, [3, 3]), (2, 8192, [2, 2]), (4000, 3, [3, 3])):
        mask = make_mask(batch, seqlen, device).view(batch, seqlen)
        for a, b in zip(kernel.mask_layout(mask, None), reference.mask_layout(mask.cpu(), None), strict=True):
            assert torch.equal(a.cpu(), b)
        assert grids == expected
        grids.clear()
    monkeypatch.setattr(kernel, "ROWS", 4)
    monkeypatch.setattr(kernel, "PROGRAMS", 16)  # of 25 that the rows would be enough for
    mask = make_mask(50, 2, device).view(50, 2)
    for a, b in zip(kernel.mask_layout(mask, None), reference.mask_layout(mask.cpu(), None), strict=True):
        assert torch.equal(a.cpu(), b)
    assert grids == [13, 13]


def test_mask_layout_names_labels_of_another_shape(device: str) -> None:
    with pytest.raises(ValueError, match="labels has shape"):
        kernel.mask_layout(torch.ones(2, 3, dtype=torch.bool, device=device), torch.ones(3, 2, device=device))
