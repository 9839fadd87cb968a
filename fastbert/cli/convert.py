"""`fastbert convert`: checkpoints of other formats into a folder that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter

from ..convert import TASKS

HELP = "turn a checkpoint of TensorFlow or an old .bin into a folder that from_pretrained loads"
DESCRIPTION = (
    "Turns Google's TensorFlow checkpoints of BERT, tf_model.h5 of transformers 4 and old pytorch_model.bin into a "
    "folder of safetensors, config and tokenizer. Every variable is used once, or named with the reason why not; "
    "conversion.json in the folder lists all. No code of a checkpoint is run. Exit status: 0 done, 2 bad usage or a "
    "bad checkpoint, 130 interrupted; then there is no folder."
)
EXAMPLES = (
    "fastbert convert uncased_L-12_H-768_A-12 --output bert-base",
    "fastbert convert out/model.ckpt-1000 --config bert_config.json --vocab vocab.txt --uncased --output classifier",
    "fastbert convert ./my-model/tf_model.h5 --output converted --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a folder, tf_model.h5, pytorch_model.bin, or a TensorFlow checkpoint's prefix",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to be made")
    parser.add_argument(
        "--task", choices=TASKS, help="what the model is for; default: as the config says, else by the variables"
    )
    parser.add_argument("--config", metavar="FILE", help="default: config.json or bert_config.json beside it")
    parser.add_argument("--vocab", metavar="FILE", help="a vocab.txt; default: the tokenizer's files beside it")
    case = parser.add_mutually_exclusive_group()
    case.add_argument(
        "--cased",
        action="store_const",
        const=True,
        help="the vocabulary has upper case; default: as files say, else by it",
    )
    case.add_argument("--uncased", action="store_const", const=False, dest="cased", help="texts are made lower case")
    parser.add_argument(
        "--leave-out", nargs="+", default=(), metavar="PATTERN", help="names of variables to do without, as 'adam*'"
    )
    parser.add_argument("--json", action="store_true", help="tell what came of each variable, as JSON")


def run(arguments: argparse.Namespace) -> int:
    # Else TensorFlow tells of what it would compute with.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

    from ..convert import convert

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "json", "path")}
    found = convert(arguments.path, **options)
    if arguments.json:
        print(json.dumps(found))
        return 0
    used, tokenizer = found["variables"], found["tokenizer"]
    print(f"{found['model']}, {found['parameters']:,} parameters of {found['dtype']}, from {found['format']}")
    print(f"{len(used):,} variables used, by name and shape")
    reasons = Counter(found["left_out"].values())
    for reason, number in reasons.most_common():
        names = [name for name, told in found["left_out"].items() if told == reason]
        print(f"  left out: {names[0] if number == 1 else f'{number:,}, as {names[0]}'}: {reason}")
    if tokenizer:
        print(f"tokenizer: {tokenizer['class']}, {tokenizer['tokens']} tokens")
    for note in found["notes"]:
        print(f"note: {note}")
    if found["not_copied"]:
        print(f"not copied: {', '.join(found['not_copied'])}")
    print(f"{arguments.output}: {', '.join(found['files'])}")
    return 0
