"""Processes that steps run in: each ends with whoever started it, killed by force or not, and with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

GIVEN_UP_S = 10.0
"""Seconds until a process that was killed, and still hangs in a driver, is left alone."""
# PR_SET_PDEATHSIG is 1; what it sets lasts beyond exec. Not by preexec_fn, which threads of this process could hang.
WITH_PARENT = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def start(words: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
    """Starts Python with these arguments in a session of its own; `more` is for subprocess.Popen."""
    return subprocess.Popen([sys.executable, "-c", WITH_PARENT, *words], start_new_session=True, **more)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a process and of all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GIVEN_UP_S)
