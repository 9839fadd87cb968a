"""The ways there are to compute the operations of a layer, on this GPU, in one call.

Of the launch configurations that kernels/launch.py has for each, and what PyTorch has:

    python benchmarks/variants.py [--size large] [--precision fp8] [--rows 21222 65536 128] [--minutes 3]

What is fused is compiled and held to the numerical policy before it is timed, as `fastbert tune` does it and by the
same code; one whose results depend on the batch is timed and says so. Time is that of the device. Rows are those of
packed batches: 21222 is the SQuAD mix of 128.

At each number of rows, in the order given, what takes most of a layer's time comes first, in at most twelve
configurations: the shipped one, the persistent kernel, tiles of 128 x 128 and cuBLAS of every GEMM ahead of anything
else, then what should be fastest of all others. Those for which the minutes will not do, by count and by what it takes
to compile one, are left out and named. Records go to --output as they are made; a table of the fastest is last.
Exit status: 0 done, 2 bad usage, 130 interrupted, with what was measured so far kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.checkpoints import default_device
from fastbert.kernels import launch
from fastbert.kernels.launch import Config
from fastbert.measure import counts, records
from fastbert.measure.cases import SHAPES
from fastbert.measure.machine import Machine, Rates, environment
from fastbert.measure.names import DTYPES
from fastbert.runtime.support import fp8_is_unsupported
from fastbert.tune.gpu import Gpu
from fastbert.tune.problems import Problem, Sizes, problems
from fastbert.tune.search import OK, OTHER_BITS, Candidate, of_variant, plausible, seeds, short
from fastbert.usage import UsageError

PROGRAMS = (0, 1, 2)
MOST = 12
"""Configurations of a problem at a number of rows."""
COMPILE_S = 2.0
"""For a process to compile one configuration, to run it and to hold it to the policy, all in all."""
START_S = 15.0
"""For such a process to start, and to have stock's result and the truth."""
TIME_S = 0.2
"""To time one way at one number of rows."""
Call = Callable[..., Any]
Case = tuple[Problem, int]


def work_of(problem: Problem, rows: int) -> int:
    """FLOPs of a GEMM; 0 of anything else, which takes far less of a layer's time."""
    facts = dict(zip(launch.OPERATIONS[problem.key[0]].parameters(), problem.key[1:], strict=True))
    return 2 * rows * facts.get("n", 0) * facts.get("k", 0) * facts.get("segments", 1)


def _cycles(problem: Problem, rows: int, config: Config) -> float:
    """What `launch.tile_cycles` has a configuration of a GEMM take; 0 of anything else."""
    facts = dict(zip(launch.OPERATIONS[problem.key[0]].parameters(), problem.key[1:], strict=True))
    arch = launch.LIKE.get(facts.get("arch", ""), facts.get("arch", ""))
    if arch not in launch.RATES or not work_of(problem, rows):
        return 0.0
    multiprocessors = problem.multiprocessors or launch.MULTIPROCESSORS[arch]
    shape = rows, facts["n"], facts["k"], facts.get("segments", 1), multiprocessors
    return launch.tile_cycles(config, launch.RATES[arch], *shape, 1 if problem.key[0].endswith("fp8") else 2)


def configurations(
    problem: Problem, rows: int, work: Sequence[Problem], shared_limit: int
) -> tuple[list[Config], list[Config]]:
    """What to try whatever else there is, the shipped one first; and what else tables have, the most likely first.

    Of the second, one of each tile and variant before any differs in nothing but stages or programs.
    """
    operation = problem.key[0]
    free = launch.OPERATIONS[operation].free
    shipped = problem.shipped(rows)
    own = [
        config
        for tables in ("TILES", "CANDIDATES")
        for arch, configs in getattr(launch, f"{operation.upper()}_{tables}", {}).items()
        if arch in problem.key
        for config in configs
    ]
    found = [shipped, *own, *seeds(problem, work)]
    if "variant" in free:
        found += [of_variant(c, variant) for c in found for variant in launch.VARIANTS]
    if "programs" in free:
        found += [dataclasses.replace(c, programs=programs) for c in found if c.variant for programs in PROGRAMS]
    kept = [config for config in dict.fromkeys(found[1:]) if plausible(problem, config, shared_limit)]
    kept = [config for config in kept if config != shipped]
    least = sorted(kept, key=lambda config: _cycles(problem, rows, config))
    first = [shipped]
    if operation.startswith("linear"):
        first += [c for c in least if c.variant == "persistent"][:1]
        first += [c for c in least if (c.block_m, c.block_n, c.variant) == (128, 128, "")][:1]
    if operation == "linear":
        first.append(dataclasses.replace(shipped, variant=launch.LIBRARY))
    rest: list[tuple[int, Config]] = []
    seen: Counter[Any] = Counter((c.block_m, c.block_n, c.variant) for c in first)
    for config in least:
        if config not in first:
            tile = config.block_m, config.block_n, config.variant
            rest.append((seen[tile], config))
            seen[tile] += 1
    rest.sort(key=lambda each: each[0])
    return first, [config for _, config in rest][: MOST - len(first)]


def _padded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, mask: None, longest: int, scale: float) -> tuple[Any, ...]:
    """What stock gets: (batch, heads, longest, head_dim) each, and a mask."""
    lengths = starts.diff().tolist()
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    keys = torch.arange(longest, device=q.device) < starts.diff()[:, None]
    return (*rows, keys[:, None, None, :])


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, mask: None, longest: int, scale: float) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts, starts, longest, longest)  # its scale is that of BERT


def _scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Any:
    return torch._scaled_mm(x, weight, scale, scale, bias=bias, out_dtype=bias.dtype)


def peers(problem: Problem) -> dict[str, tuple[Call, Call]]:
    """What PyTorch has for a problem: (call, what makes its arguments of ours); "stock" is compared with."""

    def same(*arguments: Any) -> tuple[Any, ...]:
        return arguments

    if problem.function == "attention":
        return {"stock": (F.scaled_dot_product_attention, _padded), "torch varlen": (_varlen, same)}
    if problem.function == "attention_backward":
        return {}  # autograd's, which `python -m pytest benchmarks` times
    if problem.function.endswith("_fp8"):
        return {
            "stock": (F.linear, lambda x, rows, w, scale, bias, *rest: (x.to(bias.dtype), w.to(bias.dtype), bias)),
            "torch._scaled_mm": (_scaled, lambda x, rows, w, scale, bias, *rest: (x, w.t(), scale.max(), bias)),
        }
    found: dict[str, tuple[Call, Call]] = {"stock": (problem.peer, same)}
    if problem.function in ("linear_gelu", "linear_add"):
        found["F.linear alone"] = F.linear, lambda x, weight, bias, *rest: (x, weight, bias)
    return found


def cases(work: Iterable[Problem], rows: Iterable[int]) -> list[Case]:
    """Every problem at every number of rows that it is for: by the order of these, then the largest share of time."""
    ordered = sorted(work, key=lambda problem: -work_of(problem, 1))
    return [
        (problem, count)
        for count in rows
        for problem in ordered
        if not problem.same_bits or problem.rows[0] == launch.row_class(count)
    ]


@dataclasses.dataclass
class Plan:
    """What is to be tried, by case; of what there is beyond that, what the minutes won't do for."""

    first: dict[Case, list[Config]]
    rest: dict[Case, list[Config]]
    dropped: list[tuple[Case, Config]]


def plan(work: Sequence[Problem], rows: Sequence[int], shared_limit: int, seconds: float, jobs: int) -> Plan:
    """What `seconds` do for with `jobs` processes that compile: of each case what is always tried, then case by case.

    A configuration is compiled once for all numbers of rows that share its key; a launch in two parts takes two.
    """
    found = Plan({}, {}, [])
    compiled: set[tuple[Any, Config]] = set()
    spent = 2 * START_S

    def cost(case: Case, config: Config) -> float:
        return TIME_S + (COMPILE_S / jobs if (case[0].key, config) not in compiled else 0.0)

    everything = {case: configurations(*case, work, shared_limit) for case in cases(work, rows)}
    for case, (first, _) in everything.items():
        found.first[case], found.rest[case] = first, []
        for config in first:
            spent += cost(case, config)
            compiled.add((case[0].key, config))
        spent += TIME_S * (len(peers(case[0])) + 1)
    for case, (_, rest) in everything.items():
        for config in rest:
            if (more := cost(case, config)) + spent > seconds:
                found.dropped.append((case, config))
                continue
            spent += more
            compiled.add((case[0].key, config))
            found.rest[case].append(config)
    return found


def ways(
    problem: Problem, rows: int, rig: Any, checked: Iterable[tuple[Candidate, str]], with_peers: bool = True
) -> Iterator[tuple[str, Callable[[], list[float]], str]]:
    """(name, what times it, status) of ways to do a problem: PyTorch's, "stock" first; then of what was checked.

    The shipped configuration that takes two launches is there in one launch, too.
    """
    sets = rig.sets(problem, rows)
    for name, (call, prepare) in peers(problem).items() if with_peers else ():
        yield name, functools.partial(_measure_peer, rig, call, prepare, sets), OK
    for (_, config), status in checked:
        shipped = config == problem.shipped(rows)
        name = "fused" if shipped else short(config)
        name += f", {OTHER_BITS}" if status.startswith(OTHER_BITS) else ""
        time_it = functools.partial(rig.time, problem, rows, config)
        yield name, time_it, status
        if shipped and rows >= launch.SPLIT_ROWS and _takes_two_launches(problem, rows, config):
            yield "fused, one launch", functools.partial(_in_one_launch, time_it), status


def _takes_two_launches(problem: Problem, rows: int, config: Config) -> bool:
    facts = dict(zip(launch.OPERATIONS[problem.key[0]].parameters(), problem.key[1:], strict=True))
    if "rows" not in facts:
        return False
    itemsize = facts["dtype"].itemsize if "dtype" in facts else 1
    shape = facts["n"], facts["k"], facts.get("segments", 1), launch.round_rows(rows), problem.multiprocessors
    return launch.full_waves(config, facts["arch"], itemsize, *shape) < rows


def _in_one_launch(call: Callable[[], list[float]]) -> list[float]:
    """Without a launch of its own for rows beyond whole waves."""
    split, launch.SPLIT_ROWS = launch.SPLIT_ROWS, math.inf
    try:
        return call()
    finally:
        launch.SPLIT_ROWS = split


def _measure_peer(rig: Any, call: Call, prepare: Call, sets: Sequence[Any]) -> list[float]:
    found: list[float] = rig.measure(call, [prepare(*arguments) for arguments in sets])
    return found


def measure(
    found: Plan,
    rig: Any,
    rates: Rates,
    about: dict[str, Any],
    case: dict[str, Any],
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """Yields a record for each way and each number of rows; out of time, of those measured by then.

    What is always tried is checked and timed, of all cases, before the rest is. `case` has what all records have in
    common: size and dtype.
    """
    statuses: dict[tuple[Any, Config], str] = {}
    stock: dict[Case, list[float]] = {}
    for turn, chosen in enumerate((found.first, found.rest)):
        candidates = dict.fromkeys(
            Candidate(problem, config)
            for (problem, _), configs in chosen.items()
            for config in configs
            if (problem.key, config) not in statuses
        )
        # Half of the time that is left at most; what was not reached is not timed.
        now = time.monotonic()
        for (problem, config), status in rig.check(list(candidates), now + (deadline - now) / 2):
            statuses[problem.key, config] = status
        for this, configs in chosen.items():
            if time.monotonic() > deadline:
                return
            if not configs:
                continue
            describe = _describe(this, rig, case)
            late = "not checked in time"
            checked = [(Candidate(this[0], c), statuses.get((this[0].key, c), late)) for c in configs]
            for name, call, status in ways(*this, rig, checked, with_peers=turn == 0):
                if time.monotonic() > deadline:
                    return
                samples: list[float] = []
                if status == OK or status.startswith(OTHER_BITS):
                    status = "ok"
                    try:
                        samples = call()
                    except Exception as error:  # out of memory, nothing that can be captured: this way's result
                        status = f"ERROR: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                else:
                    status = f"FAILED: {status}"
                if name == "stock":
                    stock[this] = samples
                about_it, cost = describe
                of_stock = stock.get(this, [])
                yield records.make(about, about_it, name, case["dtype"], samples, of_stock, cost, rates, status)


def _describe(case: Case, rig: Any, common: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What the records of a case have in common, and what it costs."""
    problem, count = case
    names = launch.OPERATIONS[problem.key[0]].parameters()
    arguments = rig.sets(problem, count)[0]
    cost = counts.cost(problem.function, arguments, ops.OPERATORS[problem.function].fake(*arguments))
    return {
        "what": f"variant {problem.name.split(',')[0] if problem.same_bits else problem.name}",
        "workload": f"{count} rows",
        "size": common["size"],
        "shape": {name: str(value) for name, value in zip(names, problem.key[1:], strict=True)},
        "real_tokens": count,
        "padded_tokens": count,
    }, cost


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each case stock, the shipped configuration and the fastest three, in microseconds."""
    yield f"{'what':<22}{'rows':<12}{'stock':>10}{'fused':>10}{'roofline':>10}   fastest"
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for record in found:
        run = runs.setdefault((record["what"], record["workload"]), {})
        if record["median_s"] is not None:
            run[record["candidate"]] = record
    for (what, workload), run in runs.items():
        ours = sorted((r for r in run.values() if r["candidate"] != "stock"), key=lambda r: r["median_s"])
        cells = [f"{1e6 * run[n]['median_s']:.1f}" if n in run else "-" for n in ("stock", "fused")]
        floor = run["fused"]["fraction_of_floor"] if "fused" in run else None
        best = "; ".join(f"{r['candidate']} {1e6 * r['median_s']:.1f}" for r in ours[:3])
        name, rows = what.removeprefix("variant "), workload.removesuffix(" rows")
        yield f"{name:<22}{rows:<12}{cells[0]:>10}{cells[1]:>10}{'-' if floor is None else f'{floor:.0%}':>10}   {best}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="large")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", nargs="+", type=int, default=[21222, 65536, 128], metavar="N")
    parser.add_argument("--train", action="store_true", help="the kernels of the backward, too")
    parser.add_argument("--precision", choices=("fp8",), help="GEMMs in FP8, in place of those in --dtype")
    parser.add_argument("--minutes", type=float, default=3.0, help="stop about then; default: 3")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write records to DIR/<device>/<date>-<commit>.json")
    given = parser.parse_args(argv)
    device, dtype = default_device(None), getattr(torch, given.dtype)
    if device.type != "cuda":
        raise UsageError("there is no GPU here")
    shape = SHAPES[given.size]
    sizes = Sizes(shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"])
    if given.precision and (reason := fp8_is_unsupported(device)) is not None:
        raise UsageError(f"--precision fp8: {reason}")
    arch, multiprocessors = launch.architecture(device), launch.multiprocessors(device)
    work = problems(sizes, dtype, arch, given.train, given.precision, multiprocessors)
    rig = Gpu(device, sizes, dtype, given.train, given.precision, jobs=max(1, min(8, (os.cpu_count() or 2) // 2)))
    about, rates = environment(device), Machine(device).rates(dtype)
    case = {"size": given.size, "dtype": dtype}
    found: list[dict[str, Any]] = []
    chosen = None
    try:
        deadline = time.monotonic() + 60 * given.minutes
        chosen = plan(work, given.rows, rig.shared_limit, 60 * given.minutes, rig.jobs)
        for record in measure(chosen, rig, rates, about, case, deadline):
            found.append(record)
            if given.output is not None:
                records.write(records.path_in(given.output, about), found)
    finally:
        for record in found:
            if record["status"] != "ok":
                print(f"{record['what']}, {record['workload']}, {record['candidate']}: {record['status']}")
        for (problem, rows), config in chosen.dropped if chosen else ():
            print(f"left out, for want of time: {problem.name} at {rows} rows: {short(config)}")
        for line in table(found):
            print(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"variants.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
