"""`encode`: what sentence-transformers' own methods return; `flatten`: what a padded call computes, without padding."""

from __future__ import annotations

import copy
import importlib
import random
import threading
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf

import fastbert
from fastbert.runtime.registry import family_of
from tests import models
from tests.fastbert.test_families import BASES, FAMILIES, padded
from tests.fastbert.test_families import adapter as of
from tests.fastbert.test_families import seeded as of_family
from tests.fastbert.test_readers import folder, layouts

st = pytest.importorskip("sentence_transformers")
WORDS = ["drums", "beat", "across", "the", "quiet", "river", "while", "nobody", "listens", "to", "them", "at", "night"]
BUDGET = 60


def texts(count: int = 40, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randrange(40))) for _ in range(count)]


def transformer(task: str = "feature-extraction", **changes: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    return Transformer(folder(), transformer_task=task, **changes)


@pytest.fixture(scope="module")
def embedder() -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [transformer(), Pooling(384)]
    model = st.SentenceTransformer(modules=modules, device="cpu", prompts={"query": "what beats? "})
    return fastbert.fuse(model.eval())


def same(ours: Any, theirs: Any) -> None:
    """Values to within the rounding of float32; types, shapes and order as they are."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for each in zip(ours, theirs, strict=True):
            same(*each)
        return
    if isinstance(theirs, torch.Tensor):
        assert ours.layout == theirs.layout
        ours, theirs = ours.to_dense(), theirs.to_dense()
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True, "normalize_embeddings": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"call": "encode_query", "truncate_dim": 7},
        {"prompt": "a prompt of some length: "},
        {"precision": "ubinary"},
    ],
)
def test_embeddings(embedder: Any, options: dict[str, Any]) -> None:
    own = {**options}
    call = own.pop("call", "encode")
    given = texts()
    same(fastbert.encode(embedder, given, batch_tokens=BUDGET, **options), getattr(embedder, call)(given, **own))


@pytest.mark.parametrize("labels", [1, 3])
def test_scores(labels: int, tmp_path: Any) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder())
    kind = hf.BertForSequenceClassification
    models.seeded(kind, vocab_size=len(tokenizer), num_labels=labels).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ranker = fastbert.fuse(st.CrossEncoder(str(tmp_path), device="cpu"))
    pairs = [("what beats?", text) for text in texts()]
    options = {"apply_softmax": labels > 1}
    same(fastbert.encode(ranker, pairs, batch_tokens=BUDGET, **options), ranker.predict(pairs, **options))
    assert fastbert.explain(ranker).encoders[0].stock_calls == {}


def test_late_interaction() -> None:
    """Queries are expanded to a length of their own, documents are of any."""
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    model = fastbert.fuse(st.MultiVectorEncoder(modules=[transformer(), MultiVectorMask()], device="cpu"))
    model[0].query_expansion = {"strategy": "fixed", "length": 48, "attend": False}
    given = texts(20)
    for call in ("encode_query", "encode_document"):
        same(fastbert.encode(model, given, call=call, batch_tokens=BUDGET), getattr(model, call)(given))


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small masked language model."""
    path = tmp_path_factory.mktemp("masked")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder())
    models.seeded(hf.BertForMaskedLM, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def sparse(path: str, *options: str) -> Any:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    modules = [Transformer(path, transformer_task="fill-mask"), SpladePooling(*options)]
    return st.SparseEncoder(modules=modules, device="cpu")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many rows the vocabulary head is computed where there is no padding, by the batch."""
    found: list[int] = []
    ours = importlib.import_module("fastbert.embed.encode")  # the name in the package is the function's
    made = ours.flatten

    def flatten(*args: Any) -> dict[str, Any]:
        flat: dict[str, Any] = made(*args)
        found.append(flat["input_ids"].numel())
        return flat

    monkeypatch.setattr(ours, "flatten", flatten)
    return found


@pytest.mark.parametrize("options", [("max",), ("sum", "log1p_relu")], ids=str)
@pytest.mark.parametrize("budget", [BUDGET, 10**6])
def test_sparse(options: tuple[str, ...], budget: int, masked_lm: str, rows: list[int]) -> None:
    """The vocabulary head and the pooling see no padding, in one batch and in many."""
    stock = sparse(masked_lm, *options)
    model, given = fastbert.fuse(copy.deepcopy(stock)), texts()
    expected = stock.encode(given)
    same(fastbert.encode(model, given, batch_tokens=budget), expected)
    assert sum(rows) == sum(len(row) for row in stock.tokenizer(given)["input_ids"])
    assert layouts(model) == {"packed": len(rows)}
    assert (len(rows) == 1) == (budget > BUDGET)
    before = len(rows)
    same(model.encode(given), expected)  # nothing of it is left
    same(fastbert.encode(fastbert.unfuse(model), given, batch_tokens=budget), expected)
    assert len(rows) == before


def _hooked(model: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


def _compiled(model: Any) -> None:
    model.compile(backend="eager")


def _dense(model: Any) -> None:
    fastbert.fuse(model, padding="dense")


def _derived(model: Any) -> None:
    class SpladePooling(type(model[1])):  # type: ignore[misc]
        def forward(self, features: Any) -> Any:
            assert features["token_embeddings"].shape[0] == features["attention_mask"].shape[0]
            return super().forward(features)

    model[1].__class__ = SpladePooling


@pytest.mark.parametrize("change", [_hooked, _compiled, _dense, _derived])
def test_sparse_with_code_that_would_see_it(change: Any, masked_lm: str, rows: list[int]) -> None:
    """There batches have padding, as in the model's own method."""
    model = fastbert.fuse(sparse(masked_lm))
    given = texts(12)
    expected = model.encode(given)
    change(model)
    same(fastbert.encode(model, given, batch_tokens=200), expected)
    assert not rows


def test_sparse_of_a_text_without_a_token(masked_lm: str, rows: list[int]) -> None:
    """Its batch is padded, in which it is a row of padding alone; others are not."""
    model = fastbert.fuse(sparse(masked_lm))
    own = model.tokenizer
    model[0].processor = hf.PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, pad_token="[PAD]")
    model.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.Sequence([])
    given = [*texts(12), "", "drums"]
    same(fastbert.encode(model, given, batch_tokens=100), model.encode(given))
    assert rows


HEADS = [
    pytest.param(family, kind.__name__, id=kind.__name__)
    for family in FAMILIES
    for kind in of(family).heads
    if kind.__name__.endswith(("ForMaskedLM", "ForTokenClassification")) and not of(family).embeds_padded
]


@pytest.mark.parametrize(("family", "name"), HEADS)
def test_heads_of_flattened_calls(family: str, name: str) -> None:
    """Sequences stay apart; a head that keeps to itself where they begin, so that they would not, is refused."""
    stock = of_family(family, name)
    fused = fastbert.fuse(copy.deepcopy(stock))
    given = models.masks(4, 23)["right"]
    assert given is not None
    batch = {"input_ids": padded(family, given), "attention_mask": given}
    if of(family).run is not None:
        with pytest.raises(ValueError, match=r"a head that hands its \w+ no cumulative lengths; expected"):
            fastbert.flatten(fused, batch)
        return
    with torch.inference_mode():
        expected, ours = stock(**batch).logits[given.bool()], fused(**fastbert.flatten(fused, batch)).logits[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert layouts(fused) == {"packed": 1}


def test_batches_and_what_is_left(embedder: Any) -> None:
    """The longest first, none of many more tokens than asked for; the model is as it was."""
    seen: list[list[str]] = []
    model = copy.copy(embedder)
    model.preprocess = lambda batch, **options: seen.append(batch) or embedder.preprocess(batch, **options)
    before = dict(vars(model))
    given = texts(60)
    same(fastbert.encode(model, given, batch_tokens=4 * BUDGET), embedder.encode(given))
    assert vars(model) == before
    assert sorted(text for batch in seen for text in batch) == sorted(given)
    counts = [[len(row) for row in embedder.tokenizer(batch)["input_ids"]] for batch in seen]
    assert max(map(sum, counts)) <= 4 * BUDGET
    assert min(map(sum, counts[:-1])) > 2 * BUDGET
    assert max(counts[-1]) < max(counts[0])


def test_the_next_batch_is_tokenised_while_one_runs(embedder: Any) -> None:
    """Each forward but the last waits for the next batch's tokenising to begin."""
    given = texts(30)
    model = copy.copy(embedder)
    begun = [threading.Event() for _ in given]
    batches: list[list[str]] = []
    waited: list[bool] = []

    def preprocess(batch: list[str], **options: Any) -> Any:
        begun[len(batches)].set()
        batches.append(batch)
        return embedder.preprocess(batch, **options)

    def forward(features: Any, **options: Any) -> Any:
        done = sum(map(len, batches[: len(waited) + 1]))
        waited.append(done == len(given) or begun[len(waited) + 1].wait(timeout=60))
        return embedder(features, **options)

    model.preprocess, model.forward = preprocess, forward
    same(fastbert.encode(model, given, batch_tokens=BUDGET), embedder.encode(given))
    assert len(waited) > 3
    assert all(waited)
    assert not any(thread.name.startswith("fastbert") for thread in threading.enumerate())


@pytest.mark.parametrize("where", ["preprocess", "forward"])
def test_an_error_is_raised_and_leaves_nothing(embedder: Any, where: str) -> None:
    given = texts(30)
    model = copy.copy(embedder)
    calls = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("of the third")
        return embedder.preprocess(*args, **options) if where == "preprocess" else embedder(*args, **options)

    setattr(model, where, failing)
    with pytest.raises(RuntimeError, match="of the third"):
        fastbert.encode(model, given, batch_tokens=BUDGET)
    assert not any(thread.name.startswith("fastbert") for thread in threading.enumerate())
    same(fastbert.encode(model, given, batch_tokens=BUDGET), embedder.encode(given))


def test_the_same_text_many_times(embedder: Any) -> None:
    given = [WORDS[0], *["drums"] * 30, WORDS[0], "", *WORDS] * 2
    same(fastbert.encode(embedder, given, batch_tokens=BUDGET), embedder.encode(given))


def test_batches_are_packed(embedder: Any) -> None:
    """What holds the base model is looked at for readers of padding, not the copy whose batches are tokenised ahead."""
    model = fastbert.fuse(fastbert.unfuse(copy.deepcopy(embedder)))
    given = [" ".join(WORDS[:n]) for n in (13, 9, 9, 7, 7, 5, 3, 2)]  # each batch has padding
    fastbert.encode(model, given, batch_tokens=50)
    assert layouts(model) == {"packed": 2}


def test_one_or_none(embedder: Any) -> None:
    for given in ("one text", ["one text"], []):
        same(fastbert.encode(embedder, given), embedder.encode(given))


@pytest.mark.parametrize(
    ("given", "options", "error", "told"),
    [
        (["a", 3], {}, TypeError, r"inputs\[1\] has a int; expected texts"),
        (["a", "b"], {"batch_size": 3}, TypeError, "batch_size is given; expected batch_tokens"),
        (["a", "b"], {"device": ["cpu", "cpu"]}, TypeError, "device is a list"),
        (["a", "b"], {"precision": "int8"}, TypeError, "ranges of all embeddings"),
        (["a", "b"], {"batch_tokens": 0}, ValueError, "batch_tokens is 0; expected at least 1"),
        (["a", "b"], {"call": "predict"}, ValueError, "call is 'predict'"),
    ],
)
def test_refused(embedder: Any, given: Any, options: Any, error: type[Exception], told: str) -> None:
    before = fastbert.explain(embedder)
    with pytest.raises(error, match=told):
        fastbert.encode(embedder, given, **options)
    assert fastbert.explain(embedder) == before


def test_another_library_is_refused() -> None:
    with pytest.raises(TypeError, match="model is of type BertModel; expected a SentenceTransformer"):
        fastbert.encode(models.seeded(), ["a", "b"])


def flat(model: Any, batch: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return model(**fastbert.flatten(model, batch)).last_hidden_state


@pytest.mark.parametrize(("family", "name"), BASES)
@pytest.mark.parametrize("pattern", ["right", "left", "holes", "full"])
def test_flattened_is_padded_without_padding(family: str, name: str, pattern: str) -> None:
    stock = of_family(family, name)
    fused = fastbert.fuse(copy.deepcopy(stock))
    given = models.masks(4, 23)[pattern]
    assert given is not None
    batch = {"input_ids": padded(family, given), "attention_mask": given}
    if family_of(fused).embeds_padded:
        with pytest.raises(ValueError, match="model has embeddings that read the mask of each sequence"):
            fastbert.flatten(fused, batch)
        return
    if pattern == "holes" and family_of(fused).tables is not None:  # of distances, or of positions
        with pytest.raises(ValueError, match="padding between real tokens; expected it at the ends"):
            fastbert.flatten(fused, batch)
        return
    with torch.inference_mode():
        expected = stock(**batch).last_hidden_state
    mask = given.bool()
    found = fastbert.flatten(fused, batch)
    assert found["cu_seq_lens_q"].diff().tolist() == mask.sum(1).tolist()
    assert found["max_length_k"] == mask.sum(1).max()
    torch.testing.assert_close(flat(fused, batch)[0], expected[mask], rtol=1e-4, atol=1e-5)
    assert fastbert.explain(fused).encoders[0].stock_calls == {}


def test_flatten_takes_types_and_positions() -> None:
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    batch = {"input_ids": models.ids(3, 11), "attention_mask": models.masks(3, 11)["right"]}
    batch |= {"token_type_ids": models.ids(3, 11, high=2), "position_ids": torch.arange(11).flip(0)[None] + 2}
    with torch.inference_mode():
        expected = stock(**batch).last_hidden_state[batch["attention_mask"].bool()]
    torch.testing.assert_close(flat(fused, batch)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"input_ids": torch.ones(4, dtype=torch.long)},
            r"input_ids: shape \(4,\); expected a tensor \(batch, tokens\)",
        ),
        ({"input_ids": [[1, 2]]}, "input_ids: type list"),
        ({"labels": torch.ones(2, 3)}, "batch holds labels; expected input_ids, attention_mask"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\); expected \(2, 3\)"),
        ({"token_type_ids": torch.ones(3, 3)}, r"token_type_ids has shape \(3, 3\); expected \(2, 3\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}, "a row without a real token"),
    ],
)
def test_flatten_refuses(changes: dict[str, Any], told: str) -> None:
    fused = fastbert.fuse(models.seeded())
    with pytest.raises(ValueError, match=told):
        fastbert.flatten(fused, {"input_ids": models.ids(2, 3), **changes})


def test_flatten_refuses_a_stock_model() -> None:
    with pytest.raises(ValueError, match="0 fused base models; expected one"):
        fastbert.flatten(models.seeded(), {"input_ids": models.ids(2, 3)})
