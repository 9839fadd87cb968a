"""What a family of models says of itself.

An adapter is one module with one `Family`, which `fastbert.models.classes.register` makes fused classes of. Nothing
else in fastbert asks which family a model is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput

from ..layers.layer import Layer
from ..runtime.readers import Reader
from .heads import Vocabulary

Given = dict[str, Any]
"""Fields of a half, or of a family, by name."""

IDS = {
    "input_ids": "word_embeddings",
    "token_type_ids": "token_type_embeddings",
    "position_ids": "position_embeddings",
}


@dataclass(eq=False)
class Family:
    """A family of models: its stock classes, what its layers are made of, and how a call reaches them."""

    code: ModuleType
    """The module of its stock classes; in transformers, modeling_NAME."""
    base: type[nn.Module]
    """The class of the base model."""
    encoder: type[nn.Module]
    """The class of what calls the layers: of a stack of them, or the base model's own, if that calls them itself."""
    layer: type[nn.Module]
    layout: Layer
    """What layers are made of."""
    embeddings: type[nn.Module]
    config: type[PreTrainedConfig]
    fuses_embeddings: bool = False
    """Whether embeddings are those of BERT: tables of words, types and positions, LayerNorm, dropout."""
    embeddings_at: tuple[str, ...] = ("embeddings",)
    """Where the base model has its embeddings."""
    embeds_padded: bool = False
    """Whether the embeddings read the mask: they are called as stock calls them, and what they give is packed."""
    between: tuple[str, ...] = ()
    """Submodules of the base model that are called between embeddings and encoder."""
    stack: tuple[str, ...] = ("encoder", "layer")
    """Where the base model has its layers; all but the last name lead to the encoder: none, if it is that itself."""
    order: Callable[[Any], Sequence[str]] | None = None
    """(encoder) -> where the last module of `stack` has the layers that a forward calls, one after the other: of groups
    of layers "0.layers.1", as often as each is called. None: it has the layers themselves, each called once."""
    group: type[nn.Module] | None = None
    """The class of such groups, which hold their layers in an nn.ModuleList and do no more than call them."""
    projection: str | None = None
    """The name of the linear layer, if there is one, that the encoder calls before its first layer."""
    ids: Mapping[str, str | None] = field(default_factory=lambda: dict(IDS))
    """Arguments of the base model with one integer a token, each with the table of the embeddings that has a row for
    it, or None; "", where the embeddings are the table. The first is that of words."""
    final_norm: str | None = None
    """The name of the norm, of the class of its layers', that the encoder calls after the last one."""
    norm_after: bool = False
    """Whether the base model itself calls such a norm on what the encoder returns."""
    output: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
    """What the encoder returns."""
    tables: Callable[..., Mapping[str, object]] | None = None
    """(encoder, hidden_states, packing, position_ids or None) -> `Context.tables` of one forward.

    hidden_states as the layout has them, (1, T, H) or (B, S, H). Without position_ids, `packing.positions` says where
    in its sequence every row is. Where there are tables, layers don't mix with stock ones, which are called otherwise.
    """
    makes_tables: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    """Submodules of the encoder that `tables` calls, with their classes: what they give is row by row."""
    handed: str | None = None
    """The keyword argument in which the base model hands its encoder a rotation for every row, or None: cosines and
    sines, each (1, S, head_dim) or (B, S, head_dim). It is in `Context.tables`, by that name."""
    graph_tables: Callable[..., Callable[..., Mapping[str, object]] | None] | None = None
    """(encoder, device, longest sequence) -> what makes `tables` as a CUDA graph is captured, `graphs.Tables`: of
    weights and positions, anew at each replay, and of what it holds itself. None: no graph is captured."""
    shared: Callable[..., Mapping[str, object]] | None = None
    """(encoder) -> attributes, with their values, that the attention of every layer must have: where stock code reads
    them of a layer and fastbert of the encoder, or the other way round. A layer that differs runs stock."""
    window: Callable[..., int] | None = None
    """(base model) -> how many tokens before it and after it a token sees in layers with a window."""
    after_first: Callable[..., Callable[..., Tensor] | None] = lambda encoder: None
    """(encoder) -> what makes the hidden states that the second layer takes, of (encoder, those before the first layer,
    after it, plan); None where that takes the first layer's."""
    takes_square_mask: bool = True
    """Whether the base model takes a 4-D mask, which says for every pair of tokens whether they see each other."""
    refuses: Callable[[PreTrainedModel], str | None] | None = None
    """Why calls of a base model run stock, by what it is; None where they don't."""
    widen: Callable[[PreTrainedModel], None] | None = None
    """Changes a base model in float64 whose code rounds to float32, so that it tells the truth."""
    spreads_empty: bool = False
    """Whether a sequence without a real token attends to all its tokens, whatever config._attn_implementation says:
    then a call with one runs stock. sdpa gives zeros there, as the kernels do; code that fills scores with the lowest
    number spreads them evenly."""
    run: Callable[..., object] | None = None
    """(base model, arguments by name, plan) -> its output, where the stock forward does not hand the encoder the
    keyword arguments that it doesn't know. What the encoder returns has hidden_states, where they are asked for; layers
    don't mix with stock ones."""
    heads: Mapping[type[nn.Module], Reader] = field(default_factory=dict)
    """What every head reads of the base model's output. One that is not listed may read padding: calls are dense."""
    others: tuple[type[nn.Module], ...] = ()
    """More heads to make fused classes of, of which nothing is known."""
    parts: tuple[type[nn.Module], ...] = ()
    """What heads, and the pooler, are made of, where that is the family's own: each row from the same row alone."""
    vocabularies: Mapping[type[nn.Module], Callable[..., Vocabulary]] = field(default_factory=dict)
    """Heads that can return their loss alone, and the vocabulary head of each."""
    sizes: Mapping[str, object] = field(
        default_factory=lambda: {
            "vocab_size": 16,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "pad_token_id": 0,
        }
    )
    """Of the config of a small model, on which `register` tries whether fused is stock."""

    fused: dict[type[nn.Module], type[nn.Module]] = field(default_factory=dict, init=False)
    """Made by `register`: which fused class takes the place of which stock one, inside the base model."""
    loss_heads: dict[type[nn.Module], type[nn.Module]] = field(default_factory=dict, init=False)
    """Made by `register`: the same of `vocabularies`."""
    unsupported: str | None = field(default=None, init=False)
    """Found by `register`: why no model of it can run fused."""

    records_hidden_states: bool = field(default=False, init=False)
    """Found by `register`: whether transformers records what layers return, and no loop of the family's own."""
    returns_maps: bool = field(default=False, init=False)
    """Found by `register`: whether what its encoder leaves of attention maps is what the base model returns."""
    unknown_arguments: tuple[str, ...] = field(default=(), init=False)
    """Found by `register`: parameters of the base model's forward that nothing here speaks of."""

    @property
    def loops(self) -> bool:
        """Whether the base model calls its layers itself."""
        return self.encoder is self.base

    @property
    def name(self) -> str:
        """The module of its stock classes, without modeling_."""
        return self.code.__name__.rpartition(".")[2].removeprefix("modeling_")
