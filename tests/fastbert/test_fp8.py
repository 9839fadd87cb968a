"""Models in FP8: against stock whose linear layers quantize, in float64; when they don't; what is left untouched."""

from __future__ import annotations

import copy
import io
import json
import math
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
from fastbert import calibration, fuse, ops
from fastbert.kernels import attention, launch, linear_fp8, quantize_fp8, reference_fp8
from fastbert.layers import copies, derived, fp8
from fastbert.models.bert import BertModel
from fastbert.numerics import as_fp8, assert_within_policy, relative_error
from fastbert.runtime import graphs, packing, support
from fastbert.runtime.registry import layers_of
from tests import models
from tests.fastbert import test_families
from tests.fastbert.test_encoder import launches
from tests.fastbert.test_graphs import StandIn

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
KEPT = {"qkv": 0.0625, "context": 0.03125, "up": None, "down": 0.0625}


class Quantizing(nn.Module):
    """A linear layer whose input and weight are quantized, and multiplied in the dtype they come in."""

    def __init__(self, linear: nn.Linear, scale: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        values, scales = reference_fp8.quantize_fp8(linear.weight.to(dtype), None)
        self.weight = (values.double() * scales[:, None]).to(linear.weight.dtype)
        self.bias, self.scale, self.dtype = linear.bias, scale, dtype

    def forward(self, x: Tensor) -> Tensor:
        # Rounded first to what the fused model would have, and where it would have it.
        values, scales = reference_fp8.quantize_fp8(x.flatten(0, -2).to(self.dtype), self.scale)
        rows = values.double() * (scales[:, None] if self.scale is None else self.scale)
        return F.linear(rows.view(x.shape).to(x.dtype), self.weight, self.bias)


def quantizing(model: Any, dtype: torch.dtype, scales: list[Any] | None = None) -> Any:
    """`model`, a stock BertModel, with linear layers that quantize as the config says."""
    for i, layer in enumerate(model.encoder.layer):
        own = dict.fromkeys(copies.GEMMS) if scales is None else scales[i]
        attention = layer.attention
        for holder, name, gemm in (
            *((attention.self, name, "qkv") for name in ("query", "key", "value")),
            (attention.output, "dense", "context"),
            (layer.intermediate, "dense", "up"),
            (layer.output, "dense", "down"),
        ):
            if scales is None or own[gemm] is not None:
                setattr(holder, name, Quantizing(getattr(holder, name), own[gemm], dtype))
    return model


def call(batch: int = 4, seqlen: int = 23) -> dict[str, Any]:
    return {"input_ids": models.ids(batch, seqlen), "attention_mask": models.masks(batch, seqlen)["right"]}


def run(model: Any, **given: Any) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(**(given or call())).last_hidden_state
    return out


def not_in_8_bits(model: Any) -> dict[str, str]:
    with torch.inference_mode():
        (encoder,) = fastbert.explain(model).encoders
    return encoder.not_quantized


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_product_is_that_of_quantized_numbers(calibrated: bool) -> None:
    dtype = torch.float32
    model, stock, truth = models.three(models.seeded(), dtype)
    scales = None
    if calibrated:
        scales = [KEPT, {**KEPT, "up": 0.125, "down": None}]
        model.config.fastbert = {"fp8": {"layers": scales}}
    fuse(model, precision="fp8")
    real = call()["attention_mask"].bool()
    out = run(model)[real]
    expected = [run(quantizing(m, dtype, scales))[real] for m in (stock, truth)]
    # A number close to a tie may fall on another side in float64: sums and statistics in another order are no better.
    error = relative_error(out, expected[1])
    assert error <= max(2 * relative_error(expected[0], expected[1]), 1e-3)
    plain = run(models.seeded())[real]
    assert 30 * error < relative_error(out, plain.double()) < 0.2
    (encoder,) = fastbert.explain(model).encoders
    assert encoder.fused_calls == {"packed, fp8": 1}
    assert not_in_8_bits(model) == (
        {"layer 0 up": "calibration keeps it", "layer 1 down": "calibration keeps it"} if calibrated else {}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits(dtype: torch.dtype) -> None:
    """Residuals and attention in 16 bits move the result by far less than FP8 does."""
    model = models.seeded().to(dtype)
    truth = run(copy.deepcopy(model).double())
    out = run(fuse(model, precision="fp8", padding="dense"))
    assert out.dtype == dtype
    real = call()["attention_mask"].bool()
    wide = run(fuse(models.seeded().to(dtype).float(), precision="fp8", padding="dense"))
    assert relative_error(out[real], wide[real].double()) < relative_error(out[real], truth[real]) < 0.2


def small(calibrated: bool) -> Any:
    model = models.seeded(**SMALL)
    if calibrated:
        model.config.fastbert = {"fp8": {"layers": [{**KEPT, "up": 0.0625}] * 2}}
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_kernels_run_a_model(calibrated: bool, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The whole layer through the kernels (in the interpreter, without a GPU) is what their twins make of it."""
    model = fuse(small(calibrated).to(device), precision="fp8")
    given = {name: x.to(device) for name, x in call(2, 9).items()}
    for module in (attention, quantize_fp8, linear_fp8):
        for name in {*ops.CPU_BACKEND} & {*vars(module)}:
            monkeypatch.setitem(ops.CPU_BACKEND, name, getattr(module, name))
    out = run(model, **given).cpu()
    monkeypatch.undo()
    wide = run(fuse(small(calibrated), precision="fp8"), **call(2, 9)).double()
    limit = 2e-3  # a number close to a tie, and what follows
    if device == "cuda" and launch.architecture(torch.device(device)) == "sm_90":
        limit = 2 * relative_error(with_sums_of_hopper(calibrated, monkeypatch), wide)
    assert relative_error(out, wide) < limit


def with_sums_of_hopper(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What twins make of it whose GEMMs are added up in fewer bits: more numbers fall on the other side of a tie."""

    def affine(x: Tensor, rows: Any, weight: Tensor, columns: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
        out = reference_fp8.mm_on_hopper(x, weight, launch.FP8_EXACT_K) * columns
        out = out * rows[:, None] if rows is not None and rows.numel() else out
        return out if bias is None else out + bias

    with monkeypatch.context() as patch:
        patch.setattr(reference_fp8, "_affine", affine)
        return run(fuse(small(calibrated), precision="fp8"), **call(2, 9))


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_sums_of_hopper_cost_less_than_8_bits(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are allowed there is more than on a device that sums in float32, and less than quantizing costs."""
    wide = run(fuse(small(calibrated), precision="fp8"), **call(2, 9)).double()
    plain = run(fuse(small(calibrated)), **call(2, 9)).double()
    error = relative_error(with_sums_of_hopper(calibrated, monkeypatch), wide)
    assert 2e-3 < error < 0.7 * relative_error(wide, plain)


@pytest.mark.parametrize("calibrated", [False, True])
def test_operators_of_a_layer(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one launch; by the first layer's alone what embeddings return is quantized."""
    model, names = fuse(small(calibrated), precision="fp8"), launches(monkeypatch)
    run(model)
    layer = [
        "linear_fp8",
        *(["attention_fp8"] if calibrated else ["attention", "quantize_fp8"]),
        "linear_add_fp8",
        "layer_norm_fp8",
        "linear_gelu_fp8",
        *([] if calibrated else ["quantize_fp8"]),
        "linear_add_fp8",
        "layer_norm_fp8",
    ]
    start = names.index("linear_fp8")
    end = start + 2 * len(layer)
    assert names[start:end] == [*layer, *layer[:-1], "layer_norm"]
    assert names[start - 1] == "quantize_fp8"
    assert not any(name.endswith("_fp8") for name in names[end:])


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("kind", [hf.BertModel, mpnet.MPNetModel])
def test_attention_that_writes_8_bits_changes_no_bit(kind: Any, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model: beside attention in the model's dtype, quantized by a launch of its own."""
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=models.VOCABULARY, **SMALL, num_hidden_layers=2)).eval().bfloat16()
    model.config.fastbert = {"fp8": {"layers": [{**KEPT, "context": 2**-16}, KEPT]}}  # the first saturates
    real = call()["attention_mask"].bool()
    out = run(fuse(model, precision="fp8", padding=padding))[real]
    saturated = []

    def apart(*args: Any) -> Tensor:
        attended = ops.CPU_BACKEND["attention"](*args[:-1])
        values, _ = ops.CPU_BACKEND["quantize_fp8"](attended.flatten(1), args[-1])
        saturated.append(bool((values.float().abs() == 448).any()))
        return values.view(attended.shape)

    monkeypatch.setitem(ops.CPU_BACKEND, "attention_fp8", apart)
    assert torch.equal(run(model)[real], out)
    assert saturated == [True, False]


def test_a_sequence_is_the_same_in_any_batch() -> None:
    model = fuse(models.seeded(), precision="fp8", padding="packed")
    given = call(5, 31)
    lengths = given["attention_mask"].sum(1).tolist()
    out = run(model, **given)
    for i, n in enumerate(lengths):
        # Twins multiply by torch's GEMMs, whose order of sums may vary by rows: what is asked of them is less.
        alone = run(model, input_ids=given["input_ids"][i : i + 1, :n])
        assert relative_error(alone[0], out[i, :n].double()) < 2e-3


def test_without_inference_it_is_the_model_in_its_own_dtype() -> None:
    model, plain = models.seeded(), models.seeded()
    fuse(model, precision="fp8")
    fuse(plain)
    given = call()
    out, expected = (m(**given).last_hidden_state for m in (model, plain))
    assert torch.equal(out, expected)
    out.sum().backward()
    with torch.no_grad():
        assert not torch.equal(model(**given).last_hidden_state, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(**given).last_hidden_state, plain(**given).last_hidden_state)
        torch.manual_seed(0)
        trained = model.train()(**given).last_hidden_state
        torch.manual_seed(0)
        assert torch.equal(trained, plain.train()(**given).last_hidden_state)
        assert not_in_8_bits(model) == {}
        model.eval().encoder.layer[1].output.dropout.train()  # dropout to sample from
        model(**given)
    (encoder,) = fastbert.explain(model.train()).encoders
    assert encoder.fused_calls == {"packed": 4, "packed, fp8": 1}
    assert encoder.quantized == "off: gradients are enabled, or it is training, autocast or torch.compile"
    assert encoder.precision == "fp8"


def test_nothing_of_it_is_in_the_model(tmp_path: Path) -> None:
    model = models.seeded()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    names = list(dict(model.named_buffers())) + list(dict(model.named_parameters()))
    out = run(fuse(model, precision="fp8"))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        n: p for n, (p, _) in before.items()
    }
    assert list(dict(model.named_buffers())) + list(dict(model.named_parameters())) == names
    model.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path).eval()
    assert not hasattr(again.config, "fastbert")
    assert torch.equal(run(fuse(again, precision="fp8")), out)
    pickled = pickle.dumps(model)
    plain = pickle.dumps(fuse(models.seeded()))
    assert len(pickled) < len(plain) + 1000
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(run(other), out)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    fastbert.unfuse(model)
    assert not any(isinstance(value, fp8.Fp8) for module in model.modules() for value in vars(module).values())
    assert torch.equal(run(model), run(models.seeded()))
    assert not fastbert.explain(model).encoders[0].fused


def test_weights_are_quantized_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    right = fp8.Fp8Gemm
    monkeypatch.setattr(fp8, "Fp8Gemm", lambda *given: made.append(given) or right(*given))
    model = fuse(models.seeded(), precision="fp8")
    first = run(model)
    assert len(made) == 8
    assert torch.equal(run(model), first)
    assert len(made) == 8
    changes: dict[str, Any] = {
        "an optimizer's step": lambda: torch.optim.SGD([model.encoder.layer[0].output.dense.weight], 0.1).step(),
        "load_state_dict": lambda: model.load_state_dict(models.seeded(seed=3).state_dict()),
        "another dtype": lambda: model.bfloat16(),
    }
    model.encoder.layer[0].output.dense.weight.grad = torch.ones(128, 256)
    for what, change in changes.items():
        change()
        fresh = copy.deepcopy(fastbert.unfuse(copy.deepcopy(model)))
        assert torch.equal(run(model), run(fuse(fresh, precision="fp8"))), what
    model.float()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)
    model.encoder.layer[1].output.dense.weight.data = torch.randn(128, 256)
    assert torch.equal(run(model), run(fuse(fastbert.unfuse(copy.deepcopy(model)), precision="fp8")))


@pytest.mark.parametrize("how", ["trained", "in evaluation", "merged"])
def test_what_leaves_no_version_is_seen_after_training(how: str) -> None:
    model = fuse(models.seeded(), precision="fp8")
    before = run(model)
    if how == "trained":
        model.train()
        model.encoder.layer[1].output.dense.weight.data.mul_(3.0)  # as some optimizers do
        model.eval()
    elif how == "in evaluation":
        model(**call()).last_hidden_state.square().sum().backward()
        versions = [p._version for p in model.encoder.parameters()]
        torch.optim.AdamW(model.parameters(), fused=True).step()
        assert [p._version for p in model.encoder.parameters()] == versions  # else this shows nothing
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval().merge_and_unload()
    assert not torch.equal(run(model), before)
    assert torch.equal(run(model), run(fuse(fastbert.unfuse(copy.deepcopy(model)), precision="fp8")))
    made = model.encoder.fastbert.precision.derived.made[0]
    model.eval()  # as sentence-transformers calls it before every batch
    assert model.encoder.fastbert.precision.derived.made[0] is made


def test_attention_goes_by_the_list_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one on a GPU alone."""
    given = []
    monkeypatch.setattr(packing, "tiles_of", ops.attention_tiles)
    for name in ("attention", "attention_fp8"):
        right = ops.CPU_BACKEND[name]
        monkeypatch.setitem(ops.CPU_BACKEND, name, lambda *args, _right=right: given.append(args[8]) or _right(*args))
    for model, precision in ((small(False), None), (small(False), "fp8"), (small(True), "fp8")):
        run(fuse(model, precision=precision))
    assert len(given) == 6
    assert all(isinstance(tiles, Tensor) for tiles in given)


def test_a_new_weight_at_an_old_address_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A freed weight's address and version may both come back with another weight, where nothing holds the old one."""
    right = derived.Watch.__init__
    monkeypatch.setattr(derived.Watch, "__init__", lambda self, parameters, sampled: right(self, parameters, False))
    model = fuse(models.seeded(), precision="fp8")
    run(model)
    model.encoder.layer[0].output.dense.weight.data = torch.randn(128, 256)
    state = model.encoder.fastbert.precision
    watches = [(state._kept.watch, state._kept.parameters)]
    watches += [(made.parameters, _tensors(model.encoder.layer[i])) for i, made in state.derived.made.items()]
    for watch, of in watches:
        watch._key = derived._key(of)  # as if it had the address of the old one
    assert torch.equal(run(model), run(fuse(fastbert.unfuse(copy.deepcopy(model)), precision="fp8")))


def _tensors(layer: Any) -> list[Any]:
    return [x for group in layer.layout.gemms(layer).values() for linear in group for x in (linear.weight, linear.bias)]


@pytest.mark.parametrize("where", [0, 1])
def test_a_hook_that_changes_a_layers_result_is_heeded(where: int) -> None:
    model = fuse(models.seeded(), precision="fp8", padding="dense")
    plain = run(model)
    layer = model.encoder.layer[where]

    def in_place(module: Any, args: Any, output: Tensor) -> None:
        output.mul_(1.5)

    layer.register_forward_hook(in_place)
    twice = copy.deepcopy(model)
    changed = run(model)
    assert not torch.equal(changed, plain)
    layer._forward_hooks.clear()
    layer.register_forward_hook(lambda module, args, output: output * 1.5)
    assert torch.equal(run(model), changed)
    assert torch.equal(run(twice), changed)


def test_products_that_do_not_fit_stay_in_the_models_dtype() -> None:
    model = models.seeded(intermediate_size=100)
    real = call()["attention_mask"].bool()
    out = run(fuse(model, precision="fp8"))[real]
    reason = "100 input features; FP8 takes a multiple of 16"
    assert not_in_8_bits(model) == {"layer 0 down": reason, "layer 1 down": reason}
    assert relative_error(out, run(models.seeded(intermediate_size=100))[real].double()) < 0.2
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *args: None)
    run(model)  # that layer runs stock
    assert "layer 0 up" in not_in_8_bits(model)
    with torch.inference_mode():
        assert "layer 0: stock: " in str(fastbert.explain(model))
        assert "fp8: 5 of 8 GEMMs, a scale of each row's own, simulated" in str(fastbert.explain(model))


def test_it_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.seeded()
    with pytest.raises(ValueError, match=r"^precision is 'int4'; expected one of None, 'fp8', 'int8'$"):
        fuse(model, precision="int4")
    monkeypatch.setattr(fp8.Fp8, "unsupported", lambda device: "no")
    with pytest.raises(fastbert.UnsupportedModelError, match=r"^BertModel can't be fused with precision='fp8': no$"):
        fuse(model, precision="fp8")
    monkeypatch.undo()
    for bad in ({"layers": [KEPT]}, {"layers": [KEPT, {**KEPT, "up": -1}]}, {"layers": [KEPT, {"up": 1.0}]}, {}, 3):
        model.config.fastbert = {"fp8": bad}
        with pytest.raises(ValueError, match=r"^model.config.fastbert\['fp8'\]"):
            fuse(model, precision="fp8")
    for bad in (True, 0, 1e-320, 1e-39, 1e39, math.inf, math.nan, 10**400, "1"):  # or their inverse is not a float32
        model.config.fastbert = {"fp8": {"layers": [KEPT, {**KEPT, "up": bad}]}}
        with pytest.raises(
            ValueError, match=r"^model.config.fastbert\['fp8'\]: expected what fastbert.calibrate writes"
        ):
            fuse(model, precision="fp8")
    del model.config.fastbert
    narrow = models.seeded(hidden_size=100, num_attention_heads=4, intermediate_size=100)
    with pytest.raises(fastbert.UnsupportedModelError, match=r"layer 0 qkv: 100 input features; FP8 takes a multiple"):
        fuse(narrow, precision="fp8")
    for untouched in (model, narrow):
        assert not fastbert.explain(untouched).encoders[0].fused
        assert type(untouched) is hf.BertModel


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_support_by_compute_capability(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reason = support.fp8_is_unsupported(torch.device("cuda:0"))
    assert reason == ("a GPU, of compute capability 8.0; FP8 takes 8.9 or higher" if refused else None)
    assert support.fp8_is_unsupported(torch.device("meta")) == "device meta"


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = models.seeded()
        with pytest.raises(fastbert.UnsupportedModelError, match=r"its weight was made under torch\.inference_mode"):
            fuse(model, precision="fp8")


def test_fuse_again_changes_the_precision() -> None:
    model = fuse(models.seeded(), precision="fp8")
    out = run(model)
    plain = run(fuse(model))
    assert torch.equal(plain, run(fuse(models.seeded())))
    assert torch.equal(run(fuse(model, precision="fp8")), out)
    assert fastbert.explain(fuse(BertModel(models.config()), precision="fp8")).encoders[0].precision == "fp8"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (distil.DistilBertModel, {"dim": 64, "hidden_dim": 96, "n_heads": 2, "n_layers": 2}),
        (
            mpnet.MPNetModel,
            {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2},
        ),
    ],
)
def test_other_families(kind: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=models.VOCABULARY, **config)).eval()
    given = call()
    real = given["attention_mask"].bool()
    plain = run(model, **given)[real]
    out = run(fuse(model, precision="fp8"), **given)[real]
    assert 1e-3 < relative_error(out, plain.double()) < 0.1
    (encoder,) = fastbert.explain(model).encoders
    assert encoder.fused_calls == {"packed, fp8": 1}


def test_outputs_of_the_wrong_sort_would_be_seen() -> None:
    """The policy does not hold in FP8: what is tested above is not vacuous."""
    model, stock, truth = models.three(models.seeded(), torch.float32)
    real = call()["attention_mask"].bool()
    outs = [run(m)[real] for m in (fuse(model, precision="fp8"), stock, truth)]
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_within_policy(*outs)


def outliers(**changes: Any) -> Any:
    """A model one of whose GEMMs has an input that FP8 is bad at: a few large numbers that cancel out."""
    model = models.seeded(**changes)
    with torch.no_grad():
        dense = model.encoder.layer[1].intermediate.dense
        norm = model.encoder.layer[1].attention.output.LayerNorm
        norm.bias[:2] = 200.0
        dense.weight[:, :2] *= 5.0
        dense.weight[:, 1] = -dense.weight[:, 0] * (1 + 2**-7)
    return model


BATCHES = [call(4, 23), call(3, 17)]


def test_calibration_finds_scales(tmp_path: Path) -> None:
    model = models.seeded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = fastbert.calibrate(model, BATCHES, tolerance=1.0)
    assert not fastbert.explain(model).encoders[0].fused
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(gemm.kept for gemm in found.gemms)
    assert (found.texts, found.tokens) == (7, sum(int(batch["attention_mask"].sum()) for batch in BATCHES))

    # What each GEMM multiplies, at real tokens: here, that of the last down, by stock itself.
    seen: list[Tensor] = []
    dense = model.encoder.layer[1].output.dense
    hook = dense.register_forward_pre_hook(lambda module, args: seen.append(args[0][batch["attention_mask"].bool()]))
    for batch in BATCHES:
        run(model, **batch)
    hook.remove()
    gemm = next(p for p in found.gemms if (p.layer, p.name) == (1, "down"))
    largest = torch.cat(seen).abs().max().item()
    assert gemm.largest == pytest.approx(largest, rel=1e-6)
    assert gemm.found == 2 ** round(math.log2(gemm.found))
    assert 448 * gemm.found >= largest  # nothing saturates
    assert 4 * largest < 448 * gemm.found <= 16 * largest  # with room for eight times as much

    assert model.config.fastbert["fp8"]["layers"][1]["down"] == gemm.found
    model.save_pretrained(tmp_path)
    again = fuse(hf.BertModel.from_pretrained(tmp_path).eval(), precision="fp8")
    out = run(again)
    assert torch.equal(run(fuse(model, precision="fp8")), out)
    assert "8 of 8 GEMMs, scales from calibration" in explained(again)
    real = call()["attention_mask"].bool()
    plain = run(models.seeded())[real]
    # The error that it tells is that of the first batch.
    assert found.error == pytest.approx(relative_error(out[real], plain.double()), rel=0.01)
    assert "last hidden states within" in str(found)
    again.to(torch.bfloat16)
    assert not again.encoder.fastbert.precision.derived.made  # of memory that has been left


def explained(model: Any) -> str:
    with torch.inference_mode():
        return str(fastbert.explain(model))


def test_calibration_keeps_what_costs_most() -> None:
    model = fuse(outliers(), precision="fp8")
    dynamic = run(model)
    whole = fastbert.calibrate(model, BATCHES, tolerance=10.0)
    found = fastbert.calibrate(model, BATCHES, tolerance=0.8 * whole.error)
    errors = {(p.layer, p.name): p.error for p in found.gemms}
    assert max(errors, key=errors.__getitem__) == (1, "up")
    kept = {(p.layer, p.name) for p in found.gemms if p.kept}
    assert (1, "up") in kept
    assert kept != set(errors)
    assert found.error <= 0.8 * whole.error
    # The model was fused in FP8, and goes on by what was found.
    assert {tuple(name.split()[1:]) for name in not_in_8_bits(model)} == {(str(i), name) for i, name in kept}
    real, plain = call()["attention_mask"].bool(), run(outliers())
    assert relative_error(run(model)[real], plain[real].double()) < relative_error(dynamic[real], plain[real].double())
    assert fastbert.calibrate(model, BATCHES, tolerance=1e-9).error == 0.0
    with pytest.raises(fastbert.UnsupportedModelError, match="calibration keeps it"):
        fuse(model, precision="fp8")


def test_calibration_refuses_what_it_cannot_use() -> None:
    model = models.seeded()
    with pytest.raises(ValueError, match=r"^tolerance is 0; expected a positive number"):
        fastbert.calibrate(model, BATCHES, tolerance=0)
    with pytest.raises(ValueError, match=r"^batch_size is 0"):
        fastbert.calibrate(model, BATCHES, batch_size=0)
    with pytest.raises(ValueError, match=r"^tokenizer is None, and inputs holds texts"):
        fastbert.calibrate(model, ["a text"])
    padding = {"input_ids": models.ids(2, 5), "attention_mask": torch.zeros(2, 5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"^inputs: a batch without a real token"):
        fastbert.calibrate(model, [*BATCHES, padding])
    with pytest.raises(ValueError, match=r"^inputs: 'input_ids' holds 211; expected 0 to 210"):
        fastbert.calibrate(model, [*BATCHES, {"input_ids": torch.tensor([[1, 211]])}])
    assert fastbert.verify(model, [*BATCHES, padding], precision="fp8").ok
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] = math.inf
    with pytest.raises(ValueError, match=r"^inputs: what the model multiplies on them is not finite"):
        fastbert.calibrate(model, BATCHES)
    assert not hasattr(model.config, "fastbert")


def test_the_least_scale_of_calibration_is_one_that_fuse_takes() -> None:
    model = models.seeded()
    for largest, least in ((0.0, 1.0), (1e-44, 2.0**-126), (448.0, 1.0), (449.0, 2.0)):
        assert calibration._least_scale(largest) == least
        model.config.fastbert = {"fp8": {"layers": [{**KEPT, "up": least}] * 2}}
        assert fuse(model, precision="fp8").encoder.fastbert.precision.found[0]["up"] == least


def test_calibration_of_heads_and_choices() -> None:
    model = models.seeded(hf.BertForMultipleChoice)
    choices = {"input_ids": models.ids(2, 3, 11), "attention_mask": models.masks(6, 11)["right"].view(2, 3, 11)}
    assert fastbert.calibrate(model, choices, tolerance=1.0).texts == 6
    with torch.inference_mode():
        assert fuse(model, precision="fp8")(**choices).logits.isfinite().all()


@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertForSequenceClassification, hf.BertForQuestionAnswering])
def test_verify_in_8_bits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.seeded(kind, **SMALL)
    report = fastbert.verify(model, BATCHES, precision="fp8", layouts=("packed",))
    assert report.ok, str(report)
    assert report.ran == {"packed": {"packed, fp8": 2}}
    assert all(row.ratio < 1.1 for row in report.rows)
    assert {row.name for row in report.rows} >= {"embeddings", "layer.0", "layer.1", "last_hidden_state"}
    names = {measure.name: measure for measure in report.quality}
    assert names.keys() & {"same label", "same span", "same nearest text"}
    assert all(
        0 < measure.value <= 1.0 + 1e-9 and measure.stock == pytest.approx(1, abs=1e-6) for measure in report.quality
    )
    assert json.loads(report.to_json())["quality"][0]["name"] in str(report)

    # Twice the error of FP8 is seen.
    right = reference_fp8.to_e4m3
    monkeypatch.setattr(reference_fp8, "to_e4m3", lambda x: right(x * 1.06))
    assert not fastbert.verify(model, BATCHES, precision="fp8", layouts=("packed",)).ok


def test_a_scale_that_saturates_is_seen_by_verify() -> None:
    model = models.seeded(**SMALL)
    fastbert.calibrate(model, BATCHES, tolerance=1.0)
    assert fastbert.verify(model, BATCHES, precision="fp8", layouts=("packed",)).ok
    for layer in model.config.fastbert["fp8"]["layers"]:
        layer["up"] /= 64
    report = fastbert.verify(model, BATCHES, precision="fp8", layouts=("packed",))
    assert not report.ok
    assert report.first_departure is not None
    assert report.first_departure.name == "layer.0"


def test_as_fp8_is_what_the_kernels_round_to() -> None:
    x = torch.randn(37, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 37)[:, None]
    values, scales = reference_fp8.quantize_fp8(x, None)
    torch.testing.assert_close(as_fp8(x), values.float() * scales[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_graphs_replay_8_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in of test_graphs: a replay reads the quantized weights of its capture, until a weight changes."""
    monkeypatch.setattr(graphs, "Cuda", StandIn)
    made = models.seeded() if family == "bert" else test_families.seeded(family, "ModernBertModel")
    model = fuse(copy.deepcopy(made), precision="fp8", cuda_graphs=True)
    twin = fuse(made, precision="fp8")
    outs = [run(model) for _ in range(3)]
    assert fastbert.explain(model).encoders[0].graph_calls["replayed"] == 1
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed, fp8": 3}
    for out in outs:
        assert relative_error(out, run(twin).double()) < 2e-3
    for each in (model, twin):
        with torch.no_grad():
            layer = layers_of(each)[1]
            (layer.output.dense if family == "bert" else layer.mlp.Wo).weight.mul_(0.5)
    changed = run(twin)
    assert relative_error(changed, outs[0].double()) > 0.1
    for _ in range(4):
        assert relative_error(run(model), changed.double()) < 2e-3
    calls = fastbert.explain(model).encoders[0].graph_calls
    assert calls["dropped: the model has changed"] == 1
    assert calls["replayed"] == 3
