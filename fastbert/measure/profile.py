"""Where the time of a forward or a training step goes, by operator, and how near to the roofline.

Rows are fastbert's operators, and torch's own where they are called outside of those. On a CPU an operator's time is
that between its begin and its end; on a GPU that of the kernels launched in between, which are named. What it costs at
least stands in `counts`, and its roofline is the larger of FLOPs over the rate of matmuls and bytes over the rate
of copying, both measured in the run. What a cache still holds is read faster than that, so that small shapes can be
above 100 %. All is of one forward or step, each figure the median of several; wall time is taken without the profiler.

Of a pipeline from strings one call is what the model's own method does with all texts, by stages: tokenising; the
device, which on a CPU are the operators; the host, which is the rest of the model's forwards; and what is in neither.

Host gaps are, on a CPU, the time of a run outside of operators; on a GPU the time between its first and its last kernel
in which none ran. A host synchronisation is a call that waits for the device, as `.item()` and a copy to the host make.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..explain import explain
from ..usage import UsageError
from . import counts
from .cases import Workload
from .counts import Cost
from .machine import Rates, peak_growth, quantiles, timed
from .pipeline import Model, Staged, Text, base_of
from .trace import RUN, Row, Trace, annotated, read

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports to the terminal when it starts and when it stops

LEAST_RUNS, MOST_RUNS, SECONDS = 3, 20, 4.0
"""Timed runs of each way to run the model; those after the least only while this time lasts."""
MOST_TRACED = 9
DISTURBED = 1.25
"""Where a run takes so many times as long traced as it does untraced, or the other way round, its trace misleads."""


class _Costs(TorchDispatchMode):
    """Adds up the costs of the operators that are called, by name with namespace."""

    knows_fastbert = True

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Cost] = {}

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        name = func._schema.name
        space, _, short = name.partition("::")
        if space == "aten":
            with self:  # into the operators that have kernels, in which form the profiler sees them, too
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        ours = space == "fastbert"
        cost = counts.cost(short, args, result) if ours else counts.torch_cost(func, args, kwargs, result)
        self.found[name] = counts.total([self.found.get(name, Cost(0, 0)), cost])
        return result


def _traced(
    call: Callable[[], object], model: torch.nn.Module, runs: int, device: torch.device, file: Path | None
) -> list[Any]:
    """The events of a Chrome trace of some runs, which is written to `file`, too."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with annotated(model), torch.profiler.profile(activities=activities) as profiler:
        for run in range(runs + 1):
            model.zero_grad()
            with record_function(RUN) if run else contextlib.nullcontext():  # the first one warms up the profiler
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # outside of the run, so that it is none of its waits
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(written))
        if file is not None:
            shutil.copyfile(written, file)
        events: list[object] = json.loads(written.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _plain(row: Row, whole: float, rates: Rates) -> dict[str, object]:
    """A row as plain data; `whole` is the time of all operators, in seconds."""
    return {
        "operator": row.operator,
        "calls": row.calls,
        "seconds": row.seconds,
        "share": row.seconds / whole,
        "flops": row.cost.flops,
        "bytes": row.cost.bytes,
        "flops_per_s": row.cost.flops / row.seconds,
        "bytes_per_s": row.cost.bytes / row.seconds,
        "fraction_of_floor": rates.floor(row.cost) / row.seconds,
        "kernels": {name: {"launches": n, "seconds": seconds} for name, (n, seconds) in row.kernels.items()},
        "layers": {"outside" if i is None else str(i): seconds for i, seconds in row.layers.items()},
    }


@dataclass(frozen=True)
class Profile:
    """One way to run the model, and what a run took."""

    name: str
    samples: list[float]
    """Seconds of each run, without the profiler."""
    peak_memory: int | None
    trace: Trace
    stages: dict[str, float] | None = None
    """Seconds of a pipeline's stages; None of a forward or a step."""

    @property
    def wall_s(self) -> float:
        return statistics.median(self.samples)

    def to_dict(self, tokens: int, floor: float, rates: Rates) -> dict[str, Any]:
        """Plain data; `tokens` are real ones, `floor` is the least time the layers take, in seconds."""
        whole = sum(row.seconds for row in self.trace.rows)
        low, _, high = quantiles(self.samples)
        return {
            "run": self.name,
            "wall_s": self.wall_s,
            "p20_s": low,
            "p80_s": high,
            "repeats": len(self.samples),
            "tokens_per_s": tokens / self.wall_s,
            "fraction_of_floor": floor / self.wall_s,
            "profiled_s": self.trace.run_s,
            "disturbed": not 1 / DISTURBED <= self.trace.run_s / self.wall_s <= DISTURBED,
            "gap_s": self.trace.gap_s,
            "host_synchronisations": self.trace.synchronisations,
            "copies_to_host": self.trace.copies_to_host,
            "peak_memory_bytes": self.peak_memory,
            "operators": [_plain(row, whole, rates) for row in self.trace.rows],
            "stages": self.stages,
        }


def _run(model: PreTrainedModel, item: Workload, train: bool) -> Callable[[], None]:
    """What is profiled: a forward, or one with dropout and a backward from a fixed random gradient at real tokens."""
    device, config = model.device, model.config
    inputs = item.inputs(device)
    inputs["input_ids"] %= config.vocab_size
    shape = (*inputs["input_ids"].shape, config.hidden_size)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    grad *= inputs["attention_mask"][..., None]
    model.train(train)

    def run() -> None:
        with torch.inference_mode(not train):
            hidden = model(**inputs).last_hidden_state
            if train:
                hidden.backward(grad)

    return run


def measure(
    models: Mapping[str, PreTrainedModel], item: Workload, train: bool, trace: Path | None = None
) -> list[Profile]:
    """Profiles forwards, or training steps.

    Args:
        models: base models by name; over the same weights, on one device.
        item: the batch.
        train: whether training steps are profiled, not forwards.
        trace: where to write the Chrome trace of the first.

    Raises:
        UsageError: what should run fused runs stock.
    """
    return _measure({name: (model, model, _run(model, item, train)) for name, model in models.items()}, trace)


def measure_texts(
    models: Mapping[str, Model], texts: list[Text], batch: int, trace: Path | None = None
) -> list[Profile]:
    """Profiles what the models' own method does with all of `texts`, by stages.

    Args:
        models: of sentence-transformers, by name; over the same weights, on one device.
        texts: all of a call.
        batch: texts in a forward.
        trace: where to write the Chrome trace of the first.

    Raises:
        UsageError: what should run fused runs stock.
    """
    staged = {name: Staged(model) for name, model in models.items()}
    calls = {name: (models[name], base_of(models[name]), partial(each, texts, batch)) for name, each in staged.items()}
    found = _measure(calls, trace)
    return [replace(each, stages=staged[each.name].stages(each.samples, each.trace.busy_s)) for each in found]


def _measure(
    calls: Mapping[str, tuple[torch.nn.Module, PreTrainedModel, Callable[[], object]]], trace: Path | None
) -> list[Profile]:
    """Takes the memory of (what is fused or stock, its base model, a call) by name, times, counts and traces them."""
    device = next(iter(calls.values()))[1].device
    samples: dict[str, list[float]] = {name: [] for name in calls}
    memory = {}
    for name, (model, _, call) in calls.items():
        call()  # compiles, and makes the gradients, which the memory of a step does not count
        for each in explain(model).encoders:
            if each.stock_calls:
                raise UsageError(f"the model runs stock: {', '.join(each.stock_calls)}")
        memory[name] = peak_growth(call, device)
    deadline = time.monotonic() + SECONDS * len(calls)
    for done in range(MOST_RUNS):
        if done >= LEAST_RUNS and time.monotonic() > deadline:
            break
        for name, (model, _, call) in calls.items():
            model.zero_grad()
            samples[name].append(timed(call, device))
    found: list[Profile] = []
    for name, (model, base, call) in calls.items():
        model.zero_grad()
        with _Costs() as costs:
            call()
        runs = min(MOST_TRACED, len(samples[name]))
        events = _traced(call, base, runs, device, None if found else trace)
        found.append(Profile(name, samples[name], memory[name], read(events, costs.found, device)))
    return found
