"""ERNIE: BERT after renaming; types of tasks may be embedded, too (config.use_task_id)."""

from __future__ import annotations

from transformers.models.ernie import modeling_ernie as hf

from . import bert
from .classes import bert_like, register
from .family import IDS

FAMILY = register(
    bert_like(
        hf,
        "Ernie",
        bert.HEADS,
        others=("ForCausalLM",),
        parts=bert.PARTS,
        vocabularies=bert.VOCABULARIES,
        ids={**IDS, "task_type_ids": "task_type_embeddings"},
    ),
    __name__,
)
