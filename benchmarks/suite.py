"""Everything there is to measure on one machine, the most important first: `make gpu`, `make bench`.

    python benchmarks/suite.py [--only STEP ...] [--minutes 10] [--output benchmarks/results] [--archive DIR] [--list]
                               [--slack X]

Every step is a process of its own and writes its records as it goes, and what it says into OUTPUT/logs. On a GPU
first.py comes first, which checks every operation and times the headline; then the tests in bfloat16, what they prove,
and the other tests. Checks and tests note what they found in OUTPUT/gates.jsonl, by operation and dtype (gates.py). A
row is timed unless one of its gates is red: red fp8 closes the rows of fp8 alone. Rows measured before their tests ran
say so, are judged again when these have, and are published once their gates are green.

The same command resumes where it was stopped, killed at any moment or not, on another machine too: tests by what
passed, one by one, steps by OUTPUT/progress.json. Each starts over where sources it depends on changed; --only repeats
a step. A step that outlasts the time left is interrupted and keeps what it wrote. With --archive, or OUT in the
environment, OUTPUT is packed into two files in that folder, as it goes and at the end (archive.py); archives that lie
there, or in build/gpu-cache, are unpacked first. Steps run with the shipped launch configurations, whatever the user's
cache holds, but for those that say "tuned". Exit status: 0 all done, 1 a step failed or was closed by a red gate, 3 out
of time.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks import archive, gates, processes  # noqa: E402

TESTS = "tests: "
"""How the names of the steps begin that are tests."""
TEST_LIMIT_S = 240
"""Of one test, compiling included; one that takes longer hangs."""
BROKEN, MOST_PROCESSES = 2, 20
"""The exit status of tests without workers whose device has failed, and how often they go on in another process."""
OUT_OF_TIME = 3
"""The exit status of first.py where it has more to do."""
PACKED_EVERY_S = 20.0
GATES = "gates.jsonl"
LEAST_S = 12.0
"""With fewer seconds left no step begins."""
GRACE_S = 20.0
"""What an interrupted step is given to write what it has."""


@dataclass(frozen=True)
class Step:
    """A command, and the most minutes it may take; `{output}`, `{minutes}` and `{slack}` in it are filled in."""

    name: str
    minutes: float
    command: str
    cache: str = "shipped"
    """Of the user's caches in OUTPUT/cache, the one it has. Steps that share one find what another wrote."""
    rows: tuple[tuple[str, str, str], ...] = ()
    """What it measures: a record's `what`, `candidate` and `dtype`. Closed where each has a red gate."""
    needs: str = ""
    """A package it can't do without, by the name it is imported by; where there is none, the step is left out."""


FORWARD, STEP = "BertModel forward", "BertModel training step"
IN_16 = ((FORWARD, "fused", "bfloat16"),)
IN_FP8 = ((FORWARD, "fused in fp8", "bfloat16"),)
WITH_GRAPHS = ((FORWARD, "fused + CUDA graphs", "bfloat16"),)
FP8_WITH_GRAPHS = ((FORWARD, "fused in fp8 + CUDA graphs", "bfloat16"),)
STEP_IN_16 = ((STEP, "fused", "bfloat16"),)
DEBERTA, DEBERTA_STEP = "DebertaV2Model forward", "DebertaV2Model training step"
MODERN, MODERN_STEP = "ModernBertModel forward", "ModernBertModel training step"

# A file that can't be imported, for want of a package, keeps none of the others from running.
PYTEST = "-m pytest -q --tb=short --maxfail=100 --continue-on-collection-errors -m gpu --gates {output}/gates.jsonl"
BENCH = "-m fastbert.cli bench --output {output} --minutes {minutes} --dtype"
DEBERTA_PEERS = "disentangled-flash flashdeberta"
MODERN_PEERS = "packed-encoders"
SMALL_PEERS = "graphs graphs-pdl fp8-graphs torch-varlen"
OPERATORS = "-m pytest -q benchmarks --records {output} --workload"
TEXTS = "sentence_transformers"
PROFILE = "-m fastbert.cli profile --dtype bfloat16 --compare stock --json {output}/profile-"

# Tests take what is left, most of it compilation: those of what is timed next come before it, the others after it.
ON_A_GPU = (
    Step("first", 5.0, "benchmarks/first.py --output {output} --minutes {minutes} --slack {slack}"),
    Step("tests: bfloat16", 9.5, f"{PYTEST} --covering *.bfloat16 --covering dropout.* --covering graphs.* tests"),
    Step(
        "throughput",
        2.0,
        f"{BENCH} bfloat16 --workload squad dense512 --peers fp8 torch-varlen flash-attn",
        rows=IN_16 + IN_FP8,
    ),
    Step(
        "latency",
        1.5,
        f"{BENCH} bfloat16 --workload dense128 --batch 1 8 --peers {SMALL_PEERS}",
        rows=IN_16 + WITH_GRAPHS + FP8_WITH_GRAPHS,
    ),
    Step(
        "training",
        1.5,
        f"{BENCH} bfloat16 --train --workload uniform254 squad --batch 64 --peers torch-varlen",
        rows=STEP_IN_16,
    ),
    Step(
        "deberta",
        1.5,
        f"{BENCH} bfloat16 --size deberta-v3-large --workload squad dense512 --peers {DEBERTA_PEERS}",
        rows=((DEBERTA, "fused", "bfloat16"),),
    ),
    Step(
        "deberta padded",
        1.0,
        f"{BENCH} float16 --size deberta-v2-xlarge --workload padded512 --batch 16 --peers {DEBERTA_PEERS}",
        rows=((DEBERTA, "fused", "float16"),),
    ),
    Step(
        "deberta long",
        0.7,
        f"{PROFILE.partition(' --compare')[0]} --size deberta-v3-small --lengths 8192 --batch 2 --train"
        " --json {output}/profile-deberta.json",
        rows=((DEBERTA_STEP, "fused", "bfloat16"),),
    ),
    Step(
        "deberta long forward",
        1.0,
        f"{BENCH} bfloat16 --size deberta-v3-small --workload dense8192 --batch 2 --peers {DEBERTA_PEERS}",
        rows=((DEBERTA, "fused", "bfloat16"),),
    ),
    Step(
        "deberta latency",
        1.0,
        f"{BENCH} bfloat16 --size deberta-v3-large --workload dense128 --batch 1 8 --peers graphs {DEBERTA_PEERS}",
        rows=((DEBERTA, "fused", "bfloat16"), (DEBERTA, "fused + CUDA graphs", "bfloat16")),
    ),
    Step(
        "deberta training",
        1.0,
        f"{BENCH} bfloat16 --train --size deberta-v3-large --workload squad --batch 64 --peers {DEBERTA_PEERS}",
        rows=((DEBERTA_STEP, "fused", "bfloat16"),),
    ),
    Step(
        "modernbert",
        1.5,
        f"{BENCH} bfloat16 --size modernbert-large --workload squad dense512 --peers {MODERN_PEERS}",
        rows=((MODERN, "fused", "bfloat16"),),
    ),
    Step(
        "modernbert long",
        1.0,
        f"{BENCH} bfloat16 --size modernbert-base --workload dense8192 --batch 2 --peers {MODERN_PEERS}",
        rows=((MODERN, "fused", "bfloat16"),),
    ),
    Step(
        "modernbert latency",
        1.0,
        f"{BENCH} bfloat16 --size modernbert-large --workload dense128 --batch 1 8 --peers graphs {MODERN_PEERS}",
        rows=((MODERN, "fused", "bfloat16"), (MODERN, "fused + CUDA graphs", "bfloat16")),
    ),
    Step(
        "modernbert training",
        1.0,
        f"{BENCH} bfloat16 --train --size modernbert-base --workload squad --batch 64 --peers {MODERN_PEERS}",
        rows=((MODERN_STEP, "fused", "bfloat16"),),
    ),
    Step("tests: kernels", 9.5, f"{PYTEST} tests/kernels"),
    Step("tests: models", 9.5, f"{PYTEST} tests --ignore tests/kernels"),
    Step("variants", 4.0, "benchmarks/variants.py --minutes {minutes} --train --output {output}"),
    Step("profile", 0.7, f"{PROFILE}squad.json --workload squad --batch 128", rows=IN_16),
    Step("profile dense", 0.7, f"{PROFILE}dense.json --workload dense512 --batch 128", rows=IN_16),
    Step("profile latency", 0.7, f"{PROFILE}latency.json --lengths 128", rows=IN_16),
    Step("profile training", 0.7, f"{PROFILE}training.json --workload uniform254 --batch 64 --train", rows=STEP_IN_16),
    Step("cold", 2.0, f"{BENCH} bfloat16 --cold --workload squad --batch 16", rows=IN_16),
    Step("compiled", 2.5, f"{BENCH} bfloat16 --workload squad dense512 --peers compile eager", rows=IN_16),
    Step(
        "compiled latency",
        2.0,
        f"{BENCH} bfloat16 --workload dense128 --batch 1 --peers reduce-overhead",
        rows=IN_16,
    ),
    Step("variants fp8", 3.0, "benchmarks/variants.py --precision fp8 --minutes {minutes} --output {output}"),
    Step("tune", 5.0, "-m fastbert.cli tune --minutes {minutes} --json {output}/tuned.json", "tuned"),
    Step("tuned", 1.5, f"{BENCH} bfloat16 --workload squad dense512 dense128", "tuned", IN_16),
    Step(
        "lengths",
        1.0,
        f"{BENCH} bfloat16 --workload search dense128 dense384 sentences --peers torch-varlen",
        rows=IN_16,
    ),
    Step(
        "dtypes",
        2.0,
        f"{BENCH} float16 float32 --workload squad dense512",
        rows=((FORWARD, "fused", "float16"), (FORWARD, "fused", "float32")),
    ),
    Step("operators", 2.0, f"{OPERATORS} squad", needs="pytest_benchmark"),
    Step("encode", 1.0, "benchmarks/encode.py --dtype bfloat16 --output {output}", rows=IN_16, needs=TEXTS),
    Step("embed", 1.5, "benchmarks/embed.py --dtype bfloat16 --lines 50000", rows=IN_16, needs=TEXTS),
    Step(
        "small batches",
        1.0,
        f"{BENCH} bfloat16 --workload squad search --batch 8 16 32 --peers graphs torch-varlen",
        rows=IN_16 + WITH_GRAPHS,
    ),
    Step(
        "compiled training",
        3.0,
        f"{BENCH} bfloat16 --train --workload uniform254 --batch 64 --peers compile",
        rows=STEP_IN_16,
    ),
    Step("max-autotune", 6.0, f"{BENCH} bfloat16 --workload squad dense512 --peers max-autotune", rows=IN_16),
)
ON_A_CPU = (
    Step(
        "throughput",
        30.0,
        f"{BENCH} bfloat16 float32 --workload squad search dense128 --batch 16 --repeats 5 --peers all",
    ),
    Step("latency", 10.0, f"{BENCH} bfloat16 float32 --workload squad dense128 --batch 1 --peers all"),
    Step("training", 20.0, f"{BENCH} bfloat16 float32 --train --workload squad --repeats 3"),
    Step("cold", 10.0, f"{BENCH} bfloat16 float32 --cold --workload dense128 --batch 1 --peers compile"),
    Step("encode", 10.0, "benchmarks/encode.py --dtype bfloat16 float32 --output {output}", needs=TEXTS),
    Step("operators", 10.0, f"{OPERATORS} squad --dtype float32", needs="pytest_benchmark"),
    Step("operators, bfloat16", 10.0, f"{OPERATORS} squad --dtype bfloat16", needs="pytest_benchmark"),
)


def key(step: Step) -> str:
    """What a step that is done is done for: its command, the place, and the sources of what it measures and runs."""
    words = shlex.split(step.command)
    files: Sequence[Path] = ()
    if step.name.startswith(TESTS):  # each of which has a key of its own, too
        files = sorted((ROOT / "tests").rglob("test_*.py"))
    elif words[:2] == ["-m", "fastbert.cli"]:
        files = [ROOT / "fastbert" / "cli" / f"{words[2]}.py"]
    elif words[:2] == ["-m", "pytest"]:
        files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    elif words[0].endswith(".py"):
        files = [ROOT / words[0]]
    found = hashlib.sha256(repr((gates.place(), step.command)).encode())
    for file in files:
        found.update(gates.key(file).encode())
    return found.hexdigest()[:16]


def closed(step: Step, verdicts: dict[str, str]) -> dict[str, str]:
    """Of a step's rows those with a red gate, and which; they are not timed."""
    from fastbert.measure.gates import judge  # with transformers, seconds

    found = {", ".join(row): judge(verdicts, *row[:2], getattr(torch, row[2])) for row in step.rows}
    return {row: state for row, state in found.items() if state.startswith(gates.RED)}


def judge_again(output: Path, since: str) -> None:
    """Brings what records say of their gates up to date: those of this commit, or where it is dirty of this run."""
    from fastbert.measure import machine, records
    from fastbert.usage import UsageError

    verdicts, own = gates.verdicts(output / GATES), machine.commit()
    for path in sorted(output.glob("*/*.json")):
        try:
            (about, *_) = records.load(path)
        except (UsageError, ValueError):
            continue  # another file, or an empty one
        if about["commit"] == own and (not own.endswith("-dirty") or about["date"] >= since):
            records.judge_again(path, verdicts)


class Progress:
    """What became of each step, in a file that is replaced at once."""

    def __init__(self, path: Path, steps: Sequence[Step]) -> None:
        self.path = path
        self.keys = {step.name: key(step) for step in steps}
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            known, keys, shut = dict(noted["steps"]), dict(noted["keys"]), dict(noted["closed"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or another's: from the beginning
            known, keys, shut = {}, {}, {}
        self.states: dict[str, str] = {
            name: state for name, state in known.items() if keys.get(name) == self.keys.get(name)
        }
        self.closed: dict[str, list[str]] = {name: shut[name] for name in self.states if name in shut}
        """Of a step that is done, the rows that red gates had closed."""

    def is_done(self, step: Step, verdicts: dict[str, str] | None) -> bool:
        """Whether nothing of a step is left to measure: not a row, either, that a gate closed which is red no more."""
        if self.states.get(step.name) != "done":
            return False
        shut = self.closed.get(step.name, [])
        return not shut or verdicts is None or set(shut) <= set(closed(step, verdicts))

    def note(self, name: str, state: str, rows: Iterable[str] = ()) -> None:
        """What became of a step: "done", "failed", "cut", "closed", "left out", or "begun" while it runs.

        And which of its rows red gates closed.
        """
        self.states[name] = state
        self.closed[name] = sorted(rows)
        told = {
            "steps": self.states,
            "keys": {name: self.keys[name] for name in self.states},
            "closed": {name: rows for name, rows in self.closed.items() if rows},
        }
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


@contextmanager
def kept(output: Path, folder: Path | None) -> Iterator[Any]:
    """Packs `output` into `folder` now and then, whenever what is yielded is called, and at the end, whatever it is.

    In between what was measured alone: compressing what was compiled would take time from what is timed.
    """
    if folder is None:
        yield lambda: None
        return
    turn, ended = threading.Lock(), threading.Event()

    def pack(*names: str) -> None:
        with turn:
            for line in archive.pack(output, folder, names or (archive.MEASURED, archive.CACHES)):
                print(f"left out of the archive: {line}", file=sys.stderr)

    def repeatedly() -> None:
        while not ended.wait(PACKED_EVERY_S):
            pack(archive.MEASURED)

    packer = threading.Thread(target=repeatedly, daemon=True)
    packer.start()
    try:
        yield pack
    finally:
        ended.set()
        packer.join()
        pack()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ends a step as Ctrl-C does, which keeps what it measured; who takes long for that is ended by force next."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


def command(step: Step, minutes: float, output: Path, slack: float = 1.0) -> list[str]:
    """What a step runs."""
    # A bench ends by itself when its time is up, which is before it would be interrupted.
    values = {"output": str(output), "minutes": f"{0.8 * minutes:.2f}", "slack": str(slack)}
    words = [word.format(**values) if word.startswith("{") else word for word in shlex.split(step.command)]
    if step.name.startswith(TESTS) and importlib.util.find_spec("xdist"):
        # A worker whose device has failed, or whose test hangs, is replaced.
        words += ["-n", str(min(12, max(1, 3 * len(os.sched_getaffinity(0)) // 4))), "--max-worker-restart", "100"]
    if step.name.startswith(TESTS) and importlib.util.find_spec("pytest_timeout"):
        words += [
            "--timeout",
            str(TEST_LIMIT_S),
            "--timeout-method",
            "thread",
        ]  # which ends one that hangs in CUDA, too
    return [sys.executable, *words]


def run(step: Step, minutes: float, output: Path, verdicts: dict[str, str] | None, slack: float) -> str:
    """Runs a step for `minutes` at most; returns "done", "failed", "broken" or "cut"."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "OUT"},  # packing is done here
        **({} if verdicts is None else {"FASTBERT_GATES": json.dumps(verdicts)}),  # fastbert/measure/gates.py
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(output / "cache" / step.cache),
        "TRITON_CACHE_DIR": str(output / "cache" / "triton"),  # so that it can be taken along, too
    }
    log = output / "logs" / f"{re.sub('[^a-z0-9]+', '-', step.name)}.log"
    log.parent.mkdir(exist_ok=True)
    words = command(step, minutes, output, slack)[1:]
    process = processes.start(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(log, "ab" if step.name.startswith(TESTS) else "wb") as file:  # tests go on, and so does what they say
        told = threading.Thread(target=tell, args=(process, file))
        told.start()
        try:
            status = process.wait(60 * minutes)
            return {0: "done", BROKEN: "broken", OUT_OF_TIME: "cut"}.get(status, "failed")
        except subprocess.TimeoutExpired:
            interrupt(process)
            return "cut"
        except KeyboardInterrupt:
            interrupt(process)
            raise
        finally:
            processes.end(process)  # what the step left running would hold the GPU, and the step's output open
            told.join(GRACE_S)


def tell(process: subprocess.Popen[bytes], file: BinaryIO) -> None:
    """What a step says: to whoever watches, and into its log."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        file.write(line)
        file.flush()


def main(argv: list[str] | None = None) -> int:
    on_a_gpu = torch.cuda.is_available()
    steps = {step.name: step for step in (ON_A_GPU if on_a_gpu else ON_A_CPU)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(steps), metavar="STEP", help=", ".join(steps))
    parser.add_argument("--minutes", type=float, help="for all of it; default: 10 on a GPU, 90 on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--archive", type=Path, metavar="DIR", default=os.environ.get("OUT"), help="default: $OUT")
    parser.add_argument(
        "--slack", type=float, default=1.0, metavar="X", help="a step's minutes times this, for slow machines"
    )
    parser.add_argument("--list", action="store_true", help="tell what is done and what is not, and stop")
    given = parser.parse_args(argv)
    # What a shell puts in the background ignores interrupts, and what it starts inherits that: no step could be cut.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline = time.monotonic() + 60 * (given.minutes or (10.0 if on_a_gpu else 90.0))
    output, folder = given.output.resolve(), given.archive and Path(given.archive).resolve()
    output.mkdir(parents=True, exist_ok=True)
    for place in (folder, archive.CARRIED):
        if place is not None and not given.list:
            archive.restore(place, output)
    progress = Progress(output / "progress.json", list(steps.values()))
    if given.list:
        for step in steps.values():
            words = shlex.join(command(step, step.minutes, given.output)[1:])
            print(f"{step.name:<20}{progress.states.get(step.name, 'not begun'):<11}{step.minutes:>4} min  {words}")
        return 0
    verdicts = gates.verdicts(output / GATES) if on_a_gpu else None
    wanted = [steps[name] for name in given.only or steps if given.only or not progress.is_done(steps[name], verdicts)]
    with kept(output, folder) as keep:
        return go_through(wanted, output, progress, deadline, given.slack, on_a_gpu, keep)


def go_through(
    wanted: Sequence[Step],
    output: Path,
    progress: Progress,
    deadline: float,
    slack: float,
    on_a_gpu: bool,
    keep: Any,
) -> int:
    """Runs steps until the deadline; returns the exit status."""
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for i, step in enumerate(wanted):
        if deadline - time.monotonic() < LEAST_S:
            names = ", ".join(step.name for step in wanted[i:])
            print(f"out of time: {names} not begun; the same command goes on", file=sys.stderr)
            return 3
        if step.needs and importlib.util.find_spec(step.needs) is None:
            print(f"== {step.name}: left out, {step.needs} is not installed", file=sys.stderr)
            progress.note(step.name, "left out")
            continue
        verdicts = gates.verdicts(output / GATES) if on_a_gpu else None
        shut = closed(step, verdicts) if verdicts is not None and step.rows else {}
        if step.rows and len(shut) == len(step.rows):
            print(f"== {step.name}: closed, {'; '.join(dict.fromkeys(shut.values()))}", file=sys.stderr)
            progress.note(step.name, "closed")
            continue
        print(f"\n== {step.name}: {step.command}", flush=True)
        start = time.monotonic()
        progress.note(step.name, "begun")
        for _ in range(MOST_PROCESSES):
            left = min(deadline - time.monotonic(), 60 * slack * step.minutes - (time.monotonic() - start)) / 60
            state = run(step, left, output, verdicts, slack)
            if state != "broken" or not step.name.startswith(TESTS):
                break
        progress.note(step.name, "failed" if state == "broken" else state, shut)
        print(f"== {step.name}: {state}, {time.monotonic() - start:.0f} s", flush=True)
        if on_a_gpu:
            judge_again(output, since)
        keep()
    states = {step.name: progress.states[step.name] for step in wanted}
    for state, told in (("closed", "closed by red gates"), ("failed", "failed"), ("cut", "out of time in")):
        if names := [name for name, found in states.items() if found == state]:
            print(f"{told}: {', '.join(names)}", file=sys.stderr)
    return 1 if {"failed", "closed"} & set(states.values()) else 3 if "cut" in states.values() else 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that the step's process ends, and archives are written
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
