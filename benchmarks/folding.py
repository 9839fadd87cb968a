"""What LayerNorm folded into the GEMM after it would do to the numbers; on a CPU, in plain PyTorch.

    python benchmarks/folding.py [--layers 6] [--hidden 1024] [--rows 200]

Folded, nobody writes LayerNorm(t): with W' = gamma * W, rounded once more,
    LayerNorm(t) @ W.T + b = rstd * (t @ W'.T - mean * W'.sum(1)) + (beta @ W.T + b)
and mean and rstd come of partial sums of 16 columns, combined in one order as Chan has it. Rounding is emulated;
GEMMs are those of 16-bit numbers in float32. The weights are random; t is plain, or has three features far out, or a
mean far from 0. Prints the error of the last layer against float64: of stock and, over it, of what fastbert does, of
folding, and what the policy allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.numerics import SLACK, relative_error, unit_roundoff

EPS = 1e-12
WAYS = ("stock", "fastbert", "folded")
Weights = dict[str, Tensor]


def layer(hidden: int, dtype: torch.dtype, far: str) -> Weights:
    """Weights in float64, rounded to `dtype` first; without biases but what makes t `far`."""
    sizes = {
        "qkv": (3 * hidden, hidden),
        "out": (hidden, hidden),
        "up": (4 * hidden, hidden),
        "down": (hidden, 4 * hidden),
    }
    weights = {name: 1.25 * torch.randn(size) / hidden**0.5 for name, size in sizes.items()}
    for name in ("1", "2"):
        weights["gamma" + name], weights["beta" + name] = 0.9 + 0.15 * torch.randn(hidden), 0.1 * torch.randn(hidden)
    weights["shift"] = torch.zeros(hidden)
    weights["shift"][: 3 if far == "features" else hidden] = {"": 0.0, "features": 30.0, "mean": 10.0}[far]
    return {name: weight.to(dtype).double() for name, weight in weights.items()}


def moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of rows, of partial sums of 16 columns combined by halves."""
    parts = t.unflatten(1, (-1, 16))
    mean = parts.mean(2)
    square, count = (parts - mean[..., None]).square().sum(2), 16.0
    while mean.shape[1] > 1:
        apart = mean[:, 1::2] - mean[:, ::2]
        square = square[:, ::2] + square[:, 1::2] + apart.square() * (count / 2)
        mean, count = (mean[:, ::2] + mean[:, 1::2]) / 2, count * 2
    return mean, (square / count + EPS).rsqrt()


def run(x: Tensor, layers: Sequence[Weights], dtype: torch.dtype, way: str) -> Tensor:
    """Rows of one sequence through all layers, 64 a head; in float64 where `dtype` is that."""
    work = torch.promote_types(dtype, torch.float32)

    def rounded(y: Tensor) -> Tensor:
        return y.to(dtype).to(work)

    def normed(t: Tensor, w: Weights, which: str) -> Tensor:
        if way != "folded":
            return rounded(F.layer_norm(t, t.shape[1:], w["gamma" + which], w["beta" + which], EPS))
        mean, rstd = moments(t)  # of a residual: in float32, and rounded nowhere
        return (t - mean) * rstd * w["gamma" + which] + w["beta" + which]

    def gemm(t: Tensor, y: Tensor, w: Weights | None, which: str, matrix: Tensor) -> Tensor:
        """Of LayerNorm(t), which is y where it isn't folded."""
        if way != "folded" or w is None:
            return y @ matrix.T
        scaled = rounded(matrix * w["gamma" + which])
        mean, rstd = moments(t)
        return rstd * (t @ scaled.T - mean * scaled.sum(1)) + w["beta" + which] @ matrix.T

    def total(y: Tensor, w: Weights, residual: Tensor) -> Tensor:
        y = y + w["shift"]
        return rounded((rounded(y) if way == "stock" else y) + residual)

    x = t = rounded(x.to(work))
    before = None
    for each in layers:
        w = {name: weight.to(work) for name, weight in each.items()}
        qkv = rounded(gemm(t, x, before, "2", w["qkv"]))
        q, k, v = qkv.unflatten(1, (3, -1, 64)).permute(1, 2, 0, 3)
        context = rounded(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        t = total(context @ w["out"].T, w, x)
        x = normed(t, w, "1")
        up = gemm(t, x, w, "1", w["up"])
        act = rounded(F.gelu(rounded(up) if way == "stock" else up))
        t = total(act @ w["down"].T, w, x)
        x, before = normed(t, w, "2"), w
    return x.to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    print(f"{'t':10}{'dtype':10}{'stock':>10}{'fastbert':>10}{'folded':>10}{'allowed':>10}")
    for far in ("", "features", "mean"):
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(0)
            layers = [layer(options.hidden, dtype, far) for _ in range(options.layers)]
            x = torch.randn(options.rows, options.hidden).to(dtype).double()
            truth = run(x, layers, torch.float64, "fastbert")
            stock, ours, folded = (relative_error(run(x, layers, dtype, way), truth) for way in WAYS)
            allowed = SLACK + unit_roundoff(dtype) / stock
            ratios = f"{ours / stock:>10.3f}{folded / stock:>10.3f}{allowed:>10.3f}"
            print(f"{far or 'plain':10}{str(dtype)[6:]:10}{stock:>10.2e}{ratios}", flush=True)


if __name__ == "__main__":
    main()
