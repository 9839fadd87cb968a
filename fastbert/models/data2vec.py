"""data2vec's encoder of text: RoBERTa after renaming."""

from __future__ import annotations

from transformers.models.data2vec import modeling_data2vec_text as hf

from .classes import register
from .roberta import kin

FAMILY = register(kin(hf, "Data2VecText"), __name__)
