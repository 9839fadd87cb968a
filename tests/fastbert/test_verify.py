"""verify finds what is wrong, names it, and never says ok of what it did not see run fused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import numerics, ops
from fastbert.verify import Errors
from tests.models import HEADS, ids, masks, seeded

NAMES = ("embeddings", "layer.0", "layer.1", "logits")


def outputs(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what stock in float32 computes, the truth) of a made-up model."""
    generator = torch.Generator().manual_seed(seed)
    truth = {name: torch.randn(5, 16, generator=generator, dtype=torch.float64) for name in NAMES}
    stock = {
        name: (value * (1 + 1e-6 * torch.randn(5, 16, generator=generator))).float() for name, value in truth.items()
    }
    return stock, truth


def judged(change: Callable[[dict[str, Tensor]], None]) -> dict[str, bool]:
    """Which outputs pass, of a fused model that is stock but for `change`."""
    stock_errors, fused_errors = Errors(), Errors()
    for seed in range(2):
        stock, truth = outputs(seed)
        stock_errors.add(stock, truth)
        fused = dict(stock)
        if seed == 1:
            change(fused)
        fused_errors.add(fused, truth)
    return {row.name: row.ok for row in fused_errors.judge(stock_errors, torch.float32, "packed")}


def test_stock_itself_passes() -> None:
    assert judged(lambda fused: None) == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda fused: fused.update({"layer.1": fused["layer.1"] * (1 + 1e-5)}),
        lambda fused: fused.update({"layer.1": fused["layer.1"].index_fill(0, torch.tensor([2]), math.nan)}),
        lambda fused: fused.update({"layer.1": fused["layer.1"][:4]}),
        lambda fused: fused.update({"layer.1": fused["layer.1"].double()}),
        lambda fused: fused.pop("layer.1"),
    ],
    ids=["off", "nan", "shape", "dtype", "missing"],
)
def test_planted_fault_is_found_and_named(change: Any) -> None:
    assert judged(change) == {**dict.fromkeys(NAMES, True), "layer.1": False}


def test_output_stock_has_not_departs() -> None:
    assert judged(lambda fused: fused.update(extra=fused["logits"])) == {**dict.fromkeys(NAMES, True), "extra": False}


def test_nothing_passes_where_stock_is_not_finite() -> None:
    stock, truth = outputs(0)
    stock["logits"] = stock["logits"] / 0
    errors = Errors()
    errors.add(stock, truth)
    assert not {row.name: row.ok for row in errors.judge(errors, torch.float32, "packed")}["logits"]


def test_errors_are_those_of_all_batches_as_one() -> None:
    errors = Errors()
    batches = [outputs(seed) for seed in range(3)]
    for stock, truth in batches:
        errors.add(stock, truth)
    rows = {row.name: row for row in errors.judge(errors, torch.float32, "packed")}
    for name in NAMES:
        together = [torch.cat([batch[i][name] for batch in batches]) for i in range(2)]
        assert rows[name].fused_error == pytest.approx(numerics.relative_error(*together), rel=1e-9)
        assert rows[name].elements == 3 * 5 * 16


def inputs(kind: type[nn.Module] = hf.BertModel) -> list[dict[str, Tensor]]:
    rows = 32  # a head has few numbers a sequence, and errors of a few can't be compared
    mask = masks(rows, 37)["right"]
    assert mask is not None
    batch = {"input_ids": ids(rows, 37), "attention_mask": mask, "token_type_ids": ids(rows, 37, seed=1, high=2)}
    if kind is hf.BertForMultipleChoice:
        batch = {name: value.view(-1, 2, 37) for name, value in batch.items()}
    return [batch, {"input_ids": batch["input_ids"][..., :9]}]


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_every_head(kind: Any) -> None:
    report = fastbert.verify(seeded(kind), inputs(kind))
    assert report.ok, str(report)
    assert not report.not_fused
    assert not report.stock_parts
    assert report.ran == {"packed": {"packed": 1, "dense": 1}, "dense": {"dense": 2}}  # the second call has no padding
    names = [row.name for row in report.rows if row.layout == "packed"]
    assert names[:4] == ["embeddings", "layer.0", "layer.1", "last_hidden_state"]
    assert kind is hf.BertModel or names[-1].endswith("logits")
    mask = inputs()[0]["attention_mask"]
    assert report.tokens == int(mask.sum()) + 9 * len(mask)
    assert report.rows[0].elements == report.tokens * 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_working_dtype(dtype: torch.dtype) -> None:
    model = seeded()
    report = fastbert.verify(model, inputs(), dtype=dtype)
    assert report.ok, str(report)
    assert model.dtype == torch.float32
    assert report.rows[-1].stock_error > 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("fused", [False, True])
def test_model_comes_out_as_it_went_in(fused: bool) -> None:
    model = seeded().train()
    if fused:
        fastbert.fuse(model, padding="dense")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes, parameters = [type(m) for m in model.modules()], list(model.parameters())
    assert fastbert.verify(model, inputs(), dtype=torch.bfloat16).ok
    assert [type(m) for m in model.modules()] == classes
    assert all(m.training for m in model.modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    encoder = fastbert.explain(model).encoders[0]
    assert (encoder.fused, encoder.padding) == (fused, "dense" if fused else None)
    assert not encoder.fused_calls


def plant(monkeypatch: pytest.MonkeyPatch, linear: nn.Linear) -> None:
    """Makes the fused feed-forward wrong by 1 % where it uses the weight of `linear`."""
    right = ops.linear_gelu

    def wrong(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return right(x, weight, *rest) * (1.01 if weight is linear.weight else 1)

    monkeypatch.setattr(ops, "linear_gelu", wrong)


@pytest.mark.parametrize("layer", [0, 1])
def test_fault_in_a_layer_is_named(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    model = seeded(hf.BertForSequenceClassification)
    plant(monkeypatch, model.bert.encoder.layer[layer].intermediate.dense)
    report = fastbert.verify(model, inputs())
    assert not report.ok
    assert report.first_departure is not None
    assert (report.first_departure.layout, report.first_departure.name) == ("packed", f"layer.{layer}")
    assert f"DEPARTS from stock, first at layer.{layer} (packed)" in str(report)
    only_dense = fastbert.verify(model, inputs(), layouts=["dense"])
    assert {row.layout for row in only_dense.rows} == {"dense"}
    assert only_dense.first_departure is not None


def test_running_stock_is_not_ok() -> None:
    model = seeded()
    model.config.is_causal = True
    report = fastbert.verify(model, inputs())
    assert all(row.ok for row in report.rows)
    assert not report.ok
    assert set(report.not_fused) == {"packed", "dense"}
    assert "NOT VERIFIED: packed ran stock: is_causal" in str(report)


def test_layer_that_runs_stock_is_named() -> None:
    model = seeded()
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *args: None)
    report = fastbert.verify(model, inputs())
    assert report.ok, str(report)
    assert list(report.stock_parts) == ["layer.1"]


def test_positions_after_that_of_padding() -> None:
    """Padding doesn't count, however long; texts are cut to what is left."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
    model = RobertaModel(RobertaConfig(vocab_size=211, max_position_embeddings=12, **sizes)).eval()
    padded = torch.full((2, 30), 1)
    padded[:, :10] = 2 + ids(2, 10, high=209)
    report = fastbert.verify(model, {"input_ids": padded, "attention_mask": (padded != 1).long()})
    assert report.ok, str(report)
    padded[1, 10] = 7
    with pytest.raises(ValueError, match=r"^inputs: a sequence of 11 tokens; the model has positions for 10$"):
        fastbert.verify(model, {"input_ids": padded})
    taken = []

    class Tokenizer:
        model_max_length = 10**30

        def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
            taken.append(max_length)
            return {"input_ids": 2 + ids(len(texts), max_length, high=209)}

    assert fastbert.verify(model, ["a text"], tokenizer=Tokenizer()).ok
    assert taken == [10]


def test_ids_of_one_sequence_for_all() -> None:
    given = {"input_ids": ids(3, 7), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}
    for positions in (torch.arange(7), torch.arange(7)[None], torch.arange(7).expand(3, -1)):
        assert fastbert.verify(seeded(), {**given, "position_ids": positions}).ok


def test_ids_of_embeddings_with_an_adapter() -> None:
    import peft

    adapted = peft.get_peft_model(seeded(), peft.LoraConfig(target_modules=["word_embeddings", "query"]))
    assert fastbert.verify(adapted, {"input_ids": ids(2, 7)}).ok
    with pytest.raises(ValueError, match=r"^inputs: 'input_ids' holds 211; expected 0 to 210"):
        fastbert.verify(adapted, {"input_ids": torch.tensor([[1, 211]])})


def test_wrapper_and_inputs_embeds() -> None:
    embeds = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    report = fastbert.verify(nn.Sequential(seeded()), {"inputs_embeds": embeds}, dtype=torch.bfloat16)
    assert report.ok, str(report)
    assert (report.sequences, report.tokens) == (2, 14)


def test_json_holds_the_report_and_no_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded()
    monkeypatch.setattr(ops, "linear_gelu", lambda x, weight, *rest: x.new_full((x.shape[0], len(weight)), math.nan))
    report = fastbert.verify(model, inputs())
    read = json.loads(report.to_json())
    assert read == report.to_dict()
    assert (read["ok"], read["dtype"], read["model"]) == (False, "float32", "BertModel")
    assert read["first_departure"]["name"] == "layer.0"
    assert read["first_departure"]["fused_error"] is None
    assert set(read["rows"][0]) == {
        *("layout", "name", "elements", "fused_error", "stock_error", "ratio", "bound", "ok"),
    }


def test_weights_that_are_not_finite_are_named() -> None:
    model = seeded()
    model.encoder.layer[1].output.dense.weight.data[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"'encoder\.layer\.1\.output\.dense\.weight' holds NaN or infinity"):
        fastbert.verify(model, inputs())
    model.encoder.layer[1].output.dense.weight.data[3, 5] = 1e6
    with pytest.raises(ValueError, match=r"holds NaN or infinity in torch\.float16"):
        fastbert.verify(model, inputs(), dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": "a text"}, "inputs is of type str"),
        ({"inputs": [{}]}, "inputs: expected either input_ids or inputs_embeds"),
        ({"inputs": {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}}, "inputs: 'input_ids' is empty"),
        ({"inputs": {"input_ids": [[1, 2]]}}, "inputs: 'input_ids' is of type list"),
        ({"inputs": {"input_ids": ids(2, 4), "labels": ids(2, 4)}}, "inputs: 'labels' is not compared"),
        ({"inputs": {"input_ids": ids(2, 4), "attention_mask": ids(2, 3)}}, "inputs: 'attention_mask' has shape"),
        ({"inputs": {"input_ids": ids(2, 4), "token_type_ids": ids(2, 3)}}, "inputs: 'token_type_ids' has shape"),
        ({"inputs": {"input_ids": ids(2, 4), "position_ids": ids(1, 3)}}, "inputs: 'position_ids' has shape"),
        ({"inputs": {"input_ids": ids(4, 4), "token_type_ids": 0 * ids(2, 4)}}, "inputs: 'token_type_ids' has shape"),
        ({"inputs": {"input_ids": ids(1, 4)[0]}}, r"inputs: has shape \(4,\); expected \(batch, tokens\)"),
        ({"inputs": {"input_ids": torch.tensor([[1, 211]])}}, "inputs: 'input_ids' holds 211; expected 0 to 210"),
        ({"inputs": {"input_ids": torch.tensor([[-1, 7]])}}, "inputs: 'input_ids' holds -1; expected 0 to 210"),
        ({"inputs": {"input_ids": torch.ones(1, 2)}}, "inputs: 'input_ids' is of torch.float32; expected torch.int64"),
        ({"inputs": [*inputs(), {**inputs()[0], "token_type_ids": 2 * inputs()[0]["token_type_ids"]}]}, "holds 2; exp"),
        ({"inputs": {"input_ids": ids(1, 2), "position_ids": torch.tensor([[0, 160]])}}, "'position_ids' holds 160"),
        ({"inputs": {"input_ids": ids(1, 161)}}, "inputs: a sequence of 161 tokens; the model has positions for 160"),
        ({"inputs": {"inputs_embeds": torch.ones(1, 161, 128)}}, "a sequence of 161 tokens"),
        ({"inputs": {"input_ids": ids(2, 4), "attention_mask": 0 * ids(2, 4)}}, "'attention_mask' is 0 everywhere"),
        ({"inputs": ["a text", {"input_ids": ids(2, 4)}]}, "inputs mixes kinds"),
        ({"inputs": ["a text"]}, "tokenizer is None, and inputs holds texts"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"layouts": []}, "layouts is"),
        ({"layouts": "packed"}, "layouts is"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"model": nn.Linear(2, 2)},
            "model is of type Linear, which holds no Hugging Face model; expected a PreTrainedModel",
        ),
        ({"model": None}, "model is of type NoneType"),
        ({"model": seeded(is_decoder=True)}, "decoder"),
        ({"model": seeded().to("meta")}, "meta device"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    call = {"model": seeded(), "inputs": inputs(), **arguments}
    with pytest.raises(ValueError, match=message):
        fastbert.verify(call.pop("model"), call.pop("inputs"), **call)
