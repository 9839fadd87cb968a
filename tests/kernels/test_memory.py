"""Memory the kernels may touch: the watch over it works, and addresses hold beyond 2^31 elements.

Buffers of gigabytes are reserved but never filled: of a grid over them the last program alone runs.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastbert.kernels import attention, disentangled, embedding, layer_norm, linear, padding, reference
from fastbert.numerics import relative_error

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="watches the interpreter's memory")

FAR = 2**31 + 2**16
"""Elements, beyond what 32 bits count."""


@triton.jit
def shift_kernel(x_ptr, out_ptr, n, read: tl.constexpr, write: tl.constexpr):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs + read, mask=offs < n)
    tl.store(out_ptr + offs + write, x, mask=offs < n)


@pytest.mark.parametrize(("read", "write"), [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
def test_an_element_beside_a_tensor_is_out_of_reach(read: int, write: int) -> None:
    x, out = torch.zeros(15)[1:14], torch.zeros(15)[1:14]
    if not read and not write:
        shift_kernel[(1,)](x, out, 13, read, write)
        return
    with pytest.raises(triton.runtime.errors.InterpreterError, match="1 of 13 addresses lie in none of the tensors"):
        shift_kernel[(1,)](x, out, 13, read, write)


def reserve(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11 has no name for
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def last_of(*bounds: int) -> range:
    """`range`, but where the interpreter walks a grid, of each dimension the last program."""
    walks = sys._getframe(1).f_code is interpreter.GridExecutor.__call__.__code__
    return range(bounds[0] - 1, bounds[0]) if walks else range(*bounds)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch, guarded_empty: None) -> None:
    """Runs the last program of every grid alone, on outputs that are reserved."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        elements = torch.Size(sizes).numel()
        return reserve(max(1, elements), dtype)[:elements].view(*sizes)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(interpreter, "range", last_of, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # copies all of it


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def tall(width: int, seed: int, gap: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of more than 2^31 elements, and its last five rows, the only ones that aren't zero."""
    rows = -(-FAR // (width + gap) // 320) * 320  # of 64, as tiles are, so that the last holds five, and of five
    x = reserve(rows * (width + gap), torch.float16).view(rows, width + gap)[:, :width]
    x[-5:] = normal(seed, 5, width)
    return x, x[-5:].clone()


def near(found: Tensor, expected: Tensor) -> None:
    """In the last row. Not the policy, which needs many numbers: that they are those of the right addresses."""
    found, expected = found[-1], expected[-1]
    assert expected.abs().max() > 0
    assert relative_error(found, expected.double()) < 0.01


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("gap", [0, 48])
def test_linear_of_many_rows(gap: int) -> None:
    x, last = tall(64, 1, gap)
    weight, bias = normal(2, 64, 64), normal(3, 64)
    residual, last_residual = tall(64, 4)
    near(linear.linear(x, weight, bias), reference.linear(last, weight, bias))
    near(linear.linear_gelu(x, weight, bias, "none"), reference.linear_gelu(last, weight, bias, "none"))
    if not gap:
        found = linear.linear_add(x, weight, bias, residual)
        near(found, reference.linear_add(last, weight, bias, last_residual))
        dpre, act = linear.linear_gelu_backward(x, weight, residual, "none")
        truth = reference.linear_gelu_backward(last, weight, last_residual, "none")
        near(dpre, truth[0])
        near(act, truth[1])


@pytest.mark.usefixtures("far")
def test_a_weight_of_many_rows() -> None:
    weight, last = tall(4096, 1)
    x = normal(2, 3, 4096)
    near(linear.linear(x, weight, None).t(), reference.linear(x, last, None).t())


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("packed", [True, False])
def test_attention_of_many_rows(packed: bool) -> None:
    heads, head_dim = 2, 16
    qkv, last = (x.unflatten(1, (3, heads, head_dim)) for x in tall(3 * heads * head_dim, 1))
    starts, length = torch.tensor([0, len(qkv) - 5, len(qkv)], dtype=torch.int32) if packed else None, 5
    if not packed:  # more sequences than a grid has go by a list, which isn't of the last program alone
        length = 640
        assert len(qkv) % length == 0 and len(qkv) // length <= attention.GRID_SEQUENCES
        last = qkv[-length:].clone()
    arguments, scale = (starts, None, length), head_dim**-0.5
    found = attention.attention(*qkv.unbind(1), *arguments, scale)
    near(found[:, -1], reference.attention(*last.unbind(1), None, None, length, scale)[:, -1])
    out, stats = attention.attention_forward(qkv, *arguments, scale, 0.0, None)
    small = reference.attention_forward(last, None, None, length, scale, 0.0, None)
    near(out[:, -1], small[0][:, -1])
    grad = reserve(out.numel(), torch.float16).view(out.shape)
    grad[-5:] = normal(3, 5, heads, head_dim)
    found, _ = attention.attention_backward(grad, qkv, out, stats, *arguments, scale, 0.0, None)
    truth, _ = reference.attention_backward(grad[-length:], last, *small, None, None, length, scale, 0.0, None)
    near(found[:, :, -1], truth[:, :, -1])


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("kind", ["c2p", "p2c"])  # of both, the last program is that of the second alone
def test_disentangled_attention_of_many_rows(kind: str) -> None:
    heads, head_dim, length = 2, 16, 5
    qkv, last = (x.unflatten(1, (3, heads, head_dim)) for x in tall(3 * heads * head_dim, 1))
    table, slots = normal(2, 9, heads, head_dim), torch.arange(9, dtype=torch.int32)
    tables = (table if kind == "c2p" else None, table if kind == "p2c" else None, slots)
    starts = torch.tensor([0, len(qkv) - 5, len(qkv)], dtype=torch.int32)
    rest = None, length, head_dim**-0.5, 0.0, None, None
    assert len(qkv) * heads * attention.PITCH.value > 2**31
    out, stats = disentangled.disentangled_attention(qkv, *tables, starts, *rest)
    small = reference.disentangled_attention(last, *tables, None, *rest)
    near(out[:, -1], small[0][:, -1])
    grad = reserve(out.numel(), torch.float16).view(out.shape)
    grad[-5:] = normal(3, 5, heads, head_dim)
    found = disentangled.disentangled_attention_backward(grad, qkv, *tables, out, stats, starts, *rest)
    truth = reference.disentangled_attention_backward(grad[-5:], last, *tables, *small, None, *rest)
    near(found[0][:, :, -1], truth[0][:, :, -1])


@pytest.mark.usefixtures("far")
def test_normalization_of_many_rows() -> None:
    weight, bias = normal(3, 256), normal(4, 256)
    (x, last), (residual, last_residual) = tall(256, 1), tall(256, 2)
    near(layer_norm.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(last, weight, bias, 1e-5))
    rest = (weight, bias, 1e-5, 0.0, None)
    near(layer_norm.add_layer_norm(x, residual, *rest), reference.add_layer_norm(last, last_residual, *rest))
    grad, last_grad = tall(256, 5)
    found = layer_norm.add_layer_norm_backward(grad, x, residual, weight, 1e-5, 0.0, None)[1]
    near(found, reference.add_layer_norm_backward(last_grad, last, last_residual, weight, 1e-5, 0.0, None)[1])


@pytest.mark.usefixtures("far")
def test_embeddings_of_many_rows_from_a_table_of_many() -> None:
    word, last = tall(512, 1)
    types, positions, weight, bias = normal(2, 2, 512), normal(3, 9, 512), normal(4, 512), normal(5, 512)
    ids = torch.zeros(len(word), dtype=torch.int64)
    others = torch.ones_like(ids)
    ids[-5:] = torch.arange(len(word) - 5, len(word))
    found = embedding.embedding_layer_norm(ids, others, others, word, types, positions, weight, bias, 1e-5)
    few, ones = torch.arange(5), torch.ones(5, dtype=torch.int64)
    near(found, reference.embedding_layer_norm(few, ones, ones, last, types, positions, weight, bias, 1e-5))


@pytest.mark.usefixtures("far")
def test_packing_of_many_rows() -> None:
    x, last = tall(512, 1)
    indices = torch.zeros(len(x), dtype=torch.int64)
    indices[-1] = len(x) - 1
    assert torch.equal(padding.pack(x, indices, indices)[-1], last[-1])
    assert torch.equal(padding.unpack(x, indices, indices)[-1], last[-1])
