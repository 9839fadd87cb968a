"""`fastbert tune`: launch configurations for this machine's GPU and a model."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from ..measure.names import DTYPES, SHAPES
from ..usage import UsageError, check_file, in_a_line, write_text

if TYPE_CHECKING:
    from ..tune.problems import Sizes

HELP = "find launch configurations for this GPU and a model"
DESCRIPTION = (
    "Tries launch configurations for the kernels of a model on this machine's GPU: each is checked "
    "against float64 first, then timed; one that is faster than the shipped one beyond the spread is kept in the "
    "user's cache, where every process finds it. Exit status: 0 done, 2 bad usage, 130 interrupted, with what was "
    "found so far kept."
)
EXAMPLES = (
    "fastbert tune --size large --dtype bfloat16",
    "fastbert tune --model ./checkpoint --minutes 5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH_OR_ID", help="for the sizes of a checkpoint: a folder, or a name")
    which.add_argument("--size", choices=tuple(SHAPES), help="for those of a model; default: large")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--train", action="store_true", help="the kernels of the backward, too")
    kind.add_argument("--precision", choices=("fp8",), help='the GEMMs of fuse(model, precision="fp8")')
    parser.add_argument(
        "--library", action="store_true", help="PyTorch's GEMMs, too, for use after fastbert.set_batch_invariant(False)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="stop about then; default: 10")
    parser.add_argument("--json", metavar="FILE", help="write everything that was tried there, too; -: standard output")


def sizes(arguments: argparse.Namespace) -> Sizes:
    """Of the model that is asked for. Raises UsageError."""
    import torch
    from transformers import AutoModel

    from ..checkpoints import load_config
    from ..fuse import base_models
    from ..measure.cases import config_of
    from ..tune.problems import Sizes

    config = config_of(arguments.size or "large") if arguments.model is None else load_config(arguments.model)
    try:
        with torch.device("meta"):
            found = base_models(AutoModel.from_config(config))
        layout = found[0][2].layout if found else None
        gated = layout is not None and (layout.feed_forward.is_gated or layout.feed_forward.gate is not None)
        joined = layout is not None and layout.attention.qkv is not None
        wide = config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size  # DistilBERT's name
        biased = hasattr(config, "relative_attention_num_buckets")
        disentangled = bool(getattr(config, "relative_attention", False) and getattr(config, "pos_att_type", None))
        more = biased, disentangled, gated, joined
        return Sizes(config.hidden_size, wide, config.num_attention_heads, *more)
    except (AttributeError, ValueError) as error:
        raise UsageError(f"--model {arguments.model}: {in_a_line(error)[:300]}") from error


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import tuned
    from ..checkpoints import default_device
    from ..kernels import launch
    from ..runtime.support import fp8_is_unsupported
    from ..tune.gpu import JOB_BYTES, Gpu
    from ..tune.problems import problems
    from ..tune.search import lines, report, tune

    if not arguments.minutes > 0:
        raise UsageError(f"--minutes is {arguments.minutes}; expected more than 0")
    check_file("--json", arguments.json)
    device = default_device(None)
    if device.type != "cuda":
        raise UsageError("there is no GPU here, and on a CPU nothing is launched that could be tuned")
    shape, dtype = sizes(arguments), getattr(torch, arguments.dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.precision and (reason := fp8_is_unsupported(device)) is not None:
        raise UsageError(f"--precision fp8: {reason}")
    arch, gpu = launch.architecture(device), torch.cuda.get_device_name(device)
    made_for = tuned.made_for(gpu, arch)
    file = tuned.path(gpu, arch)
    # Each process has a context of its own on the device, and results in float64.
    room = torch.cuda.mem_get_info(device)[0] // JOB_BYTES
    what = arguments.train, arguments.precision
    rig = Gpu(device, shape, dtype, *what, jobs=max(1, min(8, (os.cpu_count() or 2) // 2, room)))
    work = problems(shape, dtype, arch, *what, launch.multiprocessors(device))
    search, interrupted = tune(work, rig, file, made_for, arguments.minutes, arguments.library)
    print(f"{gpu}, {arguments.dtype}, hidden {shape.hidden}: {len(search.won)} of {len(work)} faster")
    for line in lines(search):
        print(line)
    if search.settled:
        print(f"written to {file}")
    if arguments.json is not None:
        write_text("--json", arguments.json, json.dumps(report(search, made_for), indent=1) + "\n")
    if interrupted:
        raise KeyboardInterrupt
    return 0
