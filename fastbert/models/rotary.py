"""What families with rotary positions of transformers' own share: how their code is laid out, and their tables.

Their base models call their layers themselves, and make cosines and sines by a `rotary_emb`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.attention import Attention
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..runtime.packing import Packing
from ..runtime.readers import Reader
from .family import Family, Given
from .heads import Vocabulary


def _places(hidden_states: Tensor, packing: Packing, position_ids: Tensor | None) -> Tensor:
    """(1, T) or (B, S), the position of every row."""
    if position_ids is None:
        position_ids = packing.positions(hidden_states.device)
    return position_ids.reshape(hidden_states.shape[:2])


def tables(
    encoder: PreTrainedModel, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None
) -> dict[str, tuple[Tensor, ...]]:
    """`Family.tables`, of one rotation for all layers."""
    made = encoder.rotary_emb(hidden_states, _places(hidden_states, packing, position_ids))
    return {"rotary": tuple([table.flatten(0, 1) for table in made])}


def tables_by_kind(
    encoder: PreTrainedModel, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None
) -> dict[str, dict[str, object]]:
    """The same, of a rotation for each kind of layers, by `config.layer_types`, some of which have a window."""
    places, kinds = _places(hidden_states, packing, position_ids), set(encoder.config.layer_types)
    made = {kind: encoder.rotary_emb(hidden_states, places, kind) for kind in kinds}
    return {
        "rotary": {kind: tuple([table.flatten(0, 1) for table in each]) for kind, each in made.items()},
        "window": {kind: window(encoder) if kind == "sliding_attention" else None for kind in kinds},
    }


def graph_tables(make: Callable[..., Mapping[str, object]]) -> Callable[..., Callable[..., Mapping[str, object]]]:
    """`Family.graph_tables`, of one of the two above: positions are what comes beside the rows."""
    return lambda *_: lambda encoder, rows, packing, beside: make(encoder, rows, packing, *beside)


def window(model: PreTrainedModel) -> int:
    """`Family.window`."""
    return int(model.config.sliding_window)


def refuses(model: PreTrainedModel) -> str | None:
    """`Family.refuses`: rotations that hang on the longest sequence of a call, its padding too."""
    found = model.rotary_emb.rope_type
    for kind in found.values() if isinstance(found, dict) else (found,):
        if "dynamic" in kind or kind == "longrope":
            return f"rotary positions of type {kind!r}"
    return None


SIZES = {
    **{"vocab_size": 16, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 32},
    **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None},
}
"""`Family.sizes`."""


def kin(
    code: ModuleType,
    prefix: str,
    attention: Given,
    feed_forward: Given,
    heads: Mapping[str, Reader],
    parts: tuple[str, ...] = (),
    vocabularies: Mapping[str, Callable[..., Vocabulary]] | None = None,
    layer: str = "Layer",
    pre_norm: bool = False,
    norm: type[nn.Module] = nn.LayerNorm,
    **differences: Any,
) -> Family:
    """A family whose layers have `self_attn`, with q_proj, k_proj, v_proj and o_proj, and `mlp`.

    Args:
        code: the module of its classes.
        prefix: what the names of its classes begin with: "NomicBert".
        attention, feed_forward: what else there is of `Attention` and of `FeedForward`.
        heads, parts, vocabularies: as `Family` has them, by the rest of the name: "ForMaskedLM".
        layer: the rest of the name of its layers' class.
        pre_norm, norm: as `Layer` has them.
        differences: what else there is of `Family`.
    """

    def named(rest: str) -> Any:
        return getattr(code, prefix + rest)

    projections: Given = {name: ("self_attn", f"{name[0]}_proj") for name in ("query", "key", "value", "output")}
    layout = Layer(
        Attention(
            module=("self_attn",),
            **projections,
            head_dim="head_dim",
            dropout="attention_dropout",
            rotary="rotary",
            kinds={("self_attn",): named("Attention")},
            **attention,
        ),
        FeedForward(kinds={("mlp",): named("MLP")}, **feed_forward),
        pre_norm,
        norm,
    )
    given: Given = {
        "stack": ("layers",),
        "tables": tables,
        "graph_tables": graph_tables(tables),
        "makes_tables": {"rotary_emb": named("RotaryEmbedding")},
        "refuses": refuses,
        "sizes": SIZES,
        "heads": {named(rest): reads for rest, reads in heads.items()},
        "parts": tuple(map(named, parts)),
        "vocabularies": {named(rest): vocabulary for rest, vocabulary in (vocabularies or {}).items()},
        **differences,
    }
    base = named("Model")
    embeddings = given.pop("embeddings", None) or named("Embeddings")
    return Family(code, base, base, named(layer), layout, embeddings, base.config_class, **given)


GATED: Given = {
    "up": ("mlp", "up_proj"),
    "gate": ("mlp", "gate_proj"),
    "activation": ("mlp", "act_fn"),
    "down": ("mlp", "down_proj"),
}
"""Of `FeedForward`."""
AFTER: tuple[Given, Given] = (
    {"output_dropout": ("post_attention_dropout",), "norm": ("post_attention_layernorm",)},
    {"down_dropout": ("post_mlp_dropout",), "norm": ("post_mlp_layernorm",)},
)
"""Of `Attention` and of `FeedForward`: dropout, then LayerNorm, after each half."""
EMBEDDED = {"input_ids": "word_embeddings", "token_type_ids": "token_type_embeddings", "position_ids": None}
"""`Family.ids` where embeddings are of words and types."""
