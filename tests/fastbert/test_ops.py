"""The torch.library operators: registered soundly, refused where they have no backward, routed to the right backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert import ops


def arguments(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """One sound call of every operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def integers(high: int, n: int) -> torch.Tensor:
        return torch.randint(0, high, (n,), generator=generator).to(device)

    x, weight, bias = normal(9, 32), normal(48, 32), normal(48)
    heads = normal(9, 3, 2, 16).unbind(1)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    norm = (normal(32), normal(32), 1e-12)
    tables = (normal(11, 32), normal(2, 32), normal(9, 32))
    return {
        "linear": (x, weight, bias),
        "linear_gelu": (x, weight, bias, "tanh"),
        "linear_add": (x, weight, None, normal(9, 48)),
        "qkv_linear": (x, weight, bias, weight, None, weight, bias),
        "attention": (*heads, cu_seqlens, None, 5, 0.25),
        "layer_norm": (x, *norm),
        "add_layer_norm": (x, normal(9, 32), *norm),
        "embedding_layer_norm": (integers(11, 9), integers(2, 9), torch.arange(9, device=device), *tables, *norm),
        "pack": (x, torch.tensor([0, 3, 8], device=device)),
        "unpack": (x, torch.tensor([0, -1, 8, 3], device=device)),
    }


def test_every_operator_is_covered() -> None:
    assert set(arguments()) == set(ops._OPERATORS)
    assert all(callable(getattr(ops, name)) for name in ops._OPERATORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops._OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(ops, name), arguments(dtype)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops._OPERATORS)
def test_opcheck_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(ops, name), arguments(dtype, "cuda")[name])


@pytest.mark.parametrize("name", ["linear", "attention", "layer_norm", "embedding_layer_norm", "pack"])
def test_a_call_that_needs_gradients_is_refused(name: str) -> None:
    args = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments()[name]
    ]
    with pytest.raises(NotImplementedError, match=f"fastbert::{name} has no backward"):
        getattr(ops, name)(*args)
    with torch.no_grad():
        assert not getattr(ops, name)(*args).requires_grad


def test_cpu_tensors_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments()["linear"]
    monkeypatch.setitem(ops.CPU_BACKEND, "linear", lambda *args: torch.full((1,), 7.0))
    assert ops.linear(x, weight, bias).item() == 7


@pytest.mark.gpu
def test_operators_run_on_the_device_of_their_tensors() -> None:
    """Also where that is not the current device."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x, weight, bias = arguments(device=str(device))["linear"]
    torch.testing.assert_close(ops.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
