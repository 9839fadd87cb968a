"""Gates: what has to be right before a row is timed. A gate is an operation in a dtype: "linear.bfloat16".

Whoever checks something notes it as it goes: tests (tests/gates.py) and benchmarks/first.py. The file, gates.jsonl,
has a line of JSON a note, appended whole; a line cut off by a kill is passed over. Of a check the last line counts:

    {"check": "tests/kernels/test_linear.py::test_kernel[...]",   # its name, unique
     "file": "tests/kernels/test_linear.py",   # what checks: its sources are those of this file and of all it imports
     "gates": ["linear.bfloat16"],   # what it covers
     "suite": "tests",               # which checks are planned together
     "outcome": "planned",           # then "passed", "failed" or "skipped"
     "key": "0123456789abcdef",      # of the sources and of the place (GPU, torch, triton) the outcome holds for
     "seconds": 1.5, "date": "..."}

A gate is **red** where a check of it failed, of whatever suite; **green** where none did and all that some suite
planned of it passed; else **not run**. A line whose key is no longer that of its file says nothing: sources changed, or
the GPU. Gates named "linear.any" are of tests in no dtype of their own: red, they close the operation in every dtype.

What passed by its key need not run again: `passed`. So the same file is what tests go on from.

    log = Log(output / "gates.jsonl", "first", Path(__file__))
    log.plan({"linear, 128 rows": ["linear.bfloat16"], ...})
    log.note("linear, 128 rows", "passed", seconds=0.2)
    verdicts(output / "gates.jsonl")   # {"linear.bfloat16": "green", ...}

What a row needs and how its record tells is in fastbert/measure/gates.py, which reads verdicts from the environment's
FASTBERT_GATES as JSON: `os.environ["FASTBERT_GATES"] = json.dumps(verdicts(file))`.
"""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GREEN, RED, NOT_RUN = "green", "red", "not run"
PASSED, FAILED, SKIPPED, PLANNED = "passed", "failed", "skipped", "planned"

# They run checks and note them, and are no part of what is checked.
MACHINERY = frozenset(
    {*(f"benchmarks/{name}.py" for name in ("gates", "archive", "processes", "suite")), "tests/gates.py"}
)


class Log:
    """Notes what one suite checks, into a file that others append to at the same time."""

    def __init__(self, path: Path, suite: str, file: Path | None = None) -> None:
        self.path = path
        self.suite = suite
        self.file = file
        """What checks, where all checks are of one file."""
        self._gates: dict[str, Sequence[str]] = {}

    def plan(self, checks: Mapping[str, Sequence[str]]) -> None:
        """Says what will be checked, by name, and the gates of each; before the first of them runs."""
        self._gates |= checks
        known = read(self.path)
        found = []
        for check, gates in checks.items():
            line = self._line(check, gates, PLANNED)
            before = known.get(check, {})
            if before.get("key") != line["key"] or before.get("gates") != line["gates"]:
                found.append(line)
        append(self.path, found)

    def note(self, check: str, outcome: str, *, gates: Sequence[str] | None = None, seconds: float = 0.0) -> None:
        """Says how a check ended; `gates` where it was planned by another process."""
        gates = self._gates[check] if gates is None else gates
        append(self.path, [{**self._line(check, gates, outcome), "seconds": round(seconds, 3)}])

    def _line(self, check: str, gates: Sequence[str], outcome: str) -> dict[str, Any]:
        file = self.file or ROOT / check.partition("::")[0]
        return {
            "check": check,
            "file": file.resolve().relative_to(ROOT).as_posix(),
            "gates": list(gates),
            "suite": self.suite,
            "outcome": outcome,
            "key": key(file),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines at once, so that those of several processes don't mix; each begins on a line of its own."""
    text = "".join(f"\n{json.dumps(line)}\n" for line in lines)
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last whole line of each check; of lines that are cut off nothing."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
                found[line["check"]] = line
            except (ValueError, TypeError, KeyError):  # cut off by a kill, or the blank line before a line
                continue
    return found


def current(path: Path) -> dict[str, dict[str, Any]]:
    """As `read`, of lines that hold for the sources and the place as they are."""
    keys: dict[str, str] = {}
    found = {}
    for check, line in read(path).items():
        file = line["file"]
        if file not in keys:
            keys[file] = key(ROOT / file) if (ROOT / file).is_file() else ""
        if line["key"] == keys[file]:
            found[check] = line
    return found


def verdicts(path: Path) -> dict[str, str]:
    """Of every gate that a check covers: GREEN, RED or NOT_RUN."""
    outcomes: dict[str, dict[str, set[str]]] = {}
    for line in current(path).values():
        for gate in line["gates"]:
            outcomes.setdefault(gate, {}).setdefault(line["suite"], set()).add(line["outcome"])
    found = {}
    for gate, suites in sorted(outcomes.items()):
        if any(FAILED in each for each in suites.values()):
            found[gate] = RED
        elif any(PASSED in each and PLANNED not in each for each in suites.values()):
            found[gate] = GREEN
        else:
            found[gate] = NOT_RUN
    return found


def outcomes(path: Path, outcome: str) -> set[str]:
    """The checks whose last outcome, by these sources in this place, is that one."""
    return {check for check, line in current(path).items() if line["outcome"] == outcome}


@functools.cache
def place() -> str:
    """What an outcome hangs on beside the sources: the device and what compiles for it."""
    import torch

    try:
        import triton
    except ImportError:
        version = "none"
    else:
        version = triton.__version__
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return f"{device}, torch {torch.__version__}, triton {version}"


def key(file: Path) -> str:
    """Of what the outcome of a check in `file` holds for: its sources and the place."""
    return _key(file, place())


@functools.cache
def _key(file: Path, place: str) -> str:
    found = hashlib.sha256(place.encode())
    for path in sorted(sources(file)):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def sources(file: Path) -> set[Path]:
    """`file`, the conftest.py files above it, and what any of them imports of this repository, whatever its depth.

    Packages' __init__.py count only where something of theirs is imported, not for being on the way to a module:
    `from fastbert.kernels import linear` takes in kernels/linear.py, not what `import fastbert` runs.
    """
    file = file.resolve()
    wanted = [file, *(up / "conftest.py" for up in file.parents if up.is_relative_to(ROOT))]
    found: set[Path] = set()
    while wanted:
        path = wanted.pop()
        if path not in found and path.is_file() and path.relative_to(ROOT).as_posix() not in MACHINERY:
            found.add(path)
            wanted += imports(path)
    return found


@functools.cache
def imports(path: Path) -> tuple[Path, ...]:
    """The files of this repository that a file imports itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ("fastbert", *parts[:-1]) if parts[0] == "kernels" else parts[:-1]  # one level up from it, by a symlink
    return tuple(dict.fromkeys(_targets(ast.parse(path.read_bytes()), package)))


def _targets(tree: ast.AST, package: tuple[str, ...]) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*package[: len(package) + 1 - node.level], node.module or "")) if node.level else node.module
            )
            for alias in node.names:
                # A module of that name, or else a name in the package.
                yield from _module(f"{base}.{alias.name}".replace("..", ".")) or _module((base or "").strip("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield from _module(str(name.value))
            elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                # Whatever there may be below: importlib.import_module(f"fastbert.kernels.{name}").
                folder = _file(str(name.values[0].value).strip("."))
                yield from sorted(path.resolve() for path in folder.glob("*.py"))


def _file(name: str) -> Path:
    return ROOT.joinpath(*name.split("."))


def _module(name: str) -> list[Path]:
    """The file of a module of this repository; none of another's."""
    path = _file(name)
    return [file.resolve() for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()][:1]
