"""Kernels compiled ahead for a GPU that isn't here, into a cache that Triton finds there.

    python benchmarks/prebuild.py [--arch sm_90] [--minutes 10] [--jobs 2] [--only headline training ...]

Run it with the Python and the Triton of the machine that has the GPU: a cached kernel is found by a key made of
Triton's wheel (its sources and its compiled part, which differs by the minor version of Python: `triton_key()`), of
ptxas' version, and of the kernel's source and specialisation; not of torch, nor of the machine. benchmarks/first.py
says there whether the keys can match. Work is listed without compiling, by launches on a device that isn't there
(benchmarks/dry.py), in this order:

    headline   what benchmarks/first.py launches: the gates of inference, BERT-large's forwards, the GEMMs compared
    training   the gates of training
    rows       what benchmarks/suite.py times next: throughput with fp8, latency, training steps, DeBERTa, ModernBERT
    tests      what tests marked `gpu` launch; listing it takes a quarter of an hour

Then it is compiled, each kernel in seconds, the most important first. What is there is not compiled again, so the same
command goes on; lists are made anew where they are removed. All lies in build/gpu-cache, which git ignores: kernels in
cache/triton, of each the binary and its JSON, packed in caches.tar.gz, which is all that has to travel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from benchmarks import archive  # noqa: E402

LONG = ["--slack", "20", "--minutes", "100"]
FIRST = ["benchmarks/first.py", *LONG, "--sections"]
ROWS = ("throughput", "latency", *("training", "deberta training", "modernbert training"), "deberta", "modernbert")
PARTS: dict[str, list[str]] = {
    "headline": [*FIRST, "gates", "forwards", "operators"],
    "training": [*FIRST, "training"],
    "rows": ["benchmarks/suite.py", *LONG, "--only", *ROWS],
    "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests"],
}


def list_part(part: str, arch: str, folder: Path) -> Path:
    """The file with a line for every compilation of a part; made where it isn't there."""
    file = folder / "lists" / f"{arch}-{part}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        shutil.rmtree(folder / "dry", ignore_errors=True)
        dry = [sys.executable, "-m", "benchmarks.dry", "--arch", arch, "--list", str(partial)]
        own, more = ([], []) if part == "tests" else (["--layers", "1"], ["--output", str(folder / "dry")])
        environment = {name: value for name, value in os.environ.items() if name != "OUT"}
        with open(folder / "lists" / f"{part}.log", "w") as log:
            words = [*dry, *own, sys.executable, *PARTS[part], *more]
            status = subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
        if status not in (0, 1) or not partial.exists():  # 1: something failed, and the others went on
            raise RuntimeError(f"{part} was not listed whole, status {status}; see {log.name}")
        os.replace(partial, file)
    return file


def compile_one(text: str) -> tuple[str, float, str, str]:
    """Compiles what a line says, if it isn't there; returns the kernel, seconds, its folder, and what went wrong."""
    from triton.compiler import ASTSource, compile
    from triton.runtime.cache import get_cache_manager

    from benchmarks import stub

    line, begun = json.loads(text), time.monotonic()
    kernel = getattr(importlib.import_module(line["module"]), line["kernel"])
    constants, attrs = ({tuple(path): value for path, value in line[name]} for name in ("constants", "attrs"))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in line["options"].items()}
    target = stub.target(options["arch"].replace("sm", "sm_"))
    try:
        found = compile(ASTSource(kernel, line["signature"], constants, attrs), target=target, options=options)
    except Exception as error:  # of this kernel: the others go on
        said = str(error).strip().splitlines()[-1:] or [""]
        return line["kernel"], time.monotonic() - begun, "", f"{type(error).__name__}: {said[0][:200]}"
    return line["kernel"], time.monotonic() - begun, Path(get_cache_manager(found.hash).cache_dir).name, ""


def finish(folder: Path, kept: set[str], whole: bool) -> None:
    """Packs what was compiled, and says which Triton finds it; what older sources had goes once all is there."""
    import triton
    from triton.runtime.cache import triton_key

    cache = folder / archive.CACHE
    for each in (cache / "triton").iterdir():
        if whole and each.name not in kept:
            shutil.rmtree(each)
    count = len(list((cache / "triton").iterdir()))  # of earlier calls, too
    told = {"triton": triton.__version__, "python": platform.python_version(), "kernels": count}
    (cache / "prebuilt.json").write_text(json.dumps({**told, "triton_key": triton_key()}) + "\n", encoding="utf-8")
    for line in archive.pack(folder, folder, [archive.CACHES]):
        print(f"left out: {line}")
    size = (folder / archive.CACHES).stat().st_size / 2**20
    print(f"{count} kernels in {folder / archive.CACHES}: {size:.1f} MiB", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--minutes", type=float, default=10.0, help="of compiling; default: 10")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=["headline", "training", "rows"], metavar="PART"
    )
    parser.add_argument("--output", type=Path, default=archive.CARRIED)
    given = parser.parse_args(argv)
    folder = given.output.resolve()
    os.environ |= {"TRITON_CACHE_DIR": str(folder / archive.CACHE / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
    wanted: dict[str, str] = {}
    for part in given.only:
        for line in list_part(part, given.arch, folder).read_text(encoding="utf-8").splitlines():
            wanted.setdefault(line, part)
    print(f"{len(wanted)} kernels", flush=True)
    kept: set[str] = set()
    wrong, deadline = 0, time.monotonic() + 60 * given.minutes
    running: dict[Any, str] = {}
    todo = iter(wanted)
    with concurrent.futures.ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            while len(running) < given.jobs and time.monotonic() < deadline and (line := next(todo, None)):
                running[pool.submit(compile_one, line)] = line
            if not running:
                break
            for each in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                part = wanted[running.pop(each)]
                kernel, seconds, name, error = each.result()
                wrong += bool(error)
                kept |= {name} - {""}
                print(f"{part:<10}{kernel:<34}{seconds:>6.1f} s {error}", flush=True)
    whole = next(todo, None) is None
    finish(folder, kept, whole and given.only == list(PARTS))
    return 1 if wrong else 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
