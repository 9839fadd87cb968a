"""The families beside BERT: every head against float64, by dtype, layout and mask; gradients; and what is theirs."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.ernie import modeling_ernie
from transformers.models.roberta import modeling_roberta

import fastbert
from fastbert import ops
from fastbert.fuse import FAMILIES as ALL_FAMILIES
from fastbert.fuse import LATE
from fastbert.kernels import cpu
from fastbert.layers import derived
from fastbert.models import deberta_v2, probe
from fastbert.models.family import Family
from fastbert.numerics import assert_within_policy
from fastbert.runtime.registry import layers_of
from tests import models
from tests.compat.environments import ABSENT, BROKEN_HEADS

FAMILIES = tuple(name for name in ALL_FAMILIES if name not in ABSENT.get(transformers.__version__, ()))
"""Those that run fused under this transformers."""
OF_ESM = pytest.mark.skipif("esm" not in FAMILIES, reason="ESM runs stock under this transformers")
TWINS = {
    "xlm_roberta": ("XLMRoberta", "XLMR"),
    "camembert": ("Camembert", "Camembert"),
    "data2vec": ("Data2VecText",),
}
"""Families that are RoBERTa after renaming, and their names for it: they are held to that, RoBERTa to all else."""
COUNTING = ("roberta", "roberta_prelayernorm", "xlm_roberta_xl", "mpnet")
"""Families whose positions count real tokens, by their id, beside the twins."""
PADDING_ID = dict.fromkeys((*TWINS, *COUNTING), 1)
"""Id of the token that pads; of the others 0."""


def adapter(family: str) -> Family:
    found: Family = importlib.import_module(f"fastbert.models.{family}").FAMILY
    return found


def stock_class(family: str, name: str) -> Any:
    return getattr(adapter(family).code, name)


def names_of(family: Family) -> list[str]:
    """The base model, and every head."""
    return sorted({kind.__name__ for kind in (family.base, *family.heads, *family.others)})


def heads(*families: str) -> list[tuple[str, str]]:
    """(family, class) of every head, base models among them, but for those that stock can't run."""
    broken = BROKEN_HEADS.get(transformers.__version__, ())
    return [(family, name) for family in families for name in names_of(adapter(family)) if name not in broken]


COVERED = {
    **dict.fromkeys(("mpnet", "megatron_bert", "eurobert", "esm"), ("none", "full", "right", "left", "holes")),
}
"""Kinds of masks that run fused with every head of a family, if not all do: `tests.models.masks`.

MPNet and Megatron-BERT have eager attention, under which a sequence without a real token runs stock; the others divide
by its tokens.
"""
ROTARY = tuple(name for name in FAMILIES if name in LATE)
"""Families that turn queries and keys by their positions, and whose base models call their layers themselves."""
NO_SPECIAL_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
OTHERS = tuple(family for family in FAMILIES if family != "bert" and family not in TWINS)
KIN = ("roberta_prelayernorm", "xlm_roberta_xl", "megatron_bert")
"""Families with heads that others' are, around layers of which every part is tried in others: some cases are slow."""
BASES = [pytest.param(family, adapter(family).base.__name__, id=family) for family in OTHERS]


def crossed(dtypes: list[torch.dtype], slow: tuple[torch.dtype, ...] = ()) -> list[Any]:
    """(family, class, dtype, padding): base models, and heads that labels pack for, in the first dtype, both layouts.

    Other heads in one layout; in further dtypes base models alone, in one layout, in turn: what dtype and padding
    change is around and below the heads. Of KIN heads in one layout alone, and not of every kind. With --slow, all in
    all, and in those of `slow`.
    """
    found = []
    for family, name in heads(*OTHERS):
        whole = name == adapter(family).base.__name__ or name.endswith("MaskedLM")
        for dtype in (*dtypes, *slow):
            for padding in ("auto", "dense") if whole else ("auto",):
                base = name == adapter(family).base.__name__
                turn = ("auto", "dense")[OTHERS.index(family) % 2] == padding
                wanted = dtype == dtypes[0] or (dtype in dtypes and base and turn)
                if family in KIN and not base:
                    few = padding == "auto" and not name.endswith(("Choice", "CausalLM", "Prediction"))
                    wanted = wanted and few
                marks = [] if wanted else [pytest.mark.slow]
                row = pytest.param(family, name, dtype, padding, id=f"{name}-{dtype}-{padding}", marks=marks)
                found.append(row)
    return found


def seeded(family: str, name: str, **changes: Any) -> Any:
    """A small model of two layers; weights, biases and LayerNorms random."""
    settings: dict[str, Any] = {
        "vocab_size": models.VOCABULARY,
        "num_attention_heads": 4,
        "max_position_embeddings": 60,
        "pad_token_id": PADDING_ID.get(family, 0),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
    }
    if family == "distilbert":
        settings = {k: v for k, v in settings.items() if k != "intermediate_size"} | {"hidden_dim": 256}
    elif family in ("albert", "electra"):
        settings["embedding_size"] = 64
    elif family in ROTARY:
        own: dict[str, dict[str, Any]] = {
            "modernbert": {"local_attention": 12, **NO_SPECIAL_TOKENS},
            "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 3},
        }
        kinds = own.get(family, {})
        settings = {**settings, "num_key_value_heads": 4, **kinds}
    elif family.startswith("deberta"):
        settings |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
        settings |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
        settings |= {"type_vocab_size": 0, "pooler_hidden_size": changes.get("hidden_size", settings["hidden_size"])}
    if name.endswith(("SequenceClassification", "TokenClassification")):
        settings["num_labels"] = 32
    kind = stock_class(family, name)
    model = kind(kind.config_class(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                norm = "norm" in parameter_name.lower() and parameter_name.endswith("weight")
                parameter.copy_(0.2 * noise + (1 if norm else 0))
    return model


def padded(family: str, mask: Tensor, seed: int = 0) -> Tensor:
    """Random ids, with the padding's where `mask` (B, S) is 0."""
    ids = models.ids(*mask.shape, seed=seed).clamp(min=2)
    return torch.where(mask.bool(), ids, PADDING_ID.get(family, 0))


def calls(family: str, name: str, batch: int = 9, seqlen: int = 37) -> list[tuple[dict[str, Any], Tensor]]:
    """(arguments, which tokens are real) with a mask of every kind; of a head with few outputs more of them."""
    found = []
    for seed in range(4 if name.endswith("MultipleChoice") else 1):
        for kind, mask in models.masks(batch, seqlen).items():
            if kind not in COVERED.get(family, models.MASKS):
                continue
            real = torch.ones(batch, seqlen, dtype=torch.long) if mask is None else mask
            call = {"input_ids": padded(family, real, seed=10 * seed + len(kind)), "attention_mask": mask}
            if name.endswith("MultipleChoice"):
                call = {k: v if v is None else v.view(3, 3, seqlen) for k, v in call.items()}
            found.append((call, real.bool()))
    return found


def outputs(model: Any, call: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """Every output at real tokens."""
    with torch.no_grad():
        found = {k: v for k, v in model(**call).items() if isinstance(v, Tensor)}
    return {k: (v[real] if v.shape[:2] == real.shape else v).flatten() for k, v in found.items()}


Outputs = list[dict[str, Tensor]]


def judge(
    model: Any, given: list[tuple[dict[str, Any], Tensor]], others: list[Outputs], dtype: torch.dtype, padding: str
) -> Any:
    """Asserts the policy for every output, over all calls together; returns the model, which it fuses."""
    fused = fastbert.fuse(model, padding=padding)
    found = [[outputs(fused, *one) for one in given], *others]
    for name in found[0][0]:
        results = (torch.cat([one[name] for one in ours]) for ours in found)
        assert_within_policy(*results, f"{type(model).__name__} {name} {dtype} {padding}")
    assert not fastbert.explain(fused).encoders[0].stock_calls
    return fused


def compare(model: Any, given: list[tuple[dict[str, Any], Tensor]], dtype: torch.dtype, padding: str) -> Any:
    ours, *others = models.three(model, dtype)
    return judge(ours, given, [[outputs(each, *one) for one in given] for each in others], dtype, padding)


@functools.lru_cache(maxsize=1)
def expected(family: str, name: str, dtype: torch.dtype) -> tuple[Any, list[Outputs]]:
    """A model to fuse, and what stock and float64 return for its `calls`: the same for either layout."""
    ours, *others = models.three(seeded(family, name), dtype)
    return ours, [[outputs(each, *one) for one in calls(family, name)] for each in others]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "a default device": lambda: torch.device("meta"),
    "a default dtype": lambda: default_dtype(torch.float16),
}


@pytest.mark.parametrize(
    ("family", "state"),
    [
        (family, state)
        for family in ("bert", "mpnet", "deberta_v2", "modernbert")
        for state in STATES
        if family in FAMILIES
    ],
)
def test_a_call_leaves_nothing_of_its_state_to_the_next(family: str, state: str) -> None:
    """What is kept of a first call is fit for others, with gradients, too; and the first is as stock's."""
    for kept in (derived.directions, deberta_v2._kept_slots, cpu._distances):
        kept.cache_clear()
    stock = seeded(family, adapter(family).base.__name__)
    for norm in stock.modules() if family == "bert" else ():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.bias = None  # as ModernBERT's: zeros stand for it
    fused, mask = fastbert.fuse(copy.deepcopy(stock)), models.masks(3, 11)["right"]
    assert mask is not None
    call = {"input_ids": padded(family, mask), "attention_mask": mask}
    with torch.no_grad(), STATES[state]():
        try:
            expected = stock(**call).last_hidden_state
        except (NotImplementedError, RuntimeError) as error:  # MPNet's code, of newer transformers DeBERTa's, on "meta"
            expected = None
            with pytest.raises(type(error), match=re.escape(str(error))):
                fused(**call)
        else:
            first = fused(**call).last_hidden_state
    if expected is None:
        assert state == "a default device" and family in ("mpnet", "deberta_v2")
    elif state == "fake tensors":
        assert first.shape == expected.shape
    else:
        torch.testing.assert_close(first[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    found, expected = (outputs(model, call, mask > 0) for model in (fused, stock))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
    ours, theirs = ([p for n, p in sorted(model.named_parameters()) if "layer" in n] for model in (fused, stock))
    found, expected = (
        torch.autograd.grad((model(**call).last_hidden_state * mask[..., None]).pow(2).sum(), given)
        for model, given in ((fused, ours), (stock, theirs))
    )
    for own, one in zip(found, expected, strict=True):
        torch.testing.assert_close(own, one, rtol=1e-3, atol=1e-3 * float(expected[0].abs().max()))


def fused_calls(model: Any) -> dict[str, int]:
    return fastbert.explain(model).encoders[0].fused_calls


@pytest.mark.parametrize(("family", "name", "dtype", "padding"), crossed([torch.float32, torch.bfloat16]))
def test_outputs(family: str, name: str, dtype: torch.dtype, padding: str) -> None:
    model, others = expected(family, name, dtype)
    fused = judge(copy.deepcopy(model), calls(family, name), others, dtype, padding)
    opaque = name not in {kind.__name__ for kind in (adapter(family).base, *adapter(family).heads)}
    assert ("packed" in fused_calls(fused)) is not (padding == "dense" or opaque)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*base.values, id=base.id, marks=[pytest.mark.slow] * (base.values[0] in KIN[1:])) for base in BASES],
)
def test_kernels(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each kind on the Triton kernels, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run for real here; see test_on_a_gpu")
    for operator in ops.CPU_BACKEND:
        monkeypatch.setitem(ops.CPU_BACKEND, operator, ops.registry.kernel(operator))
    given = [each for each in calls(family, name, 3, 19) if each[0]["attention_mask"] is not None][1:4]
    layers = 2 if family == "modernbert" else 1
    shape = {"num_hidden_layers": layers, "hidden_size": 64, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2} if family == "eurobert" else {}
    for padding in ("packed", "dense") if family in ("mpnet", "deberta_v2") else ("packed",):  # positions in both
        compare(seeded(family, name, **shape), given, torch.float32, padding)


DEBERTA_HEADS = [
    pytest.param(*pair, id=pair[1]) for pair in heads("deberta", "deberta_v2") if not pair[1].endswith("Model")
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "name"), BASES + DEBERTA_HEADS)
def test_on_a_gpu(family: str, name: str, dtype: torch.dtype) -> None:
    given = [
        ({k: v if v is None else v.cuda() for k, v in call.items()}, real.cuda()) for call, real in calls(family, name)
    ]
    compare(seeded(family, name).cuda(), given, dtype, "packed")


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["auto", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "name"),
    DEBERTA_HEADS + [pytest.param(*pair, id=pair[1]) for pair in heads(*ROTARY) if pair[1].endswith("MaskedLM")],
)
def test_gradients_on_a_gpu(family: str, name: str, dtype: torch.dtype, padding: str) -> None:
    compare_gradients(seeded(family, name, **NO_DROPOUT).cuda(), family, name, dtype, padding)


def labelled(family: str, name: str, real: Tensor, seed: int) -> dict[str, Any]:
    """Labels for one step of a head, none at padding."""
    tokens = models.ids(*real.shape, seed=seed + 1)
    tokens = torch.where(real & (models.ids(*real.shape, high=3, seed=seed) == 0), tokens, -100)
    sequences = models.ids(len(real), seed=seed + 2)
    if name.endswith(("MaskedLM", "CausalLM")):
        return {"labels": tokens}
    if name.endswith("ForPreTraining"):
        if family == "electra":
            return {"labels": models.ids(*real.shape, seed=seed, high=2)}
        return {"labels": tokens, f"{'sentence_order' if family == 'albert' else 'next_sentence'}_label": sequences % 2}
    if name.endswith("TokenClassification"):
        return {"labels": torch.where(tokens == -100, -100, tokens % 32)}
    if name.endswith("QuestionAnswering"):
        return {"start_positions": sequences % 5, "end_positions": sequences % 7}
    if name.endswith("MultipleChoice"):
        return {"labels": sequences[: len(real) // 3] % 3}
    return {"labels": sequences % (2 if name.endswith("NextSentencePrediction") else 32)}


def judged_with(name: str) -> str:
    """The tensor whose errors a parameter's gradient is judged with: some biases' with the weight's.

    Softmax ignores the bias of the keys and that of a choice, and, where it runs over tokens, one that all rows get;
    those of a few outputs are too few numbers.
    """
    few = (
        "key.bias",
        "k_lin.bias",
        "attn.k.bias",
        "classifier.bias",
        "qa_outputs.bias",
        "seq_relationship.bias",
        "out_proj.bias",
    )
    few = (*few, "dense_prediction.bias", "summary.bias", "layer.1.output.LayerNorm.bias")
    return name.removesuffix("bias") + "weight" if name.endswith(few) else name


def gradients(
    model: Any, family: str, name: str, batches: int = 8, masks: tuple[Tensor, ...] = ()
) -> dict[str, Tensor]:
    """Each parameter's gradients of several batches, one after the other; of `masks`, or of those here."""
    found: dict[str, list[Tensor]] = {}
    device = next(model.parameters()).device
    # Of several lengths: how a vendor's GEMM splits its sum hangs on them, and so does its error.
    masks = masks or tuple(m for i in range(batches) if (m := models.masks(12, 19 + 4 * i)["right"]) is not None)
    for seed, mask in enumerate(masks):
        model.zero_grad()
        call = {"input_ids": padded(family, mask, seed).to(device), "attention_mask": mask.to(device)}
        if "Model" in name:
            hidden = model(**call).last_hidden_state
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            loss = (hidden * weights.to(hidden))[call["attention_mask"].bool()].sum()
        else:
            if name.endswith("MultipleChoice"):
                call = {k: v.view(4, 3, -1) for k, v in call.items()}
            labels = labelled(family, name, mask.bool(), seed)
            loss = model(**call, **{k: v.to(device) for k, v in labels.items()}).loss
        loss.backward()
        for parameter, p in model.named_parameters():
            if p.grad is not None:
                found.setdefault(judged_with(parameter), []).append(p.grad.flatten().clone())
    return {parameter: torch.cat(parts) for parameter, parts in found.items()}


NO_DROPOUT = {
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0},
    **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    **{"summary_last_dropout": 0.0, "summary_first_dropout": 0.0},
}


@functools.lru_cache(maxsize=1)
def expected_gradients(family: str, name: str, dtype: torch.dtype) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model to fuse, and gradients of stock and float64: the same for either layout."""
    ours, *others = (each.train() for each in models.three(seeded(family, name, **NO_DROPOUT), dtype))
    return ours, [gradients(each, family, name) for each in others]


def each_head_once(cases: list[Any]) -> list[Any]:
    """Base models of every family in both layouts, MaskedLM in one, other heads of one family, in turn; else slow.

    Of KIN base models in one layout, in turn.
    """
    kinds: dict[str, list[Any]] = {}
    for case in cases:
        family, name, _, padding = case.values
        turn = padding == ("auto", "dense")[OTHERS.index(family) % 2] and "For" not in name
        if not case.marks and (family not in KIN or turn):
            kinds.setdefault(case.values[1].partition("For")[2], []).append(case)
    wanted = [*kinds.pop(""), *(case for case in kinds.pop("MaskedLM") if case.values[3] == "auto")]
    wanted += [same[number % len(same)] for number, same in enumerate(kinds.values())]
    return [
        case if case in wanted or case.marks else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize(
    ("family", "name", "dtype", "padding"), each_head_once(crossed([torch.float32], (torch.bfloat16,)))
)
def test_gradients(family: str, name: str, dtype: torch.dtype, padding: str) -> None:
    """In the dense layout padding has gradients of its own, and the rows of the padding in the tables get none."""
    model, others = expected_gradients(family, name, dtype)
    fused = fastbert.fuse(copy.deepcopy(model), padding=padding)
    models.assert_all_within_policy(gradients(fused, family, name), *others, f"{name} {padding}")
    assert not fastbert.explain(fused).encoders[0].stock_calls


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("deberta_v2", "auto"),
        ("modernbert", "auto"),
        *((family, "auto" if family == "eurobert" else "dense") for family in ROTARY),
    ],
)
def test_gradients_under_autocast(family: str, padding: str) -> None:
    """Stock DeBERTa v1 can't. Cosines and sines stay in float32 there, queries and keys don't."""
    name = next(name for name in names_of(adapter(family)) if name.endswith("TokenClassification"))
    compare_gradients(seeded(family, name, **NO_DROPOUT), family, name, torch.float32, padding, torch.bfloat16)


def compare_gradients(
    model: Any,
    family: str,
    name: str,
    dtype: torch.dtype,
    padding: str,
    cast: torch.dtype | None = None,
    masks: tuple[Tensor, ...] = (),
) -> None:
    trio = [each.train() for each in models.three(model, dtype)]
    fastbert.fuse(trio[0], padding=padding)
    found = []
    for each in trio:
        with torch.autocast("cpu", cast, enabled=cast is not None and each is not trio[2]):
            found.append(gradients(each, family, name, masks=masks))
    models.assert_all_within_policy(*found, f"{name} {padding}")
    assert not fastbert.explain(trio[0]).encoders[0].stock_calls


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*pair, id=pair[1]) for pair in heads(*OTHERS) if pair[1].endswith("MaskedLM")],
)
def test_loss_only(family: str, name: str) -> None:
    model = seeded(family, name)
    fused = fastbert.fuse(copy.deepcopy(model), loss_only=True)
    mask = models.masks(9, 37)["right"]
    assert mask is not None
    call = {"input_ids": padded(family, mask), "attention_mask": mask, **labelled(family, name, mask.bool(), 0)}
    ours, stock = fused(**call), model(**call)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, stock.loss)
    assert fused(input_ids=call["input_ids"]).logits is not None
    assert type(fastbert.unfuse(fused)) is type(model)


@pytest.mark.parametrize(("family", "name"), [pytest.param(*pair, id=pair[1]) for pair in heads(*OTHERS, *TWINS)])
def test_the_names_of_transformers(family: str, name: str, tmp_path: Path) -> None:
    stock = seeded(family, name)
    stock.save_pretrained(tmp_path)
    ours = getattr(fastbert, name)
    assert name in fastbert.__all__
    assert issubclass(ours, type(stock))
    assert (ours.__name__, ours.__module__) == (name, f"fastbert.models.{family}")
    model = pickle.loads(pickle.dumps(ours.from_pretrained(tmp_path)))
    assert model.config.architectures == [name]
    (call, real), *_ = calls(family, name, 9, 17)
    call = {**call, "output_hidden_states": True}
    with torch.no_grad():
        torch.testing.assert_close(model(**call).hidden_states, stock(**call).hidden_states)
    restored = fastbert.unfuse(model).base_model
    assert {type(module).__module__ for module in restored.modules()}.isdisjoint({ours.__module__})
    assert fastbert.explain(model).encoders[0].fused is False
    assert outputs(model, call, real).keys() == outputs(stock, call, real).keys()


def test_every_name_is_exported() -> None:
    names = {name for _, name in heads(*FAMILIES)}
    assert names < set(fastbert.__all__)
    assert names < set(dir(fastbert))
    for family, (begin, _) in fastbert._MODELS.items():  # none of models that this transformers has not
        there = importlib.util.find_spec(f"transformers.models.{family}") is not None
        assert (f"{begin}Model" in fastbert.__all__) is there
        assert there or not hasattr(fastbert, f"{begin}Model")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", COUNTING)
def test_positions_count_real_tokens(family: str, side: str) -> None:
    """Padding on either side, and padding's id in the middle, which the mask lets in."""
    name = adapter(family).base.__name__
    model = seeded(family, name, max_position_embeddings=21)  # 19 positions beyond the padding's
    mask = models.masks(5, 25)["right"]
    assert mask is not None
    mask = mask * (torch.arange(25) < 19)
    mask[:, 0] = 1
    ids = padded(family, mask, seed=3)
    ids[:, 0] = 1
    if side == "left":
        mask, ids = mask.flip(1), ids.flip(1)
    call = {"input_ids": ids, "attention_mask": mask}
    fused = compare(model, [(call, mask.bool())], torch.float32, "packed")
    assert outputs(fused, call, mask.bool()).keys() == {"last_hidden_state", "pooler_output"}
    inner = slice(0, 19) if side == "right" else slice(-19, None)
    embeds = model.embeddings.word_embeddings(ids)[:, inner].detach()
    call = {"inputs_embeds": embeds, "attention_mask": mask[:, inner]}
    compare(model, [(call, mask[:, inner].bool())], torch.float32, "packed")
    with pytest.raises(ValueError, match=r"^input_ids has 20 tokens a sequence; expected at most 19, max_position"):
        fused(input_ids=torch.full((1, 20), 5))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("distilbert", "mpnet", "eurobert")])
def test_embeddings_are_called_as_stock(family: str) -> None:
    """By position in the family's own order, up to how much a cache holds; what stock refuses, with stock's words."""
    model = seeded(family, adapter(family).base.__name__)
    stock, fused = model.embeddings, fastbert.fuse(copy.deepcopy(model)).embeddings
    names = list(inspect.signature(stock.forward).parameters)
    ids, zeros = models.ids(2, 7), torch.zeros(2, 7, dtype=torch.int64)
    given = {"input_ids": ids, "token_type_ids": zeros, "task_type_ids": zeros, "position_ids": zeros + 9}
    for cached in (0, 3):
        lengths = dict.fromkeys(("past_key_values_length", "cache_length"), cached)
        call = [({**given, **lengths} if not cached else {"input_ids": ids, **lengths}).get(each) for each in names]
        for end in range(1, len(call) + 1):
            torch.testing.assert_close(fused(*call[:end]), stock(*call[:end]), atol=1e-5, rtol=1e-5)
    for args, more in (((ids,), {"input_ids": ids}), ((ids,), {"nonsense": 1}), ((ids, *[None] * 8), {})):
        said = []
        for module in (stock, fused):
            with pytest.raises(TypeError) as error:
                module(*args, **more)
            said.append(str(error.value))
        assert said[0] == said[1]


@pytest.mark.parametrize("family", COUNTING)
def test_padding_has_no_gradient(family: str) -> None:
    model = fastbert.fuse(seeded(family, adapter(family).base.__name__), padding="dense").train()
    mask = models.masks(5, 19)["right"]
    assert mask is not None
    model(input_ids=padded(family, mask), attention_mask=mask).last_hidden_state.square().sum().backward()
    for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
        assert table.weight.grad[1].eq(0).all()
        assert table.weight.grad[2:10].ne(0).any()


@pytest.mark.parametrize("whole", [True, False])
def test_padding_is_zeros_after_a_norm_of_the_base_model(whole: bool) -> None:
    """Where it was left out, and gets no gradient there; in the dense layout it is stock's."""
    stock = seeded("roberta_prelayernorm", "RobertaPreLayerNormModel", **NO_DROPOUT)
    mask = models.masks(5, 19)["right"]
    assert mask is not None
    call = {"input_ids": padded("roberta_prelayernorm", mask), "attention_mask": mask, "return_dict": whole}
    slopes = []
    for padding in ("packed", "dense"):
        fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
        found, expected = fused(**call), stock(**call)
        assert type(found) is type(expected) and len(found) == len(expected)
        torch.testing.assert_close(found[0][mask > 0], expected[0][mask > 0], rtol=1e-4, atol=1e-5)
        if padding == "packed":
            assert found[0][mask == 0].eq(0).all() and fused_calls(fused) == {"packed": 1}
        else:
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        kept = found[0] if padding == "packed" else found[0][mask > 0]
        slopes.append(torch.autograd.grad(kept.sum(), fused.LayerNorm.bias)[0])
    torch.testing.assert_close(*slopes)
    fused.LayerNorm.register_forward_hook(lambda module, args, out: None)
    assert "LayerNorm is hooked" in str(fastbert.explain(fastbert.fuse(fused)).encoders[0].dense)


@pytest.mark.parametrize(("family", "name"), BASES)
def test_flattened_calls(family: str, name: str) -> None:
    """Sequences end to end in one row stay apart, and are what they are alone; positions are the caller's."""
    lengths = [3, 11, 1, 7]
    model = seeded(family, name)
    fused = fastbert.fuse(copy.deepcopy(model))
    call = models.ragged(lengths)
    if adapter(family).embeds_padded:  # by the mask of each
        with pytest.raises(ValueError, match=r"embeddings that read the mask of each sequence\), and stock EsmModel"):
            fused(**call)
        return
    first = 2 if family in COUNTING else 0
    call["position_ids"] = call["position_ids"] + first
    call["input_ids"] = call["input_ids"].clamp(min=2)
    with torch.no_grad():
        found = fused(**call).last_hidden_state[0].split(lengths)
        alone = [model(input_ids=ids).last_hidden_state[0] for ids in call["input_ids"].split(lengths, 1)]
    for ours, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert fused_calls(fused) == {"packed": 1}


def original(text: str, twin: str | None) -> str:
    """A name of a twin's, or code of such names, as RoBERTa has it; None: it is RoBERTa's."""
    if twin is None:
        return text
    for name in TWINS[twin]:
        text = re.sub(rf"\b{name}(?!o)", "Roberta", text)
    return text.replace(adapter(twin).name, "roberta")


@functools.cache
def code_of(family: str) -> dict[str, list[str]]:
    """Of every function of every class, in RoBERTa's names, but for what takes no part in a forward."""
    module = adapter(family).code
    classes = [each for each in vars(module).values() if inspect.isclass(each)]
    code: dict[str, list[str]] = {}
    for kind in (each for each in classes if each.__module__ == module.__name__):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
            if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "_init_weights"):
                body = node.body[ast.get_docstring(node) is not None :]
                parts = [ast.unparse(each) for each in (node.args, *body)]
                parts = [re.sub(r"\n *labels = labels\.to\(.*\)", "", part) for part in parts]
                name = f"{kind.__name__}.{node.name}"
                twin = family if family in TWINS else None
                code[original(name, twin)] = [original(part, twin) for part in parts]
    return code


@pytest.mark.parametrize("twin", TWINS)
def test_a_twins_code_is_robertas(twin: str) -> None:
    """After renaming; but for __init__, whose parts are compared below, and for where labels are moved to."""
    found = [code_of(family) for family in ("roberta", twin)]
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 20
    assert [name for name, code in found[0].items() if found[1][name] != code] == []


@pytest.mark.parametrize("padding", ["auto", "dense"])
@pytest.mark.parametrize(("twin", "name"), [pytest.param(*pair, id=pair[1]) for pair in heads(*TWINS)])
def test_a_twin_is_roberta(twin: str, name: str, padding: str) -> None:
    """With the same weights: to the bit, outputs and gradients, in calls of the same kinds."""
    found = []
    stock = seeded("roberta", original(name, twin), **NO_DROPOUT)
    for family, kind in (("roberta", original(name, twin)), (twin, name)):
        model = seeded(family, kind, **NO_DROPOUT).train()
        weights = {key.replace("roberta", model.base_model_prefix): each for key, each in stock.state_dict().items()}
        model.load_state_dict(weights)  # parameters are drawn in another order
        fastbert.fuse(model, padding=padding)
        tied = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}  # it goes by the name before
        slopes = {original(key, twin): slope for key, slope in gradients(model, family, kind, 1).items()}
        slopes = {tied.get(key, key): slope for key, slope in slopes.items()}
        found.append((outputs(model, *calls(family, kind)[2]), slopes, fused_calls(model)))
        assert not fastbert.explain(model).encoders[0].stock_calls
    assert found[0][2] == found[1][2]
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("choice", ["first", "last", "mean"])
def test_summaries_of_electra(choice: str) -> None:
    """Its multiple choice may read the last row, or all of them, padding too."""
    name = "ElectraForMultipleChoice"
    fused = compare(seeded("electra", name, summary_type=choice), calls("electra", name), torch.float32, "auto")
    assert ("packed" in fused_calls(fused)) is (choice == "first")


@pytest.mark.parametrize("given", [True, False])
def test_tasks_of_ernie(given: bool) -> None:
    model = seeded("ernie", "ErnieModel", use_task_id=True, task_type_vocab_size=3)
    found = []
    for call, real in calls("ernie", "ErnieModel"):
        tasks = {"task_type_ids": models.ids(*real.shape, high=3)} if given else {}
        found.append(({**call, **tasks}, real))
    fused = compare(model, found, torch.float32, "packed")
    assert "not for these" in str(fastbert.explain(fused))
    with pytest.raises(ValueError, match=r"^task_type_ids holds values from 3 to 3; expected 0 to 2"):
        fused(input_ids=torch.ones(1, 4, dtype=torch.long), task_type_ids=torch.full((1, 4), 3))


ERNIE_3 = {
    **{"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768},
    **{"initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 2048, "pad_token_id": 0},
    **{"num_attention_heads": 12, "layer_norm_eps": 1e-5, "model_type": "ernie", "architectures": ["ErnieForMaskedLM"]},
    **{"task_type_vocab_size": 3, "type_vocab_size": 4, "use_task_id": True, "vocab_size": 40000},
}
"""The config of ernie-3.0-base-zh in Hugging Face's format, which has 12 layers."""


def test_ernie_3(tmp_path: Path) -> None:
    """An old .bin of ERNIE 3.0, two layers of it, converted: its types of tasks and of tokens, beyond 512 tokens."""
    sizes = {**ERNIE_3, "vocab_size": 4000, "intermediate_size": 768}
    model = seeded("ernie", "ErnieForMaskedLM", **sizes)
    (tmp_path / "old").mkdir()
    said = json.dumps({**sizes, "num_hidden_layers": 2})
    (tmp_path / "old" / "config.json").write_text(said, encoding="utf-8")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    fastbert.convert(tmp_path / "old", tmp_path / "new")
    base = fastbert.ErnieModel.from_pretrained(tmp_path / "new", add_pooling_layer=False).eval()
    assert torch.equal(base.embeddings.task_type_embeddings.weight, model.ernie.embeddings.task_type_embeddings.weight)
    mask = models.masks(2, 600)["right"]
    shape = (2, 600)
    call = {"input_ids": models.ids(*shape, high=4000), "attention_mask": mask}
    call["token_type_ids"] = models.ids(*shape, high=4, seed=1)
    found = []
    for tasks in ({}, {"task_type_ids": models.ids(*shape, high=3, seed=2)}):
        fused = compare(fastbert.unfuse(base), [({**call, **tasks}, mask.bool())], torch.float32, "packed")
        assert fused_calls(fused) == {"packed": 1}
        found.append(outputs(fused, {**call, **tasks}, mask.bool())["last_hidden_state"])
    assert (found[0] - found[1]).abs().max() > 0.1  # they are read


def test_distilbert_drops_one_thing_fewer() -> None:
    """Attention probabilities and the feed-forward's output; and returns what stock returns."""
    model = seeded("distilbert", "DistilBertModel", dropout=0.25, attention_dropout=0.5).train()
    fused = fastbert.fuse(copy.deepcopy(model))
    assert [layer.layout.dropouts(layer) for layer in fused.transformer.layer] == [(0.5, 0.0, 0.25, 0.0)] * 2
    call = {"input_ids": models.ids(3, 7)}
    assert type(fused(**call)) is type(model(**call)) is modeling_distilbert.BaseModelOutput
    torch.manual_seed(0)
    first = fused(**call).last_hidden_state
    torch.manual_seed(0)
    assert torch.equal(fused(**call).last_hidden_state, first)
    assert not torch.equal(fused(**call).last_hidden_state, first)
    fused.transformer.layer[1].ffn.ff_chunk = model.transformer.layer[1].ffn.ff_chunk
    assert "layer 1: stock: transformer.layer.1.ffn.ff_chunk has been replaced" in str(fastbert.explain(fused))


def test_a_hook_between_embeddings_and_encoder_sees_stock_shapes() -> None:
    fused = fastbert.fuse(seeded("electra", "ElectraModel"))
    seen = []
    fused.embeddings_project.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    mask = models.masks(5, 19)["right"]
    with torch.no_grad():
        fused(input_ids=models.ids(5, 19), attention_mask=mask)
    assert seen == [(5, 19, 128)]


def test_mpnet_is_dense_where_packing_would_change_distances() -> None:
    """Where padding stands between real tokens; and where hidden states are to be returned, of every row."""
    stock = seeded("mpnet", "MPNetModel")
    fused = fastbert.fuse(copy.deepcopy(stock))
    mask = models.masks(5, 19)
    call = {"input_ids": padded("mpnet", torch.ones(5, 19)), "attention_mask": mask["holes"]}
    with torch.no_grad():
        torch.testing.assert_close(
            fused(**call, output_hidden_states=True)[2], stock(**call, output_hidden_states=True)[2]
        )
        fused(**call)
        assert fused_calls(fused) == {"dense": 2}
        found = fused(**{**call, "attention_mask": mask["left"]}, return_dict=False)
        assert type(found) is tuple and len(found) == 2


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_gradients_of_mpnets_bias_are_the_same_each_time(padding: str, autocast: bool) -> None:
    """Bitwise, with dropout, and by the seed alone."""
    model = fastbert.fuse(seeded("mpnet", "MPNetModel"), padding=padding).train()
    mask = models.masks(7, 41)["right"]
    assert mask is not None
    call = {"input_ids": padded("mpnet", mask), "attention_mask": mask}
    table, found = model.encoder.relative_attention_bias.weight, []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**call).last_hidden_state.float().square().sum().backward()
        found.append(table.grad.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert fused_calls(model) == {padding: 3}


@pytest.mark.parametrize("output", ["hidden_states", "attentions"])
@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in heads(*OTHERS) if f == "mpnet" or "Sequence" in n])
def test_outputs_that_the_config_asks_for(family: str, name: str, output: str) -> None:
    """MPNet's heads hand a None on to its model, which stands for what the config says."""
    asked = {f"output_{output}": True, "attn_implementation": "eager"}
    stock = seeded(family, name, **asked)
    fused = fastbert.fuse(copy.deepcopy(stock))
    call = {"input_ids": padded(family, torch.ones(5, 19)), "attention_mask": models.masks(5, 19)["right"]}
    if name.endswith("MultipleChoice"):
        call = {key: value.unsqueeze(0) for key, value in call.items()}
    with torch.no_grad():
        expected, found = stock(**call), fused(**call)
    assert found.keys() == expected.keys()
    assert len(expected[output]) == 2 + (output == "hidden_states")
    for one, other in zip(found[output], expected[output], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("family", "name"), [base.values for base in BASES])
def test_one_layer_that_runs_stock(family: str, name: str) -> None:
    stock = seeded(family, name)
    fused = fastbert.fuse(copy.deepcopy(stock))
    layers, changed = layers_of(fused), adapter(family).order is None  # of one layer, shared, none is left
    own = layers[changed].forward
    layers[changed].forward = lambda *args, **kwargs: own(*args, **kwargs)  # somebody's: what it does can't be told
    assert list(fastbert.explain(fused).encoders[0].layers) == [changed]
    mask = models.masks(5, 19)["right"]
    call = {"input_ids": padded(family, torch.ones(5, 19)), "attention_mask": mask}
    with torch.no_grad():
        torch.testing.assert_close(fused(**call)[0], stock(**call)[0])
    # What tables hold a stock layer could not be given; layers of Megatron-BERT return tuples.
    mixes = changed and adapter(family).tables is None and adapter(family).run is None
    expected = {"dense": 1} if mixes else {}
    assert fused_calls(fused) == expected


def test_decoders_stay_stock() -> None:
    for kind in (
        modeling_roberta.RobertaForCausalLM,
        modeling_electra.ElectraForCausalLM,
        modeling_ernie.ErnieForCausalLM,
    ):
        family = kind.__module__.split(".")[2]
        with pytest.raises(fastbert.UnsupportedModelError, match="it is a decoder"):
            fastbert.fuse(seeded(family, kind.__name__, is_decoder=True))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("distilbert", "DistilBertForSequenceClassification"),
        ("xlm_roberta", "XLMRobertaModel"),
        ("mpnet", "MPNetForSequenceClassification"),
        ("deberta", "DebertaForTokenClassification"),
        ("deberta_v2", "DebertaV2ForMultipleChoice"),
        *heads(*ROTARY),
    ],
)
def test_verify_knows_them(family: str, name: str) -> None:
    call, real = calls(family, name)[2]
    batch = {"input_ids": call["input_ids"], "attention_mask": real.long().view(call["input_ids"].shape)}
    report = fastbert.verify(seeded(family, name), batch)
    assert report.ok, str(report)
    assert report.ran["dense"] == {"dense": 1} and not report.not_fused
    assert [row.name for row in report.rows][:3] == ["embeddings", "layer.0", "layer.1"]
    assert report.rows[0].elements == int(real.sum()) * 128
    with pytest.raises(ValueError, match="inputs: 'input_ids' holds 211; expected 0 to 210"):
        fastbert.verify(seeded(family, name), {"input_ids": torch.full((1, 2), models.VOCABULARY)})


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["deberta", "deberta_v2", *ROTARY])
def test_eight_bits(family: str, precision: Any, calibrated: bool) -> None:
    """Beside stock whose linear layers quantize, in both layouts: calibrated, attention itself may write e4m3."""
    model = seeded(family, adapter(family).base.__name__)
    batches = [{"input_ids": call["input_ids"], "attention_mask": real.long()} for call, real in calls(family, "")[2:4]]
    if calibrated:
        found = fastbert.calibrate(model, batches, precision=precision, tolerance=0.5)
        assert len(found.gemms) == (8 if "gate" not in {gemm.name for gemm in found.gemms} else 10)
        assert not any(gemm.kept for gemm in found.gemms)
    report = fastbert.verify(model, batches, precision=precision)
    assert report.ok, str(report)
    assert not report.not_fused and report.ran["dense"] == {f"dense, {precision}": 2}
    assert report.ran["packed"][f"packed, {precision}"] >= 1  # where the first row is padding a pooler has it dense
    assert report.rows[-1].stock_error > 1e-3


@pytest.mark.parametrize("family", [family for family in ROTARY if family in ("modernbert", "nomic_bert")])
def test_a_gate_keeps_its_products_alone(family: str) -> None:
    """For the backward, of one weight and of two; nothing that is made of them, but where dropout comes after."""
    for rate in (0.0, 0.5) if family == "modernbert" else (0.0,):
        model = fastbert.fuse(seeded(family, adapter(family).base.__name__, **NO_DROPOUT, mlp_dropout=rate)).train()
        mask, kept = models.masks(5, 19)["right"], []
        assert mask is not None
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.shape) or x, lambda x: x):
            model(input_ids=padded(family, mask), attention_mask=mask)
        of_rows = [shape[1] for shape in kept if len(shape) == 2 and shape[0] == mask.sum()]
        both, one = of_rows.count(512), of_rows.count(256)
        assert (both, one) == (2, 0) if rate == 0 else (both == 0 and one > 4)
        assert fused_calls(model) == {"packed": 1}


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "_proj.", "down_proj", "mlp", "layers.1"])
def test_parts_of_a_gate_that_are_frozen(frozen: str) -> None:
    """They get no gradient, and the others the same."""
    if "nomic_bert" not in FAMILIES:
        pytest.skip("NomicBERT is not in this transformers")
    found = []
    for names in ("nothing", frozen):
        model = fastbert.fuse(seeded("nomic_bert", "NomicBertModel", **NO_DROPOUT)).train()
        for name, p in model.named_parameters():
            p.requires_grad_(names not in name)
        found.append(gradients(model, "nomic_bert", "NomicBertModel", 1))
        assert fused_calls(model) == {"packed": 1}
    assert {name for name in found[0] if frozen not in name} == found[1].keys()
    for name, gradient in found[1].items():
        assert gradient.norm()
        torch.testing.assert_close(gradient, found[0][name], msg=name)


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_embeddings_of_fewer_bits_than_the_layers(padding: str) -> None:
    """Stock code runs on: its first sum is of both, in the dtype of the layers."""
    stock = seeded("eurobert", "EuroBertModel", **NO_DROPOUT)
    stock.get_input_embeddings().bfloat16()
    fused, truth = fastbert.fuse(copy.deepcopy(stock), padding=padding), copy.deepcopy(stock).double()
    call = {"input_ids": models.ids(4, 13, high=60), "attention_mask": models.masks(4, 13)["right"]}
    with torch.no_grad():
        found, theirs, expected = (m(**call)[0][call["attention_mask"].bool()] for m in (fused, stock, truth))
    assert found.dtype == theirs.dtype == torch.float32
    assert_within_policy(found, theirs, expected)


LENGTHS = [1, 37, 128, 129, 1024]


def narrow(family: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    if family == "modernbert":
        sizes["local_attention"] = 128
    return seeded(family, adapter(family).base.__name__, max_position_embeddings=8192, **sizes, **changes)


@pytest.mark.parametrize("length", [*LENGTHS, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ROTARY)
def test_lengths(family: str, length: int) -> None:
    """To the longest that ModernBERT knows; its window the usual one, which padding is longer than, and layers of both
    kinds."""
    model = narrow(family)
    mask = torch.ones(3 if length < 8192 else 2, length, dtype=torch.long)
    mask[1, length // 5 + 1 :] = 0
    given = [
        ({"input_ids": padded(family, each), "attention_mask": each}, each.bool()) for each in (mask, mask.flip(1))
    ]
    given += [({"input_ids": padded(family, mask[:1]), "attention_mask": None}, mask[:1].bool())]
    fused = compare(model, given, torch.float32, "auto")
    pooled = getattr(model, "pooler", None) is not None  # from the first row, which is padding on the left
    assert fused_calls(fused).get("packed", 0) == (0 if length == 1 else 1 if pooled else 2)


@pytest.mark.parametrize(
    ("family", "length"),
    [
        pytest.param(family, length, marks=[pytest.mark.slow] * (length > 1024 or family not in ("modernbert", "esm")))
        for family in ROTARY
        for length in (*LENGTHS[1:], 8192)
    ],
)
def test_gradients_at_lengths(family: str, length: int) -> None:
    """Of rows that are whole, of one that ends within a window or beyond it, and of one of a single token: alone,
    queries and keys would have no gradient."""
    mask = torch.ones(12 if length < 1024 else 3 if length < 8192 else 1, length, dtype=torch.long)
    if len(mask) > 1:
        mask[1, length // 5 + 1 :] = 0
        mask[2, 1:] = 0
    model = narrow(family, **NO_DROPOUT)
    # Of flash attention on a CPU, stock's and this one, few rows have most of the error: it takes several batches.
    compare_gradients(model, family, "Model", torch.float32, "packed", masks=(mask, mask.flip(0)) * 4)


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("modernbert", "esm") else pytest.mark.slow) for f in ROTARY]
)
def test_gradients_under_masks_of_every_kind(family: str, padding: str) -> None:
    """Of real tokens that padding, or a hole longer than a window, lies before or between; and of none."""
    kinds = [kind for kind in COVERED.get(family, models.MASKS) if kind not in ("none", "right")]
    masks = [models.masks(12, 19 + 4 * i)[kind] for kind in kinds for i in range(2)]
    apart = torch.ones(12, 41, dtype=torch.long)
    apart[:, 8:30] = 0
    given = tuple(mask for mask in (*masks, apart) if mask is not None)
    model = seeded(family, adapter(family).base.__name__, **NO_DROPOUT)
    compare_gradients(model, family, "Model", torch.float32, padding, masks=given)


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_edges_of_a_window(attention: str, padding: str) -> None:
    """A token sees those as far away as half of `local_attention`, on both sides, and none beyond."""
    kinds = ["sliding_attention", "full_attention"]  # configs of transformers 5.4 must have both
    model = seeded("modernbert", "ModernBertModel", layer_types=kinds, attn_implementation=attention)
    del model.layers[1:]
    model.config.num_hidden_layers = 1
    fused = fastbert.fuse(copy.deepcopy(model), padding=padding)
    ids, mask = models.ids(2, 37), torch.ones(2, 37, dtype=torch.long)
    mask[1, 31:] = 0
    reach = {}
    for which, each in (("stock", model), ("fused", fused)):
        with torch.no_grad():
            before = each(input_ids=ids, attention_mask=mask).last_hidden_state
            for place in (0, 15, 30):
                other = ids.clone()
                other[:, place] = (ids[:, place] + 1) % models.VOCABULARY
                after = each(input_ids=other, attention_mask=mask).last_hidden_state
                moved = (before != after).any(-1)[:, :31]
                reach[which, place] = [row.nonzero().flatten().tolist() for row in moved]
    for place in (0, 15, 30):
        seen = list(range(max(0, place - 6), min(31, place + 7)))
        assert reach["fused", place] == [seen] * 2
        assert reach["fused", place] == reach["stock", place]
    assert fused_calls(fused) == {padding: 4}


@pytest.mark.parametrize(
    ("padding", "kind"), [("auto", "right"), ("auto", "left"), ("auto", "holes"), ("dense", "right")]
)
def test_padding_longer_than_a_window_under_eager_attention(padding: str, kind: str) -> None:
    """Stock spreads what has no real token in its window over its sequence; the packed layout has no such row."""
    stock = seeded("modernbert", "ModernBertModel", attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock), padding=padding)
    mask = torch.ones(3, 37, dtype=torch.long)
    mask[1, 20:], mask[2, 3:], mask[0, 5:7] = 0, 0, int(kind != "holes")
    mask = mask.flip(1) if kind == "left" else mask
    given = [({"input_ids": padded("modernbert", mask), "attention_mask": mask}, mask.bool())]
    if padding == "auto" and kind != "holes":
        compare(stock, given, torch.float32, padding)
    call = given[0][0]
    with torch.no_grad():
        expected, found = stock(**call)[0], fused(**call)[0]
    said = fastbert.explain(fused).encoders[0]
    if padding == "auto" and kind != "holes":
        assert (said.fused_calls, said.stock_calls) == ({"packed": 1}, {})
        return
    assert torch.equal(found, expected)
    why = "padding with no real token in its window, which eager attention spreads over its sequence"
    assert (said.fused_calls, said.stock_calls) == ({}, {why: 1})
    with torch.no_grad():  # of padding within reach it is the kernels'
        near = {"input_ids": call["input_ids"][:1], "attention_mask": mask[:1]}
        torch.testing.assert_close(fused(**near)[0], stock(**near)[0])
    assert fastbert.explain(fused).encoders[0].fused_calls == {"dense": 1}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in ("modernbert", "eurobert") else pytest.mark.slow) for f in ROTARY],
)
def test_descriptions_of_rotary_families(family: str) -> None:
    """As `register` tries those from outside: masks, lengths, positions, gradients, each dropout alone, heads."""
    probe.check_description(adapter(family))
    probe.try_family(adapter(family))


def test_rotary_families_are_short() -> None:
    for family in LATE - {"modernbert"}:  # whose layers are of two kinds, and called as no others'
        code = Path(probe.__file__).with_name(f"{family}.py").read_text(encoding="utf-8")
        assert code.count("\n") < 40, family


@OF_ESM
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_masked_tokens_scale_the_embeddings_of_esm(positions: str, kind: str) -> None:
    """By their share of each sequence, which hangs on its mask, not of the row that it is packed into."""
    stock = seeded("esm", "EsmModel", position_embedding_type=positions, emb_layer_norm_before=positions == "absolute")
    fused = fastbert.fuse(copy.deepcopy(stock))
    mask = models.masks(5, 19)[kind]
    assert mask is not None
    ids = torch.where(models.ids(5, 19, high=4, seed=9) == 0, 3, padded("esm", torch.ones(5, 19)).clamp(min=4))
    ids[mask == 0] = 0
    ids[mask.cumsum(1) == 1] = 7  # one at least is not masked
    call, plain = {"input_ids": ids, "attention_mask": mask}, ids.where(ids != 3, 7)
    compare(stock, [(call, mask.bool())], torch.float32, "auto")
    with torch.no_grad():
        for given in (call, {**call, "input_ids": plain}, {"inputs_embeds": stock.get_input_embeddings()(ids)}):
            torch.testing.assert_close(
                fused(**given)[0][mask.bool()], stock(**given)[0][mask.bool()], rtol=1e-4, atol=1e-5
            )
        assert (fused(**call)[0] - fused(**{**call, "input_ids": plain})[0])[ids == 7].abs().max() > 0.1
    assert not fastbert.explain(fused).encoders[0].stock_calls
    assert "embeddings: stock: the embeddings read the mask" in str(fastbert.explain(fused))


@OF_ESM
def test_contacts_of_esm() -> None:
    """Its head reads attention maps, those of padding zeroed: fused under eager attention; sdpa gives none."""
    stock = seeded("esm", "EsmForMaskedLM", attn_implementation="eager")
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    mask = models.masks(5, 19)["right"]
    assert mask is not None
    ids = padded("esm", mask).clamp(min=4)
    with torch.no_grad():
        torch.testing.assert_close(fused.predict_contacts(ids, mask), stock.predict_contacts(ids, mask))
    assert fused_calls(fused) == {"packed": 1}


@OF_ESM
@pytest.mark.parametrize("change", ["scaling", "position_embedding_type", "hook", "gelu"])
def test_no_change_of_esms_layers_goes_unnoticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = seeded("esm", "EsmModel")
    fused = fastbert.fuse(copy.deepcopy(stock))
    call = {"input_ids": padded("esm", torch.ones(5, 19)), "attention_mask": models.masks(5, 19)["right"]}
    real = call["attention_mask"].bool()
    with torch.no_grad():
        before = fused(**call)[0][real]
        for model in (stock, fused):
            attention = model.encoder.layer[1].attention.self
            if change == "scaling":
                attention.scaling = 2.0
            elif change == "position_embedding_type":
                attention.position_embedding_type = "absolute"
            elif change == "hook":
                model.encoder.layer[0].register_forward_hook(lambda module, args, out: 2 * out)
        if change == "gelu":
            monkeypatch.setattr(adapter("esm").code, "gelu", lambda x: x.relu())
        expected = stock(**call)[0][real]
        torch.testing.assert_close(fused(**call)[0][real], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
