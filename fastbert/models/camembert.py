"""CamemBERT: RoBERTa after renaming."""

from __future__ import annotations

from transformers.models.camembert import modeling_camembert as hf

from .classes import register
from .roberta import kin

FAMILY = register(kin(hf, "Camembert"), __name__)
