"""Gates of a row: what must have passed its tests before the row is timed, and what is known of that.

A gate is an operation in a dtype, "linear.bfloat16"; benchmarks/gates.py tells how it becomes green or red. Here
verdicts come as JSON from the environment's FASTBERT_GATES: `{"linear.bfloat16": "green", ...}`. Where nobody set it,
rows are held to the numerical policy by their own run alone, and records say nothing of gates.
"""

from __future__ import annotations

import json
import os

import torch

VARIABLE = "FASTBERT_GATES"
FORWARD = ("embedding", "padding", "linear", "attention", "layer_norm", "model")
BACKWARD = ("embedding_training", "linear_training", "attention_training", "layer_norm_training", "dropout")
# DeBERTa's in place of those; it has the stock embeddings.
DEBERTA = {
    "attention": ("disentangled",),
    "attention_training": ("disentangled_training", "deberta_training"),
    "model": ("deberta",),
    **dict.fromkeys(("embedding", "embedding_training"), ()),
}
# ModernBERT's, whose windows and training are the same operators', with rotations beside them.
ROTARY = {
    "model": ("rotary", "families"),
    "dropout": ("dropout", "families_training"),
    **dict.fromkeys(("embedding", "embedding_training"), ()),
}
GREEN, RED, NOT_RUN = "green", "red", "not run"

# Of the name of an operator, which tests it is in; the first that it holds.
OPERATORS = {
    "fp8": "fp8",
    "int8": "int8",
    "cross_entropy": "cross_entropy",
    "attention_map": "attention_map",
    "disentangled": "disentangled",
    "embedding": "embedding",
    "attention": "attention",
    "layer_norm": "layer_norm",
    "rotate": "rotary",
    "linear": "linear",
    "pack": "padding",
}


def needed(what: str, candidate: str) -> tuple[str, ...]:
    """The operations a record's row runs, by its fields `what` and `candidate`; none where nothing of ours is run.

    Launch configurations, "variant ...", are each held to the policy in the run, and are nobody's result yet.
    """
    if not candidate.startswith("fused") or what.startswith("variant "):
        return ()
    if what.startswith("operator "):
        name = what.removeprefix("operator ")
        operation = next((own for part, own in OPERATORS.items() if part in name), name)
        return (operation + ("_training" if "backward" in name else ""),)
    found = FORWARD + (BACKWARD if "training" in what else ())
    for prefix, others in (("Deberta", DEBERTA), ("ModernBert", ROTARY)):
        if what.startswith(prefix):
            found = tuple(own for name in found for own in others.get(name, (name,)))
    return found + ("graphs",) * ("graphs" in candidate) + tuple(own for own in ("fp8", "int8") if own in candidate)


def state(what: str, candidate: str, dtype: torch.dtype) -> str | None:
    """GREEN; "red: ..." or "not run: ...", with the gates that are; None where no verdicts are given."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return None
    return judge(json.loads(given), what, candidate, dtype)


def judge(verdicts: dict[str, str], what: str, candidate: str, dtype: torch.dtype) -> str:
    """As `state`, by these verdicts.

    Tests in no dtype of their own ("linear.any") close an operation when they are red, and open one that has no others.
    """
    found: dict[str, list[str]] = {RED: [], NOT_RUN: [], GREEN: []}
    for operation in needed(what, candidate):
        own, other = f"{operation}.{str(dtype).removeprefix('torch.')}", f"{operation}.any"
        if verdicts.get(other) == RED and verdicts.get(own) != RED:
            found[RED].append(other)
        elif own in verdicts:
            found[verdicts[own]].append(own)
        else:
            found[verdicts.get(other, NOT_RUN)].append(own)
    for verdict in (RED, NOT_RUN):
        if found[verdict]:
            return f"{verdict}: {', '.join(found[verdict])}"
    return GREEN
