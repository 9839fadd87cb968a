"""What changes a call, or reads what comes of it, behind the back of what is known: by values that would be wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import DebertaV2Model, MPNetModel, masking_utils, modeling_layers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as hf
from transformers.models.roberta import modeling_roberta as roberta

import fastbert
from tests import models

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "hidden_dropout_prob": 0.0}
CALL = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
REAL = models.masks(3, 11)["right"].bool()  # type: ignore[union-attr]
LABELS = torch.arange(33).view(3, 11) % 2

Change = Callable[[Any], None]


def small(kind: Any = hf.BertForTokenClassification) -> Any:
    return models.seeded(kind, **SMALL)


def ran(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    said = fastbert.explain(model).encoders[0]
    return said.fused_calls, said.stock_calls


def answers(model: Any, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        found = model(**CALL, **more)
    return [*([] if found.loss is None else [found.loss]), found.logits[REAL]]


def agree(stock: Any, fused: Any, **more: Any) -> None:
    said = fastbert.explain(fused).encoders[0]
    for ours, theirs in zip(answers(fused, **more), answers(stock, **more), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    layouts, reasons = ran(fused)
    assert bool(reasons) == (said.reason is not None)
    assert said.dense is None or "packed" not in layouts


def both(change: Change, when: str, kind: Any = hf.BertForTokenClassification) -> tuple[Any, Any]:
    """A stock and a fused model, changed before or after `fuse`."""
    stock, fused = small(kind), small(kind)
    if when == "after":
        fastbert.fuse(fused)
    change(stock)
    change(fused)
    return stock, fused if when == "after" else fastbert.fuse(fused)


class Edits:
    """A callable around a forward, which centres over all rows what that returns."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.inner(*args, **kwargs)
        return rows - rows.mean(1, keepdim=True)


class Blind(Edits):
    """One that calls a layer without its mask."""

    def __call__(self, hidden_states: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden_states, None, *args, **kwargs)


def object_on_a_head(model: Any) -> None:
    model.classifier.forward = Edits(model.classifier.forward)


def object_on_a_layer(model: Any) -> None:
    layer = model.bert.encoder.layer[0]
    layer.forward = Blind(layer.forward)


def labels_by_a_partial(model: Any) -> None:
    model.forward = functools.partial(model.forward, labels=LABELS)


def labels_by_a_hook(model: Any) -> None:
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "labels": LABELS}), with_kwargs=True)


def hook_on_a_wrapper(model: Any) -> None:
    model.classifier = checkpoint_wrapper(model.classifier)
    model.classifier.register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(1, keepdim=True),))


def without_mask(module: Any, hidden_states: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    return module(hidden_states, None, *args, **kwargs)


def checkpointed_without_mask(model: Any) -> None:
    layers = model.bert.encoder.layer
    layers[0] = checkpoint_wrapper(layers[0], checkpoint_fn=without_mask)


def checkpointed_by_a_reader(model: Any) -> None:
    def read(module: Any, rows: Tensor) -> Tensor:
        return module(rows - rows.mean(1, keepdim=True))

    model.classifier = checkpoint_wrapper(model.classifier, checkpoint_fn=read)


def forward_of_a_wrapper(model: Any) -> None:
    layers = model.bert.encoder.layer
    wrapper: Any = checkpoint_wrapper(layers[0])
    wrapper.forward = lambda rows, mask=None, *args, **kwargs: type(wrapper).forward(wrapper, rows, None)
    layers[0] = wrapper


def norm_over_tokens(model: Any) -> None:
    model.classifier = nn.Sequential(nn.LayerNorm((11, 32)), model.classifier)


def causal_by_a_method(model: Any) -> None:
    own = model.bert._create_attention_masks

    def causal(*args: Any, **kwargs: Any) -> Any:
        return torch.ones(11, 11, dtype=torch.bool).tril().expand(3, 1, 11, 11), own(*args, **kwargs)[1]

    model.bert._create_attention_masks = causal


def attention_of_one_layer(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "values alone"


CHANGES = (
    object_on_a_head,
    object_on_a_layer,
    labels_by_a_partial,
    labels_by_a_hook,
    hook_on_a_wrapper,
    checkpointed_without_mask,
    checkpointed_by_a_reader,
    forward_of_a_wrapper,
    norm_over_tokens,
    causal_by_a_method,
    attention_of_one_layer,
)


@pytest.fixture
def values_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return value.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["values alone"] = attend
    yield
    del ALL_ATTENTION_FUNCTIONS["values alone"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_change(change: Change, when: str, values_alone: None) -> None:
    stock, fused = both(change, when)
    agree(stock, fused)
    assert answers(small())[-1].ne(answers(stock)[-1]).any() or "labels" in change.__name__
    agree(stock, fused)  # and as often as it is called


def test_labels_that_a_hook_makes_are_told_from_the_second_call_on() -> None:
    ignored = torch.where(REAL, LABELS, -100)
    _, fused = both(lambda model: None, "after")
    fused.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "labels": ignored}), with_kwargs=True)
    assert "hooked after fuse" in str(fastbert.explain(fused).encoders[0].dense)
    for _ in range(3):
        answers(fused)
    assert ran(fused) == ({"dense": 1, "packed": 2}, {})
    assert fastbert.explain(fused).encoders[0].dense is None


def test_a_method_of_roberta_embeddings() -> None:
    def backwards(ids: Tensor, padding_idx: int, *_: Any) -> Tensor:
        return (torch.arange(ids.shape[1]).flip(0) + padding_idx + 1).expand(ids.shape)

    def change(model: Any) -> None:
        model.roberta.embeddings.create_position_ids_from_input_ids = backwards

    stock, fused = both(change, "after", roberta.RobertaForTokenClassification)
    agree(stock, fused)


class Chance(nn.ModuleList):
    """Layers of which every other time one is left out."""

    times = 0

    def __iter__(self) -> Iterator[nn.Module]:
        self.times += 1
        return iter(list(self._modules.values())[: 1 + self.times % 2])


def test_layers_that_are_left_out_by_chance() -> None:
    def change(model: Any) -> None:
        model.bert.encoder.layer = Chance(list(model.bert.encoder.layer))

    stock, fused = both(change, "after")
    for _ in range(2):
        stock.bert.encoder.layer.times = fused.bert.encoder.layer.times = 0
        agree(stock, fused)
    assert "Chance" in next(iter(ran(fused)[1]))


def test_losses_of_labelled_tokens_behind_a_norm_over_all() -> None:
    stock, fused = small(hf.BertForMaskedLM), small(hf.BertForMaskedLM)
    for model in (stock, fused):
        model.cls.predictions.transform.LayerNorm = nn.LayerNorm((11, 32))
    fastbert.fuse(fused, loss_only=True)
    agree(stock, fused, labels=torch.where(REAL, LABELS, -100))


# Code that takes part without being of the family's own classes.


class Halved(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return 0.5 * out if getattr(function, "__name__", "") == "gelu" else out


class Clamped(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out.clamp(-0.5, 0.5) if function is torch.ops.aten.addmm.default else out


class Normed(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return (0.5 * out[0], *out[1:]) if function is torch.ops.aten.native_layer_norm.default else out


class OnAClass:
    """A method of a class that is no function."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        return 0.5 * self.inner(layer, x)

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        return lambda x: self(layer, x)


def no_mask(self: Any, hidden_states: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    return nn.Module.__call__(self, hidden_states, None, *args, **kwargs)


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextlib.contextmanager
def mask_registered() -> Iterator[None]:
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: None
    yield
    del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


PATCHES: dict[str, Callable[[], Any]] = {
    "a function mode": Halved,
    "a dispatch mode": Clamped,
    "one of norms": Normed,
    "no function": lambda: put(hf.BertLayer, "feed_forward_chunk", OnAClass(hf.BertLayer.feed_forward_chunk)),
    "a class derived from": lambda: put(modeling_layers.GradientCheckpointingLayer, "__call__", no_mask),
    "a mask in its registry": mask_registered,
    "what makes masks": lambda: put(masking_utils, "bidirectional_mask_function", lambda b, h, q, k: q >= k),
}


@pytest.mark.parametrize("first", ["patch", "fuse"])
@pytest.mark.parametrize("what", PATCHES)
def test_one_patch(what: str, first: str) -> None:
    stock, fused = small(), small()
    before = answers(stock)[-1]
    if first == "fuse":
        fastbert.fuse(fused)
    with PATCHES[what]():
        fastbert.fuse(fused)
        agree(stock, fused)
        assert answers(stock)[-1].ne(before).any()
        assert fastbert.explain(fused).encoders[0].reason is not None
    torch.testing.assert_close(answers(fused)[-1], before, rtol=1e-4, atol=1e-5)
    assert ran(fused)[0] == {"packed": 1}


def test_flops_are_counted_as_of_stock() -> None:
    counted = []
    stock, fused = small(), fastbert.fuse(small())
    for model in (stock, fused):
        with FlopCounterMode(display=False) as counter:
            answers(model)
        counted.append(counter.get_total_flops())
    assert counted[1] == counted[0] > 0
    assert ran(fused)[0] == {}


@pytest.mark.parametrize("mode", [Clamped, functools.partial(FlopCounterMode, display=False)])
def test_a_dispatch_mode_around_the_backward_alone_is_told(mode: Any) -> None:
    """It would see operators of fastbert's, not those that it counts or replaces."""
    model = fastbert.fuse(small()).train()
    loss = model(**CALL)[0].sum()
    with mode(), pytest.raises(RuntimeError, match=r"under a \S+, which .*; enter the mode before the forward"):
        loss.backward()
    with mode():
        model(**CALL)[0].sum().backward()
    assert ran(model)[0] == {"packed": 1} and sum(ran(model)[1].values()) == 1


def test_a_selective_checkpoint_runs_fused() -> None:
    """Its gradients are those of the fused model without one, to the bit."""
    ways = create_selective_checkpoint_contexts
    context = functools.partial(ways, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    model, gradients = fastbert.fuse(small()), []
    for run in (model, functools.partial(checkpoint, model, use_reentrant=False, context_fn=context)):
        model.zero_grad()
        run(**CALL).logits[REAL].sum().backward()
        gradients.append(model.bert.embeddings.word_embeddings.weight.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].any()
    assert ran(model)[1] == {}


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_one_row_for_more_sequences(implementation: str, kept: int) -> None:
    mask = torch.ones(1, 11, dtype=torch.int64)
    mask[0, 11 - kept :] = 0
    found = []
    for model in (small(), fastbert.fuse(small())):
        model.set_attn_implementation(implementation)
        try:
            found.append(model(input_ids=CALL["input_ids"], attention_mask=mask).logits)
        except IndexError as error:  # of transformers, where a mask hides something
            found.append(str(error))
    assert ran(model) == ({}, {"an attention_mask of one row for more sequences": 1})
    assert torch.equal(*found) if kept == 0 else found[0] == found[1]


def test_the_mode_of_a_device_runs_fused() -> None:
    fused = fastbert.fuse(small())
    with torch.device("cpu"):
        answers(fused)
    assert ran(fused) == ({"packed": 1}, {})


class Mean(nn.Module):
    """Around a base model: the mean of all rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments: Any) -> Tensor:
        return self.inner(**arguments)[0].mean(1)


def pair() -> tuple[Any, Any]:
    """Two modules around one base model, of which the first reads padding."""
    head = small(hf.BertForSequenceClassification)
    return Mean(head.bert), head


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_two_models_share_a_base_model(order: tuple[int, ...]) -> None:
    fused = pair()
    for each in order:
        fastbert.fuse(fused[each])
    with torch.no_grad():
        torch.testing.assert_close(fused[0](**CALL), pair()[0](**CALL), rtol=1e-4, atol=1e-5)
    assert ran(fused[0])[0] == {"dense": 1}


@pytest.mark.parametrize("inner", ["fuse", "unfuse, fuse"])
def test_a_part_is_fused_again(inner: str) -> None:
    fused = fastbert.fuse(pair()[0])
    if inner != "fuse":
        fastbert.unfuse(fused)
        fastbert.fuse(fused)
    fastbert.fuse(fused.inner, loss_only=True)
    with torch.no_grad():
        torch.testing.assert_close(fused(**CALL), pair()[0](**CALL), rtol=1e-4, atol=1e-5)
    assert ran(fused)[0] == {"dense": 1}
    assert "Mean" in str(fastbert.explain(fused).encoders[0].dense)


def test_a_base_model_of_another_class_since() -> None:
    class Own(hf.BertModel):
        pass

    fused = fastbert.fuse(small())
    fused.bert.__class__ = Own
    assert fastbert.explain(fused).encoders[0].reason is not None
    for ours, theirs in zip(answers(fused), answers(small()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Doubling(Tensor):
    """Its linear layers give twice what torch's do; what is computed of it is of it, too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is nn.functional.linear else result


@pytest.mark.parametrize("where", ["inputs_embeds", "a table", "a layer"])
def test_a_tensor_subclass_that_changes_functions(where: str) -> None:
    stock = models.seeded(num_hidden_layers=3).eval()
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    ids, mask = models.ids(2, 9), models.masks(2, 9)["right"]
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if where == "inputs_embeds":
        embeds = stock.embeddings.word_embeddings(ids).detach()
        call = {"inputs_embeds": embeds.as_subclass(Doubling), "attention_mask": mask}
    for model in (stock, fused):
        module = model.embeddings.word_embeddings if where == "a table" else model.encoder.layer[1].output.dense
        if where != "inputs_embeds":
            weight = module.weight.detach().as_subclass(Doubling)
            del module.weight
            module.weight = weight
    with torch.no_grad():
        found, expected = (model(**call).last_hidden_state.as_subclass(Tensor) for model in (fused, stock))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


# What an encoder has beside its layers, and makes of rows that lie otherwise than stock's: a table of distances, a
# convolution. And embeddings in front of one, which stock has read padding.


class Summing(nn.Embedding):
    """Over what it looks up."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).cumsum(0)


class Raised(nn.Module):
    """Around embeddings: rows at padding aren't zeros."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.word_embeddings = inner, inner.word_embeddings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) + 1


def over_rows(module: Any, args: Any, out: Tensor) -> Tensor:
    return out * (1 + 9 * out.abs().mean((0, 1), keepdim=True))


def table_derived(encoder: Any) -> None:
    encoder.relative_attention_bias.__class__ = Summing


def gradients_scaled(encoder: Any) -> None:
    encoder.relative_attention_bias.scale_grad_by_freq = True


def method_of_a_convolution(encoder: Any) -> None:
    inner = encoder.conv.forward
    encoder.conv.forward = lambda first, *args: inner(first, *args) + first.mean(1, keepdim=True)


def over_tokens(encoder: Any) -> None:
    encoder.conv.conv.register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(2, keepdim=True),))


BESIDE: dict[str, tuple[Any, Change]] = {
    "a hook on a table": (MPNetModel, lambda m: m.encoder.relative_attention_bias.register_forward_hook(over_rows)),
    "a table derived": (MPNetModel, lambda m: table_derived(m.encoder)),
    "gradients of a table": (MPNetModel, lambda m: gradients_scaled(m.encoder)),
    "a hook on a convolution": (DebertaV2Model, lambda m: m.encoder.conv.register_forward_hook(over_rows)),
    "a hook in a convolution": (DebertaV2Model, lambda m: over_tokens(m.encoder)),
    "a convolution's forward": (DebertaV2Model, lambda m: method_of_a_convolution(m.encoder)),
    "a convolution in a circle": (DebertaV2Model, lambda m: setattr(m.encoder.conv.conv, "padding_mode", "circular")),
    "embeddings before a convolution": (DebertaV2Model, lambda m: setattr(m, "embeddings", Raised(m.embeddings))),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_layers(what: str, when: str) -> None:
    kind, change = BESIDE[what]
    sizes = {**SMALL, "vocab_size": 300, "num_hidden_layers": 2, "attention_probs_dropout_prob": 0.0}
    if kind is DebertaV2Model:
        sizes |= {"conv_kernel_size": 3, "conv_act": "gelu", "relative_attention": True, "pos_att_type": ["c2p"]}
    torch.manual_seed(0)
    stock = kind(kind.config_class(**sizes)).eval()
    for parameter in stock.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    fused, plain, found = copy.deepcopy(stock), copy.deepcopy(stock), []
    if when == "after":
        fastbert.fuse(fused, padding="packed")(**CALL)
    for model in (stock, fused):
        change(model)
    fastbert.fuse(fused, padding="packed")
    before, reason = ran(fused)[0], fastbert.explain(fused).encoders[0].reason
    for model in (fused, stock, plain):
        model.zero_grad()
        rows = model(**CALL)[0][REAL]
        rows.square().sum().backward()
        found.append([rows, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(found[1], found[2], strict=True))
    if what.startswith("embeddings"):
        assert reason is None and ran(fused)[0]["dense"] == 1
    else:
        assert reason is not None and ran(fused) == (before, {reason: 1})


def test_a_convolution_packs() -> None:
    config = DebertaV2Model.config_class(vocab_size=300, num_hidden_layers=2, conv_kernel_size=3, **SMALL)
    fused = fastbert.fuse(DebertaV2Model(config).eval())
    fused(**CALL)
    assert ran(fused) == ({"packed": 1}, {})


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("encoder", marks=pytest.mark.slow),
        pytest.param("encoder.layer.1", marks=pytest.mark.slow),
        pytest.param("encoder.layer.0.attention.self", marks=pytest.mark.slow),
        pytest.param("encoder.layer.0.attention.output.LayerNorm", marks=pytest.mark.slow),
        pytest.param("encoder.layer.1.output.dense", marks=pytest.mark.slow),
        pytest.param("encoder.layer.1.intermediate.intermediate_act_fn", marks=pytest.mark.slow),
        "embeddings.LayerNorm",
        pytest.param("embeddings", marks=pytest.mark.slow),
    ],
)
def test_a_forward_that_is_replaced_after_it_was_compiled(path: str) -> None:
    found = []
    stock = models.seeded(hf.BertModel, **SMALL)
    for model in (copy.deepcopy(stock), fastbert.fuse(copy.deepcopy(stock))):
        compiled = torch.compile(model, backend="eager")
        module = model.get_submodule(path)
        own = module.forward

        def halved(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            if isinstance(out, tuple):
                return out[0] * 0.5, *out[1:]
            return out * 0.5 if isinstance(out, Tensor) else type(out)(last_hidden_state=out[0] * 0.5)

        with torch.no_grad():
            before = compiled(CALL["input_ids"])[0]
            module.forward = halved
            found.append((before, compiled(CALL["input_ids"])[0]))
    (before, after), (fused_before, fused_after) = found
    torch.testing.assert_close(fused_before, before)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(fused_after, after)
