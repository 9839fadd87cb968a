"""What the host does in one forward of BERT-large's depth, in microseconds, with no kernel to wait for or to launch.

    python benchmarks/host.py [--layers 24] [--calls 200]

Operators return memory they have, and a graph replays nothing, so that what is timed is Python: the model's of
transformers, the plan, the layers' or, with graphs, the check that nothing has changed. On a GPU that check runs
while the device does; it is listed alone, too. Launches come on top: seven a layer, or one. A mask is laid out by its
reference here, on a GPU by one launch. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import encoder, graphs, ops


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
        shapes = ops._SHAPES[name]

        def run(*args: Any) -> Any:
            key = name, *(tuple(a.shape) for a in args if isinstance(a, Tensor))
            if key not in held:
                held[key] = shapes(*args)
            return held[key]

        return run

    for name in ops.CPU_BACKEND.keys() - {"mask_layout"}:  # whose result says how the call goes on
        ops.CPU_BACKEND[name] = stub(name)


def timed(what: str, call: Callable[[], Any], calls: int) -> None:
    """Prints the fastest of `calls`, and the time that a quarter of them stays below."""
    for _ in range(5):
        call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    print(f"{what:<44}{1e6 * seconds[0]:>8.0f}{1e6 * seconds[calls // 4]:>8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    without_kernels()
    graphs.Cuda = Device  # type: ignore[assignment,misc]
    encoder._is_readable = lambda ids: False  # as on a GPU
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=64, num_hidden_layers=options.layers, **sizes)
    ids, ones = torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    ragged = ones.tril(9)
    arguments = {"no mask": {}, "a mask of ones": {"attention_mask": ones}, "ragged": {"attention_mask": ragged}}
    print(f"{'microseconds':<44}{'fastest':>8}{'p25':>8}")
    with torch.inference_mode():
        stock = hf.BertModel(config, add_pooling_layer=False).eval()
        for on in (False, True):
            model = fastbert.fuse(stock, cuda_graphs=on)
            for name, given in arguments.items():
                what = f"forward, {name}" + (", CUDA graphs" if on else "")
                timed(what, functools.partial(model, ids, **given), options.calls)
        layers, fingerprint = model.encoder.layer, model.encoder.fastbert.graphs._fingerprint
        timed("of it: whether anything has changed", lambda: fingerprint.holds(layers), options.calls)
        coverage = model.encoder.fastbert.coverage
        timed("without graphs: whether layers are covered", lambda: coverage.look(model), options.calls)


if __name__ == "__main__":
    main()
