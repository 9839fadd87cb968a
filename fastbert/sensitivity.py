"""Whether what a model returns depends on what stands at padding: found by putting values there.

The rows at padding of what a base model returns are replaced, once by zeros, as the packed layout has them, and once by
noise. An answer that differs has read them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .explain import explain
from .fuse import base_models, fuse, unfuse
from .runtime.readers import named_arguments

NOISE = 10.0
"""Of what is put at padding, in standard deviations of the rows that are real."""
CALLS = 4
"""Of those with padding, how many are made: a reader of padding reads it in any."""
TOLERANCE = 1e-6
"""A relative change below is a rounding."""


class Sensitivity(NamedTuple):
    """What was found."""

    reads: dict[str, float]
    """What is returned and depends on padding: each with its largest change, relative to its own size."""
    packed: bool
    """Whether `fuse` packs such a call all the same, under padding="auto": then its answer would be wrong."""
    unseen: str | None
    """Why nothing was found out."""

    def __str__(self) -> str:
        if self.unseen is not None:
            return f"padding: not looked at: {self.unseen}"
        if not self.reads:
            return "padding: ignored: nothing that is returned at real tokens depends on it"
        found = ", ".join(f"{name} (changes by {change:.1e})" for name, change in self.reads.items())
        layout = "and is packed all the same: fuse with padding='dense'" if self.packed else "and so runs dense"
        return f"padding: READ, {layout}: {found}"


def sensitivity(model: nn.Module, inputs: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> Sensitivity:
    """Whether what `model` returns depends on what its base models return at padding.

    Args:
        model: a stock model in evaluation mode, of a known family or holding one; left as it is.
        inputs: texts, or nothing. A sentence-transformers model is given them as its own queries and documents, too.
        batches: calls by argument name, of input_ids or inputs_embeds and an attention_mask, on the model's device.
    """
    reads: dict[str, float] = {}
    packed, padded, failed = False, 0, None
    for call in _calls(model, inputs, batches):
        mask = call.features.get("attention_mask")
        if mask is None or padded == CALLS or bool((mask != 0).all()):
            continue
        padded += 1
        try:
            zeros, noise = (_run(model, call, fill) for fill in (0.0, NOISE))
        except Exception as error:  # whatever a model of somebody's own raises: it takes another call than this
            failed = f"{type(model).__name__} can't be called like this: {type(error).__name__}: {error}"
            continue
        found = {name: change for name in zeros if (change := _change(zeros[name], noise[name])) > TOLERANCE}
        for name, change in found.items():
            reads[name] = max(change, reads.get(name, 0.0))
        packed = packed or (bool(found) and _is_packed(model, call))
    return Sensitivity(reads, packed, failed if failed or padded else "no input has padding")


class _Call(NamedTuple):
    features: dict[str, Any]
    task: str | None = None
    """Of a sentence-transformers model."""
    whole: bool = False
    """Whether the features are one argument, as of sentence-transformers' models."""

    def __call__(self, model: nn.Module) -> Any:
        if not self.whole:
            return model(**self.features)
        return model(dict(self.features)) if self.task is None else model(dict(self.features), task=self.task)


def _calls(model: nn.Module, texts: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> Iterator[_Call]:
    preprocess = getattr(model, "preprocess", None) if isinstance(model, nn.Sequential) else None
    if preprocess is None:
        yield from (_Call(dict(batch)) for batch in batches)
        return
    if not texts:
        yield from (_Call(dict(batch), whole=True) for batch in batches)
        return
    device = next(model.parameters()).device
    for task in ("query", "document") if hasattr(model, "encode_query") else (None,):
        features = preprocess(list(texts)) if task is None else preprocess(list(texts), task=task)
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}
        yield _Call(moved, task, whole=True)


def _run(model: nn.Module, call: _Call, fill: float) -> dict[str, Tensor]:
    """What is returned at real tokens, by name, with noise of that size in the rows at padding."""
    with _filled(model, fill), torch.inference_mode():
        found = dict(_tensors(call(model), ""))
    mask = found.get("attention_mask", call.features["attention_mask"])  # of what is scored, as the model says
    real = mask != 0
    return {name: x[real] if x.shape[: real.dim()] == real.shape else x for name, x in found.items()}


def _tensors(found: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor):
        yield name or "output", found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, (list, tuple)):
        for i, value in enumerate(found):
            yield from _tensors(value, f"{name}.{i}" if name else str(i))


@contextlib.contextmanager
def _filled(model: nn.Module, fill: float) -> Iterator[None]:
    """Puts noise at padding. By a forward, not a hook: sentence-transformers calls `forward` itself."""

    def replaced(base: object, forward: Any, *args: object, **kwargs: object) -> Any:
        output = forward(*args, **kwargs)
        mask = named_arguments(type(base), args, kwargs).get("attention_mask")
        hidden: Tensor = output[0]
        if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
            return output
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden) * (fill * hidden.float().std().item())
        hidden = torch.where(mask[..., None] != 0, hidden, noise)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    with contextlib.ExitStack() as stack:
        for _, base, _ in base_models(model):
            before = {name: vars(base)[name] for name in ("forward",) if name in vars(base)}
            stack.callback(vars(base).update, before)
            stack.callback(vars(base).pop, "forward")
            vars(base)["forward"] = functools.partial(replaced, base, base.forward)
        yield


def _change(zeros: Tensor, noise: Tensor) -> float:
    if zeros.shape != noise.shape:
        return float("inf")
    if not zeros.is_floating_point():
        return float(not torch.equal(zeros, noise))
    difference = (zeros.double() - noise.double()).nan_to_num(nan=0.0 if zeros.isnan().equal(noise.isnan()) else 1e300)
    return float(difference.norm() / zeros.double().nan_to_num().norm().clamp_min(1e-30))


def _is_packed(model: nn.Module, call: _Call) -> bool:
    """Whether the fused model packs such a call."""
    try:
        fuse(model)
        with torch.inference_mode():
            call(model)
        return any("packed" in layout for each in explain(model).encoders for layout in each.fused_calls)
    finally:
        unfuse(model)
