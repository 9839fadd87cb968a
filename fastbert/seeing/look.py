"""Looks at one text through a fused model: attributions of its tokens, and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention_maps import attention_maps
from ..usage import UsageError

STEPS = 32
"""Points of a path at which integrated gradients are taken."""


@dataclass(frozen=True)
class Seen:
    """What was found of one text."""

    text: str
    pieces: list[tuple[str, str]]
    """Of every token what stands before it in the text, and what it is: a part of the text, or a special token."""
    special: list[bool]
    scores: list[float]
    """How much each token counts."""
    method: str
    """What `scores` are, in a sentence."""
    maps: dict[int, Tensor]
    """By layer, (heads, S, S) float32 on the CPU."""


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    target: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Seen:
    """Looks at one text.

    Args:
        model: fused, in evaluation mode: a base model, or one with a head. Of a classifier of sequences, attributions
            are integrated gradients of a logit; of all else, the attention rollout of the first token.
        tokenizer: its own.
        text: cut at the model's longest.
        target: the class whose logit is looked at; None: that of the largest.
        layers, heads: as `attention_maps` has them.

    Raises:
        UsageError: there is no class `target`.
        ValueError: as `attention_maps`.
    """
    encoded = tokenizer(text, return_tensors="pt", truncation=True, return_special_tokens_mask=True)
    special = encoded.pop("special_tokens_mask")[0].bool()
    call = {name: value.to(model.device) for name, value in encoded.items()}
    maps = attention_maps(model, call, layers, heads)
    if _classifies(model):
        scores, method = _integrated_gradients(model, tokenizer, call, special, target)
    else:
        if target is not None:
            raise UsageError(f"{target}: this {type(model).__name__} gives no logits of a whole text", "target")
        scores = attention_maps(model, call, reduce="rollout")[0, 0].cpu()
        method = "attention rollout through all layers, of the first token (Abnar and Zuidema, 2020): shares of one"
    pieces = _pieces(tokenizer, text, call["input_ids"][0].tolist(), special.tolist())
    found = {layer: each[0].float().cpu() for layer, each in maps.items()}
    return Seen(text, pieces, special.tolist(), scores.tolist(), method, found)


def _classifies(model: PreTrainedModel) -> bool:
    """Whether a model gives logits of a whole text."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _integrated_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    call: dict[str, Tensor],
    special: Tensor,
    target: int | None,
) -> tuple[Tensor, str]:
    """Of a logit, (S,), along a straight path from padding in place of all tokens that aren't special."""
    ids, others = call["input_ids"], {name: value for name, value in call.items() if name != "input_ids"}
    words = model.get_input_embeddings()
    empty = torch.full_like(ids, tokenizer.pad_token_id or 0)
    with torch.no_grad():
        end = words(ids)
        begin = torch.where(special.to(ids.device)[None, :, None], end, words(empty))
        logits = model(**call).logits[0].float()
    if target is not None and not 0 <= target < len(logits):
        raise UsageError(f"{target}: expected a class from 0 to {len(logits) - 1}", "target")
    chosen = int(logits.argmax()) if target is None else target
    wide = torch.promote_types(end.dtype, torch.float32)
    total = torch.zeros_like(end, dtype=wide)
    for i in range(STEPS):  # one at a time: of the memory of one
        point = (begin + (end - begin) * ((i + 0.5) / STEPS)).requires_grad_()
        with torch.enable_grad():
            logit = model(inputs_embeds=point, **others).logits[0, chosen]
        (gradient,) = torch.autograd.grad(logit, point)
        total += gradient.to(wide) / STEPS
    scores = ((end - begin).to(wide) * total).sum(2)[0].cpu()
    names = getattr(model.config, "id2label", None) or {}
    probability = "" if len(logits) == 1 else f", probability {logits.softmax(0)[chosen].item():.3f}"
    return scores, (
        f"integrated gradients (Sundararajan et al., 2017) of the logit of {names.get(chosen, chosen)!r}: "
        f"{logits[chosen].item():.3f}{probability}; from padding in place of the text, in {STEPS} steps"
    )


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], special: list[bool]
) -> list[tuple[str, str]]:
    """`Seen.pieces`; of a tokenizer that doesn't say where tokens stand, as it names them."""
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    if not tokenizer.is_fast:
        return [(" ", name) for name in names]
    offsets = tokenizer(text, truncation=True, return_offsets_mapping=True)["offset_mapping"]
    found: list[tuple[str, str]] = []
    last, parted = 0, False
    for name, is_special, (start, end) in zip(names, special, offsets, strict=True):
        if is_special or start == end:
            found.append((" " if found else "", name))
            parted = True
            continue
        while start < end and text[start].isspace():  # of a tokenizer whose tokens begin with the space before them
            start += 1
        before = text[last:start] if last <= start else ""
        found.append((before or " " * parted, text[start:end] or name))
        parted = False
        last = max(last, end)
    return found
