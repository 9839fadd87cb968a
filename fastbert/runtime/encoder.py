"""The fused encoder: runs every layer over the plan that its base model has made of a call, or the stock code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput

from ..layers.context import Context, Map
from ..layers.gemm import plain
from ..layers.layer import FusedLayer, Mixin, layer_is_unsupported, stock_forward
from . import known
from .packing import Packing
from .plan import Plan
from .readers import Maps
from .registry import stack_in
from .settings import Settings
from .support import is_capturing, is_custom, is_hooked, is_plain, named
from .wrappers import unwrapped


class FusedEncoder(Mixin):
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
        counts, precision = settings.counts, settings.precision
        family, stack = type(self).family, stack_in(self)
        layers, calls = stack.layers, stack.calls
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The step that comes of gradients may leave no version: that of torch's fused optimizers.
            settings.coverage.derived.drop()
            if precision is not None:
                self._drop()
        if not isinstance(plan, Plan):
            # There its model hands on no plan, and has counted the call.
            if plan is None and family.run is None and known.takes_plan(family.name):
                counts.add(counts.stock, "called past the forward of its model")
            stock = stock_forward(FusedEncoder, self, hidden_states, *args, **kwargs)
            return stock
        receipt = plan.receipt
        if plan.foreign:
            given = hidden_states
            hidden_states, plan, odd = _take(self, given, plan)
            if odd is not None:
                receipt.stock = odd
                kwargs["attention_mask"] = _stock_mask(given, plan, family.takes_square_mask)
                stock = stock_forward(FusedEncoder, self, given, *args[1:], **kwargs)
                return stock
        if is_custom(hidden_states) and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"the embeddings gave a {named(hidden_states)}, which may change what functions of torch compute; "
                "fastbert.unfuse(model) runs the stock code"
            )
        if family.projection is not None:
            hidden_states = _projected(self._modules[family.projection], hidden_states)
        if hidden_states.dtype.itemsize == 2 and not torch.is_autocast_enabled(hidden_states.device.type):
            # Embeddings of fewer bits than the layers: stock code widens them in the first sum.
            dtype = next(stack.held.parameters()).dtype
            if torch.promote_types(hidden_states.dtype, dtype) is dtype:
                hidden_states = hidden_states.to(dtype)
        packing = plan.packing
        # Code of others has run since it was planned, and may have changed layers: a hook that adds another, say.
        looks = (plan.watched or plan.foreign) and not torch.compiler.is_compiling() and not settings.coverage.holds()
        if looks:
            plan = plan._replace(bound=None)
        if precision is not None and (plan.seeds is not None or not precision.runs(layers, hidden_states)):
            precision = None
        result = None
        if settings.graphs is not None and not torch.compiler.is_compiling():
            beside = functools.partial(self._beside, hidden_states, plan, kwargs)
            result = settings.graphs.run(self, hidden_states, plan, precision, beside)
        layout = "dense" if packing.cu_seqlens is None else "packed"
        receipt.fused = layout if precision is None else f"{layout}, {precision.name}"
        if result is not None:
            if family.final_norm is not None:
                result = packing.unpack(self._modules[family.final_norm](result))
            return family.output(last_hidden_state=result)
        if family.handed is not None:
            context = Context(packing, {family.handed: _laid_out(kwargs[family.handed], packing)})
        elif family.tables is None:
            context = Context(packing)
        else:
            context = Context(packing, family.tables(self, hidden_states, packing, plan.position_ids))
        shown: tuple[object, ...] = ()
        handed: dict[str, object] = {}
        if plan.hooked or any(plan.stock_layers):  # they are called as stock code calls them
            shown, handed = _as_stock(hidden_states, plan, kwargs)
        seeds = (None,) * len(calls) if plan.seeds is None else plan.seeds.unbind(0)
        found: Any = (None,) * len(calls) if plan.bound is None else [plan.bound[j] for j in calls]
        if precision is not None:
            quantized = precision.bind(layers, plan.stock_layers, plan.bound, calls)
            found = [own or plain for own, plain in zip(quantized, found, strict=True)]
        first, after, maps = hidden_states, family.after_first(self), None
        if plan.maps is not None:
            maps = _Maps(plan.maps, packing, self)
        collected = [hidden_states]
        if plan.bound is not None and plan.seeds is None and _only_infers(layers, plan.bound, hidden_states):
            x = hidden_states.flatten(0, 1)
            for i, bound in enumerate(found):
                x = bound.infer(x, context if maps is None else maps.context(i, context))
                if after is not None:
                    x, after = after(self, first, x.view_as(first), plan).flatten(0, 1), None
                if maps is not None and maps.take(i, layers[calls[i]]):
                    break
            hidden_states, calls, seeds, found = x.view_as(hidden_states), (), (), ()
        for i, (j, own_seeds, bound) in enumerate(zip(calls, seeds, found, strict=True)):
            layer, stock = layers[j], plan.stock_layers[j]
            if looks and not stock:
                stock = self._is_changed(stack.name(j), layer, packing)
                others = [k != j for k in range(len(layers))]
                bound = None if precision is None else precision.bind(layers, others, calls=calls)[i]
                if stock and not shown:
                    shown, handed = _as_stock(hidden_states, plan, kwargs)
            if stock or (shown and is_custom(hidden_states)):  # a layer that runs stock has made it
                hidden_states = layer(hidden_states, *shown, **handed)
            else:
                mask = shown or ((_FUSED_ALONE,) if _runs_again(layer) else ())
                own = context if maps is None else maps.context(i, context)
                hidden_states = layer(hidden_states, *mask, context=own, seeds=own_seeds, bound=bound, **handed)
            looks = looks or ((stock or plan.hooked) and not torch.compiler.is_compiling())
            if after is not None:
                hidden_states, after = after(self, first, hidden_states, plan), None
            if plan.collects:
                collected.append(hidden_states)
            if maps is not None and maps.take(i, layer):
                break
        if family.final_norm is not None:
            hidden_states = self._modules[family.final_norm](hidden_states)
            collected[-1] = hidden_states
        more: dict[str, object] = {}
        if plan.collects:
            more["hidden_states"] = tuple(collected)
        if maps is not None and family.run is not None:
            more["attentions"] = tuple(maps.kept)
        return family.output(last_hidden_state=packing.unpack(hidden_states), **more)

    def _beside(self, hidden_states: Tensor, plan: Plan, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What tables of a graph are made of, row by row: a rotation that is handed on, or positions."""
        family, packing = type(self).family, plan.packing
        if family.handed is not None:
            return _laid_out(kwargs[family.handed], packing) or ()
        if not family.makes_tables:
            return ()
        places = packing.positions(hidden_states.device) if plan.position_ids is None else plan.position_ids
        return (places.flatten(),)

    def _is_changed(self, name: str, layer: nn.Module, packing: Packing) -> bool:
        """Whether a layer, which was to run fused, runs stock, by what was done to it since this forward began.

        Raises:
            RuntimeError: it would have to, and can't: its rows are packed, or it takes what only stock's encoder gives.
        """
        family = type(self).family
        shared = {} if family.shared is None else family.shared(self)
        why = layer_is_unsupported(layer, name, shared)
        if family.run is not None and why is None and is_hooked(self, called=True):
            why = "the encoder has hooks"
        if why is not None and (family.run is not None or packing.cu_seqlens is not None):
            raise RuntimeError(
                f"{why}, since this forward began, which then can't run stock; change a model between its forwards, or "
                "call fastbert.unfuse on it"
            )
        return why is not None

    def _apply(self, *args: object, **kwargs: object) -> Any:
        """As torch's `.to`, `.half` and others call it. Graphs and quantized weights would keep the old memory."""
        self._drop()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As `.eval` calls it, too: between training and inference weights may have been written to unseen.

        By an optimizer that writes to `weight.data`; by PEFT, which may merge an adapter before there is another call:
        the modules of one come in training mode, and are put into the model's.
        """
        settings = getattr(self, "fastbert", None)
        derives = settings is not None and (settings.precision is not None or type(self).family.tables is not None)
        if derives and any(module.training != mode for module in self.modules()):
            self._drop()
        return super().train(mode)

    def _drop(self) -> None:
        """Frees graphs, quantized weights and what was found of layers; they are made again where they are needed."""
        settings = getattr(self, "fastbert", None)
        for kept in () if settings is None else (settings.graphs, settings.precision, settings.coverage):
            if kept is not None:
                kept.drop()


class _Maps:
    """The attention maps of one forward, on their way from layers to whoever takes them."""

    def __init__(self, wanted: Maps, packing: Packing, encoder: FusedEncoder) -> None:
        self.wanted, self.packing, self.family = wanted, packing, type(encoder).family
        self.map: Map | None = None
        self.kept: list[Tensor] = []
        """Those that the encoder is to return: nothing of transformers records them."""

    def context(self, layer: int, context: Context) -> Context:
        """That of a layer, which says whether its map is wanted."""
        self.map = Map(self.wanted.heads, self._ends(layer)) if layer in self.wanted.layers else None
        return context if self.map is None else context._replace(map=self.map)

    def _ends(self, layer: int) -> bool:
        """Whether nothing is wanted of what comes after the map of a layer."""
        return self.wanted.alone and layer == max(self.wanted.layers)

    def take(self, number: int, layer: nn.Module) -> bool:
        """Hands on the map that a layer has left, if it was to; returns whether no layer after it need run."""
        if self.map is None:
            return False
        found, take = self.map.found, self.wanted.take
        self.map = None
        assert found is not None
        if take is not None:
            take(number, found, self.packing.key_mask)
        elif self.family.run is not None:
            self.kept.append(found)
        else:  # as the attention of stock code returns it, to hooks of transformers
            module = unwrapped(layer).get_submodule(".".join(self.family.layout.attention.module))
            for hook in module._forward_hooks.values():
                if is_capturing(hook):
                    hook(module, (), (None, found))
        return self._ends(number)


_UNFUSED_MEANWHILE = (
    "a checkpointed {} ran fused in the forward and runs stock in its backward: fastbert.unfuse(model) came in "
    "between; call it after the backward"
)


def refuse_to_run_again_unfused(called: nn.Module, encoder: nn.Module, output: Tensor) -> None:
    """Has the backward raise where it would run an encoder again that was unfused meanwhile.

    Stock code would take packed rows for one sequence.

    Args:
        called: what the base model calls: the encoder, or what it is wrapped in.
        encoder: the fused encoder.
        output: the last hidden states.
    """
    again = type(called).__name__ == "CheckpointWrapper" or "forward" in encoder.__dict__
    if again and output.requires_grad:

        def check(gradient: Tensor) -> None:
            if not isinstance(encoder, FusedEncoder):
                raise RuntimeError(_UNFUSED_MEANWHILE.format("encoder"))

        output.register_hook(check)


class _FusedAlone:
    """In the mask's place where a layer may run again in the backward: stock code that meets it raises.

    It would take packed rows for one sequence, which an `unfuse` between forward and backward leads to.
    """

    @classmethod
    def __torch_function__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(_UNFUSED_MEANWHILE.format("layer"))


_FUSED_ALONE = _FusedAlone()


def _runs_again(layer: nn.Module) -> bool:
    """Whether the backward calls `layer` anew: transformers' checkpointing, or torch's wrapper."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return bool(layer.__dict__.get("gradient_checkpointing")) or type(layer).__name__ == "CheckpointWrapper"


def _only_infers(layers: nn.ModuleList, bound: tuple[object, ...], sample: Tensor) -> bool:
    """Whether nobody sees layers called, so that they need not be: all bound, in inference, of fastbert's own code."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(sample.device.type) or torch.compiler.is_compiling():
        return False
    if any(each is None for each in bound):
        return False
    kinds: set[Any] = {type(layer) for layer in layers}
    if any(kind.forward is not FusedLayer.forward or kind.__call__ is not kind.family.layer.__call__ for kind in kinds):
        return False
    return not any(layer.training for layer in layers)


def _as_stock(
    hidden_states: Tensor, plan: Plan, kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What stock code gives its layers after hidden states: by position, and by name; `kwargs` are the encoder's."""
    handed = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "use_cache")}
    shown: tuple[object, ...] = (_stock_mask(hidden_states, plan),)
    if "encoder_hidden_states" in handed:  # by position, too, but for DistilBERT, which has none
        shown += (handed.pop("encoder_hidden_states"),)
    return shown, handed


def _stock_mask(hidden_states: Tensor, plan: Plan, square: bool = True) -> Tensor | None:
    """The mask that stock code hands to its encoder; not `square`: it has one of tokens."""
    if not square:
        return hidden_states.new_ones(hidden_states.shape[:2]) if plan.mask is None else plan.mask
    return create_bidirectional_mask(config=plan.config, inputs_embeds=hidden_states, attention_mask=plan.mask)


def _laid_out(tables: tuple[Tensor, ...] | None, packing: Packing) -> tuple[Tensor, ...] | None:
    """Tables of which there is a row for every position, (1, S, D) or (B, S, D) -> (rows, D), as the rows lie."""
    if tables is None or (packing.cu_seqlens is not None and packing.indices is None):
        return tables and tuple([table.flatten(0, 1) for table in tables])
    whole = [table.expand(packing.batch, -1, -1).flatten(0, 1) for table in tables]
    return tuple(whole if packing.indices is None else [table[packing.indices] for table in whole])


def _projected(linear: nn.Module, hidden_states: Tensor) -> Tensor:
    """What the linear layer before the first layer makes of hidden states; without adapters by fastbert's own GEMM."""
    called = torch.is_autocast_enabled(hidden_states.device.type) or "forward" in linear.__dict__  # which moves them
    if called or not is_plain(linear, nn.Linear):
        return cast(Tensor, linear(hidden_states))
    return plain("", (linear,))(hidden_states.flatten(0, 1)).view(*hidden_states.shape[:2], -1)


def _take(encoder: nn.Module, rows: Tensor, plan: Plan) -> tuple[Tensor, Plan, str | None]:
    """The hidden states of embeddings that aren't the family's own, laid out; with the reason where they can't be."""
    packing = plan.packing
    shape, dtype = tuple(rows.shape[:2]), next(stack_in(encoder).held.parameters()).dtype
    if plan.mask is None and packing.cu_seqlens is None:  # as long as they are
        packing = Packing(shape[0], shape[1], shape[1])
    flat = packing.cu_seqlens is not None and packing.indices is None
    expected = (1 if flat else packing.batch, packing.seqlen)
    if shape != expected or rows.dtype != dtype:
        return rows, plan, f"custom embeddings that give {shape} of {rows.dtype}, not {expected} of {dtype}"
    return packing.pack(rows), plan._replace(packing=packing), None
