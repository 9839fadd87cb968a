"""What a Chrome trace by torch.profiler says: the time of every operator, by layer and by kernel, and the gaps.

`annotated` puts names into the trace that `read` goes by; the runs to look at are in ranges named RUN.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from .. import ops
from ..runtime.registry import stack_of
from ..usage import UsageError
from .counts import Cost

RUN = "fastbert profile: run"
_BACKWARD_OF_REST = "backward of the rest"
Event = Mapping[str, Any]
"""Of a Chrome trace, as JSON has it."""
_WAITS = re.compile(r"(cuda|hip)((Stream|Device|Event)Synchronize|Memcpy|MemcpyWithStream)")


@dataclass
class Row:
    """What one operator took in a run; on a GPU also what was launched outside of all operators, by its own name."""

    operator: str
    cost: Cost
    """0, where nothing is known of it."""
    calls: float = 0
    layers: dict[int | None, float] = field(default_factory=dict)
    """Seconds by layer; None: outside of the layers."""
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Launches and seconds by kernel; on a GPU."""

    @property
    def seconds(self) -> float:
        return sum(self.layers.values())

    def took(self, microseconds: float, layer: int | None, kernel: str | None = None) -> None:
        """Adds the time of one call, or of one kernel."""
        seconds = microseconds / 1e6
        self.layers[layer] = self.layers.get(layer, 0.0) + seconds
        if kernel is not None:
            launches, before = self.kernels.get(kernel, (0, 0.0))
            self.kernels[kernel] = launches + 1, before + seconds


def _median_row(rows: Sequence[Row]) -> Row:
    """Of one operator in several runs: medians by layer, and by kernel.

    By layer, as load beside the run that holds up one layer of each run would be in the median of whole rows.
    """
    layers = {layer: median(row.layers.get(layer, 0.0) for row in rows) for row in rows for layer in row.layers}
    kernels = {
        kernel: (
            median(row.kernels.get(kernel, (0, 0.0))[0] for row in rows),
            median(row.kernels.get(kernel, (0, 0.0))[1] for row in rows),
        )
        for row in rows
        for kernel in row.kernels
    }
    return Row(rows[0].operator, rows[0].cost, median(row.calls for row in rows), layers, kernels)


class Trace(NamedTuple):
    """What a trace says of a run: each figure the median of all that it holds."""

    rows: list[Row]
    """The longest first."""
    run_s: float
    """Under the profiler."""
    gap_s: float
    busy_s: float
    """While at least one operator ran; on a GPU a kernel."""
    synchronisations: float | None
    """None on a CPU, for which nothing waits."""
    copies_to_host: float | None


def _named(name: str, call: Callable[..., object]) -> Callable[..., object]:
    def named(*args: object) -> object:
        with record_function(name):
            return call(*args)

    return named


def _mark(layer: int | None) -> Callable[[Tensor], None]:
    def mark(grad: Tensor) -> None:
        with record_function(_BACKWARD_OF_REST if layer is None else f"backward of layer {layer}"):
            pass

    return mark


@contextlib.contextmanager
def annotated(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, traces of `model` name fastbert's operators and the layer each is in.

    Operators are wrapped, not sent through the dispatcher, as in inference they do not go through it: that would add
    dozens of microseconds to the time of each, where a range adds a few before and after it, to the gaps.
    """
    stack = stack_of(model)
    layers = {
        id(layer): itertools.cycle([place for place, each in enumerate(stack.calls) if each == i])
        for i, layer in enumerate(stack.layers)
    }
    kind: Any = type(stack.layers[0])  # on the class: a layer that is itself hooked or changed runs stock
    call = kind.__call__

    def layer(self: object, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        i = next(layers[id(self)])
        with record_function(f"layer {i}"):
            out = call(self, hidden_states, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out  # stock DeBERTa's, with what it says of attention
        if hidden.requires_grad:
            hidden.register_hook(_mark(i))
            if i == 0 and hidden_states.requires_grad:
                hidden_states.register_hook(_mark(None))
        return out

    before = {name: getattr(ops, name) for name in ops.OPERATORS}
    try:
        kind.__call__ = layer
        for name, operator in before.items():
            setattr(ops, name, _named(f"fastbert::{name}", operator))
        yield
    finally:
        del kind.__call__
        for name, operator in before.items():
            setattr(ops, name, operator)


class _Span(NamedTuple):
    """Of one thread, in microseconds."""

    start: float
    end: float
    name: str


def _outermost(spans: Iterable[_Span]) -> list[_Span]:
    """Those that lie in no other, in order."""
    found: list[_Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if not found or span.start >= found[-1].end:
            found.append(span)
    return found


def _within(spans: Sequence[_Span], moment: float) -> _Span | None:
    """The span, of some in order that don't overlap, in which a moment lies."""
    i = bisect.bisect_right(spans, moment, key=lambda span: span.start) - 1
    return spans[i] if i >= 0 and moment < spans[i].end else None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time in which at least one of them lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class _Timeline:
    """The runs of a trace, what each thread called in them, and the layers they went through."""

    def __init__(self, events: Iterable[Event], names: Iterable[str]) -> None:
        known = set(names)
        threads: dict[object, list[_Span]] = defaultdict(list)
        runs: list[_Span] = []
        self.entered: list[tuple[float, int | None]] = []
        """Moments, and the layer that what comes after them belongs to."""
        for event in events:
            if event["cat"] not in ("user_annotation", "cpu_op"):
                continue
            span = _Span(event["ts"], event["ts"] + event["dur"], event["name"])
            if span.name == RUN:
                runs.append(span)
                self.entered.append((span.start, None))
            elif span.name == _BACKWARD_OF_REST:
                self.entered.append((span.start, None))
            elif layer := re.fullmatch(r"(backward of )?layer (\d+)", span.name):
                self.entered.append((span.start, int(layer[2])))
                self.entered += [] if layer[1] else [(span.end, None)]
            elif span.name in known:
                threads[event["tid"]].append(span)
        self.runs = sorted(runs)
        self.entered.sort(key=lambda each: each[0])
        self.operators = {
            thread: [span for span in _outermost(spans) if _within(self.runs, span.start)]
            for thread, spans in threads.items()
        }

    def layer(self, moment: float) -> int | None:
        return self.entered[bisect.bisect_right(self.entered, moment, key=lambda each: each[0]) - 1][1]


class _Run:
    """What is found of one run."""

    def __init__(self, span: _Span, costs: Mapping[str, Cost]) -> None:
        self.span, self.costs = span, costs
        self.rows: dict[str, Row] = {}
        self.busy: list[tuple[float, float]] = []
        self.waits = self.copies = 0

    def row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row(name, self.costs.get(name, Cost(0, 0))))

    def times(self, device: torch.device) -> tuple[float, float, float]:
        """Its time, of which gaps, and busy, in seconds."""
        busy, took = _covered(self.busy), self.span.end - self.span.start
        if device.type == "cpu":
            return took / 1e6, (took - busy) / 1e6, busy / 1e6
        first, last = min(start for start, _ in self.busy), max(end for _, end in self.busy)
        took += max(0.0, last - self.span.end)  # the host is done before the device is
        return took / 1e6, (last - first - busy) / 1e6, busy / 1e6


def read(events: Iterable[Event], costs: Mapping[str, Cost], device: torch.device) -> Trace:
    """What a trace says of its runs: medians.

    Args:
        events: "traceEvents" of a Chrome trace by torch.profiler, of `annotated` runs in ranges named RUN.
        costs: of one run, by operator with its namespace; what other operators take counts as gaps.
        device: where it ran.

    Raises:
        UsageError: on a GPU a run has no kernel.
    """
    events = [event for event in events if event["ph"] == "X"]
    timeline = _Timeline(events, costs)
    runs = {span: _Run(span, costs) for span in timeline.runs}

    def run_of(moment: float) -> _Run | None:
        span = _within(timeline.runs, moment)
        return None if span is None else runs[span]

    for span in chain.from_iterable(timeline.operators.values()):
        if run := run_of(span.start):
            run.row(span.name).calls += 1
            if device.type == "cpu":
                run.row(span.name).took(span.end - span.start, timeline.layer(span.start))
                run.busy.append((span.start, span.end))
    if device.type != "cpu":
        _read_kernels(events, timeline, run_of)
        if not all(run.busy for run in runs.values()):
            raise UsageError(
                "the profiler saw no kernel; its library, CUPTI, may lack the permission to watch this GPU, "
                "which the driver grants to root, or to all with NVreg_RestrictProfilingToAdminUsers=0"
            )
    found = list(runs.values())
    names = {name: None for run in found for name in run.rows}
    rows = [_median_row([run.row(name) for run in found]) for name in names]
    run_s, gap_s, busy_s = (median(times) for times in zip(*(run.times(device) for run in found), strict=True))
    return Trace(
        sorted((row for row in rows if row.seconds), key=lambda row: -row.seconds),
        run_s,
        gap_s,
        busy_s,
        None if device.type == "cpu" else median(run.waits for run in found),
        None if device.type == "cpu" else median(run.copies for run in found),
    )


def _read_kernels(events: Sequence[Event], timeline: _Timeline, run_of: Callable[[float], _Run | None]) -> None:
    """Puts kernels, copies and waits into the runs that launched them."""
    launches: dict[int | None, tuple[_Run, Event]] = {}
    for event in events:
        if event["cat"] in ("cuda_runtime", "cuda_driver") and (run := run_of(event["ts"])):
            launches[event["args"].get("correlation")] = run, event
            run.waits += _WAITS.fullmatch(event["name"]) is not None
    for event in events:
        if event["cat"] not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        if event["args"]["correlation"] not in launches:
            continue  # launched in no run
        run, launch = launches[event["args"]["correlation"]]
        run.busy.append((event["ts"], event["ts"] + event["dur"]))
        run.copies += "DtoH" in event["name"]
        caller = _within(timeline.operators.get(launch["tid"], []), launch["ts"])
        found = run.row(event["name"] if caller is None else caller.name)
        found.calls += caller is None
        found.took(event["dur"], timeline.layer(launch["ts"]), event["name"])
