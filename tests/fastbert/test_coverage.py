"""What was found of layers once, and whether a change since then is seen."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwAD
from torch.overrides import TorchFunctionMode
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.models import probe
from fastbert.runtime import coverage, plan
from fastbert.runtime.registry import layers_of
from tests import models

from .test_families import seeded as of_family
from .test_graphs import CHANGES, SMALL


def last(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=models.ids(3, 11), **arguments)[0]
    return result


def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of every time that layers are looked at anew from now on, the model."""
    seen: list[Any] = []
    look = coverage.look
    monkeypatch.setattr(coverage, "look", lambda model: (seen.append(model), look(model))[1])
    return seen


# More than graphs have to see: what decides whether a layer is covered at all.


def doubled_context(model: Any, layer: Any) -> None:
    layer.attention.output.dense.weight.data = layer.attention.output.dense.weight.data.double()
    layer.attention.output.dense.forward = lambda x: (
        2 * nn.functional.linear(x, layer.attention.output.dense.weight.float(), layer.attention.output.dense.bias)
    )


def parametrized(model: Any, layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.output.dense)
    with torch.no_grad():
        layer.output.dense.parametrizations.weight.original0.mul_(3)


def hook_brings_weights(model: Any, layer: Any) -> None:
    """At each call, after layers were looked at: as custom offloading does."""

    def bring(module: Any, args: Any) -> None:
        module.output.dense.weight = nn.Parameter(module.output.dense.weight.detach() * 0.9)

    layer.register_forward_pre_hook(bring)


def attention_of_ones_own(model: Any, layer: Any) -> None:
    class Halved(type(layer.attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return (out[0] * 0.5, *out[1:])

    layer.attention.__class__ = Halved


def new_attributes(model: Any, layer: Any) -> None:
    """All of a module's, in a dictionary that equals the old one until it is changed."""
    dense = layer.output.dense
    dense.__dict__ = dict(dense.__dict__)
    dense._forward_hooks = type(dense._forward_hooks)()
    last(model)
    dense.register_forward_hook(lambda module, args, out: 2 * out)


def embeddings_hooked(model: Any, layer: Any) -> None:
    model.embeddings.register_forward_hook(lambda module, args, out: 2 * out)


MORE = [
    doubled_context,
    parametrized,
    hook_brings_weights,
    attention_of_ones_own,
    new_attributes,
    embeddings_hooked,
]


@pytest.mark.parametrize("change", [c for c in CHANGES if c.__name__ != "unfused_and_fused"] + MORE)
def test_no_change_goes_unnoticed(change: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    seen = looks(monkeypatch)
    assert torch.equal(last(fused), before)
    assert not seen
    for model in (stock, fused):
        with torch.no_grad():
            change(model, model.encoder.layer[0])
    expected = last(stock)
    assert not torch.allclose(expected, before, atol=1e-3)  # the change is one that tells
    torch.testing.assert_close(last(fused), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)


def other(value: object) -> object:
    """What an attribute may be instead; the same, where it is no number and no flag."""
    if value is None or isinstance(value, bool):
        return not value
    return 2 * value + 1 if isinstance(value, (int, float)) else value


FAMILIES = ("bert", "distilbert", "mpnet", "deberta", "deberta_v2")


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("albert", marks=pytest.mark.slow)])
def test_no_attribute_goes_unread(name: str) -> None:
    """Each of each module of the first layer, and of what is beside the layers, is another for two calls."""
    family: Any = importlib.import_module(f"fastbert.models.{name}").FAMILY
    torch.manual_seed(0)
    stock = probe._small(family, family.base)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    mask = models.masks(3, 11)["right"]
    assert mask is not None
    call = {"input_ids": models.ids(3, 11, high=16), "attention_mask": mask}

    def answer(model: Any) -> Tensor | None:
        with torch.no_grad():
            try:
                hidden: Tensor = model(**call)[0]
            except Exception:  # it is for stock to say what it can't be
                return None
        return hidden[mask.bool()]

    plain, told = answer(fused), 0
    assert plain is not None
    later = tuple(".".join((*family.stack, str(i))) for i in (1, 2))
    for path, module in list(stock.named_modules()):
        for attribute, value in [] if path.startswith(later) else list(vars(module).items()):
            if other(value) is value or attribute == "max_norm":  # which writes to the weight
                continue
            pair, what = (module, fused.get_submodule(path)), f"{path}.{attribute} = {other(value)!r}"
            for each in pair:
                setattr(each, attribute, other(value))
            expected, found = answer(stock), answer(fused)
            if expected is not None:
                assert found is not None, what
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=what)
                told += not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
            for each in pair:
                setattr(each, attribute, value)
    assert told >= 3  # scales and eps
    assert torch.equal(answer(fused), plain)  # type: ignore[arg-type]


def test_a_hook_that_moves_from_a_layer_into_it_is_seen() -> None:
    """Harmless where it was, as another sees the hidden states there; not where it is now."""
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    hook = lambda module, args, out: None  # noqa: E731
    handle = fused.encoder.layer[0].register_forward_hook(hook)
    last(fused), last(fused)
    assert not fused.encoder.fastbert.coverage.look(fused).stock[0]
    handle.remove()
    fused.encoder.layer[0].attention.register_forward_hook(hook)
    assert fused.encoder.fastbert.coverage.look(fused).stock[0]


@pytest.mark.parametrize("value", [[1, 2], {"a": 1, "b": 2}, {1, 2}], ids=["list", "dict", "set"])
def test_what_is_in_an_attribute_is_looked_at_where_it_changed_in_place(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer's modules; two lists beside each other are two. And of the configs that they have."""
    fused = fastbert.fuse(models.seeded(**SMALL))
    attention = fused.encoder.layer[1].attention
    attention.self.first, attention.self.second = value, copy.copy(value)
    attention.config = copy.deepcopy(fused.config)
    last(fused)
    seen = looks(monkeypatch)
    last(fused)
    assert not seen
    if isinstance(value, list):
        attention.self.second.insert(0, attention.self.first.pop())
    elif isinstance(value, dict):
        attention.self.second["b"] = 3
    else:
        attention.self.second.add(3)
    last(fused)
    assert len(seen) == 1
    attention.config._attn_implementation = "custom"
    reason = fused.encoder.fastbert.coverage.look(fused).reasons[1]
    assert reason is not None and "a config of its own, of attention 'custom'" in reason
    assert len(seen) == 2


def test_written_weights_are_read_and_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    last(fused)
    seen = looks(monkeypatch)
    for model in (stock, fused):
        model.encoder.layer[1].output.dense.weight.data.mul_(2)
        model.requires_grad_(False)
        torch.manual_seed(0)
        model.encoder.layer[0].output.LayerNorm.bias.data = torch.randn(32)
    torch.testing.assert_close(last(fused), last(stock))
    assert not seen


def test_parameters_that_are_others_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are right, and soon no longer compared."""
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    ids = {"input_ids": models.ids(3, 11)}
    snapshots: list[Any] = []
    snapshot = coverage.Snapshot
    monkeypatch.setattr(coverage, "Snapshot", lambda groups: (snapshots.append(1), snapshot(groups))[1])
    for i in range(20):
        new = {name: p.detach() * (1 + 0.01 * i) for name, p in stock.named_parameters()}
        with torch.no_grad():
            found, expected = (torch.func.functional_call(m, new, (), ids)[0] for m in (fused, stock))
        torch.testing.assert_close(found, expected)
    assert len(snapshots) < 6
    for _ in range(20):
        torch.testing.assert_close(last(fused), last(stock))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_weights(copied: Callable[[Any], Any]) -> None:
    fused = fastbert.fuse(models.seeded(**SMALL))
    before = last(fused)
    twin = copied(fused)
    with torch.no_grad():
        twin.encoder.layer[0].output.dense.weight.mul_(2)
    assert torch.equal(last(fused), before)
    assert not torch.allclose(last(twin), before)


def test_what_is_gone_is_not_kept() -> None:
    """A model; and after a move, or with unfuse, weights that were replaced."""
    fused = fastbert.fuse(models.seeded(**SMALL))
    last(fused)
    weight = weakref.ref(fused.encoder.layer[0].output.dense.weight)
    fused.encoder.layer[0].output.dense.weight = nn.Parameter(torch.ones(32, 64))
    fused.to(torch.float32)
    assert weight() is None
    last(fused)
    weight = weakref.ref(fused.encoder.layer[0].output.dense.weight)
    gc.disable()
    try:
        fused.encoder.layer[0].output.dense.weight = nn.Parameter(torch.ones(32, 64))
        fastbert.unfuse(fused)
        assert weight() is None
        fastbert.fuse(fused)
        last(fused)
        weight = weakref.ref(fused.encoder.layer[0].output.dense.weight)
    finally:
        gc.enable()
    del fused
    gc.collect()
    assert weight() is None


def test_modules_of_torch_jit_are_looked_at_each_time() -> None:
    fused = fastbert.fuse(models.seeded(**SMALL))
    expected = last(fused)
    dense = fused.encoder.layer[0].output.dense
    fused.encoder.layer[0].output.dense = torch.jit.trace(dense, torch.ones(1, 64), check_trace=False)
    for _ in range(2):
        torch.testing.assert_close(last(fused), expected)
    assert "output.dense" in fastbert.explain(fused).encoders[0].layers[0]


# Shapes: stock code broadcasts where kernels take columns to be there.

NARROW = {
    "BertModel": ["attention.self.key", "attention.self.value", "attention.self.key attention.self.value"],
    "DistilBertModel": ["attention.k_lin attention.v_lin"],
    "MPNetModel": ["attention.attn.k attention.attn.v"],
}


def narrowed(layer: Any, paths: str, columns: int) -> None:
    for path in paths.split():
        linear = layer.get_submodule(path)
        holder, _, name = path.rpartition(".")
        torch.manual_seed(0)
        setattr(layer.get_submodule(holder), name, nn.Linear(linear.in_features, columns))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("name", "paths"), [(name, paths) for name in NARROW for paths in NARROW[name]])
def test_one_head_of_keys_for_all_queries(name: str, paths: str, after: bool) -> None:
    stock = of_family(name.removesuffix("Model").lower(), name)
    fused = fastbert.fuse(copy.deepcopy(stock)) if after else stock
    for model in {id(m): m for m in (stock, fused)}.values():
        narrowed(layers_of(model)[0], paths, 32)
    if not after:
        fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused), last(stock), rtol=0, atol=0)
    (encoder,) = fastbert.explain(fused).encoders
    assert f"{paths.split()[0]} is of shape (32, 128); expected (128, 128)" in str(encoder.layers | {9: encoder.reason})


@pytest.mark.parametrize("path", ["attention.output.dense", "output.dense", "intermediate.dense"])
def test_a_result_of_one_column(path: str) -> None:
    stock = models.seeded()
    narrowed(stock.encoder.layer[1], path, 1)
    if path == "intermediate.dense":
        stock.encoder.layer[1].output.dense = nn.Linear(1, 128)  # fewer, but as many: this one is fused
    fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)
    found = fastbert.explain(fused).encoders[0].layers
    expected = {} if path == "intermediate.dense" else {1: f"{path} is of shape (1, "}
    assert list(found) == list(expected)
    assert all(told in found[i] for i, told in expected.items())


def test_a_bias_of_one_value() -> None:
    stock = models.seeded()
    stock.encoder.layer[0].output.dense.bias = nn.Parameter(torch.ones(1))
    fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)
    assert fastbert.explain(fused).encoders[0].layers == {
        0: "encoder.layer.0.output.dense has a bias of one value for 128 columns"
    }


@pytest.mark.parametrize("name", ["token_type_embeddings", "position_embeddings", "LayerNorm"])
def test_embeddings_of_another_width(name: str) -> None:
    """Tables of one column are broadcast by stock; a LayerNorm may take in all tokens of a sequence."""
    stock = models.seeded()
    torch.manual_seed(0)
    part = nn.LayerNorm((11, 128)) if name == "LayerNorm" else nn.Embedding(160, 1)
    setattr(stock.embeddings, name, part)
    fused = fastbert.fuse(copy.deepcopy(stock))
    mask = models.masks(3, 11)["right"]
    assert mask is not None
    ours, theirs = (last(model, attention_mask=mask)[mask.bool()] for model in (fused, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (encoder,) = fastbert.explain(fused).encoders
    whole = "LayerNorm of the embeddings normalises over more than a row"
    assert encoder.embeddings == (whole if name == "LayerNorm" else "its tables and its LayerNorm differ in width")
    assert encoder.fused_calls == {"packed": 1}


def test_pruned_heads_run_fused() -> None:
    stock = models.seeded()
    for layer in stock.encoder.layer:
        for name in ("query", "key", "value"):
            narrowed(layer, f"attention.self.{name}", 64)
        layer.attention.output.dense = nn.Linear(64, 128)
        layer.attention.self.all_head_size = 64
    fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)
    assert fastbert.explain(fused).encoders[0].layers == {}


def test_data_of_another_shape_is_seen() -> None:
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    last(fused)
    for model in (fused, stock):
        key = model.encoder.layer[0].attention.self.key
        key.weight.data, key.bias.data = key.weight.data[:32], key.bias.data[:32]
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)
    assert "key is of shape (32, 128)" in fastbert.explain(fused).encoders[0].layers[0]


# What was decided of a call is kept, and holds for others like it until something changes.

TURNS: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "config": lambda m, _: setattr(m, "config", type(m.config)(**{**m.config.to_dict(), "is_decoder": True})),
    "config, in place": lambda m, _: setattr(m.config, "is_decoder", True),
    "implementation": lambda m, _: setattr(m.config, "_attn_implementation", "paged|sdpa"),
    "hidden states": lambda m, _: setattr(m.config, "output_hidden_states", True),
    "attentions": lambda m, _: m.set_attn_implementation("eager") or setattr(m.config, "output_attentions", True),
    "hook of the encoder": lambda m, _: m.encoder.register_forward_hook(lambda module, args, out: None) and None,
    "pre-hook of the encoder": lambda m, _: m.encoder.register_forward_pre_hook(lambda module, args: None) and None,
    "forward": lambda m, _: setattr(m, "forward", lambda **call: type(m).forward(m, **call)),
    "forward of the encoder": lambda m, _: setattr(m.encoder, "forward", lambda *args, **kwargs: args[0]),
    "method": lambda m, _: setattr(m, "_create_attention_masks", lambda **k: type(m)._create_attention_masks(m, **k)),
    "switch": lambda m, patch: patch.setenv("FASTBERT_DISABLE", "1"),
    "code": lambda m, patch: patch.setattr(nn.LayerNorm, "forward", lambda self, x: x),
    "code of embeddings": lambda m, patch: patch.setattr(hf.BertEmbeddings, "forward", lambda self, *a, **k: None),
    "layers": lambda m, _: setattr(m.encoder, "layer", m.encoder.layer[:1]),
    "embeddings": lambda m, _: setattr(m.embeddings, "word_embeddings", nn.Embedding(2000, 64, max_norm=1.0)),
    "dropout": lambda m, _: m.train() and None,
}


def planned(model: Any) -> object:
    """What becomes of a call of three sequences."""
    mask = torch.ones(3, 11, dtype=torch.int64)
    _, call = plan.plan_call(model, ("input_ids",), (models.ids(3, 11),), {"attention_mask": mask})
    found = call["plan"]
    if not isinstance(found, plan.Plan):
        return found
    names = ("stock_layers", "watched", "hooked", "foreign", "collects", "maps")
    return [found.seeds is None, *(getattr(found, name) for name in names)]


@pytest.mark.parametrize("name", TURNS)
def test_a_decision_that_is_kept_is_what_would_be_decided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded(**SMALL))
    before = planned(model)
    assert planned(model) == before
    kept = model.encoder.fastbert.coverage.calls
    assert len(kept) == 1
    monkeypatch.setattr(plan, "decide", lambda *_: pytest.fail("decided anew, of the same call"))
    planned(model)
    monkeypatch.undo()
    TURNS[name](model, monkeypatch)
    found = planned(model)
    model.encoder.fastbert.coverage.drop()
    assert found == planned(model) != before


class Mode(TorchFunctionMode):
    """Does nothing, which nobody can know."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("state", [Mode, fwAD.dual_level], ids=str)
def test_a_decision_holds_in_the_state_of_torch_it_was_made_in(state: Callable[[], Any]) -> None:
    model = fastbert.fuse(models.seeded(**SMALL))
    before = planned(model)
    assert planned(model) == before
    with state():
        found = planned(model)
        model.encoder.fastbert.coverage.drop()
        assert found == planned(model) != before
    assert planned(model) == before


def test_calls_of_other_arguments_are_decided_for_themselves() -> None:
    model = fastbert.fuse(models.seeded(**SMALL))
    ids, names = models.ids(3, 11), ("input_ids",)
    square = torch.ones(3, 1, 11, 11, dtype=torch.bool)
    calls: list[dict[str, Any]] = [
        {},
        {"attention_mask": torch.ones(3, 11)},
        {"attention_mask": torch.ones(1, 11)},
        {"attention_mask": square},
        {"output_hidden_states": True},
        {"output_hidden_states": False},
        {"is_causal": True},
        {"is_causal": False},
        {"encoder_hidden_states": torch.ones(3, 4, 64)},
        {"past_key_values": (1, 2)},
    ]
    found = []
    for _ in range(2):
        for call in calls:
            made = plan.plan_call(model, names, (ids,), dict(call))[1]["plan"]
            found.append(made.watched if isinstance(made, plan.Plan) else made)
    assert found[: len(calls)] == found[len(calls) :]
    stock = "an attention_mask of one row for more sequences", "an attention_mask that is not 2-D"
    expected = [False, False, *stock, True, False, "is_causal", False, "encoder_hidden_states", "past_key_values"]
    assert found[: len(calls)] == expected


def test_so_many_kinds_of_calls_are_kept() -> None:
    model = fastbert.fuse(models.seeded(**SMALL))
    for batch in range(1, 9):
        plan.plan_call(model, ("input_ids",), (models.ids(batch, 5),), {})
    kept = model.encoder.fastbert.coverage.calls
    assert len(kept) == 2  # of one sequence, and of more
    for number in range(50):
        plan.plan_call(model, ("input_ids",), (models.ids(2, 5),), {f"more_{number}": True})
    assert len(kept) == plan._CALLS
