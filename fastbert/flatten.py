"""`flatten`: a padded batch as one row of its real tokens, for outputs without padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .fuse import base_models
from .layers.embeddings import default_positions
from .runtime.packing import pack_mask
from .runtime.registry import embeddings_of, family_of, has_fused_encoder


def flatten(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor | int]:
    """A padded batch as the flattened call of transformers takes it: one row of all real tokens.

    `model(**fastbert.flatten(model, batch)).last_hidden_state[0]` is (T, hidden), T the number of real tokens; those of
    sequence i are rows `cu_seq_lens_q[i]` to `cu_seq_lens_q[i + 1]`. Each token keeps the position it has in the
    padded call. Synchronises with the device once.

    Args:
        model: a fused base model, or one with a head for tokens.
        batch: what a tokenizer returns: `input_ids` (B, S), and any of `attention_mask` (B, S), which is 1 at real
            tokens (default: all are), `token_type_ids` and `position_ids` (B, S) or (1, S), integers on one device.

    Returns:
        `input_ids` and `position_ids`, and what else was given, (1, T); `cu_seq_lens_q` and `cu_seq_lens_k`, (B + 1,)
        int32; `max_length_q` and `max_length_k`, int.

    Raises:
        ValueError: `model` holds no base model that is fused, or several, or a head that does not hand on where
            sequences begin (MPNet's and DeBERTa's); `batch` holds other names or shapes; a sequence has no real token;
            one has padding between real tokens, and the model attends by distance.
    """
    fused = [base for _, base, _ in base_models(model) if has_fused_encoder(base)]
    if len(fused) != 1:
        raise ValueError(f"model holds {len(fused)} fused base models; expected one: fastbert.fuse(model) comes first")
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        told = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
        raise ValueError(f"input_ids: {told}; expected a tensor (batch, tokens)")
    family = family_of(fused[0])
    if family.run is not None and any(isinstance(each, (*family.heads, *family.others)) for each in model.modules()):
        name = type(fused[0]).__name__
        raise ValueError(f"model holds a head that hands its {name} no cumulative lengths; expected the base model")
    names = [name for name in family.ids if name != "input_ids"]
    if odd := sorted(set(batch) - {"input_ids", "attention_mask", *names}):
        raise ValueError(f"batch holds {', '.join(odd)}; expected input_ids, attention_mask, {', '.join(names)}")
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(ids.shape)}")
    tables: dict[str, Tensor] = {"input_ids": ids, **{name: batch[name] for name in names if name in batch}}
    if "position_ids" in names and "position_ids" not in tables:
        tables["position_ids"] = default_positions(embeddings_of(fused[0]), ids, ids.shape[1]).to(ids.device)
    for name, values in tables.items():
        if tuple(values.shape) not in (tuple(ids.shape), (1, ids.shape[1])):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {tuple(ids.shape)}")
    selection = pack_mask(mask.bool())
    starts, longest, indices = selection.packing.cu_seqlens, selection.packing.max_seqlen, selection.packing.indices
    assert starts is not None
    assert indices is not None
    if family.embeds_padded:
        raise ValueError("model has embeddings that read the mask of each sequence; expected a padded call")
    if selection.has_holes and family.tables is not None:
        raise ValueError(
            "attention_mask has padding between real tokens; expected it at the ends: this model goes by the distance "
            "of tokens, and a flattened call has no room between them"
        )
    if not bool((starts[1:] > starts[:-1]).all()):
        raise ValueError("attention_mask has a row without a real token; expected one at least")
    rows = {name: values.expand_as(ids).flatten().index_select(0, indices)[None] for name, values in tables.items()}
    return {
        **rows,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
