"""torch.library operators `fastbert::*` over the kernels: CUDA and ROCm tensors run Triton, CPU tensors `cpu`.

Every operator has the signature and the result of the function of its name in `fastbert.kernels.reference` (in 8 bits:
`reference_fp8`), where shapes and dtypes are documented. Here: schemas, backends, shapes under fake tensors, and what
is refused. Gradients are in `fastbert.autograd`.
"""

from __future__ import annotations

import functools
import importlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuned
from .kernels import cpu

_QKV = "Tensor q_weight, Tensor? q_bias, Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias"
_SEQUENCES = "Tensor? cu_seqlens, Tensor? key_mask, SymInt max_seqlen, float scale"
_DROPOUT = "float dropout, Tensor? seed"
_IDS = "Tensor input_ids, Tensor token_type_ids, Tensor position_ids"
_TABLES = "Tensor word, Tensor token_type, Tensor position"
_FP8 = "Tensor x, Tensor? row_scale, Tensor weight, Tensor col_scale, Tensor? bias"

# name: (module of the kernel, schema)
_OPERATORS = {
    # Inference, where nothing needs a gradient.
    "linear_gelu": ("linear", "(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor"),
    "linear_add": ("linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor"),
    "attention": (
        "attention",
        f"(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor? bias=None, Tensor? tiles=None) -> Tensor",
    ),
    "layer_norm": ("layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"),
    # Inference in 8 bits.
    "quantize_fp8": ("quantize_fp8", "(Tensor x, float? scale) -> (Tensor, Tensor)"),
    "layer_norm_fp8": (
        "quantize_fp8",
        "(Tensor x, Tensor weight, Tensor bias, float eps, float? scale) -> (Tensor, Tensor, Tensor)",
    ),
    "attention_fp8": (
        "attention",
        f"(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor? bias, Tensor? tiles, float out_scale) -> Tensor",
    ),
    "linear_fp8": ("linear_fp8", f"({_FP8}, ScalarType dtype) -> Tensor"),
    "linear_gelu_fp8": ("linear_fp8", f"({_FP8}, ScalarType dtype, str approximate, float? scale) -> Tensor"),
    "linear_add_fp8": ("linear_fp8", f"({_FP8}, Tensor residual) -> Tensor"),
    # Inference and training.
    "linear": ("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"),
    "qkv_linear": ("linear", f"(Tensor x, {_QKV}) -> Tensor"),
    "attention_tiles": ("attention", "(Tensor cu_seqlens, SymInt rows) -> Tensor"),
    "add_layer_norm": (
        "layer_norm",
        f"(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, {_DROPOUT}) -> Tensor",
    ),
    "embedding_layer_norm": (
        "embedding",
        f"({_IDS}, {_TABLES}, Tensor weight, Tensor bias, float eps, int padding_idx, int position_padding_idx) "
        "-> Tensor",
    ),
    "mask_layout": ("padding", "(Tensor mask, Tensor? labels) -> (Tensor, Tensor, Tensor, Tensor)"),
    "pack": ("padding", "(Tensor x, Tensor indices, Tensor inverse) -> Tensor"),
    "unpack": ("padding", "(Tensor x, Tensor indices, Tensor inverse) -> Tensor"),
    # Training.
    "feed_forward": (
        "linear",
        "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str approximate) -> (Tensor, Tensor)",
    ),
    "linear_gelu_backward": (
        "linear",
        "(Tensor grad, Tensor weight, Tensor pre, str approximate) -> (Tensor, Tensor)",
    ),
    "attention_forward": (
        "attention",
        f"(Tensor qkv, {_SEQUENCES}, {_DROPOUT}, Tensor? tiles=None, Tensor? bias=None) -> (Tensor, Tensor)",
    ),
    "attention_backward": (
        "attention",
        f"(Tensor grad, Tensor qkv, Tensor out, Tensor stats, {_SEQUENCES}, {_DROPOUT}, Tensor? tiles=None, "
        "Tensor? bias=None, bool bias_grad=True) -> (Tensor, Tensor)",
    ),
    "add_layer_norm_backward": (
        "layer_norm",
        f"(Tensor grad, Tensor x, Tensor residual, Tensor weight, float eps, {_DROPOUT}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "embedding_layer_norm_backward": (
        "embedding",
        f"(Tensor grad, {_IDS}, {_TABLES}, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    ),
    "linear_cross_entropy": (
        "cross_entropy",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor labels) -> (Tensor, Tensor)",
    ),
    "linear_cross_entropy_backward": (
        "cross_entropy",
        "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor lse) -> (Tensor, Tensor, Tensor)",
    ),
}

_LIBRARY = torch.library.Library("fastbert", "DEF")


@functools.cache
def _kernel(name: str) -> Callable[..., Any]:
    """The Triton launcher of an operator; imported at its first call, so that fastbert imports without triton."""
    tuned.apply()
    kernel: Callable[..., Any] = getattr(importlib.import_module(f".kernels.{_OPERATORS[name][0]}", __package__), name)
    return kernel


def _refuse_gradients(name: str, args: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        what = "second derivatives are not implemented" if name.endswith("_backward") else "it is for inference"
        raise NotImplementedError(
            f"fastbert::{name} can't be differentiated: {what}; fastbert.unfuse(model) runs the stock code"
        )


CPU_BACKEND: dict[str, Callable[..., Any]] = {name: getattr(cpu, name) for name in _OPERATORS}
"""What runs on CPU tensors, by operator. Tests put the Triton kernels here, to run models through the interpreter."""


def _on_cpu(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # dtypes have been chosen by now
            with torch.autocast("cpu", enabled=False):
                return CPU_BACKEND[name](*args)
        return CPU_BACKEND[name](*args)

    return run


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether an error came up as a kernel was compiled or loaded: triton's, ptxas', of a missing C compiler."""
    places = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(place.startswith(("triton.compiler", "triton.runtime.build")) for place in places)


def _run_kernel(name: str, args: Sequence[Any]) -> Any:
    try:
        return _kernel(name)(*args)
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RuntimeError(
            f"the kernel of fastbert::{name} could not be compiled for {args[0].device} ({args[0].dtype}): {first}; "
            "FASTBERT_DISABLE=1 in the environment, or fastbert.unfuse(model), runs the stock code"
        ) from error


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _on_cuda(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        first = args[0]
        if first.get_device() == _current_device() and not torch.is_autocast_enabled("cuda"):
            return _run_kernel(name, args)
        with torch.cuda.device(first.device), torch.autocast("cuda", enabled=False):
            return _run_kernel(name, args)

    return run


def _without_gradients(name: str, backend: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls: a backend that refuses to be differentiated."""

    def run(*args: Any) -> Any:
        _refuse_gradients(name, args)
        return backend(*args)

    return run


_BACKENDS = {name: (_on_cpu(name), _on_cuda(name)) for name in _OPERATORS}


def _like(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape)


def _wide(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _fp8(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    row_scale = x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), row_scale


def _fp8_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _add_layer_norm_gradients(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Any:
    dropout = rest[1]
    dx = _like(x, 0) if not dropout and x.dtype == residual.dtype else _like(x, *x.shape)
    return dx, _like(residual, *x.shape), _like(weight, *weight.shape), _like(weight, *weight.shape)


def _attention_gradients(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    tiles: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    dbias = _like(stats, 0) if bias is None or not bias_grad else _like(bias, *bias.shape)
    return _like(qkv, *qkv.shape), dbias


_SHAPES: dict[str, Callable[..., Any]] = {
    "linear": lambda x, weight, bias: _like(x, x.shape[0], weight.shape[0]),
    "linear_gelu": lambda x, weight, bias, approximate: _like(x, x.shape[0], weight.shape[0]),
    "linear_add": lambda x, weight, bias, residual: _like(x, x.shape[0], weight.shape[0]),
    "qkv_linear": lambda x, q_weight, *rest: (
        _like(x, 3, x.shape[0], q_weight.shape[0]).transpose(0, 1)
        if x.device.type == "cpu"
        else _like(x, x.shape[0], 3, q_weight.shape[0])
    ),
    "feed_forward": lambda x, weight1, bias1, weight2, *rest: (
        _like(x, x.shape[0], weight2.shape[0]),
        _like(x, x.shape[0], weight1.shape[0]),
    ),
    "linear_gelu_backward": lambda grad, weight, pre, approximate: (_like(pre, *pre.shape), _like(pre, *pre.shape)),
    "attention": lambda q, *rest: _like(q, *q.shape),
    "attention_forward": lambda qkv, *rest: (
        _like(qkv, qkv.shape[0], *qkv.shape[2:]),
        _wide(qkv, 2 if qkv.dtype.itemsize > 2 else 1, qkv.shape[2], qkv.shape[0]),
    ),
    "attention_backward": _attention_gradients,
    "attention_tiles": lambda cu_seqlens, rows: _like(cu_seqlens, rows // 128 + cu_seqlens.shape[0] - 1, 4),
    "layer_norm": lambda x, *rest: _like(x, *x.shape),
    "add_layer_norm": lambda x, residual, *rest: _like(residual, *x.shape),
    "add_layer_norm_backward": _add_layer_norm_gradients,
    "embedding_layer_norm": lambda ids, types, positions, word, *rest: _like(word, ids.shape[0], word.shape[1]),
    "embedding_layer_norm_backward": lambda grad, ids, types, positions, word, token_type, position, weight, eps: (
        _like(word, ids.shape[0], word.shape[1]),
        _like(weight, *weight.shape),
        _like(weight, *weight.shape),
    ),
    "linear_cross_entropy": lambda x, *rest: (_wide(x, x.shape[0]), _wide(x, x.shape[0])),
    "linear_cross_entropy_backward": lambda grad, x, weight, bias, labels, lse: (
        _like(x, *x.shape),
        _like(weight, *weight.shape),
        _like(lse, 0) if bias is None else _like(bias, *bias.shape),
    ),
    "quantize_fp8": _fp8,
    "layer_norm_fp8": lambda x, weight, bias, eps, scale: (_like(x, *x.shape), *_fp8(x, scale)),
    "attention_fp8": lambda q, *rest: q.new_empty(q.shape, dtype=torch.float8_e4m3fn),
    "linear_fp8": lambda x, row_scale, weight, col_scale, bias, dtype: _fp8_product(x, weight, dtype),
    "linear_gelu_fp8": lambda x, row_scale, weight, col_scale, bias, dtype, approximate, scale: _fp8_product(
        x, weight, dtype if scale is None else torch.float8_e4m3fn
    ),
    "linear_add_fp8": lambda x, row_scale, weight, col_scale, bias, residual: _fp8_product(x, weight, residual.dtype),
    "mask_layout": lambda mask, labels: (
        mask.new_empty(mask.shape[0] + 1, dtype=torch.int32),
        *(mask.new_empty(size, dtype=torch.int64) for size in (mask.numel(), mask.numel(), 5)),
    ),
    "pack": lambda x, indices, inverse: _like(x, indices.shape[0], x.shape[1]),
    "unpack": lambda x, indices, inverse: _like(x, inverse.shape[0], x.shape[1]),
}

for _name, (_module, _schema) in _OPERATORS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _backend, _key in zip(_BACKENDS[_name], ("CPU", "CUDA"), strict=True):
        _LIBRARY.impl(_name, _without_gradients(_name, _backend), _key)
    torch.library.register_fake(f"fastbert::{_name}", _SHAPES[_name], lib=_LIBRARY)


_is_grad_enabled, _dispatch_modes = torch.is_grad_enabled, torch._C._len_torch_dispatch_stack


def _callable(name: str) -> Callable[..., Any]:
    """An operator as a function: in plain eager inference its backend itself, which spares the dispatcher's own time.

    That is dozens of microseconds for each of the 168 operators of a BERT-large, as much as a small batch takes.
    """
    operator = getattr(torch.ops.fastbert, name).default
    on_cpu, on_cuda = _BACKENDS[name]

    def call(*args: Any) -> Any:
        first = args[0]
        if type(first) is Tensor and not (torch.compiler.is_compiling() or _is_grad_enabled() or _dispatch_modes()):
            if first.is_cuda:
                return on_cuda(*args)
            if first.is_cpu:
                return on_cpu(*args)
        return operator(*args)

    call.__name__ = name
    return call


quantize_fp8: Callable[..., tuple[Tensor, Tensor]] = _callable("quantize_fp8")
layer_norm_fp8: Callable[..., tuple[Tensor, Tensor, Tensor]] = _callable("layer_norm_fp8")
attention_fp8: Callable[..., Tensor] = _callable("attention_fp8")
linear_fp8: Callable[..., Tensor] = _callable("linear_fp8")
linear_gelu_fp8: Callable[..., Tensor] = _callable("linear_gelu_fp8")
linear_add_fp8: Callable[..., Tensor] = _callable("linear_add_fp8")
linear: Callable[..., Tensor] = _callable("linear")
linear_gelu: Callable[..., Tensor] = _callable("linear_gelu")
linear_add: Callable[..., Tensor] = _callable("linear_add")
linear_gelu_backward: Callable[..., tuple[Tensor, Tensor]] = _callable("linear_gelu_backward")
qkv_linear: Callable[..., Tensor] = _callable("qkv_linear")
feed_forward: Callable[..., tuple[Tensor, Tensor]] = _callable("feed_forward")
attention: Callable[..., Tensor] = _callable("attention")
attention_forward: Callable[..., tuple[Tensor, Tensor]] = _callable("attention_forward")
attention_backward: Callable[..., tuple[Tensor, Tensor]] = _callable("attention_backward")
attention_tiles: Callable[..., Tensor] = _callable("attention_tiles")
layer_norm: Callable[..., Tensor] = _callable("layer_norm")
add_layer_norm: Callable[..., Tensor] = _callable("add_layer_norm")
add_layer_norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _callable("add_layer_norm_backward")
embedding_layer_norm: Callable[..., Tensor] = _callable("embedding_layer_norm")
embedding_layer_norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _callable("embedding_layer_norm_backward")
linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]] = _callable("linear_cross_entropy")
linear_cross_entropy_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _callable("linear_cross_entropy_backward")
mask_layout: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _callable("mask_layout")
pack: Callable[..., Tensor] = _callable("pack")
unpack: Callable[..., Tensor] = _callable("unpack")
