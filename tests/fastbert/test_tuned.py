"""Configurations from the user's cache: what is written comes before the tables, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert import tuned
from fastbert.kernels import launch
from fastbert.runtime import graphs

GPU, ARCH = "NVIDIA H200", "sm_90"
LINEAR = ("linear", ARCH, torch.bfloat16, 4096, 1024, 1, 8192)
ATTENTION = ("attention", ARCH, torch.float16, 64)
ROW = ("row", torch.bfloat16, 1024)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The shipped tables, before and after."""
    launch.use({})
    yield
    launch.use({})
    tuned.apply.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's, empty; the GPU is one that isn't here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(launch, "architecture", lambda device: ARCH)
    tuned.apply.cache_clear()
    return tuned.path(GPU, ARCH)


def entry(key: tuple[Any, ...], **changes: Any) -> tuned.Entry:
    config = dataclasses.replace(launch.OPERATIONS[key[0]].choose(*key[1:]), **changes)
    return tuned.Entry(key, config, {"8192": [1e-4, 1.1e-4, 1.2e-4]}, {"8192": [2e-4, 2.1e-4, 2.2e-4]})


ENTRIES = [entry(LINEAR, block_n=64, num_stages=5), entry(ATTENTION, block_m=128), entry(ROW, num_warps=4)]


def test_what_is_given_comes_first_and_goes_again() -> None:
    shipped = launch.linear_config(*LINEAR[1:])
    other = dataclasses.replace(shipped, block_n=64)
    launch.use({LINEAR: other})
    assert launch.linear_config(*LINEAR[1:]) == other
    assert launch.linear_config(*LINEAR[1:5]) == other  # segments and rows are these by default
    assert launch.linear_config(*LINEAR[1:5], rows=4096) != other
    assert launch.linear_config("sm_80", *LINEAR[2:]) != other
    launch.use({})
    assert launch.linear_config(*LINEAR[1:]) == shipped


def test_what_is_written_is_applied(cache: Path) -> None:
    tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    assert tuned.apply() == (cache, tuple(ENTRIES))
    assert launch.linear_config(*LINEAR[1:]) == ENTRIES[0].config
    assert launch.attention_config(*ATTENTION[1:]) == ENTRIES[1].config
    assert launch.row_config(*ROW[1:]).num_warps == 4
    assert launch.row_config(torch.float32, 1024) == launch.OPERATIONS["row"].choose(torch.float32, 1024)
    tuned.write(cache, tuned.made_for(GPU, ARCH), [])  # whole, in place of the other
    assert [each.name for each in cache.parent.iterdir()] == [cache.name]


def test_the_library_is_used_by_those_who_ask(cache: Path) -> None:
    """A tile and PyTorch's GEMM of one key lie side by side in the file."""
    by_library = ENTRIES[0]._replace(config=launch.BY_LIBRARY)
    tuned.write(cache, tuned.made_for(GPU, ARCH), [*ENTRIES, by_library])
    assert tuned.apply() == (cache, (*ENTRIES, by_library))
    assert launch.linear_config(*LINEAR[1:]) == ENTRIES[0].config
    assert launch.linear_config(*LINEAR[1:], batch_invariant=False) == launch.BY_LIBRARY
    assert launch.linear_config(*LINEAR[1:], batch_invariant=True) == ENTRIES[0].config
    try:
        fastbert.set_batch_invariant(False)
        assert launch.batch_invariant is False
        assert graphs.bucket_of(128, 1, 128) != (
            invariant := graphs.bucket_of(128, 1, 128)._replace(batch_invariant=True)
        )
    finally:
        fastbert.set_batch_invariant(True)
    assert graphs.bucket_of(128, 1, 128) == invariant
    with pytest.raises(TypeError, match="enabled is None; expected True or False"):
        fastbert.set_batch_invariant(None)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_old_file(cache: Path) -> None:
    tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
    with pytest.raises(ValueError, match="JSON"):
        tuned.write(cache, tuned.made_for(GPU, ARCH), [ENTRIES[0]._replace(seconds={"1": [float("nan")] * 3})])
    assert [each.name for each in cache.parent.iterdir()] == [cache.name]
    assert len(tuned.read(cache, tuned.made_for(GPU, ARCH))) == 3


def test_without_a_file_or_a_gpu_nothing_happens(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.apply() is None
        tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
        tuned.apply.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert tuned.apply() is None
    assert launch.linear_config(*LINEAR[1:]) == launch.OPERATIONS["linear"].choose(*LINEAR[1:])


def test_the_file_is_read_when_a_kernel_is_first_launched(cache: Path) -> None:
    from fastbert import ops

    tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
    assert tuned.apply.cache_info().currsize == 0
    ops.registry.kernel.cache_clear()
    ops.registry.kernel("pack")
    assert launch.linear_config(*LINEAR[1:]) == ENTRIES[0].config
    ops.registry.kernel.cache_clear()


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes what a good file holds."""

    def apply(file: Path) -> None:
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return apply


def config(field: str, value: Any, entry: int = 0) -> Callable[[Path], None]:
    return changed(lambda found: found["entries"][entry]["config"].__setitem__(field, value))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda file: file.write_text(file.read_text()[:-20]), "no JSON"),
    "binary": (lambda file: file.write_bytes(b"\x80\x04\x95\xff"), "no JSON"),
    "deep": (lambda file: file.write_text("[" * 200_000), "no JSON"),
    "too large": (lambda file: file.write_text(" " * (1 << 21)), "larger"),
    "a list": (lambda file: file.write_text("[]"), "layout"),
    "another schema": (changed(lambda found: found.update(schema=2)), "layout"),
    "no entries": (changed(lambda found: found.pop("entries")), "layout"),
    "another triton": (changed(lambda found: found["made_for"].update(triton="2.0")), "made for triton 2.0"),
    "another fastbert": (changed(lambda found: found["made_for"].update(fastbert="0")), "made for fastbert 0"),
    "other kernels": (changed(lambda found: found["made_for"].update(kernels="?")), "made for kernels"),
    "another GPU": (changed(lambda found: found["made_for"].update(gpu="NVIDIA H100")), "made for gpu NVIDIA H100"),
    "made for nothing": (changed(lambda found: found.pop("made_for")), "made for gpu None"),
    "unreadable": (lambda file: (file.unlink(), file.mkdir()), "directory"),
    "everybody's": (lambda file: file.chmod(0o666), "others"),
    "no power of two": (config("block_m", 96), "block_m is 96; expected a power of two"),
    "huge": (config("block_n", 1 << 20), "block_n"),
    "negative": (config("num_stages", -1), "num_stages"),
    "a float": (config("num_warps", 4.0), "num_warps"),
    "a string": (config("num_warps", "4"), "num_warps"),
    "a bool": (config("block_m", True, entry=2), "block_m is True; expected 1"),
    "code": (config("variant", "__import__('os')"), "variant"),
    "not to be changed": (config("block_n", 2048, entry=2), "block_n is 2048; expected 1024"),
    "a field too few": (changed(lambda found: found["entries"][0]["config"].pop("block_k")), "other fields"),
    "a field too many": (config("num_ctas", 2), "other fields"),
    "an entry of another shape": (changed(lambda found: found["entries"].append(7)), "other fields"),
    "no such operation": (changed(lambda found: found["entries"][0].update(operation="use")), "operation"),
    "an operation that is a list": (changed(lambda found: found["entries"][0].update(operation=[])), "operation"),
    "another key": (changed(lambda found: found["entries"][0]["key"].pop("n")), "operation"),
    "a dtype": (changed(lambda found: found["entries"][0]["key"].update(dtype="float64")), "key dtype"),
    "a size": (changed(lambda found: found["entries"][0]["key"].update(n="4096")), "key n"),
    "a head_dim": (changed(lambda found: found["entries"][1]["key"].update(head_dim=4096)), "head_dim is 4096"),
    "no times": (changed(lambda found: found["entries"][0].update(seconds={"8": [1]})), "times"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_left_aside_with_one_warning(name: str, cache: Path) -> None:
    spoil, why = BAD[name]
    tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
    spoil(cache)
    with pytest.warns(UserWarning, match=r"is not used: .*fastbert tune") as said:
        results = [tuned.apply() for _ in range(2)]
    assert results == [None, None]
    assert len(said) == 1
    assert why in str(said[0].message)
    assert launch.in_use() == {}


def test_a_file_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(cache, tuned.made_for(GPU, ARCH), ENTRIES)
    mine = os.stat(cache).st_uid
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100600, 0, 0, 1, mine + 7, 0, 9, 0, 0, 0)))
    with pytest.warns(UserWarning, match="this user"):
        assert tuned.apply() is None


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (None, "", "relative"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        name = "tuned-nvidia-h100-80gb-hbm3-sm_90.json"
        assert tuned.path("NVIDIA H100 80GB HBM3", "sm_90") == tmp_path / ".cache" / "fastbert" / name
    assert tuned.path("../../x", "sm_90").name == "tuned-x-sm_90.json"


def test_every_shipped_configuration_could_have_been_found() -> None:
    """Or `fastbert tune` could not start from it."""
    for arch in ("sm_80", "sm_90", "sm_100", "portable"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            keys: list[tuple[Any, ...]] = [("row", dtype, width) for width in (128, 1024, 4096)]
            keys += [("row_backward", dtype, width) for width in (128, 1024, 4096)]
            keys += [(op, arch, dtype, d) for op in ("attention", "attention_backward") for d in (16, 32, 64, 128)]
            for n, k in ((1024, 1024), (4096, 1024), (1024, 4096), (100, 70)):
                keys.append(("linear_backward", arch, dtype, n, k))
                keys += [("linear", arch, dtype, n, k, 1, rows) for rows in (64, 1024, 8192)]
            for key in keys:
                assert tuned.problem(key, launch.OPERATIONS[key[0]].choose(*key[1:])) is None, key
