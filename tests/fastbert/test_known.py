"""Code of torch and transformers that somebody has replaced runs, and what stands in for it does not."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.activations
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetModel,
    NomicBertConfig,
    NomicBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)
from transformers.loss import loss_utils
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as hf
from transformers.models.mpnet import modeling_mpnet as mpnet
from transformers.models.roberta import modeling_roberta as roberta

import fastbert
from tests import fresh, models

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TINY = {"dim": 32, "n_heads": 2, "hidden_dim": 64, "n_layers": 2}


def last(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=models.ids(3, 11), **arguments)[0]
    return result


def said(model: Any) -> Any:
    with torch.no_grad():
        (encoder,) = fastbert.explain(model).encoders
    return encoder


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    def half(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, tuple):
            return (out[0] * 0.5, *out[1:])
        if isinstance(out, Tensor):
            return out.mul(0.5)
        if isinstance(out, float):
            return 0.5 * out
        out.last_hidden_state = out.last_hidden_state * 0.5
        return out

    return half


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """It says that it is what it is around."""
    return functools.wraps(function)(halved(function))


def squared(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) ** 2


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """It takes no argument but stock's."""

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None) -> Any:
        return halved(function)(self, input_ids, attention_mask)

    return forward


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


# (owner, name, what is put in its place, attention)
PATCHES: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "BertSelfAttention.forward": (hf.BertSelfAttention, "forward", halved, "eager"),
    "BertSelfOutput.forward": (hf.BertSelfOutput, "forward", halved, "sdpa"),
    "BertAttention.forward": (hf.BertAttention, "forward", wrapped, "sdpa"),
    "BertIntermediate.forward": (hf.BertIntermediate, "forward", halved, "sdpa"),
    "BertOutput.forward": (hf.BertOutput, "forward", wrapped, "sdpa"),
    "BertLayer.forward": (hf.BertLayer, "forward", halved, "sdpa"),
    "BertLayer.feed_forward_chunk": (hf.BertLayer, "feed_forward_chunk", wrapped, "sdpa"),
    "BertEncoder.forward": (hf.BertEncoder, "forward", halved, "sdpa"),
    "BertEmbeddings.forward": (hf.BertEmbeddings, "forward", halved, "sdpa"),
    "BertModel.forward": (hf.BertModel, "forward", strict, "sdpa"),
    "BertIntermediate.__call__": (hf.BertIntermediate, "__call__", lambda _: halved(nn.Module.__call__), "sdpa"),
    "LayerNorm.forward": (nn.LayerNorm, "forward", halved, "sdpa"),
    "Linear.forward": (nn.Linear, "forward", wrapped, "sdpa"),
    "Dropout.forward": (nn.Dropout, "forward", halved, "sdpa"),
    "Embedding.forward": (nn.Embedding, "forward", squared, "sdpa"),
    "GELUActivation.forward": (transformers.activations.GELUActivation, "forward", halved, "sdpa"),
    "torch.nn.Module._call_impl": (nn.Module, "_call_impl", halved, "sdpa"),
    "modeling_bert.eager_attention_forward": (hf, "eager_attention_forward", halved, "eager"),
    "modeling_bert.apply_chunking_to_forward": (hf, "apply_chunking_to_forward", wrapped, "sdpa"),
    "torch.nn.functional.layer_norm": (nn.functional, "layer_norm", halved, "sdpa"),
    "torch.nn.functional.linear": (nn.functional, "linear", halved, "sdpa"),
    "torch.nn.functional.scaled_dot_product_attention": (
        nn.functional,
        "scaled_dot_product_attention",
        halved,
        "sdpa",
    ),
    "torch.nn.functional.softmax": (nn.functional, "softmax", halved, "eager"),
    "torch.matmul": (torch, "matmul", halved, "eager"),
    "torch.layer_norm": (torch, "layer_norm", halved, "sdpa"),  # which torch.nn.functional's calls
    "torch.embedding": (torch, "embedding", squared, "sdpa"),
    "Tensor.__add__": (Tensor, "__add__", halved, "eager"),
}


@pytest.mark.parametrize("what", PATCHES)
def test_replaced_code_runs_until_it_is_put_back(what: str) -> None:
    owner, name, patch, attention = PATCHES[what]
    stock = models.seeded(attn_implementation=attention, **SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(stock)
    torch.testing.assert_close(last(fused), before, rtol=1e-4, atol=1e-5)
    with replaced(owner, name, patch(getattr(owner, name))):
        expected, found, during = last(stock), last(fused), said(fused)
    assert not torch.allclose(expected, before, atol=1e-2)  # the patch is one that tells
    assert torch.equal(found, expected)
    assert what in during.reason
    assert during.stock_calls == {during.reason: 1}
    torch.testing.assert_close(last(fused), before, rtol=1e-4, atol=1e-5)
    after = said(fused)
    assert after.reason is None and sum(after.fused_calls.values()) == 2 and sum(after.stock_calls.values()) == 1


def test_the_mask_is_handed_to_what_replaces_the_model() -> None:
    """By position, as it takes it, and nothing of ours with it."""
    stock = models.seeded(hf.BertForTokenClassification, **SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    mask = models.masks(3, 11)["right"]
    forward = hf.BertModel.forward

    def own(self: Any, input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any,
            **kwargs: Any) -> Any:  # fmt: skip
        assert not kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}, kwargs
        return forward(self, input_ids, attention_mask * 0 + 1, token_type_ids)

    names = ("token_type_ids", "position_ids", "inputs_embeds")
    with replaced(hf.BertModel, "forward", own):
        expected, found = (
            last(m, attention_mask=mask, labels=models.ids(3, 11, high=4), **dict.fromkeys(names))
            for m in (stock, fused)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("owner", [hf.BertForMaskedLM, hf.BertOnlyMLMHead, hf.BertLMPredictionHead])
def test_a_replaced_head_gives_its_own_loss(owner: Any) -> None:
    stock = models.seeded(hf.BertForMaskedLM, **SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock), loss_only=True)
    call = {"input_ids": models.ids(3, 11), "labels": models.ids(3, 11)}
    with torch.no_grad():
        assert fused(**call).logits is None
        own = owner.forward

        def doubled(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            if not isinstance(out, Tensor):
                out.loss, out.logits = out.loss * 2, out.logits * 2
            return out * 2 if isinstance(out, Tensor) else out

        with replaced(owner, "forward", doubled):
            expected, found = stock(**call), fused(**call)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert fused(**call).logits is None


class OfAllRows(nn.CrossEntropyLoss):
    """A loss that takes in padding."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.pow(2).mean()


def mixing(rows: Tensor) -> Tensor:
    return rows.tanh() + rows.mean(-2, keepdim=True)


# (head, owner, name, what is put in its place)
LOSSES: dict[str, tuple[Any, Any, str, Any]] = {
    "modeling_bert.CrossEntropyLoss": (hf.BertForMaskedLM, hf, "CrossEntropyLoss", OfAllRows),
    "CrossEntropyLoss.forward": (hf.BertForMaskedLM, nn.CrossEntropyLoss, "forward", OfAllRows.forward),
    "torch.nn.CrossEntropyLoss": (ElectraForMaskedLM, nn, "CrossEntropyLoss", OfAllRows),
    "cross_entropy": (DistilBertForMaskedLM, nn.functional, "cross_entropy", lambda x, labels, **_: x.pow(2).mean()),
    "modeling_roberta.gelu": (RobertaForMaskedLM, roberta, "gelu", mixing),
}


@pytest.mark.parametrize("loss_only", [True, False])
@pytest.mark.parametrize("what", LOSSES)
def test_a_replaced_loss_is_taken(what: str, loss_only: bool) -> None:
    """It, or what comes before it, may read padding, and rows without a label."""
    kind, owner, name, other = LOSSES[what]
    torch.manual_seed(0)
    stock = kind(kind.config_class(vocab_size=models.VOCABULARY, **(TINY if kind is DistilBertForMaskedLM else SMALL)))
    stock.eval()
    fused = fastbert.fuse(copy.deepcopy(stock), loss_only=loss_only)
    mask = models.masks(3, 11)["right"]
    call = {"input_ids": models.ids(3, 11), "attention_mask": mask, "labels": models.ids(3, 11).where(mask > 0, -100)}
    with torch.no_grad():
        plain = fused(**call)
        with replaced(owner, name, other):
            expected, found = stock(**call).loss, fused(**call).loss
        assert (expected - plain.loss).abs() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused(**call).loss, plain.loss)
    assert said(fused).fused_calls == {"packed": 2}
    assert (plain.logits is None) is loss_only


OWN_LOSSES: dict[str, Callable[[Any], object]] = {
    "a loss": lambda model: setattr(model, "mlm_loss_fct", nn.CrossEntropyLoss(label_smoothing=0.3)),
    "a hook": lambda model: model.mlm_loss_fct.register_forward_hook(lambda loss, args, output: 2 * output),
    "rows": lambda model: model.vocab_transform.register_forward_hook(lambda part, args, output: mixing(output)),
}


@pytest.mark.parametrize("what", OWN_LOSSES)
def test_a_loss_that_is_a_module_is_taken_as_it_is(what: str) -> None:
    stock = DistilBertForMaskedLM(DistilBertConfig(vocab_size=models.VOCABULARY, **TINY)).eval()
    fused = fastbert.fuse(copy.deepcopy(stock), loss_only=True)
    labels = models.ids(3, 11)
    labels[:, ::2] = -100
    call = {"input_ids": models.ids(3, 11), "labels": labels}
    with torch.no_grad():
        assert fused(**call).logits is None
        plain = stock(**call).loss
        for model in (stock, fused):
            OWN_LOSSES[what](model)
        expected, found = stock(**call).loss, fused(**call).loss
    assert (expected - plain).abs() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def of_all_logits(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.pow(2).mean()


# How the loss of a head that has a `loss_function` becomes another.
Patch = pytest.MonkeyPatch
FUNCTIONS: dict[str, Callable[[Any, Patch], object]] = {
    "of the model": lambda model, patch: setattr(model, "loss_function", of_all_logits),
    "of its type": lambda model, patch: setattr(model, "loss_type", "ForCausalLM"),
    "in the table": lambda model, patch: patch.setitem(loss_utils.LOSS_MAPPING, "ForMaskedLM", of_all_logits),
    "what it calls": lambda model, patch: patch.setattr(loss_utils, "fixed_cross_entropy", of_all_logits),
    "an argument": lambda model, patch: None,
}


@pytest.mark.parametrize("loss_only", [True, False])
@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_loss_function_is_taken_as_it_is(what: str, loss_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": models.VOCABULARY, "num_hidden_layers": 2, **SMALL}
    torch.manual_seed(0)
    stock = ModernBertForMaskedLM(ModernBertConfig(**sizes, pad_token_id=0)).eval()
    fused = fastbert.fuse(copy.deepcopy(stock), loss_only=loss_only)
    mask = models.masks(3, 11)["left"]
    labels = models.ids(3, 11).masked_fill(mask == 0, -100)
    call: dict[str, Any] = {"input_ids": models.ids(3, 11), "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        plain = fused(**call)
        assert (plain.logits is None) is loss_only
        if what == "an argument":
            ignored = int(labels[mask > 0].mode().values)
            call |= {"labels": labels.where(labels != -100, ignored), "ignore_index": ignored}
        for model in (stock, fused):
            FUNCTIONS[what](model, monkeypatch)
        expected, found = stock(**call).loss, fused(**call).loss
    assert (expected - plain.loss).abs() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_attention_function_registered_anew() -> None:
    stock = models.seeded(attn_implementation="sdpa", **SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    type(ALL_ATTENTION_FUNCTIONS).register("sdpa", wrapped(own))
    try:
        assert torch.equal(last(fused), last(stock))
        assert "attention 'sdpa' is" in said(fused).reason
    finally:
        type(ALL_ATTENTION_FUNCTIONS).register("sdpa", own)
    last(fused)
    assert sum(said(fused).fused_calls.values()) == 1


def given_by(find: Callable[..., Any]) -> Callable[..., Any]:
    """`find` gives functions; what these return is halved."""
    return lambda *args, **kwargs: halved(find(*args, **kwargs))


def others(registry: Any) -> Any:
    """A registry of the same class, of which one function is another."""
    own = type(registry)()
    own["sdpa"] = halved(registry["sdpa"])
    return own


# (owner, name, what is put in its place)
REGISTRIES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "AttentionInterface.get_interface": (type(ALL_ATTENTION_FUNCTIONS), "get_interface", given_by),
    "ALL_ATTENTION_FUNCTIONS.get_interface": (ALL_ATTENTION_FUNCTIONS, "get_interface", given_by),
    "modeling_bert.ALL_ATTENTION_FUNCTIONS": (hf, "ALL_ATTENTION_FUNCTIONS", others),
}


@pytest.mark.parametrize("what", REGISTRIES)
def test_where_attention_functions_are_looked_up(what: str) -> None:
    owner, name, patch = REGISTRIES[what]
    stock = models.seeded(attn_implementation="sdpa", **SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    with replaced(owner, name, patch(getattr(owner, name))):
        expected, found, reason = last(stock), last(fused), said(fused).reason
    assert torch.equal(found, expected) and not torch.allclose(found, before, atol=1e-2)
    assert what in reason
    torch.testing.assert_close(last(fused), before)
    assert said(fused).reason is None


def test_code_replaced_inside_a_function() -> None:
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    last(fused)

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(hidden_states) + 2 * input_tensor)
        return normed

    function = hf.BertOutput.forward
    before, function.__code__ = function.__code__, forward.__code__
    try:
        assert torch.equal(last(fused), last(stock))
        assert "code of" in said(fused).reason and "BertOutput.forward" in said(fused).reason
    finally:
        function.__code__ = before
    last(fused)
    assert sum(said(fused).fused_calls.values()) == 2


def other_defaults(**changes: Any) -> Any:
    """Makes defaults of a function others, by the parameters' names."""

    def change(function: Any, patch: pytest.MonkeyPatch) -> None:
        names = list(inspect.signature(function).parameters)[-len(function.__defaults__) :]
        values = [changes.get(name, x) for name, x in zip(names, function.__defaults__, strict=True)]
        patch.setattr(function, "__defaults__", tuple(values))

    return change


def keyword_default(function: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Tensor, *, factor: float = 0.5) -> Tensor:
        rows: Tensor = factor * self.intermediate_act_fn(self.dense(hidden_states))
        return rows

    patch.setattr(function, "__code__", forward.__code__)
    patch.setattr(function, "__kwdefaults__", forward.__kwdefaults__)


def what_a_decorator_holds(function: Any, patch: pytest.MonkeyPatch) -> None:
    (cell,) = (each for each in function.__closure__ if each.cell_contents is function.__wrapped__)
    patch.setattr(cell, "cell_contents", halved(cell.cell_contents))


def values_alone(function: Any, patch: pytest.MonkeyPatch) -> None:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return value.transpose(1, 2).contiguous(), None

    patch.setattr(function, "__code__", attend.__code__)
    patch.setattr(function, "__defaults__", None)


# A function of stock code, and what is changed in it: it stays the same object.
IN_PLACE: dict[str, tuple[Any, Any]] = {
    "a default of a model's": (inspect.unwrap(MPNetModel.forward), other_defaults(output_hidden_states=True)),
    "a keyword's default": (inspect.unwrap(mpnet.MPNetIntermediate.forward), keyword_default),
    "what a decorator holds": (hf.BertModel.forward, what_a_decorator_holds),
    "the code of an attention in its registry": (ALL_ATTENTION_FUNCTIONS["sdpa"], values_alone),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_a_function_is_made_of(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, change = IN_PLACE[what]
    of_mpnet = function.__module__ == mpnet.__name__
    stock = MPNetModel(MPNetConfig(vocab_size=300, **SMALL)).eval() if of_mpnet else models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    ids = models.ids(3, 11)
    with torch.no_grad():
        before = stock(ids)
        torch.testing.assert_close(fused(ids).to_tuple(), before.to_tuple(), rtol=1e-4, atol=1e-5)
        with monkeypatch.context() as patch:
            change(function, patch)
            expected, found, during = stock(ids), fused(ids), said(fused)
        after = fused(ids)
    told = len(expected) != len(before) or not torch.allclose(expected[0], before[0], atol=1e-2)
    assert told and found.keys() == expected.keys()
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=0)
    assert f".{function.__qualname__}, its defaults or" in during.reason
    assert during.stock_calls == {during.reason: 1}
    torch.testing.assert_close(after.to_tuple(), before.to_tuple(), rtol=1e-4, atol=1e-5)
    assert sum(said(fused).fused_calls.values()) == 2


@pytest.mark.parametrize("name", ["flatten", "view_as", "unbind", "to", "t"])
def test_methods_of_tensors_that_fastbert_calls(name: str) -> None:
    """Replaced by others, which stock code needn't call."""
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    method = getattr(Tensor, name)
    with replaced(Tensor, name, lambda x, *args, **kwargs: method(x, *args, **kwargs)):
        found, expected = last(fused), last(stock)
        assert f"Tensor.{name} is" in said(fused).reason
    assert torch.equal(found, expected)
    with replaced(Tensor, "a_method_of_ones_own", method), replaced(Tensor, "__str__", method):
        assert said(fused).reason is None
    torch.testing.assert_close(last(fused), before)
    assert sum(said(fused).fused_calls.values()) == 2


def test_a_function_of_another_module() -> None:
    """MPNet's scale is math.sqrt's."""
    stock = MPNetModel(MPNetConfig(vocab_size=300, **SMALL)).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    with replaced(math, "sqrt", halved(math.sqrt)):
        found, expected, reason = last(fused), last(stock), said(fused).reason
    assert torch.equal(found, expected) and not torch.allclose(found, before)
    assert reason.startswith("math.sqrt is")


def test_what_an_activation_calls() -> None:
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    for model in (stock, fused):
        model.encoder.layer[1].intermediate.intermediate_act_fn.act = lambda x: torch.softmax(x, 1)
    torch.testing.assert_close(last(fused), last(stock))
    assert not torch.allclose(last(fused), before)
    assert "GELUActivation whose `act` has been replaced" in said(fused).layers[1]


def test_a_replaced_pooler_runs_behind_fused_layers() -> None:
    stock = models.seeded(**SMALL)
    fused = fastbert.fuse(copy.deepcopy(stock))
    with replaced(hf.BertPooler, "forward", halved(hf.BertPooler.forward)), torch.no_grad():
        found, expected = (m(input_ids=models.ids(3, 11)).pooler_output for m in (fused, stock))
    torch.testing.assert_close(found, expected)
    assert sum(said(fused).fused_calls.values()) == 1


@pytest.mark.parametrize(
    ("owner", "name"), [(mpnet, "create_position_ids_from_input_ids"), (ModelOutput, "__getitem__")]
)
def test_what_a_model_calls_before_and_after_its_layers(owner: Any, name: str) -> None:
    torch.manual_seed(0)
    stock = MPNetModel(MPNetConfig(vocab_size=211, num_hidden_layers=2, **SMALL)).eval()
    fused, own = fastbert.fuse(copy.deepcopy(stock)), getattr(owner, name)
    ids = {"input_ids": models.ids(3, 11)}

    def turned(*args: Any) -> Any:
        return own(*args).flip(-1)

    with torch.no_grad():
        before = fused(**ids).last_hidden_state
        with replaced(owner, name, turned):
            expected, found, reason = *(m(**ids).pooler_output for m in (stock, fused)), said(fused).reason
            whole, theirs = (m(**ids).last_hidden_state for m in (fused, stock))
        assert torch.equal(found, expected) and torch.equal(whole, theirs) and name in reason
        torch.testing.assert_close(fused(**ids).last_hidden_state, before)


def test_the_function_of_an_activation() -> None:
    torch.manual_seed(0)
    stock = NomicBertModel(NomicBertConfig(vocab_size=211, num_hidden_layers=2, pad_token_id=0, **SMALL)).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    before = last(fused)
    with replaced(torch._C._nn, "silu", halved(torch._C._nn.silu)):
        expected, found = last(stock), last(fused)
    assert torch.equal(found, expected) and not torch.allclose(found, before, atol=1e-4)
    torch.testing.assert_close(last(fused), before)


@pytest.mark.parametrize(
    ("kind", "config", "owner"),
    [
        (DistilBertModel, DistilBertConfig(vocab_size=211, dim=32, hidden_dim=64, n_layers=2, n_heads=2), "FFN"),
        (MPNetModel, MPNetConfig(vocab_size=211, num_hidden_layers=2, **SMALL), "MPNetOutput"),
        (RobertaModel, RobertaConfig(vocab_size=211, num_hidden_layers=2, **SMALL), "RobertaLayer"),
    ],
)
@pytest.mark.parametrize("of_the_model", [False, True])
def test_other_families(kind: Any, config: Any, owner: str, of_the_model: bool) -> None:
    module = sys.modules[kind.__module__]
    patched = kind if of_the_model else getattr(module, owner)
    torch.manual_seed(0)
    stock = kind(config).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    last(fused)
    with replaced(patched, "forward", halved(patched.forward)):
        assert torch.equal(last(fused), last(stock))
        during = said(fused)
        assert f"{patched.__name__}.forward" in during.reason
        assert during.stock_calls == {during.reason: 1}
    torch.testing.assert_close(last(fused), last(stock), rtol=1e-4, atol=1e-5)
    assert sum(said(fused).fused_calls.values()) == 2


BEFORE = {
    "a method": """
        own = hf.BertSelfAttention.forward
        hf.BertSelfAttention.forward = lambda *a, **k: (own(*a, **k)[0] * 0.5, None)
        """,
    "a function": """
        own = hf.apply_chunking_to_forward
        hf.apply_chunking_to_forward = lambda *a: own(*a) * 0.5
        """,
    "a class": """
        class Own(hf.BertSelfOutput):
            def forward(self, *args):
                return super().forward(*args) * 0.5
        hf.BertSelfOutput = Own
        """,
    "a class of the same name": """
        class BertLayer(hf.BertLayer):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 0.5
        hf.BertLayer = BertLayer
        """,
    "torch's LayerNorm": """
        own = torch.nn.LayerNorm.forward
        torch.nn.LayerNorm.forward = lambda self, x: own(self, x) * 0.5
        """,
    "an activation by its name": """
        class Own(torch.nn.Module):
            def forward(self, x):
                return x.softmax(1)
        transformers.activations.ACT2FN["gelu"] = Own
        """,
}


def test_code_replaced_before_fastbert_is_imported() -> None:
    """In a process for each, forked from one that has imported the rest."""
    script = """
        import copy, os, sys, torch, transformers.activations
        from transformers.models.bert import modeling_bert as hf
        torch.set_num_threads(1)

        def check(patch):
            exec(patch, globals())
            import fastbert
            config = hf.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=64)
            stock = hf.BertModel(config).eval()
            fused = fastbert.fuse(copy.deepcopy(stock))
            ids = torch.arange(20).view(2, 10)
            with torch.inference_mode():
                torch.testing.assert_close(fused(ids)[0], stock(ids)[0])
                said = fastbert.explain(fused).encoders[0]
            assert said.reason and not said.fused_calls and said.stock_calls == {said.reason: 1}, said

        for patch in sys.argv[1:]:
            if not os.fork():
                check(patch)
                os._exit(0)
            assert os.wait()[1] == 0, patch
        """
    patches = map(textwrap.dedent, BEFORE.values())
    done = fresh.run("-c", textwrap.dedent(script), *patches)
    assert done.returncode == 0, done.stderr


def test_names_of_the_hubs_flash_attention_run_fused() -> None:
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    fused = fastbert.fuse(models.seeded(**SMALL))
    expected = last(fused)
    for name in flash.FLASH_ATTN_KERNEL_FALLBACK.values():
        fused.config._attn_implementation = name
        assert said(fused).reason is None
        assert torch.equal(last(fused), expected)
        flat = models.ragged([4, 7])
        assert last_flat(fused, flat).shape == (1, 11, 32)
    assert not said(fused).stock_calls
    fused.config._attn_implementation = "somebody/flash-attn2"
    assert said(fused).reason == "attention implementation 'somebody/flash-attn2'"


def last_flat(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**call)[0]
    return result


def test_reasons_name_the_module() -> None:
    class Linear4bit(nn.Linear):
        pass

    class Table(nn.Parameter):
        pass

    fused = fastbert.fuse(models.seeded(num_hidden_layers=4, **SMALL))
    layers = fused.encoder.layer
    layers[0].attention.self.query.__class__ = Linear4bit
    layers[1].output.LayerNorm.register_forward_hook(lambda *_: None)
    layers[2].output.dense.weight = Table(layers[2].output.dense.weight.detach())
    own = f"{__name__}.test_reasons_name_the_module.<locals>"
    assert said(fused).layers == {
        0: f"encoder.layer.0.attention.self.query is a {own}.Linear4bit",
        1: "encoder.layer.1.output.LayerNorm is a torch.nn.modules.normalization.LayerNorm with hooks, not a plain "
        "nn.LayerNorm with a weight",
        2: f"encoder.layer.2.output.dense is a torch.nn.modules.linear.Linear whose weight is a {own}.Table",
    }


def test_asking_whether_code_is_known_costs_microseconds() -> None:
    import time

    from fastbert.runtime import known

    fastbert.fuse(models.seeded(**SMALL))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        known.foreign("bert", "sdpa")
        times.append(time.perf_counter() - start)
    assert min(times) < 50e-6
