"""Attention maps, fused against stock: `python benchmarks/maps.py --size base --workload squad --batch 16`.

Prints medians and ratios, of calls one after the other in random order: a fused forward without maps; that of one
layer's, the last by default, at which nothing is left out; the mean of that over all layers, each asked for alone;
its rollout; all maps by `output_attentions`, and stock's.
Maps are held to the numerical policy first, in rows of real tokens. No record is written.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastbert
from fastbert.checkpoints import default_device
from fastbert.measure.cases import SEED, SHAPES, build, workload
from fastbert.numerics import assert_within_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument("--workload", default="squad")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()

    device = default_device(None)
    stock = build(given.size, getattr(torch, given.dtype), device)
    stock.set_attn_implementation("eager")
    fused = fastbert.fuse(copy.deepcopy(stock))
    batch = workload(given.workload, given.batch).inputs(device)
    layers = stock.config.num_hidden_layers
    layer = given.layer % layers

    calls: dict[str, Callable[[], Any]] = {
        "fused, no maps": lambda: fused(**batch),
        "fused, one layer": lambda: fastbert.attention_maps(fused, batch, [layer]),
        "fused, each layer alone": lambda: [fastbert.attention_maps(fused, batch, [one]) for one in range(layers)],
        "fused, rollout": lambda: fastbert.attention_maps(fused, batch, reduce="rollout"),
        "fused, all maps": lambda: fastbert.attention_maps(fused, batch),
        "fused, output_attentions": lambda: fused(**batch, output_attentions=True),
        "stock eager, output_attentions": lambda: stock(**batch, output_attentions=True),
    }
    with torch.inference_mode():
        real = batch["attention_mask"].bool()
        one = calls["fused, one layer"]()[layer].transpose(1, 2)[real]
        theirs = stock(**batch, output_attentions=True).attentions[layer].transpose(1, 2)[real]
        truth = copy.deepcopy(stock).double()(**batch, output_attentions=True).attentions[layer].transpose(1, 2)[real]
        assert_within_policy(one, theirs, truth)
        del one, theirs, truth
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order, chance = list(calls), random.Random(SEED)
        for repeat in range(given.repeats + 1):  # the first warms up
            chance.shuffle(order)
            for name in order:
                start = time.perf_counter()
                calls[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    medians["fused, each layer alone"] /= layers
    plain, eager = medians["fused, no maps"], medians["stock eager, output_attentions"]
    print(f"{'':<32}{'ms':>10}{'x no maps':>12}{'stock eager / this':>20}")
    for name, median in medians.items():
        print(f"{name:<32}{1e3 * median:>10.1f}{median / plain:>12.2f}{eager / median:>20.2f}")


if __name__ == "__main__":
    main()
