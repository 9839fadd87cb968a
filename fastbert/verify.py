"""Numbers against the reference: a model's fused forward, layer by layer, judged by the policy of `numerics`.

Copies of one model run stock in float64 (the truth, on the CPU), stock in the working dtype (which sets the bound) and
fused in the working dtype, packed and dense. Errors are taken over all inputs as if they were one batch, at
real tokens.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import numerics
from .explain import explain
from .fuse import Precision, fuse, unfuse
from .layers.embeddings import first_position, longest_sequence
from .layers.low_precision import LowPrecision
from .quality import Measure, Quality
from .runtime.registry import REGISTERED, embeddings_of, encoder_of, family_of, layers_in, stack_of, table_of, widen
from .sensitivity import Sensitivity, sensitivity

LAYOUTS = ("packed", "dense")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_ONE_A_TOKEN = ("start_logits", "end_logits")

Outputs = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """One output of the model in one layout: its relative errors against float64, and the largest one allowed."""

    layout: str
    name: str
    elements: int
    fused_error: float
    stock_error: float
    bound: float

    @property
    def ratio(self) -> float:
        """The fused error in units of stock's own; infinity where only stock is exact."""
        if self.stock_error == 0:
            return 1.0 if self.fused_error == 0 else math.inf
        return self.fused_error / self.stock_error

    @property
    def ok(self) -> bool:
        return self.fused_error <= self.bound

    def to_dict(self) -> dict[str, object]:
        """The fields, the ratio and the verdict; None for a number that is not finite, which JSON can't hold."""
        told = {**vars(self), "ratio": self.ratio, "ok": self.ok}
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in told.items()}


@dataclass(frozen=True)
class Report:
    """What `verify` found. `ok` needs every row within its bound and every fused forward to have run fused."""

    model: str
    dtype: str
    device: str
    sequences: int
    tokens: int
    ran: Mapping[str, Mapping[str, int]]
    """By layout asked for: how many forwards ran fused in which layout (without padding, packed and dense are one)."""
    not_fused: Mapping[str, str]
    """By layout asked for, where not every forward ran fused: the reason."""
    stock_parts: Mapping[str, str]
    """Layers, or the embeddings, that run stock code in a fused forward, and why."""
    rows: Sequence[Row]
    precision: str | None = None
    """As `fuse` takes it."""
    quality: Sequence[Measure] = ()
    """In FP8 or int8, what that changes in what the model is used for; it decides nothing."""
    padding: Sensitivity = field(default_factory=lambda: Sensitivity({}, False, "not asked"))
    """Whether what the whole model returns depends on what stands at padding."""

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.not_fused and all(row.ok for row in self.rows) and not self.padding.packed

    @property
    def first_departure(self) -> Row | None:
        """The first row, in the order the model computes, that exceeds its bound."""
        return next((row for row in self.rows if not row.ok), None)

    def to_dict(self) -> dict[str, object]:
        first = self.first_departure
        return {
            **vars(self),
            "ok": self.ok,
            "first_departure": None if first is None else first.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "quality": [measure._asdict() for measure in self.quality],
            "padding": {
                **self.padding._asdict(),
                "reads": {name: min(change, 1e300) for name, change in self.padding.reads.items()},
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        stock = "stock error" if self.precision is None else f"stock in {self.precision}"
        header = ("layout", "output", "elements", "fused error", stock, "ratio", "bound", "")
        table = [header] + [
            (
                row.layout,
                row.name,
                str(row.elements),
                f"{row.fused_error:.2e}",
                f"{row.stock_error:.2e}",
                f"{row.ratio:.2f}",
                f"{row.bound:.2e}",
                "ok" if row.ok else "DEPARTS",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            cells[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            lines.append("  ".join(cells).rstrip())
        kind = ", ".join(filter(None, (self.dtype, self.precision)))
        title = f"{self.model}, {kind}, {self.device}: {self.sequences} sequences, {self.tokens} tokens"
        ran = [f"{layout}: {self._ran(layout)}" for layout in self.ran]
        parts = [f"{part}: runs stock in a fused forward: {why}" for part, why in self.stock_parts.items()]
        quality = [f"{m.name}: {m.value:.4f} (stock, {self.dtype}: {m.stock:.4f})" for m in self.quality]
        return "\n".join([title, *ran, *parts, "", *lines, "", *quality, str(self.padding), self._verdict()])

    def _ran(self, layout: str) -> str:
        counts = [f"forwards run fused, {how}: {count}" for how, count in self.ran[layout].items()]
        return "; ".join(counts + ([f"STOCK: {self.not_fused[layout]}"] if layout in self.not_fused else []))

    def _verdict(self) -> str:
        first = self.first_departure
        if first is not None:
            return f"DEPARTS from stock, first at {first.name} ({first.layout})"
        if self.not_fused:
            return "NOT VERIFIED: " + "; ".join(f"{layout} ran stock: {why}" for layout, why in self.not_fused.items())
        if self.padding.packed:
            return "DEPARTS from stock: padding is read, and packed away"
        bound = "the numerical policy" + ("" if self.precision is None else f", as it is for {self.precision}")
        return f"ok: every output is within {bound}" if self.ok else "NOT VERIFIED: nothing was compared"


@dataclass
class _Sum:
    """Squared norms of one output's difference from the truth, and of the truth, over the batches so far."""

    elements: int = 0
    difference: float = 0.0
    truth: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def error(self) -> float:
        scale = math.sqrt(self.truth)
        return math.sqrt(self.difference) / (scale if 0 < scale < math.inf else 1.0)


class Errors:
    """Relative errors of named outputs against the truth, over batches taken as one. Holds no tensors."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def add(self, actual: Outputs, truth: Outputs) -> None:
        """Adds a batch: tensors by name; `truth` in float64. An output only one side has, or of another shape, counts
        as infinitely wrong."""
        for name in {**truth, **actual}:
            total = self._sums.setdefault(name, _Sum())
            if name not in actual or name not in truth or actual[name].shape != truth[name].shape:
                total.difference = math.inf
                continue
            norm = truth[name].norm().item()
            scale = norm if 0 < norm < math.inf else 1.0
            total.elements += truth[name].numel()
            total.difference += (numerics.relative_error(actual[name], truth[name]) * scale) ** 2
            total.truth += norm**2
            total.dtypes.add(actual[name].dtype)

    def judge(self, stock: Errors, dtype: torch.dtype, layout: str, slack: float = numerics.SLACK) -> list[Row]:
        """A row for each output, in the order they were added; `stock`'s errors in the same `dtype` set the bounds."""
        rows = []
        for name in {**stock._sums, **self._sums}:
            mine, theirs = self._sums.get(name, _Sum(difference=math.inf)), stock._sums.get(name, _Sum())
            error = mine.error if mine.dtypes == theirs.dtypes else math.inf
            limit = numerics.bound(theirs.error, dtype, slack) if math.isfinite(theirs.error) else math.nan
            rows.append(Row(layout, name, mine.elements, error, theirs.error, limit))
        return rows


def verify(
    model: nn.Module,
    inputs: Sequence[str] | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    tokenizer: object = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layouts: Sequence[str] = LAYOUTS,
    batch_size: int = 8,
    precision: Precision | None = None,
    prepack: bool = False,
) -> Report:
    """Compares the fused forward of `model` with stock in float64 and stock in the same dtype, on copies of it.

    The copies share the model's weights where dtype and device agree; the model itself is left as it is, fused or not.
    Of the whole model, whatever stands around the Hugging Face model in it, the report says whether what it returns
    depends on what stands at padding: found by noise that is put there.

    Args:
        model: a Hugging Face model with any head, fused or stock, or a module that holds one (a SentenceTransformer, a
            CrossEncoder, a wrapper).
        inputs: texts; or the tensors of a call, by argument name: input_ids or inputs_embeds, and what goes with them,
            (batch, tokens), or (batch, choices, tokens) for multiple choice; or a list of such calls.
        tokenizer: for texts; default: the one `model` carries, as a SentenceTransformer does.
        dtype: the working dtype, float32, bfloat16 or float16; default: the model's. Weights are rounded to it first,
            and the truth is computed on the rounded ones.
        device: where fused and stock run; default: the model's. The truth is always computed on the CPU.
        layouts: which layouts of the fused path to run, of "packed" and "dense"; DeBERTa has the first alone.
        batch_size: how many texts go into one forward.
        precision: as `fuse` takes it. In FP8 or int8 the bound is set by stock with its linear layers in it, and the
            report says what they change in what the model is used for.
        prepack: as `fuse` takes it.

    Returns:
        The report: `.ok`, `.rows`, `.first_departure`, `.ran`, `.padding`, `str()`, `.to_dict()`, `.to_json()`.

    Raises:
        ValueError: an argument is out of range, empty, all padding, or lacks what it needs; ids are not of the model;
            the weights hold NaN or infinity.
        UnsupportedModelError: nothing in `model` could be fused, or not in this precision.
    """
    if isinstance(layouts, str) or not layouts or any(layout not in LAYOUTS for layout in layouts):
        raise ValueError(f"layouts is {layouts!r}; expected one or more of {LAYOUTS}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    inner = inner_model(model)
    dtype = inner.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    device = inner.device if device is None else torch.device(device)
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    batches = list(batches_of(inner, inputs, tokenizer, batch_size))
    for batch in batches:
        if "inputs_embeds" in batch:
            batch["inputs_embeds"] = batch["inputs_embeds"].to(dtype)
    if not any(real_tokens(batch).any() for batch in batches):
        raise ValueError("inputs: 'attention_mask' is 0 everywhere, nothing would be compared; expected a real token")

    working = twin(inner, device, dtype)
    bounding = working
    # Refused before anything is computed, where nothing can be fused.
    fuse(working, precision=precision, prepack=prepack)
    if precision is not None:
        bounding = stock_in(precision, inner, device, dtype)
    unfuse(working)
    for name, parameter in working.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"model: parameter {name!r} holds NaN or infinity in {dtype}; expected finite weights, and a dtype "
                "that they fit in"
            )
    truth = twin(inner, torch.device("cpu"), dtype, torch.float64)
    widen(truth)
    if truth.config._attn_implementation not in ("eager", "sdpa"):
        truth.set_attn_implementation("sdpa")  # the others know neither float64 nor the CPU

    padding = _padding(model, inputs, batches, device, dtype, batch_size)
    stock_errors, quality = Errors(), Quality()
    fused_errors = {layout: Errors() for layout in layouts}
    ran: dict[str, Counter[str]] = {layout: Counter() for layout in layouts}
    not_fused: dict[str, str] = {}
    stock_parts: dict[str, str] = {}
    tokens = sequences = 0
    with torch.inference_mode():
        for batch in batches:
            real = real_tokens(batch)
            sequences, tokens = sequences + real.shape[0], tokens + int(real.sum())
            expected = _outputs(truth, batch, real)
            stock_errors.add(_outputs(bounding, batch, real), expected)
            plain = {} if precision is None else _outputs(working, batch, real)
            for layout in layouts:
                # Where padding is read, packed is auto: dense where it must be.
                fuse(
                    working,
                    padding="dense" if layout == "dense" else "auto" if padding.reads else "packed",
                    precision=precision,
                    prepack=prepack,
                )
                found = _outputs(working, batch, real)
                fused_errors[layout].add(found, expected)
                if precision is not None and layout == layouts[0]:
                    quality.add(expected, plain, found, real)
                for encoder in explain(working).encoders:
                    ran[layout].update(encoder.fused_calls)
                    if encoder.stock_calls:
                        not_fused[layout] = ", ".join(encoder.stock_calls)
                    stock_parts.update({f"layer.{i}": reason for i, reason in encoder.layers.items()})
                    if encoder.embeddings:
                        stock_parts["embeddings"] = encoder.embeddings
                unfuse(working)  # which also starts the counts anew
    slack = numerics.SLACKS[precision]
    rows = [row for layout in layouts for row in fused_errors[layout].judge(stock_errors, dtype, layout, slack)]
    return Report(
        model=type(inner).__name__,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        sequences=sequences,
        tokens=tokens,
        ran={layout: dict(counts) for layout, counts in ran.items()},
        not_fused=not_fused,
        stock_parts=stock_parts,
        rows=rows,
        precision=precision,
        quality=quality.measures(),
        padding=padding,
    )


def _padding(
    model: nn.Module,
    inputs: object,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> Sensitivity:
    """`sensitivity` of a copy of the whole model, as it was given."""
    whole = twin(model, device, dtype)
    texts = [text for text in inputs if isinstance(text, str)][:batch_size] if isinstance(inputs, Sequence) else []
    moved = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    return sensitivity(whole, texts, moved)


def stock_in(precision: Precision, inner: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A stock twin of `inner` whose linear layers multiply rounded numbers, where `inner`, fused so, would."""
    model = twin(inner, device, dtype)
    encoder = encoder_of(fuse(model, precision=precision).base_model)
    low: LowPrecision = encoder.fastbert.precision
    for group in low.groups(layers_in(encoder)).values():
        for linear in group:
            linear.weight = nn.Parameter(low.rounded_weight(linear.weight.detach()), False)
            linear.register_forward_pre_hook(lambda module, args: (low.rounded(args[0]), *args[1:]))
    return unfuse(model)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The outermost Hugging Face model in `model` that is built on one encoder."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is of type {type(model).__name__}; expected a torch.nn.Module")
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        raise ValueError(
            f"model is of type {type(model).__name__}, which holds no Hugging Face model; "
            "expected a PreTrainedModel or a module around one"
        )
    inner = next((module for module in found if hasattr(module.base_model, "embeddings")), found[0])
    for name, parameter in inner.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: parameter {name!r} is on the meta device; load the weights first")
    return inner


def twin(model: Module, device: torch.device, *dtypes: torch.dtype) -> Module:
    """A stock copy in evaluation mode, its floating-point tensors cast to each of `dtypes` in turn.

    Tensors that need no cast and no move are shared with `model`, so a copy of the same kind takes no memory.
    """
    memo: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        cast = tensor.detach().to(device)
        for dtype in dtypes if cast.is_floating_point() else ():
            cast = cast.to(dtype)
        same = cast.dtype == tensor.dtype and cast.device == tensor.device
        if same:
            memo[id(tensor)] = tensor
        else:
            memo[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
    return unfuse(copy.deepcopy(model, memo)).eval()


def batches_of(
    model: PreTrainedModel, inputs: object, tokenizer: object, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise ValueError(f"inputs is of type {type(inputs).__name__}; expected texts, a mapping or a list of mappings")
    if not inputs:
        raise ValueError("inputs is empty; expected at least one text or mapping")
    if all(isinstance(item, str) for item in inputs):
        yield from _tokenized(model, inputs, tokenizer, batch_size)
    elif all(isinstance(item, Mapping) for item in inputs):
        for item in inputs:
            yield _checked(model, item)
    else:
        raise ValueError("inputs mixes kinds; expected all texts or all mappings of tensors")


def _tokenized(
    model: PreTrainedModel, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    if tokenizer is None:
        raise ValueError("tokenizer is None, and inputs holds texts; expected the model's tokenizer")
    limit = min(tokenizer.model_max_length, _limit(model) or 512)
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        encoding = tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batch = {name: encoding[name] for name in _ARGUMENTS if name in encoding}
        if type(model).__name__.endswith("ForMultipleChoice"):
            batch = {name: tensor.unsqueeze(1) for name, tensor in batch.items()}  # one choice each
        yield _checked(model, batch)


def _checked(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, tensor in batch.items():
        if name not in _ARGUMENTS:
            raise ValueError(f"inputs: {name!r} is not compared; expected {', '.join(_ARGUMENTS)}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"inputs: {name!r} is of type {type(tensor).__name__}; expected a tensor")
        if not tensor.numel():
            raise ValueError(f"inputs: {name!r} is empty, of shape {tuple(tensor.shape)}; expected a token or more")
    if ("input_ids" in batch) == ("inputs_embeds" in batch):
        raise ValueError("inputs: expected either input_ids or inputs_embeds in every mapping")
    shape = _shape(batch)
    if len(shape) not in (2, 3):
        raise ValueError(f"inputs: has shape {tuple(shape)}; expected (batch, tokens) or (batch, choices, tokens)")
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        found = batch[name].shape if name in batch else shape
        fits = name != "attention_mask" and found[-1:] == shape[-1:]  # ids of one sequence are for all
        if found != shape and not (fits and found[:-1].numel() in (1, shape[:-1].numel())):
            raise ValueError(f"inputs: {name!r} has shape {tuple(found)}; expected {tuple(shape)}")
    base, known = model.base_model, _is_known(model)
    embeddings: Any = embeddings_of(base) if known else None
    for name, place in family_of(base).ids.items() if known else ():
        table = table_of(embeddings, place)
        rows = getattr(getattr(table, "base_layer", table), "num_embeddings", None)  # that of PEFT's adapters
        if name in batch and rows is not None:
            _check_ids(name, batch[name], rows)
    limit = _limit(model)
    if limit is not None and "position_ids" not in batch:
        # Where there is a position for padding, tokens of its id have that one, however many they are.
        by_id = first_position(embeddings) and "input_ids" in batch
        tokens = int((batch["input_ids"] != embeddings.padding_idx).sum(-1).max()) if by_id else shape[-1]
        if tokens > limit:
            raise ValueError(f"inputs: a sequence of {tokens} tokens; the model has positions for {limit}")
    return dict(batch)


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"inputs: {name!r} is of {ids.dtype}; expected torch.int64 or torch.int32")
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= rows:
        told = f"holds {low if low < 0 else high}; expected 0 to {rows - 1}, by the model's embeddings"
        raise ValueError(f"inputs: {name!r} {told}")


def _is_known(model: PreTrainedModel) -> bool:
    """Whether its base model is of a family; one that isn't is refused later."""
    return any(kind in REGISTERED for kind in type(model.base_model).__mro__)


def _limit(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have, where that is known."""
    return longest_sequence(model.base_model) if _is_known(model) else None


def _shape(batch: Mapping[str, Tensor]) -> torch.Size:
    return batch["input_ids"].shape if "input_ids" in batch else batch["inputs_embeds"].shape[:-1]


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """(sequences, tokens) bool on the CPU, True at real tokens; choices count as sequences."""
    shape = _shape(batch)
    mask = batch.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu() != 0
    return real.reshape(-1, shape[-1])


def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """One forward: embeddings, layers, the encoder's results and the head's, at real tokens, by name and in order."""
    call = {
        name: tensor.to(model.device, model.dtype) if name == "inputs_embeds" else tensor.to(model.device)
        for name, tensor in batch.items()
    }
    outputs: dict[str, Tensor] = {}
    encoded: list[Mapping[str, object]] = []
    base = model.base_model
    with contextlib.ExitStack() as stack:
        loops = family_of(base).loops  # and calls its embeddings and layers itself: the first layer's input is theirs
        if not loops:
            stack.enter_context(_recorded(embeddings_of(base), ["embeddings"], outputs, real))
        called = stack_of(base)
        for i, layer in enumerate(called.layers):
            taken = "embeddings" if loops and i == 0 else None
            names = [f"layer.{place}" for place, each in enumerate(called.calls) if each == i]
            stack.enter_context(_recorded(layer, names, outputs, real, taken))
        stack.callback(base.register_forward_hook(lambda module, args, output: encoded.append(output)).remove)
        result = model(**call, return_dict=True)
    for name, value in chain(encoded[0].items(), result.items()):
        if isinstance(value, Tensor):
            one_a_token = value.dim() == 3 or name in _ONE_A_TOKEN
            outputs[name] = at_real_tokens(value, real) if one_a_token else value
    return outputs


@contextlib.contextmanager
def _recorded(
    module: nn.Module, names: Sequence[str], outputs: dict[str, Tensor], real: Tensor, taken: str | None = None
) -> Iterator[None]:
    """Puts what `module` returns, at real tokens, into `outputs`, and under the name `taken` what it is given first.

    `names` are those of its calls, one after the other.

    By a subclass, not a hook: a hook expects the padded layout, so a fused model that has one runs dense.
    """
    kind: Any = type(module)
    left = iter(names)

    class Recorder(kind):
        def forward(self, *args: object, **kwargs: object) -> object:
            if taken is not None:
                outputs[taken] = at_real_tokens(cast(Tensor, args[0]), real)
            result = super().forward(*args, **kwargs)
            hidden = result[0] if isinstance(result, tuple) else result  # a tuple of MPNet's stock layers
            outputs[next(left, names[-1])] = at_real_tokens(hidden, real)
            return result

    module.__class__ = Recorder
    try:
        yield
    finally:
        module.__class__ = kind


def at_real_tokens(tensor: Tensor, real: Tensor) -> Tensor:
    """The rows at real tokens of a padded (sequences, tokens, ...) tensor, or of a packed (1, real tokens, ...) one."""
    return tensor[real.to(tensor.device)] if tensor.shape[:2] == real.shape else tensor.flatten(0, 1)
