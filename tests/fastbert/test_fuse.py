"""The contract of fuse, unfuse and explain: what stays as it was, what falls back, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.runtime.support import CACHES
from tests import models


def call(seqlen: int = 17) -> dict[str, torch.Tensor]:
    return {"input_ids": models.ids(5, seqlen), "attention_mask": models.masks(5, seqlen)["right"]}


def last(model: Any, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments)[0]


def reasons(model: Any) -> dict[str, int]:
    return fastbert.explain(model).encoders[0].stock_calls


def fused_calls(model: Any) -> int:
    return sum(fastbert.explain(model).encoders[0].fused_calls.values())


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """(fused, stock) sequence classifiers of the same weights."""
    stock = models.seeded(hf.BertForSequenceClassification)
    return fastbert.fuse(copy.deepcopy(stock)), stock


def test_returns_the_same_object_with_the_same_parameters() -> None:
    model = models.seeded()
    before = dict(model.named_parameters()), dict(model.named_buffers()), list(model.state_dict())
    assert fastbert.fuse(model) is model
    assert list(model.state_dict()) == before[2]
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert all(b is before[1][name] for name, b in model.named_buffers())
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in models.seeded().modules()]


def test_unfuse_restores_every_class_and_hook() -> None:
    model, untouched = models.seeded(hf.BertForMaskedLM), models.seeded(hf.BertForMaskedLM)
    assert fastbert.unfuse(fastbert.fuse(model)) is model
    for a, b in zip(model.modules(), untouched.modules(), strict=True):
        assert type(a) is type(b)
        assert not a._forward_pre_hooks
        assert a.__dict__.keys() == b.__dict__.keys()
    assert torch.equal(last(model, **call()), last(untouched, **call()))
    assert not fastbert.explain(model).encoders[0].fused


def test_fusing_twice_changes_only_the_padding(pair: tuple[Any, Any]) -> None:
    fused, _ = pair
    last(fused, **call())
    fastbert.fuse(fused, padding="dense")
    assert fastbert.explain(fused).encoders[0].padding == "dense"
    last(fused, **call())
    assert fastbert.explain(fused).encoders[0].fused_calls == {"packed": 1, "dense": 1}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_run_fused(pair: tuple[Any, Any], way: str, tmp_path: Path) -> None:
    fused, _ = pair
    expected = last(fused, **call())
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(last(twin, **call()), expected)
    assert fused_calls(twin) == fused_calls(fused) + 1  # counts are copied, then go separate ways
    assert twin.bert.embeddings.word_embeddings.weight is not fused.bert.embeddings.word_embeddings.weight


def test_save_and_reload(pair: tuple[Any, Any], tmp_path: Path) -> None:
    fused, stock = pair
    fused.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is hf.BertForSequenceClassification
    assert torch.equal(last(plain, **call()), last(stock, **call()))
    again = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(last(again, **call()), last(fused, **call()))
    assert plain.config.architectures == ["BertForSequenceClassification"]


def test_to_half_resize_and_load_state_dict(pair: tuple[Any, Any]) -> None:
    fused, stock = pair
    fused, stock = fused.to(torch.bfloat16), stock.to(torch.bfloat16)
    torch.testing.assert_close(last(fused, **call()), last(stock, **call()), rtol=2**-6, atol=2**-6)
    fused, stock = fused.float(), stock.float()
    for model in (fused, stock):
        torch.manual_seed(0)
        model.resize_token_embeddings(models.VOCABULARY + 5, mean_resizing=False)
    wide = {"input_ids": torch.full((1, 3), models.VOCABULARY + 4)}
    torch.testing.assert_close(last(fused, **wide), last(stock, **wide))
    other = models.seeded(hf.BertForSequenceClassification, seed=1)
    other.resize_token_embeddings(models.VOCABULARY + 5, mean_resizing=False)
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(last(fused, **call()), last(other, **call()))


def test_threads_share_one_model() -> None:
    """Calls of different shapes and layouts at once, each with its own right answer and all of them counted."""
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    calls = [
        {"input_ids": models.ids(3, 9 + i, seed=i), "attention_mask": models.masks(3, 9 + i)["right"]} for i in range(8)
    ]
    expected = [last(fused, **c) for c in calls]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(last(fused, **calls[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fused_calls(fused) == 8 + 80


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.left, self.right = inner, models.seeded(seed=3)

    def forward(self, **arguments: Any) -> torch.Tensor:
        return self.left(**arguments)[0] + self.right(**arguments)[0]


def test_every_encoder_inside_a_module_is_fused() -> None:
    model = Wrapper(models.seeded())
    stock = copy.deepcopy(model)
    fastbert.fuse(model, padding="dense")
    with torch.no_grad():
        torch.testing.assert_close(model(**call()), stock(**call()))
    explanation = fastbert.explain(model)
    assert [e.name for e in explanation.encoders] == ["left", "right"]
    assert [e.fused_calls for e in explanation.encoders] == [{"dense": 1}] * 2


# What is not covered runs stock: bitwise stock's answer, and counted under its reason.


def stock_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    four = torch.ones(5, 1, 17, 17, dtype=torch.bool).tril()
    return {
        "output_attentions, of which 'sdpa' attention gives none": ({}, {"output_attentions": True}),
        "an attention_mask that is not 2-D": ({}, {"attention_mask": four}),
        **{name: ({}, {name: "a new one for each model"}) for name in CACHES},
        "encoder_hidden_states": ({}, {"encoder_hidden_states": torch.zeros(5, 3, 128)}),
    }


@pytest.mark.parametrize("reason", stock_cases())
def test_a_call_not_covered_runs_stock(reason: str) -> None:
    from transformers import DynamicCache

    changes, arguments = stock_cases()[reason]
    stock = models.seeded(**changes)
    fused = fastbert.fuse(copy.deepcopy(stock))
    results = []
    for model in (fused, stock):
        arguments |= {name: DynamicCache(config=model.config) for name in CACHES if name in arguments}
        with torch.no_grad():
            results.append(model(**{**call(), **arguments}))
    # The embeddings may still be fused, and round differently.
    torch.testing.assert_close(results[0][0], results[1][0])
    if "output_attentions" in arguments:
        assert results[0].attentions == results[1].attentions == ()
    assert reasons(fused) == {reason: 1}
    assert fused_calls(fused) == 0


def shift_positions(model: Any) -> None:
    model.embeddings.position_ids.copy_((torch.arange(160)[None] + 2) % 160)


def other_types(model: Any) -> None:
    model.embeddings.token_type_ids.fill_(1)


def halve_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, out: out * 0.5)


def replace_dropout(model: Any) -> None:
    model.encoder.layer[0].output.dropout = nn.Tanh()
    model.embeddings.dropout = nn.Tanh()


def make_causal(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True


def decode(model: Any) -> None:
    model.config.is_decoder = True
    make_causal(model)


def cross_attend(model: Any) -> None:
    model.encoder.layer[0].attention.is_cross_attention = True  # it takes the mask of another model then


def own_types(model: Any) -> None:
    del model.embeddings.token_type_ids  # then they are zeros
    model.embeddings.token_type_embeddings.weight[0] += 1


def mix_tokens(model: Any) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Softmax(dim=1)


def skip_feed_forward(model: Any) -> None:
    model.encoder.layer[0].feed_forward_chunk = lambda x: x


def quantize(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def own_layer(model: Any) -> None:
    model.encoder.layer.append(models.seeded(hf.BertModel, seed=7).encoder.layer[0])


def own_words(model: Any) -> None:
    torch.manual_seed(0)
    model.embeddings.word_embeddings = nn.Sequential(nn.Embedding(models.VOCABULARY, 16), nn.Linear(16, 128))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("arguments", [{}, call()], ids=["no mask", "mask"])
@pytest.mark.parametrize(
    "change",
    [
        shift_positions,
        other_types,
        halve_dropout,
        replace_dropout,
        make_causal,
        cross_attend,
        own_types,
        decode,
        mix_tokens,
        skip_feed_forward,
        quantize,
        own_layer,
        own_words,
    ],
)
def test_changes_to_a_fused_model_are_honoured(change: Any, arguments: dict[str, Any]) -> None:
    """Whatever is done to the parts of a model after fuse, it answers as a stock model does after the same."""
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    inputs = {"input_ids": call()["input_ids"], **arguments}
    unchanged = last(stock, **inputs)
    for model in (stock, fused):
        with torch.no_grad():
            change(model)
    real = call()["attention_mask"].bool() if arguments else torch.ones(5, 17, dtype=torch.bool)
    expected = last(stock, **inputs)
    torch.testing.assert_close(last(fused, **inputs)[real], expected[real])
    if change is not (make_causal if arguments else cross_attend):  # sdpa is causal only without a mask
        assert not torch.equal(expected[real], unchanged[real])


@pytest.mark.parametrize(
    "where",
    ["embeddings.dropout", *(f"encoder.layer.1.{n}.dropout" for n in ("attention.self", "attention.output", "output"))],
)
def test_dropout_alone_in_training_mode_drops(where: str) -> None:
    model = fastbert.fuse(models.seeded())
    # Stock's attention asks its own training flag, the others that of their dropout.
    name = where.removesuffix(".dropout") if where.endswith("self.dropout") else where
    model.get_submodule(name).train()
    assert not torch.equal(last(model, **call()), last(model, **call()))


def test_forward_mode_derivatives_are_stocks() -> None:
    stock = models.seeded(attn_implementation="eager").requires_grad_(False)
    fused = fastbert.fuse(copy.deepcopy(stock))
    embeds = torch.randn(1, 5, 128)
    tangents = [
        torch.func.jvp(lambda e, m=m: m(inputs_embeds=e).last_hidden_state, (embeds,), (embeds,))[1]
        for m in (fused, stock)
    ]
    assert tangents[1].abs().max() > 0.01
    torch.testing.assert_close(*tangents)


def test_gradients_through_a_hook_on_frozen_embeddings() -> None:
    model = fastbert.fuse(models.seeded().requires_grad_(False))
    model.enable_input_require_grads()
    assert model(**call())[0].requires_grad


def test_a_flattened_call_with_a_stock_layer_isolates_sequences() -> None:
    for implementation in ("eager", "sdpa"):
        fused = fastbert.fuse(models.seeded(attn_implementation=implementation))
        expected = last(fused, **models.ragged([5, 3, 9]))
        fused.encoder.layer[0].attention.register_forward_hook(lambda *args: None)
        torch.testing.assert_close(last(fused, **models.ragged([5, 3, 9])), expected)
    fused.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' would not keep its sequences apart"):
        last(fused, **models.ragged([5, 3, 9]))


class Strict(hf.BertForTokenClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:  # type: ignore
        return super().forward(input_ids, attention_mask, labels=labels)


def test_a_head_with_a_forward_of_its_own_is_dense() -> None:
    stock = models.seeded(Strict)
    fused = fastbert.fuse(copy.deepcopy(stock))
    labels = models.ids(5, 17, high=30)
    torch.testing.assert_close(last(fused, **call(), labels=labels), last(stock, **call(), labels=labels))
    assert fastbert.explain(fused).encoders[0].fused_calls == {"dense": 1}


def test_a_custom_loss_function() -> None:
    model = fastbert.fuse(models.seeded(hf.BertLMHeadModel))
    model.loss_function = lambda logits, labels, vocab_size: logits.sum()
    assert last(model, **call(), labels=models.ids(5, 17)).dim() == 0


def test_longer_position_tables_than_the_config_says() -> None:
    model = fastbert.fuse(models.seeded(max_position_embeddings=200))
    model.config.max_position_embeddings = 160
    assert last(model, input_ids=models.ids(1, 200)).shape == (1, 200, 128)


def test_a_sequence_without_a_real_token() -> None:
    """sdpa gives it zeros, which the kernels do, too; eager an even average, which is left to it."""
    arguments = {"input_ids": models.ids(5, 17), "attention_mask": models.masks(5, 17)["empty"]}
    for implementation, expected in (
        ("sdpa", {}),
        ("eager", {"a sequence without a real token, which eager attention spreads over its padding": 1}),
    ):
        stock = models.seeded(attn_implementation=implementation)
        fused = fastbert.fuse(copy.deepcopy(stock), padding="dense")
        torch.testing.assert_close(last(fused, **arguments), last(stock, **arguments))
        assert reasons(fused) == expected


def test_ids_broadcast_as_stocks_do() -> None:
    stock = models.seeded()
    for padding in ("packed", "dense"):
        fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
        real = call()["attention_mask"].bool()
        for name, ids in (
            ("token_type_ids", models.ids(17, high=2)),
            ("token_type_ids", models.ids(5, 1, high=2)),
            ("position_ids", torch.arange(17).flip(0)[None]),
            ("position_ids", torch.arange(17).flip(0).int()[None]),
        ):
            arguments = {**call(), name: ids}
            torch.testing.assert_close(last(fused, **arguments)[real], last(stock, **arguments)[real])


def test_autocast_of_float64_parameters_runs_stock(pair: tuple[Any, Any]) -> None:
    """It leaves them alone."""
    fused, stock = (model.double() for model in pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(last(fused, **call()), last(stock, **call()))
    assert reasons(fused) == {"dtype torch.float64": 1}


def test_a_direct_call_of_forward_runs_fused(pair: tuple[Any, Any]) -> None:
    """sentence-transformers calls `forward` itself, past the hooks of a module, and reads its signature."""
    a, b = (m.bert.forward for m in pair)
    with torch.no_grad():
        torch.testing.assert_close(a(**call())[1], b(**call())[1])
    assert fused_calls(pair[0]) == 1
    assert inspect.signature(a) == inspect.signature(b)


def test_a_direct_call_of_the_encoder_runs_stock() -> None:
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    hidden = torch.randn(2, 5, 128)
    assert torch.equal(last(fused.encoder, hidden_states=hidden), last(stock.encoder, hidden_states=hidden))
    assert reasons(fused) == {"called past the forward of its model": 1}


def test_a_custom_attention_runs_stock() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return 2 * out, weights

    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    stock = models.seeded(attn_implementation="doubled")
    fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused, **call()), last(stock, **call()))
    assert reasons(fused) == {"attention implementation 'doubled'": 1}


class Shift(nn.Linear):
    """A replacement that mixes tokens: wrong on any layout but the padded one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 3
        return super().forward(x).roll(1, dims=1)


@pytest.mark.parametrize(
    "where",
    ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "output.LayerNorm"],
)
def test_a_replaced_submodule_runs_its_layer_stock(where: str) -> None:
    stock = models.seeded(num_hidden_layers=3)
    layer = stock.encoder.layer[1]
    old = layer.get_submodule(where)
    if isinstance(old, nn.Linear):
        new: nn.Module = Shift(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
    else:
        new = nn.Sequential(old)
    layer.set_submodule(where, new)
    fused = fastbert.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(last(fused, **call()), last(stock, **call()))
    with torch.no_grad():
        explanation = fastbert.explain(fused).encoders[0]
    assert list(explanation.layers) == [1]
    assert where in explanation.layers[1]
    assert explanation.fused_calls == {"dense": 1}
    with torch.no_grad():
        assert where in str(fastbert.explain(fused))


def test_hooks_see_what_stock_shows_them() -> None:
    """Hooks on a layer, on a linear inside one, on embeddings and on the encoder: same shapes, same values."""
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for name in ("encoder.layer.0", "encoder.layer.1.intermediate.dense", "embeddings", "encoder", "pooler"):
        seen: list[torch.Tensor] = []
        handles = [
            m.get_submodule(name).register_forward_hook(
                lambda module, args, out, _s=seen: _s.append(out if isinstance(out, torch.Tensor) else out[0])
            )
            for m in (fused, stock)
        ]
        for model in (fused, stock):
            last(model, **call())
        for handle in handles:
            handle.remove()
        assert len(seen) == 2, name
        if name not in ("encoder",):
            torch.testing.assert_close(seen[0], seen[1], msg=name)


def test_a_hook_that_changes_a_linear_is_honoured() -> None:
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    for model in (fused, stock):
        model.encoder.layer[0].attention.self.value.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(last(fused, **call()), last(stock, **call()))


def test_parametrized_and_pruned_weights_are_honoured() -> None:
    from torch.nn.utils import parametrizations, prune

    model = models.seeded()
    parametrizations.weight_norm(model.encoder.layer[0].output.dense)
    prune.random_unstructured(model.encoder.layer[1].intermediate.dense, "weight", 0.5)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.parametrizations.weight.original0.mul_(3)
    expected = last(model, **call())
    torch.testing.assert_close(last(fastbert.fuse(model), **call()), expected)


def test_lora_adapters() -> None:
    peft = pytest.importorskip("peft")
    for targets in (["query", "value"], "all-linear"):
        base = models.seeded(hf.BertForSequenceClassification)
        stock = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
        expected = last(stock, **call())
        fused = fastbert.fuse(stock)
        torch.testing.assert_close(last(fused, **call()), expected)
        assert fastbert.explain(fused).encoders[0].fused_calls == {"packed": 1}
        assert fastbert.explain(fused).encoders[0].layers == {}
        merged = fused.merge_and_unload()
        torch.testing.assert_close(last(merged, **call()), expected)
        assert fastbert.explain(merged).encoders[0].fused_calls == {"packed": 2}


def test_an_adapter_that_mixes_tokens_runs_its_layers_stock() -> None:
    peft = pytest.importorskip("peft")
    base = models.seeded(hf.BertForSequenceClassification)
    stock = peft.get_peft_model(base, peft.LilyConfig(r=4, target_modules=["query"])).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    expected = last(stock, **call())
    torch.testing.assert_close(last(fastbert.fuse(stock), **call()), expected)
    assert fused_calls(stock) == 0
    assert list(reasons(stock)) == [
        "no layer can run fused: encoder.layer.0.attention.self.query is a peft.tuners.lily.layer.Linear"
    ]


def test_sentence_transformer_and_cross_encoder(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    models.seeded(hf.BertForSequenceClassification, num_labels=1, vocab_size=15).save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    texts = ["a b c", "d", "e f g h i j a b c d e", "c c"]
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    expected = encoder.encode(texts)
    got = fastbert.fuse(encoder).encode(texts)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert fused_calls(encoder) == 1
    ranker = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(a, b) for a in texts for b in texts]
    expected = ranker.predict(pairs)
    torch.testing.assert_close(torch.tensor(fastbert.fuse(ranker).predict(pairs)), torch.tensor(expected))
    assert fused_calls(ranker) == 1


def test_torch_compile_gives_the_same_answer(pair: tuple[Any, Any]) -> None:
    fused, stock = pair
    compiled = torch.compile(fused, backend="aot_eager")
    torch.testing.assert_close(last(compiled, **call()), last(stock, **call()))
    assert fused_calls(fused) <= 1  # a compiled call is not counted


# What is refused, by name, before anything changes.


def test_unsupported_models_are_refused_unchanged() -> None:
    decoder = models.seeded(hf.BertLMHeadModel, is_decoder=True)
    with pytest.raises(fastbert.UnsupportedModelError, match="decoder"):
        fastbert.fuse(decoder)
    assert type(decoder.bert.encoder) is hf.BertEncoder
    with pytest.raises(fastbert.UnsupportedModelError, match="head dimension is 8"):
        fastbert.fuse(models.seeded(hidden_size=32))
    with pytest.raises(
        fastbert.UnsupportedModelError, match=r"no encoder of a supported family \(bert, .*register adds"
    ):
        fastbert.fuse(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is the class BertModel; expected an instance, as"):
        fastbert.fuse(hf.BertModel)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="model is of type str"):
        fastbert.fuse("bert-large-uncased")  # type: ignore[type-var]
    model = models.seeded()
    with pytest.raises(ValueError, match="padding is 'none'; expected one of 'auto', 'packed', 'dense'"):
        fastbert.fuse(model, padding="none")  # type: ignore[arg-type]
    assert type(model.encoder) is hf.BertEncoder


def test_types_say_what_is_expected() -> None:
    """So that a type checker finds padding="packd"."""
    hints = get_type_hints(fastbert.fuse)
    paddings, precisions = get_args(hints["padding"]), get_args(get_args(hints["precision"])[0])
    assert (paddings, precisions) == (("auto", "packed", "dense"), ("fp8", "int8"))
    for padding in paddings:
        assert fastbert.explain(fastbert.fuse(models.seeded(), padding=padding)).encoders[0].padding == padding


def test_the_kill_switch(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = pair
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    assert torch.equal(last(fused, **call()), last(stock, **call()))
    assert (fused_calls(fused), reasons(fused)) == (0, {"FASTBERT_DISABLE is set": 1})
    assert "stock: FASTBERT_DISABLE is set" in str(fastbert.explain(fused))
    monkeypatch.setenv("FASTBERT_DISABLE", "0")
    last(fused, **call())
    assert fused_calls(fused) == 1


class Own(hf.BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(fastbert.UnsupportedModelError, match="Own is a custom class"):
        fastbert.fuse(Own(models.config()))


BAD = {
    "input_ids holds values from -1 to": {"input_ids": torch.tensor([[1, -1]])},
    "input_ids holds values from 1 to 211; expected 0 to 210": {"input_ids": torch.tensor([[1, 211]])},
    "input_ids has dtype torch.float32": {"input_ids": torch.ones(1, 2)},
    r"input_ids has shape \(2,\); expected \(batch, tokens\)": {"input_ids": torch.ones(2, dtype=torch.long)},
    r"input_ids has shape \(0, 4\); expected at least one": {"input_ids": torch.ones(0, 4, dtype=torch.long)},
    r"input_ids has shape \(4, 0\); expected at least one": {"input_ids": torch.ones(4, 0, dtype=torch.long)},
    "input_ids has 161 tokens a sequence; expected at most max_position_embeddings, 160": {
        "input_ids": models.ids(1, 161)
    },
    "input_ids is on meta": {"input_ids": torch.ones(1, 2, dtype=torch.long, device="meta")},
    "token_type_ids holds values from 0 to 2": {
        "input_ids": models.ids(1, 3),
        "token_type_ids": torch.tensor([[0, 1, 2]]),
    },
    r"token_type_ids has shape \(1, 4\)": {"input_ids": models.ids(1, 3), "token_type_ids": torch.zeros(1, 4).long()},
    "position_ids holds values from 0 to 160": {
        "input_ids": models.ids(1, 2),
        "position_ids": torch.tensor([[0, 160]]),
    },
    r"attention_mask has shape \(2, 4\); expected \(2, 3\)": {
        "input_ids": models.ids(2, 3),
        "attention_mask": torch.ones(2, 4),
    },
    r"attention_mask has shape \(2, 3, 3\)": {"input_ids": models.ids(2, 3), "attention_mask": torch.ones(2, 3, 3)},
    "attention_mask has dtype torch.complex64": {
        "input_ids": models.ids(2, 3),
        "attention_mask": torch.ones(2, 3, dtype=torch.complex64),
    },
    "inputs_embeds has width 64; expected that of the embeddings, 128": {"inputs_embeds": torch.ones(1, 3, 64)},
    "cu_seq_lens_q runs from 0 to 4": {"input_ids": models.ids(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 4])},
    "smallest step of -1": {"input_ids": models.ids(1, 5), "cu_seq_lens_q": torch.tensor([0, 3, 2, 5])},
    "cu_seq_lens_q is given for a batch of 2": {"input_ids": models.ids(2, 5), "cu_seq_lens_q": torch.tensor([0, 5])},
    "attention_mask is given together with cu_seq_lens_q": {
        "input_ids": models.ids(1, 5),
        "cu_seq_lens_q": torch.tensor([0, 5]),
        "attention_mask": torch.ones(1, 5),
    },
    "cu_seq_lens_q: expected a 1-D int32": {"input_ids": models.ids(1, 5), "cu_seq_lens_q": torch.tensor([5])},
    "cu_seq_lens_k: expected a 1-D int32": {
        "input_ids": models.ids(1, 5),
        "cu_seq_lens_q": torch.tensor([0, 5]),
        "cu_seq_lens_k": [0, 5],
    },
    "cu_seq_lens_k differs from cu_seq_lens_q": {
        "input_ids": models.ids(1, 5),
        "cu_seq_lens_q": torch.tensor([0, 2, 5]),
        "cu_seq_lens_k": torch.tensor([0, 3, 5]),
    },
    "input_ids is of type list; expected a torch.Tensor": {"input_ids": [[1, 2]]},
    "position_ids is of type list; expected a torch.Tensor": {"input_ids": models.ids(1, 2), "position_ids": [0, 1]},
    "exactly one of input_ids or inputs_embeds": {},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    model = fastbert.fuse(models.seeded())
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**BAD[message])
    last(model, **call())  # and nothing has changed


def test_mixed_dtypes_are_an_error() -> None:
    model = fastbert.fuse(models.seeded())
    model.encoder.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        last(model, **call())


def test_explain_reads_well() -> None:
    model = models.seeded(hf.BertForMaskedLM)
    assert str(fastbert.explain(model)) == "bert: stock: not fused; call fastbert.fuse"
    fastbert.fuse(model)
    last(model, **call())
    assert str(fastbert.explain(model)) == "bert: fused (padding='auto')\n  ran fused, packed: 1"
    assert str(fastbert.explain(nn.Linear(1, 1))) == "no encoder of a supported family found"
