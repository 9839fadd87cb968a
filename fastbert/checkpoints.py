"""The checkpoint and the device that are asked for: looked for, and loaded, with errors that say what is wrong."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from .usage import UsageError, in_a_line


def check_folder(path: str) -> None:
    """Raises UsageError where `path` can only be a folder and there is none: the hub isn't asked."""
    if path.startswith(("/", ".", "~")) and not os.path.isdir(path):
        raise UsageError(f"{path}: no such folder; expected one that save_pretrained wrote", "model")


def default_device(name: str | None) -> torch.device:
    """The device a command was told, or the GPU where there is one, or the CPU.

    Raises:
        UsageError: torch knows no such device, or it isn't here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"{name}: expected cpu or cuda", "device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"{name}: {str(error).splitlines()[0]}", "device") from error
    return device


def load_config(path: str) -> Any:
    """The config of a checkpoint. Raises UsageError where there is none."""
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever reading files and asking the hub raises: to a user it is one thing
        raise UsageError(f"{path}: {in_a_line(error)}", "model") from error


def load_base(path: str, dtype: str | None, device: torch.device) -> Any:
    """The base model of a checkpoint, in the dtype it is stored in where `dtype` is None. Raises UsageError."""
    config = load_config(path)
    try:
        kind = "auto" if dtype is None else getattr(torch, dtype)
        return AutoModel.from_pretrained(path, config=config, dtype=kind, trust_remote_code=False).to(device).eval()
    except Exception as error:  # as above
        raise UsageError(f"{path}: {in_a_line(error)}", "model") from error


def load_model(path: str) -> tuple[Any, Any]:
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
            raise UsageError(f"{path}: transformers has no class {name}, which its config names", "model")
        model = kind.from_pretrained(path, dtype="auto")
    except UsageError:
        raise
    except Exception as error:  # whatever reading files and checking repositories raises: to a user it is one thing
        raise UsageError(f"{path}: {in_a_line(error)}", "model") from error
    return model, load_tokenizer(path)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        UsageError: there is no such checkpoint, or none in it.
    """
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever reading files and asking the hub raises: to a user it is one thing
        raise UsageError(f"{path}: {in_a_line(error)}", "model") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there is none
        raise UsageError(f"{path}: holds no tokenizer; expected one that its save_pretrained wrote there", "model")
    return tokenizer
