"""CUDA that isn't there: any command of this repository as it would run on a GPU, with every kernel launch left out.

    python -m benchmarks.dry [--arch sm_90] [--compiles] [--layers N] [--small] [--list FILE] COMMAND ...
    python -m benchmarks.dry python -m pytest -q -m gpu tests
    python -m benchmarks.dry python benchmarks/first.py --output build/dry

The command, and what Python it starts, find one GPU. Its tensors lie in the host's memory, and say that they are on
"cuda"; streams, events and graphs do nothing; Triton's driver is that of benchmarks/stub.py: kernels are chosen and
specialised as on a device, and with --compiles compiled, into TRITON_CACHE_DIR, for a device to load. In place of a
launch an operator's plain-PyTorch twin writes its result, if that takes milliseconds, else zeros. Large results of
PyTorch's own are zeros, too. What a device refuses is refused: tensors of both kinds in one matmul, NumPy, reading a
value while a graph is captured. So a call that fails here fails there; a wrong number says nothing, and no time does.
torch.compile compiles nothing.

Under pytest, which loads this as a plugin then, a test that asserts something of values is reported as expected to
fail: "dry". --list appends what would be compiled, a line each, for benchmarks/prebuild.py.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME = "no GPU (dry)"
"""As records and gates have it, so that nobody takes them for measured."""
LARGE = 1 << 22
"""Elements of a tensor that nothing goes through."""
FLOPS = 1 << 28
"""Of a matmul that is taken: milliseconds."""

_thread = threading.local()
_held: list[Any] = []


def _depth(name: str) -> int:
    return int(getattr(_thread, name, 0))


@contextlib.contextmanager
def _within(name: str) -> Iterator[None]:
    setattr(_thread, name, _depth(name) + 1)
    try:
        yield
    finally:
        setattr(_thread, name, _depth(name) - 1)


def begin(*options: Any) -> None:
    """Installs it; a process that can't is ended: Python itself would go on without."""
    try:
        install(*options)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def install(arch: str, compiles: bool, listed: str | None, layers: int | None, small: bool) -> None:
    """Puts a GPU into this process, to its end."""
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.overrides import _get_current_function_mode_stack as modes
    from torch.utils._device import DeviceContext
    from torch.utils._pytree import tree_flatten, tree_map

    from benchmarks import stub
    from fastbert import numerics, ops
    from fastbert.kernels import cpu, reference_fp8
    from fastbert.measure import bench, cases, counts, profile
    from fastbert.runtime import known

    for family in ("deberta", "deberta_v2"):  # what they compile with TorchScript knows PyTorch's own functions alone
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    cuda, base = torch.device("cuda", 0), torch._C.TensorBase
    plain_device = base.device.__get__  # type: ignore[attr-defined]

    # Tensors: whether a storage is the GPU's is an attribute of it; what is made within a call on the GPU is, too.

    def storage(x: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            try:
                return base.untyped_storage(x)
            except (RuntimeError, NotImplementedError):  # a sparse tensor, or one of a transform
                return None

    def mark(x: Any, there: bool = True) -> Any:
        if isinstance(x, Tensor) and (found := storage(x)) is not None:
            found.is_dry = there
        return x

    def on_gpu(x: Tensor) -> bool:
        found = storage(x)
        return bool(getattr(found, "is_dry", _depth("inside") > 0)) and not _depth("real")

    def device_of(x: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            real = plain_device(x)
        return cuda if real.type == "cpu" and on_gpu(x) else real

    empty, zeros = torch.empty, torch.zeros

    def blank(shape: Any, dtype: torch.dtype) -> Tensor:
        """Zeros: what is large the system gives so, page by page, when it is read."""
        large = math.prod(shape) * dtype.itemsize > 1 << 26
        return (empty if large else zeros)(shape, dtype=dtype)

    def wanted(device: Any) -> str | None:
        """ "cuda" or "cpu", or None where a call says neither."""
        if device is None:
            return None
        return torch.device(device).type if not isinstance(device, int) else "cuda"

    def factory(make: Callable[..., Any]) -> Callable[..., Any]:
        own = make.__name__.endswith("_like") or make.__name__.startswith("new_")  # as their argument, else

        @functools.wraps(make)
        def made(*args: Any, device: Any = None, **more: Any) -> Any:
            if device is None and not own:
                device = next((mode.device for mode in modes() if isinstance(mode, DeviceContext)), None)
            if wanted(device) != "cuda":
                return make(*args, **more) if device is None else mark(make(*args, device=device, **more), False)
            if make.__name__.startswith("rand") and more.get("generator") is not None:
                more = {name: value for name, value in more.items() if name != "generator"}
            if make.__name__ in ("randn", "rand", "randint", "normal"):
                with contextlib.suppress(Exception):
                    empty = make(*args, device="meta", **{k: v for k, v in more.items() if k != "pin_memory"})
                    if empty.numel() > LARGE:
                        return mark(blank(empty.shape, empty.dtype))
            return mark(make(*args, device="cpu", **more))

        return made

    for name in (
        *(
            "empty",
            "zeros",
            "ones",
            "full",
            "rand",
            "randn",
            "randint",
            "randperm",
            "arange",
            "linspace",
            "tensor",
            "eye",
        ),
        *("as_tensor", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("empty_strided", "scalar_tensor", "normal", "tril_indices"),
    ):
        setattr(torch, name, factory(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"):
        setattr(Tensor, name, factory(getattr(base, name)))

    def moved(x: Tensor, found: Tensor, where: str | None) -> Tensor:
        there = on_gpu(x) if where is None else where == "cuda"
        if where is not None and there != on_gpu(x) and storage(found) is storage(x):
            found = found.clone()
        return mark(found, there) if storage(found) is not storage(x) else found

    def to(self: Tensor, *args: Any, **more: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device = more.pop("device", None)
        if args and isinstance(args[0], (str, torch.device, int)) and not isinstance(args[0], bool):
            device, args = args[0], args[1:]
        if wanted(device) not in (None, "cuda", "cpu"):
            return base.to(self, device, *args, **more)
        dtype = next((a for a in args if isinstance(a, torch.dtype)), more.get("dtype"))
        kept = {name: more[name] for name in ("copy", "memory_format") if name in more}
        if on_gpu(self) and dtype not in (None, self.dtype) and self.numel() > LARGE:
            return mark(_shaped(lambda x: base.to(x, dtype), (self,), {}), wanted(device) in (None, "cuda"))
        found = base.to(self, dtype or self.dtype, **kept)
        return moved(self, found, wanted(device))

    Tensor.device = property(device_of)  # type: ignore[misc,assignment]
    Tensor.is_cuda = property(lambda x: device_of(x).type == "cuda")  # type: ignore[misc,assignment]
    Tensor.is_cpu = property(lambda x: device_of(x).type == "cpu")  # type: ignore[misc,assignment]
    Tensor.to = to  # type: ignore[method-assign,assignment]
    Tensor.cuda = lambda self, *args, **more: moved(self, self, "cuda")  # type: ignore[method-assign]
    Tensor.cpu = lambda self, *args, **more: told(self) and moved(self, self, "cpu")  # type: ignore
    Tensor.get_device = lambda self: 0 if device_of(self).type == "cuda" else -1  # type: ignore[method-assign]
    Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]

    capturing: list[Any] = []

    def told(x: Tensor) -> bool:
        if capturing and on_gpu(x):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return True

    def numpy(self: Tensor, *args: Any, **more: Any) -> Any:
        if on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return base.numpy(self, *args, **more)

    Tensor.numpy = numpy  # type: ignore[method-assign]

    # Calls: their results are the GPU's where an argument is. Large ones are shapes alone.

    class Zeros(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, call: Any, *tensors: Tensor) -> Any:
            context.given = [(t.shape, t.dtype) if t.is_floating_point() else None for t in tensors]
            found = call(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors))
            return tree_map(lambda t: mark(blank(t.shape, t.dtype)) if isinstance(t, Tensor) else t, found)

        @staticmethod
        def backward(context: Any, *grads: Any) -> Any:
            given = zip(context.given, context.needs_input_grad[1:], strict=True)
            return None, *(mark(blank(*g)) if g and needed else None for g, needed in given)

    def _shaped(call: Callable[..., Any], args: Any, more: Any) -> Any:
        """What `call` would return, all zeros."""
        flat, spec = tree_flatten((args, more))
        places = [i for i, each in enumerate(flat) if isinstance(each, Tensor)]

        def again(*tensors: Tensor) -> Any:
            given = list(flat)
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = tensor
            (a, m) = torch.utils._pytree.tree_unflatten(given, spec)
            return call(*a, **m)

        return Zeros.apply(again, *(flat[i] for i in places))

    matmuls = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention", "__matmul__"}
    matmuls |= {"__rmatmul__", "_scaled_mm", "addmm_", "mm_", "conv1d"}
    passes = {"gelu", "softmax", "layer_norm", "native_layer_norm", "dropout", "add", "sub", "mul", "div", "abs", "neg"}
    passes |= {
        "double",
        "float",
        "half",
        "bfloat16",
        "clone",
        "norm",
        "amax",
        "amin",
        "sum",
        "mean",
        "where",
    }
    passes |= {"stack", "cat", "eq", "ne", "masked_fill", "embedding", "index_select", "exp", "tanh", "square", "sqrt"}
    passes |= {
        "__add__",
        "__mul__",
        "__sub__",
        "__truediv__",
        "__radd__",
        "__rmul__",
        "__rsub__",
        "any",
        "isnan",
    }
    passes |= {
        "gelu_backward",
        "native_layer_norm_backward",
        "pad_sequence",
        "clamp",
        "diff",
        "cumsum",
        "contiguous",
        "max",
    }
    written = {"copy_", "fill_", "zero_", "normal_", "mul_", "add_", "uniform_", "div_", "gelu_", "clamp_", "sub_"}
    mixed = matmuls | {
        "add",
        "sub",
        "mul",
        "div",
        "eq",
        "equal",
        "allclose",
        "where",
        "layer_norm",
        "__add__",
        "__mul__",
    }
    reads = {"item", "tolist", "__bool__", "nonzero", "__float__", "__int__", "__index__", "equal", "allclose"}

    def flops(tensors: list[Tensor]) -> int:
        sizes = sorted((t.numel() for t in tensors if t.dim() >= 2), reverse=True)
        return 2 * sizes[0] * max((t.shape[-2] if t.dim() > 1 else 1) for t in tensors) if sizes else 0

    class Mode(TorchFunctionMode):
        __module__ = "torch.dry"  # as torch's own are, for fused models, which run stock under anybody else's

        def __torch_function__(self, call: Any, kinds: Any, args: Any = (), more: Any = None) -> Any:
            more, name = more or {}, getattr(call, "__name__", "")
            if name in (
                "__get__",
                "untyped_storage",
                "data_ptr",
                "dim",
                "stride",
                "numel",
                "size",
                "is_floating_point",
            ):
                found = call(*args, **more)
                return mark(found) if isinstance(found, Tensor) and on_gpu(args[0]) else found
            tensors = [each for each in tree_flatten((args, more))[0] if isinstance(each, Tensor)]
            there = [t for t in tensors if on_gpu(t)]
            if not there:
                return call(*args, **more)
            here = [t for t in tensors if t.dim() and not any(t is each for each in there)]
            if here and name in mixed:
                raise RuntimeError(f"Expected all tensors to be on the same device, but got cuda:0 and cpu in {name}")
            if capturing and name in reads:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            for tensor in here:
                mark(tensor, False)
            most = max(t.numel() for t in tensors)
            if name in ("reshape", "flatten") and most > LARGE and not args[0].is_contiguous():
                return _shaped(call, args, more)
            if "out" not in more:
                if (name in matmuls and flops(tensors) > FLOPS) or (name in passes and most > LARGE):
                    with torch._C.DisableTorchFunction():
                        return _shaped(call, args, more)
                if name in ("equal", "allclose") and most > LARGE:
                    return True
                if name in ("isfinite", "all") and most > LARGE:
                    with torch._C.DisableTorchFunction():
                        return mark(torch.ones_like(_shaped(call, args, more)))
            elif name in matmuls and flops(tensors) > FLOPS:
                return more["out"]
            if name in written and tensors[0].numel() > LARGE:
                return tensors[0]
            with _within("inside"):
                found = call(*args, **more)
            return tree_map(
                lambda t: mark(t) if isinstance(t, Tensor) and not hasattr(storage(t), "is_dry") else t, found
            )

    mode = Mode()
    mode.__enter__()
    run = threading.Thread.run

    def run_with_gpu(self: threading.Thread) -> None:
        with Mode():
            run(self)

    threading.Thread.run = run_with_gpu  # type: ignore[method-assign]

    # CUDA.

    class Event:
        def __init__(self, *args: Any, **more: Any) -> None:
            self.at = 0.0

        def record(self, stream: Any = None) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1000 * max(end.at - self.at, 1e-6)

        def query(self) -> bool:
            return True

        def wait(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            pass

    class Stream(Event):
        device, device_index, cuda_stream, priority = cuda, 0, 0, 0

        def wait_stream(self, stream: Any) -> None:
            pass

        wait_event = wait_stream

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record()
            return event

        def __enter__(self) -> Any:
            return streams.__setitem__(slice(len(streams), None), [self]) or self

        def __exit__(self, *error: Any) -> None:
            streams.pop()

    class Graph:
        def replay(self) -> None:
            pass

        reset = replay

        def pool(self) -> Any:
            return (0, 0)

        def capture_begin(self, *args: Any, **more: Any) -> None:
            capturing.append(self)

        def capture_end(self) -> None:
            capturing.pop()

    @contextlib.contextmanager
    def graph(found: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        capturing.append(found)
        try:
            yield
        finally:
            capturing.pop()

    class Device(contextlib.nullcontext):  # type: ignore[type-arg]
        def __init__(self, device: Any = None) -> None:
            super().__init__(device)

    streams = [Stream()]
    properties = types.SimpleNamespace(
        name=NAME,
        major=int(arch.removeprefix("sm_")[:-1]),
        minor=int(arch[-1]),
        multi_processor_count=stub.MULTIPROCESSORS.get(arch, 48),
        total_memory=80 << 30,
        shared_memory_per_block_optin=stub.SHARED.get(arch, 99) << 10,
        L2_cache_size=50 << 20,
        warp_size=32,
        gcnArchName="",
    )
    constants = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": NAME,
        "get_device_properties": properties,
        "graph_pool_handle": (0, 0),
        "is_bf16_supported": True,
        "mem_get_info": (80 << 30, 80 << 30),
        "get_sync_debug_mode": 0,
        "memory_snapshot": [],
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 0),
        **dict.fromkeys(
            ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), None
        ),
        **dict.fromkeys(("set_sync_debug_mode", "set_device", "init", "_lazy_init", "ipc_collect", "set_stream"), None),
    }
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *args, value=value, **more: value)
    ops.registry._current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: bool(capturing)
    torch.cuda.current_stream = lambda device=None: streams[-1]  # type: ignore
    torch.cuda.default_stream = lambda device=None: streams[0]  # type: ignore
    torch.cuda.stream = lambda stream: stream or contextlib.nullcontext()  # type: ignore
    for name, value in {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "device": Device}.items():
        setattr(torch.cuda, name, value)
    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator.__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.get_rng_state = lambda *args: torch.default_generator.get_state()  # type: ignore
    torch.cuda.set_rng_state = lambda state, *args: torch.default_generator.set_state(state)  # type: ignore
    with contextlib.suppress(ImportError):
        from torch.nn.attention import varlen

        varlen.varlen_attn = lambda q, k, v, *rest, **more: _shaped(lambda q, k, v: q.new_empty(q.shape), (q, k, v), {})

    workload, measure = cases.workload, bench.run  # before who imports them by name has
    if layers is not None:
        for shape in cases.SHAPES.values():
            shape["num_hidden_layers"] = layers
        bench.run = lambda *args, **more: measure(*args, **{**more, "repeats": bench.LEAST_REPEATS})

    def less(name: str, batch: int = 16) -> cases.Workload:
        found = workload(name, min(batch, 4))
        return dataclasses.replace(found, lengths=tuple(min(length, 1024) for length in found.lengths))

    if small:
        cases.workload = less

    mm = torch.mm

    def mm_as(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        """A host has no matmuls of 16 bits in float32."""
        found = mm(a, b, **more)
        return found if out_dtype is None else found.to(out_dtype)

    torch.mm = mm_as  # type: ignore[assignment]

    def uncompiled(model: Any = None, **more: Any) -> Any:
        """There is nothing to compile for."""
        return model if model is not None else (lambda call: call)

    torch.compile = uncompiled

    begin, read = torch.profiler.profile.__init__, profile.read

    def profile_host(self: Any, *args: Any, activities: Any = None, **more: Any) -> None:
        """The host's part alone; the device's would say at each operator that there is no driver."""
        begin(self, *args, activities=[torch.profiler.ProfilerActivity.CPU], **more)

    torch.profiler.profile.__init__ = profile_host  # type: ignore[method-assign]
    profile.read = lambda events, costs, device: read(events, costs, torch.device("cpu"))

    # It traces by transforms of tensors, which know the host's memory alone.
    torch.library.opcheck = lambda operator, args, *rest, **more: operator(*args)  # type: ignore

    # fastbert's kernels. Numbers are not judged: their shapes and dtypes are.

    on_hopper = reference_fp8.mm_on_hopper

    def short_sums(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if 2 * x.shape[0] * x.shape[1] * weight.shape[0] <= FLOPS:
            return on_hopper(x, weight, *rest)
        return mark(blank((x.shape[0], weight.shape[0]), torch.float32), on_gpu(x))

    reference_fp8.mm_on_hopper = short_sums

    def no_error(actual: Tensor, truth: Tensor) -> float:
        if actual.shape != truth.shape or truth.dtype != torch.float64:
            return relative_error(actual, truth)
        return 0.0

    relative_error, numerics.relative_error = numerics.relative_error, no_error
    _held.append(stub.device(arch, compiles))
    _held[0].__enter__()
    atexit.register(_held[0].__exit__, None, None, None)
    from triton.runtime import jit

    record = jit.JITFunction._do_compile

    def listing(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any, *rest: Any
    ) -> Any:
        if listed is not None:
            append_specialization(Path(listed), self, signature, constants, options, attrs)
        return record(self, key, signature, device, constants, options, attrs, *rest)

    jit.JITFunction._do_compile = listing

    def launched(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        twin = getattr(cpu, name)

        @functools.wraps(kernel)
        def call(*args: Any, **more: Any) -> Any:
            with _within("inside"):
                found = kernel(*args, **more)
                for each in found if isinstance(found, tuple) else (found,):
                    mark(each)
                if more:
                    return found
                with _within("real"), torch.no_grad(), torch._C.DisableTorchFunction():
                    given = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                    cost = counts.cost(name, given, found)
                    results = found if isinstance(found, tuple) else (found,)
                    if cost.flops < FLOPS and cost.bytes < 8 * LARGE:
                        right = twin(*given)
                        for mine, its in zip(results, right if isinstance(right, tuple) else (right,), strict=True):
                            if mine.shape != its.shape or mine.dtype != its.dtype:
                                raise TypeError(
                                    f"{name}: {mine.shape}, {mine.dtype}; its twin: {its.shape}, {its.dtype}"
                                )
                            mine.copy_(its)
                    else:
                        for mine in results:
                            if mine.nbytes <= 1 << 26:  # what is larger the system gives as zeros
                                mine.zero_()
            return found

        return call

    for name, operator in ops.OPERATORS.items():
        module = importlib.import_module(f"fastbert.kernels.{operator.module}")
        kernel, twin = launched(name, getattr(module, name)), getattr(cpu, name)
        setattr(module, name, kernel)

        def backend(*args: Any, kernel: Any = kernel, twin: Any = twin) -> Any:
            there = any(on_gpu(a) for a in args if isinstance(a, Tensor))
            return kernel(*args) if there else twin(*args)

        ops.CPU_BACKEND[name] = backend
    ops.registry.kernel.cache_clear()
    # What stands in for methods of tensors is no change that would make calls run stock.
    known._OWNERS = (*known._OWNERS, "benchmarks")


def append_specialization(file: Path, kernel: Any, signature: Any, constants: Any, options: Any, attrs: Any) -> None:
    """A line of `file` for what would be compiled; benchmarks/prebuild.py reads it."""
    line = {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "signature": signature,
        "constants": [[list(path), value] for path, value in constants.items()],
        "attrs": [[list(path), value] for path, value in attrs.items()],
        "options": {k: v for k, v in options.__dict__.items() if k not in ("extern_libs",)},
    }
    text = json.dumps(line) + "\n"
    with open(file, "a", encoding="utf-8") as out:
        out.write(text)


# As a plugin of pytest.

WITHOUT = {
    "tests/fastbert/test_profile.py::test_on_a_gpu": "there is no device to trace",
    "tests/fastbert/test_encoder.py::test_autocast_on_a_gpu": "autocast goes by where a tensor's memory is",
    "tests/fastbert/test_faults.py::test_a_kernel_that_does_not_compile_on_a_gpu": "nothing is compiled",
}
"""Tests that have nothing to run on here, by name, and why."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves those out."""
    for item in items:
        if reason := WITHOUT.get(item.nodeid.partition("[")[0]):
            item.add_marker(pytest.mark.skip(reason=f"dry: {reason}"))


def pytest_collection_finish(session: Any) -> None:
    """Says what it is that runs."""
    print(f"dry: {len(session.items)} tests, on a GPU that isn't there")


def _pytest_makereport(item: Any, call: Any) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if call.excinfo is None or not report.failed:
        return
    # What a test waits for a device to raise or to warn of, nothing raises.
    unraised = call.excinfo.errisinstance(pytest.fail.Exception) and "DID NOT" in str(call.excinfo.value)
    if unraised or call.excinfo.errisinstance(AssertionError):
        report.outcome, report.wasxfail = "skipped", "dry: of values"


with contextlib.suppress(ImportError):
    import pytest

    pytest_runtest_makereport = pytest.hookimpl(hookwrapper=True)(_pytest_makereport)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--compiles", action="store_true", help="Triton compiles what would be launched")
    parser.add_argument("--list", type=Path, metavar="FILE", help="append what would be compiled")
    parser.add_argument("--layers", type=int, metavar="N", help="of benchmarks' models, which repeat three times then")
    parser.add_argument("--small", action="store_true", help="models of one layer, 4 sequences of 1,024 tokens at most")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        listed = None if given.list is None else str(given.list.resolve())
        layers = 1 if given.small and given.layers is None else given.layers
        options = given.arch, given.compiles, listed, layers, given.small
        code = f"from benchmarks import dry; dry.begin{options!r}\n"
        Path(folder, "sitecustomize.py").write_text(code, encoding="utf-8")
        paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_PLUGINS": "benchmarks.dry"}
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(given.command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
