"""Launch configurations that `fastbert tune` found for this machine's GPU: the file they are kept in, and its use.

Where PyTorch's GEMM was found to be faster than all of these it is used only after `set_batch_invariant(False)`.
The file lies in $XDG_CACHE_HOME/fastbert (~/.cache/fastbert), one a GPU, and is read when the first kernel is launched.
It holds for the versions and the kernels that it was made with. One that doesn't hold, or isn't what `write` writes, is
left aside with a warning: then the shipped tables hold.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .kernels.launch import Config

SCHEMA = 1
LIMIT_BYTES = 1 << 20
"""A file is a few hundred lines; no more than this is read."""
Key = tuple[Any, ...]
"""(operation, arguments of the function of kernels/launch.py that chooses for it)"""

# Least and most of each field of a configuration that may differ from the shipped one, and whether by powers of two.
RANGES = {
    "block_m": (1, 512, True),
    "block_n": (8, 512, True),
    "block_k": (16, 512, True),
    "num_warps": (1, 32, True),
    "num_stages": (1, 8, False),
    "group_m": (1, 64, True),
    "programs": (0, 8, False),
}


def set_batch_invariant(enabled: bool) -> None:
    """Whether a sequence's result, in inference on a GPU, is the same bits whatever it is batched with; the default.

    Without that, GEMMs of 16 bits are PyTorch's (cuBLAS) where those are faster: where `fastbert tune --library` has
    found so on this GPU, or a shipped table says so. cuBLAS chooses among kernels by the number of rows. Results stay
    within the numerical policy, and two runs of one batch still give the same bits. For the whole process, from the
    next call on.

    Args:
        enabled: False gives the guarantee up; True takes it back.

    Raises:
        TypeError: `enabled` is no bool.
    """
    from .kernels import launch

    launch.set_batch_invariant(enabled)


class Unusable(Exception):
    """A file whose configurations can't be used, and why."""


class Entry(NamedTuple):
    """A configuration that beat the shipped one, and by how much."""

    key: Key
    config: Config
    seconds: dict[str, list[float]]
    """By number of rows: p20, median and p80 of a launch."""
    shipped_seconds: dict[str, list[float]]


def path(gpu: str, arch: str) -> Path:
    """The file of a GPU, by the name torch gives it and that of its architecture."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the standard has it
        cache = os.path.expanduser("~/.cache")
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return Path(cache) / "fastbert" / f"tuned-{name}-{arch}.json"


@functools.cache
def _sources() -> str:
    """A hash of the kernels."""
    found = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def made_for(gpu: str, arch: str) -> dict[str, str]:
    """What configurations hold for."""
    import triton

    from .version import VERSION

    return {
        "gpu": gpu,
        "architecture": arch,
        "triton": triton.__version__,
        "fastbert": VERSION,
        "kernels": _sources(),
    }


def problem(key: Key, config: Config) -> str | None:
    """Why a configuration can't stand in for the shipped one, or None: fields out of range, or not to be changed."""
    from .kernels import launch

    operation = launch.OPERATIONS[key[0]]
    shipped = operation.choose(*key[1:])
    for name, value in dataclasses.asdict(config).items():
        if name not in operation.free:
            if type(value) is not type(getattr(shipped, name)) or value != getattr(shipped, name):
                return f"{name} is {value!r}; expected {getattr(shipped, name)!r}"
        elif name == "variant":
            known = (*launch.VARIANTS, launch.LIBRARY)
            if value not in known:
                return f"variant is {value!r}; expected one of {', '.join(map(repr, known))}"
        else:
            least, most, powers = RANGES[name]
            most = min(most, operation.most) if name in ("block_m", "block_n") else most
            if type(value) is not int or not least <= value <= most or (powers and value & (value - 1)):
                kind = "a power of two" if powers else "a whole number"
                return f"{name} is {value!r}; expected {kind} from {least} to {most}"
    return None


def _entry(found: object) -> Entry:
    """One entry of a file. Raises Unusable."""
    from .kernels import launch

    if not isinstance(found, dict) or found.keys() != {"operation", "key", "config", "seconds", "shipped_seconds"}:
        raise Unusable("an entry has other fields than expected")
    operation = launch.OPERATIONS.get(found["operation"]) if isinstance(found["operation"], str) else None
    names = operation.parameters() if operation else ()
    given, fields = found["key"], found["config"]
    if operation is None or not isinstance(given, dict) or given.keys() != set(names):
        raise Unusable("an entry is of an operation, or a key, that these kernels don't have")
    key: list[object] = [found["operation"]]
    for name in names:
        value = given[name]
        if name == "dtype":
            value = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(value))
        elif name != "arch" and (type(value) is not int or not 1 <= value < 2**31):
            value = None
        if value is None or (name == "arch" and not isinstance(value, str)):
            raise Unusable(f"the key {name} is {given[name]!r}")
        key.append(value)
    expected = {field.name for field in dataclasses.fields(launch.Config)}
    if not isinstance(fields, dict) or fields.keys() != expected:
        raise Unusable("a configuration has other fields than expected")
    config = launch.Config(**fields)
    try:
        reason = problem(tuple(key), config)
    except (ValueError, KeyError) as error:  # there is no shipped one: a head_dim out of range, say
        raise Unusable(f"an entry is of a shape that these kernels don't have: {error}") from error
    if reason is not None:
        raise Unusable(reason)
    for times in (found["seconds"], found["shipped_seconds"]):
        rows = times.values() if isinstance(times, dict) else [None]
        if not all(isinstance(each, list) and len(each) == 3 and all(type(t) is float for t in each) for each in rows):
            raise Unusable("an entry has no times")
    return Entry(tuple(key), config, found["seconds"], found["shipped_seconds"])


def read(file: Path, expected: Mapping[str, str]) -> list[Entry]:
    """The entries of a file made for what is `expected`, `made_for`'s.

    Raises:
        FileNotFoundError: there is none.
        Unusable: it can't be read, is not the user's own, was made for something else or holds something else.
    """
    try:
        with open(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or (hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0)):
                raise Unusable("it is not a file of this user's")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Unusable("others than its owner may write it")
            raw = stream.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unusable(str(error)) from error
    if len(raw) > LIMIT_BYTES:
        raise Unusable(f"it is larger than {LIMIT_BYTES} bytes")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("entries"), list):
        raise Unusable("its layout is not that of this version")
    was = found.get("made_for")
    for name, value in expected.items():
        if not isinstance(was, dict) or was.get(name) != value:
            has = was.get(name) if isinstance(was, dict) else None
            raise Unusable(f"it was made for {name} {has}; here it is {value}")
    return [_entry(each) for each in found["entries"]]


def write(file: Path, expected: Mapping[str, str], entries: Iterable[Entry]) -> None:
    """Replaces a file at once; it and its folder are the user's alone."""
    from .kernels import launch

    def plain(entry: Entry) -> dict[str, object]:
        names = launch.OPERATIONS[entry.key[0]].parameters()
        key = dict(zip(names, entry.key[1:], strict=True))
        if "dtype" in key:
            key["dtype"] = str(key["dtype"]).removeprefix("torch.")
        found = {"operation": entry.key[0], "key": key, "config": dataclasses.asdict(entry.config)}
        return {**found, "seconds": entry.seconds, "shipped_seconds": entry.shipped_seconds}

    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = {"schema": SCHEMA, "made_for": dict(expected), "entries": [plain(entry) for entry in entries]}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as partial:  # mode 0600
        try:
            partial.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
            partial.close()
            os.replace(partial.name, file)
        except BaseException:
            os.unlink(partial.name)
            raise


@functools.cache
def apply() -> tuple[Path, tuple[Entry, ...]] | None:
    """Puts what was found for this machine's GPU before the shipped tables, once; what is in use, or None.

    Of several GPUs, the current one's. Warns of a file that can't be used.
    """
    from .kernels import launch

    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, arch = torch.cuda.get_device_name(device), launch.architecture(device)
    file = path(gpu, arch)
    try:
        entries = read(file, made_for(gpu, arch))
    except FileNotFoundError:
        return None
    except Unusable as error:
        warnings.warn(
            f"{file} is not used: {error}. The shipped launch configurations hold; `fastbert tune` writes a new file",
            stacklevel=2,
        )
        return None
    by_library = [entry.key for entry in entries if entry.config.variant == launch.LIBRARY]
    launch.use({e.key: e.config for e in entries if e.config.variant != launch.LIBRARY}, by_library)
    return file, tuple(entries)
