"""From text to result, stock against fused: `python benchmarks/encode.py --output benchmarks/results`.

What sentence-transformers' users call, and a tagger as a pipeline: `--what` of WAYS. Texts are of a made-up vocabulary,
of as many tokens as questions and passages of SQuAD have. Times include tokenising; a line says where they went. In one
process: stock, fused by the model's own method, `fastbert.encode`, with `--peers` other runtimes in the place of
the base model, and with `--backends` sentence-transformers' own, where optimum runs with this transformers; on a GPU
with flash-attn sentence-transformers' own unpadding, too. Results are held to the numerical policy first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.backend import export_dynamic_quantized_onnx_model
from sentence_transformers.base.modules import Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import BertTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

import fastbert
from fastbert import numerics
from fastbert.checkpoints import default_device
from fastbert.measure import counts, records
from fastbert.measure.cases import SEED, SHAPES, Workload, build, config_of, draw, workload
from fastbert.measure.machine import Machine, environment
from fastbert.measure.peers import PEERS, Unavailable, share

WORDS = 1000
QUERIES_IN_A_ROW = 5
"""A service has one after the other; and weights of other candidates, and their code, would be what caches hold."""
LEAST = 3
"""Repeats, where --minutes asks for fewer."""
QUERY = 12
"""Words of the query that passages are ranked for."""
AHEAD = "fused, fastbert.encode"
PREPACKED = "fused, prepacked"
CHECKED = ("stock", "fused", PREPACKED, "stock, its own unpadding")
"""Runs that are held to the policy; peers take no segment ids, and are timed without."""


@dataclass(frozen=True)
class Way:
    """One thing that users call."""

    head: str
    """Which model it takes: a key of HEADS."""
    call: str
    """The method."""
    lengths: Callable[[int], Workload]
    """Of its texts, by the batch."""
    one_call: bool = True
    """Of all texts at once; else a call for every `batch` of them, as they come."""
    ahead: bool = True
    """Whether `fastbert.encode` is run, too."""
    alone: bool = False
    """Stock and fused alone: long, and of the same forwards as another way with all."""


def _search(batch: int) -> Workload:
    return workload("search", 16 * batch)


def _query(tokens: int) -> Way:
    return Way("embedder", "encode", lambda _: workload(f"dense{tokens}", 1), ahead=False)


WAYS = {
    **{f"query {tokens}": _query(tokens) for tokens in (8, 16, 32, 64, 128)},
    "queries": Way("embedder", "encode", lambda batch: Workload("questions", draw(("squad_questions", batch)))),
    "corpus": Way("embedder", "encode", _search),
    "calls": Way("embedder", "encode", _search, one_call=False, ahead=False, alone=True),
    "rerank": Way("ranker", "predict", lambda _: workload("squad", 100)),
    "tag": Way("tagger", "__call__", lambda batch: workload("search", 4 * batch), ahead=False, alone=True),
    "late queries": Way("late", "encode_query", lambda batch: Workload("questions", draw(("squad_questions", batch)))),
    "late documents": Way(
        "late", "encode_document", lambda batch: Workload("passages", draw(("squad_passages", batch)))
    ),
    "sparse": Way("sparse", "encode", lambda batch: Workload("passages", draw(("squad_passages", batch)))),
}
HEADS = {
    "embedder": ("feature-extraction", "AutoModel"),
    "ranker": ("sequence-classification", "AutoModelForSequenceClassification"),
    "tagger": ("token-classification", "AutoModelForTokenClassification"),
    "late": ("feature-extraction", "AutoModel"),
    "sparse": ("fill-mask", "AutoModelForMaskedLM"),
}
"""The task by which sentence-transformers loads a model, and its class."""


def texts_of(item: Workload) -> list[str]:
    """A text of words w0, w1, ... for each length, with room for two special tokens."""
    chance = random.Random(SEED)
    return [" ".join(f"w{chance.randrange(WORDS)}" for _ in range(n - 2)) for n in item.lengths]


def pairs_of(item: Workload) -> list[tuple[str, str]]:
    """The same query with a passage for each length, with room for three special tokens."""
    query = " ".join(f"w{i}" for i in range(QUERY))
    passages = texts_of(Workload("", tuple(max(3, n - QUERY - 1) for n in item.lengths)))
    return [(query, passage) for passage in passages]


def save_tokenizer(folder: Path, pad: int = 0) -> None:
    """One that knows the words of `texts_of`, with that id for padding: 0 or 1."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    words[0], words[pad] = words[pad], words[0]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)


def inner_model(head: str, size: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A stock model in evaluation mode with seeded weights."""
    if HEADS[head][1] == "AutoModel":
        return build(size, dtype, device)
    config = config_of(size)
    config.num_labels = 1 if head == "ranker" else 9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(transformers, HEADS[head][1]).from_config(config)
    return model.to(device, dtype).eval()


def encoder(
    size: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa", head: str = "embedder"
) -> Any:
    """A model of sentence-transformers, or a pipeline that tags, over a BERT with seeded weights."""
    task, inner = HEADS[head][0], inner_model(head, size, dtype, device)
    inner.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), inner.config.pad_token_id)
        if head == "tagger":
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            return transformers.pipeline(task, model=inner, tokenizer=tokenizer, device=device)
        inner_model(head, "minilm", torch.float32, torch.device("cpu")).save_pretrained(folder)
        transformer = Transformer(folder, transformer_task=task)
    transformer.model = inner
    transformer.max_seq_length = 512
    rest: dict[str, Callable[[], tuple[Any, list[nn.Module]]]] = {
        "embedder": lambda: (SentenceTransformer, [Pooling(SHAPES[size]["hidden_size"], "mean")]),
        "ranker": lambda: (CrossEncoder, []),
        "late": lambda: (MultiVectorEncoder, [MultiVectorMask()]),
        "sparse": lambda: (SparseEncoder, [SpladePooling("max")]),
    }
    kind, modules = rest[head]()
    if head == "late":
        transformer.query_expansion = {"strategy": "fixed", "length": 32, "attend": False}
    return kind(modules=[transformer, *modules], device=str(device))


def inside(model: Any) -> Any:
    """The model of transformers."""
    return model[0].model if isinstance(model, nn.Module) else model.model


def with_model(model: Any, inner: Any) -> Any:
    """A copy of a SentenceTransformer, or of a pipeline, around another model."""
    if isinstance(model, nn.Module):
        found = copy.deepcopy(model, {id(model[0].model): inner})
        assert found[0].model is inner
        return found
    found = copy.copy(model)
    found.model = inner
    return found


class _Base(nn.Module):
    """Another runtime in the place of a base model."""

    def __init__(self, stock: Any, runtime: Any) -> None:
        super().__init__()
        self.config, self.pooler, self.runtime = stock.config, stock.pooler, runtime
        self.dtype, self.device = stock.dtype, stock.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        hidden = self.runtime(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def peers(stock: Any, names: list[str]) -> dict[str, Any]:
    """Copies of `stock` on other runtimes; those that can't run here are told."""
    found = {}
    for name in names:
        told, make = PEERS[name]
        inner = share(inside(stock))
        prefix = getattr(inner, "base_model_prefix", "")
        base = getattr(inner, prefix, inner)
        try:
            made = _Base(base, make(base))
        except (Unavailable, ImportError) as error:
            print(f"{told}: {error}", flush=True)
            continue
        if base is inner:
            inner = made
        else:
            setattr(inner, prefix, made)
        found[told] = with_model(stock, inner)
    return found


BACKENDS = ("onnx", "onnx-int8", "openvino", "openvino-int8")
INT8 = "avx512_vnni" if "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "avx2"


def backends(stock: Any, names: list[str]) -> dict[str, Any]:
    """`stock` on sentence-transformers' own backends; those that can't run here are told."""
    found: dict[str, Any] = {}
    if not isinstance(stock, nn.Module) or inside(stock).dtype != torch.float32 or inside(stock).device.type != "cpu":
        return found
    for name in names:
        backend, _, int8 = name.partition("-")
        told = f"sentence-transformers, {backend}{' int8' if int8 else ''}"
        options: dict[str, Any] = {"backend": backend, "device": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            try:
                stock.save_pretrained(folder)
                if backend == "onnx":
                    options["model_kwargs"] = {"provider": "CPUExecutionProvider"}
                if name == "onnx-int8":  # quantised as it runs, as their page on speed advises
                    export_dynamic_quantized_onnx_model(type(stock)(folder, **options), INT8, folder)
                    options["model_kwargs"]["file_name"] = f"onnx/model_qint8_{INT8}.onnx"
                elif name == "openvino-int8":  # weights: activations take a data set to calibrate on
                    options["model_kwargs"] = {"load_in_8bit": True}
                made = type(stock)(folder, **options)
            except Exception as error:  # of three packages, of any kind; a peer less
                print(f"{told}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
        made[0].max_seq_length = stock[0].max_seq_length
        found[told] = made
    return found


def _fused(stock: Any, prepack: bool = False) -> Any:
    made = with_model(stock, share(inside(stock)))
    fastbert.fuse(made if isinstance(made, nn.Module) else made.model, prepack=prepack)
    return made


def candidates(
    head: str, size: str, dtype: torch.dtype, device: torch.device, others: list[str], own: list[str]
) -> dict[str, Any]:
    """Models by the name of a run; `fastbert.encode` takes the fused one."""
    stock = encoder(size, dtype, device, head=head)
    found = {"stock": stock, "fused": _fused(stock)}
    if device.type == "cpu":
        found[PREPACKED] = _fused(stock, prepack=True)
    if head == "embedder" and device.type == "cuda":
        try:
            found["stock, its own unpadding"] = encoder(size, dtype, device, "flash_attention_2")
        except ImportError as error:
            print(f"stock, its own unpadding: {error}", flush=True)
    return {**found, **peers(stock, others), **backends(stock, own)}


def values(head: str, model: Any, texts: list[Any]) -> Tensor:
    """What comes of texts, as one tensor of numbers."""
    with torch.inference_mode():
        if head == "tagger":
            call = model.tokenizer(texts, padding=True, return_tensors="pt").to(model.model.device)
            logits: Tensor = model.model(**call).logits
            return logits[call["attention_mask"].bool()]
        features = {name: to_device(value, model.device) for name, value in model.preprocess(texts).items()}
        found = model(features)
    if head == "late":
        rows: Tensor = found["token_embeddings"]
        return rows[found["attention_mask"].bool()]
    result: Tensor = found["scores" if head == "ranker" else "sentence_embedding"].to_dense()
    return result


def to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class Stages:
    """Seconds of tokenising and of the model in what runs within."""

    def __init__(self, model: Any) -> None:
        self.spent = {"tokenise": 0.0, "model": 0.0}
        self.model = copy.copy(model)
        if isinstance(model, nn.Module):
            self.model.preprocess = self._timed("tokenise", model.preprocess)
            self.model.forward = self._timed("model", model.forward)
        else:
            self.model.tokenizer = self._timed("tokenise", model.tokenizer)
            self.model._forward = self._timed("model", model._forward)

    def _timed(self, name: str, call: Callable[..., Any]) -> Any:
        class Timed:
            """Called as what it stands for, and whose attributes it has."""

            def __getattr__(self, attribute: str) -> Any:
                return getattr(call, attribute)

            def __call__(_, *args: Any, **kwargs: Any) -> Any:
                begun = time.perf_counter()
                try:
                    found = call(*args, **kwargs)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    return found
                finally:
                    self.spent[name] += time.perf_counter() - begun

        return Timed()


def _call(way: Way, texts: list[Any], batch: int) -> Callable[[str, Any], None]:
    """(name of the run, model) -> all texts through it, once."""
    groups = [texts] if way.one_call else [texts[i : i + batch] for i in range(0, len(texts), batch)]

    def run(name: str, model: Any) -> None:
        for group in groups:
            if name == AHEAD:
                fastbert.encode(model, group, call=way.call)
            elif way.head == "tagger":
                model(group, batch_size=batch)
            else:
                getattr(model, way.call)(group, batch_size=batch)

    return run


def run(
    name: str, found: dict[str, Any], size: str, dtype: torch.dtype, batch: int, repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """The records of one way to call, of all candidates, in about so many seconds, of three repeats at least."""
    way = WAYS[name]
    if way.alone:
        found = {each: model for each, model in found.items() if each in CHECKED}
    item = way.lengths(batch)
    texts: list[Any] = pairs_of(item) if way.head == "ranker" else texts_of(item)
    stock = found["stock"]
    device = inside(stock).device
    some = texts[:: max(1, len(texts) // 8)]
    exact = values(way.head, with_model(stock, copy.deepcopy(inside(stock)).double()), some)
    expected = values(way.head, stock, some)
    for each, model in found.items():
        if each in CHECKED:
            numerics.assert_within_policy(values(way.head, model, some), expected, exact, each)
    if way.ahead:
        found = {**found, AHEAD: found["fused"]}
    call = _call(way, texts, batch)
    samples = _timed(found, call, repeats, seconds, QUERIES_IN_A_ROW if name.startswith("query ") else 1)
    chunks = [item.lengths[i : i + batch] for i in range(0, len(texts), batch)]
    if way.one_call and way.head != "tagger":  # a pipeline takes texts as they come
        ordered = sorted(item.lengths, reverse=True)
        chunks = [tuple(ordered[i : i + batch]) for i in range(0, len(texts), batch)]
    case = {
        "what": f"encode, {name}",
        "workload": item.name
        if name == "rerank" or name.startswith("query ")
        else f"{item.name.split(' b')[0]} b{batch}",
        "size": size,
        "shape": {"texts": len(texts), "batch": batch, "longest": max(item.lengths)},
        "real_tokens": item.real_tokens,
        "padded_tokens": sum(max(chunk) * len(chunk) for chunk in chunks),
    }
    about, rates = environment(device), Machine(device).rates(dtype)
    cost = counts.encoder(inside(stock).config, item.lengths, dtype)
    result = []
    for each, taken in samples.items():
        result.append(records.make(about, case, each, dtype, taken, samples["stock"], cost, rates))
        if each in ("stock", "fused"):
            staged = Stages(found[each])
            begun = time.perf_counter()
            call(each, staged.model)
            whole = time.perf_counter() - begun
            result[-1]["stages"] = {**staged.spent, "rest": whole - sum(staged.spent.values())}
        print(records.line(result[-1]), flush=True)
        if "stages" in result[-1]:
            print(
                "    " + ", ".join(f"{stage} {1000 * spent:,.1f} ms" for stage, spent in result[-1]["stages"].items())
            )
    return result


def _timed(
    found: dict[str, Any], call: Callable[[str, Any], None], repeats: int, seconds: float, in_a_row: int
) -> dict[str, list[float]]:
    """Of each candidate in a turn `in_a_row` calls, of which, where they are more than one, the first is not timed."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    chance = random.Random(SEED)
    first = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > LEAST and time.perf_counter() - first > seconds:
            break
        for name, i in itertools.product(chance.sample(list(found), len(found)), range(in_a_row)):
            begun = time.perf_counter()
            call(name, found[name])
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # some methods leave results on the GPU
            if repeat and (i or in_a_row == 1):
                samples[name].append(time.perf_counter() - begun)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what", nargs="+", choices=list(WAYS), default=["corpus", "calls"], help="default: %(default)s"
    )
    parser.add_argument("--all", action="store_true", help="everything of --what")
    parser.add_argument("--size", nargs="+", choices=list(SHAPES), help="default: minilm on a CPU, large on a GPU")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    parser.add_argument("--batch", type=int, help="default: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="of one query 16 times as many")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=[])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[], help="of sentence-transformers")
    parser.add_argument("--minutes", type=float, default=60.0, help="fewer repeats to end about then; default: 60")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = default_device(None)
    usual, batch = ("minilm", 32) if device.type == "cpu" else ("large", 128)
    chosen = list(WAYS) if given.all else given.what
    print(records.HEADER)
    found: list[dict[str, Any]] = []
    sizes = given.size or [usual]
    left, end = len(sizes) * len(given.dtype) * len(chosen), time.perf_counter() + 60 * given.minutes
    for size in sizes:
        for name in given.dtype:
            dtype = getattr(torch, name)
            for head in dict.fromkeys(WAYS[way].head for way in chosen):
                models = candidates(head, size, dtype, device, given.peers, given.backends)
                for way in (way for way in chosen if WAYS[way].head == head):
                    times = 4 if way.startswith("query ") else 1
                    seconds = (end - time.perf_counter()) / left
                    found += run(way, models, size, dtype, given.batch or batch, times * given.repeats, seconds)
                    left -= 1
                    if given.output is not None:
                        records.write(records.path_in(given.output, found[0]), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
