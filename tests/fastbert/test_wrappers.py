"""Wrappers of layers, encoders and forwards: what hands its arguments on is looked through, and goes on working."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.layers.layer import Bound
from tests import models

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "hidden_dropout_prob": 0.0}
CALL = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
REAL = models.masks(3, 11)["right"].bool()  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    torch._dynamo.reset()


def small(kind: Any = hf.BertModel) -> Any:
    return models.seeded(kind, attention_probs_dropout_prob=0.0, **SMALL)


def said(model: Any) -> Any:
    (encoder,) = fastbert.explain(model).encoders
    return encoder


def step(model: Any) -> dict[str, Tensor]:
    """The result at real tokens, and the gradients of a loss over it."""
    out = model(**CALL)[0][REAL]
    out.pow(2).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"out": out.detach(), **{plain(name): g for name, g in gradients.items()}}


def plain(name: str) -> str:
    for extra in ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace(extra, "")
    return name


def same(found: dict[str, Tensor], stock: Any) -> None:
    """Result and gradients are those of `stock`, by the policy; of a key's bias, which softmax doesn't see, there is
    none but of rounding."""
    steps = found, step(copy.deepcopy(stock)), step(copy.deepcopy(stock).double())
    assert found.keys() == steps[1].keys() and len(found) > 30
    models.assert_all_within_policy(
        *({name: x for name, x in each.items() if not name.endswith("key.bias")} for each in steps), "a step"
    )


def each_layer(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for i, layer in enumerate(model.encoder.layer):
            model.encoder.layer[i] = wrap(layer)
        return model

    return wrapped


def checkpointed(reentrant: bool) -> Callable[[Any], Any]:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT

    def wrapped(model: Any) -> Any:
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
        apply_activation_checkpointing(model, wrap, check_fn=lambda m: isinstance(m, hf.BertLayer))
        return model

    return wrapped


def by_regions(model: Any) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


def compiled_encoder(model: Any) -> Any:
    model.encoder = torch.compile(model.encoder, backend="eager")
    return model


def checkpointed_encoder(model: Any) -> Any:
    model.encoder = checkpoint_wrapper(model.encoder)
    return model


compiled = functools.partial(torch.compile, backend="eager")
WRAPS: dict[str, Callable[[Any], Any]] = {
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "offloaded": each_layer(offload_wrapper),
    "compiled layers": each_layer(compiled),
    "compiled, checkpointed layers": each_layer(lambda layer: compiled(checkpoint_wrapper(layer))),
    "compiled regions": by_regions,
    "checkpointed encoder": checkpointed_encoder,
    "compiled encoder": compiled_encoder,
}


@pytest.mark.parametrize(
    ("how", "first"),
    [
        pytest.param(how, first, marks=pytest.mark.slow if compiles and twice else ())
        for how in WRAPS
        for first in ("fuse", "wrap")
        for compiles in [how.startswith("compiled")]  # which takes seconds: one of them in both orders
        for twice in [how != "compiled layers" and (first == "fuse") is (how == "compiled regions")]
    ],
)
def test_wrapped_layers_run_fused_and_packed(how: str, first: str) -> None:
    stock = small().train()
    fused, wrap = copy.deepcopy(stock), WRAPS[how]
    fused = wrap(fastbert.fuse(fused)) if first == "fuse" else fastbert.fuse(wrap(fused))
    assert said(fused).reason is None and said(fused).layers == {}
    same(step(fused), stock)
    assert (said(fused).fused_calls, said(fused).stock_calls) == ({"packed": 1}, {})
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(**CALL)[0][REAL], stock.eval()(**CALL)[0][REAL], rtol=1e-4, atol=1e-5)
    assert (said(fused).fused_calls, said(fused).stock_calls) == ({"packed": 2}, {})


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_runs_again_in_the_backward_is_counted_once(reentrant: bool) -> None:
    """One that is checkpointed as a whole; and a compiled encoder that runs stock, by its reason."""
    model = fastbert.fuse(small().train())
    words = model.embeddings.word_embeddings(CALL["input_ids"]).detach().requires_grad_()

    def run(words: Tensor) -> Tensor:
        out: Tensor = model(inputs_embeds=words, attention_mask=CALL["attention_mask"]).last_hidden_state
        return out

    checkpoint(run, words, use_reentrant=reentrant).sum().backward()
    assert (said(model).fused_calls, said(model).stock_calls) == ({"packed": 1}, {})
    compiled_encoder(model)(**CALL, output_attentions=True)
    reason = "output_attentions, of which 'sdpa' attention gives none"
    assert (said(model).fused_calls, said(model).stock_calls) == ({"packed": 1}, {reason: 1})


@pytest.mark.parametrize("how", ["checkpointed", "compiled layers"])
def test_wrapped_layers_after_unfuse(how: str) -> None:
    stock = small().train()
    fused = fastbert.fuse(WRAPS[how](fastbert.fuse(copy.deepcopy(stock))))
    step(fused)
    same(step(fastbert.unfuse(fused)), stock)
    assert not any(type(m).__module__.startswith("fastbert") for m in fused.modules())


def test_checkpointing_is_still_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a layer computes nothing is kept, but what it is given: its forward runs again in the backward."""
    ran: list[int] = []
    fused = WRAPS["checkpointed"](fastbert.fuse(small().train()))
    train = Bound.train
    monkeypatch.setattr(Bound, "train", lambda *args: (ran.append(1), train(*args))[1])
    out = fused(**CALL)[0].sum()
    layers = len(fused.encoder.layer)
    assert len(ran) == layers
    out.backward()
    assert len(ran) == 2 * layers


def test_dropout_of_checkpointed_layers_is_the_same_again() -> None:
    fused = fastbert.fuse(models.seeded(**{**SMALL, "hidden_dropout_prob": 0.3}).train())
    wrapped = WRAPS["checkpointed"](copy.deepcopy(fused))
    results = []
    for model in (fused, wrapped):
        torch.manual_seed(0)
        results.append(step(model))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 30
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_a_submodule_replaced_inside_a_wrapper_is_honoured() -> None:
    stock = small()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        each_layer(checkpoint_wrapper)(model)
    with torch.no_grad():
        fused(**CALL), fused(**CALL)
        for model in (stock, fused):
            dense = model.encoder.layer[1]._checkpoint_wrapped_module.output.dense
            dense.register_forward_hook(lambda module, args, out: out * 2)
        torch.testing.assert_close(fused(**CALL)[0], stock(**CALL)[0], rtol=1e-4, atol=1e-5)
    assert list(said(fused).layers) == [1]
    assert "encoder.layer.1.output.dense" in said(fused).layers[1]


def test_a_hook_on_a_wrapper_sees_stocks_shape() -> None:
    fused = each_layer(checkpoint_wrapper)(fastbert.fuse(small()))
    shapes: list[Any] = []
    fused.encoder.layer[1].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    fused(**CALL)
    assert shapes == [(3, 11, 32)]
    assert said(fused).fused_calls == {"dense": 1}


class Own(nn.Module):
    """It turns rows around: wrong on any layout but stock's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden_states.flip(1), *args, **kwargs)


class CheckpointWrapper(Own):
    """Named as one that is known."""


@pytest.mark.parametrize("kind", [Own, CheckpointWrapper])
def test_an_unknown_wrapper_runs_stock_and_is_named(kind: Any) -> None:
    stock = small()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        model.encoder.layer[1] = kind(model.encoder.layer[1])
    with torch.no_grad():
        torch.testing.assert_close(fused(**CALL)[0], stock(**CALL)[0], rtol=1e-4, atol=1e-5)
    assert said(fused).layers == {1: f"encoder.layer.1 is a custom {__name__}.{kind.__name__}"}
    assert said(fused).fused_calls == {"dense": 1}


def test_in_8_bits_wrapped_layers_run_in_the_models_dtype() -> None:
    stock = models.seeded()
    plain = fastbert.fuse(each_layer(checkpoint_wrapper)(copy.deepcopy(stock)))
    fused = each_layer(checkpoint_wrapper)(fastbert.fuse(stock, precision="fp8"))
    with torch.no_grad():
        assert torch.equal(fused(**CALL)[0], plain(**CALL)[0])


# Forwards.


def prepared(model: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # which other tests have made in another precision
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def bound(model: Any) -> Any:
    """As a decorator around the function of the class leaves it."""
    function = model.forward.__func__

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    return model


def in_a_closure(model: Any) -> Any:
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


def in_a_partial(model: Any) -> Any:
    model.forward = functools.partial(model.forward, output_attentions=False)
    return model


class Called:
    """As an object that is called, in its attribute."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def in_an_object(model: Any) -> Any:
    model.forward = Called(model.forward)
    return model


def autocast(model: Any) -> Any:
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)
    return model


def twice(model: Any) -> Any:
    return compiled_forward(prepared(model))


FORWARDS = [prepared, compiled_forward, bound, in_a_closure, in_a_partial, in_an_object, autocast, twice]


def result(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**CALL)[0]
    return out if out.dim() == 2 else out[REAL]


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        pytest.param(kind, wrap, marks=[pytest.mark.slow] * (wrap is twice or slow))
        for kind in (hf.BertModel, hf.BertForSequenceClassification)
        for wrap in FORWARDS
        for slow in [wrap is compiled_forward and kind is hf.BertModel]  # what compiles takes seconds
    ],
)
def test_a_wrapped_forward_goes_on_to_the_right_one(wrap: Any, kind: Any) -> None:
    """After fuse and after unfuse, whichever came first; and what `explain` says is what happens."""
    stock = small(kind)
    expected = result(wrap(copy.deepcopy(stock)))
    close = {"rtol": 3e-2, "atol": 3e-2} if wrap in (prepared, twice) else {"rtol": 1e-4, "atol": 1e-5}
    is_compiled = wrap in (compiled_forward, twice)
    for first in ("fuse", "wrap"):
        model = copy.deepcopy(stock)
        model = wrap(fastbert.fuse(model)) if first == "fuse" else fastbert.fuse(wrap(model))
        assert said(model).reason is None
        torch.testing.assert_close(result(model), expected, **close)
        assert said(model).stock_calls == {}
        assert is_compiled or sum(said(model).fused_calls.values()) == 1  # compiled calls are not counted
        assert fastbert.unfuse(model) is model
        torch.testing.assert_close(result(model), expected, **close)
        fastbert.fuse(model)
        torch.testing.assert_close(result(model), expected, **close)
        assert said(model).stock_calls == {}
        assert is_compiled or sum(said(model).fused_calls.values()) == 1  # compiled calls are not counted


@pytest.mark.parametrize("wrap", [compiled_forward, autocast])
@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_a_wrapped_forward_of_a_layer_or_the_encoder(wrap: Any, first: str) -> None:
    stock = small()
    expected = result(stock)
    model = fastbert.fuse(copy.deepcopy(stock)) if first == "fuse" else copy.deepcopy(stock)
    for module in (model.encoder.layer[0], model.encoder):
        wrap(module)
    fastbert.fuse(model)
    assert (said(model).reason, said(model).layers) == (None, {})
    torch.testing.assert_close(result(model), expected, rtol=1e-4, atol=1e-5)
    assert (said(model).fused_calls, said(model).stock_calls) == ({"packed": 1}, {})
    torch.testing.assert_close(result(fastbert.unfuse(model)), expected, rtol=1e-4, atol=1e-5)


def test_wrapped_forwards_inside_a_compiled_model() -> None:
    """What the wrapper holds was looked at, of which the compiler then knew no more how to call it."""
    stock = small()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        in_a_closure(model.embeddings)
        bound(model.encoder.layer[1])
    expected = result(stock)
    fused.forward = torch.compile(fused.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(result(fused), expected, rtol=1e-4, atol=1e-5)


def test_layers_compiled_in_place_run_fused() -> None:
    stock = small()
    model = fastbert.fuse(copy.deepcopy(stock))
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(result(model), result(stock), rtol=1e-4, atol=1e-5)
    assert said(model).fused_calls == {"packed": 2}


@pytest.mark.parametrize("name", ["encoder.layer.0", "encoder"])
def test_an_unknown_forward_of_a_layer_or_the_encoder_runs_stock(name: str) -> None:
    stock = small()
    model = fastbert.fuse(copy.deepcopy(stock))
    for each in (stock, model):
        module = each.get_submodule(name)
        inner = module.forward
        module.forward = lambda hidden, *args, _inner=inner, **kwargs: _inner(hidden.flip(1), *args, **kwargs)
    torch.testing.assert_close(result(model), result(stock), rtol=1e-4, atol=1e-5)
    assert "packed" not in said(model).fused_calls


def test_a_forward_kept_elsewhere_works_after_unfuse() -> None:
    stock = small()
    fused = fastbert.fuse(copy.deepcopy(stock))
    kept = [fused.forward, fused.encoder.forward, fused.encoder.layer[0].forward, fused.embeddings.forward]
    fastbert.unfuse(fused)
    hidden = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(kept[0](**CALL)[0], stock(**CALL)[0])
        assert torch.equal(kept[1](hidden)[0], stock.encoder(hidden)[0])
        assert torch.equal(kept[2](hidden), stock.encoder.layer[0](hidden))
        assert torch.equal(kept[3](CALL["input_ids"]), stock.embeddings(CALL["input_ids"]))


def test_a_wrapped_forward_that_can_not_be_followed_runs_stock_and_says_so() -> None:
    """One that looks the function up by name: it goes past the fused one, or to it."""
    stock = small()
    past = fastbert.fuse(copy.deepcopy(stock))
    past.forward = lambda *args, **kwargs: hf.BertModel.forward(past, *args, **kwargs)
    through = fastbert.fuse(copy.deepcopy(stock))
    through.forward = lambda *args, **kwargs: type(through).forward(through, *args, **kwargs)
    for model in (past, through):
        reason = said(model).reason
        assert reason is not None and "forward" in reason and __name__ in reason
        torch.testing.assert_close(result(model), result(stock), rtol=1e-4, atol=1e-5)
        assert said(model).fused_calls == {} and sum(said(model).stock_calls.values()) == 1


def test_an_unknown_wrapper_of_a_forward_may_read_padding() -> None:
    stock = small()
    models_ = [fastbert.fuse(copy.deepcopy(stock)), stock]
    for model in models_:
        inner = model.forward
        model.forward = lambda *args, _inner=inner, **kwargs: _inner(*args, **kwargs)[0].mean(1, keepdim=True)
    with torch.no_grad():
        found, expected = (model(**CALL) for model in models_)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert said(models_[0]).fused_calls == {"dense": 1}


def test_what_is_copied_from_stays_as_it_is() -> None:
    """Two models that share a decorated function of the class: one is fused."""
    stock = small()
    forward = functools.wraps(hf.BertModel.forward)(lambda self, *args, **kwargs: decorated(self, *args, **kwargs))
    decorated = hf.BertModel.forward
    one, other = copy.deepcopy(stock), copy.deepcopy(stock)
    one.forward, other.forward = MethodType(forward, one), MethodType(forward, other)
    fastbert.fuse(one)
    assert other.forward.__func__ is forward
    for model in (one, other):
        torch.testing.assert_close(result(model), result(stock), rtol=1e-4, atol=1e-5)
    assert sum(said(one).fused_calls.values()) == 1


def test_an_interrupted_fuse_leaves_wrapped_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastbert import fuse as _  # noqa: F401

    model = prepared(small())
    before = dict(vars(model))
    monkeypatch.setattr(sys.modules["fastbert.fuse"], "_fuse", _interrupted(sys.modules["fastbert.fuse"]))
    with pytest.raises(KeyboardInterrupt):
        fastbert.fuse(model)
    assert all(vars(model)[name] is before[name] for name in ("forward", "_original_forward"))


def _interrupted(module: Any) -> Callable[..., None]:
    own = module._fuse

    def fuse_base(*args: Any) -> None:
        own(*args)
        raise KeyboardInterrupt

    return fuse_base


@pytest.mark.parametrize("place", ["encoder", "encoder.layer.1", "embeddings"])
@pytest.mark.parametrize("wrap", [functools.partial, functools.partial(torch.compile, backend="eager")])
def test_stock_code_is_what_a_wrapper_held(wrap: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose forward is replaced later: stock calls the one that the wrapper got hold of before."""
    stock, fused = small(), small()
    for model in (stock, fused):
        module = model.get_submodule(place)
        module.forward = wrap(module.forward)
    fastbert.fuse(fused)
    kind = type(stock.get_submodule(place))
    own = kind.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        return 2 * found if isinstance(found, torch.Tensor) else type(found)(last_hidden_state=2 * found[0])

    monkeypatch.setattr(kind, "forward", patched)
    with torch.no_grad():
        expected = stock(**CALL)[0]
        torch.testing.assert_close(fused(**CALL)[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fastbert.unfuse(fused)(**CALL)[0], expected, rtol=1e-4, atol=1e-5)
