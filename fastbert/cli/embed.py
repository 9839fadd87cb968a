"""`fastbert embed`: embeddings of a corpus, in shards, to be taken up again where it was stopped.

Rows are read in order, and every `--shard-rows` of them are a shard. A process beside reads ahead and tokenises; here
the texts of a shard are sorted by length, cut into batches of about `--batch-tokens` tokens, laid end to end without
padding, run through the fused model, pooled, and written. What a shard holds depends on its own rows alone, so that a
run that was killed, and one over many ranks, leave the same files as one that ran through.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from .. import fuse
from ..fuse import explain
from ..layers.embeddings import first_position, positions
from ..runtime.support import MAX_SEQUENCES
from . import UsageError, in_a_line
from .checkpoints import load_tokenizer
from .info import default_device
from .rows import Input, Row
from .shards import Shards

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "lasttoken")
# As sentence-transformers has them in the config of its pooling.
_NAMES = {"mean_sqrt_len_tokens": "mean_sqrt_len"}
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Recipe:
    """How texts become embeddings."""

    pooling: str = "mean"
    normalize: bool = False
    prompt: str = ""
    max_length: int | None = None


def read_recipe(folder: Path) -> Recipe:
    """What a sentence-transformers folder says; the defaults of a plain checkpoint, which has no modules.json.

    Raises:
        UsageError: it has modules or a pooling that this command has not.
    """

    def load(*path: str) -> Any:
        name = os.path.normpath(os.path.join(*path))
        if os.path.isabs(name) or name.startswith(".."):
            raise UsageError(f"--model {folder}: names a file outside of it, {name}")
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    modules = load("modules.json")
    if not modules:
        return Recipe()
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UsageError(
            f"--model {folder}: has modules {', '.join(kinds)}; expected Transformer, Pooling [, Normalize]"
        )
    config = load(modules[1]["path"], "config.json")
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    pooling = _NAMES.get(modes[0], modes[0])
    if len(modes) > 1 or pooling not in POOLINGS or config.get("include_prompt") is False:
        raise UsageError(f"--model {folder}: pools by {config}; expected one of {', '.join(POOLINGS)}, prompt included")
    whole = load("config_sentence_transformers.json")
    prompt = (whole.get("prompts") or {}).get(whole.get("default_prompt_name"), "") or ""
    longest = load("sentence_bert_config.json").get("max_seq_length")
    if not isinstance(longest, int | None):
        raise TypeError(f"max_seq_length is {longest!r}")
    return Recipe(pooling, len(kinds) > 2, prompt, longest)


class Tokens(NamedTuple):
    """Texts of a shard as tokens."""

    ids: np.ndarray
    """(T,) int32, of all texts end to end."""
    lengths: np.ndarray
    """(texts,) int32."""
    cut: dict[int, int]
    """Texts that were too long, and the tokens they had."""


_tokenizer: Any = None


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _begin_worker(path: str) -> None:
    """Loads the tokenizer, and sees to it that a worker doesn't outlive a parent that is killed."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is told to all; the parent sees to it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.set_verbosity_error()
    _tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _tokenise(texts: list[str], max_length: int) -> Tokens:
    rows: list[list[int]] = []
    if texts:  # a tokenizer refuses none: where every row of a shard has a problem
        found = _tokenizer(texts, add_special_tokens=True, return_attention_mask=False, return_token_type_ids=False)
        rows = found["input_ids"]
    cut = {i: len(row) for i, row in enumerate(rows) if len(row) > max_length}
    for i in cut:
        rows[i] = _tokenizer(texts[i], truncation=True, max_length=max_length)["input_ids"]
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    return Tokens(ids, lengths, cut)


def pool(rows: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """One vector of each sequence.

    Args:
        rows: (T, H), of sequences end to end.
        cu_seqlens: (B + 1,) where each starts; none is empty.
        how: one of POOLINGS.

    Returns:
        (B, H) float32.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if how in ("cls", "lasttoken"):
        return rows[starts if how == "cls" else ends - 1].float()
    lengths = ends - starts
    reduced = torch.segment_reduce(rows.float(), "max" if how == "max" else "sum", lengths=lengths)
    if how == "max":
        return reduced
    divisor = lengths.float() if how == "mean" else lengths.float().sqrt()
    return reduced / divisor[:, None]


class Encoder:
    """A fused base model that embeds texts laid end to end."""

    def __init__(self, model: Any, recipe: Recipe, batch_tokens: int) -> None:
        self.model, self.recipe, self.batch_tokens = model, recipe, batch_tokens
        self.first = first_position(model.embeddings)

    def batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of sequences, the longest first, in batches of `batch_tokens` at most, or of one."""
        order = np.lexsort((np.arange(len(lengths)), -lengths))
        start = total = 0
        for i, index in enumerate(order):
            if i > start and (total + lengths[index] > self.batch_tokens or i - start == MAX_SEQUENCES):
                yield order[start:i]
                start, total = i, 0
            total += int(lengths[index])
        if len(order) > start:
            yield order[start:]

    @torch.inference_mode()
    def __call__(self, tokens: Tokens) -> np.ndarray:
        """(texts, H) float32."""
        begins = np.concatenate([[0], tokens.lengths.cumsum()])
        result = np.empty((len(tokens.lengths), self.model.config.hidden_size), np.float32)
        device = self.model.device
        rows = self.model.get_input_embeddings().num_embeddings
        if (largest := int(tokens.ids.max(initial=0))) >= rows:
            raise UsageError(f"--model: its tokenizer gives token {largest}, its embeddings have 0 to {rows - 1}")
        for chosen in self.batches(tokens.lengths):
            lengths = tokens.lengths[chosen]
            cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
            positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
            ids = tokens.ids[np.repeat(begins[chosen], lengths) + positions]
            starts = torch.from_numpy(cu_seqlens).to(device)
            longest = int(lengths.max())
            rows = self.model(
                input_ids=torch.from_numpy(ids).long().to(device)[None],
                position_ids=torch.from_numpy(positions + self.first).long().to(device)[None],
                cu_seq_lens_q=starts,
                cu_seq_lens_k=starts,
                max_length_q=longest,
                max_length_k=longest,
            ).last_hidden_state[0]
            pooled = pool(rows, starts, self.recipe.pooling)
            if self.recipe.normalize:
                pooled = nn.functional.normalize(pooled, dim=1)
            result[chosen] = pooled.cpu().numpy()
        return result


class _Shard(NamedTuple):
    number: int
    rows: list[Row]
    digest: str
    tokens: concurrent.futures.Future[Tokens]
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


def _read(source: Input, shards: Shards, shard_rows: int, submit: Any) -> Iterator[_Shard | None]:
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
                f"the input has changed: rows from {index * shard_rows} on are not those of part-{index:05d}"
            )
        else:
            yield None
        index += 1


_END: Any = object()


def _one_ahead(items: Iterator[Any], pool: concurrent.futures.Executor) -> Iterator[Any]:
    """The same items, each made in a thread of `pool` while the one before is used."""
    following = pool.submit(next, items, _END)
    while (item := following.result()) is not _END:
        following = pool.submit(next, items, _END)
        yield item


def embed(source: Input, shards: Shards, encoder: Encoder, workers: Any, max_length: int, shard_rows: int) -> int:
    """Makes the shards that are not there; returns how many there are to be in all."""
    prompt = encoder.recipe.prompt

    def submit(texts: list[str]) -> Any:
        return workers.submit(_tokenise, [prompt + text for text in texts], max_length)

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
                if len(ahead) > workers._max_workers + 1:
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


def _make(shard: _Shard, encoder: Encoder, max_length: int) -> tuple[tuple[Any, ...], int]:
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
    embeddings = encoder(tokens)
    finite = np.isfinite(embeddings).all(1)
    for i in np.flatnonzero(~finite).tolist():
        told = f"NaN or infinity in its embedding, in {encoder.model.dtype}"
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
    return (shard.number, keys, embeddings[finite], [problems[n] for n in sorted(problems)], about), total


def weights_digest(model: nn.Module) -> str:
    """A hash of names, dtypes and values of all parameters that embeddings come from."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):  # drawn anew in each process where the checkpoint, as of a masked LM, has none
            continue
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of how texts become tokens."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    told = json.dumps(sorted(tokenizer.get_vocab().items())) if rust is None else rust.to_str()
    return hashlib.sha256(told.encode()).hexdigest()


def _load(arguments: argparse.Namespace, tokenizer: Any, device: torch.device) -> tuple[Any, Recipe, int]:
    """The fused model, what is done with its output, and the most tokens of a text."""
    path = arguments.model
    try:
        recipe = read_recipe(Path(path)) if Path(path).is_dir() else Recipe()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {in_a_line(error)}"
        raise UsageError(f"--model {path}: its modules are not as sentence-transformers writes them: {told}") from error
    given = {"pooling": arguments.pooling, "normalize": arguments.normalize, "prompt": arguments.prompt}
    recipe = Recipe(
        **{name: getattr(recipe, name) if value is None else value for name, value in given.items()},
        max_length=recipe.max_length if arguments.max_length is None else arguments.max_length,
    )
    dtype = "auto" if arguments.dtype is None else getattr(torch, arguments.dtype)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModel.from_pretrained(path, config=config, dtype=dtype).to(device).eval()
    except Exception as error:  # whatever reading files and asking the hub raises: to a user it is one thing
        raise UsageError(f"--model {path}: {in_a_line(error)}") from error
    try:
        model = fuse(model)
    except ValueError as error:  # UnsupportedModelError is one
        raise UsageError(f"--model {path}: {in_a_line(error)}") from error
    with torch.inference_mode():
        if reason := explain(model).encoders[0].reason:
            raise UsageError(f"--model {path}: runs stock ({reason}); expected a model that runs fused")
    if tokenizer.cls_token_id is None and recipe.pooling == "cls":
        raise UsageError("--pooling cls: the tokenizer has no such token")
    longest = positions(model.embeddings)
    limit = longest if recipe.max_length is None else min(longest, recipe.max_length)
    least = tokenizer.num_special_tokens_to_add() + 1
    if limit < least:
        raise UsageError(f"--max-length is {limit}; expected at least {least}, of which {least - 1} are special tokens")
    if arguments.max_length is not None and arguments.max_length > longest:
        raise UsageError(f"--max-length is {arguments.max_length}; the model has positions for {longest}")
    return model, recipe, limit


def _place() -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine), as torchrun tells them."""
    told = {name: os.environ.get(name, default) for name, default in _PLACES.items()}
    if not all(value.isdecimal() for value in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise UsageError(f"the environment has {told}; expected numbers, RANK from 0 to WORLD_SIZE - 1")
    return int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"])


_PLACES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _batch_tokens(arguments: argparse.Namespace, device: torch.device) -> int:
    return arguments.batch_tokens or (65536 if device.type == "cuda" else 2048)


def main(arguments: argparse.Namespace) -> int:
    logging.disable_progress_bar()
    for option, least in (("batch_tokens", 1), ("shard_rows", 1), ("workers", 1)):
        if (value := getattr(arguments, option)) is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} is {value}; expected at least {least}")
    if os.path.exists(arguments.output) and not os.path.isdir(arguments.output):
        raise UsageError(f"--output {arguments.output}: is a file; expected a folder")
    source = Input(arguments.input, arguments.column, arguments.id_column)
    rank, world, local = _place()
    if world > 1 and "-" in arguments.input:
        raise UsageError(f"- is given to {world} ranks; each would read a part of standard input, expected files")
    name = arguments.device or (f"cuda:{local}" if torch.cuda.is_available() else None)
    device = default_device(name)
    tokenizer = load_tokenizer(arguments.model)
    batch_tokens = _batch_tokens(arguments, device)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        arguments.workers, mp_context=spawn, initializer=_begin_worker, initargs=(arguments.model,)
    ) as workers:
        try:
            workers.submit(_tokenise, [""], 1 << 30)  # it starts while the model loads
            model, recipe, max_length = _load(arguments, tokenizer, device)
            settings = {
                "weights": weights_digest(model),
                "tokenizer": tokenizer_digest(tokenizer),
                "pooling": recipe.pooling,
                "normalize": recipe.normalize,
                "prompt": recipe.prompt,
                "max_length": max_length,
                "batch_tokens": batch_tokens,
                "shard_rows": arguments.shard_rows,
                "format": arguments.format,
                "column": arguments.column,
                "id_column": arguments.id_column,
            }
            begun = time.monotonic()
            with contextlib.closing(
                Shards(Path(arguments.output), arguments.format, arguments.id_column is None, settings, rank, world)
            ) as shards:
                encoder = Encoder(model, recipe, batch_tokens)
                count = embed(source, shards, encoder, workers, max_length, arguments.shard_rows)
                summary = shards.finish(count)
        except BrokenProcessPool as error:
            raise UsageError("a process that tokenises has died: killed, or out of memory?") from error
        except torch.OutOfMemoryError as error:
            raise UsageError(f"out of memory on {device} with --batch-tokens {batch_tokens}; expected fewer") from error
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    passed = time.monotonic() - begun
    if arguments.json:
        print(json.dumps({**(summary or {"complete": False}), "rank": rank, "world": world, "seconds": passed}))
    elif summary is None:
        print(f"rank {rank} of {world}: done in {passed:.0f} s; others are not")
    else:
        rejected, cut = summary["rejected"], summary["truncated"]
        told = f"{_count(rejected, 'row')} rejected, {cut:,} cut to {_count(max_length, 'token')}"
        print(
            f"{_count(summary['rows'], 'row')} in {_count(summary['shards'], 'shard')}, "
            f"{_count(summary['tokens'], 'token')}; "
            f"{f'{told} (see part-*.problems.jsonl)' if rejected or cut else 'none rejected or cut'}; {passed:.0f} s"
        )
    return 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
