"""How a call of a base model is run: whether fused, in which layout, with which seeds.

A base model plans as its forward is entered, before transformers turns the mask into a 4-D one; the plan travels to the
encoder as a keyword argument of the call itself, never as state, so threads can share a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exporting import tell_of_stock
from ..layers.embeddings import default_positions, embeddings_are_foreign
from . import known
from .arguments import check_arguments, shape_of
from .coverage import UNSEEN, Seen
from .packing import Packing, flattened, has_values, host_integers, isolating_mask, pack_mask
from .readers import Args, Call, Kwargs, Maps, Readings, Reads, outermost, readings_of, told_aside
from .registry import (
    Stack,
    before_layers,
    embeddings_of,
    encoder_of,
    family_of,
    has_fused_encoder,
    layers_of,
    stack_of,
    table_of,
    wrapped_encoder_of,
)
from .settings import Settings
from .support import (
    DISABLED,
    MAX_SEQUENCES,
    call_is_unsupported,
    first_parameter,
    foreign_code,
    is_asked,
    is_disabled,
    is_flash,
    is_hooked,
    is_unmixable,
    judged_implementation,
    named,
    needs_stock,
    no_maps_now,
    oddity,
)


class Receipt:
    """What an encoder has made of a plan: an object, which copies of the plan (FSDP's, of arguments) share."""

    def __init__(self) -> None:
        self.fused: str | None = None
        """How it ran fused, as `Counts.fused` has it."""
        self.stock: str | None = None
        """Why it ran stock all the same."""


class Plan(NamedTuple):
    """How one call runs fused."""

    packing: Packing
    stock_layers: tuple[bool, ...]
    """For each of `Stack.layers`, whether it runs its stock code."""
    receipt: Receipt
    """Written by the encoder: see `count` and `check_taken`."""
    seeds: Tensor | None = None
    """(calls, 3) int64, of the dropouts of each call of a layer, by torch's generator; None where none drops."""
    watched: bool = False
    """Whether something sees the hidden states between embeddings and output."""
    bound: tuple[object, ...] | None = None
    """`Seen.bound`."""
    assumed: bool = False
    """Whether the layers were not looked at, but taken to be as they were: see `fastbert.runtime.graphs`."""
    settings: Any = None
    """The `Settings` it was planned by, whatever `fuse` and `unfuse` leave on the encoder meanwhile."""
    config: object = None
    """The model's, of which masks are made: DistilBERT's encoder has none."""
    mask: Tensor | None = None
    """The caller's attention_mask, for what runs stock, and what is to see stock's arguments."""
    hooked: bool = False
    """Whether a layer has hooks, which are to see it called as stock code calls it."""
    foreign: bool = False
    """Whether the hidden states come padded, of whatever shape: of embeddings that aren't the family's own."""
    position_ids: Tensor | None = None
    """Those of the call, as its rows are laid out; None: it gives none."""
    collects: bool = False
    """Whether the encoder is to return all hidden states: nothing of transformers records them."""
    maps: Maps | None = None
    """Attention maps that are to be computed."""


def _encoder_is_unsupported(model: nn.Module) -> str | None:
    """Why the encoder of a base model that was fused takes no plan at this moment."""
    if is_disabled():
        return DISABLED
    if not has_fused_encoder(model):
        return f"its encoder is a custom {named(encoder_of(model))}"
    stack, family = stack_of(model), family_of(model)
    if type(stack.held).__iter__ is not nn.ModuleList.__iter__:  # which may leave some out, by chance
        return f"its layers are in a custom {named(stack.held)}"
    if stack.lost is not None:
        return f"its layers are not where {family.encoder.__name__} has them: {stack.lost}"
    for name, group in stack.groups().items():
        own = type(group).__iter__ is nn.ModuleList.__iter__ if isinstance(group, nn.ModuleList) else False
        if not (own or type(group) is family.group) or is_hooked(group):
            return f"{name} is a {named(group)}{oddity(group)}"
    if family.loops and encoder_of(model).config.num_hidden_layers < len(stack.layers):
        return "it has more layers than its config says, which it may leave out"
    return None


UNKNOWN = "a module may read padding"
"""`why_dense`, where `fastbert.runtime.readers` is to be asked which."""
KEEPS = "a layer runs stock, or something sees hidden states"
"""`why_dense`, where `what_keeps` is to be asked which."""
ASKED = "padding='dense' was asked of fuse"
"""`why_dense`, where that is all."""


class Decision(NamedTuple):
    """What becomes of a call: `plan_call` does it, `explain` says it."""

    stock: str | None
    """Why it runs stock; None: it runs fused."""
    seen: Seen
    """What was found of the layers."""
    assumed: bool
    """As `Plan.assumed`."""
    watched: bool
    """As `Plan.watched`."""


def decide(
    model: nn.Module, settings: Settings, call: Mapping[str, object], foreign: bool, assumes: bool = False
) -> Decision:
    """Whether a call of a fused base model runs stock, as far as its arguments say, but not their values.

    Args:
        model: the base model.
        settings: what `fuse` left on its encoder.
        call: the arguments by name; none: an ordinary call.
        foreign: whether the embeddings are not the family's own.
        assumes: as `plan_call` has it.
    """
    graphs = settings.graphs
    layers = len(layers_of(model))
    seen = Seen((None,) * layers, (False,) * layers, (None,) * layers, False, False, False, UNSEEN)
    reason = _encoder_is_unsupported(model) or foreign_code(model)
    if foreign and family_of(model).loops:
        reason = reason or f"{embeddings_are_foreign(model)}, and it calls its layers itself"
    reason = reason or (_foreign_call_is_unsupported(model, call) if foreign and call else None)
    reason = reason or call_is_unsupported(model, call)
    assumed = assumes and reason is None and graphs is not None and graphs.expects() and not foreign
    assumed = assumed and _is_repeatable(model, call)
    if reason is None and not assumed:
        seen = settings.coverage.look(model)
        if all(seen.stock):
            reason = f"no layer can run fused: {seen.reasons[0]}" if layers else "it has no layers"
    asks = is_asked(model, call, "output_attentions")
    if reason is None and asks and seen.drops:
        reason = "output_attentions in training, of what dropout leaves"
    if reason is None:
        reason = is_unmixable(model, call, next(filter(None, seen.reasons), None), seen.hooked)
    # What foreign embeddings are given, and what comes of them, has stock's shape anyway.
    watched = seen.hooked or (seen.watched and not foreign)
    # At padding, they may give what the second layer's rows take up.
    if foreign and reason is None:
        watched = watched or family_of(model).after_first(encoder_of(model)) is not None
    watched = watched or (not assumed and is_asked(model, call, "output_hidden_states"))
    return Decision(reason, seen, assumed, watched)


def why_dense(model: nn.Module, settings: Settings, reads: Reads, keeps: bool) -> tuple[str | None, Readings]:
    """Why a call with padding runs dense, by what is asked and who reads; and those who read, if they were looked at.

    Args:
        model: the base model.
        settings: what `fuse` left on its encoder.
        reads: what the call reads of its own.
        keeps: whether a layer that runs stock, or something that sees hidden states, needs the padded shape.
    """
    nobody = Readings()
    if settings.padding == "dense":
        return ASKED, nobody
    if keeps:
        return KEEPS, nobody
    if reads.maps is not None:
        whole = reads.maps.take is None and settings.padding == "auto"
        return "attention maps are asked for, with their rows of padding" if whole else None, nobody
    if reads.reads_padding:
        return "the call reads padding", nobody
    if torch.compiler.is_compiling():
        return "it is being compiled", nobody
    around = readings_of(outermost(model, settings.holders))
    if settings.padding == "auto":
        if around.unknown is not None:
            return UNKNOWN, around
        if around.tells is not None and not reads.told:
            return "it came past the hooks that tell what is read", around
    return None, around


def what_keeps(model: nn.Module, seen: Seen) -> str:
    """What needs the padded shape in an ordinary call, for a reader to read."""
    if any(seen.stock):
        return f"layer {seen.stock.index(True)} runs stock, which takes padded rows"
    inner = {id(each) for first in before_layers(model) for each in first.modules()} | set(map(id, layers_of(model)))
    for name, module in model.named_modules():
        if id(module) in inner and is_hooked(module, called=True):
            return f"{name} has a hook, which sees hidden states"
    return "hidden states are asked for"


class _Kept(NamedTuple):
    """What was decided of a call that runs fused, and of what it came besides the layers that were looked at."""

    decision: Decision
    config: object
    implementation: str | None
    parameter: Tensor


_CALLS = 32
"""Kinds of calls at most that are kept of one model."""


def _arguments_alike(call: Mapping[str, object]) -> tuple[object, ...] | None:
    """What `decide` reads of a call's arguments; None: they are not so plain that it is known what it reads."""
    if torch.compiler.is_compiling():
        return None
    found: list[object] = []
    for name, value in call.items():
        kind = type(value)
        if kind is Tensor:
            assert isinstance(value, Tensor)
            rows = value.shape[0] if value.dim() else 0
            found += (name, value.dtype, value.dim(), min(rows, 2) if rows <= MAX_SEQUENCES else rows)
        elif kind is bool or kind is int:
            found += (name, kind, kind is bool and value)
        elif value is not None:
            return None
    return tuple(found)


def _is_bare(model: nn.Module) -> bool:
    """Whether a base model and its encoder are called as their classes are, and nothing watches the encoder."""
    encoder, attributes = encoder_of(model), model.__dict__
    own = encoder.__dict__
    if "forward" in attributes or "forward" in own or wrapped_encoder_of(model) is not encoder:
        return False
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    kind, encoder_kind = cast(Any, type(model)), cast(Any, type(encoder))
    stock, forward, *_ = kind.own_embeddings
    return (
        stock.forward is forward
        and attributes.keys().isdisjoint(kind.called)
        and own.keys().isdisjoint(encoder_kind.called)
        and type(stack_of(model).held) is nn.ModuleList
    )


def _decided_before(model: nn.Module, settings: Settings, alike: tuple[object, ...]) -> Decision | None:
    """What was decided of a call with such arguments, where nothing that counts has changed; else None.

    Layers, embeddings and configs are looked at by `Coverage`, the code of classes by `known`; the rest is asked here.
    """
    found = settings.coverage.calls.get(alike)
    if found is None or not _is_bare(model):
        return None
    seen, kept = found
    family = family_of(model)
    if not isinstance(kept, _Kept) or model.__dict__.get("config") is not kept.config:
        return None
    if not settings.coverage.still(model, seen) or known.foreign(family.name, kept.implementation) is not None:
        return None
    if needs_stock(kept.parameter) is not None or (family.refuses is not None and family.refuses(model) is not None):
        return None
    return kept.decision


def _keep_decision(
    model: nn.Module, settings: Settings, alike: tuple[object, ...], decision: Decision, call: Mapping[str, object]
) -> None:
    """Keeps what was decided of a call that runs fused, of a model of which all that counts is looked at."""
    coverage, config = settings.coverage, model.__dict__.get("config")
    if decision.stock is not None or settings.graphs is not None or is_asked(model, call, "output_attentions"):
        return
    judged, parameter = judged_implementation(model), first_parameter(encoder_of(model))
    if coverage.watches(config) and _is_bare(model) and isinstance(parameter, Tensor) and len(coverage.calls) < _CALLS:
        coverage.calls[alike] = decision.seen, _Kept(decision, config, judged, parameter)


def plan_call(model: PreTrainedModel, names: tuple[str, ...], args: Args, kwargs: Kwargs, assumes: bool = True) -> Call:
    """Checks the arguments of a call of a base model, chooses the layout, and adds what tells the encoder.

    Args:
        model: the base model.
        names: those of the parameters of its stock forward.
        args: the positional arguments.
        kwargs: those by name; among them, from the hook of a head, what it reads.
        assumes: whether layers that CUDA graphs were captured from may be taken to be as they were (`Plan.assumed`).

    Returns:
        The arguments to call the stock forward with.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; the message names it.
    """
    encoder = encoder_of(model)
    settings: Settings | None = getattr(encoder, "fastbert", None)  # once: another thread may unfuse the model
    call = dict(zip(names, args, strict=False))
    if settings is None or len(args) > len(names) or call.keys() & kwargs.keys():
        # Unfused, or given too many or twice: the forward itself says so.
        return args, {name: value for name, value in kwargs.items() if name not in Reads._fields}
    if not known.takes_plan(family_of(model).name):  # called as stock: what has replaced it may take nothing else
        settings.counts.add(settings.counts.stock, str(_encoder_is_unsupported(model) or foreign_code(model)))
        return args, {name: value for name, value in kwargs.items() if name not in Reads._fields}
    if not has_fused_encoder(model):  # in place of the one that was fused
        settings.counts.add(settings.counts.stock, str(_encoder_is_unsupported(model)))
        return args, {name: value for name, value in kwargs.items() if name not in Reads._fields}
    call.update(kwargs)
    reads = Reads(*(call.pop(name, default) for name, default in Reads._field_defaults.items()))
    if not torch.compiler.is_compiling():
        aside = told_aside(call)
        reads = reads if reads.told else aside or reads
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return (), call  # both or neither: the forward itself says so
    if is_disabled():
        call["plan"] = DISABLED
        _isolate(model, call, DISABLED)
        return (), call
    alike = None if reads.maps is not None else _arguments_alike(call)
    decided = before = None if alike is None else _decided_before(model, settings, alike)
    foreign = decided is None and embeddings_are_foreign(model) is not None
    check_arguments(model, call, foreign)
    if decided is None:
        decided = decide(model, settings, call, foreign, assumes and reads.maps is None)
        if alike is not None and not foreign:
            _keep_decision(model, settings, alike, decided, call)
    reason, seen, assumed, watched = decided
    mixed = any(seen.stock)
    if reads.maps is not None:
        reason = reason or no_maps_now(model, call)
        calls = stack_of(model).calls
        stock = [seen.reasons[calls[i]] for i in sorted(reads.maps.layers)]
        reason = reason or next(filter(None, stock), None)
        if reason is not None:
            raise RuntimeError(
                f"attention maps can't be computed of this call, which runs stock: {reason}; a model loaded with "
                "attn_implementation='eager' gives them by output_attentions=True"
            )
    elif reason is None and before is None and is_asked(model, call, "output_attentions"):
        calls = stack_of(model).calls
        reads = reads._replace(maps=Maps(frozenset(i for i, layer in enumerate(calls) if not seen.stock[layer])))
    cu_seqlens = call.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        longest = call.get("max_length_q")
        longest = longest if isinstance(longest, int) else None
        packing = flattened(cu_seqlens, shape_of(call)[1], call.get("cu_seq_lens_k"), longest)
        if reason is None and mixed:
            reason = "a flattened call of a model with a layer that runs stock"
    # Of which attention maps are zeros, however it is spread.
    spread = reads.maps is None or reads.maps.take is None
    if reason is None and spread and _has_empty_sequence(model, call.get("attention_mask")):
        reason = "a sequence without a real token, which eager attention spreads over its padding"
    if reason is not None:
        call["plan"] = reason
        _isolate(model, call, reason)
        return (), call
    if seen.embeddings is None and not foreign:
        known.vouch_for(embeddings_of(model))
    if mixed:
        tell_of_stock("some layers", next(filter(None, seen.reasons)))
    mask = call.get("attention_mask")
    if cu_seqlens is None:
        packing = _lay_out(model, call, settings, reads, foreign, mixed or watched)
        if spread and packing.key_mask is not None and _is_out_of_reach(model, packing.key_mask):
            call["attention_mask"] = mask
            call["plan"] = "padding with no real token in its window, which eager attention spreads over its sequence"
            return (), call
    seeds = _draw_seeds(stack_of(model)) if seen.drops else None
    call["plan"] = Plan(
        packing,
        seen.stock,
        Receipt(),
        seeds,
        watched,
        None if watched else seen.bound,
        assumed,
        settings,
        model.config,
        mask,
        seen.hooked,
        foreign,
        _position_ids(call, packing),
        not family_of(model).records_hidden_states and is_asked(model, call, "output_hidden_states"),
        reads.maps,
    )
    return (), call


def count(model: nn.Module, plan: Plan | str | None) -> None:
    """Counts a call of a base model, by what its encoder made of its plan, or by why it ran stock.

    Not in the encoder, which may be compiled, and which a backward may run again: neither is to change the count.
    """
    if isinstance(plan, Plan):
        settings, fused, stock = plan.settings, plan.receipt.fused, plan.receipt.stock
    else:
        settings, fused, stock = getattr(encoder_of(model), "fastbert", None), None, plan
    if settings is not None and stock is not None:
        settings.counts.add(settings.counts.stock, stock)
    elif settings is not None and fused is not None:
        settings.counts.add(settings.counts.fused, fused)


def check_taken(model: nn.Module, plan: object) -> None:
    """Raises RuntimeError where a base model has returned and its encoder has not taken the plan of the call.

    Then stock code has run over rows that were laid out for another: sequences saw each other, and padding.
    """
    if isinstance(plan, Plan) and plan.receipt.fused is None and plan.receipt.stock is None:
        raise RuntimeError(
            f"{type(model).__name__} did not hand its encoder the plan of this call; its result would be wrong: call "
            "fastbert.unfuse on the model, which restores its stock code, and report the version of transformers"
        )


def _foreign_call_is_unsupported(model: nn.Module, call: Mapping[str, object]) -> str | None:
    """Why a call of a model with embeddings that aren't the family's own runs stock, where its layout can't be told."""
    name = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
    values, mask = call[name], call.get("attention_mask")
    if not isinstance(values, Tensor) or values.dim() < 2 or not values.numel():
        return f"{name} without (batch, tokens), for custom embeddings"
    if isinstance(mask, Tensor) and mask.dim() != 2:
        return "an attention_mask that is not 2-D"
    if family_of(model).embeds_padded and call.get("cu_seq_lens_q") is not None:
        return "a flattened call, of embeddings that read the mask of each sequence"
    return None


def _position_ids(call: Mapping[str, Any], packing: Packing) -> Tensor | None:
    """The position_ids of a call, one for each of its rows."""
    given: Tensor | None = call.get("position_ids")
    if given is None or packing.cu_seqlens is not None:
        return given
    return given.expand(packing.batch, packing.seqlen)


def _draw_seeds(stack: Stack) -> Tensor:
    """Seeds for all dropouts of one forward.

    Drawn once, and handed to the layers as arguments: one computed again for its gradients drops the same.
    """
    device = next(stack.held.parameters()).device
    return torch.randint(2**63 - 1, (len(stack.calls), 3), dtype=torch.int64, device=device)


def _has_empty_sequence(model: PreTrainedModel, mask: Tensor | None) -> bool:
    """Whether a row of the mask is all zero where that matters, at the price of a synchronisation.

    Eager attention spreads such a sequence evenly over all its keys, padding too; sdpa, and the kernels, give zeros.
    """
    if mask is None or not _spreads(model, mask):
        return False
    return not host_integers([mask.to(torch.bool).any(1).all()])[0]


def _is_out_of_reach(model: PreTrainedModel, mask: Tensor) -> bool:
    """The same of a token with no real one in its window: it is padding, which the packed layout has none of."""
    window = family_of(model).window
    if window is None or not _spreads(model, mask):
        return False
    width = window(model)
    seen = nn.functional.max_pool1d(mask.float(), 2 * width + 1, 1, width)
    return not host_integers([seen.all()])[0]


def _spreads(model: PreTrainedModel, mask: Tensor) -> bool:
    """Whether attention spreads a row without a real key over all its keys, and the mask can be asked for such rows."""
    family = family_of(model)
    spreads = family.spreads_empty or model.config._attn_implementation in ("eager", None)
    if not spreads or family.layout.attention.spreads_padding or not has_values(mask):
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _isolate(model: PreTrainedModel, call: Kwargs, reason: str) -> None:
    """Keeps the sequences of a flattened call apart that runs stock: stock code would let them attend to each other."""
    cu_seqlens, implementation = call.get("cu_seq_lens_q"), model.config._attn_implementation
    if cu_seqlens is None or call.get("attention_mask") is not None or is_flash(model):
        return
    family = family_of(model)
    if implementation in ("sdpa", "eager", None) and family.takes_square_mask and not family.embeds_padded:
        call["attention_mask"] = _stock_isolation(model, cu_seqlens, shape_of(call)[1])
    elif reason != DISABLED:
        raise ValueError(
            f"cu_seq_lens_q is given, the call runs stock ({reason}), and stock {type(model).__name__} under attention "
            f"implementation {implementation!r} would not keep its sequences apart; expected a padded call"
        )


def _stock_isolation(model: nn.Module, cu_seqlens: Tensor, tokens: int) -> Tensor:
    mask = isolating_mask(cu_seqlens, tokens)
    if model.config._attn_implementation == "sdpa":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _is_seen_to_be_full(mask: Tensor) -> bool:
    """Whether every token is real, where one operator tells, without a synchronisation."""
    return mask.device.type == "cpu" and bool(mask.all())


def _is_repeatable(model: nn.Module, call: Mapping[str, object]) -> bool:
    """Whether what runs before the layers can run twice and nobody sees it: without hooks, without dropout."""
    if is_asked(model, call, "output_hidden_states") or is_asked(model, call, "output_attentions"):
        return False
    first = (module for each in before_layers(model) for module in each.modules())
    return not any(module.training or is_hooked(module) for module in first)


def _lay_out(
    model: PreTrainedModel, call: Kwargs, settings: Settings, reads: Reads, foreign: bool, keeps: bool
) -> Packing:
    """Chooses between packed and dense for a padded call, and rewrites its arguments to match.

    Those of foreign embeddings stay as they are, and it is the mask that says how long the sequences are. `keeps` as
    `why_dense` has it.
    """
    labels, mask = reads.padded_labels, call.get("attention_mask")
    batch, seqlen = mask.shape if foreign and mask is not None else shape_of(call)
    if not family_of(model).embeds_padded:
        call["attention_mask"] = None
    if mask is None:
        return Packing(batch, seqlen, seqlen)
    readable = type(mask) is Tensor and has_values(mask)
    if readable and _is_seen_to_be_full(mask):
        return Packing(batch, seqlen, seqlen)
    # A copy where there may be a backward, which may run layers again: the caller may write to the mask until then.
    mask = mask.to(torch.bool, copy=torch.is_grad_enabled())
    family = family_of(model)
    # Positions that the family doesn't count among its ids aren't packed.
    keeps = keeps or (call.get("position_ids") is not None and "position_ids" not in family.ids)
    why, around = why_dense(model, settings, reads, keeps)
    dense = why is not None or (labels is not None and labels.shape != mask.shape)  # an error the loss will name
    dense = dense or not readable
    if dense or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    selection = pack_mask(mask, labels)
    if selection.tokens == batch * seqlen:
        return Packing(batch, seqlen, seqlen)
    # A pooler reads position 0 of every sequence, real or not.
    exact = selection.starts_real or not (around.first or getattr(model, "pooler", None) is not None)
    if family.layout.attention.by_distance and selection.has_holes:  # distances are those of the padded layout
        exact = False
    if selection.tokens == 0 or not exact or (selection.labels_padding and settings.padding == "auto"):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    indices, inverse = selection.packing.indices, selection.packing.inverse
    assert indices is not None and inverse is not None
    if foreign:
        return selection.packing
    embeddings = embeddings_of(model)
    if call.get("position_ids") is None and table_of(embeddings, family.ids.get("position_ids")) is not None:
        call["position_ids"] = default_positions(embeddings, call.get("input_ids"), seqlen)
    for name in family.ids:
        if call.get(name) is not None:
            call[name] = call[name].expand(batch, seqlen).flatten()[indices][None]
    if call.get("inputs_embeds") is not None:
        call["inputs_embeds"] = selection.packing.pack(call["inputs_embeds"])
    return selection.packing
