"""`fastbert bench`: stock against fused, timed on this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..measure.names import DTYPES, PEERS, SHAPES, WORKLOADS
from ..usage import UsageError, check_file, in_a_line, is_special, refused

HELP = "time stock against fused, on this machine"
DESCRIPTION = (
    "Times stock against fused in one process, in random order, after checking both against float64. "
    "Weights are seeded; lengths are drawn from those of real text. "
    "Exit status: 0 all measured, 1 stock or fused failed, 2 bad usage, 130 interrupted."
)
EXAMPLES = (
    "fastbert bench --size base --workload squad --batch 8 32 --output records",
    "fastbert bench --train --peers compile --json -",
    "fastbert bench --compare old.json new.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=["squad", "search", "dense128"],
        help="question and passage in one; sentences; questions and passages; all of 16, 128, 384, 512, 8192 tokens; "
        "lengths spread around 254; of 2 to 70, padded to 512; default: squad search dense128",
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="sequences; default: 16 on a CPU, 128 on a GPU"
    )
    parser.add_argument(
        "--size", nargs="+", choices=tuple(SHAPES), default=["large"], help="shape of the model; default: large"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 and float16 on a GPU"
    )
    parser.add_argument("--train", action="store_true", help="time training steps, forward and backward, not forwards")
    parser.add_argument(
        "--cold", action="store_true", help="time new processes to their first result; of --peers, compile alone"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=("all", *PEERS), default=[], help="time these, too; default: none"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU; default: as PyTorch has them")
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed forwards of each candidate; default: 20, least: 3"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="fewer repeats to end about then; default: 8")
    parser.add_argument("--output", metavar="DIR", help="write the records to DIR/<device>/<date>-<commit>.json")
    parser.add_argument("--json", metavar="FILE", help="write the records there, too; -: standard output")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing; where did fused lose against stock, beyond the spread? Exit status 1: somewhere",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..checkpoints import default_device
    from ..measure import bench, cold, gates, records
    from ..measure.cases import check_batch, config_of, workload
    from ..measure.machine import backend, device_name

    if arguments.compare is not None:
        return _compare(*arguments.compare)
    if arguments.repeats < bench.LEAST_REPEATS:
        raise UsageError(f"--repeats is {arguments.repeats}; expected at least {bench.LEAST_REPEATS}")
    if not arguments.minutes > 0:
        raise UsageError(f"--minutes is {arguments.minutes}; expected more than 0")
    if arguments.cold and arguments.train:
        raise UsageError("--cold is given with --train; expected one of them")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads is {arguments.threads}; expected at least 1")
        torch.set_num_threads(arguments.threads)
    device = default_device(arguments.device)
    batches = arguments.batch or [16 if device.type == "cpu" else 128]
    for batch in batches:
        check_batch(batch)
    for option, name in (("--output", arguments.output), ("--json", arguments.json)):
        if name is not None and not (option == "--json" and is_special(Path(name))):
            # Now, not after minutes of measuring.
            with refused(f"{option} {name}", kinds=OSError, expected="a folder that can be written"):
                folder = Path(name) if option == "--output" else Path(os.path.realpath(name)).parent
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
    check_file("--json", arguments.json)
    names = arguments.dtype or (["float32"] if device.type == "cpu" else ["bfloat16", "float16"])
    dtypes = [getattr(torch, name) for name in names]
    items = [workload(name, batch) for name in arguments.workload for batch in batches]
    for size, item in itertools.product(arguments.size, items):
        config = config_of(size)
        if item.width > config.max_position_embeddings and getattr(config, "position_biased_input", True):
            raise UsageError(f"--workload: {item.name} is longer than --size {size} has positions for")
    peers = list(PEERS) if "all" in arguments.peers else arguments.peers
    found: list[records.Record] = []
    measured: Iterator[records.Record]
    if arguments.cold:
        cases = itertools.product(arguments.size, dtypes, items)
        measured = itertools.chain.from_iterable(
            cold.run(item, size, dtype, device=device, compiled="compile" in peers) for size, dtype, item in cases
        )
    else:
        limits = {"repeats": arguments.repeats, "minutes": arguments.minutes}
        measured = bench.run(items, arguments.size, dtypes, device=device, peers=peers, train=arguments.train, **limits)
    print(f"{device_name(device)}, fused by {backend(device)}\n{records.HEADER}", flush=True)
    once = arguments.json is not None and is_special(Path(arguments.json))
    for record in measured:
        found.append(record)
        print(records.line(record), flush=True)
        _keep(found, arguments.output, None if once else arguments.json)
    if once:
        _keep(found, None, arguments.json)
    expected = len(items) * len(arguments.size) * len(names)
    if (done := len({(r["workload"], r["size"], r["dtype"]) for r in found})) < expected:
        print(f"out of time: {expected - done} of {expected} cases were not begun; see --minutes", file=sys.stderr)
    ours = [r for r in found if r["candidate"] == "stock" or r["candidate"].startswith("fused")]
    # What red tests close is theirs to report.
    status = [r["status"] for r in ours if not r.get("gates", gates.GREEN).startswith(gates.RED)]
    return 1 if any(each.startswith(("FAILED", "ERROR")) for each in status) else 0


def _keep(found: Sequence[dict[str, object]], output: str | None, json: str | None) -> None:
    from ..measure import records

    try:
        if output is not None:
            records.write(records.path_in(Path(output), found[0]), found)
        if json is not None:
            records.write(Path(json), found)
    except OSError as error:
        raise UsageError(f"{error.filename or json}: {in_a_line(error)}") from error


def _compare(old: str, new: str) -> int:
    from ..measure import records

    verdicts = []
    for verdict, text in records.compare(*(records.load(file, "--compare") for file in (old, new))):
        verdicts.append(verdict)
        print(text)
    if not {"same", "slower", "faster", "broken"} & set(verdicts):
        raise UsageError(
            "--compare: the two files have no case in common; expected the same model, dtype, workload and device"
        )
    return 1 if {"slower", "broken"} & set(verdicts) else 0
