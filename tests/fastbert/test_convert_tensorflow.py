"""`fastbert convert` of what TensorFlow itself has written: run by `make tensorflow`, which brings it, and files that
transformers 4 wrote. Elsewhere skipped; what takes no TensorFlow is in test_convert.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.numerics import assert_within_policy
from fastbert.usage import UsageError
from tests import models
from tests.compat import tf4_files
from tests.compat.environments import CACHE
from tests.fastbert.test_convert import assert_same, refused, vocabulary, write_vocabulary

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
WRITTEN = CACHE / "tf4"

# Google's.

HEADS = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    "classifier.weight": "output_weights",
    "classifier.bias": "output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
}


def as_google(model: nn.Module) -> dict[str, Any]:
    """The variables that Google's BERT has for the weights of `model`; a pooler, too, where it has none."""
    found = {}
    for name, value in model.state_dict().items():
        name = name if name.startswith(("bert.", "cls.", "classifier.", "qa_outputs.")) else f"bert.{name}"
        if name in HEADS:
            found[HEADS[name]] = value.numpy()
        elif not name.startswith("cls.predictions.decoder"):
            leaf = {"weight": "kernel", "bias": "bias"}[name.rsplit(".", 1)[1]]
            if "LayerNorm" in name:
                leaf = {"kernel": "gamma", "bias": "beta"}[leaf]
            path = re.sub(r"layer\.(\d+)", r"layer_\1", name.rsplit(".", 1)[0]).replace(".", "/")
            table = path.endswith("_embeddings")
            found[path if table else f"{path}/{leaf}"] = (
                value.numpy().T if leaf == "kernel" and not table else value.numpy()
            )
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(3)).numpy()
    found.setdefault("bert/pooler/dense/kernel", noise)
    found.setdefault("bert/pooler/dense/bias", noise[0])
    return found


def save_by_saver(variables: dict[str, Any], prefix: Path) -> None:
    """As run_pretraining.py and run_classifier.py did, with the optimizer's variables."""
    tf = pytest.importorskip("tensorflow")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in variables.items():
            tf.compat.v1.get_variable(name, initializer=value)
            tf.compat.v1.get_variable(f"{name}/adam_m", initializer=0 * value)
            tf.compat.v1.get_variable(f"{name}/adam_v", initializer=0 * value)
        tf.compat.v1.train.get_or_create_global_step()
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(prefix))


def save_by_checkpoint(variables: dict[str, Any], prefix: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    held = {name: tf.Variable(value, name=name) for name, value in variables.items()}
    tf.train.Checkpoint(global_step=tf.Variable(7, name="global_step"), **held).write(str(prefix))


def write_google(model: Any, folder: Path, save: Any = save_by_saver) -> Path:
    """A folder as Google's archives have it."""
    pytest.importorskip("tensorflow")
    folder.mkdir()
    save(as_google(model), folder / "bert_model.ckpt")
    said = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "vocab_size")
    said += ("max_position_embeddings", "type_vocab_size", "initializer_range", "hidden_dropout_prob")
    config = {name: getattr(model.config, name) for name in (*said, "attention_probs_dropout_prob")}
    (folder / "bert_config.json").write_text(json.dumps(config))
    write_vocabulary(folder)
    return folder


def forward_of_google(read: Any, call: dict[str, Any], heads: int = 4, layers: int = 2) -> dict[str, Any]:
    """Google's modeling.py and its heads of pre-training, in TensorFlow and float64; `read` gives a variable."""
    tf = pytest.importorskip("tensorflow")

    def get(name: str) -> Any:
        return tf.cast(read(name), tf.float64)

    def dense(x: Any, scope: str) -> Any:
        return x @ get(f"{scope}/kernel") + get(f"{scope}/bias")

    def norm(x: Any, scope: str) -> Any:
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        scope = f"{scope}/LayerNorm"
        return tf.nn.batch_normalization(x, mean, variance, get(f"{scope}/beta"), get(f"{scope}/gamma"), 1e-12)

    def gelu(x: Any) -> Any:
        return x * 0.5 * (1 + tf.math.erf(x / tf.sqrt(tf.constant(2, tf.float64))))

    ids, kinds, mask = call["input_ids"], call["token_type_ids"], call["attention_mask"]
    batch, length = ids.shape
    table = get("bert/embeddings/word_embeddings")
    x = tf.gather(table, ids) + tf.gather(get("bert/embeddings/token_type_embeddings"), kinds)
    x = norm(x + get("bert/embeddings/position_embeddings")[:length], "bert/embeddings")
    adder = (1 - tf.cast(mask, tf.float64))[:, None, None, :] * -1e9
    for i in range(layers):
        scope = f"bert/encoder/layer_{i}"
        query, key, value = (
            tf.transpose(
                tf.reshape(dense(x, f"{scope}/attention/self/{name}"), (batch, length, heads, -1)), (0, 2, 1, 3)
            )
            for name in ("query", "key", "value")
        )
        scores = tf.matmul(query, key, transpose_b=True) / tf.sqrt(tf.cast(query.shape[-1], tf.float64)) + adder
        context = tf.reshape(tf.transpose(tf.nn.softmax(scores) @ value, (0, 2, 1, 3)), (batch, length, -1))
        x = norm(dense(context, f"{scope}/attention/output/dense") + x, f"{scope}/attention/output")
        x = norm(dense(gelu(dense(x, f"{scope}/intermediate/dense")), f"{scope}/output/dense") + x, f"{scope}/output")
    pooled = tf.tanh(dense(x[:, 0], "bert/pooler/dense"))
    transformed = norm(gelu(dense(x, "cls/predictions/transform/dense")), "cls/predictions/transform")
    logits = tf.matmul(transformed, table, transpose_b=True) + get("cls/predictions/output_bias")
    relationship = tf.matmul(pooled, get("cls/seq_relationship/output_weights"), transpose_b=True)
    return {
        "prediction_logits": logits,
        "seq_relationship_logits": relationship + get("cls/seq_relationship/output_bias"),
    }


KINDS = [kind for kind in models.HEADS if kind not in (hf.BertForMultipleChoice, hf.BertLMHeadModel)]


@pytest.mark.parametrize("save", [save_by_saver, save_by_checkpoint])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_checkpoints_of_google(kind: type[nn.Module], save: Any, tmp_path: Path) -> None:
    model = models.seeded(kind)
    google = write_google(model, tmp_path / "uncased_L-2_H-128", save)
    tags = kind is hf.BertForTokenClassification  # whose variables are those of a classifier of sequences
    report = fastbert.convert(google, tmp_path / "new", task="token-classification" if tags else None)
    found = assert_same(model, tmp_path / "new")
    assert (found.config.layer_norm_eps, found.config.hidden_act) == (1e-12, "gelu")
    variables = as_google(model)
    left = {name: told for name, told in report["left_out"].items() if name in variables}
    if kind in (hf.BertForMaskedLM, hf.BertForTokenClassification, hf.BertForQuestionAnswering):
        assert left == {
            f"bert/pooler/dense/{leaf}": f"{kind.__name__} has no bert.pooler.dense.{name}"
            for leaf, name in (("kernel", "weight"), ("bias", "bias"))
        }
    else:
        assert not left
    assert report["variables"].keys() == variables.keys() - left.keys()
    others = report["left_out"].keys() - left.keys()
    if save is save_by_saver:
        slots = {f"{name}/{slot}" for name in variables for slot in ("adam_m", "adam_v")}
        assert others == {*slots, "global_step"}
        assert report["left_out"]["bert/pooler/dense/bias/adam_v"] == "adam_v of the optimizer"
    else:
        assert others == {"global_step", "_CHECKPOINTABLE_OBJECT_GRAPH"}


def test_it_answers_as_google(tmp_path: Path) -> None:
    """The forward of Google's code, on what TensorFlow reads, in float64: as near the truth as stock in float32."""
    tf = pytest.importorskip("tensorflow")
    google = write_google(models.seeded(hf.BertForPreTraining), tmp_path / "uncased")
    fastbert.convert(google, tmp_path / "new")
    reader = tf.train.load_checkpoint(str(google / "bert_model.ckpt"))
    mask = models.masks(4, 19)["right"]
    call = {"input_ids": models.ids(4, 19), "token_type_ids": models.ids(4, 19, high=2), "attention_mask": mask}
    theirs = forward_of_google(reader.get_tensor, {name: each.numpy() for name, each in call.items()})
    model = hf.BertForPreTraining.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        stock, truth = model(**call), model.double()(**call)
    real = mask.bool()
    for name, value in theirs.items():
        value = torch.from_numpy(value.numpy()).float()
        rows = real if name == "prediction_logits" else slice(None)
        assert_within_policy(value[rows], stock[name][rows], truth[name][rows], name)


def test_a_checkpoint_of_fine_tuning(tmp_path: Path) -> None:
    """As run_classifier.py leaves it: several, the last named in `checkpoint`; config and vocabulary are elsewhere."""
    pytest.importorskip("tensorflow")
    first, last = (models.seeded(hf.BertForSequenceClassification, seed=seed) for seed in (1, 2))
    google = write_google(last, tmp_path / "google")
    out = tmp_path / "out"
    out.mkdir()
    save_by_saver(as_google(first), out / "model.ckpt-7")
    save_by_saver(as_google(last), out / "model.ckpt-123")
    given = {"config": google / "bert_config.json", "vocab": google / "vocab.txt"}
    report = fastbert.convert(out, tmp_path / "new", **given)
    assert_same(last, tmp_path / "new")
    assert report["notes"][0] == "of 2 checkpoints the last, model.ckpt-123"
    assert any(note.endswith("token-classification: name the task then") for note in report["notes"])
    assert "the config says no num_labels; 32 by the head's bias" in report["notes"]
    for path in (out / "model.ckpt-7", out / "model.ckpt-7.index", out / "model.ckpt-7.data-00000-of-00001"):
        fastbert.convert(path, tmp_path / path.name, **given)
        assert_same(first, tmp_path / path.name)
    refused(out, tmp_path / "other", r"^config .*has neither config.json nor bert_config.json", vocab=given["vocab"])
    refused(out, tmp_path / "other", r"^vocab .*has no vocab.txt", config=given["config"])
    (out / "checkpoint").unlink()
    refused(out, tmp_path / "other", r"holds model.ckpt-123, model.ckpt-7; expected the path of one", **given)


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_google(models.seeded(hf.BertForPreTraining), tmp_path_factory.mktemp("google") / "uncased")


@pytest.fixture
def copied(google: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    folder = tmp_path / "uncased"
    folder.mkdir()
    for file in google.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


DATA = "bert_model.ckpt.data-00000-of-00001"


def test_files_that_are_missing(copied: Path, tmp_path: Path) -> None:
    (copied / DATA).unlink()
    refused(copied, tmp_path / "new", r"bert_model.ckpt: .* can't be read, the file is damaged or cut: .*data-00000")
    (copied / "bert_model.ckpt.index").unlink()
    refused(copied, tmp_path / "new", r"expected a TensorFlow checkpoint")
    refused(copied / DATA, tmp_path / "new", r"00001: no such file or folder")


@pytest.mark.parametrize("short", [1, 50, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("name", [DATA, "bert_model.ckpt.index"])
def test_files_that_are_cut(name: str, short: float, copied: Path, tmp_path: Path) -> None:
    """Where the optimizer's variables are, too: by Google's names they come last."""
    data = (copied / name).read_bytes()
    cut = int(short if (short >= 1 and short != 1.0) or isinstance(short, int) else short * len(data))
    (copied / name).write_bytes(data[: len(data) - cut])
    refused(copied, tmp_path / "new", r"bert_model.ckpt: .*damaged")


@pytest.mark.parametrize("name", [DATA, "bert_model.ckpt.index"])
def test_bytes_that_are_flipped(name: str, copied: Path, tmp_path: Path) -> None:
    """Whatever it is read as, it is refused, or what comes of it is the same."""
    good = (copied / name).read_bytes()
    generator = random.Random(0)
    caught = 0
    for i in range(40):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (copied / name).write_bytes(data)
        with contextlib.suppress(UsageError):
            fastbert.convert(copied, tmp_path / f"new{i}")
        if (tmp_path / f"new{i}").exists():
            assert_same(models.seeded(hf.BertForPreTraining), tmp_path / f"new{i}")
        else:
            caught += 1
    assert caught >= (40 if name == DATA else 35)


def test_variables_too_many_and_too_few(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    google = write_google(models.seeded(hf.BertForPreTraining), tmp_path / "uncased")
    variables = as_google(models.seeded(hf.BertForPreTraining))

    def save(**changes: Any) -> None:
        changed = {name: value for name, value in {**variables, **changes}.items() if value is not None}
        save_by_saver(changed, google / "bert_model.ckpt")

    bias = variables["bert/pooler/dense/bias"]
    save(**{"bert/encoder/layer_1/crf/kernel": variables["bert/pooler/dense/kernel"], "loss_scale": bias})
    refused(
        google, tmp_path / "new", r"bert_model.ckpt: loss_scale: no parameter of such a model is known by that name"
    )
    refused(google, tmp_path / "new", r"layer_1/crf/kernel: no parameter of such a model", leave_out=["loss_scale*"])
    fastbert.convert(google, tmp_path / "left", leave_out=["loss_scale*", "*/crf/*"])
    assert_same(models.seeded(hf.BertForPreTraining), tmp_path / "left")
    save(**{"bert/encoder/layer_0/attention/self/key/bias": None})
    refused(google, tmp_path / "new", r"has no variable for (bert\.)?encoder.layer.0.attention.self.key.bias of Bert")
    save(**{"bert/encoder/layer_0/output/dense/kernel": variables["bert/encoder/layer_0/output/dense/kernel"].T})
    refused(google, tmp_path / "new", r"layer_0/output/dense/kernel has shape \(128, 256\); expected \(256, 128\)")
    save(**{"bert/pooler/dense/bias": (1000 * bias).astype("int32")})
    refused(google, tmp_path / "new", r"bert/pooler/dense/bias is of int32; expected floating point")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_of_tensorflow(dtype: str, tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    model = models.seeded(hf.BertForPreTraining)
    google = write_google(model, tmp_path / "uncased")
    variables = {name: tf.cast(value, dtype).numpy() for name, value in as_google(model).items()}
    save_by_checkpoint(variables, google / "bert_model.ckpt")
    assert fastbert.convert(google, tmp_path / "new")["dtype"] == dtype
    assert_same(model.to(getattr(torch, dtype)), tmp_path / "new")


# Transformers 4's.


@pytest.mark.parametrize("case", [*tf4_files.CASES, tf4_files.SHARDED, tf4_files.CHECKPOINT])
def test_what_transformers_4_wrote(case: str, tmp_path: Path) -> None:
    """Its TensorFlow class in float64 is as near the converted model in float64 as that is in float32."""
    np = pytest.importorskip("numpy")
    pytest.importorskip("h5py")
    if not (WRITTEN / case).exists():
        pytest.skip("make tensorflow writes the files")
    given = {}
    if case == tf4_files.CHECKPOINT:  # of TensorFlow they have to have a vocabulary
        pytest.importorskip("tensorflow")
        (tmp_path / "words").write_text("\n".join(vocabulary(99)))
        given = {"vocab": tmp_path / "words"}
    report = fastbert.convert(WRITTEN / case, tmp_path / "new", **given)
    assert report["model"] == case.partition("-")[0]
    poolers = {f"{report['model']} has no mpnet.pooler.dense.{name}" for name in ("weight", "bias")}
    slots = {"names of objects", "count of checkpoints"}
    assert set(report["left_out"].values()) <= (poolers | slots if case != "MPNetModel" else set())
    outputs = np.load(WRITTEN / case / "outputs.npz")
    model = getattr(transformers, report["model"]).from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        ids = torch.from_numpy(outputs["input_ids"])
        stock, truth = model(ids), model.double()(ids)
    assert len(outputs.files) > 1
    for name in outputs.files[1:]:
        assert_within_policy(torch.from_numpy(outputs[name]).float(), stock[name], truth[name], name)
