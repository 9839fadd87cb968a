"""Every kernel compiled ahead of time for GPUs that aren't here: what each costs in registers and shared memory.

    python -m tests.kernels.aot [--arch sm_90 ...] [--op attention ...] [--few | --full] [--jobs 2]

prints one JSON line a compilation, then a table, and exits 1 where a row is in violation: it failed to compile, spills,
takes more shared memory than the chip has, has no wgmma where sm_90 should, or more in its main loop than it should.
That loop is the last column of the table: instructions of PTX in each step, by kind.

An op joins by a function that yields its specializations for one architecture, registered under the op's name:

    @specializations("attention")
    def _attention(arch: str, full: bool) -> Iterator[Spec]:
        yield Spec(
            variant="packed d64",
            kernel=attention_kernel,
            arguments={"q_ptr": "*fp16", "stride_qt": 3072, "scale": 0.125, "key_mask_ptr": None, "HEAD_DIM": 64, ...},
            config=attention_config(table(arch), torch.float16, 64),
        )

`arguments` names every parameter of the kernel without a default. Each is what its launcher would pass: a pointer's
type for a tensor ("*fp16", "*bf16", "*fp32", "*i64", "*i32", "*i1"), a descriptor's ("tensordesc<fp16[128, 64]>"), a
typical value for a number, None for an absent tensor, anything for a constexpr. They are specialized as a launch
specializes them: pointers are divisible by 16, integers where the value is, 1 and None are constants. With `full`
false, yield a few dozen at most that cover every branch, dtype and tile shape; with it true, everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("TRITON_INTERPRET is set: the interpreter's kernels can't be compiled")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbert.kernels import attention, attention_map, disentangled, launch, linear
from fastbert.kernels.cross_entropy import cross_entropy_backward_kernel, cross_entropy_kernel
from fastbert.kernels.embedding import embedding_backward_kernel, embedding_kernel
from fastbert.kernels.launch import (
    FP8_EXACT_K,
    LINEAR_CANDIDATES,
    LINEAR_FP8_TILES,
    LINEAR_TILES,
    MASK_LAYOUT,
    UNALIGNED,
    VOCABULARY_BLOCK,
    Config,
    attention_backward_config,
    attention_config,
    attention_dbias_config,
    linear_backward_config,
    linear_config,
    linear_fp8_config,
    linear_gated_config,
    linear_int8_config,
    row_backward_config,
    row_config,
)
from fastbert.kernels.layer_norm import add_layer_norm_backward_kernel, layer_norm_kernel
from fastbert.kernels.linear_fp8 import linear_fp8_kernel
from fastbert.kernels.linear_gated import GATES, linear_gated_kernel
from fastbert.kernels.linear_int8 import linear_int8_kernel
from fastbert.kernels.padding import PROGRAMS, gather_rows_kernel, mask_counts_kernel, mask_layout_kernel
from fastbert.kernels.quantize_fp8 import quantize_fp8_kernel
from fastbert.kernels.quantize_int8 import quantize_int8_kernel
from fastbert.kernels.rms_norm import rms_norm_kernel
from fastbert.kernels.rotary import rotate_kernel
from tests.kernels.main_loop import main_loop, matrix

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "sm_121": GPUTarget("cuda", 121, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {  # bytes a program
    "sm_80": 163 * 1024,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 * 1024),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227 * 1024),
    "gfx942": 64 * 1024,
}
TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Spec:
    """One compilation of one kernel; `arguments` as the module's docstring says."""

    variant: str
    kernel: Any
    arguments: dict[str, Any]
    config: Config  # of which num_warps and num_stages are used here
    matrix: bool = True  # whether 16-bit operands should meet in wgmma on sm_90
    # Whether each step of its main loop on 16-bit operands should be asynchronous copies of 16 bytes or more, and
    # matrix instructions of k 16 (FP8: 32), the same in every tile of an architecture: launch.LINEAR_TILES builds on
    # that.
    streams: bool = False
    unaligned: tuple[str, ...] = ()  # the pointers that are divisible by nothing
    held: bool = False  # in every set: it has spilled, and what has more operands had not


def targets(op: str, everything: bool) -> tuple[str, ...]:
    """The architectures an op is compiled for: those that have FP8 numbers, for ops of them.

    sm_89 only for those, but for `everything`: for all else its instructions are those of sm_80. sm_121 has them, but
    Triton (3.7.1) multiplies them there in 16 bits.
    """
    if op.endswith("_int8"):  # for no others
        return ("sm_80", "sm_86", "sm_90") + ("sm_89",) * everything
    fp8 = op.endswith("_fp8")
    without = {"sm_80", "sm_86", "sm_121", "gfx942"} if fp8 else set() if everything else {"sm_89"}
    return tuple(arch for arch in TARGETS if arch not in without)


Specializations = Callable[[str, bool], Iterator[Spec]]
SPECIALIZATIONS: dict[str, Specializations] = {}


def specializations(op: str) -> Callable[[Specializations], Specializations]:
    """Registers the function it decorates as what yields the specializations of `op`."""

    def register(function: Specializations) -> Specializations:
        SPECIALIZATIONS[op] = function
        return function

    return register


def table(arch: str) -> str:
    """The name kernels/launch.py knows a target by."""
    return "portable" if arch.startswith("gfx") else arch


@specializations("attention")
def _attention(arch: str, full: bool) -> Iterator[Spec]:
    def common(dtype: torch.dtype, head_dim: int, layout: str, precision: str, drops: bool) -> dict[str, Any]:
        return {
            "cu_seqlens_ptr": "*i32" if layout == "packed" else None,
            "key_mask_ptr": "*i1" if layout == "masked" else None,
            "seed_ptr": "*i64" if drops else None,
            "tiles_ptr": "*i32" if layout == "packed" else None,
            **dict.fromkeys(("c2p_ptr", "p2c_ptr"), None),
            "heads": 16,
            "rows": 4096,
            "max_seqlen": 512,
            "threshold": 6554,
            "kept_scale": 1.11,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "INPUT_PRECISION": precision,
        }

    def added(bias: bool) -> dict[str, Any]:
        return {"bias_ptr": "*fp32" if bias else None, "bias_span": 512, "inverse_scale": 8.0}

    def spec(
        dtype: torch.dtype,
        head_dim: int,
        layout: str,
        precision: str = "ieee",
        stats: bool = False,
        drops: bool = False,
        bias: bool = False,
        longest: int = 512,
        window: int | None = None,
    ) -> Spec:
        longest = longest if window is None else launch.SHORT
        config = launch.of_length(attention_config(table(arch), dtype, head_dim), longest)
        config = launch.of_bias(config, table(arch)) if bias or window is not None else config
        strides = {f"stride_{x}{axis}": 3 * 1024 if axis == "t" else head_dim for x in "qkv" for axis in "th"}
        return Spec(
            variant=f"{layout} {precision} d{head_dim}"
            + "".join(f" {name}" for name, there in (("stats", stats), ("dropout", drops), ("bias", bias)) if there)
            + (" window" if window is not None else " short" if longest <= launch.SHORT else ""),
            kernel=attention.attention_kernel,
            arguments={
                **({} if window is None else {"WINDOW": window}),
                **common(dtype, head_dim, layout, precision, drops),
                **{f"{name}_ptr": f"*{TYPE_NAMES[dtype]}" for name in ("q", "k", "v", "out")},
                "stats_ptr": "*fp32" if stats else None,
                **added(bias),
                "out_inverse_scale": 1.0,
                "scale_log2e": 0.18,
                **strides,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            },
            config=config,
        )

    def backward(
        dtype: torch.dtype,
        head_dim: int,
        layout: str,
        precision: str = "ieee",
        drops: bool = True,
        bias: bool = False,
        window: int | None = None,
    ) -> Iterator[Spec]:
        config = attention_backward_config(table(arch), dtype, head_dim)
        config = launch.of_bias(config, table(arch), backward=True) if bias else config
        pointer = f"*{TYPE_NAMES[dtype]}"
        for name, held, walked in (("kv", "BLOCK_N", "BLOCK_M"), ("q", "BLOCK_M", "BLOCK_N")):
            yield Spec(
                variant=f"d{name} {layout} {precision} d{head_dim}"
                + " dropout" * drops
                + " bias" * bias
                + (" window" if window is not None else ""),
                kernel=getattr(attention, f"attention_backward_{name}_kernel"),
                arguments={
                    **({} if window is None else {"WINDOW": window}),
                    **common(dtype, head_dim, layout, precision, drops),
                    **dict.fromkeys(("qkv_ptr", "grad_ptr", "dqkv_ptr"), pointer),
                    **dict.fromkeys(("stats_ptr", "delta_ptr"), "*fp32"),
                    **({"out_ptr": pointer, "ds_ptr": None, "keep_rate": 0.9} if name == "q" else {}),
                    **added(bias),
                    "scale": 0.125,
                    "scale_log2e": 0.18,
                    "stride_qt": 3 * 1024,
                    held: config.block_m,
                    walked: config.block_n,
                },
                config=config,
            )
        if not bias:
            return
        config = attention_dbias_config(table(arch), dtype, head_dim)
        shared = common(dtype, head_dim, layout, precision, drops)
        for absent in ("tiles_ptr", "c2p_ptr", "p2c_ptr"):
            del shared[absent]
        yield Spec(
            variant=f"dbias {layout} {precision} d{head_dim}" + " dropout" * drops,
            kernel=attention.attention_dbias_kernel,
            arguments={
                **shared,
                **dict.fromkeys(("qkv_ptr", "grad_ptr"), pointer),
                **added(True),
                **dict.fromkeys(("stats_ptr", "delta_ptr", "partial_ptr"), "*fp32"),
                "sequences": 32,
                "scale_log2e": 0.18,
                "stride_qt": 3 * 1024,
                "BLOCK": config.block_m,
            },
            config=config,
        )

    yield Spec(
        variant="tiles",
        kernel=attention.tiles_kernel,
        arguments={"cu_seqlens_ptr": "*i32", "tiles_ptr": "*i32", "sequences": 128, "entries": 300, "BLOCK": 64},
        config=Config(64, 64, 0, 4, 3),
        matrix=False,
    )
    for dtype in (torch.float16, torch.float32):  # whose partial sums differ in size alone
        yield Spec(
            variant=f"dbias sums {TYPE_NAMES[dtype]}",
            kernel=attention.attention_dbias_sum_kernel,
            arguments={
                **dict.fromkeys(("partial_ptr", "dbias_ptr"), "*fp32"),
                **{"chunks": 16, "heads": 12, "half": 512, "bias_span": 512},
                **{"PART": attention_dbias_config(table(arch), dtype, 64).block_m, "BLOCK": attention.SUM_BLOCK},
            },
            config=Config(1, attention.SUM_BLOCK, 0, 4, 3),
            matrix=False,
        )
    layouts = ("packed", "dense", "masked")
    if full:
        for head_dim in (16, 32, 40, 64, 80, 96, 128):
            for layout in layouts:
                for dtype in TYPE_NAMES:
                    yield spec(dtype, head_dim, layout)
                yield spec(torch.float32, head_dim, layout, "tf32")
                for drops in (False, True):
                    yield spec(torch.bfloat16, head_dim, layout, "ieee", drops, drops, longest=launch.SHORT)
                for dtype in TYPE_NAMES:
                    yield spec(dtype, head_dim, layout, bias=True)
                    for drops, bias in itertools.product((False, True), repeat=2):
                        yield spec(dtype, head_dim, layout, "ieee", True, drops, bias)
                        yield from backward(dtype, head_dim, layout, "ieee", drops, bias)
                for bias in (False, True):
                    yield from backward(torch.float32, head_dim, layout, "tf32", bias=bias)
                for dtype, drops in itertools.product(TYPE_NAMES, (False, True)):
                    yield spec(dtype, head_dim, layout, stats=drops, drops=drops, window=64)
                    yield from backward(dtype, head_dim, layout, "ieee", drops, window=64)
    else:
        yield spec(torch.bfloat16, 64, "packed", "ieee", True, True)
        yield spec(torch.bfloat16, 64, "packed", longest=launch.SHORT)
        yield from backward(torch.bfloat16, 64, "packed")
        yield from backward(torch.float16, 128, "masked", drops=False)
        yield from backward(torch.float32, 64, "masked")
        for head_dim, layout in ((16, "packed"), (32, "masked"), (40, "packed"), (64, "masked"), (128, "masked")):
            yield spec(torch.float16, head_dim, layout)
            yield spec(torch.float32, head_dim, layout)
        for layout in layouts:
            yield spec(torch.bfloat16, 64, layout)
        yield spec(torch.bfloat16, 80, "packed")
        yield spec(torch.bfloat16, 64, "packed", bias=True)
        yield spec(torch.float32, 64, "masked", bias=True)
        for dtype, head_dim, layout, drops in (
            (torch.bfloat16, 64, "packed", True),
            (torch.float16, 64, "dense", False),
            (torch.float16, 128, "masked", True),
            (torch.float16, 40, "packed", True),
            (torch.float32, 64, "masked", True),
            (torch.float32, 128, "packed", False),
        ):
            yield spec(dtype, head_dim, layout, "ieee", True, drops, True)
            yield from backward(dtype, head_dim, layout, "ieee", drops, True)
        yield spec(torch.bfloat16, 64, "packed", "ieee", True, True, True, launch.SHORT)
        yield from backward(torch.float32, 96, "masked", "tf32", True, True)
        for dtype, head_dim, layout in (
            (torch.bfloat16, 64, "packed"),
            (torch.float16, 64, "masked"),
            (torch.float16, 128, "masked"),
            (torch.float32, 64, "packed"),
        ):
            for drops in (False, True):
                yield spec(dtype, head_dim, layout, stats=drops, drops=drops, window=64)
                yield from backward(dtype, head_dim, layout, "ieee", drops, window=64)
        yield spec(torch.float32, 64, "packed", "tf32")
        yield spec(torch.float32, 128, "masked", "tf32")


@specializations("attention_fp8")
def _attention_fp8(arch: str, full: bool) -> Iterator[Spec]:
    """Attention in inference, its result in FP8."""
    for spec in _attention(arch, full):
        given = spec.arguments
        if spec.kernel is not attention.attention_kernel or given["stats_ptr"] is not None:
            continue
        if full or given["q_ptr"] == "*bf16" or given["HEAD_DIM"] == 40:
            yield replace(spec, arguments={**given, "out_ptr": "*fp8e4nv", "out_inverse_scale": 4.0})


@specializations("disentangled")
def _disentangled(arch: str, full: bool) -> Iterator[Spec]:
    sizes = {"heads": 16, "rows": 4096, "max_seqlen": 512, "reach": 512, "stride_qt": 3 * 1024}

    def family(
        dtype: torch.dtype,
        head_dim: int,
        kinds: str = "c2p p2c",
        layout: str = "packed",
        drops: bool = False,
        precision: str = "ieee",
        backward: bool = True,
        band: int | None = None,
    ) -> Iterator[Spec]:
        """Every kernel of a forward, and of a backward."""
        pointer, wide = f"*{TYPE_NAMES[dtype]}", "*fp32"
        tables = {kind: pointer if kind in kinds else None for kind in ("c2p", "p2c")}
        sequences = dict.fromkeys(("cu_seqlens_ptr", "tiles_ptr"), "*i32" if layout == "packed" else None)
        attend = {
            **{f"{kind}_ptr": table for kind, table in tables.items()},
            **sequences,
            "key_mask_ptr": "*i1" if layout == "masked" else None,
            "seed_ptr": "*i64" if drops else None,
            "bias_ptr": None,
            **{"threshold": 6554, "kept_scale": 1.11, "bias_span": 0, "inverse_scale": 8.0, "scale_log2e": 0.18},
            **{"heads": 16, "rows": 4096, "max_seqlen": 512},
        }

        def spec(
            name: str, kernel: Any, choose: Any, arguments: dict[str, Any], swapped: bool = False, matrix: bool = True
        ) -> Spec:
            config = choose(table(arch), dtype, head_dim)
            if name in ("attention", "dq") and layout == "masked":
                config = launch.of_mask(config, table(arch))
            held, walked = ("BLOCK_N", "BLOCK_M") if swapped else ("BLOCK_M", "BLOCK_N")
            shared = {
                "HEAD_DIM": head_dim,
                "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
                "INPUT_PRECISION": precision,
                held: config.block_m,
                walked: config.block_n,
                **({} if band is None else {"BAND": band}),
            }
            given = {name: value for name, value in {**shared, **arguments}.items() if name in kernel.arg_names}
            variant = f"{name} {kinds} {layout} {precision} d{head_dim}" + " dropout" * drops + " band" * bool(band)
            return Spec(variant, kernel, given, config, matrix)

        def by_kind(suffix: str, of: str) -> dict[str, Any]:
            return {f"{kind}{suffix}_ptr": table and of for kind, table in tables.items()}

        strides = {f"stride_{x}{axis}": 3 * 1024 if axis == "t" else head_dim for x in "qkv" for axis in "th"}
        position = {**by_kind("", pointer), "slots_ptr": "*i32", **sequences, **sizes, "scale": 0.125, "factor": 0.125}
        yield spec(
            "scores",
            disentangled.position_scores_kernel,
            launch.position_config,
            {**position, "qkv_ptr": pointer, **by_kind("_scores", pointer)},
        )
        yield spec(
            "attention",
            attention.attention_kernel,
            launch.disentangled_config,
            {
                **attend,
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer),
                **{"stats_ptr": wide, "out_inverse_scale": 1.0, **strides},
            },
        )
        if not backward:
            return
        for name, swapped in (("q", False), ("kv", True)):
            yield spec(
                f"d{name}",
                getattr(attention, f"attention_backward_{name}_kernel"),
                launch.disentangled_backward_config,
                {
                    **attend,
                    **dict.fromkeys(("qkv_ptr", "grad_ptr", "out_ptr", "dqkv_ptr"), pointer),
                    **dict.fromkeys(("stats_ptr", "delta_ptr"), wide),
                    **{"ds_ptr": tables["c2p"], "keep_rate": 0.9, "scale": 0.125, "stride_qt": 3 * 1024},
                },
                swapped,
            )
        gradients = {**position, **by_kind("_grad", pointer)}
        yield spec(
            "rows",
            disentangled.position_rows_kernel,
            launch.position_config,
            {**gradients, "dqkv_ptr": pointer, "delta_ptr": wide},
        )
        yield spec(
            "table",
            disentangled.position_table_kernel,
            launch.position_config,
            {**gradients, "qkv_ptr": pointer, "partial_ptr": wide, "sequences": 32},
        )
        counts = {"chunks": 4, "parts": 64, "distances": 1024, "slots": 512}
        given = {f"d{name}": table for name, table in by_kind("", pointer).items()}
        yield spec(
            "slots",
            disentangled.position_slots_kernel,
            launch.position_slots_config,
            {**position, **given, "partial_ptr": wide, "ends_ptr": wide if band else None, **counts},
            matrix=False,  # it adds up in float32
        )
        if band:
            yield spec(
                "ends",
                disentangled.position_ends_kernel,
                lambda *_: launch.POSITION_ENDS,
                {**gradients, "qkv_ptr": pointer, "delta_ptr": wide, "ends_ptr": wide, "sequences": 32, "FIRST": 0},
                matrix=False,  # it adds up in float32
            )

    both = "c2p p2c"
    if full:
        for head_dim, dtype in itertools.product((16, 32, 40, 64, 80, 96, 128), TYPE_NAMES):
            for kinds, layout in ((both, "packed"), (both, "dense"), ("c2p", "packed"), ("p2c", "packed")):
                yield from family(dtype, head_dim, kinds, layout, True)
            for layout, drops in (("packed", False), ("dense", False), ("masked", False), ("masked", True)):
                for spec in family(dtype, head_dim, both, layout, drops):
                    if spec.kernel.__name__.startswith("attention"):  # the others have neither masks nor dropout
                        yield spec
            if dtype is torch.float32:
                yield from family(dtype, head_dim, both, "packed", True, "tf32")
            banded = ((both, "packed", True), (both, "masked", False), ("c2p", "dense", False))
            for kinds, layout, drops in banded if arch.startswith("sm_") else ():  # as `disentangled._band` has it
                yield from family(dtype, head_dim, kinds, layout, drops, band=512)
            if arch.startswith("sm_") and dtype is torch.bfloat16:
                # With dropout, dQ of heads of 80 and 96 spills 8 bytes on sm_100; no model is known to have such heads.
                for kinds, drops in ((both, True), ("p2c", False))[head_dim in (80, 96) and arch == "sm_100" :]:
                    for spec in family(dtype, head_dim, kinds, "masked", drops, band=512):
                        if spec.kernel.__name__.startswith("attention"):
                            yield spec
    else:
        yield from family(torch.bfloat16, 64, both, "packed", True)
        if arch.startswith("sm_"):
            yield from family(torch.bfloat16, 64, both, "packed", False, band=512)
            yield from family(torch.float32, 32, "p2c", "masked", True, band=512)
        yield from family(torch.float16, 32, "p2c", "masked", True)
        yield from family(torch.float32, 64, both, "packed", True, "tf32")
        for spec in family(torch.bfloat16, 64, both, "masked", True):
            if spec.kernel.__name__.startswith("attention"):
                yield spec
        yield from family(torch.float32, 64, "c2p", "dense")
        for head_dim in (64, 128):
            yield from family(torch.bfloat16, head_dim, both, "packed", backward=False)
        for head_dim, band in ((40, None), (64, None), (128, 512)) if arch == "sm_100" else ():
            for spec in family(torch.bfloat16, head_dim, both, "masked", backward=False, band=band):
                if spec.kernel is attention.attention_kernel:
                    yield replace(spec, held=True)


@specializations("attention_map")
def _attention_map(arch: str, full: bool) -> Iterator[Spec]:
    def spec(dtype: torch.dtype, head_dim: int, layout: str, more: str = "", precision: str = "ieee") -> Spec:
        config, pointer = launch.attention_map_config(table(arch), dtype, head_dim), f"*{TYPE_NAMES[dtype]}"
        return Spec(
            variant=f"{layout} {precision} d{head_dim} {more}".strip(),
            kernel=attention_map.attention_map_kernel,
            arguments={
                **dict.fromkeys(("q_ptr", "k_ptr", "out_ptr"), pointer),
                **dict.fromkeys(("cu_seqlens_ptr", "tiles_ptr"), "*i32" if layout == "packed" else None),
                "places_ptr": "*i64" if layout == "packed" else None,
                "key_mask_ptr": "*i1" if layout == "masked" else None,
                "bias_ptr": "*fp32" if more == "bias" else None,
                **{f"{kind}_ptr": pointer if kind in more else None for kind in ("c2p", "p2c")},
                **{f"stride_{x}{axis}": 3 * 1024 if axis == "t" else head_dim for x in "qk" for axis in "th"},
                **{"heads": 16, "rows": 4096, "max_seqlen": 512, "width": 512, "bias_span": 512},
                **{"scale_log2e": 0.18, "inverse_scale": 8.0, "INPUT_PRECISION": precision, "HEAD_DIM": head_dim},
                "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                **({"WINDOW": 64} if more == "window" else {}),
            },
            config=config,
        )

    kinds = ("", "bias", "c2p p2c", "c2p", "p2c", "window")
    if full:
        layouts = ("packed", "dense", "masked")
        for head_dim, dtype in itertools.product((16, 32, 40, 64, 80, 96, 128), TYPE_NAMES):
            for layout, more in itertools.product(layouts, kinds):
                yield spec(dtype, head_dim, layout, more)
            if dtype is torch.float32:
                yield spec(dtype, head_dim, "packed", "c2p p2c", "tf32")
    else:
        yield spec(torch.bfloat16, 64, "packed", "c2p p2c")
        yield spec(torch.float16, 40, "masked", "bias")
        yield spec(torch.bfloat16, 64, "packed", "window")
        yield spec(torch.float32, 64, "dense", "c2p p2c")
        for head_dim in (64, 128):
            yield spec(torch.bfloat16, head_dim, "packed")


@specializations("linear")
def _linear(arch: str, full: bool) -> Iterator[Spec]:
    def backward(dtype: torch.dtype, n: int, k: int, gelu: str, precision: str = "ieee", gated: bool = False) -> Spec:
        config = linear_backward_config(table(arch), dtype, n, k)
        pointer = f"*{TYPE_NAMES[dtype]}"
        return Spec(
            variant=f"{'gated' if gated else 'gelu'} backward {gelu} {precision} n{n} k{k}",
            kernel=linear.linear_gelu_backward_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in ("grad", "w", "pre", "dpre", "act")},
                "m": 4096,
                "n": n,
                "k": k,
                "stride_gm": k,
                "GELU": gelu,
                "GATED": gated,
                "EVEN_K": k % config.block_k == 0,
                "INPUT_PRECISION": precision,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config=config,
            streams=not n % 16 and not k % 16,
        )

    def spec(
        dtype: torch.dtype,
        n: int,
        k: int,
        op: str,
        precision: str = "ieee",
        bias: bool = True,
        config: Config | None = None,
    ) -> Spec:
        config = config or linear_config(table(arch), dtype, n, k)
        pointer = f"*{TYPE_NAMES[dtype]}"
        segments = 3 if op == "qkv" else 1
        present = [pointer] * segments + [None] * (3 - segments)
        persistent = config.variant == "persistent"

        def block(rows: int) -> str:
            return f"tensordesc<{pointer[1:]}[{rows}, {config.block_k}]>"

        operands: dict[str, Any] = {
            "x_ptr": pointer,
            **{f"w{i}_ptr": pointer for i, pointer in enumerate(present)},
            "stride_xm": k,
            "EVEN_K": k % config.block_k == 0,
            "INPUT_PRECISION": precision,
        }
        # What the persistent kernel can't read by descriptors goes by pointers, in tiles for rows at any address.
        unaligned = config == UNALIGNED and dtype.itemsize == 2 and not n % 16 and not k % 16
        if unaligned:
            operands["stride_xm"] = k + 1
        if persistent:
            operands = {"x_desc": block(config.block_m)}
            operands |= {f"w{i}_desc": pointer and block(config.block_n) for i, pointer in enumerate(present)}
        return Spec(
            variant=f"{op} {precision} n{n} k{k}"
            + ("" if bias else " no bias")
            + (" persistent" if persistent else "")
            + (" unaligned" if unaligned else ""),
            kernel=linear.linear_persistent_kernel if persistent else linear.linear_kernel,
            arguments={
                **operands,
                **{f"b{i}_ptr": pointer if bias else None for i, pointer in enumerate(present)},
                "residual_ptr": pointer if op == "add" else None,
                "pre_ptr": pointer if op.endswith("pre") else None,
                "out_ptr": pointer,
                "m": 4096,
                "n": n,
                "k": k,
                "stride_rm": n if op == "add" else 0,
                "SEGMENTS": segments,
                "GELU": {"gelu": "none", "gelu_pre": "none", "gelu_tanh": "tanh"}.get(op, ""),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config=config,
            streams=not n % 16 and not k % 16 and not unaligned,
            unaligned=("x_ptr",) if unaligned else (),
        )

    ops = ("linear", "gelu", "gelu_pre", "gelu_tanh", "add", "qkv")
    tiles = LINEAR_TILES.get(table(arch), ())
    candidates = LINEAR_CANDIDATES.get(table(arch), ())
    precisions = [(dtype, "ieee") for dtype in TYPE_NAMES]
    if arch.startswith("sm_"):
        precisions.append((torch.float32, "tf32"))
    if full:
        # Sizes count only by table entry and by what divides them.
        shapes = ((1024, 1024), (4096, 1024), (1040, 1040), (100, 70), (100, 1024))
        for (n, k), (dtype, precision) in itertools.product(shapes, precisions):
            for op in ops:
                yield spec(dtype, n, k, op, precision)
            for op in ("linear", "qkv"):
                yield spec(dtype, n, k, op, precision, bias=False)
            for gelu in ("none", "tanh"):
                yield backward(dtype, n, k, gelu, precision)
            for gelu in ("none", "tanh", "silu"):
                yield backward(dtype, n, k, gelu, precision, gated=True)
        for config, dtype, op, k in itertools.product(
            (*tiles, *candidates), (torch.float16, torch.bfloat16), ops, (1024, 1040)
        ):
            yield spec(dtype, 1024, k, op, config=config)
        for dtype, op in itertools.product((torch.float16, torch.bfloat16), ops):
            yield spec(dtype, 1024, 1024, op, config=UNALIGNED)
    else:
        for config, op in zip(tiles, ("gelu_tanh", "linear", "add", "gelu_pre", "qkv", "gelu"), strict=False):
            yield spec(torch.bfloat16, 1024, 1024, op, config=config)
        for op in ("gelu_pre", "add", "qkv"):
            yield spec(torch.bfloat16, 1024, 1024, op, config=UNALIGNED)
        for config, op in zip(candidates, itertools.cycle(("gelu_pre", "qkv", "add")), strict=False):
            yield spec(torch.bfloat16, 1024, 1024, op, config=config)
        for number, op in enumerate(ops):  # an n on either side of where the tile may change, or one where it doesn't
            found = spec(torch.bfloat16, 1024, 1024, op), spec(torch.float16, 4096, 1024, op)
            yield from found if found[0].config != found[1].config else found[number % 2 :][:1]
        for dtype, precision in precisions:
            yield spec(dtype, 100, 70, "gelu", precision)
            yield spec(dtype, 1024, 1040, "add", precision)
        yield spec(torch.bfloat16, 4096, 1024, "linear", bias=False)
        yield backward(torch.bfloat16, 4096, 1024, "none")
        yield backward(torch.float16, 4096, 1024, "tanh")
        yield backward(torch.float16, 100, 70, "none")
        yield backward(torch.float32, 4096, 1024, "none")
        for dtype, gelu in ((torch.bfloat16, "none"), (torch.float16, "silu"), (torch.float32, "tanh")):
            yield backward(dtype, 1152, 768, gelu, gated=True)


@specializations("linear_fp8")
def _linear_fp8(arch: str, full: bool) -> Iterator[Spec]:
    def spec(
        dtype: torch.dtype, n: int, k: int, op: str, rows: bool, bias: bool = True, config: Config | None = None
    ) -> Spec:
        config = config or linear_fp8_config(table(arch), n, k)
        pointer = f"*{TYPE_NAMES[dtype]}"
        to_fp8 = op.startswith("gelu") and not rows
        return Spec(
            variant=f"{op} n{n} k{k}" + (" rows" if rows else "") + ("" if bias else " no bias"),
            kernel=linear_fp8_kernel,
            arguments={
                "x_ptr": "*fp8e4nv",
                "w_ptr": "*fp8e4nv",
                "row_scale_ptr": "*fp32" if rows else None,
                "col_scale_ptr": "*fp32",
                "bias_ptr": pointer if bias else None,
                "residual_ptr": pointer if op == "add" else None,
                "out_ptr": "*fp8e4nv" if to_fp8 else pointer,
                "m": 4096,
                "n": n,
                "k": k,
                "stride_rm": n if op == "add" else 0,
                "inverse_scale": 4.0,
                "GELU": {"gelu": "none", "gelu_tanh": "tanh"}.get(op, ""),
                "EVEN_K": k % config.block_k == 0,
                "EXACT_K": min(FP8_EXACT_K, config.block_k),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config=config,
            streams=n % 16 == 0,
        )

    ops = ("linear", "gelu", "gelu_tanh", "add")
    tiles = LINEAR_FP8_TILES.get(table(arch), ())
    if full:
        for (n, k), dtype, op, rows in itertools.product(
            ((1024, 1024), (4096, 1024), (1040, 1040), (100, 80)), TYPE_NAMES, ops, (False, True)
        ):
            yield spec(dtype, n, k, op, rows)
            yield spec(dtype, n, k, op, rows, bias=False)
        for config, dtype, op, k in itertools.product(tiles, TYPE_NAMES, ops, (1024, 1040)):
            yield spec(dtype, 1024, k, op, True, config=config)
    else:
        for op, rows in itertools.product(ops, (False, True)):
            yield spec(torch.bfloat16, 4096, 1024, op, rows)
        for config, op in zip(tiles[1:], ("add", "linear", "gelu"), strict=False):
            yield spec(torch.bfloat16, 1024, 1024, op, True, config=config)
        yield spec(torch.float16, 100, 80, "add", True)
        yield spec(torch.float32, 3072, 1024, "linear", False, bias=False)


@specializations("linear_gated")
def _linear_gated(arch: str, full: bool) -> Iterator[Spec]:
    def spec(dtype: torch.dtype, n: int, k: int, activation: str, bias: bool, keep: bool = False) -> Spec:
        config = linear_gated_config(arch, dtype, n, k)
        pointer = f"*{TYPE_NAMES[dtype]}"
        return Spec(
            variant=f"{activation} n{n} k{k}" + ("" if bias else " no bias") + (" kept" if keep else ""),
            kernel=linear_gated_kernel,
            arguments={
                "x_ptr": pointer,
                **{f"{name}_ptr": pointer for name in ("gate", "up")},
                **{f"{name}_bias_ptr": pointer if bias else None for name in ("gate", "up")},
                "pre_ptr": pointer if keep else None,
                "out_ptr": pointer,
                "m": 4096,
                "n": n,
                "k": k,
                "stride_xm": k,
                "ACTIVATION": activation,
                "EVEN_K": k % config.block_k == 0,
                "INPUT_PRECISION": "ieee",
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config=config,
            streams=dtype.itemsize == 2 and n % 16 == 0,
        )

    shapes = ((1152, 768), (2624, 1024), (100, 80)) if full else ((1152, 768), (100, 80))
    for (n, k), dtype, activation in itertools.product(shapes, TYPE_NAMES, GATES):
        for bias in (False, True) if full else (activation == "silu",):
            yield spec(dtype, n, k, activation, bias)
            yield spec(dtype, n, k, activation, bias, keep=True)


@specializations("linear_int8")
def _linear_int8(arch: str, full: bool) -> Iterator[Spec]:
    def spec(dtype: torch.dtype, n: int, k: int, op: str, bias: bool = True) -> Spec:
        config = linear_int8_config(arch, n, k)
        pointer = f"*{TYPE_NAMES[dtype]}"
        return Spec(
            variant=f"{op} n{n} k{k}" + ("" if bias else " no bias"),
            kernel=linear_int8_kernel,
            arguments={
                "x_ptr": "*i8",
                "w_ptr": "*i8",
                "row_scale_ptr": "*fp32",
                "row_zero_ptr": "*i32",
                "col_scale_ptr": "*fp32",
                "col_sum_ptr": "*i32",
                "bias_ptr": pointer if bias else None,
                "residual_ptr": pointer if op == "add" else None,
                "out_ptr": pointer,
                "m": 4096,
                "n": n,
                "k": k,
                "stride_rm": n if op == "add" else 0,
                "GELU": {"gelu": "none", "gelu_tanh": "tanh"}.get(op, ""),
                "EVEN_K": k % config.block_k == 0,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config=config,
            streams=n % 16 == 0,
        )

    shapes = ((1024, 1024), (4096, 1024), (1040, 1040), (100, 80)) if full else ((1024, 1024), (100, 80))
    for (n, k), dtype, op in itertools.product(shapes, TYPE_NAMES, ("linear", "gelu", "gelu_tanh", "add")):
        yield spec(dtype, n, k, op)
        if full:
            yield spec(dtype, n, k, op, bias=False)


WIDTHS = (128, 384, 768, 1024, 4096)


@specializations("quantize_int8")
def _quantize_int8(arch: str, full: bool) -> Iterator[Spec]:
    for width, dtype, normalizes, smooth in itertools.product(
        WIDTHS if full else (1024,), TYPE_NAMES, (False, True), (False, True)
    ):
        config = row_config(dtype, width)
        pointer = f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"{'norm ' if normalizes else ''}{'smooth ' if smooth else ''}h{width}",
            kernel=quantize_int8_kernel,
            arguments={
                "x_ptr": pointer,
                **{f"{name}_ptr": pointer if normalizes else None for name in ("weight", "bias")},
                "factors_ptr": "*fp32" if smooth else None,
                "normal_ptr": pointer if normalizes else None,
                "out_ptr": "*i8",
                "scale_ptr": "*fp32",
                "zero_ptr": "*i32",
                "width": width,
                "stride_xm": width,
                "eps": 1e-12,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )


@specializations("quantize_fp8")
def _quantize_fp8(arch: str, full: bool) -> Iterator[Spec]:
    for width, dtype, normalizes, given in itertools.product(
        WIDTHS if full else (1024,), TYPE_NAMES, (False, True), (False, True)
    ):
        config = row_config(dtype, width)
        pointer = f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"{'norm ' if normalizes else ''}h{width}" + ("" if given else " rows"),
            kernel=quantize_fp8_kernel,
            arguments={
                "x_ptr": pointer,
                **{f"{name}_ptr": pointer if normalizes else None for name in ("weight", "bias", "normal")},
                "out_ptr": "*fp8e4nv",
                "scale_ptr": None if given else "*fp32",
                "width": width,
                "stride_xm": width,
                "eps": 1e-12,
                "inverse_scale": 4.0,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )


@specializations("layer_norm")
def _layer_norm(arch: str, full: bool) -> Iterator[Spec]:
    dropout = {"threshold": 6554, "kept_scale": 1.11}
    for width, dtype, op in itertools.product(WIDTHS if full else (384, 1024), TYPE_NAMES, ("", "add ", "drop ")):
        config = row_config(dtype, width)
        pointer = f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"{op}h{width}",
            kernel=layer_norm_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in ("x", "weight", "bias", "out")},
                "residual_ptr": pointer if op else None,
                "seed_ptr": "*i64" if op == "drop " else None,
                "width": width,
                "stride_xm": width,
                "stride_rm": width if op else 0,
                "eps": 1e-12,
                **dropout,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )
    for width, dtype, drops in itertools.product(WIDTHS if full else (1024,), TYPE_NAMES, (False, True)):
        config = row_backward_config(dtype, width)
        pointer = f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"{'drop ' if drops else ''}backward h{width}",
            kernel=add_layer_norm_backward_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in ("grad", "x", "residual", "weight", "dresidual")},
                "dx_ptr": pointer if drops else None,
                "seed_ptr": "*i64" if drops else None,
                **dict.fromkeys(("dweight_ptr", "dbias_ptr"), "*fp32"),
                "rows": 4096,
                "width": width,
                "stride_xm": width,
                "stride_rm": width,
                "eps": 1e-12,
                **dropout,
                "ROWS": config.block_m,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )


@specializations("rms_norm")
def _rms_norm(arch: str, full: bool) -> Iterator[Spec]:
    for width, dtype in itertools.product(WIDTHS if full else (768, 2304), TYPE_NAMES):
        config, pointer = row_config(dtype, width), f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"h{width}",
            kernel=rms_norm_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in ("x", "weight", "out")},
                **{"width": width, "stride_xm": width, "eps": 1e-5, "BLOCK_H": config.block_n},
            },
            config=config,
            matrix=False,
        )


@specializations("rotary")
def _rotary(arch: str, full: bool) -> Iterator[Spec]:
    for head_dim, dtype, back in itertools.product((16, 32, 40, 64, 80, 128), TYPE_NAMES, (False, True)):
        config, pointer = launch.rotary_config(dtype, head_dim // 2), f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"{'back ' if back else ''}d{head_dim}",
            kernel=rotate_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in ("qkv", "cosines", "sines", "out")},
                **{"rows": 4096, "heads": 12, "stride_t": 36 * head_dim, "stride_third": 12 * head_dim},
                **{"HALF": head_dim // 2, "BACK": back, "BLOCK_M": config.block_m, "BLOCK_D": config.block_n},
            },
            config=config,
            matrix=False,
        )


@specializations("embedding")
def _embedding(arch: str, full: bool) -> Iterator[Spec]:
    tables = ("word", "token_type", "position")
    for width, dtype in itertools.product(WIDTHS if full else (1024,), TYPE_NAMES):
        config = row_config(dtype, width)
        yield Spec(
            variant=f"h{width}",
            kernel=embedding_kernel,
            arguments={
                **{f"{name}_ptr": f"*{TYPE_NAMES[dtype]}" for name in (*tables, "weight", "bias", "out")},
                **{f"{name}_ids_ptr": "*i64" for name in ("input", "token_type", "position")},
                "words": 30522,
                "token_types": 2,
                "positions": 512,
                "width": width,
                "eps": 1e-12,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )
    for width, dtype in itertools.product(WIDTHS if full else (1024,), TYPE_NAMES):
        config = row_backward_config(dtype, width)
        pointer = f"*{TYPE_NAMES[dtype]}"
        yield Spec(
            variant=f"backward h{width}",
            kernel=embedding_backward_kernel,
            arguments={
                **{f"{name}_ptr": pointer for name in (*tables, "grad", "weight", "dtotal")},
                **{f"{name}_ids_ptr": "*i64" for name in ("input", "token_type", "position")},
                **dict.fromkeys(("dweight_ptr", "dbias_ptr"), "*fp32"),
                "rows": 4096,
                "words": 30522,
                "token_types": 2,
                "positions": 512,
                "width": width,
                "eps": 1e-12,
                "ROWS": config.block_m,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )


@specializations("cross_entropy")
def _cross_entropy(arch: str, full: bool) -> Iterator[Spec]:
    for dtype in TYPE_NAMES:
        for name, kernel, others in (
            ("forward", cross_entropy_kernel, ("loss_ptr", "lse_ptr")),
            ("backward", cross_entropy_backward_kernel, ("lse_ptr", "grad_ptr")),
        ):
            yield Spec(
                variant=name,
                kernel=kernel,
                arguments={
                    "logits_ptr": f"*{TYPE_NAMES[dtype]}",
                    "labels_ptr": "*i64",
                    **dict.fromkeys(others, "*fp32"),
                    "width": 30522,
                    "BLOCK_N": VOCABULARY_BLOCK,
                },
                config=Config(1, VOCABULARY_BLOCK, 0, 4, 1),
                matrix=False,
            )


def _mask_layout() -> Iterator[Spec]:
    shared = {
        "mask_ptr": "*i1",
        "counts_ptr": "*i32",
        "totals_ptr": "*i64",
        "batch": 32,
        "seqlen": 384,
        "group": 16,
        "BLOCK": MASK_LAYOUT.block_n,
        "PROGRAMS": PROGRAMS,
    }
    yield Spec(variant="mask counts", kernel=mask_counts_kernel, arguments=shared, config=MASK_LAYOUT, matrix=False)
    for labels, counts in itertools.product((None, "*i64"), (None, "*i32")):
        yield Spec(
            variant="mask layout" + (" with labels" if labels else "") + (" of many rows" if counts else ""),
            kernel=mask_layout_kernel,
            arguments={
                **shared,
                "labels_ptr": labels,
                "counts_ptr": counts,
                "cu_seqlens_ptr": "*i32",
                **{f"{name}_ptr": "*i64" for name in ("indices", "inverse")},
            },
            config=MASK_LAYOUT,
            matrix=False,
        )


@specializations("padding")
def _padding(arch: str, full: bool) -> Iterator[Spec]:
    yield from _mask_layout()
    for width, dtype, first in itertools.product(WIDTHS if full else (1024,), TYPE_NAMES, (0, -1)):
        config = row_config(dtype, width)
        yield Spec(
            variant=f"{'unpack' if first else 'pack'} h{width}",
            kernel=gather_rows_kernel,
            arguments={
                **{f"{name}_ptr": f"*{TYPE_NAMES[dtype]}" for name in ("x", "out")},
                "index_ptr": "*i64",
                "rows": 4096,
                "width": width,
                "stride_xm": width,
                "FIRST": first,
                "BLOCK_H": config.block_n,
            },
            config=config,
            matrix=False,
        )


def _dtype(spec: Spec) -> str:
    """The dtype that a kernel works in, as rows name it."""
    names = {*TYPE_NAMES.values(), "fp8e4nv", "i8"}
    pointers = (v[1:] for v in spec.arguments.values() if isinstance(v, str))
    return next((name for name in pointers if name in names), "integer")


def _of_each_kind(found: list[Spec]) -> list[Spec]:
    """Of each kernel, in each configuration, size of an element and kind of arithmetic, the one with most operands.

    That takes the most registers: the others' code is Hopper's, and part of its own.
    """
    kept: dict[tuple[Any, ...], Spec] = {}
    for spec in found:
        given = spec.arguments
        kind = given.get("INPUT_PRECISION"), bool(given.get("GELU")), given.get("HEAD_DIM") == given.get("BLOCK_D")
        key = spec.kernel.__name__, spec.config, _dtype(spec).replace("bf16", "fp16"), *kind
        operands = sum(isinstance(value, str) for value in given.values())
        if key not in kept or operands > sum(isinstance(value, str) for value in kept[key].arguments.values()):
            kept[key] = spec
    return list(kept.values()) + [spec for spec in found if spec.held and spec not in kept.values()]


def _few(found: list[Spec], arch: str) -> list[Spec]:
    """Of each kernel one, with most operands: for matrices in 16 bits or FP8, and on sm_80 in float32, too.

    Of the others' code architectures differ less: they are compiled for sm_90 in 16 bits, and for gfx942 in float32.
    """

    def weight(spec: Spec) -> tuple[int, bool, bool, int]:
        operands = sum(isinstance(value, str) for value in spec.arguments.values())
        return operands, spec.streams, spec.arguments.get("HEAD_DIM") == 64, spec.config.block_m

    kept: dict[tuple[str, bool], Spec] = {}
    for spec in sorted(found, key=weight):
        name, wide = spec.kernel.__name__, _dtype(spec) == "fp32"
        if spec.matrix and (arch == "sm_80" or not wide):
            kept[name, wide] = spec
        elif (
            not spec.matrix
            and arch in ("sm_90", "gfx942")
            and (wide is (arch == "gfx942") or (name, False) not in kept)
        ):
            kept[name, False] = spec
    return list(kept.values()) + [spec for spec in found if spec.held and spec not in kept.values()]


def specs(op: str, arch: str, which: str) -> list[Spec]:
    """The specializations of an op; on Hopper with one more of each kernel ("full": of each) that is launched early.

    Elsewhere, but for "full" and architectures that are compiled by name alone, no more than `_of_each_kind`.
    """
    found = list(SPECIALIZATIONS[op](arch, which == "full"))
    if which == "few":
        return _few(found, arch)
    if which != "full" and arch != "sm_90" and arch not in launch.LIKE:
        return _of_each_kind(found)
    early, seen = [], set()
    for spec in found if arch == "sm_90" else []:
        known = "DEPENDENT" in spec.kernel.arg_names and "*bf16" in spec.arguments.values()
        if known and (which == "full" or spec.kernel.__name__ not in seen):
            seen.add(spec.kernel.__name__)
            arguments = {**spec.arguments, "DEPENDENT": True}
            early.append(replace(spec, variant=f"{spec.variant} early", arguments=arguments))
    return found + early


# What touches global memory.
_GLOBAL = re.compile(r"\b(ld\.global|st\.global|ld\.volatile|cp\.async|cp\.reduce|atom\.|red\.)")


def _waits_first(ptx: str) -> bool:
    """Whether a kernel waits for the one before it ahead of anything that touches global memory, and of any return."""
    lines = ptx.splitlines()
    first = next(
        i for i, line in enumerate(lines) if _GLOBAL.search(line) or re.search(r"\bret;|\bexit;|\bbra\b", line)
    )
    return any("griddepcontrol.wait" in line for line in lines[:first])


def _source(spec: Spec) -> ASTSource:
    """What the just-in-time compiler would be given for a launch with these arguments."""
    parameters = spec.kernel.params
    defaults = {p.name for p in parameters if p.has_default}
    if unknown := (spec.arguments.keys() ^ {p.name for p in parameters}) - defaults:
        raise ValueError(f"{spec.kernel.__name__}: arguments and parameters differ in {sorted(unknown)}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for p in parameters:
        value = spec.arguments.get(p.name, p.default)
        specialize = not p.do_not_specialize
        if p.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, str):
            signature[p.name] = value
            aligned = not p.do_not_specialize_on_alignment and p.name not in spec.unaligned
            if value.startswith("*") and aligned:
                attributes[(p.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        elif isinstance(value, int) and not isinstance(value, bool):
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(p.num,)] = [["tt.divisibility", 16]]
        else:
            raise TypeError(f"{spec.kernel.__name__}: {p.name} is {value!r}; expected a pointer type, a number or None")
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _cuda_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spill_bytes": found["STACK"] + found["LOCAL"]}


def _hip_usage(assembly: str) -> dict[str, int]:
    def value(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])

    spilled = 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))
    return {"registers": value("vgpr_count"), "spill_bytes": max(spilled, value("private_segment_fixed_size"))}


# Of these, what the loop of a kernel that streams is made of, besides arithmetic and branches.
STREAM = {
    **dict.fromkeys(
        ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
        re.compile(r"mma\.m16n8k(16|32)|cp\.async\.16|ldmatrix\.shared|other"),
    ),
    "sm_90": re.compile(r"wgmma\.m64n\d+k(16|32)|cp\.async\.16|tma|other"),
}


def _violations(row: dict[str, Any], spec: Spec) -> list[str]:
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > (limit := SHARED_LIMIT[row["arch"]]):
        found.append(f"takes {row['shared_bytes']} bytes of shared memory, of {limit}")
    if row["dtype"] != "fp32":
        if row["arch"] == "sm_90" and spec.matrix and not row["wgmma"]:
            found.append("has no wgmma")
        if spec.streams and (allowed := STREAM.get(row["arch"])):
            loop = row["loop"]
            found += [f"has {kind} in its main loop" for kind in loop if not allowed.fullmatch(kind)]
            if not matrix(loop) or ("tma" in loop) == ("cp.async.16" in loop):
                found.append("has no main loop of copies and matrix instructions")
    return found


def compile_one(op: str, arch: str, spec: Spec) -> dict[str, Any]:
    """Compiles one specialization; the row this harness prints, with what is wrong under "violations"."""
    config = spec.config
    row: dict[str, Any] = {
        "op": op,
        "variant": spec.variant,
        "dtype": _dtype(spec),
        "arch": arch,
        "config": [config.block_m, config.block_n, config.block_k],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    options: dict[str, Any] = dict(launch.options(config))
    if spec.kernel.debug:
        options |= {"debug": True, "sanitize_overflow": False}
    try:
        compiled = triton.compile(_source(spec), target=TARGETS[arch], options=options)
    except Exception as error:  # the compiler raises whatever it likes, and a row is what reports it
        return row | {"error": str(error), "violations": [f"doesn't compile: {str(error).strip().splitlines()[-1:]}"]}
    if arch.startswith("sm_"):
        ptx = compiled.asm["ptx"]
        row |= _cuda_usage(compiled.asm["cubin"]) | {"wgmma": "wgmma.mma_async" in ptx, "tcgen05": "tcgen05.mma" in ptx}
        row["loop"] = main_loop(ptx) if spec.matrix else {}
    else:
        row |= _hip_usage(compiled.asm["amdgcn"])
    row["shared_bytes"] = compiled.metadata.shared
    row["violations"] = _violations(row, spec)
    if spec.arguments.get("DEPENDENT") and not _waits_first(compiled.asm["ptx"]):
        row["violations"].append("does not begin by waiting for the kernel before it")
    return row


def _job(op: str, arch: str, which: str, index: int) -> dict[str, Any]:
    # Kernels don't pickle: a worker finds its specialization by its place.
    return compile_one(op, arch, specs(op, arch, which)[index])


def _table_line(row: dict[str, Any]) -> tuple[Any, ...]:
    tile = "x".join(str(n) for n in row["config"] if n)
    cost = (row.get("registers", ""), row.get("shared_bytes", ""))
    schedule = (row["num_warps"], row["num_stages"])
    loop = ", ".join(f"{number} {kind}" for kind, number in row.get("loop", {}).items())
    return (
        row["arch"],
        row["op"],
        row["variant"],
        row["dtype"],
        tile,
        *schedule,
        *cost,
        "; ".join(row["violations"]),
        loop,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", choices=TARGETS, help="default: all but those that go by the tables of another"
    )
    parser.add_argument("--op", nargs="+", choices=SPECIALIZATIONS, default=list(SPECIALIZATIONS))
    which = parser.add_mutually_exclusive_group()
    for name, chosen in (("few", "one of each kernel"), ("full", "every specialization")):
        which.add_argument(
            f"--{name}",
            dest="which",
            action="store_const",
            const=name,
            default="",
            help=f"{chosen}, not a representative set",
        )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes to compile in")
    options = parser.parse_args(argv)

    jobs = [
        (op, arch, options.which, index)
        for arch in options.arch or [arch for arch in TARGETS if arch not in launch.LIKE]
        for op in options.op
        if arch in targets(op, everything=options.which == "full" or bool(options.arch))
        for index, _ in enumerate(specs(op, arch, options.which))
    ]
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(_job, *zip(*jobs, strict=True)):
            print(json.dumps(row), flush=True)
            rows.append(row)

    print()
    header = ("arch", "op", "variant", "dtype", "tile", "warps", "stages", "regs", "shared", "violations", "main loop")
    for line in [header, *map(_table_line, rows)]:
        print("{:7} {:13} {:36} {:5} {:>10} {:>5} {:>6} {:>4} {:>6}  {:10}  {}".format(*line))
    bad = sum(bool(row["violations"]) for row in rows)
    print(f"triton {triton.__version__}: {len(rows)} compiled, {bad} in violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
