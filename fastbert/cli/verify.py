"""`fastbert verify`: a checkpoint's fused forward against stock."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from .. import verify
from ..verify import LAYOUTS
from . import UsageError, check_file, in_a_line, write_text
from .checkpoints import check_folder, load_tokenizer
from .info import backend, default_device

# Lengths from a few tokens to a hundred, so that a batch has padding.
TEXTS = (
    "Where is the station?",
    "The encoder reads a sentence in both directions at once.",
    "Yes.",
    "A glacier is a persistent body of dense ice that forms where snow accumulates faster than it melts over many"
    " years, and that moves slowly downhill under its own weight, carving valleys and feeding rivers on its way.",
    "Please transfer 250 euros to my savings account on the first of every month.",
    "After the second goal the visitors defended deep in their own half, the referee added six minutes, and the "
    "crowd, who had been silent since the break, found its voice again; it made no difference, and the longest "
    "unbeaten run of the league ended on a wet Tuesday in March, two matches short of the record that had stood "
    "for thirty-one years and that nobody in the ground, least of all the manager, had wanted to talk about.",
    "Proteins fold.",
    "The recipe asks for two cups of flour, a pinch of salt, cold butter and just enough water to bind the dough.",
)


def load(path: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint: the class its config names, in the dtype it is stored in.

    Raises:
        UsageError: there is no such checkpoint, or transformers can't load it.
    """
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise UsageError(f"--model {path}: transformers has no class {name}, which its config names")
        model = kind.from_pretrained(path, dtype="auto")
    except UsageError:
        raise
    except Exception as error:  # whatever reading files and checking repositories raises: to a user it is one thing
        raise UsageError(f"--model {path}: {in_a_line(error)}") from error
    return model, load_tokenizer(path)


def main(arguments: argparse.Namespace) -> int:
    logging.disable_progress_bar()
    device = default_device(arguments.device)
    check_file("--json", arguments.json)
    texts = list(TEXTS)
    if arguments.texts is not None:
        try:
            texts = [line for line in Path(arguments.texts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            told = f"{in_a_line(error)}; expected UTF-8, a text a line"
            raise UsageError(f"--texts {arguments.texts}: {told}") from error
        if not texts:
            raise UsageError(f"--texts {arguments.texts}: holds no text")
    model, tokenizer = load(arguments.model)
    try:
        report = verify(
            model,
            texts,
            tokenizer=tokenizer,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            device=device,
            layouts=LAYOUTS if arguments.padding is None else (arguments.padding,),
            precision=arguments.precision,
        )
    except ValueError as error:  # UnsupportedModelError is one
        raise UsageError(f"--model {arguments.model}: {in_a_line(error)}") from error
    print(f"fused forwards by {backend(device)}\n{report}")
    if arguments.json is not None:
        write_text("--json", arguments.json, report.to_json() + "\n")
    if not report.ok:
        print(f"fastbert verify: {arguments.model} is not verified", file=sys.stderr)
    return 0 if report.ok else 1
