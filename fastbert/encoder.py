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
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput

from . import ops
from .coverage import Coverage, Seen, before_layers
from .fp8 import Fp8
from .graphs import Graphs
from .layer import default_positions, first_position
from .packing import Packing, flattened, host_integers, isolating_mask, pack_mask
from .readers import Holder, Reads, outermost, readings
from .support import (
    CACHES,
    call_is_unsupported,
    encoder_of,
    is_asked,
    is_hooked,
    is_transformed,
    relative_is_unsupported,
)

PADDINGS = ("auto", "packed", "dense")

# Arguments of a base model's forward that hold one integer a token.
_IDS = ("input_ids", "token_type_ids", "position_ids", "task_type_ids")

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
    weights: tuple[Any, ...] | None = None
    """`Seen.weights`."""
    assumed: bool = False
    """Whether the layers were not looked at, but taken to be as they were: see `fastbert.graphs`."""
    config: Any = None
    """The model's, where a layer runs its stock code and needs a mask made: DistilBERT's encoder has none."""
    receipt: Receipt | None = None
    """Set by the encoder: see `check_taken`."""


class FusedEncoder(_Module):
    """A stack of fused layers; mixed into a family's own Hugging Face encoder class by `fastbert.models`."""

    fastbert: Settings
    output: ClassVar[type[ModelOutput]] = BaseModelOutputWithPastAndCrossAttentions
    """What the stock encoder returns."""
    relative: ClassVar[bool] = False
    """Whether attention adds a bias by distance: then `relative_bias` gives it, for inference alone."""

    def forward(self, hidden_states: Tensor, *args: Any, plan: Plan | str | None = None, **kwargs: Any) -> ModelOutput:
        """hidden_states (1, T, H) or (B, S, H) as `plan` lays out -> (B, S, H); stock where it is no Plan.

        `plan` as a string is the reason the call runs stock.
        """
        if not hasattr(self, "fastbert"):  # unfused, in a class that FSDP has derived from this one
            stock: ModelOutput = super().forward(hidden_states, *args, **kwargs)
            return stock
        counts = self.fastbert.counts
        if self.fastbert.fp8 is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._drop()  # the step that comes of gradients may leave no version: that of torch's fused optimizers
        if not isinstance(plan, Plan):
            if plan or not self.relative:  # there its model has counted
                counts.add(counts.stock, plan or "called past the forward of its model")
            stock = super().forward(hidden_states, *args, **kwargs)
            return stock
        if plan.receipt is not None:
            plan.receipt.taken = True
        packing, settings = plan.packing, self.fastbert
        fp8 = settings.fp8
        if fp8 is not None and (plan.seeds is not None or not fp8.runs(self.layer, hidden_states)):
            fp8 = None
        result = None
        if settings.graphs is not None and not torch.compiler.is_compiling():
            result = settings.graphs.run(self, hidden_states, plan, fp8)
        layout = "dense" if packing.cu_seqlens is None else "packed"
        counts.add(counts.fused, layout if fp8 is None else f"{layout}, fp8")
        if result is not None:
            return self.output(last_hidden_state=result)
        if self.relative:
            packing = packing._replace(bias=self.relative_bias(packing.max_seqlen))
        stock_mask = None
        if any(plan.stock_layers):
            for name in ("attention_mask", "use_cache"):  # the one replaced here, the other the encoder's alone
                kwargs.pop(name, None)
            stock_mask = create_bidirectional_mask(
                config=plan.config, inputs_embeds=hidden_states, attention_mask=packing.key_mask
            )
        seeds = (None,) * len(plan.stock_layers) if plan.seeds is None else plan.seeds.unbind(0)
        infers: Any = [None] * len(seeds) if fp8 is None else fp8.plan(self.layer, plan.stock_layers)
        known = plan.weights or (None,) * len(seeds)
        every = zip(self.layer, plan.stock_layers, seeds, infers, known, strict=True)
        for layer, stock, own_seeds, infer, weights in every:
            if stock:
                hidden_states = layer(hidden_states, stock_mask, **kwargs)
            else:
                hidden_states = layer(hidden_states, packing=packing, seeds=own_seeds, infer=infer, weights=weights)
        return self.output(last_hidden_state=packing.unpack(hidden_states))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's `.to`, `.half` and others call it. Graphs and 8 bits would keep the memory that is being left."""
        self._drop()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As `.eval` calls it, too: between training and inference weights may have been written to unseen.

        By an optimizer that writes to `weight.data`; by PEFT, which may merge an adapter before there is another call:
        the modules of one come in training mode, and are put into the model's.
        """
        in_8_bits = hasattr(self, "fastbert") and self.fastbert.fp8 is not None
        if in_8_bits and any(module.training != mode for module in self.modules()):
            self._drop()
        return super().train(mode)

    def _drop(self) -> None:
        """Frees graphs, weights in 8 bits and what was found of layers; they are made again where they are needed."""
        settings = getattr(self, "fastbert", None)
        for kept in (settings.graphs, settings.fp8, settings.coverage) if settings is not None else ():
            if kept is not None:
                kept.drop()

    def relative_bias(self, length: int) -> Tensor:
        """`Packing.bias` for sequences of `length` tokens at most."""
        raise NotImplementedError


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
    call = dict(zip(names, args, strict=False))
    if not hasattr(encoder, "fastbert") or len(args) > len(names) or call.keys() & kwargs.keys():
        return args, kwargs  # unfused, or given too many or twice: the forward itself says so
    call.update(kwargs)
    reads = Reads(*(call.pop(name, default) for name, default in Reads._field_defaults.items()))
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return (), call  # both or neither: the forward itself says so
    _check(model, call)
    reason = call_is_unsupported(model, call)
    graphs = encoder.fastbert.graphs
    assumed = assumes and reason is None and graphs is not None and graphs.expects() and _is_repeatable(model, call)
    layers = len(encoder.layer)
    seen = Seen((None,) * layers, (False,) * layers, (None,) * layers, False)
    if reason is None and not assumed:
        seen = encoder.fastbert.coverage.look(model)
        if all(seen.stock):
            reason = f"no layer can run fused: {seen.reasons[0]}"
    mixed = any(seen.stock)
    if reason is None and encoder.relative:
        reason = relative_is_unsupported(model, call, mixed)
    cu_seqlens = call.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        packing = flattened(cu_seqlens, _shape(call)[1], call.get("cu_seq_lens_k"))
        if reason is None and mixed:
            reason = "a flattened call of a model with a layer that runs stock"
    if reason is None and _has_empty_sequence(model, call.get("attention_mask")):
        reason = "a sequence without a real token, under eager attention"
    if reason is not None:
        call["plan"] = reason
        flash = (model.config._attn_implementation or "").startswith("flash")
        if cu_seqlens is not None and call.get("attention_mask") is None and not flash:
            # Stock code would let the sequences of a flattened call attend to each other.
            call["attention_mask"] = _stock_isolation(model, cu_seqlens, _shape(call)[1], reason)
        return (), call
    watched = seen.watched or (not assumed and is_asked(model, call, "output_hidden_states"))
    if cu_seqlens is None:
        keeps_shape = mixed or watched
        packing = _lay_out(model, call, reads._replace(reads_padding=keeps_shape or reads.reads_padding))
    seeds = None if assumed else _draw_seeds(encoder.layer, seen.stock)
    config = model.config if mixed else None
    call["plan"] = Plan(
        packing, seen.stock, seeds, watched, None if watched else seen.weights, assumed, config, Receipt()
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


def _draw_seeds(layers: Any, stock: tuple[bool, ...]) -> Tensor | None:
    """Seeds for all dropouts of one forward, or None where none drops.

    Drawn once, and handed to the layers as arguments: one computed again for its gradients drops the same.
    """
    fused = [layer for layer, is_stock in zip(layers, stock, strict=True) if not is_stock]
    if not any(rate for layer in fused for rate in layer.dropouts()):
        return None
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
    if mask is None or model.config._attn_implementation not in ("eager", None) or torch.compiler.is_compiling():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not host_integers([mask.to(torch.bool).any(1).all()])[0]


def _stock_isolation(model: Any, cu_seqlens: Tensor, tokens: int, reason: str) -> Tensor:
    mask = isolating_mask(cu_seqlens, tokens)
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        return mask
    if implementation not in ("eager", None):
        raise ValueError(
            f"cu_seq_lens_q is given, the call runs stock ({reason}), and attention implementation {implementation!r} "
            "would not keep its sequences apart; expected 'sdpa', 'eager' or a flash attention"
        )
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _is_repeatable(model: Any, call: Mapping[str, Any]) -> bool:
    """Whether what runs before the layers can run twice and nobody sees it: without hooks, without dropout."""
    if is_asked(model, call, "output_hidden_states"):
        return False
    return not any(module.training or is_hooked(module) for module in before_layers(model))


def _lay_out(model: Any, call: dict[str, Any], reads: Reads) -> Packing:
    """Chooses between packed and dense for a padded call, and rewrites its arguments to match."""
    batch, seqlen = _shape(call)
    settings, labels = encoder_of(model).fastbert, reads.padded_labels
    mask = call.get("attention_mask")
    call["attention_mask"] = None
    padding = settings.padding
    if mask is None:
        return Packing(batch, seqlen, seqlen)
    mask = mask.to(torch.bool)
    dense = reads.reads_padding or padding == "dense" or torch.compiler.is_compiling()
    dense = dense or (labels is not None and labels.shape != mask.shape)  # an error the loss will name
    if dense or type(mask) is not Tensor or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    around = readings(outermost(model, settings.holders))
    if padding == "auto" and (around.unknown is not None or (around.tells is not None and not reads.told)):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    selection = pack_mask(mask, labels)
    if selection.tokens == batch * seqlen:
        return Packing(batch, seqlen, seqlen)
    # A pooler reads position 0 of every sequence, real or not.
    exact = selection.starts_real or not (around.first or getattr(model, "pooler", None) is not None)
    if encoder_of(model).relative and selection.has_holes:  # distances are those of the padded layout
        exact = False
    if selection.tokens == 0 or not exact or (selection.labels_padding and padding == "auto"):
        return Packing(batch, seqlen, seqlen, key_mask=mask)
    indices, inverse = selection.packing.indices, selection.packing.inverse
    assert indices is not None and inverse is not None
    if call.get("position_ids") is None:
        call["position_ids"] = default_positions(model.embeddings, call.get("input_ids"), seqlen)
    for name in _IDS:
        if call.get(name) is not None:
            call[name] = call[name].expand(batch, seqlen).flatten()[indices][None]
    if call.get("inputs_embeds") is not None:
        call["inputs_embeds"] = ops.pack(call["inputs_embeds"].flatten(0, 1), indices, inverse)[None]
    return selection.packing


def _check(model: Any, call: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first argument that is of the wrong shape, dtype, device or range."""
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
    tables = model.embeddings
    words = getattr(tables.word_embeddings, "weight", None)
    if embeds is not None and isinstance(words, Tensor) and embeds.shape[2] != words.shape[1]:
        raise ValueError(
            f"inputs_embeds has width {embeds.shape[2]}; expected that of the embeddings, {words.shape[1]}"
        )
    for name, table in zip(_IDS, ("word", "token_type", "position", "task_type"), strict=True):
        weight = getattr(getattr(tables, f"{table}_embeddings", None), "weight", None)
        if call.get(name) is not None and isinstance(weight, Tensor):  # a quantized table has a method of that name
            _check_ids(name, call[name], (batch, seqlen), weight)
    if any(call.get(name) is not None for name in CACHES):
        return  # a cache changes which lengths are right
    if call.get("position_ids") is None:
        _check_length(tables, ids, given, seqlen)
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
    return (
        ids.device.type == "cpu" and type(ids) is Tensor and not torch.compiler.is_compiling() and not is_transformed()
    )


def _check_ids(name: str, ids: Tensor, shape: tuple[int, int], table: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}; expected a torch.Tensor")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {ids.dtype}; expected torch.int64 or torch.int32")
    sizes = (1,) * (2 - ids.dim()) + tuple(ids.shape)
    if len(sizes) != 2 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {shape}")
    if ids.device != table.device and table.device.type != "meta":  # accelerate moves the inputs of an offloaded model
        raise ValueError(f"{name} is on {ids.device}; expected the model's device, {table.device}")
    if _is_readable(ids):
        low, high = host_integers([ids.min(), ids.max()])
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"{name} holds values from {low} to {high}; expected 0 to {table.shape[0] - 1}")


def _check_mask(mask: Any, shape: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor) or mask.dim() == 4:
        return
    if tuple(mask.shape) != shape:
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
