"""The fused encoder layer and embeddings: mixed into a family's own Hugging Face classes by `fastbert.models`.

A fused module keeps its parameters, its names and its call; it reads its children's weights where they are plain, calls
them where they are not, and runs the stock code where it is not asked for a layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from . import ops
from .packing import Packing
from .support import embeddings_are_unsupported, is_plain

# transformers' activation classes by the value of torch.nn.functional.gelu's `approximate` that computes the same.
_GELU = {
    type(ACT2FN[name]): approximate
    for name, approximate in (
        ("gelu", "none"),
        ("gelu_new", "tanh"),
        ("gelu_fast", "tanh"),
        ("gelu_pytorch_tanh", "tanh"),
    )
}

# A mixin has no base of its own at run time: each family adds the Hugging Face class it stands in for.
_Module: Any = nn.Module if TYPE_CHECKING else object


def child(module: Any, *path: str) -> Any:
    """A submodule by its path: `nn.Module.__getattr__` costs several times as much, and a layer is asked for dozens."""
    for name in path:
        module = module.__dict__["_modules"][name]
    return module


class FusedLayer(_Module):
    """A BERT layer in seven launches, for a layer of Hugging Face's BERT shape."""

    def parts(self) -> tuple[tuple[str, nn.Module, type[nn.Module]], ...]:
        """Submodules whose code the fused layer stands in for, each with the class that code is known for."""
        raise NotImplementedError

    def linears(self) -> tuple[tuple[str, nn.Module], ...]:
        """The six linear layers, by name."""
        attention = child(self, "attention", "self")
        return (
            ("attention.self.query", child(attention, "query")),
            ("attention.self.key", child(attention, "key")),
            ("attention.self.value", child(attention, "value")),
            ("attention.output.dense", child(self, "attention", "output", "dense")),
            ("intermediate.dense", child(self, "intermediate", "dense")),
            ("output.dense", child(self, "output", "dense")),
        )

    def norms(self) -> tuple[tuple[str, nn.Module], ...]:
        """The two LayerNorms, by name."""
        return (
            ("attention.output.LayerNorm", child(self, "attention", "output", "LayerNorm")),
            ("output.LayerNorm", child(self, "output", "LayerNorm")),
        )

    def activation(self) -> nn.Module:
        """What the feed-forward applies between its two linear layers."""
        activation: nn.Module = self.intermediate.intermediate_act_fn
        return activation

    def forward(self, hidden_states: Tensor, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Tensor:
        """hidden_states (1, T, H) or (B, S, H), as `packing` lays out -> the same; stock without a `packing`."""
        if packing is None:
            stock: Tensor = super().forward(hidden_states, *args, **kwargs)
            return stock
        x = hidden_states.flatten(0, 1)  # [T, H]
        context = self._attention(x, packing)
        x = _close(child(self, "attention", "output"), context, x)
        x = _close(child(self, "output"), self._expand(x), x)
        return x.view_as(hidden_states)

    def _attention(self, x: Tensor, packing: Packing) -> Tensor:
        attention = child(self, "attention", "self")
        heads, head_dim = attention.num_attention_heads, attention.attention_head_size
        projections = [child(attention, name) for name in ("query", "key", "value")]
        if all(is_plain(p, nn.Linear) for p in projections):
            query, key, value = projections
            qkv = ops.qkv_linear(x, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias)
            q, k, v = qkv.view(-1, 3, heads, head_dim).unbind(1)  # [T, heads, head_dim]
        else:
            q, k, v = (p(x).view(-1, heads, head_dim) for p in projections)
        out = ops.attention(q, k, v, packing.cu_seqlens, packing.key_mask, packing.max_seqlen, attention.scaling)
        return out.flatten(1)

    def _expand(self, x: Tensor) -> Tensor:
        dense, activation = child(self, "intermediate", "dense"), self.activation()
        approximate = _GELU.get(type(activation))
        if not is_plain(dense, nn.Linear):
            expanded: Tensor = activation(dense(x))
            return expanded
        if approximate is None:
            return activation(ops.linear(x, dense.weight, dense.bias))
        return ops.linear_gelu(x, dense.weight, dense.bias, approximate)


def _close(sublayer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """What ends both halves of a layer: projection, residual and LayerNorm."""
    dense, norm = child(sublayer, "dense"), child(sublayer, "LayerNorm")
    if is_plain(dense, nn.Linear):
        total = ops.linear_add(x, dense.weight, dense.bias, residual)
        return ops.layer_norm(total, norm.weight, norm.bias, norm.eps)
    return ops.add_layer_norm(dense(x), residual, norm.weight, norm.bias, norm.eps)


class FusedEmbeddings(_Module):
    """BERT's three embedding tables and their LayerNorm in one launch."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """Ids (B, S) -> embeddings (B, S, H); stock where the kernels don't apply."""
        if input_ids is None or past_key_values_length or embeddings_are_unsupported(self):
            stock: Tensor = super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
            return stock
        shape = input_ids.shape
        if position_ids is None:
            position_ids = self.position_ids[:, : shape[1]]
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
        )
        return rows.view(*shape, -1)
