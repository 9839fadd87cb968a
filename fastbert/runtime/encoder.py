"""The fused encoder: plans a call once, then runs every layer over that plan, or the stock code.

A base model plans as its forward is entered, before transformers turns the mask into a 4-D one; the plan travels to the
encoder as a keyword argument of the call itself, never as state, so threads can share a model.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput

from ..layers.context import Context
from ..layers.embeddings import default_positions, embeddings_are_foreign, first_position
from ..layers.fp8 import Fp8
from ..layers.layer import stock_forward
from . import known
from .coverage import Coverage, Seen
from .graphs import Graphs
from .packing import Packing, flattened, has_values, host_integers, isolating_mask, pack_mask
from .readers import Holder, Readings, Reads, outermost, readings_of, told_aside
from .registry import before_layers, embeddings_of, encoder_of, family_of, layers_in, layers_of
from .support import (
    CACHES,
    DISABLED,
    call_is_unsupported,
    foreign_code,
    is_asked,
    is_disabled,
    is_flash,
    is_hooked,
    is_transformed,
    is_unmixable,
    named,
)

PADDINGS = ("auto", "packed", "dense")

_Module: Any = nn.Module if TYPE_CHECKING else object


# Of all counts: held for an addition. A process that is forked meanwhile would wait for it forever.
_COUNTING = threading.Lock()


def _renew_lock() -> None:
    global _COUNTING
    _COUNTING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class Counts:
    """How many forwards ran which way; safe to share between threads, to fork, to copy and to pickle."""

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()
        """Forwards that ran fused, by layout: "packed" or "dense"; with products in 8 bits "packed, fp8" and so on."""
        self.stock: Counter[str] = Counter()
        """Forwards that ran stock, by reason."""
        self.graphs: Counter[str] = Counter()
        """What came of CUDA graphs, of those that ran fused where they are asked for."""

    def add(self, which: Counter[str], key: str) -> None:
        """Counts one forward; a call being compiled is not counted."""
        if not torch.compiler.is_compiling():
            with _COUNTING:
                which[key] += 1


class Running:
    """The threads that are in a forward of a fused base model at this moment. A copy of it begins with none."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()


class Settings:
    """What `fuse` leaves on an encoder: what was asked of it, counts, and what its base model stood in."""

    def __init__(self, padding: str, loss_only: bool, cuda_graphs: bool, fp8: Fp8 | None) -> None:
        self.padding = padding
        self.loss_only = loss_only
        self.graphs = Graphs() if cuda_graphs else None
        self.fp8 = fp8
        self.holders: list[Holder] = []
        """What the base model stood in, outermost first."""
        self.counts = Counts()
        self.running = Running()
        self.coverage = Coverage()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "holders": []}  # those that are copied, too, come back by themselves


class Receipt:
    """Says whether an encoder has taken a plan: an object, which copies of the plan (FSDP's, of arguments) share."""

    def __init__(self) -> None:
        self.taken = False


class Plan(NamedTuple):
    """How one call runs fused."""

    packing: Packing
    stock_layers: tuple[bool, ...]
    """For each layer, whether it runs its stock code."""
    seeds: Tensor | None = None
    """(layers, 3) int64, of the dropouts of each layer, drawn from torch's generator; None where none drops."""
    watched: bool = False
    """Whether something sees the hidden states between embeddings and output."""
    bound: tuple[Any, ...] | None = None
    """`Seen.bound`."""
    assumed: bool = False
    """Whether the layers were not looked at, but taken to be as they were: see `fastbert.runtime.graphs`."""
    settings: Any = None
    """The `Settings` it was planned by, whatever `fuse` and `unfuse` leave on the encoder meanwhile."""
    config: Any = None
    """The model's, of which masks are made: DistilBERT's encoder has none."""
    mask: Tensor | None = None
    """The caller's attention_mask, for what runs stock, and what is to see stock's arguments."""
    hooked: bool = False
    """Whether a layer has hooks, which are to see it called as stock code calls it."""
    foreign: bool = False
    """Whether the hidden states come padded, of whatever shape: of embeddings that aren't the family's own."""
    position_ids: Tensor | None = None
    """Those of the call, as its rows are laid out; None: it gives none."""
    receipt: Receipt | None = None
    """Set by the encoder: see `check_taken`."""


class FusedEncoder(_Module):
    """A stack of fused layers; mixed into a family's own Hugging Face encoder class by `fastbert.models`."""

    fastbert: Settings
    family: ClassVar[Any]
    """Its `fastbert.models.family.Family`."""

    def forward(self, hidden_states: Tensor, *args: Any, plan: Plan | str | None = None, **kwargs: Any) -> ModelOutput:
        """hidden_states (1, T, H) or (B, S, H) as `plan` lays out -> (B, S, H); stock where it is no Plan.

        `plan` as a string is the reason the call runs stock.
        """
        settings: Settings | None = plan.settings if isinstance(plan, Plan) else getattr(self, "fastbert", None)
        if settings is None:  # unfused, in a class that FSDP has derived from this one
            stock: ModelOutput = stock_forward(FusedEncoder, self, hidden_states, *args, **kwargs)
            return stock
        counts, fp8, family, layers = settings.counts, settings.fp8, type(self).family, layers_in(self)
        if fp8 is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._drop()  # the step that comes of gradients may leave no version: that of torch's fused optimizers
        if not isinstance(plan, Plan):
            if plan is None and not known.takes_plan(family.name):
                counts.add(counts.stock, str(known.foreign(family.name, None)))
            elif plan or family.run is None:  # there its model has counted
                counts.add(counts.stock, plan or "called past the forward of its model")
            stock = stock_forward(FusedEncoder, self, hidden_states, *args, **kwargs)
            return stock
        if plan.receipt is not None:
            plan.receipt.taken = True
        if plan.foreign:
            given = hidden_states
            hidden_states, plan, odd = _take(self, given, plan)
            if odd is not None:
                counts.add(counts.stock, odd)
                kwargs["attention_mask"] = _stock_mask(given, plan)
                stock = stock_forward(FusedEncoder, self, given, *args, **kwargs)
                return stock
        packing = plan.packing
        if fp8 is not None and (plan.seeds is not None or not fp8.runs(layers, hidden_states)):
            fp8 = None
        result = None
        if settings.graphs is not None and not torch.compiler.is_compiling():
            result = settings.graphs.run(self, hidden_states, plan, fp8)
        layout = "dense" if packing.cu_seqlens is None else "packed"
        counts.add(counts.fused, layout if fp8 is None else f"{layout}, fp8")
        if result is not None:
            return family.output(last_hidden_state=result)
        if family.tables is None:
            context = Context(packing)
        else:
            context = Context(packing, family.tables(self, hidden_states, packing, plan.position_ids))
        shown: tuple[Any, ...] = ()
        if plan.hooked or any(plan.stock_layers):  # they are called as stock code calls them
            for name in ("attention_mask", "use_cache"):  # the one replaced here, the other the encoder's alone
                kwargs.pop(name, None)
            shown = (_stock_mask(hidden_states, plan),)
            if "encoder_hidden_states" in kwargs:  # by position, too, but for DistilBERT, which has none
                shown += (kwargs.pop("encoder_hidden_states"),)
        else:
            kwargs = {}
        seeds = (None,) * len(plan.stock_layers) if plan.seeds is None else plan.seeds.unbind(0)
        found: Any = plan.bound or (None,) * len(seeds)
        if fp8 is not None:
            found = fp8.bind(layers, plan.stock_layers)
        for layer, stock, own_seeds, bound in zip(layers, plan.stock_layers, seeds, found, strict=True):
            if stock:
                hidden_states = layer(hidden_states, *shown, **kwargs)
            else:
                mask = shown or ((_FUSED_ALONE,) if _runs_again(layer) else ())
                hidden_states = layer(hidden_states, *mask, context=context, seeds=own_seeds, bound=bound, **kwargs)
        if family.final_norm is not None:
            hidden_states = self._modules[family.final_norm](hidden_states)
        return family.output(last_hidden_state=packing.unpack(hidden_states))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's `.to`, `.half` and others call it. Graphs and 8 bits would keep the memory that is being left."""
        self._drop()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As `.eval` calls it, too: between training and inference weights may have been written to unseen.

        By an optimizer that writes to `weight.data`; by PEFT, which may merge an adapter before there is another call:
        the modules of one come in training mode, and are put into the model's.
        """
        settings = getattr(self, "fastbert", None)
        in_8_bits = settings is not None and settings.fp8 is not None
        if in_8_bits and any(module.training != mode for module in self.modules()):
            self._drop()
        return super().train(mode)

    def _drop(self) -> None:
        """Frees graphs, weights in 8 bits and what was found of layers; they are made again where they are needed."""
        settings = getattr(self, "fastbert", None)
        for kept in () if settings is None else (settings.graphs, settings.fp8, settings.coverage):
            if kept is not None:
                kept.drop()


class _FusedAlone:
    """In the mask's place where a layer may run again in the backward: stock code that meets it raises.

    It would take packed rows for one sequence, which an `unfuse` between forward and backward leads to.
    """

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a checkpointed layer ran fused in the forward and runs stock in its backward: "
            "fastbert.unfuse(model) came in between; call it after the backward"
        )


_FUSED_ALONE = _FusedAlone()


def _runs_again(layer: nn.Module) -> bool:
    """Whether the backward calls `layer` anew: transformers' checkpointing, or torch's wrapper."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return bool(layer.__dict__.get("gradient_checkpointing")) or type(layer).__name__ == "CheckpointWrapper"


def _stock_mask(hidden_states: Tensor, plan: Plan) -> Any:
    """The mask that stock code hands to its encoder."""
    return create_bidirectional_mask(config=plan.config, inputs_embeds=hidden_states, attention_mask=plan.mask)


def _take(encoder: Any, rows: Tensor, plan: Plan) -> tuple[Tensor, Plan, str | None]:
    """The hidden states of embeddings that aren't the family's own, laid out; with the reason where they can't be."""
    packing = plan.packing
    shape, dtype = tuple(rows.shape[:2]), next(layers_in(encoder).parameters()).dtype
    if plan.mask is None and packing.cu_seqlens is None:  # as long as they are
        packing = Packing(shape[0], shape[1], shape[1])
    flat = packing.cu_seqlens is not None and packing.indices is None
    expected = (1 if flat else packing.batch, packing.seqlen)
    if shape != expected or rows.dtype != dtype:
        return rows, plan, f"embeddings of one's own that give {shape} of {rows.dtype}, not {expected} of {dtype}"
    return packing.pack(rows), plan._replace(packing=packing), None


def _encoder_is_unsupported(encoder: Any) -> str | None:
    """Why an encoder that was fused takes no plan at this moment."""
    if is_disabled():
        return DISABLED
    if not isinstance(encoder, FusedEncoder):
        return f"its encoder is a {named(encoder)} of one's own"
    layers = layers_in(encoder)
    if type(layers).__iter__ is not nn.ModuleList.__iter__:  # which may leave some out, by chance
        return f"its layers are in a {named(layers)} of one's own"
    return None


UNKNOWN = "a module may read padding"
"""`why_dense`, where `fastbert.runtime.readers` is to be asked which."""


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


def decide(model: Any, settings: Settings, call: Mapping[str, Any], foreign: bool, assumes: bool = False) -> Decision:
    """Whether a call of a fused base model runs stock, as far as its arguments say, but not their values.

    Args:
        model: the base model.
        settings: what `fuse` left on its encoder.
        call: the arguments by name; none: an ordinary call.
        foreign: whether the embeddings are not the family's own.
        assumes: as `plan_call` has it.
    """
    encoder, graphs = encoder_of(model), settings.graphs
    layers = len(layers_of(model))
    seen = Seen((None,) * layers, (False,) * layers, (None,) * layers, False, False, False)
    reason = _encoder_is_unsupported(encoder) or foreign_code(model)
    reason = reason or (_foreign_call_is_unsupported(call) if foreign and call else None)
    reason = reason or call_is_unsupported(model, call)
    assumed = assumes and reason is None and graphs is not None and graphs.expects() and not foreign
    assumed = assumed and _is_repeatable(model, call)
    if reason is None and not assumed:
        seen = settings.coverage.look(model)
        if all(seen.stock):
            reason = f"no layer can run fused: {seen.reasons[0]}" if layers else "it has no layers"
    if reason is None:
        reason = is_unmixable(model, call, seen.hooked or any(seen.stock))
    # What foreign embeddings are given, and what comes of them, has stock's shape anyway.
    watched = seen.hooked or (seen.watched and not foreign)
    watched = watched or (not assumed and is_asked(model, call, "output_hidden_states"))
    return Decision(reason, seen, assumed, watched)


def why_dense(model: Any, settings: Settings, reads: Reads, keeps: bool) -> tuple[str | None, Readings]:
    """Why a call with padding runs dense, by what is asked and who reads; and those who read, if they were looked at.

    Args:
        model: the base model.
        settings: what `fuse` left on its encoder.
        reads: what the call reads of its own.
        keeps: whether a layer that runs stock, or something that sees hidden states, needs the padded shape.
    """
    nobody = Readings()
    if settings.padding == "dense":
        return "padding='dense' was asked of fuse", nobody
    if keeps:
        return "a layer runs stock, or something sees hidden states", nobody
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


def plan_call(
    model: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], assumes: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
        return args, {name: value for name, value in kwargs.items() if name not in Reads._fields}
    if not isinstance(encoder, FusedEncoder):  # in place of the one that was fused
        settings.counts.add(settings.counts.stock, str(_encoder_is_unsupported(encoder)))
        return args, {name: value for name, value in kwargs.items() if name not in Reads._fields}
    call.update(kwargs)
    reads = Reads(*(call.pop(name, default) for name, default in Reads._field_defaults.items()))
    if family_of(model).run is not None and not torch.compiler.is_compiling() and not reads.told:
        reads = told_aside(call)
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return (), call  # both or neither: the forward itself says so
    if is_disabled():
        call["plan"] = DISABLED
        _isolate(model, call, DISABLED)
        return (), call
    foreign = embeddings_are_foreign(model) is not None
    _check(model, call, foreign)
    reason, seen, assumed, watched = decide(model, settings, call, foreign, assumes)
    mixed = any(seen.stock)
    cu_seqlens = call.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        longest = call.get("max_length_q")
        longest = longest if isinstance(longest, int) else None
        packing = flattened(cu_seqlens, _shape(call)[1], call.get("cu_seq_lens_k"), longest)
        if reason is None and mixed:
            reason = "a flattened call of a model with a layer that runs stock"
    if reason is None and _has_empty_sequence(model, call.get("attention_mask")):
        reason = "a sequence without a real token, under eager attention"
    if reason is not None:
        call["plan"] = reason
        _isolate(model, call, reason)
        return (), call
    mask = call.get("attention_mask")
    if cu_seqlens is None:
        packing = _lay_out(model, call, settings, reads, foreign, mixed or watched)
    seeds = _draw_seeds(layers_of(model)) if seen.drops else None
    call["plan"] = Plan(
        packing,
        seen.stock,
        seeds,
        watched,
        None if watched else seen.bound,
        assumed,
        settings,
        model.config,
        mask,
        seen.hooked,
        foreign,
        call.get("position_ids"),
        Receipt(),
    )
    return (), call


def check_taken(model: nn.Module, plan: Any) -> None:
    """Raises RuntimeError where a base model has returned and its encoder has not taken the plan of the call.

    Then stock code has run over rows that were laid out for another: sequences saw each other, and padding.
    """
    if isinstance(plan, Plan) and plan.receipt is not None and not plan.receipt.taken:
        raise RuntimeError(
            f"{type(model).__name__} did not hand its encoder the plan of this call; its result would be wrong: call "
            "fastbert.unfuse on the model, which restores its stock code, and report the version of transformers"
        )


def _foreign_call_is_unsupported(call: Mapping[str, Any]) -> str | None:
    """Why a call of a model with embeddings that aren't the family's own runs stock, where its layout can't be told."""
    name = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
    values, mask = call[name], call.get("attention_mask")
    if not isinstance(values, Tensor) or values.dim() < 2 or not values.numel():
        return f"{name} without (batch, tokens), for embeddings of one's own"
    if isinstance(mask, Tensor) and mask.dim() != 2:
        return "an attention_mask that is not 2-D"
    return None


def _draw_seeds(layers: Any) -> Tensor:
    """Seeds for all dropouts of one forward.

    Drawn once, and handed to the layers as arguments: one computed again for its gradients drops the same.
    """
    device = next(layers.parameters()).device
    return torch.randint(2**63 - 1, (len(layers), 3), dtype=torch.int64, device=device)


def _shape(call: Mapping[str, Any]) -> tuple[int, int]:
    ids = call.get("input_ids")
    shape = ids.shape if ids is not None else call["inputs_embeds"].shape[:2]
    return shape[0], shape[1]  # not by int(), which would fix them in a graph


def _has_empty_sequence(model: Any, mask: Tensor | None) -> bool:
    """Whether a row of the mask is all zero where that matters, at the price of a synchronisation.

    Eager attention spreads such a sequence evenly over all its keys, padding too; sdpa, and the kernels, give zeros.
    """
    if mask is None or model.config._attn_implementation not in ("eager", None) or not has_values(mask):
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not host_integers([mask.to(torch.bool).any(1).all()])[0]


def _isolate(model: Any, call: dict[str, Any], reason: str) -> None:
    """Keeps the sequences of a flattened call apart that runs stock: stock code would let them attend to each other."""
    cu_seqlens, implementation = call.get("cu_seq_lens_q"), model.config._attn_implementation
    if cu_seqlens is None or call.get("attention_mask") is not None or is_flash(model):
        return
    if implementation in ("sdpa", "eager", None):
        call["attention_mask"] = _stock_isolation(model, cu_seqlens, _shape(call)[1])
    elif reason != DISABLED:
        raise ValueError(
            f"cu_seq_lens_q is given, the call runs stock ({reason}), and attention implementation {implementation!r} "
            "would not keep its sequences apart; expected 'sdpa', 'eager' or a flash attention"
        )


def _stock_isolation(model: Any, cu_seqlens: Tensor, tokens: int) -> Tensor:
    mask = isolating_mask(cu_seqlens, tokens)
    if model.config._attn_implementation == "sdpa":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _is_repeatable(model: Any, call: Mapping[str, Any]) -> bool:
    """Whether what runs before the layers can run twice and nobody sees it: without hooks, without dropout."""
    if is_asked(model, call, "output_hidden_states"):
        return False
    first = (module for each in before_layers(model) for module in each.modules())
    return not any(module.training or is_hooked(module) for module in first)


def _lay_out(model: Any, call: dict[str, Any], settings: Settings, reads: Reads, foreign: bool, keeps: bool) -> Packing:
    """Chooses between packed and dense for a padded call, and rewrites its arguments to match.

    Those of foreign embeddings stay as they are, and it is the mask that says how long the sequences are. `keeps` as
    `why_dense` has it.
    """
    labels, mask = reads.padded_labels, call.get("attention_mask")
    batch, seqlen = mask.shape if foreign and mask is not None else _shape(call)
    call["attention_mask"] = None
    if mask is None:
        return Packing(batch, seqlen, seqlen)
    mask = mask.to(torch.bool)
    why, around = why_dense(model, settings, reads, keeps)
    dense = why is not None or (labels is not None and labels.shape != mask.shape)  # an error the loss will name
    dense = dense or not has_values(mask) or type(mask) is not Tensor
    if dense or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    if mask.device.type == "cpu" and bool(mask.all()):  # one operator; there, it costs no synchronisation
        return Packing(batch, seqlen, seqlen)
    selection = pack_mask(mask, labels)
    if selection.tokens == batch * seqlen:
        return Packing(batch, seqlen, seqlen)
    # A pooler reads position 0 of every sequence, real or not.
    exact = selection.starts_real or not (around.first or getattr(model, "pooler", None) is not None)
    family = family_of(model)
    if family.layout.attention.bias is not None and selection.has_holes:  # distances are those of the padded layout
        exact = False
    if selection.tokens == 0 or not exact or (selection.labels_padding and settings.padding == "auto"):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    indices, inverse = selection.packing.indices, selection.packing.inverse
    assert indices is not None and inverse is not None
    if foreign:
        return selection.packing
    if call.get("position_ids") is None and family.ids.get("position_ids") is not None:
        call["position_ids"] = default_positions(embeddings_of(model), call.get("input_ids"), seqlen)
    for name in family.ids:
        if call.get(name) is not None:
            call[name] = call[name].expand(batch, seqlen).flatten()[indices][None]
    if call.get("inputs_embeds") is not None:
        call["inputs_embeds"] = selection.packing.pack(call["inputs_embeds"])
    return selection.packing


def _check(model: Any, call: Mapping[str, Any], foreign: bool) -> None:
    """Raises ValueError naming the first argument that is of the wrong shape, dtype, device or range.

    What embeddings that aren't the family's own take is for them to say.
    """
    if foreign:
        if call.get("cu_seq_lens_q") is not None:
            _check_flattened(call, _shape(call)[0])
        return
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    given = "input_ids" if ids is not None else "inputs_embeds"
    values = call[given]
    if not isinstance(values, Tensor):
        raise ValueError(f"{given} is a {type(values).__name__}; expected a torch.Tensor")
    if values.dim() != (2 if ids is not None else 3):
        expected = "(batch, tokens)" if ids is not None else "(batch, tokens, hidden)"
        raise ValueError(f"{given} has shape {tuple(values.shape)}; expected {expected}")
    batch, seqlen = _shape(call)
    if not batch or not seqlen:
        raise ValueError(f"{given} has shape {tuple(values.shape)}; expected at least one sequence of one token")
    embeddings, names = embeddings_of(model), family_of(model).ids
    tables = embeddings.__dict__["_modules"]
    width = tables[next(iter(names.values()))].embedding_dim
    if embeds is not None and embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds has width {embeds.shape[2]}; expected that of the embeddings, {width}")
    for name, table in names.items():
        if call.get(name) is not None and (table is None or table in tables):
            _check_ids(name, call[name], (batch, seqlen), None if table is None else tables[table])
    if any(call.get(name) is not None for name in CACHES):
        return  # a cache changes which lengths are right
    if call.get("position_ids") is None and names.get("position_ids") is not None:
        _check_length(embeddings, ids, given, seqlen)
    _check_mask(call.get("attention_mask"), (batch, seqlen))
    if call.get("cu_seq_lens_q") is not None:
        _check_flattened(call, batch)


def _check_length(embeddings: Any, ids: Tensor | None, given: str, seqlen: int) -> None:
    first = first_position(embeddings)
    longest = embeddings.position_ids.shape[1] - first
    if first and ids is not None and seqlen > longest:  # positions count tokens other than padding's
        if not _is_readable(ids):
            return
        seqlen = host_integers([(ids != embeddings.padding_idx).sum(1).max()])[0]
    if seqlen > longest:
        expected = f"{longest}, max_position_embeddings - {first}" if first else f"max_position_embeddings, {longest}"
        raise ValueError(f"{given} has {seqlen} tokens a sequence; expected at most {expected}")


def _is_readable(ids: Tensor) -> bool:
    """Whether looking at values costs nothing. On a GPU it would be a synchronisation; there the kernels assert."""
    return ids.device.type == "cpu" and type(ids) is Tensor and has_values(ids) and not is_transformed()


def _check_ids(name: str, ids: Tensor, shape: tuple[int, int], table: Any) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}; expected a torch.Tensor")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {ids.dtype}; expected torch.int64 or torch.int32")
    sizes = (1,) * (2 - ids.dim()) + tuple(ids.shape)
    if len(sizes) != 2 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {shape}")
    weight = None if table is None else table.__dict__["_parameters"].get("weight")
    if weight is None:  # of none, parametrized, or held elsewhere
        return
    device = weight.device
    if ids.device != device and device.type != "meta":  # accelerate moves the inputs of an offloaded model
        raise ValueError(f"{name} is on {ids.device}; expected the model's device, {device}")
    rows = weight.shape[0]
    whole = weight.dim() == 2 and rows == table.num_embeddings  # not a shard, of FSDP1 or DeepSpeed
    if whole and _is_readable(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name} holds values from {low} to {high}; expected 0 to {rows - 1}")


def _check_mask(mask: Any, shape: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor) or mask.dim() == 4:
        return
    if tuple(mask.shape) not in (shape, (1, shape[1])):  # one row for all runs stock
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {shape} (or 4-D)")
    if mask.dtype.is_complex:
        raise ValueError(f"attention_mask has dtype {mask.dtype}; expected bool, integer or floating point")


def _check_flattened(call: Mapping[str, Any], batch: int) -> None:
    cu_seqlens, keys = call["cu_seq_lens_q"], call.get("cu_seq_lens_k")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q is given for a batch of {batch}; expected one row that holds all sequences")
    if call.get("attention_mask") is not None:
        raise ValueError("attention_mask is given together with cu_seq_lens_q; expected only one of the two")
    for name, starts in (("cu_seq_lens_q", cu_seqlens), ("cu_seq_lens_k", cu_seqlens if keys is None else keys)):
        integer = isinstance(starts, Tensor) and starts.dtype in (torch.int32, torch.int64)
        if not integer or starts.dim() != 1 or len(starts) < 2 or starts.shape != cu_seqlens.shape:
            raise ValueError(
                f"{name}: expected a 1-D int32 tensor of where each sequence starts, the number of tokens last; "
                "the same for queries and keys"
            )
