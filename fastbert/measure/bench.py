"""Stock against fused in one process, checked before they are timed; and the records it leaves.

Stock runs the batch padded to its longest row; so does the caller of fused, whose time includes packing. Weights are
seeded and shared by all candidates, which take turns in random order. Time is that of a forward, or of a training
step: forward with dropout and backward, without an optimizer. On a GPU it is taken between CUDA events. Memory is what
it takes on top of the weights, and of their gradients: on a CPU the growth of the peak of the resident set (Linux), on
a GPU of the allocator's. The roofline is what `counts.encoder` counts, FLOPs over the rate of matmuls or bytes
over the rate of copying, whichever is larger; both rates are measured in the run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import numerics
from ..explain import explain
from ..fuse import fuse
from ..usage import in_a_line
from ..verify import stock_in, twin
from . import counts, gates, records
from .cases import SEED, Workload, build, shape_of
from .machine import Machine, Rates, environment, peak_growth, timed
from .peers import INFERENCE_ONLY, KEEP_MEMORY, LOW_PRECISION, PEERS, Unavailable, share

P = ParamSpec("P")
R = TypeVar("R")
LEAST_REPEATS = 3


def what(model: PreTrainedModel, train: bool) -> str:
    """The field of that name of a record of `model`, stock or fused."""
    return f"{type(model).__name__} {'training step' if train else 'forward'}"


class _Candidate:
    """One way to run the model, what it gave and what went wrong."""

    def __init__(self, name: str, model: Any = None, status: str = "ok") -> None:
        self.name = name
        self.model = model
        self.status = status
        self.error: float | None = None
        self.samples: list[float] = []
        self.peak_memory: int | None = None

    def attempt(self, step: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R | None:
        """What `step` returns; None, and a status that says why, where it fails. The others go on."""
        try:
            return step(*arguments, **named)
        except Unavailable as error:
            self.status = f"UNAVAILABLE: {error}"
        except AssertionError as error:
            self.status = f"FAILED: {error}"
        except Exception as error:  # out of memory, a kernel that doesn't compile: reported as this candidate's result
            self.status = f"ERROR: {type(error).__name__}: {in_a_line(error)[:300]}"
        self.samples.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def run(
    workloads: Sequence[Workload],
    sizes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    *,
    device: torch.device,
    repeats: int = 20,
    minutes: float = 8.0,
    peers: Sequence[str] = (),
    train: bool = False,
) -> Iterator[records.Record]:
    """Measures every workload x size x dtype; yields a record for each candidate as soon as its case is done.

    Args:
        workloads: the batches.
        sizes: keys of SHAPES.
        dtypes: working dtypes.
        device: a CPU or CUDA device.
        repeats: timed forwards of each candidate.
        minutes: repeats are cut, to LEAST_REPEATS if need be, to end about then; cases not begun by then are left out.
        peers: further candidates, names in peers.PEERS.
        train: whether training steps are measured, not forwards.

    Yields:
        Records: plain data, times in seconds. A candidate beyond the numerical policy, or whose tests are red
        (gates.py), has status "FAILED: ...", one that broke "ERROR: ..." and one that can't run here
        "UNAVAILABLE: ..."; none of these has a time.
    """
    deadline = time.monotonic() + 60 * minutes
    about, machine = environment(device), Machine(device)
    cases = len(workloads) * len(sizes) * len(dtypes)
    begun = 0
    for size in sizes:
        for dtype in dtypes:
            if begun and time.monotonic() > deadline:
                return
            model = build(size, dtype, device)
            rates = machine.rates(dtype)
            truths = _truths(model, workloads, train)
            ways = _ways(model, peers, train)
            for item, truth in zip(workloads, truths, strict=True):
                if begun and time.monotonic() > deadline:
                    return
                share = (deadline - time.monotonic()) / (cases - begun)
                begun += 1
                candidates = [_Candidate(*way) for way in ways]
                for candidate in candidates:
                    state = gates.state(what(model, train), candidate.name, dtype) or gates.GREEN
                    if candidate.status == "ok" and state.startswith(gates.RED):
                        candidate.status = f"FAILED: its tests are {state}"
                measure = _measure if train else torch.inference_mode()(_measure)
                measure(candidates, item, truth, repeats, time.monotonic() + share, train)
                model.zero_grad()
                yield from _records(candidates, item, size, dtype, model, rates, train, about)


def _ways(model: PreTrainedModel, peers: Sequence[str], train: bool) -> list[tuple[str, nn.Module, str]]:
    """Ways to run `model`: (name, what runs it, status); stock and fused first."""
    found: list[tuple[str, nn.Module, str]] = [("stock", model, "ok"), ("fused", fuse(share(model)), "ok")]
    for peer in peers:
        name, build = PEERS[peer]
        candidate = _Candidate(name)
        if train and peer in INFERENCE_ONLY:
            candidate.status = "UNAVAILABLE: it is for inference"
        else:
            candidate.model = candidate.attempt(build, model)
        found.append((name, candidate.model, candidate.status))
    return found


def _checked(item: Workload) -> list[int]:
    """The sequences whose output is compared with float64: the shortest and the longest."""
    order = sorted(range(len(item.lengths)), key=lambda i: item.lengths[i])
    return sorted({order[0], order[-1]})


def _backward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Gradients of a fixed random projection of every real token's output."""
    hidden = model(**inputs).last_hidden_state
    generator = torch.Generator().manual_seed(SEED)
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden)
    (hidden * weights * inputs["attention_mask"][..., None]).sum().backward()


def _encoder(model: nn.Module) -> nn.Module:
    """What holds the layers, of a base model or of what a peer has made of one: itself, where it calls them itself."""
    return getattr(model, "encoder", model)


def _gradients(model: nn.Module, item: Workload, device: torch.device) -> Tensor:
    """Of the sequences that are checked, without dropout: the gradients of the first and the last layer, end to end.

    And those of DeBERTa's positions, to which every layer adds.
    """
    checked = _checked(item)
    longest = max(item.lengths[i] for i in checked)
    inputs = {name: x[checked, :longest] for name, x in item.inputs(device).items()}
    model.eval()
    model.zero_grad()
    _backward(model, inputs)
    encoder = _encoder(model)
    layers = encoder.get_submodule("layers" if hasattr(encoder, "layers") else "layer")
    parts = [layers.get_submodule(str(i)) for i in (0, len(list(layers.children())) - 1)]
    parts += [part for name in ("rel_embeddings", "LayerNorm") if (part := getattr(encoder, name, None)) is not None]
    found = torch.cat([p.grad.flatten() for part in parts for p in part.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def _outputs(model: nn.Module, item: Workload, device: torch.device) -> Tensor:
    """Of the sequences that are checked, in the whole batch: (their tokens, hidden)."""
    hidden = model(**item.inputs(device)).last_hidden_state
    return torch.cat([hidden[i, : item.lengths[i]] for i in _checked(item)])


def _truths(model: PreTrainedModel, workloads: Sequence[Workload], train: bool) -> list[Tensor]:
    """For each workload, what its candidates are checked by, in float64; outputs of each sequence alone."""
    reference = twin(model, model.device, torch.float64)
    if train:
        _encoder(reference).requires_grad_()
        return [_gradients(reference, item, model.device) for item in workloads]
    truths = []
    with torch.inference_mode():
        for item in workloads:
            ids = item.inputs(model.device)["input_ids"]
            alone = [ids[i : i + 1, : item.lengths[i]] for i in _checked(item)]
            truths.append(torch.cat([reference(row).last_hidden_state[0] for row in alone]))
    return truths


def _measure(
    candidates: Sequence[_Candidate], item: Workload, truth: Tensor, repeats: int, deadline: float, train: bool
) -> None:
    """Checks every candidate, then times those that passed, until `deadline` (of the monotonic clock) or `repeats`."""
    inputs = item.inputs(truth.device)
    stock_rows: list[Tensor] = []

    def check(candidate: _Candidate) -> None:
        rows = (_gradients if train else _outputs)(candidate.model, item, truth.device)
        if not torch.isfinite(rows).all():
            raise AssertionError("output is not finite")
        if candidate is candidates[0]:
            stock_rows.append(rows)
        if not stock_rows:
            raise AssertionError("there is no stock result to judge by")
        for encoder in explain(candidate.model).encoders:
            if encoder.stock_calls:
                raise AssertionError(f"ran stock: {', '.join(encoder.stock_calls)}")
        if candidate.name in LOW_PRECISION:
            candidate.error, precision = numerics.relative_error(rows, truth), LOW_PRECISION[candidate.name]
            if precision is None:  # a peer's, which nothing here is the truth for
                return
            rounded = _outputs(stock_in(precision, candidate.model, truth.device, rows.dtype), item, truth.device)
            slack = numerics.SLACKS[precision]
            limit = numerics.bound(numerics.relative_error(rounded, truth), rows.dtype, slack)
            if not candidate.error <= limit:
                raise AssertionError(
                    f"output: error {candidate.error:.3e} exceeds the bound for {precision}, {limit:.3e}"
                )
            return
        candidate.error, _ = numerics.assert_within_policy(rows, stock_rows[0], truth)

    def call(candidate: _Candidate) -> Callable[[], object]:
        return lambda: _backward(candidate.model, inputs) if train else candidate.model(**inputs)

    for candidate in candidates:
        if candidate.status == "ok":
            candidate.attempt(check, candidate)
            candidate.model.train(train)
    for candidate in candidates:
        if candidate.status == "ok":
            if train:  # gradients are there before the step whose memory is measured
                candidate.attempt(call(candidate))
            if candidate.name not in KEEP_MEMORY:
                candidate.peak_memory = candidate.attempt(peak_growth, call(candidate), truth.device)
    order = [c for c in candidates if c.status == "ok"]
    chance = random.Random(SEED)
    for done in range(repeats):
        if done >= LEAST_REPEATS and time.monotonic() > deadline:
            break
        chance.shuffle(order)
        for candidate in order:
            if candidate.status == "ok":
                candidate.model.zero_grad()
                sample = candidate.attempt(timed, call(candidate), truth.device)
                candidate.samples += [] if sample is None else [sample]


def _records(
    candidates: Sequence[_Candidate],
    item: Workload,
    size: str,
    dtype: torch.dtype,
    model: PreTrainedModel,
    rates: Rates,
    train: bool,
    about: records.Record,
) -> Iterator[records.Record]:
    config = model.config
    case = {
        "what": what(model, train),
        "workload": item.name,
        "size": size,
        "shape": shape_of(config, item),
        "real_tokens": item.real_tokens,
        "padded_tokens": item.padded_tokens,
    }
    cost = counts.encoder(config, item.lengths, dtype, train)
    stock = candidates[0].samples
    for each in candidates:
        found = (each.status, each.peak_memory, each.error)
        own = None if each.name in LOW_PRECISION else cost  # the rates are those of the dtype
        yield records.make(about, case, each.name, dtype, each.samples, stock, own, rates, *found)
