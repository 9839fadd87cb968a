"""Scales for FP8, factors for int8, and which GEMMs they are not for, by measurement on your own texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import numerics
from .fuse import PRECISIONS, Precision, fuse, unfuse
from .layers.copies import GEMMS, Found, Key
from .layers.int8 import written
from .runtime.registry import encoder_of, layers_in
from .verify import at_real_tokens, batches_of, inner_model, real_tokens, twin

ROOM = (8, 4, 2, 1)
"""How much larger than what was seen a scale may leave room for; a floating-point format has it to spare."""


TOLERANCE: dict[Precision, float] = {"fp8": 0.1, "int8": 0.05}
"""int8 costs all-MiniLM-L6-v2 0.036, and on CPUs without VNNI and AMX, where weights have 7 bits, 0.057."""


@dataclass(frozen=True)
class CalibratedGemm:
    """One GEMM of one layer."""

    layer: int
    name: str
    largest: float
    """Magnitude among what it multiplies by its weight, at real tokens."""
    found: Found
    """In FP8 the scale of that; in int8 the factors of its columns, see `layers.int8.factors_of`, or none: ""."""
    error: float
    """Of the last hidden states, relative, with this GEMM alone in the precision."""
    kept: bool
    """Whether it stays in the model's dtype."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, and has written to the model's config."""

    gemms: Sequence[CalibratedGemm]
    error: float
    """Of the last hidden states, relative to the model's dtype, with all GEMMs in the precision but those kept."""
    texts: int
    tokens: int
    precision: Precision = "fp8"

    def __str__(self) -> str:
        title = PRECISIONS[self.precision].title
        kept = [f"layer {p.layer} {p.name}" for p in self.gemms if p.kept]
        lines = [
            f"{self.texts} texts, {self.tokens} tokens: last hidden states within {self.error:.1%}",
            f"in the model's dtype: {', '.join(kept) or 'no GEMM'}",
            "layer  " + "  ".join(f"{name:>8}" for name in GEMMS) + f"   error with one GEMM in {title}; *: kept",
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
    tolerance: float | None = None,
    precision: Precision = "fp8",
) -> Calibration:
    """Finds static scales for `fuse(model, precision="fp8")`, or factors for "int8", and the GEMMs to leave out of it.

    What it finds goes into the model's config, as config.fastbert, and with it into config.json: `fuse` reads it there.
    A model that is fused so already goes on by it. Scales leave room for eight times what was seen, where that
    costs no precision. Factors share outliers of a column out between activations and weight, where that costs less
    than none. After training further, calibrate again.

    Args:
        model: a Hugging Face model with any head, fused or not, or a module that holds one.
        inputs: texts as the model will meet them, a few dozen; or tensors, as `fastbert.verify` takes them.
        tokenizer: for texts; default: the one `model` carries, as a SentenceTransformer does.
        batch_size: how many texts go into one forward. On the first batch every GEMM is tried alone.
        tolerance: the largest relative error (Frobenius norm) of the last hidden states, on the first batch, that
            the precision may cause. The GEMMs that cost most for their share of FLOPs stay in the model's dtype until
            it holds. Default: 0.1 in FP8, 0.05 in int8.
        precision: as `fuse` takes it.

    Returns:
        What was found; str() renders it.

    Raises:
        ValueError: an argument is out of range, empty, or lacks what it needs; ids are not of the model; what the model
            computes isn't finite.
        UnsupportedModelError: the model can't run in the precision on its device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
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
    fuse(working, precision=precision)  # refused before anything is computed, where it can't be
    encoder, kind = encoder_of(base), PRECISIONS[precision]
    gemms = encoder.fastbert.precision.groups(layers_in(encoder))
    unfuse(working)

    def found_of(chosen: Iterable[Key]) -> list[dict[str, Found | None]]:
        wanted, layers = set(chosen), len(layers_in(encoder))
        return [{n: found[i, n] if (i, n) in wanted else None for n in GEMMS} for i in range(layers)]

    def error(chosen: Iterable[Key]) -> float:
        encoder.fastbert.precision = kind(found_of(chosen))
        return numerics.relative_error(_last(base, first, real), truth)

    def best(key: Key) -> float:
        """The error with one GEMM alone, by the option that costs least, which is kept."""
        tried: list[tuple[float, Found]] = []
        for option in options[key]:
            found[key] = option
            tried.append((error([key]), option))
        least, found[key] = min(tried, key=lambda each: each[0])
        return least

    with torch.inference_mode():
        columns = _observe(base, batches, gemms)
        largest = {key: float(column.max()) for key, column in columns.items()}
        options: dict[Key, tuple[Found, ...]] = {}
        if precision == "fp8":
            smallest = {key: _least_scale(value) for key, value in largest.items()}
            errors = _errors(base, batches, gemms, smallest)
            options.update({key: (smallest[key] * _room(errors, key),) for key in smallest})
        else:  # factors, or none
            options.update({key: (written(_smooth(columns[key], gemms[key])), "") for key in columns})
        found = {key: each[0] for key, each in options.items()}

        fuse(working, padding="packed")
        first, real = batches[0], real_tokens(batches[0])
        truth = _last(base, first, real).double()
        alone = {key: best(key) for key in gemms}
        chosen = dict(alone)
        # Errors of GEMMs add up as independent ones do, about; whether it was so is looked at in the end.
        while chosen and math.hypot(*chosen.values()) > tolerance:
            del chosen[_dearest(chosen, gemms)]
        while (total := error(chosen)) > tolerance and chosen:
            del chosen[_dearest(chosen, gemms)]
    if not math.isfinite(total):
        raise ValueError(
            "inputs: the model's last hidden states on the first batch are not finite; look for NaN in its weights "
            "and in inputs_embeds, and load it in bfloat16 or float32 where float16 overflows"
        )

    config = inner.base_model.config
    before = getattr(config, "fastbert", None)
    others = {name: kept for name, kept in before.items() if name in PRECISIONS} if isinstance(before, Mapping) else {}
    config.fastbert = {**others, precision: {"layers": found_of(chosen), "error": total}}
    settings = getattr(encoder_of(inner.base_model), "fastbert", None)
    if settings is not None and isinstance(settings.precision, kind):
        settings.precision = kind.of(config, len(layers_in(encoder)))
        if settings.graphs is not None:
            settings.graphs.drop()
    tokens = [real_tokens(batch) for batch in batches]
    return Calibration(
        [CalibratedGemm(key[0], key[1], largest[key], found[key], alone[key], key not in chosen) for key in gemms],
        total,
        sum(mask.shape[0] for mask in tokens),
        sum(int(mask.sum()) for mask in tokens),
        precision,
    )


def _least_scale(largest: float) -> float:
    """The least power of two in which a magnitude fits into e4m3, among those `fuse` takes."""
    return 2.0 ** max(-126, math.ceil(math.log2(largest / 448))) if largest else 1.0


def _call(base: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a call, where and as the base model takes them."""
    flat = {name: x.to(base.device).flatten(0, -3 if name == "inputs_embeds" else -2) for name, x in batch.items()}
    return {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in flat.items()}


def _last(base: nn.Module, batch: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """The last hidden states at real tokens, in float32."""
    return at_real_tokens(base(**_call(base, batch)).last_hidden_state, real).float()


Look = Callable[[Tensor, Key], None]


def _look(
    base: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], gemms: Mapping[Key, Sequence[nn.Module]], look: Look
) -> None:
    """Shows what the GEMMs of a stock model multiply, (rows, K) float32 at real tokens, over all batches."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], key: Key) -> None:
        look(at_real_tokens(args[0], real).float(), key)

    hooks = [group[0].register_forward_pre_hook(partial(hook, key=key)) for key, group in gemms.items()]
    try:
        for batch in batches:
            real = real_tokens(batch)
            base(**_call(base, batch))
    finally:
        for each in hooks:
            each.remove()


def _observe(
    base: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], gemms: Mapping[Key, Sequence[nn.Module]]
) -> dict[Key, Tensor]:
    """The largest magnitude in each column (K,) of what is multiplied, by layer and GEMM."""
    found: dict[Key, Tensor] = {}

    def look(x: Tensor, key: Key) -> None:
        column = x.abs().amax(0)
        found[key] = column if key not in found else torch.maximum(found[key], column)

    _look(base, batches, gemms, look)
    if not all(bool(column.isfinite().all()) for column in found.values()):
        raise ValueError(
            "inputs: what the model multiplies on them is not finite; look for NaN in its weights and in "
            "inputs_embeds, and load it in bfloat16 or float32 where float16 overflows"
        )
    return found


def _errors(
    base: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    gemms: Mapping[Key, Sequence[nn.Module]],
    smallest: Mapping[Key, float],
) -> dict[tuple[Key, int], float]:
    """The squared error of rounding to e4m3 in a scale of factor times `smallest`, by GEMM and factor of ROOM."""
    found: dict[tuple[Key, int], Tensor] = {}

    def look(x: Tensor, key: Key) -> None:
        for factor in ROOM:
            scale = smallest[key] * factor
            rounded = (x / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float() * scale
            error = (rounded - x).square().sum(dtype=torch.float64)
            found[key, factor] = error + found.get((key, factor), 0.0)

    _look(base, batches, gemms, look)
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def _smooth(columns: Tensor, group: Sequence[nn.Linear]) -> Tensor:
    """Factors (K,) of the columns of what is multiplied: SmoothQuant's, with as much left to the weight, around 1."""
    weights = torch.stack([linear.weight.float().abs().amax(0) for linear in group]).amax(0)
    factors = (weights.clamp(min=1e-5) / columns.clamp(min=1e-5)).sqrt()
    return factors / factors.log().mean().exp()


def _room(errors: Mapping[tuple[Key, int], float], key: Key) -> int:
    """The most of ROOM that costs less than 2 % of the rounding error."""
    own = {factor: errors[key, factor] for factor in ROOM}
    return next(factor for factor in ROOM if own[factor] <= 1.02**2 * min(own.values()))


def _dearest(errors: Mapping[Key, float], gemms: Mapping[Key, Sequence[Any]]) -> Key:
    """The GEMM that costs most squared error for its FLOPs."""
    return max(errors, key=lambda key: errors[key] ** 2 / sum(linear.weight.numel() for linear in gemms[key]))
