"""From tokens to embeddings: what a folder says of pooling, the fused model, and vectors of its rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints import load_base, load_pipeline, pipeline_kind
from ..explain import explain
from ..fuse import Precision, base_models, fuse
from ..layers.embeddings import first_position, longest_sequence
from ..runtime.registry import embeddings_of
from ..usage import UsageError, in_a_line, refused
from .batches import batches_of
from .encode import encode
from .rows import Text
from .shards import TokenVectors
from .tokens import Tokens

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer
    from transformers import PreTrainedTokenizerBase

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "lasttoken")
# As sentence-transformers has them in the config of its pooling.
_NAMES = {"mean_sqrt_len_tokens": "mean_sqrt_len"}
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Recipe:
    """How texts become embeddings."""

    pooling: str = "mean"
    normalize: bool = False
    prompt: str = ""
    max_length: int | None = None


def read_recipe(folder: Path) -> Recipe:
    """What a sentence-transformers folder says; the defaults of a plain checkpoint, which has no modules.json.

    Raises:
        UsageError: it has modules or a pooling that `embed` has not.
    """

    def load(*path: str) -> Any:
        name = os.path.normpath(os.path.join(*path))
        if os.path.isabs(name) or name.startswith(".."):
            raise UsageError(f"{folder}: names a file outside of it, {name}; expected names inside", "model")
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    modules = load("modules.json")
    if not modules:
        return Recipe()
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UsageError(
            f"{folder}: has modules {', '.join(kinds)}; expected Transformer, Pooling [, Normalize]", "model"
        )
    config = load(modules[1]["path"], "config.json")
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    pooling = _NAMES.get(modes[0], modes[0])
    if len(modes) > 1 or pooling not in POOLINGS or config.get("include_prompt") is False:
        raise UsageError(
            f"{folder}: pools by {config}; expected one of {', '.join(POOLINGS)}, prompt included", "model"
        )
    whole = load("config_sentence_transformers.json")
    prompt = (whole.get("prompts") or {}).get(whole.get("default_prompt_name"), "") or ""
    longest = load("sentence_bert_config.json").get("max_seq_length")
    if not isinstance(longest, int | None):
        raise TypeError(f"max_seq_length is {longest!r}")
    return Recipe(pooling, len(kinds) > 2, prompt, longest)


def pool(rows: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """One vector of each sequence.

    Args:
        rows: (T, H), of sequences end to end.
        cu_seqlens: (B + 1,) cumulative lengths; no sequence is empty.
        how: one of POOLINGS.

    Returns:
        (B, H) float32.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if how in ("cls", "lasttoken"):
        return rows[starts if how == "cls" else ends - 1].float()
    lengths = ends - starts
    reduced = torch.segment_reduce(rows.float(), "max" if how == "max" else "sum", lengths=lengths)
    if how == "max":
        return reduced
    divisor = lengths.float() if how == "mean" else lengths.float().sqrt()
    return reduced / divisor[:, None]


class Encoder:
    """A fused base model that embeds texts laid end to end."""

    makes = "embedding"

    def __init__(self, model: PreTrainedModel, recipe: Recipe, batch_tokens: int) -> None:
        self.model, self.recipe, self.batch_tokens = model, recipe, batch_tokens
        self.prompt, self.dtype = recipe.prompt, model.dtype
        self.first = first_position(embeddings_of(model))

    def batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        return batches_of(lengths, self.batch_tokens)

    @torch.inference_mode()
    def __call__(self, tokens: Tokens, texts: Sequence[Text] = ()) -> np.ndarray:
        """(texts, H) float32, from their tokens alone."""
        begins = np.concatenate([[0], tokens.lengths.cumsum()])
        result = np.empty((len(tokens.lengths), self.model.config.hidden_size), np.float32)
        device = self.model.device
        rows = self.model.get_input_embeddings().num_embeddings
        if (largest := int(tokens.ids.max(initial=0))) >= rows:
            raise UsageError(f"has a tokenizer that gives token {largest}, and embeddings of 0 to {rows - 1}", "model")
        for chosen in self.batches(tokens.lengths):
            lengths = tokens.lengths[chosen]
            cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
            positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
            ids = tokens.ids[np.repeat(begins[chosen], lengths) + positions]
            starts = torch.from_numpy(cu_seqlens).to(device)
            longest = int(lengths.max())
            rows = self.model(
                input_ids=torch.from_numpy(ids).long().to(device)[None],
                position_ids=torch.from_numpy(positions + self.first).long().to(device)[None],
                cu_seq_lens_q=starts,
                cu_seq_lens_k=starts,
                max_length_q=longest,
                max_length_k=longest,
            ).last_hidden_state[0]
            pooled = pool(rows, starts, self.recipe.pooling)
            if self.recipe.normalize:
                pooled = nn.functional.normalize(pooled, dim=1)
            result[chosen] = pooled.cpu().numpy()
        return result


class Ranker:
    """A fused CrossEncoder that scores pairs, as its own `predict` does."""

    makes, prompt = "score", ""

    def __init__(self, model: CrossEncoder, batch_tokens: int) -> None:
        self.model, self.batch_tokens, self.dtype = model, batch_tokens, model.dtype

    def __call__(self, tokens: Tokens, texts: Sequence[Text]) -> np.ndarray:
        """(pairs,) float32, or (pairs, labels) where there are several."""
        if not texts:
            return np.empty((0,) if self.model.num_labels == 1 else (0, self.model.num_labels), np.float32)
        found: Tensor = encode(self.model, texts, batch_tokens=self.batch_tokens, convert_to_tensor=True)
        scores: np.ndarray = found.float().cpu().numpy()
        return scores


class LateEncoder:
    """A fused MultiVectorEncoder, for late interaction: vectors of tokens, as its own `encode_document` has them."""

    makes = "embeddings"

    def __init__(self, model: MultiVectorEncoder, prompt: str, batch_tokens: int) -> None:
        self.model, self.prompt, self.batch_tokens, self.dtype = model, prompt, batch_tokens, model.dtype

    def __call__(self, tokens: Tokens, texts: Sequence[Text]) -> TokenVectors:
        """Those of the tokens that are scored: of more or fewer than the texts have, as the model says."""
        found: list[np.ndarray] = encode(
            self.model,
            texts,
            call="encode_document",
            batch_tokens=self.batch_tokens,
            prompt=self.prompt,
            convert_to_numpy=True,
        )
        none = np.empty((0, self.model.get_embedding_dimension() or 0), np.float32)
        starts = np.array([0, *map(len, found)], np.int64).cumsum()
        return TokenVectors(np.concatenate([none, *found], dtype=np.float32), starts)


def load_late(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: str | None,
    prompt: str | None,
    max_length: int | None,
    precision: Precision | None,
) -> tuple[MultiVectorEncoder, str, int]:
    """The fused MultiVectorEncoder of a checkpoint, what goes before every text, and the most tokens of one.

    Raises:
        UsageError: it can't be loaded, would run stock, or doesn't go with what else is given.
    """
    model = cast("MultiVectorEncoder", load_pipeline(path, dtype, device))
    _fused(model, path, precision)
    ((_, base, _),) = base_models(model)
    first = cast("Transformer", model[0])
    own = model.max_seq_length if first.document_length is None else first.document_length
    first.document_length = _limit(longest_sequence(base), own, max_length, tokenizer.num_special_tokens_to_add())
    if prompt is None:  # as `encode_document` chooses it
        names = [name for name in ("document", "passage", "corpus") if name in model.prompts]
        prompt = model.prompts.get(names[0] if names else str(model.default_prompt_name))
    return model, prompt or "", first.document_length


def load_ranker(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: str | None,
    max_length: int | None,
    precision: Precision | None,
) -> tuple[CrossEncoder, int]:
    """The fused CrossEncoder of a checkpoint, and the most tokens of a pair.

    Raises:
        UsageError: it is none, can't be loaded, would run stock, or doesn't go with what else is given.
    """
    if (kind := pipeline_kind(path)) != "CrossEncoder":
        raise UsageError(f"is given with {path}, a {kind}; expected a CrossEncoder", "query_column")
    model = cast("CrossEncoder", load_pipeline(path, dtype, device))
    _fused(model, path, precision)
    ((_, base, _),) = base_models(model)
    limit = _limit(longest_sequence(base), model.max_seq_length, max_length, tokenizer.num_special_tokens_to_add(True))
    model.max_seq_length = limit
    return model, limit


def weights_digest(model: nn.Module) -> str:
    """A hash of names, dtypes and values of all parameters that embeddings come from."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):  # drawn anew in each process where the checkpoint, as of a masked LM, has none
            continue
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how texts become tokens."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    told = json.dumps(sorted(tokenizer.get_vocab().items())) if rust is None else rust.to_str()
    return hashlib.sha256(told.encode()).hexdigest()


def load(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    dtype: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    max_length: int | None = None,
    precision: Precision | None = None,
) -> tuple[PreTrainedModel, Recipe, int]:
    """The fused model of a checkpoint, what is done with its output, and the most tokens of a text.

    What is None is as the folder says.

    Raises:
        UsageError: it can't be loaded, would run stock, or doesn't go with what else is given.
    """
    try:
        recipe = read_recipe(Path(path)) if Path(path).is_dir() else Recipe()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = f"{type(error).__name__}: {in_a_line(error)}"
        raise UsageError(
            f"{path}: its modules are not as sentence-transformers writes them: {told}", "model"
        ) from error
    given: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "prompt": prompt, "max_length": max_length}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    model = load_base(path, dtype, device)
    _fused(model, path, precision)
    ((_, base, family),) = base_models(model)
    if family.embeds_padded:
        told = f"{type(base).__name__} reads the mask of each text, and texts are laid end to end here"
        raise UsageError(f"{path}: {told}; expected another model", "model")
    if tokenizer.cls_token_id is None and recipe.pooling == "cls":
        raise UsageError("cls: the tokenizer has no such token; expected another pooling", "pooling")
    own = recipe.max_length if max_length is None else None
    limit = _limit(longest_sequence(model), own, max_length, tokenizer.num_special_tokens_to_add())
    return model, recipe, limit


def _fused(model: nn.Module, path: str, precision: Precision | None) -> None:
    """Fuses the model of a checkpoint. Raises UsageError where it can't be, or would run stock."""
    with refused(path, "model", ValueError):  # UnsupportedModelError is one
        fuse(model, precision=precision)
    with torch.inference_mode():
        if reason := explain(model).encoders[0].reason:
            raise UsageError(f"{path}: runs stock ({reason}); expected a model that runs fused", "model")


def _limit(longest: int | None, own: int | None, given: int | None, special: int) -> int:
    """The most tokens of a text, by the model's positions, what the folder says, or `given`. Raises UsageError."""
    limits = [each for each in (longest, own if given is None else given) if each is not None]
    if not limits:
        raise UsageError("expected a number of tokens; the model itself has no limit", "max_length")
    if min(limits) <= special:
        raise UsageError(
            f"is {min(limits)}; expected at least {special + 1}, of which {special} are special tokens", "max_length"
        )
    if given is not None and longest is not None and given > longest:
        raise UsageError(f"is {given}; the model has positions for {longest}", "max_length")
    return min(limits)
