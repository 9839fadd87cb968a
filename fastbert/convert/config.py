"""The config beside a checkpoint: read, checked, and made transformers' own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import transformers
from transformers import PretrainedConfig

from ..usage import UsageError, in_a_line
from .sources import Source

MODEL_TYPES = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "distilbert", "mpnet"),
    *("deberta", "deberta-v2"),
)
_ROOTS = ("bert", "distilbert", "electra", "ernie", "mpnet")
"""Model types that the names of weights tell, too: "roberta" and "deberta" begin those of several."""

_REQUIRED = {
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings",),
}
"""What a config has to say, under either name: the defaults of a class are those of another model."""

_GOOGLE = {"layer_norm_eps": 1e-12}  # which its code has, not its config


class Config:
    """What a file says.

    Attributes:
        kind: transformers' class of such configs.
        said: the settings in it, but for those that are written anew.
        architecture: the class it names, without the TF before it; None: none.

    Raises:
        UsageError: it is not there, not JSON, says too little, or is of a model that is not known.
    """

    def __init__(self, source: Source, file: Path | None) -> None:
        self.file = file or _beside(source)
        try:
            said = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.wrong(f"{in_a_line(error)}; expected JSON") from error
        if not isinstance(said, dict):
            raise self.wrong("expected the settings of a model, by name")
        for name, either in _REQUIRED.items():
            told = next((said[each] for each in either if each in said), None)
            if told is None:
                raise self.wrong(f"says no {name}")
            if type(told) is not int or told < 1:
                raise self.wrong(f"says {told!r} for {name}; expected a number from 1 up")
        if not isinstance(said.get("hidden_act", said.get("activation")), str):
            raise self.wrong("says no hidden_act")
        named = said.pop("architectures", None)
        self.architecture = str(named[0]).removeprefix("TF") if isinstance(named, list) and named else None
        self.said = {name: value for name, value in said.items() if name not in ("torch_dtype", "dtype")}
        self.kind: type[PretrainedConfig] = transformers.CONFIG_MAPPING[self._model_type(source)]
        self._google = source.format == "tensorflow"

    def wrong(self, told: str) -> UsageError:
        return UsageError(f"{self.file}: {told}", "config")

    def _model_type(self, source: Source) -> str:
        expected = f"expected one of {', '.join(MODEL_TYPES)}"
        found = self.said.get("model_type")
        if found is None:
            stems = {each: stem(transformers.CONFIG_MAPPING[each]) for each in MODEL_TYPES}
            names = {variable.to.split(".")[0] for variable in source.variables if variable.to}
            named = self.architecture or ""
            ways = {
                "the class it names": [n for n in MODEL_TYPES if re.match(f"{stems[n]}(Model|For|LMHead)", named)],
                "the names of variables": [n for n in _ROOTS if n in names],
                "its own name": ["bert"] * self.file.name.startswith("bert_config"),
            }
            how, fits = next(((how, fits) for how, fits in ways.items() if fits), ("", []))
            if len(fits) != 1:
                raise self.wrong(f"says no model_type; {expected}")
            (found,) = fits
            source.notes.append(f"the config says no model_type; {found} by {how}")
        if found not in MODEL_TYPES:
            raise self.wrong(f"says {found!r} for model_type; {expected}")
        return str(found)

    def says(self, *names: str) -> bool:
        return bool(self.said.keys() & set(names))

    def settings(self, source: Source) -> PretrainedConfig:
        """An instance of transformers' class."""
        try:
            found = self.kind.from_dict({**(_GOOGLE if self._google else {}), **self.said})
        except Exception as error:  # it checks types, and has many ways to say so
            raise self.wrong(in_a_line(error)) from error
        if not self._google and not self.says("layer_norm_eps") and hasattr(found, "layer_norm_eps"):
            source.notes.append(
                f"the config says no layer_norm_eps; {found.layer_norm_eps}, as {self.kind.__name__} has"
            )
        return found


def stem(kind: type[PretrainedConfig]) -> str:
    """What the names of the classes of a config's models begin with: "Bert"."""
    return kind.__name__.removesuffix("Config")


def _beside(source: Source) -> Path:
    usual = ["bert_config.json", "config.json"]
    for name in usual if source.format == "tensorflow" else reversed(usual):
        if (source.folder / name).is_file():
            return source.folder / name
    raise UsageError(f"{source.folder}: has neither config.json nor bert_config.json; expected one", "config")
