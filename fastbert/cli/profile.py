"""`fastbert profile`: where the time of a forward or a training step goes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..measure.names import DTYPES, SHAPES, WORKLOADS
from ..usage import UsageError, check_file, refused, write_text
from ..version import install

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..measure.cases import Workload
    from ..measure.profile import Profile

HELP = "where the time of a forward or a training step goes, by operator"
DESCRIPTION = (
    "Traces the fused model several times and tells for every operator its calls, median time, share, FLOPs and bytes "
    "a second and % of roofline, by ceilings measured in the same run; and host gaps, host "
    "synchronisations, tokens a second and peak memory; of a pipeline from strings also its stages. "
    "Exit status: 0 done, 2 bad usage, 130 interrupted."
)
EXAMPLES = (
    "fastbert profile --size base --lengths 12,40,128 --compare stock",
    "fastbert profile --model ./checkpoint --train --trace trace.json --plot plots",
    "fastbert profile --model ./sentence-transformer --texts lines.txt --batch 64 --compare stock",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint: a folder, or a name on the hub")
    which.add_argument("--size", choices=tuple(SHAPES), help="a model with seeded weights; default: large")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--lengths", metavar="N[,N...]", help="a batch of sequences of so many tokens, as 12,40,128")
    batch.add_argument("--workload", choices=WORKLOADS, help="a batch as `fastbert bench` has it; default: squad")
    batch.add_argument(
        "--texts",
        metavar="FILE",
        help="a text a line, through the model's own encode, or a query, a tab and a passage, through predict; takes "
        "--model and sentence-transformers",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="so many sequences, of the workload or of the one length of --lengths; of --texts in a forward: 32",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: the checkpoint's; of --size, float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--train", action="store_true", help="a training step, forward and backward, not a forward")
    parser.add_argument("--compare", choices=("stock",), help="profile stock, too, over the same weights, padded")
    parser.add_argument("--json", metavar="FILE", help="write the record there, too; -: standard output")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of the fused model there")
    parser.add_argument("--plot", metavar="FOLDER", help="write roofline.png and layers.png there; takes matplotlib")


def _item(arguments: argparse.Namespace) -> tuple[str, Workload]:
    """(what the user calls it, the batch).

    Raises:
        UsageError: lengths that are none, or arguments that don't go together.
    """
    from ..measure.cases import Workload, check_batch, workload

    batch = arguments.batch
    if batch is not None:
        check_batch(batch)
    if arguments.lengths is None:
        name = arguments.workload or "squad"
        return f"--workload {name}", workload(name) if batch is None else workload(name, batch)
    try:
        lengths = [int(part) for part in arguments.lengths.split(",")]
    except ValueError as error:
        raise UsageError(f"--lengths {arguments.lengths}: expected integers between commas, as 12,40,128") from error
    if min(lengths) <= 0:
        raise UsageError(f"--lengths {arguments.lengths}: holds {min(lengths)}; expected more than 0")
    if batch is not None:
        if len(lengths) > 1:
            raise UsageError(f"--batch is given with {len(lengths)} --lengths; expected one length, for every sequence")
        lengths *= batch
    return f"--lengths {arguments.lengths}", Workload(f"b{len(lengths)}", tuple(lengths))


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises UsageError naming the first output that can't be written: now, not after measuring."""
    check_file("--json", arguments.json)
    check_file("--trace", arguments.trace)
    if arguments.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"--plot needs matplotlib, which is not installed: {install('bench')}")
        with refused(arguments.plot, "plot", OSError, "a folder"):
            Path(arguments.plot).mkdir(parents=True, exist_ok=True)


def _models(arguments: argparse.Namespace, stock: Any) -> dict[str, Any]:
    """Fused, and stock where it is asked for, over the same weights. Raises UsageError."""
    from ..fuse import fuse
    from ..measure.peers import share

    with refused(arguments.model, "model", ValueError):  # UnsupportedModelError is one
        fused = fuse(share(stock))
    return {"fused": fused, **({"stock": stock} if arguments.compare else {})}


class _Case(NamedTuple):
    """What is profiled."""

    what: str
    """ "forward", "training step" or the name of a method."""
    workload: str
    lengths: tuple[int, ...]
    padded_tokens: int
    base: PreTrainedModel
    """The fused base model."""
    measure: Callable[[], list[Profile]]


def _of_texts(arguments: argparse.Namespace, device: torch.device) -> _Case:
    """Raises UsageError."""
    from ..checkpoints import load_pipeline
    from ..measure import profile
    from ..measure.cases import check_batch
    from ..measure.pipeline import Staged, base_of, method_of, read_texts

    batch = 32 if arguments.batch is None else arguments.batch
    check_batch(batch)
    if arguments.train:
        raise UsageError("--texts is given with --train; expected one of them")
    if arguments.model is None:
        raise UsageError("--texts is given without --model, whose tokenizer it takes")
    stock = load_pipeline(arguments.model, arguments.dtype, device)
    what = method_of(stock)
    texts = read_texts(arguments.texts, what == "predict")
    models = _models(arguments, stock)
    ran = Staged(models["fused"])
    ran(texts, batch)
    trace = arguments.trace and Path(arguments.trace)
    return _Case(
        what,
        f"{Path(arguments.texts).name} b{batch}",
        tuple(ran.lengths),
        ran.padded,
        base_of(models["fused"]),
        lambda: profile.measure_texts(models, texts, batch, trace),
    )


def _of_ids(arguments: argparse.Namespace, device: torch.device) -> _Case:
    """Raises UsageError."""
    import torch

    from ..checkpoints import load_base, load_config
    from ..layers.embeddings import longest_sequence
    from ..measure import profile
    from ..measure.cases import build, config_of

    given, item = _item(arguments)
    size, path = arguments.size or "large", arguments.model
    config = config_of(size) if path is None else load_config(path)
    placed = getattr(config, "position_biased_input", True)  # not so of a DeBERTa that has no table of positions
    limit = getattr(config, "max_position_embeddings", None) if placed else None
    if limit is not None and max(item.lengths) > limit:
        raise UsageError(f"{given}: holds {max(item.lengths)}; expected at most max_position_embeddings, {limit}")
    if path is None:
        dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        models = _models(arguments, build(size, getattr(torch, dtype), device))
    else:
        models = _models(arguments, load_base(path, arguments.dtype, device))
    longest = longest_sequence(models["fused"])
    if longest is not None and max(item.lengths) > longest:  # a family whose first positions are that of padding
        raise UsageError(f"{given}: holds {max(item.lengths)}; the model has positions for {longest}")
    trace = arguments.trace and Path(arguments.trace)
    return _Case(
        "training step" if arguments.train else "forward",
        item.name,
        item.lengths,
        item.padded_tokens,
        models["fused"],
        lambda: profile.measure(models, item, arguments.train, trace),
    )


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..checkpoints import default_device
    from ..measure import counts, tables
    from ..measure.machine import Machine, backend, device_name, environment

    logging.disable_progress_bar()
    if arguments.texts is None:
        _item(arguments)
    device = default_device(arguments.device)
    _check_outputs(arguments)
    case = (_of_ids if arguments.texts is None else _of_texts)(arguments, device)
    dtype, real_tokens = case.base.dtype, sum(case.lengths)
    rates = Machine(device).rates(dtype)
    model = arguments.model or arguments.size or "large"
    short = f"{Path(model).name}, {str(dtype).removeprefix('torch.')}, {case.workload}, {real_tokens} tokens"
    print(f"{device_name(device)}, fused by {backend(device)}; {case.what} of {short}")
    print(f"measured ceilings: {rates.flops_per_s / 1e12:.3g} TFLOP/s, {rates.bytes_per_s / 1e12:.3g} TB/s")

    least = counts.encoder(case.base.config, case.lengths, dtype, arguments.train)
    runs = [each.to_dict(real_tokens, rates.floor(least), rates) for each in case.measure()]
    record = {
        "what": f"{type(case.base).__name__} {case.what}",
        "model": model,
        "workload": case.workload,
        "lengths": case.lengths,
        "dtype": str(dtype).removeprefix("torch."),
        "real_tokens": real_tokens,
        "padded_tokens": case.padded_tokens,
        "machine": rates._asdict(),
        "encoder": least._asdict(),
        "runs": runs,
        "ratio_to_stock": runs[1]["wall_s"] / runs[0]["wall_s"] if arguments.compare else None,
        **environment(device),
    }
    for run in runs:
        print(f"\n{run['run']}\n{tables.table(run, case.what)}")
    if arguments.compare:
        print(f"\nx stock                {record['ratio_to_stock']:.2f}")
    if arguments.json is not None:
        write_text("--json", arguments.json, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if arguments.plot is not None:
        for run in runs:
            prefix = "" if run["run"] == "fused" else f"{run['run']}-"
            tables.plot(run, f"{run['run']} {case.what}: {short}", rates, Path(arguments.plot), prefix)
    return 0
