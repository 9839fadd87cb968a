"""torch.library operators `fastbert::*` over the kernels: CUDA and ROCm tensors run Triton, CPU tensors the reference.

Every operator has the signature and the result of the function of its name in `fastbert.kernels.reference`, where
shapes and dtypes are documented. Here: schemas, backends, shapes under fake tensors, and what is refused.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import reference

_QKV = "Tensor q_weight, Tensor? q_bias, Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias"
_TABLES = "Tensor word, Tensor token_type, Tensor position"

# name: (module of the kernel, schema)
_OPERATORS = {
    "linear": ("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"),
    "linear_gelu": ("linear", "(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor"),
    "linear_add": ("linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor"),
    "qkv_linear": ("linear", f"(Tensor x, {_QKV}) -> Tensor"),
    "attention": (
        "attention",
        "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? key_mask, SymInt max_seqlen, float scale) "
        "-> Tensor",
    ),
    "layer_norm": ("layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"),
    "add_layer_norm": ("layer_norm", "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor"),
    "embedding_layer_norm": (
        "embedding",
        f"(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, {_TABLES}, "
        "Tensor weight, Tensor bias, float eps) -> Tensor",
    ),
    "pack": ("padding", "(Tensor x, Tensor indices) -> Tensor"),
    "unpack": ("padding", "(Tensor x, Tensor inverse) -> Tensor"),
}

_LIBRARY = torch.library.Library("fastbert", "DEF")


@functools.cache
def _kernel(name: str) -> Callable[..., Tensor]:
    """The Triton launcher of an operator; imported at its first call, so that fastbert imports without triton."""
    kernel: Callable[..., Tensor] = getattr(
        importlib.import_module(f".kernels.{_OPERATORS[name][0]}", __package__), name
    )
    return kernel


def _refuse_gradients(name: str, args: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise NotImplementedError(
            f"fastbert::{name} has no backward yet; call it under torch.no_grad() or torch.inference_mode()"
        )


CPU_BACKEND: dict[str, Callable[..., Tensor]] = {name: getattr(reference, name) for name in _OPERATORS}
"""What runs on CPU tensors, by operator. Tests put the Triton kernels here, to run models through the interpreter."""


def _on_cpu(name: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        _refuse_gradients(name, args)
        return CPU_BACKEND[name](*args)

    return run


def _on_cuda(name: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        _refuse_gradients(name, args)
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return _kernel(name)(*args)
        with torch.cuda.device(device):
            return _kernel(name)(*args)

    return run


def _like(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape)


_SHAPES: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, weight, bias: _like(x, x.shape[0], weight.shape[0]),
    "linear_gelu": lambda x, weight, bias, approximate: _like(x, x.shape[0], weight.shape[0]),
    "linear_add": lambda x, weight, bias, residual: _like(x, x.shape[0], weight.shape[0]),
    "qkv_linear": lambda x, q_weight, *rest: _like(x, x.shape[0], 3 * q_weight.shape[0]),
    "attention": lambda q, *rest: _like(q, *q.shape),
    "layer_norm": lambda x, *rest: _like(x, *x.shape),
    "add_layer_norm": lambda x, *rest: _like(x, *x.shape),
    "embedding_layer_norm": lambda ids, types, positions, word, *rest: _like(word, ids.shape[0], word.shape[1]),
    "pack": lambda x, indices: _like(x, indices.shape[0], x.shape[1]),
    "unpack": lambda x, inverse: _like(x, inverse.shape[0], x.shape[1]),
}

for _name, (_module, _schema) in _OPERATORS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _on_cpu(_name), "CPU")
    _LIBRARY.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"fastbert::{_name}", _SHAPES[_name], lib=_LIBRARY)

linear: Callable[..., Tensor] = torch.ops.fastbert.linear.default
linear_gelu: Callable[..., Tensor] = torch.ops.fastbert.linear_gelu.default
linear_add: Callable[..., Tensor] = torch.ops.fastbert.linear_add.default
qkv_linear: Callable[..., Tensor] = torch.ops.fastbert.qkv_linear.default
attention: Callable[..., Tensor] = torch.ops.fastbert.attention.default
layer_norm: Callable[..., Tensor] = torch.ops.fastbert.layer_norm.default
add_layer_norm: Callable[..., Tensor] = torch.ops.fastbert.add_layer_norm.default
embedding_layer_norm: Callable[..., Tensor] = torch.ops.fastbert.embedding_layer_norm.default
pack: Callable[..., Tensor] = torch.ops.fastbert.pack.default
unpack: Callable[..., Tensor] = torch.ops.fastbert.unpack.default
