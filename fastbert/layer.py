"""The fused encoder layer and embeddings: mixed into a family's own Hugging Face classes by `fastbert.models`.

A fused module keeps its parameters, its names and its call; it reads its children's weights where they are plain, calls
them where they are not, and runs the stock code where it is not asked for a layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from . import autograd as autograd  # registers the operators' gradients
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

    def dropouts(self) -> tuple[float, float, float]:
        """Rates at which dropout now drops: attention probabilities, and what the two halves of the layer add."""
        attention = child(self, "attention", "self")
        outputs = child(self, "attention", "output", "dropout"), child(self, "output", "dropout")
        first, second = (float(dropout.p) if dropout.training else 0.0 for dropout in outputs)
        # As stock: the flag of the attention, the rate of its dropout.
        return float(child(attention, "dropout").p) if attention.training else 0.0, first, second

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (1, T, H) or (B, S, H), as `packing` lays out -> the same; stock without a `packing`.

        `seeds`, (3,) int64, are those of the three dropouts; None where none drops anything.
        """
        if packing is None:
            stock: Tensor = super().forward(hidden_states, *args, **kwargs)
            return stock
        x = hidden_states.flatten(0, 1)  # [T, H]
        trains = self.training or seeds is not None or torch.is_grad_enabled()
        if trains or torch.is_autocast_enabled(x.device.type):
            x = self._train(x, packing, seeds)
        else:
            x = self._infer(x, packing)
        return x.view_as(hidden_states)

    def _infer(self, x: Tensor, packing: Packing) -> Tensor:
        """Seven launches, nothing kept."""
        q, k, v = self._project(x).unbind(1)  # [T, heads, head_dim]
        scale = child(self, "attention", "self").scaling
        context = ops.attention(q, k, v, packing.cu_seqlens, packing.key_mask, packing.max_seqlen, scale)
        del q, k, v
        x = _close(child(self, "attention", "output"), context.flatten(1), x)
        del context
        dense, activation = child(self, "intermediate", "dense"), self.activation()
        approximate = _GELU.get(type(activation))
        if approximate is None or not is_plain(dense, nn.Linear):
            expanded = activation(_linear(dense, x))
        else:
            expanded = ops.linear_gelu(x, dense.weight, dense.bias, approximate)
        return _close(child(self, "output"), expanded, x)

    def _train(self, x: Tensor, packing: Packing, seeds: Tensor | None) -> Tensor:
        """The same with dropout and gradients, and under autocast; residuals keep the dtype of x."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rates = (0.0, 0.0, 0.0) if seeds is None else self.dropouts()
        seed = (None, None, None) if seeds is None else seeds.unbind(0)

        context, _ = ops.attention_forward(
            self._project(x.to(dtype)),
            packing.cu_seqlens,
            packing.key_mask,
            packing.max_seqlen,
            child(self, "attention", "self").scaling,
            rates[0],
            seed[0],
        )
        output = child(self, "attention", "output")
        norm = child(output, "LayerNorm")
        added = _linear(child(output, "dense"), context.flatten(1))
        del context
        x = ops.add_layer_norm(added, x, norm.weight, norm.bias, norm.eps, rates[1], seed[1])

        up, activation, output = child(self, "intermediate", "dense"), self.activation(), child(self, "output")
        down, norm = child(output, "dense"), child(output, "LayerNorm")
        approximate = _GELU.get(type(activation))
        if approximate is not None and is_plain(up, nn.Linear) and is_plain(down, nn.Linear):
            added, _ = ops.feed_forward(x.to(dtype), up.weight, up.bias, down.weight, down.bias, approximate)
        else:
            added = _linear(down, activation(_linear(up, x.to(dtype))))
        return ops.add_layer_norm(added, x, norm.weight, norm.bias, norm.eps, rates[2], seed[2])

    def _project(self, x: Tensor) -> Tensor:
        """x (T, H) -> queries, keys and values, (T, 3, heads, head_dim)."""
        attention = child(self, "attention", "self")
        heads, head_dim = attention.num_attention_heads, attention.attention_head_size
        projections = [child(attention, name) for name in ("query", "key", "value")]
        if all(is_plain(p, nn.Linear) for p in projections):
            query, key, value = projections
            qkv = ops.qkv_linear(x, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias)
        else:
            qkv = torch.stack([p(x) for p in projections], 1)
        return qkv.view(x.shape[0], 3, heads, head_dim)


def _linear(linear: Any, x: Tensor) -> Tensor:
    """A linear layer, called where it is more than its weights (an adapter)."""
    result: Tensor = ops.linear(x, linear.weight, linear.bias) if is_plain(linear, nn.Linear) else linear(x)
    return result


def _close(sublayer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """What ends both halves of a layer in inference: projection, residual and LayerNorm."""
    dense, norm = child(sublayer, "dense"), child(sublayer, "LayerNorm")
    if is_plain(dense, nn.Linear):
        total = ops.linear_add(x, dense.weight, dense.bias, residual)
        return ops.layer_norm(total, norm.weight, norm.bias, norm.eps)
    return ops.add_layer_norm(dense(x), residual, norm.weight, norm.bias, norm.eps, 0.0, None)


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
            -1 if self.word_embeddings.padding_idx is None else self.word_embeddings.padding_idx,
        )
        if rows.is_cuda and torch.is_autocast_enabled("cuda"):
            rows = rows.float()  # as autocast has it of a LayerNorm there, though not on a CPU
        if self.word_embeddings._forward_hooks and torch.is_grad_enabled() and not rows.requires_grad:
            rows.requires_grad_()  # what the one kind of hook allowed here does, for layers that are checkpointed
        embeddings: Tensor = self.dropout(rows.view(*shape, -1))
        return embeddings
