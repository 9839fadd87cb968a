"""`fastbert convert`: of a checkpoint every variable is used or told, what comes of it answers as its weights do, and
what is damaged or doesn't fit is told, and leaves no folder. TensorFlow's own files: test_convert_tensorflow.py."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.cli.__main__ import main
from fastbert.convert import names, weights
from fastbert.usage import UsageError
from tests import models

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary(size: int = models.VOCABULARY, upper: bool = False) -> list[str]:
    """Tokens of a WordPiece vocabulary; a third with upper case, where asked."""
    letters = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    if upper:
        letters = [each.title() if i % 3 == 0 else each for i, each in enumerate(letters)]
    return [*SPECIAL, *letters][:size]


def write_vocabulary(folder: Path, tokens: list[str] | None = None) -> None:
    (folder / "vocab.txt").write_text("\n".join(tokens or vocabulary()) + "\n", encoding="utf-8")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it was in 2019: gamma and beta, and a buffer of positions; what is tied is not in it."""
    found = {}
    for name, tensor in state.items():
        if not name.startswith("cls.predictions.decoder"):
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            found[name] = tensor
    table = next(name for name in found if name.endswith("position_embeddings.weight"))
    positions = torch.arange(len(found[table]))[None]
    return {table.replace("position_embeddings.weight", "position_ids"): positions, **found}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with an old state dict of a classifier, and an uncased vocabulary."""
    return write_old(models.seeded(hf.BertForSequenceClassification), tmp_path / "old")


def write_old(model: Any, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    change(folder / "config.json", **changes)
    torch.save(renamed(model.state_dict()), folder / "pytorch_model.bin")
    write_vocabulary(folder)
    return folder


def change(file: Path, **changes: Any) -> None:
    """Edits JSON; None takes a name out."""
    said = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


def edit(file: Path, by: Callable[[dict[str, Tensor]], object]) -> None:
    """Edits a state dict in place."""
    state = torch.load(file, weights_only=True)
    by(state)
    torch.save(state, file)


def refused(path: Path, output: Path, match: str, **options: Any) -> None:
    """That a conversion is refused, and leaves nothing beside what was there."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(UsageError, match=match):
        fastbert.convert(path, output, **options)
    assert sorted(output.parent.iterdir()) == before


def assert_same(model: nn.Module, output: Path) -> Any:
    """That what was converted has the weights of `model`, bit by bit, and answers as it does; what was converted."""
    report = json.loads((output / "conversion.json").read_text())
    found = getattr(transformers, report["model"]).from_pretrained(output).eval()
    assert type(found).__name__ == type(model).__name__
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    call = {"input_ids": models.ids(3, 17, high=99)}
    call = {name: each[:, None] for name, each in call.items()} if "MultipleChoice" in report["model"] else call
    with torch.no_grad():
        ours, theirs = (each(**call).to_tuple() for each in (found, model))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    return found


# State dicts.


@pytest.mark.parametrize("kind", models.HEADS, ids=lambda kind: kind.__name__)
def test_an_old_state_dict(kind: type[nn.Module], tmp_path: Path) -> None:
    model = models.seeded(kind)
    report = fastbert.convert(write_old(model, tmp_path / "old"), tmp_path / "new")
    assert_same(model, tmp_path / "new")
    sources = renamed(model.state_dict())
    assert report["variables"].keys() | report["left_out"].keys() == sources.keys()
    assert len(report["variables"]) + len(report["left_out"]) == len(sources)
    assert list(report["left_out"].values()) == ["0, 1, 2, ...: the model makes it itself"]
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert sorted(each["to"] for each in report["variables"].values()) == sorted(stored)
    assert report["parameters"] == sum(each.numel() for each in stored.values())
    assert set(report["files"]) == {entry.name for entry in (tmp_path / "new").iterdir()}


SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
FAMILIES = {
    "RobertaForMaskedLM": SMALL,
    "XLMRobertaForQuestionAnswering": SMALL,
    "CamembertModel": SMALL,
    "ElectraForPreTraining": {**SMALL, "embedding_size": 24},
    "ErnieForMaskedLM": {**SMALL, "use_task_id": True},
    "DistilBertForSequenceClassification": {"vocab_size": 99, "n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 48},
    "MPNetForTokenClassification": SMALL,
    "DebertaForTokenClassification": SMALL,
    "DebertaV2ForMaskedLM": {
        **SMALL,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
    },
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("typed", [True, False])
def test_other_families(name: str, typed: bool, tmp_path: Path) -> None:
    """Where the config doesn't say the model's type, by the class it names."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**FAMILIES[name])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    old = write_old(model, tmp_path / "old", **({} if typed else {"model_type": None}))
    (old / "vocab.txt").unlink()
    report = fastbert.convert(old, tmp_path / "new")
    assert_same(model, tmp_path / "new")
    assert report["notes"][-1] == "no tokenizer: there are no files of one beside it" and report["tokenizer"] is None


def test_what_is_converted_runs_fused(checkpoint: Path, tmp_path: Path) -> None:
    fastbert.convert(checkpoint, tmp_path / "new")
    model = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        model(**tokenizer(["AB cd", "ef"], padding=True, return_tensors="pt"))
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed": 1}


@pytest.mark.parametrize("form", ["shards", "legacy", "wrapped", "file", "index"])
def test_forms_of_state_dicts(form: str, checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "pytorch_model.bin"
    state, path = torch.load(file, weights_only=True), checkpoint
    if form == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(file)
    elif form == "wrapped":
        torch.save({f"module.{name}": value for name, value in state.items()}, file)
    elif form == "file":
        path = file
    else:
        file.unlink()
        path = split(state, checkpoint) if form == "index" else checkpoint
        split(state, checkpoint)
    fastbert.convert(path, tmp_path / "new")
    assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")


def split(state: dict[str, Tensor], folder: Path) -> Path:
    """Writes a state dict in two shards; the index."""
    place = {}
    for i in range(2):
        part = {name: value for j, (name, value) in enumerate(state.items()) if j % 2 == i}
        torch.save(part, folder / f"part{i}.bin")
        place |= dict.fromkeys(part, f"part{i}.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return index


def test_shards_that_are_not_what_the_index_says(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    (checkpoint / "pytorch_model.bin").unlink()
    index = split(state, checkpoint)
    edit(checkpoint / "part1.bin", lambda part: part.pop("classifier.bias"))
    refused(checkpoint, tmp_path / "new", r"part1.bin: is not the shard .*: classifier.bias is not in it")
    (checkpoint / "part0.bin").unlink()
    refused(checkpoint, tmp_path / "new", r"part0.bin: no such file, which pytorch_model.bin.index.json names")
    index.write_text(json.dumps({"weight_map": {"a": "../part1.bin"}}))
    refused(checkpoint, tmp_path / "new", r"names '../part1.bin'; expected a file beside it")
    index.write_text("[1]")
    refused(checkpoint, tmp_path / "new", r"is no index of shards")


def test_large_weights_are_written_in_files(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 300_000)
    report = fastbert.convert(checkpoint, tmp_path / "new")
    parts = [name for name in report["files"] if name.endswith(".safetensors")]
    assert len(parts) > 3 and max((tmp_path / "new" / name).stat().st_size for name in parts) < 310_000
    assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.seeded(hf.BertForSequenceClassification).to(dtype)
    report = fastbert.convert(write_old(model, tmp_path / "old"), tmp_path / "new")
    assert report["dtype"] == str(dtype)[6:]
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) and value.dtype is dtype for name, value in stored.items())


def test_of_several_dtypes_the_widest_is_written(checkpoint: Path, tmp_path: Path) -> None:
    def halve(state: dict[str, Tensor]) -> None:
        state["classifier.bias"] = state["classifier.bias"].half()

    edit(checkpoint / "pytorch_model.bin", halve)
    report = fastbert.convert(checkpoint, tmp_path / "new")
    assert (report["dtype"], report["variables"]["classifier.bias"]["dtype"]) == ("float32", "float16")
    stored = load_file(tmp_path / "new" / "model.safetensors")["classifier.bias"]
    assert torch.equal(stored, models.seeded(hf.BertForSequenceClassification).classifier.bias.half().float())


# Which class.


def test_a_class_of_pretraining_that_loses_nothing(tmp_path: Path) -> None:
    """The hub's bert-base-uncased: its config names BertForMaskedLM, its state dict has a pooler, too."""
    model = models.seeded(hf.BertForPreTraining)
    old = write_old(model, tmp_path / "old", architectures=["BertForMaskedLM"])
    report = fastbert.convert(old, tmp_path / "new")
    assert_same(model, tmp_path / "new")
    assert report["notes"][0].startswith("BertForMaskedLM, which the config names, has no bert.pooler.dense.")
    assert report["notes"][0].endswith("BertForPreTraining has all")


@pytest.mark.parametrize(
    ("task", "kind", "left"),
    [
        ("masked-lm", hf.BertForMaskedLM, 4),
        ("base", hf.BertModel, 7),
        ("next-sentence", hf.BertForNextSentencePrediction, 5),
    ],
)
def test_the_task_that_is_asked_for(task: str, kind: Any, left: int, tmp_path: Path) -> None:
    old = write_old(models.seeded(hf.BertForPreTraining), tmp_path / "old")
    report = fastbert.convert(old, tmp_path / "new", task=task)
    reasons = [told for told in report["left_out"].values() if told.startswith(f"{kind.__name__} has no ")]
    assert (report["model"], len(reasons), len(report["left_out"])) == (kind.__name__, left, left + 1)
    loaded, told = kind.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(told.values())
    truth = models.seeded(hf.BertForPreTraining).state_dict()
    prefix = "" if task != "base" else "bert."
    assert all(torch.equal(value, truth[prefix + name]) for name, value in loaded.state_dict().items())


def test_a_task_it_has_no_variables_for(tmp_path: Path) -> None:
    old = write_old(models.seeded(hf.BertForPreTraining), tmp_path / "old")
    match = (
        r"task .*has no variable for classifier.weight, classifier.bias of BertForSequenceClassification; it has all "
    )
    refused(old, tmp_path / "new", match + r"for pre-training \(BertForPreTraining\)", task="sequence-classification")
    refused(old, tmp_path / "new", r"task is nonsense; expected one of pre-training", task="nonsense")


def test_a_pooler_that_a_tagger_does_not_use(tmp_path: Path) -> None:
    """By names, it could be a classifier of sequences: what the config says, stands."""
    model = models.seeded(hf.BertForTokenClassification)
    old = write_old(model, tmp_path / "old")
    pooler = {f"bert.pooler.dense.{name}": value for name, value in nn.Linear(128, 128).state_dict().items()}
    edit(old / "pytorch_model.bin", lambda state: state.update(pooler))
    report = fastbert.convert(old, tmp_path / "new")
    assert_same(model, tmp_path / "new")
    assert report["left_out"]["bert.pooler.dense.bias"] == "BertForTokenClassification has no bert.pooler.dense.bias"


@pytest.mark.parametrize("kind", models.HEADS[:3] + models.HEADS[4:], ids=lambda kind: kind.__name__)
def test_a_config_that_names_no_class(kind: type[nn.Module], tmp_path: Path) -> None:
    """As those of 2018: without a class, a model's type and labels."""
    model = models.seeded(kind)
    none = dict.fromkeys(("architectures", "model_type", "id2label", "label2id", "num_labels"))
    old = write_old(model, tmp_path / "old", **none)
    (old / "config.json").rename(old / "bert_config.json")
    report = fastbert.convert(old, tmp_path / "new")
    choice = [note for note in report["notes"] if note.startswith("the config names no class; ")]
    if kind is hf.BertForMultipleChoice:  # its head is that of a classifier with one label
        assert "as it may be multiple-choice: name the task then" in choice[0]
        fastbert.convert(old, tmp_path / "other", task="multiple-choice")
        assert_same(model, tmp_path / "other")
    else:
        assert f"{'BertForMaskedLM' if kind is hf.BertLMHeadModel else kind.__name__} by the variables" in choice[0]
        assert_same(model, tmp_path / "new")


# What is wrong with it.


def test_a_variable_too_many(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "pytorch_model.bin", lambda state: state.update(crf=torch.ones(2, 2)))
    refused(checkpoint, tmp_path / "new", r"pytorch_model.bin: crf: no parameter of such a model is known by that name")
    refused(checkpoint, tmp_path / "new", r"leave_out cr: no variable has such a name", leave_out=["cr"])
    report = fastbert.convert(checkpoint, tmp_path / "new", leave_out=["cr?"])
    assert report["left_out"]["crf"] == "asked to be left out"
    assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.output.dense.bias",
        "bert.embeddings.LayerNorm.gamma",
        "bert.pooler.dense.weight",
        "classifier.bias",
    ],
)
def test_a_variable_too_few(name: str, checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "pytorch_model.bin", lambda state: state.pop(name))
    known = name.replace("gamma", "weight")
    refused(checkpoint, tmp_path / "new", f"has no variable for {known} of BertForSequenceClassification")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"hidden_size": 64},
            r"word_embeddings.weight has shape \(211, 128\); expected \(211, 64\), .* hidden_size 64",
        ),
        ({"vocab_size": 212}, r"vocab.txt: has 211 tokens; expected 212, the config's vocab_size"),
        ({"vocab_size": 216}, r"shape \(211, 128\); expected \(216, 128\), by the config: vocab_size 216"),
        ({"num_hidden_layers": 1}, r"says 1 for num_hidden_layers; pytorch_model.bin has layers 0 to 1"),
        ({"num_hidden_layers": 3}, r"says 3 for num_hidden_layers; pytorch_model.bin has layers 0 to 1"),
        ({"num_hidden_layers": 10**12}, r"says 10+ for num_hidden_layers; pytorch_model.bin has layers 0 to 1"),
        ({"num_attention_heads": 3}, r"^config BertFor\w+ can't be made of it: .*number of attention heads"),
        (
            {"intermediate_size": 64},
            r"intermediate.dense.weight has shape \(256, 128\); expected \(64, 128\), .*_size 64",
        ),
        ({"max_position_embeddings": 512}, r"position_embeddings.weight has shape \(160, 128\); expected \(512, 128\)"),
        ({"type_vocab_size": 1}, r"token_type_embeddings.weight has shape \(2, 128\); expected \(1, 128\)"),
        ({"id2label": {"0": "a"}}, r"classifier.weight has shape \(32, 128\); expected \(1, 128\)"),
        ({"hidden_size": None}, r"config.json: says no hidden_size$"),
        ({"num_attention_heads": None}, r"config.json: says no num_attention_heads$"),
        ({"hidden_act": None}, r"config.json: says no hidden_act$"),
        ({"vocab_size": "211"}, r"says '211' for vocab_size; expected a number from 1 up"),
        ({"hidden_size": True}, r"says True for hidden_size"),
        ({"hidden_act": "nonsense"}, r"^config "),
        ({"model_type": "t5"}, r"says 't5' for model_type; expected one of bert, roberta,"),
        ({"architectures": ["BertCRF"]}, r"says BertCRF in architectures; expected a class of BertConfig, or a task"),
        ({"architectures": ["RobertaModel"]}, r"says RobertaModel in architectures; expected a class of BertConfig"),
        (
            {"architectures": ["BertForPreTraining"]},
            r"has no variable for cls.predictions.bias, .* and \d more of BertForPre",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config(changes: dict[str, Any], match: str, checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "config.json", **changes)
    refused(checkpoint, tmp_path / "new", match)


def test_an_epsilon_that_is_not_said(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "config.json", layer_norm_eps=None)
    report = fastbert.convert(checkpoint, tmp_path / "new")
    assert "the config says no layer_norm_eps; 1e-12, as BertConfig has" in report["notes"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_config_that_is_not_one(text: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    refused(checkpoint, tmp_path / "new", r"^config .*config.json: .*expected")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, tmp_path / "new", r"has neither config.json nor bert_config.json")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.full((32,), float("nan")), "holds NaN or infinity"),
        (torch.ones(32, dtype=torch.int64), "is of int64; expected floating point"),
        (torch.ones(31), r"has shape \(31,\); expected \(32,\)"),
    ],
)
def test_wrong_values(value: Tensor, match: str, checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "pytorch_model.bin", lambda state: state.update({"classifier.bias": value}))
    refused(checkpoint, tmp_path / "new", f"classifier.bias {match}")


def test_positions_that_are_not_counted(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "pytorch_model.bin", lambda state: state["bert.embeddings.position_ids"].add_(1))
    refused(checkpoint, tmp_path / "new", r"position_ids is not 0, 1, 2")


def test_what_is_tied_and_differs(tmp_path: Path) -> None:
    model = models.seeded(hf.BertForMaskedLM)
    old = write_old(model, tmp_path / "old")
    decoder = model.bert.embeddings.word_embeddings.weight.detach().clone()
    edit(old / "pytorch_model.bin", lambda state: state.update({"cls.predictions.decoder.weight": decoder}))
    report = fastbert.convert(old, tmp_path / "same")
    assert_same(model, tmp_path / "same")
    stored = "bert.embeddings.word_embeddings.weight"
    assert [report["variables"][name]["to"] for name in (stored, "cls.predictions.decoder.weight")] == [stored] * 2
    decoder[3, 4] += 1
    edit(old / "pytorch_model.bin", lambda state: state.update({"cls.predictions.decoder.weight": decoder}))
    refused(
        old, tmp_path / "new", r"cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight"
    )
    edit(
        old / "pytorch_model.bin",
        lambda state: state.update({"cls.predictions.decoder.bias": model.cls.predictions.bias}),
    )
    change(old / "config.json", tie_word_embeddings=False)
    fastbert.convert(old, tmp_path / "new")
    found = hf.BertForMaskedLM.from_pretrained(tmp_path / "new")
    assert torch.equal(found.cls.predictions.decoder.weight, decoder)
    assert not torch.equal(found.bert.embeddings.word_embeddings.weight, decoder)


class Code:
    """Runs as it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = {"weight": Code()}
    torch.save(held, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(checkpoint, tmp_path / "new", r"pytorch_model.bin: is no state dict of tensors, or damaged")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(held))
    refused(checkpoint, tmp_path / "new", r"pytorch_model.bin: is no state dict of tensors, or damaged")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ({"model": {}, "step": 3}, "holds a dict of model, step; expected tensors by their names"),
        (torch.ones(3), "holds Tensor; expected"),
        ({}, "holds no variables"),
    ],
)
def test_other_things_that_torch_saves(held: Any, match: str, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(held, checkpoint / "pytorch_model.bin")
    refused(checkpoint, tmp_path / "new", match)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.37, 0.5, 0.83, 0.999])
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_state_dict(where: float, how: str, checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    place = int(where * len(data))
    if how == "cut":
        del data[place:]
    else:
        data[place] ^= 0x10
    file.write_bytes(data)
    try:
        refused(checkpoint, tmp_path / "new", r"pytorch_model.bin: .*(damaged|holds)")
    except pytest.fail.Exception:  # a byte that nothing reads, as between the records of the archive
        assert how == "flipped"
        assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")


# Where it is, and where it goes.


def test_paths_without_one_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    refused(tmp_path / "nowhere", new, r"nowhere: no such file or folder, nor a checkpoint of that prefix")
    refused(
        checkpoint / "vocab.txt", new, r"vocab.txt: expected a TensorFlow checkpoint, tf_model.h5, pytorch_model.bin"
    )
    (checkpoint / "tf_model.h5").touch()
    refused(checkpoint, new, r"holds tf_model.h5, pytorch_model.bin; expected the path of one")
    (checkpoint / "model.safetensors").touch()
    refused(checkpoint, new, r"holds model.safetensors, which from_pretrained loads")
    fastbert.convert(checkpoint / "pytorch_model.bin", new)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(
        empty, tmp_path / "other", r"expected a TensorFlow checkpoint \(\*.index\), tf_model.h5 or pytorch_model.bin"
    )
    (empty / "saved_model.pb").touch()
    refused(empty, tmp_path / "other", r"is a SavedModel, which is code")


def test_outputs_that_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    refused(checkpoint, full, r"^output .*full: holds files; expected a new folder, or an empty one")
    refused(checkpoint, full / "mine", r"^output .*mine: is a file")
    assert (full / "mine").read_text() == "mine"
    with pytest.raises(
        UsageError, match=r"^output .*below: (File exists|Not a .*); expected a folder that can be made"
    ):
        fastbert.convert(checkpoint, full / "mine" / "below")


@pytest.mark.parametrize("name", ["new", "a b'c\n\"ü", "deep/er/new", "link"])
def test_outputs_that_are_made(name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "link":
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there")
    report = fastbert.convert(checkpoint, name)
    assert {entry.name for entry in Path(name).iterdir()} == set(report["files"])
    assert len({entry.stat().st_mode for entry in Path(name).iterdir()}) == 1
    assert Path(name).is_symlink() == (name == "link")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_breaks_off_leaves_nothing(
    error: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: Any, file: Path, about: Any) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(weights, "save_file", broken)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UsageError):
        fastbert.convert(checkpoint, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def test_another_that_writes_there(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".new.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused(checkpoint, tmp_path / "new", r"another process writes there")
    os.close(lock)
    (partial / "left").write_text("by one that was killed")
    (partial / "below").mkdir()
    report = fastbert.convert(checkpoint, tmp_path / "new")
    assert not partial.exists() and {entry.name for entry in (tmp_path / "new").iterdir()} == set(report["files"])


def test_a_link_in_place_of_the_folder_that_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    (tmp_path / ".new.partial").symlink_to(mine)
    refused(checkpoint, tmp_path / "new", r"^output ")
    assert (mine / "file").exists()


@pytest.mark.slow
def test_killed_at_any_moment(checkpoint: Path, tmp_path: Path) -> None:
    """There is no folder, or all of it; and the next one is right."""
    code = (
        f"import fastbert; print('begun', flush=True); fastbert.convert({str(checkpoint)!r}, {str(tmp_path / 'new')!r})"
    )
    whole = 0
    for i in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not (tmp_path / ".new.partial").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "new").exists():
            whole += 1
            assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")
            for entry in (tmp_path / "new").iterdir():
                entry.unlink()
    fastbert.convert(checkpoint, tmp_path / "new")
    assert_same(models.seeded(hf.BertForSequenceClassification), tmp_path / "new")
    assert whole < 12


# Tokenizers.


@pytest.mark.parametrize(
    ("name", "upper", "cased", "lower", "how"),
    [
        ("old", False, None, True, "by its vocabulary, where 0 of 211 tokens have upper case"),
        ("old", True, None, False, "by its vocabulary, where 69 of 211 tokens have upper case"),
        ("uncased_L-2_H-128", True, None, True, "by the folder's name, uncased_l-2_h-128"),
        ("multi_cased_L-2_H-128", False, None, False, "by the folder's name, multi_cased_l-2_h-128"),
        ("uncased_L-2_H-128", False, True, False, "as was asked"),
        ("cased_L-2_H-128", False, False, True, "as was asked"),
    ],
)
def test_case(name: str, upper: bool, cased: bool | None, lower: bool, how: str, tmp_path: Path) -> None:
    old = write_old(models.seeded(hf.BertForSequenceClassification), tmp_path / name)
    write_vocabulary(old, vocabulary(upper=upper))
    report = fastbert.convert(old, tmp_path / "new", cased=cased)
    assert f"tokenizer: {'lower case' if lower else 'cased'} {how}" in report["notes"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert isinstance(tokenizer, transformers.BertTokenizer) and tokenizer.model_max_length == 160
    told = tokenizer.convert_ids_to_tokens(tokenizer("ab AB, é")["input_ids"])
    assert told[:3] == ["[CLS]", "ab", "ab" if lower else "[UNK]"]


def test_tokenizer_files_stay_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    fastbert.convert(checkpoint, tmp_path / "first", cased=True)
    there = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in there:
        (checkpoint / name).write_bytes((tmp_path / "first" / name).read_bytes())
    report = fastbert.convert(checkpoint, tmp_path / "new")
    assert report["tokenizer"] == {
        "class": "BertTokenizer",
        "tokens": 211,
        "case": "as its files say",
        "lower_case": False,
    }
    for name in there:
        assert (tmp_path / "new" / name).read_bytes() == (checkpoint / name).read_bytes()
    refused(checkpoint, tmp_path / "other", r"^cased .*its tokenizer files decide that", cased=False)
    fastbert.convert(checkpoint, tmp_path / "agreed", cased=True)
    (checkpoint / "tokenizer.json").unlink()
    change(checkpoint / "tokenizer_config.json", added_by="somebody")
    fastbert.convert(checkpoint, tmp_path / "older")
    assert not (tmp_path / "older" / "tokenizer.json").exists()
    for name in there[1:]:
        assert (tmp_path / "older" / name).read_bytes() == (checkpoint / name).read_bytes()
    (checkpoint / "tokenizer.json").write_text("{")
    refused(checkpoint, tmp_path / "other", r"its tokenizer can't be loaded")
    (checkpoint / "tokenizer_config.json").write_text("{")
    refused(checkpoint, tmp_path / "other", r"its tokenizer can't be read")


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (vocabulary(210), r"vocab.txt: has 210 tokens; expected 211, the config's vocab_size"),
        ([*vocabulary(), "more"], r"vocab.txt: has 212 tokens; expected 211"),
        (
            ["x" if token == "[SEP]" else token for token in vocabulary()],
            r"has no \[SEP\]; expected a vocabulary of BERT",
        ),
        (["\udcff"], r"^vocab .*expected UTF-8, a token a line"),
    ],
)
def test_a_wrong_vocabulary(tokens: list[str], match: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "vocab.txt").write_bytes("\n".join(tokens).encode(errors="surrogateescape"))
    refused(checkpoint, tmp_path / "new", match)


def test_a_vocabulary_that_was_filled_up(tmp_path: Path) -> None:
    """To a multiple of 8; with its tokens in another order, and lines that Windows ended."""
    model = models.seeded(hf.BertForSequenceClassification, vocab_size=216)
    old = write_old(model, tmp_path / "old")
    tokens = [*vocabulary()[5:], *SPECIAL]
    (old / "vocab.txt").write_bytes("\r\n".join(tokens).encode())
    report = fastbert.convert(old, tmp_path / "new")
    assert "the tokenizer has 211 tokens, the model 216 rows for them" in report["notes"]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert config.pad_token_id == tokenizer.pad_token_id == tokens.index("[PAD]") == 206
    assert tokenizer("aa ab")["input_ids"] == [tokens.index(token) for token in ("[CLS]", "aa", "ab", "[SEP]")]


def test_a_vocabulary_that_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "vocab.txt").rename(tmp_path / "words")
    fastbert.convert(checkpoint, tmp_path / "new", vocab=tmp_path / "words", config=checkpoint / "config.json")
    assert (tmp_path / "new" / "vocab.txt").read_text().splitlines() == vocabulary()
    refused(checkpoint, tmp_path / "other", r"its tokenizer can't be read: No such file", vocab=tmp_path / "nowhere")


# Names.


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bert/embeddings/word_embeddings", ("bert.embeddings.word_embeddings.weight", False)),
        ("bert/embeddings/LayerNorm/gamma", ("bert.embeddings.LayerNorm.weight", False)),
        ("bert/encoder/layer_11/output/dense/kernel", ("bert.encoder.layer.11.output.dense.weight", True)),
        ("cls/predictions/transform/LayerNorm/beta", ("cls.predictions.transform.LayerNorm.bias", False)),
        ("cls/predictions/output_bias", ("cls.predictions.bias", False)),
        ("cls/squad/output_weights", ("qa_outputs.weight", False)),
        ("output_weights", ("classifier.weight", False)),
        ("bert/pooler/dense/alpha", None),
        ("electra/embeddings/word_embeddings", None),
        ("kernel", None),
    ],
)
def test_names_of_google(name: str, found: tuple[str, bool] | None) -> None:
    assert names.of_google(name) == found


def test_names_of_what_is_no_weight() -> None:
    for name in ("bert/pooler/dense/kernel/adam_m", "global_step", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"):
        assert names.slot(name)
    assert names.slot("model/x/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE") == "state of the optimizer"
    assert names.slot("bert/pooler/dense/kernel") is None and names.slot("output_bias") is None


# Weights of Keras.


def write_keras(model: Any, folder: Path, copies: bool = True, **changes: Any) -> Path:
    """`tf_model.h5` as transformers 4 wrote it of `model`; test_convert_tensorflow.py has files that it wrote."""
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    change(folder / "config.json", **changes)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        if not name.startswith("cls.predictions.decoder"):
            layer, weight, kernel = keras_name(name)
            layers.setdefault(layer, {})[weight] = value.T if kernel else value
    if copies and "mlm___cls" in layers:  # which holds the layer of the embeddings, too
        layers["mlm___cls"] |= {name: value for name, value in layers["bert"].items() if "/embeddings/" in name}
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, held in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in held]
            for name, value in held.items():
                group[name] = value.numpy()
    return folder


def keras_name(name: str) -> tuple[str, str, bool]:
    """(layer, name, whether it is a kernel) of a parameter of a BERT with a head."""
    layer, *parts = name.split(".")
    kernel = name.endswith("weight") and "mbeddings" not in name and "LayerNorm" not in name
    leaf = "kernel" if kernel else parts[-1]
    if "LayerNorm" in name:
        leaf = {"weight": "gamma", "bias": "beta"}[leaf]
    elif parts[-2:-1] in (["token_type_embeddings"], ["position_embeddings"]):
        leaf = "embeddings"
    inside = "/".join([*parts[:-1], leaf]).replace("layer/", "layer_._")
    above = {"predictions": "mlm___cls", "seq_relationship": "nsp___cls"}.get(parts[0], layer)
    return above, f"tf_bert/{above}/{inside}:0", kernel


KERAS = [hf.BertForPreTraining, hf.BertForMaskedLM, hf.BertForSequenceClassification, hf.BertForQuestionAnswering]


@pytest.mark.parametrize("kind", KERAS, ids=lambda kind: kind.__name__)
def test_weights_of_keras(kind: type[nn.Module], tmp_path: Path) -> None:
    model = models.seeded(kind)
    report = fastbert.convert(write_keras(model, tmp_path / "old"), tmp_path / "new")
    assert_same(model, tmp_path / "new")
    assert report["format"] == "weights of Keras" and not report["left_out"]
    assert len(report["variables"]) >= len(load_file(tmp_path / "new" / "model.safetensors"))


def test_a_copy_in_keras_that_differs(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    old = write_keras(models.seeded(hf.BertForMaskedLM), tmp_path / "old")
    with h5py.File(old / "tf_model.h5", "r+") as file:
        file["mlm___cls/tf_bert/bert/embeddings/LayerNorm/gamma:0"][7] += 1
    refused(
        old, tmp_path / "new", r"LayerNorm/gamma:0 in mlm___cls differs from tf_bert/bert/embeddings/LayerNorm/gamma:0"
    )


def test_long_attributes_of_keras(tmp_path: Path) -> None:
    """Keras cuts lists of names that an HDF5 header can't hold."""
    h5py = pytest.importorskip("h5py")
    model = models.seeded(hf.BertForQuestionAnswering)
    old = write_keras(model, tmp_path / "old")
    with h5py.File(old / "tf_model.h5", "r+") as file:
        held = list(file["bert"].attrs["weight_names"])
        del file["bert"].attrs["weight_names"]
        file["bert"].attrs["weight_names0"], file["bert"].attrs["weight_names1"] = held[:11], held[11:]
    fastbert.convert(old, tmp_path / "new")
    assert_same(model, tmp_path / "new")
    with h5py.File(old / "tf_model.h5", "r+") as file:
        del file["bert"].attrs["weight_names0"]
    refused(
        old, tmp_path / "other", r"tf_model.h5: /bert has no attribute weight_names; expected weights that Keras saved"
    )


def test_values_of_keras_that_are_elsewhere(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    old = write_keras(models.seeded(hf.BertForQuestionAnswering), tmp_path / "old")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["bias"] = torch.ones(2).numpy()
    with h5py.File(old / "tf_model.h5", "r+") as file:
        del file["qa_outputs/tf_bert/qa_outputs/bias:0"]
        file["qa_outputs/tf_bert/qa_outputs/bias:0"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "bias")
    refused(old, tmp_path / "new", r"tf_model.h5: the values of tf_bert/qa_outputs/bias:0 are not in it")
    with h5py.File(old / "tf_model.h5", "r+") as file:
        del file["qa_outputs/tf_bert/qa_outputs/bias:0"]
    refused(old, tmp_path / "new", r"tf_model.h5: is no HDF5 file of Keras, or damaged: .*bias:0")


@pytest.mark.parametrize("where", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_weights_of_keras_that_are_cut(where: float, tmp_path: Path) -> None:
    old = write_keras(models.seeded(hf.BertForQuestionAnswering), tmp_path / "old")
    data = (old / "tf_model.h5").read_bytes()
    (old / "tf_model.h5").write_bytes(data[: int(where * len(data))])
    refused(old, tmp_path / "new", r"tf_model.h5: is no HDF5 file of Keras, or damaged")


def test_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module, extra in (("tf_model.h5", "h5py", "h5"), ("bert_model.ckpt.index", "tensorflow", "tensorflow")):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, module, None)
        refused(tmp_path / name, tmp_path / "new", rf"not installed: pip install 'fastbert-triton\[{extra}\]'$")


# The command.


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "modules.json").write_text("[]")
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "new"), "--uncased"]) == 0
    said = capsys.readouterr().out.splitlines()
    count = sum(p.numel() for p in models.seeded(hf.BertForSequenceClassification).parameters())
    assert said[:3] == [
        f"BertForSequenceClassification, {count:,} parameters of float32, from a PyTorch state dict",
        "41 variables used, by name and shape",
        "  left out: bert.embeddings.position_ids: 0, 1, 2, ...: the model makes it itself",
    ]
    assert "tokenizer: BertTokenizer, 211 tokens" in said and "note: tokenizer: lower case as was asked" in said
    assert "not copied: modules.json" in said
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "other"), "--json", "--task", "base"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "other" / "conversion.json").read_text())
    assert report["model"] == "BertModel" and "classifier.bias" in report["left_out"]


def test_the_command_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(checkpoint), "--output", str(tmp_path / "new")]
    assert main([*command, "--leave-out", "x*"]) == 2
    assert capsys.readouterr().err == "fastbert convert: --leave-out x*: no variable has such a name\n"
    assert main(["convert", str(tmp_path / "no such"), "--output", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastbert convert: {tmp_path / 'no such'}: no such file") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        main([*command, "--cased", "--uncased"])
