"""Packing: how the rows of one forward are laid out, decided once and carried through every layer.

Two layouts run over the same kernels. *Packed* holds the real tokens of all sequences end to end, `(1, T, H)`, with
`cu_seqlens` marking where each begins. *Dense* keeps every row of the padded `(B, S, H)` and masks keys; its decisions
need nothing from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .support import is_fake, is_faked


class Packing(NamedTuple):
    """The layout of one forward.

    A NamedTuple of tensors and integers, so that it travels through module calls, hooks and torch.compile as data.
    """

    batch: int
    """Sequences."""
    seqlen: int
    """Rows a sequence takes in the layout the caller knows: S of (B, S), or T of a flattened (1, T)."""
    max_seqlen: int
    """Length of the longest sequence, in tokens."""
    cu_seqlens: Tensor | None = None
    """(B + 1,) int32, cumulative lengths: where each sequence starts in the packed layout; None: dense."""
    key_mask: Tensor | None = None
    """(B, S) bool, True where a key takes part; dense layout only. None: all take part."""
    indices: Tensor | None = None
    """(T,) int64, rows of the flattened (B * S) padded layout that hold real tokens, in order. None: none dropped."""
    inverse: Tensor | None = None
    """(B * S,) int64, the packed row of each padded row, or -1 where it is padding. None: nothing to unpack."""
    tiles: Tensor | None = None
    """`ops.attention_tiles` of cu_seqlens, by which attention shares out its work. None: as on a CPU, it does not."""

    def positions(self, device: torch.device) -> Tensor:
        """(T,) or (B * S,) int64, the position of every row within its sequence, as the caller knows it."""
        if self.indices is not None:
            return self.indices % self.seqlen
        if self.cu_seqlens is None:
            return torch.arange(self.seqlen, device=device).repeat(self.batch)
        rows = torch.arange(self.seqlen, device=device)
        starts = self.cu_seqlens.to(rows.dtype)
        return rows - starts[torch.bucketize(rows, starts[1:], right=True)]

    def pack(self, rows: Tensor) -> Tensor:
        """(B, S, H) as the caller knows them -> (1, T, H), the real tokens; unchanged where none are dropped."""
        if self.indices is None or self.inverse is None:
            return rows
        return ops.pack(rows.flatten(0, 1), self.indices, self.inverse)[None]

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` as the caller knows them: (1, T, H) -> (B, S, H), zeros at padding; else unchanged."""
        if self.indices is None or self.inverse is None:
            return hidden_states
        device = hidden_states.device  # the last layer's, of a model that is spread over several
        rows = ops.unpack(hidden_states.flatten(0, 1), self.indices.to(device), self.inverse.to(device))
        return rows.view(self.batch, self.seqlen, -1)


class Selection(NamedTuple):
    """What `pack_mask` found: the packed layout, and what decides whether it may be used."""

    packing: Packing
    tokens: int
    """T, real tokens."""
    starts_real: bool
    """Whether position 0 of every sequence is a real token."""
    labels_padding: bool
    """Whether a label other than -100 stands at padding."""
    has_holes: bool
    """Whether padding stands between real tokens of a sequence."""


def has_values(x: Tensor) -> bool:
    """Whether `x` holds numbers to look at: it and the results of operators on it are not fake, nor being traced."""
    if torch.compiler.is_compiling() or is_fake(x):
        return False
    return not is_faked()


def host_integers(values: Tensor | list[Tensor]) -> list[int]:
    """The values of a 1-D int64 tensor, or of 0-d integer or bool ones, in one transfer: one host synchronisation."""
    if not isinstance(values, Tensor):
        values = torch.stack([value.to(torch.int64) for value in values])
    result: list[int] = values.tolist()
    return result


def pack_mask(mask: Tensor, labels: Tensor | None = None) -> Selection:
    """The packed layout of a padding mask.

    Args:
        mask: (B, S) bool, True at real tokens, in any pattern.
        labels: (B, S) integer labels of the tokens, -100 where there is none; or None.

    Returns:
        A Selection. Synchronises with the device once.
    """
    batch, seqlen = mask.shape
    cu_seqlens, indices, inverse, totals = ops.mask_layout(mask, labels)
    tokens, longest, starts_real, at_padding, has_holes = host_integers(totals)
    tiles = tiles_of(cu_seqlens, tokens)
    packing = Packing(batch, seqlen, longest, cu_seqlens, None, indices[:tokens], inverse, tiles)
    return Selection(packing, tokens, bool(starts_real), bool(at_padding), bool(has_holes))


def tiles_of(cu_seqlens: Tensor, tokens: int) -> Tensor | None:
    """`Packing.tiles` of a packed layout."""
    return ops.attention_tiles(cu_seqlens, tokens) if cu_seqlens.is_cuda else None


def flattened(cu_seqlens: Tensor, tokens: int, keys: Tensor | None = None, longest: int | None = None) -> Packing:
    """The layout of a flattened call, where sequences lie end to end in one row already.

    Args:
        cu_seqlens: (B + 1,) integer, cumulative lengths: where each sequence starts, from 0 to `tokens`.
        tokens: T, the tokens of all sequences.
        keys: the same for the keys, (B + 1,); None: as the queries.
        longest: the most tokens of a sequence, as the caller has it; taken at its word only where there are no values
            to look at (fake tensors, tracing), and `tokens` in its place where it is None.

    Raises:
        ValueError: cu_seqlens does not run from 0 to `tokens` without descending, or `keys` differs from it.
    """
    if not has_values(cu_seqlens):
        starts = cu_seqlens.to(torch.int32)
        return Packing(
            starts.shape[0] - 1, tokens, tokens if longest is None else longest, starts, tiles=tiles_of(starts, tokens)
        )
    lengths = cu_seqlens.diff()
    differs = cu_seqlens.new_zeros(()) if keys is None else (keys != cu_seqlens).any()
    first, last, shortest, longest, other_keys = host_integers(
        [cu_seqlens[0], cu_seqlens[-1], lengths.min(), lengths.max(), differs]
    )
    if other_keys:
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; expected the same, for self-attention")
    if first != 0 or last != tokens or shortest < 0:
        raise ValueError(
            f"cu_seq_lens_q runs from {first} to {last} with a smallest step of {shortest}; expected it to rise from 0 "
            f"to the number of tokens, {tokens}"
        )
    starts = cu_seqlens.to(torch.int32, copy=torch.is_grad_enabled())  # the caller may write to it before a backward
    return Packing(len(starts) - 1, tokens, longest, starts, tiles=tiles_of(starts, tokens))


def isolating_mask(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(1, 1, T, T) bool, True where both tokens belong to the same sequence of a flattened call."""
    rows = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:].to(rows.dtype), right=True)
    return (sequence[:, None] == sequence[None, :])[None, None]
