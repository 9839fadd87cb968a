"""`pytest --quick`: the tests of what a change touches, in a minute or two; `make test` is what proves a change.

Changed is what differs from the commit that this branch and `main` have in common, new files too. A test file is run
where it has changed, where it imports a changed module itself, or where it goes by its name: test_fuse.py by
fastbert/fuse.py. A changed kernel reaches the kernels that import it, and their tests. Those of EVER are run in any
case, whole: they catch most of the faults of `make mutants`.

Of other tests with many parameters a few are run: of dtypes float32 alone, and of what remains FEW, spread over all. A
test ends, as skipped, where it would start another Python or compile a model: `nothing_cold`.
"""

from __future__ import annotations

import multiprocessing.process
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gates import ROOT, imports

EVER = {
    *("tests/fastbert/test_life.py", "tests/fastbert/test_packing.py"),
    *("tests/kernels/test_properties.py", "tests/test_house.py"),
}
FEW = 3


def changed(root: Path = ROOT) -> set[Path]:
    """The files of the tree at `root` that differ from the commit it has in common with main; without git none."""

    def git(*command: str) -> list[str]:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.splitlines() if done.returncode == 0 else []

    (base,) = git("merge-base", "HEAD", "origin/main") or git("merge-base", "HEAD", "main") or ["HEAD"]
    names = git("diff", "--name-only", "--relative", base) + git("ls-files", "--others", "--exclude-standard")
    return {(root / name).resolve() for name in names}


def touched(file: Path, changes: set[Path]) -> bool:
    """Whether a test file is run for these changes."""
    seen: set[Path] = set()
    wanted = [file, *(up / "conftest.py" for up in file.parents if up.is_relative_to(ROOT / "tests"))]
    while wanted:
        path = wanted.pop()
        if path not in seen and path.is_file():
            seen.add(path)
            # Through kernels and what tests share, and no further than what those name of fastbert.
            if path.parent == ROOT / "kernels" or path.is_relative_to(ROOT / "tests"):
                wanted += imports(path)
    names = {f"test_{path.stem}.py" for path in changes if path.suffix == ".py"}
    names |= {"test_docs.py"} if any(path.suffix == ".md" for path in changes) else set()
    return bool(seen & changes) or file.name in names or file.relative_to(ROOT).as_posix() in EVER


def few(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of the parameters of one test, FEW that are far from each other."""
    dtypes = [item.callspec.params.get("dtype") if hasattr(item, "callspec") else None for item in items]
    if torch.float32 in dtypes:
        items = [item for item, dtype in zip(items, dtypes, strict=True) if dtype == torch.float32]
    last = len(items) - 1
    return [items[i] for i in sorted({round(last * i / (FEW - 1)) for i in range(FEW)})]


def select(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of `items` that are run."""
    changes = changed()
    files = {path for path in {item.path for item in items} if touched(path, changes)}
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path in files:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    ever = {name for name in tests if name.partition("::")[0] in EVER}
    return [item for name, same in tests.items() for item in (same if name in ever else few(same))]


@contextmanager
def nothing_cold() -> Iterator[None]:
    """Within it, who starts a Python or a compilation is skipped."""

    def skip(*_: Any, **__: Any) -> Any:
        pytest.skip("starts a process or compiles: not with --quick")

    begin = subprocess.Popen.__init__

    def popen(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
        if sys.executable in command:
            skip()
        begin(self, command, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", popen)
        patch.setattr(multiprocessing.process.BaseProcess, "start", skip)
        for owner, name in ((torch, "compile"), (torch.nn.Module, "compile"), (torch.export, "export")):
            patch.setattr(owner, name, skip)
        yield
