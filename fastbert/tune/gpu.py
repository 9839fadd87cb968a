"""The device that configurations are tried on: checked in processes of their own, timed in this one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..kernels import launch
from ..kernels.launch import Config
from .problems import Problem, Sizes, listed, problems
from .search import OK, OTHER_BITS, Candidate, Samples

JOB_BYTES = 3 << 30
"""Memory of the device for one process that checks."""
SAMPLES = 15
TRIAL_LIMIT_S = 90.0
"""For one configuration to compile and to run; what takes longer hangs."""
FRUITLESS = 3
"""Processes in a row that end at their first candidate, before the rest is given up."""


class Checker:
    """Holds one configuration after another to the policy, on one device. Stock's results are kept for the problem."""

    def __init__(self, work: Sequence[Problem], device: torch.device) -> None:
        self.work = {problem.name: problem for problem in work}
        self.device = device
        self._known: tuple[str, object] = ("", None)

    @torch.no_grad()
    def check(self, name: str, config: Config) -> str:
        """OK, or what is wrong; what begins with OTHER_BITS is within the policy."""
        problem = self.work[name]
        try:
            arguments, stock, truth, shipped = self._stock(problem)
            launch.use({problem.key: config})
            found = listed(problem.call(*arguments))
            for i, each in enumerate(zip(found[: len(stock)], stock, truth, strict=True)):
                numerics.assert_within_policy(*each, f"result {i}")
            if problem.same_bits and not all(map(torch.equal, found, shipped)):
                return f"{OTHER_BITS} than the shipped configuration's, so results would depend on the batch"
        except Exception as error:  # whatever the compiler or the driver raises is this candidate's result
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            launch.use({})
        return OK

    def _stock(self, problem: Problem) -> Any:
        """(arguments, stock's results, the truth, the shipped configuration's results)."""
        if self._known[0] != problem.name:
            torch.manual_seed(0)
            arguments = problem.arguments(problem.checked_rows, self.device)
            exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
            stock, truth = (listed(problem.peer(*each)) for each in (arguments, exact))
            shipped = listed(problem.call(*arguments)) if problem.same_bits else []
            self._known = problem.name, (arguments, stock, truth, shipped)
        return self._known[1]


def serve() -> None:
    """A process that checks: its task comes in by stdin, a line of JSON goes out for each candidate, in order."""
    given, out = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no result
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    work = problems(Sizes(*given["sizes"]), dtype, given["arch"], given["train"], given["precision"])
    checker = Checker(work, device)
    for name, fields in given["candidates"]:
        print(json.dumps(checker.check(name, Config(**fields))), file=out, flush=True)


class Gpu:
    """The CUDA device of this machine."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        dtype: torch.dtype,
        train: bool = False,
        precision: str | None = None,
        jobs: int = 1,
    ) -> None:
        self.device = device
        self.task = {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "arch": launch.architecture(device),
            "sizes": sizes,
            "train": train,
            "precision": precision,
        }
        self.jobs = jobs
        self.command = [sys.executable, "-c", "from fastbert.tune.gpu import serve; serve()"]
        self._buffers: tuple[tuple[str, int], list[tuple[object, ...]]] = (("", 0), [])
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            self.shared_limit = int(getattr(found, "shared_memory_per_block_optin", 99 * 1024))
            self.l2_bytes = int(getattr(found, "L2_cache_size", 64 << 20))

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        """As Rig has it: a few processes, each with a share of the candidates."""
        # Candidates of one kernel go to one process, or two would compile the same.
        shares: dict[int, list[Candidate]] = {}
        homes: dict[object, int] = {}
        for candidate in candidates:
            home = homes.setdefault((candidate.problem.function, candidate.config), len(homes) % self.jobs)
            shares.setdefault(home, []).append(candidate)
        results: SimpleQueue[tuple[Candidate, str] | None] = SimpleQueue()
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._check_share, args=(share, deadline, results, stop), daemon=True)
            for share in shares.values()
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                else:
                    yield result
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _check_share(
        self, share: list[Candidate], deadline: float, results: SimpleQueue[object], stop: threading.Event
    ) -> None:
        """One process after another, until every candidate of a share has its result."""
        # What is known of a problem is kept for its candidates: one problem after the other, in the order given.
        place = {name: i for i, name in enumerate(dict.fromkeys(candidate.problem.name for candidate in share))}
        share = sorted(share, key=lambda candidate: place[candidate.problem.name])
        fruitless = 0
        try:
            while share and not stop.is_set() and time.monotonic() < deadline:
                statuses = self._process(share, deadline, stop)
                fruitless = fruitless + 1 if len(statuses) == 1 else 0
                if fruitless == FRUITLESS:  # it is not the candidate
                    statuses *= len(share)
                for status in statuses:
                    results.put((share.pop(0), status))
        finally:
            results.put(None)

    def _process(self, share: list[Candidate], deadline: float, stop: threading.Event) -> list[str]:
        """The results of the first candidates of a share: of all, or up to one that ended the process."""
        given = [[candidate.problem.name, dataclasses.asdict(candidate.config)] for candidate in share]
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        found: list[str] = []
        said: list[str] = []
        latest = [time.monotonic()]

        def read() -> None:
            for line in process.stdout:
                found.append(json.loads(line))
                latest[0] = time.monotonic()

        readers = [
            threading.Thread(target=read, daemon=True),
            threading.Thread(target=lambda: said.append(process.stderr.read()), daemon=True),
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it has ended already, which is noticed below
            json.dump({**self.task, "candidates": given}, process.stdin)
        hung = False
        while process.poll() is None:
            hung = time.monotonic() - latest[0] > TRIAL_LIMIT_S
            if hung or stop.is_set() or time.monotonic() > deadline:
                process.kill()
                process.wait()
            time.sleep(0.02)
        for reader in readers:
            reader.join()
        if len(found) < len(share) and not stop.is_set() and (hung or time.monotonic() < deadline):
            last = (" ".join(said).strip() or "nothing said").splitlines()[-1][:200]
            found.append(f"no end after {TRIAL_LIMIT_S:.0f} s" if hung else f"ended its process: {last}")
        return found

    @torch.no_grad()
    def time(self, problem: Problem, rows: int, config: Config) -> Samples:
        """As Rig has it."""
        launch.use({problem.key: config})
        try:
            return self.measure(problem.call, self.sets(problem, rows))
        finally:
            launch.use({})

    @torch.no_grad()
    def measure(self, call: Callable[..., object], sets: Sequence[tuple[object, ...]]) -> Samples:
        """Seconds of one call, by replays of a graph of calls, each with arguments of its own."""
        side = torch.cuda.Stream(self.device)
        torch.cuda.synchronize(self.device)  # the arguments are made on another stream
        with torch.cuda.device(self.device), torch.cuda.stream(side):
            call(*sets[0])  # loads the kernel
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for arguments in sets:
                    call(*arguments)
            samples = []
            for _ in range(SAMPLES + 2):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end) / 1000 / len(sets))
        return samples[2:]

    def sets(self, problem: Problem, rows: int) -> list[tuple[object, ...]]:
        """Arguments of a problem, so many that the L2 cache holds none of them when its turn comes again."""
        if self._buffers[0] != (problem.name, rows):
            self._buffers = ("", 0), []  # first give back the old ones
            first = problem.arguments(rows, self.device)
            size = sum(a.numel() * a.itemsize for a in first if isinstance(a, Tensor))
            count = min(64, max(4, -(-3 * self.l2_bytes // size)))
            more = [problem.arguments(rows, self.device) for _ in range(count - 1)]
            self._buffers = (problem.name, rows), [first, *more]
        return self._buffers[1]
