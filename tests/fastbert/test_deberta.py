"""DeBERTa: positions by distance, what its configs leave out, masks that are factors, what is kept of weights, padding
that is read, and what people train and run it with."""

from __future__ import annotations

import copy
import itertools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import fastbert
from fastbert import numerics, ops
from fastbert.layers import derived, disentangled, gemm
from fastbert.layers.context import Context
from fastbert.models import deberta_v2, probe
from fastbert.runtime.packing import Packing
from tests import models

CONFIGS: dict[str, dict[str, Any]] = {
    "projections of their own": {"share_att_key": False},
    "content to position": {"pos_att_type": ["c2p"], "share_att_key": False},
    "position to content": {"pos_att_type": ["p2c"]},
    "neither": {"pos_att_type": []},
    "no positions": {"relative_attention": False},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 24},
    "no norm": {"norm_rel_ebd": "none"},
    "a convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "narrow embeddings": {"embedding_size": 24},
    "positions and types in embeddings": {"position_biased_input": True, "type_vocab_size": 2},
    "the other head": {"legacy": False},
}


def seeded(kind: Any = hf.DebertaV2Model, **changes: Any) -> Any:
    """Of two layers, with buckets as v3 has them; v1 has none."""
    torch.manual_seed(0)
    sizes = {**deberta_v2.FAMILY.sizes, "vocab_size": 100, "num_hidden_layers": 2, "position_buckets": 256}
    model = kind(kind.config_class(**copy.deepcopy({**sizes, **changes}))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape) + (parameter.dim() == 1 and "norm" in name.lower()))
    return model


def pair(kind: Any = hf.DebertaV2Model, padding: str = "packed", **changes: Any) -> tuple[Any, Any]:
    """(fused, stock)"""
    stock = seeded(kind, **changes)
    return fastbert.fuse(copy.deepcopy(stock), padding=padding), stock


def stock_calls(model: Any) -> dict[str, int]:
    return dict(fastbert.explain(model).encoders[0].stock_calls)


def fused_calls(model: Any) -> dict[str, int]:
    """By layout; fails where any ran stock."""
    assert not stock_calls(model)
    return dict(fastbert.explain(model).encoders[0].fused_calls)


def padded(batch: int = 5, seqlen: int = 19, kind: str = "right") -> dict[str, Any]:
    """A call with padding."""
    return {"input_ids": models.ids(batch, seqlen, high=100), "attention_mask": models.masks(batch, seqlen)[kind]}


LENGTHS = [1, 37, 128, 129, 511, 512, 700]


TOGETHER = (
    ("content to position", "narrow embeddings"),
    ("position to content", "no norm"),
    ("neither", "positions and types in embeddings"),
    ("no positions", "the other head"),
    ("no buckets", "a convolution"),
    ("projections of their own",),
)
"""Each of them, with others that it has nothing to do with: a try takes seconds."""


@pytest.mark.parametrize(
    "what", [*TOGETHER, *(pytest.param((one,), marks=pytest.mark.slow) for one in CONFIGS)], ids=", ".join
)
def test_configs(what: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that an adapter from outside fastbert is tried with: masks, lengths, gradients, dropout, heads."""
    changes = {key: value for one in what for key, value in CONFIGS[one].items()}
    monkeypatch.setattr(deberta_v2.FAMILY, "sizes", {**deberta_v2.FAMILY.sizes, **changes})
    probe.try_family(deberta_v2.FAMILY)


def test_every_config_is_tried() -> None:
    assert sorted(one for some in TOGETHER for one in some) == sorted(CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("kind", [hf.DebertaV2Model, pytest.param(v1.DebertaModel, marks=pytest.mark.slow)])
def test_lengths(kind: Any, seqlen: int, dtype: torch.dtype) -> None:
    """Beyond max_position_embeddings, too: there is no limit where no table has a row for each position."""
    fused, stock, truth = models.three(seeded(kind), dtype)
    fastbert.fuse(fused, padding="packed")
    mask = torch.arange(seqlen) < torch.tensor([[seqlen], [1 + seqlen // 3]])
    call = {"input_ids": models.ids(2, seqlen, high=100), "attention_mask": mask.long()}
    with torch.no_grad():
        numerics.assert_within_policy(*(each(**call).last_hidden_state[mask] for each in (fused, stock, truth)))
    assert not stock_calls(fused)


@pytest.mark.parametrize(
    ("buckets", "furthest", "reach"),
    [(256, 512, 513), (-1, 512, 513), (32, 128, 129), (31, 128, 150), (5, 9, 34), (2, 512, 1152), (64, 20, 1152)],
)
def test_slots_are_stocks_at_every_distance(buckets: int, furthest: int, reach: int) -> None:
    """Beyond those that are kept, too, which have the first or the last; some numbers of buckets end nowhere."""
    length, span = 1025, buckets if buckets > 0 else furthest
    rows = torch.empty(length, 1)
    relative = hf.build_relative_position(rows, rows, buckets, furthest)[0]
    expected = (relative + span).clamp(0, 2 * span - 1)
    assert deberta_v2._slots_reach(length, buckets, furthest, span) == reach
    slots = deberta_v2._slots(reach, buckets, furthest, span, rows.device)
    places = torch.arange(length)
    found = slots[reach - 1 + (places[:, None] - places).clamp(1 - reach, reach - 1)]
    assert torch.equal(found.long(), expected)
    if buckets < 0:
        assert torch.equal(relative, v1.build_relative_position(rows, rows)[0])


@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty"])
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (hf.DebertaV2Model, {"conv_kernel_size": 3, "conv_act": "gelu"}),
        (hf.DebertaV2Model, {"relative_attention": False}),
        (v1.DebertaModel, {}),
    ],
    ids=["a convolution", "no positions", "v1"],
)
def test_masks(model: Any, changes: dict[str, Any], padding: str, kind: str) -> None:
    """Dense, padding has stock's rows. Distances are those of the padded layout, so that holes don't pack."""
    fused, stock = pair(model, padding, **changes)
    call = padded(kind=kind)
    rows = call["attention_mask"].bool() | (padding == "dense" or kind == "holes")
    with torch.no_grad():
        torch.testing.assert_close(*(each(**call).last_hidden_state[rows] for each in (fused, stock)))
    assert fused_calls(fused) == {"dense" if kind == "holes" else padding: 1}


def test_who_may_read_padding_gets_stocks_rows() -> None:
    """As a model over it that nobody knows does, of which GLiNER is one."""
    stock = seeded(hf.DebertaV2ForTokenClassification)
    stock.classifier = torch.nn.Conv1d(19, 19, 3)
    fused = fastbert.fuse(copy.deepcopy(stock))
    assert "classifier is a Conv1d" in str(fastbert.explain(fused).encoders[0].dense)
    with torch.no_grad():
        torch.testing.assert_close(fused(**padded()).logits, stock(**padded()).logits)
    assert fused_calls(fused) == {"dense": 1}


@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_padding_drops_as_stock_does(kind: Any) -> None:
    """Where all of attention is dropped; else each row of padding has a mean of its own, over all of its sequence."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 1.0}
    fused, stock = (each.train() for each in pair(kind, "dense", **rates))
    torch.testing.assert_close(fused(**padded()).last_hidden_state, stock(**padded()).last_hidden_state)
    assert fused_calls(fused) == {"dense": 1}
    context = Context(Packing(4, 128, 128, key_mask=torch.zeros(4, 128, dtype=torch.bool)))
    ones, seed = torch.ones(4 * 128, 3, 16), torch.tensor([7])
    means = disentangled._spread(0 * ones, ones, context, 0.25, seed)[..., 0]
    assert means.mean() == pytest.approx(1, abs=5e-3)
    # That of 128 numbers, each 4/3 or, by chance of a quarter, 0.
    assert means.std() == pytest.approx((0.25 / 0.75 / 128) ** 0.5, rel=0.1)
    assert torch.equal(disentangled._spread(ones, ones, context), ones)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [(hf.DebertaV2Model, {"conv_kernel_size": 3, "conv_act": "tanh"}), (v1.DebertaModel, {})],
    ids=["a convolution", "v1"],
)
def test_hidden_states(kind: Any, changes: dict[str, Any], as_dict: bool) -> None:
    """All of them, of every row, with their gradients."""
    found = []
    fused, stock = pair(kind, **changes)
    for model in (fused, stock):
        result = model(**padded(), output_hidden_states=True, return_dict=as_dict)
        last, hidden = result.to_tuple() if as_dict else result
        assert torch.equal(hidden[-1], last) and len(hidden) == 3
        hidden[1].square().sum().backward()
        found.append([*hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert fused_calls(fused) == {"dense": 1}


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_mask_is_a_factor(factor: float) -> None:
    """Stock multiplies embeddings with it, and attends to all that is not zero."""
    fused, stock = pair()
    mask = torch.tensor([[1, 1, factor, 1, 1], [1, factor, 1, 0, 0]])
    ids = models.ids(2, 5, high=100)
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).last_hidden_state[mask > 0] for model in (fused, stock))
        ones = stock(ids, attention_mask=(mask > 0).long()).last_hidden_state[mask > 0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, ones)
    assert not stock_calls(fused)


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3, "conv_act": "tanh"}], ids=["v3", "a convolution"])
def test_a_flattened_call_keeps_sequences_apart(changes: dict[str, Any]) -> None:
    fused, stock = pair(**changes)
    lengths = (5, 1, 9)
    ids, starts = models.ids(1, sum(lengths), high=100), torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        found = fused(ids, **given).last_hidden_state
        expected = torch.cat([stock(part).last_hidden_state for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(found, expected)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "of one row": {"conv_kernel_size": 1},
    "of three": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "of five, in groups": {"conv_kernel_size": 5, "conv_groups": 3},
}


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("changes", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_packed_convolutions(changes: dict[str, Any], seen: bool) -> None:
    """Also of sequences shorter than its reach, and without a token; one whose arguments somebody sees runs stock."""
    fused, stock = pair(**changes)
    shapes = []
    for model in (fused, stock) if seen else ():
        model.encoder.conv.conv.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    mask = torch.arange(9) < torch.tensor([[9], [1], [0], [2], [7], [0]])
    call = {"input_ids": models.ids(6, 9, high=100), "attention_mask": mask.long()}
    with torch.no_grad():
        found, expected = (model(**call).last_hidden_state[mask] for model in (fused, stock))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert shapes == ([(6, 48, 9)] * 2 if seen else [])
    if seen:
        assert stock_calls(fused) == {"encoder.conv.conv has hooks": 1}
    else:
        assert fused_calls(fused) == {"packed": 1}


def test_a_packed_convolution_reads_nothing_from_the_device() -> None:
    with torch.device("meta"):
        encoder = hf.DebertaV2Model(hf.DebertaV2Config(**{**deberta_v2.FAMILY.sizes, "conv_kernel_size": 3})).encoder
        rows, mask = torch.empty(1, 15, 48), torch.ones(3, 9)
        layout = Packing(3, 9, 9, torch.empty(4, dtype=torch.int32), None, torch.empty(15, dtype=torch.int64))
        plan: Any = types.SimpleNamespace(mask=mask, packing=layout)
        assert deberta_v2._convolve(encoder, rows, rows, plan).shape == (1, 15, 48)


def test_a_flattened_call_that_runs_stock_is_refused() -> None:
    """Stock takes no mask that would keep its sequences apart."""
    fused, _ = pair()
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="would not keep its sequences apart"):
        fused(models.ids(1, 9, high=100), cu_seq_lens_q=starts, cu_seq_lens_k=starts, output_attentions=True)


WRITES = {
    "embeddings of positions": lambda encoder: encoder.rel_embeddings.weight,
    "their norm": lambda encoder: encoder.LayerNorm.weight,
    "a projection": lambda encoder: encoder.layer[1].attention.self.pos_key_proj.weight,
    "a projection's bias": lambda encoder: encoder.layer[0].attention.self.pos_query_proj.bias,
}


@pytest.mark.parametrize("what", WRITES)
def test_positions_are_made_again_once_a_weight_is_written_to(what: str) -> None:
    fused, stock = pair(share_att_key=False)
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        before = fused(ids).last_hidden_state
        assert torch.equal(fused(ids).last_hidden_state, before)
        for model in (fused, stock):
            WRITES[what](model.encoder).mul_(1.5)
        after = fused(ids).last_hidden_state
        torch.testing.assert_close(after, stock(ids).last_hidden_state)
    assert not torch.allclose(after, before)


def test_training_leaves_no_stale_positions() -> None:
    """Steps by `weight.data`, which leave no version, too."""
    fused, stock = pair(share_att_key=False, **QUIET)
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        fused(ids)
    for model in (fused, stock):
        model.train()
        model(ids).last_hidden_state.square().sum().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 1e-3 * parameter.grad
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).last_hidden_state, stock(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_keys_of_positions_are_made_once(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each layer and term; in inference mode, too, where tensors have no version."""
    fused, _ = pair(share_att_key=False)
    made: list[int] = []
    linear = gemm.Linear.__call__
    monkeypatch.setattr(gemm.Linear, "__call__", lambda self, x, *rest: made.append(len(x)) or linear(self, x, *rest))
    rows = 2 * fused.encoder.layer[0].attention.self.pos_ebd_size
    with mode():
        for _ in range(3):
            fused(models.ids(2, 9, high=100))
    assert made.count(rows) == 2 * 2


def test_positions_are_kept_and_are_no_part_of_the_model() -> None:
    fused, stock = pair()
    seen: list[int] = []
    get = type(fused.encoder).get_rel_embedding
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        fused(models.ids(2, 9, high=100))
        patch.setattr(type(fused.encoder), "get_rel_embedding", lambda encoder: seen.append(1) or get(encoder))
        fused(models.ids(2, 9, high=100))
    assert not seen
    assert fused.state_dict().keys() == stock.state_dict().keys()


def gradients(model: Any, masks: list[Tensor], everywhere: bool = False) -> dict[str, Tensor]:
    """Of a sum over real rows, or over all."""
    found: dict[str, list[Tensor]] = {}
    for seed, mask in enumerate(masks):
        model.zero_grad()
        ids = models.ids(*mask.shape, seed=seed, high=100).to(mask.device)
        hidden = model(ids, attention_mask=mask.long()).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (hidden * weights.to(hidden))[mask.bool() | everywhere].sum().backward()
        for name, parameter in model.named_parameters():
            # Those of biases, which softmax all but ignores, are judged with the weights'.
            found.setdefault(name.replace("proj.bias", "proj.weight"), []).append(parameter.grad.flatten().clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def judge(model: Any, dtype: torch.dtype, padding: str, masks: list[Tensor], what: str) -> None:
    """All gradients, by the policy; those of embeddings of positions and of their norm, which v1 has not, are there."""
    trio = [each.train() for each in models.three(model, dtype)]
    fastbert.fuse(trio[0], padding=padding)
    found = [gradients(each, masks, padding == "dense") for each in trio]
    names = {"encoder.rel_embeddings.weight", "encoder.LayerNorm.weight"}
    assert names & dict(model.named_parameters()).keys() == names & found[0].keys() != set()
    # A single key is attended to whatever its score is.
    unread = [name for name, exact in found[2].items() if not exact.any()]
    assert not any(each.pop(name).any() for each in found for name in unread)
    assert bool(unread) is all(mask.shape[1] == 1 for mask in masks)
    models.assert_all_within_policy(*found, what)
    assert fused_calls(trio[0]).keys() == {padding}


@pytest.mark.parametrize(
    ("kind", "shared", "padding"),
    [
        (hf.DebertaV2Model, True, "packed"),
        (hf.DebertaV2Model, False, "packed"),
        (hf.DebertaV2Model, True, "dense"),
        (v1.DebertaModel, False, "dense"),
    ],
)
def test_gradients(kind: Any, shared: bool, padding: str) -> None:
    """At lengths at which buckets hold many distances; dense, of all rows."""
    masks = [models.masks(12, 19 + 4 * seed)["right" if seed % 2 else "left"] for seed in range(8)]
    model = seeded(kind, share_att_key=shared, position_buckets=8, **QUIET)
    judge(model, torch.float32, padding, [mask for mask in masks if mask is not None], padding)


@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("changes", [{"pos_att_type": []}, {"relative_attention": False}], ids=str)
def test_gradients_without_positions(changes: dict[str, Any], padding: str) -> None:
    """Plain attention, which stock has eager: of queries and keys, more precise than flash attention's on a CPU."""
    trio = [each.train() for each in models.three(seeded(**QUIET, **changes), torch.float32)]
    fastbert.fuse(trio[0], padding=padding)
    found: list[list[Tensor]] = [[], [], []]
    for model, parts in zip(trio, found, strict=True):
        parameters = [p for name, p in model.named_parameters() if "query_proj.w" in name or "key_proj.w" in name]
        for seed in range(6):
            call = padded(6, 17 + 5 * seed)
            hidden = model(**call).last_hidden_state[call["attention_mask"].bool()]
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            parts += torch.autograd.grad((hidden * weights.to(hidden)).sum(), parameters)
    numerics.assert_within_policy(*(torch.cat([each.flatten() for each in parts]) for parts in found))
    assert fused_calls(trio[0]) == {padding: 6}


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_gradients_at_every_length(kind: Any, seqlen: int, dtype: torch.dtype, padding: str) -> None:
    judge_at((seqlen,) * 4, seeded(kind, **QUIET), dtype, padding)


def judge_at(lengths: tuple[int, ...], model: Any, dtype: torch.dtype, padding: str) -> None:
    """`judge`, by a batch of each length."""
    device = next(model.parameters()).device
    masks = []
    for seed, seqlen in enumerate(lengths):
        if seqlen == 1:  # which has no padding, and no layout but one
            padding, rows = "dense", torch.ones(16, 1, dtype=torch.bool)
        else:
            rows = torch.arange(seqlen) < torch.tensor([[seqlen], [1 + seqlen // (3 + seed)]])
        masks.append(rows.to(device))
    judge(model, dtype, padding, masks, f"{type(model).__name__} {lengths} {dtype} {padding}")


LARGE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
"""With heads of 64, as checkpoints have them."""


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_on_a_gpu(kind: Any, dtype: torch.dtype, padding: str) -> None:
    """Every length, and kinds of masks in turn; where rows of padding are computed, these, too."""
    fused, stock, truth = models.three(seeded(kind, **LARGE).cuda(), dtype)
    fastbert.fuse(fused, padding=padding)
    for seqlen, name in zip((*LENGTHS, 37, 129), itertools.cycle(models.MASKS), strict=False):
        mask = models.masks(5, seqlen)[name]
        call = {"input_ids": models.ids(5, seqlen, high=100).cuda()}
        if mask is not None:
            call["attention_mask"] = mask.cuda()
        real = torch.ones_like(call["input_ids"]) if mask is None or padding == "dense" else mask.cuda()
        with torch.no_grad():
            found = [each(**call).last_hidden_state[real.bool()] for each in (fused, stock, truth)]
        numerics.assert_within_policy(*found, f"{kind.__name__} {seqlen} {name} {dtype} {padding}")
    assert not stock_calls(fused)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1,), (37, 128, 129), (511, 512, 700)], ids=str)
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_gradients_on_a_gpu(kind: Any, dtype: torch.dtype, padding: str, lengths: tuple[int, ...]) -> None:
    judge_at(lengths, seeded(kind, **LARGE, **QUIET).cuda(), dtype, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_convolution_on_a_gpu(dtype: torch.dtype) -> None:
    """Packed and dense, and flattened; no sequence sees another."""
    model = seeded(**LARGE, **CONFIGS["a convolution"]).cuda()
    for padding in ("packed", "dense"):
        fused, stock, truth = models.three(model, dtype)
        fastbert.fuse(fused, padding=padding)
        for seqlen in (37, 128, 129):
            mask = models.masks(5, seqlen)["right"].cuda()  # type: ignore[union-attr]
            call = {"input_ids": models.ids(5, seqlen, high=100).cuda(), "attention_mask": mask}
            with torch.no_grad():
                found = [each(**call).last_hidden_state[mask.bool()] for each in (fused, stock, truth)]
            numerics.assert_within_policy(*found, f"{padding} {seqlen} {dtype}")
        assert fused_calls(fused) == {padding: 3}


@pytest.mark.gpu
def test_a_convolution_waits_for_no_gpu() -> None:
    """But once, for the layout."""
    model = fastbert.fuse(seeded(**LARGE, **CONFIGS["a convolution"]).cuda(), padding="packed")
    call = {k: v.cuda() for k, v in padded().items()}
    with torch.no_grad():
        model(**call)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as caught:
                model(**call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_gradients_of_kernels(kind: Any, dtype: torch.dtype, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of it on the Triton kernels, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run for real here; see test_families.test_on_a_gpu")
    for operator in ops.CPU_BACKEND:
        monkeypatch.setitem(ops.CPU_BACKEND, operator, ops.registry.kernel(operator))
    masks = [torch.arange(37) < torch.tensor([[37], [lengths]]) for lengths in (12, 30)]
    judge(seeded(kind, num_hidden_layers=1, **QUIET), dtype, padding, masks, f"{kind.__name__} {dtype} {padding}")


@pytest.mark.parametrize("kind", [hf.DebertaV2Model, v1.DebertaModel])
def test_gradient_checkpointing_changes_nothing(kind: Any) -> None:
    """All three dropouts are drawn again as they were: of positions, of probabilities, of what is added."""
    model = fastbert.fuse(seeded(kind)).train()
    ids = models.ids(2, 9, high=100)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(5)
        model(ids).last_hidden_state.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    assert not stock_calls(model)


def test_autocast() -> None:
    fused, stock = pair()
    ids = models.ids(2, 37, high=100)
    truth = copy.deepcopy(stock).double()
    with torch.no_grad():
        expected = truth(ids).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            found, theirs = (model(ids).last_hidden_state for model in (fused, stock))
    numerics.assert_within_policy(found.float(), theirs.float(), expected)
    assert not stock_calls(fused)


def test_a_model_that_repeats_its_last_layer_runs_stock() -> None:
    fused, stock = pair()
    fused.z_steps = stock.z_steps = 2
    ids = models.ids(2, 9, high=100)
    raised = []
    for model in (stock, fused):
        with torch.no_grad(), pytest.raises(AttributeError) as error:  # stock's own: it appends to a tuple
            model(ids)
        raised.append(str(error.value))
    assert raised[0] == raised[1]
    assert stock_calls(fused) == {"z_steps is 2": 1}


def test_verify() -> None:
    model = seeded(hf.DebertaV2ForSequenceClassification, num_labels=64)
    call = {"input_ids": models.ids(12, 37, high=100), "attention_mask": models.masks(12, 37)["right"]}
    assert fastbert.verify(model, [call]).ok


CLASSIFIERS = [hf.DebertaV2ForSequenceClassification, v1.DebertaForTokenClassification]


def answers(call: Any) -> Tensor:
    """Logits of sequences, by their first token."""
    logits: Tensor = call(**padded(12)).logits
    return logits if logits.dim() == 2 else logits[:, 0]


def steps(model: Any, call: Any, number: int = 2) -> list[Tensor]:
    """Losses of some steps of training, by `call`s of a model, and what they make of its parameters."""
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(number):
        # Its own loss breaks the graph of stock, too.
        loss = torch.nn.functional.cross_entropy(answers(call), torch.arange(12) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *(p.detach() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_lora(kind: Any) -> None:
    """Of the projections, by which v3 makes keys and queries of positions, too."""
    peft = pytest.importorskip("peft")
    targets = ["in_proj", "pos_proj"] if kind is CLASSIFIERS[1] else ["query_proj", "key_proj", "value_proj"]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False)
    found, stock, results = *pair(kind, "auto", **QUIET), []
    for model in (found, stock):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, copy.deepcopy(config)).train()
        trained = steps(wrapped, wrapped)
        with torch.no_grad():
            results.append([*trained, answers(wrapped.eval()), answers(wrapped.merge_and_unload())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], results[0][1])
    assert fused_calls(found) == {"packed": 4}


@pytest.mark.parametrize(
    "kind",  # which say of their calls what they read
    [hf.DebertaV2ForTokenClassification, pytest.param(v1.DebertaForTokenClassification, marks=pytest.mark.slow)],
)
def test_compiled(kind: Any) -> None:
    """Without a graph break, dense, in training."""
    torch.compiler.reset()
    fused, stock = (each.train() for each in pair(kind, "auto", num_hidden_layers=1, **QUIET))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(steps(fused, compiled), steps(stock, stock), rtol=1e-4, atol=1e-4)


V1, V2 = v1.DebertaModel, hf.DebertaV2Model
BOTH = pytest.mark.parametrize("kind", [V1, V2], ids=["v1", "v2"])


def attention(model: Any, layer: int = 0) -> Any:
    return model.encoder.layer[layer].attention.self


def linear(*sizes: int) -> Any:
    torch.manual_seed(3)
    return nn.Linear(*sizes).requires_grad_(False)


def twice(function: Any) -> Any:
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def doubled(owner: Any, name: str) -> None:
    setattr(owner, name, twice(getattr(owner, name)))


# What somebody may change of a model: lists in place, attributes that stock code reads in one place and fastbert in
# another, methods, weights.
CHANGES: dict[str, Any] = {
    "terms cleared": lambda m: attention(m).pos_att_type.clear(),
    "a term popped": lambda m: attention(m, 1).pos_att_type.pop(),
    "an unknown term": lambda m: attention(m).pos_att_type.append("p2p"),
    "a term twice": lambda m: attention(m).pos_att_type.append("c2p"),
    "terms in a string": lambda m: setattr(attention(m), "pos_att_type", "c2p|p2c"),
    "terms of the config": lambda m: m.config.pos_att_type.remove("p2c"),
    "no positions in a layer": lambda m: setattr(attention(m), "relative_attention", False),
    "no positions in the encoder": lambda m: setattr(m.encoder, "relative_attention", False),
    "a layer's span": lambda m: (
        setattr(attention(m), "pos_ebd_size", 8),
        setattr(attention(m), "max_relative_positions", 8),
    ),
    "the encoder's span": lambda m: setattr(m.encoder, "max_relative_positions", 9),
    "the encoder's buckets": lambda m: setattr(m.encoder, "position_buckets", 8),
    "no buckets": lambda m: setattr(m.encoder, "position_buckets", -1),
    "norms of positions cleared": lambda m: getattr(m.encoder, "norm_rel_ebd", []).clear(),
    "another eps of positions": lambda m: hasattr(m.encoder, "LayerNorm") and setattr(m.encoder.LayerNorm, "eps", 0.5),
    "another norm of positions": lambda m: (
        hasattr(m.encoder, "LayerNorm")
        and setattr(m.encoder, "LayerNorm", nn.Sequential(m.encoder.LayerNorm, linear(48, 48)))
    ),
    "eps of the other's name": lambda m: (
        setattr(m.encoder.layer[0].output.LayerNorm, "eps", 0.5),
        setattr(m.encoder.layer[1].output.LayerNorm, "variance_epsilon", 0.5),
    ),
    "heads": lambda m: setattr(attention(m), "num_attention_heads", 6),
    "another size of heads": lambda m: setattr(attention(m), "attention_head_size", 8),
    "talking heads": lambda m: setattr(attention(m, 1), "head_logits_proj", linear(3, 3)),
    "talking heads after softmax": lambda m: setattr(attention(m, 1), "head_weights_proj", linear(3, 3)),
    "a method of attention": lambda m: doubled(attention(m), "transpose_for_scores"),
    "a method of attention to positions": lambda m: doubled(
        attention(m), "disentangled_attention_bias" if "V2" in type(m).__name__ else "disentangled_att_bias"
    ),
    "a method of the encoder": lambda m: doubled(m.encoder, "get_rel_embedding"),
    "layers in another order": lambda m: m.encoder.layer._modules.update(
        zip("01", list(m.encoder.layer._modules.values())[::-1], strict=True)
    ),
    "fewer embeddings of positions": lambda m: setattr(m.encoder, "rel_embeddings", nn.Embedding(20, 48)),
    "a projection gone": lambda m: delattr(
        attention(m), "pos_q_proj" if "V2" not in type(m).__name__ else "query_proj"
    ),
    "a write that leaves no version": lambda m: m.encoder.rel_embeddings.weight.data[3:90].neg_(),
    "one to a projection": lambda m: (
        attention(m, 1)._modules["pos_proj" if "V2" not in type(m).__name__ else "pos_key_proj"].weight.data[:5].mul_(5)
    ),
    "one through NumPy": lambda m: m.encoder.rel_embeddings.weight.detach().numpy()[10:70].sort(axis=0),
}


def answer(model: Any, call: dict[str, Tensor]) -> Tensor | str:
    """The hidden states of the last layer at real tokens, or the name of an error."""
    with torch.no_grad():
        try:
            hidden: Tensor = model(**call).last_hidden_state
        except Exception as error:
            return type(error).__name__
    return hidden[call["attention_mask"].bool()] if "attention_mask" in call else hidden


@BOTH
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse and a call"])
@pytest.mark.parametrize("what", CHANGES)
def test_no_change_goes_unnoticed(what: str, before: bool, kind: Any) -> None:
    stock = seeded(kind, share_att_key=False, position_buckets=16, max_position_embeddings=64)
    fused = copy.deepcopy(stock)
    mask = models.masks(3, 40)["right"]
    assert mask is not None
    ids = models.ids(3, 40, high=100)
    calls = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    for model in (fused, stock):
        if model is fused and not before:
            fastbert.fuse(fused, padding="packed")
            assert all(not isinstance(answer(fused, call), str) for call in calls)
        CHANGES[what](model)
    if before:
        fastbert.fuse(fused, padding="packed")
    for call in calls:
        reason, ran = fastbert.explain(fused).encoders[0].reason, dict(fastbert.explain(fused).encoders[0].fused_calls)
        found, expected = answer(fused, call), answer(stock, call)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (reason is None) or fastbert.explain(fused).encoders[0].fused_calls == ran


class Counting(nn.Module):
    """Embeddings of somebody's own, which read all that stock gives them."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings, self.word_embeddings = embeddings, embeddings.word_embeddings

    def forward(self, mask: Tensor, token_type_ids: Tensor, **given: Any) -> Tensor:
        rows: Tensor = self.embeddings(mask=mask, token_type_ids=token_type_ids, **given)
        return rows * (1 + 0.1 * mask[..., None].float()) + token_type_ids.sum()


def halve_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "mask": 0.5 * kwargs["mask"], "token_type_ids": kwargs["token_type_ids"] + 0}


@BOTH
@pytest.mark.parametrize("change", ["hooked", "replaced"])
def test_embeddings_that_somebody_sees_are_given_what_stock_gives(change: str, kind: Any) -> None:
    stock = seeded(kind)
    fused = fastbert.fuse(copy.deepcopy(stock), padding="packed")
    for model in (fused, stock):
        if change == "hooked":
            model.embeddings.register_forward_pre_hook(halve_mask, with_kwargs=True)
        else:
            model.embeddings = Counting(model.embeddings)
    mask = models.masks(3, 19)["right"]
    assert mask is not None
    for call in ({}, {"attention_mask": mask}, {"attention_mask": torch.ones(3, 19)}):
        call = {"input_ids": models.ids(3, 19, high=100), **call}
        torch.testing.assert_close(answer(fused, call), answer(stock, call))


class Doubling(Tensor):
    """Of whatever GEMM or LayerNorm it takes part in, twice the result."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * found if function in (nn.functional.linear, nn.functional.layer_norm) else found


@BOTH
def test_embeddings_of_positions_that_change_functions_of_torch(kind: Any) -> None:
    """A tensor subclass: what comes of it is one, too, in every layer."""
    stock = seeded(kind)
    fused = fastbert.fuse(copy.deepcopy(stock))
    call = {"input_ids": models.ids(3, 19, high=100)}
    before = answer(fused, call)
    for model in (fused, stock):
        table = model.encoder.rel_embeddings
        table.weight = nn.Parameter(table.weight.detach().as_subclass(Doubling), requires_grad=False)
    found, expected = (answer(model, call).as_subclass(Tensor) for model in (fused, stock))  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)  # type: ignore[arg-type]
    assert stock_calls(fused) == {"rel_embeddings of the encoder has a parameter of a custom tensor subclass": 1}


PATCHES: dict[str, tuple[Any, str]] = {
    "a helper of v1": (v1, "compute_attention_span"),
    "a helper of v2": (hf, "build_rpos"),
    "a helper that a helper calls": (hf, "make_log_bucket_position"),
    "a method whose name begins with get_": (hf.DebertaV2Encoder, "get_rel_embedding"),
    "another, of v1": (v1.DebertaEncoder, "get_rel_pos"),
    "torch.bmm": (torch, "bmm"),
    "torch.gather": (torch, "gather"),
    "torch.sqrt": (torch, "sqrt"),
    "a method of tensors": (Tensor, "masked_fill"),
}


@BOTH
@pytest.mark.parametrize("what", PATCHES)
def test_replaced_code_runs_and_leaves_nothing(what: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it stands in the place of stock's, and when that is back."""
    owner, name = PATCHES[what]
    stock = seeded(kind, share_att_key=False, position_buckets=16)
    fused = fastbert.fuse(copy.deepcopy(stock))
    deberta_v2._kept_slots.cache_clear()
    ids = models.ids(2, 40, high=100)
    with torch.no_grad():
        plain = stock(ids).last_hidden_state
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, twice(getattr(owner, name)))
            torch.testing.assert_close(fused(ids).last_hidden_state, stock(ids).last_hidden_state)
        torch.testing.assert_close(fused(ids).last_hidden_state, plain)


def test_weights_that_positions_share_need_not_be_read_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GEMM of queries and keys shows a write to them, be it to one element, through `.data`."""
    fused, stock = pair()
    read: list[int] = []
    prints = derived._prints
    monkeypatch.setattr(derived, "_prints", lambda some: [read.append(len(some)), prints(some)][1])
    kept = fused.encoder.fastbert.coverage.derived
    with torch.no_grad():
        for length in (9, 17):  # a GEMM of another number of rows may round otherwise: read once more
            ids = models.ids(2, length, high=100)
            fused(ids)
            fused(ids)
            read.clear()
            fused(ids)
            assert read == [3]  # rel_embeddings and their LayerNorm; in no layer
        for name in ("query_proj", "key_proj"):
            for model in (fused, stock):
                getattr(attention(model), name).weight.data[3, 5] += 0.5
            before = dict(kept.made)
            torch.testing.assert_close(fused(ids)[0], stock(ids)[0], rtol=1e-5, atol=1e-5)
            assert sum(kept.made[place] is not made for place, made in before.items()) == 1


def test_what_is_kept_does_not_grow() -> None:
    """Where every call brings other parameters, or other data."""
    fused, stock = pair(share_att_key=False)
    ids = models.ids(2, 9, high=100)
    kept = fused.encoder.fastbert.coverage.derived
    with torch.no_grad():
        fused(ids)
        most = len(kept.made)
        assert most == 1 + 2 * 2
        for i in range(4):
            new = {name: p * (1 + 0.1 * i) for name, p in stock.named_parameters()}
            found, expected = (torch.func.functional_call(each, new, (ids,))[0] for each in (fused, stock))
            torch.testing.assert_close(found, expected)
            assert len(kept.made) <= most
        for _ in range(4):
            for model in (fused, stock):
                weight = attention(model).pos_key_proj.weight
                weight.data = weight.data * 1.5
            torch.testing.assert_close(fused(ids)[0], stock(ids)[0])
            assert len(kept.made) <= most


def test_what_was_made_under_autocast_is_not_used_outside_of_it() -> None:
    fused, stock = pair()
    ids = models.ids(2, 9, high=100)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            fused(ids)
        torch.testing.assert_close(fused(ids)[0], stock(ids)[0])
