"""Embeddings of a corpus, in shards, to be taken up again where it was stopped.

Rows are read in order, and every `shard_rows` of them are a shard. A process beside reads ahead and tokenises; here
the texts of a shard are sorted by length, cut into batches of about `batch_tokens` tokens, laid end to end without
padding, run through the fused model, pooled, and written. What a shard holds depends on its own rows alone, so that a
run that was killed, and one over many ranks, leave the same files as one that ran through.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ..checkpoints import default_device, load_tokenizer, pipeline_kind
from ..fuse import Precision
from ..usage import UsageError
from .batches import batch_tokens_on
from .encoder import (
    Encoder,
    LateEncoder,
    Ranker,
    load,
    load_late,
    load_ranker,
    tokenizer_digest,
    weights_digest,
)
from .rows import Input, Row, Text
from .shards import Shards, TokenVectors
from .tokens import Tokens, begin_worker, tokenise

_Making = concurrent.futures.Future[Tokens]
_Encoder = Encoder | LateEncoder | Ranker


class _Shard(NamedTuple):
    number: int
    rows: list[Row]
    digest: str
    tokens: _Making
    span: tuple[float, float] | None
    """Where in the input it is: fractions read before and after it; None where that can't be told."""


class Progress:
    """A line on a terminal that is written over; elsewhere nothing."""

    def __init__(self) -> None:
        self.begun, self.rows, self.tokens = time.monotonic(), 0, 0
        self._first: float | None = None
        self._shown = sys.stderr.isatty()

    def add(self, rows: int, tokens: int, span: tuple[float, float] | None) -> None:
        """Counts a shard that is done."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        if not self._shown:
            return
        passed, left = time.monotonic() - self.begun, ""
        if span is not None:
            self._first = span[0] if self._first is None else self._first  # what was there before took no time
            seconds = int(passed * (1 - span[1]) / max(span[1] - self._first, 1e-9))
            left = f", {span[1]:.0%}, {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        line = f"{self.rows:,} rows, {self.tokens / passed:,.0f} tokens/s{left}"
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
        print(f"\r{line[:width]}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown and self.rows:
            print(file=sys.stderr)


def _digest(rows: Sequence[Row]) -> str:
    """A hash of what a shard is made of."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([str(row.key), row.text, row.problem]).encode())
    return found.hexdigest()


def _read(
    source: Input, shards: Shards, shard_rows: int, submit: Callable[[list[Text]], _Making]
) -> Iterator[_Shard | None]:
    """The shards to be made here, in order, each being tokenised; None for every other one."""
    rows = source.rows(lambda number: shards.is_own(number // shard_rows))
    index = 0
    before = source.fraction()
    while window := list(islice(rows, shard_rows)):
        there, after = shards.committed(index), source.fraction()
        span = None if before is None or after is None else (before, after)
        before = after
        if not shards.is_own(index):
            yield None
        elif there is None:
            texts = [row.text for row in window if row.text is not None]
            yield _Shard(index, window, _digest(window), submit(texts), span)
        elif there.get("input") != _digest(window):
            raise UsageError(
                f"the input has changed: rows from {index * shard_rows} on are not those of "
                f"part-{index:05d}; expected the same input, or another output"
            )
        else:
            yield None
        index += 1


_END: object = object()


def _one_ahead(items: Iterator[object], pool: concurrent.futures.Executor) -> Iterator[Any]:
    """The same items, each made in a thread of `pool` while the one before is used."""
    following = pool.submit(next, items, _END)
    while (item := following.result()) is not _END:
        following = pool.submit(next, items, _END)
        yield item


def _run(
    source: Input,
    shards: Shards,
    encoder: _Encoder,
    pool: ProcessPoolExecutor,
    workers: int,
    max_length: int,
    shard_rows: int,
) -> int:
    """Makes the shards that are not there; returns how many there are to be in all."""
    prompt = encoder.prompt

    def submit(texts: list[Text]) -> _Making:
        made: list[Text] = [prompt + text if isinstance(text, str) else text for text in texts]
        return pool.submit(tokenise, made, max_length)

    progress = Progress()
    ahead: deque[_Shard] = deque()
    count = 0
    written: concurrent.futures.Future[None] | None = None
    read = _read(source, shards, shard_rows, submit)
    with concurrent.futures.ThreadPoolExecutor(1) as reader, concurrent.futures.ThreadPoolExecutor(1) as writer:
        if not source.is_stream:  # a thread that waits for standard input can't be interrupted
            read = _one_ahead(read, reader)

        def make(shard: _Shard) -> None:
            nonlocal written
            found, tokens = _make(shard, encoder, max_length)
            if written is not None:  # one behind, while the next is embedded
                written.result()
            written = writer.submit(shards.commit, *found)
            progress.add(len(shard.rows), tokens, shard.span)

        try:
            for shard in read:
                count += 1
                if shard is not None:
                    ahead.append(shard)
                if len(ahead) > workers + 1:
                    make(ahead.popleft())
            while ahead:
                make(ahead.popleft())
            if written is not None:
                written.result()
        finally:
            progress.close()
            for left in ahead:
                left.tokens.cancel()
    return count


def _make(shard: _Shard, encoder: _Encoder, max_length: int) -> tuple[tuple[Any, ...], int]:
    """The arguments of `Shards.commit` for a shard, and how many tokens it has."""
    tokens = shard.tokens.result()
    good = [row for row in shard.rows if row.text is not None]
    problems = {
        row.number: {"row": row.number, "id": row.key, "problem": row.problem, "embedded": False}
        for row in shard.rows
        if row.text is None
    }
    for i, length in tokens.cut.items():
        told = f"{length} tokens, cut to {max_length}"
        problems[good[i].number] = {"row": good[i].number, "id": good[i].key, "problem": told, "embedded": True}
    made = encoder(tokens, [row.text for row in good if row.text is not None])
    embeddings: np.ndarray | TokenVectors
    if isinstance(made, TokenVectors):
        finite = made.are_finite()
        embeddings = made.of(finite)
    else:
        finite = np.isfinite(made.reshape(len(good), -1)).all(1) if good else np.ones(0, bool)
        embeddings = made[finite]
    for i in np.flatnonzero(~finite).tolist():
        told = f"NaN or infinity in its {encoder.makes}, in {encoder.dtype}"
        problems[good[i].number] = {"row": good[i].number, "id": good[i].key, "problem": told, "embedded": False}
    keys = [row.key for row, right in zip(good, finite, strict=True) if right]
    total = int(tokens.lengths.sum())
    about = {
        "rows": len(keys),
        "rejected": len(shard.rows) - len(keys),
        "truncated": sum(bool(finite[i]) for i in tokens.cut),
        "tokens": total,
        "input": shard.digest,
    }
    return (shard.number, keys, embeddings, [problems[n] for n in sorted(problems)], about), total


def _place() -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine), as torchrun tells them."""
    told = {name: os.environ.get(name, default) for name, default in _PLACES.items()}
    if not all(value.isdecimal() for value in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise UsageError(f"the environment has {told}; expected numbers, RANK from 0 to WORLD_SIZE - 1")
    return int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"])


_KINDS = ("SentenceTransformer", "CrossEncoder", "MultiVectorEncoder")
"""Classes of sentence-transformers whose checkpoints are taken; of a CrossEncoder, without queries, its base model."""
_PLACES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def embed(
    files: Sequence[str],
    output: str,
    *,
    model: str,
    column: str = "text",
    id_column: str | None = None,
    query_column: str | None = None,
    format: str = "parquet",
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    batch_tokens: int | None = None,
    shard_rows: int | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Embeds the texts of files into shards in a folder; resumes a run that was stopped.

    Args:
        files: .txt .jsonl .csv .tsv (also .gz) .parquet; "-" is standard input.
        output: the folder.
        model: a checkpoint: a folder, or a name on the hub; of a MultiVectorEncoder each token of a text has a vector,
            as its `encode_document` has them, and there is no `pooling` or `normalize` but its own.
        column, id_column: the fields that hold the text and the id; without one, rows are numbered.
        query_column: the field that holds a query; then `model` is a CrossEncoder, and rows get the score of query and
            text, as its own `predict` has them.
        format: "parquet" or "npy".
        pooling: one of POOLINGS; this, `normalize`, `prompt` and `max_length` are by default as the folder says.
        dtype: its name; default: the checkpoint's.
        precision: as `fuse` takes it.
        device: default: cuda where there is one; under torchrun that of this rank.
        batch_tokens: tokens in a forward; default: `batch_tokens_on`.
        shard_rows: rows of a shard; default: 8,192, or 1,024 of token vectors.
        workers: processes that tokenise.

    Returns:
        "complete", "rank", "world", "seconds" and "max_length"; where all ranks are done, also "shards", "rows",
        "rejected", "truncated" and "tokens".

    Raises:
        UsageError: what is asked for can't be done; it names the argument.
    """
    logging.disable_progress_bar()
    for name, value in (("batch_tokens", batch_tokens), ("shard_rows", shard_rows), ("workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"is {value}; expected at least 1", name)
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"{output}: is a file; expected a folder", "output")
    given: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "prompt": prompt}
    if query_column is not None:
        for name, value in given.items():
            if value is not None:
                raise UsageError("is given with query_column; expected none, as nothing is pooled", name)
    source = Input(files, column, id_column, query_column)
    rank, world, local = _place()
    if world > 1 and "-" in files:
        raise UsageError(f"- is given to {world} ranks; each would read a part of standard input, expected files")
    where = default_device(device or (f"cuda:{local}" if torch.cuda.is_available() else None))
    tokenizer = load_tokenizer(model)
    kind = pipeline_kind(model) if query_column is None else "CrossEncoder"
    if kind not in _KINDS:
        how = ": MultiVectorEncoder(...).save_pretrained(folder) makes one of it" if kind == "ColBERT" else ""
        raise UsageError(f"{model}: is a {kind}; expected a {', '.join(_KINDS[:-1])} or {_KINDS[-1]}{how}", "model")
    is_late = kind == "MultiVectorEncoder"
    for name in ("pooling", "normalize") if is_late else ():
        if given[name] is not None:
            raise UsageError(
                f"is given with {model}, a {kind}; expected none: token vectors are as it makes them", name
            )
    shard_rows = shard_rows or (1024 if is_late else 8192)
    batch_tokens = batch_tokens or batch_tokens_on(where)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=begin_worker, initargs=(model,)
    ) as pool:
        try:
            pool.submit(tokenise, [""], 1 << 30)  # it starts while the model loads
            encoder: _Encoder
            if is_late:
                late, before, longest = load_late(model, tokenizer, where, dtype, prompt, max_length, precision)
                encoder = LateEncoder(late, before, batch_tokens)
                own: dict[str, object] = {"prompt": before, "modules": [repr(module) for module in late]}
            elif query_column is None:
                given |= {"dtype": dtype, "max_length": max_length, "precision": precision}
                loaded, recipe, longest = load(model, tokenizer, where, **given)
                encoder = Encoder(loaded, recipe, batch_tokens)
                own = {"pooling": recipe.pooling, "normalize": recipe.normalize, "prompt": recipe.prompt}
            else:
                ranker, longest = load_ranker(model, tokenizer, where, dtype, max_length, precision)
                encoder = Ranker(ranker, batch_tokens)
                own = {"query_column": query_column, "activation": str(ranker.activation_fn)}
            settings = {
                "weights": weights_digest(encoder.model),
                "tokenizer": tokenizer_digest(tokenizer),
                **own,
                "max_length": longest,
                "batch_tokens": batch_tokens,
                "shard_rows": shard_rows,
                "format": format,
                "column": column,
                "id_column": id_column,
                **({} if precision is None else {"precision": precision}),
            }
            begun = time.monotonic()
            with contextlib.closing(
                Shards(Path(output), format, id_column is None, settings, rank, world, encoder.makes)
            ) as shards:
                count = _run(source, shards, encoder, pool, workers, longest, shard_rows)
                summary = shards.finish(count)
        except BrokenProcessPool as error:
            raise UsageError(
                "a process that tokenises has died: killed, or out of memory? The same call resumes"
            ) from error
        except torch.OutOfMemoryError as error:
            raise UsageError(f"is {batch_tokens}: {where} is out of memory; expected fewer", "batch_tokens") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    about = {"rank": rank, "world": world, "seconds": time.monotonic() - begun, "max_length": longest}
    return {**(summary or {"complete": False}), **about}
