"""Every kernel compiles for every GPU it ships for, without spilling and within the chip's shared memory."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fastbert.usage import replace_text
from tests import fresh
from tests.kernels.main_loop import main_loop

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
FP8 = ("sm_89", "sm_90", "sm_100")
INT8 = ("sm_80", "sm_90")


def kept(name: str, options: tuple[str, ...]) -> Path:
    """Where what a module prints is kept, by a hash of all that it comes of."""
    sources = [*(ROOT / "kernels").glob("*.py"), *Path(__file__).parent.glob("*.py")]
    if name != "tests.kernels.aot":  # it runs models
        sources += (ROOT / "fastbert").rglob("*.py")
    versions = [version(package) for package in ("torch", "transformers", "triton")]
    found = hashlib.sha256(repr((sys.version, versions)).encode())
    for path in sorted(sources):
        found.update(path.read_bytes())
    return ROOT / "build" / "aot" / "".join((name, *options)) / f"{found.hexdigest()}.json"


@functools.cache
def run_module(name: str, *options: str) -> list[dict[str, Any]]:
    """The JSON lines that a module prints, run in a process of its own: this one may be interpreting kernels.

    Kernels that haven't changed aren't compiled again: see `kept`.
    """
    file = kept(name, options)
    if file.exists():
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return found
    done = fresh.run("-m", name, *options, timeout=24 * 3600)
    violations = {0, 1} if name == "tests.kernels.aot" else {0}
    assert done.returncode in violations, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob("*.json"):
        old.unlink(missing_ok=True)
    replace_text(file, json.dumps(rows))
    return rows


def compile_all(*options: str) -> list[dict[str, Any]]:
    """The rows of the harness."""
    return run_module("tests.kernels.aot", *options)


def assert_clean(rows: list[dict[str, Any]]) -> None:
    bad = [
        f"{row['arch']} {row['op']} {row['variant']} {row['dtype']}: {'; '.join(row['violations'])}"
        for row in rows
        if row["violations"]
    ]
    assert not bad, "\n".join(bad)


def operations() -> tuple[set[str], set[str], set[str]]:
    """(without, with FP8, with int8): a kernel is launched over a grid, `run(name, grid, ...)`, its file its op."""
    files = {
        path.stem for path in (ROOT / "kernels").glob("*.py") if re.search(r"\brun\(\w+_kernel,", path.read_text())
    }
    fp8 = {file for file in files if file.endswith("_fp8")}
    int8 = {file for file in files if file.endswith("_int8")}
    assert fp8 and int8
    return files - fp8 - int8, {*fp8, "attention_fp8"}, int8  # the second is attention's own kernel


def test_compiles_without_spills_within_shared_memory() -> None:
    """Every kernel: those of matrices for every architecture, of which sm_89 is for FP8 alone; the others for two.

    One test, as processes of its own share the work out.
    """
    rows = compile_all("--few")
    plain, fp8, int8 = operations()
    matrices = {"attention", "attention_map", "disentangled", "linear", "linear_gated"}
    for arch in ARCHITECTURES:
        ops = {row["op"] for row in rows if row["arch"] == arch}
        found = {*matrices} if arch != "sm_89" else set()
        found |= {f"{op}_fp8" for op in ("attention", "linear")} if arch in FP8 else set()
        found |= {"linear_int8"} if arch in INT8 else set()
        found |= plain if arch in ("sm_90", "gfx942") else set()
        assert ops == (found | fp8 | int8 if arch == "sm_90" else found), arch
    assert {row["dtype"] for row in rows if row["arch"] == "sm_80"} >= {"fp32", "bf16"}
    assert_clean(rows)


@pytest.mark.slow
def test_a_call_of_each_kind_compiles() -> None:
    """In every dtype. FP8 numbers are for the architectures that have them; sm_89 is compiled for them alone."""
    rows = compile_all()
    plain, fp8, int8 = operations()
    assert {row["arch"] for row in rows} == {*ARCHITECTURES}
    for arch in ARCHITECTURES:
        chosen = [row for row in rows if row["arch"] == arch]
        dtypes = {"fp32", "fp16", "bf16"} | ({"fp8e4nv"} if arch in FP8 else set())
        dtypes |= {"integer"} if arch != "sm_89" else set()
        dtypes |= {"i8"} if arch in INT8 else set()
        assert {row["dtype"] for row in chosen} == dtypes, arch
        ops = (fp8 if arch in FP8 else set()) | (plain if arch != "sm_89" else set())
        ops |= int8 if arch in INT8 else set()
        assert {row["op"] for row in chosen} == ops, arch
    assert_clean(rows)


PTX = """
$L__BB0_1:
	{
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
	}
	wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {%f0, %f1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
	@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd3, {%r4, %r5}], [%r6];
	cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
	cp.async.ca.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x4, %r8;
	cvt.s64.s32 %rd5, %r9;
	CONVERSION
	@%p3 bra $L__BB0_3;
	st.global.v4.b32 [%rd6], {%r1, %r2, %r3, %r4}; // of one step in many
	cvt.rn.f16x2.f32 %r9, %f1, %f0;
$L__BB0_3:
	@%p4 bra $L__BB0_1;
	ret;
"""


def test_a_main_loop_is_read() -> None:
    """The shortest way around it, with what waits and without what only some steps do."""
    plain = {"wgmma.m64n256k16": 1, "tma": 1, "cp.async.16": 1, "cp.async": 1, "other": 5}
    assert main_loop(PTX.replace("CONVERSION", "")) == plain
    assert main_loop(PTX.replace("CONVERSION", "cvt.f32.bf16 %f3, %rs1;")) == {**plain, "conversion": 1}
    assert main_loop(PTX.replace("@%p4 bra", "// bra")) == {}


@pytest.mark.slow
def test_the_full_set_compiles() -> None:
    assert_clean(compile_all("--full"))


TRAINED = {"attention_backward_q_kernel", "add_layer_norm_backward_kernel", "embedding_backward_kernel"}


def specialized(how: str) -> list[dict[str, Any]]:
    rows = run_module("tests.kernels.specializations")
    return [{key: value for key, value in row.items() if key != "how"} for row in rows if row["how"] == how]


@pytest.mark.parametrize("how", ["inference", "training"])
def test_nothing_compiles_anew_for_another_batch_shape(how: str) -> None:
    """But for tiles chosen by the number of rows: no number, and no address, that a batch sets is compiled in.

    In training layers drop by seeds that lie 8 bytes apart.
    """
    found = specialized(how)
    kernels = [row["kernel"] for row in found]
    assert {"embedding_kernel", "linear_kernel", "attention_kernel", "layer_norm_kernel", "tiles_kernel"} <= {*kernels}
    assert how == "inference" or {*kernels} >= TRAINED
    assert all(kernels.count(name) == 1 for name in ("embedding_kernel", "layer_norm_kernel", "tiles_kernel"))
    for i, row in enumerate(found):
        same = [other for other in found[:i] if {**other, "shape": 0} == {**row, "shape": 0}]
        assert not same, f"{row} of a batch of {row['shape']} is compiled again, after {same[0]['shape']}"
    if how == "inference":
        assert sum(row["shape"] == [1, 1] for row in found) <= 9  # what the first forward waits for


def test_a_kernel_launched_before_the_last_has_ended_waits_for_it() -> None:
    """Each that is launched so is compiled to wait, and no other; none unless asked for."""
    early = specialized("dependent")
    waiting = {row["kernel"] for row in early if row["dependent"]}
    assert waiting >= {"linear_kernel", "attention_kernel", "layer_norm_kernel"}
    for row in early:
        assert row["dependent"] == (row["constexprs"].get("DEPENDENT") == "True"), row
    assert not any(row["dependent"] for row in specialized("inference"))
