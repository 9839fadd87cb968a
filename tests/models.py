"""Small seeded models and inputs that tests share. Weights *and* biases are random: nothing hides behind a zero or a
one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

from fastbert.numerics import assert_within_policy
from fastbert.runtime.registry import widen

HEADS = (
    hf.BertModel,
    hf.BertForPreTraining,
    hf.BertForMaskedLM,
    hf.BertLMHeadModel,
    hf.BertForNextSentencePrediction,
    hf.BertForSequenceClassification,
    hf.BertForMultipleChoice,
    hf.BertForTokenClassification,
    hf.BertForQuestionAnswering,
)

VOCABULARY = 211


def config(**changes: Any) -> BertConfig:
    """A BERT of two layers of width 128."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 160,
        "num_labels": 32,
    }
    return BertConfig(**{**settings, **changes})


def seeded(kind: type[nn.Module] = hf.BertModel, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode with every parameter drawn at random, LayerNorm's and biases too."""
    generator = torch.Generator().manual_seed(seed)
    if kind is hf.BertForQuestionAnswering:
        changes["num_labels"] = 2
    model = kind(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise)
    return model


def ids(*shape: int, seed: int = 0, high: int = VOCABULARY) -> Tensor:
    """Random token ids."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


MASKS = ("none", "full", "right", "left", "holes", "empty")


def masks(batch: int, seqlen: int) -> dict[str, Tensor | None]:
    """One mask of every kind, (batch, seqlen) int64 or None."""
    lengths = torch.tensor([1 + (7 * i + 3) % seqlen for i in range(batch)])
    right = (torch.arange(seqlen) < lengths[:, None]).long()
    holes = torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(1)).gt(0.4).long()
    holes[:, 0] = 1
    empty = right.clone()
    empty[batch // 2] = 0
    return {
        "none": None,
        "full": torch.ones_like(right),
        "right": right,
        "left": right.flip(1),
        "holes": holes,
        "empty": empty,
    }


def three(model: Any, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Copies of `model` with weights rounded to `dtype`: to fuse, stock in that dtype, and the truth in float64."""
    rounded = copy.deepcopy(model).to(dtype)
    truth = copy.deepcopy(rounded).double()
    widen(truth)
    return copy.deepcopy(rounded), rounded, truth


def ragged(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """A flattened call, as transformers' DataCollatorWithFlattening makes it."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": ids(1, sum(lengths), seed=seed),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def assert_all_within_policy(
    fused: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor], what: str
) -> None:
    """The policy over many tensors at once, each scaled to about the norm of its truth so that none hides another.

    Their errors share causes, and one tensor's alone is often that of a few numbers: its ratio to stock's then varies,
    with the CPU and how its GEMMs split their sums, by more than the policy's slack.
    """
    assert fused.keys() == stock.keys() == truth.keys()
    assert truth
    joined: list[list[Tensor]] = [[], [], []]
    for name, exact in truth.items():
        assert exact.norm() > 0, name
        scale = 2.0 ** -int(exact.norm().log2())  # of two, so that scaling doesn't round
        for parts, tensor in zip(joined, (fused[name], stock[name], exact), strict=True):
            parts.append((tensor * scale).flatten())
    assert_within_policy(torch.cat(joined[0]), torch.cat(joined[1]), torch.cat(joined[2]), what)
