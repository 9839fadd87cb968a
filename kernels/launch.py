"""Launch configurations: data, per architecture, each with its reason; and the pure functions that choose one.

Nothing here touches a device except `architecture`. No autotuning: the same shape always gets the same configuration,
of the tables or of what `use` was given, which comes from `fastbert tune`.
A row's result doesn't depend on what it is batched with: a configuration depends on the number of rows only among tiles
that give each element of the result the same operations in the same order, and only where `LINEAR_TILES` says so.
PyTorch's GEMMs, whose rows do depend on it, are chosen only where a launcher is told that they may.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One launch configuration of a tiled kernel. Tile sizes are in elements, 0 where there is none."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    variant: str = ""
    """Which of the operation's kernels; "" is the one that every GPU and every shape runs."""
    group_m: int = 8
    """Of GEMMs: rows of tiles walked through column by column together, their operand in the L2 cache meanwhile."""
    programs: int = 0
    """Programs an SM, each of which walks through tiles; 0: one program a tile."""
    max_registers: int = 0
    """Registers a thread that the compiler may take: where left alone it takes as many as no second program has room
    for and gains nothing, or stops at fewer and spills; 0: its choice. NVIDIA only."""


MEASURED: dict[str, str] = {}
"""By architecture, what its configurations below were measured on. One that isn't here has them from the compiler's
figures: registers, shared memory, programs an SM."""

VARIANTS = ("", "persistent")
"""What `Config.variant` may be. "persistent", of 16-bit GEMMs: `programs` an SM, each of which walks through
tiles that the tensor memory accelerator loads; for sm_90 and later."""
LIBRARY = "library"
"""One more, of GEMMs: PyTorch's, by cuBLAS, then what the epilogue does, pass by pass. It chooses among kernels by the
number of rows, so a row depends on what it is batched with: chosen only where `batch_invariant` is False."""
batch_invariant = True
"""Whether a row's result must not depend on what it is batched with; see `set_batch_invariant`."""


Choose = Callable[..., Config]
"""What chooses for one operation: a function below, or a test's own."""
Key = tuple[object, ...]
"""An operation's name and what its configuration is chosen by, as `use` takes them."""
P = ParamSpec("P")


class _Operation(NamedTuple):
    choose: Callable[..., Config]
    """Of the tables, uncached."""
    choice: Any
    """What `use` was given or the tables have, cached."""
    free: tuple[str, ...]
    """The fields of a configuration that others could be tried for; the others say what the kernel computes."""
    most: int
    """Of block_m and block_n: with larger ones the kernel would compute something else."""

    def parameters(self) -> tuple[str, ...]:
        """Names of what a key has: what a configuration is chosen by, rows as `row_class` tells."""
        return tuple(name for name in inspect.signature(self.choose).parameters if name not in _BEYOND_KEYS)


OPERATIONS: dict[str, _Operation] = {}
"""What the functions below choose for, by name: "linear" is `linear_config`."""
_tuned: dict[Key, Config] = {}
_plans: list[Any] = []
_library: frozenset[Key] = frozenset()
_BEYOND_KEYS = ("multiprocessors", "batch_invariant")
"""Parameters of a choice that no key has: the first is the GPU's, which a file of `fastbert tune` is made for; the
second is the process's."""
CHOICES = 1 << 14
"""Choices kept for each operation: of the numbers of rows met last, four GEMMs each."""
_Plan = TypeVar("_Plan", bound=Callable[..., object])
_Table = TypeVar("_Table")


def _tunable(*free: str, most: int = 512) -> Callable[[Callable[P, Config]], Callable[P, Config]]:
    """Caches a function that chooses, and lets what `use` was given come before it; `most` as `_Operation` has it."""

    def decorate(choose: Callable[P, Config]) -> Callable[P, Config]:
        operation, signature = choose.__name__.removesuffix("_config"), inspect.signature(choose)

        @functools.lru_cache(CHOICES)
        @functools.wraps(choose)
        def choice(*args: P.args, **kwargs: P.kwargs) -> Config:
            if not _tuned and not _library:
                return choose(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            if "rows" in given:
                given["rows"] = row_class(given["rows"])
            key = (operation, *(value for name, value in given.items() if name not in _BEYOND_KEYS))
            if key in _library and not given["batch_invariant"]:
                return BY_LIBRARY
            return _tuned.get(key) or choose(*args, **kwargs)

        OPERATIONS[operation] = _Operation(choose, choice, free, most)
        return choice  # type: ignore[return-value]

    return decorate


def planned(plan: _Plan) -> _Plan:
    """Caches a function of hashable arguments that makes ready what launches of one kind share, until `use` is called.

    What it calls to choose a configuration is among its arguments: tests have others choose.
    """
    cached = functools.lru_cache(CHOICES)(plan)
    _plans.append(cached)
    return cached  # type: ignore[return-value]


def use(configurations: Mapping[Key, Config], library: Iterable[Key] = ()) -> None:
    """From now on these come before the tables, in place of what an earlier call gave; {} is the tables alone.

    Args:
        configurations: by operation and every argument of the function that chooses for it but the GPU's and the
            process's, as ("linear", "sm_90", torch.bfloat16, 4096, 1024, 1, 8192); one holds for all numbers of rows
            of its `row_class`.
        library: such keys of "linear" for which PyTorch's GEMM comes before both, where `set_batch_invariant` allows.
    """
    global _tuned, _library
    _tuned, _library = dict(configurations), frozenset(library)
    for operation in OPERATIONS.values():
        operation.choice.cache_clear()
    for plan in _plans:
        plan.cache_clear()


def set_batch_invariant(enabled: bool) -> None:
    """Whether a row's result must be the same bits whatever else is in the batch (the default).

    False lets launchers take PyTorch's GEMMs, by cuBLAS, where a table or what `use` was given has them as faster.
    """
    global batch_invariant
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled is {enabled!r}; expected True or False")
    batch_invariant = enabled


def in_use() -> dict[Key, Config]:
    """What `use` was given last."""
    return dict(_tuned)


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip or device.type != "cuda":
        return "portable"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """The name the tables below know `device` by: "sm_90" and so on, or "portable" where it is no NVIDIA GPU."""
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return _architecture(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of `device`; 0 where it is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


LIKE = {"sm_86": "sm_89", "sm_103": "sm_100", "sm_120": "sm_89", "sm_121": "sm_89"}
"""Architectures that go by another's tables, where a table doesn't have them: of its shared memory and instructions.

Consumer Blackwell (sm_120, sm_121) multiplies by mma.sync out of 99 KiB, as Ada does, without wgmma or tcgen05.
"""


def _of(tables: Mapping[str, _Table], arch: str) -> _Table:
    """The architecture's own table, that of the one it is like, or "portable"."""
    return tables[next(name for name in (arch, LIKE.get(arch, "portable"), "portable") if name in tables)]


DEPENDENT: dict[str, bool] = {
    "sm_90": False,  # counted: 0.89 -> 0.72 ms for one text of 128 in a graph, nothing for long batches; unmeasured
    "sm_100": False,  # as sm_90
}
"""Architectures, sm_90 or later, and whether their kernels are launched before the one before has ended: see
kernels/dependent.py. True where a device shows it faster (`fastbert bench --peers graphs-pdl`) and right (make gpu)."""


def is_dependent(arch: str) -> bool:
    """Whether `arch` has programmatic dependent launch on."""
    return DEPENDENT.get(arch, False)


def dependent(arch: str) -> dict[str, bool]:
    """What a launch adds to its constants for programmatic dependent launch; nothing where that is off."""
    return {"DEPENDENT": True, "launch_pdl": True} if is_dependent(arch) else {}


def float32_precision() -> str:
    """How PyTorch multiplies float32 on NVIDIA GPUs: "tf32", or another word, by which it is IEEE.

    Whatever set it: `torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32`, or `fp32_precision`
    of `torch.backends` and what is below; each of their own getters fails where another has been used.
    """
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision


def input_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies matrices: "ieee" or, for float32 where allowed, "tf32".

    As stock does: by `float32_precision`, on NVIDIA GPUs.
    """
    if dtype is not torch.float32 or torch.version.hip or float32_precision() != "tf32":
        return "ieee"
    return "tf32"


def options(config: Config) -> dict[str, int]:
    """A configuration as options of the compiler."""
    found = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {**found, "maxnreg": config.max_registers} if config.max_registers else found


def gemm_constants(config: Config, k: int) -> dict[str, int]:
    """What every GEMM of depth k is compiled with: its tile, and options of the compiler."""
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}
    return {**tile, "EVEN_K": k % config.block_k == 0, **options(config)}


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself, whose rows may be any distance apart, or a copy where its rows aren't contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor) -> Tensor:
    """`Tensor.contiguous`, which takes several times as long to give a contiguous tensor back."""
    return x if x.is_contiguous() else x.contiguous()


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, contiguous and in `dtype`: itself where it is."""
    return contiguous(x if x.dtype is dtype else x.to(dtype))


# Attention: by architecture, then (bytes of an element, head_dim rounded up to a power of two). Not measured yet: the
# reasons are what the compiler reports, registers a thread, shared memory, and so how many programs share an SM. Blocks
# of 64 waste little at the ends of sequences. In float32, IEEE matmuls spill with fewer warps, larger tiles or more
# stages. benchmarks/NOTES.md counts what bounds head_dim 64.
_ATTENTION: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        (2, 16): Config(64, 64, 0, 4, 3),
        (2, 32): Config(64, 64, 0, 4, 3),
        (2, 64): Config(64, 64, 0, 4, 2),  # 168 registers: three programs an SM; a third stage spills
        (2, 128): Config(64, 32, 0, 4, 3),  # 190 registers; 64 keys spill
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 32, 0, 8, 1, max_registers=128),
        (4, 128): Config(16, 32, 0, 8, 1),
    },
    "sm_90": {
        (2, 16): Config(64, 64, 0, 4, 3),
        (2, 32): Config(64, 64, 0, 4, 3),
        # 64 keys and values for 64 queries are 64 FLOPs a byte: at the 28 bytes a clock that an SM gets of the L2
        # cache, 410 TFLOP/s at most. 128 queries halve that. With dropout ptxas takes 170 registers; at 128 nothing
        # spills, and two programs share an SM, as without it.
        (2, 64): Config(128, 64, 0, 8, 3, max_registers=128),
        (2, 128): Config(64, 64, 0, 4, 2),  # 184 registers and 80 KiB: two programs an SM
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1, max_registers=168),
        (4, 64): Config(32, 32, 0, 8, 1, max_registers=168),
        (4, 128): Config(16, 32, 0, 8, 1),
    },
    "portable": {
        (2, 16): Config(64, 32, 0, 4, 2),  # all within 48 KiB
        (2, 32): Config(64, 32, 0, 4, 2),
        (2, 64): Config(64, 32, 0, 4, 2),
        (2, 128): Config(64, 32, 0, 4, 2),
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 32, 0, 8, 1),
        (4, 128): Config(16, 32, 0, 8, 1),
    },
}
_ATTENTION["sm_89"] = {
    **_ATTENTION["portable"],
    (4, 32): Config(32, 32, 0, 8, 1, max_registers=128),
    (4, 128): Config(16, 32, 0, 8, 1, max_registers=128),
}
_ATTENTION["sm_100"] = {  # the same shared memory, and it compiles to tcgen05
    **_ATTENTION["sm_90"],
    (2, 64): Config(64, 64, 0, 4, 3),
}

SHORT_TILES = {
    # Half of 128 queries would be none. 128 registers and 56 KiB: exactly four programs an SM.
    Config(128, 64, 0, 8, 3, max_registers=128): Config(64, 64, 0, 4, 3),
}
"""What takes the place of a configuration above where no sequence has more than `SHORT` tokens. Of the same block_n,
and with a warp to every 16 rows of block_m: then the rows are the same, bit for bit. A test on a GPU compares them, and
what fails it leaves this table."""
SHORT = 64


@_tunable("block_m", "block_n", "num_warps", "num_stages")
def attention_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of attention: `block_m` queries by `block_n` keys. `of_length` has the last word.

    Args:
        arch: as `architecture` names it; one without a table gets "portable".
        dtype: of the operands.
        head_dim: 1 to 128.

    Raises:
        ValueError: `head_dim` is out of range.
    """
    if not 1 <= head_dim <= 128:
        raise ValueError(f"head_dim is {head_dim}; expected 1 to 128")
    padded = max(16, 1 << (head_dim - 1).bit_length())
    config = _of(_ATTENTION, arch)[dtype.itemsize, padded]
    # Columns that pad a head take registers for their masks: too many for the larger tile.
    return config if head_dim == padded else SHORT_TILES.get(config, config)


def of_length(config: Config, max_seqlen: int) -> Config:
    """`config`, or what takes its place where no sequence has more than `max_seqlen` tokens."""
    return SHORT_TILES.get(config, config) if max_seqlen <= SHORT else config


def of_bias(config: Config, arch: str, backward: bool = False) -> Config:
    """`config` as attention with a bias or a window runs it, or with a bias its backward, where it would spill: with
    eight warps for four, and where it has eight, with as many registers as it asks for; on sm_80 the backward doesn't
    load ahead, either."""
    arch = LIKE.get(arch, arch)
    if arch == "sm_80" and backward:
        return replace(config, num_stages=1, max_registers=255)
    if arch not in ("sm_89", "sm_100") and (arch != "sm_80" or config.block_n != 32):
        return config
    if config.num_warps == 8:
        return replace(config, max_registers=config.max_registers or 255)
    return replace(config, num_warps=8)


# The backward of attention: `block_m` rows held, keys in one kernel and queries in the other, `block_n` walked at once.
# Unmeasured, as above: dK and dV of the held rows and two tiles of scores at once are what fills the registers. Those
# of float32 are what of many tiles didn't spill, in any layout and head dimension.
_HALF_BACKWARD = {
    (2, 16): Config(64, 64, 0, 4, 2),
    (2, 32): Config(64, 64, 0, 4, 2),
    (2, 64): Config(64, 32, 0, 4, 2),
    (2, 128): Config(64, 32, 0, 8, 2),
}
_ATTENTION_BACKWARD: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        **_HALF_BACKWARD,
        (4, 16): Config(32, 16, 0, 4, 1, max_registers=255),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(16, 32, 0, 4, 1),
        (4, 128): Config(16, 16, 0, 8, 1, max_registers=255),
    },
    "sm_90": {
        **_HALF_BACKWARD,
        (4, 16): Config(32, 32, 0, 4, 1),
        (4, 32): Config(32, 32, 0, 4, 1, max_registers=255),
        (4, 64): Config(32, 32, 0, 8, 1),
        (4, 128): Config(16, 16, 0, 8, 1, max_registers=255),
    },
    "sm_100": {
        **_HALF_BACKWARD,
        (2, 64): Config(64, 32, 0, 4, 3),  # with two stages ptxas stops at 96 registers and spills
        (4, 16): Config(16, 32, 0, 4, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 32, 0, 8, 1),
        (4, 128): Config(16, 16, 0, 8, 1, max_registers=255),
    },
    "portable": {
        (2, 16): Config(64, 32, 0, 4, 1),
        (2, 32): Config(64, 32, 0, 4, 1),
        (2, 64): Config(64, 32, 0, 4, 1),
        (2, 128): Config(32, 32, 0, 4, 1),  # on gfx942 larger tiles spill
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 16, 0, 8, 1),
        (4, 128): Config(16, 16, 0, 8, 1),
    },
}
_ATTENTION_BACKWARD["sm_89"] = {
    **_ATTENTION_BACKWARD["portable"],
    (4, 16): Config(32, 32, 0, 8, 1, max_registers=255),
}


@_tunable("block_m", "block_n", "num_warps", "num_stages")
def attention_backward_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of attention's backward: `block_m` rows held, `block_n` walked. Arguments as `attention_config`'s."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    config = _of(_ATTENTION_BACKWARD, arch)[dtype.itemsize, padded]
    # There, the masks of columns that pad a head leave no registers for a second stage.
    return replace(config, num_stages=1) if arch == "sm_80" and head_dim != padded else config


# The gradient of a bias: by architecture and bytes an element, square tiles of `block_m` queries and as many keys.
# Unmeasured, as above: what doesn't spill, of the largest tiles, which read the least for an operation.
_ATTENTION_DBIAS: dict[str, dict[int, Config]] = {
    "sm_80": {2: Config(32, 0, 0, 8, 2), 4: Config(32, 0, 0, 8, 1, max_registers=255)},
    "sm_90": {2: Config(64, 0, 0, 8, 1), 4: Config(32, 0, 0, 8, 1, max_registers=255)},
    "sm_100": {2: Config(64, 0, 0, 8, 1, max_registers=255), 4: Config(32, 0, 0, 8, 1, max_registers=255)},
    "portable": {2: Config(64, 0, 0, 4, 1), 4: Config(32, 0, 0, 8, 1)},
}
_ATTENTION_DBIAS["sm_89"] = _ATTENTION_DBIAS["sm_80"]
_ATTENTION_DBIAS_WIDE = Config(
    16, 0, 0, 4, 1, max_registers=255
)  # of float32, heads of more than 64: larger ones spill


@_tunable("block_m", "num_warps", "num_stages")
def attention_dbias_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of the gradient of attention's bias. Arguments as `attention_config`'s."""
    if dtype.itemsize == 4 and head_dim > 64:
        return _ATTENTION_DBIAS_WIDE
    return _of(_ATTENTION_DBIAS, arch)[dtype.itemsize]


DBIAS_PROGRAMS = 2048
"""The gradient of attention's bias is shared out among at most so many programs, unless its heads and diagonals of
tiles are more: several rounds of all that an H100 has room for. Each writes two numbers a row of its tile, to be added
up."""


# Disentangled attention and its backward: by architecture, then (bytes of an element, head_dim rounded up to a power of
# two), as above. Unmeasured: what doesn't spill. No block is larger than 64, `attention.PITCH`: of scores by position
# each pair of a query and a key is read once, whatever the tile, so larger ones would save little.
_DISENTANGLED: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        (2, 16): Config(64, 64, 0, 4, 2),
        (2, 32): Config(64, 64, 0, 4, 2),
        (2, 64): Config(64, 32, 0, 4, 2),  # 64 keys spill beyond a band with a mask
        (2, 128): Config(64, 32, 0, 8, 2),  # with four warps it spills
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 32, 0, 8, 1),
        (4, 128): Config(16, 32, 0, 8, 1),
    },
    "sm_90": {
        (2, 16): Config(64, 64, 0, 4, 2),
        (2, 32): Config(64, 64, 0, 4, 2),
        # 147 registers, 162 with dropout, and 56 KiB: three programs an SM; beyond a band 226.
        (2, 64): Config(64, 64, 0, 4, 2),
        (2, 128): Config(64, 32, 0, 4, 2),  # 64 keys spill beyond a band
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1, max_registers=168),
        (4, 64): Config(32, 32, 0, 8, 1, max_registers=168),
        (4, 128): Config(16, 32, 0, 8, 1, max_registers=128),
    },
    "portable": {
        (2, 16): Config(64, 32, 0, 4, 1),
        (2, 32): Config(64, 32, 0, 4, 1),
        (2, 64): Config(64, 32, 0, 4, 1),
        (2, 128): Config(64, 32, 0, 4, 1),
        (4, 16): Config(32, 32, 0, 8, 1),
        (4, 32): Config(32, 32, 0, 8, 1),
        (4, 64): Config(32, 32, 0, 8, 1),
        (4, 128): Config(16, 32, 0, 8, 1),
    },
}
_DISENTANGLED["sm_89"] = {  # by the same instructions, within 99 KiB
    **_DISENTANGLED["sm_80"],
    # Left alone, ptxas stops at 168 and at 80 registers and spills beyond a band.
    (2, 16): Config(64, 64, 0, 4, 2, max_registers=255),
    (4, 128): Config(16, 32, 0, 8, 1, max_registers=128),
}
_DISENTANGLED["sm_100"] = {
    **_DISENTANGLED["sm_90"],
    # 64 keys spill beyond a band, or where a head is padded.
    **dict.fromkeys(((2, 16), (2, 32), (2, 64)), Config(64, 32, 0, 4, 2)),
}
_DISENTANGLED_BACKWARD: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        **_ATTENTION_BACKWARD["sm_80"],
        (2, 16): Config(64, 32, 0, 4, 2, max_registers=255),  # left alone, ptxas stops at 128 and spills
        (2, 32): Config(64, 32, 0, 4, 2),
        (2, 64): Config(32, 32, 0, 4, 2, max_registers=255),  # left alone, ptxas stops at 168 and spills
        (2, 128): Config(32, 32, 0, 8, 2),  # 64 rows spill beyond a band
        (4, 32): Config(32, 32, 0, 8, 1, max_registers=255),
    },
    "sm_90": {
        **_ATTENTION_BACKWARD["sm_90"],
        (2, 16): Config(64, 32, 0, 4, 2),
        (2, 32): Config(64, 32, 0, 4, 2),
        (4, 32): Config(32, 32, 0, 8, 1, max_registers=255),
    },
    "sm_100": {
        **_ATTENTION_BACKWARD["sm_100"],
        # Left alone, ptxas stops at 168 and at 128 registers and spills.
        (2, 16): Config(64, 32, 0, 4, 2, max_registers=255),
        (2, 32): Config(64, 32, 0, 4, 2, max_registers=255),
        (2, 64): Config(64, 32, 0, 4, 2, max_registers=255),
        (2, 128): Config(64, 32, 0, 8, 2, max_registers=255),
        (4, 64): Config(32, 16, 0, 8, 1, max_registers=255),
    },
    "portable": _ATTENTION_BACKWARD["portable"],
}
_DISENTANGLED_BACKWARD["sm_89"] = _DISENTANGLED_BACKWARD["sm_80"]


@_tunable("block_m", "block_n", "num_warps", "num_stages", most=64)
def disentangled_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of disentangled attention: `block_m` queries by `block_n` keys. `of_mask` has the last word.

    Arguments and errors as `attention_config`'s.
    """
    if not 1 <= head_dim <= 128:
        raise ValueError(f"head_dim is {head_dim}; expected 1 to 128")
    padded = max(16, 1 << (head_dim - 1).bit_length())
    config = _of(_DISENTANGLED, arch)[dtype.itemsize, padded]
    # Columns that pad a head take registers for their masks: beyond a band, too many for 64 keys.
    return config if head_dim == padded else replace(config, block_n=min(config.block_n, 32))


def of_mask(config: Config, arch: str) -> Config:
    """`config` as disentangled attention with a mask runs it, and its dQ: on sm_100 they would spill with two stages.

    Of the same tile and warps: no bit depends on the mask being there.
    """
    return replace(config, num_stages=1) if LIKE.get(arch, arch) == "sm_100" else config


def attention_map_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of attention maps, with a bias or scores by position or without. Arguments and errors as
    `attention_config`'s. Unmeasured: those of disentangled attention, with columns that don't spill with a bias."""
    if not 1 <= head_dim <= 128:
        raise ValueError(f"head_dim is {head_dim}; expected 1 to 128")
    return replace(_of(_DISENTANGLED, arch)[dtype.itemsize, max(16, 1 << (head_dim - 1).bit_length())], block_n=32)


@_tunable("block_m", "block_n", "num_warps", "num_stages", most=64)
def disentangled_backward_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of its backward: `block_m` rows held, `block_n` walked."""
    return _of(_DISENTANGLED_BACKWARD, arch)[dtype.itemsize, max(16, 1 << (head_dim - 1).bit_length())]


# Scores by position and what their gradients give rows and tables: `block_m` rows by `block_n` distances. And tables by
# slot: `block_m` slots by `block_n` distances. By architecture and bytes an element; unmeasured, what doesn't spill.
_POSITION: dict[str, dict[int, Config]] = {
    # Left alone, ptxas stops at 128 registers and spills.
    "sm_80": {
        2: Config(64, 64, 0, 8, 1, max_registers=168),
        4: Config(32, 32, 0, 8, 1, max_registers=168),
    },
    # In 16 bits with head_dim 64 89, 48 and 60 registers: two, five and four programs an SM. With four warps the first
    # takes 184.
    "sm_90": {2: Config(64, 64, 0, 8, 1), 4: Config(32, 32, 0, 8, 1, max_registers=168)},
    "portable": {2: Config(64, 64, 0, 4, 1), 4: Config(32, 32, 0, 8, 1)},
}
_POSITION_SLOTS: dict[str, Config] = {
    "sm_80": Config(16, 32, 0, 4, 1, max_registers=168),
    "portable": Config(16, 32, 0, 4, 1),
}
_POSITION["sm_89"] = _POSITION["sm_80"]
_POSITION["sm_100"] = {**_POSITION["sm_90"], 4: Config(32, 32, 0, 8, 1, max_registers=255)}
_POSITION_SLOTS.update(dict.fromkeys(("sm_89", "sm_90", "sm_100"), _POSITION_SLOTS["sm_80"]))


@_tunable("block_m", "block_n", "num_warps", "num_stages", most=64)
def position_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of scores by position, and of their gradients. Arguments as `attention_config`'s."""
    return _of(_POSITION, arch)[dtype.itemsize]


def position_slots_config(arch: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The tiles of the gradients of tables, by slot."""
    return _of(_POSITION_SLOTS, arch)


POSITION_PROGRAMS = 2048
"""The gradients of tables by distance are shared out as `DBIAS_PROGRAMS` says."""
POSITION_ENDS = Config(32, 0, 0, 4, 1)
"""Of distances beyond a band: `block_m` rows at a time. Unmeasured: it reads queries and keys once."""


# Linear layers: by architecture and bytes an element, (n below which it applies, configuration). Not measured yet:
# counted from registers and shared memory a program, as the ahead-of-time compilation reports them.
_ANY = float("inf")
# Public figures for Hopper, at a depth of 1,024: by pointers three quarters of cuBLAS's rate, by descriptors in a
# persistent kernel nine tenths (triton-lang/triton #5726, #5461); 502 to 564 TFLOP/s of cuBLAS's 584 with specialised
# warps (facebookexperimental/triton #1038, 65536 x 1024 x 1024). Until it is measured here, sm_90 follows them.
_PERSISTENT_SM_90 = Config(128, 256, 64, 8, 4, "persistent", programs=1)  # 224 KiB: one program an SM
_LINEAR: dict[str, dict[int, tuple[tuple[float, Config], ...]]] = {
    "sm_80": {
        2: (
            (2048, Config(128, 128, 32, 4, 4)),  # two programs an SM: one's epilogue under the other's main loop
            (_ANY, Config(128, 256, 32, 8, 4)),  # a quarter less traffic an operation; block_k 64 leaves no register
        ),
        4: ((_ANY, Config(64, 128, 32, 8, 3)),),  # the largest tile whose IEEE matmul and separate sums fit
    },
    "sm_90": {
        # Two warp groups of m64n256 wgmma. At full speed they read 48 bytes a clock and SM from the L2 cache, which has
        # some 39 for each; two programs of 128x128 would read 64.
        2: ((_ANY, _PERSISTENT_SM_90),),
        4: ((_ANY, Config(64, 128, 32, 8, 3)),),  # as on sm_80
    },
    "sm_100": {
        # By pointers: every number of rows has this tile, few rows gain nothing by a persistent kernel, and there is no
        # public figure of one like ours. It is a candidate.
        2: ((2048, Config(128, 128, 64, 4, 3)), (_ANY, Config(128, 256, 64, 8, 4))),  # as on sm_90, by tcgen05
        4: ((_ANY, Config(128, 128, 32, 8, 3)),),  # with smaller tiles ptxas stops at 64 registers and spills
    },
    "portable": {
        2: ((_ANY, Config(128, 128, 32, 4, 3)),),  # in 64 KiB of LDS (gfx942)
        4: ((_ANY, Config(64, 128, 32, 8, 3)),),
    },
}
_LINEAR["sm_89"] = _LINEAR["sm_80"]  # by the same instructions, within 99 KiB
UNALIGNED = Config(64, 128, 32, 8, 3)
"""Of GEMMs with an operand whose rows don't start at 16 bytes: they are loaded element by element, through registers,
and larger tiles spill."""
BY_LIBRARY = Config(128, 128, 64, 4, 3, LIBRARY)
"""PyTorch's GEMM; its sizes mean nothing."""

LINEAR_TILES: dict[str, tuple[Config, ...]] = {
    "sm_80": (
        Config(128, 256, 32, 8, 4),
        Config(128, 128, 32, 4, 4),
        Config(64, 128, 32, 4, 4),
        Config(64, 64, 64, 4, 5),
        Config(32, 64, 64, 4, 5),
        Config(32, 32, 64, 4, 6),
    ),
    "sm_90": (
        _PERSISTENT_SM_90,
        Config(128, 128, 64, 4, 3),
        Config(64, 128, 64, 4, 4),
        Config(64, 64, 64, 4, 6),
        Config(64, 32, 128, 4, 4),
        Config(64, 16, 128, 4, 5),
    ),
}
"""Tiles of 16-bit GEMMs among which the number of rows decides, largest first, by architecture.

So at most this many kernels are compiled for a weight and an epilogue, however many numbers of rows there are. The
smallest tiles keep some 80 KiB in flight; all but the largest leave room for a second program on their SM. Not measured
yet. An architecture that is not here has one tile a weight.

This is as independent of the batch as one tile is if the matrix instruction is. All tiles of an architecture add up k
in one chain of the same one, mma.m16n8k16 or wgmma.m64nNk16, 16 elements a step (the ahead-of-time tests hold that),
whether pointers or descriptors load them; so a row is bitwise the same in each, unless wgmma adds up differently by N.
`test_a_row_is_the_same_in_every_tile` tells on a GPU; where it fails, take the architecture out. What that costs: one
text of 128 tokens then has 4 tiles for the 132 SMs of an H200 at n 1024, and its GEMMs take several times as long.
"""
for _arch in ("sm_86", "sm_89", "sm_120", "sm_121"):
    LINEAR_TILES[_arch] = LINEAR_TILES["sm_80"]

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_120": 170, "sm_121": 48}
"""SMs where a choice is made without a device: of an A100, an A40, an L40S, an H100 or H200, an RTX 5090 and a GB10."""


class Rates(NamedTuple):
    """What an SM of an architecture does in a clock, and the cycles a tile takes beyond its main loop."""

    multiply_adds: int
    """Of 16-bit numbers with sums in float32; of FP8 ones twice as many."""
    l2_bytes: int
    """From the L2 cache, where all SMs load."""
    shared_bytes: int
    """What programs that share an SM have between them."""
    pointers: float = 1.0
    """Share of these rates that a main loop reaches whose operands are loaded by pointers."""
    fill_bytes: int = 64
    """From the L2 cache where few SMs load."""
    start: int = 1500
    """Until the first operands are there."""
    finish: float = 0.1
    """Of the epilogue, an element: 3,900 cycles for 128 x 256 with GELU on sm_90, fewer without."""
    launch: int = 3000
    """Between two launches: a microsecond, and a program's start."""


RATES: dict[str, Rates] = {
    "sm_80": Rates(1024, 47, 163 << 10),  # 5,120 bytes a clock for 108 SMs
    "sm_90": Rates(2048, 39, 227 << 10, pointers=0.83),  # the same for 132, which is assumed; by _LINEAR's figures
    "sm_89": Rates(512, 16, 99 << 10),  # of an L40S; 5 TB/s have been measured of an RTX 4090's cache
}
"""By architecture, from datasheets and public figures, for `tile_cycles` alone."""


def tile_cycles(
    config: Config, rates: Rates, rows: int, n: int, k: int, segments: int, multiprocessors: int, itemsize: int = 2
) -> float:
    """Clocks that a GEMM takes in tiles of `config`, wave by wave: what tiles are compared by.

    A wave is a tile for each SM, however many programs share one, as its matrix units do. The last wave takes as long
    for one tile as for all, but that the L2 cache has more for each: hence the quantisation. A persistent program
    starts once, with the next tile's loads under an epilogue; programs that share an SM have their starts and ends
    together.
    """
    block_m, block_n = config.block_m, config.block_n
    waves, rest = divmod(-(-rows // block_m) * -(-n // block_n) * segments, multiprocessors)
    multiply = block_m * block_n * k * itemsize / (2 * rates.multiply_adds)
    loaded = (block_m + block_n) * k * itemsize
    loop = waves * max(multiply, loaded / rates.l2_bytes)
    if rest:
        waves += 1
        loop += max(multiply, loaded / min(rates.fill_bytes, rates.l2_bytes * multiprocessors / rest))
    finish = block_m * block_n * rates.finish
    if config.variant == "persistent":
        return loop + waves * finish + rates.start
    shared = config.num_stages * (block_m + block_n) * config.block_k * itemsize
    held = block_m * block_n * (2 if itemsize == 1 else 1)  # sums; of all registers, a quarter is 128 x 128
    together = 2 if 2 * shared <= rates.shared_bytes and held <= 128 * 128 else 1
    return loop / rates.pointers + -(-waves // together) * (rates.start + finish)


LINEAR_CANDIDATES: dict[str, tuple[Config, ...]] = {
    "sm_90": (
        Config(128, 256, 64, 8, 4),  # 192 KiB; by pointers, which were in the tables before there were figures
        Config(128, 128, 64, 4, 3, "persistent", programs=2),  # 104 KiB; one's epilogue under the other's main loop
    ),
    "sm_100": (Config(128, 256, 64, 8, 3, "persistent", programs=1),),
}
"""What else 16-bit GEMMs of many rows could take, by architecture: compiled and tested, not measured yet."""
MANY_ROWS = 8192
SPLIT_ROWS: float = MANY_ROWS
"""Of so many rows and more a GEMM may take two launches, as `full_waves` tells; with fewer the host's time counts."""

LIBRARY_FROM: dict[tuple[str, int], int] = {("sm_90", 3): MANY_ROWS}
"""Where PyTorch's GEMM is taken if results may depend on the batch: by architecture and weights side by side, from so
many rows. By the figures above cuBLAS is a tenth faster than the persistent kernel; of Q, K and V it adds the bias by
itself, while GELU or a residual takes a pass, of a tenth or more of the GEMM's time. Not measured yet."""


SLACK = 1.03
"""A smaller tile is taken where it is this many times faster by `tile_cycles`, which comes no closer to the truth."""


def round_rows(m: int) -> int:
    """m rounded up to 64 rows: what choices are made by, so that few are, for every large tile has as many rows."""
    return -(-m // 64) * 64


def row_class(m: int) -> int:
    """What the keys of configurations know of m rows: m rounded up to a power of two, within 64 and MANY_ROWS."""
    return min(max(64, 1 << (m - 1).bit_length()), MANY_ROWS)


def _fastest(
    tiles: tuple[Config, ...], arch: str, rows: int, n: int, k: int, segments: int, multiprocessors: int, itemsize: int
) -> Config:
    """The first of the tiles that is as fast as the fastest, by `tile_cycles` and within SLACK."""
    rates, multiprocessors = _of(RATES, arch), multiprocessors or MULTIPROCESSORS[arch]
    cycles = [tile_cycles(tile, rates, rows, n, k, segments, multiprocessors, itemsize) for tile in tiles]
    return next(tile for tile, each in zip(tiles, cycles, strict=True) if each <= SLACK * min(cycles))


@_tunable("block_m", "block_n", "block_k", "num_warps", "num_stages", "variant", "group_m", "programs")
def linear_config(
    arch: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    segments: int = 1,
    rows: int = MANY_ROWS,
    multiprocessors: int = 0,
    batch_invariant: bool = True,
) -> Config:
    """The tiles of a GEMM with `segments` weights of shape (n, k); a persistent one asks for aligned operands.

    Where `LINEAR_TILES` has the architecture, what takes the fewest cycles for exactly so many rows.

    Args:
        arch: as `architecture` names it; one without a table gets "portable".
        dtype: of the operands.
        n, k: output and input features.
        segments: weights side by side.
        rows: of the other operand, best as `round_rows` has them.
        multiprocessors: SMs of the device; 0: as in MULTIPROCESSORS.
        batch_invariant: False allows PyTorch's GEMM, where `LIBRARY_FROM` or what `use` was given has it.
    """
    if not batch_invariant and dtype.itemsize == 2 and rows >= LIBRARY_FROM.get((arch, segments), _ANY):
        return BY_LIBRARY
    if n % 16 or k % 16:
        return UNALIGNED
    if dtype.itemsize == 2 and arch in LINEAR_TILES:
        return _fastest(LINEAR_TILES[arch], arch, rows, n, k, segments, multiprocessors, 2)
    table = _of(_LINEAR, arch)[dtype.itemsize]
    return next(config for below, config in table if n < below)


@functools.lru_cache(CHOICES)
def full_waves(
    config: Config, arch: str, itemsize: int, n: int, k: int, segments: int, rows: int, multiprocessors: int = 0
) -> int:
    """How many of so many rows to launch in tiles of `config`; the rest goes by another launch, which chooses anew.

    Of 21,222 rows by 1,024 columns, tiles of 128 x 256 fill 132 SMs five times, and four are left: a wave that takes
    as long as the others, where their 102 rows take a third of it in small tiles. All rows, where that does not save
    twice what a launch takes, and where the architecture's tiles are not known to give the same bits.

    Args:
        config: as `linear_config` or, with `itemsize` 1, `linear_fp8_config` has it.
        arch, n, k, segments, rows, multiprocessors: as those were given them.
        itemsize: bytes of an operand's element.
    """
    tiles = LINEAR_TILES if itemsize == 2 else LINEAR_FP8_TILES
    if itemsize > 2 or arch not in tiles or config.variant == LIBRARY or n % 16 or k % 16:
        return rows
    multiprocessors = multiprocessors or MULTIPROCESSORS[arch]
    columns = -(-n // config.block_n) * segments
    waves = -(-rows // config.block_m) * columns // multiprocessors
    first = waves * multiprocessors // columns * config.block_m
    if not 0 < first < rows:
        return rows
    rates = _of(RATES, arch)

    def cycles(config: Config, rows: int) -> float:
        return tile_cycles(config, rates, rows, n, k, segments, multiprocessors, itemsize)

    rest = min(cycles(tile, rows - first) for tile in tiles[arch])
    return first if cycles(config, first) + 2 * rates.launch + rest < cycles(config, rows) else rows


# Two GEMMs at once, by bytes an element: half the columns of a GEMM's tile, for both are held. Not measured.
_LINEAR_GATED = {2: Config(128, 64, 32, 4, 3), 4: Config(64, 32, 32, 4, 3)}
_LINEAR_GATED_SM_90 = {**_LINEAR_GATED, 2: Config(128, 128, 64, 8, 3)}
LINEAR_GATED_UNALIGNED = Config(64, 64, 32, 8, 3)  # as UNALIGNED


@_tunable("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m")
def linear_gated_config(arch: str, dtype: torch.dtype, n: int, k: int) -> Config:
    """The tiles of `linear_gated`, of weights of shape (n, k)."""
    if n % 16 or k % 16:
        return LINEAR_GATED_UNALIGNED
    return (_LINEAR_GATED_SM_90 if arch == "sm_90" else _LINEAR_GATED)[dtype.itemsize]


# The GEMM whose epilogue is GELU's derivative, by bytes an element. Two results and what they are made from are held
# beside the sums: with four warps, or wider tiles, that spills. Not measured yet. On sm_90 registers allow one program
# an SM: two loads of block_k 32 ahead are 512 cycles of wgmma, less than a load takes, and 64 halves the barriers.
_LINEAR_BACKWARD = {2: Config(128, 128, 32, 8, 3), 4: Config(64, 128, 32, 8, 3)}
_LINEAR_BACKWARD_SM_90 = {**_LINEAR_BACKWARD, 2: Config(128, 128, 64, 8, 3)}


@_tunable("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m")
def linear_backward_config(arch: str, dtype: torch.dtype, n: int, k: int) -> Config:
    """The tiles of `linear_gelu_backward`, of a weight of shape (k, n). Arguments as `linear_config`'s."""
    if n % 16 or k % 16:
        return UNALIGNED
    return (_LINEAR_BACKWARD_SM_90 if arch == "sm_90" else _LINEAR_BACKWARD)[dtype.itemsize]


# FP8 GEMMs: by architecture, (n below which it applies, configuration). Not measured yet: counted from
# registers and shared memory a program, as the ahead-of-time compilation reports them. With exact sums (below) a tile
# is held twice: 128 x 256 spills.
_LINEAR_FP8: dict[str, tuple[tuple[float, Config], ...]] = {
    "portable": ((_ANY, Config(128, 128, 64, 8, 3)),),  # 32 KiB and 128 registers: two programs an SM (sm_89)
    "sm_90": ((_ANY, Config(128, 128, 128, 8, 4)),),  # 128 KiB: one program an SM, two warp groups
    "sm_100": ((_ANY, Config(128, 128, 128, 8, 4)),),
}
_LINEAR_FP8_UNALIGNED = Config(64, 128, 64, 8, 3)  # as UNALIGNED: residual and result, element by element
LINEAR_FP8_TILES: dict[str, tuple[Config, ...]] = {
    "sm_90": (
        Config(128, 128, 128, 8, 4),
        Config(64, 128, 128, 4, 4),
        Config(64, 64, 128, 4, 6),
        Config(64, 32, 128, 4, 8),
    ),
}
"""As LINEAR_TILES, of FP8 GEMMs: each tile adds four steps of 32 elements in one chain, and the sums in float32."""

FP8_EXACT_K = 128
"""How many products of FP8 numbers Hopper adds up in fewer bits than float32 has, before the sum goes to float32."""


@_tunable("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m")
def linear_fp8_config(arch: str, n: int, k: int, rows: int = MANY_ROWS, multiprocessors: int = 0) -> Config:
    """The tiles of a GEMM of FP8 numbers with a weight of shape (n, k). Arguments as `linear_config`'s."""
    if n % 16:
        return _LINEAR_FP8_UNALIGNED
    if arch in LINEAR_FP8_TILES:
        return _fastest(LINEAR_FP8_TILES[arch], arch, rows, n, k, 1, multiprocessors, 1)
    return next(config for below, config in _of(_LINEAR_FP8, arch) if n < below)


# int8 GEMMs, by architecture. Not measured: as FP8's, of elements as wide. There are none for sm_75, whose `tl.dot` has
# no int8, nor from sm_100 on, where it is slow.
LINEAR_INT8 = {
    "portable": Config(64, 128, 64, 4, 4),  # 48 KiB: two programs an SM; GELU spills in tiles of 128 x 128
    "sm_90": Config(128, 128, 128, 8, 4),  # 128 KiB: one program an SM, two warp groups
}
LINEAR_INT8_UNALIGNED = Config(64, 128, 64, 8, 3)  # as UNALIGNED


def linear_int8_config(arch: str, n: int, k: int) -> Config:
    """The tiles of a GEMM of int8 numbers with a weight of shape (n, k)."""
    return LINEAR_INT8_UNALIGNED if n % 16 else LINEAR_INT8.get(arch, LINEAR_INT8["portable"])


@_tunable("num_warps")
def row_config(dtype: torch.dtype, width: int) -> Config:
    """One row a program, `block_n` columns (a power of two, `width` or more), for kernels that normalize or move rows.

    A warp holds 2 KiB of its row: up to BERT-large's width one warp reduces it all, without shared memory or a barrier.
    Unmeasured.
    """
    block = max(8, 1 << (width - 1).bit_length())  # of dropout's draws, eight at a time
    num_warps = 1
    while num_warps < 16 and block * dtype.itemsize > 2048 * num_warps:
        num_warps *= 2
    return Config(1, block, 0, num_warps, 1)


def rotary_config(dtype: torch.dtype, half: int) -> Config:
    """Rows a program, and the columns of half a head (a power of two): tables of both halves stay in registers.

    Unmeasured.
    """
    block = max(8, 1 << (half - 1).bit_length())
    return Config(max(8, 1024 // block), block, 0, 4, 1)


@_tunable("block_m", "num_warps")
def row_backward_config(dtype: torch.dtype, width: int) -> Config:
    """`block_m` rows a program, `block_n` columns as `row_config` has them, for the backward of a normalization.

    Half a dozen rows of numbers are held at once: eight times the warps of `row_config` keep them in registers, even
    where ptxas stops early (sm_100). Sixteen rows a program make the sums of weight and bias, a row each in float32, an
    eighth of what is read and written.
    Unmeasured.
    """
    forward = row_config(dtype, width)
    return Config(16, forward.block_n, 0, min(8 * forward.num_warps, 32), 1)


VOCABULARY_BLOCK = 4096
"""Columns of the vocabulary that a program of `cross_entropy` takes at a time, in four warps. Unmeasured."""

MASK_LAYOUT = Config(1, 1024, 0, 8, 1)
"""A program that lays out a mask takes `block_n` rows at a time: twice as many spill on sm_120. Unmeasured."""
