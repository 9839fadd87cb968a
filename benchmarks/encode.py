"""SentenceTransformer.encode, stock against fused: `python benchmarks/encode.py --output benchmarks/results`.

Texts are of a made-up vocabulary, of as many tokens as questions and passages of SQuAD have, one half each. "corpus":
one call of encode over all of them, which sorts them by length, so that little padding is left. "calls": one call after
the other over `--batch` of them, as they come. Times include tokenising. On a GPU with flash-attn, its own unpadding is
measured, too. Embeddings are held to the numerical policy first.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertTokenizer

import fastbert
from fastbert import numerics
from fastbert.checkpoints import default_device
from fastbert.measure import counts, records
from fastbert.measure.cases import SEED, SHAPES, Workload, build, workload
from fastbert.measure.machine import Machine, environment
from fastbert.measure.peers import share

WORDS = 1000


def texts_of(item: Workload) -> list[str]:
    """A text of words w0, w1, ... for each length, with room for two special tokens."""
    chance = random.Random(SEED)
    return [" ".join(f"w{chance.randrange(WORDS)}" for _ in range(n - 2)) for n in item.lengths]


def save_tokenizer(folder: Path) -> None:
    """One that knows the words of `texts_of`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)


def encoder(size: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """A SentenceTransformer that takes means over a BERT with seeded weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        build("minilm", torch.float32, torch.device("cpu")).save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"attn_implementation": attention, "dtype": dtype})
    transformer.model = build(size, dtype, device)
    transformer.model.set_attn_implementation(attention)
    transformer.max_seq_length = 512
    return SentenceTransformer(modules=[transformer, Pooling(SHAPES[size]["hidden_size"], "mean")], device=str(device))


def with_model(model: Any, inner: Any) -> Any:
    """A copy of a SentenceTransformer around another model."""
    found = copy.deepcopy(model, {id(model[0].model): inner})
    assert found[0].model is inner
    return found


def run(size: str, dtype: torch.dtype, device: torch.device, batch: int, repeats: int) -> list[dict[str, Any]]:
    """The records of both ways to call, of all candidates."""
    stock = encoder(size, dtype, device)
    found: dict[str, Any] = {"stock": stock, "fused": fastbert.fuse(with_model(stock, share(stock[0].model)))}
    try:
        unpadded = encoder(size, dtype, device, "flash_attention_2") if device.type == "cuda" else None
    except ImportError:
        unpadded = None
    if unpadded is not None:
        found["stock, its own unpadding"] = unpadded
    truth = with_model(stock, copy.deepcopy(stock[0].model).double())
    item = workload("search", 16 * batch)
    texts = texts_of(item)
    some = texts[:: max(1, len(texts) // 8)]
    exact = truth.encode(some, convert_to_tensor=True)
    for name, model in found.items():
        rows = [m.encode(some, convert_to_tensor=True) for m in (model, stock)]
        numerics.assert_within_policy(*rows, exact, name)

    def corpus(model: Any) -> None:
        model.encode(texts, batch_size=batch)

    def calls(model: Any) -> None:
        for i in range(0, len(texts), batch):
            model.encode(texts[i : i + batch], batch_size=batch)

    about, rates = environment(device), Machine(device).rates(dtype)
    cost = counts.encoder(stock[0].model.config, item.lengths, dtype)
    result = []
    for way, call in (("corpus", corpus), ("calls", calls)):
        samples = _timed(found, call, repeats)
        chunks = [item.lengths[i : i + batch] for i in range(0, len(texts), batch)]
        ordered = sorted(item.lengths, reverse=True)
        if way == "corpus":
            chunks = [tuple(ordered[i : i + batch]) for i in range(0, len(texts), batch)]
        case = {
            "what": f"encode, {way}",
            "workload": f"search b{batch}",
            "size": size,
            "shape": {"texts": len(texts), "batch": batch, "longest": max(item.lengths)},
            "real_tokens": item.real_tokens,
            "padded_tokens": sum(max(chunk) * len(chunk) for chunk in chunks),
        }
        for name, taken in samples.items():
            result.append(records.make(about, case, name, dtype, taken, samples["stock"], cost, rates))
            print(records.line(result[-1]), flush=True)
    return result


def _timed(found: dict[str, Any], call: Callable[[Any], None], repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in found}
    chance = random.Random(SEED)
    for repeat in range(repeats + 1):
        for name in chance.sample(list(found), len(found)):
            begun = time.perf_counter()
            call(found[name])  # ends with results on the host
            if repeat:
                samples[name].append(time.perf_counter() - begun)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), help="default: minilm on a CPU, large on a GPU")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    parser.add_argument("--batch", type=int, help="default: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    device = default_device(None)
    size, batch = ("minilm", 32) if device.type == "cpu" else ("large", 128)
    print(records.HEADER)
    found: list[dict[str, Any]] = []
    for name in given.dtype:
        dtype = getattr(torch, name)
        found += run(given.size or size, dtype, device, given.batch or batch, given.repeats)
        if given.output is not None:
            records.write(records.path_in(given.output, found[0]), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
