"""Models in int8: against stock whose linear layers quantize, in float64; when they don't; what is left untouched."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf
from transformers.models.distilbert import modeling_distilbert as distil
from transformers.models.mpnet import modeling_mpnet as mpnet

import fastbert
from fastbert import fuse, ops
from fastbert.kernels import cpu, cpu_int8, reference_int8
from fastbert.layers import int8
from fastbert.numerics import as_int8, relative_error, weight_as_int8
from fastbert.runtime import graphs, support
from tests import models
from tests.fastbert.test_encoder import launches
from tests.fastbert.test_fp8 import BATCHES, SMALL, call, explained, run
from tests.fastbert.test_graphs import StandIn


class Quantizing(nn.Module):
    """A linear layer whose input and weight are quantized, and multiplied in the dtype they come in."""

    def __init__(self, linear: nn.Linear, factors: Tensor | None) -> None:
        super().__init__()
        weight = linear.weight.float() if factors is None else linear.weight.float() / factors
        values, scale = int8.quantize_weight(weight.detach(), cpu_int8.weight_limit())
        self.weight = (values.double() * scale[:, None]).to(linear.weight.dtype)
        self.bias, self.factors = linear.bias, factors

    def forward(self, x: Tensor) -> Tensor:
        values, scale, zero = reference_int8.quantize_int8(x.flatten(0, -2).float(), self.factors)
        rows = (values.double() - zero[:, None]) * scale[:, None]
        return F.linear(rows.view(x.shape).to(x.dtype), self.weight, self.bias)


def quantizing(model: Any, found: list[dict[str, str]] | None = None) -> Any:
    """`model`, a stock BertModel, with linear layers that quantize."""
    for i, layer in enumerate(model.encoder.layer):
        attention = layer.attention
        for holder, name, gemm in (
            *((attention.self, name, "qkv") for name in ("query", "key", "value")),
            (attention.output, "dense", "context"),
            (layer.intermediate, "dense", "up"),
            (layer.output, "dense", "down"),
        ):
            factors = int8.factors_of(found[i][gemm]) if found is not None and found[i][gemm] else None
            setattr(holder, name, Quantizing(getattr(holder, name), factors))
    return model


def kept(model: Any) -> dict[str, str]:
    with torch.inference_mode():
        (encoder,) = fastbert.explain(model).encoders
    return encoder.not_quantized


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_product_is_that_of_quantized_numbers(calibrated: bool) -> None:
    model, stock, truth = models.three(models.seeded(), torch.float32)
    found = None
    if calibrated:
        fastbert.calibrate(model, BATCHES, tolerance=1.0, precision="int8")
        found = model.config.fastbert["int8"]["layers"]
        assert {len(layer["down"]) for layer in found} <= {256, 0} and any(map(any, map(dict.values, found)))
    fuse(model, precision="int8")
    real = call()["attention_mask"].bool()
    out = run(model)[real]
    expected = [run(quantizing(m, found))[real] for m in (stock, truth)]
    # A number close to a tie may fall on another side in float64: sums and statistics in another order are no better.
    error = relative_error(out, expected[1])
    assert error <= max(2 * relative_error(expected[0], expected[1]), 1e-3)
    plain = run(models.seeded())[real]
    assert 8 * error < relative_error(out, plain.double()) < 0.05
    (encoder,) = fastbert.explain(model).encoders
    assert encoder.fused_calls == {"packed, int8": 1}
    assert kept(model) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits(dtype: torch.dtype) -> None:
    model = models.seeded().to(dtype)
    truth = run(copy.deepcopy(model).double())
    out = run(fuse(model, precision="int8", padding="dense"))
    assert out.dtype == dtype
    real = call()["attention_mask"].bool()
    assert relative_error(out[real], truth[real]) < 0.03


def test_operators_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are quantized as LayerNorm makes them; by the first layer's alone what embeddings return."""
    model, names = fuse(models.seeded(**SMALL), precision="int8"), launches(monkeypatch)
    run(model)
    layer = [
        *("linear_int8", "attention", "quantize_int8", "linear_add_int8", "layer_norm_int8"),
        *("linear_gelu_quantize_int8", "linear_add_int8", "layer_norm_int8"),
    ]
    start = names.index("linear_int8")
    end = start + 2 * len(layer)
    assert names[start:end] == [*layer, *layer[:-1], "layer_norm"]
    assert names[start - 1] == "quantize_int8"


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_sequence_is_the_same_in_any_batch(calibrated: bool) -> None:
    """Integers add up exactly: bitwise."""
    model = models.seeded()
    if calibrated:
        fastbert.calibrate(model, BATCHES, tolerance=1.0, precision="int8")
    fuse(model, precision="int8", padding="packed")
    given = call(5, 31)
    lengths = given["attention_mask"].sum(1).tolist()
    out = run(model, **given)
    for i, n in enumerate(lengths):
        assert torch.equal(run(model, input_ids=given["input_ids"][i : i + 1, :n])[0], out[i, :n])


def test_nan_stays_in_its_sequence() -> None:
    model = fuse(models.seeded(), precision="int8")
    given = call(4, 23)
    given["inputs_embeds"] = model.embeddings.word_embeddings(given.pop("input_ids")).detach().clone()
    given["inputs_embeds"][1, 3, 5] = float("nan")
    out, real = run(model, **given), given["attention_mask"].bool()
    assert out[1][real[1]].isnan().all()
    assert all(out[i][real[i]].isfinite().all() for i in (0, 2, 3))


def test_without_inference_it_is_the_model_in_its_own_dtype() -> None:
    model, plain = fuse(models.seeded(), precision="int8"), fuse(models.seeded())
    given = call()
    out, expected = (m(**given).last_hidden_state for m in (model, plain))
    assert torch.equal(out, expected)
    out.sum().backward()
    with torch.no_grad():
        assert not torch.equal(model(**given).last_hidden_state, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(**given).last_hidden_state, plain(**given).last_hidden_state)
    (encoder,) = fastbert.explain(model.train()).encoders
    assert encoder.quantized == "off: gradients are enabled, or it is training, autocast or torch.compile"
    assert encoder.precision == "int8"


def test_nothing_of_it_is_in_the_model(tmp_path: Path) -> None:
    model = models.seeded()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    out = run(fuse(model, precision="int8"))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    model.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(fuse(again, precision="int8")), out)
    pickled = pickle.dumps(model)
    assert len(pickled) < len(pickle.dumps(fuse(models.seeded()))) + 1000
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(run(other), out)
    weights = sum(p.numel() for p in model.encoder.parameters() if p.dim() == 2)
    held = model.encoder.fastbert.precision.memory()
    packed = 0 if cpu_int8.engine() is None else weights
    assert weights + packed < held < 1.1 * (weights + packed)
    assert f"8 of 8 GEMMs, a scale and an offset of each row's own; {held / 1e6:,.1f} MB beside" in explained(model)
    state = model.encoder.fastbert.precision
    fastbert.unfuse(model)
    assert torch.equal(run(model), run(models.seeded()))
    state.drop()
    assert state.memory() == 0


def test_weights_are_quantized_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    right = int8.Int8.make
    monkeypatch.setattr(int8.Int8, "make", lambda *given: made.append(given) or right(*given))
    model = fuse(models.seeded(), precision="int8")
    first = run(model)
    assert len(made) == 8
    assert torch.equal(run(model), first)
    assert len(made) == 8
    model.load_state_dict(models.seeded(seed=3).state_dict())
    assert torch.equal(run(model), run(fuse(models.seeded(seed=3), precision="int8")))
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)
    fresh = fastbert.unfuse(copy.deepcopy(model))
    assert torch.equal(run(model), run(fuse(fresh, precision="int8")))


def test_what_is_watched_or_wrapped_stays_in_the_models_dtype() -> None:
    model = fuse(models.seeded(intermediate_size=100), precision="int8")
    run(model)
    reason = "100 input features; int8 takes a multiple of 16"
    assert kept(model) == {"layer 0 down": reason, "layer 1 down": reason}
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(models.seeded(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    fuse(adapted.eval(), precision="int8")
    out, real = run(adapted), call()["attention_mask"].bool()
    assert kept(adapted) == dict.fromkeys(("layer 0 qkv", "layer 1 qkv"), "a Linear")
    assert relative_error(out[real], run(fastbert.unfuse(adapted))[real].double()) < 0.03


def test_it_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.seeded()
    for bad in ({"layers": [{}]}, {"layers": [dict.fromkeys(("qkv", "context", "up", "down"), 1.0)] * 2}, 3):
        model.config.fastbert = {"int8": bad}
        with pytest.raises(ValueError, match=r"^model.config.fastbert\['int8'\]: expected what fastbert.calibrate"):
            fuse(model, precision="int8")
    model.config.fastbert = {"int8": {"layers": [dict.fromkeys(("qkv", "context", "up", "down"), "0-_")] * 2}}
    with pytest.raises(ValueError, match=r"has 3 factors for 128 input features; run"):
        run(fuse(model, precision="int8"))
    fastbert.unfuse(model)
    del model.config.fastbert
    monkeypatch.setattr(int8.Int8, "unsupported", lambda device: "no")
    with pytest.raises(fastbert.UnsupportedModelError, match=r"^BertModel can't be fused with precision='int8': no$"):
        fuse(model, precision="int8")
    assert type(model) is hf.BertModel


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "a GPU, of compute capability 7.5: it takes 8.0 to 9.0"),
        ((8, 0), None),
        ((8, 6), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), "a GPU, of compute capability 10.0: whose tensor cores are slow at it; precision='fp8' is for them"),
    ],
)
def test_support_by_compute_capability(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert support.int8_is_unsupported(torch.device("cuda:0")) == reason
    assert support.int8_is_unsupported(torch.device("meta")) == "device meta"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (distil.DistilBertModel, {"dim": 64, "hidden_dim": 96, "n_heads": 2, "n_layers": 2}),
        (mpnet.MPNetModel, {**SMALL, "num_hidden_layers": 2}),
    ],
)
def test_other_families(kind: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=models.VOCABULARY, **config)).eval()
    real = call()["attention_mask"].bool()
    plain = run(model)[real]
    out = run(fuse(model, precision="int8"))[real]
    assert 1e-4 < relative_error(out, plain.double()) < 0.03
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed, int8": 1}


def with_an_outlier() -> Any:
    """A model with a column of activations that is a hundred times the others."""
    model = models.seeded()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.LayerNorm.weight[7] = 60.0
            layer.intermediate.dense.weight[:, 7] /= 60.0
    return model


def test_calibration_smooths_outliers(tmp_path: Path) -> None:
    model, real = with_an_outlier(), call()["attention_mask"].bool()
    plain = run(model)[real].double()
    rough = relative_error(run(fuse(with_an_outlier(), precision="int8"))[real], plain)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = fastbert.calibrate(model, BATCHES, tolerance=1.0, precision="int8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.precision == "int8" and "error with one GEMM in int8" in str(found)
    smooth = run(fuse(model, precision="int8"))
    assert relative_error(smooth[real], plain) < 0.7 * rough
    assert found.error == pytest.approx(relative_error(smooth[real], plain), rel=0.05)
    up = next(g for g in found.gemms if (g.layer, g.name) == (0, "up"))
    assert isinstance(up.found, str)
    assert int8.factors_of(up.found).argmin() == 7
    model.save_pretrained(tmp_path)
    again = fuse(hf.BertModel.from_pretrained(tmp_path).eval(), precision="int8")
    assert torch.equal(run(again), smooth)
    assert "smoothed by calibration" in explained(again)
    # Beside what FP8 has found.
    fastbert.calibrate(model, BATCHES, tolerance=1.0)
    assert set(model.config.fastbert) == {"fp8", "int8"}
    assert torch.equal(run(model), smooth)


def test_calibration_keeps_what_costs_most() -> None:
    whole = fastbert.calibrate(with_an_outlier(), BATCHES, tolerance=1.0, precision="int8")
    model = fuse(with_an_outlier(), precision="int8")
    found = fastbert.calibrate(model, BATCHES, tolerance=0.7 * whole.error, precision="int8")
    left = {(g.layer, g.name) for g in found.gemms if g.kept}
    assert 0 < len(left) < 8
    assert found.error <= 0.7 * whole.error
    run(model)
    assert kept(model) == {f"layer {i} {name}": "calibration keeps it" for i, name in left}
    with pytest.raises(ValueError, match=r"^precision is None; expected one of 'fp8', 'int8'"):
        fastbert.calibrate(model, BATCHES, precision=None)  # type: ignore[arg-type]


def test_factors_are_written_to_a_quarter_of_an_octave() -> None:
    factors = torch.exp2(torch.linspace(-7.9, 7.6, 500))
    text = int8.written(factors)
    assert len(text) == 500
    assert (int8.factors_of(text).log2() - factors.log2()).abs().max() <= 0.1251
    assert int8.Int8.is_found(text) and not int8.Int8.is_found(text + "!") and not int8.Int8.is_found(3)
    assert json.loads(json.dumps(text)) == text


def test_weights_are_rounded_to_their_rows() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    weight[4], weight[5, 1] = 0.0, float("inf")
    for limit in (127, 64):
        values, scale = int8.quantize_weight(weight, limit)
        assert scale[5].isnan() and not values[4].any()
        finite = torch.arange(16) != 5
        assert (values[finite].abs().amax(1) == limit).sum() == 14
        back = values[finite] * scale[finite, None]
        assert ((back - weight[finite]).abs() <= 0.5001 * scale[finite, None]).all()
        torch.testing.assert_close(back, weight_as_int8(weight[finite], limit), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertForSequenceClassification])
def test_verify(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.seeded(kind, **SMALL)
    report = fastbert.verify(model, BATCHES, precision="int8", layouts=("packed",))
    assert report.ok, str(report)
    assert report.ran == {"packed": {"packed, int8": 2}}
    assert "stock in int8" in str(report) and "as it is for int8" in str(report)
    assert {m.name for m in report.quality} & {"same label", "same nearest text"}

    # A zero that is one off is seen.
    right = cpu.quantize_int8

    def off(x: Tensor, factors: Tensor | None) -> Any:
        values, scale, zero = right(x, factors)
        return values, scale, zero + 1

    monkeypatch.setitem(ops.CPU_BACKEND, "quantize_int8", off)
    assert not fastbert.verify(model, BATCHES, precision="int8", layouts=("packed",)).ok


def test_as_int8_is_what_the_kernels_round_to() -> None:
    x = torch.randn(37, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 37)[:, None]
    values, scale, zero = reference_int8.quantize_int8(x, None)
    mine = ((values - zero[:, None]) * scale[:, None] - x).norm(dim=1)
    torch.testing.assert_close(mine, (as_int8(x) - x).norm(dim=1), rtol=5e-3, atol=0)


def test_graphs_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Cuda", StandIn)
    model, twin = fuse(models.seeded(), precision="int8", cuda_graphs=True), fuse(models.seeded(), precision="int8")
    outs = [run(model) for _ in range(3)]
    assert fastbert.explain(model).encoders[0].graph_calls["replayed"] == 1
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed, int8": 3}
    assert all(relative_error(out, run(twin).double()) < 2e-3 for out in outs)
