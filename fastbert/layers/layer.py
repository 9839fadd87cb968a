"""The fused encoder layer and embeddings: mixed into a family's own Hugging Face classes by `fastbert.models`.

A fused module keeps its parameters, its names and its call; it reads its children's weights where they are plain, calls
them where they are not, and runs the stock code where it is not asked for a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

from .. import autograd as autograd  # registers the operators' gradients
from .. import ops
from ..runtime import known
from ..runtime.packing import Packing
from ..runtime.support import (
    activation_is_unsupported,
    embeddings_are_unsupported,
    is_a,
    is_placed,
    is_plain,
    own_method,
)

# transformers' activation classes by the value of torch.nn.functional.gelu's `approximate` that computes the same.
_GELU = {
    getattr(activations, name): approximate
    for name, approximate in (
        ("GELUActivation", "none"),
        ("NewGELUActivation", "tanh"),
        ("FastGELUActivation", "tanh"),
        ("PytorchGELUTanh", "tanh"),  # before transformers 5
        ("GELUTanh", "tanh"),
    )
    if hasattr(activations, name)
}


def gelu_of(activation: Any) -> str | None:
    """`approximate` as torch.nn.functional.gelu has it, where an activation computes that; else None."""
    return _GELU.get(type(activation)) if activation_is_unsupported(activation) is None else None


# A mixin has no base of its own at run time: each family adds the Hugging Face class it stands in for.
_Module: Any = nn.Module if TYPE_CHECKING else object


def child(module: Any, *path: str) -> Any:
    """A submodule by its path: `nn.Module.__getattr__` costs several times as much, and a layer is asked for dozens."""
    for name in path:
        module = module.__dict__["_modules"][name]
    return module


Path = tuple[str, ...]


def stock_forward(mixin: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward of the class that `mixin` is mixed into; of `module`, which may have been unfused meanwhile."""
    if torch.compiler.is_compiling():
        return super(mixin, module).forward(*args, **kwargs)
    kind: Any = type(module)  # once: another thread may unfuse it
    forward = super(mixin, kind).forward if issubclass(kind, mixin) else kind.forward
    return forward(module, *args, **kwargs)


class Shape(NamedTuple):
    """Where the layers of a family keep what a fused layer reads: paths of submodules. The defaults are BERT's."""

    attention: Path = ("attention", "self")
    """Has attention_head_size, and the dropout of the probabilities as `dropout`."""
    query: Path = ("attention", "self", "query")
    key: Path = ("attention", "self", "key")
    value: Path = ("attention", "self", "value")
    context: Path = ("attention", "output", "dense")
    """The linear layer after attention, then its dropout and the LayerNorm that closes the first half."""
    context_dropout: Path | None = ("attention", "output", "dropout")
    context_norm: Path = ("attention", "output", "LayerNorm")
    up: Path = ("intermediate", "dense")
    activation: Path = ("intermediate", "intermediate_act_fn")
    down: Path = ("output", "dense")
    down_dropout: Path = ("output", "dropout")
    down_norm: Path = ("output", "LayerNorm")
    chunk: Path = ("feed_forward_chunk",)
    """The method that computes the feed-forward."""


Linear = tuple[Tensor, Tensor | None]
"""A linear layer's weight and bias."""
Norm = tuple[Tensor, Tensor, float]
"""A LayerNorm's weight, bias and eps."""


class Weights(NamedTuple):
    """All that a layer reads in inference, looked up once: see `fastbert.runtime.coverage`."""

    query: Linear
    key: Linear
    value: Linear
    head_dim: int
    scale: float
    """Of attention's scores."""
    context: Linear
    context_norm: Norm
    up: Linear
    approximate: str
    """As torch.nn.functional.gelu has it."""
    down: Linear
    down_norm: Norm


class FusedLayer(_Module):
    """A layer of BERT's kind in seven launches."""

    shape: ClassVar[Shape] = Shape()
    kinds: ClassVar[dict[Path, type[nn.Module]]] = {}
    """Submodules whose code the fused layer stands in for, each with the class that code is known for."""

    def parts(self) -> Iterator[tuple[Path, nn.Module, type[nn.Module]]]:
        """(path, submodule, class) of `kinds`, and of the dropouts."""
        shape = self.shape
        for path, kind in self.kinds.items():
            yield path, child(self, *path), kind
        for dropout in ((*shape.attention, "dropout"), shape.context_dropout, shape.down_dropout):
            if dropout is not None:
                yield dropout, child(self, *dropout), nn.Dropout

    def linears(self) -> Iterator[tuple[Path, nn.Module]]:
        """The six linear layers, by path."""
        shape = self.shape
        for path in (shape.query, shape.key, shape.value, shape.context, shape.up, shape.down):
            yield path, child(self, *path)

    def norms(self) -> Iterator[tuple[Path, nn.Module]]:
        """The two LayerNorms, by path."""
        for path in (self.shape.context_norm, self.shape.down_norm):
            yield path, child(self, *path)

    def activation(self) -> nn.Module:
        """What the feed-forward applies between its two linear layers."""
        *holder, name = self.shape.activation
        activation: nn.Module = getattr(child(self, *holder), name)
        return activation

    def is_static(self) -> bool:
        """Whether parameters say all that it computes in inference: no adapters, no activation with a state."""
        return gelu_of(self.activation()) is not None and all(
            is_plain(linear, nn.Linear) for _, linear in self.linears()
        )

    def weights(self) -> Weights | None:
        """All that it reads in inference, as it is now; None where it calls a submodule. It must be covered."""
        if not self.is_static():
            return None
        linears: list[Any] = [linear for _, linear in self.linears()]
        norms: list[Any] = [norm for _, norm in self.norms()]
        query, key, value, context, up, down = ((linear.weight, linear.bias) for linear in linears)
        context_norm, down_norm = ((norm.weight, norm.bias, norm.eps) for norm in norms)
        head_dim = child(self, *self.shape.attention).attention_head_size
        approximate = gelu_of(self.activation())
        assert approximate is not None
        return Weights(
            query, key, value, head_dim, self.scale(), context, context_norm, up, approximate, down, down_norm
        )

    def replaced_chunk(self) -> str | None:
        """The name of the method of the feed-forward, where somebody has replaced it on this layer."""
        *holder, name = self.shape.chunk
        return name if name in child(self, *holder).__dict__ else None

    def dropouts(self) -> tuple[float, float, float]:
        """Rates at which dropout now drops: attention probabilities, and what the two halves of the layer add."""
        shape = self.shape
        attention = child(self, *shape.attention)
        # As stock: the flag of the attention, the rate of its dropout.
        probabilities = float(child(attention, "dropout").p) if attention.training else 0.0
        return probabilities, self._rate(shape.context_dropout), self._rate(shape.down_dropout)

    def scale(self) -> float:
        """Of the attention's scores."""
        attention = child(self, *self.shape.attention)
        return float(getattr(attention, "scaling", attention.attention_head_size**-0.5))

    def _rate(self, path: Path | None) -> float:
        dropout = None if path is None else child(self, *path)
        return float(dropout.p) if dropout is not None and dropout.training else 0.0

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        infer: Callable[[Any, Tensor, Packing], Tensor] | None = None,
        weights: Weights | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (1, T, H) or (B, S, H), as `packing` lays out -> the same; stock without a `packing`.

        `seeds`, (3,) int64, are those of the three dropouts; None where none drops anything. `infer` runs in place of
        `_infer`, given the layer as its first argument. `weights` are its own, looked up already, or None.
        """
        if packing is None:
            stock: Tensor = stock_forward(FusedLayer, self, hidden_states, *args, **kwargs)
            return stock
        x = hidden_states.flatten(0, 1)  # [T, H]
        trains = self.training or seeds is not None or torch.is_grad_enabled()
        if trains or torch.is_autocast_enabled(x.device.type):
            x = self._train(x, packing, seeds)
        else:
            x = self._infer(x, packing, weights) if infer is None else infer(self, x, packing)
        return x.view_as(hidden_states)

    def _infer(self, x: Tensor, packing: Packing, weights: Weights | None) -> Tensor:
        """Seven launches, nothing kept."""
        if weights is not None:
            return _infer(weights, x, packing)
        shape = self.shape
        q, k, v = self.project(x).unbind(1)  # [T, heads, head_dim]
        sequences = packing.cu_seqlens, packing.key_mask, packing.max_seqlen
        context = ops.attention(q, k, v, *sequences, self.scale(), packing.bias, packing.tiles)
        del q, k, v
        x = _close(child(self, *shape.context), child(self, *shape.context_norm), context.flatten(1), x)
        del context
        dense, activation = child(self, *shape.up), self.activation()
        approximate = gelu_of(activation)
        if approximate is None or not is_plain(dense, nn.Linear):
            expanded = activation(_linear(dense, x))
        else:
            expanded = ops.linear_gelu(x, dense.weight, dense.bias, approximate)
        return _close(child(self, *shape.down), child(self, *shape.down_norm), expanded, x)

    def _train(self, x: Tensor, packing: Packing, seeds: Tensor | None) -> Tensor:
        """The same with dropout and gradients, and under autocast; residuals keep the dtype of x."""
        shape, device = self.shape, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rates = (0.0, 0.0, 0.0) if seeds is None else self.dropouts()
        seed = (None, None, None) if seeds is None else seeds.unbind(0)

        qkv = self.project(x.to(dtype))
        context, _ = ops.attention_forward(
            qkv,
            packing.cu_seqlens,
            packing.key_mask,
            packing.max_seqlen,
            self.scale(),
            rates[0],
            seed[0],
            packing.tiles,
        )
        del qkv
        norm = child(self, *shape.context_norm)
        added = _linear(child(self, *shape.context), context.flatten(1))
        del context
        x = ops.add_layer_norm(added, x, norm.weight, norm.bias, norm.eps, rates[1], seed[1])

        up, activation, down = child(self, *shape.up), self.activation(), child(self, *shape.down)
        norm = child(self, *shape.down_norm)
        approximate = gelu_of(activation)
        if approximate is not None and is_plain(up, nn.Linear) and is_plain(down, nn.Linear):
            added, _ = ops.feed_forward(x.to(dtype), up.weight, up.bias, down.weight, down.bias, approximate)
        else:
            added = _linear(down, activation(_linear(up, x.to(dtype))))
        return ops.add_layer_norm(added, x, norm.weight, norm.bias, norm.eps, rates[2], seed[2])

    def project(self, x: Tensor) -> Tensor:
        """x (T, H) -> queries, keys and values, (T, 3, heads, head_dim)."""
        shape = self.shape
        projections = [child(self, *path) for path in (shape.query, shape.key, shape.value)]
        if all(is_plain(p, nn.Linear) for p in projections):
            query, key, value = projections
            qkv = ops.qkv_linear(x, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias)
        else:
            qkv = torch.stack([p(x) for p in projections], 1)
        head_dim = child(self, *shape.attention).attention_head_size
        return qkv.view(x.shape[0], 3, qkv.shape[2] // head_dim, head_dim)


def _infer(weights: Weights, x: Tensor, packing: Packing) -> Tensor:
    """`FusedLayer._infer` of a layer that calls no submodule."""
    query, key, value, head_dim, scale, context, context_norm, up, approximate, down, down_norm = weights
    qkv = ops.qkv_linear(x, *query, *key, *value)
    q, k, v = qkv.view(x.shape[0], 3, qkv.shape[2] // head_dim, head_dim).unbind(1)
    del qkv
    attended = ops.attention(
        q, k, v, packing.cu_seqlens, packing.key_mask, packing.max_seqlen, scale, packing.bias, packing.tiles
    )
    del q, k, v
    x = ops.layer_norm(ops.linear_add(attended.flatten(1), *context, x), *context_norm)
    del attended
    expanded = ops.linear_gelu(x, *up, approximate)
    return ops.layer_norm(ops.linear_add(expanded, *down, x), *down_norm)


def _linear(linear: Any, x: Tensor) -> Tensor:
    """A linear layer, called where it is more than its weights (an adapter)."""
    result: Tensor = ops.linear(x, linear.weight, linear.bias) if is_plain(linear, nn.Linear) else linear(x)
    return result


def _close(dense: Any, norm: Any, x: Tensor, residual: Tensor) -> Tensor:
    """What ends both halves of a layer in inference: projection, residual and LayerNorm."""
    if is_plain(dense, nn.Linear):
        total = ops.linear_add(x, dense.weight, dense.bias, residual)
        return ops.layer_norm(total, norm.weight, norm.bias, norm.eps)
    return ops.add_layer_norm(dense(x), residual, norm.weight, norm.bias, norm.eps, 0.0, None)


def first_position(embeddings: Any) -> int:
    """The position of the first token: after the padding's, where the family has one (RoBERTa and its kin), or 0."""
    padding_idx = getattr(embeddings, "padding_idx", None)
    return 0 if padding_idx is None else int(padding_idx) + 1


def positions(embeddings: Any) -> int:
    """How many tokens a sequence may have."""
    return int(embeddings.position_ids.shape[1]) - first_position(embeddings)


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
        positions: Tensor = embeddings.position_ids[:, first : first + seqlen]
        return positions
    real = input_ids != embeddings.padding_idx
    return real.cumsum(1) * real + embeddings.padding_idx


# The children of a family's own embeddings, each with the one function that is known to treat every row by itself: as
# it was at import, for it may be replaced.
_ROWWISE: dict[str, type[nn.Module]] = {
    **dict.fromkeys((f"{what}_embeddings" for what in ("word", "token_type", "position", "task_type")), nn.Embedding),
    "LayerNorm": nn.LayerNorm,
    "dropout": nn.Dropout,
}
_ROWWISE_FORWARDS = {name: kind.forward for name, kind in _ROWWISE.items()}
_LINEAR = nn.Linear.forward


def embeddings_are_foreign(model: Any) -> str | None:
    """Why the embeddings of a base model are to be called with the caller's own arguments; None: with packed ones, too.

    Packed arguments are one row of tokens, each with its position. What isn't the family's own code may read more into
    their shape than that: soft prompts over the first columns, positions by counting, ids that are no ids.
    """
    embeddings = child(model, "embeddings")
    kind = type(embeddings)
    if is_a(embeddings, "torch.distributed.fsdp", "FSDPModule"):
        kind = kind.__mro__[2]  # fully_shard's subclass of it is (FSDPModule, kind)
    stock, forward, fused, called = model.own_embeddings
    if kind is not stock and kind is not fused:
        return f"the embeddings are a {kind.__name__} of one's own"
    if stock.forward is not forward or _is_replaced(embeddings):
        return f"the forward of {kind.__name__} has been replaced"
    if (name := own_method(embeddings, called)) is not None:
        return f"{name} of {kind.__name__} has been replaced"
    for name, part in embeddings.__dict__["_modules"].items():
        if type(part).forward is not _ROWWISE_FORWARDS.get(name) or _is_replaced(part):
            return f"{name} of the embeddings is a {type(part).__name__}"
        if part.__dict__.get("max_norm") is not None:
            return f"{name} of the embeddings renormalises the rows that are looked up"
    project = model.__dict__["_modules"].get("embeddings_project")  # ELECTRA's
    if project is not None and (type(project).forward is not _LINEAR or _is_replaced(project)):
        return f"embeddings_project is a {type(project).__name__}"
    return None


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__ and not is_placed(module)


_TABLES = ("input_ids", "token_type_ids", "position_ids")


class FusedEmbeddings(_Module):
    """Three embedding tables and their LayerNorm in one launch."""

    family: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """Of the parameters of the stock forward, in its order."""
    called: ClassVar[tuple[str, ...]]
    """Methods that the stock forward calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
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
        odd = odd or known.foreign(family, None) is not None or own_method(self, called) is not None
        if odd or cached or embeddings_are_unsupported(self):
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
