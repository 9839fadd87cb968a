"""How a forward is laid out: packed from masks of any pattern, flattened, and back."""

from __future__ import annotations

import pytest
import torch

from fastbert.runtime import packing
from tests import models


@pytest.mark.parametrize("kind", ["full", "right", "left", "holes", "empty"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 37), (7, 19)])
def test_pack_mask_agrees_with_boolean_indexing(kind: str, shape: tuple[int, int]) -> None:
    mask = models.masks(*shape)[kind].bool()
    hidden = torch.randn(*shape, 3)
    layout, tokens, starts_real, labels_padding, has_holes = packing.pack_mask(mask)
    assert torch.equal(hidden.flatten(0, 1)[layout.indices], hidden[mask])
    assert tokens == int(mask.sum())
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert layout.max_seqlen == int(mask.sum(1).max())
    assert starts_real == bool(mask[:, 0].all())
    assert labels_padding is False
    runs = ["".join("01"[x] for x in row).split("0") for row in mask.tolist()]
    assert has_holes is any(len([run for run in row if run]) > 1 for row in runs)
    restored = layout.unpack(hidden[mask][None])
    assert torch.equal(restored, hidden * mask[..., None])


def test_labels_at_padding_are_found() -> None:
    mask = torch.tensor([[True, True, False]])
    assert packing.pack_mask(mask, torch.tensor([[1, -100, -100]])).labels_padding is False
    assert packing.pack_mask(mask, torch.tensor([[-100, -100, 1]])).labels_padding is True


def test_flattened() -> None:
    layout = packing.flattened(torch.tensor([0, 3, 3, 8]), 8)
    assert layout == packing.Packing(3, 8, 5, layout.cu_seqlens)
    assert layout.cu_seqlens.dtype == torch.int32
    hidden = torch.randn(1, 8, 2)
    assert layout.unpack(hidden) is hidden
    same = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    assert torch.equal(packing.isolating_mask(layout.cu_seqlens, 8)[0, 0], same[:, None] == same)


@pytest.mark.parametrize("starts", [[0, 3], [1, 8], [0, 5, 4, 8], [0, 9]])
def test_flattened_refuses_starts_that_do_not_cover_the_tokens(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packing.flattened(torch.tensor(starts), 8)
