"""What int8 costs a real model, beside what it saves: `python benchmarks/quality.py TEXTS --model PATH_OR_ID`.

TEXTS has one text a line, and after a tab what it is labelled as, if anything. Embeddings are means of real tokens,
normalised; they are compared with stock's in float32 as `fastbert verify` compares them. With --train, a file like
TEXTS, a linear classifier is fitted to stock's embeddings of it, and judged on every candidate's embeddings of TEXTS.

All candidates run over the same batches, in random order, and are timed as they do: medians, in ratio to stock. What
needs ranges or factors is calibrated on the first 64 texts of --train, or of TEXTS. No record is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import fastbert
from fastbert.measure import peers
from fastbert.measure.cases import SEED
from fastbert.quality import Quality

CANDIDATES = ("int8", "int8-calibrated", *peers.OTHERS_INT8)
CALIBRATED_ON = 64


def lines(path: Path) -> tuple[list[str], list[str] | None]:
    """The texts of a file, and their labels, if it has any."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        return [row[0] for row in rows], None
    return [row[0] for row in rows], [row[1] for row in rows]


def made(name: str, model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """A candidate made of the model; its own copy."""
    if name == "int8-calibrated":
        model = peers.share(model)
        fastbert.calibrate(model, texts, tokenizer=tokenizer, precision="int8")
        return fastbert.fuse(model, precision="int8")
    if name == "openvino-int8" and importlib.util.find_spec("nncf"):
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
        batches = [tokenizer(texts[i : i + 16], **options) for i in range(0, len(texts), 16)]
        return peers.openvino(model, [(each["input_ids"], each["attention_mask"]) for each in batches])
    return peers.PEERS[name][1](model)


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden (B, S, H), mask (B, S) -> (B, H), normalised."""
    real = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=1)


def classifier(rows: Tensor, labels: Tensor) -> Tensor:
    """Weights (H + 1, classes) of a linear classifier of rows (N, H), by ridge regression."""
    rows = F.pad(rows.double(), (0, 1), value=1.0)
    square = rows.t() @ rows + 0.1 * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(square, rows.t() @ F.one_hot(labels).double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub, of a BERT")
    parser.add_argument("--train", type=Path, help="labelled texts for a linear classifier")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="how often every batch is run")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    texts, labels = lines(given.texts)
    train, train_labels = lines(given.train) if given.train else (texts, None)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    stock = AutoModel.from_pretrained(given.model, dtype=torch.float32).eval()

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        parts = [texts[i : i + given.batch] for i in range(0, len(texts), given.batch)]
        names = ["input_ids", "attention_mask"]
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
        return [{name: found[name] for name in names} for found in (tokenizer(part, **options) for part in parts)]

    models = {"stock": stock, "fused": fastbert.fuse(peers.share(stock))}
    failed = {}
    for name in given.candidates:
        try:
            models[name] = made(name, stock, tokenizer, train[:CALIBRATED_ON])
        except peers.Unavailable as reason:
            failed[name] = str(reason)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    order, chance = list(models), random.Random(SEED)
    with torch.inference_mode():
        weights, names = None, sorted(set(train_labels or ()))  # a label that training has not is never guessed
        if labels is not None and train_labels is not None:
            known = [mean_of_tokens(stock(**b).last_hidden_state, b["attention_mask"]) for b in batches(train[:2000])]
            weights = classifier(torch.cat(known), torch.tensor([names.index(label) for label in train_labels[:2000]]))
        work = batches(texts)
        for model in models.values():
            model(**work[0])
        for repeat in range(given.repeats):
            taken = dict.fromkeys(models, 0.0)
            for batch in work:
                chance.shuffle(order)
                for name in order:
                    start = time.perf_counter()
                    hidden = models[name](**batch).last_hidden_state
                    taken[name] += time.perf_counter() - start
                    if repeat == 0:
                        rows[name].append(mean_of_tokens(hidden, batch["attention_mask"]))
            for name, value in taken.items():
                seconds[name].append(value)

    plain = statistics.median(seconds["stock"])
    told = ["stock / this", "mean cosine", "worst", "same nearest text", "ten nearest in common"]
    told += ["accuracy"] if weights is not None else []
    print(f"{len(texts)} texts, {given.threads} threads, stock {plain:.2f} s\n")
    print(f"| | {' | '.join(told)} |\n|---|{'---:|' * len(told)}")
    truth = torch.cat(rows["stock"])
    for name, found in rows.items():
        own, quality = torch.cat(found), Quality()
        ones = torch.ones(len(own), 1, dtype=torch.bool)  # a row a text
        as_hidden = [{"last_hidden_state": each} for each in (truth, truth, own)]
        quality.add(as_hidden[0], as_hidden[1], as_hidden[2], ones)
        values = [f"{plain / statistics.median(seconds[name]):.2f}"]
        values += [f"{measure.value:.4f}" for measure in quality.measures()]
        if weights is not None:
            guessed = (F.pad(own.double(), (0, 1), value=1.0) @ weights).argmax(1)
            right = [names[i] == label for i, label in zip(guessed.tolist(), labels or (), strict=True)]
            values.append(f"{statistics.mean(right):.4f}")
        print(f"| {name} | {' | '.join(values)} |")
    for name, reason in failed.items():
        print(f"\n{name}: {reason}")


if __name__ == "__main__":
    main()
