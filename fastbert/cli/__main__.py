"""The command `fastbert`, and its exit statuses: 0 done; 1 the numbers are not right, or something is slower, or
failed; 2 bad usage; 130 interrupted; 141 whoever read the output has closed it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import io
import os
import select
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from ..usage import UsageError, in_a_line
from ..version import VERSION, install

COMMANDS = ("verify", "bench", "profile", "explain", "embed", "convert", "tune", "info")
"""Each a module of its name."""
_PATHS = ("FILE", "DIR", "FOLDER", "PATH", "PATH_OR_ID", ("OLD", "NEW"))
_COMPLETE_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete arguments, by shtab, and exits."""

    def __call__(
        self, own: argparse.ArgumentParser, namespace: object, shell: object, option: str | None = None
    ) -> None:
        if importlib.util.find_spec("shtab") is None:
            own.error(f"--print-completion takes shtab, which is not installed: {install('completion')}")
        import shtab

        print(shtab.complete(own, shell))
        own.exit(0)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert",
        description="Check, time and run encoders like BERT on fused kernels.",
        epilog="Exit status: 0 done; 1 the numbers are not right, or something is slower, or failed; 2 bad usage; "
        "130 interrupted; 141 whoever read the output has closed it.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    top.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        default=argparse.SUPPRESS,
        help="print a script that completes arguments in this shell, and exit",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    width = max(20, min(100, shutil.get_terminal_size().columns - 2))  # the last two are argparse's margin
    for name in COMMANDS:
        module = _module(name)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=textwrap.fill(module.DESCRIPTION, width),
            epilog="\n  ".join(("examples:", *module.EXAMPLES)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        for action in command._actions:
            if action.metavar in _PATHS:
                action.complete = _COMPLETE_FILES  # type: ignore[attr-defined]  # as shtab reads it
    return top


@contextlib.contextmanager
def _json_on_stdout(arguments: argparse.Namespace) -> Iterator[None]:
    """`--json -`: standard output gets the JSON alone, and what is told beside it goes to standard error."""
    if getattr(arguments, "json", None) != "-":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "json"
        arguments.json = str(file)
        with contextlib.redirect_stdout(sys.stderr):
            yield
        if file.exists():
            print(file.read_text(encoding="utf-8"), end="")


def _is_closed(stream: TextIO | None) -> bool:
    """Whether a standard stream is a pipe, or a socket, that nobody reads any more."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Sends what an output didn't take nowhere: Python writes it once more as it ends, and would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
    finally:  # argparse exits by itself after --help and --version
        print(end="", flush=True)
    try:
        with _json_on_stdout(arguments):
            status: int = _module(arguments.command).run(arguments)
        print(end="", flush=True)
    except UsageError as error:
        option = f"--{error.argument.replace('_', '-')} " if error.argument else ""
        print(f"fastbert {arguments.command}: {option}{error.told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastbert {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. argparse itself exits on arguments it refuses, with status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it: names may be in any script
    try:
        return _run(argv)
    except BrokenPipeError:
        if not (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
            raise  # it is another pipe that broke, as one to a process that died
        _drop_output()
        return 141  # 128 + SIGPIPE, as of a program that the signal ended
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        with contextlib.suppress(OSError):  # standard error may be what is full
            print(f"fastbert: {in_a_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
