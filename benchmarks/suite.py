"""Everything there is to measure on one machine, the most important first: `make gpu`, `make bench`.

    python benchmarks/suite.py [--only STEP ...] [--minutes 10] [--output benchmarks/results] [--list]

Every step is a process of its own and writes its records as it goes. On a GPU the first is the tests that need one, and
nothing is timed while they are red. What is done is noted in OUTPUT/progress.json by a hash of the sources, so that the
same command goes on where it was stopped, and starts over where code changed; --only repeats a step. A step that
outlasts the time left is interrupted and keeps what it wrote. Exit status: 0 all done, 1 a step failed, 3 out of time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests"
GRACE_S = 20.0
"""What an interrupted step is given to write what it has."""


@dataclass(frozen=True)
class Step:
    """A command, and the most minutes it may take; `{output}` and `{minutes}` in it are filled in."""

    name: str
    minutes: float
    command: str


BENCH = "-m fastbert.cli bench --output {output} --minutes {minutes} --dtype"

ON_A_GPU = (
    Step(TESTS, 5.0, "-m pytest -q tests -m gpu"),
    Step("throughput", 2.0, f"{BENCH} bfloat16 --workload squad dense512 search --peers torch-varlen flash-attn"),
    Step("latency", 1.5, f"{BENCH} bfloat16 --workload dense128 --batch 1 2 4 8 --peers reduce-overhead"),
    Step("training", 1.5, f"{BENCH} bfloat16 --train --workload squad dense512 --batch 64 --peers torch-varlen"),
    Step(
        "profile",
        0.5,
        "-m fastbert.cli profile --workload squad --batch 128 --compare stock --json {output}/profile.json",
    ),
    Step("cold", 1.5, f"{BENCH} bfloat16 --cold --workload squad --batch 16"),
    Step("compiled", 2.0, f"{BENCH} bfloat16 --workload squad dense512 --peers compile eager"),
    Step("lengths", 1.0, f"{BENCH} bfloat16 --workload dense128 dense384 sentences --peers torch-varlen"),
    Step("dtypes", 2.0, f"{BENCH} float16 float32 --workload squad dense512"),
    Step("operators", 2.0, "-m pytest -q benchmarks --records {output} --workload squad"),
    Step("encode", 1.0, "benchmarks/encode.py --dtype bfloat16 --output {output}"),
    Step("small batches", 1.0, f"{BENCH} bfloat16 --workload squad search --batch 8 16 32 --peers torch-varlen"),
    Step("compiled training", 3.0, f"{BENCH} bfloat16 --train --workload squad --batch 64 --peers compile"),
    Step("max-autotune", 6.0, f"{BENCH} bfloat16 --workload squad dense512 --peers max-autotune"),
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
    Step("encode", 10.0, "benchmarks/encode.py --dtype bfloat16 float32 --output {output}"),
    Step("operators", 10.0, "-m pytest -q benchmarks --records {output} --workload squad --dtype float32"),
    Step("operators, bfloat16", 10.0, "-m pytest -q benchmarks --records {output} --workload squad --dtype bfloat16"),
)


def fingerprint() -> str:
    """A hash of what is measured and of what measures it."""
    found = hashlib.sha256()
    for folder in ("fastbert", "kernels", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ends a step as Ctrl-C does, which keeps what it measured; or by force, where that takes long."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(step: Step, minutes: float, output: Path) -> list[str]:
    """What a step runs."""
    # A bench ends by itself when its time is up, which is before it would be interrupted.
    values = {"output": str(output), "minutes": f"{0.8 * minutes:.2f}"}
    words = [word.format(**values) if word.startswith("{") else word for word in shlex.split(step.command)]
    if step.name == TESTS and importlib.util.find_spec("xdist"):
        words += ["-n", str(min(8, (os.cpu_count() or 2) // 2))]  # most of the time is compilation
    return [sys.executable, *words]


def run(step: Step, minutes: float, output: Path) -> str:
    """Runs a step for `minutes` at most; returns "done", "failed" or "cut"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command(step, minutes, output), cwd=ROOT, env=environment, start_new_session=True)
    try:
        return "done" if process.wait(60 * minutes) == 0 else "failed"
    except subprocess.TimeoutExpired:
        interrupt(process)
        return "cut"
    except KeyboardInterrupt:
        interrupt(process)
        raise


def main(argv: list[str] | None = None) -> int:
    steps = {step.name: step for step in (ON_A_GPU if torch.cuda.is_available() else ON_A_CPU)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(steps), metavar="STEP", help=", ".join(steps))
    parser.add_argument("--minutes", type=float, help="for all of it; default: 10 on a GPU, 90 on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--list", action="store_true", help="tell what is done and what is not, and stop")
    given = parser.parse_args(argv)
    # What a shell puts in the background ignores interrupts, and what it starts inherits that: no step could be cut.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    minutes = given.minutes or (10.0 if torch.cuda.is_available() else 90.0)
    deadline = time.monotonic() + 60 * minutes
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    progress, sources = output / "progress.json", fingerprint()
    noted = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else {}
    steps_done = noted["steps"] if noted.get("sources") == sources else {}
    if given.list:
        for name in steps:
            print(f"{name:<20}{steps_done.get(name, 'not begun')}")
        return 0
    wanted = given.only or [name for name in steps if steps_done.get(name) != "done"]
    if TESTS in steps and TESTS not in wanted and steps_done.get(TESTS) != "done":
        wanted = [TESTS, *wanted]
    for i, name in enumerate(wanted):
        left = (deadline - time.monotonic()) / 60
        if left < 0.2:
            print(f"out of time: {', '.join(wanted[i:])} not begun; the same command goes on", file=sys.stderr)
            return 3
        print(f"\n== {name}: {steps[name].command}", flush=True)
        start = time.monotonic()
        steps_done[name] = run(steps[name], min(left, steps[name].minutes), output)
        print(f"== {name}: {steps_done[name]}, {time.monotonic() - start:.0f} s", flush=True)
        partial = progress.with_suffix(".partial")
        partial.write_text(json.dumps({"sources": sources, "steps": steps_done}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, progress)
        if name == TESTS and steps_done[name] != "done":
            print("the tests are not green: nothing is timed", file=sys.stderr)
            return 1
    if cut := [name for name in wanted if steps_done[name] == "cut"]:
        print(f"out of time in: {', '.join(cut)}", file=sys.stderr)
    return 1 if "failed" in (steps_done[name] for name in wanted) else 3 if cut else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step's process ends, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
