"""Texts through a model of sentence-transformers, in batches of about as many tokens, each tokenised while one runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..explain import explain
from ..flatten import flatten
from ..fuse import base_models
from ..runtime.readers import HOLDS, HOOKS
from .batches import batch_tokens_on, batches_of

BYTES_PER_TOKEN = 4
"""Of UTF-8: about what English has. Chinese has 3 or fewer, and batches that are larger by a third."""

Features = dict[str, object]
"""What `preprocess` of sentence-transformers makes of texts."""
_OURS = ("batch_size", "pool", "chunk_size")


def encode(
    model: Any,
    inputs: Sequence[object],
    *,
    call: str | None = None,
    batch_tokens: int | None = None,
    show_progress_bar: bool = False,
    **options: object,
) -> Any:
    """What `model.encode(inputs, **options)` returns, in batches of about as many tokens, tokenised one ahead.

    The longest texts come first, and a thread tokenises the next batch while the model runs one. What is computed of a
    text is what the model's own method computes of it, to within the rounding that a batch of another size brings. The
    vocabulary head and the pooling of a fused SparseEncoder are computed of real tokens alone, too.

    Args:
        model: a SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder of sentence-transformers, fused
            or not. While this runs no other thread may use its tokenizer.
        inputs: texts, or pairs of texts; one alone goes to the model's own method.
        call: the method: "encode", "encode_query", "encode_document", "predict". Default: "predict" of a CrossEncoder,
            "encode" of others.
        batch_tokens: about how many tokens a forward takes, by the bytes of its texts; default: 65,536 on a GPU and
            2,048 on a CPU.
        show_progress_bar: whether a bar on standard error counts the inputs that are done.
        **options: of the method, as `normalize_embeddings` or `prompt_name`; `device` is one device.

    Returns:
        As the method: an array or a tensor (len(inputs), ...), or a list, in the order of `inputs`.

    Raises:
        TypeError: `model` is of another library; `inputs` holds what is no text; an option is one of `batch_size`,
            `pool` and `chunk_size`, or `device` is a list; `precision` is "int8" or "uint8", which quantizes by the
            ranges of all embeddings of a call: that is for `quantize_embeddings` of sentence-transformers.
        ValueError: `batch_tokens` is less than 1, or the model has no method `call`.
    """
    if not hasattr(model, "preprocess") or not hasattr(model, "is_singular_input"):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected a SentenceTransformer, CrossEncoder, SparseEncoder or "
            "MultiVectorEncoder of a sentence-transformers that has `preprocess`"
        )
    call = call or ("predict" if hasattr(model, "predict") else "encode")
    if not callable(getattr(model, call, None)):
        raise ValueError(f"call is {call!r}; expected the name of a method of {type(model).__name__}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
    for name in _OURS:
        if name in options:
            raise TypeError(f"{name} is given; expected batch_tokens, or a call of the model's own {call}")
    if options.get("precision") in ("int8", "uint8"):
        raise TypeError(
            f"precision is {options['precision']!r}, by the ranges of all embeddings; expected none, and "
            "sentence_transformers.util.quantize_embeddings of the result"
        )
    if isinstance(options.get("device"), list):
        raise TypeError(f"device is a list; expected one device, or a call of the model's own {call}")
    if model.is_singular_input(inputs) or not len(inputs):
        return getattr(model, call)(inputs, **options, show_progress_bar=False)
    texts = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    lengths = np.array([_estimate(text, i) for i, text in enumerate(texts)])
    longest = getattr(model, "max_seq_length", None)
    if longest and longest < lengths.max():  # a tokenizer without a limit says one that no array holds
        lengths = np.minimum(lengths, longest)
    device = torch.device(str(options.get("device") or model.device))
    chosen = list(batches_of(lengths, batch_tokens or batch_tokens_on(device)))
    masked = _fused_masked_lm(model)
    if len(chosen) == 1 and masked is None:  # nothing to tokenise ahead
        return getattr(model, call)(texts, batch_size=len(texts), show_progress_bar=show_progress_bar, **options)
    model.eval()  # as the method does
    parts = []
    with (
        ThreadPoolExecutor(1, "fastbert-tokenise") as thread,
        tqdm(total=len(texts), disable=not show_progress_bar) as bar,
    ):
        lay_out = None if masked is None else functools.partial(_without_padding, masked)
        ahead = _Ahead(model.preprocess, [[texts[i] for i in rows] for rows in chosen], thread, lay_out)
        view = copy.copy(model)  # the same modules
        view.__dict__.pop(HOLDS, None)  # of what may hold the base model the original is looked at, not this
        view.preprocess = ahead
        for batch in ahead.batches:
            parts.append(getattr(view, call)(batch, batch_size=len(batch), show_progress_bar=False, **options))
            bar.update(len(batch))
    return _in_order(parts, np.argsort(np.concatenate(chosen)))


def _estimate(text: object, i: int) -> int:
    """About how many tokens a text or a pair has."""
    parts = text if isinstance(text, (tuple, list)) else (text,)
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"inputs[{i}] has a {type(part).__name__}; expected texts, or pairs of texts")
    return sum(2 + len(part.encode(errors="replace")) // BYTES_PER_TOKEN for part in parts)


def _fused_masked_lm(model: nn.Module) -> nn.Module | None:
    """Of a fused SparseEncoder its masked language model, if that and the pooling can be called without padding.

    As sentence-transformers calls them where it unpads itself. Not where code of others would see that: a hook, say.
    """
    parts = list(model.children())
    if [type(part).__name__.removeprefix("MLM") for part in parts] != ["Transformer", "SpladePooling"]:
        return None
    (transformer, pooling), found = parts, base_models(model)
    masked = getattr(transformer, "model", None)
    if len(found) != 1 or not isinstance(masked, nn.Module) or getattr(masked, "base_model", None) is not found[0][1]:
        return None
    own = type(masked).__name__.endswith("ForMaskedLM") and type(masked).__module__.startswith(_OWNERS)
    takes = hasattr(pooling, "_forward_flattened") and getattr(transformer, "model_forward_params", ()) is None
    _, base, family = found[0]
    if not own or not takes or family.embeds_padded or family.run is not None:
        return None
    for module in (model, transformer, masked, base):
        if module._compiled_call_impl is not None or not set(HOOKS).issuperset(module._forward_pre_hooks.values()):
            return None
    with torch.inference_mode():
        (told,) = explain(model).encoders
    return None if told.reason or told.layers or told.dense or told.outside else masked


_OWNERS = ("transformers.", __name__.partition(".")[0] + ".")
"""Whose heads hand cumulative lengths on to their base models."""


def _without_padding(masked: nn.Module, features: Features) -> Features:
    """Features as `flatten` lays them out; as they are where a text has no token, or other tensors are by the text."""
    ((_, _, family),) = base_models(masked)
    names = ("attention_mask", *family.ids)
    batch = {name: value for name, value in features.items() if name in names and isinstance(value, Tensor)}
    rest = {name: value for name, value in features.items() if name not in batch}
    mask = batch.get("attention_mask")
    if mask is None or any(isinstance(value, Tensor) for value in rest.values()) or not bool(mask.any(1).all()):
        return features
    return {**rest, **flatten(masked, batch)}


class _Ahead:
    """In the place of `model.preprocess`: what was tokenised ahead.

    The first batch is tokenised as it is asked for, which tells the arguments that the method gives; the others with
    the same, each as the one before is handed out.
    """

    def __init__(
        self,
        preprocess: Callable[..., Features],
        batches: list[list[object]],
        thread: ThreadPoolExecutor,
        lay_out: Callable[[Features], Features] | None = None,
    ) -> None:
        self.lay_out = lay_out
        self.preprocess, self.batches, self.thread = preprocess, batches, thread
        self.next = 0
        self.made: Future[Features] | None = None
        self.options: dict[str, object] = {}

    def __call__(self, inputs: list[object], **options: object) -> Features:
        features = None
        batch = self.batches[self.next]
        if self.made is not None:
            made = self.made.result()
            if options == self.options:
                features = _as_asked(made, batch, inputs)
        if features is None:
            features = self.preprocess(inputs, **options)
        self.next, self.options, self.made = self.next + 1, options, None
        if self.next < len(self.batches):
            self.made = self.thread.submit(self.preprocess, self.batches[self.next], **options)
        return features if self.lay_out is None else self.lay_out(features)


def _as_asked(features: Features, batch: list[object], inputs: list[object]) -> Features | None:
    """Features of `batch` in the order of `inputs`, which the method has sorted; None where that can't be made."""
    where = {id(text): i for i, text in enumerate(batch)}
    order = [where.get(id(text), -1) for text in inputs]
    if order == list(range(len(batch))):
        return features
    by_rows = all(value.shape[:1] == (len(batch),) for value in features.values() if isinstance(value, Tensor))
    if -1 in order or len(order) != len(batch) or not by_rows:
        return None
    return {name: value[order] if isinstance(value, Tensor) else value for name, value in features.items()}


def _in_order(parts: list[Iterable[object]], order: np.ndarray) -> object:
    """The results of all batches, put back."""
    if arrays := [part for part in parts if isinstance(part, np.ndarray)]:
        return np.concatenate(arrays)[order]
    if tensors := [part for part in parts if isinstance(part, Tensor)]:
        return torch.cat(tensors).index_select(0, torch.from_numpy(order).to(tensors[0].device))
    rows = [row for part in parts for row in part]
    return [rows[i] for i in order]
