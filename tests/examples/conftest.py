"""A tiny seeded checkpoint, tiny files for every script, and how a script is run."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

SCRIPTS = {
    "text_classification": ".tsv",
    "token_classification": ".conll",
    "question_answering": ".json",
    "pretraining": ".txt",
    "translation": ".pairs.tsv",
    "ranking": ".jsonl",
    "generation": ".lines.txt",
}

WORDS = ["the", "a", "cat", "dog", "bird", "saw", "heard", "chased", "red", "green", "small", "big", "house", "tree"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module", autouse=True)
def _as_a_script_runs() -> Iterator[None]:
    """A script's folder is on the path when it is run; one thread sums in one order, and these tensors are tiny."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


def script(name: str) -> Any:
    """A script as a module."""
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers of width 32 and its tokenizer, dropout on."""
    folder = tmp_path_factory.mktemp("checkpoint")
    BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *WORDS, ".", "?"])}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForPreTraining(config).save_pretrained(folder)
    return folder


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + " ."


def write(folder: Path, stem: str, seed: int) -> None:
    """One small file for each script."""
    draw = random.Random(seed)
    some = [sentence(draw) for _ in range(22)]
    (folder / f"{stem}.tsv").write_text("sentence\tlabel\n" + "".join(f"{s}\t{int('cat' in s)}\n" for s in some))
    (folder / f"{stem}.lines.txt").write_text("\n".join(some))
    (folder / f"{stem}.txt").write_text("\n\n".join("\n".join(some[i : i + 4]) for i in range(0, 22, 4)))
    (folder / f"{stem}.pairs.tsv").write_text("".join(f"{s}\t{' '.join(reversed(s.split()))}\n" for s in some))
    tags = {"cat": "B-animal", "dog": "B-animal", "big": "B-size", "house": "I-size"}
    (folder / f"{stem}.conll").write_text(
        "\n\n".join("\n".join(f"{word}\t{tags.get(word, 'O')}" for word in s.split()) for s in some)
    )
    (folder / f"{stem}.jsonl").write_text(
        "".join(json.dumps({"context": some[i - 1], "response": s}) + "\n" for i, s in enumerate(some))
    )
    paragraphs = []
    for i in range(0, 21, 3):
        context = " ".join(some[i : i + 3])
        word = draw.choice(context.split()[:-1])
        answers = [{"text": word, "answer_start": context.index(word)}]
        paragraphs.append({"context": context, "qas": [{"id": str(i), "question": "the cat ?", "answers": answers}]})
    (folder / f"{stem}.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]}))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, "train", 0)
    write(folder, "eval", 1)
    return folder


EXTRA = {
    "question_answering": ["--stride", "4"],
    "ranking": ["--candidates", "3"],
    "pretraining": ["--vocabulary", "80"],
}


@pytest.fixture
def command(checkpoint: Path, data: Path, tmp_path: Path) -> Any:
    """The arguments of a script: command(name, *more); two checkpoints in seven steps, an epoch and more."""

    def make(name: str, *more: str, output: str = "run") -> list[str]:
        ending = SCRIPTS[name]
        given = {
            "model": checkpoint,
            "train": data / f"train{ending}",
            "eval": data / f"eval{ending}",
            "output": tmp_path / output,
            "steps": 7,
            "save-steps": 3,
            "batch-size": 4,
            "max-length": 16,
            "lr": 1e-3,
        }
        return [*(f"--{key}={value}" for key, value in given.items()), *EXTRA.get(name, []), *more]

    return make
