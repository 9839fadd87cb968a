"""Python processes that have imported torch and transformers, nothing of fastbert: forks of one that has, and waits.

To start Python and import them takes seconds, each time anew. Kernels are compiled in them, not interpreted.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_server: list[subprocess.Popen[str]] = []


def environment(**changes: str) -> dict[str, str]:
    """This process's, but that kernels are not interpreted."""
    return {**{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}, **changes}


def run(
    *words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *words])`, with what it prints: -c CODE, -m MODULE or FILE, and arguments."""
    if not _server:
        command = [sys.executable, "-m", "tests.fresh"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _server.append(subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes))  # type: ignore[call-overload]
    (server,) = _server
    with tempfile.TemporaryDirectory() as folder:
        job = {"words": [*map(str, words)], "cwd": str(cwd), "env": environment() if env is None else env}
        files = {name: os.path.join(folder, name) for name in ("out", "err")}
        server.stdin.write(json.dumps({**job, **files, "timeout": timeout}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8") for file in files.values())
    if status == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(job["words"], timeout, out, err)
    return subprocess.CompletedProcess(job["words"], status, out, err)


def _become(job: dict[str, Any]) -> None:
    """Runs a job as Python does what is on its command line."""
    signal.alarm(job["timeout"])
    for place, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), place)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    how, *rest = job["words"]
    script = how not in ("-c", "-m")
    sys.argv = job["words"] if script else [how, *rest[1:]]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [os.path.dirname(os.path.abspath(how)) if script else os.getcwd(), *paths]
    if how == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif how == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(how, run_name="__main__")


def main() -> None:
    import transformers.models.bert.modeling_bert  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _become(json.loads(line))
            except Exception:
                traceback.print_exc()
                sys.exit(1)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
