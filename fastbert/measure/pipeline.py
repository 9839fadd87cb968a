"""A pipeline from strings: a model of sentence-transformers, its texts, and where the time of a call goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..usage import UsageError, refused

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

Model: TypeAlias = "BaseModel"
Text = str | tuple[str, str]
P = ParamSpec("P")
R = TypeVar("R")


def base_of(model: Model) -> PreTrainedModel:
    """The base model inside, of transformers."""
    inner = cast(PreTrainedModel, model[0].model)
    base: PreTrainedModel = getattr(inner, inner.base_model_prefix, inner)
    return base


def method_of(model: Model) -> str:
    """The method of `model` that texts, or pairs of them, go through."""
    return "predict" if hasattr(model, "predict") else "encode"


def read_texts(file: str, pairs: bool) -> list[Text]:
    """The lines of a file, each a text or a pair with a tab between.

    Raises:
        UsageError: it can't be read, holds none, or a line that is no pair.
    """
    with refused(file, "texts", (OSError, ValueError), "a file of a text a line"):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    if not lines:
        raise UsageError(f"{file}: holds no line; expected a text a line", "texts")
    if not pairs:
        return list(lines)
    found: list[Text] = []
    for number, line in enumerate(lines, 1):
        query, tab, passage = line.partition("\t")
        if not tab:
            raise UsageError(f"{file}, line {number}: has no tab; expected a query, a tab and a passage", "texts")
        found.append((query, passage))
    return found


class Staged:
    """A view of a model, the same modules, that takes the time of tokenising and of forwards; called, it runs texts."""

    def __init__(self, model: Model) -> None:
        self.spent: list[dict[str, float]] = []
        """Of each call: seconds of "tokenise" and "forward"."""
        self.lengths: list[int] = []
        """Tokens of each text of the last call, in the order in which they ran."""
        self.padded = 0
        self._method = method_of(model)
        self._on_gpu = base_of(model).device.type == "cuda"
        preprocess: Callable[..., dict[str, Tensor]] = self._timed("tokenise", model.preprocess)

        def counted(*args: object, **kwargs: object) -> dict[str, Tensor]:
            features = preprocess(*args, **kwargs)
            mask = features["attention_mask"]
            self.lengths += mask.sum(1).tolist()
            self.padded += mask.numel()
            return features

        self.model = copy.copy(model)
        vars(self.model).update(preprocess=counted, forward=self._timed("forward", model.forward))

    def __call__(self, texts: list[Text], batch: int) -> None:
        self.spent.append({"tokenise": 0.0, "forward": 0.0})
        self.lengths, self.padded = [], 0
        getattr(self.model, self._method)(texts, batch_size=batch, show_progress_bar=False)

    def _timed(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            begun = time.perf_counter()
            found = call(*args, **kwargs)
            if self._on_gpu:
                torch.cuda.synchronize()
            self.spent[-1][name] += time.perf_counter() - begun
            return found

        return timed

    def stages(self, samples: list[float], busy_s: float) -> dict[str, float]:
        """Seconds of each stage of one call, that whose time is the median: they add up to it.

        Args:
            samples: seconds of whole calls, which come after two others.
            busy_s: of a call, while an operator, on a GPU a kernel, ran.
        """
        timed = zip(samples, self.spent[2:], strict=False)
        whole, spent = sorted(timed, key=lambda each: each[0])[(len(samples) - 1) // 2]
        device = min(busy_s, spent["forward"])
        return {
            "tokenise": spent["tokenise"],
            "host": spent["forward"] - device,
            "device": device,
            "rest": whole - sum(spent.values()),
        }
