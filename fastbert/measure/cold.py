"""`fastbert bench --cold`: how long a new process takes to its first result, and what a new shape of batch costs then.

Every repeat is a process of its own, which imports what it needs, makes a model, and runs one batch twice and then one
of another shape; candidates take turns in random order. What compilers keep on disk lies in an empty folder, but for
the candidate that finds the kernels compiled before. The last result is checked by the policy, on one sequence.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from . import records
from .cases import SEED, Workload, config_of, fields_of, shape_of
from .machine import environment

REPEATS = 3
LIMIT_S = 600
TIMES = ("cold start: first result", "cold start: same shape again", "cold start: new shape")
"""From the start of the process to the first result; then of one forward each."""

# Runs without fastbert where fastbert is not what it times. Prints its times, and the error of the result.
CHILD = """
import json, sys, time
given = json.loads(sys.argv[1])
import torch
from transformers import AutoConfig, AutoModel
if given["way"] == "fused":
    import fastbert

device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
torch.set_num_threads(given["threads"])
torch.manual_seed(0)
with device:
    model = AutoModel.from_config(AutoConfig.for_model(**given["shape"])).to(dtype).eval()
run = model
if given["way"] == "fused":
    run = fastbert.fuse(model)
elif given["way"] == "compile":
    run = torch.compile(model)

def inputs(lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

def forward(batch):
    hidden = run(**batch).last_hidden_state
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return hidden

times = []
with torch.inference_mode():
    for lengths in (given["lengths"][0], given["lengths"][0], given["lengths"][1]):
        batch = inputs(lengths)
        start = time.time() if times else given["start"]
        hidden = forward(batch)
        times.append(time.time() - start)
    import fastbert
    from fastbert import numerics
    rows = hidden[0, : given["lengths"][1][0]]
    if given["way"] == "fused":
        fastbert.unfuse(model)
    alone = {"input_ids": batch["input_ids"][:1, : len(rows)]}
    stock = model(**alone).last_hidden_state[0]
    truth = model.double()(**alone).last_hidden_state[0]
    try:
        status, (error, _) = "ok", numerics.assert_within_policy(rows, stock, truth)
    except AssertionError as failure:
        status, error = f"FAILED: {failure}", None
print(json.dumps({"times": times, "status": status, "error": error}))
"""


def _child(way: str, item: Workload, size: str, dtype: torch.dtype, device: torch.device, cache: str) -> records.Record:
    """What one process found; its status where it broke."""
    # Its batch of another shape: a sequence less, and each of the others a token longer.
    another = [n + 1 for n in item.lengths[1:]] or [n + 1 for n in item.lengths]
    given = {
        "way": way,
        "shape": fields_of(size),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "lengths": [item.lengths, another],
    }
    caches = {
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"),
    }
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    given["start"] = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(given)],
            env={**os.environ, **caches, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"ERROR: no result after {LIMIT_S} s"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"status": f"ERROR: {last[:300]}"}
    found: records.Record = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    item: Workload, size: str, dtype: torch.dtype, *, device: torch.device, compiled: bool = False
) -> Iterator[records.Record]:
    """Measures cold starts; yields the records of stock, fused and, where asked for, of stock + torch.compile.

    Args:
        item: the batch.
        size: a key of cases.SHAPES.
        dtype: working dtype.
        device: a CPU or CUDA device.
        compiled: whether stock under torch.compile is measured, too.
    """
    ways = {"stock": "stock", "fused": "fused"}
    if device.type == "cuda":
        ways["fused, kernels compiled before"] = "fused"
    if compiled:
        ways["stock + torch.compile"] = "compile"
    about = environment(device)
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    status, errors = dict.fromkeys(ways, "ok"), dict.fromkeys(ways)
    chance = random.Random(SEED)
    with tempfile.TemporaryDirectory() as before:
        for repeat in range(REPEATS + 1):  # the first fills files and caches of the system, and `before`
            for name in chance.sample(list(ways), len(ways)):
                if status[name] != "ok" or (repeat == 0 and ways[name] == "compile"):
                    continue
                with tempfile.TemporaryDirectory() as empty:
                    cache = before if name.endswith("before") else empty
                    found = _child(ways[name], item, size, dtype, device, cache)
                status[name], errors[name] = found["status"], found.get("error")
                if status[name] != "ok":
                    samples[name].clear()
                elif repeat:
                    samples[name].append(found["times"])
    tokens = {"real_tokens": None, "padded_tokens": None}
    for i, what in enumerate(TIMES):
        case = {"what": what, "workload": item.name, "size": size, "shape": shape_of(config_of(size), item), **tokens}
        stock = [times[i] for times in samples["stock"]]
        for name in ways:
            taken = [times[i] for times in samples[name]]
            yield records.make(about, case, name, dtype, taken, stock, status=status[name], error=errors[name])
