"""The policy itself: what it measures, what it lets through and what it doesn't."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastbert import numerics

TRUTH = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_relative_error() -> None:
    assert numerics.relative_error(torch.tensor([3.0, 4.5]), TRUTH) == pytest.approx(0.1)
    assert numerics.relative_error(torch.tensor([0.0, 2.0]), 0 * TRUTH) == 2
    assert numerics.relative_error(torch.tensor([3.0, math.nan]), TRUTH) == math.inf
    assert numerics.relative_error(torch.tensor([3.0, math.inf]), TRUTH) == math.inf
    assert numerics.relative_error(torch.tensor([3.0, math.inf]), torch.tensor([3.0, math.inf]).double()) == 0
    assert numerics.relative_error(torch.empty(0), torch.empty(0).double()) == 0
    with pytest.raises(ValueError, match="shape"):
        numerics.relative_error(torch.ones(3), TRUTH)
    with pytest.raises(ValueError, match="float64"):
        numerics.relative_error(torch.ones(2), TRUTH.float())


def test_errors_are_taken_where_the_truth_lies() -> None:
    """No copy goes to the host: of a GPU's results, hundreds of MB in float64, that took most of the time."""
    moved: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, call: Any, kinds: Any, args: Any = (), more: Any = None) -> Any:
            if call in (Tensor.to, Tensor.cpu, Tensor.numpy, Tensor.tolist):
                moved.append((call.__name__, *args[1:]))
            return call(*args, **(more or {}))

    with Watch():
        assert numerics.relative_error(torch.tensor([3.0, 4.5]), TRUTH) == pytest.approx(0.1)
    assert moved == [("to", TRUTH.device)]


def test_the_bound_is_stocks_error_and_a_tenth_and_one_rounding() -> None:
    assert numerics.bound(0.01, torch.bfloat16) == pytest.approx(0.011 + 2**-8)
    assert numerics.bound(0.0, torch.float32) == 2**-24


def test_only_what_is_within_the_bound_passes() -> None:
    stock = torch.tensor([3.0, 4.05])  # an error of 1 %
    assert numerics.assert_within_policy(torch.tensor([3.0, 4.054]), stock, TRUTH) == pytest.approx(
        (0.0108, 0.01), 1e-4
    )
    for wrong in (4.056, math.nan, math.inf):
        with pytest.raises(AssertionError, match="logits: error"):
            numerics.assert_within_policy(torch.tensor([3.0, wrong]), stock, TRUTH, "logits")
    with pytest.raises(AssertionError, match="dtype"):
        numerics.assert_within_policy(stock.half(), stock, TRUTH)


def test_a_broken_stock_result_lets_nothing_through() -> None:
    with pytest.raises(AssertionError, match="sets no bound"):
        numerics.assert_within_policy(torch.tensor([3.0, 4.0]), torch.tensor([3.0, math.nan]), TRUTH)
