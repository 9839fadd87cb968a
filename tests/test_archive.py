"""Archives of a run: what is in them, what is left out and said to be, what comes back of them, at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import archive

ROOT = Path(__file__).resolve().parent.parent


def fill(output: Path) -> dict[str, bytes]:
    """What a run leaves behind."""
    group = {"child_paths": {"k.cubin": f"{output}/cache/triton/KEY/k.cubin", "k.json": f"{output}/x/KEY/k.json"}}
    found = {
        "progress.json": b'{"steps": {}}',
        "gates.jsonl": b'\n{"check": "a"}\n',
        "nvidia-h100/2026-11-27T000000-abc.json": b"[]",
        "profile-squad.json": b"{}",
        "logs/first.log": b"said\n",
        "cache/shipped/fastbert/tuned.json": b"{}",
        "cache/triton/KEY/k.cubin": bytes(range(256)),
        "cache/triton/KEY/k.json": b"{}",
        "cache/triton/KEY/__grp__k.json": json.dumps(group).encode(),
        "cache/triton/KEY/k.ptx": b"to be read",
        "cache/triton/KEY/tmp.pid_1_x/k.cubin": b"half writ",
    }
    for name, content in found.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    return found


def test_two_archives_hold_all_of_a_run(tmp_path: Path) -> None:
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    found = fill(here)
    assert archive.pack(here, folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["caches.tar.gz", "measured.tar.gz"]
    archive.restore(folder, there)
    back = {path.relative_to(there).as_posix(): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    del found["cache/triton/KEY/k.ptx"], found["cache/triton/KEY/tmp.pid_1_x/k.cubin"]
    moved = "cache/triton/KEY/__grp__k.json"
    assert {name: content for name, content in back.items() if name != moved} == {
        name: content for name, content in found.items() if name != moved
    }
    # Triton goes by absolute paths, and has another place now.
    paths = json.loads(back[moved])["child_paths"]
    assert paths == {name: str(there / "cache/triton/KEY" / name) for name in ("k.cubin", "k.json")}


def test_what_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "here")
    archive.pack(tmp_path / "here", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "progress.json").write_text("newer")
    assert "progress.json" not in archive.restore(tmp_path / "out", tmp_path / "there")
    assert (tmp_path / "there" / "progress.json").read_text() == "newer"
    assert archive.restore(tmp_path / "nothing", tmp_path / "there") == []


def test_an_archive_has_a_limit_and_says_what_it_left_out(tmp_path: Path) -> None:
    here, folder = tmp_path / "here", tmp_path / "out"
    fill(here)
    noise = random.Random(0)
    for i in range(20):
        kernel = here / "cache" / "triton" / f"K{i:02}" / "k.cubin"
        kernel.parent.mkdir()
        kernel.write_bytes(noise.randbytes(20_000))
        os.utime(kernel.parent, (i + 1, i + 1))
    (here / "logs" / "long.log").write_bytes(noise.randbytes(archive.LOG_BYTES) + b"the end")
    limit = 200_000
    left_out = archive.pack(here, folder, limit=limit)
    assert all((folder / name).stat().st_size < limit for name in (archive.MEASURED, archive.CACHES))
    with tarfile.open(folder / archive.CACHES) as packed:
        names = packed.getnames()
        said = packed.extractfile("caches.tar.gz.LEFT_OUT.txt")
        assert said is not None
        assert "cache/triton/K00/k.cubin: 20,000 bytes" in said.read().decode().splitlines()
    assert "cache/shipped/fastbert/tuned.json" in names
    kept = [name for name in names if name.endswith("k.cubin")]
    assert "cache/triton/K19/k.cubin" in kept  # the newest
    assert len(kept) < 12
    with tarfile.open(folder / archive.MEASURED) as packed:
        assert {"progress.json", "gates.jsonl", "profile-squad.json", "logs/first.log"} <= set(packed.getnames())
        assert "logs/long.log" not in packed.getnames()
    assert any(line.startswith("logs/long.log: its first 7 bytes") for line in left_out)


@pytest.mark.parametrize("seconds", [0.3, 0.6])
def test_killed_while_packing_the_last_archive_is_whole(seconds: float, tmp_path: Path) -> None:
    here, folder = tmp_path / "here", tmp_path / "out"
    fill(here)
    (here / "big").write_bytes(random.Random(0).randbytes(4_000_000))
    code = (
        "import sys, pathlib; from benchmarks.archive import pack\nwhile True: pack(*map(pathlib.Path, sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(here), str(folder)], env=environment)
    while not (folder / archive.CACHES).exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "big" in archive.restore(folder, tmp_path / "there")


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs))

source = ASTSource(double_kernel, signature={"x_ptr": "*fp32", "BLOCK": "constexpr"}, constexprs={(1,): 128})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(len(compiled.asm["cubin"]), compiled.metadata.name, compiled.metadata.num_warps)
"""


def test_what_was_compiled_is_loaded_elsewhere_and_not_compiled_again(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "compile.py").write_text(COMPILE)

    def compiled(output: Path) -> tuple[str, set[str]]:
        cache = output / "cache" / "triton"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "compile.py")],
            env={**environment, "TRITON_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, {path.suffix for path in cache.rglob("double_kernel.*")}

    said, files = compiled(tmp_path / "here")
    assert {".ptx", ".cubin", ".json"} <= files
    archive.pack(tmp_path / "here", tmp_path / "out")
    archive.restore(tmp_path / "out", tmp_path / "there")
    # What only people read was left behind, and would be there if it had been compiled.
    (tmp_path / "here").rename(tmp_path / "gone")
    assert compiled(tmp_path / "there") == (said, {".cubin", ".json"})


def test_of_a_damaged_archive_comes_back_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, folder = tmp_path / "here", tmp_path / "out"
    fill(here)
    (here / "nvidia-h100" / "noise.json").write_bytes(random.Random(0).randbytes(100_000))
    archive.pack(here, folder)
    whole = (folder / archive.MEASURED).read_bytes()
    flipped = bytes([whole[60_000] ^ 255])
    for i, damaged in enumerate((whole[:60_000], whole[:60_000] + flipped + whole[60_001:], b"junk", b"")):
        (folder / archive.MEASURED).write_bytes(damaged)
        back = archive.restore(folder, tmp_path / str(i))
        assert ("gates.jsonl" in back) == (i < 2)
        assert "cache/triton/KEY/k.cubin" in back  # of the other archive
        assert "measured.tar.gz can't be read to its end" in capsys.readouterr().err
        assert not list((tmp_path / str(i)).rglob("*.partial"))


def test_an_archive_that_cant_be_written_is_told_and_stays_as_it_was(tmp_path: Path) -> None:
    here, folder = tmp_path / "here", tmp_path / "out"
    fill(here)
    archive.pack(here, folder)
    before = (folder / archive.CACHES).read_bytes()
    code = (
        "import pathlib, resource, signal, sys; from benchmarks.archive import pack\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "print(*pack(*map(pathlib.Path, sys.argv[1:])), sep='\\n')"
    )
    for place in (folder, here / "progress.json"):  # full; no folder
        words = [sys.executable, "-c", code, str(here), str(place)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        assert "caches.tar.gz, all of it: " in done.stdout
    assert (folder / archive.CACHES).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["caches.tar.gz", "measured.tar.gz"]
