"""`fuse` and `unfuse` while other threads are in forwards: each forward ends as it began."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.models.bert import modeling_bert as hf
from transformers.models.roberta import modeling_roberta

import fastbert
from fastbert import ops
from tests import models

ROWS, LENGTH = 4, 19


def call(mask: str = "right") -> dict[str, Any]:
    return {"input_ids": models.ids(ROWS, LENGTH), "attention_mask": models.masks(ROWS, LENGTH)[mask]}


def kinds(model: Any) -> list[Any]:
    return [type(module) for module in model.modules()]


class Held:
    """Holds a forward up at the embeddings: planned, and not yet in the encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        embed = ops.CPU_BACKEND["embedding_layer_norm"]

        def slow(*args: Any) -> Any:
            if not self.entered.is_set():
                self.entered.set()
                assert self.go_on.wait(30)
            return embed(*args)

        monkeypatch.setitem(ops.CPU_BACKEND, "embedding_layer_norm", slow)

    def start(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Runs it in a thread up to there; the result finishes it, and gives what came of it."""
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(run())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert self.entered.wait(30)

        def finish() -> Any:
            self.go_on.set()
            thread.join(30)
            return found[0]

        return finish


def hidden(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given)[0]
    return found


def test_unfuse_waits_for_a_forward_and_others_run_stock_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = models.seeded()
    expected, real = hidden(stock, call()), call()["attention_mask"].bool()
    model = fastbert.fuse(copy.deepcopy(stock))
    fused_kinds = kinds(model)
    finish = Held(monkeypatch).start(lambda: hidden(model, call()))
    unfusing = threading.Thread(target=fastbert.unfuse, args=(model,))
    unfusing.start()
    while hasattr(model.encoder, "fastbert"):
        pass
    torch.testing.assert_close(hidden(model, call()), expected, rtol=1e-4, atol=1e-5)  # at padding, too
    unfusing.join(0.1)
    assert unfusing.is_alive() and kinds(model) == fused_kinds
    found = finish()
    unfusing.join(30)
    assert not unfusing.is_alive() and kinds(model) == kinds(stock)
    assert not found[~real].any()  # packed, as it began
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_fuse_again_leaves_a_forward_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded())
    finish = Held(monkeypatch).start(lambda: hidden(model, call()))
    fastbert.fuse(model, padding="dense", cuda_graphs=True)
    assert not finish()[~call()["attention_mask"].bool()].any()
    assert hidden(model, call())[~call()["attention_mask"].bool()].any()
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed": 1, "dense": 1}


def test_fuse_leaves_a_stock_forward_of_a_head_as_it_began() -> None:
    """It has asked no hook what the head reads: the first row of each sequence, which is padding."""
    config = modeling_roberta.RobertaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = modeling_roberta.RobertaForSequenceClassification(config).eval()
    given = {**call("left"), "input_ids": models.ids(ROWS, LENGTH, high=90) + 5}
    expected = hidden(model, given)

    def fusing(module: Any, args: Any, kwargs: Any) -> None:
        thread = threading.Thread(target=fastbert.fuse, args=(model,))
        thread.start()
        thread.join(30)

    handle = model.roberta.register_forward_pre_hook(fusing, with_kwargs=True)  # the head's own hooks have run
    found = hidden(model, given)
    handle.remove()
    assert kinds(model) != kinds(modeling_roberta.RobertaForSequenceClassification(config))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unfuse_within_a_forward_is_refused() -> None:
    model = fastbert.fuse(models.seeded(hf.BertForSequenceClassification))
    handle = model.bert.pooler.register_forward_hook(lambda *_: fastbert.unfuse(model) and None)
    before = kinds(model)
    with pytest.raises(RuntimeError, match="within a forward of this BertForSequenceClassification"):
        model(**call())
    handle.remove()
    assert kinds(model) == before
    model(**call())
    # A hook sees what is at padding: the first was dense.
    assert fastbert.explain(model).encoders[0].fused_calls == {"dense": 1, "packed": 1}


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns every few microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("mask", ["right", "left"])
def test_models_are_swapped_under_load(mask: str, often: None) -> None:
    """Every result is the model's, fused or stock; nothing raises."""
    config = modeling_roberta.RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = modeling_roberta.RobertaForSequenceClassification(config).eval()
    given = {**call(mask), "input_ids": models.ids(ROWS, LENGTH, high=90) + 5}
    expected, stop = hidden(model, given), threading.Event()
    wrong: list[Any] = []
    ran = [0] * 3

    def work(index: int) -> None:
        while not stop.is_set() and not wrong:
            try:
                found = hidden(model, given)
                if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    wrong.append((found - expected).abs().max())
            except BaseException as error:
                wrong.append(error)
            ran[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        fastbert.fuse(model)
        fastbert.explain(model)
        fastbert.unfuse(model)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong and all(ran)


class At:
    """Calls `act` as the code of torch's calls, of transformers and of fastbert comes to one of its lines."""

    def __init__(self, line: Any = None, act: Callable[[], None] = lambda: None) -> None:
        self.lines: dict[tuple[str, int], None] = {}
        self._line, self._act = line, act

    def __enter__(self) -> At:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code.co_filename
        return self._step if code.endswith(("nn/modules/module.py", *self._FILES)) else None

    _FILES = ("modeling_bert.py", "models/heads.py", "models/classes.py", "runtime/readers.py")

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in self.lines:
            self.lines[line] = None
            if line == self._line:
                sys.settrace(None)
                self._act()
        return self._step


SWAPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "unfused": (lambda model: fastbert.fuse(model, loss_only=True), fastbert.unfuse),
    "fused otherwise": (lambda model: fastbert.fuse(model, loss_only=True), fastbert.fuse),
    "fused": (lambda model: model, lambda model: fastbert.fuse(model, loss_only=True)),
}


@pytest.mark.parametrize(
    ("kind", "swap"),
    [
        *(
            pytest.param(hf.BertForMaskedLM, swap, marks=[pytest.mark.slow] * (swap == "unfused"))  # ten seconds
            for swap in SWAPS
        ),
        (hf.BertForQuestionAnswering, "unfused"),
    ],
)
def test_heads_are_swapped_at_any_line(kind: Any, swap: str) -> None:
    """Another thread swaps a head while this one is in it, at the first run of each line: its loss is the model's.

    A loss over labelled tokens alone, and one over padding, are each told to the base model by a hook.
    """
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    stock, (before, after) = models.seeded(kind, **small), SWAPS[swap]
    given = call()
    if kind is hf.BertForMaskedLM:
        given["labels"] = torch.where(given["attention_mask"] == 1, given["input_ids"], -100)
    else:
        given |= {"start_positions": torch.zeros(ROWS, dtype=torch.long), "end_positions": torch.ones(ROWS).long()}
    expected = hidden(stock, given)
    model = before(copy.deepcopy(stock))
    hidden(model, given)  # the first does more
    with At() as seen:
        hidden(model, given)
    assert len(seen.lines) > 50
    for line in seen.lines:
        model = before(copy.deepcopy(stock))
        thread = threading.Thread(target=after, args=(model,))

        def act(thread: threading.Thread = thread) -> None:
            thread.start()
            thread.join(0.01)  # an `unfuse` that waits for this forward is not done

        with At(line, act):
            found = hidden(model, given)
        thread.join(30)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, at=line: f"{at}: {text}")
        assert is_fused(model) is (swap != "unfused"), line


def is_fused(model: Any) -> bool:
    return any(kind.__module__.startswith("fastbert") for kind in kinds(model))


def _checkpointed(model: Any, how: str) -> None:
    if how == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, hf.BertLayer))
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "wrapper"])
def test_unfuse_between_forward_and_backward_is_told(how: str, attention: str) -> None:
    """A checkpointed layer would run stock over packed rows: as if they were one sequence."""
    model = models.seeded().train()
    model.config._attn_implementation = attention
    _checkpointed(model, how)
    fused = fastbert.fuse(copy.deepcopy(model))
    fused(**call()).last_hidden_state.sum().backward()
    assert fastbert.explain(fused).encoders[0].fused_calls["packed"] == 1
    loss = fused(**call()).last_hidden_state.sum()
    fastbert.unfuse(fused)
    with pytest.raises(RuntimeError, match=r"unfuse\(model\) came in between"):
        loss.backward()


@pytest.mark.parametrize("way", ["wrapper", "by hand"])
def test_an_encoder_that_is_unfused_before_it_runs_again_is_told(way: str) -> None:
    model = fastbert.fuse(models.seeded()).train()
    if way == "by hand":
        model.encoder.forward = functools.partial(checkpoint, model.encoder.forward, use_reentrant=False)
    else:
        model.encoder = checkpoint_wrapper(model.encoder)
    model(**call()).last_hidden_state.sum().backward()
    out = model(**call())
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed": 2}
    fastbert.unfuse(model)
    with pytest.raises(RuntimeError, match=r"checkpointed encoder ran fused .*unfuse\(model\) came in between"):
        out.pooler_output.sum().backward()
