"""`fastbert verify`: a checkpoint's fused forward against stock."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..measure.names import DTYPES
from ..usage import UsageError, check_file, refused, write_text

HELP = "compare a checkpoint's fused forward with stock, layer by layer"
DESCRIPTION = (
    "Compares a checkpoint's fused forward with stock in float64 and stock in the same dtype. "
    "Exit status: 0 within the policy, 1 not, 2 bad usage."
)
EXAMPLES = (
    "fastbert verify --model BAAI/bge-large-en-v1.5 --dtype bfloat16",
    "fastbert verify --model ./checkpoint --texts texts.txt --json report.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the hub")
    parser.add_argument("--dtype", choices=DTYPES, help="working dtype; default: the checkpoint's")
    parser.add_argument("--texts", metavar="FILE", help="UTF-8, one text a line; default: a few built-in ones")
    parser.add_argument("--device", help="where fused and stock run; default: cuda where there is one, else cpu")
    parser.add_argument("--padding", choices=("packed", "dense"), help="one layout only; default: both")
    parser.add_argument(
        "--precision",
        choices=("fp8", "int8"),
        help="inference in FP8 or int8, and how far its results are from stock's",
    )
    parser.add_argument(
        "--prepack", action="store_true", help="with weights laid out for the CPU once, as fuse(model, prepack=True)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there, too; -: standard output")


# Lengths from a few tokens to a hundred, so that a batch has padding.
TEXTS = (
    "Where is the station?",
    "The encoder reads a sentence in both directions at once.",
    "Yes.",
    "A glacier is a persistent body of dense ice that forms where snow accumulates faster than it melts over many"
    " years, and that moves slowly downhill under its own weight, carving valleys and feeding rivers on its way.",
    "Please transfer 250 euros to my savings account on the first of every month.",
    "After the second goal the visitors defended deep in their own half, the referee added six minutes, and the "
    "crowd, who had been silent since the break, found its voice again; it made no difference, and the longest "
    "unbeaten run of the league ended on a wet Tuesday in March, two matches short of the record that had stood "
    "for thirty-one years and that nobody in the ground, least of all the manager, had wanted to talk about.",
    "Proteins fold.",
    "The recipe asks for two cups of flour, a pinch of salt, cold butter and just enough water to bind the dough.",
)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from ..checkpoints import default_device, load_model
    from ..measure.machine import backend
    from ..verify import LAYOUTS, verify

    logging.disable_progress_bar()
    device = default_device(arguments.device)
    check_file("--json", arguments.json)
    texts = list(TEXTS)
    if arguments.texts is not None:
        with refused(arguments.texts, "texts", (OSError, UnicodeDecodeError), "UTF-8, a text a line"):
            texts = [line for line in Path(arguments.texts).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise UsageError(f"--texts {arguments.texts}: holds no text")
    model, tokenizer = load_model(arguments.model)
    with refused(arguments.model, "model", ValueError):  # UnsupportedModelError is one
        report = verify(
            model,
            texts,
            tokenizer=tokenizer,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            device=device,
            layouts=LAYOUTS if arguments.padding is None else (arguments.padding,),
            precision=arguments.precision,
            prepack=arguments.prepack,
        )
    print(f"fused forwards by {backend(device)}\n{report}")
    if arguments.json is not None:
        write_text("--json", arguments.json, report.to_json() + "\n")
    if not report.ok:
        print(f"fastbert verify: {arguments.model} is not verified", file=sys.stderr)
    return 0 if report.ok else 1
