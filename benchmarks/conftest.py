"""What the suites of operators share: a shape, a dtype, and a comparison that is checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastbert import numerics
from fastbert.checkpoints import default_device
from fastbert.measure import counts, records
from fastbert.measure.cases import SHAPES, workload
from fastbert.measure.machine import Machine, environment
from fastbert.measure.names import WORKLOADS
from fastbert.runtime.packing import pack_mask

# On a GPU a round is this many calls and one wait for the device, or waiting would be most of what is timed.
CALLS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=list(SHAPES), default="large", help="of the model; default: large")
    parser.addoption(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.addoption("--workload", choices=WORKLOADS, default="squad")
    parser.addoption("--batch", type=int, help="sequences; default: 16 on a CPU, 128 on a GPU")
    parser.addoption("--records", type=Path, metavar="DIR", help="write records to DIR/<device>/<date>-<commit>.json")


TIMED = pytest.StashKey[list[Any]]()
"""Of each benchmark that ran: (what it was, candidate, Case, cost, seconds of each call)."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMED] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the records, where they are asked for: of what was timed before an interruption, too."""
    timed, folder = session.config.stash[TIMED], session.config.getoption("--records")
    if not timed or folder is None:
        return
    device, dtype = timed[0][2].device, timed[0][2].dtype
    about, rates = environment(device), Machine(device).rates(dtype)
    stock = {case["what"]: samples for case, candidate, *_, samples in timed if candidate == "stock"}
    found = [
        records.make(about, case, candidate, dtype, samples, stock.get(case["what"], []), cost, rates)
        for case, candidate, _, cost, samples in timed
    ]
    records.write(records.path_in(folder, about), found)


class Case(NamedTuple):
    """Sizes of a model, a batch, and tensors for it."""

    hidden: int
    intermediate: int
    heads: int
    lengths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed numbers."""
        return (torch.randn(shape, dtype=torch.float32) * scale).to(self.device, self.dtype)

    def linear(self, out: int, into: int) -> tuple[Tensor, Tensor]:
        """A weight (out, into), which keeps the scale of its input, and a bias (out,)."""
        return self.normal(out, into, scale=into**-0.5), self.normal(out)

    def mask(self) -> Tensor:
        """(batch, longest) bool, True at real tokens."""
        return (torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]).to(self.device)

    def packing(self) -> Any:
        """The packed layout of the batch."""
        return pack_mask(self.mask()).packing


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    option = request.config.getoption
    device = default_device(None)
    name = option("--dtype") or ("float32" if device.type == "cpu" else "bfloat16")
    shape = SHAPES[option("--size")]
    sizes = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    batch = option("--batch") or (16 if device.type == "cpu" else 128)
    torch.manual_seed(0)
    return Case(*sizes, workload(option("--workload"), batch).lengths, getattr(torch, name), device)


@pytest.fixture(params=["torch", "fused"])
def compare(request: pytest.FixtureRequest, benchmark: Any, case: Case) -> Callable[..., None]:
    """Times fused, or what PyTorch runs in its place, after holding fused to the numerical policy.

    compare(name, fused, peer, arguments, given=arguments, read=None): `fused` takes `arguments` and `peer` takes
    `given`; both return a tensor or several. Those of `peer`, after `read` where they are laid out otherwise, are the
    same to within the policy; run in float64, they are the truth. `name` is the operator whose FLOPs and bytes are
    written beside the times.
    """

    def run(
        name: str,
        fused: Callable[..., Any],
        peer: Callable[..., Any],
        arguments: tuple[Any, ...],
        given: tuple[Any, ...] | None = None,
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        given = arguments if given is None else given
        result = fused(*arguments)
        exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]
        stock, truth = (peer(*each) if read is None else read(peer(*each)) for each in (given, exact))
        for i, each in enumerate(zip(*map(_listed, (result, stock, truth)), strict=True)):
            numerics.assert_within_policy(*each, f"{name} {i}")

        cuda = case.device.type == "cuda"
        repeats = CALLS if cuda else 1
        call, inputs = (fused, arguments) if request.param == "fused" else (peer, given)

        def calls() -> None:
            for _ in range(repeats):
                call(*inputs)
            if cuda:
                torch.cuda.synchronize()

        dtype = str(case.dtype).removeprefix("torch.")
        size, batch = request.config.getoption("--size"), len(case.lengths)
        benchmark.group = f"{name}, {dtype}, {size}, {case.tokens} tokens"
        cost = counts.cost(name, arguments, result)
        benchmark.extra_info |= {"calls": repeats, **cost._asdict()}
        benchmark(calls)
        if benchmark.stats is not None:  # None where timing is disabled
            about = {
                "what": f"operator {name}",
                "workload": f"{request.config.getoption('--workload')} b{batch}",
                "size": size,
                "shape": {"batch": batch, "longest": max(case.lengths), "hidden": case.hidden, "heads": case.heads}
                | {"intermediate": case.intermediate},
                "real_tokens": case.tokens,
                "padded_tokens": batch * max(case.lengths),
            }
            samples = [seconds / repeats for seconds in benchmark.stats.stats.data]
            candidate = "fused" if request.param == "fused" else "stock"
            request.config.stash[TIMED].append((about, candidate, case, cost, samples))

    return run


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
