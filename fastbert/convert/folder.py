"""A folder that is there whole, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..usage import UsageError, refused


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to be filled, beside `output`, which it becomes at the end; it goes where what fills it fails.

    Of a process that was killed `.NAME.partial` stays; the next for the same output takes it up, and empties it.

    Raises:
        UsageError: `output` is a file, or holds anything; it can't be written; another process is at it.
    """
    output = Path(os.path.realpath(output))
    partial = output.with_name(f".{output.name}.partial")
    with refused(f"{output}", "output", (OSError, ValueError), "a folder that can be made"):
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            held = "holds files" if output.is_dir() else "is a file"
            raise UsageError(f"{output}: {held}; expected a new folder, or an empty one", "output")
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _hold(partial)
    try:
        with refused(f"{output}", "output", OSError):
            _empty(partial)
            yield partial
            _sync(partial)
            os.rename(partial, output)
            _sync_entry(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _hold(partial: Path) -> int:
    """The folder, made where it is not, and locked for as long as this process lives."""
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its holder has ended meanwhile
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(partial)):
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(f"{partial}: another process writes there; expected another folder", "output") from error
        except FileNotFoundError:
            pass  # as above
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    """So that a machine that loses power finds what the name says it finds."""
    for entry in folder.iterdir():
        _sync_entry(entry)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
