"""What a run measured and what it compiled, as two files that can be carried away and taken up again.

    python -m benchmarks.archive pack benchmarks/results FOLDER      # FOLDER/measured.tar.gz, FOLDER/caches.tar.gz
    python -m benchmarks.archive restore FOLDER benchmarks/results
    python -m benchmarks.archive commit                              # notes the commit for a copy without .git

A machine that is lent gives back a few files of a few megabytes. `measured.tar.gz` holds progress, gates, records and
logs; `caches.tar.gz` what is in cache/: users' caches and what Triton compiled, of that the binaries, which suffice.
Each stays under LIMIT: what is worth least is left out, a log's beginning first, and named in the archive, in LEFT_OUT.
A file is replaced at once, so that at any moment there is a whole one. Restored, nothing that is there is replaced.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

MEASURED, CACHES = "measured.tar.gz", "caches.tar.gz"
LIMIT = 15 * 2**20
"""Bytes of an archive, at most: below the 16 MiB that machines give back."""
LEFT_OUT = "LEFT_OUT.txt"
LOG_BYTES = 2**20
"""Of a log, its end."""
CACHE = "cache"
CARRIED = Path(__file__).resolve().parent.parent / "build" / "gpu-cache"
"""Where archives lie that were taken along."""
GROUP = "__grp__"
"""How Triton's names of the files begin that tell, by absolute paths, where a kernel's other files are."""
# What a compiled kernel is loaded from is its binary and its JSON; these are for who reads them.
READ_BY_PEOPLE = frozenset({".ttir", ".ttgir", ".llir", ".ptx", ".source", ".amdgcn", ".sass"})


def pack(output: Path, folder: Path, names: Iterable[str] = (MEASURED, CACHES), limit: int = LIMIT) -> list[str]:
    """Packs `output`, a folder of benchmarks/suite.py, into archives in `folder`; returns what it left out, by line.

    Files that others write, replace or remove meanwhile are taken as they are found. An archive that can't be written,
    where the disk is full, say, is left as it was, and is one of those lines: what measures goes on.
    """
    left_out: list[str] = []
    for name in names:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = list((_measured if name == MEASURED else _caches)(output))
            left_out += _write(folder / name, output, found, limit)
        except OSError as error:
            left_out.append(f"{name}, all of it: {error}")
    return left_out


def restore(folder: Path, output: Path) -> list[str]:
    """Unpacks what archives there are in `folder` into `output`, but for files that are there; returns their names.

    What Triton compiled is told where it is now. Of an archive that is cut off or damaged comes back what can be read,
    and stderr says so: what it lacks is measured again.
    """
    found = []
    for name in (MEASURED, CACHES):
        if not (folder / name).is_file():
            continue
        try:
            with tarfile.open(folder / name, "r:gz") as archive:
                for member in archive:
                    target = output / member.name
                    if member.name.endswith(LEFT_OUT) or not member.isfile() or target.exists():
                        continue
                    if not target.resolve().is_relative_to(output.resolve()):
                        continue
                    read = archive.extractfile(member)
                    assert read is not None
                    _replace(target, read.read())
                    found.append(member.name)
                assert archive.fileobj is not None
                archive.fileobj.read()  # to the checksum
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            print(f"{folder / name} can't be read to its end: {error}", file=sys.stderr)
    rebase(output / CACHE / "triton")
    return found


def rebase(cache: Path) -> None:
    """Makes a Triton cache that was moved to `cache` tell its files by where they are."""
    for group in cache.glob(f"*/{GROUP}*.json"):
        try:
            told = json.loads(group.read_text(encoding="utf-8"))
            paths = {name: str(group.parent / name) for name in told["child_paths"]}
        except (ValueError, KeyError, TypeError):
            continue  # Triton compiles anew where it can't read it
        if paths != told["child_paths"]:
            _replace(group, json.dumps({**told, "child_paths": paths}).encode())


def _measured(output: Path) -> Iterator[Path]:
    """What is worth most first: progress and gates, records, then logs, the shortest first."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.relative_to(output).parts[0] != CACHE and path.suffix != ".partial"]
    logs = [path for path in files if path.suffix == ".log"]
    first = [path for path in files if path.parent == output and path not in logs]
    yield from first
    yield from (path for path in files if path.parent != output and path not in logs)
    yield from sorted(logs, key=lambda path: path.stat().st_size)


def _caches(output: Path) -> Iterator[Path]:
    """Users' caches first, which are small; then what Triton compiled, what took longest last used first."""
    files = [path for path in (output / CACHE).rglob("*") if path.is_file() and path.suffix not in READ_BY_PEOPLE]
    triton = output / CACHE / "triton"
    yield from sorted(path for path in files if not path.is_relative_to(triton))
    kernels: dict[Path, list[Path]] = {}
    for path in files:
        if path.is_relative_to(triton) and not any(part.startswith("tmp.") for part in path.parts):
            kernels.setdefault(path.parent, []).append(path)
    # A kernel's files lie in one folder, of no use without each other: the newest kernels first.
    for folder in sorted(kernels, key=_changed, reverse=True):
        yield from sorted(kernels[folder])


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write(path: Path, output: Path, files: Iterable[Path], limit: int) -> list[str]:
    left_out: list[str] = []
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for file in files:
            name = file.relative_to(output).as_posix()
            try:
                content = file.read_bytes()
            except FileNotFoundError:
                continue
            if file.suffix == ".log" and len(content) > LOG_BYTES:
                left_out.append(f"{name}: its first {len(content) - LOG_BYTES:,} bytes")
                content = content[-LOG_BYTES:]
            # Alone it takes no less than among the others. What was written and not yet compressed is within 1 MiB.
            zipped.flush()
            if packed.tell() + len(zlib.compress(content, 6)) + 1024 > limit - limit // 16:
                left_out.append(f"{name}: {len(content):,} bytes")
                continue
            _add(archive, name, content)
        if left_out:
            _add(archive, f"{path.name}.{LEFT_OUT}", "\n".join(left_out)[: limit // 32].encode())
    _replace(path, packed.getvalue())
    return left_out


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "restore", "commit"))
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("target", type=Path, nargs="?")
    given = parser.parse_args(argv)
    if given.what == "commit":
        from fastbert.measure.machine import NOTED, note_commit

        print(f"{note_commit()} noted in {NOTED}")
    elif given.source is None or given.target is None:
        parser.error(f"{given.what} takes two folders")
    elif given.what == "restore":
        print(f"{len(restore(given.source, given.target)):,} files restored")
    else:
        for line in pack(given.source, given.target):
            print(f"left out: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
