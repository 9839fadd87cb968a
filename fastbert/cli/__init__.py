"""The command line, `fastbert COMMAND`: arguments are in `__main__`, commands in modules of their names."""

from __future__ import annotations

import os
from pathlib import Path


class UsageError(Exception):
    """What the user asked for can't be done; the message, one line, says why."""


def in_a_line(error: Exception) -> str:
    """What an error says, in one line, without the number that the system gives it."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split()) or type(error).__name__


def is_special(file: Path) -> bool:
    """Whether it is a pipe or a device, as /dev/null: a file must not replace it, and it may be read only once."""
    return file.exists() and not file.is_file() and not file.is_dir()


def check_file(option: str, name: str | None) -> None:
    """Raises UsageError where the file an option names can't be written: now, not after the work."""
    if name is None or is_special(Path(name)):
        return
    file = Path(os.path.realpath(name))  # of a link, what it leads to
    try:
        for tried in (file, _partial(file)):
            existed = tried.exists()
            tried.open("ab").close()
            if not existed:
                tried.unlink()
    except OSError as error:
        raise UsageError(f"{option} {name}: {in_a_line(error)}; expected a file that can be written") from error


def _partial(file: Path) -> Path:
    """What is written in its place until it is whole."""
    return file.with_name(file.name + ".partial")


def replace_text(path: Path, text: str) -> None:
    """Replaces a file at once: who reads it, interrupts or fills the disk finds the old one or the new one, whole."""
    if is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))  # a link stays one
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(option: str, name: str, text: str) -> None:
    """Writes the file an option names; raises UsageError where that fails."""
    try:
        replace_text(Path(name), text)
    except OSError as error:
        raise UsageError(f"{option} {name}: {in_a_line(error)}") from error
