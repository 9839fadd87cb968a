"""`fastbert tune`: launch configurations for this GPU and a model, found by trying, kept in the user's cache.

For every key of the tables of kernels/launch.py that the model asks for, configurations near the best one so far are
tried: first in processes of their own, where they are compiled and their results held to the numerical policy, so that
one that hangs or crashes takes nothing along; those that are right are timed in this process, one by one. Time is that
of the device: launches captured into a CUDA graph, over buffers that the L2 cache can't hold. One that is faster than
the shipped configuration beyond the spread of both is kept. Where a table is by the number of rows, only one that gives
the same bits as the shipped one is, so that a sequence's result still doesn't depend on its batch. With `--library`
PyTorch's GEMM is tried, too: where it beats the best tile it is kept beside that, for those who give this up
(`fastbert.set_batch_invariant`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import numerics, tuned
from ..kernels import launch
from ..kernels.launch import Config
from ..runtime.support import fp8_is_unsupported
from . import UsageError, check_file, in_a_line, write_text
from .cases import SHAPES
from .info import default_device
from .problems import Problem, Sizes, listed, problems

ROUNDS = 4
"""In each, configurations near the best one of the last are tried."""
JOB_BYTES = 3 << 30
"""Memory of the device for one process that checks."""
SAMPLES = 15
MAX_HELD = 160
"""float32 numbers a thread may hold, of its 255 registers."""
TRIAL_LIMIT_S = 90.0
"""For one configuration to compile and to run; what takes longer hangs."""
FRUITLESS = 3
"""Processes in a row that end at their first candidate, before the rest is given up."""
OK, OTHER_BITS = "ok", "other bits"
Samples = list[float]


class Candidate(NamedTuple):
    """A configuration to try for a problem."""

    problem: Problem
    config: Config


class Rig(Protocol):
    """A device, as the search needs it."""

    shared_limit: int
    """Bytes of shared memory that a program may take."""

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        """Compiles and runs each; yields it with OK or with what is wrong. At `deadline` the rest is left out."""

    def time(self, problem: Problem, rows: int, config: Config) -> Samples:
        """Seconds of one launch, several times."""


def of_variant(config: Config, variant: str) -> Config:
    """A configuration for another variant: with programs an SM, one at least, only where it walks through tiles."""
    return dataclasses.replace(config, variant=variant, programs=max(1, config.programs) if variant else 0)


def neighbours(problem: Problem, config: Config) -> list[Config]:
    """Configurations a step away: a size doubled or halved, a stage or a program more or less, another variant."""
    free = launch.OPERATIONS[problem.key[0]].free

    def changed(**fields: Any) -> Config:
        return dataclasses.replace(config, **fields)

    found = []
    for name in free:
        value = getattr(config, name)
        if name == "programs" and not config.variant:
            continue  # then there is one a tile, whatever it says
        if name == "variant":
            found += [of_variant(config, variant) for variant in launch.VARIANTS]
        elif tuned.RANGES[name][2]:
            found += [changed(**{name: value * 2}), changed(**{name: value // 2})]
        else:
            found += [changed(**{name: value + 1}), changed(**{name: value - 1})]
    # A tile twice as large, or half, takes as many more warps.
    for name in ("block_m", "block_n"):
        if {name, "num_warps"} <= set(free):
            value = getattr(config, name)
            found.append(changed(**{name: value * 2}, num_warps=config.num_warps * 2))
            found.append(changed(**{name: value // 2}, num_warps=config.num_warps // 2))
    return found


def seeds(problem: Problem, others: Iterable[Problem]) -> list[Config]:
    """What tables have for the problem, and for others of its operation, on any architecture; the shipped one first."""
    operation, architectures = problem.key[0], ("sm_80", "sm_89", "sm_90", "sm_100", "portable")
    choose, _, free = launch.OPERATIONS[operation]
    known = [
        choose(*(arch if isinstance(value, str) else value for value in other.key[1:]))
        for other in others
        for arch in architectures
        if other.key[0] == operation
    ]
    for beside in ("TILES", "CANDIDATES"):
        tables: dict[str, tuple[Config, ...]] = getattr(launch, f"{operation.upper()}_{beside}", {})
        known += itertools.chain.from_iterable(tables.values())
    shipped = problem.shipped()
    return [shipped, *(dataclasses.replace(shipped, **{name: getattr(c, name) for name in free}) for c in known)]


def plausible(problem: Problem, config: Config, shared_limit: int) -> bool:
    """Whether a configuration is worth compiling: within ranges, shared memory and registers."""
    if tuned.problem(problem.key, config) is not None:
        return False
    return problem.shared(config) <= shared_limit and problem.held(config) <= MAX_HELD


def quantiles(samples: Samples) -> list[float]:
    """p20, median and p80."""
    found: list[float] = (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return found


def gain(new: dict[int, Samples], old: dict[int, Samples]) -> float:
    """How many times faster, by medians: the geometric mean over numbers of rows."""
    ratios = [statistics.median(old[rows]) / statistics.median(new[rows]) for rows in old]
    return math.exp(statistics.fmean(map(math.log, ratios)))


def beats(new: dict[int, Samples], old: dict[int, Samples]) -> bool:
    """Whether `new` is faster beyond the spread at some number of rows, slower beyond it at none, faster overall."""
    faster = slower = False
    for rows in old:
        (new_low, _, new_high), (old_low, _, old_high) = quantiles(new[rows]), quantiles(old[rows])
        faster |= new_high < old_low
        slower |= new_low > old_high
    return faster and not slower and gain(new, old) > 1


class Search:
    """What is tried, what is known so far, and what is best; `entries` is right at any moment."""

    def __init__(
        self,
        work: Sequence[Problem],
        rig: Rig,
        note: Callable[[str], None] = lambda _: None,
        library: bool = False,
    ) -> None:
        self.work = work
        self.rig = rig
        self.library = library
        """Whether PyTorch's GEMMs are tried, too."""
        self.note = note
        """Told what happens, a few words for each candidate."""
        self.times: dict[tuple[Any, ...], dict[Config, dict[int, Samples]]] = {problem.key: {} for problem in work}
        self.dropped: list[tuple[Candidate, str]] = []
        self.won: dict[tuple[Any, ...], tuned.Entry] = {}
        self.by_library: dict[tuple[Any, ...], tuned.Entry] = {}
        """Where PyTorch's GEMM beats what is best."""
        self.settled: dict[tuple[Any, ...], Config] = {}
        """By key, the best configuration, once it has been compared with the shipped one again."""

    def best(self, problem: Problem) -> Config:
        """The fastest configuration so far; the shipped one, of the first number of rows, where none was timed."""
        times, shipped = self.times[problem.key], problem.shipped()
        if shipped not in times:
            return shipped
        tiles = [config for config in times if config != launch.BY_LIBRARY]
        return max(tiles, key=lambda config: gain(times[config], times[shipped]))

    def candidates(self, first: bool) -> list[Candidate]:
        """What to try next, nothing twice."""
        known = {(candidate.problem.key, candidate.config) for candidate, _ in self.dropped}
        found: dict[tuple[Any, Config], Candidate] = {}
        for problem in self.work:
            shipped, best = problem.shipped(), self.best(problem)
            near = seeds(problem, self.work) if first else []
            if first and self.library and problem.key[0] == "linear":
                found[problem.key, launch.BY_LIBRARY] = Candidate(problem, launch.BY_LIBRARY)
            if first or best in self.times[problem.key]:  # without a shipped one that works there is no more to know
                near = [*near, *neighbours(problem, best)]
            for config in near:
                new = config not in self.times[problem.key] and (problem.key, config) not in known
                if new and (config == shipped or plausible(problem, config, self.rig.shared_limit)):
                    found.setdefault((problem.key, config), Candidate(problem, config))
        return list(found.values())

    def run(self, deadline: float) -> None:
        """Searches until nothing nearby is faster, or until `deadline` of the monotonic clock."""
        place = {problem.key: i for i, problem in enumerate(self.work)}
        for turn in range(ROUNDS):
            right = []
            for candidate, status in self.rig.check(self.candidates(turn == 0), deadline):
                self.note(f"checked {candidate.problem.name}")
                other_bits = status.startswith(OTHER_BITS) and candidate.config == launch.BY_LIBRARY
                if status == OK or other_bits:
                    right.append(candidate)
                else:
                    self.dropped.append((candidate, status))
            # A problem's shipped configuration comes first: it is what the others are compared with.
            right.sort(key=lambda c: (place[c.problem.key], c.config != c.problem.shipped()))
            for _, group in itertools.groupby(right, key=lambda c: c.problem.key):
                for candidate in group:
                    if time.monotonic() > deadline:
                        break
                    self._time(*candidate)
                self._settle(candidate.problem)
            if not right or time.monotonic() > deadline:
                break

    def _time(self, problem: Problem, config: Config) -> None:
        shipped = problem.shipped()
        if config != shipped and shipped not in self.times[problem.key]:
            return  # the shipped one is not right, which is reported
        try:
            found = {
                rows: self.rig.time(problem, rows, problem.shipped(rows) if config == shipped else config)
                for rows in problem.rows
            }
        except Exception as error:  # out of memory, a launch that can't be captured: this candidate's result
            self.dropped.append((Candidate(problem, config), f"{type(error).__name__}: {str(error)[:200]}"))
            return
        self.times[problem.key][config] = found
        self.note(f"timed {problem.name}: {gain(found, self.times[problem.key][shipped]):.2f} x shipped")

    def _settle(self, problem: Problem) -> None:
        """Times the best configuration and the shipped one again, in turns, and keeps the best one if it wins."""
        shipped, best = problem.shipped(), self.best(problem)
        if shipped not in self.times[problem.key] or self.settled.get(problem.key) == best:
            return
        if best != shipped and (entry := self._compared(problem, best, problem.shipped)):
            self.won[problem.key] = entry
        if launch.BY_LIBRARY in self.times[problem.key]:
            self.by_library.pop(problem.key, None)
            won = self.won.get(problem.key)
            rival = problem.shipped if won is None else lambda rows: won.config
            if entry := self._compared(problem, launch.BY_LIBRARY, rival):
                self.by_library[problem.key] = entry
        self.settled[problem.key] = best

    def _compared(self, problem: Problem, config: Config, other: Callable[[int], Config]) -> tuned.Entry | None:
        """Times a configuration and another, by the number of rows, in turns; what to keep if the first one wins."""
        new: dict[int, Samples] = {rows: [] for rows in problem.rows}
        old: dict[int, Samples] = {rows: [] for rows in problem.rows}
        for rows, _ in itertools.product(problem.rows, range(3)):
            old[rows] += self.rig.time(problem, rows, other(rows))
            new[rows] += self.rig.time(problem, rows, config)
        if not beats(new, old):
            return None
        seconds = [{str(rows): quantiles(each[rows]) for rows in problem.rows} for each in (new, old)]
        return tuned.Entry(problem.key, config, *seconds)

    def entries(self, before: Iterable[tuned.Entry] = ()) -> list[tuned.Entry]:
        """What was won, and of `before` what this search has not settled."""
        kept = [entry for entry in before if entry.key not in self.settled]
        return [*kept, *self.won.values(), *self.by_library.values()]


class Checker:
    """Holds one configuration after another to the policy, on one device. Stock's results are kept for the problem."""

    def __init__(self, work: Sequence[Problem], device: torch.device) -> None:
        self.work = {problem.name: problem for problem in work}
        self.device = device
        self._known: tuple[str, Any] = ("", None)

    @torch.no_grad()
    def check(self, name: str, config: Config) -> str:
        """OK, or what is wrong; what begins with OTHER_BITS is within the policy."""
        problem = self.work[name]
        try:
            arguments, stock, truth, shipped = self._stock(problem)
            launch.use({problem.key: config})
            found = listed(problem.call(*arguments))
            for i, each in enumerate(zip(found, stock, truth, strict=True)):
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
        self.command = [sys.executable, "-c", "from fastbert.cli.tune import serve; serve()"]
        self._buffers: tuple[tuple[str, int], list[Any]] = (("", 0), [])
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            self.shared_limit = int(getattr(found, "shared_memory_per_block_optin", 99 * 1024))
            self.l2_bytes = int(getattr(found, "L2_cache_size", 64 << 20))

    def check(self, candidates: Sequence[Candidate], deadline: float) -> Iterator[tuple[Candidate, str]]:
        """As Rig has it: a few processes, each with a share of the candidates."""
        # Candidates of one kernel go to one process, or two would compile the same.
        shares: dict[int, list[Candidate]] = {}
        homes: dict[Any, int] = {}
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
        self, share: list[Candidate], deadline: float, results: SimpleQueue[Any], stop: threading.Event
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
    def measure(self, call: Callable[..., Any], sets: Sequence[Any]) -> Samples:
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

    def sets(self, problem: Problem, rows: int) -> list[Any]:
        """Arguments of a problem, so many that the L2 cache holds none of them when its turn comes again."""
        if self._buffers[0] != (problem.name, rows):
            self._buffers = ("", 0), []  # first give back the old ones
            first = problem.arguments(rows, self.device)
            size = sum(a.numel() * a.itemsize for a in first if isinstance(a, Tensor))
            count = min(64, max(4, -(-3 * self.l2_bytes // size)))
            more = [problem.arguments(rows, self.device) for _ in range(count - 1)]
            self._buffers = (problem.name, rows), [first, *more]
        return self._buffers[1]


def sizes(arguments: argparse.Namespace) -> Sizes:
    """Of the model that is asked for. Raises UsageError."""
    if arguments.model is None:
        shape = SHAPES[arguments.size or "large"]
        return Sizes(shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"])
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
        wide = config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size  # DistilBERT's name
        return Sizes(config.hidden_size, wide, config.num_attention_heads)
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"--model {arguments.model}: {in_a_line(error)[:300]}") from error


class _Bar:
    """A line on a terminal that tells how far it is; nothing elsewhere."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds, self.count = time.monotonic(), 60 * minutes, 0
        self.shown = sys.stderr.isatty()

    def note(self, what: str) -> None:
        """One more candidate is done."""
        self.count += 1
        if self.shown:
            spent = time.monotonic() - self.start
            full = min(30, int(30 * spent / self.seconds))
            bar = f"[{'#' * full}{'.' * (30 - full)}] {spent:.0f} of {self.seconds:.0f} s, {self.count} steps: {what}"
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
            print(f"\r\x1b[K{bar[:width]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the line empty."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def short(config: Config) -> str:
    """A configuration in a few words, as "128x256x64 w8 s4"."""
    if config.variant == launch.LIBRARY:
        return config.variant
    tile = "x".join(str(n) for n in (config.block_m, config.block_n, config.block_k) if n)
    more = [config.variant] if config.variant else []
    more += [f"group {config.group_m}"] if config.group_m != 8 else []
    more += [f"{config.programs} programs"] if config.programs else []
    return " ".join([tile, f"w{config.num_warps}", f"s{config.num_stages}", *more])


def lines(search: Search) -> Iterator[str]:
    """The report: a line for every problem, then what was dropped."""
    for problem in search.work:
        shipped, entry = problem.shipped(), search.won.get(problem.key)
        times = search.times[problem.key]
        tried = f"{len(times)} timed"
        if shipped not in times:
            yield f"{problem.name:<26}{short(shipped):<26}no time: not reached, or not right"
        elif entry is None:
            why = "none is faster beyond the spread" if problem.key in search.settled else "not settled"
            yield f"{problem.name:<26}{short(shipped):<26}{why}; {tried}"
        else:
            pairs = [(entry.shipped_seconds[rows][1], entry.seconds[rows][1]) for rows in entry.seconds]
            each = ", ".join(f"{1e6 * old:.1f} -> {1e6 * new:.1f} us" for old, new in pairs)
            yield f"{problem.name:<26}{short(shipped):<26}{short(entry.config):<30}{each}; {tried}"
        if problem.key in search.by_library:
            found = search.by_library[problem.key]
            pairs = [(found.shipped_seconds[rows][1], found.seconds[rows][1]) for rows in found.seconds]
            each = ", ".join(f"{1e6 * old:.1f} -> {1e6 * new:.1f} us" for old, new in pairs)
            yield f"{'':<26}where results may depend on the batch: {short(found.config)}, {each}"
    for (problem, config), reason in search.dropped:
        yield f"dropped for {problem.name}: {short(config)}: {reason}"


def tune(
    work: Sequence[Problem], rig: Rig, file: Path, made_for: dict[str, str], minutes: float, library: bool = False
) -> tuple[Search, bool]:
    """Searches and writes what was found, also where it is interrupted; the search, and whether it was."""
    bar = _Bar(minutes)
    search, interrupted = Search(work, rig, bar.note, library), False
    try:
        before = tuned.read(file, made_for)
    except (FileNotFoundError, tuned.Unusable):
        before = []
    try:
        search.run(time.monotonic() + 60 * minutes)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
        if search.settled:
            tuned.write(file, made_for, search.entries(before))
    return search, interrupted


def main(arguments: argparse.Namespace) -> int:
    if not arguments.minutes > 0:
        raise UsageError(f"--minutes is {arguments.minutes}; expected more than 0")
    check_file("--json", arguments.json)
    device = default_device(None)
    if device.type != "cuda":
        raise UsageError("there is no GPU here, and on a CPU nothing is launched that could be tuned")
    shape, dtype = sizes(arguments), getattr(torch, arguments.dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.precision and (reason := fp8_is_unsupported(device)) is not None:
        raise UsageError(f"--precision fp8: {reason}")
    arch, gpu = launch.architecture(device), torch.cuda.get_device_name(device)
    made_for = tuned.made_for(gpu, arch)
    file = tuned.path(gpu, arch)
    # Each process has a context of its own on the device, and results in float64.
    room = torch.cuda.mem_get_info(device)[0] // JOB_BYTES
    what = arguments.train, arguments.precision
    rig = Gpu(device, shape, dtype, *what, jobs=max(1, min(8, (os.cpu_count() or 2) // 2, room)))
    work = problems(shape, dtype, arch, *what, launch.multiprocessors(device))
    search, interrupted = tune(work, rig, file, made_for, arguments.minutes, arguments.library)
    print(f"{gpu}, {arguments.dtype}, hidden {shape.hidden}: {len(search.won)} of {len(work)} faster")
    for line in lines(search):
        print(line)
    if search.settled:
        print(f"written to {file}")
    if arguments.json is not None:
        write_text("--json", arguments.json, json.dumps(report(search, made_for), indent=1) + "\n")
    if interrupted:
        raise KeyboardInterrupt
    return 0


def report(search: Search, made_for: dict[str, str]) -> dict[str, Any]:
    """Everything that was tried, as plain data."""
    tried = [
        {"problem": problem.name, "config": dataclasses.asdict(config), "shipped": config == problem.shipped()}
        | {
            "kept": any(
                problem.key in to and to[problem.key].config == config for to in (search.won, search.by_library)
            )
        }
        | {"seconds": {str(rows): quantiles(samples) for rows, samples in times.items()}}
        for problem in search.work
        for config, times in search.times[problem.key].items()
    ]
    dropped = [
        {"problem": problem.name, "config": dataclasses.asdict(config), "reason": reason}
        for (problem, config), reason in search.dropped
    ]
    return {"made_for": made_for, "tried": tried, "dropped": dropped}
