"""Training a fused model: every parameter's gradient against float64, what is kept for the backward, dropout, and a
hundred steps beside stock."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import ops
from fastbert.layers import layer
from fastbert.numerics import assert_within_policy
from tests import models

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def batch(kind: Any, seed: int, rows: int = 9, seqlen: int = 37) -> tuple[dict[str, Any], Tensor]:
    """A batch of one head with its labels, padded on the right; and which tokens are real."""
    mask = models.masks(rows, seqlen)["right"]
    real = mask.bool()
    call: dict[str, Any] = {
        "input_ids": models.ids(rows, seqlen, seed=seed),
        "attention_mask": mask,
        "token_type_ids": models.ids(rows, seqlen, high=2, seed=seed),
    }
    tokens = models.ids(rows, seqlen, seed=seed + 100)
    tokens[~real | (models.ids(rows, seqlen, high=3, seed=seed + 200) > 0)] = -100  # a third of the tokens
    of_sequences = models.ids(rows, seed=seed + 300)
    if kind in (hf.BertForMaskedLM, hf.BertLMHeadModel):
        call["labels"] = tokens
    elif kind is hf.BertForPreTraining:
        call |= {"labels": tokens, "next_sentence_label": of_sequences % 2}
    elif kind is hf.BertForNextSentencePrediction:
        call["labels"] = of_sequences % 2
    elif kind is hf.BertForSequenceClassification:
        call["labels"] = of_sequences % 32
    elif kind is hf.BertForTokenClassification:
        call["labels"] = torch.where(tokens == -100, -100, tokens % 32)
    elif kind is hf.BertForQuestionAnswering:
        call |= {"start_positions": of_sequences % 5, "end_positions": of_sequences % 7}
    elif kind is hf.BertForMultipleChoice:
        call = {k: v.view(3, 3, seqlen) for k, v in call.items()} | {"labels": of_sequences[:3] % 3}
    return call, real


def backward(model: Any, call: dict[str, Any], real: Tensor) -> None:
    """One step's gradients: of the head's own loss, or of a random projection of a base model's outputs."""
    out = model(**call)
    loss = out.get("loss")
    if loss is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out[i].shape, generator=generator, dtype=torch.float64).to(out[i]) for i in (0, 1)]
        loss = (out[0] * weights[0])[real].sum() + (out[1] * weights[1]).sum()
    loss.backward()


def judged_with(name: str) -> str:
    """The tensor whose errors a parameter's gradient is judged with: its own, but for some biases the weight's.

    Softmax ignores the bias of the keys, and that of a multiple choice: their gradients are zero but for rounding.
    Those of a head's few outputs are too few numbers to compare the errors of.
    """
    ignored = ("key.bias", "classifier.bias", "seq_relationship.bias", "qa_outputs.bias")
    return name.removesuffix("bias") + "weight" if name.endswith(ignored) else name


def judged_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients there are, but for those that are judged with another."""
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and judged_with(name) == name}


def gradients(model: Any, kind: Any, seeds: Iterator[int], context: Any = None) -> dict[str, Tensor]:
    """Each parameter's gradients of several batches, one after the other, so that errors are those of many numbers."""
    found: dict[str, list[Tensor]] = {}
    for seed in seeds:
        model.zero_grad()
        with context or torch.enable_grad():
            backward(model, *batch(kind, seed))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == parameter.dtype
                found.setdefault(judged_with(name), []).append(parameter.grad.flatten().clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


def compare(model: Any, kind: Any, dtype: torch.dtype, padding: str, layout: str, context: Any = None) -> None:
    fused, stock, truth = (m.train() for m in models.three(model, dtype))
    fastbert.fuse(fused, padding=padding)
    # Stock's own error varies from batch to batch by more than the policy's slack: eight of them.
    results = [gradients(m, kind, iter(range(8)), c) for m, c in ((fused, context), (stock, context), (truth, None))]
    models.assert_all_within_policy(*results, f"{kind.__name__} {dtype} {padding}")
    assert fastbert.explain(fused).encoders[0].fused_calls == {layout: 8}


@pytest.mark.parametrize(
    ("kind", "dtype", "padding"),
    [
        pytest.param(kind, dtype, padding, id=f"{kind.__name__}-{dtype}-{padding}")
        for kind in models.HEADS
        for dtype in (torch.float32, torch.bfloat16)
        for padding in ("packed", "dense")
        if kind is hf.BertModel
        or (kind is hf.BertForMaskedLM and dtype == torch.float32)
        or (dtype, padding) == (torch.float32, "packed")
    ],
)
def test_gradients_of_every_head(kind: Any, dtype: torch.dtype, padding: str) -> None:
    """Heads take what the encoder returns, whatever its dtype and layout: two of them in all."""
    if kind is hf.BertForQuestionAnswering and padding == "packed":
        padding = "auto"  # its loss is taken over padding: there packed is another loss, and auto is dense
    layout = "packed" if padding == "packed" else "dense"
    compare(models.seeded(kind, **NO_DROPOUT), kind, dtype, padding, layout)


@pytest.mark.parametrize(
    ("dtype", "cast", "padding"),
    [
        (torch.float32, torch.bfloat16, "packed"),
        (torch.float32, torch.bfloat16, "dense"),
        (torch.float32, torch.float16, "packed"),
        (torch.bfloat16, torch.bfloat16, "dense"),
        (torch.float16, torch.float16, "packed"),
    ],
    ids=str,
)
def test_gradients_under_autocast(dtype: torch.dtype, cast: torch.dtype, padding: str) -> None:
    kind = hf.BertForTokenClassification
    compare(models.seeded(kind, **NO_DROPOUT), kind, dtype, padding, padding, torch.autocast("cpu", cast))


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"),
    [
        pytest.param(
            *(kind, dtype, autocast),
            id=f"{kind.__name__}-{dtype}-{autocast}",
            marks=[pytest.mark.slow] * autocast,
        )
        for kind in (hf.BertForMaskedLM, hf.BertForPreTraining)
        for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    ],
)
def test_loss_only(kind: Any, dtype: torch.dtype, autocast: bool) -> None:
    """The loss and its gradients from labelled tokens alone, as near to float64 as stock's from all logits."""
    context = torch.autocast("cpu", torch.bfloat16) if autocast else torch.enable_grad()
    fused, stock, truth = models.three(models.seeded(kind, **NO_DROPOUT), dtype)
    fastbert.fuse(fused, loss_only=True)
    calls = [batch(kind, seed)[0] for seed in range(8)]
    # Eight losses are too few numbers to compare the errors of, unless the rounding of the result is most of them.
    more = [batch(kind, seed, 3, 19)[0] for seed in range(8, 512)] if autocast else []
    losses, found = [], []
    for m in (fused, stock, truth):
        grads: dict[str, list[Tensor]] = {}
        of_calls = []
        for call in [*calls, *more]:
            m.zero_grad()
            with torch.enable_grad() if m is truth else context, torch.set_grad_enabled(len(of_calls) < 8):
                out = m(**call)
            of_calls.append(out.loss.detach())
            if not out.loss.requires_grad:
                continue
            out.loss.backward()
            for name, parameter in m.named_parameters():
                if parameter.grad is not None:
                    grads.setdefault(judged_with(name), []).append(parameter.grad.flatten().clone())
        losses.append(torch.stack(of_calls))
        found.append({name: torch.cat(parts) for name, parts in grads.items()})
    assert_within_policy(losses[0].to(losses[1].dtype), losses[1], losses[2], "loss")
    models.assert_all_within_policy(*found, "gradients")
    out = fused(**calls[0])
    assert out["loss"] is not None
    assert (out.logits if kind is hf.BertForMaskedLM else out.prediction_logits) is None
    assert isinstance(fused(**calls[0], return_dict=False), tuple)
    without = {name: value for name, value in calls[0].items() if "label" not in name}
    assert (fused(**without).logits if kind is hf.BertForMaskedLM else fused(**without).prediction_logits) is not None
    everything = {**calls[0], "labels": torch.full_like(calls[0]["labels"], -100)}
    assert fused(**everything).loss.isnan() and stock(**everything).loss.isnan()
    with pytest.raises(ValueError, match="labels has shape"):
        fused(**{**calls[0], "labels": calls[0]["labels"][:, :-1]})
    assert type(fastbert.unfuse(fused)) is kind
    assert fused(**calls[0])["logits" if kind is hf.BertForMaskedLM else "prediction_logits"] is not None


def test_loss_only_never_makes_all_logits() -> None:
    model = models.seeded(hf.BertForMaskedLM, vocab_size=5000, **NO_DROPOUT)
    call, _ = batch(hf.BertForMaskedLM, 0)
    logits = call["input_ids"].numel() * 5000 * 4
    assert saved_bytes(fastbert.fuse(model), call) > logits
    assert saved_bytes(fastbert.fuse(model, loss_only=True), call) < logits / 4


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_gradients_through_other_activations(activation: str) -> None:
    kind = hf.BertForTokenClassification
    compare(models.seeded(kind, hidden_act=activation, **NO_DROPOUT), kind, torch.float32, "auto", "packed")


def test_flattened_calls_train() -> None:
    """Sequences end to end have the gradients of the same sequences, padded, under stock."""
    lengths = [5, 1, 19]
    call = models.ragged(lengths)
    fused, stock, truth = (m.train() for m in models.three(models.seeded(**NO_DROPOUT), torch.float32))
    fastbert.fuse(fused)
    fused(**call).last_hidden_state.pow(2).mean().backward()
    padded = torch.nn.utils.rnn.pad_sequence(call["input_ids"][0].split(lengths), batch_first=True)
    mask = (torch.arange(19) < torch.tensor(lengths)[:, None]).long()
    for model in (stock, truth):
        model(padded, mask).last_hidden_state[mask.bool()].pow(2).mean().backward()
    models.assert_all_within_policy(*map(judged_gradients, (fused, stock, truth)), "gradients")


def test_no_gradient_is_computed_for_what_is_frozen() -> None:
    model = fastbert.fuse(models.seeded(hf.BertForSequenceClassification, **NO_DROPOUT)).train()
    stock = copy.deepcopy(fastbert.unfuse(copy.deepcopy(model)))
    for m in (model, stock):
        m.bert.embeddings.requires_grad_(False)
        m.bert.encoder.layer[0].requires_grad_(False)
        m.bert.encoder.layer[1].attention.self.key.requires_grad_(False)
        m.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
        m.bert.encoder.layer[1].intermediate.dense.bias.requires_grad_(False)
        backward(m, *batch(hf.BertForSequenceClassification, 0))
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def saved_bytes(model: Any, call: dict[str, Any]) -> int:
    """Bytes of the distinct storages that the forward keeps for the backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(**call)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_kept_for_the_backward(dropout: float) -> None:
    """Of a layer, for each real token: 12 rows of the hidden size, four of them the GELU's input; no scores."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    shape = {"intermediate_size": 4 * 128, "num_hidden_layers": 4}
    call = {
        "input_ids": models.ids(4, 150),
        "attention_mask": (torch.arange(150) < torch.tensor([[150], [60], [40], [20]])).long(),
    }
    deep = fastbert.fuse(models.seeded(**shape, **rates)).train()
    shallow = fastbert.fuse(models.seeded(**{**shape, "num_hidden_layers": 2}, **rates)).train()
    a_layer = (saved_bytes(deep, call) - saved_bytes(shallow, call)) / 2
    rows = a_layer / (270 * 128 * 4)
    assert 12 <= rows < 12.2  # and the logarithms of the softmax's sums
    stock = saved_bytes(fastbert.unfuse(deep), call) - saved_bytes(fastbert.unfuse(shallow), call)
    assert a_layer < 0.35 * stock / 2


def test_dropout_follows_torchs_generator() -> None:
    model = fastbert.fuse(models.seeded()).train()
    call, _ = batch(hf.BertModel, 0)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = model(**call).last_hidden_state
        return out

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    torch.manual_seed(0)
    assert not torch.equal(model(**call).last_hidden_state, model(**call).last_hidden_state)
    model.eval()
    assert torch.equal(run(0), run(1))


def test_each_layer_and_each_dropout_draws_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded(num_hidden_layers=3)).train()
    seeds, train = [], layer.Bound.train
    monkeypatch.setattr(layer.Bound, "train", lambda *args: seeds.append(args[4].tolist()) or train(*args))
    for _ in range(2):
        model(**batch(hf.BertModel, 0)[0])
    assert len(set(itertools.chain.from_iterable(seeds))) == 18


@pytest.mark.parametrize("what", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_dropout_is_stocks_on_average(what: str) -> None:
    """The mean output over many draws, of one layer, is as near to stock's mean as stock's means are to each other."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, what: 0.4}
    stock = models.seeded(num_hidden_layers=1, **rates).train()
    fused = fastbert.fuse(copy.deepcopy(stock))
    call = {"input_ids": models.ids(1, 24).expand(400, -1), "attention_mask": torch.ones(400, 24, dtype=torch.long)}
    call["attention_mask"][:, 20:] = 0
    torch.manual_seed(0)
    with torch.no_grad():
        outs = [m(**call).last_hidden_state[:, :20].double() for m in (fused, stock, stock)]
    variances = [o.var(0) for o in outs]
    # Of 2,560 differences of means, in standard errors: their mean square is 1 but for chance (by 0.05).
    error = ((outs[0].mean(0) - outs[1].mean(0)) ** 2 / ((variances[0] + variances[1]) / 400)).mean()
    itself = ((outs[2].mean(0) - outs[1].mean(0)) ** 2 / ((variances[2] + variances[1]) / 400)).mean()
    assert 0.5 < error < 1.5 and 0.5 < itself < 1.5
    assert 0.9 < (variances[0].mean() / variances[1].mean()) < 1.1


def train(model: Any, steps: int, order: Tensor) -> Tensor:
    """Losses of AdamW on sequence classification; `order` permutes each batch, which changes nothing but rounding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for step in range(steps):
        call, _ = batch(hf.BertForSequenceClassification, step % 10)
        call["labels"] = call["input_ids"][:, 0] % 4
        loss = model(**{k: v[order] for k, v in call.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [
        (torch.bfloat16, 60),
        pytest.param(torch.bfloat16, 100, marks=pytest.mark.slow),
        pytest.param(torch.float32, 100, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_many_steps_beside_stock(dtype: torch.dtype, steps: int) -> None:
    """Losses stay as near to float64's as those of stock, whose sequences may come in any order, do."""
    model = models.seeded(hf.BertForSequenceClassification, num_hidden_layers=1, **NO_DROPOUT)
    fused, stock, truth = (m.train() for m in models.three(model, dtype))
    order = torch.arange(9)
    exact = train(truth, steps, order)
    assert exact[-10:].mean() < 0.5 * exact[:10].mean()  # it learns
    noise = [(train(copy.deepcopy(stock), steps, order.roll(i)) - exact).norm() for i in range(4)]
    departure = (train(fastbert.fuse(fused), steps, order) - exact).norm()
    assert departure <= 1.1 * max(noise)
    assert fastbert.explain(fused).encoders[0].fused_calls == {"packed": steps}


def test_pretraining_loss_falls_as_stocks_does() -> None:
    model = models.seeded(hf.BertForPreTraining, **NO_DROPOUT)
    losses = []
    for m in (fastbert.fuse(copy.deepcopy(model)), model):
        optimizer = torch.optim.AdamW(m.train().parameters(), lr=3e-4)
        losses.append([])
        for step in range(40):
            loss = m(**batch(hf.BertForPreTraining, step % 4)[0]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    fused, stock = (torch.stack(found) for found in losses)
    assert stock[-4:].mean() < 0.8 * stock[:4].mean()
    torch.testing.assert_close(fused, stock, rtol=1e-3, atol=0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Triton kernels on CPU tensors, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run for real here")
    for name in ops.CPU_BACKEND:
        monkeypatch.setitem(ops.CPU_BACKEND, name, ops.registry.kernel(name))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("padding", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
def test_triton_in_the_interpreter(padding: str) -> None:
    """A whole step through the kernels: gradients against float64, and with dropout a second step like the first."""
    kind = hf.BertForTokenClassification
    narrow = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    fused, stock, truth = (m.train() for m in models.three(models.seeded(kind, **narrow, **NO_DROPOUT), torch.float32))
    fastbert.fuse(fused, padding=padding)
    call, real = batch(kind, 0, 3, 19)
    for m in (fused, stock, truth):
        backward(m, call, real)
    models.assert_all_within_policy(*map(judged_gradients, (fused, stock, truth)), "gradients")
    for module in fused.bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    seen = []
    for _ in range(2):
        torch.manual_seed(5)
        fused.zero_grad()
        backward(fused, call, real)
        seen.append([p.grad.clone() for p in fused.parameters()])
    assert all(map(torch.equal, *seen))
