"""The CPU backend against the oracle: every operator, on one sound call, and bitwise where numbers are only moved."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastbert import ops
from fastbert.kernels import cpu, reference, reference_fp8
from tests.fastbert.test_ops import arguments

EXACT = ("attention_tiles", "mask_layout", "pack", "unpack")


def test_signatures_are_those_of_the_oracle() -> None:
    for name in ops.OPERATORS:
        oracle = getattr(reference_fp8 if name.endswith("_fp8") else reference, name)
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(oracle), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if not name.endswith("_fp8")])
def test_cpu_is_the_oracle(name: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, dropout=0.0)[name]
    found, truth = getattr(cpu, name)(*args), getattr(reference, name)(*args)
    for mine, its in zip(*([x] if isinstance(x, Tensor) else x for x in (found, truth)), strict=True):
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
        if name in EXACT:
            assert torch.equal(mine, its)
        elif its.numel():
            # Both round once or twice to the dtype: within eight units in the last place of the largest number.
            assert (mine - its).abs().max() <= 8 * torch.finfo(dtype).eps * its.abs().max()


@pytest.mark.parametrize("name", ["attention_forward", "add_layer_norm"])
def test_the_oracle_drops_the_same_again_in_the_backward(name: str) -> None:
    """Its backward, with dropout, against finite differences of its forward."""
    args = arguments(torch.float64, dropout=0.3)
    given = args[name]
    x = given[0]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(x: Tensor) -> Tensor:
        result = getattr(reference, name)(x, *given[1:])
        return result[0] if isinstance(result, tuple) else result

    grad = torch.randn(out(x).shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    step = 1e-6
    slope = ((out(x + step * direction) - out(x - step * direction)) * grad).sum() / (2 * step)
    if name == "attention_forward":
        dx, _ = reference.attention_backward(grad, x, *reference.attention_forward(*given), *given[1:])
    else:
        dx = reference.add_layer_norm_backward(grad, x, given[1], given[2], *given[4:])[0]
    torch.testing.assert_close((dx * direction).sum(), slope, rtol=1e-6, atol=1e-6)
    plain = out(x), getattr(reference, name)(*given[:5], 0.0, None)
    assert not torch.equal(plain[0], plain[1][0] if isinstance(plain[1], tuple) else plain[1])
