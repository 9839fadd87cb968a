"""Layers that are called several times, alone or in groups, and a projection before them: ALBERT's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.albert import modeling_albert as hf

import fastbert
from fastbert.models import albert, probe
from fastbert.runtime import graphs
from fastbert.runtime.registry import stack_of
from tests import models
from tests.fastbert import test_families, test_graphs

SHARED = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 48}
"""Two groups of two layers, each called twice."""
ORDER = [0, 1, 0, 1, 2, 3, 2, 3]


def seeded(name: str = "AlbertModel", **changes: Any) -> Any:
    return test_families.seeded("albert", name, **{**SHARED, "hidden_size": 64, **changes})


def call(kind: str = "right") -> dict[str, Any]:
    mask = models.masks(5, 19)[kind]
    return {"input_ids": test_families.padded("albert", torch.ones(5, 19)), "attention_mask": mask}


def last(model: Any, **more: Any) -> Tensor:
    """At real tokens."""
    given = call() | more
    with torch.no_grad():
        found: Tensor = model(**given).last_hidden_state
    return found[given["attention_mask"].bool()]


def said(model: Any) -> Any:
    return fastbert.explain(model).encoders[0]


def test_layers_are_called_as_stock_calls_them() -> None:
    """What hooks of stock layers see, by order; and of a model whose groups divide its layers unevenly."""
    for sizes, expected in (({}, ORDER), ({"num_hidden_layers": 5, "inner_group_num": 1}, [0, 0, 0, 1, 1])):
        model, seen = seeded(**sizes), []
        stack = stack_of(model)
        for i, layer in enumerate(stack.layers):
            assert model.get_submodule(stack.name(i)) is layer
            layer.register_forward_hook(lambda *_, i=i, seen=seen: seen.append(i))
        last(model)
        assert seen == expected == list(stack.calls)


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_gradients_of_every_call(padding: str) -> None:
    masks = tuple(mask for i in range(3) if (mask := models.masks(12, 19 + 8 * i)["right"]) is not None)
    model = seeded(**test_families.NO_DROPOUT)
    test_families.compare_gradients(model, "albert", "AlbertModel", torch.float32, padding, masks=masks)
    model = seeded(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2)
    fused, found = fastbert.fuse(model, padding=padding).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        fused(**call()).last_hidden_state.square().sum().backward()
        found.append(stack_of(fused).layers[3].ffn.weight.grad.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_hidden_states_and_maps_are_of_calls() -> None:
    stock = seeded(attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock))
    given = call()
    with torch.no_grad():
        found, expected = (m(**given, output_hidden_states=True, output_attentions=True) for m in (fused, stock))
    assert len(found.hidden_states) == 9 and len(found.attentions) == 8
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.attentions, expected.attentions, rtol=1e-4, atol=1e-4)
    assert said(fused).fused_calls == {"dense": 1}
    maps = fastbert.attention_maps(fused, given, layers=[1, 6])
    real = given["attention_mask"].bool()
    for i, each in maps.items():
        ours, theirs = (x.transpose(1, 2)[real] for x in (each, expected.attentions[i]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected different integers from 0 to 7"):
        fastbert.attention_maps(fused, given, layers=[8])


@pytest.mark.parametrize("precision", ["fp8", "int8", None])
def test_there_is_one_copy_of_a_layer(precision: Any) -> None:
    """Of the weights in fewer bits, and of those laid out; calibrated for all calls of a layer together."""
    alone, shared = seeded(num_hidden_layers=2, inner_group_num=1), seeded(num_hidden_layers=6, inner_group_num=1)
    shared.load_state_dict(alone.state_dict())
    held = []
    for model in (alone, shared):
        plain = last(fastbert.fuse(copy.deepcopy(model)))
        fused = fastbert.fuse(model, precision=precision, prepack=precision is None)
        error = (last(fused) - plain).norm() / plain.norm()
        assert error < (1e-5 if precision is None else 0.2)
        held.append(fused.encoder.fastbert.precision.memory())
        assert len(fused.encoder.fastbert.precision.groups(stack_of(fused).layers)) == 8
    assert held[0] == held[1] > 0
    if precision is None:
        return
    stock = fastbert.unfuse(shared)
    found = fastbert.calibrate(stock, [call()], precision=precision, tolerance=0.5)
    assert {gemm.layer for gemm in found.gemms} == {0, 1} and len(found.gemms) == 8
    report = fastbert.verify(stock, [call()], precision=precision)
    assert report.ok, str(report)
    assert [row.name for row in report.rows][1:8] == [*(f"layer.{i}" for i in range(6)), "last_hidden_state"]


CHANGES: dict[str, tuple[Callable[[Any], object], str | None]] = {
    "a layer's forward": (
        lambda m: setattr(group(m).albert_layers[1], "forward", lambda x, *args, **kwargs: 0.5 * x),
        "encoder.albert_layer_groups.0.albert_layers.1.forward has been replaced",
    ),
    "a layer's linear": (
        lambda m: setattr(group(m).albert_layers[0], "ffn", nn.Sequential(nn.Linear(64, 256), nn.Tanh())),
        "encoder.albert_layer_groups.0.albert_layers.0.ffn is a torch.nn.modules.container.Sequential",
    ),
    "a hook of a linear": (
        lambda m: group(m).albert_layers[0].ffn.register_forward_hook(lambda module, args, out: 2 * out),
        "ffn is a torch.nn.modules.linear.Linear with hooks",
    ),
    "a hook of a layer": (
        lambda m: group(m).albert_layers[1].register_forward_hook(lambda module, args, out: 2 * out),
        None,
    ),
    "a hook of a group": (
        lambda m: group(m).register_forward_hook(lambda module, args, out: 2 * out),
        "encoder.albert_layer_groups.0 is a transformers.models.albert.modeling_albert.AlbertLayerGroup with hooks",
    ),
    "a group's forward": (
        lambda m: setattr(group(m), "forward", lambda x, *args, **kwargs: 2 * x),
        "AlbertLayerGroup whose forward has been replaced",
    ),
    "another group": (
        lambda m: m.encoder.albert_layer_groups.__setitem__(0, Halving()),
        "encoder.albert_layer_groups.0 is a tests.fastbert.test_shared_layers.Halving",
    ),
    "a group without layers": (
        lambda m: m.encoder.albert_layer_groups.__setitem__(1, Doubling()),
        "its layers are not where AlbertTransformer has them: AttributeError: 'Doubling' object has no attribute",
    ),
    "one layer more": (lambda m: group(m).albert_layers.append(copy.deepcopy(group(m).albert_layers[0])), None),
    "layers swapped": (lambda m: setattr(group(m), "albert_layers", group(m).albert_layers[::-1]), None),
    "more calls": (lambda m: setattr(m.config, "num_hidden_layers", 6), None),
    "other groups": (lambda m: setattr(m.config, "num_hidden_groups", 1), None),
    "the projection's weight": (lambda m: m.encoder.embedding_hidden_mapping_in.weight.mul_(2), None),
    "another projection": (
        lambda m: setattr(m.encoder, "embedding_hidden_mapping_in", nn.Linear(48, 64, bias=False)),
        None,
    ),
    "a projection of its own": (
        lambda m: setattr(m.encoder, "embedding_hidden_mapping_in", nn.Sequential(nn.Linear(48, 64), nn.Tanh())),
        "embedding_hidden_mapping_in of the encoder is a torch.nn.modules.container.Sequential, not a plain nn.Linear",
    ),
    "a hook of the projection": (
        lambda m: m.encoder.embedding_hidden_mapping_in.register_forward_hook(lambda module, args, out: 2 * out),
        "embedding_hidden_mapping_in of the encoder is a torch.nn.modules.linear.Linear with hooks",
    ),
}


class Halving(hf.AlbertLayerGroup):
    """With layers that are found where ALBERT's are."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.albert_layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return 0.5 * hidden_states


class Doubling(nn.Module):
    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return 2 * hidden_states


def group(model: Any) -> Any:
    return model.encoder.albert_layer_groups[0]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_what_is_shared_goes_unnoticed(change: str) -> None:
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = [last(fused) for _ in range(2)][-1]
    do, why = CHANGES[change]
    for model in (stock, fused):
        torch.manual_seed(0)
        with torch.no_grad():
            do(model)
    expected = last(stock)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(last(fused), expected, rtol=1e-4, atol=1e-4)
    if why is None:
        assert not said(fused).stock_calls
    else:
        assert why in str(fastbert.explain(fused))


def test_a_class_that_is_patched_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    monkeypatch.setattr(hf.AlbertLayerGroup, "forward", lambda self, x, *args, **kwargs: 2 * x)
    assert torch.equal(last(fused), last(stock))
    assert "AlbertLayerGroup.forward is" in str(said(fused).reason)


@pytest.mark.parametrize("targets", [["query", "ffn"], "all-linear"], ids=str)
def test_lora_of_shared_layers(targets: Any) -> None:
    """Gradients of adapters come of every call; the projection before the layers may have one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets)
    model, given = seeded("AlbertForSequenceClassification", **test_families.NO_DROPOUT), call()
    found = []
    for each in models.three(model, torch.float32):
        torch.manual_seed(0)
        whole = peft.get_peft_model(each, copy.deepcopy(config)).train()
        with torch.no_grad():
            for p in (p for name, p in whole.named_parameters() if "lora_B" in name):
                p.copy_(0.1 * torch.randn(p.shape))
        if not found:
            fastbert.fuse(whole)
        whole(**given, labels=torch.arange(5)).loss.backward()
        found.append({name: p.grad for name, p in whole.named_parameters() if p.grad is not None})
        if len(found) == 1:
            assert said(whole).fused_calls == {"packed": 1}
    models.assert_all_within_policy(*found, "adapters")
    assert any("embedding_hidden_mapping_in" in name for name in found[0]) is (targets == "all-linear")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_its_own_layers(copied: Callable[[Any], Any]) -> None:
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    before = last(fused)
    twin = copied(fused)
    assert torch.equal(last(twin), before)
    with torch.no_grad():
        stack_of(twin).layers[2].ffn_output.weight.mul_(2)
    assert torch.equal(last(fused), before) and not torch.allclose(last(twin), before)
    restored = fastbert.unfuse(fused)
    assert type(group(restored).albert_layers[1]) is hf.AlbertLayer and type(restored.encoder) is hf.AlbertTransformer
    assert torch.equal(last(restored), last(stock))


def test_graphs_call_layers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are dropped where the order changes, or a group has a hook."""
    monkeypatch.setattr(graphs, "Cuda", test_graphs.StandIn)
    model = fastbert.fuse(seeded(), padding="packed", cuda_graphs=True)
    twin = fastbert.fuse(seeded(), padding="packed")
    test_graphs.assert_replays(model, test_graphs.padded([37, 9, 60]), twin)
    assert said(model).graph_calls["captured"] == 1
    for each in (model, twin):
        each.config.num_hidden_layers = 6
    test_graphs.assert_replays(model, test_graphs.padded([37, 9, 60]), twin)
    for each in (model, twin):
        group(each).register_forward_hook(lambda module, args, out: 2 * out)
    for _ in range(3):
        torch.testing.assert_close(last(model), last(twin))
    assert said(model).stock_calls == {said(twin).reason: 3}


def test_its_description() -> None:
    """As `register` tries those from outside."""
    probe.check_description(albert.FAMILY)
    probe.try_family(albert.FAMILY)
