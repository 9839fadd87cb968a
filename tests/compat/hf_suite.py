"""Hugging Face's own tests, stock and fused: the same tests pass, are skipped and fail.

    python -m tests.compat.hf_suite [--transformers 5.4.0 ...] [--family bert ...] [--only EXPRESSION]

fetches the source distribution of each version of transformers, which has the tests common to all its models, and runs
them twice over every head of every family: as they are, and with `fastbert.fuse` of every model as it is built. Prints
a table, and how many forwards of encoders ran fused and stock, by reason; exit status 1 where a test ends differently,
where none passed, or where a family's forwards did not run fused both with and without gradients.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastbert
from fastbert.fuse import FAMILIES
from fastbert.version import TRIED

from .environments import ABSENT, CACHE, environment, library, overlay, pip

# Tests that can't hold of a fused model, and why.
DIFFERENT: dict[str, str] = {}

# Fused without gradients alone.
INFERENCE_ONLY = {"mpnet"}

Record = dict[str, Any]


def unpacked(version: str) -> Path:
    """A folder that holds `huggingface_tests`, the tests of that version of transformers."""
    folder = CACHE / f"transformers-{version}-tests"
    if folder.exists():
        return folder
    # Reading its metadata is part of pip's download; without isolation that takes no second environment.
    pip(
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary=:all:",
        f"transformers=={version}",
        "-d",
        CACHE,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tests = partial / "huggingface_tests"
    tests.mkdir(parents=True)
    with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.parts[1:-1] == ("tests",) and (source := archive.extractfile(member)):
                (tests / path.name).write_bytes(source.read())
    for name in ("test_modeling_common.py", "test_training_mixin.py"):
        fill_in(tests, (tests / name).read_text(encoding="utf-8"))
    partial.rename(folder)
    return folder


def fill_in(tests: Path, source: str) -> None:
    """Empty classes in place of what `source` imports from files of `tests` which the distribution leaves out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            file = tests / (node.module.replace(".", "/") + ".py")
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                classes = "".join(f"class {name.name}:\n    pass\n" for name in node.names)
                file.write_text(classes, encoding="utf-8")


def prepare(version: str) -> tuple[Path, ...]:
    """Makes what running under that version takes; returns the folders to import from."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # none of this project's settings
    packages = overlay(f"transformers=={version}"), overlay("parameterized")
    return library(), *packages, unpacked(version), Path(__file__).parent


def run(version: str, family: str, fused: bool, only: str | None) -> Record:
    """One run of one family's tests, in a process of its own, after `prepare`."""
    name = f"{version}-{family}-{'fused' if fused else 'stock'}"
    record, log = CACHE / f"{name}.json", CACHE / f"{name}.log"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--noconftest", "--import-mode=importlib"]
    command += ["-W", "ignore", "--durations=5"]
    command += ["-c", str(CACHE / "pytest.ini"), "-p", "no:cacheprovider", "-p", "hf_plugin", "--record", str(record)]
    command += ["--fuse", family] if fused else []
    command += ["-k", only] if only else []
    command.append(f"{Path(__file__).with_name('hf_models.py')}::{test_class(family)}")
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables = environment(*prepare(version), HF_HOME=str(CACHE / "empty"), **threads)
    with log.open("w") as output:
        subprocess.run(command, cwd=CACHE, env=variables, stdout=output, stderr=subprocess.STDOUT)
    if not record.exists():
        raise RuntimeError(f"{name} broke off:\n{log.read_text()[-2000:]}")
    found: Record = json.loads(record.read_text(encoding="utf-8"))
    return found


def test_class(family: str) -> str:
    """The name of a family's class in hf_models.py."""
    return f"{fastbert._MODELS[family][0]}ModelTest"


def differences(stock: Record, fused: Record) -> list[str]:
    """What is wrong with two runs of the same tests, one line each."""
    before, after = stock["outcomes"], fused["outcomes"]
    wrong = []
    for test in sorted(before.keys() | after.keys()):
        was, now = before.get(test, "missing"), after.get(test, "missing")
        if was != now and test not in DIFFERENT:
            wrong.append(f"{test}: {was} stock, {now} fused ({fused['why'].get(test, '')})")
    if "passed" not in after.values():
        wrong.append("no test passed")
    return wrong


def never_fused(fused: Record, family: str) -> list[str]:
    """What a run of all tests should have run fused and did not, one line each."""
    expected = ("no gradients",) if family in INFERENCE_ONLY else ("gradients", "no gradients")
    return [
        f"no forward ran fused with {gradients}"
        for gradients in expected
        if not any(way.startswith(f"fused, {gradients}:") for way in fused["forwards"])
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", nargs="+", default=TRIED["transformers"], metavar="VERSION")
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--only", metavar="EXPRESSION", help="tests to run, as pytest's -k")
    options = parser.parse_args(arguments)
    forwards: Counter[str] = Counter()
    status = 0
    print("| transformers | family | passed | skipped | failed | with a fused forward | differences |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for version in options.transformers:
        prepare(version)
        for family in (name for name in options.family if name not in ABSENT.get(version, ())):
            with ThreadPoolExecutor() as pool:
                runs = [pool.submit(run, version, family, fuse, options.only) for fuse in (False, True)]
            stock, fused = (each.result() for each in runs)
            wrong = differences(stock, fused) + ([] if options.only else never_fused(fused, family))
            ends = Counter(fused["outcomes"].values())
            row = (version, family, *(ends[end] for end in ("passed", "skipped", "failed")))
            print("|", " | ".join(map(str, (*row, len(fused["fused_tests"]), len(wrong)))), "|", flush=True)
            for line in wrong:
                print(f"  {version} {family}: {line}", flush=True)
            status |= bool(wrong)
            forwards.update(fused["forwards"])
    print("\nForwards of encoders:")
    for way, times in sorted(forwards.items()):
        print(f"{times:8,} {way}")
    return status


if __name__ == "__main__":
    sys.exit(main())
