"""`--quick` runs the tests of what has changed, and nothing that takes long to start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import quick

BEYOND = {  # of what is changed, and of EVER: a test that runs, and one that does not
    "kernels/linear.py": ("kernels/test_linear.py", "kernels/test_attention.py"),
    "kernels/launch.py": ("kernels/test_attention.py", "fastbert/test_promise.py"),
    "kernels/dropout.py": ("kernels/test_layer_norm.py", "kernels/test_padding.py"),
    "fastbert/fuse.py": ("fastbert/test_fuse.py", "kernels/test_linear.py"),
    "fastbert/models/electra.py": ("fastbert/test_families.py", "fastbert/test_fuse.py"),
    "tests/models.py": ("fastbert/test_readers.py", "kernels/test_linear.py"),
    "tests/kernels/conftest.py": ("kernels/test_linear.py", "fastbert/test_fuse.py"),
    "README.md": ("test_docs.py", "fastbert/test_fuse.py"),
}


@pytest.mark.parametrize("change", BEYOND)
def test_what_a_change_touches(change: str) -> None:
    changes = {quick.ROOT / change}
    assert (quick.ROOT / change).is_file()
    runs, not_run = (quick.touched(quick.ROOT / "tests" / name, changes) for name in BEYOND[change])
    assert (runs, not_run) == (True, False)
    assert all(quick.touched(quick.ROOT / name, changes) for name in quick.EVER)


def test_what_has_changed(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    assert quick.changed(tmp_path) == set()
    git("init", "-b", "main")
    for name in ("same", "committed", "edited"):
        (tmp_path / name).write_text("before")
    git("add", ".")
    git("commit", "-m", "first")
    assert quick.changed(tmp_path) == set()
    git("switch", "-c", "branch")
    (tmp_path / "committed").write_text("after")
    git("commit", "-am", "second")
    (tmp_path / "edited").write_text("after")
    (tmp_path / "new").touch()
    assert quick.changed(tmp_path) == {tmp_path / name for name in ("committed", "edited", "new")}


def test_few_of_many_parameters() -> None:
    def item(**params: Any) -> Any:
        return SimpleNamespace(callspec=SimpleNamespace(params=params))

    many = [item(dtype=dtype, n=n) for n in range(9) for dtype in (torch.float16, torch.float32)]
    assert [each.callspec.params for each in quick.few(many)] == [{"dtype": torch.float32, "n": n} for n in (0, 4, 8)]
    for some in ([SimpleNamespace()], [item(n=1), item(n=2)], [item(dtype=torch.float16)]):
        assert quick.few(some) == some


def test_nothing_cold_is_begun() -> None:
    with quick.nothing_cold():
        subprocess.run(["true"], check=True)
        for begin in (
            lambda: subprocess.run([sys.executable, "-c", ""], check=True),
            lambda: torch.compile(torch.nn.Linear(1, 1)),
            lambda: torch.nn.Linear(1, 1).compile(),
            lambda: torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1),)),
        ):
            with pytest.raises(pytest.skip.Exception):
                begin()
    subprocess.run([sys.executable, "-c", ""], check=True)
