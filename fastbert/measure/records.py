"""Records: what was measured, as flat plain data; the files they are kept in; whether one run is slower than another.

A record is one candidate in one case: `benchmarks/README.md` tells its fields. A file, <device>/<date>-<commit>.json,
is a list of them from one run.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..usage import UsageError, in_a_line, replace_text
from . import gates
from .counts import Cost
from .machine import Rates, datasheet, quantiles

Record = dict[str, Any]
Run = dict[str, Record]
"""The records of one case, by candidate."""

TEXTS = frozenset(
    {
        *("what", "candidate", "status", "workload", "size", "dtype", "device", "device_name", "torch"),
        *("transformers", "backend", "commit", "date"),
    }
)
TIMES = frozenset({"median_s", "p20_s", "p80_s"})
NUMBERS = TIMES | {
    *("real_tokens", "padded_tokens", "repeats", "tokens_per_s", "ratio_to_stock", "ideal_ratio", "error"),
    *("flops", "bytes", "peak_flops_per_s", "peak_bytes_per_s", "fraction_of_floor", "mfu", "peak_memory_bytes"),
    "num_threads",
}
"""Each may be None."""
FIELDS = TEXTS | NUMBERS | {"shape", "driver", "triton"}
# And, where gates are asked, "gates": "green", or "not run: ..." or "red: ..." with those that are.
CASE = ("device_name", "what", "size", "dtype", "workload")
"""What two runs of one case have in common."""


def make(
    about: Record,
    case: Record,
    candidate: str,
    dtype: torch.dtype,
    samples: Sequence[float],
    stock: Sequence[float],
    cost: Cost | None = None,
    rates: Rates | None = None,
    status: str = "ok",
    peak_memory: int | None = None,
    error: float | None = None,
) -> Record:
    """A record; of a row one of whose gates is red, without a time.

    Args:
        about: machine.environment().
        case: what, workload, size, shape, real_tokens, padded_tokens; the last two None where there are no sequences.
        candidate: its name.
        dtype: working dtype.
        samples: seconds of each repeat; none where the candidate was not timed.
        stock: those of the candidate it is compared with, "stock"; none where that one was not timed.
        cost: the least it costs; None where nothing is counted.
        rates: what the machine does at best; None where they were not measured.
        status: "ok", or what became of the candidate.
        peak_memory: in bytes; None where unknown.
        error: relative to float64; None where unchecked.
    """
    state = gates.state(case["what"], candidate, dtype)
    if samples and state is not None and state.startswith(gates.RED):
        samples, status = (), f"FAILED: its tests are {state}"
    low, median, high = quantiles(samples) if samples else (None, None, None)
    tokens, padded = case["real_tokens"], case["padded_tokens"]
    peak = datasheet(about["device_name"], dtype)
    return {
        "candidate": candidate,
        "status": status,
        **case,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": len(samples),
        "median_s": median,
        "p20_s": low,
        "p80_s": high,
        "peak_memory_bytes": peak_memory,
        "tokens_per_s": tokens / median if tokens and median else None,
        "ratio_to_stock": statistics.median(stock) / median if stock and median else None,
        "ideal_ratio": padded / tokens if tokens else None,
        "flops": cost.flops if cost else None,
        "bytes": cost.bytes if cost else None,
        "peak_flops_per_s": rates.flops_per_s if rates else None,
        "peak_bytes_per_s": rates.bytes_per_s if rates else None,
        "fraction_of_floor": rates.floor(cost) / median if rates and cost and median else None,
        "mfu": cost.flops / median / peak if cost and median and peak else None,
        "error": error,
        **about,
        **({} if state is None else {"gates": state}),
    }


def write(path: Path, records: Sequence[Record]) -> None:
    """Replaces `path` at once, so that whoever reads it or interrupts sees whole records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(list(records), indent=1, allow_nan=False) + "\n")


def path_in(folder: Path, about: Record) -> Path:
    """`folder`/<device>/<date>-<commit>.json; `about` is a record or machine.environment()."""
    date = about["date"][:19].replace(":", "")
    return folder / device_folder(about["device_name"]) / f"{date}-{about['commit']}.json"


def device_folder(device_name: str) -> str:
    """The name of a device as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()


def load(file: str | Path, option: str = "records") -> list[Record]:
    """The records in a file; `option` is what named it.

    Raises:
        UsageError: it can't be read, or holds something else.
    """

    def refused(why: str) -> UsageError:
        return UsageError(f"{option} {file}: {why}; expected a file that `fastbert bench` wrote")

    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(in_a_line(error)) from error
    except (ValueError, RecursionError) as error:
        raise refused(f"not JSON: {in_a_line(error)}") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise refused("holds no records")
    for record in found:
        if missing := FIELDS - set(record):
            raise refused(f"holds a record without {', '.join(sorted(missing))}")
        if wrong := sorted(name for name in FIELDS if not _is_right(name, record[name])):
            raise refused(f"holds a record whose {wrong[0]} is {record[wrong[0]]!r}"[:200])
    return found


def _is_right(name: str, value: Any) -> bool:
    """Whether a field of a record can have this value."""
    if name in TEXTS:
        return isinstance(value, str)
    if name not in NUMBERS or value is None:
        return True
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return is_number and (value > 0 or name not in TIMES)


def proven(records: Iterable[Record]) -> list[Record]:
    """Those to be published: without runs of a case whose fused row has a gate that is not green, and such rows."""

    def run(record: Record) -> tuple[str, ...]:
        return (record["date"], *(record[name] for name in CASE))

    records = list(records)
    unproven = [record for record in records if record.get("gates", gates.GREEN) != gates.GREEN]
    dropped = {run(record) for record in unproven if record["candidate"] == "fused"}
    return [record for record in records if record not in unproven and run(record) not in dropped]


def judge_again(path: Path, verdicts: dict[str, str]) -> bool:
    """Rewrites a file of records where gates have become green or red since; whether it did."""
    found = load(path)
    changed = False
    for record in found:
        if "gates" in record:
            now = gates.judge(verdicts, record["what"], record["candidate"], getattr(torch, record["dtype"]))
            changed |= now != record["gates"]
            record["gates"] = now
    if changed:
        write(path, found)
    return changed


def latest(records: Iterable[Record], beside: Iterable[Record] = ()) -> dict[tuple[str, ...], Run]:
    """For each case the records of the last run that has it, by candidate; what, size and dtype together.

    On a CPU, a workload on fewer threads than another record of the device has, of these or `beside`, is one of its
    own, and its name says so.
    """
    records = sorted(records, key=lambda record: record["date"])
    threads: dict[str, int] = {}
    for record in (*records, *beside):
        threads[record["device_name"]] = max(threads.get(record["device_name"], 0), record["num_threads"])
    cases: dict[tuple[str, ...], Run] = {}
    dates: dict[tuple[str, ...], str] = {}
    for record in records:
        case = tuple(record[name] for name in CASE)
        some = record["num_threads"]
        if some < threads[record["device_name"]] and not record["backend"].startswith("triton"):
            case = *case[:-1], f"{case[-1]}, {some} thread{'s' if some > 1 else ''}"
        if dates.get(case) != record["date"]:
            cases.pop(case, None)
            dates[case] = record["date"]
        cases.setdefault(case, {})[record["candidate"]] = record
    return dict(sorted(cases.items(), key=lambda item: item[0][:4]))


def _ratio(run: Run) -> tuple[float, float, float]:
    """Of fused to stock: by p80 against p20, by medians, by p20 against p80."""
    stock, fused = run["stock"], run["fused"]
    return (
        stock["p20_s"] / fused["p80_s"],
        stock["median_s"] / fused["median_s"],
        stock["p80_s"] / fused["p20_s"],
    )


def compare(old: Sequence[Record], new: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Whether fused lost against stock from one run to another, case by case; yields (verdict, line).

    A ratio is that of medians, with what it becomes where one of the two takes its p20 and the other its p80. Only
    where these ranges don't overlap, a case is "faster" or "slower"; else it is "same". Where fused had a time and now
    has none, the case is "broken"; in one of the runs alone, "only".
    """
    before, after = latest(old, new), latest(new, old)
    for case in [*before, *(case for case in after if case not in before)]:
        name = f"{', '.join(case[1:])} ({case[0]})"
        runs = [cases.get(case, {}) for cases in (before, after)]
        timed = ["fused" in run and all(run[n]["median_s"] for n in ("stock", "fused") if n in run) for run in runs]
        if not all(timed) or not all("stock" in run for run in runs):
            broken = bool(runs[0]) and timed[0] and bool(runs[1])
            verdict = "broken" if broken else "only"
            status = runs[1]["fused"]["status"] if broken and "fused" in runs[1] else "in one of the runs alone"
            yield verdict, f"{verdict:<7}{name}: {status}"
            continue
        then, now = map(_ratio, runs)
        verdict = "slower" if now[2] < then[0] else "faster" if now[0] > then[2] else "same"
        ranges = " -> ".join(f"{mid:.2f} ({low:.2f} to {high:.2f})" for low, mid, high in (then, now))
        yield verdict, f"{verdict:<7}{name}: {ranges} x stock"


HEADER = f"{'what':<22}{'model':<18}{'dtype':<10}{'workload':<14}{'run':<38}" + "".join(
    name.rjust(width)
    for name, width in (("ms", 10), ("tokens/s", 11), ("x stock", 9), ("ideal", 7), ("roofline", 10), ("MiB", 8))
)


def line(record: Record) -> str:
    """One record as a line under HEADER."""
    what = re.sub(r"^(\w+Model |cold start: )", "", record["what"])
    case = f"{what:<22}{record['size']:<18}{record['dtype']:<10}{record['workload']:<14}{record['candidate']:<38}"
    if record["median_s"] is None:
        return case + record["status"]

    def figure(name: str, form: str, width: int, unit: float = 1) -> str:
        return ("" if record[name] is None else format(record[name] / unit, form)).rjust(width)

    return (
        case
        + figure("median_s", ".1f", 10, 1e-3)
        + figure("tokens_per_s", ".0f", 11)
        + figure("ratio_to_stock", ".2f", 9)
        + figure("ideal_ratio", ".2f", 7)
        + figure("fraction_of_floor", ".0%", 10)
        + figure("peak_memory_bytes", ".0f", 8, 2**20)
    )
