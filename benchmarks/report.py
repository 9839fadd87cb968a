"""The README's table, docs/measured.md and docs/<device>.svg, from records: `python benchmarks/report.py FILES`.

Of every case the latest run counts, of those whose gates are green. The README has the headlines of one device, and
what begins with strings, of one model;
docs/measured.md has all candidates of all devices with their spread, operators and cold starts; the plots, forwards and
training steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastbert.measure.records import device_folder, latest, load, proven
from fastbert.usage import UsageError, in_a_line
from fastbert.version import install

MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"
ROWS = 6
"""Of the README's table."""
# Cases that the README shows first: what, dtype, workload. Of one in several batches, whichever were run.
HEADLINES = (
    ("forward", "bfloat16", "squad"),
    ("training step", "bfloat16", "squad"),
    ("forward", "bfloat16", "dense128"),
    ("forward", "bfloat16", "search"),
    ("forward", "float32", "squad"),
    ("forward", "float32", "dense128"),
)
MODEL = "BertModel "
"""What the README and the charts are of."""
OF_A_MODEL = re.compile(r"\w+Model ")
TEXTS = "encode, "
"""What begins with strings: benchmarks/encode.py."""
SHOWN = ("query 16", "query 128", "queries", "corpus", "rerank", "tag", "late queries", "late documents", "sparse")
"""Of those, what the README shows."""
Runs = dict[tuple[str, ...], dict[str, dict[str, Any]]]


def figure(record: dict[str, Any] | None, name: str, form: str, unit: float = 1) -> str:
    """A field for a table, in units of `unit`; in its place what became of the candidate, where it has no time."""
    if record is None:
        return "-"
    if record["status"] != "ok":
        return str(record["status"]).partition(":")[0]
    value = record[name]
    return "-" if value is None else format(value if unit == 1 else value / unit, form)


def _table(header: Sequence[str], left: int, rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first `left` columns are text and the others figures."""
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _device(runs: Runs) -> str:
    """A GPU before a CPU, then the one with most cases."""
    devices = [case[0] for case in runs]
    on_gpu = {case[0]: next(iter(run.values()))["backend"].startswith("triton") for case, run in runs.items()}
    return max(sorted(set(devices)), key=lambda name: (on_gpu[name], devices.count(name)))


def _headlines(records: Iterable[dict[str, Any]]) -> tuple[str, Runs]:
    """The device that the README shows, a GPU before a CPU, then the one with most cases; and its cases.

    Of a headline the largest batch counts: one sequence alone is a question of latency.
    """
    runs = {case: run for case, run in latest(records).items() if case[1].startswith(MODEL)}
    if not runs:
        return "", {}
    device = _device(runs)
    ours = {case: run for case, run in runs.items() if case[0] == device}

    def rank(case: tuple[str, ...]) -> tuple[int, int]:
        _, what, _, dtype, workload = case
        kind, _, batch = workload.partition(" b")
        key = (what.removeprefix(MODEL), dtype, kind)
        size = int(batch) if batch.isdigit() else 0
        return (HEADLINES.index(key) if key in HEADLINES and size > 1 else len(HEADLINES), -size)

    return device, {case: ours[case] for case in sorted(ours, key=rank)[:ROWS]}


def _x_stock(run: dict[str, dict[str, Any]]) -> str:
    return figure(run.get("fused"), "ratio_to_stock", ".2f")


def figures(records: Iterable[dict[str, Any]]) -> str:
    """The first three headlines in words."""
    device, runs = _headlines(records)
    lines = []
    for (_, what, model, dtype, workload), run in list(runs.items())[:3]:
        padded = max(record["ideal_ratio"] for record in run.values())
        rows = "no padding" if padded < 1.005 else f"{1 - 1 / padded:.0%} of the padded rows are padding"
        what = what.removeprefix(MODEL)
        lines.append(f"- **{_x_stock(run)} x stock**: {what}, BERT-{model}, {dtype}, {workload}, {rows}; {device}")
    return "\n".join(lines)


def readme(records: Iterable[dict[str, Any]]) -> str:
    """The table of the README: stock, fused, and the fastest of the others, for the headlines of one device."""
    header = [
        *("what", "model", "dtype", "workload", "padded / real rows", "stock, tokens/s", "fused, tokens/s"),
        *("x stock", "best other, x stock"),
    ]
    rows = []
    for (_, what, *case), run in _headlines(records)[1].items():
        others = [r for name, r in run.items() if name != "stock" and r["ratio_to_stock"] is not None]
        others = [r for r in others if not r["candidate"].startswith("fused")]
        best = max(others, key=lambda record: record["ratio_to_stock"], default=None)
        rows.append(
            [
                *(what.removeprefix(MODEL), *case),
                f"{max(record['ideal_ratio'] for record in run.values()):.2f}",
                figure(run.get("stock"), "tokens_per_s", ",.0f"),
                figure(run.get("fused"), "tokens_per_s", ",.0f"),
                _x_stock(run),
                "-" if best is None else f"{best['ratio_to_stock']:.2f} {best['candidate']}",
            ]
        )
    return "\n".join(_table(header, 4, rows))


def texts(records: Iterable[dict[str, Any]]) -> str:
    """The table of what begins with strings: on one device the model and dtype that most was measured of.

    Of the ways to run fused, the model's own method, prepacked too, and `fastbert.encode`, the fastest; others of the
    same precision.
    """
    runs = {case: run for case, run in latest(records).items() if case[1].startswith(TEXTS)}
    header = ["what", "model", "dtype", "workload", "padded / real rows", "stock, ms", "fused, ms", "x stock"]
    header.append("best other, x stock")
    if not runs:
        return "\n".join(_table(header, 4, []))
    device = _device(runs)
    kinds = [case[2:4] for case in runs if case[0] == device]
    kind = max(sorted(set(kinds)), key=kinds.count)
    rows = []
    for what in SHOWN:
        for (where, name, *case), run in runs.items():
            if (where, name, tuple(case[:2])) != (device, TEXTS + what, kind):
                continue
            good = [record for record in run.values() if record["ratio_to_stock"] is not None]
            ours = [record for record in good if record["candidate"].startswith("fused")]
            others = [r for r in good if r["candidate"] != "stock" and r not in ours and "int8" not in r["candidate"]]
            fused = max(ours, key=lambda record: record["ratio_to_stock"], default=None)
            best = max(others, key=lambda record: record["ratio_to_stock"], default=None)
            rows.append(
                [
                    *(what, *case),
                    f"{max(record['ideal_ratio'] for record in run.values()):.2f}",
                    figure(run.get("stock"), "median_s", ",.1f", 1e-3),
                    figure(fused, "median_s", ",.1f", 1e-3),
                    figure(fused, "ratio_to_stock", ".2f"),
                    "-" if best is None else f"{best['ratio_to_stock']:.2f} {best['candidate']}",
                ]
            )
    return "\n".join(_table(header, 4, rows))


def measured(records: Iterable[dict[str, Any]]) -> str:
    """docs/measured.md."""
    runs = latest(records)
    lines = [
        "# Measured",
        "",
        "Rendered from the records in `benchmarks/results/` by `benchmarks/report.py`: of a case, its latest run.",
        "Figures are medians, in brackets the time between which three fifths of the repeats lie. What the columns and",
        "the workloads are: [benchmarks/README.md](../benchmarks/README.md).",
    ]
    for device in sorted({case[0] for case in runs}):
        ours = {case[1:]: run for case, run in runs.items() if case[0] == device}
        lines += ["", f"## {device}"]
        if any(case[0].startswith(MODEL) for case in ours):
            lines += ["", f"![tokens/s and memory]({device_folder(device)}.svg)"]
        for title, chosen in (
            ("Models", {c: run for c, run in ours.items() if OF_A_MODEL.match(c[0])}),
            ("sentence-transformers", {c: run for c, run in ours.items() if c[0].startswith(TEXTS)}),
            ("Cold starts", {c: run for c, run in ours.items() if c[0].startswith("cold start: ")}),
            ("Operators", {c: run for c, run in ours.items() if c[0].startswith("operator ")}),
            ("Launch configurations", {c: run for c, run in ours.items() if c[0].startswith("variant ")}),
        ):
            if chosen:
                lines += ["", f"### {title}", "", *_candidates(chosen)]
        lines += _absent(ours)
        lines += ["", "Run on:", "", *sorted(_places(ours))]
    return "\n".join(lines) + "\n"


def _candidates(runs: Runs) -> list[str]:
    """A row for each candidate that ran."""
    header = [
        *("what", "model", "dtype", "workload", "run", "ms", "tokens/s", "x stock", "% of roofline", "MFU"),
        *("memory, MiB", "error", "repeats"),
    ]
    rows = []
    for (what, *case), run in runs.items():
        for name, record in run.items():
            if record["status"].startswith("UNAVAILABLE"):
                continue
            kind = re.sub(rf"^({OF_A_MODEL.pattern}|cold start: |operator |variant )", "", what)
            if record["status"] != "ok":  # and why
                rows.append([kind, *case, name, in_a_line(record["status"]), *["-"] * (len(header) - 6)])
                continue
            time = figure(record, "median_s", ",.3g" if what.startswith(("operator", "variant")) else ",.1f", 1e-3)
            if record["median_s"] is not None:
                time += f" ({1000 * record['p20_s']:,.4g} to {1000 * record['p80_s']:,.4g})"
            rows.append(
                [
                    *(kind, *case, name, time),
                    figure(record, "tokens_per_s", ",.0f"),
                    figure(record, "ratio_to_stock", ".2f"),
                    figure(record, "fraction_of_floor", ".0%"),
                    figure(record, "mfu", ".0%"),
                    figure(record, "peak_memory_bytes", ",.0f", 2**20),
                    figure(record, "error", ".2g"),
                    figure(record, "repeats", "d"),
                ]
            )
    return _table(header, 5, rows)


def _absent(runs: Runs) -> list[str]:
    """What has no time, and why, once each."""
    found = {
        f"- {name}, {record['dtype']}: {record['status']}"
        for run in runs.values()
        for name, record in run.items()
        if record["status"] != "ok"
    }
    return ["", "Without a time:", "", *sorted(found)] if found else []


def _places(runs: Runs) -> set[str]:
    return {
        f"- {r['date'][:10]}, commit {r['commit']}: {r['backend']}, torch {r['torch']}, triton {r['triton']}, "
        f"transformers {r['transformers']}, {r['num_threads']} threads"
        f"{'' if r['driver'] is None else ', driver ' + r['driver']}"
        for run in runs.values()
        for r in run.values()
    }


def plot(records: Iterable[dict[str, Any]], device: str, file: Path) -> None:
    """Writes an SVG of the model's runs on one device: tokens/s and memory, a row of plots for each dtype and step."""
    import matplotlib
    from matplotlib.figure import Figure

    runs = {case: run for case, run in latest(records).items() if case[0] == device and case[1].startswith(MODEL)}
    panels = sorted({(what, dtype) for _, what, _, dtype, _ in runs})
    names = sorted({name for run in runs.values() for name, r in run.items() if r["median_s"] is not None})
    names = [*(n for n in ("stock", "fused") if n in names), *(n for n in names if n not in ("stock", "fused"))]
    looks = {name: (f"C{i % 10}", "oDs^vP*X<>"[i % 10]) for i, name in enumerate(names)}
    height = [sum((w, d) == (what, dtype) for _, w, _, d, _ in runs) for what, dtype in panels]
    # Texts stay texts, and nothing in the file changes but with the records.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastbert"}):
        drawn = Figure((9, 1.1 + 0.55 * len(panels) + 0.36 * sum(height)), layout="constrained")
        grid = drawn.subplots(len(panels), 2, squeeze=False, height_ratios=[h + 1 for h in height])
        for axes, (what, dtype) in zip(grid, panels, strict=True):
            cases = [case for case in runs if (case[1], case[3]) == (what, dtype)]
            sizes = {case[2] for case in cases}
            for y, case in enumerate(reversed(cases)):
                for name, record in runs[case].items():
                    if record["median_s"] is None:
                        continue
                    color, marker = looks[name]
                    speed = record["tokens_per_s"]
                    spread = [
                        [speed - record["real_tokens"] / record["p80_s"]],
                        [record["real_tokens"] / record["p20_s"] - speed],
                    ]
                    style = {"fmt": marker, "color": color, "markersize": 7, "alpha": 0.8}
                    axes[0].errorbar(speed, y, xerr=spread, label=name, **style)
                    if record["peak_memory_bytes"]:
                        axes[1].errorbar(record["peak_memory_bytes"] / 2**20, y, **style)
            texts = [case[4] if len(sizes) == 1 else f"{case[2]} {case[4]}" for case in reversed(cases)]
            axes[0].set_yticks(range(len(cases)), texts)
            axes[1].set_yticks(range(len(cases)), [""] * len(cases))
            axes[0].set_title(f"{what.removeprefix(MODEL)}, {dtype}", fontsize=10, loc="left")
            for each in axes:
                each.set_xscale("log")
                each.set_ylim(-0.6, len(cases) - 0.4)
                each.grid(True, which="both", alpha=0.25)
                each.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
                least, most = each.get_xlim()
                named = "25" if most < 100 * least else ""
                each.xaxis.set_minor_formatter(lambda x, _, named=named: f"{x:,.0f}" if f"{x:e}"[0] in named else "")
                each.tick_params(axis="x", which="both", labelsize=8)
        grid[-1][0].set_xlabel("real tokens/s, log scale; bars: 20 % to 80 % of repeats")
        grid[-1][1].set_xlabel("peak memory beyond the weights, MiB, log scale")
        drawn.suptitle(f"BERT, {device}", fontsize=11)
        handles: dict[str, Any] = {}
        for row in grid:
            for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        drawn.legend([handles[n] for n in names], names, loc="outside lower center", ncols=3, fontsize=9)
        drawn.savefig(file, metadata={"Date": None})


def chart(records: Iterable[dict[str, Any]], file: Path) -> None:
    """Writes an SVG of the headlines: fused over stock, a bar each."""
    import matplotlib
    from matplotlib.figure import Figure

    device, runs = _headlines(records)
    names = [f"{what.removeprefix(MODEL)}, {dtype}, {workload}" for _, what, _, dtype, workload in runs]
    ratios = [(run.get("fused") or {}).get("ratio_to_stock") or 0.0 for run in runs.values()]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastbert"}):
        drawn = Figure((7, 1.1 + 0.36 * len(names)), layout="constrained")
        axes = drawn.subplots()
        places = range(len(names), 0, -1)
        axes.bar_label(axes.barh(places, ratios, color="C0"), [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(places, names)
        axes.set_xlim(0, 1.15 * max([1.0, *ratios]))
        axes.set_xlabel(f"tokens/s, x stock (line: stock)\nBERT-large, {device}")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        drawn.savefig(file, metadata={"Date": None})


def splice(text: str, part: str, name: str = "table") -> str:
    """`text` with `part` between the markers of that name, in place of what was there.

    Raises:
        UsageError: the markers are not there.
    """
    marks = [marker.format(name) for marker in MARKERS]
    begin, end = map(text.find, marks)
    if begin < 0 or end < begin:
        raise UsageError(f"--readme: expected a line {marks[0]} and after it one {marks[1]}")
    return f"{text[: begin + len(marks[0])]}\n{part}\n{text[end:]}"


def render(files: Sequence[str | Path], document: str | Path) -> None:
    """Renders records into a README, and into docs/ beside it.

    Raises:
        UsageError: a file can't be read or written, or holds something else.
    """
    records = proven(record for file in files for record in load(file))
    path = Path(document)
    try:
        text = splice(path.read_text(encoding="utf-8"), readme(records))
        text = splice(text, figures(records), "figures")
        text = splice(text, texts(records), "texts")
        docs = path.parent / "docs"
        docs.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        (docs / "measured.md").write_text(measured(records), encoding="utf-8")
        chart(records, docs / "headlines.svg")
        for device in sorted({record["device_name"] for record in records if record["what"].startswith(MODEL)}):
            plot(records, device, docs / f"{device_folder(device)}.svg")
    except (OSError, ValueError) as error:
        raise UsageError(f"--readme {document}: {in_a_line(error)}") from error


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("records", nargs="+", metavar="FILE", help="as `fastbert bench --output` writes them")
    own.add_argument("--readme", metavar="FILE", default="README.md", help="the file to change; docs/ is beside it")
    given = own.parse_args(argv)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"matplotlib is not installed: {install('bench')}")
        render(given.records, given.readme)
    except UsageError as error:
        own.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
