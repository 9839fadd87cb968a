"""A long run in short: thousands of ragged batches through one model, in constant memory, to the same numbers."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from transformers.models.bert import modeling_bert as hf

import fastbert
from tests import models

BATCHES = 10_000
WARM = 1_000
"""Batches until allocators hold what they will hold."""


def batch(generator: random.Random, device: str) -> dict[str, Any]:
    lengths = [generator.randint(1, 64) for _ in range(generator.randint(1, 6))]
    if generator.random() < 0.5:
        call = models.ragged(lengths, seed=generator.randint(0, 99))
    else:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        call = {"input_ids": models.ids(*mask.shape, seed=generator.randint(0, 99)), "attention_mask": mask}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def binaries() -> int:
    """Compiled kernels that Triton holds for this process."""
    from triton.runtime.jit import JITFunction

    from fastbert.kernels import attention, cross_entropy, embedding, layer_norm, linear, padding

    modules = (attention, cross_entropy, embedding, layer_norm, linear, padding)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.slow
@pytest.mark.gpu
def test_ten_thousand_batches_on_a_gpu() -> None:
    soak("cuda")


@pytest.mark.slow
def test_ten_thousand_batches() -> None:
    soak("cpu")


def soak(device: str) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    model = fastbert.fuse(models.seeded(hf.BertForSequenceClassification, **shape)).to(device)
    generator, probe = random.Random(0), batch(random.Random(1), device)
    held, compiled = 0, 0
    with torch.inference_mode():
        first = model(**probe)[0].clone()
        for i in range(BATCHES):
            assert model(**batch(generator, device))[0].isfinite().all()
            if i == WARM:
                gc.collect()
                held = memory(device)
                compiled = binaries() if device == "cuda" else 0
        gc.collect()
        assert torch.equal(model(**probe)[0], first)  # no drift
    assert memory(device) - held < 8 * 2**20
    assert device == "cpu" or binaries() == compiled > 0
    (encoder,) = fastbert.explain(model).encoders
    assert (sum(encoder.fused_calls.values()), encoder.stock_calls) == (BATCHES + 2, {})


def memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(pytest.importorskip("psutil").Process().memory_info().rss)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once() -> None:
    """With dynamic shapes, thousands of batches of other sizes run what the first few compiled."""
    torch._dynamo.reset()
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1}
    model = torch.compile(fastbert.fuse(models.seeded(**shape)), dynamic=True, backend="eager")
    generator, graphs = random.Random(0), torch._dynamo.utils.counters["stats"]
    compiled = 0
    with torch.no_grad():
        for i in range(1_000):
            rows, seqlen = generator.randint(2, 6), generator.randint(2, 64)
            mask = torch.ones(rows, seqlen, dtype=torch.int64)
            mask[0, seqlen // 2 + 1 :] = 0
            assert model(models.ids(rows, seqlen, seed=i), mask)[0].isfinite().all()
            if i == 20:
                compiled = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == compiled > 0
