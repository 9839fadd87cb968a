"""The nine classes under transformers' names: from_pretrained in every form a checkpoint comes in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.numerics import assert_within_policy
from tests import models


def answer(model: Any) -> torch.Tensor:
    mask = models.masks(5, 17)["right"]
    with torch.no_grad():
        return model(input_ids=models.ids(5, 17), attention_mask=mask)[0].float()


def ran_fused(model: Any) -> bool:
    return sum(fastbert.explain(model).encoders[0].fused_calls.values()) == 1


@pytest.mark.parametrize("kind", models.HEADS, ids=lambda kind: kind.__name__)
def test_the_nine_classes(kind: Any, tmp_path: Path) -> None:
    stock = models.seeded(kind)
    stock.save_pretrained(tmp_path)
    ours = getattr(fastbert, kind.__name__)
    assert issubclass(ours, kind)
    assert ours.__name__ == kind.__name__
    model = ours.from_pretrained(tmp_path)
    assert model.config.architectures == [kind.__name__]
    arguments: dict[str, Any] = {"input_ids": models.ids(5, 17)}
    if "MultipleChoice" in kind.__name__:
        arguments["input_ids"] = models.ids(2, 3, 17)
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments)[0], stock(**arguments)[0])
        hidden = model(**arguments, output_hidden_states=True).hidden_states
        expected = stock(**arguments, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden, expected)
    assert type(fastbert.unfuse(model).base_model).__module__.startswith("transformers.")


def test_a_decoder_loads_and_stays_stock() -> None:
    model = fastbert.BertLMHeadModel(models.config(is_decoder=True)).eval()
    with torch.no_grad():
        assert model(input_ids=models.ids(1, 5)).past_key_values is not None
    assert "decoder" in str(fastbert.explain(model))


def saved(path: Path, form: str) -> torch.Tensor:
    """Saves a seeded BertForMaskedLM under `path` in one form of checkpoint; returns its answer."""
    model = models.seeded(fastbert.BertForMaskedLM)
    expected = answer(model)
    if form == "sharded":
        model.save_pretrained(path, max_shard_size="200KB")
        assert len(list(path.glob("*.safetensors"))) > 1
        return expected
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    if form == "bin":
        (path / "model.safetensors").unlink()
        torch.save(weights, path / "pytorch_model.bin")
    elif form == "legacy names":
        old = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in weights.items()
        }
        assert old.keys() != weights.keys()
        save_file(old, path / "model.safetensors", metadata={"format": "pt"})
    elif form == "fp16":
        save_file({k: v.half() for k, v in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return expected


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "legacy names", "fp16"])
def test_forms_of_checkpoint(form: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, form)
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.dtype == torch.float32
    tolerance = {"rtol": 2**-9, "atol": 2**-8} if form == "fp16" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(answer(model), expected, **tolerance)
    assert ran_fused(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = saved(tmp_path, "safetensors")
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    error = (answer(model) - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert ran_fused(model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_on_one_device(device_map: Any, tmp_path: Path) -> None:
    expected = saved(tmp_path, "safetensors")
    model = fastbert.BertForMaskedLM.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(answer(model), expected)


def places(last: Any) -> dict[str, Any]:
    """A device_map of a BERT of two layers: the first half on the CPU, the second on `last`."""
    return {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": last, "pooler": last}


@pytest.mark.parametrize("first", ["fuse", "dispatch"])
@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_a_model_spread_over_devices_runs_fused(first: str, padding: str) -> None:
    """accelerate replaces the forward of all that it places, here all on one device, to move inputs there."""
    accelerate = pytest.importorskip("accelerate")
    stock = models.seeded()
    model = copy.deepcopy(stock)
    if first == "fuse":
        fastbert.fuse(model, padding=padding)
    accelerate.dispatch_model(model, places("cpu"), main_device="cpu", force_hooks=True)
    if first == "dispatch":
        fastbert.fuse(model, padding=padding)
    assert "forward" in model.encoder.layer[1].output.dense.__dict__
    call = {"input_ids": models.ids(5, 19), "attention_mask": models.masks(5, 19)["right"]}
    real = call["attention_mask"].bool()

    def last(which: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = which(**call).last_hidden_state[real]
        return found

    torch.testing.assert_close(last(model), last(stock))
    (encoder,) = fastbert.explain(model).encoders
    assert (encoder.fused_calls, encoder.stock_calls, encoder.layers) == ({padding: 1}, {}, {})
    model.train()(**call).last_hidden_state.sum().backward()
    assert model.encoder.layer[1].output.dense.weight.grad.abs().max() > 0
    model.eval()
    placed = model.encoder.layer[0].forward
    model.encoder.layer[0].forward = lambda *args, **kwargs: placed(*args, **kwargs)  # by somebody else
    torch.testing.assert_close(last(model), last(stock))
    assert "forward has been replaced" in str(fastbert.explain(model))
    del model.encoder.layer[0].forward
    torch.testing.assert_close(last(fastbert.unfuse(model)), last(stock))
    assert type(model.encoder.layer[1]) is hf.BertLayer
    assert model.encoder.layer[1]._old_forward.__func__ is hf.BertLayer.forward


@pytest.mark.parametrize("path", ["encoder.layer.0.output.dense", "encoder.layer.0.attention.self", "embeddings"])
def test_a_hook_derived_from_accelerates_own_is_called(path: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.AlignDevicesHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: Any, output: Any) -> Any:
            output = super().post_forward(module, output)
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    stock = models.seeded()
    model = fastbert.fuse(copy.deepcopy(stock))
    for which in (stock, model):
        hooks.add_hook_to_module(which.get_submodule(path), Doubling(execution_device="cpu"))
    call = {"input_ids": models.ids(3, 11)}
    with torch.no_grad():
        torch.testing.assert_close(model(**call).last_hidden_state, stock(**call).last_hidden_state)


@pytest.mark.parametrize("fused_when_removed", [True, False])
def test_unfused_once_accelerates_hooks_are_removed(fused_when_removed: bool) -> None:
    """They leave on each module the forward that it had."""
    accelerate = pytest.importorskip("accelerate")
    stock = models.seeded()
    model = copy.deepcopy(stock)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    if fused_when_removed:
        fastbert.fuse(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    call = {"input_ids": models.ids(3, 11)}
    with torch.no_grad():
        expected = stock(**call).last_hidden_state
        for _ in range(2):
            torch.testing.assert_close(fastbert.fuse(model)(**call).last_hidden_state, expected)
            assert torch.equal(fastbert.unfuse(model)(**call).last_hidden_state, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_over_two_gpus(padding: str, tmp_path: Path) -> None:
    """A sharded checkpoint, each half of the layers on a GPU of its own."""
    stock = models.seeded(num_hidden_layers=4).eval()
    stock.save_pretrained(tmp_path, max_shard_size="200KB")
    halves = {f"encoder.layer.{i}": i // 2 for i in range(4)}
    model = fastbert.BertModel.from_pretrained(tmp_path, device_map={"embeddings": 0, **halves, "pooler": 1})
    fastbert.fuse(model, padding=padding)
    call = {"input_ids": models.ids(5, 19).cuda(0), "attention_mask": models.masks(5, 19)["right"].cuda(0)}
    real = call["attention_mask"].bool()
    with torch.no_grad():
        found = model(**call).last_hidden_state[real]
        trio = [found, stock.cuda()(**call).last_hidden_state[real], stock.double()(**call).last_hidden_state[real]]
    assert_within_policy(*trio)
    assert fastbert.explain(model).encoders[0].fused_calls == {padding: 1}


def test_three_billion_parameters_by_config(tmp_path: Path) -> None:
    """36 layers of width 2560, built without memory; and the same shape in small, from shards onto a device_map."""
    sizes = {"num_hidden_layers": 36, "num_attention_heads": 20, "hidden_size": 2560, "intermediate_size": 10240}
    with torch.device("meta"):
        model = fastbert.BertModel(models.config(**sizes, vocab_size=119_547))
    assert 3.0e9 < sum(p.numel() for p in model.parameters()) < 3.3e9
    assert "head dimension" not in str(fastbert.explain(model))
    small = models.seeded(**{**sizes, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 256})
    small.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = fastbert.BertModel.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "4GB"})
    call = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
    real = call["attention_mask"].bool()
    with torch.no_grad():
        truth = copy.deepcopy(small).double()(**call).last_hidden_state[real]
        assert_within_policy(*(each(**call).last_hidden_state[real] for each in (loaded, small)), truth)
    assert fastbert.explain(loaded).encoders[0].fused_calls == {"packed": 1}


@pytest.mark.parametrize("before", [True, False], ids=["fused first", "offloaded first"])
def test_an_offloaded_layer_runs_stock(before: bool, tmp_path: Path) -> None:
    """accelerate replaces the forward of what it offloads, whose weights are elsewhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    stock = models.seeded()
    expected = answer(stock)
    model = models.seeded()
    if before:
        fastbert.fuse(model)
    device_map = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if not before:
        fastbert.fuse(model)
    torch.testing.assert_close(answer(model), expected)
    (encoder,) = fastbert.explain(model).encoders
    assert encoder.layers == {
        1: "encoder.layer.1.attention.self.query is a torch.nn.modules.linear.Linear whose forward has been replaced"
    }
    assert (encoder.fused_calls, encoder.stock_calls) == ({"dense": 1}, {})
