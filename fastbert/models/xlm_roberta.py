"""XLM-R: RoBERTa after renaming."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from .classes import register
from .roberta import kin

FAMILY = register(kin(hf, "XLMRoberta"), __name__)
