"""FLOPs against torch's own counter, bytes against sums by hand, and an encoder against what a fused model calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.models.bert import modeling_bert as hf
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

import fastbert
from fastbert import ops
from fastbert.kernels import cpu, reference_int8
from fastbert.measure import cases, counts
from fastbert.models import deberta_v2
from tests import models
from tests.fastbert import test_families
from tests.fastbert.test_ops import arguments

LENGTHS = [5, 1, 17, 12]


def flops_by_torch(call: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a call by torch's counter, which does not know the fused attention of a CPU: matmuls one by one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_flops_are_those_of_the_twin(name: str) -> None:
    args = arguments()[name]
    result = ops.CPU_BACKEND[name](*args)
    # The twin multiplies each row with all 2 S - 1 distances of its sequence, of 4 and 5 tokens, not with its own S.
    known = {"disentangled_attention": 2, "disentangled_attention_map": 2, "disentangled_attention_backward": 6}
    terms = known.get(name, 0)
    more = terms * 2 * 2 * 16 * (4 * 3 + 5 * 4)
    twin = getattr(reference_int8, name, ops.CPU_BACKEND[name])  # of int8 the backend calls no operator of torch
    assert counts.cost(name, args, result).flops + more == flops_by_torch(twin, *args)


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_dense_attention(masked: bool) -> None:
    q = torch.randn(12, 2, 16)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4]) if masked else None
    shape = (3, 2, 4, 16)  # sequences, heads, rows, head_dim
    assert counts.cost("attention", (q, q, q, None, mask, 4, 0.25), q).flops == sdpa_flop_count(shape, shape, shape)


def test_flops_of_packed_attention_are_those_of_each_sequence() -> None:
    qkv = torch.randn(sum(LENGTHS), 3, 2, 16)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    args = (qkv, starts, None, max(LENGTHS), 0.25, 0.0, None)
    result = ops.attention_forward(*args)
    shapes = [(1, 2, n, 16) for n in LENGTHS]
    assert counts.cost("attention_forward", args, result).flops == sum(sdpa_flop_count(s, s, s) for s in shapes)
    args = (result[0], qkv, *result, *args[1:])
    backward = counts.cost("attention_backward", args, (qkv, torch.empty(0)))
    assert backward.flops == sum(sdpa_backward_flop_count(s, s, s, s) for s in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes(dtype: torch.dtype) -> None:
    """By hand, for the arguments of tests/fastbert/test_ops.py: 9 rows of 32 and 48, 2 heads of 16, in sequences of 4
    and 5; what is float32 or int64 whatever the dtype is added in bytes."""
    rows, wide, weight = 9 * 32, 9 * 48, 48 * 32
    starts, seed, tiles, bias = 3 * 4, 8, 2 * 4 * 4, 4 * 2 * 11
    positions, slots, places, maps = 8 * 2 * 16, 4 * 11, 8 * 9, 2 * 2 * 7 * 7
    stats = 4 * 2 * 9 * (2 if dtype == torch.float32 else 1)
    expected = {
        "linear": (rows + weight + 48 + wide, 0),
        "linear_gelu": (rows + weight + 48 + wide, 0),
        "linear_gated": (rows + 2 * weight + 48 + wide, 0),
        "linear_add": (rows + weight + wide + wide, 0),  # no bias
        "qkv_linear": (rows + 3 * weight + 2 * 48 + 3 * wide, 0),
        "feed_forward": (rows + weight + 48 + wide + 2 * wide + weight + 32 + rows, 0),
        "gated_feed_forward": (rows + 2 * weight + 48 + wide + 2 * wide + wide + weight + 32 + rows, 0),
        "linear_gated_backward": (rows + weight + 2 * wide + 3 * wide, 0),
        "linear_gelu_backward": (rows + weight + wide + 2 * wide, 0),
        "attention": (4 * rows, starts + tiles),
        "attention_tiles": (0, starts + tiles),
        "attention_map": (2 * rows + maps, starts + places + tiles + bias),
        "attention_forward": (4 * rows, starts + seed + tiles + bias + stats),
        "attention_backward": (rows + 3 * rows + rows + 3 * rows, starts + seed + tiles + bias + stats + bias),
        "disentangled_attention": (4 * rows + 2 * positions, slots + starts + seed + tiles + stats),
        "disentangled_attention_backward": (8 * rows + 4 * positions, slots + starts + seed + tiles + stats),
        "disentangled_attention_map": (2 * rows + 2 * positions + maps, slots + starts + places + tiles),
        "rotate": (6 * rows + 2 * 9 * 16, 0),
        "layer_norm": (2 * rows + 2 * 32, 0),
        "rms_norm": (2 * rows + 32, 0),
        "add_layer_norm": (3 * rows + 2 * 32, seed),
        "add_layer_norm_backward": (3 * rows + 32 + 2 * rows + 2 * 32, seed),
        "linear_cross_entropy": (rows + weight + 48, 8 * 9 + 2 * 4 * 9),
        "linear_cross_entropy_backward": (2 * (rows + weight + 48), 4 * 9 + 8 * 9 + 4 * 9),
        "quantize_fp8": (rows, rows + 4 * 9),
        "layer_norm_fp8": (2 * rows + 2 * 32, rows),
        "attention_fp8": (3 * rows, rows + starts + tiles),
        "linear_fp8": (48 + wide, rows + weight + 4 * (9 + 48)),
        "linear_gelu_fp8": (48, rows + weight + 4 * (9 + 48) + wide),
        "linear_add_fp8": (48 + 2 * wide, rows + weight + 4 * 48),  # one scale for all rows
        "quantize_int8": (rows, rows + 2 * 4 * 9),
        "layer_norm_int8": (2 * rows + 2 * 32, rows + 2 * 4 * 9 + 4 * 32),
        "linear_int8": (48 + wide, rows + weight + 2 * 4 * (9 + 48)),
        "linear_gelu_int8": (48 + wide, rows + weight + 2 * 4 * (9 + 48)),
        "linear_gelu_quantize_int8": (48, rows + weight + 2 * 4 * (9 + 48) + 4 * 48 + wide + 2 * 4 * 9),
        "linear_add_int8": (48 + 2 * wide, rows + weight + 2 * 4 * (9 + 48)),
        "mask_layout": (0, 9 + 8 * 9 + 4 * 4 + 2 * 8 * 9 + 8 * 5),
        "pack": (2 * 3 * 32, 8 * 3),  # three rows are real
        "unpack": (3 * 32 + rows, 8 * 9),
    }
    calls = arguments(dtype)
    words, types = (calls["embedding_layer_norm"][i].unique().numel() for i in (0, 1))
    assert words < 9  # of which some come twice
    tables = (words + types + 9) * 32
    expected["embedding_layer_norm"] = (tables + 2 * 32 + rows, 3 * 8 * 9)
    expected["embedding_layer_norm_backward"] = (rows + tables + 32 + rows + 2 * 32, 3 * 8 * 9)
    assert set(expected) == set(ops.OPERATORS)
    for name, (elements, others) in expected.items():
        result = ops.CPU_BACKEND[name](*calls[name])
        assert counts.cost(name, calls[name], result).bytes == elements * dtype.itemsize + others, name


def test_bytes_of_what_is_expanded_and_of_what_is_shared() -> None:
    x, weight = torch.randn(1, 32).expand(9, 32), torch.randn(48, 32)
    assert counts.cost("linear", (x, weight, None), torch.empty(9, 48)).bytes == 4 * (32 + 48 * 32 + 9 * 48)
    # Without dropout and in one dtype, dx is dresidual and comes back empty.
    args = list(arguments(dropout=0.0)["add_layer_norm_backward"])
    once = counts.cost("add_layer_norm_backward", args, ops.add_layer_norm_backward(*args)).bytes
    assert once == 4 * (3 * 9 * 32 + 32 + 9 * 32 + 2 * 32)


def test_an_unknown_operator() -> None:
    with pytest.raises(ValueError, match=r"^name is 'softmax'; expected one of "):
        counts.cost("softmax", (), ())


def alone(model: nn.Module, n: int, backward: bool = False) -> None:
    """One sequence through stock, without padding."""
    hidden = model(models.ids(1, n)).last_hidden_state
    if backward:
        hidden.backward(torch.ones_like(hidden))


@pytest.fixture(scope="module")
def stock() -> Any:
    """A stock model without a pooler, whose attention is matmuls one by one."""
    torch.manual_seed(0)
    return hf.BertModel(models.config(attn_implementation="eager"), add_pooling_layer=False)


def test_flops_of_an_encoder(stock: Any) -> None:
    found = counts.encoder(stock.config, LENGTHS, torch.float32)
    assert found.flops == sum(flops_by_torch(alone, stock, n) for n in LENGTHS)


def test_flops_are_counted_on_real_tokens() -> None:
    # BERT-large at 128 tokens: 24 S (24 h^2 + 4 S h) = 78.9 GFLOP.
    config = hf.BertConfig(**cases.SHAPES["large"])
    one, two = (counts.encoder(config, lengths, torch.bfloat16).flops for lengths in ([128], [128, 37]))
    assert one == 24 * 128 * (24 * 1024**2 + 4 * 128 * 1024)
    assert two == one + 24 * 37 * (24 * 1024**2 + 4 * 37 * 1024)


def test_flops_of_a_training_step(stock: Any) -> None:
    found = counts.encoder(stock.config, LENGTHS, torch.float32, train=True)
    # Stock keeps the scores; the fused backward computes them again, one matmul more a layer.
    again = stock.config.num_hidden_layers * sum(2 * n * n * stock.config.hidden_size for n in LENGTHS)
    assert found.flops == again + sum(flops_by_torch(alone, stock, n, backward=True) for n in LENGTHS)


class Calls(TorchDispatchMode):
    """Costs of fastbert's operators and of matmuls, as they are called."""

    knows_fastbert = True

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[tuple[str, counts.Cost]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space == "fastbert":
            self.costs.append((name, counts.cost(name, args, result)))
        elif name == "mm":
            self.costs.append((name, counts.torch_cost(func, args, kwargs or {}, result)))
        return result


@pytest.mark.parametrize("kinds", [["c2p"], ["c2p", "p2c"]], ids="+".join)
@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_of_deberta_costs_what_it_calls(train: bool, kinds: list[str]) -> None:
    """Without what makes embeddings, and the convolution, which is stock's. Inference makes those of positions once."""
    torch.manual_seed(0)
    sizes = deberta_v2.SIZES | {"vocab_size": 300, "pos_att_type": kinds, "conv_kernel_size": 3, "conv_act": "gelu"}
    model = fastbert.fuse(deberta.DebertaV2Model(deberta.DebertaV2Config(**sizes))).train(train)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.set_grad_enabled(train):
        for _ in range(2):
            with Calls() as calls:
                hidden = model(models.ids(*mask.shape), attention_mask=mask).last_hidden_state
                if train:
                    hidden.backward(torch.ones_like(hidden))
    convolved = (1 + 2 * train) * 2 * sum(LENGTHS) * 3 * 48**2
    shown = 0 if train else model.config.num_hidden_layers * 2 * 48 * 3 * 48  # by a row more: see `Derived`
    expected = counts.encoder(model.config, LENGTHS, torch.float32, train)
    assert sum(cost.flops for _, cost in calls.costs) + convolved == expected.flops + shown
    assert 0 < expected.bytes < 1e9


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_an_encoder_costs_what_it_calls(
    train: bool, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_has_native_matmul", lambda dtype: True)  # matmuls in `dtype` wherever this runs
    rates = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    model = fastbert.fuse(models.seeded(**rates).to(dtype)).train(train)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.set_grad_enabled(train), Calls() as calls:
        hidden = model(models.ids(*mask.shape), attention_mask=mask).last_hidden_state
        if train:
            hidden.backward(torch.ones_like(hidden))
    around = {"embedding_layer_norm", "embedding_layer_norm_backward", "mask_layout", "unpack", "pack"}
    assert {name for name, _ in calls.costs} >= (around if train else {"embedding_layer_norm", "unpack"})
    layers = counts.total(each for name, each in calls.costs if name not in around)
    expected = counts.encoder(model.config, LENGTHS, dtype, train)
    assert layers.flops == expected.flops
    # Those of linear layers' biases are sums; LayerNorms' come of its backward.
    vectors = {name: p for name, p in model.encoder.named_parameters() if p.dim() == 1 and "LayerNorm" not in name}
    biases = sum(p.nbytes for p in vectors.values()) if train else 0
    assert layers.bytes + biases == expected.bytes


def test_costs_of_torch_s_own_operators() -> None:
    aten = torch.ops.aten
    x, weight, bias = torch.randn(9, 32), torch.randn(48, 32), torch.randn(48)

    def cost(operator: Any, *args: Any, **kwargs: Any) -> counts.Cost:
        return counts.torch_cost(operator, args, kwargs, operator(*args, **kwargs))

    assert cost(aten.addmm.default, bias, x, weight.t()) == (2 * 9 * 32 * 48, 4 * (48 + 9 * 32 + 48 * 32 + 9 * 48))
    assert cost(aten.t.default, x) == (0, 0)
    assert cost(aten.add_.Tensor, x, x.clone()) == (0, 3 * 4 * 9 * 32)
    ids: Tensor = torch.tensor([3, 1, 3])
    assert cost(aten.embedding.default, torch.randn(1000, 32), ids) == (0, 8 * 3 + 2 * 4 * 3 * 32)
    q = torch.randn(3, 2, 4, 16)
    attended = cost(aten._scaled_dot_product_flash_attention_for_cpu.default, q, q, q)
    assert attended == (sdpa_flop_count(*[q.shape] * 3), 4 * (4 * q.numel() + 3 * 2 * 4))


@pytest.mark.parametrize("window", [0, 3, 5, 6, 64])
def test_a_window_leaves_pairs_out(window: int) -> None:
    lengths, width = [1, 5, 6, 7, 20], 2 * 8
    q = torch.zeros(sum(lengths), 2, 8)
    qkv, starts = torch.zeros(len(q), 3, 2, 8), torch.tensor([0, *lengths]).cumsum(0)
    pairs = sum(abs(i - j) <= window for n in lengths for i in range(n) for j in range(n))
    layout = (starts, None, 20, 1.0)
    forward, backward = (0.0, None, None, None, window), (0.0, None, None, None, True, window)
    assert counts.cost("attention", (q, q, q, *layout, None, None, window), q).flops == 2 * 2 * width * pairs
    assert counts.cost("attention_forward", (qkv, *layout, *forward), q).flops == 2 * 2 * width * pairs
    assert counts.cost("attention_backward", (q, qkv, q, q, *layout, *backward), q).flops == 5 * 2 * width * pairs
    dense = (q[:20], q[:20], q[:20], None, None, 20, 1.0, None, None, window)
    near = sum(abs(i - j) <= window for i in range(20) for j in range(20))
    assert counts.cost("attention", dense, q[:20]).flops == 2 * 2 * width * near


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", test_families.ROTARY)
def test_an_encoder_with_rotary_positions_costs_what_it_calls(family: str, train: bool) -> None:
    """But for element-wise operators of torch, of which only bytes are counted: by hand, below."""
    name = test_families.adapter(family).base.__name__
    model = fastbert.fuse(test_families.seeded(family, name)).train(train)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.set_grad_enabled(train), Calls() as calls:
        hidden = model(models.ids(*mask.shape), attention_mask=mask).last_hidden_state
        if train:
            hidden.backward(torch.ones_like(hidden))
    found = sum(cost.flops for _, cost in calls.costs)
    assert counts.encoder(model.config, LENGTHS, torch.float32, train).flops == found > 1e7


def test_costs_of_modernbert_by_hand() -> None:
    """ModernBERT-large in bfloat16, two texts: of 28 layers 18 have a window of 64 on each side."""
    config, h, i, lengths = cases.config_of("modernbert-large"), 1024, 2624, [512, 37]
    fastbert.fuse(test_families.seeded("modernbert", "ModernBertModel"))
    tokens, layers, near = sum(lengths), 28, 18
    weights = 3 * h * h + h * h + 2 * i * h + i * h
    pairs = 512**2 + 37**2  # of the longer, 64 keys on each side but for its ends, where 1 to 64 are missing
    close = 512 * 129 - 64 * 65 + 37**2
    attention = 4 * h * ((layers - near) * pairs + near * close)
    found = counts.encoder(config, lengths, torch.bfloat16)
    assert found.flops == layers * 2 * tokens * weights + attention
    # Of a layer: two norms, QKV, rotation, attention, two GEMMs with residuals, and the gated one.
    rows = 4 * h + 4 * h + 6 * h + 4 * h + 3 * h + (i + 2 * h) + (h + i)
    tables, vectors, starts = 2 * tokens * 64, 4 * h, 3 * 4
    first = 2 * (2 * h * tokens + 2 * h)  # which has no norm before attention
    assert found.bytes == layers * (2 * (rows * tokens + weights + vectors + tables) + starts) - first
    step = counts.encoder(config, lengths, torch.bfloat16, train=True)
    assert step.flops == 3 * layers * 2 * tokens * weights + attention * (2 + 5) // 2


@pytest.mark.parametrize("train", [False, True])
def test_esm_costs_bert_and_its_rotations(train: bool) -> None:
    """The same GEMMs; queries and keys are turned, and back: qkv read and written, cosines and sines read."""
    found = []
    for positions in ("rotary", "absolute"):
        sizes = {"position_embedding_type": positions, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        model = fastbert.fuse(test_families.seeded("esm", "EsmModel", **sizes))
        found.append(counts.encoder(model.config, LENGTHS, torch.float32, train))
    assert found[0].flops == found[1].flops
    if not train:  # where norms come first, residuals are added in passes of their own
        assert found[0].bytes - found[1].bytes == 2 * 4 * sum(LENGTHS) * (6 * 128 + 2 * 32)
