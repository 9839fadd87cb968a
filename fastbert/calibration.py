"""Scales for FP8 inference, and which GEMMs it is not for, by measurement on your own texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import numerics
from .fuse import fuse, unfuse
from .layers.fp8 import GEMMS, Fp8, Key, calibrated
from .runtime.registry import encoder_of, layers_in
from .verify import at_real_tokens, batches_of, inner_model, real_tokens, twin

ROOM = (8, 4, 2, 1)
"""How much larger than what was seen a scale may leave room for; a floating-point format has it to spare."""


@dataclass(frozen=True)
class CalibratedGemm:
    """One GEMM of one layer."""

    layer: int
    name: str
    largest: float
    """Magnitude among what it multiplies by its weight, at real tokens."""
    scale: float
    error: float
    """Of the last hidden states, relative, with this GEMM alone in FP8."""
    kept: bool
    """Whether it stays in the model's dtype."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, and has written to the model's config."""

    gemms: Sequence[CalibratedGemm]
    error: float
    """Of the last hidden states, relative to the model's dtype, with all GEMMs in FP8 but those kept."""
    texts: int
    tokens: int

    def __str__(self) -> str:
        kept = [f"layer {p.layer} {p.name}" for p in self.gemms if p.kept]
        lines = [
            f"{self.texts} texts, {self.tokens} tokens: last hidden states within {self.error:.1%}",
            f"in the model's dtype: {', '.join(kept) or 'no GEMM'}",
            "layer  " + "  ".join(f"{name:>8}" for name in GEMMS) + "   error with one GEMM in FP8; *: kept",
        ]
        for layer in sorted({p.layer for p in self.gemms}):
            cells = {p.name: f"{p.error:.2%}" + ("*" if p.kept else " ") for p in self.gemms if p.layer == layer}
            lines.append(f"{layer:5}  " + "  ".join(f"{cells.get(name, '- '):>8}" for name in GEMMS))
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    inputs: Sequence[str] | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    tokenizer: object = None,
    batch_size: int = 8,
    tolerance: float = 0.1,
) -> Calibration:
    """Finds static scales for `fuse(model, precision="fp8")` and the GEMMs to leave out of it.

    What it finds goes into the model's config, as config.fastbert, and with it into config.json: `fuse` reads it there.
    A model that is fused in FP8 already goes on by it. Scales leave room for eight times what was seen, where that
    costs no precision. After training further, calibrate again.

    Args:
        model: a Hugging Face model with any head, fused or not, or a module that holds one.
        inputs: texts as the model will meet them, a few dozen; or tensors, as `fastbert.verify` takes them.
        tokenizer: for texts; default: the one `model` carries, as a SentenceTransformer does.
        batch_size: how many texts go into one forward. On the first batch every GEMM is tried alone.
        tolerance: the largest relative error (Frobenius norm) of the last hidden states, on the first batch, that
            FP8 may cause. The GEMMs that cost most for their share of FLOPs stay in the model's dtype until it
            holds.

    Returns:
        What was found; str() renders it.

    Raises:
        ValueError: an argument is out of range, empty, or lacks what it needs; ids are not of the model; what the model
            computes isn't finite.
        UnsupportedModelError: the model can't run in FP8 on its device.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; expected a positive number")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    inner = inner_model(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    batches = list(batches_of(inner, inputs, tokenizer, batch_size))
    if not all(real_tokens(batch).any() for batch in batches):
        raise ValueError("inputs: a batch without a real token; expected one at least in each")
    working = twin(inner, inner.device)  # shares its weights
    working.config.fastbert = None
    base = working.base_model
    fuse(working, precision="fp8")  # refused before anything is computed, where it can't be
    encoder = encoder_of(base)
    gemms = encoder.fastbert.fp8.groups(layers_in(encoder))
    unfuse(working)

    def scales_of(chosen: Iterable[Key]) -> list[dict[str, float | None]]:
        wanted, layers = set(chosen), len(layers_in(encoder))
        return [{n: scales[i, n] if (i, n) in wanted else None for n in GEMMS} for i in range(layers)]

    def error(chosen: Iterable[Key]) -> float:
        encoder.fastbert.fp8 = Fp8(scales_of(chosen))
        return numerics.relative_error(_last(base, first, real), truth)

    with torch.inference_mode():
        largest = _observe(base, batches, gemms, {})
        smallest = {key: _least_scale(value) for key, value in largest.items()}
        errors = _observe(base, batches, gemms, smallest)
        scales = {key: smallest[key] * _room(errors, key) for key in smallest}

        fuse(working, padding="packed")
        first, real = batches[0], real_tokens(batches[0])
        truth = _last(base, first, real).double()
        alone = {key: error([key]) for key in gemms}
        chosen = dict(alone)
        # Errors of GEMMs add up as independent ones do, about; whether it was so is looked at in the end.
        while chosen and math.hypot(*chosen.values()) > tolerance:
            del chosen[_dearest(chosen, gemms)]
        while (total := error(chosen)) > tolerance and chosen:
            del chosen[_dearest(chosen, gemms)]
    if not math.isfinite(total):
        raise ValueError("inputs: the model's last hidden states on the first batch are not finite")

    config = inner.base_model.config
    config.fastbert = {"fp8": {"layers": scales_of(chosen), "error": total}}
    settings = getattr(encoder_of(inner.base_model), "fastbert", None)
    if settings is not None and settings.fp8 is not None:
        settings.fp8 = Fp8(calibrated(config))
        if settings.graphs is not None:
            settings.graphs.drop()
    tokens = [real_tokens(batch) for batch in batches]
    return Calibration(
        [CalibratedGemm(key[0], key[1], largest[key], scales[key], alone[key], key not in chosen) for key in gemms],
        total,
        sum(mask.shape[0] for mask in tokens),
        sum(int(mask.sum()) for mask in tokens),
    )


def _least_scale(largest: float) -> float:
    """The least power of two in which a magnitude fits into e4m3, among those `fuse` takes."""
    return 2.0 ** max(-126, math.ceil(math.log2(largest / 448))) if largest else 1.0


def _call(base: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a call, where and as the base model takes them."""
    flat = {name: x.to(base.device).flatten(0, -3 if name == "inputs_embeds" else -2) for name, x in batch.items()}
    return {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in flat.items()}


def _last(base: nn.Module, batch: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """The last hidden states at real tokens, in float32."""
    return at_real_tokens(base(**_call(base, batch)).last_hidden_state, real).float()


def _observe(
    base: Any,
    batches: Sequence[Mapping[str, Tensor]],
    gemms: Mapping[Key, Sequence[Any]],
    smallest: Mapping[Key, float],
) -> dict[Any, float]:
    """Looks at what the GEMMs of a stock model multiply, at real tokens, over all batches.

    Returns:
        Without `smallest`, the largest magnitude by layer and GEMM. With it, by layer, GEMM and factor of ROOM,
        the squared error of rounding to e4m3 in a scale of factor times `smallest`.
    """
    found: dict[Any, Tensor] = {}

    def add(key: Any, value: Tensor, join: Any) -> None:
        found[key] = value if key not in found else join(found[key], value)

    def look(module: nn.Module, args: tuple[Tensor, ...], key: Key) -> None:
        x = at_real_tokens(args[0], real).float()
        if not smallest:
            add(key, x.abs().amax(), torch.maximum)
            return
        for factor in ROOM:
            scale = smallest[key] * factor
            rounded = (x / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float() * scale
            add((key, factor), (rounded - x).square().sum(dtype=torch.float64), torch.add)

    hooks = [group[0].register_forward_pre_hook(partial(look, key=key)) for key, group in gemms.items()]
    try:
        for batch in batches:
            real = real_tokens(batch)
            base(**_call(base, batch))
    finally:
        for hook in hooks:
            hook.remove()
    values = dict(zip(found, torch.stack([x.double() for x in found.values()]).tolist(), strict=True))
    if not all(map(math.isfinite, values.values())):
        raise ValueError("inputs: what the model multiplies on them is not finite")
    return values


def _room(errors: Mapping[object, float], key: Key) -> int:
    """The most of ROOM that costs less than 2 % of the rounding error."""
    own = {factor: errors[key, factor] for factor in ROOM}
    return next(factor for factor in ROOM if own[factor] <= 1.02**2 * min(own.values()))


def _dearest(errors: Mapping[Key, float], gemms: Mapping[Key, Sequence[Any]]) -> Key:
    """The GEMM that costs most squared error for its FLOPs."""
    return max(errors, key=lambda key: errors[key] ** 2 / sum(linear.weight.numel() for linear in gemms[key]))
