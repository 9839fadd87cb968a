"""What commands and the libraries under them share: the error of bad arguments, and files written whole or not."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


class UsageError(Exception):
    """What the user asked for can't be done.

    Args:
        told: one line: what is wrong, and what was expected.
        argument: the name of the argument at fault, which goes before it: the command line puts its option there.
    """

    def __init__(self, told: str, argument: str = "") -> None:
        super().__init__(told, argument)
        self.told, self.argument = told, argument

    def __str__(self) -> str:
        return f"{self.argument} {self.told}" if self.argument else self.told


def in_a_line(error: Exception) -> str:
    """What an error says, in one line, without the number that the system gives it."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split()) or type(error).__name__


@contextlib.contextmanager
def refused(
    what: str, argument: str = "", kinds: type[Exception] | tuple[type[Exception], ...] = Exception, expected: str = ""
) -> Iterator[None]:
    """Within it, an error of `kinds` becomes a UsageError: `what`, what it says, and what was expected.

    By default all errors do: whatever reading files and asking the hub raises, to a user it is one thing.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        told = f"{what}: {in_a_line(error)}" if what else in_a_line(error)
        raise UsageError(f"{told}; expected {expected}" if expected else told, argument) from error


def is_special(file: Path) -> bool:
    """Whether it is a pipe or a device, as /dev/null: a file must not replace it, and it may be read only once."""
    return file.exists() and not file.is_file() and not file.is_dir()


def check_file(option: str, name: str | None) -> None:
    """Raises UsageError where the file an option names can't be written: now, not after the work."""
    if name is None:
        return
    with refused(f"{option} {name}", kinds=(OSError, ValueError), expected="a file that can be written"):
        if is_special(Path(name)):
            return
        file = Path(os.path.realpath(name))  # of a link, what it leads to
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()


# In a folder one may not write to; of a file that is a mount point, or somebody else's.
_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EINVAL)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file at once: who reads it, interrupts or fills the disk finds the old one or the new one, whole.

    Its owner and its mode stay. What can be written but not replaced is written in place.
    """
    if not is_special(path):
        path = Path(os.path.realpath(path))  # a link stays one
        try:
            _replace(path, text)
            return
        except OSError as error:
            if error.errno not in _IN_PLACE:
                raise
    path.write_text(text, encoding="utf-8")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")  # no two processes' alike
    with partial.open("x", encoding="utf-8") as file:
        try:
            if path.exists():
                now, own = path.stat(), partial.stat()
                if (now.st_uid, now.st_gid) != (own.st_uid, own.st_gid):
                    os.chown(partial, now.st_uid, now.st_gid)
                partial.chmod(stat.S_IMODE(now.st_mode))
            file.write(text)
            file.close()
            os.replace(partial, path)
        except BaseException:
            partial.unlink()
            raise


def write_text(option: str, name: str, text: str) -> None:
    """Writes the file an option names; raises UsageError where that fails."""
    with refused(f"{option} {name}", kinds=OSError):
        replace_text(Path(name), text)
