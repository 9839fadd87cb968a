"""CUDA graphs: which calls they take, that a replay answers as the layers would, and that no change goes unnoticed.

Without a GPU a recording of operators stands in for the graph: bound to memory, as a graph is, and of no use where
anything but an operator has to run again.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DebertaModel, DebertaV2Model, DistilBertModel, ElectraModel, RobertaModel
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.kernels import cpu, launch
from fastbert.numerics import assert_within_policy
from fastbert.runtime import graphs
from fastbert.runtime.registry import encoder_of
from tests import models
from tests.fastbert import test_families


class Recorder(TorchDispatchMode):
    """Records operators as a graph does launches: with the memory of their arguments, whatever holds it later."""

    knows_fastbert = True

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is written in place is memory from before: a capture leaves it alone.
        out = args[0] if func._schema.is_mutable else func(*args, **(kwargs or {}))
        bound = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, args)
        self.steps.append((func, bound, kwargs or {}, out))
        return out

    def poison(self) -> None:
        """A capture runs nothing."""
        for _, args, _, out in self.steps:
            for tensor in own(out, args):
                tensor.fill_(math.nan if tensor.is_floating_point() else 77)

    def replay(self) -> None:
        for kept in cpu._TABLES:  # by versions, which views that a dispatch mode sees don't share; no GPU has it
            kept.clear()
        for func, args, kwargs, out in self.steps:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, value in zip(own(out, args), own(new, args), strict=True):
                    old.copy_(value)


def own(out: Any, args: Any) -> list[Tensor]:
    """The tensors of `out` that are no views of arguments."""
    known = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, Tensor)}
    return [t for t in tree_leaves(out) if t.untyped_storage().data_ptr() not in known]


class StandIn:
    """In place of graphs.Cuda. Threads have streams of their own; what happens is kept in `log`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captures: list[weakref.ref[Recorder]] = []
        self.pools = 0

    def refuses(self, x: Tensor) -> str | None:
        return None

    def guard(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def begin(self, *buffers: Tensor) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")

    def finish(self) -> None:
        self.log.append("finish")

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    def capture(self, run: Callable[[], None], pool: int) -> Recorder:
        assert pool == self.pools
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        run()
        with Recorder() as recorder:
            run()
        recorder.poison()
        self.captures.append(weakref.ref(recorder))
        return recorder


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Cuda", StandIn)


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def fused_pair(kind: type[nn.Module] = hf.BertModel, **changes: Any) -> tuple[Any, Any]:
    """(with graphs, without) of the same weights, both fused."""
    model = models.seeded(kind, **{**SMALL, **changes})
    return fastbert.fuse(copy.deepcopy(model), cuda_graphs=True), fastbert.fuse(model)


def graphs_of(model: Any) -> Any:
    return encoder_of(model.base_model).fastbert.graphs


def calls(model: Any) -> dict[str, int]:
    return fastbert.explain(model).encoders[0].graph_calls


def padded(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    seqlen = max(lengths)
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": models.ids(len(lengths), seqlen, seed=seed), "attention_mask": mask}


@torch.no_grad()
def last(model: Any, call: dict[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    result: Tensor = model(**on_device)[0]
    return result


def assert_replays(model: Any, call: dict[str, Any], twin: Any) -> None:
    """Its next call of this size is a replay, and right by an eager twin: to the bit, on a GPU."""
    for _ in range(2):
        last(model, call)
    before = calls(model).get("replayed", 0)
    result, expected = last(model, call), last(twin, call)
    assert calls(model).get("replayed", 0) == before + 1, calls(model)
    if result.is_cuda:
        assert torch.equal(result, expected)
    else:  # there GEMMs depend on the number of rows
        torch.testing.assert_close(result, expected)


CALLS = {
    "no mask": {"input_ids": models.ids(2, 33)},
    "one": {"input_ids": models.ids(1, 128), "attention_mask": torch.ones(1, 128, dtype=torch.int64)},
    "short": {"input_ids": models.ids(1, 1)},
    "padded": padded([37, 1, 128, 129]),
    "flattened": models.ragged([37, 1, 128, 5]),
    "empty sequence": models.ragged([0, 5, 0, 64, 0]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_is_within_the_policy(name: str, recorded: None) -> None:
    fused, stock, truth = models.three(models.seeded(), torch.float32)
    fastbert.fuse(fused, cuda_graphs=True)
    call = CALLS[name]
    real = call.get("attention_mask", torch.ones(call["input_ids"].shape)).bool()
    first = last(fused, call)
    second, third = last(fused, call), last(fused, call)
    assert calls(fused) == {"eager: the first call of its size": 1, "captured": 1, "replayed": 1}
    for result in (second, third):
        if name in ("flattened", "empty sequence", "short"):  # which stock doesn't tell apart; too few to judge by
            torch.testing.assert_close(result, first)
        else:
            assert_within_policy(result[real], last(stock, call)[real], last(truth, call)[real], name)
            assert not result[~real].any()


def test_ragged_calls_of_one_bucket_replay_one_graph(recorded: None) -> None:
    model, twin = fused_pair()
    results = {}
    for seed, lengths in enumerate([[40, 9, 60, 7], [64, 13, 18, 1], [30, 30, 30, 30], [64, 62, 1]] * 2):
        call = padded(lengths, seed)
        results[seed] = last(model, call), call
    # None of what was handed out has been written to since.
    for result, call in results.values():
        torch.testing.assert_close(result, last(twin, call))
    assert calls(model) == {"eager: the first call of its size": 1, "captured": 1, "replayed": 6}
    assert len(graphs_of(model)._graphs) == 1


def test_numbers_left_in_the_buffers_reach_no_result(recorded: None) -> None:
    model, twin = fused_pair()
    call = padded([37, 1, 100])
    for _ in range(3):
        last(model, call)
    graphs_of(model)._buffers[0].fill_(math.nan)
    torch.testing.assert_close(last(model, call), last(twin, call))


def test_rows_that_fill_up_are_computed_as_others(recorded: None) -> None:
    """So that they are finite, whatever the memory of a graph held before."""
    model, _ = fused_pair()
    for lengths in ([37, 1, 100], [128, 1, 3], [1], [5, 60, 129]):
        for _ in range(3):
            last(model, padded(lengths))
            assert graphs_of(model)._buffers is None or graphs_of(model)._buffers[0].isfinite().all()
    assert calls(model)["replayed"] == 6


def test_buckets() -> None:
    seen = set()
    for tokens in range(1, graphs.MAX_TOKENS + 1):
        bucket = graphs.bucket_of(tokens, 1, tokens)
        assert bucket.tokens >= tokens
        assert bucket.tokens % graphs.FILLER == 0
        assert bucket.tokens <= max(tokens * 1.25, tokens + graphs.FILLER - 1)
        assert bucket.longest >= tokens
        seen.add(bucket.tokens)
        for sequences in (1, 3, 4, 1000):
            filling = graphs.bucket_of(tokens, sequences, 1).sequences - sequences
            assert filling * graphs.FILLER >= bucket.tokens - tokens
    assert max(seen) == graphs.MAX_TOKENS
    assert len(seen) == 24
    assert graphs.bucket_of(100, 5, 65).longest == 128


def test_where_sequences_start_in_a_bucket(recorded: None) -> None:
    model, _ = fused_pair()
    for lengths in ([37, 1, 128, 129], [100, 20, 129, 17], [129, 129, 32]):
        last(model, padded(lengths))
        last(model, padded(lengths))
        bucket = graphs.bucket_of(sum(lengths), len(lengths), max(lengths))
        starts = graphs_of(model)._buffers[1][: bucket.sequences + 1]
        steps = starts.diff()
        assert starts[0] == 0 and starts[-1] == bucket.tokens
        assert steps[: len(lengths)].tolist() == lengths
        assert (steps[len(lengths) :] >= 0).all() and (steps[len(lengths) :] <= graphs.FILLER).all()


def test_equal_lengths_write_their_starts_once(recorded: None) -> None:
    """And again after another call of the bucket has."""
    model, twin = fused_pair()
    for shape in [(2, 32), (2, 32), (4, 16), (2, 32), (1, 64), (4, 16), (4, 16)]:
        call = {"input_ids": models.ids(*shape)}
        torch.testing.assert_close(last(model, call), last(twin, call))
    torch.testing.assert_close(last(model, padded([50, 10])), last(twin, padded([50, 10])))
    torch.testing.assert_close(last(model, CALLS["no mask"]), last(twin, CALLS["no mask"]))


def test_heads_run_on_graphs(recorded: None) -> None:
    model, twin = fused_pair(hf.BertForSequenceClassification)
    assert_replays(model, padded([37, 9, 60]), twin)


@pytest.mark.parametrize("kind", [RobertaModel, ElectraModel, DistilBertModel], ids=lambda kind: kind.__name__)
def test_other_families_replay(kind: Any, recorded: None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    renamed = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "embedding_size": 16}
    model = kind(kind.config_class(vocab_size=models.VOCABULARY, **sizes, **renamed)).eval()
    twin = fastbert.fuse(copy.deepcopy(model))
    assert_replays(fastbert.fuse(model, cuda_graphs=True), padded([37, 9, 60]), twin)
    encoder_of(model).layer[0].register_forward_hook(lambda module, args, out: 2 * out)
    encoder_of(twin).layer[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(last(model, padded([37, 9, 60])), last(twin, padded([37, 9, 60])))


def test_attention_by_distance_runs_eagerly(recorded: None) -> None:
    check_eager(test_families.seeded("mpnet", "MPNetModel", **SMALL))


def check_eager(model: Any) -> None:
    twin = fastbert.fuse(copy.deepcopy(model), padding="packed")
    fastbert.fuse(model, padding="packed", cuda_graphs=True)
    call = {"input_ids": models.ids(2, 20, high=60), "attention_mask": padded([20, 11])["attention_mask"]}
    for _ in range(3):
        assert torch.equal(last(model, call), last(twin, call))
    assert calls(model) == {"eager: its encoder does more than to call its layers": 3}
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed": 3}
    with torch.no_grad():
        assert fastbert.explain(model).encoders[0].eager == "its encoder does more than to call its layers"


DEBERTAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "v3": (DebertaV2Model, {"share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    "projections of their own": (DebertaV2Model, {"share_att_key": False, "pos_att_type": ["c2p"]}),
    "v1": (DebertaModel, {}),
    "no positions": (DebertaV2Model, {"relative_attention": False}),
}


def deberta(kind: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": models.VOCABULARY, "num_hidden_layers": 2, "position_buckets": 8, "type_vocab_size": 0}
    given = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, **changes}
    model = kind(kind.config_class(**sizes, **SMALL, **given)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2)
            parameter.copy_(noise + (parameter.dim() == 1 and "norm" in name.lower()))
    return model


def deberta_pair(name: str = "v3", device: str = "cpu", **changes: Any) -> tuple[Any, Any]:
    kind, given = DEBERTAS[name]
    model = deberta(kind, **given, **changes).to(device)
    return fastbert.fuse(copy.deepcopy(model), cuda_graphs=True), fastbert.fuse(model)


@pytest.mark.parametrize("name", DEBERTAS)
def test_deberta_replays(name: str, recorded: None) -> None:
    """Of other lengths, too, and after writes to all that positions are made of."""
    check_deberta(name, "cpu")


def check_deberta(name: str, device: str) -> None:
    model, twin = deberta_pair(name, device)
    for lengths in ([37, 9, 60], [129, 1]):
        assert_replays(model, padded(lengths), twin)
    call = padded([37, 9, 60])
    before, captured = last(model, call), calls(model)["captured"]
    for each in (model, twin):
        for path, parameter in each.named_parameters():
            if "rel_embeddings" in path or "encoder.LayerNorm" in path or "attention.self" in path:
                with torch.no_grad():
                    parameter.mul_(1.1).add_(0.01)
    assert_replays(model, call, twin)
    assert calls(model)["captured"] == captured
    assert not torch.allclose(last(model, call), before, rtol=1e-3, atol=1e-3)


POSITIONS: dict[str, Callable[[Any], object]] = {
    "another table": lambda e: setattr(
        e, "rel_embeddings", nn.Embedding(16, 32, device=e.rel_embeddings.weight.device)
    ),
    "other data": lambda e: setattr(e.rel_embeddings.weight, "data", e.rel_embeddings.weight.data.flip(0)),
    "a hook": lambda e: e.LayerNorm.register_forward_hook(lambda module, args, out: 2 * out),
    "another eps": lambda e: setattr(e.LayerNorm, "eps", 0.5),
    "no norm": lambda e: setattr(e, "norm_rel_ebd", ["none"]),
    "the list in place": lambda e: e.norm_rel_ebd.clear(),
    "a method": lambda e: setattr(e, "get_rel_embedding", lambda: 2 * e.LayerNorm(e.rel_embeddings.weight)),
}


@pytest.mark.parametrize("change", POSITIONS)
def test_no_change_of_debertas_positions_goes_unnoticed(change: str, recorded: None) -> None:
    check_positions(change, "cpu")


def check_positions(change: str, device: str) -> None:
    model, twin = deberta_pair(device=device)
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    before = last(model, call)
    for each in (model, twin):
        torch.manual_seed(1)
        POSITIONS[change](each.encoder)
    expected = last(twin, call)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    for _ in range(4):
        torch.testing.assert_close(last(model, call), expected)


def test_what_graphs_of_deberta_leave_out(recorded: None) -> None:
    """A convolution; sequences with which a graph would hold on to gigabytes."""
    check_eager(deberta(DebertaV2Model, conv_kernel_size=3, conv_act="gelu"))
    model, twin = deberta_pair()
    call = padded([1025, 7])
    for _ in range(3):
        assert torch.equal(last(model, call), last(twin, call))
    assert calls(model) == {"eager: its sequences are too long for scores by position": 3}


def rotary_pair(family: str, device: str = "cpu", **changes: Any) -> tuple[Any, Any]:
    given = {"num_key_value_heads": 2, "max_position_embeddings": 512, "num_hidden_layers": 4, **SMALL, **changes}
    model = test_families.seeded(family, test_families.adapter(family).base.__name__, **given).to(device)
    twin = copy.deepcopy(model)
    return fastbert.fuse(model, padding="packed", cuda_graphs=True), fastbert.fuse(twin, padding="packed")


def with_mask(rows: list[list[int]]) -> dict[str, Any]:
    mask = torch.tensor(rows)
    return {"input_ids": models.ids(*mask.shape), "attention_mask": mask}


@pytest.mark.parametrize("family", test_families.ROTARY)
def test_rotary_families_replay(family: str, recorded: None) -> None:
    """Positions are the call's own: a bucket's graph turns rows that begin elsewhere, or have gaps, as they stand."""
    check_rotary(family, "cpu")


def check_rotary(family: str, device: str) -> None:
    model, twin = rotary_pair(family, device)
    for lengths in ([37, 9, 60], [129, 1], [300]):
        assert_replays(model, padded(lengths), twin)
    here = range(20)
    near = with_mask([[int(i < 12) for i in here], [1] * 20])
    far = with_mask([[int(i >= 8) for i in here], [1] * 20])
    gaps = with_mask([[int(i % 5 != 2 and i < 15) for i in here], [1] * 20])
    assert len({int(call["attention_mask"].sum()) for call in (near, far, gaps)}) == 1
    assert_replays(model, near, twin)
    captured, rows = calls(model)["captured"], []
    for call in (near, far, gaps):
        for _ in range(2):
            result = last(model, call)
            rows.append(result[call["attention_mask"].bool().to(result.device)])
            torch.testing.assert_close(result, last(twin, call), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rows[0], rows[4], rtol=1e-2, atol=1e-2)  # gaps tell
    assert_replays(model, {"input_ids": models.ids(2, 16)}, twin)  # no mask: one layout more
    if family != "esm":  # whose sequences of a row don't know each other's masked tokens
        assert_replays(model, models.ragged([20, 12]), twin)
    assert calls(model)["captured"] == captured  # all of one bucket
    for each in (model, twin):
        with torch.no_grad():
            for parameter in encoder_of(each).parameters():
                parameter.mul_(1.1).add_(0.01)
    assert_replays(model, near, twin)
    assert calls(model)["captured"] == captured


def test_places_are_those_that_are_given(recorded: None) -> None:
    """By position_ids of a caller: in the same graph."""
    model, twin = rotary_pair("modernbert")
    call = {"input_ids": models.ids(2, 40)}
    assert_replays(model, call, twin)
    before = last(model, call)
    given = {**call, "position_ids": torch.arange(40).flip(0).pow(2).expand(2, -1)}
    assert_replays(model, given, twin)
    assert not torch.allclose(last(model, given), before, rtol=1e-2, atol=1e-2)
    assert calls(model)["captured"] == 1


ROTATIONS: dict[str, Callable[[Any], object]] = {
    "another buffer": lambda m: setattr(
        m.rotary_emb, "full_attention_inv_freq", m.rotary_emb.full_attention_inv_freq.flip(0)
    ),
    "other data": lambda m: setattr(
        m.rotary_emb.sliding_attention_inv_freq, "data", m.rotary_emb.sliding_attention_inv_freq.data.flip(0)
    ),
    "in place": lambda m: m.rotary_emb.full_attention_inv_freq.mul_(2),
    "a scale": lambda m: setattr(m.rotary_emb, "full_attention_attention_scaling", 2.0),
    "another rotation": lambda m: setattr(m, "rotary_emb", type(m.rotary_emb)(changed(m.config, theta=10.0))),
    "a hook": lambda m: m.rotary_emb.register_forward_hook(lambda module, args, out: (out[1], out[0])),
    "a method": lambda m: setattr(m.rotary_emb, "forward", lambda x, places, kind: 2 * [x.new_ones(1, x.shape[1], 16)]),
    "the window": lambda m: setattr(m.config, "sliding_window", 2),
    "another config": lambda m: setattr(m, "config", changed(m.config, window=2)),
    "a hook of the norm": lambda m: m.final_norm.register_forward_hook(lambda module, args, out: 2 * out),
    "another norm": lambda m: setattr(m, "final_norm", nn.LayerNorm(32, eps=0.5)),
    "the norm's weight": lambda m: setattr(m.final_norm, "weight", nn.Parameter(2 * m.final_norm.weight.detach())),
    "a layer": lambda m: setattr(m.layers[1].mlp, "act", nn.SiLU()),
}


def changed(config: Any, theta: float | None = None, window: int | None = None) -> Any:
    config = copy.deepcopy(config)
    if theta is not None:
        for parameters in config.rope_parameters.values():
            parameters["rope_theta"] = theta
    if window is not None:
        config.sliding_window = window
    return config


@pytest.mark.parametrize("change", ROTATIONS)
def test_no_change_of_rotations_goes_unnoticed(change: str, recorded: None) -> None:
    model, twin = rotary_pair("modernbert")
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    before = last(model, call)
    for each in (model, twin):
        with torch.no_grad():
            ROTATIONS[change](each)
    expected = last(twin, call)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    for _ in range(4):
        torch.testing.assert_close(last(model, call), expected)


def test_a_rotation_that_is_handed_on_or_not(recorded: None) -> None:
    """ESM's, which its base model makes anew in each call."""
    model, twin = rotary_pair("esm")
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    before = last(model, call)
    for each in (model, twin):
        each.rotary_embeddings.register_forward_hook(lambda module, args, out: (out[0], -out[1]))
    expected = last(twin, call)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    for _ in range(3):
        torch.testing.assert_close(last(model, call), expected)
    assert calls(model)["captured"] == 1


def test_a_rotary_model_that_is_gone_leaves_nothing(recorded: None) -> None:
    model, _ = rotary_pair("modernbert")
    for _ in range(3):
        last(model, padded([5, 9]))
    graph, norm = graphs_of(model)._device.captures[0], weakref.ref(model.final_norm.weight)
    assert graph() is not None
    del model
    assert graph() is None and norm() is None


def test_inference_mode_and_no_grad_share_graphs(recorded: None) -> None:
    model, twin = fused_pair()
    call = padded([37, 9, 60])
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            result = model(**call)[0]
            assert result.is_inference() == (mode is torch.inference_mode)
            torch.testing.assert_close(result, twin(**call)[0])
    assert calls(model)["replayed"] == 2


# What a user may do to a model between two calls. `layer` is one of its fused layers.


def replaced_data(model: Any, layer: Any) -> None:
    layer.output.dense.weight.data = layer.output.dense.weight.data * 0.5


def replaced_parameter(model: Any, layer: Any) -> None:
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight.detach() * 0.5)


def replaced_module(model: Any, layer: Any) -> None:
    torch.manual_seed(1)
    layer.output.dense = nn.Linear(64, 32, device=layer.output.dense.weight.device)


def replaced_class(model: Any, layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.output.dense.__class__ = Doubled


def replaced_forward(model: Any, layer: Any) -> None:
    layer.output.dense.forward = lambda x: 2 * nn.Linear.forward(layer.output.dense, x)


def hooked_linear(model: Any, layer: Any) -> None:
    layer.output.dense.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_layer(model: Any, layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_dropout(model: Any, layer: Any) -> None:
    layer.output.dropout.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hooked_behind_the_back(model: Any, layer: Any) -> None:
    layer.output.dense._forward_hooks = {0: lambda module, args, out: 2 * out}


def changed_eps(model: Any, layer: Any) -> None:
    layer.output.LayerNorm.eps = 0.5


def changed_scale(model: Any, layer: Any) -> None:
    layer.attention.self.scaling = 1.0


def changed_activation(model: Any, layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def pruned(model: Any, layer: Any) -> None:
    """At the same address, with the same strides."""
    dense, out = layer.intermediate.dense, layer.output.dense
    dense.weight.data, dense.bias.data = dense.weight.data[:40], dense.bias.data[:40]
    out.weight.data = out.weight.data[:, :40]


def transposed(model: Any, layer: Any) -> None:
    """In place, at the same address, of the same shape."""
    layer.attention.output.dense.weight.t_()


def fewer_layers(model: Any, layer: Any) -> None:
    encoder_of(model.base_model).layer = encoder_of(model.base_model).layer[:1]


def reordered_layers(model: Any, layer: Any) -> None:
    layers = encoder_of(model.base_model).layer
    layers[0], layers[1] = layers[1], layers[0]


def swapped(model: Any, layer: Any) -> None:
    weight = layer.output.dense.weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones_like(weight)))


def assigned(model: Any, layer: Any) -> None:
    device, other = next(model.parameters()).device, models.seeded(seed=3, **SMALL)
    model.load_state_dict({name: value.to(device) for name, value in other.state_dict().items()}, assign=True)


def rounded(model: Any, layer: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def causal(model: Any, layer: Any) -> None:
    layer.attention.self.is_causal = True


def unfused_and_fused(model: Any, layer: Any) -> None:
    fastbert.fuse(fastbert.unfuse(model), cuda_graphs=True)
    layer.output.dense.weight.data = layer.output.dense.weight.data * 0.5


def emptied(model: Any, layer: Any) -> None:
    """What memory a weight had is another's."""
    weight = layer.output.dense.weight
    value = weight.detach().clone()
    weight.data = torch.empty(0, device=weight.device)
    weight.data = torch.roll(value, 1, 0)


CHANGES = [
    replaced_data,
    replaced_parameter,
    replaced_module,
    replaced_class,
    replaced_forward,
    hooked_linear,
    hooked_layer,
    hooked_dropout,
    hooked_behind_the_back,
    changed_eps,
    changed_scale,
    changed_activation,
    pruned,
    transposed,
    fewer_layers,
    reordered_layers,
    swapped,
    assigned,
    rounded,
    causal,
    unfused_and_fused,
    emptied,
]


def check_change(change: Callable[[Any, Any], None], device: str) -> None:
    model, twin = fused_pair()
    model, twin = model.to(device), twin.to(device)
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    before = last(model, call)
    for each in (model, twin):
        with torch.no_grad():
            change(each, encoder_of(each.base_model).layer[0])
    stale = last(model, call)
    assert not torch.equal(stale, before)  # the change is one that tells
    expected = last(twin, call)
    assert torch.equal(stale, expected)
    assert torch.equal(last(model, call), expected) or "captured" in calls(model)


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_model_goes_unnoticed(change: Callable[[Any, Any], None], recorded: None) -> None:
    check_change(change, "cpu")


def test_hooks_see_each_call_once_after_they_are_added(recorded: None) -> None:
    model, _ = fused_pair()
    for _ in range(3):
        last(model, padded([5, 9]))
    seen: list[tuple[int, ...]] = []
    encoder_of(model).layer[1].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    last(model, padded([5, 9]))
    assert seen == [(2, 9, 32)]
    assert calls(model)["dropped: the model has changed"] == 1
    assert fastbert.explain(model).encoders[0].fused_calls == {"packed": 3, "dense": 1}


def test_weights_updated_in_place_are_what_a_replay_reads(recorded: None) -> None:
    model, twin = fused_pair()
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        each(**call)[0].square().sum().backward()
        optimizer.step()
        each.load_state_dict({k: v * 1.01 if v.is_floating_point() else v for k, v in each.state_dict().items()})
    assert_replays(model, call, twin)
    assert calls(model)["captured"] == 1
    assert calls(model)["eager: gradients are enabled"] == 1


def test_training_mode_drops_out_and_eval_replays_again(recorded: None) -> None:
    model, twin = fused_pair()
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    torch.manual_seed(0)
    dropped = last(model.train(), call)
    torch.manual_seed(0)
    assert torch.equal(dropped, last(twin.train(), call))
    assert calls(model)["eager: dropout"] == 1
    assert_replays(model.eval(), call, twin.eval())


def test_hidden_states_after_replays(recorded: None) -> None:
    """Of all layers, and their capturing hooks, which stay, stand in no graph's way."""
    model, twin = fused_pair()
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    with torch.no_grad():
        states, expected = (m(**call, output_hidden_states=True).hidden_states for m in (model, twin))
    assert len(states) == 3
    for a, b in zip(states, expected, strict=True):
        assert torch.equal(a, b)
    assert_replays(model, call, twin)


def test_adapters_run_eagerly(recorded: None) -> None:
    peft = pytest.importorskip("peft")
    model, _ = fused_pair()
    call = padded([37, 9, 60])
    for _ in range(3):
        last(model, call)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    adapted = last(wrapped, call)
    with wrapped.disable_adapter():
        plain = last(wrapped, call)
    assert not torch.allclose(adapted, plain)
    assert torch.equal(adapted, last(wrapped, call))
    assert calls(model)["eager: a layer has an adapter, or an activation other than GELU and SiLU"] >= 2


def test_the_least_recently_used_graph_goes(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model, twin = fused_pair()
    sizes = [[60], [120], [60], [150, 40]]
    for lengths in sizes:
        assert_replays(model, padded(lengths), twin)
    held = graphs_of(model)
    assert [bucket.tokens for bucket in held._graphs] == [64, 192]
    assert [ref() is not None for ref in held._device.captures] == [True, False, True]
    assert_replays(model, padded([120]), twin)  # captured again
    assert held._device.pools == 1
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    assert_replays(model, padded([60]), twin)
    assert_replays(model, padded([120]), twin)
    assert held._device.pools > 1  # a pool is not used again when its last graph is gone


def test_what_graphs_do_not_take(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 256)
    monkeypatch.setattr(graphs, "MAX_SEQUENCES", 8)
    model, twin = fused_pair()
    small = padded([5, 9])
    for _ in range(3):
        last(model, small)

    def expect(reason: str, act: Callable[[Any], Tensor]) -> None:
        before = calls(model).get(f"eager: {reason}", 0)
        with torch.no_grad():
            assert torch.equal(act(model), act(twin))
        assert calls(model).get(f"eager: {reason}", 0) == before + 1, calls(model)

    expect("more than 256 tokens", lambda m: last(m, {"input_ids": models.ids(3, 100)}))
    expect("more than 8 sequences", lambda m: last(m, {"input_ids": models.ids(9, 2)}))
    empty = {"input_ids": small["input_ids"], "attention_mask": torch.zeros(2, 9, dtype=torch.int64)}
    expect("padding is masked, not dropped", lambda m: last(m, empty))
    expect("hidden states are asked for, or watched by hooks", lambda m: m(**small, output_hidden_states=True)[0])
    with torch.enable_grad():
        assert model(**small)[0].requires_grad
    assert calls(model)["eager: gradients are enabled"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        expect("torch.autocast", lambda m: last(m, small))
    with Recorder():
        expect("a dispatch mode of torch", lambda m: last(m, small))
    assert_replays(model, small, twin)


def test_compiled_calls_trace_the_layers(recorded: None) -> None:
    model, _ = fused_pair(num_hidden_layers=1)
    call = {"input_ids": models.ids(2, 8)}
    for _ in range(3):
        last(model, call)
    before = calls(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(last(compiled, call), last(model, call))
    assert calls(model) == {**before, "replayed": before["replayed"] + 1}


def test_a_capture_that_fails_is_told_and_the_call_runs(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StandIn, run: Callable[[], None], pool: int) -> Recorder:
        run()
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(StandIn, "capture", fail)
    model, twin = fused_pair()
    call = padded([37, 9, 60])
    last(model, call)
    with pytest.warns(UserWarning, match="a capture failed: no room"):
        result = last(model, call)
    assert torch.equal(result, last(twin, call))
    assert torch.equal(last(model, call), result)
    assert calls(model) == {"eager: the first call of its size": 1, "eager: a capture failed: no room": 2}
    assert "a capture failed" in str(fastbert.explain(model))
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "Cuda", StandIn)
    assert_replays(fastbert.fuse(model, cuda_graphs=True), call, twin)


def run_threads(model: Any, twin: Any, streams: Callable[[], contextlib.AbstractContextManager[Any]]) -> list[str]:
    """Ragged calls on four threads at once; what went wrong."""
    lengths = [[40, 9, 60, 7], [64, 13, 18, 1], [30, 30, 30, 30], [5], [120, 3], [64, 62, 1]]
    expected = [last(twin, padded(each, seed)) for seed, each in enumerate(lengths)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # before other streams read them
    wrong: list[str] = []

    def work(offset: int) -> None:
        try:
            with streams():
                for i in range(offset, offset + 12):
                    seed = i % len(lengths)
                    result = last(model, padded(lengths[seed], seed))
                    if result.is_cuda:
                        torch.cuda.current_stream().synchronize()
                        same = torch.equal(result, expected[seed])
                    else:
                        same = torch.allclose(result, expected[seed], atol=1e-5)
                    if not same:
                        wrong.append(f"{lengths[seed]} on thread {offset}")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_take_turns(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Recorder.replay

    def slow(self: Recorder) -> None:
        time.sleep(0.001)  # lets other threads in
        replay(self)
        time.sleep(0.001)

    monkeypatch.setattr(Recorder, "replay", slow)
    model, twin = fused_pair()
    assert run_threads(model, twin, contextlib.nullcontext) == []
    log = [entry for entry in graphs_of(model)._device.log if entry != "finish"]
    assert "".join(log).replace("beginbegin", "begin").replace("beginend", "") == ""  # a capture begins twice
    assert calls(model)["replayed"] > 20


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_begin_without_graphs(way: str, recorded: None) -> None:
    model, twin = fused_pair()
    names = list(model.state_dict())
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert list(model.state_dict()) == names
    assert not graphs_of(other)._graphs and graphs_of(other)._fingerprint is None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = last(fastbert.fuse(copy.deepcopy(other)), call)
    assert not torch.allclose(expected, last(twin, call))
    for _ in range(3):
        torch.testing.assert_close(last(other, call), expected)
    assert_replays(model, call, twin)


def test_a_model_that_is_gone_leaves_nothing(recorded: None) -> None:
    """Without the collector of cycles: its memory on the device is free as soon as the model is."""
    model, _ = fused_pair()
    for _ in range(3):
        last(model, padded([5, 9]))
    weight = weakref.ref(encoder_of(model).layer[0].output.dense.weight)
    graph = graphs_of(model)._device.captures[0]
    assert graph() is not None
    del model
    assert weight() is None and graph() is None


def test_moving_a_model_frees_its_graphs(recorded: None) -> None:
    model, _ = fused_pair()
    for _ in range(3):
        last(model, padded([5, 9]))
    graph = graphs_of(model)._device.captures[0]
    model.to(torch.bfloat16)
    assert graph() is None


def test_fusing_again_turns_them_off_and_on(recorded: None) -> None:
    model, twin = fused_pair()
    call = padded([5, 9])
    assert_replays(model, call, twin)
    assert graphs_of(fastbert.fuse(model)) is None
    assert torch.equal(last(model, call), last(twin, call))
    explained = fastbert.explain(model).encoders[0]
    assert not explained.cuda_graphs and explained.graph_calls["replayed"] == 1
    assert_replays(fastbert.fuse(model, cuda_graphs=True), call, twin)


def test_explained(recorded: None) -> None:
    model, _ = fused_pair()
    assert fastbert.explain(model).encoders[0].eager == "gradients are enabled"
    with torch.no_grad():
        assert fastbert.explain(model).encoders[0].eager is None
        for _ in range(3):
            last(model, padded([5, 9]))
        text = str(fastbert.explain(model))
        assert "CUDA graphs: yes" in text and "CUDA graphs, replayed: 1" in text
        encoder_of(model).layer[0].output.dense.register_forward_hook(lambda *_: None)
        assert fastbert.explain(model).encoders[0].eager == "a layer runs stock"


def test_inert_on_a_cpu_with_the_reason() -> None:
    model, twin = fused_pair()
    call = padded([5, 9])
    for _ in range(3):
        assert torch.equal(last(model, call), last(twin, call))
    assert calls(model) == {"eager: the model is on the cpu": 3}
    with torch.no_grad():
        assert "CUDA graphs: none: the model is on the cpu" in str(fastbert.explain(model))


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_cuda_graphs_is_a_bool(wrong: Any) -> None:
    model = models.seeded()
    with pytest.raises(TypeError, match=r"cuda_graphs is .*; expected True or False"):
        fastbert.fuse(model, cuda_graphs=wrong)
    assert type(model) is hf.BertModel


# On a device, with graphs in earnest.


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def on_gpu(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, twin = fused_pair(max_position_embeddings=512)
    return model.to("cuda", request.param), twin.to("cuda", request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_a_replay_is_the_layers_to_the_bit(name: str, on_gpu: tuple[Any, Any]) -> None:
    assert_replays(on_gpu[0], CALLS[name], on_gpu[1])


@pytest.mark.gpu
def test_on_a_gpu_ragged_batches_replay(on_gpu: tuple[Any, Any]) -> None:
    model, twin = on_gpu
    generator = torch.Generator().manual_seed(0)
    kept = []
    for seed in range(40):
        lengths = torch.randint(1, 120, (1 + seed % 7,), generator=generator).tolist()
        kept.append((last(model, padded(lengths, seed)), padded(lengths, seed)))
    for result, call in kept:
        assert torch.equal(result, last(twin, call))
    assert calls(model)["replayed"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_on_a_gpu_no_change_goes_unnoticed(change: Callable[[Any, Any], None]) -> None:
    check_change(change, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_weights_are_updated_in_place(on_gpu: tuple[Any, Any]) -> None:
    model, twin = on_gpu
    call = padded([37, 9, 60])
    assert_replays(model, call, twin)
    for each in on_gpu:
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.01)
    assert_replays(model, call, twin)
    assert calls(model)["captured"] == 1


@pytest.mark.gpu
def test_on_a_gpu_threads_with_streams_of_their_own_take_turns(on_gpu: tuple[Any, Any]) -> None:
    assert run_threads(*on_gpu, lambda: torch.cuda.stream(torch.cuda.Stream())) == []
    assert calls(on_gpu[0])["replayed"] > 0


@pytest.mark.gpu
def test_on_a_gpu_inside_another_capture_the_layers_run(on_gpu: tuple[Any, Any]) -> None:
    model, twin = on_gpu
    ids = models.ids(2, 64).cuda()
    with torch.no_grad():
        for _ in range(3):
            model(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(ids)[0]
        graph.replay()
        assert torch.equal(result, twin(ids)[0])


@pytest.mark.gpu
def test_on_a_gpu_kernels_launched_early_compute_the_same(
    on_gpu: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With programmatic dependent launch, where there is one: eagerly and in graphs, many times over."""
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU without programmatic dependent launch")
    model, twin = on_gpu
    expected = [(call, last(twin, call)) for call in CALLS.values()]
    monkeypatch.setitem(launch.DEPENDENT, launch.architecture(torch.device("cuda", 0)), True)
    for _ in range(50):
        for call, result in expected:
            assert torch.equal(last(twin, call), result)
            assert torch.equal(last(model, call), result)
    assert calls(model)["replayed"] > 0


@pytest.mark.gpu
def test_on_a_gpu_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    model, _ = fused_pair(max_position_embeddings=512)
    model.cuda()
    sizes = [{"input_ids": models.ids(batch, 64)} for batch in range(1, 17)]
    reserved = []
    for _ in range(3):
        for call in sizes:
            last(model, call)
            last(model, call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= reserved[1]
    assert len(graphs_of(model)._graphs) == 4
    model.cpu()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEBERTAS)
def test_on_a_gpu_deberta_replays_to_the_bit(name: str) -> None:
    check_deberta(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("family", test_families.ROTARY)
def test_on_a_gpu_rotary_families_replay_to_the_bit(family: str) -> None:
    check_rotary(family, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("change", POSITIONS)
def test_on_a_gpu_no_change_of_debertas_positions_goes_unnoticed(change: str) -> None:
    check_positions(change, "cuda")
