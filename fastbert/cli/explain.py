"""`fastbert explain`: how much each token of a text counts, and what attends to what, on a page."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from ..usage import UsageError, check_file, refused, write_text
from ..version import install

HELP = "what a model makes of a text: tokens by how much they count, attention maps; a page"
DESCRIPTION = (
    "Writes one page of HTML, which needs no network, or an image: of each text its tokens, colored by how much they "
    "count (integrated gradients of a classifier's logit; of other models the attention rollout of the first token), "
    "and the attention maps by layer and head. Exit status: 0 done, 2 bad usage, 130 interrupted."
)
EXAMPLES = (
    'fastbert explain --model ./classifier --text "Not a dull minute." --output map.html',
    'fastbert explain --model ./encoder --text "One." --text "Another." --layers 0,11 --output map.png',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", required=True, help="a checkpoint: a folder, or a name on the hub"
    )
    parser.add_argument("--text", action="append", required=True, help="a text; more than once: each by itself")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="a page, .html, or an image, .png (takes matplotlib)"
    )
    parser.add_argument(
        "--target", type=int, metavar="N", help="the class looked at; default: that of the largest logit"
    )
    parser.add_argument("--layers", metavar="N[,N...]", help="whose maps are shown, from 0 on; default: all")
    parser.add_argument("--heads", metavar="N[,N...]", help="the same of heads; default: all")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", metavar="FILE", help="write tokens and their scores there, too; -: standard output")


def _numbers(option: str, given: str | None) -> Sequence[int] | None:
    if given is None:
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {given}: expected integers between commas, as 0,11") from error


def run(arguments: argparse.Namespace) -> int:
    kind = Path(arguments.output).suffix.lower()
    if kind not in (".html", ".png"):
        raise UsageError(f"--output {arguments.output}: expected a name that ends in .html or .png")
    if kind == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--output {arguments.output}: needs matplotlib, which is not installed: {install('bench')}")
    for text in arguments.text:
        if not text.strip():
            raise UsageError("--text: it is empty; expected a text")
    layers, heads = _numbers("--layers", arguments.layers), _numbers("--heads", arguments.heads)
    check_file("--output", arguments.output)
    check_file("--json", arguments.json)

    from transformers.utils import logging

    from ..checkpoints import default_device, load_model
    from ..fuse import fuse
    from ..seeing.look import look
    from ..seeing.page import image, page

    logging.disable_progress_bar()
    device = default_device(arguments.device)
    model, tokenizer = load_model(arguments.model)
    with refused(arguments.model, "model", ValueError):  # UnsupportedModelError is one
        model = fuse(model.to(device).eval())
    with refused("", kinds=ValueError):  # of layers and heads, which it names
        seen = [look(model, tokenizer, text, arguments.target, layers, heads) for text in arguments.text]
    name = Path(arguments.model).name or arguments.model
    title, about = f"{name}: what it makes of a text", f"{type(model).__name__}, by fastbert explain"
    if kind == ".html":
        write_text("--output", arguments.output, page(title, about, seen))
    else:
        image(f"{title} ({type(model).__name__})", seen, Path(arguments.output))
    print(
        f"{arguments.output}: {len(seen)} text{'s' * (len(seen) > 1)}, {sum(len(each.pieces) for each in seen)} tokens"
    )
    if arguments.json is not None:
        told = [
            {
                "text": each.text,
                "method": each.method,
                "tokens": [piece for _, piece in each.pieces],
                "scores": each.scores,
            }
            for each in seen
        ]
        write_text("--json", arguments.json, json.dumps(told, indent=1) + "\n")
    return 0
