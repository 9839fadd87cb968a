"""The first minutes on a GPU: the figures that matter most, whatever else is red.

    python benchmarks/first.py [--output benchmarks/results] [--minutes 5] [--sections NAME ...] [--dry]

In this order, each with a deadline of its own:

    gates      every operation in bfloat16 at BERT-large's shapes and 128, 2,048 and 21,222 rows, against float64
    rates      what the device does at best: a GEMM of 8192 x 8192, a copy
    forwards   BERT-large: SQuAD's lengths and dense 512 at batch 128, then one text of 128 tokens. Stock on sdpa,
               fused, fused with CUDA graphs, stock packed by torch's varlen attention
    operators  every GEMM of BERT-large at 21,222, 65,536 and 128 rows: cuBLAS, shipped, persistent, tiles of
               128 x 128; attention against sdpa and varlen
    training   the gates of what only training runs; its rows are benchmarks/suite.py's

A process that never touches the device starts another that does, and ends it where a step outlasts its deadline, hung
in a CUDA call or not; the next goes on behind that step. So it is after a crash. What was found is appended to
OUTPUT/first.jsonl as it goes: gates to OUTPUT/gates.jsonl, which tests add to (benchmarks/gates.py); records, of the
form of `fastbert bench`, to OUTPUT/<device>/<date>-<commit>.json, too. A red gate closes the rows that need it and no
others. The same command resumes where it was stopped; where sources or the device changed it starts over.

With OUT in the environment, OUTPUT is packed into that folder as it goes (benchmarks/archive.py); archives that lie
there, or in build/gpu-cache, are unpacked first: of an earlier call, or kernels compiled before, by
benchmarks/prebuild.py. `--dry`: tiny sizes, on a CPU, too. Exit status: 0 all done, 1 a step failed or a gate is red,
3 out of time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from benchmarks import archive, processes  # noqa: E402

LIMITS = {"gates": 100.0, "rates": 20.0, "forwards": 100.0, "operators": 90.0, "training": 60.0}
"""Seconds of each section, in all."""
STEP_S = {
    "start": 60.0,
    "compile": 75.0,
    "gates": 20.0,
    "rates": 20.0,
    "forwards": 60.0,
    "operators": 20.0,
    "training": 20.0,
}
"""Seconds of a step of each section; until a process has begun its first; and to compile what a section launches."""
PACKED_EVERY_S = 20.0


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line of JSON that is on the disk when this returns; after one that a kill cut off, on its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(-1 if file.tell() else 0, os.SEEK_END)
        cut = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that `append` wrote; of one that a kill cut off nothing."""
    found = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


# ---- The process that watches. It imports no torch: nothing the device does can hang it.


class Child:
    """A process that measures, and what it says: lines of JSON."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self.process = processes.start(
                ["-X", "faulthandler", __file__, *arguments, "--measure"],
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut off as the process ended
                self.said.put(json.loads(text))
        self.said.put(None)

    def end(self) -> None:
        """Ends it, with all that it started, whatever it does."""
        processes.end(self.process)


def watch(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Starts processes that measure until all is done or time is up. Returns the exit status."""
    output, begun = given.output.resolve(), time.monotonic()
    deadline = begun + 60 * given.minutes
    events, log = output / "first.jsonl", output / "logs" / "first.log"
    out = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else None
    spent: dict[str, float] = {}
    ended: list[str] = []

    def pack(*names: str) -> None:
        if out is not None:
            for line in archive.pack(output, out, names or (archive.MEASURED, archive.CACHES)):
                print(f"left out of the archive: {line}", flush=True)

    def tell(**line: Any) -> None:
        append(events, {"at_s": round(time.monotonic() - begun, 2), **line})
        print(f"{time.monotonic() - begun:6.1f} s  {' '.join(str(value) for value in line.values())}", flush=True)

    for folder in (out, archive.CARRIED):
        if folder is not None and (found := archive.restore(folder, output)):
            tell(event="restored", what=f"{len(found)} files from {folder.name}")
    child: Child | None = None
    try:
        while time.monotonic() < deadline:
            child = Child([*arguments, "--spent", json.dumps(spent)], log)
            section, step, key, limit = "start", "start", "", time.monotonic() + STEP_S["start"]
            entered = packed = time.monotonic()
            why = ""
            while not why:
                now = time.monotonic()
                left = min(limit, deadline)
                if section in LIMITS:
                    left = min(left, entered + LIMITS[section] - spent.get(section, 0.0))
                try:
                    said = child.said.get(timeout=max(0.0, min(left - now, PACKED_EVERY_S)))
                except queue.Empty:
                    now = time.monotonic()
                    if now - packed > PACKED_EVERY_S:
                        pack(archive.MEASURED)
                        packed = now
                    if now >= deadline:
                        why = "out of time"
                    elif now >= left:
                        why = f"no end in {'its section' if now < limit else 'the step'}'s time"
                    continue
                if said is None:
                    code = child.process.wait()
                    why = "done" if code == 0 else f"ended its process, status {code}"
                elif "step" in said:
                    if said["section"] != section:
                        spent[section] = spent.get(section, 0.0) + time.monotonic() - entered
                        section, entered = said["section"], time.monotonic()
                    step, key, limit = said["step"], said["key"], time.monotonic() + said["limit_s"]
                else:
                    print(f"{time.monotonic() - begun:6.1f} s  {said['text']}", flush=True)
            spent[section] = spent.get(section, 0.0) + time.monotonic() - entered
            child.end()
            if why == "done":
                break
            tell(event="ended", section=section, step=step, why=why, key=key)
            ended.append(f"{section}: {step}: {why}")
            if section == "start" and len(ended) > 1 and ended[-2] == ended[-1]:
                break  # it never gets as far as a step
            if why.endswith("section's time"):
                spent[section] = float("inf")
    finally:
        if child is not None:
            child.end()
        pack()
    for line in ended:
        print(line)
    kept = {line["step"]: line for line in lines(events) if line.get("event") == "step"}
    wrong = [name for name, line in kept.items() if line["status"] != "ok"]
    print(f"{len(kept)} steps, {len(wrong)} not right{': ' if wrong else ''}{'; '.join(wrong)}")
    return 3 if time.monotonic() >= deadline else 1 if ended or wrong else 0


# ---- The process that measures.


class Poisoned(Exception):
    """The device has failed, and with it this process."""


class Steps:
    """What is done of what there is to do, by these sources on this device."""

    def __init__(self, output: Path, key: str, spent: dict[str, float]) -> None:
        self.events, self.key, self.spent = output / "first.jsonl", key, spent
        found = [line for line in lines(self.events) if line.get("key") == key]
        self.begun: set[tuple[str, str]] = set()
        self.wrong: set[tuple[str, str]] = set()
        """Of those begun, the ones that failed, or hung, or ended their process."""
        for line in found:
            if line["event"] in ("step", "ended"):
                self._note(line["section"], line["step"], line.get("status", "ended"))
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever else is printed goes into the log

    def _note(self, section: str, step: str, status: str) -> None:
        self.begun.add((section, step))
        if status != "ok":
            self.wrong.add((section, step))

    def tell(self, text: str) -> None:
        """A line for who watches."""
        print(json.dumps({"text": text}), file=self.out)

    def begin(self, section: str, step: str, limit_s: float) -> None:
        """From now on `step` runs."""
        print(json.dumps({"section": section, "step": step, "limit_s": limit_s, "key": self.key}), file=self.out)

    def end(self, section: str, step: str, status: str, since: float, **more: Any) -> None:
        """`step` has ended."""
        seconds = round(time.monotonic() - since, 3)
        line = {"event": "step", "section": section, "step": step, "status": status, "seconds": seconds, **more}
        append(self.events, {**line, "key": self.key})
        self.tell(f"{section}: {step}: {status}, {seconds:.1f} s")
        self._note(section, step, status)

    def run(self, section: str, step: str, call: Callable[[], Any], limit_s: float | None = None) -> Any:
        """What `call` returns, or None where the step was begun before or fails. Raises Poisoned."""
        if (section, step) in self.begun:
            return None
        self.begin(section, step, STEP_S[section] if limit_s is None else limit_s)
        since, status, result = time.monotonic(), "ok", None
        try:
            result = call()
        except Exception as error:  # out of memory, a kernel that doesn't compile: this step's result
            status = _status(error)
        self.end(section, step, status, since)
        if status != "ok":
            _check_device()
        return result


def _status(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"FAILED: {text}" if isinstance(error, AssertionError) else f"ERROR: {type(error).__name__}: {text}"


def _check_device() -> None:
    """Raises Poisoned where nothing more can run on the device in this process."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise Poisoned(str(error).splitlines()[0]) from error


class Case(NamedTuple):
    """One call of an operation, and what PyTorch runs in its place, which in float64 is the truth."""

    name: str
    operation: str
    arguments: Callable[[], tuple[Any, ...]]
    stock: Callable[..., Any]
    results: int | None = None
    """How many of its results, the first, are compared; None: all."""


def cases(shape: dict[str, int], rows: int, device: Any, train: bool) -> Iterator[Case]:
    """Every operation of inference, or what only training has, in bfloat16."""
    import torch
    import torch.nn.functional as F

    from fastbert import ops
    from fastbert.kernels import cpu, launch
    from fastbert.runtime.packing import pack_mask
    from fastbert.tune.problems import EPS, Sizes, lengths_of, problems

    h, i, words = shape["hidden_size"], shape["intermediate_size"], 30522
    sizes, dtype = Sizes(h, i, shape["num_attention_heads"]), torch.bfloat16
    normal = functools.partial(_normal, device=device, dtype=dtype)
    lengths = lengths_of(rows)

    def mask() -> Any:
        return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)

    def starts() -> Any:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def sequences() -> tuple[Any, ...]:
        return starts(), None, max(lengths), (h // sizes.heads) ** -0.5

    def ids() -> tuple[Any, ...]:
        chosen = [torch.randint(0, count, (rows,), device=device) for count in (words, 2, 512)]
        return (*chosen, normal(words, h), normal(2, h), normal(512, h), normal(h))

    def moved(unpacks: bool) -> tuple[Any, ...]:
        packing = pack_mask(mask()).packing
        return normal(rows if unpacks else mask().numel(), h), packing.indices, packing.inverse

    qkv = (rows, 3, sizes.heads, h // sizes.heads)

    def attended() -> tuple[Any, ...]:
        given = normal(*qkv), *sequences(), 0.0, None
        found = ops.attention_forward(*given)
        return normal(rows, *qkv[2:]), given[0], *found, *given[1:]

    def attend(qkv: Any, *rest: Any) -> Any:
        return cpu.attention(*qkv.unbind(1), *rest[:4])

    found: set[str] = set()
    for problem in problems(sizes, dtype, launch.architecture(device), train):
        name = problem.name.partition(", ")[0] if problem.same_bits else problem.name
        if ("backward" in name) == train and name not in found:
            found.add(name)
            back = problem.function == "attention_backward"
            arguments = attended if back else functools.partial(problem.arguments, rows, device)
            yield Case(name, problem.function, arguments, problem.peer)
    if not train:
        tables = cpu.embedding_layer_norm
        yield Case("tiles", "attention_tiles", lambda: (starts(), rows), cpu.attention_tiles)
        yield Case("embeddings", "embedding_layer_norm", lambda: (*ids(), normal(h), EPS, 0, -1), tables)
        yield Case("mask", "mask_layout", lambda: (mask(), None), cpu.mask_layout)
        yield Case("packing", "pack", lambda: moved(False), cpu.pack)
        yield Case("unpacking", "unpack", lambda: moved(True), cpu.unpack)
        return

    def plain(n: int, k: int) -> tuple[Any, ...]:
        return normal(n, k, scale=k**-0.5), normal(n)

    def added() -> tuple[Any, ...]:
        return normal(rows, h), normal(rows, h), normal(h), normal(h), EPS, 0.0, None

    feed_forward = cpu.feed_forward
    yield Case("linear", "linear", lambda: (normal(rows, h), *plain(h, h)), F.linear)
    yield Case("added LayerNorm", "add_layer_norm", added, cpu.add_layer_norm)
    yield Case(
        "feed-forward", "feed_forward", lambda: (normal(rows, h), *plain(i, h), *plain(h, i), "none"), feed_forward
    )
    yield Case("attention", "attention_forward", lambda: (normal(*qkv), *sequences(), 0.0, None), attend, 1)
    back = cpu.embedding_layer_norm_backward
    yield Case("embeddings, backward", back.__name__, lambda: (normal(rows, h), *ids(), EPS), back)
    if rows <= 2048:  # of labelled tokens there are few

        def labelled() -> tuple[Any, ...]:
            return normal(rows, h), *plain(words, h), torch.randint(0, words, (rows,), device=device)

        def labelled_backward() -> tuple[Any, ...]:
            given = labelled()
            return torch.rand(rows, device=device), *given, ops.linear_cross_entropy(*given)[1]

        loss, back = cpu.linear_cross_entropy, cpu.linear_cross_entropy_backward
        yield Case("loss", loss.__name__, labelled, loss)
        yield Case("loss, backward", back.__name__, labelled_backward, back)


def _normal(*shape: int, device: Any, dtype: Any, scale: float = 1.0) -> Any:
    import torch

    return (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype)


def _listed(result: Any, count: int | None) -> list[Any]:
    return [result] if not isinstance(result, (tuple, list)) else list(result)[:count]


def judge(case: Case) -> None:
    """Raises AssertionError where an operation is not right."""
    import torch

    from fastbert import numerics, ops

    torch.manual_seed(0)
    with torch.no_grad():
        given = case.arguments()
        fused = _listed(getattr(ops, case.operation)(*given), case.results)
        stock = _listed(case.stock(*given), case.results)
        exact = (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given)
        truth = _listed(case.stock(*exact), case.results)
        for i, each in enumerate(zip(fused, stock, truth, strict=True)):
            if each[0].is_floating_point():
                numerics.assert_within_policy(*each, f"result {i}")
            elif not torch.equal(each[0], each[1]):
                raise AssertionError(f"result {i} is not that of the CPU backend")


def gate_of(operation: str, train: bool) -> str:
    """The gate that an operation belongs to, as tests have it."""
    from fastbert.measure.gates import needed

    operation = {"mask_layout": "unpack", "feed_forward": "linear"}.get(operation, operation)
    (name,) = needed(f"operator {operation.removesuffix('_backward')}", "fused")
    return f"{name}{'_training' if train and name != 'cross_entropy' else ''}.bfloat16"


def gate(steps: Steps, section: str, shape: dict[str, int], rows: Sequence[int], device: Any, output: Path) -> None:
    """Judges every operation at every number of rows; all are launched before, which compiles them side by side."""
    import torch

    from benchmarks import gates
    from fastbert import ops

    found = {
        f"{case.name}: {case.operation}, {count} rows": case
        for count in rows
        for case in cases(shape, count, device, section == "training")
    }
    log = gates.Log(output / "gates.jsonl", f"first: {section}", Path(__file__))
    log.plan({name: [gate_of(case.operation, section == "training")] for name, case in found.items()})

    def launched(case: Case) -> None:
        with torch.no_grad():
            getattr(ops, case.operation)(*case.arguments())

    def compile_all() -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for each in [pool.submit(launched, case) for case in found.values()]:
                each.exception()  # its own step will tell

    def judged(name: str, case: Case) -> None:
        since, outcome = time.monotonic(), gates.FAILED
        try:
            judge(case)
            outcome = gates.PASSED
        finally:  # before the step is said to be done: a kill between the two repeats it
            log.note(name, outcome, seconds=time.monotonic() - since)

    for name in found:
        if (section, name) in steps.wrong:  # hung, perhaps, or ended its process
            log.note(name, gates.FAILED)
    steps.run(section, "compile", compile_all, STEP_S["compile"])
    for name, case in found.items():
        steps.run(section, name, functools.partial(judged, name, case))


def workloads(batch: int) -> tuple[Any, ...]:
    """What whole models run, the headline first."""
    from fastbert.measure.cases import workload

    return workload("squad", batch), workload("dense512", batch), workload("dense128", 1)


def forwards(steps: Steps, size: str, batch: int, device: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """Whole models, by `fastbert bench`'s own hand; where a way to run one hangs, stock and fused alone."""
    import torch

    from fastbert.measure import bench, records

    items = {item.name: item for item in workloads(batch)}
    for peers, suffix in ((("graphs", "torch-varlen"), ""), ((), ", fused alone")):
        names = [name for name in items if ("forwards", name + suffix) not in steps.begun]
        names = [name for name in names if not suffix or ("forwards", name) in steps.wrong]
        minutes = 0.8 * (LIMITS["forwards"] - steps.spent.get("forwards", 0.0)) / 60
        measured = bench.run(
            [items[name] for name in names],
            [size],
            [torch.bfloat16],
            device=device,
            minutes=minutes,
            peers=peers,
        )
        for name in names:
            steps.begin("forwards", name + suffix, STEP_S["forwards"])
            since, status = time.monotonic(), "ok"
            try:
                for _ in range(2 + len(peers)):  # not one more, which would be of the next workload
                    record = next(measured)
                    keep(record)
                    steps.tell(records.line(record))
            except StopIteration:
                status = "ERROR: out of time"
            except Exception as error:  # out of memory, say: this step's result
                status = _status(error)
            steps.end("forwards", name + suffix, status, since)
            if status != "ok":
                _check_device()


def operators(
    steps: Steps, size: str, rows: Sequence[int], device: Any, rates: Any, about: Any, keep: Callable[[Any], None]
) -> None:
    """Every GEMM at every number of rows, the largest first, and attention; by ways of `benchmarks/variants.py`."""
    import torch

    from benchmarks import variants
    from fastbert import ops
    from fastbert.kernels import launch
    from fastbert.measure import counts, records
    from fastbert.measure.cases import SHAPES
    from fastbert.tune.gpu import Checker, Gpu
    from fastbert.tune.problems import Sizes, problems
    from fastbert.tune.search import OK, OTHER_BITS, Candidate

    shape, dtype = SHAPES[size], torch.bfloat16
    sizes = Sizes(shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"])
    found = problems(sizes, dtype, launch.architecture(device), multiprocessors=launch.multiprocessors(device))
    work = [problem for problem in found if problem.key[0] in ("linear", "attention")]
    rig, checker = Gpu(device, sizes, dtype), Checker(work, device)
    # Of a GEMM: shipped at so many rows, the likeliest persistent one, tiles of 128 x 128, cuBLAS.
    chosen = {
        (problem.name, count): variants.configurations(problem, count, work, rig.shared_limit)[0]
        for problem, count in variants.cases(work, rows)
    }

    def compile_all() -> None:
        """A round for each configuration: what `launch.use` is given is for the whole process."""
        each = {p.key: dict.fromkeys(c for (name, _), cs in chosen.items() if name == p.name for c in cs) for p in work}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for round_ in itertools.zip_longest(*each.values()):
                given = {p: config for p, config in zip(work, round_, strict=True) if config is not None}
                launch.use({p.key: config for p, config in given.items()})
                for job in [pool.submit(launched, problem) for problem in given]:
                    job.exception()  # its own step will tell
        launch.use({})

    def launched(problem: Any) -> None:
        with torch.no_grad():
            problem.call(*problem.arguments(problem.rows[0], device))

    def measure(problem: Any, count: int) -> None:
        arguments = rig.sets(problem, count)[0]
        cost = counts.cost(problem.function, arguments, ops.OPERATORS[problem.function].fake(*arguments))
        case = {
            "what": f"variant {problem.name.split(',')[0]}",
            "workload": f"{count} rows",
            "size": size,
            "shape": {
                name: str(value)
                for name, value in zip(launch.OPERATIONS[problem.key[0]].parameters(), problem.key[1:], strict=True)
            },
            "real_tokens": count,
            "padded_tokens": count,
        }
        checked = []
        for config in chosen[problem.name, count]:
            library = config.variant == launch.LIBRARY
            checked.append((Candidate(problem, config), OK if library else checker.check(problem.name, config)))
        stock: list[float] = []
        for name, call, status in variants.ways(problem, count, rig, checked):
            samples: list[float] = []
            if status == OK or status.startswith(OTHER_BITS):
                samples, status = call(), "ok"
            stock = samples if name == "stock" else stock
            record = records.make(about, case, name, dtype, samples, stock, cost, rates, status)
            keep(record)
            if samples:
                steps.tell(f"{problem.name}, {count} rows, {name}: {1e6 * record['median_s']:.0f} us")

    steps.run("operators", "compile", compile_all, STEP_S["compile"])
    with torch.no_grad():
        for count in sorted(rows, reverse=True):
            for problem, _ in variants.cases(work, [count]):
                steps.run("operators", f"{problem.name}: {count} rows", functools.partial(measure, problem, count))


def measure(given: argparse.Namespace) -> int:
    """All sections, in a process that touches the device. Returns the exit status."""
    import torch

    from benchmarks import gates
    from fastbert.checkpoints import default_device
    from fastbert.measure import cases as models
    from fastbert.measure import records
    from fastbert.measure.machine import Machine, Rates, environment

    output, device = given.output.resolve(), default_device(None)
    steps = Steps(output, gates.key(Path(__file__)), json.loads(given.spent))
    size, rows, batch, many = "large", (21222, 2048, 128), 128, (21222, 65536, 128)
    if given.dry:
        size, rows, batch, many = "tiny", (128, 37), 2, (2048, 128)
        models.SHAPES["tiny"] = {
            **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        }
    found = [line for line in lines(steps.events) if line["event"] == "record" and line.get("key") == steps.key]
    about = found[0]["record"] if found else environment(device)  # of one run all records have one date
    about = {name: about[name] for name in environment(device)}
    models_log = gates.Log(output / "gates.jsonl", "first: models", Path(__file__))
    models_log.plan({item.name: ["model.bfloat16"] for item in workloads(batch)})

    def row(record: dict[str, Any]) -> tuple[str, ...]:
        return record["what"], record["workload"], record["candidate"]

    kept = {row(line["record"]): line["record"] for line in found}

    def keep(record: dict[str, Any]) -> None:
        record |= about
        if record["candidate"] == "fused" and record["what"].endswith(
            "Model forward"
        ):  # the whole model, by bench's own check
            models_log.note(record["workload"], gates.PASSED if record["status"] == "ok" else gates.FAILED)
        append(steps.events, {"event": "record", "key": steps.key, "record": record})
        kept[row(record)] = record  # a step that was killed comes again
        records.write(records.path_in(output, about), list(kept.values()))

    steps.tell(f"{about['device_name']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}")
    steps.tell(tell_prebuilt(output))

    def measure_rates() -> None:
        rates = Machine(device).rates(torch.bfloat16)
        append(steps.events, {"event": "rates", "key": steps.key, "rates": list(rates)})
        steps.tell(f"{rates.flops_per_s / 1e12:.1f} TFLOP/s, {rates.bytes_per_s / 1e12:.2f} TB/s")

    try:
        for section in given.sections:
            if steps.spent.get(section, 0.0) >= LIMITS[section]:
                continue
            if section in ("gates", "training"):
                gate(steps, section, models.SHAPES[size], rows, device, output)
            elif section == "rates":
                steps.run(section, "rates", measure_rates)
            elif section == "forwards":
                os.environ["FASTBERT_GATES"] = json.dumps(gates.verdicts(output / "gates.jsonl"))
                forwards(steps, size, batch, device, keep)
            elif device.type == "cuda":
                told = [line["rates"] for line in lines(steps.events) if line["event"] == "rates"]
                operators(steps, size, many, device, Rates(*told[-1]) if told else None, about, keep)
            if kept:  # what was measured before the gates it needs were green
                records.judge_again(records.path_in(output, about), gates.verdicts(output / "gates.jsonl"))
    except Poisoned as error:
        print(f"the device has failed: {error}", file=sys.stderr)
        return 4
    return 0


def tell_prebuilt(output: Path) -> str:
    """Whether kernels that were compiled elsewhere can be found here: Triton's wheel has to be the same."""
    told = output / archive.CACHE / "prebuilt.json"
    if not told.exists():
        return "no prebuilt kernels: everything is compiled here"
    from triton.runtime.cache import triton_key

    wanted = json.loads(told.read_text(encoding="utf-8"))
    if wanted["triton_key"] == triton_key():
        return f"{wanted['kernels']} prebuilt kernels, of this very Triton"
    return f"prebuilt kernels are of another Triton ({wanted['triton']}, Python {wanted['python']}): compiled here"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of it; default: 5")
    parser.add_argument("--sections", nargs="+", choices=list(LIMITS), default=list(LIMITS), metavar="NAME")
    parser.add_argument(
        "--restore", type=Path, metavar="FOLDER", help="with archives of an earlier call, to go on from"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--slack", type=float, default=1.0, metavar="X", help="deadlines of steps and sections times this"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spent", default="{}", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    for limits in (LIMITS, STEP_S):
        limits.update({name: given.slack * seconds for name, seconds in limits.items()})
    if given.measure:
        return measure(given)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that what measures ends, too, and all is packed
    os.environ["TRITON_CACHE_DIR"] = str(given.output.resolve() / archive.CACHE / "triton")
    os.environ["XDG_CACHE_HOME"] = str(given.output.resolve() / archive.CACHE / "shipped")
    return watch(given, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
