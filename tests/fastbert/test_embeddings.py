"""Embeddings that aren't the family's own: they are called with the caller's arguments, and their result is packed."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.numerics import assert_within_policy
from tests import models

ROWS, LENGTH, WIDTH = 5, 17, 128


class SoftPrompt(nn.Module):
    """In place of the table of words: vectors of its own over the first columns."""

    def __init__(self, words: nn.Embedding, columns: int) -> None:
        super().__init__()
        self.words, self.prompt = words, nn.Parameter(torch.randn(columns, words.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        rest = self.words(ids[:, len(self.prompt) :])
        return torch.cat([self.prompt.expand(len(ids), -1, -1), rest], 1)


class Hashed(nn.Embedding):
    """Few rows for many ids, and the more of one the fainter to the right."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids % self.num_embeddings) / torch.arange(1, ids.shape[1] + 1)[:, None]


class Backwards(hf.BertEmbeddings):
    """Positions from the shape of what it is given, counted from the end."""

    def forward(self, input_ids: Any = None, **given: Any) -> Tensor:
        length = input_ids.shape[1]
        given["position_ids"] = torch.arange(length).flip(0)[None]
        rows: Tensor = super().forward(input_ids=input_ids, **given)
        return rows


class Sinusoids(nn.Module):
    """In place of the table of positions: of the shape alone."""

    def forward(self, position_ids: Tensor) -> Tensor:
        steps = torch.arange(position_ids.shape[1])[:, None] * torch.arange(1, WIDTH + 1)
        return steps.sin()[None]


class PassThrough(nn.Module):
    """As captum's stand-in for a layer of embeddings: what comes in are embeddings already."""

    def forward(self, *inputs: Any, **given: Any) -> Any:
        return inputs[0] if inputs else given["input_ids"]


class Prefixed(nn.Module):
    """More rows come out than went in: a prompt before every sequence, for which the mask has places."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.prompt = embeddings, nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, input_ids: Any = None, **_: Any) -> Tensor:
        rows = self.embeddings(input_ids=input_ids)
        return torch.cat([self.prompt.expand(len(rows), -1, -1), rows], 1)


class Own(nn.Module):
    """Nothing of what the family's embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(models.VOCABULARY, WIDTH)

    def forward(self, input_ids: Any = None, **_: Any) -> Tensor:
        rows: Tensor = self.table(input_ids)
        return rows


class OverTokens(nn.Module):
    """In place of the LayerNorm: over all tokens it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 1))) / x.std((0, 1))


def reclass(kind: type[nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.embeddings.__class__ = kind

    return change


def on_instance(model: Any) -> None:
    forward = model.embeddings.forward
    model.embeddings.forward = lambda input_ids=None, **given: forward(input_ids=input_ids.flip(1), **given)


def renormalising(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 0.5


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "soft prompt": (lambda m: m.set_input_embeddings(SoftPrompt(m.get_input_embeddings(), 3)), "word_embeddings"),
    "hashed ids": (lambda m: m.set_input_embeddings(Hashed(50, WIDTH)), "word_embeddings"),
    "positions from the shape": (reclass(Backwards), "Backwards"),
    "positions replaced": (lambda m: setattr(m.embeddings, "position_embeddings", Sinusoids()), "position_embeddings"),
    "without LayerNorm": (lambda m: setattr(m.embeddings, "LayerNorm", nn.Identity()), "LayerNorm"),
    "norm over tokens": (lambda m: setattr(m.embeddings, "LayerNorm", OverTokens()), "LayerNorm"),
    "a custom module": (lambda m: setattr(m, "embeddings", Own()), "Own"),
    "wrapped": (lambda m: setattr(m, "embeddings", nn.Sequential(m.embeddings)), "Sequential"),
    "forward on the instance": (on_instance, "forward"),
    "rows renormalised": (renormalising, "renormalise"),
}
KEYWORDS = ("wrapped",)  # nn.Sequential takes none: its stock model can't be called


def trio(change: Callable[[Any], None], model: Any = None) -> tuple[Any, Any, Any]:
    """(fused, stock, truth), of which each is changed by itself: replaced methods are bound to one model."""
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        made = copy.deepcopy(models.seeded() if model is None else model)
        change(made)
        found.append(made)
    return fastbert.fuse(found[0]), found[1], found[2].double()


def call(mask: str = "right") -> dict[str, Any]:
    return {"input_ids": models.ids(ROWS, LENGTH), "attention_mask": models.masks(ROWS, LENGTH)[mask]}


def at_tokens(model: Any, mask: Any = None, **given: Any) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(attention_mask=mask, **given)[0]
    return hidden if mask is None else hidden[mask.bool()]


def ran(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    found = fastbert.explain(model).encoders[0]
    return found.fused_calls, found.stock_calls


@pytest.mark.parametrize("what", [name for name in CHANGES if name not in KEYWORDS])
@pytest.mark.parametrize("mask", ["right", "holes", "none"])
def test_they_are_called_as_they_are_and_packed_after(what: str, mask: str) -> None:
    trained = trio(CHANGES[what][0])
    given = call(mask)
    results = [at_tokens(model, given["attention_mask"], input_ids=given["input_ids"]) for model in trained]
    assert_within_policy(*results)
    assert ran(trained[0]) == ({"dense" if mask == "none" else "packed": 1}, {})
    with torch.no_grad():
        found = fastbert.explain(trained[0]).encoders[0]
    assert found.reason is None and not found.layers


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "mpnet"])
def test_of_every_family(family: str) -> None:
    """A soft prompt in place of the words: of embeddings that are fused, and of those that are left as they are."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"roberta": "Roberta", "electra": "Electra", "distilbert": "DistilBert", "mpnet": "MPNet"}[family]
    torch.manual_seed(1)
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(module, f"{name}Config")(**sizes)
    model = getattr(module, f"{name}Model")(config).eval()
    trained = trio(CHANGES["soft prompt"][0], model)
    ids = models.ids(ROWS, LENGTH, high=90) + 5
    mask = call()["attention_mask"]
    assert_within_policy(*(at_tokens(each, mask, input_ids=ids) for each in trained))
    assert ran(trained[0]) == ({"packed": 1}, {})


def test_embeddings_of_captum_take_embeddings_for_ids() -> None:
    trained = trio(lambda model: setattr(model, "embeddings", PassThrough()))
    mask, rows = call()["attention_mask"], torch.randn(ROWS, LENGTH, WIDTH)
    found = [at_tokens(model, mask, input_ids=rows.to(next(model.parameters()).dtype)) for model in trained]
    assert_within_policy(*found)
    assert ran(trained[0]) == ({"packed": 1}, {})


@pytest.mark.parametrize("masked", [True, False])
def test_more_rows_than_tokens(masked: bool) -> None:
    """The mask says how long sequences are; without one, the embeddings do."""
    trained = trio(lambda model: setattr(model, "embeddings", Prefixed(model.embeddings)))
    mask = torch.cat([torch.ones(ROWS, 3, dtype=torch.long), call()["attention_mask"]], 1) if masked else None
    found = [at_tokens(model, mask, input_ids=models.ids(ROWS, LENGTH)) for model in trained]
    assert found[0].shape == found[1].shape
    assert_within_policy(*found)
    assert ran(trained[0]) == ({"packed" if masked else "dense": 1}, {})


@pytest.mark.parametrize("mask", ["right", "none"])
def test_rows_of_another_dtype_run_stock(mask: str) -> None:
    """Embeddings in double under layers in float: stock code says what it makes of that, not the kernels."""
    stock = models.seeded()
    stock.embeddings = Own().double()
    fused = fastbert.fuse(copy.deepcopy(stock))
    said = []
    for model in (fused, stock):
        with pytest.raises(RuntimeError) as raised:
            model(**call(mask))
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert ran(fused)[0] == {} and "torch.float64" in next(iter(ran(fused)[1]))


def test_gradients_of_a_soft_prompt() -> None:
    fused, stock, truth = trio(CHANGES["soft prompt"][0], models.seeded(hf.BertForSequenceClassification))
    found = []
    for model in (fused, stock, truth):
        model(**call(), labels=torch.arange(ROWS)).loss.backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    models.assert_all_within_policy(*found, "gradients")
    assert any("prompt" in name for name in found[0])
    assert ran(fused) == ({"packed": 1}, {})


def test_a_flattened_call() -> None:
    """The caller's own single row goes to the embeddings; sequences stay apart."""
    fused, stock, truth = trio(CHANGES["hashed ids"][0])
    flat = models.ragged([3, 9, 5])
    with torch.no_grad():
        ours = fused(**flat)[0]
        mask = torch.zeros(1, 1, 17, 17, dtype=torch.bool)
        for start, end in ((0, 3), (3, 12), (12, 17)):
            mask[..., start:end, start:end] = True
        given = {"input_ids": flat["input_ids"], "position_ids": flat["position_ids"], "attention_mask": mask}
        theirs, exact = (model(**given)[0] for model in (stock, truth))
    assert_within_policy(ours, theirs, exact)
    assert ran(fused) == ({"packed": 1}, {})


@pytest.mark.parametrize("graphs", [False, True])
def test_hooks_on_foreign_embeddings_see_what_stock_shows_them(graphs: bool) -> None:
    fused, stock, _ = trio(CHANGES["soft prompt"][0])
    fused = fastbert.fuse(fused, cuda_graphs=graphs)
    seen: list[Any] = []
    for model in (fused, stock):
        model.embeddings.register_forward_hook(lambda m, args, given, out: seen.append((given, out)), with_kwargs=True)
        at_tokens(model, **{"mask": call()["attention_mask"], "input_ids": call()["input_ids"]})
    assert torch.equal(seen[0][0]["input_ids"], seen[1][0]["input_ids"])
    assert seen[0][0]["position_ids"] is None
    torch.testing.assert_close(seen[0][1], seen[1][1])


def test_explain_names_the_part() -> None:
    for what, (change, part) in CHANGES.items():
        model = models.seeded()
        change(model)
        with torch.no_grad():
            found = fastbert.explain(fastbert.fuse(model)).encoders[0]
        assert found.embeddings is not None, what
        assert part in found.embeddings, (what, found.embeddings)


# The kill switch.


@pytest.mark.parametrize("what", [*(name for name in CHANGES if name not in KEYWORDS), "nothing"])
def test_disabled_comes_before_every_check(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules and of arguments: a mask of complex numbers, which stock code takes, is refused otherwise."""
    fused, stock, _ = trio(CHANGES[what][0] if what in CHANGES else lambda model: None)
    given = call()
    given["attention_mask"] = given["attention_mask"].to(torch.complex64)
    if what == "nothing":
        with pytest.raises(ValueError, match=r"attention_mask has dtype torch\.complex64"):
            fused(**given)
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    with torch.no_grad():
        assert torch.equal(fused(**given)[0], stock(**given)[0])
    assert ran(fused) == ({}, {"FASTBERT_DISABLE is set": 1})


# Tables that are not whole: FSDP1 and DeepSpeed keep shards, and gather them as a module is called.


@pytest.mark.parametrize("shard", [lambda w: w.flatten()[:300], lambda w: w[:0].flatten(), lambda w: w[:40]])
def test_inputs_embeds_while_the_tables_are_sharded(shard: Callable[[Tensor], Tensor]) -> None:
    model = models.seeded()
    rows = torch.randn(ROWS, LENGTH, WIDTH)
    mask = call()["attention_mask"]
    expected = at_tokens(model, mask, inputs_embeds=rows)
    model.embeddings.word_embeddings.weight.data = shard(model.embeddings.word_embeddings.weight.data).clone()
    fused = fastbert.fuse(model)
    torch.testing.assert_close(at_tokens(fused, mask, inputs_embeds=rows), expected)
    with pytest.raises(ValueError, match="inputs_embeds has width 3; expected that of the embeddings, 128"):
        fused(inputs_embeds=rows[..., :3])


@pytest.mark.parametrize("shard", [lambda w: w.flatten()[:300], lambda w: w[:0].flatten(), lambda w: w[:40]])
def test_ids_while_tables_are_gathered_as_they_are_called(shard: Callable[[Tensor], Tensor]) -> None:
    model = models.seeded()
    expected = at_tokens(model, **{"mask": call()["attention_mask"], "input_ids": call()["input_ids"]})
    table = model.embeddings.word_embeddings
    whole = table.weight.data
    table.weight.data = shard(whole).clone()

    def gather(module: Any, args: Any) -> None:
        module.weight.data = whole

    def release(module: Any, args: Any, out: Any) -> None:
        module.weight.data = shard(whole).clone()

    table.register_forward_pre_hook(gather)
    table.register_forward_hook(release)
    fused = fastbert.fuse(model)
    for _ in range(2):
        ours = at_tokens(fused, **{"mask": call()["attention_mask"], "input_ids": call()["input_ids"]})
        torch.testing.assert_close(ours, expected)
    assert ran(fused)[1] == {}


# Tensors without values.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors_have_no_values_to_read(attention: str, inside: bool) -> None:
    """Estimators of memory call models so: their arguments fake, or made fake by the mode."""
    model = fastbert.fuse(models.seeded(attn_implementation=attention))
    given = call()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if inside:
        given = {name: mode.from_tensor(value) for name, value in given.items()}
    with mode, torch.no_grad():
        assert model(**given)[0].shape == (ROWS, LENGTH, WIDTH)
    assert ran(model) == ({"dense": 1}, {})


@pytest.mark.parametrize("longest", [None, 9])
def test_a_flattened_call_of_fake_tensors(longest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest sequence is the caller's word, or the number of tokens."""
    model = fastbert.fuse(models.seeded())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    flat = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in models.ragged([3, 9, 5]).items()}
    flat["max_length_q"] = flat["max_length_k"] = longest
    plan, layouts = importlib.import_module("fastbert.runtime.plan"), []
    flattened = plan.flattened
    monkeypatch.setattr(plan, "flattened", lambda *args: layouts.append(flattened(*args)) or layouts[-1])
    with mode, torch.no_grad():
        assert model(**flat)[0].shape == (1, 17, WIDTH)
    assert [layout.max_seqlen for layout in layouts] == [longest or 17]
    assert ran(model) == ({"packed": 1}, {})
