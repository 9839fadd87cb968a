"""A profile, as a table and as plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .machine import Rates

LEAST_SHARE = 0.005
"""Of the time of all operators; those with less stand together in the table and in the plots."""

HEADER = f"{'operator':<50}" + "".join(
    name.rjust(width)
    for name, width in (("calls", 7), ("ms", 10), ("share", 8), ("TFLOP/s", 10), ("TB/s", 10), ("roofline", 10))
)


def _line(name: str, row: Mapping[str, Any]) -> str:
    rates = row["flops_per_s"], row["bytes_per_s"]
    return (
        f"{name:<50}{row['calls']:>7g}{1000 * row['seconds']:>10.3f}{row['share']:>8.1%}"
        + "".join(f"{rate / 1e12:.3g}".rjust(10) if rate else " " * 10 for rate in rates)
        + (f"{row['fraction_of_floor']:>10.0%}" if row["bytes"] else "")
    )


def _together(rows: Iterable[dict[str, Any]]) -> dict[str, object]:
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
        f"wall time              {1000 * run['wall_s']:.3f} ms per {what}, median of {run['repeats']}, "
        f"{1000 * run['p20_s']:.3f} to {1000 * run['p80_s']:.3f}; {1000 * run['profiled_s']:.3f} under the profiler",
        f"tokens/s               {run['tokens_per_s']:,.0f}, {run['fraction_of_floor']:.0%} of the layers' roofline",
        f"host gaps              {1000 * run['gap_s']:.3f} ms, {run['gap_s'] / run['profiled_s']:.1%} of the profiled",
        "host synchronisations  "
        + (
            "none: a CPU is not waited for"
            if waits is None
            else f"{waits:g}, {run['copies_to_host']:g} copies to the host"
        ),
        f"peak memory            {'unknown' if memory is None else f'{memory / 2**20:,.1f} MiB'}",
    ]
    if run["stages"] is not None:
        parts = (f"{n} {1000 * s:.3f} ms ({s / run['wall_s']:.0%})" for n, s in run["stages"].items())
        lines.append(f"stages                 {', '.join(parts)}")
    if run["disturbed"]:
        times = f"{run['profiled_s'] / run['wall_s']:.2f} times as long"
        lines.append(
            f"warning                under the profiler it takes {times}: what operators take misleads; "
            "other load, or a call too short to be traced?"
        )
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
    matmuls = [row for row in rows if row["flops"]]
    intensities = [row["flops"] / row["bytes"] for row in matmuls]
    ridge = peak / copying
    least, most = min([ridge, *intensities]) / 3, max([ridge, *intensities]) * 3
    ceilings = f"measured ceilings: {peak:.3g} TFLOP/s, {copying:.3g} TB/s"
    left.plot([least, ridge, most], [least * copying, peak, peak], color="black", label=ceilings)
    right.axhline(copying, color="black")
    for row, intensity in zip(matmuls, intensities, strict=True):
        color, marker = looks[row["operator"]]
        left.plot(
            intensity, row["flops_per_s"] / 1e12, marker, color=color, markersize=8, alpha=0.8, label=row["operator"]
        )
    for i, row in enumerate(row for row in rows if row["bytes"] and not row["flops"]):
        color, marker = looks[row["operator"]]
        right.plot(i, row["bytes_per_s"] / 1e12, marker, color=color, markersize=8, alpha=0.8, label=row["operator"])
    for axes, ceiling, label, heading in (
        (left, peak, "TFLOP/s", "GEMMs and attention"),
        (right, copying, "TB/s", "no matmuls"),
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
