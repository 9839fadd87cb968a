"""The checkpoint and the device that are asked for: looked for, and loaded, with errors that say what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from .usage import UsageError, refused

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


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


def load_config(path: str) -> PreTrainedConfig:
    """The config of a checkpoint. Raises UsageError where there is none."""
    check_folder(path)
    with refused(path, "model"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


def load_base(path: str, dtype: str | None, device: torch.device) -> PreTrainedModel:
    """The base model of a checkpoint, in the dtype it is stored in where `dtype` is None. Raises UsageError."""
    config = load_config(path)
    with refused(path, "model"):
        kind = "auto" if dtype is None else getattr(torch, dtype)
        model: PreTrainedModel = AutoModel.from_pretrained(path, config=config, dtype=kind, trust_remote_code=False)
        model = model.to(device).eval()
    return model


def load_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a checkpoint: the class its config names, in the dtype it is stored in.

    Raises:
        UsageError: there is no such checkpoint, or transformers can't load it.
    """
    name = (load_config(path).architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UsageError(f"{path}: transformers has no class {name}, which its config names", "model")
    with refused(path, "model"):
        model = kind.from_pretrained(path, dtype="auto")
    return model, load_tokenizer(path)


def pipeline_kind(path: str) -> str:
    """The class of sentence-transformers that a checkpoint is of: as it says, else by the head that its config names.

    "ColBERT" is one of PyLate or of Stanford's ColBERT, which a MultiVectorEncoder can load, and save as its own.

    Raises:
        UsageError: there is no such checkpoint.
    """
    config = load_config(path)
    with refused(path, "model", (OSError, ValueError)):
        file = cached_file(path, "config_sentence_transformers.json", _raise_exceptions_for_missing_entries=False)
        told = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError(f"config_sentence_transformers.json holds {told!r}; expected an object")
    if "HF_ColBERT" in (config.architectures or ()):
        return str(told.get("model_type") or "ColBERT")
    heads = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    return str(told.get("model_type") or ("CrossEncoder" if heads and not told else "SentenceTransformer"))


def load_pipeline(path: str, dtype: str | None, device: torch.device) -> BaseModel:
    """A checkpoint as a model of sentence-transformers, of the class that it is for, in evaluation mode.

    Raises:
        UsageError: there is no such checkpoint, or sentence-transformers is not installed or can't load it.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UsageError("sentence-transformers is not installed: pip install sentence-transformers")
    import sentence_transformers

    kind = pipeline_kind(path)
    with refused(path, "model"):
        made: BaseModel = getattr(sentence_transformers, kind)(
            path, device=str(device), model_kwargs={"dtype": "auto" if dtype is None else getattr(torch, dtype)}
        )
    return made.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        UsageError: there is no such checkpoint, or none in it.
    """
    check_folder(path)
    with refused(f"{path}: its tokenizer can't be loaded", "model"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there is none
        raise UsageError(f"{path}: holds no tokenizer; expected one that its save_pretrained wrote there", "model")
    return tokenizer
