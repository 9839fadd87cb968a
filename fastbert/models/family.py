"""How an adapter makes the fused classes of its family: subclasses of transformers' own, under the same names.

Same names because transformers and accelerate look classes up by `__name__` (which blocks not to split over devices,
what to wrap), and because a saved config records them. An adapter is a module with what `fuse` reads:

BASE, ENCODER: the stock classes of the base model, and of its stack of layers.
CLASSES: which fused class takes the place of which stock one, in the base model.
HEADS: for every head, what it reads of the base model's output (`fastbert.runtime.readers`). One that is not listed
    may read padding: then calls are dense.
PARTS: what heads, and the pooler, are made of, where that is the family's own: each row from the same row alone.
LOSS_HEADS: heads that can return their loss alone, and the fused classes that do.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from ..fuse import FusedModel
from ..layers.layer import FusedEmbeddings, FusedLayer, Shape
from ..runtime import known
from ..runtime.encoder import FusedEncoder, check_taken, plan_call
from ..runtime.graphs import Stale
from ..runtime.readers import named_arguments, parameter_names
from ..runtime.support import encoder_of
from .heads import Vocabulary, labelled_loss, takes_labelled_rows

T = TypeVar("T", bound=nn.Module)


def _called(kind: Any) -> tuple[str, ...]:
    """The methods of a class that its forward calls."""
    return tuple(name for name in known.methods_used(kind) if name != "forward")


def _derive(kind: type[T], module: str, mixin: type, **attributes: Any) -> type[T]:
    about: dict[str, Any] = {"__module__": module, "__doc__": f"transformers' {kind.__name__}, fused."}
    about.update(family=module, called=_called(kind))
    return type(kind.__name__, (mixin, kind), {**about, **attributes})


def layer(
    kind: type[T], module: str, kinds: dict[tuple[str, ...], type[nn.Module]], shape: Shape | None = None
) -> type[T]:
    """The fused layer of a family; `kinds` and `shape` as `FusedLayer` has them."""
    return _derive(kind, module, FusedLayer, kinds=kinds, shape=Shape() if shape is None else shape)


def bert_like(hf: Any, name: str) -> dict[tuple[str, ...], type[nn.Module]]:
    """`FusedLayer.kinds` of a family whose classes are BERT's after renaming: in module `hf`, beginning with `name`."""
    paths = {
        ("attention",): "Attention",
        ("attention", "self"): "SelfAttention",
        ("attention", "output"): "SelfOutput",
        ("intermediate",): "Intermediate",
        ("output",): "Output",
    }
    return {path: getattr(hf, name + end) for path, end in paths.items()}


def encoder(kind: type[T], module: str, **attributes: Any) -> type[T]:
    """The fused stack of layers of a family; `attributes` are those of `FusedEncoder` that differ."""
    return _derive(kind, module, FusedEncoder, **attributes)


def embeddings(kind: Any, module: str) -> Any:
    """The fused embeddings of a family."""
    return _derive(kind, module, FusedEmbeddings, names=parameter_names(kind))


def base_model(kind: Any, module: str, embeddings: Any, own: Callable[..., Any] | None = None) -> Any:
    """The fused base model of a family.

    Args:
        kind: the stock one.
        module: the adapter's name.
        embeddings: the class of its embeddings, fused or, where there is none, stock.
        own: its forward, where the stock one hands no plan on to the encoder.
    """
    names = parameter_names(kind)
    stock = embeddings.__bases__[-1] if issubclass(embeddings, FusedEmbeddings) else embeddings

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        planned, named = plan_call(self, names, args, kwargs)
        if torch.compiler.is_compiling():
            output = kind.forward(self, *planned, **named)
        else:
            try:
                output = kind.forward(self, *planned, **named)
            except Stale:
                planned, named = plan_call(self, names, args, kwargs, assumes=False)
                output = kind.forward(self, *planned, **named)
        check_taken(self, named.get("plan"))
        return output

    planned_forward = forward if own is None else own

    @functools.wraps(kind.forward)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = None if torch.compiler.is_compiling() else getattr(encoder_of(self), "fastbert", None)
        if settings is None:
            return planned_forward(self, *args, **kwargs)
        threads, thread = settings.running.threads, threading.get_ident()
        threads.append(thread)  # before there is a plan: `unfuse` waits for who has one
        try:
            return planned_forward(self, *args, **kwargs)
        finally:
            threads.remove(thread)

    attributes = {"own_embeddings": (stock, stock.forward, embeddings, _called(stock))}
    return _derive(kind, module, FusedModel, forward=noted, **attributes)


def introduce(model: Any, config: type[Any], probes: bool = True) -> None:
    """Makes a fused base model known to transformers; at the end of its adapter, from where `fuse` takes the rest.

    It records hidden states only of classes it has seen constructed, and a model that `fuse` or unpickling made one of
    this class was not constructed as one. With `probes` it also tries, on the meta device, whether the stock forward
    hands on to its encoder what it is given by names it doesn't know, as a plan is; if not, none of the family is
    fused, and a warning says so.
    """
    family = sys.modules[model.__module__]
    kinds = [kind for fused in family.CLASSES.values() for kind in getattr(fused, "kinds", {}).values()]
    known.keep(family.__name__, family.hf, (*family.CLASSES, *kinds))
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        one = model(config(**sizes, pad_token_id=0))
    if probes and (why := hands_nothing_on(one)) is not None:
        model.unsupported = why
        warnings.warn(f"fastbert runs {model.__name__} on its stock code: {why}", RuntimeWarning, stacklevel=3)


def hands_nothing_on(model: Any) -> str | None:
    """Why a base model on the meta device can't be given a plan: its stock forward keeps it from its encoder.

    None, too, where that can't be tried: then `check_taken` finds it, in a call.
    """
    seen: list[Any] = []
    stock: Any = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    hook = encoder_of(model).register_forward_pre_hook(
        lambda encoder, args, kwargs: seen.append(kwargs.get("plan")), with_kwargs=True
    )
    error: Exception | None = None
    try:
        with torch.no_grad():
            stock.forward(model, input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), plan="of a probe")
    except Exception as raised:  # whatever it raises: it looked at values, which there are none of, or takes no names
        error = raised
    finally:
        hook.remove()
    if seen == ["of a probe"] or (not seen and not isinstance(error, TypeError)):
        return None
    kind, version = stock.__name__, transformers.__version__
    why = "" if error is None else f": {error}"
    return f"the {kind} of transformers {version} does not hand its keyword arguments on to its encoder{why}"


def head(kind: type[T], module: str) -> type[T]:
    """A model with a head, fused from construction or `from_pretrained` on."""
    return _derive(kind, module, FusedModel)


def masked_lm(kind: Any, module: str, vocabulary: Callable[[Any], Vocabulary]) -> Any:
    """A masked language model which can return its loss alone; `vocabulary` gives the head of one."""

    @functools.wraps(kind.forward)
    @can_return_tuple
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call, found = named_arguments(kind, args, kwargs), vocabulary(self)
        if not takes_labelled_rows(self, found, call):
            return kind.forward(self, *args, **kwargs)
        labels = call.pop("labels")
        outputs = self.base_model(**call)
        loss = labelled_loss(found, outputs.last_hidden_state, labels)
        return MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states)

    return _derive(kind, module, FusedModel, forward=forward)


def pre_training(kind: Any, module: str, output: type[Any]) -> Any:
    """BERT's pre-training model, a masked language model that predicts the next sentence, too; the same."""

    @functools.wraps(kind.forward)
    @can_return_tuple
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call, found = named_arguments(kind, args, kwargs), predictions(self)
        if call.get("next_sentence_label") is None or not takes_labelled_rows(self, found, call):
            return kind.forward(self, *args, **kwargs)
        labels, next_sentence_label = call.pop("labels"), call.pop("next_sentence_label")
        outputs = self.base_model(**call)
        order = self.cls.seq_relationship(outputs.pooler_output)
        order_loss = nn.functional.cross_entropy(order.view(-1, 2), next_sentence_label.view(-1))
        return output(
            loss=labelled_loss(found, outputs.last_hidden_state, labels) + order_loss,
            seq_relationship_logits=order,
            hidden_states=outputs.hidden_states,
        )

    return _derive(kind, module, FusedModel, forward=forward)


def predictions(model: Any) -> Vocabulary:
    """The vocabulary head of BERT and of ERNIE."""
    found = model.cls.predictions
    return Vocabulary(found.transform, found.decoder, (model.cls, found))


def lm_head(model: Any) -> Vocabulary:
    """The vocabulary head of RoBERTa and its kin."""
    found = model.lm_head
    return Vocabulary(lambda x: found.layer_norm(nn.functional.gelu(found.dense(x))), found.decoder, (found,))
