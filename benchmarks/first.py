"""The first minutes on a GPU: the figures that matter most, whatever else is red.

    python benchmarks/first.py [--output benchmarks/results] [--minutes 5] [--sections NAME ...] [--dry]

In this order, each with a deadline of its own:

    gates      every operation in bfloat16 at BERT-large's shapes and 128, 2,048 and 21,222 rows, against float64
    rates      what the device does at best: a product of 8192 x 8192, a copy
    forwards   BERT-large: SQuAD's lengths and dense 512 at batch 128, then one text of 128 tokens. Stock on sdpa, fused,
               fused with CUDA graphs, stock packed by torch's varlen attention
    operators  every product of BERT-large at 21,222, 65,536 and 128 rows: cuBLAS, shipped, persistent, tiles of
               128 x 128; attention against sdpa and varlen
    training   the gates of what only training runs; its rows are benchmarks/suite.py's

A process that never touches the device starts another that does, and ends it where a step outlasts its deadline, hung in
a CUDA call or not; the next goes on behind that step. So it is after a crash. What was found is appended to
OUTPUT/first.jsonl as it goes: gates to OUTPUT/gates.jsonl, which tests add to (benchmarks/gates.py); records, of the form of
`fastbert bench`, to OUTPUT/<device>/<date>-<commit>.json, too. A red gate closes the rows that need it and no others. The
same command goes on where it was stopped; where sources or the device changed it starts over.

With OUT in the environment, OUTPUT is packed into that folder as it goes (benchmarks/archive.py); archives found in
build/gpu-cache are unpacked first: kernels compiled before, by benchmarks/prebuild.py. `--dry`: tiny sizes, on a CPU, too.
Exit status: 0 all done, 1 a step failed or a gate is red, 3 out of time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
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

from benchmarks import archive  # noqa: E402

PREBUILT = ROOT / "build" / "gpu-cache"
START_S = 60.0
"""What a process is given to import everything and find the device."""
LIMITS = {"gates": 100.0, "rates": 20.0, "forwards": 100.0, "operators": 90.0, "training": 60.0}
"""Seconds of each section, in all."""
STEP_S = {"compile": 75.0, "gates": 20.0, "rates": 20.0, "forwards": 60.0, "operators": 20.0, "training": 20.0}
"""Seconds of a step of each section, and of compiling what its steps launch."""
PACKED_EVERY_S = 20.0


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line of JSON that is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
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
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", __file__, *arguments, "--measure"],
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.said.put(json.loads(text))
        self.said.put(None)

    def end(self) -> None:
        """Ends it, with all that it started, whatever it does."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


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

    for folder in dict.fromkeys((PREBUILT, *([given.restore] if given.restore else []))):
        if folder.is_dir() and (found := archive.restore(folder, output)):
            tell(event="restored", what=f"{len(found)} files from {folder.name}")
    child: Child | None = None
    try:
        while time.monotonic() < deadline:
            child = Child([*arguments, "--spent", json.dumps(spent)], log)
            section, step, key, limit = "start", "start", "", time.monotonic() + START_S
            entered = packed = time.monotonic()
            why = ""
            while not why:
                now = time.monotonic()
                left = min(limit, deadline, *([entered + LIMITS[section] - spent.get(section, 0.0)] * (section in LIMITS)))
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
        self.begun = {(line["section"], line["step"]) for line in found if line["event"] in ("step", "ended")}
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever else is printed goes into the log

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
        self.begun.add((section, step))

    def run(self, section: str, step: str, call: Callable[[], Any], limit_s: float | None = None) -> Any:
        """What `call` returns, or None where the step was begun before or fails. Raises Poisoned."""
        if (section, step) in self.begun:
            return None
        self.begin(section, step, STEP_S[section] if limit_s is None else limit_s)
        since, status, result = time.monotonic(), "ok", None
        try:
            result = call()
        except AssertionError as error:
            status = f"FAILED: {' '.join(str(error).split())[:300]}"
        except Exception as error:  # out of memory, a kernel that doesn't compile: this step's result
            status = f"ERROR: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.end(section, step, status, since)
        if status != "ok":
            _check_device()
        return result


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
    from fastbert.cli.problems import EPS, Sizes, lengths_of, problems
    from fastbert.kernels import launch, reference
    from fastbert.packing import pack_mask

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

    def attend(qkv: Any, *rest: Any) -> Any:
        return reference.attention(*qkv.unbind(1), *rest[:4])

    arch, found = launch.architecture(device), set()
    for problem in problems(sizes, dtype, arch, train):
        of_training = "backward" in problem.name
        if of_training == train and problem.name.partition(",")[0] not in found or of_training:
            found.add(problem.name.partition(",")[0])
            yield Case(problem.function, functools.partial(problem.arguments, rows, device), problem.peer)
    if not train:
        yield Case("attention_tiles", lambda: (starts(), rows), reference.attention_tiles)
        yield Case("embedding_layer_norm", lambda: (*ids(), normal(h), EPS, 0, -1), reference.embedding_layer_norm)
        yield Case("mask_layout", lambda: (mask(), None), reference.mask_layout)
        yield Case("pack", lambda: moved(False), reference.pack)
        yield Case("unpack", lambda: moved(True), reference.unpack)
        return
    linear = lambda n, k: (normal(n, k, scale=k**-0.5), normal(n))  # noqa: E731
    yield Case("linear", lambda: (normal(rows, h), *linear(h, h)), F.linear)
    yield Case(
        "add_layer_norm",
        lambda: (normal(rows, h), normal(rows, h), normal(h), normal(h), EPS, 0.0, None),
        reference.add_layer_norm,
    )
    yield Case("feed_forward", lambda: (normal(rows, h), *linear(i, h), *linear(h, i), "none"), reference.feed_forward)
    qkv = (rows, 3, sizes.heads, h // sizes.heads)
    yield Case("attention_forward", lambda: (normal(*qkv), *sequences(), 0.0, None), attend, 1)
    yield Case(
        "embedding_layer_norm_backward", lambda: (normal(rows, h), *ids(), EPS), reference.embedding_layer_norm_backward
    )
    if rows <= 2048:  # of labelled tokens there are few

        def labelled() -> tuple[Any, ...]:
            return normal(rows, h), *linear(words, h), torch.randint(0, words, (rows,), device=device)

        def backward() -> tuple[Any, ...]:
            given = labelled()
            grad = torch.rand(rows, device=device)
            return grad, *given, ops.linear_cross_entropy(*given)[1]

        yield Case("linear_cross_entropy", labelled, reference.linear_cross_entropy)
        yield Case("linear_cross_entropy_backward", backward, reference.linear_cross_entropy_backward)


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
    with torch.inference_mode():
        given = case.arguments()
        fused = _listed(getattr(ops, case.operation)(*given), case.results)
        stock = _listed(case.stock(*given), case.results)
        exact = (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given)
        truth = _listed(case.stock(*exact), case.results)
        for i, each in enumerate(zip(fused, stock, truth, strict=True)):
            if each[0].is_floating_point():
                numerics.assert_within_policy(*each, f"result {i}")
            elif not torch.equal(each[0], each[1]):
                raise AssertionError(f"result {i} is not that of the reference")


def gate(steps: Steps, section: str, shape: dict[str, int], rows: Sequence[int], device: Any, output: Path) -> None:
    """Judges every operation at every number of rows; all are launched once before, which compiles them side by side."""
    import torch

    from benchmarks import gates
    from fastbert import ops

    found = {
        f"{number}: {case.operation}, {count} rows": case
        for count in rows
        for number, case in enumerate(cases(shape, count, device, section == "training"))
    }
    log = gates.Log(output / "gates.jsonl", section, Path(__file__))
    log.plan({name: [f"{case.operation}.bfloat16"] for name, case in found.items()})

    def launched(case: Case) -> None:
        with torch.inference_mode():
            getattr(ops, case.operation)(*case.arguments())

    def compile_all() -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for each in [pool.submit(launched, case) for case in found.values()]:
                each.exception()  # its own step will tell

    steps.run(section, "compile", compile_all, STEP_S["compile"])
    for name, case in found.items():
        if (section, name) in steps.begun:
            continue
        since = time.monotonic()
        right = steps.run(section, name, lambda case=case: judge(case) or True)
        log.note(name, gates.PASSED if right else gates.FAILED, seconds=time.monotonic() - since)


def forwards(steps: Steps, size: str, batch: int, device: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """Whole models, by `fastbert bench`'s own hand; where a way to run one hangs, stock and fused alone."""
    import torch

    from fastbert.cli import bench
    from fastbert.cli.cases import workload

    items = [workload("squad", batch), workload("dense512", batch), workload("dense128", 1)]
    for peers in (("graphs", "torch-varlen"), ()):
        names = [item.name + ("" if peers else ", fused alone") for item in items]
        left = [item for item, name in zip(items, names, strict=True) if ("forwards", name) not in steps.begun]
        if not left:
            return
        names = [name for name in names if ("forwards", name) not in steps.begun]
        minutes = 0.8 * (LIMITS["forwards"] - steps.spent.get("forwards", 0.0)) / 60
        since = time.monotonic()
        steps.begin("forwards", names[0], STEP_S["forwards"])
        for record in bench.run(left, [size], [torch.bfloat16], device=device, minutes=minutes, peers=peers):
            if not record["workload"] == left[len(left) - len(names)].name:
                since = _next(steps, names, since)
            keep(record)
            steps.tell(bench.line(record))
        _next(steps, names, since)
        return


def _next(steps: Steps, names: list[str], since: float) -> float:
    steps.end("forwards", names.pop(0), "ok", since)
    if names:
        steps.begin("forwards", names[0], STEP_S["forwards"])
    return time.monotonic()
