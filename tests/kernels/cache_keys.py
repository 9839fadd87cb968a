"""Prints each kernel whose place in Triton's cache hangs on what its process compiled before it.

python -m tests.kernels.cache_keys

A function's key takes in the global constexprs of the functions it calls, but only of those that have a key already
(DependenciesFinder._update_hash, in Triton 3.6 and 3.7). So what kernels call has to take such constants as arguments;
else what one process compiled, or benchmarks/prebuild.py did, another doesn't find.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]


def functions() -> dict[str, JITFunction]:
    """Of kernels/, by name, what each module defines itself."""
    found = {}
    for file in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"fastbert.kernels.{file.stem}")
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
        }
    return found


def key_in_a_child(name: str, others_first: bool) -> str:
    read, write = os.pipe()
    if not os.fork():
        found = functions()
        for each in found.values() if others_first else ():
            if each is not found[name]:
                each.cache_key  # noqa: B018
        os.write(write, found[name].cache_key.encode())
        os._exit(0)
    os.wait()
    os.close(write)
    with os.fdopen(read) as file:
        return file.read()


def main() -> None:
    names = [name for name in functions() if name.endswith("_kernel")]
    assert len(names) > 15
    for name in names:
        key = key_in_a_child(name, others_first=False)
        assert len(key) == 64, name
        print(name, "ok" if key == key_in_a_child(name, others_first=True) else "hangs on the order", flush=True)


if __name__ == "__main__":
    main()
