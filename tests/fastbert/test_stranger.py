"""A family that fastbert has never heard of, through an adapter of its own: docs/adding-a-family.md."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert import numerics, ops
from fastbert.models import classes, probe
from fastbert.models.classes import register
from fastbert.models.family import Family
from fastbert.runtime import registry
from fastbert.runtime.readers import FIRST, REAL
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
    # That with a sequence without a real token, which the adapter says that stock spreads (`spreads_empty`).
    assert list(encoder.stock_calls.values()) == [1]
    assert ("packed" in encoder.fused_calls) is (padding == "packed" and seqlen > 1)


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


def test_a_head_in_a_decorator_of_transformers_packs() -> None:
    """`can_return_tuple`, as transformers' own heads have it; and labels at padding are what its loss counts, too."""
    stock = seeded(code.QuillForTagging)
    fused = fastbert.fuse(copy.deepcopy(stock))
    call = {"input_ids": models.ids(4, 23, high=100), "attention_mask": models.masks(4, 23)["right"]}
    labels = models.ids(4, 23, seed=1, high=5)
    with torch.no_grad():
        real = call["attention_mask"].bool()
        torch.testing.assert_close(fused(**call).logits[real], stock(**call).logits[real])
        losses = [model(**call, labels=labels).loss for model in (fused, stock)]
        of_real = stock(**call, labels=labels.where(real, -100)).loss
    torch.testing.assert_close(*losses)
    assert not torch.isclose(losses[1], of_real)
    (encoder,) = fastbert.explain(fused).encoders
    assert (encoder.dense, encoder.fused_calls) == (None, {"packed": 1, "dense": 1})


def test_a_head_that_somebody_has_wrapped_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = code.QuillForTagging.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    wrapper.__code__ = wrapper.__code__.replace(co_filename="/elsewhere/tool.py")
    monkeypatch.setattr(code.QuillForTagging, "forward", wrapper)
    fused = fastbert.fuse(seeded(code.QuillForTagging))
    assert "QuillForTagging, whose forward has been replaced" in str(fastbert.explain(fused).encoders[0].dense)


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
    more = "and layers take what only their own encoder gives: all run stock"
    assert reason.startswith("stack.blocks.1.mlp ") and reason.endswith(more)
    fused = fastbert.fuse(seeded())
    fused.stack.blocks[1].register_forward_hook(lambda module, args, out: None)
    assert fastbert.explain(fused).encoders[0].reason == f"stack.blocks.1 has a hook, {more}"


@pytest.mark.parametrize("shape", [(1, 9), (2, 9)], ids=["for all", "for each"])
@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_position_ids(padding: str, shape: tuple[int, int]) -> None:
    """Tables are made of those that a call gives, one for each row."""
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    call = {
        "attention_mask": mask,
        "position_ids": torch.randint(40, shape, generator=torch.Generator().manual_seed(3)),
    }
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        expected, found = (model(ids, **call).last_hidden_state[mask.bool()] for model in (stock, fused))
        assert not torch.allclose(expected, stock(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(found, expected)
    assert dict(fastbert.explain(fused).encoders[0].fused_calls) == {padding: 1}


def test_hidden_states_that_an_encoder_collects_itself() -> None:
    """A loop of its own, which the fused encoder does not have, so that such calls are stock's."""
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        expected, found = (model(ids, output_hidden_states=True).hidden_states for model in (stock, fused))
    assert len(expected) == 3
    assert all(map(torch.equal, found, expected))
    assert dict(fastbert.explain(fused).encoders[0].stock_calls) == {"output_hidden_states": 1}


def test_an_argument_that_the_adapter_does_not_name() -> None:
    stock = seeded()
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    call = {"attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5]), "extra_rows": torch.randn(2, 9, 64)}
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        assert torch.equal(fused(ids, **call).last_hidden_state, stock(ids, **call).last_hidden_state)
    (reason,) = fastbert.explain(fused).encoders[0].stock_calls
    assert reason == "extra_rows, which its adapter does not name"


class Mixing(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


def mixes(model: Any) -> None:
    model.stack.norm = Mixing(64)


def watches(model: Any) -> None:
    model.stack.norm.register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))


@pytest.mark.parametrize("change", [mixes, watches])
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
def test_a_final_norm_that_is_replaced_or_hooked(change: Callable[[Any], None], before: bool) -> None:
    stock = seeded()
    fused = copy.deepcopy(stock)
    change(stock)
    if before:
        change(fused)
    fastbert.fuse(fused, padding="packed")
    ids, mask = models.ids(2, 9, high=100), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.no_grad():
        if not before:
            fused(ids, attention_mask=mask)
            change(fused)
        found, expected = (model(ids, attention_mask=mask).last_hidden_state for model in (fused, stock))
    assert torch.equal(found, expected)
    assert any("norm of the encoder is a" in reason for reason in fastbert.explain(fused).encoders[0].stock_calls)


def test_a_module_of_the_base_model_that_nobody_knows_makes_calls_dense() -> None:
    """It may read what the encoder returns, padding too."""
    model = seeded()
    model.summary = Mixing(64)
    fastbert.fuse(model)
    with torch.no_grad():
        model(models.ids(2, 9, high=100), attention_mask=torch.tensor([[1] * 9, [1] * 4 + [0] * 5]))
    assert dict(fastbert.explain(model).encoders[0].fused_calls) == {"dense": 1}


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The adapter's family, with another to be registered in its place."""
    kept = registry.REGISTERED.pop(code.QuillModel)
    yield kept
    registry.REGISTERED.pop(code.QuillModel, None)
    monkeypatch.setattr(classes, "try_family", lambda family: None)
    register(kept, adapter.__name__)


def attention(**changes: Any) -> Callable[[Family], dict[str, Any]]:
    return lambda f: {
        "layout": dataclasses.replace(f.layout, attention=dataclasses.replace(f.layout.attention, **changes))
    }


def feed_forward(**changes: Any) -> Callable[[Family], dict[str, Any]]:
    def change(family: Family) -> dict[str, Any]:
        half = dataclasses.replace(family.layout.feed_forward, **changes)
        return {"layout": dataclasses.replace(family.layout, feed_forward=half)}

    return change


def quirk(name: str, **sizes: Any) -> Callable[[Family], dict[str, Any]]:
    """The stock code does what the adapter doesn't say."""
    return lambda family: {"sizes": {**family.sizes, "quirk": name, **sizes}}


def tables(make: Callable[..., Any]) -> Callable[[Family], dict[str, Any]]:
    return lambda family: {"tables": make}


def squared(encoder: Any, x: Tensor, packing: Any, ids: Tensor | None) -> dict[str, Any]:
    return {"rotation": encoder.rotation(packing.positions(x.device) ** 2)}


def blind(encoder: Any, x: Tensor, packing: Any, ids: Tensor | None) -> dict[str, Any]:
    return {"rotation": encoder.rotation(packing.positions(x.device))}


def of_rows(encoder: Any, x: Tensor, packing: Any, ids: Tensor | None) -> dict[str, Any]:
    positions = torch.arange(x.shape[0] * x.shape[1]) if ids is None else ids.flatten()
    return {"rotation": encoder.rotation(positions)}


def short(encoder: Any, x: Tensor, packing: Any, ids: Tensor | None) -> dict[str, Any]:
    return {"rotation": encoder.rotation(torch.arange(x.shape[1]))}


DEPARTS = "QuillModel is not registered: fused, it departs from stock: its hidden"
WRONG: dict[str, tuple[Callable[[Family], dict[str, Any]], str]] = {
    "the norm after": (lambda f: {"layout": dataclasses.replace(f.layout, pre_norm=False)}, DEPARTS),
    "no final norm": (lambda f: {"final_norm": None}, DEPARTS),
    "no rotation": (attention(rotary=None), DEPARTS),
    "squared positions": (tables(squared), DEPARTS),
    "tables without position_ids": (tables(blind), "position_ids .*; tables have to be made of position_ids"),
    "positions of rows": (tables(of_rows), DEPARTS),
    "tables of one sequence": (
        tables(short),
        r"Family.tables gave .* for 'rotation', Attention.rotary; expected \(27,",
    ),
    "a table of another name": (attention(rotary="turn"), "Family.tables gave None for 'turn', Attention.rotary"),
    "no tables": (lambda f: {"tables": None}, "Attention.rotary is 'rotation'; Family.tables"),
    "empty sequences": (lambda f: {"spreads_empty": False}, "see Family.spreads_empty"),
    "no gate": (feed_forward(is_gated=False), "FeedForward.up gives .* columns; expected"),
    "heads of another width": (attention(head_dim="rate"), "Attention.head_dim is 'rate'"),
    "two gates": (feed_forward(gate=("mlp", "wi")), "is_gated and FeedForward.gate are both given"),
    "a dropout left out": (feed_forward(down_dropout=None), "QuillEncoder drops something in training that neither"),
    "a dropout taken for another": (
        lambda f: {**attention(dropout=None, output_dropout=("attn", "drop"))(f)},
        "attn.drop is not the dropout of what attn.wo gives, in QuillBlock",
    ),
    "kinds left out": (feed_forward(kinds={}), "mlp is a QuillGate, in the kinds of no half"),
    "kinds of another class": (
        feed_forward(kinds={("mlp",): code.QuillAttention}),
        "mlp is a QuillGate, not a? ?Quill",
    ),
    "a linear layer that isn't there": (
        feed_forward(down=("mlp", "down")),
        "FeedForward: a linear layer is mlp.down; QuillBlock.mlp has no",
    ),
    "a norm left out": (feed_forward(norm=("norm1",)), "QuillBlock has norm2.weight, a parameter of nothing"),
    "no head dimension": (attention(head_dim="head"), "Attention.head_dim is 'head'; QuillBlock.attn has no such"),
    "no encoder between": (lambda f: {"stack": ("blocks",)}, r"Family.stack is \('blocks',\); expected a path through"),
    "layers elsewhere": (
        lambda f: {"stack": ("stack", "layer")},
        "Family.stack is stack.layer; QuillModel.stack has no",
    ),
    "no table of words": (lambda f: {"ids": {"input_ids": "words"}}, "Family.ids names 'words' as the table of words"),
    "another final norm": (lambda f: {"final_norm": "blocks"}, "Family.final_norm is 'blocks'; a QuillEncoder has no"),
    "a table that isn't there": (
        lambda f: {"ids": {"input_ids": "tokens", "place_ids": "nosuch"}},
        "Family.ids names 'nosuch' as the table of place_ids; a QuillEmbeddings has none there",
    ),
    "a table that is none": (
        lambda f: {"ids": {"input_ids": "tokens", "position_ids": "norm"}},
        "Family.ids names 'norm' as the table of position_ids; a QuillEmbeddings has none there",
    ),
    "an argument that isn't there": (
        lambda f: {"ids": {"input_ids": "tokens", "extra_rows": "tokens"}},
        "QuillModel can't be called with input_ids, extra_rows, attention_mask: .*; see Family.ids",
    ),
    "a path of one name": (feed_forward(up="wi"), r"FeedForward.up is 'wi'; expected a tuple of names, as \('wi',\)"),
    "a path of letters": (
        lambda f: {"embeddings_at": "embed"},
        r"Family.embeddings_at is 'embed'; expected a tuple of names, as \('embed',\)",
    ),
    "kinds by name": (feed_forward(kinds={"mlp": code.QuillGate}), "a path in FeedForward.kinds is 'mlp'; expected"),
    "a head by name": (
        lambda f: {"heads": {"QuillForRanking": FIRST}},
        "Family.heads has 'QuillForRanking'; expected classes of modules",
    ),
    "a head of nothing": (lambda f: {"heads": {code.QuillEncoder: FIRST}}, "QuillEncoder, which holds no QuillModel"),
    "another output": (lambda f: {"output": dict}, "Family.output is <class 'dict'>; expected a class derived from"),
    "a head of real tokens": (lambda f: {"heads": {code.QuillForRanking: REAL}}, "left; Family.heads says which rows"),
    "a head of all rows": (quirk("a mean over all rows"), "QuillForRanking is not registered: fused, it departs"),
    "a loss over real tokens": (
        lambda f: {"heads": {code.QuillForTagging: REAL}},
        "QuillForTagging is not registered: .* its loss by .* padding and labels of all tokens; Family.heads says",
    ),
    "a loss of the first row": (
        lambda f: {"heads": {code.QuillForTagging: FIRST}},
        "QuillForTagging is not registered: .* its loss by .* padding and labels of all tokens; Family.heads says",
    ),
    "another activation": (
        quirk("a GELU by tanh"),
        r"FeedForward.activation is mlp.act; what QuillBlock hands to mlp.wo is off by .* makes of mlp.wi",
    ),
    "a function that is another": (
        feed_forward(activation=(), function=torch.nn.GELU(approximate="tanh")),
        r"FeedForward.activation is GELU\(approximate='tanh'\); what QuillBlock hands to mlp.wo is off by",
    ),
    "an argument that is not handed on": (
        lambda f: {"handed": "turns_of_all"},
        "Family.handed is 'turns_of_all'; QuillEncoder takes no such argument",
    ),
    "a qkv by heads": (quirk("queries, keys and values of each head side by side"), DEPARTS),
    "a scale of its own": (quirk("a scale"), DEPARTS),
    "a window": (quirk("a window"), f"{DEPARTS} .* of 300 tokens a sequence"),
    "a layer unlike others": (quirk("a layer without positions"), DEPARTS),
    "positions of the mask": (quirk("positions of the mask"), "in its mask; if its positions come from the mask"),
    "a rate left out": (
        lambda f: {**attention(dropout=None)(f), **quirk("a rate")(f)},
        "QuillEncoder drops something in training that neither half names",
    ),
    "dropout elsewhere": (quirk("dropout of values"), "attn.drop is not the dropout of attention's probabilities"),
    "a table of positions left out": (
        lambda f: {"ids": {"input_ids": "tokens"}, "sizes": {**f.sizes, "places": 512}},
        DEPARTS,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_says_what_is_not_so_is_refused(what: str, unregistered: Family) -> None:
    change, error = WRONG[what]
    family = dataclasses.replace(unregistered, **change(unregistered))
    with pytest.raises(ValueError, match=error):
        register(family, adapter.__name__)
    assert code.QuillModel not in registry.REGISTERED


def test_a_table_of_positions_without_a_buffer(unregistered: Family) -> None:
    """Its rows say how long a sequence may be, and positions are counted from 0."""
    register(dataclasses.replace(unregistered, sizes={**unregistered.sizes, "places": 512}), adapter.__name__)
    stock = seeded(places=9)
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    ids, mask = models.ids(2, 9, high=100), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in (fused, stock))
        torch.testing.assert_close(found, expected)
        with pytest.raises(ValueError, match=r"10 tokens a sequence; expected at most max_position_embeddings, 9"):
            fused(models.ids(1, 10, high=100))


def test_a_rate_in_place_of_a_dropout(unregistered: Family) -> None:
    """Stock drops probabilities by a number, and so does the fused layer, while the attention is in training."""
    changes = {**attention(dropout="rate")(unregistered), **quirk("a rate")(unregistered)}
    register(dataclasses.replace(unregistered, **changes), adapter.__name__)
    model = fastbert.fuse(seeded(quirk="a rate", dropout=0.3)).train()
    model.stack.blocks[0].attn.rate = model.stack.blocks[1].attn.rate = 0.3
    for block in model.stack.blocks:
        block.drop.p = 0.0
    ids = models.ids(2, 9, high=100)
    once, twice = (model(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(once, twice)
    for block in model.stack.blocks:
        block.attn.rate = 1.0
    stock = fastbert.unfuse(copy.deepcopy(model))
    torch.testing.assert_close(model(ids).last_hidden_state, stock(ids).last_hidden_state)
    assert not fastbert.explain(model).encoders[0].stock_calls


def test_registered_once_and_from_a_module_that_is_there() -> None:
    with pytest.raises(ValueError, match=r"QuillModel is registered already, by tests.fastbert.quill.adapter"):
        register(dataclasses.replace(adapter.FAMILY), adapter.__name__)
    with pytest.raises(ValueError, match=r"module is 'no.such', which is not loaded"):
        register(dataclasses.replace(adapter.FAMILY), "no.such")


@pytest.mark.parametrize(
    "name",
    [
        *("bert", "mpnet", "deberta_v2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "electra", "ernie", "distilbert")),
    ],
)
def test_families_that_come_with_fastbert_are_as_they_say(name: str) -> None:
    """What is asked of a stranger's adapter, asked of ours; XLM-R's and CamemBERT's code is RoBERTa's."""
    family = importlib.import_module(f"fastbert.models.{name}").FAMILY
    probe.check_description(family)
    probe.try_family(family)


def test_attention_maps() -> None:
    """Of rotated queries and keys; its stock code returns none, but drops elements of them."""
    stock, seen = seeded(), []
    fused = fastbert.fuse(copy.deepcopy(stock))
    for block in stock.stack.blocks:
        block.attn.drop.register_forward_hook(lambda _, __, output: seen.append(output))
    call, real = calls(3, 37)[2]
    with torch.no_grad():
        stock(**call)
    found = fastbert.attention_maps(fused, call)
    assert len(seen) == len(found) > 1
    for one, other in zip(found.values(), seen, strict=True):
        torch.testing.assert_close(one.transpose(1, 2)[real.bool()], other.transpose(1, 2)[real.bool()])
    assert fastbert.explain(fused).encoders[0].fused_calls == {"packed": 1}
    with torch.no_grad():
        assert "attentions" not in fused(**call, output_attentions=True)
    assert fastbert.explain(fused).encoders[0].stock_calls == {"output_attentions": 1}
