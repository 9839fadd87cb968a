"""Every way there is to compute the operations of a layer, on this GPU, in one call.

What any table of kernels/launch.py has for them, each variant and number of programs, and what PyTorch has:

    python benchmarks/variants.py [--size large] [--precision fp8] [--rows 21222 128 65536 2048] [--minutes 3]

What is fused is compiled and held to the numerical policy before it is timed, as `fastbert tune` does it and by the
same code; one whose results depend on the batch is timed and says so. Time is that of the device. Rows are those of
packed batches: 21222 is the SQuAD mix of 128. Records go to --output as they are made; a table of the fastest is last.
Exit status: 0 done, 2 bad usage, 130 interrupted, with what was measured so far kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.cli import UsageError, counts, records
from fastbert.cli.__main__ import DTYPES, SIZES
from fastbert.cli.cases import SHAPES
from fastbert.cli.info import default_device
from fastbert.cli.machine import Machine, Rates, environment
from fastbert.cli.problems import Problem, Sizes, problems
from fastbert.cli.tune import OK, OTHER_BITS, Candidate, Gpu, plausible, seeds, short
from fastbert.kernels import launch
from fastbert.kernels.launch import Config
from fastbert.support import fp8_is_unsupported

PROGRAMS = (0, 1, 2)
Call = Callable[..., Any]


def configurations(problem: Problem, work: Sequence[Problem], shared_limit: int) -> list[Config]:
    """The shipped one first, then all that tables have for its operation, and each with the other variants."""
    free = launch.OPERATIONS[problem.key[0]].free
    found = seeds(problem, work)
    if "variant" in free:
        found += [dataclasses.replace(c, variant=variant) for c in found for variant in launch.VARIANTS]
    if "programs" in free:
        found += [dataclasses.replace(c, programs=programs) for c in found if c.variant for programs in PROGRAMS]
    kept = [config for config in dict.fromkeys(found[1:]) if plausible(problem, config, shared_limit)]
    if problem.key[0] == "linear":
        kept.append(dataclasses.replace(found[0], variant=launch.LIBRARY))
    return [found[0], *(config for config in kept if config != found[0])]


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


def cases(work: Sequence[Problem], rows: Iterable[int]) -> Iterator[tuple[Problem, int]]:
    """Every problem at every number of rows that it is for."""
    for count in rows:
        for problem in work:
            if not problem.same_bits or problem.rows[0] == launch.row_class(count):
                yield problem, count


def ways(
    problem: Problem, rows: int, rig: Any, checked: Sequence[tuple[Candidate, str]]
) -> Iterator[tuple[str, Callable[[], list[float]], str]]:
    """(name, what times it, status) of everything for a problem: of PyTorch's first, then what was checked."""
    sets = rig.sets(problem, rows)
    for name, (call, prepare) in peers(problem).items():
        yield name, functools.partial(_measure_peer, rig, call, prepare, sets), OK
    for (_, config), status in checked:
        name = "fused" if config == problem.shipped() else short(config)
        name += f", {OTHER_BITS}" if status.startswith(OTHER_BITS) else ""
        yield name, functools.partial(rig.time, problem, rows, config), status


def _measure_peer(rig: Any, call: Call, prepare: Call, sets: Sequence[Any]) -> list[float]:
    found: list[float] = rig.measure(call, [prepare(*arguments) for arguments in sets])
    return found


def measure(
    work: Sequence[Problem],
    rows: Sequence[int],
    rig: Any,
    rates: Rates,
    about: dict[str, Any],
    case: dict[str, Any],
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """Yields a record for each way and each number of rows; out of time, of those measured by then.

    `case` has what all records have in common: size and dtype.
    """
    wanted = {problem.key: problem for problem, _ in cases(work, rows)}
    candidates = [
        Candidate(problem, config)
        for problem in wanted.values()
        for config in configurations(problem, work, rig.shared_limit)
    ]
    # Half of the time at most; what was not reached is not timed.
    found = list(rig.check(candidates, time.monotonic() + (deadline - time.monotonic()) / 2))
    for problem, count in cases(work, rows):
        if time.monotonic() > deadline:
            return
        names = launch.OPERATIONS[problem.key[0]].parameters()
        arguments = rig.sets(problem, count)[0]
        cost = counts.cost(problem.function, arguments, ops._SHAPES[problem.function](*arguments))
        this = {
            "what": f"variant {problem.name.split(',')[0] if problem.same_bits else problem.name}",
            "workload": f"{count} rows",
            "size": case["size"],
            "shape": {name: str(value) for name, value in zip(names, problem.key[1:], strict=True)},
            "real_tokens": count,
            "padded_tokens": count,
        }
        stock: list[float] = []
        checked = [(candidate, status) for candidate, status in found if candidate.problem is problem]
        for name, call, status in ways(problem, count, rig, checked):
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
            stock = samples if name == "stock" else stock
            yield records.make(about, this, name, case["dtype"], samples, stock, cost, rates, status)


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each case stock, the shipped configuration and the fastest three, in microseconds."""
    yield f"{'what':<22}{'rows':<12}{'stock':>10}{'fused':>10}{'floor':>8}   fastest"
    for (what, workload), group in itertools.groupby(found, key=lambda r: (r["what"], r["workload"])):
        run = {record["candidate"]: record for record in group if record["median_s"] is not None}
        ours = sorted((r for r in run.values() if r["candidate"] != "stock"), key=lambda r: r["median_s"])
        cells = [f"{1e6 * run[n]['median_s']:.1f}" if n in run else "-" for n in ("stock", "fused")]
        floor = run["fused"]["fraction_of_floor"] if "fused" in run else None
        best = "; ".join(f"{r['candidate']} {1e6 * r['median_s']:.1f}" for r in ours[:3])
        name, rows = what.removeprefix("variant "), workload.removesuffix(" rows")
        yield f"{name:<22}{rows:<12}{cells[0]:>10}{cells[1]:>10}{'-' if floor is None else f'{floor:.0%}':>8}   {best}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", nargs="+", type=int, default=[21222, 128, 65536, 2048], metavar="N")
    parser.add_argument("--train", action="store_true", help="the kernels of the backward, too")
    parser.add_argument("--precision", choices=("fp8",), help="products in 8 bits, in place of those in --dtype")
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
    work = problems(sizes, dtype, launch.architecture(device), given.train, given.precision)
    rig = Gpu(device, sizes, dtype, given.train, given.precision, jobs=max(1, min(8, (os.cpu_count() or 2) // 2)))
    about, rates = environment(device), Machine(device).rates(dtype)
    case = {"size": given.size, "dtype": dtype}
    found: list[dict[str, Any]] = []
    try:
        deadline = time.monotonic() + 60 * given.minutes
        for record in measure(work, given.rows, rig, rates, about, case, deadline):
            found.append(record)
            if given.output is not None:
                records.write(records.path_in(given.output, about), found)
    finally:
        for record in found:
            if record["status"] != "ok":
                print(f"{record['what']}, {record['workload']}, {record['candidate']}: {record['status']}")
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
