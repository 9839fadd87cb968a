"""`attention_maps`: what chosen layers and heads of a fused model attend to, without the maps of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fuse import base_models
from .runtime.readers import Maps, parameter_names
from .runtime.registry import family_of, has_fused_encoder, stack_of
from .runtime.support import is_hooked

REDUCTIONS = (None, "mean", "rollout")


@overload
def attention_maps(
    model: nn.Module,
    inputs: Mapping[str, Tensor | None],
    layers: Sequence[int] | None = ...,
    heads: Sequence[int] | None = ...,
    reduce: Literal["mean"] | None = ...,
) -> dict[int, Tensor]: ...


@overload
def attention_maps(
    model: nn.Module,
    inputs: Mapping[str, Tensor | None],
    layers: Sequence[int] | None = ...,
    heads: Sequence[int] | None = ...,
    *,
    reduce: Literal["rollout"],
) -> Tensor: ...


def attention_maps(
    model: nn.Module,
    inputs: Mapping[str, Tensor | None],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    reduce: str | None = None,
) -> dict[int, Tensor] | Tensor:
    """The attention maps of chosen layers and heads: of every token, what it gives to each token of its sequence.

    Computed from a forward of the base model, packed where it can be, up to the last of these layers; never are more
    maps held than those returned and one layer's. Within the numerical policy they are what stock's eager attention
    returns, whatever attention the model is set to. Without gradients.

    Args:
        model: a Hugging Face model that `fuse` was applied to, a base model or one with a head; the head isn't run. Of
            what stands around one (PEFT, a SentenceTransformer), give the model inside.
        inputs: arguments of its base model by name, as a tokenizer gives them: input_ids (B, S), attention_mask and
            their like.
        layers: which, from 0 on; one that is called several times counts each time. None: all.
        heads: which of each of these layers, from 0 on, in the order wanted. None: all.
        reduce: None; "mean" over these heads; or "rollout" through these layers: of each the mean over heads plus the
            identity, its rows normalised to sum one, multiplied from the first to the last (Abnar and Zuidema, 2020,
            https://arxiv.org/abs/2005.00928).

    Returns:
        By layer, in ascending order, maps (B, heads, S, S) in the dtype of the model, or their means (B, S, S); or the
        rollout alone, (B, S, S) float32. Rows of real tokens sum to one; rows and columns of padding are zeros.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `inputs` no mapping.
        ValueError: `model` is not fused, is in training mode, or holds no base model or several; `inputs` has what the
            base model doesn't take, or of the wrong shape, dtype, device or range; `layers`, `heads` or `reduce` names
            what there isn't.
        RuntimeError: this call, or one of these layers, runs stock; the reason is that of `explain`.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
    base = _base_of(model)
    call = _arguments(base, inputs)
    wanted = _chosen("layers", layers, len(stack_of(base).calls))
    some = None if heads is None else _chosen("heads", heads, base.config.num_attention_heads)
    found: dict[int, Tensor] = {}
    rolled: list[Tensor] = []

    def take(layer: int, maps: Tensor, key_mask: Tensor | None) -> None:
        if key_mask is not None:  # dense: rows of padding attend, too
            maps.masked_fill_(~key_mask[:, None, :, None], 0.0)
        if reduce is None:
            found[layer] = maps
        elif reduce == "mean":
            found[layer] = maps.mean(1, dtype=torch.float32).to(maps.dtype)
        else:
            mean = maps.mean(1, dtype=torch.float32)
            mean.diagonal(dim1=1, dim2=2).add_(1.0)
            mean /= mean.sum(2, keepdim=True)
            rolled[:] = [mean @ rolled[0] if rolled else mean]

    # Who watches the model is to see all of a forward, or nothing that is wrong.
    alone = not any(map(is_hooked, base.modules()))
    with torch.no_grad():
        base(**call, told=True, maps=Maps(frozenset(wanted), some, take, alone))
    if not rolled and found.keys() != set(wanted):
        raise RuntimeError("attention maps can't be computed of this call, which runs stock: see fastbert.explain")
    if reduce != "rollout":
        return found
    mask = call.get("attention_mask")
    return rolled[0] if mask is None else rolled[0].masked_fill_(~mask.bool()[:, :, None], 0.0)


def _base_of(model: nn.Module) -> PreTrainedModel:
    """The base model; raises ValueError as `attention_maps` says of its model."""
    found = base_models(model)
    name = type(model).__name__
    if len(found) != 1:
        raise ValueError(f"model: this {name} holds {len(found)} encoders of supported families; expected one")
    _, base, family = found[0]
    assert isinstance(base, PreTrainedModel)
    if model is not base and not (isinstance(model, PreTrainedModel) and model.base_model is base):
        raise ValueError(f"model is a {name} around a {type(base).__name__}; give the Hugging Face model inside of it")
    if not has_fused_encoder(base) or type(base).forward is not family.fused[family.base].forward:
        raise ValueError(f"model: this {name} is not fused; call fastbert.fuse on it first")
    if base.training:
        raise ValueError(f"model: this {name} is in training mode, in which dropout changes maps; call model.eval()")
    return base


def _arguments(base: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are given; raises as `attention_maps` says of its inputs."""
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs is of type {type(inputs).__name__}; expected a mapping from arguments' names to tensors"
        )
    call = {name: value for name, value in inputs.items() if value is not None}
    names = [*family_of(base).ids, "inputs_embeds", "attention_mask"]
    taken = [name for name in names if name in parameter_names(family_of(base).base)]
    if unknown := call.keys() - set(taken):
        raise ValueError(f"inputs has {', '.join(sorted(unknown))}; {type(base).__name__} takes {', '.join(taken)}")
    if ("input_ids" in call) == ("inputs_embeds" in call):
        raise ValueError("inputs has both input_ids and inputs_embeds, or neither; expected one of the two")
    return call


def _chosen(name: str, given: Sequence[int] | None, number: int) -> list[int]:
    """`given`, or all of them; raises ValueError as `attention_maps` says of layers and heads."""
    if given is None:
        return list(range(number))
    chosen = list(given)
    whole = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < number for one in chosen)
    if not chosen or not whole or len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} is {given!r}; expected different integers from 0 to {number - 1}")
    return chosen
