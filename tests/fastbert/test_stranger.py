"""A family that fastbert has never heard of, through an adapter of its own: docs/adding-a-family.md."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert import numerics, ops
from fastbert.models.classes import register
from fastbert.models.family import Family
from fastbert.runtime import registry
from tests import models
from tests.fastbert.quill import adapter
from tests.fastbert.quill import modeling_quill as code


def seeded(kind: Any = code.QuillModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind(code.QuillConfig(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return model


def calls(batch: int, seqlen: int) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments, and which tokens are real."""
    found = []
    for mask in models.masks(batch, seqlen).values():
        ids = models.ids(batch, seqlen, high=100)
        found.append(({"input_ids": ids, "attention_mask": mask}, torch.ones_like(ids) if mask is None else mask))
    return found


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen", [1, 37, 128, 129])
def test_outputs(seqlen: int, dtype: torch.dtype, padding: str) -> None:
    fused, stock, truth = models.three(seeded(), dtype)
    fastbert.fuse(fused, padding=padding)
    for call, real in calls(3, seqlen):
        with torch.no_grad():
            found = [model(**call).last_hidden_state[real.bool()] for model in (fused, stock, truth)]
        numerics.assert_within_policy(*found)
    (encoder,) = fastbert.explain(fused).encoders
    assert not encoder.stock_calls
    assert ("packed" in encoder.fused_calls) is (padding == "packed")


def test_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels run for real there")
    for operator in ops.CPU_BACKEND:
        monkeypatch.setitem(ops.CPU_BACKEND, operator, ops.registry.kernel(operator))
    fused, stock, truth = models.three(seeded(), torch.float32)
    fastbert.fuse(fused, padding="packed")
    for call, real in calls(3, 19)[:3]:
        with torch.no_grad():
            found = [model(**call).last_hidden_state[real.bool()] for model in (fused, stock, truth)]
        numerics.assert_within_policy(*found)


def gradients(model: Any) -> dict[str, Tensor]:
    """Each parameter's gradients of several batches, one after the other."""
    found: dict[str, list[Tensor]] = {}
    for seed in range(8):
        mask = models.masks(12, 19 + 4 * seed)["right"]
        assert mask is not None
        model.zero_grad()
        hidden = model(models.ids(*mask.shape, seed=seed, high=100), attention_mask=mask).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (hidden * weights.to(hidden.dtype))[mask.bool()].sum().backward()
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(parameter.grad.flatten().clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_gradients(padding: str) -> None:
    trio = [model.train() for model in models.three(seeded(), torch.float32)]
    fastbert.fuse(trio[0], padding=padding)
    models.assert_all_within_policy(*map(gradients, trio), padding)
    assert not fastbert.explain(trio[0]).encoders[0].stock_calls


def test_heads_pack() -> None:
    """By what the adapter says that they read."""
    fused = fastbert.fuse(seeded(code.QuillForRanking))
    stock = seeded(code.QuillForRanking)
    call = {"input_ids": models.ids(4, 23, high=100), "attention_mask": models.masks(4, 23)["right"]}
    with torch.no_grad():
        torch.testing.assert_close(fused(**call), stock(**call))
    assert dict(fastbert.explain(fused).encoders[0].fused_calls) == {"packed": 1}


def test_dropout_is_drawn_by_the_seed() -> None:
    model = fastbert.fuse(seeded(dropout=0.4)).train()
    ids = models.ids(2, 9, high=100)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(ids).last_hidden_state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_layer_that_runs_stock_takes_the_call_with_it() -> None:
    model = seeded()
    fused = fastbert.fuse(copy.deepcopy(model))
    fused.stack.blocks[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    model.stack.blocks[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        assert torch.equal(fused(ids).last_hidden_state, model(ids).last_hidden_state)
    (reason,) = fastbert.explain(fused).encoders[0].stock_calls
    assert "takes what only its own encoder gives" in reason


def swapped_gate(family: Family) -> dict[str, Any]:
    half = dataclasses.replace(family.layout.feed_forward, is_gated=False)
    return {"layout": dataclasses.replace(family.layout, feed_forward=half)}


def unturned(family: Family) -> dict[str, Any]:
    half = dataclasses.replace(family.layout.attention, rotary=None)
    return {"layout": dataclasses.replace(family.layout, attention=half)}


WRONG: dict[str, Callable[[Family], dict[str, Any]]] = {
    "no rotation": unturned,
    "the norm after": lambda family: {"layout": dataclasses.replace(family.layout, pre_norm=False)},
    "no final norm": lambda family: {"final_norm": None},
    "positions from 1": lambda family: {
        "tables": lambda encoder, x, packing, ids: {"rotation": encoder.rotation(packing.positions(x.device) ** 2)}
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_says_what_is_not_so_is_refused(what: str) -> None:
    family = dataclasses.replace(adapter.FAMILY, **WRONG[what](adapter.FAMILY))
    try:
        with pytest.raises(ValueError, match="QuillModel was registered, and departs from stock: its hidden"):
            register(family, adapter.__name__)
        assert code.QuillModel not in registry.REGISTERED
    finally:
        register(adapter.FAMILY, adapter.__name__)
