"""Texts as tokens, made in processes beside the one that embeds."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging

from .rows import Text


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


def begin_worker(path: str) -> None:
    """Loads the tokenizer, and sees to it that a worker doesn't outlive a parent that is killed."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is told to all; the parent sees to it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.set_verbosity_error()
    _tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _parts(text: Text) -> tuple[str, ...]:
    return text if isinstance(text, tuple) else (text,)


def tokenise(texts: list[Text], max_length: int) -> Tokens:
    rows: list[list[int]] = []
    if texts:  # a tokenizer refuses none: where every row of a shard has a problem
        columns = [list(each) for each in zip(*map(_parts, texts), strict=True)]
        found = _tokenizer(*columns, add_special_tokens=True, return_attention_mask=False, return_token_type_ids=False)
        rows = found["input_ids"]
    cut = {i: len(row) for i, row in enumerate(rows) if len(row) > max_length}
    for i in cut:
        rows[i] = _tokenizer(*_parts(texts[i]), truncation=True, max_length=max_length)["input_ids"]
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    return Tokens(ids, lengths, cut)
