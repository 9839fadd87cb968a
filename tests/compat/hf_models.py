"""What hf_suite.py has pytest collect: Hugging Face's test classes over every family, and every head, of fastbert.

`huggingface_tests` is the folder tests/ of transformers' source distribution, which hf_suite.py unpacks. It has the
tests that are common to all models, and not the small models each family brings to them: those are made here. They
have heads of 16, the least that fastbert fuses.
"""

from __future__ import annotations

import importlib
import unittest
from typing import Any

import torch
from environments import ABSENT, BROKEN_HEADS
from huggingface_tests.generation.test_utils import GenerationTesterMixin
from huggingface_tests.test_modeling_common import ModelTesterMixin, global_rng, ids_tensor, random_attention_mask
from huggingface_tests.test_training_mixin import TrainingTesterMixin
from transformers import __version__

import fastbert
from fastbert.fuse import FAMILIES, code_of

NO_TYPES = {"distilbert", "mpnet", "modernbert", "eurobert", "esm"}
SMALL_IDS = {"pad_token_id": 0, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))}
OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 37},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 16},
    # No positions by distance unless the config says so.
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta_v2": {
        **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        **{"norm_rel_ebd": "layer_norm", "share_att_key": True},
    },
    "modernbert": {"local_attention": 4, **SMALL_IDS},  # half of it on either side
    "nomic_bert": SMALL_IDS,
    "eurobert": {"num_key_value_heads": 2, **SMALL_IDS},
    "gte": SMALL_IDS,
    "jina_embeddings_v3": SMALL_IDS,
    "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 2, **SMALL_IDS},
}
"""Of the config of a small model, what its family calls otherwise, or would have too large for its vocabulary."""


class Tester:
    """A small model of a family, and inputs: what ModelTesterMixin asks of a `model_tester`."""

    batch_size, seq_length, num_choices, num_labels = 13, 7, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    is_training = True

    def __init__(self, family: str, masked_lm: Any) -> None:
        self.family = family
        self.causal_lm_class = masked_lm  # what TrainingTesterMixin trains: any model that takes ids as its labels

    def get_config(self) -> Any:
        sizes = {"vocab_size": 99, "max_position_embeddings": 512, "initializer_range": 0.02}
        sizes |= {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        if self.family != "distilbert":
            sizes |= {"intermediate_size": 37}
        if self.family not in NO_TYPES:
            sizes |= {"type_vocab_size": 16}
        sizes |= OWN.get(self.family, {})
        return self.causal_lm_class.config_class(**sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        # Ids from 2 on: from those of padding, 0 and 1, some families derive positions, and expect none in embeddings.
        inputs = {"input_ids": ids_tensor(shape, 97) + 2, "attention_mask": random_attention_mask(shape)}
        if self.family not in NO_TYPES:
            inputs["token_type_ids"] = ids_tensor(shape, 16)
        return self.get_config(), inputs


class FamilyTests(ModelTesterMixin, TrainingTesterMixin):
    model_tester: Any = None
    family = ""

    def setUp(self) -> None:
        global_rng.seed(0)  # what inputs are drawn from: the same ones, stock and fused
        masked_lm = next(kind for kind in self.all_model_classes if kind.__name__.endswith("ForMaskedLM"))
        self.model_tester = Tester(self.family, masked_lm)

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        name = model_class.__name__
        if return_labels and name.endswith("ForPreTraining"):
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            if name != "ElectraForPreTraining":
                order = "sentence_order_label" if name == "AlbertForPreTraining" else "next_sentence_label"
                inputs[order] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs


def _tests_of(family: str) -> type[unittest.TestCase]:
    begin, ends = fastbert._MODELS[family]
    module = importlib.import_module(code_of(family))
    names = [begin + end for end in ("Model", *(end for end in ends if end != "Model"))]
    kinds = tuple(getattr(module, name) for name in names if name not in BROKEN_HEADS.get(__version__, ()))
    # Hugging Face's tests ask for this class, empty here, wherever a model can generate.
    generates = (GenerationTesterMixin,) if any(kind.can_generate() for kind in kinds) else ()
    bases = (FamilyTests, *generates, unittest.TestCase)
    return type(f"{begin}ModelTest", bases, {"__module__": __name__, "all_model_classes": kinds, "family": family})


for _family in (name for name in FAMILIES if name not in ABSENT.get(__version__, ())):
    _tests = _tests_of(_family)
    globals()[_tests.__name__] = _tests
del _tests
