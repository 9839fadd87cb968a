"""Launches by what is known of earlier ones, on a GPU that isn't there: checks that test_compiled.py runs, by name.

python -m tests.kernels.launches NAME ...
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import stub
from fastbert.kernels import attention, attention_map, compiled, embedding, launch, layer_norm, linear, padding
from fastbert.kernels.compiled import Constants

BF16 = torch.bfloat16


def at(offset: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor whose address is `offset` bytes past a multiple of 16."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.zeros(size + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    return memory[start : start + size].view(dtype).view(shape)


class Watch:
    """Who is asked to launch: Triton, or a compiled kernel's own launcher."""

    def __init__(self, gpu: stub.Gpu) -> None:
        self.gpu, self.by_triton = gpu, 0
        gpu.keeps_arguments = True
        run = JITFunction.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.by_triton += 1
            return run(*args, **kwargs)

        JITFunction.run = counted

    def asks_triton(self, call: Callable[[], Any], launches: int = 1) -> bool:
        """Whether the `launches` of a call were Triton's, all of them or none."""
        before, begun = self.by_triton, self.gpu.launches
        call()
        asked = self.by_triton - before
        assert self.gpu.launches - begun == launches and asked in (0, launches), (self.gpu.launches - begun, asked)
        return asked > 0

    def launched(self) -> tuple[stub.Compilation, tuple[Any, ...]]:
        """The kernel of the one launch since the last time, and its arguments."""
        ((found, arguments),) = [(c, a) for c in self.gpu.compilations for a in c.launches]
        found.launches.clear()
        return found, arguments


def check_alignment(gpu: stub.Gpu) -> None:
    """At every offset, what is launched is what Triton would choose, with the addresses and numbers it would have."""
    watch = Watch(gpu)
    cases: list[tuple[Any, tuple[Any, ...], Any]] = []
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 8, "EVEN_K": True, "INPUT_PRECISION": "ieee"}
    constants = Constants(tile, SEGMENTS=1, GELU="", num_warps=4)
    assert constants is Constants(num_warps=4, GELU="", SEGMENTS=1, **tile)
    assert constants is not Constants(constants, SEGMENTS=True)
    for a, b, c in itertools.product((0, 2, 4, 8, 16), (0, 2), (0, 8)):
        x, weight, out = at(a, 16, 64), at(b, 32, 64), at(c, 16, 32)
        others = *(None,) * 7, out, 16, 32, 64
        cases.append((linear.linear_kernel, (x, weight, *others, 64, 0), constants))
        cases.append((linear.linear_kernel, (x, weight, *others, 40, 0), constants))  # rows that aren't aligned
        norm = layer_norm._plan(launch.row_config, "sm_90", BF16, 64, False)
        seed = at(c, 1, dtype=torch.int64)
        numbers = 64, 64, 0, 1e-5, 6554, 1.1
        cases.append((layer_norm.layer_norm_kernel, (x, None, x[0], x[0], seed, at(b, 16, 64), *numbers), norm))
    for kernel, arguments, constants in cases:
        compiled.run(kernel, (3, 1, 1), arguments, constants)
        watch.launched()
        assert not watch.asks_triton(lambda k=kernel, a=arguments, c=constants: compiled.run(k, (3, 1, 1), a, c))
        found, known = watch.launched()
        count = len(gpu.compilations)
        assert watch.asks_triton(lambda k=kernel, a=arguments, c=constants: k[3, 1, 1](*a, **c))
        chosen, given = watch.launched()
        assert len(gpu.compilations) == count and found is chosen
        assert known[:4] == given[:4] and known[6:9] == (None, None, None)
        assert known[9:] == tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in given[9:])
    kernels = {c.kernel: 0 for c in gpu.compilations}
    for c in gpu.compilations:
        kernels[c.kernel] += 1
    assert kernels["linear_kernel"] == 2 * 2 * 2 * 2, kernels  # x, weight, out; and the rows of x
    assert kernels["layer_norm_kernel"] == 2 * 2, kernels  # x with weight and bias, out; not the seed


def check_types(gpu: stub.Gpu) -> None:
    """Of another dtype, without a bias, with a number of 64 bits: another kernel."""
    watch, x, w = Watch(gpu), torch.zeros(16, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)
    half, bias, residual = x.half(), w[:, 0].contiguous(), torch.zeros(16, 32, dtype=BF16)
    calls: list[Callable[[], Any]] = [
        lambda: linear.linear(x, w, None),
        lambda: linear.linear(half, w, None),
        lambda: linear.linear(x, w, bias),
        lambda: linear.linear_add(x, w, None, residual),
        lambda: linear.linear_add(x, w, None, residual.float()),
        lambda: linear.linear_gelu(x, w, None),
        lambda: linear.linear(x[:, :40], w[:, :40], None),
    ]
    for number, call in enumerate(calls):
        assert watch.asks_triton(call) and len(gpu.compilations) == number + 1
        assert not watch.asks_triton(call)
    assert not watch.asks_triton(lambda: linear.linear(x[:7], w, bias))  # fewer rows
    cu_seqlens, tiles = torch.zeros(3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    for sequences, expected in ((2, "i32"), (2**31 - 1, "i32"), (2**31, "i64")):
        arguments = cu_seqlens, tiles, sequences, 2
        compiled.run(attention.tiles_kernel, (1, 1, 1), arguments, attention.TILES)
        compiled.run(attention.tiles_kernel, (1, 1, 1), arguments, attention.TILES)
        assert f"('{expected}', None), ('i32', None)" in gpu.compilations[-1].key
        assert gpu.compilations[-1].launches[-1][11] == sequences


def check_settings(gpu: stub.Gpu) -> None:
    """Hooks, debug settings and instrumentation are Triton's to see, each time; then all is as before."""
    watch, x, w = Watch(gpu), torch.zeros(16, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)

    def call() -> Tensor:
        return linear.linear(x, w, None)

    assert watch.asks_triton(call) and not watch.asks_triton(call)
    runtime, compilation = knobs.runtime, knobs.compilation
    seen: list[Any] = []
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(seen.append)
        assert watch.asks_triton(call) and watch.asks_triton(call)
        chain.remove(seen.append)
        assert not watch.asks_triton(call)
    for place, name, value in (
        (runtime, "debug", True),
        (runtime, "launch_enter_hook", seen.append),
        (compilation, "instrumentation_mode", "consan"),
        (linear.linear_kernel, "pre_run_hooks", [lambda *args, **kwargs: None]),
    ):
        before = getattr(place, name)
        setattr(place, name, value)
        assert watch.asks_triton(call) and watch.asks_triton(call), name
        setattr(place, name, before)
        assert not watch.asks_triton(call), name
    plain, debug, instrumented = (c.options for c in gpu.compilations)
    assert not plain.debug and debug.debug and not debug.instrumentation_mode
    assert instrumented.instrumentation_mode == "consan"


def check_configurations(gpu: stub.Gpu) -> None:
    """Another configuration, given to `launch.use`, and programmatic dependent launch hold from the next launch on."""
    watch, x, w = Watch(gpu), torch.zeros(16, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)

    def call() -> Tensor:
        return linear.linear(x, w, None)

    assert watch.asks_triton(call)
    config = launch.Config(32, 32, 32, 2, 2)
    launch.use({("linear", "sm_90", BF16, 32, 64, 1, 64): config})
    assert watch.asks_triton(call) and gpu.compilations[-1].constexprs["BLOCK_M"] == "32"
    assert not watch.asks_triton(call)
    launch.DEPENDENT["sm_90"] = True
    assert watch.asks_triton(call) and gpu.compilations[-1].options.launch_pdl
    launch.DEPENDENT["sm_90"] = False
    assert not watch.asks_triton(call) and not gpu.compilations[-2].options.launch_pdl
    launch.use({})
    call()
    assert len(gpu.compilations) == 3  # the first, the other, and that early


def check_devices(gpu: stub.Gpu) -> None:
    """Each device has its own compiled kernel; the stream is the current one's, at each launch."""
    watch, x, w = Watch(gpu), torch.zeros(16, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)
    active: Any = driver.active
    for device, stream in ((0, 5), (0, 6), (1, 5), (1, 7), (0, 8)):
        active.get_current_device = lambda device=device: device
        active.get_current_stream = lambda of, device=device, stream=stream: stream if of == device else None
        linear.linear(x, w, None)
        found, arguments = watch.launched()
        assert arguments[3] == stream and found is gpu.compilations[device]
    assert len(gpu.compilations) == 2


def check_threads(gpu: stub.Gpu) -> None:
    """Many at once, from the first launch on: each launches its own tensors."""
    gpu.keeps_arguments = True
    w = torch.zeros(32, 64, dtype=BF16)
    inputs = [torch.zeros(16, 64, dtype=BF16) for _ in range(8)]
    start = threading.Barrier(8)

    def work(x: Tensor) -> None:
        start.wait()
        for _ in range(100):
            linear.linear(x, w, None)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = [a[9] for c in gpu.compilations for a in c.launches]
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in first]
    assert sorted(addresses) == sorted(x.data_ptr() for x in inputs for _ in range(100))


def check_descriptors(gpu: stub.Gpu) -> None:
    """The persistent kernel's are made anew at each launch, of the tensors given to it."""
    watch, x, w = Watch(gpu), torch.zeros(150, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)
    config = launch.Config(64, 32, 32, 4, 3, variant="persistent", group_m=2, programs=1)
    launch.use({("linear", "sm_90", BF16, 32, 64, 1, 256): config})
    assert watch.asks_triton(lambda: linear.linear(x, w, None))
    watch.launched()
    other = torch.zeros(130, 128, dtype=BF16)[:, :64]
    assert not watch.asks_triton(lambda: linear.linear(other, w, None))
    found, arguments = watch.launched()
    assert found.kernel == "linear_persistent_kernel" and arguments[0] == 3
    made, weight = arguments[9:11]
    assert made.base is other and (*made.shape, *made.strides) == (130, 64, 128, 1) and made.block_shape == [64, 32]
    assert weight.base is w and (*weight.shape, *weight.strides) == (32, 64, 64, 1) and weight.block_shape == [32, 32]
    triton = made.checked()  # whatever else this Triton reads of one
    for name in (field.name for field in dataclasses.fields(triton) if field.name != "base"):
        ours, its = getattr(made, name), getattr(triton, name)
        assert (list(ours) == its) if isinstance(its, list) else (ours == its), name
    launch.use({})


def check_another_triton(gpu: stub.Gpu) -> None:
    """Where its insides are not as expected, Triton launches, and nothing fails."""
    watch, x, w = Watch(gpu), torch.zeros(16, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)

    def call() -> Tensor:
        return linear.linear(x, w, None)

    assert watch.asks_triton(call) and not watch.asks_triton(call)
    for place, name in ((linear.linear_kernel, "params"), (stub.Driver, "get_active_torch_device")):
        held = place.__dict__[name]
        delattr(place, name)
        compiled.forget()
        assert watch.asks_triton(call) and watch.asks_triton(call)
        setattr(place, name, held)
    compiled.forget()
    assert watch.asks_triton(call) and not watch.asks_triton(call)


def check_every_launcher(gpu: stub.Gpu) -> None:
    """The second time, none asks Triton."""
    watch = Watch(gpu)
    x, w, v = torch.zeros(16, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16), torch.zeros(64, dtype=BF16)
    ids, seed = torch.zeros(16, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    qkv = torch.zeros(16, 3, 2, 32, dtype=BF16)
    cu_seqlens = torch.tensor([0, 7, 16], dtype=torch.int32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    out, stats = attention.attention_forward(qkv, cu_seqlens, None, 9, 0.2, 0.1, seed[0, 0])
    tables, bias = (x, x, x, v), torch.zeros(2, 21)
    biased = cu_seqlens, None, 9, 0.2, 0.1, seed[0, 0], None, bias
    calls: list[tuple[Callable[[], Any], int]] = [
        (lambda: linear.qkv_linear(x, w, v, w, v, w, v), 1),
        (lambda: linear.feed_forward(x, w, v, w, v, "none"), 2),
        (lambda: linear.linear_gelu_backward(x, w, x, "none"), 1),
        (lambda: attention.attention(*qkv.unbind(1), cu_seqlens, None, 9, 0.2), 1),
        (lambda: attention.attention(*qkv.unbind(1), None, mask, 8, 0.2), 1),
        (lambda: attention.attention_tiles(cu_seqlens, 16), 1),
        (lambda: attention_map.attention_map(*qkv.unbind(1)[:2], cu_seqlens, None, 9, 0.2, ids, 9), 1),
        (lambda: attention.attention_forward(qkv, cu_seqlens, None, 9, 0.2, 0.1, seed[0, 0]), 1),
        (lambda: attention.attention_backward(out, qkv, out, stats, cu_seqlens, None, 9, 0.2, 0.1, seed[0, 0]), 2),
        (lambda: attention.attention_forward(qkv, cu_seqlens, None, 9, 0.2, 0.1, seed[0, 0], None, bias), 1),
        (lambda: attention.attention_backward(out, qkv, out, stats, *biased), 4),
        (lambda: layer_norm.add_layer_norm(x, x, v, v, 1e-5, 0.1, seed[0, 1]), 1),
        (lambda: layer_norm.add_layer_norm_backward(x, x, x, v, 1e-5, 0.1, seed[1, 0]), 1),
        (lambda: embedding.embedding_layer_norm(ids, ids, ids, *tables, v, 1e-5), 1),
        (lambda: embedding.embedding_layer_norm_backward(x, ids, ids, ids, *tables, 1e-5), 1),
        (lambda: padding.mask_layout(mask, None), 1),
        (lambda: padding.mask_layout(mask.repeat(1, 1000), mask.repeat(1, 1000).long()), 2),
        (lambda: padding.unpack(x, ids, ids), 1),
    ]
    for call, launches in calls:
        call()
        assert not watch.asks_triton(call, launches)


def main() -> None:
    for name in sys.argv[1:]:
        run = JITFunction.run
        with stub.device("sm_90") as gpu, torch.inference_mode():
            globals()[f"check_{name}"](gpu)
        JITFunction.run = run
        print(name, flush=True)


if __name__ == "__main__":
    main()
