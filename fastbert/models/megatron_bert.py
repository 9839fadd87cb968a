"""Megatron-BERT: BERT with LayerNorm before each half and after the last, none in its embeddings.

Its model hands no arguments of ours on to its encoder.
"""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.megatron_bert import modeling_megatron_bert as hf

from . import bert
from .classes import bert_like, register, run_as_bert

FAMILY = register(
    bert_like(
        hf,
        "MegatronBert",
        bert.HEADS,
        others=("ForCausalLM",),
        parts=bert.PARTS,
        vocabularies=bert.VOCABULARIES,
        attention={"norm": ("attention", "ln")},
        feed_forward={"norm": ("ln",)},
        pre_norm=True,
        final_norm="ln",
        fuses_embeddings=False,
        run=run_as_bert(BaseModelOutputWithPoolingAndCrossAttentions),
    ),
    __name__,
)
