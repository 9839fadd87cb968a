"""What the host does in one forward of BERT-large's depth, in microseconds, with no kernel to wait for.

    python benchmarks/host.py [--layers 24] [--calls 200]

First with launches on a stubbed GPU (`stub.py`), operator by operator and of a whole forward of one text of 128 tokens
in bfloat16: all that Python does for a launch, up to the call of the compiled kernel's own launcher, which on a GPU
takes some 3 microseconds more, and the allocation of results, by the CPU's allocator. Beside it stock's forward of one
token, of which nearly all is PyTorch's own dispatch.

Then without launches: operators return memory they have, and a graph replays nothing, so that what is timed is the
model's Python of transformers, the plan, the layers' or, with graphs, the check that nothing has changed. On a GPU that
check runs while the device does; it is listed alone, too. A mask is laid out by its reference here, on a GPU by one
launch. Times are of this thread, on the CPU. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import ops
from fastbert.runtime import arguments, graphs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import stub


class Replay:
    """A graph of nothing."""

    def replay(self) -> None:
        pass


class Device:
    """In place of graphs.Cuda: captures nothing."""

    def refuses(self, x: Tensor) -> None:
        pass

    def guard(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def begin(self, *buffers: Tensor) -> None:
        pass

    def end(self) -> None:
        pass

    finish = pool = end

    def capture(self, run: Callable[[], None], pool: Any) -> Replay:
        run()
        return Replay()


def without_kernels() -> None:
    """Operators give memory back that they have given before."""
    held: dict[Any, Any] = {}

    def stub(name: str) -> Callable[..., Any]:
        shapes = ops.OPERATORS[name].fake

        def run(*args: Any) -> Any:
            key = name, *(tuple(a.shape) for a in args if isinstance(a, Tensor))
            if key not in held:
                held[key] = shapes(*args)
            return held[key]

        return run

    for name in ops.CPU_BACKEND.keys() - {"mask_layout"}:  # whose result says how the call goes on
        ops.CPU_BACKEND[name] = stub(name)


def timed(what: str, call: Callable[[], Any], calls: int, each: int = 1) -> None:
    """Prints the fastest of `calls`, and the time that a quarter of them stays below: of one of `each` it makes."""
    digits = 0 if each == 1 else 1
    for _ in range(5):
        call()
    seconds = []
    for _ in range(calls):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    seconds.sort()
    print(
        f"{what:<44}{1e6 * seconds[0] / each:>8.{digits}f}{1e6 * seconds[calls // 4] / each:>8.{digits}f}", flush=True
    )


def launches(stock: Any, layers: int, calls: int) -> None:
    """Of BERT-large's operators at 128 rows, and of `stock`, fused and not."""
    width, bf16 = 1024, torch.bfloat16
    x, wide = torch.zeros(128, width, dtype=bf16), torch.zeros(128, 4 * width, dtype=bf16)
    square, up = torch.zeros(width, width, dtype=bf16), torch.zeros(4 * width, width, dtype=bf16)
    down, b, b4 = up.view(width, 4 * width), x[0].clone(), wide[0].clone()
    ids, mask = torch.zeros(128, dtype=torch.int64), torch.ones(2, 64, dtype=torch.bool)
    cu_seqlens, seed = torch.tensor([0, 128], dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    qkv = torch.zeros(128, 3, 16, 64, dtype=bf16)
    q, k, v = qkv.unbind(1)
    x8, square8 = x.to(torch.float8_e4m3fn), square.to(torch.float8_e4m3fn)
    scales = torch.ones(width)
    sequences = None, None, 128, 0.125
    out, stats = q.contiguous(), torch.zeros(1, 16, 128)
    operators: dict[str, tuple[int, Callable[[], Any]]] = {
        "embedding_layer_norm": (1, lambda: ops.embedding_layer_norm(ids, ids, ids, x, x, x, b, b, 1e-5, -1, -1)),
        "qkv_linear": (1, lambda: ops.qkv_linear(x, square, b, square, b, square, b)),
        "attention": (1, lambda: ops.attention(q, k, v, *sequences, None, None)),
        "linear_add": (1, lambda: ops.linear_add(x, square, b, x)),
        "layer_norm": (1, lambda: ops.layer_norm(x, b, b, 1e-5)),
        "linear_gelu": (1, lambda: ops.linear_gelu(x, up, b4, "none")),
        "linear": (1, lambda: ops.linear(wide, down, b)),
        "attention_tiles": (1, lambda: ops.attention_tiles(cu_seqlens, 128)),
        "mask_layout": (1, lambda: ops.registry.kernel("mask_layout")(mask, None)),
        "unpack": (1, lambda: ops.unpack(x, ids, ids)),
        "linear_fp8": (1, lambda: ops.linear_fp8(x8, None, square8, scales, b, bf16)),
        "layer_norm_fp8": (1, lambda: ops.layer_norm_fp8(x, b, b, 1e-5, 0.1)),
        "attention_forward": (1, lambda: ops.attention_forward(qkv, *sequences, 0.1, seed, None)),
        "attention_backward": (2, lambda: ops.attention_backward(out, qkv, out, stats, *sequences, 0.1, seed, None)),
        "add_layer_norm": (1, lambda: ops.add_layer_norm(x, x, b, b, 1e-5, 0.1, seed)),
        "add_layer_norm_backward": (1, lambda: ops.add_layer_norm_backward(x, x, x, b, 1e-5, 0.1, seed)),
        "linear_gelu_backward": (1, lambda: ops.linear_gelu_backward(x, square, x, "none")),
    }
    with stub.device("sm_90") as gpu:
        for name, (number, call) in operators.items():
            repeat = functools.partial(_repeat, call)
            timed(f"{name}, {number} {'launch' if number == 1 else 'launches'}", repeat, calls // 4, 100)
        text = torch.ones(1, 128, dtype=torch.int64)
        fused = fastbert.fuse(stock.to(bf16))
        fused(text)
        begun = gpu.launches
        fused(text)
        timed(f"forward, {layers} layers, {gpu.launches - begun} launches", lambda: fused(text), calls)
    plain = fastbert.unfuse(fused).float()
    timed("stock, one token", lambda: plain(text[:, :1]), calls)


def _repeat(call: Callable[[], Any]) -> None:
    for _ in range(100):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    graphs.Cuda = Device  # type: ignore[assignment,misc]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=64, num_hidden_layers=options.layers, **sizes)
    ids, ones = torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    ragged = ones.tril(9)
    masks = {"no mask": {}, "a mask of ones": {"attention_mask": ones}, "ragged": {"attention_mask": ragged}}
    print(f"{'microseconds':<44}{'fastest':>8}{'p25':>8}")
    with torch.inference_mode():
        launches(hf.BertModel(config, add_pooling_layer=False).eval(), options.layers, options.calls)
        without_kernels()
        arguments._is_readable = lambda ids: False  # as on a GPU
        stock = hf.BertModel(config, add_pooling_layer=False).eval()
        for on in (False, True):
            model = fastbert.fuse(stock, cuda_graphs=on)
            for name, given in masks.items():
                what = f"forward, {name}" + (", CUDA graphs" if on else "")
                timed(what, functools.partial(model, ids, **given), options.calls)
        layers, fingerprint = model.encoder.layer, model.encoder.fastbert.graphs._fingerprint
        timed("of it: whether anything has changed", lambda: fingerprint.holds(layers), options.calls)
        coverage = model.encoder.fastbert.coverage
        timed("without graphs: whether layers are covered", lambda: coverage.look(model), options.calls)


if __name__ == "__main__":
    main()
