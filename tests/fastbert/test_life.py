"""A fused model's life, drawn by hypothesis: whatever is done to it, in whatever order, it answers as stock would.

In float64, which runs fused here alone: the two differ by so little that no error can hide behind rounding.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.runtime import support
from tests import models

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

FEW = settings().max_examples // 2
KINDS = [hf.BertModel, hf.BertForMaskedLM, hf.BertForSequenceClassification, hf.BertForTokenClassification]
MASKS = ["none", "full", "right", "left", "holes", "empty"]


@pytest.fixture(autouse=True)
def float64_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "DTYPES", (*support.DTYPES, torch.float64))


def fused_calls(model: Any) -> int:
    """Those that ran fused; none may have run stock."""
    (encoder,) = fastbert.explain(model).encoders
    assert not encoder.stock_calls
    return sum(encoder.fused_calls.values())


def tiny(kind: Any, seed: int = 0) -> Any:
    changes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return models.seeded(kind, seed, num_labels=3, **changes, **rates).double()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def padded_call(rows: int, seqlen: int, mask: Tensor | None, seed: int) -> dict[str, Any]:
    return {"input_ids": models.ids(rows, seqlen, seed=seed), "attention_mask": mask}


def real(out: Tensor, mask: Tensor | None) -> Tensor:
    """Of (B, S, H) the real tokens; of (B, labels), by the first tokens, the sequences that begin with one."""
    if mask is None:
        return out
    return out[mask.bool() if out.dim() == 3 else mask[:, 0].bool()]


@settings(max_examples=FEW)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 40),
    st.data(),
    st.sampled_from(["auto", "packed", "dense"]),
    st.booleans(),
)
def test_any_mask(kind: Any, rows: int, seqlen: int, data: Any, padding: str, trains: bool) -> None:
    """At real tokens, of sequences that have one: what stock gives; and its gradients of a loss over these."""
    bits = data.draw(st.lists(st.booleans(), min_size=rows * seqlen, max_size=rows * seqlen))
    mask = torch.tensor(bits).view(rows, seqlen)
    mask[:, 0] |= ~mask.any(1) & torch.tensor(data.draw(st.booleans()))
    if padding == "auto" and not mask.any():
        mask[0, 0] = True
    call = padded_call(rows, seqlen, mask.long(), data.draw(st.integers(0, 99)))
    call["token_type_ids"] = models.ids(rows, seqlen, high=2)
    stock = tiny(kind).train(trains)
    fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
    gradients = []
    for model in (fused, stock):
        with torch.set_grad_enabled(trains):
            out = model(**call)[0]
        out = real(out, mask)
        gradients.append([out])
        if trains and out.numel():
            out.pow(2).sum().backward()
            gradients[-1] += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    for found, expected in zip(*gradients, strict=True):
        same(found, expected)
    assert fused_calls(fused) == 1


@settings(max_examples=FEW)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.permutations(range(6)))
def test_a_batch_is_its_sequences(lengths: list[int], order: list[int]) -> None:
    """Flattened or padded, in any order, alone or together."""
    order = [i for i in order if i < len(lengths)]
    model = fastbert.fuse(tiny(hf.BertModel))
    sequences = [models.ids(n, seed=i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        alone = [model(sequence[None])[0][0] for sequence in sequences]
        ids = torch.nn.utils.rnn.pad_sequence([sequences[i] for i in order], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(lengths[i]) for i in order], batch_first=True).long()
        together = model(ids, mask)[0]
        call = models.ragged([lengths[i] for i in order])
        call["input_ids"] = torch.cat([sequences[i] for i in order])[None]
        flat = model(**call)[0][0].split([lengths[i] for i in order])
    assert fused_calls(model) == len(lengths) + 2
    for place, i in enumerate(order):
        same(together[place, : lengths[i]], alone[i])
        same(flat[place], alone[i])


class Life(RuleBasedStateMachine):
    """One model that is fused and one that never was; what is done to the one is done to the other."""

    @initialize(kind=st.sampled_from(KINDS), seed=st.integers(0, 3))
    def born(self, kind: Any, seed: int) -> None:
        self.stock = tiny(kind, seed)
        self.fused = fastbert.fuse(copy.deepcopy(self.stock))
        self.is_fused, self.has_lora, self.has_hooks = True, False, False

    def both(self, what: Any) -> None:
        self.fused, self.stock = (what(model) for model in (self.fused, self.stock))

    def in_place(self, what: Any) -> None:
        for model in (self.fused, self.stock):
            what(model)

    @rule(padding=st.sampled_from(["auto", "dense"]))
    def fuse(self, padding: str) -> None:
        assert fastbert.fuse(self.fused, padding=padding) is self.fused
        self.is_fused = True

    @rule()
    def unfuse(self) -> None:
        assert fastbert.unfuse(self.fused) is self.fused
        self.is_fused = False

    @rule()
    def cast_and_back(self) -> None:
        self.in_place(lambda model: model.to(torch.bfloat16).double())

    @rule()
    def deepcopied(self) -> None:
        self.both(copy.deepcopy)

    @precondition(lambda self: not self.has_hooks)  # transformers', which no pickle takes
    @rule()
    def pickled(self) -> None:
        self.both(lambda model: pickle.loads(pickle.dumps(model)))

    @rule()
    def saved_and_loaded(self) -> None:
        def through_a_file(model: Any) -> None:
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model.load_state_dict(torch.load(file, weights_only=True))

        self.in_place(through_a_file)

    @rule(seed=st.integers(0, 9))
    def weights_edited_in_place(self, seed: int) -> None:
        """Behind the version counter: nothing computed from weights may be kept."""

        def edit(model: Any) -> None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.data.add_(noise, alpha=0.01)

        self.in_place(edit)

    @rule(seed=st.integers(0, 9))
    def trained(self, seed: int) -> None:
        def step(model: Any) -> None:
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            call = padded_call(3, 11, models.masks(3, 11)["right"], seed)
            real(model(**call)[0], call["attention_mask"]).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()

        self.in_place(step)

    @precondition(lambda self: not self.has_lora)
    @rule()
    def vocabulary_grown(self) -> None:
        def grow(model: Any) -> None:
            torch.manual_seed(0)
            model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)

        self.in_place(grow)

    @precondition(lambda self: not self.has_lora)
    @rule()
    def adapted(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        def adapt(model: Any) -> Any:
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules=["query", "value", "output.dense"], init_lora_weights=False)
            inject_adapter_in_model(config, model)
            return model.double()

        self.both(adapt)
        self.has_lora = True

    @rule(seed=st.integers(0, 9), mask=st.sampled_from(MASKS), hidden=st.booleans())
    def called(self, seed: int, mask: str, hidden: bool) -> None:
        call = padded_call(4, 13, models.masks(4, 13)[mask], seed)
        with torch.no_grad():
            found, expected = (model(**call, output_hidden_states=hidden) for model in (self.fused, self.stock))
        self.has_hooks |= hidden
        same(real(found[0], call["attention_mask"]), real(expected[0], call["attention_mask"]))
        if hidden:
            states = (real(out.hidden_states[-1], call["attention_mask"]) for out in (found, expected))
            same(*states)
        if self.is_fused:
            assert fused_calls(self.fused) > 0

    @invariant()
    def is_what_it_says(self) -> None:
        if hasattr(self, "fused"):
            assert any(type(m).__module__.startswith("fastbert") for m in self.fused.modules()) is self.is_fused
            ours, theirs = (dict(model.named_parameters()) for model in (self.fused, self.stock))
            assert list(ours) == list(theirs)
            for name, parameter in ours.items():
                same(parameter, theirs[name])


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=FEW, stateful_step_count=12)
