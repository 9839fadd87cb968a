"""`fastbert profile`: where the time of a forward or a training step goes, by operator, and how near to the floor.

Rows are fastbert's operators, and torch's own where they are called outside of those. On a CPU an operator's time is
that between its begin and its end; on a GPU that of the kernels launched in between, which are named. What it costs at
least stands in `counts`, and its floor is the larger of FLOPs over the rate of matrix products and bytes over the rate
of copying, both measured in the run. What a cache still holds is read faster than that, so that small shapes can be
above 100 %. All is of one forward or step, and an average over several; wall time is taken without the profiler.

Host gaps are, on a CPU, the time of a run outside of operators; on a GPU the time between its first and its last kernel
in which none ran. A host synchronisation is a call that waits for the device, as `.item()` and a copy to the host make.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, BertConfig
from transformers.utils import logging

from .. import explain, fuse
from ..layers.embeddings import positions
from ..version import install
from . import UsageError, check_file, counts, in_a_line, write_text
from .cases import SHAPES, Workload, build, check_batch, workload
from .checkpoints import check_folder
from .counts import Cost
from .info import backend, default_device, device_name
from .machine import Machine, Rates, environment, peak_growth, timed
from .peers import share
from .trace import RUN, Row, Trace, annotated, read

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports to the terminal when it starts and when it stops

LEAST_RUNS, MOST_RUNS, SECONDS = 3, 20, 4.0
"""Timed runs of each way to run the model; those after the least only while this time lasts."""
MOST_TRACED = 5
LEAST_SHARE = 0.005
"""Of the time of all operators; those with less stand together in the table and in the plots."""


class _Costs(TorchDispatchMode):
    """Adds up the costs of the operators that are called, by name with namespace."""

    knows_fastbert = True

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Cost] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def _traced(call: Callable[[], Any], model: Any, runs: int, device: torch.device, file: Path | None) -> list[Any]:
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
        events: list[Any] = json.loads(written.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _plain(row: Row, whole: float, rates: Rates) -> dict[str, Any]:
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

    @property
    def wall_s(self) -> float:
        return statistics.median(self.samples)

    def to_dict(self, tokens: int, floor: float, rates: Rates) -> dict[str, Any]:
        """Plain data; `tokens` are real ones, `floor` is the least time the layers take, in seconds."""
        whole = sum(row.seconds for row in self.trace.rows)
        quantiles = statistics.quantiles(self.samples, n=5, method="inclusive")
        return {
            "run": self.name,
            "wall_s": self.wall_s,
            "p20_s": quantiles[0],
            "p80_s": quantiles[-1],
            "repeats": len(self.samples),
            "tokens_per_s": tokens / self.wall_s,
            "fraction_of_floor": floor / self.wall_s,
            "profiled_s": self.trace.run_s,
            "gap_s": self.trace.gap_s,
            "host_synchronisations": self.trace.synchronisations,
            "copies_to_host": self.trace.copies_to_host,
            "peak_memory_bytes": self.peak_memory,
            "operators": [_plain(row, whole, rates) for row in self.trace.rows],
        }


def _run(model: Any, item: Workload, train: bool) -> Callable[[], None]:
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


def measure(models: Mapping[str, Any], item: Workload, train: bool, trace: Path | None = None) -> list[Profile]:
    """Takes the memory of every model, times them by turns, counts their costs and traces them.

    Args:
        models: by name; over the same weights, on one device.
        item: the batch.
        train: whether training steps are profiled, not forwards.
        trace: where to write the Chrome trace of the first.

    Raises:
        UsageError: what should run fused runs stock.
    """
    device = next(iter(models.values())).device
    calls = {name: _run(model, item, train) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    memory = {}
    for name, call in calls.items():
        call()  # compiles, and makes the gradients, which the memory of a step does not count
        for each in explain(models[name]).encoders:
            if each.stock_calls:
                raise UsageError(f"the model runs stock: {', '.join(each.stock_calls)}")
        memory[name] = peak_growth(call, device)
    deadline = time.monotonic() + SECONDS * len(models)
    for done in range(MOST_RUNS):
        if done >= LEAST_RUNS and time.monotonic() > deadline:
            break
        for name, call in calls.items():
            models[name].zero_grad()
            samples[name].append(timed(call, device))
    found: list[Profile] = []
    for name, call in calls.items():
        models[name].zero_grad()
        with _Costs() as costs:
            call()
        runs = min(MOST_TRACED, len(samples[name]))
        events = _traced(call, models[name], runs, device, None if found else trace)
        found.append(Profile(name, samples[name], memory[name], read(events, costs.found, device)))
    return found


HEADER = f"{'operator':<50}" + "".join(
    name.rjust(width)
    for name, width in (("calls", 7), ("ms", 10), ("share", 8), ("TFLOP/s", 10), ("TB/s", 10), ("floor", 7))
)


def _line(name: str, row: Mapping[str, Any]) -> str:
    rates = row["flops_per_s"], row["bytes_per_s"]
    return (
        f"{name:<50}{row['calls']:>7g}{1000 * row['seconds']:>10.3f}{row['share']:>8.1%}"
        + "".join(f"{rate / 1e12:.3g}".rjust(10) if rate else " " * 10 for rate in rates)
        + (f"{row['fraction_of_floor']:>7.0%}" if row["bytes"] else "")
    )


def _together(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows added up."""
    sums = {key: sum(row[key] for row in rows) for key in ("calls", "seconds", "share", "flops", "bytes")}
    floor = sum(row["fraction_of_floor"] * row["seconds"] for row in rows)
    rates = {f"{key}_per_s": sums[key] / sums["seconds"] for key in ("flops", "bytes")}
    return {**sums, **rates, "fraction_of_floor": floor / sums["seconds"]}


def table(run: Mapping[str, Any], what: str) -> str:
    """A run of the record, as text; `what` it was one of: "forward" or "training step"."""
    rows = run["operators"]
    lines = [HEADER]
    for row in rows:
        if row["share"] >= LEAST_SHARE:
            lines.append(_line(row["operator"], row))
            lines += [
                f"  {name[:46]:<48}{kernel['launches']:>7g}{1000 * kernel['seconds']:>10.3f}"
                for name, kernel in row["kernels"].items()
                if name != row["operator"]
            ]
    if small := [row for row in rows if row["share"] < LEAST_SHARE]:
        lines.append(_line(f"{len(small)} others, each under {LEAST_SHARE:.1%}", _together(small)))
    lines.append(_line("all operators", _together(rows)))
    waits, memory = run["host_synchronisations"], run["peak_memory_bytes"]
    lines += [
        "",
        f"wall time              {1000 * run['wall_s']:.3f} ms a {what}, median of {run['repeats']}, "
        f"{1000 * run['p20_s']:.3f} to {1000 * run['p80_s']:.3f}; {1000 * run['profiled_s']:.3f} under the profiler",
        f"tokens/s               {run['tokens_per_s']:,.0f}, {run['fraction_of_floor']:.0%} of the floor of the layers",
        f"host gaps              {1000 * run['gap_s']:.3f} ms, {run['gap_s'] / run['profiled_s']:.1%} of the profiled",
        "host synchronisations  "
        + (
            "none: a CPU is not waited for"
            if waits is None
            else f"{waits:g}, {run['copies_to_host']:g} copies to the host"
        ),
        f"peak memory            {'unknown' if memory is None else f'{memory / 2**20:,.1f} MiB'}",
    ]
    return "\n".join(lines)


def plot(run: Mapping[str, Any], title: str, rates: Rates, folder: Path, prefix: str = "") -> None:
    """Writes `folder`/`prefix`roofline.png and `prefix`layers.png, 900 pixels wide: a run of the record."""
    from matplotlib.figure import Figure

    rows = [row for row in run["operators"] if row["share"] >= LEAST_SHARE]
    small = [row for row in run["operators"] if row["share"] < LEAST_SHARE]
    looks = {row["operator"]: (f"C{i % 10}", "os^Dv"[(i + i // 10) % 5]) for i, row in enumerate(rows)}
    below = 0.2 * (len(rows) // 2 + 1)  # inches the legend takes

    figure = Figure((9, 4.8 + below), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    peak, copying = rates.flops_per_s / 1e12, rates.bytes_per_s / 1e12
    products = [row for row in rows if row["flops"]]
    intensities = [row["flops"] / row["bytes"] for row in products]
    ridge = peak / copying
    least, most = min([ridge, *intensities]) / 3, max([ridge, *intensities]) * 3
    ceilings = f"measured ceilings: {peak:.3g} TFLOP/s, {copying:.3g} TB/s"
    left.plot([least, ridge, most], [least * copying, peak, peak], color="black", label=ceilings)
    right.axhline(copying, color="black")
    for row, intensity in zip(products, intensities, strict=True):
        color, marker = looks[row["operator"]]
        left.plot(
            intensity, row["flops_per_s"] / 1e12, marker, color=color, markersize=8, alpha=0.8, label=row["operator"]
        )
    for i, row in enumerate(row for row in rows if row["bytes"] and not row["flops"]):
        color, marker = looks[row["operator"]]
        right.plot(i, row["bytes_per_s"] / 1e12, marker, color=color, markersize=8, alpha=0.8, label=row["operator"])
    for axes, ceiling, label, heading in (
        (left, peak, "TFLOP/s", "matrix products and attention"),
        (right, copying, "TB/s", "no products"),
    ):
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_title(heading, fontsize=10)
        axes.margins(x=0.15)
        shown = [y for line in axes.lines for y in line.get_ydata()]
        axes.set_ylim(min([*shown, ceiling / 8]) / 1.6, max(shown) * 1.6)  # a decade at least
        axes.grid(True, alpha=0.3)
    left.set_xscale("log")
    left.margins(x=0.02)
    left.set_xlabel("FLOP per byte")
    right.set_xticks([])
    figure.suptitle(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(folder / f"{prefix}roofline.png")

    figure = Figure((9, 4.8 + below), dpi=100, layout="constrained")
    axes = figure.subplots()
    bars = [
        (row["operator"], looks[row["operator"]][0], ("", "//", "xx")[i // 10 % 3], [row]) for i, row in enumerate(rows)
    ]
    bars += [("others", "lightgrey", "", small)] if small else []
    found = {layer for row in run["operators"] for layer in row["layers"]}
    layers = sorted(found, key=lambda layer: (layer == "outside", layer.rjust(9)))
    tops = [0.0] * len(layers)
    for name, color, hatch, parts in bars:
        heights = [1000 * sum(row["layers"].get(layer, 0.0) for row in parts) for layer in layers]
        axes.bar(layers, heights, bottom=tops, color=color, hatch=hatch, label=name)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    axes.set_xlabel("layer")
    axes.set_ylabel("time of operators, ms")
    axes.set_title(title, fontsize=11)
    axes.set_axisbelow(True)
    axes.grid(True, axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(folder / f"{prefix}layers.png")


def _item(arguments: argparse.Namespace) -> tuple[str, Workload]:
    """(what the user calls it, the batch).

    Raises:
        UsageError: lengths that are none, or arguments that don't go together.
    """
    batch = arguments.batch
    if batch is not None:
        check_batch(batch)
    if arguments.lengths is None:
        name = arguments.workload or "squad"
        return f"--workload {name}", workload(name) if batch is None else workload(name, batch)
    try:
        lengths = [int(part) for part in arguments.lengths.split(",")]
    except ValueError as error:
        raise UsageError(f"--lengths {arguments.lengths}: expected integers between commas, as 12,40,128") from error
    if min(lengths) <= 0:
        raise UsageError(f"--lengths {arguments.lengths}: holds {min(lengths)}; expected more than 0")
    if batch is not None:
        if len(lengths) > 1:
            raise UsageError(f"--batch is given with {len(lengths)} --lengths; expected one length, for every sequence")
        lengths *= batch
    return f"--lengths {arguments.lengths}", Workload(f"b{len(lengths)}", tuple(lengths))


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises UsageError naming the first output that can't be written: now, not after measuring."""
    check_file("--json", arguments.json)
    check_file("--trace", arguments.trace)
    if arguments.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"--plot needs matplotlib, which is not installed: {install('bench')}")
        try:
            Path(arguments.plot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--plot {arguments.plot}: {in_a_line(error)}; expected a folder") from error


def _config(arguments: argparse.Namespace) -> Any:
    """The model's config.

    Raises:
        UsageError: there is no such checkpoint.
    """
    path = arguments.model
    if path is None:
        return BertConfig(**SHAPES[arguments.size or "large"])
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever reading files and asking the hub raises: to a user it is one thing
        raise UsageError(f"--model {path}: {in_a_line(error)}") from error


def _models(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Fused, and stock where it is asked for, over the same weights.

    Raises:
        UsageError: transformers can't load the checkpoint, or fastbert can't fuse it.
    """
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    if arguments.model is None:
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        stock = build(arguments.size or "large", dtype, device)
    else:
        try:
            stock = AutoModel.from_pretrained(arguments.model, trust_remote_code=False, dtype=dtype or "auto").to(
                device
            )
        except Exception as error:  # as above
            raise UsageError(f"--model {arguments.model}: {in_a_line(error)}") from error
    try:
        fused = fuse(share(stock))
    except ValueError as error:  # UnsupportedModelError is one
        raise UsageError(f"--model {arguments.model}: {in_a_line(error)}") from error
    return {"fused": fused, **({"stock": stock} if arguments.compare else {})}


def main(arguments: argparse.Namespace) -> int:
    logging.disable_progress_bar()
    given, item = _item(arguments)
    device = default_device(arguments.device)
    _check_outputs(arguments)
    config = _config(arguments)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max(item.lengths) > limit:
        raise UsageError(f"{given}: holds {max(item.lengths)}; expected at most max_position_embeddings, {limit}")
    models = _models(arguments, device)
    longest = positions(models["fused"].embeddings)
    if max(item.lengths) > longest:  # a family whose first positions are that of padding
        raise UsageError(f"{given}: holds {max(item.lengths)}; the model has positions for {longest}")
    dtype, config = models["fused"].dtype, models["fused"].config
    rates = Machine(device).rates(dtype)
    what = "training step" if arguments.train else "forward"
    model = arguments.model or arguments.size or "large"
    short = f"{Path(model).name}, {str(dtype).removeprefix('torch.')}, {item.name}, {item.real_tokens} tokens"
    print(f"{device_name(device)}, fused by {backend(device)}; {what} of {short}")
    print(f"measured ceilings: {rates.flops_per_s / 1e12:.3g} TFLOP/s, {rates.bytes_per_s / 1e12:.3g} TB/s")

    least = counts.encoder(config, item.lengths, dtype, arguments.train)
    profiles = measure(models, item, arguments.train, None if arguments.trace is None else Path(arguments.trace))
    runs = [profile.to_dict(item.real_tokens, rates.floor(least), rates) for profile in profiles]
    record = {
        "what": f"{type(models['fused']).__name__} {what}",
        "model": model,
        "workload": item.name,
        "lengths": item.lengths,
        "dtype": str(dtype).removeprefix("torch."),
        "real_tokens": item.real_tokens,
        "padded_tokens": item.padded_tokens,
        "machine": rates._asdict(),
        "encoder": least._asdict(),
        "runs": runs,
        "ratio_to_stock": runs[1]["wall_s"] / runs[0]["wall_s"] if arguments.compare else None,
        **environment(device),
    }
    for run in runs:
        print(f"\n{run['run']}\n{table(run, what)}")
    if arguments.compare:
        print(f"\nx stock                {record['ratio_to_stock']:.2f}")
    if arguments.json is not None:
        write_text("--json", arguments.json, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if arguments.plot is not None:
        for run in runs:
            prefix = "" if run["run"] == "fused" else f"{run['run']}-"
            plot(run, f"{run['run']} {what}: {short}", rates, Path(arguments.plot), prefix)
    return 0
