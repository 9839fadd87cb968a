"""Attention maps of fused models: `output_attentions`, and `fastbert.attention_maps` of chosen layers and heads."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.bert import modeling_bert as bert
from transformers.models.deberta import modeling_deberta as deberta
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta_v2

import fastbert
from fastbert.models import probe
from fastbert.numerics import assert_within_policy
from fastbert.runtime import encoder
from tests import fresh, models
from tests.fastbert import test_deberta, test_families

NAMES = tuple(name for name in test_families.FAMILIES if name not in test_families.TWINS)
CONFIGS: dict[str, dict[str, Any]] = {
    "deberta_v2 without positions": {"relative_attention": False},
    "deberta_v2, one term": {"pos_att_type": ["p2c"], "conv_kernel_size": 3, "conv_act": "gelu"},
}


def seeded(name: str, **changes: Any) -> Any:
    """A small base model whose stock code gives maps."""
    family, _, _ = name.partition(",")[0].partition(" ")
    changes = {"attn_implementation": "eager", **CONFIGS.get(name, {}), **changes}
    if family == "bert":
        return models.seeded(**changes)
    if family.startswith("deberta"):
        kind = deberta.DebertaModel if family == "deberta" else deberta_v2.DebertaV2Model
        return test_deberta.seeded(kind, **changes)
    return test_families.seeded(family, test_families.adapter(family).base.__name__, **changes)


def call(name: str, kind: str, batch: int = 5, seqlen: int = 37) -> dict[str, Any]:
    mask = models.masks(batch, seqlen)[kind]
    real = torch.ones(batch, seqlen, dtype=torch.long) if mask is None else mask
    ids = models.ids(batch, seqlen, high=100).clamp(min=2)
    padding = test_families.PADDING_ID.get(name, 0)
    found = {"input_ids": torch.where(real.bool(), ids, padding)}
    return found if mask is None else {**found, "attention_mask": mask}


def counts(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    (told,) = fastbert.explain(model).encoders
    return told.fused_calls, told.stock_calls


def assert_maps(found: list[Tensor], stock: list[Tensor], truth: list[Tensor], real: Tensor | None) -> None:
    """Within the policy in rows of tokens that are `real`, (B, S); None: in all."""
    assert len(found) == len(stock) == len(truth)
    for one, other, exact in zip(found, stock, truth, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        parts = [x if real is None else x.transpose(1, 2)[real] for x in (one, other, exact)]
        assert_within_policy(*parts)
        sums = parts[0].double().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-2 if one.dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("kind", models.MASKS)
@pytest.mark.parametrize("name", [*NAMES, *CONFIGS])
def test_output_attentions_are_stocks_at_every_token(name: str, kind: str) -> None:
    """Rows and columns of padding, too."""
    fused, stock, truth = models.three(seeded(name), torch.float32)
    fastbert.fuse(fused)
    given = call(name.partition(" ")[0].partition(",")[0], kind)
    with torch.no_grad():
        found, expected, exact = (model(**given, output_attentions=True) for model in (fused, stock, truth))
    assert list(found) == list(expected)
    windowed = name == "modernbert" and kind in ("right", "left", "empty")  # padding with no real token in its window
    if windowed or (name in ("eurobert", "esm") and kind == "empty"):  # of an empty sequence stock makes NaN
        pairs = zip((found[0], *found.attentions), (expected[0], *expected.attentions), strict=True)
        assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in pairs)
        ((reason, times),) = counts(fused)[1].items()
        assert times == 1 and ("without a real token" in reason or "no real token in its window" in reason)
        return
    assert_maps(found.attentions, expected.attentions, exact.attentions, None)
    assert_within_policy(found[0], expected[0], exact[0])
    if kind == "empty" and not name.startswith("deberta"):  # eager attention spreads its sequence over padding
        assert list(counts(fused)[0]) == []
    else:
        assert counts(fused) == ({"dense": 1}, {})


@pytest.mark.parametrize(
    ("name", "padding", "dtype"),
    [
        pytest.param(name, padding, dtype, marks=() if dtype == torch.float32 or in_turn else pytest.mark.slow)
        for i, name in enumerate([*NAMES, *CONFIGS])
        for j, padding in enumerate(("packed", "dense"))
        for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        for in_turn in [(i + j + k) % 4 == 0]
    ],
    ids=str,
)
def test_maps_of_every_family(name: str, padding: str, dtype: torch.dtype) -> None:
    """With each kind of mask in turn, and zeros where it has padding."""
    fused, stock, truth = models.three(seeded(name), dtype)
    fastbert.fuse(fused, padding=padding)
    for kind in models.MASKS if dtype == torch.float32 else ("right", "holes"):
        given = call(name.partition(" ")[0].partition(",")[0], kind)
        maps = fastbert.attention_maps(fused, given)
        with torch.no_grad():
            expected, exact = (list(model(**given, output_attentions=True).attentions) for model in (stock, truth))
        mask = given.get("attention_mask")
        real = None if mask is None else mask.bool()
        assert list(maps) == [0, 1]
        assert_maps(list(maps.values()), expected, exact, real)
        if real is not None:
            for each in maps.values():
                assert each.transpose(1, 2)[~real].eq(0).all() and each.permute(0, 3, 1, 2)[~real].eq(0).all()
    assert counts(fused)[1] == {}
    assert padding in counts(fused)[0]


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_a_layer_with_a_window_gives_nothing_outside_of_it(padding: str) -> None:
    """To either side; and one without gives to all."""
    stock = seeded("modernbert")
    fused, given = fastbert.fuse(copy.deepcopy(stock), padding=padding), call("modernbert", "none")
    places = torch.arange(37)
    for layer, maps in fastbert.attention_maps(fused, given).items():
        local = stock.config.layer_types[layer] == "sliding_attention"
        near = (places[:, None] - places).abs() <= (stock.config.sliding_window if local else 37)
        assert torch.equal(maps > 0, near.expand_as(maps))
    assert set(stock.config.layer_types) == {"sliding_attention", "full_attention"}


def test_chosen_layers_and_heads_are_those_of_all() -> None:
    model = fastbert.fuse(models.seeded(num_hidden_layers=3))
    given = call("bert", "right")
    whole = fastbert.attention_maps(model, given)
    some = fastbert.attention_maps(model, given, layers=[2, 0], heads=[3, 1])
    assert sorted(some) == [0, 2]
    for layer, maps in some.items():
        torch.testing.assert_close(maps, whole[layer][:, [3, 1]])
    means = fastbert.attention_maps(model, given, layers=[1], heads=[3, 1], reduce="mean")
    torch.testing.assert_close(means[1], whole[1][:, [3, 1]].mean(1))


@pytest.mark.parametrize("name", ["mpnet", "deberta_v2", "deberta"])
def test_chosen_heads_have_their_own_positions(name: str) -> None:
    model = fastbert.fuse(seeded(name))
    given = call(name, "right")
    whole = fastbert.attention_maps(model, given)
    some = fastbert.attention_maps(model, given, heads=[2, 1])
    for layer in whole:
        torch.testing.assert_close(some[layer], whole[layer][:, [2, 1]])


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_rollout(padding: str) -> None:
    """Abnar and Zuidema's, of stock's maps: one sequence after the other, without its padding."""
    stock = models.seeded(num_hidden_layers=3, attn_implementation="eager")
    model = fastbert.fuse(copy.deepcopy(stock), padding=padding)
    given = call("bert", "holes")
    found = fastbert.attention_maps(model, given, reduce="rollout")
    chosen = fastbert.attention_maps(model, given, layers=[1, 2], heads=[0], reduce="rollout")
    with torch.no_grad():
        attentions = stock(**given, output_attentions=True).attentions
    for rolled, layers, heads in ((found, (0, 1, 2), (0, 1, 2, 3)), (chosen, (1, 2), (0,))):
        assert rolled.dtype == torch.float32
        expected = torch.zeros_like(rolled)
        for i, row in enumerate(given["attention_mask"].bool()):
            places = row.nonzero()[:, 0]
            total = torch.eye(len(places))
            for layer in layers:
                each = attentions[layer][i][list(heads)].mean(0)[places][:, places] + torch.eye(len(places))
                total = (each / each.sum(1, keepdim=True)) @ total
            expected[i, places[:, None], places] = total
        torch.testing.assert_close(rolled, expected, rtol=1e-4, atol=1e-6)


def test_of_a_head_it_is_the_base_model_alone() -> None:
    """Nor is anything run after the last layer that is chosen."""
    model = fastbert.fuse(models.seeded(bert.BertForSequenceClassification, num_hidden_layers=3))
    given = call("bert", "right")
    ran: list[str] = []
    model.classifier.register_forward_hook(lambda *_: ran.append("classifier"))
    expected = fastbert.attention_maps(model.bert, given, layers=[0])
    found = fastbert.attention_maps(model, given, layers=[0])
    assert torch.equal(found[0], expected[0]) and not ran
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    assert fastbert.attention_maps(model, given, layers=[0])[0].isfinite().all()
    assert fastbert.attention_maps(model, given, layers=[1])[1].isfinite().all()
    assert fastbert.attention_maps(model, given, layers=[2])[2].isnan().any()


def test_who_watches_sees_a_whole_forward() -> None:
    model = fastbert.fuse(models.seeded(num_hidden_layers=3))
    given, seen = call("bert", "none"), []
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    fastbert.attention_maps(model, given, layers=[0])
    assert torch.equal(seen[0], expected)


BAD: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "layers": (nn.Module.eval, {"layers": [2]}, r"layers is \[2\]; expected different integers from 0 to 1"),
    "no layers": (nn.Module.eval, {"layers": []}, r"layers is \[\]; expected different"),
    "heads": (nn.Module.eval, {"heads": [-1]}, r"heads is \[-1\]; expected different integers from 0 to 3"),
    "heads twice": (nn.Module.eval, {"heads": [1, 1]}, r"heads is \[1, 1\]; expected different"),
    "reduce": (nn.Module.eval, {"reduce": "max"}, "reduce is 'max'; expected one of None, 'mean', 'rollout'"),
    "training": (nn.Module.train, {}, r"is in training mode, in which dropout changes maps; call model.eval\(\)"),
    "stock": (fastbert.unfuse, {}, "this BertModel is not fused; call fastbert.fuse on it first"),
    "several": (lambda model: nn.ModuleList([model, copy.deepcopy(model)]), {}, "holds 2 encoders of supported"),
    "around": (nn.Sequential, {}, "a Sequential around a BertModel; give the Hugging Face model inside of it"),
    "inputs": (nn.Module.eval, {"inputs": {"labels": 1}}, "inputs has labels; BertModel takes input_ids, token_type"),
    "none": (nn.Module.eval, {"inputs": {}}, "inputs has both input_ids and inputs_embeds, or neither"),
    "ids": (nn.Module.eval, {"inputs": {"input_ids": torch.full((1, 2), 999)}}, "input_ids holds values from 999"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_there_is_not_is_told_before_anything_runs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, arguments, error = BAD[what]
    model = change(fastbert.fuse(models.seeded()))
    monkeypatch.setitem(fastbert.ops.CPU_BACKEND, "qkv_linear", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=error):
        fastbert.attention_maps(model, **{"inputs": call("bert", "right"), **arguments})
    with pytest.raises(TypeError, match="inputs is of type list; expected a mapping"):
        fastbert.attention_maps(fastbert.fuse(models.seeded()), [1])  # type: ignore[call-overload]


def replace_attention(model: Any) -> None:
    model.encoder.layer[1].attention.self.forward = lambda *args, **kwargs: (args[0], None)


def test_a_layer_that_runs_stock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded())
    replace_attention(model)
    given = call("bert", "right")
    assert list(fastbert.attention_maps(model, given, layers=[0])) == [0]
    with pytest.raises(RuntimeError, match=r"which runs stock: encoder.layer.1.attention.self"):
        fastbert.attention_maps(model, given)
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    with pytest.raises(RuntimeError, match="which runs stock"):
        fastbert.attention_maps(model, given, layers=[0])
    monkeypatch.delenv("FASTBERT_DISABLE")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"under torch\.autocast"):
        fastbert.attention_maps(model, given, layers=[0])


# `output_attentions`, where it isn't a plain eager forward.


def test_packed_where_that_is_asked_for() -> None:
    """Zeros then in rows of padding, as in hidden states."""
    stock = models.seeded(attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    given = call("bert", "right")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        found, expected = fused(**given, output_attentions=True), stock(**given, output_attentions=True)
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(one.transpose(1, 2)[real], other.transpose(1, 2)[real])
        assert one.transpose(1, 2)[~real].eq(0).all()
    assert counts(fused) == ({"packed": 1}, {})


def with_gradients(model: Any, given: dict[str, Any]) -> Any:
    return model(**given, output_attentions=True)


def with_dropout(model: Any, given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.train()(**given, output_attentions=True)


def under_autocast(model: Any, given: dict[str, Any]) -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(**given, output_attentions=True)


def under_sdpa(model: Any, given: dict[str, Any]) -> Any:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(**given, output_attentions=True)


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (with_gradients, "with gradients, which maps have none of: call it under torch.no_grad()"),
        (with_dropout, "in training, of what dropout leaves"),
        (under_autocast, "under torch.autocast"),
        (under_sdpa, "of which 'sdpa' attention gives none"),
    ],
)
def test_calls_that_run_stock_say_why(ask: Callable[[Any, dict[str, Any]], Any], reason: str) -> None:
    stock = models.seeded(attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock))
    given = call("bert", "right")
    found, expected = (ask(model, given) for model in (fused, stock))
    assert len(found.attentions) == len(expected.attentions) == (0 if ask is under_sdpa else 2)
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert one.dtype == other.dtype
        if ask is not with_dropout:  # the embeddings, which run fused, draw another way
            torch.testing.assert_close(one, other)
    (told,) = counts(fused)[1]
    assert told.startswith("output_attentions") and told.endswith(reason)
    if ask is with_gradients:
        found.attentions[1].square().sum().backward()
        expected.attentions[1].square().sum().backward()
        weight = "encoder.layer.0.attention.self.key.weight"
        torch.testing.assert_close(fused.get_parameter(weight).grad, stock.get_parameter(weight).grad)


def test_no_gradients_are_none_though_they_are_enabled() -> None:
    model = fastbert.fuse(models.seeded(attn_implementation="eager").requires_grad_(False))
    assert not model(**call("bert", "right"), output_attentions=True).attentions[0].requires_grad
    assert counts(model) == ({"dense": 1}, {})


def test_a_layer_that_runs_stock_gives_its_own() -> None:
    """In the order of layers, among those of fused ones."""
    stock = models.seeded(num_hidden_layers=3, attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock))
    own = fused.encoder.layer[1].forward
    fused.encoder.layer[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    given = call("bert", "right")
    with torch.no_grad():
        found = fused(**given, output_attentions=True, output_hidden_states=True)
        expected = stock(**given, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    assert counts(fused) == ({"dense": 1}, {})
    fused.encoder.layer[2].attention.self.config = copy.copy(fused.config)
    fused.encoder.layer[2].attention.self.config._attn_implementation = "sdpa"
    with torch.no_grad():
        assert len(fused(**given, output_attentions=True).attentions) == 2  # as stock: there are none of that layer
    assert list(counts(fused)[1]) == ["output_attentions, of which 'sdpa' attention gives none"]


@pytest.mark.parametrize("kind", [bert.BertForSequenceClassification, bert.BertForMaskedLM, bert.BertForPreTraining])
def test_heads_return_them(kind: Any) -> None:
    stock = models.seeded(kind, attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock))
    given = call("bert", "right")
    with torch.no_grad():
        found = fused(**given, output_attentions=True, return_dict=False)
        expected = stock(**given, output_attentions=True, return_dict=False)
        torch.testing.assert_close(found, expected)
        fused.config.output_attentions = stock.config.output_attentions = True
        torch.testing.assert_close(fused(**given).attentions, stock(**given).attentions)
    assert counts(fused) == ({"dense": 2}, {})


MEMORY = """
import ctypes, json, torch, fastbert
from fastbert.measure import machine
from tests import models

ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once, and is not counted again
model = fastbert.fuse(models.seeded(num_hidden_layers=12, max_position_embeddings=400))
given = {"input_ids": models.ids(8, 400)}
found = []
for run in (
    lambda: model(**given),
    lambda: fastbert.attention_maps(model, given, [11]),
    lambda: fastbert.attention_maps(model, given, reduce="mean"),
    lambda: fastbert.attention_maps(model, given),
):
    run()  # what is made once
    with torch.no_grad():
        found.append(machine.peak_growth(run, torch.device("cpu")))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read as Linux tells it")
def test_memory_is_that_of_one_layers_maps() -> None:
    """Beside that of a forward, and of parts that are computed at a time."""
    done = fresh.run("-c", MEMORY)
    assert done.returncode == 0, done.stderr
    one = 8 * 4 * 400 * 400 * 4  # bytes of the maps of a layer: 20 MB
    forward, chosen, means, everything = (growth / one for growth in json.loads(done.stdout))
    assert chosen < forward + 2
    assert means < forward + 2 + 12 / 4
    assert everything > 11  # and so it is seen


@pytest.mark.parametrize("reduce", ["mean", "rollout"])
def test_maps_are_gone_once_they_are_reduced(reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StorageWeakRef] = []
    own = fastbert.ops.CPU_BACKEND["attention_map"]

    def backend(*args: Any) -> Tensor:
        assert all(each.expired() for each in made)
        found: Tensor = own(*args)
        made.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setitem(fastbert.ops.CPU_BACKEND, "attention_map", backend)
    fastbert.attention_maps(fastbert.fuse(models.seeded(num_hidden_layers=3)), call("bert", "right"), reduce=reduce)
    assert len(made) == 3


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("name", ["mpnet", "distilbert"])
def test_a_family_is_tried_for_maps(name: str, returned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from outside fastbert may drop them, or return those of another layer: then such calls run stock."""
    family = test_families.adapter(name)
    stock = probe._small(family, family.base)
    if not returned and family.run is not None:
        own = family.run

        def drop(model: Any, call: dict[str, Any], plan: Any) -> Any:
            output = own(model, call, plan)
            output.attentions = output.attentions and output.attentions[::-1]
            return output

        monkeypatch.setattr(family, "run", drop)
    elif not returned:
        monkeypatch.setattr(encoder, "is_capturing", lambda hook: False)
    assert probe._returns_maps(stock, list(probe._calls(stock, family))[:4]) is returned
