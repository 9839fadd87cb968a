"""What commands ask of `--model` before they load it."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer

from . import UsageError, in_a_line


def check_folder(path: str) -> None:
    """Raises UsageError where `path` can only be a folder and there is none: the hub isn't asked."""
    if path.startswith(("/", ".", "~")) and not os.path.isdir(path):
        raise UsageError(f"--model {path}: no such folder")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        UsageError: there is no such checkpoint, or none in it.
    """
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever reading files and asking the hub raises: to a user it is one thing
        raise UsageError(f"--model {path}: {in_a_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there is none
        raise UsageError(f"--model {path}: holds no tokenizer")
    return tokenizer
