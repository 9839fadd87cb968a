"""What is measured: models by their size, and batches by the lengths of their sequences, in tokens.

Where lengths come from text, batches are drawn at random, with a fixed seed, from `lengths.json` (counts of token
lengths, made by benchmarks/lengths.py); of `DRAWS` of them the one nearest to their mean in real tokens and in padding
is run, so that no figure comes of a lucky draw.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..runtime.support import MAX_SEQUENCES
from ..usage import UsageError
from .names import SHAPES as SHAPES

DRAWS = 1000
SEED = 0


@dataclass(frozen=True)
class Workload:
    """One batch of sequences: their lengths in tokens."""

    name: str
    lengths: tuple[int, ...]
    least_width: int = 0
    """Rows are padded to so many tokens, where none is longer."""

    @property
    def width(self) -> int:
        """Tokens of a padded row."""
        return max(self.least_width, *self.lengths)

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        return len(self.lengths) * self.width

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Random ids, padded on the right, with their mask: (batch, longest), int64."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (len(self.lengths), self.width)
        ids = torch.randint(1000, 30000, shape, generator=generator)
        mask = (torch.arange(shape[1]) < torch.tensor(self.lengths)[:, None]).long()
        return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def check_batch(batch: int) -> None:
    """Raises UsageError where no forward takes so many sequences."""
    if not 1 <= batch <= MAX_SEQUENCES:
        raise UsageError(f"is {batch}; expected 1 to {MAX_SEQUENCES}", "batch")


@functools.cache
def draw(*parts: tuple[str, int]) -> tuple[int, ...]:
    """Lengths of a typical batch: of each (histogram of lengths.json, count), so many; shuffled."""
    histograms = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
    chance = random.Random(SEED)
    batches = []
    for _ in range(DRAWS):
        batch: list[int] = []
        for name, count in parts:
            counts = histograms[name]["counts"]
            batch += map(int, chance.choices(list(counts), list(counts.values()), k=count))
        chance.shuffle(batch)
        batches.append(tuple(batch))
    tokens = [sum(lengths) for lengths in batches]
    padding = [max(lengths) * len(lengths) / sum(lengths) for lengths in batches]
    aim = statistics.fmean(tokens), statistics.fmean(padding)

    def distance(i: int) -> float:
        return (tokens[i] / aim[0] - 1) ** 2 + (padding[i] / aim[1] - 1) ** 2

    return batches[min(range(DRAWS), key=distance)]


def workload(name: str, batch: int = 16) -> Workload:
    """A workload by name, of `batch` sequences.

    "squad": question and passage in one sequence; "sentences"; "search": questions and passages, one half each;
    "dense16", "dense128", "dense384", "dense512", "dense8192": all of so many tokens; "uniform254": evenly spread from
    2 to 506, of 254 at the mean, which is the mean of pre-training's sequences in MLPerf; "padded512": from 2 to 70,
    each padded to 512 all the same, as a tokenizer does that is told to, so that 93 % are padding.
    """
    if name.startswith("dense"):
        return Workload(f"{name} b{batch}", (int(name.removeprefix("dense")),) * batch)
    if name in ("uniform254", "padded512"):
        spread, width = (504, 0) if name == "uniform254" else (68, 512)
        lengths = [round(2 + spread * (i + 0.5) / batch) for i in range(batch)]
        random.Random(SEED).shuffle(lengths)
        return Workload(f"{name} b{batch}", tuple(lengths), width)
    parts = {
        "squad": [("squad_pairs", batch)],
        "sentences": [("sst2", batch)],
        "search": [("squad_questions", batch // 2), ("squad_passages", batch - batch // 2)],
    }[name]
    return Workload(f"{name} b{batch}", draw(*parts))


def fields_of(size: str) -> dict[str, object]:
    """The fields of a config, for `AutoConfig.for_model`."""
    return {"model_type": "bert", **SHAPES[size]}


def config_of(size: str) -> PreTrainedConfig:
    """The config of a model of that size."""
    return AutoConfig.for_model(**fields_of(size))


def shape_of(config: PreTrainedConfig, item: Workload) -> dict[str, int]:
    """The field of a record that says of a batch and of a model how large they are."""
    return {
        "batch": len(item.lengths),
        "longest": max(item.lengths),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
    }


def build(size: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A stock base model in evaluation mode with seeded weights, on the attention that stock takes: sdpa, or eager."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModel.from_config(config_of(size))
    return model.to(device, dtype).eval()
