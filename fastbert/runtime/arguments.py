"""Checks of the arguments of a call: an error that names the argument, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.embeddings import first_position, longest_sequence
from .packing import has_values, host_integers
from .registry import embeddings_of, family_of, table_of
from .support import (
    CACHES,
    is_transformed,
)


def shape_of(call: Mapping[str, Any]) -> tuple[int, int]:
    ids = call.get("input_ids")
    shape = ids.shape if ids is not None else call["inputs_embeds"].shape[:2]
    return shape[0], shape[1]  # not by int(), which would fix them in a graph


def check_arguments(model: nn.Module, call: Mapping[str, Any], foreign: bool) -> None:
    """Raises ValueError naming the first argument that is of the wrong shape, dtype, device or range.

    What embeddings that aren't the family's own take is for them to say.
    """
    if foreign:
        if call.get("cu_seq_lens_q") is not None:
            _check_flattened(call, shape_of(call)[0])
        return
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    given = "input_ids" if ids is not None else "inputs_embeds"
    values = call[given]
    if not isinstance(values, Tensor):
        raise ValueError(f"{given} is of type {type(values).__name__}; expected a torch.Tensor")
    if values.dim() != (2 if ids is not None else 3):
        expected = "(batch, tokens)" if ids is not None else "(batch, tokens, hidden)"
        raise ValueError(f"{given} has shape {tuple(values.shape)}; expected {expected}")
    batch, seqlen = shape_of(call)
    if not batch or not seqlen:
        raise ValueError(f"{given} has shape {tuple(values.shape)}; expected at least one sequence of one token")
    embeddings, names = embeddings_of(model), family_of(model).ids
    tables = embeddings.__dict__["_modules"]
    width = table_of(embeddings, next(iter(names.values()))).embedding_dim
    if embeds is not None and embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds has width {embeds.shape[2]}; expected that of the embeddings, {width}")
    for name, table in names.items():
        if call.get(name) is not None and (not table or table in tables):
            _check_ids(name, call[name], (batch, seqlen), table_of(embeddings, table))
    if any(call.get(name) is not None for name in CACHES):
        return  # a cache changes which lengths are right
    longest = longest_sequence(model)
    if call.get("position_ids") is None and longest is not None:
        _check_length(embeddings, longest, ids, given, seqlen)
    _check_mask(call.get("attention_mask"), (batch, seqlen))
    if call.get("cu_seq_lens_q") is not None:
        _check_flattened(call, batch)


def _check_length(embeddings: Any, longest: int, ids: Tensor | None, given: str, seqlen: int) -> None:
    first = first_position(embeddings)
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
        raise ValueError(f"{name} is of type {type(ids).__name__}; expected a torch.Tensor")
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


def _check_mask(mask: object, shape: tuple[int, int]) -> None:
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
                f"{name}: expected a 1-D int32 tensor of cumulative lengths, from 0 to the number of tokens; "
                "the same for queries and keys"
            )
