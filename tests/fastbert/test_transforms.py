"""Several gradients of one graph at once: a vmap that begins in the backward, of a forward that ran fused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import ops
from tests import models

ROWS, LENGTH, CLASSES = 3, 13, 4
Ways = Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, ...]]


def batched(outputs: Tensor, leaves: list[Tensor], vectors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, vectors, is_grads_batched=True, retain_graph=True)


def vmapped(outputs: Tensor, leaves: list[Tensor], vectors: Tensor) -> tuple[Tensor, ...]:
    def one(vector: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, vector, retain_graph=True)

    found: tuple[Tensor, ...] = torch.func.vmap(one)(vectors)
    return found


def in_turn(outputs: Tensor, leaves: list[Tensor], vectors: Tensor) -> tuple[Tensor, ...]:
    each = [torch.autograd.grad(outputs, leaves, vector, retain_graph=True) for vector in vectors]
    return tuple(map(torch.stack, zip(*each, strict=True)))


def graph(model: Any, leaves: str) -> tuple[Tensor, list[Tensor], list[str]]:
    """What is differentiated, and with respect to what."""
    mask = models.masks(ROWS, LENGTH)["right"]
    if leaves == "parameters":
        named = dict(model.bert.named_parameters())
        logits = model(input_ids=models.ids(ROWS, LENGTH), attention_mask=mask).logits
        return logits[0], list(named.values()), list(named)
    words = model.bert.embeddings.word_embeddings(models.ids(ROWS, LENGTH)).detach().requires_grad_()
    return model(inputs_embeds=words, attention_mask=mask).logits[0], [words], ["inputs_embeds"]


def trio(**changes: Any) -> tuple[Any, Any, Any]:
    stock = models.seeded(hf.BertForSequenceClassification, num_labels=CLASSES, **changes)
    return fastbert.fuse(copy.deepcopy(stock)), stock, copy.deepcopy(stock).double()


@pytest.mark.parametrize("way", [batched, vmapped])
@pytest.mark.parametrize("leaves", ["inputs_embeds", "parameters"])
@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_gradients_in_a_batch(way: Ways, leaves: str, padding: str) -> None:
    fused, stock, truth = trio()
    fastbert.fuse(fused, padding=padding)
    found = []
    for model in (fused, stock, truth):
        outputs, tensors, names = graph(model, leaves)
        run = way if model is fused else in_turn
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fastbert::.*")  # of an operator without a rule for vmap
            results = run(outputs, tensors, torch.eye(CLASSES).to(outputs))
        # Of a key's bias it is zero, but for rounding: softmax doesn't see it.
        kept = [(name, g.double()) for name, g in zip(names, results, strict=True) if not name.endswith("key.bias")]
        found.append(dict(kept))
    models.assert_all_within_policy(*found, "gradients in a batch")
    assert fastbert.explain(fused).encoders[0].fused_calls == {padding: 1}


def test_the_vectorized_jacobian() -> None:
    fused, stock, truth = trio()

    def run(model: Any) -> dict[str, Tensor]:
        words = model.bert.embeddings.word_embeddings(models.ids(1, 5)).detach()
        rows = torch.autograd.functional.jacobian(lambda x: model(inputs_embeds=x).logits[0], words, vectorize=True)
        return {"jacobian": rows.double()}

    models.assert_all_within_policy(run(fused), run(stock), run(truth), "jacobian")
    assert fastbert.explain(fused).encoders[0].fused_calls == {"dense": 1}


@pytest.mark.parametrize("way", [batched, vmapped])
def test_each_drops_what_the_forward_has_dropped(way: Ways) -> None:
    """Dropout, its seeds drawn once: in a batch as in turn, by the same graph."""
    model = trio(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)[0].train()
    outputs, leaves, _ = graph(model, "parameters")
    used = [leaf for leaf in leaves if leaf.requires_grad]
    together, one_by_one = (run(outputs, used, torch.eye(CLASSES)) for run in (way, in_turn))
    for ours, theirs in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [batched, vmapped])
def test_losses_of_labelled_tokens_alone(way: Ways) -> None:
    model = fastbert.fuse(models.seeded(hf.BertForMaskedLM), loss_only=True)
    ids = models.ids(ROWS, LENGTH)
    loss = model(input_ids=ids, attention_mask=models.masks(ROWS, LENGTH)["right"], labels=ids).loss
    leaves = [p for name, p in model.named_parameters() if "pooler" not in name]
    vectors = torch.tensor([1.0, -2.0])
    for ours, theirs in zip(way(loss, leaves, vectors), in_turn(loss, leaves, vectors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_operator_of_a_backward_has_a_rule() -> None:
    """Those that are called on gradients: over any dimension, and where not all arguments have one."""
    for name in ops.OPERATORS:
        if name.endswith("_backward") or name in ("pack", "unpack"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{name}", "FuncTorchBatched"), name
    rows, indices = torch.randn(3, 7, 5), torch.tensor([1, 4])
    inverse = torch.full((7,), -1)
    inverse[indices] = torch.arange(2)
    found = torch.func.vmap(lambda x: torch.ops.fastbert.pack(x, indices, inverse), in_dims=2)(rows.permute(1, 2, 0))
    assert torch.equal(found, rows[:, indices])


def test_second_derivatives_still_raise() -> None:
    fused = trio()[0]
    outputs, leaves, _ = graph(fused, "inputs_embeds")
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(outputs, leaves, torch.eye(CLASSES), is_grads_batched=True, create_graph=True)
