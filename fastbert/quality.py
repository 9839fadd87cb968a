"""What another precision changes in what a model is used for: labels, spans, the order of scores, nearest texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = Mapping[str, Tensor]


class Measure(NamedTuple):
    """One comparison with the truth, between 0 and 1; 1 where nothing has changed."""

    name: str
    value: float
    stock: float
    """The same of stock in the model's own dtype."""


class Quality:
    """Collects the outputs of the truth, of stock and of a candidate, batch by batch."""

    def __init__(self) -> None:
        self._kept: dict[str, list[list[Tensor]]] = {}

    def add(self, truth: Outputs, stock: Outputs, candidate: Outputs, real: Tensor) -> None:
        """Adds a batch: outputs as `verify` names them, at real tokens; `real` (sequences, tokens) bool."""
        for kept, outputs in zip(("truth", "stock", "candidate"), (truth, stock, candidate), strict=True):
            for name, value in _of_use(outputs, real).items():
                self._kept.setdefault(name, [[], [], []])[("truth", "stock", "candidate").index(kept)].append(value)

    def measures(self) -> list[Measure]:
        """What there is to say of all batches."""
        found = []
        for name, values in self._kept.items():
            truth, stock, candidate = (torch.cat(each) for each in values)
            for what, measure in _MEASURES[name].items():
                found.append(Measure(what, measure(candidate, truth), measure(stock, truth)))
        return found


def _of_use(outputs: Outputs, real: Tensor) -> dict[str, Tensor]:
    """The outputs that a task reads: float64, one row a sequence, or a token where it has labels of tokens."""
    if "logits" in outputs:
        logits = outputs["logits"].double().cpu()
        return {"scores" if logits.shape[-1] == 1 else "labels": logits.flatten(0, -2)}
    lengths = real.sum(1).tolist()
    if "start_logits" in outputs:
        ends = [outputs[name].double().cpu().flatten().split(lengths) for name in ("start_logits", "end_logits")]
        spans = [[x.argmax() for x in pair if x.numel()] for pair in zip(*ends, strict=True)]
        rows = [torch.stack(span) for span in spans if span]
        return {"spans": torch.stack(rows)} if rows else {}
    hidden = outputs["last_hidden_state"].double().cpu().split(lengths)
    rows = [F.normalize(x.mean(0), dim=0) for x in hidden if len(x)]
    return {"embeddings": torch.stack(rows)} if rows else {}


def _same(candidate: Tensor, truth: Tensor) -> float:
    return (candidate == truth).flatten(1).all(1).double().mean().item()


def _same_label(candidate: Tensor, truth: Tensor) -> float:
    return _same(candidate.argmax(1, keepdim=True), truth.argmax(1, keepdim=True))


def _same_order(candidate: Tensor, truth: Tensor) -> float:
    """The share of pairs whose scores are in the same order."""
    first, second = torch.triu_indices(len(truth), len(truth), 1)
    orders = [(x.flatten()[first] - x.flatten()[second]).sign()[:, None] for x in (candidate, truth)]
    return _same(*orders) if len(first) else 1.0


def _cosines(candidate: Tensor, truth: Tensor) -> Tensor:
    return (candidate * truth).sum(1)


def _same_nearest(candidate: Tensor, truth: Tensor) -> float:
    """The share of texts whose nearest other text is the same one."""
    if len(truth) < 2:
        return 1.0
    alike = [(x @ x.t()).fill_diagonal_(-2).argmax(1, keepdim=True) for x in (candidate, truth)]
    return _same(*alike)


def _same_ten(candidate: Tensor, truth: Tensor) -> float:
    """The share of the ten nearest other texts that are among the ten nearest, too."""
    count = min(10, len(truth) - 1)
    if count < 1:
        return 1.0
    alike = [(x @ x.t()).fill_diagonal_(-2).topk(count).indices for x in (candidate, truth)]
    return (alike[0][:, :, None] == alike[1][:, None, :]).any(2).double().mean().item()


_MEASURES: dict[str, dict[str, Callable[[Tensor, Tensor], float]]] = {
    "labels": {"same label": _same_label},
    "scores": {"pairs in the same order": _same_order},
    "spans": {"same span": _same},
    "embeddings": {
        "cosine of embeddings (mean of tokens), on average": lambda c, t: _cosines(c, t).mean().item(),
        "the same, at worst": lambda c, t: _cosines(c, t).min().item(),
        "same nearest text": _same_nearest,
        "ten nearest texts in common": _same_ten,
    },
}
