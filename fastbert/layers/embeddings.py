"""The fused embeddings, the positions of tokens, and whether embeddings are the family's own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import ops
from ..runtime import known
from ..runtime.registry import embeddings_of, family_of, table_of
from ..runtime.support import embeddings_are_unsupported, is_a, is_placed, own_method
from .layer import Mixin, stock_forward


def first_position(embeddings: nn.Module) -> int:
    """The position of the first token: after the padding's, where the family has one (RoBERTa and its kin), or 0."""
    padding_idx = embeddings.__dict__.get("padding_idx")  # a module takes its time to say that it has none
    return 0 if padding_idx is None else int(padding_idx) + 1


def longest_sequence(model: nn.Module) -> int | None:
    """How many tokens a sequence may have, by the table of positions of a base model; None where it has none."""
    embeddings = embeddings_of(model)
    table = table_of(embeddings, family_of(model).ids.get("position_ids"))
    if table is None:
        return None
    buffer = getattr(embeddings, "position_ids", None)
    rows = getattr(table, "num_embeddings", None) if buffer is None else buffer.shape[1]
    return None if rows is None else int(rows) - first_position(embeddings)


def default_positions(embeddings: Any, input_ids: Tensor | None, seqlen: int) -> Tensor:
    """Position ids of a call that gives none, as the family's stock embeddings have them.

    Args:
        embeddings: the embeddings of a base model.
        input_ids: (B, S), or None where embeddings are given.
        seqlen: S.

    Returns:
        (1, S), or (B, S) where positions count the tokens of input_ids that are not padding by their id.
    """
    first = first_position(embeddings)
    if not first or input_ids is None:
        buffer: Tensor | None = getattr(embeddings, "position_ids", None)
        if buffer is None:
            return torch.arange(first, first + seqlen, device=next(embeddings.parameters()).device)[None]
        return buffer[:, first : first + seqlen]
    real = input_ids != embeddings.padding_idx
    return real.cumsum(1) * real + embeddings.padding_idx


# What a family's own embeddings may be made of: functions that are known to treat every row by itself, as they were at
# import, for they may be replaced.
_ROWWISE_FORWARDS = {kind.forward for kind in (nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Linear)}
_LINEAR = nn.Linear.forward


def embeddings_are_foreign(model: PreTrainedModel) -> str | None:
    """Why the embeddings of a base model are to be called with the caller's own arguments; None: with packed ones, too.

    Packed arguments are one row of tokens, each with its position. What isn't the family's own code may read more into
    their shape than that: soft prompts over the first columns, positions by counting, ids that are no ids.
    """
    embeddings = embeddings_of(model)
    kind = type(embeddings)
    if is_a(embeddings, "torch.distributed.fsdp", "FSDPModule"):
        kind = kind.__mro__[2]  # fully_shard's subclass of it is (FSDPModule, kind)
    stock, forward, fused, called = model.own_embeddings
    if kind is not stock and kind is not fused:
        return f"the embeddings are a custom {kind.__name__}"
    if stock.forward is not forward or _is_replaced(embeddings):
        return f"the forward of {kind.__name__} has been replaced"
    if (name := own_method(embeddings, called)) is not None:
        return f"{name} of {kind.__name__} has been replaced"
    family = family_of(model)
    if embeddings.__dict__.get("max_norm") is not None:
        return "the embeddings renormalise the rows that are looked up"
    for name, part in embeddings.__dict__["_modules"].items():
        if part is None:
            continue
        rowwise = type(part).forward in _ROWWISE_FORWARDS or type(part) is family.layout.norm
        if not rowwise or _is_replaced(part):
            return f"{name} of the embeddings is a {type(part).__name__}"
        if part.__dict__.get("max_norm") is not None:
            return f"{name} of the embeddings renormalises the rows that are looked up"
        if isinstance(part, nn.LayerNorm) and len(part.normalized_shape) != 1:
            return f"{name} of the embeddings normalises over more than a row"
    for name in family.between:
        part = model.__dict__["_modules"].get(name)
        if part is not None and (type(part).forward is not _LINEAR or _is_replaced(part)):
            return f"{name} is a {type(part).__name__}"
    return "the embeddings read the mask" if family.embeds_padded else None


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__ and not is_placed(module)


_TABLES = ("input_ids", "token_type_ids", "position_ids")


class FusedEmbeddings(Mixin):
    """Three embedding tables and their LayerNorm in one launch."""

    family: ClassVar[Any]
    """Its `fastbert.models.family.Family`."""
    names: ClassVar[tuple[str, ...]]
    """Of the parameters of the stock forward, in its order."""
    called: ClassVar[tuple[str, ...]]
    """Methods that the stock forward calls."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Ids (B, S) -> embeddings (B, S, H); stock where the kernels don't apply, and where it would complain."""
        family, names, called = (getattr(self, name, None) for name in ("family", "names", "called"))
        # Unfused since; or called by what was put around the forward of fused ones.
        if family is None or names is None or called is None:
            return type(self).forward(self, *args, **kwargs)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        input_ids, token_type_ids, position_ids = (call.get(name) for name in _TABLES)
        odd = len(call) < len(args) + len(kwargs) or any(name not in names for name in kwargs)
        cached = call.get("past_key_values_length") or call.get("cache_length")  # before transformers 5.24; since
        odd = odd or not isinstance(input_ids, Tensor) or input_ids.dim() != 2
        odd = odd or (token_type_ids is None and "token_type_ids" not in self.__dict__["_buffers"])
        if not (odd or known.are_vouched_for(self)):
            odd = known.foreign(family.name, None) is not None or own_method(self, called) is not None
            odd = odd or embeddings_are_unsupported(self) is not None
        if odd or cached:
            stock: Tensor = stock_forward(FusedEmbeddings, self, *args, **kwargs)
            return stock
        shape = input_ids.shape
        if position_ids is None:
            position_ids = default_positions(self, input_ids, shape[1])
        if token_type_ids is None:  # as stock: from a buffer, by position
            token_type_ids = self.token_type_ids.expand(position_ids.shape[0], -1).gather(1, position_ids.long())
        norm = self.LayerNorm
        rows = ops.embedding_layer_norm(
            input_ids.flatten(),
            token_type_ids.expand(shape).flatten(),
            position_ids.expand(shape).flatten(),
            self.word_embeddings.weight,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            *(-1 if t.padding_idx is None else t.padding_idx for t in (self.word_embeddings, self.position_embeddings)),
        )
        if rows.is_cuda and torch.is_autocast_enabled("cuda"):
            rows = rows.float()  # as autocast has it of a LayerNorm there, though not on a CPU
        if self.word_embeddings._forward_hooks and torch.is_grad_enabled() and not rows.requires_grad:
            rows.requires_grad_()  # what the one kind of hook allowed here does, for layers that are checkpointed
        embeddings: Tensor = self.dropout(rows.view(*shape, -1))
        return embeddings
