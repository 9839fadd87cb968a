"""Hooks on layers, on the encoder and inside of attention: what they see and change is what they would in stock."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.numerics import assert_within_policy
from tests import models

ROWS, LENGTH = 5, 17


def call(mask: str = "right") -> dict[str, Any]:
    return {"input_ids": models.ids(ROWS, LENGTH), "attention_mask": models.masks(ROWS, LENGTH)[mask]}


def hidden(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given)[0]
    mask = given["attention_mask"]
    return found if mask is None else found[mask.bool()]


# Each takes what a pre-hook does with `with_kwargs`, and gives back what it changes. The mask comes by position, or by
# name: that of the encoder, and of self-attention.


def with_mask(args: Any, kwargs: Any, change: Callable[[Tensor], Any]) -> Any:
    if len(args) > 1:
        return (args[0], change(args[1]), *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": change(kwargs["attention_mask"])}


def knock_out(layer: Any, args: Any, kwargs: Any) -> Any:
    """Nobody in this layer sees token 0."""

    def change(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[..., 0] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask

    return with_mask(args, kwargs, change)


def patch(layer: Any, args: Any, kwargs: Any) -> Any:
    """The first sequence's states in place of the second's, by their place in the padded batch."""
    rows = args[0].clone()
    rows[1] = rows[0]
    return (rows, *args[1:]), kwargs


def without_mask(layer: Any, args: Any, kwargs: Any) -> Any:
    """As calibration may call a layer again."""
    return with_mask(args, kwargs, lambda mask: None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("change", [knock_out, patch, without_mask])
@pytest.mark.parametrize(
    "path", ["encoder.layer.1", "encoder", *(f"encoder.layer.0.attention{s}" for s in ("", ".self"))]
)
def test_a_hook_that_edits_arguments_is_heeded(path: str, change: Callable[..., Any], attention: str) -> None:
    model = models.seeded(attn_implementation=attention)
    trained = fastbert.fuse(copy.deepcopy(model)), copy.deepcopy(model), copy.deepcopy(model).double()
    plain = hidden(trained[0], call())
    for each in trained:
        each.get_submodule(path).register_forward_pre_hook(change, with_kwargs=True)
    results = [hidden(each, call()) for each in trained]
    assert_within_policy(*results)
    assert not torch.allclose(results[0], plain, atol=1e-2)  # it has done something
    with torch.no_grad():
        found = fastbert.explain(trained[0]).encoders[0]
    if path == "encoder":
        assert found.reason == "the encoder has hooks"
        assert (found.fused_calls, found.stock_calls) == ({"packed": 1}, {found.reason: 1})
    else:
        assert list(found.layers) == [int(path.split(".")[2])] and found.reason is None
        assert found.fused_calls == {"packed": 1, "dense": 1}


def seen(value: Any) -> Any:
    """What a hook was shown, to be compared."""
    if isinstance(value, dict):
        return {name: seen(each) for name, each in value.items() if each is not None and not isinstance(each, bool)}
    if isinstance(value, tuple | list):
        return tuple(map(seen, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def watch(module: Any, how: str, shown: list[Any]) -> None:
    if how == "before":
        module.register_forward_pre_hook(lambda m, args: shown.append(seen(args)))
    elif how == "before, by name":
        module.register_forward_pre_hook(lambda m, args, kwargs: shown.append(seen((args, kwargs))), with_kwargs=True)
    elif how == "after":
        module.register_forward_hook(lambda m, args, out: shown.append(seen((args, out))))
    else:
        module.register_forward_hook(
            lambda m, args, kwargs, out: shown.append(seen((args, kwargs, out))), with_kwargs=True
        )


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("how", ["before", "before, by name", "after", "after, by name"])
@pytest.mark.parametrize("mask", ["right", "full", "none"])
def test_hooks_of_layers_are_shown_what_stock_shows_them(family: str, how: str, mask: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"bert": "Bert", "distilbert": "DistilBert", "mpnet": "MPNet"}[family]
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    stock = getattr(module, f"{name}Model")(getattr(module, f"{name}Config")(**sizes)).eval()
    given = {**call(mask), "input_ids": models.ids(ROWS, LENGTH, high=90) + 5}
    shown: tuple[list[Any], list[Any]] = ([], [])
    for model, found in zip((stock, fastbert.fuse(copy.deepcopy(stock))), shown, strict=True):
        for layer in model.get_submodule("transformer" if family == "distilbert" else "encoder").layer:
            watch(layer, how, found)
        hidden(model, given)
    assert len(shown[0]) == len(shown[1]) == 2
    for theirs, ours in zip(*shown, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        explanation = fastbert.explain(model).encoders[0]
    if family == "mpnet":
        assert len(explanation.stock_calls) == 1
    elif how == "after":
        assert explanation.fused_calls == {"dense": 1} and not explanation.layers
    else:
        assert all(why.endswith(f"{i} has a hook that sees its arguments") for i, why in explanation.layers.items())
        assert explanation.stock_calls == {explanation.reason: 1}


def halve_attention(layer: Any) -> None:
    layer.attention.self.register_forward_hook(lambda module, args, output: (0.5 * output[0], *output[1:]))


def replace_a_linear(layer: Any) -> None:
    torch.manual_seed(0)
    layer.output.dense = nn.Sequential(nn.Linear(256, 128), nn.Tanh())


def replace_a_weight(layer: Any) -> None:
    layer.output.dense.weight = nn.Parameter(0.3 * layer.output.dense.weight)


@pytest.mark.parametrize("where", ["embeddings", "encoder.layer.0", "encoder.layer.0.output.dense"])
@pytest.mark.parametrize("change", [halve_attention, replace_a_linear, replace_a_weight])
def test_what_a_hook_changes_of_a_later_layer(where: str, change: Callable[[Any], None]) -> None:
    def run(model: Any) -> Tensor:
        def once(module: Any, args: Any, output: Any) -> None:
            change(model.encoder.layer[1])
            handle.remove()

        handle = model.get_submodule(where).register_forward_hook(once)
        return hidden(model, call())

    stock = models.seeded()
    before, fused = hidden(stock, call()), fastbert.fuse(copy.deepcopy(stock))
    expected, ours = run(stock), run(fused)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class Planting(nn.Module):
    """Embeddings that have a later layer changed as they are called."""

    def __init__(self, inner: nn.Module, change: Callable[[], object]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.change()
        return self.inner(*args, **kwargs)


def test_a_later_layer_that_can_no_longer_run_stock_is_told() -> None:
    """Of packed rows, and of a family whose layers take what only stock's encoder gives."""
    packed = fastbert.fuse(models.seeded())
    packed.embeddings = Planting(packed.embeddings, lambda: halve_attention(packed.encoder.layer[1]))
    mpnet = fastbert.fuse(MPNetModel(MPNetConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)).eval())
    attention, shown = mpnet.encoder.layer[1].attention.attn, list[Any]()

    def plant(module: Any, args: Any, output: Any) -> None:
        attention.register_forward_hook(lambda module, args, output: shown.append(output))

    mpnet.embeddings.register_forward_hook(plant)
    for model, part in ((packed, "self"), (mpnet, "attn")):
        with pytest.raises(
            RuntimeError, match=rf"encoder.layer.1.attention.{part} has hooks, since this forward began"
        ):
            hidden(model, call())


def test_backward_hooks_of_layers_are_given_as_much_as_stock_gives_them() -> None:
    stock = models.seeded()
    found: list[Any] = []
    for model in (stock, fastbert.fuse(copy.deepcopy(stock))):
        shown: list[Any] = []
        model.encoder.layer[1].register_full_backward_hook(lambda m, before, after, s=shown: s.append((before, after)))
        model(**call())[0][:, 0].sum().backward()
        found.append(shown)
    (theirs,), (ours,) = found
    assert len(ours[0]) == len(theirs[0]) > 1
    torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=1e-4, atol=1e-5)


def test_a_flattened_call_with_hooks_on_a_layer() -> None:
    """One that sees arguments: the call is stock, its sequences kept apart. One after: as stock calls it, no mask."""
    stock, flat = models.seeded(), models.ragged([3, 9, 5])
    plain = fastbert.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        expected = plain(**flat)[0]
        for how, kinds in (("before", {"stock": 1}), ("after", {"packed": 1})):
            model, shown = fastbert.fuse(copy.deepcopy(stock)), []
            watch(model.encoder.layer[0], how, shown)
            torch.testing.assert_close(model(**flat)[0], expected, rtol=1e-4, atol=1e-5)
            found = fastbert.explain(model).encoders[0]
            assert found.fused_calls == {name: n for name, n in kinds.items() if name != "stock"}
            assert sum(found.stock_calls.values()) == kinds.get("stock", 0)
            mask = shown[0][1] if how == "before" else shown[0][0][1]
            assert mask is None if how == "after" else mask.shape == (1, 1, 17, 17)


def explained(change: Callable[[Any], object]) -> Any:
    model = fastbert.fuse(models.seeded())
    change(model)
    with torch.no_grad():
        return fastbert.explain(model).encoders[0]


def test_explain_names_what_sees_hidden_states() -> None:
    def does_nothing(module: object, args: object, out: object) -> None:
        return None

    found = explained(lambda model: model.embeddings.LayerNorm.register_forward_hook(does_nothing))
    assert found.dense == "embeddings.LayerNorm has a hook, which sees hidden states"
    found = explained(lambda model: model.encoder.layer[1].register_forward_hook(does_nothing))
    assert found.dense == "encoder.layer.1 has a hook, which sees hidden states"
    found = explained(lambda model: model.encoder.layer[1].output.register_forward_hook(does_nothing))
    assert found.dense == "layer 1 runs stock, which takes padded rows"


def test_explain_tells_a_forward_of_the_encoder_from_a_hook() -> None:
    def forward(*args: object, **kwargs: object) -> None:
        return None

    found = explained(lambda model: setattr(model.encoder, "forward", forward))
    assert found.reason.startswith("forward of its BertEncoder is ") and found.reason.endswith(".forward")


@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertForSequenceClassification, hf.BertForMaskedLM])
def test_explain_says_where_loss_only_changes_nothing(kind: Any) -> None:
    model = fastbert.fuse(models.seeded(kind), loss_only=True)
    (found,) = fastbert.explain(model).encoders
    assert (found.loss_only is None) is (kind is hf.BertForMaskedLM)
    assert ("loss_only: no effect" in str(fastbert.explain(model))) is (kind is not hf.BertForMaskedLM)
    assert fastbert.explain(fastbert.fuse(model)).encoders[0].loss_only is None
