"""What transformers 4 wrote: run by its own Python, it leaves a folder for each of CASES, by its TensorFlow classes.

    python tests/compat/tf4_files.py FOLDER

`tf_model.h5` and `config.json` of `save_pretrained`, of small models with random weights, biases and norms; of one also
in shards, and as a checkpoint of Keras. Beside them `outputs.npz`: ids, and what TensorFlow makes of them in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SHAPE = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
SHORT = {"max_position_embeddings": 40, "type_vocab_size": 2}
ROBERTA = {**SHAPE, "max_position_embeddings": 40, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {"vocab_size": 99, "n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48, "max_position_embeddings": 40}
ELECTRA = {**SHAPE, **SHORT, "embedding_size": 24}
MPNET = {**SHAPE, "max_position_embeddings": 40}
HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Bert": ({**SHAPE, **SHORT}, ("Model", "ForPreTraining", "ForNextSentencePrediction", *HEADS)),
    "Roberta": (ROBERTA, ("Model", *HEADS)),
    "Camembert": (ROBERTA, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    "XLMRoberta": (ROBERTA, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    "DistilBert": (DISTILBERT, ("Model", *HEADS)),
    "Electra": (ELECTRA, ("Model", "ForPreTraining", *HEADS)),
    "MPNet": (MPNET, ("Model", *HEADS)),
    "Deberta": ({**SHAPE, **SHORT}, ("Model", "ForSequenceClassification", "ForTokenClassification")),
    "DebertaV2": (
        {
            **{**SHAPE, **SHORT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
            **{"share_att_key": True, "position_biased_input": False, "norm_rel_ebd": "layer_norm"},
        },
        ("Model", "ForSequenceClassification", "ForTokenClassification"),
    ),
}
CASES = [f"{family}{head}" for family, (_, heads) in FAMILIES.items() for head in heads]
SHARDED, CHECKPOINT = "BertForSequenceClassification-sharded", "BertForSequenceClassification-checkpoint"


def write(folder: Path) -> None:
    import numpy as np
    import tensorflow as tf
    import transformers
    from tf_keras.backend import set_floatx

    generator = np.random.default_rng(0)
    for family, (shape, heads) in FAMILIES.items():
        for head in heads:
            name = f"{family}{head}"
            kind = getattr(transformers, f"TF{name}")
            config = kind.config_class(**shape, **({} if head == "ForQuestionAnswering" else {"num_labels": 3}))
            ids = generator.integers(5, config.vocab_size, (2, 3, 11) if head == "ForMultipleChoice" else (2, 11))
            model = kind(config)
            model(tf.constant(ids))
            for weight in model.weights:
                around = 1.0 if weight.name.endswith("gamma:0") else 0.0
                weight.assign(around + 0.2 * generator.standard_normal(weight.shape))
            set_floatx("float64")
            wide = kind(config)
            wide(tf.constant(ids))
            wide.set_weights([each.astype(np.float64) for each in model.get_weights()])
            found = wide(tf.constant(ids), training=False)
            set_floatx("float32")
            values = {key: value.numpy() for key, value in found.items() if hasattr(value, "numpy")}
            assert all(value.dtype == np.float64 for value in values.values())
            for case in (each for each in (name, SHARDED, CHECKPOINT) if each.split("-")[0] == name):
                there = folder / case
                if case == CHECKPOINT:
                    config.architectures = [name]
                    config.save_pretrained(there)
                    model.save_weights(there / "weights", save_format="tf")
                else:
                    model.save_pretrained(there, max_shard_size="20KB" if case == SHARDED else "5GB")
                np.savez(there / "outputs.npz", input_ids=ids, **values)
                print(case, flush=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
