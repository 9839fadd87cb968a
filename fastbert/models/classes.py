"""Makes the fused classes of a family: subclasses of its own, under the same names.

Same names because transformers and accelerate look classes up by `__name__` (which blocks not to split over devices,
what to wrap), and because a saved config records them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..fuse import FusedModel
from ..layers.attention import Attention
from ..layers.embeddings import FusedEmbeddings
from ..layers.feed_forward import FeedForward
from ..layers.layer import FusedLayer, Layer
from ..runtime import known
from ..runtime.encoder import FusedEncoder, refuse_to_run_again_unfused
from ..runtime.graphs import Stale
from ..runtime.plan import Plan, check_taken, count, plan_call
from ..runtime.readers import Args, Kwargs, Reader, know, named_arguments, parameter_names
from ..runtime.registry import REGISTERED, embeddings_of, encoder_of, wrapped_encoder_of
from .family import Family, Given
from .heads import Vocabulary, labelled_loss, takes_labelled_rows
from .probe import check_description, hands_nothing_on, try_family

T = TypeVar("T", bound=nn.Module)


def register(family: Family, module: str) -> Family:
    """Makes the fused classes of a family, into the module of that name, and has `fastbert.fuse` look for its models.

    Args:
        family: the family.
        module: `__name__` of the adapter; there, fused classes have the names of the stock ones. It must be importable
            by that name, for models are pickled by their classes.

    Returns:
        `family`.

    Raises:
        ValueError: the module is not loaded, or has no place for what is made; the family is registered already, or
            says what its classes don't have; or a small model of it computes something else fused than stock, which is
            named. Then the family is not registered.

    Warns:
        RuntimeWarning: the base model does not hand its encoder the keyword arguments that it doesn't know, which is
            tried on the meta device; then none of the family is fused. See `Family.run`.
    """
    if module not in sys.modules:
        raise ValueError(f"module is {module!r}, which is not loaded; expected the adapter's __name__")
    if family.base in REGISTERED:
        made = REGISTERED[family.base].fused[family.base].__module__
        raise ValueError(f"family: {family.base.__name__} is registered already, by {made}")
    outside = not module.startswith("fastbert.")
    if outside:
        check_description(family)
    if family.handed is not None and family.handed not in inspect.signature(family.encoder.forward).parameters:
        raise ValueError(f"Family.handed is {family.handed!r}; {family.encoder.__name__} takes no such argument")
    family.unknown_arguments = _unknown_arguments(family)
    recorded = getattr(family.base, "_can_record_outputs", None) or {}
    family.records_hidden_states = family.run is None and "hidden_states" in recorded
    family.returns_maps = "attentions" in (recorded if family.run is None else family.output.__dataclass_fields__)
    kinds = {
        family.base: _base_model(family, module),
        family.layer: _derive(family, family.layer, module, FusedLayer, layout=family.layout),
    }
    if not family.loops:
        kinds[family.encoder] = _derive(family, family.encoder, module, FusedEncoder)
    if family.fuses_embeddings:
        kinds[family.embeddings] = family.fused[family.embeddings]
    family.fused.update(kinds)
    family.loss_heads.update(
        {kind: _masked_lm(family, kind, module, vocabulary) for kind, vocabulary in family.vocabularies.items()}
    )
    heads = {*family.heads, *family.others}
    made = [*kinds.values(), *family.loss_heads.values()]
    made += [_derive(family, kind, module, FusedModel) for kind in heads if kind not in family.loss_heads]
    for kind in made:
        setattr(sys.modules[module], kind.__name__, kind)

    stood_in_for = (*kinds, *(kind for half in family.layout.halves() for kind in half.kinds.values()))
    stood_in_for += tuple(family.makes_tables.values())
    if family.group is not None:
        stood_in_for += (family.group,)
    if family.embeddings.__module__ == family.code.__name__:  # fastbert counts positions as it does
        stood_in_for += (family.embeddings,)
    if family.layout.norm is not nn.LayerNorm:
        stood_in_for += (family.layout.norm,)
    known.keep(family.name, family.code, stood_in_for, (*heads, *family.parts))
    before = (family.embeddings_at[0], family.stack[0], *family.between)
    if family.loops:  # what else it has of its own
        before += tuple(name for name in (family.final_norm, *family.makes_tables) if name is not None)
    know((family.base, kinds[family.base]), before, family.heads, family.parts, family.loss_heads)
    REGISTERED[family.base] = family
    try:
        _introduce(family)
        if outside and family.unsupported is None:
            try_family(family)
    except BaseException:
        del REGISTERED[family.base]
        raise
    return family


_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_hidden_states"),
    *("encoder_attention_mask", "past_key_values", "cache", "use_cache", "cache_position", "cu_seq_lens_q"),
    *("cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "output_attentions", "output_hidden_states"),
    *("return_dict", "head_mask", "kwargs", "args"),
}
"""Parameters of base models that are known, whatever the family: checked, looked at, or of no effect on its rows."""


def _unknown_arguments(family: Family) -> tuple[str, ...]:
    """Parameters of the base model's forward that neither the family nor anything else here speaks of."""
    base: Any = family.base
    return tuple(name for name in parameter_names(base) if name not in _ARGUMENTS and name not in family.ids)


def bert_like(
    code: ModuleType,
    prefix: str,
    heads: Mapping[str, Reader],
    others: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    vocabularies: Mapping[str, Callable[..., Vocabulary]] | None = None,
    dropout: str = "dropout",
    attention: Given | None = None,
    feed_forward: Given | None = None,
    pre_norm: bool = False,
    **differences: Any,
) -> Family:
    """A family whose layers and embeddings are BERT's after renaming.

    Args:
        code: the module of its classes.
        prefix: what the names of its classes begin with: "Bert".
        heads, others, parts, vocabularies: as `Family` has them, by the rest of the name: "ForMaskedLM".
        dropout: as `Attention` has it.
        attention, feed_forward: what else is not BERT's, of `Attention` and of `FeedForward`.
        pre_norm: as `Layer` has it.
        differences: what else is not BERT's, of `Family`.
    """

    def named(rest: str) -> Any:
        return getattr(code, prefix + rest)

    half = Attention(
        kinds={
            ("attention",): named("Attention"),
            ("attention", "self"): named("SelfAttention"),
            ("attention", "output"): named("SelfOutput"),
        },
        dropout=dropout,
        **(attention or {}),
    )
    other = FeedForward(
        kinds={("intermediate",): named("Intermediate"), ("output",): named("Output")}, **(feed_forward or {})
    )
    base = named("Model")
    family = Family(
        code,
        base,
        named("Encoder"),
        named("Layer"),
        Layer(half, other, pre_norm),
        named("Embeddings"),
        base.config_class,
        fuses_embeddings=True,
        heads={named(rest): reads for rest, reads in heads.items()},
        others=tuple(map(named, others)),
        parts=tuple(map(named, parts)),
        vocabularies={named(rest): vocabulary for rest, vocabulary in (vocabularies or {}).items()},
    )
    return replace(family, **differences)


def _derive(family: Family, kind: type[T], module: str, *mixins: type, **attributes: object) -> type[T]:
    about: dict[str, object] = {"__module__": module, "__doc__": f"The stock {kind.__name__}, fused."}
    about.update(family=family, called=known.methods_called(kind))
    return type(kind.__name__, (*mixins, kind), {**about, **attributes})


def _base_model(family: Family, module: str) -> type[nn.Module]:
    """The fused base model; its embeddings' class, too, if that is fused, goes into `family.fused`."""
    kind: Any = family.base
    stock: Any = family.embeddings
    embeddings = stock
    if family.fuses_embeddings:
        embeddings = _derive(family, stock, module, FusedEmbeddings, names=parameter_names(stock))
        family.fused[stock] = embeddings
    names = parameter_names(kind)

    def run(self: PreTrainedModel, args: Args, kwargs: Kwargs, assumes: bool) -> ModelOutput:
        planned, named = plan_call(self, names, args, kwargs, assumes)
        plan = named.get("plan")
        try:
            if family.run is None and not family.loops:
                output = kind.forward(self, *planned, **named)
            elif isinstance(plan, Plan):
                output = (
                    _call_layers(self, **named) if family.run is None else family.run(self, named, named.pop("plan"))
                )
            else:  # which its stock forward would not hand on
                named.pop("plan", None)
                output = kind.forward(self, *planned, **named)
        finally:
            count(self, plan)
        check_taken(self, plan)
        if family.norm_after and isinstance(plan, Plan):
            output = _zeroed(output, plan)
        if isinstance(plan, Plan) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_to_run_again_unfused(wrapped_encoder_of(self), encoder_of(self), output[0])
        return output

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            return run(self, args, kwargs, True)
        settings = getattr(encoder_of(self), "fastbert", None)
        if settings is None:
            return run(self, args, kwargs, True)
        threads, thread = settings.running.threads, threading.get_ident()
        threads.append(thread)  # before there is a plan: `unfuse` waits for who has one
        try:
            with known.looking_once():
                try:
                    return run(self, args, kwargs, True)
                except Stale:
                    return run(self, args, kwargs, False)
        finally:
            threads.remove(thread)

    own = (stock, stock.forward, embeddings, known.methods_called(stock))
    mixins = (FusedModel, FusedEncoder) if family.loops else (FusedModel,)
    return _derive(family, kind, module, *mixins, forward=forward, own_embeddings=own, embeds=parameter_names(stock))


def _zeroed(output: Any, plan: Plan) -> Any:
    """What a base model returns, with zeros again in rows of padding that were left out and normalised since."""
    if plan.receipt.fused is None or plan.packing.indices is None or plan.mask is None:
        return output
    hidden_states = output[0].masked_fill(plan.mask[..., None].to(output[0].device) == 0, 0.0)
    if isinstance(output, tuple):
        return hidden_states, *output[1:]
    output["last_hidden_state"] = hidden_states
    return output


@merge_with_config_defaults
@capture_outputs
def _call_layers(model: PreTrainedModel, plan: Plan, **call: object) -> ModelOutput:
    """What the forward of a base model does that calls its layers itself, in the decorators that stock's has."""
    embeddings = embeddings_of(model)
    if type(embeddings) is nn.Embedding:
        rows = embeddings(call["input_ids"]) if call.get("inputs_embeds") is None else call["inputs_embeds"]
    else:
        rows = embeddings(**{name: call[name] for name in type(model).embeds if name in call})
    output = FusedEncoder.forward(model, cast(Tensor, rows), plan=plan)
    if "pooler" in model._modules:
        output["pooler_output"] = None if model.pooler is None else model.pooler(output[0])
    return output


def _introduce(family: Family) -> None:
    """Makes a fused base model known to transformers, and tries whether its encoder can be given a plan.

    transformers records hidden states only of classes it has seen constructed, and a model that `fuse` or unpickling
    made one of this class was not constructed as one.
    """
    with torch.device("meta"):
        model = family.fused[family.base](family.config(**family.sizes))
    if family.run is None and not family.loops and (why := hands_nothing_on(model, family)) is not None:
        family.unsupported = why
        name = family.base.__name__
        warnings.warn(f"fastbert runs {name} on its stock code: {why}", RuntimeWarning, stacklevel=4)


def _masked_lm(family: Family, kind: Any, module: str, vocabulary: Callable[..., Vocabulary]) -> type[nn.Module]:
    """A masked language model which can return its loss alone; with a loss over the next sentence, too, or without."""
    orders = "next_sentence_label" in parameter_names(kind)

    @functools.wraps(kind.forward)
    @can_return_tuple
    def forward(self: PreTrainedModel, *args: object, **kwargs: object) -> object:
        call, found = named_arguments(kind, args, kwargs), vocabulary(self)
        if orders and call.get("next_sentence_label") is None:
            return kind.forward(self, *args, **kwargs)
        if not takes_labelled_rows(self, found, call):
            return kind.forward(self, *args, **kwargs)
        labels, order_labels = call.pop("labels"), call.pop("next_sentence_label", None)
        outputs = self.base_model(**call)
        loss = labelled_loss(found, outputs.last_hidden_state, labels)
        if not orders:
            return MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states)
        order = self.cls.seq_relationship(outputs.pooler_output)
        return getattr(family.code, f"{kind.__name__}Output")(
            loss=loss + nn.functional.cross_entropy(order.view(-1, 2), order_labels.view(-1)),
            seq_relationship_logits=order,
            hidden_states=outputs.hidden_states,
        )

    return _derive(family, kind, module, FusedModel, forward=forward)


def run_as_bert(output: type[ModelOutput]) -> Callable[..., object]:
    """`Family.run` of base models that call embeddings, encoder and pooler as BERT's, and return an `output`."""

    def run(model: Any, call: Mapping[str, object], plan: Plan) -> object:
        given = {name: call[name] for name in model.embeds if name in call}
        found = model.encoder(model.embeddings(**given), plan=plan)
        hidden_states, *more = found.to_tuple()
        pooled = None if model.pooler is None else model.pooler(hidden_states)
        whole = call.get("return_dict")
        if not (model.config.return_dict if whole is None else whole):
            return hidden_states, pooled, *more
        return output(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    return run


def predictions(model: PreTrainedModel) -> Vocabulary:
    """The vocabulary head of BERT and of its kin."""
    found = model.cls.predictions
    return Vocabulary(found.transform, found.decoder, (model.cls, found))


def lm_head(model: PreTrainedModel) -> Vocabulary:
    """The vocabulary head of RoBERTa and its kin, of MPNet, and of ESM, whose decoder has no bias."""
    found = model.lm_head
    code = sys.modules[type(found).__module__]  # which has a function of its own
    bias = found.bias if getattr(found.decoder, "bias", found) is None else None
    return Vocabulary(lambda x: found.layer_norm(code.gelu(found.dense(x))), found.decoder, (found,), bias=bias)
