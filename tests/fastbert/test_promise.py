"""The promise, over models that nobody wrote: composed of known and unknown readers, replaced and patched parts, hooks
at every level and wrapped forwards, before or after `fuse`, one by one and drawn by hypothesis.

A fused model equals stock at real tokens and wherever something reads, or it raises before anything is computed; and
`explain` says beforehand how the call is then counted. In float64, which runs fused here alone: no error can hide.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as hf
from transformers.utils import ModelOutput

import fastbert
from fastbert.runtime import support
from tests import models

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROWS, LENGTH = 4, 11
MASKS = ["none", "full", "right", "left", "holes"]


@pytest.fixture(autouse=True)
def float64_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "DTYPES", (*support.DTYPES, torch.float64))


# What is composed: a base model, and who reads its output


class Reader(nn.Module):
    """A module around a base model that `fuse` can't know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.read(self.inner(input_ids, attention_mask=attention_mask)[0], attention_mask)

    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class MeanOfAll(Reader):
    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(rows.mean(1))


class MeanOfReal(Reader):
    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        weights = rows.new_ones(rows.shape[:2]) if mask is None else mask.to(rows.dtype)
        return self.out((rows * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


class Neighbours(Reader):
    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(rows + rows.roll(1, 1) + rows.roll(-1, 1))


class Directions(Reader):
    """Of a row of zeros it makes NaN, as the next two do."""

    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(rows / rows.norm(dim=-1, keepdim=True))


class Standardised(Reader):
    """Masked after: NaN times zero is NaN."""

    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        rows = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, keepdim=True)
        return self.out(rows if mask is None else rows * mask[..., None])


class Similarities(Reader):
    """Of all rows to all, those to padding left out by a product."""

    def read(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        lengths = rows.norm(dim=-1)
        cosines = rows @ rows.mT / (lengths[:, :, None] * lengths[:, None, :])
        return self.out((cosines if mask is None else cosines * mask[:, None, :]) @ rows)


class Recurrent(nn.Module):
    """A BiLSTM in place of a linear layer."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(width, 8, batch_first=True, bidirectional=True), nn.Linear(16, labels)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.rnn(rows)[0])


HEADS = (
    hf.BertModel,
    hf.BertForMaskedLM,
    hf.BertForPreTraining,
    hf.BertForTokenClassification,
    hf.BertForSequenceClassification,
    hf.BertForQuestionAnswering,
    hf.BertForNextSentencePrediction,
)
READERS = (MeanOfAll, MeanOfReal, Neighbours, Directions, Standardised, Similarities)
KINDS = {kind.__name__: kind for kind in (*HEADS, *READERS)}


def composed(kind: str, attention: str = "sdpa") -> Any:
    """A model of that kind, the same at each call."""
    changes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    make = KINDS[kind]
    whole = make if make in HEADS else hf.BertModel
    model = models.seeded(whole, num_labels=3, attn_implementation=attention, **changes, **rates)
    if make in READERS:
        torch.manual_seed(0)
        model = make(model).eval()
    return model.double()


def base_of(model: Any) -> Any:
    """The base model inside `model`, whatever is wrapped around it."""
    return next(module for module in model.modules() if isinstance(module, hf.BertModel))


def part(model: Any, name: str) -> Any:
    """A module of the base model by its path, wrappers looked through; "head" is the whole model."""
    module = model if name == "head" else base_of(model)
    for step in name.split(".") if name not in ("head", "base") else ():
        for wrapper in ("_checkpoint_wrapped_module", "_orig_mod"):
            module = module._modules.get(wrapper, module)
        module = getattr(module, step)
    return module


def put(model: Any, name: str, module: Any) -> None:
    """Puts a module in place of a part."""
    holder, _, last = name.rpartition(".")
    setattr(part(model, holder or "base"), last, module)


def scaled(x: Any) -> Any:
    """What a module returned, or is given, scaled."""
    if isinstance(x, ModelOutput):
        first = next(iter(x))
        x[first] = scaled(x[first])
        return x
    if isinstance(x, tuple):
        return (scaled(x[0]), *x[1:]) if x else x
    return 0.9 * x if isinstance(x, Tensor) and x.is_floating_point() else x


# What is done to it. A change is made to the stock model and to the fused one, each with what it sees of its own.

Seen = list[Any]
Change = Callable[[Any, Seen], Any]
PARTS = (
    "head",
    "base",
    "embeddings",
    "embeddings.word_embeddings",
    "embeddings.LayerNorm",
    "encoder",
    "encoder.layer.1",
    "encoder.layer.0.attention",
    "encoder.layer.0.attention.self",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.attention.output.dropout",
    "encoder.layer.1.intermediate.intermediate_act_fn",
    "encoder.layer.1.output",
    "encoder.layer.1.output.LayerNorm",
)


def first_float(*found: Any) -> Tensor | None:
    """The first floating-point tensor of what a hook is shown."""
    for x in found:
        values = tuple(x.values()) if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().clone()
    return None


def hooked(name: str, when: str, edits: bool, with_kwargs: bool = False) -> Change:
    """A hook before or after a part, which notes what it is shown."""

    def change(model: Any, seen: Seen) -> None:
        def before(module: Any, args: Any, kwargs: Any = None) -> Any:
            if name.startswith("encoder.layer"):  # below, stock hands over arguments by name, in an order of its own
                seen.append(len(args))
            seen.append(first_float(args, kwargs or {}))
            if not edits:
                return None
            return (scaled(args), kwargs) if with_kwargs else scaled(args)

        def after(module: Any, args: Any, *kwargs_and_output: Any) -> Any:
            output = kwargs_and_output[-1]
            seen.append(first_float(output))
            return scaled(output) if edits else None

        module = part(model, name)
        if when == "before":
            module.register_forward_pre_hook(before, with_kwargs=with_kwargs)
        elif when == "after":
            module.register_forward_hook(after, with_kwargs=with_kwargs)
        else:
            module.register_full_backward_hook(lambda module, back, grads: seen.append(first_float(back)))

    return change


def mask_edited(model: Any, seen: Seen) -> None:
    """Attention knockout: nobody in one layer sees token 2."""

    def cut(layer: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = list(args), dict(kwargs)
        held, key = (args, 1) if len(args) > 1 else (kwargs, "attention_mask")
        mask = held.get(key) if isinstance(held, dict) else held[key]
        if mask is None:
            mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
        held[key] = mask.clone().index_fill_(-1, torch.tensor([2]), False if mask.dtype is torch.bool else -1e30)
        return tuple(args), kwargs

    part(model, "encoder.layer.1").register_forward_pre_hook(cut, with_kwargs=True)


def forward_wrapped(name: str, edits: bool) -> Change:
    """A forward on the instance, around the one that was."""

    def change(model: Any, seen: Seen) -> None:
        module = part(model, name)
        before = module.forward

        @functools.wraps(before)
        def forward(*args: Any, **kwargs: Any) -> Any:
            found = before(*args, **kwargs)
            seen.append(first_float(found))
            return scaled(found) if edits else found

        module.forward = forward

    return change


def forward_compiled(name: str) -> Change:
    def change(model: Any, seen: Seen) -> None:
        module = part(model, name)
        module.forward = torch.compile(module.forward, backend="eager")

    return change


def layer_wrapped(wrap: Callable[[Any], Any]) -> Change:
    def change(model: Any, seen: Seen) -> None:
        put(model, "encoder.layer.1", wrap(part(model, "encoder.layer.1")))

    return change


def replaced(name: str, make: Callable[[Any], Any]) -> Change:
    """A part replaced by what is made of it, its weights drawn from the same seed."""

    def change(model: Any, seen: Seen) -> None:
        torch.manual_seed(3)
        if part(model, name) is not None:
            put(model, name, make(part(model, name)).double())

    return change


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class OwnEmbeddings(nn.Module):
    """Embeddings that make positions from shapes."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(models.VOCABULARY, 32), nn.Embedding(40, 32)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Tensor:
        rows = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        return rows + self.positions(torch.arange(rows.shape[1]))


class Passing(nn.Module):
    """One that hands on to what it holds, as attribution tools put it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnAttention(hf.BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, weights = super().forward(*args, **kwargs)
        return context.flip(-1), weights


def attention_of_ones_own(old: Any) -> Any:
    old.__class__ = OwnAttention
    return old


def derived(kind: Any) -> Callable[[Any], Any]:
    """Makes a module one of a subclass whose forward scales."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(kind.forward(self, *args, **kwargs))

    own = type(kind.__name__, (kind,), {"forward": forward})

    def make(old: Any) -> Any:
        old.__class__ = own
        return old

    return make


def recurrent_head(model: Any, seen: Seen) -> None:
    """A BiLSTM in place of the last linear layer of a head."""
    torch.manual_seed(3)
    for name in ("classifier", "qa_outputs", "out"):
        if isinstance(old := getattr(model, name, None), nn.Linear) and not isinstance(
            model, (hf.BertForSequenceClassification, MeanOfAll, MeanOfReal)
        ):
            setattr(model, name, Recurrent(old.in_features, old.out_features).double())


def summing_dropout(model: Any, seen: Seen) -> None:
    """A module in place of a head's dropout which mixes rows."""

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(1, keepdim=True) if x.dim() == 3 else x

    if hasattr(model, "dropout"):
        model.dropout = Mixing()


def mean_pooler(old: Any) -> Any:
    class Pooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 32)

        def forward(self, rows: Tensor) -> Tensor:
            return self.dense(rows.mean(1))

    return Pooler()


CHANGES: dict[str, Change] = {
    "nothing": lambda model, seen: None,
    "a BiLSTM for a head": recurrent_head,
    "a mixing dropout in a head": summing_dropout,
    "a pooler over all rows": replaced("pooler", mean_pooler),
    "custom embeddings": replaced("embeddings", OwnEmbeddings),
    "embeddings passed through": replaced("embeddings", Passing),
    "embeddings without a norm": replaced("embeddings.LayerNorm", lambda old: nn.Identity()),
    "embeddings derived": replaced("embeddings", derived(hf.BertEmbeddings)),
    "words passed through": replaced("embeddings.word_embeddings", Passing),
    "an encoder derived": replaced("encoder", derived(hf.BertEncoder)),
    "a layer derived": replaced("encoder.layer.1", derived(hf.BertLayer)),
    "a layer passed through": layer_wrapped(Passing),
    "an attention derived": replaced("encoder.layer.1.attention.self", attention_of_ones_own),
    "a linear derived": replaced("encoder.layer.1.output.dense", lambda old: OwnLinear(48, 32)),
    "a norm replaced": replaced("encoder.layer.0.output.LayerNorm", lambda old: nn.RMSNorm(32)),
    "an activation replaced": replaced("encoder.layer.0.intermediate.intermediate_act_fn", lambda old: Doubled()),
    "a mask edited": mask_edited,
    "a layer checkpointed": layer_wrapped(checkpoint_wrapper),
    **{
        f"a hook {when} {name}, {'edits' if edits else 'reads'}{', kwargs' if kwargs else ''}": hooked(
            name, when, edits, kwargs
        )
        for name in PARTS
        for when, edits, kwargs in (
            ("before", False, False),
            ("before", True, True),
            ("after", False, True),
            ("after", True, False),
            ("in the backward of", False, False),
        )
    },
    **{
        f"a forward around {name}, {'edits' if edits else 'reads'}": forward_wrapped(name, edits)
        for name in ("head", "base", "embeddings", "encoder", "encoder.layer.1", "encoder.layer.0.attention.self")
        for edits in (False, True)
    },
}

# Those that take seconds each: among the slow tests one by one, and drawn now and then.
COMPILED: dict[str, Change] = {
    "a layer compiled": layer_wrapped(functools.partial(torch.compile, backend="eager")),
    "the forward of a layer compiled": forward_compiled("encoder.layer.1"),
    "the forward of the encoder compiled": forward_compiled("encoder"),
    "the forward of the base compiled": forward_compiled("base"),
}


class Patch(NamedTuple):
    """A name that is made another while a model runs, for all models."""

    owner: Any
    name: str
    attention: str = "sdpa"

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        is_map = not hasattr(self.owner, self.name)
        before = self.owner[self.name] if is_map else getattr(self.owner, self.name)

        @functools.wraps(before)  # some are asked for their parameters
        def patched(*args: Any, **kwargs: Any) -> Any:
            return scaled(before(*args, **kwargs))

        with pytest.MonkeyPatch.context() as patch:
            if is_map:
                patch.setitem(self.owner._global_mapping, self.name, patched)
            else:
                patch.setattr(self.owner, self.name, patched)
            yield


PATCHES = {
    **{
        f"{kind.__name__}.forward": Patch(kind, "forward")
        for kind in (
            hf.BertSelfAttention,
            hf.BertAttention,
            hf.BertSelfOutput,
            hf.BertIntermediate,
            hf.BertOutput,
            hf.BertLayer,
            hf.BertEncoder,
            hf.BertEmbeddings,
            hf.BertModel,
            hf.BertPooler,
            nn.LayerNorm,
            nn.Linear,
            nn.Embedding,
            nn.Dropout,
        )
    },
    "BertLayer.feed_forward_chunk": Patch(hf.BertLayer, "feed_forward_chunk"),
    "eager_attention_forward": Patch(hf, "eager_attention_forward", "eager"),
    "apply_chunking_to_forward": Patch(hf, "apply_chunking_to_forward"),
    "attention of sdpa": Patch(ALL_ATTENTION_FUNCTIONS, "sdpa"),
}


# What is asked of both


def results(out: Any, mask: Tensor | None, whole: bool) -> list[Tensor]:
    """Floating-point tensors of an output: where they have a row a token, those of real tokens, or all (`whole`)."""
    tensors = [x for x in (out.to_tuple() if isinstance(out, ModelOutput) else (out,)) if isinstance(x, Tensor)]
    real = None if mask is None or whole else mask.bool()
    return [x[real] if real is not None and x.shape[:2] == real.shape else x for x in tensors if x.is_floating_point()]


def same(found: Any, expected: Any, what: str) -> None:
    assert len(found) == len(expected), f"{what}: {len(found)} instead of {len(expected)}"
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor), what
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda text: f"{what}: {text}")
        else:
            assert ours == theirs, what


def shown(seen: Seen, mask: Tensor | None) -> Seen:
    """What hooks saw, at real tokens."""
    return [results(x, mask, False)[0] if isinstance(x, Tensor) else x for x in seen]


class Trial(NamedTuple):
    """One model, what is done to it and how it is called."""

    kind: str = "BertForTokenClassification"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    patched_before: bool = False
    mask: str = "right"
    padding: str = "auto"
    trains: bool = False
    disabled: bool = False

    def run(self) -> dict[str, int]:
        """Holds the promise to it; returns how many forwards ran fused, by layout."""
        attention = next((PATCHES[name].attention for name in self.patches), "sdpa")
        mask = models.masks(ROWS, LENGTH)[self.mask]
        call = {"input_ids": models.ids(ROWS, LENGTH, seed=5), "attention_mask": mask}
        noted: list[Seen] = [[], []]
        pair = [composed(self.kind, attention) for _ in noted]
        for model, seen in zip(pair, noted, strict=True):
            for name in self.before:
                ALL[name](model, seen)
        with contextlib.ExitStack() as stack:
            if self.disabled:
                stack.enter_context(pytest.MonkeyPatch.context()).setenv("FASTBERT_DISABLE", "1")
            if self.patched_before:
                self.patch(stack)
            try:
                fastbert.fuse(pair[1], padding=self.padding)
            except fastbert.UnsupportedModelError:
                assert not is_fused(pair[1])
            if not self.patched_before:
                self.patch(stack)
            for model, seen in zip(pair, noted, strict=True):
                for name in self.after:
                    ALL[name](model, seen)
            ran = self.compare(pair, noted, call)
            self.unfuse(pair, call)
        return ran

    def patch(self, stack: contextlib.ExitStack) -> None:
        for name in self.patches:
            stack.enter_context(PATCHES[name].applied())

    def compare(self, pair: list[Any], noted: list[Seen], call: dict[str, Any]) -> dict[str, int]:
        mask = call["attention_mask"]
        expected = self.call(pair[0], call, self.trains)
        with torch.set_grad_enabled(self.trains):
            said = fastbert.explain(pair[1]).encoders
        try:
            found = self.call(pair[1], call, self.trains)
        except (ValueError, fastbert.UnsupportedModelError):  # another is no refusal
            if self.disabled:
                raise
            assert counted(pair[1]) == [(e.fused_calls, e.stock_calls) for e in said], "refused, and counted"
            return {}
        same(found, expected, "outputs or gradients")
        same(shown(noted[1], mask), shown(noted[0], mask), "what hooks saw")
        total: Counter[str] = Counter()
        for before, (fused, stock) in zip(said, counted(pair[1]), strict=True):
            ran, fell = Counter(fused) - Counter(before.fused_calls), Counter(stock) - Counter(before.stock_calls)
            total += ran
            graph = "the forward of the base compiled" in (*self.before, *self.after)  # in which nothing is counted
            if before.fused and not graph:
                told = f"explain: {before.reason or 'fused'}; counted: {dict(ran)}, {dict(fell)}"
                assert bool(fell) == (before.reason is not None) and bool(ran) == (before.reason is None), told
                assert set(fell) <= {before.reason}, told
        assert not (self.disabled and total)
        return dict(total)

    def unfuse(self, pair: list[Any], call: dict[str, Any]) -> None:
        """Takes it back, whatever was done meanwhile."""
        fastbert.unfuse(pair[1])
        assert not is_fused(pair[1])
        expected, found = (self.call(model, call, False) for model in pair)
        same(found, expected, "unfused")

    def call(self, model: Any, call: dict[str, Any], trains: bool) -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            found = results(model(**call), call["attention_mask"], KINDS[self.kind] in READERS)
        if trains:
            total = torch.stack([x.pow(2).sum() for x in found]).sum()
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            zeros = (torch.zeros_like(p) for p in parameters)
            found += [zero if g is None else g for g, zero in zip(gradients, zeros, strict=True)]
        return found


def counted(model: Any) -> list[tuple[dict[str, int], dict[str, int]]]:
    return [(e.fused_calls, e.stock_calls) for e in fastbert.explain(model).encoders]


def is_fused(model: Any) -> bool:
    return any(type(module).__module__.startswith("fastbert") for module in model.modules())


ALL = CHANGES | COMPILED


def kind_of(change: str) -> str:
    """One that has the part in question."""
    return "BertForSequenceClassification" if "pooler" in change else "BertForTokenClassification"


@pytest.mark.parametrize("change", CHANGES)
def test_one_change(change: str) -> None:
    """Before `fuse` as after it."""
    trial = Trial(kind_of(change), trains="backward" in change)
    before, after = trial._replace(before=(change,)).run(), trial._replace(after=(change,)).run()
    if change == "a hook before head, edits, kwargs":  # which comes after the one that tells of labels, at first
        assert (before, after) == ({"packed": 1}, {"dense": 1})
    else:
        assert before == after


@pytest.mark.parametrize("change", [change for change in CHANGES if not change.startswith("a hook")])
def test_the_switch_comes_before_every_check(change: str) -> None:
    Trial(kind_of(change), before=(change,), disabled=True).run()
    Trial(kind_of(change), after=(change,), disabled=True).run()


@pytest.mark.parametrize("patch", PATCHES)
def test_one_patch(patch: str) -> None:
    trial = Trial("BertModel", patches=(patch,))
    assert trial.run() == trial._replace(patched_before=True).run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_each_kind(kind: str, mask: str) -> None:
    Trial(kind, mask=mask).run()
    Trial(kind, mask=mask, trains=True).run()


@pytest.mark.parametrize("kind", [Directions, Standardised, Similarities])
def test_zeros_at_padding(kind: type[Reader]) -> None:
    """Outside of what was fused they are met, and told of: NaN. Inside they are not."""
    call = {"input_ids": models.ids(ROWS, LENGTH), "attention_mask": models.masks(ROWS, LENGTH)["right"]}
    for what in ("the whole", "the base model"):
        model = composed(kind.__name__)
        fastbert.fuse(model if what == "the whole" else model.inner)
        finite = bool(model(**call).isfinite().all())
        (said,) = fastbert.explain(model).encoders
        assert finite is (what == "the whole")
        assert said.fused_calls == {"dense" if finite else "packed": 1}
        assert (said.dense if finite else said.outside or "").startswith("the model itself")


def trials(changes: list[str]) -> st.SearchStrategy[Trial]:
    some = st.lists(st.sampled_from(changes), max_size=2, unique=True).map(tuple)
    return st.builds(
        Trial,
        kind=st.sampled_from(list(KINDS)),
        before=some,
        after=some,
        patches=st.lists(st.sampled_from(list(PATCHES)), max_size=1).map(tuple),
        patched_before=st.booleans(),
        mask=st.sampled_from(MASKS),
        padding=st.sampled_from(["auto", "dense"]),
        trains=st.booleans(),
        disabled=st.sampled_from([False, False, False, True]),
    )


@given(trials(list(CHANGES)))
def test_any_composition(trial: Trial) -> None:
    trial.run()


ON_A_QUERY = "a hook before encoder.layer.0.attention.self.query, edits, kwargs"
IN_A_BACKWARD = "a hook in the backward of encoder.layer.0.attention, reads"


@pytest.mark.slow
@settings(max_examples=40)
@example(Trial(after=(ON_A_QUERY, IN_A_BACKWARD), disabled=True), "the forward of the base compiled", True)
@example(Trial(before=("a forward around embeddings, reads",)), "the forward of the base compiled", False)
@given(trials(list(ALL)), st.sampled_from(list(COMPILED)), st.booleans())
def test_any_composition_compiled(trial: Trial, compiled: str, before: bool) -> None:
    which = "before" if before else "after"
    torch.compiler.reset()
    # By default the compiler takes hooks to be as they were: a stock model compiled after another gets that one's.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        trial._replace(**{which: (*getattr(trial, which)[:1], compiled)}).run()
