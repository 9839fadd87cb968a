"""Launch configurations for a GPU and a model, found by trying, kept in the user's cache.

For every key of the tables of kernels/launch.py that the model asks for, configurations near the best one so far are
tried: first in processes of their own, where they are compiled and their results held to the numerical policy, so that
one that hangs or crashes takes nothing along; those that are right are timed in this process, one by one. Time is that
of the device: launches captured into a CUDA graph, over buffers that the L2 cache can't hold. One that is faster than
the shipped configuration beyond the spread of both is kept. Where a table is by the number of rows, only one that gives
the same bits as the shipped one is, so that a sequence's result still doesn't depend on its batch. With `library`
PyTorch's GEMM is tried, too: where it beats the best tile it is kept beside that, for those who give this up
(`fastbert.set_batch_invariant`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .. import tuned
from ..kernels import launch
from ..kernels.launch import Config
from ..measure.machine import quantiles
from .problems import Problem

ROUNDS = 4
"""In each, configurations near the best one of the last are tried."""
MAX_HELD = 160
"""float32 numbers a thread may hold, of its 255 registers."""
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
    choose, free = launch.OPERATIONS[operation].choose, launch.OPERATIONS[operation].free
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
        self.times: dict[tuple[object, ...], dict[Config, dict[int, Samples]]] = {problem.key: {} for problem in work}
        self.dropped: list[tuple[Candidate, str]] = []
        self.won: dict[tuple[object, ...], tuned.Entry] = {}
        self.by_library: dict[tuple[object, ...], tuned.Entry] = {}
        """Where PyTorch's GEMM beats what is best."""
        self.settled: dict[tuple[object, ...], Config] = {}
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
        found: dict[tuple[object, Config], Candidate] = {}
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
            yield f"{problem.name:<26}{short(shipped):<40}no time: not reached, or not right"
        elif entry is None:
            why = "none is faster beyond the spread" if problem.key in search.settled else "not settled"
            yield f"{problem.name:<26}{short(shipped):<40}{why}; {tried}"
        else:
            pairs = [(entry.shipped_seconds[rows][1], entry.seconds[rows][1]) for rows in entry.seconds]
            each = ", ".join(f"{1e6 * old:.1f} -> {1e6 * new:.1f} us" for old, new in pairs)
            yield f"{problem.name:<26}{short(shipped):<40}{short(entry.config):<40}{each}; {tried}"
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


def report(search: Search, made_for: dict[str, str]) -> dict[str, object]:
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
