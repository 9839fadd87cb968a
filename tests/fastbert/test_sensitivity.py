"""Whether an answer depends on what stands at padding is found by putting values there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.runtime import readers
from tests import models
from tests.fastbert.test_readers import TEXTS, Around, Attentive, BiLSTM, _transformer, attention_pooling, mean_of_all

INPUTS = {"input_ids": models.ids(5, 17), "attention_mask": models.masks(5, 17)["right"]}


def verified(model: nn.Module, inputs: Any = INPUTS, **more: Any) -> Any:
    before = [(type(module), set(vars(module))) for module in model.modules()]
    report = fastbert.verify(model, inputs, **more)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    return report


@pytest.mark.parametrize("kind", models.HEADS, ids=lambda kind: kind.__name__)
def test_heads_ignore_padding(kind: Any) -> None:
    shape = (slice(None), None) if kind is hf.BertForMultipleChoice else slice(None)
    # Of heads with an output or two a sequence many sequences: the error of ten numbers is noise.
    few = kind in (hf.BertForMultipleChoice, hf.BertForNextSentencePrediction)
    given = {"input_ids": models.ids(90, 17), "attention_mask": models.masks(90, 17)["right"]} if few else INPUTS
    inputs = {name: tensor[shape] for name, tensor in given.items() if tensor is not None}
    report = verified(models.seeded(kind), inputs)
    assert report.ok
    assert report.padding == ({}, False, None)
    assert "padding: ignored" in str(report)


def test_what_reads_padding_is_named() -> None:
    tagger = models.seeded(hf.BertForTokenClassification)
    tagger.classifier = BiLSTM().eval()
    for model, name in ((tagger, "logits"), (Around(models.seeded(), attention_pooling).eval(), "output")):
        report = verified(model)
        assert report.ok  # it runs dense
        assert list(report.padding.reads) == [name]
        assert report.padding.reads[name] > 1e-3
        assert f"padding: READ, and so runs dense: {name} (changes by" in str(report)
        assert json.loads(report.to_json())["padding"]["reads"] == report.padding.reads


def test_what_reads_padding_and_is_packed_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a row said of a module that it ignores padding, which it does not."""
    monkeypatch.setitem(readers._KNOWN, Around, readers.Reader(around=True))
    monkeypatch.setattr(readers, "_MET", {**readers._MET})
    report = verified(Around(models.seeded(), mean_of_all).eval())
    assert report.padding.packed
    assert not report.ok
    assert "DEPARTS from stock: padding is read, and packed away" in str(report)
    assert report.first_departure is None


def test_what_can_not_be_seen_is_said() -> None:
    assert verified(models.seeded(), {"input_ids": models.ids(2, 5)}).padding.unseen == "no input has padding"

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = models.seeded()

        def forward(self, sentence: str) -> Tensor:
            raise AssertionError(sentence)

    report = verified(Strange().eval())
    assert "Strange can't be called like this: TypeError" in report.padding.unseen
    assert "padding: not looked at" in str(report)


@pytest.mark.parametrize("name", ["mean", "custom", "queries that are expanded"])
def test_sentence_transformers(name: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    backbone = _transformer()
    if name == "queries that are expanded":
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        backbone.query_expansion = {"strategy": "fixed", "length": 24}
        model = sentence_transformers.MultiVectorEncoder(modules=[backbone, MultiVectorMask()], device="cpu")
        expected = ["token_embeddings"]
    else:
        from sentence_transformers.sentence_transformer.modules import Pooling

        pooling = Pooling(384) if name == "mean" else Attentive()
        model = sentence_transformers.SentenceTransformer(modules=[backbone, pooling], device="cpu")
        expected = [] if name == "mean" else ["sentence_embedding"]
    report = verified(model.eval(), TEXTS)
    assert report.padding.unseen is None
    assert list(report.padding.reads) == expected
    assert not report.padding.packed
    assert report.ok


def test_the_model_is_left_as_it_was() -> None:
    model = fastbert.fuse(Around(models.seeded(), mean_of_all).eval())
    fastbert.verify(model, INPUTS)
    assert fastbert.explain(model).encoders[0].fused
    assert not model.bert._forward_hooks
    assert torch.is_grad_enabled()
