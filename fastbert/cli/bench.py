"""`fastbert bench`: stock against fused in one process, checked before they are timed; and the records it leaves.

A workload is a batch of sequence lengths. Where they come from text, batches are drawn at random, with a fixed seed,
from `lengths.json` (counts of token lengths, made by benchmarks/lengths.py); of `DRAWS` of them the one nearest to
their mean in real tokens and in padding is run, so that no figure comes of a lucky draw.

Stock runs the batch padded to its longest row; so does the caller of fused, whose time includes packing. Weights are
seeded and shared by all candidates, which take turns in random order. Time is that of a forward, or of a training
step: forward with dropout and backward, without an optimizer. On a GPU it is taken between CUDA events. Memory is what
it takes on top of the weights, and of their gradients: on a CPU the growth of the peak of the resident set (Linux), on
a GPU of the allocator's. The floor is the larger of counted FLOPs of real tokens over the rate of matrix products, and
bytes of weights over the rate of copying, three times either for a step; both rates are measured in the run.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import fastbert

from .. import explain, fuse, numerics
from ..verify import twin
from . import UsageError
from .info import backend, default_device, device_name, driver, versions
from .peers import INFERENCE_ONLY, PEERS, Unavailable, share

SHAPES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
DRAWS = 1000
LEAST_REPEATS = 3
SEED = 0
MARKERS = ("<!-- table:begin -->", "<!-- table:end -->")


@dataclass(frozen=True)
class Workload:
    """One batch of sequences: their lengths in tokens."""

    name: str
    lengths: tuple[int, ...]

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        return len(self.lengths) * max(self.lengths)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Random ids, padded on the right, with their mask: (batch, longest), int64."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (len(self.lengths), max(self.lengths))
        ids = torch.randint(1000, 30000, shape, generator=generator)
        mask = (torch.arange(shape[1]) < torch.tensor(self.lengths)[:, None]).long()
        return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def draw(*parts: tuple[str, int]) -> tuple[int, ...]:
    """Lengths of a typical batch: of each (histogram of lengths.json, count), so many; shuffled."""
    histograms = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
    chance = random.Random(SEED)
    batches = []
    for _ in range(DRAWS):
        batch: list[int] = []
        for name, count in parts:
            counts = histograms[name]["counts"]
            batch += map(int, chance.choices(list(counts), list(counts.values()), k=count))
        chance.shuffle(batch)
        batches.append(tuple(batch))
    tokens = [sum(lengths) for lengths in batches]
    padding = [max(lengths) * len(lengths) / sum(lengths) for lengths in batches]
    aim = statistics.fmean(tokens), statistics.fmean(padding)

    def distance(i: int) -> float:
        return (tokens[i] / aim[0] - 1) ** 2 + (padding[i] / aim[1] - 1) ** 2

    return batches[min(range(DRAWS), key=distance)]


def workload(name: str) -> Workload:
    """A workload by name: "squad" (question + passage, 16), "mixed" (16 sentences, 16 passages), "dense", "single"."""
    lengths = {
        "squad": lambda: draw(("squad_pairs", 16)),
        "mixed": lambda: draw(("sst2", 16), ("squad_passages", 16)),
        "dense": lambda: (128,) * 8,
        "single": lambda: (128,),
    }[name]()
    return Workload(f"{name} b{len(lengths)}", lengths)


def build(size: str, dtype: torch.dtype, device: torch.device) -> BertModel:
    """A stock model in evaluation mode with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BertModel(BertConfig(**SHAPES[size], attn_implementation="sdpa"))
    return model.to(device, dtype).eval()


def flops(config: Any, lengths: Sequence[int]) -> int:
    """Floating-point operations of the encoder's matrix products over real tokens, attention within each sequence."""
    h, i = config.hidden_size, config.intermediate_size
    a_token = 2 * (4 * h * h + 2 * h * i)
    return config.num_hidden_layers * sum(n * a_token + 4 * h * n * n for n in lengths)


class Machine:
    """What `device` can do at best, measured: the rates of the floor."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._products: dict[torch.dtype, float] = {}
        source = torch.ones((1 << 28) // 4, device=device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(5))

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Of a square matrix product; on a CPU that is slower in 16-bit dtypes than in float32, float32's rate."""
        if dtype not in self._products:
            n = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            rate = 2 * n**3 / min(timed(lambda: a @ b, self.device) for _ in range(3))
            if self.device.type == "cpu" and dtype != torch.float32:
                rate = max(rate, self.flops_per_s(torch.float32))
            self._products[dtype] = rate
        return self._products[dtype]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_growth(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which one call raises the peak of memory in use, above what is in use before it; None where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    # Memory freed earlier but still held by the allocator would hide what the call needs: give it back first.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts over from the present resident set
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def commit() -> str:
    """The commit this code runs from, "-dirty" where files differ from it; the version where it is no checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=30, check=False)

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return f"v{fastbert.__version__}"
        dirty = bool(git("status", "--porcelain", "--untracked-files=no").stdout)
    except FileNotFoundError:  # no git
        return f"v{fastbert.__version__}"
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if dirty else "")


def environment(device: torch.device) -> dict[str, Any]:
    """What every record says about where it was measured."""
    installed = versions()
    return {
        "device": device.type,
        "device_name": device_name(device),
        "driver": driver(device),
        "torch": torch.__version__,
        "triton": installed["triton"],
        "transformers": installed["transformers"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": backend(device),
        "num_threads": torch.get_num_threads(),
    }


class _Candidate:
    """One way to run the model, what it gave and what went wrong."""

    def __init__(self, name: str, model: Any = None, status: str = "ok") -> None:
        self.name = name
        self.model = model
        self.status = status
        self.error: float | None = None
        self.samples: list[float] = []
        self.peak_memory: int | None = None

    def attempt(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """What `step` returns; None, and a status that says why, where it fails. The others go on."""
        try:
            return step(*arguments)
        except Unavailable as error:
            self.status = f"UNAVAILABLE: {error}"
        except AssertionError as error:
            self.status = f"FAILED: {error}"
        except Exception as error:  # out of memory, a kernel that doesn't compile: reported as this candidate's result
            self.status = f"ERROR: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
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
) -> Iterator[dict[str, Any]]:
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
        Records: plain data, times in seconds. A candidate beyond the numerical policy has status "FAILED: ...", one
        that broke "ERROR: ..." and one that can't run here "UNAVAILABLE: ..."; none of these has a time.
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
            truths = _truths(model, workloads, train)
            ways = _ways(model, peers, train)
            for item, truth in zip(workloads, truths, strict=True):
                if begun and time.monotonic() > deadline:
                    return
                share = (deadline - time.monotonic()) / (cases - begun)
                begun += 1
                candidates = [_Candidate(*way) for way in ways]
                measure = _measure if train else torch.inference_mode()(_measure)
                measure(candidates, item, truth, repeats, time.monotonic() + share, train)
                model.zero_grad()
                floor = (3 if train else 1) * max(
                    flops(model.config, item.lengths) / machine.flops_per_s(dtype),
                    sum(p.nbytes for p in model.encoder.parameters()) / machine.bytes_per_s,
                )
                what = "BertModel training step" if train else "BertModel forward"
                yield from _records(candidates, item, size, dtype, model.config, floor, {"what": what, **about})


def _ways(model: BertModel, peers: Sequence[str], train: bool) -> list[tuple[str, Any, str]]:
    """Ways to run `model`: (name, what runs it, status); stock and fused first."""
    found: list[tuple[str, Any, str]] = [("stock", model, "ok"), ("fused", fuse(share(model)), "ok")]
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


def _backward(model: BertModel, inputs: dict[str, Tensor]) -> None:
    """Gradients of a fixed random projection of every real token's output."""
    hidden = model(**inputs).last_hidden_state
    generator = torch.Generator().manual_seed(SEED)
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden)
    (hidden * weights * inputs["attention_mask"][..., None]).sum().backward()


def _gradients(model: BertModel, item: Workload, device: torch.device) -> Tensor:
    """Of the sequences that are checked, without dropout: the gradients of the first and the last layer, end to end."""
    checked = _checked(item)
    longest = max(item.lengths[i] for i in checked)
    inputs = {name: x[checked, :longest] for name, x in item.inputs(device).items()}
    model.eval()
    model.zero_grad()
    _backward(model, inputs)
    layers = model.encoder.layer[0], model.encoder.layer[-1]
    found = torch.cat([p.grad.flatten() for layer in layers for p in layer.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def _outputs(model: BertModel, item: Workload, device: torch.device) -> Tensor:
    """Of the sequences that are checked, in the whole batch: (their tokens, hidden)."""
    hidden = model(**item.inputs(device)).last_hidden_state
    return torch.cat([hidden[i, : item.lengths[i]] for i in _checked(item)])


def _truths(model: BertModel, workloads: Sequence[Workload], train: bool) -> list[Tensor]:
    """For each workload, what its candidates are checked by, in float64; outputs of each sequence alone."""
    reference = twin(model, model.device, torch.float64)
    if train:
        reference.encoder.requires_grad_()
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
        candidate.error, _ = numerics.assert_within_policy(rows, stock_rows[0], truth)

    def call(candidate: _Candidate) -> Callable[[], Any]:
        return lambda: _backward(candidate.model, inputs) if train else candidate.model(**inputs)

    for candidate in candidates:
        if candidate.status == "ok":
            candidate.attempt(check, candidate)
            candidate.model.train(train)
    for candidate in candidates:
        if candidate.status == "ok":
            if train:  # gradients are there before the step whose memory is measured
                candidate.attempt(call(candidate))
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
    config: Any,
    floor: float,
    about: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    def quantiles(candidate: _Candidate) -> list[float | None]:
        if not candidate.samples:
            return [None, None, None]
        samples = torch.tensor(candidate.samples, dtype=torch.float64)
        return samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()

    stock = quantiles(candidates[0])[1]
    for candidate in candidates:
        low, median, high = quantiles(candidate)
        yield {
            "candidate": candidate.name,
            "status": candidate.status,
            "workload": item.name,
            "size": size,
            "shape": {
                "batch": len(item.lengths),
                "longest": max(item.lengths),
                "layers": config.num_hidden_layers,
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            "dtype": str(dtype).removeprefix("torch."),
            "repeats": len(candidate.samples),
            "median_s": median,
            "p20_s": low,
            "p80_s": high,
            "peak_memory_bytes": candidate.peak_memory,
            "real_tokens": item.real_tokens,
            "padded_tokens": item.padded_tokens,
            "tokens_per_s": None if median is None else item.real_tokens / median,
            "ratio_to_stock": None if median is None or stock is None else stock / median,
            "ideal_ratio": item.padded_tokens / item.real_tokens,
            "fraction_of_floor": None if median is None else floor / median,
            "error": candidate.error,
            **about,
        }


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Replaces `path` at once, so that whoever reads it or interrupts sees whole records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(list(records), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def record_path(folder: Path, about: dict[str, Any]) -> Path:
    """`folder`/<device>/<date>-<commit>.json."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", about["device_name"]).strip("-").lower()
    date = about["date"][:16].replace(":", "")
    return folder / name / f"{date}-{about['commit']}.json"


def render(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table, a row for each case from the latest run that measured it; then what did not run, and where."""
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        key = tuple(record[name] for name in ("device_name", "what", "size", "dtype", "workload"))
        if key in cases and cases[key][0]["date"] != record["date"]:
            cases[key] = []
        cases.setdefault(key, []).append(record)
    lines = [
        "| device | what | model | dtype | workload | padded / real | stock, tokens/s | fused, tokens/s | x stock | "
        "of the floor | memory, MiB: stock, fused | repeats | others, x stock |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    absent: set[str] = set()
    places: set[str] = set()
    for (device, what, *case), run in cases.items():
        places.update(
            f"{device}: {r['backend']}, torch {r['torch']}, triton {r['triton']}, transformers {r['transformers']}, "
            f"{r['num_threads']} threads, commit {r['commit']}, {r['date'][:10]}."
            for r in run
        )
        found = {record["candidate"]: record for record in run}
        stock, fused = (found.pop(name, None) for name in ("stock", "fused"))
        others = []
        for name, record in found.items():
            if record["status"].startswith("UNAVAILABLE"):
                absent.add(f"{device}, {name}: {record['status'].partition(': ')[2]}.")
            else:
                others.append(f"{name} {_figure(record, 'ratio_to_stock', '.2f')}")
        ideal = max(record["ideal_ratio"] for record in run)
        figures = [
            f"{ideal:.2f}",
            _figure(stock, "tokens_per_s", ",.0f"),
            _figure(fused, "tokens_per_s", ",.0f"),
            _figure(fused, "ratio_to_stock", ".2f"),
            _figure(fused, "fraction_of_floor", ".0%"),
            ", ".join(_figure(record, "peak_memory_bytes", ",.0f", 2**20) for record in (stock, fused)),
            _figure(fused, "repeats", "d"),
            "; ".join(others),
        ]
        lines.append("| " + " | ".join([device, what.removeprefix("BertModel "), *case, *figures]) + " |")
    missing = ["Not run:", "", *(f"- {each}" for each in sorted(absent)), ""] if absent else []
    return "\n".join([*lines, "", *missing, *sorted(places)])


def _figure(record: dict[str, Any] | None, name: str, form: str, unit: int = 1) -> str:
    """A field for the table, in units of `unit`; in its place what became of the candidate, where it has no time."""
    if record is None:
        return "-"
    if record["status"] != "ok":
        return str(record["status"]).partition(":")[0]
    value = record[name]
    return "-" if value is None else format(value if unit == 1 else value / unit, form)


def splice(text: str, table: str) -> str:
    """`text` with `table` between the markers, in place of what was there.

    Raises:
        UsageError: the markers are not there.
    """
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        raise UsageError(f"--readme: expected a line {MARKERS[0]} and after it one {MARKERS[1]}")
    return f"{text[: begin + len(MARKERS[0])]}\n{table}\n{text[end:]}"


def _report(files: Sequence[str], readme: str) -> int:
    records: list[dict[str, Any]] = []
    try:
        for file in files:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(found, list) or not all(isinstance(r, dict) and "fraction_of_floor" in r for r in found):
                raise UsageError(f"--report: {file} holds no records of this command")
            records += found
        path = Path(readme)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    path.write_text(splice(text, render(records)), encoding="utf-8")
    return 0


HEADER = f"{'model':<8}{'dtype':<10}{'workload':<12}{'run':<38}" + "".join(
    name.rjust(width)
    for name, width in (("ms", 10), ("tokens/s", 11), ("x stock", 9), ("ideal", 7), ("floor", 7), ("MiB", 8))
)


def line(record: dict[str, Any]) -> str:
    """One record as a line under HEADER."""
    case = f"{record['size']:<8}{record['dtype']:<10}{record['workload']:<12}{record['candidate']:<38}"
    if record["median_s"] is None:
        return case + record["status"]
    ratio, memory = record["ratio_to_stock"], record["peak_memory_bytes"]
    return (
        f"{case}{1000 * record['median_s']:>10.1f}{record['tokens_per_s']:>11.0f}"
        f"{'' if ratio is None else f'{ratio:.2f}':>9}{record['ideal_ratio']:>7.2f}"
        f"{record['fraction_of_floor']:>7.0%}{'' if memory is None else f'{memory / 2**20:.0f}':>8}"
    )


def main(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        return _report(arguments.report, arguments.readme)
    if arguments.repeats < LEAST_REPEATS:
        raise UsageError(f"--repeats is {arguments.repeats}; expected at least {LEAST_REPEATS}")
    if not arguments.minutes > 0:
        raise UsageError(f"--minutes is {arguments.minutes}; expected more than 0")
    if arguments.output is not None:
        try:  # now, not after minutes of measuring
            Path(arguments.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output: {error}") from error
    device = default_device(arguments.device)
    names = arguments.dtype or (["float32"] if device.type == "cpu" else ["bfloat16", "float16"])
    print(f"{device_name(device)}, fused by {backend(device)}\n{HEADER}")
    records: list[dict[str, Any]] = []
    for record in run(
        [workload(name) for name in arguments.workload],
        arguments.size,
        [getattr(torch, name) for name in names],
        device=device,
        repeats=arguments.repeats,
        minutes=arguments.minutes,
        peers=list(PEERS) if "all" in arguments.peers else arguments.peers,
        train=arguments.train,
    ):
        records.append(record)
        print(line(record), flush=True)
        if arguments.output is not None:
            write(record_path(Path(arguments.output), records[0]), records)
    expected = len(arguments.workload) * len(arguments.size) * len(names)
    if (done := len({(r["workload"], r["size"], r["dtype"]) for r in records})) < expected:
        print(f"out of time: {expected - done} of {expected} cases were not begun; see --minutes", file=sys.stderr)
    return 1 if any(record["status"].startswith(("FAILED", "ERROR")) for record in records) else 0
