"""Quill: LayerNorm first, rotary positions, a gated feed-forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastbert.layers.attention import Attention
from fastbert.layers.feed_forward import FeedForward
from fastbert.layers.layer import Layer
from fastbert.models.classes import register
from fastbert.models.family import Family
from fastbert.runtime.packing import Packing
from fastbert.runtime.readers import FIRST, LABELS

from . import modeling_quill as code

LAYOUT = Layer(
    Attention(
        module=("attn",),
        qkv=("attn", "wqkv"),
        output=("attn", "wo"),
        output_dropout=None,
        norm=("norm1",),
        head_dim="width",
        dropout="drop",
        rotary="rotation",
        kinds={("attn",): code.QuillAttention},
    ),
    FeedForward(
        up=("mlp", "wi"),
        is_gated=True,
        activation=("mlp", "act"),
        down=("mlp", "wo"),
        down_dropout=("drop",),
        norm=("norm2",),
        kinds={("mlp",): code.QuillGate},
    ),
    pre_norm=True,
)


def tables(encoder: Any, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None) -> dict[str, Any]:
    positions = packing.positions(hidden_states.device) if position_ids is None else position_ids.flatten()
    cosine, sine = encoder.rotation(positions)
    return {"rotation": (cosine, sine)}


FAMILY = register(
    Family(
        code,
        code.QuillModel,
        code.QuillEncoder,
        code.QuillBlock,
        LAYOUT,
        code.QuillEmbeddings,
        code.QuillConfig,
        embeddings_at=("embed",),
        stack=("stack", "blocks"),
        ids={"input_ids": "tokens", "position_ids": "places"},
        final_norm="norm",
        output=BaseModelOutput,
        tables=tables,
        spreads_empty=True,
        heads={code.QuillForRanking: FIRST, code.QuillForTagging: LABELS},
    ),
    __name__,
)
