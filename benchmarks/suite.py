"""Everything there is to measure on one machine, the most important first: `make gpu`, `make bench`.

    python benchmarks/suite.py [--only STEP ...] [--minutes 10] [--output benchmarks/results] [--list]

Every step is a process of its own and writes its records as it goes, and what it says into OUTPUT/logs. On a GPU the
first are the tests that need one, all of them, and nothing is timed while one is red. What is done is noted in
OUTPUT/progress.json by a hash of the sources, so that the same command goes on where it was stopped, on another machine
too where that file is taken along, and starts over where code changed; --only repeats a step. A step that outlasts the
time left is interrupted and keeps what it wrote. Steps run with the shipped launch configurations, whatever the user's
cache holds, but for those that say "tuned". Exit status: 0 all done, 1 a step failed, 3 out of time.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests: "
"""How the names of the steps begin that have to pass before anything is timed."""
GRACE_S = 20.0
"""What an interrupted step is given to write what it has."""


@dataclass(frozen=True)
class Step:
    """A command, and the most minutes it may take; `{output}` and `{minutes}` in it are filled in."""

    name: str
    minutes: float
    command: str
    cache: str = "shipped"
    """Of the user's caches in OUTPUT/cache, the one it has. Steps that share one find what another wrote."""


PYTEST = "-m pytest -q --tb=short --maxfail=50 -m gpu"
BENCH = "-m fastbert.cli bench --output {output} --minutes {minutes} --dtype"
SMALL_PEERS = "graphs graphs-pdl fp8-graphs torch-varlen"
PROFILE = "-m fastbert.cli profile --dtype bfloat16 --compare stock --json {output}/profile-"

# Tests take what is left, as nothing is timed before they are through; most of it is compilation.
ON_A_GPU = (
    Step("tests: kernels", 9.5, f"{PYTEST} tests/kernels"),
    Step("tests: models", 9.5, f"{PYTEST} tests --ignore tests/kernels"),
    Step("throughput", 2.0, f"{BENCH} bfloat16 --workload squad dense512 --peers fp8 torch-varlen flash-attn"),
    Step("latency", 1.5, f"{BENCH} bfloat16 --workload dense128 --batch 1 8 --peers {SMALL_PEERS}"),
    Step("training", 1.5, f"{BENCH} bfloat16 --train --workload uniform254 squad --batch 64 --peers torch-varlen"),
    Step("variants", 4.0, "benchmarks/variants.py --minutes {minutes} --train --output {output}"),
    Step("profile", 0.7, f"{PROFILE}squad.json --workload squad --batch 128"),
    Step("profile dense", 0.7, f"{PROFILE}dense.json --workload dense512 --batch 128"),
    Step("profile latency", 0.7, f"{PROFILE}latency.json --lengths 128"),
    Step("profile training", 0.7, f"{PROFILE}training.json --workload uniform254 --batch 64 --train"),
    Step("cold", 2.0, f"{BENCH} bfloat16 --cold --workload squad --batch 16"),
    Step("compiled", 2.5, f"{BENCH} bfloat16 --workload squad dense512 --peers compile eager"),
    Step("compiled latency", 2.0, f"{BENCH} bfloat16 --workload dense128 --batch 1 --peers reduce-overhead"),
    Step("variants fp8", 3.0, "benchmarks/variants.py --precision fp8 --minutes {minutes} --output {output}"),
    Step("tune", 5.0, "-m fastbert.cli tune --minutes {minutes} --json {output}/tuned.json", "tuned"),
    Step("tuned", 1.5, f"{BENCH} bfloat16 --workload squad dense512 dense128", "tuned"),
    Step("lengths", 1.0, f"{BENCH} bfloat16 --workload search dense128 dense384 sentences --peers torch-varlen"),
    Step("dtypes", 2.0, f"{BENCH} float16 float32 --workload squad dense512"),
    Step("operators", 2.0, "-m pytest -q benchmarks --records {output} --workload squad"),
    Step("encode", 1.0, "benchmarks/encode.py --dtype bfloat16 --output {output}"),
    Step("embed", 1.5, "benchmarks/embed.py --dtype bfloat16 --lines 50000"),
    Step("small batches", 1.0, f"{BENCH} bfloat16 --workload squad search --batch 8 16 32 --peers graphs torch-varlen"),
    Step("compiled training", 3.0, f"{BENCH} bfloat16 --train --workload uniform254 --batch 64 --peers compile"),
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
    if step.name.startswith(TESTS) and importlib.util.find_spec("xdist"):
        words += ["-n", str(min(8, max(1, (os.cpu_count() or 2) // 2)))]
    return [sys.executable, *words]


def run(step: Step, minutes: float, output: Path) -> str:
    """Runs a step for `minutes` at most; returns "done", "failed" or "cut"."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(output / "cache" / step.cache),
        "TRITON_CACHE_DIR": str(output / "cache" / "triton"),  # so that it can be taken along, too
    }
    log = output / "logs" / f"{re.sub('[^a-z0-9]+', '-', step.name)}.log"
    log.parent.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command(step, minutes, output),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with open(log, "wb") as file:
        told = threading.Thread(target=tell, args=(process, file))
        told.start()
        try:
            return "done" if process.wait(60 * minutes) == 0 else "failed"
        except subprocess.TimeoutExpired:
            interrupt(process)
            return "cut"
        except KeyboardInterrupt:
            interrupt(process)
            raise
        finally:
            told.join(GRACE_S)  # what the step left running may hold its output open


def tell(process: subprocess.Popen[bytes], file: BinaryIO) -> None:
    """What a step says: to whoever watches, and into its log."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        file.write(line)
        file.flush()


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
    try:
        noted = json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or one that was cut off on its way: from the beginning
        noted = {}
    steps_done = noted["steps"] if noted.get("sources") == sources else {}
    if given.list:
        for step in steps.values():
            words = shlex.join(command(step, step.minutes, given.output)[1:])
            print(f"{step.name:<20}{steps_done.get(step.name, 'not begun'):<11}{step.minutes:>4} min  {words}")
        return 0
    wanted = given.only or [name for name in steps if steps_done.get(name) != "done"]
    tests = [name for name in steps if name.startswith(TESTS)]
    wanted = [*(name for name in tests if name not in wanted and steps_done.get(name) != "done"), *wanted]
    for i, name in enumerate(wanted):
        left = (deadline - time.monotonic()) / 60
        if left < 0.2:
            print(f"out of time: {', '.join(wanted[i:])} not begun; the same command goes on", file=sys.stderr)
            return 3
        if name not in tests and (red := [one for one in tests if steps_done.get(one) != "done"]):
            print(f"not green: {', '.join(red)}; nothing is timed", file=sys.stderr)
            return 1
        print(f"\n== {name}: {steps[name].command}", flush=True)
        start = time.monotonic()
        steps_done[name] = run(steps[name], min(left, steps[name].minutes), output)
        print(f"== {name}: {steps_done[name]}, {time.monotonic() - start:.0f} s", flush=True)
        partial = progress.with_suffix(".partial")
        partial.write_text(json.dumps({"sources": sources, "steps": steps_done}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, progress)
    if cut := [name for name in wanted if steps_done[name] == "cut"]:
        print(f"out of time in: {', '.join(cut)}", file=sys.stderr)
    return 1 if "failed" in (steps_done[name] for name in wanted) else 3 if cut else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step's process ends, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
