"""Checkpoints of other formats into a folder that `from_pretrained` loads, every variable of theirs accounted for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

TASKS = {
    "pre-training": "ForPreTraining",
    "masked-lm": "ForMaskedLM",
    "next-sentence": "ForNextSentencePrediction",
    "sequence-classification": "ForSequenceClassification",
    "question-answering": "ForQuestionAnswering",
    "token-classification": "ForTokenClassification",
    "multiple-choice": "ForMultipleChoice",
    "base": "Model",
}
"""What a model is for: how the names of its classes end. The first that fits is taken, where nothing else tells."""


class Conversion(TypedDict):
    """What came of a checkpoint; as JSON in `conversion.json` of the folder."""

    source: str
    """The name of its file."""
    format: str
    model: str
    """The class."""
    dtype: str
    parameters: int
    variables: dict[str, dict[str, object]]
    """Of each that is used: "to", the parameter; "shape" and "dtype"; and whether it is "transposed"."""
    left_out: dict[str, str]
    """Of each other one the reason."""
    tokenizer: dict[str, object] | None
    notes: list[str]
    """What was decided where nothing told, and why."""
    files: list[str]
    not_copied: list[str]
    """What lies beside the checkpoint and may describe it, too."""


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None = None,
    config: str | os.PathLike[str] | None = None,
    vocab: str | os.PathLike[str] | None = None,
    cased: bool | None = None,
    leave_out: Sequence[str] = (),
) -> Conversion:
    """Turns a checkpoint into a folder of safetensors, config and tokenizer; the folder is there whole, or not at all.

    Every variable is used once, by name and shape, or told in the result with the reason why not; a parameter of the
    model without a variable, and a variable without a place, are errors. No code that the checkpoint brings is run.

    Args:
        path: a folder, or in it: the prefix or `.index` of a TensorFlow checkpoint, `tf_model.h5` of transformers 4,
            or `pytorch_model.bin`; of the last two also `.index.json` of shards. TensorFlow's is one under the names of
            Google's BERT, or of a class of transformers 4.
        output: the folder to be made; one that is there has to be empty.
        task: one of TASKS; default: the class that the config names, or that takes all variables.
        config: default: `config.json` or `bert_config.json` beside the checkpoint.
        vocab: a `vocab.txt`; default: the tokenizer files beside the checkpoint.
        cased: whether the vocabulary tells upper case from lower; default: as tokenizer files say, else by the folder's
            name, else by the vocabulary.
        leave_out: patterns of names of variables to do without, as a shell has them.

    Returns:
        What came of it, also written to `conversion.json`.

    Raises:
        UsageError: the checkpoint is not what it should be, or what is asked for can't be done.
    """
    from .job import run

    return run(path, output, task=task, config=config, vocab=vocab, cased=cased, leave_out=leave_out)
