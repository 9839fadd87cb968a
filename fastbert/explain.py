"""`explain`: what would run fused in a model at this moment, what not and why, and how many forwards did each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .fuse import base_models
from .layers.embeddings import embeddings_are_foreign
from .runtime.plan import ASKED, KEEPS, UNKNOWN, decide, what_keeps, why_dense
from .runtime.readers import Maps, Reads, outermost, unknown_reader
from .runtime.registry import embeddings_of, encoder_of, family_of, stack_of
from .runtime.settings import Settings
from .runtime.support import (
    embeddings_are_unsupported,
    is_asked,
    model_is_unsupported,
)


@dataclass(frozen=True)
class EncoderExplanation:
    """What `explain` says of one base model."""

    name: str
    """Its name inside the model explained."""
    fused: bool
    """Whether `fuse` has been applied to it."""
    padding: str | None
    """The padding asked of `fuse`; None where it is not fused."""
    reason: str | None
    """Why an ordinary call at this moment would run stock; None where it would run fused."""
    layers: dict[int, str]
    """Layers that would run stock at this moment, each with the reason. One that is shared counts once."""
    embeddings: str | None
    """Why its embeddings would run stock at this moment, or None."""
    fused_calls: dict[str, int]
    """Forwards of the base model so far that ran fused, by layout.

    Not counted are those in a compiled graph (by `torch.compile` of the model, not of its encoder or layers alone),
    and those that a backward runs, as checkpointing of the whole model runs them again.
    """
    stock_calls: dict[str, int]
    """Forwards so far that ran stock, by reason."""
    cuda_graphs: bool = False
    """Whether CUDA graphs were asked of `fuse`."""
    eager: str | None = None
    """Why an ordinary call at this moment would not run as a CUDA graph, where they were asked for; else None."""
    graph_calls: dict[str, int] = field(default_factory=dict)
    """What came of CUDA graphs so far: "replayed", "captured", too, "eager: " and why, "dropped: " and why."""
    precision: str | None = None
    """The precision asked of `fuse`; "prepacked" where that was."""
    quantized: str | None = None
    """Where there is one: what an ordinary call at this moment would make of it, in a line."""
    not_quantized: dict[str, str] = field(default_factory=dict)
    """There, GEMMs of layers that run on the model's own weights, by name ("layer 0 down"), each with the reason."""
    dense: str | None = None
    """Why calls with padding run in the dense layout; None where they are packed, if what they ask for allows it."""
    loss_only: str | None = None
    """Why `loss_only`, where it was asked of `fuse`, changes nothing; else None."""
    outside: str | None = None
    """What in the model explained, outside of what `fuse` was given, may read padding; None where nothing does."""


@dataclass(frozen=True)
class Explanation:
    """What would run fused in a model, what not and why, and how many forwards did each. str() renders it."""

    encoders: list[EncoderExplanation] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.encoders:
            return "no encoder of a supported family found"
        lines = []
        for e in self.encoders:
            state = f"stock: {e.reason}" if e.reason else "fused"
            lines.append(f"{e.name}: {state}" + (f" (padding={e.padding!r})" if e.fused else ""))
            if e.embeddings and not e.reason:
                lines.append(f"  embeddings: stock: {e.embeddings}")
            lines += [f"  layer {i}: stock: {reason}" for i, reason in e.layers.items() if not e.reason]
            if e.dense and e.dense != ASKED and not e.reason:
                lines.append(f"  dense, not packed: {e.dense}")
            if e.loss_only and not e.reason:
                lines.append(f"  loss_only: {e.loss_only}")
            if e.outside and not e.reason:
                lines.append(f"  outside of what fuse was given: {e.outside}")
            if e.quantized is not None and not e.reason:
                lines.append(f"  {e.precision}: {e.quantized}")
                lines += [f"    {name}: {reason}" for name, reason in e.not_quantized.items()]
            lines += [f"  ran fused, {layout}: {n}" for layout, n in e.fused_calls.items()]
            lines += [f"  ran stock, {reason}: {n}" for reason, n in e.stock_calls.items()]
            if e.cuda_graphs:
                lines.append(f"  CUDA graphs: none: {e.eager}" if e.eager else "  CUDA graphs: yes, at the right sizes")
                lines += [f"  CUDA graphs, {what}: {n}" for what, n in e.graph_calls.items()]
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Says what in `model` would run fused at this moment, what would not and why, and counts what did.

    "At this moment" includes torch's state: call it under the same `torch.inference_mode()` as the forward.
    """
    return Explanation([_explain_base(model, *found) for found in base_models(model)])


def _explain_base(model: nn.Module, name: str, base: PreTrainedModel, family: Any) -> EncoderExplanation:
    encoder = encoder_of(base)
    settings: Settings | None = getattr(encoder, "fastbert", None)
    if settings is None or not hasattr(base, "own_embeddings"):  # another class since
        why = model_is_unsupported(base) or "not fused; call fastbert.fuse"
        return EncoderExplanation(name, False, None, why, {}, None, {}, {})
    foreign = embeddings_are_foreign(base)
    reason, seen, _, watched = decide(base, settings, {}, foreign is not None)  # as every call does
    if type(base).forward is not family.fused[family.base].forward:
        reason = model_is_unsupported(base)
    layers = {i: why for i, why in enumerate(seen.reasons) if why}
    counts, graphs = settings.counts, settings.graphs
    if graphs is None or reason is not None:
        eager = reason
    else:
        eager = "a layer runs stock" if layers else graphs.refuses(encoder)
    quantized, not_quantized = _explain_precision(base, settings)
    maps = Maps(frozenset()) if is_asked(base, {}, "output_attentions") else None
    dense, _ = why_dense(base, settings, Reads(told=True, maps=maps), bool(layers) or watched)
    if dense == KEEPS:
        dense = what_keeps(base, seen)
    if dense == UNKNOWN:
        around = outermost(base, settings.holders)
        dense = f"{unknown_reader(around)}; if it does not, fuse the model with padding='packed'"
    return EncoderExplanation(
        name,
        True,
        settings.padding,
        reason,
        layers,
        foreign or embeddings_are_unsupported(embeddings_of(base), sharded=True),
        dict(counts.fused),
        dict(counts.stock),
        graphs is not None,
        None if graphs is None else eager,
        dict(counts.graphs),
        None if settings.precision is None else settings.precision.name,
        quantized,
        not_quantized,
        dense,
        _explain_loss(base, settings),
        _explain_outside(model, base, settings),
    )


def _explain_loss(base: nn.Module, settings: Settings) -> str | None:
    """`EncoderExplanation.loss_only` of a fused base model."""
    kinds = tuple(family_of(base).loss_heads.values())
    around = (module for each in outermost(base, settings.holders) for module in each.modules())
    if not settings.loss_only or any(isinstance(module, kinds) for module in around):
        return None
    return "no effect: around this model is no head of those that can return their loss alone"


def _explain_outside(model: nn.Module, base: nn.Module, settings: Settings) -> str | None:
    """`EncoderExplanation.outside` of a fused base model."""
    around = outermost(base, settings.holders)
    if settings.padding != "auto" or unknown_reader(around) is not None or any(model is each for each in around):
        return None
    inside = set(map(id, model.modules()))
    if not any(id(each) in inside for each in around) or (why := unknown_reader([model])) is None:
        return None
    return f"{why}; fuse the whole {type(model).__name__}, to have it looked at"


def _explain_precision(base: nn.Module, settings: Settings) -> tuple[str | None, dict[str, str]]:
    """`EncoderExplanation.quantized` and `.not_quantized` of a fused base model."""
    stack, family, precision = stack_of(base), family_of(base), settings.precision
    if precision is None:
        return None, {}
    layers, sample = stack.layers, next(stack.held.parameters())
    if not precision.runs(layers, sample):
        off = "gradients are enabled, or it is training, autocast or torch.compile"
        return f"off: {precision.unsupported(sample.device) or off}", {}
    reasons = precision.reasons(layers, family.fused)
    gemms, held = len(precision.groups(layers)), precision.memory()
    line = f"{gemms} of {gemms + len(reasons)} GEMMs, {precision.told(sample.device)}"
    line += f"; {held / 1e6:,.1f} MB beside the model" if held else ""
    return line, {f"layer {i} {name}": why for (i, name), why in reasons.items()}
