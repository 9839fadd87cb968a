"""The names that other formats give to variables, and those of the same weights in PyTorch. Data and rules alone."""

from __future__ import annotations

import re

SLOTS = {
    "adam_m": "adam_m of the optimizer",
    "adam_v": "adam_v of the optimizer",
    "lamb_m": "lamb_m of the optimizer",
    "lamb_v": "lamb_v of the optimizer",
    "Adam": "first moment of the optimizer",
    "Adam_1": "second moment of the optimizer",
    "Momentum": "momentum of the optimizer",
    "global_step": "count of training steps",
    "beta1_power": "state of the optimizer",
    "beta2_power": "state of the optimizer",
    "save_counter": "count of checkpoints",
    "_CHECKPOINTABLE_OBJECT_GRAPH": "names of objects",
}
"""Last part of the name of what is no weight in a TensorFlow checkpoint, and what it is."""

_KEY = "/.ATTRIBUTES/VARIABLE_VALUE"
_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}
_GOOGLE_HEADS = {
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}


def slot(name: str) -> str | None:
    """What a variable of a TensorFlow checkpoint is, where it is no weight."""
    if "/.OPTIMIZER_SLOT/" in name or re.match(r"optimizer\d*/", name):
        return "state of the optimizer"
    return SLOTS.get(name.removesuffix(_KEY).rsplit("/", 1)[-1])


def of_google(name: str) -> tuple[str, bool] | None:
    """(name in PyTorch, whether it is transposed) of a variable of Google's BERT; None of others.

    "bert/encoder/layer_0/attention/self/query/kernel" -> "bert.encoder.layer.0.attention.self.query.weight", True.
    """
    if name in _GOOGLE_HEADS:
        return _GOOGLE_HEADS[name], False
    *above, leaf = name.split("/")
    if not above or above[0] not in ("bert", "cls"):
        return None
    if leaf.endswith("_embeddings"):
        return ".".join((*above, leaf, "weight")), False
    if leaf not in ("kernel", "bias", "gamma", "beta"):
        return None
    parts = [re.sub(r"^layer_(\d+)$", r"layer.\1", part) for part in above]
    return ".".join((*parts, _LEAVES.get(leaf, leaf))), leaf == "kernel"


def of_keras(name: str) -> tuple[str, bool]:
    """(name in PyTorch, whether it is transposed) of a weight of a TensorFlow class of transformers 4.

    "tf_bert_model/bert/encoder/layer_._0/attention/self/query/kernel:0" -> as above. What is before the first / is the
    model's own name; "a___b" stands for b, "a_._b" for two levels.
    """
    name = re.sub(r":\d+$", "", name)
    name = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", name).replace("_._", "/")
    *above, leaf = [part for part in name.split("/") if part][1:]
    return ".".join((*above, _LEAVES.get(leaf, leaf))), leaf == "kernel"


def of_old_torch(name: str) -> str:
    """Today's name of a weight in an old state dict: "LayerNorm.gamma" -> "LayerNorm.weight"."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))
