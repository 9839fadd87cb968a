"""The nine classes under transformers' names: from_pretrained in every form a checkpoint comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastbert
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
    assert (
        "forward has been replaced" in str(fastbert.explain(model)) or fastbert.explain(model).encoders[0].stock_calls
    )
