"""From a checkpoint to a folder: in order, what is read, decided, written and looked at again."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from ..usage import UsageError
from . import TASKS, Conversion
from .classes import Target, choose
from .config import Config
from .folder import new_folder
from .sources import FORMATS, Source, find, load
from .tokenizer import write_tokenizer
from .weights import size, write_weights


def run(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None,
    config: str | os.PathLike[str] | None,
    vocab: str | os.PathLike[str] | None,
    cased: bool | None,
    leave_out: Sequence[str],
) -> Conversion:
    """See `fastbert.convert`."""
    if task is not None and task not in TASKS:
        raise UsageError(f"is {task}; expected one of {', '.join(TASKS)}", "task")
    logging.disable_progress_bar()
    source = find(Path(path))
    with new_folder(Path(output)) as folder:  # before the work: it says what can't be written
        load(source)
        _leave_out(source, leave_out)
        settings, target = choose(source, Config(source, None if config is None else Path(config)), task)
        tokenizer = write_tokenizer(source, folder, settings, None if vocab is None else Path(vocab), cased)
        variables, dtype = write_weights(source, target, folder, settings)
        settings.architectures, settings.dtype = [target.name], dtype
        settings.save_pretrained(folder)
        _check_loads(target, dtype, folder)
        report: Conversion = {
            "source": source.file.name,
            "format": FORMATS[source.format],
            "model": target.name,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(map(size, target.shapes.values())),
            "variables": variables,
            "left_out": {each.name: each.reason for each in source.variables if each.reason},
            "tokenizer": tokenizer,
            "notes": source.notes,
            "files": sorted({entry.name for entry in folder.iterdir()} | {"conversion.json"}),
            "not_copied": _not_copied(source, folder),
        }
        (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _leave_out(source: Source, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        found = [each for each in source.variables if fnmatch.fnmatchcase(each.name, pattern)]
        if not found:
            raise UsageError(f"{pattern}: no variable has such a name", "leave_out")
        for variable in found:
            variable.reason = variable.reason or "asked to be left out"


def _check_loads(target: Target, dtype: torch.dtype, folder: Path) -> None:
    """That from_pretrained takes it, parameter by parameter: what it misses, it would draw at random."""
    _, told = target.kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if wrong := {name: value for name, value in told.items() if value}:
        raise RuntimeError(f"{target.name} does not load what was converted, which is a fault of fastbert: {wrong}")


def _not_copied(source: Source, folder: Path) -> list[str]:
    """What else lies beside the checkpoint and may describe the model: JSON, and folders with modules of it."""
    ours = {entry.name for entry in folder.iterdir()} | {"config.json", "bert_config.json"}
    others = [entry for entry in source.folder.iterdir() if entry.name not in ours]
    json_files = (entry.name for entry in others if entry.suffix == ".json" and entry.name != source.file.name)
    modules = (f"{entry.name}/" for entry in others if (entry / "config.json").is_file() and entry.resolve() != folder)
    return sorted([*json_files, *modules])
