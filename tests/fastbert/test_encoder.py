"""The fused encoder against stock and against float64: every head, size, dtype, mask and layout."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import ops
from fastbert.layers.context import Context
from fastbert.numerics import assert_within_policy
from fastbert.runtime import arguments as checks
from fastbert.runtime import packing, plan
from tests import models

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Triton kernels on CPU tensors, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run for real here; see the gpu tests")
    for name in ops.CPU_BACKEND:
        monkeypatch.setitem(ops.CPU_BACKEND, name, ops.registry.kernel(name))


def outputs(model: Any, **call: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {k: v for k, v in model(**call).items() if isinstance(v, torch.Tensor)}


def fused_counts(model: Any) -> dict[str, int]:
    return fastbert.explain(model).encoders[0].fused_calls


def compare(model: Any, dtype: torch.dtype, calls: list[tuple[dict[str, Any], Any]], padding: str = "auto") -> Any:
    """Runs calls [(arguments, real: (B, S) bool or None)] through fused, stock and float64; asserts the policy.

    Outputs of all calls are judged together, so that the errors compared are those of many numbers. Rows where `real`
    is False are left out where the layout doesn't promise them.
    """
    fused, stock, truth = models.three(model, dtype)
    fastbert.fuse(fused, padding=padding)
    gathered: dict[str, list[list[torch.Tensor]]] = {}
    for call, real in calls:
        single = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()
        }
        double = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in single.items()
        }
        results = [outputs(fused, **single), outputs(stock, **single), outputs(truth, **double)]
        assert results[0].keys() == results[1].keys()
        for name in results[0]:
            values = [r[name] for r in results]
            assert values[0].shape == values[1].shape
            if real is not None and values[0].shape[:2] == real.shape:
                values = [v[real] for v in values]
            gathered.setdefault(name, []).append([v.flatten() for v in values])
    for name, parts in gathered.items():
        a, b, c = (torch.cat(column) for column in zip(*parts, strict=True))
        assert_within_policy(a, b, c, f"{type(model).__name__} {name} {dtype} {padding}")
    return fused


def padded_calls(batch: int, seqlen: int, everywhere: bool, **extra: Any) -> list[tuple[dict[str, Any], Any]]:
    calls = []
    for kind, mask in models.masks(batch, seqlen).items():
        real = None if mask is None or everywhere else mask.bool()
        call = {"input_ids": models.ids(batch, seqlen, seed=len(kind)), "attention_mask": mask, **extra}
        calls.append((call, real))
    return calls


@pytest.mark.parametrize(
    ("kind", "dtype", "padding"),
    [
        pytest.param(kind, dtype, padding, id=f"{kind.__name__}-{dtype}-{padding}")
        for kind in models.HEADS
        for dtype in DTYPES
        for padding in ("packed", "dense")
        # Heads take what the encoder returns, whatever its dtype and layout: two of them in all.
        if kind in (hf.BertModel, hf.BertForMaskedLM) or (dtype, padding) == (torch.float32, "packed")
    ],
)
def test_heads(kind: Any, dtype: torch.dtype, padding: str) -> None:
    model = models.seeded(kind)
    if kind is hf.BertForMultipleChoice:
        calls = [
            (
                {
                    "input_ids": models.ids(3, 7, 23, seed=i),
                    "attention_mask": models.masks(21, 23)["right"].view(3, 7, 23),
                },
                None,
            )
            for i in range(8)
        ]
    else:
        calls = padded_calls(9, 37, everywhere=padding == "dense", token_type_ids=models.ids(9, 37, high=2))
    fused = compare(model, dtype, calls, padding)
    assert sum(fused_counts(fused).values()) == len(calls)
    assert ("packed" in fused_counts(fused)) == (padding == "packed")


@pytest.mark.parametrize(
    ("hidden", "heads", "dtype"),
    [
        (128, 4, torch.float32),
        (128, 2, torch.bfloat16),
        (384, 12, torch.bfloat16),
        (384, 6, torch.float32),
        (768, 12, torch.float32),
        (1024, 16, torch.float32),
        (120, 3, torch.float32),
        (120, 3, torch.bfloat16),
    ],
)
def test_sizes(hidden: int, heads: int, dtype: torch.dtype) -> None:
    model = models.seeded(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=2 * hidden, num_hidden_layers=1
    )
    for padding in ("packed", "dense"):
        compare(model, dtype, padded_calls(3, 21, everywhere=padding == "dense"), padding)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(activation: str) -> None:
    # Inputs large enough that erf and tanh differ by far more than the bound.
    fused = compare(models.seeded(hidden_act=activation), torch.float32, padded_calls(3, 21, everywhere=False))
    assert sum(fused_counts(fused).values()) > 0


def test_depth() -> None:
    compare(models.seeded(num_hidden_layers=12), torch.float32, padded_calls(5, 33, everywhere=False))


@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_other_arguments(padding: str) -> None:
    batch, seqlen = 5, 29
    mask = models.masks(batch, seqlen)["right"]
    real = mask.bool()
    positions = torch.arange(seqlen).flip(0)
    embeds = torch.randn(batch, seqlen, 128, generator=torch.Generator().manual_seed(0))
    everywhere = None if padding == "dense" else real
    base = {"input_ids": models.ids(batch, seqlen)}
    calls = [
        ({**base, "attention_mask": mask.bool()}, everywhere),
        ({**base, "attention_mask": mask.int()}, everywhere),
        ({**base, "attention_mask": mask.float()}, everywhere),
        ({**base, "attention_mask": mask, "position_ids": positions[None]}, everywhere),
        ({**base, "attention_mask": mask, "position_ids": positions.repeat(batch, 1)}, everywhere),
        ({**base, "attention_mask": mask, "token_type_ids": models.ids(batch, seqlen, high=2)}, everywhere),
        ({"inputs_embeds": embeds, "attention_mask": mask}, everywhere),
        ({"inputs_embeds": embeds}, None),
        ({"input_ids": models.ids(1, 1)}, None),
    ]
    fused = compare(models.seeded(), torch.float32, calls, padding)
    assert sum(fused_counts(fused).values()) == len(calls)


def test_packed_returns_zeros_at_padding() -> None:
    model = fastbert.fuse(models.seeded(), padding="packed")
    mask = models.masks(5, 17)["right"]
    hidden = outputs(model, input_ids=models.ids(5, 17), attention_mask=mask)["last_hidden_state"]
    assert torch.equal(hidden[mask == 0], torch.zeros_like(hidden[mask == 0]))
    assert hidden[mask == 1].abs().min(dim=1).values.gt(0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flattened_call_isolates_sequences(dtype: torch.dtype) -> None:
    lengths = [5, 1, 37, 12]
    fused, stock, truth = models.three(models.seeded(), dtype)
    fastbert.fuse(fused)
    call = models.ragged(lengths)
    hidden = outputs(fused, **call)["last_hidden_state"][0]
    alone = [
        torch.cat([outputs(m, input_ids=part)["last_hidden_state"][0] for part in call["input_ids"].split(lengths, 1)])
        for m in (stock, truth)
    ]
    assert_within_policy(hidden, *alone)
    assert fused_counts(fused) == {"packed": 1}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_flattened_call_isolates_sequences_where_it_runs_stock(implementation: str) -> None:
    lengths = [5, 1, 37, 12]
    model = models.seeded(attn_implementation=implementation)
    call = models.ragged(lengths)
    alone = [outputs(model, input_ids=part)["last_hidden_state"][0] for part in call["input_ids"].split(lengths, 1)]
    fused = fastbert.fuse(model)
    with torch.enable_grad():
        hidden = fused(**call).last_hidden_state[0]
    assert hidden.requires_grad
    torch.testing.assert_close(hidden.detach(), torch.cat(alone))


def test_hidden_states_equal_stocks_in_number_shape_and_value() -> None:
    model = models.seeded(num_hidden_layers=3)
    mask = models.masks(5, 17)["left"]
    fused, stock, truth = models.three(model, torch.float32)
    fastbert.fuse(fused)
    call = {"input_ids": models.ids(5, 17), "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        a, b, c = (m(**call) for m in (fused, stock, truth))
    assert len(a.hidden_states) == 4
    for i, values in enumerate(zip(a.hidden_states, b.hidden_states, c.hidden_states, strict=True)):
        assert_within_policy(*values, what=f"hidden state {i}")
    assert torch.equal(a.hidden_states[-1], a.last_hidden_state)


def test_auto_is_exact_where_a_head_reads_padding() -> None:
    """A pooler over a masked position, and losses taken over padding, make "auto" compute the padding."""
    batch, seqlen = 5, 19
    left, right = models.masks(batch, seqlen)["left"], models.masks(batch, seqlen)["right"]
    tokens = models.ids(batch, seqlen)
    labels = models.ids(batch, seqlen, high=30)
    spans = {"start_positions": models.ids(batch, high=seqlen), "end_positions": models.ids(batch, high=seqlen)}
    cases = [
        (hf.BertForSequenceClassification, {"attention_mask": left}, "dense"),
        (hf.BertForQuestionAnswering, {"attention_mask": right, **spans}, "dense"),
        (hf.BertForQuestionAnswering, {"attention_mask": right}, "packed"),
        (hf.BertForTokenClassification, {"attention_mask": right, "labels": labels}, "dense"),
        (hf.BertForTokenClassification, {"attention_mask": right, "labels": labels.where(right == 1, -100)}, "packed"),
        (hf.BertForMaskedLM, {"attention_mask": right, "labels": labels}, "dense"),
        (hf.BertForPreTraining, {"attention_mask": left, "labels": labels}, "dense"),
        (hf.BertLMHeadModel, {"attention_mask": left, "labels": labels.where(left == 1, -100)}, "dense"),
    ]
    for kind, arguments, layout in cases:
        model = models.seeded(kind)
        stock = outputs(model, input_ids=tokens, **arguments)
        fused = fastbert.fuse(model)
        result = outputs(fused, input_ids=tokens, **arguments)
        assert fused_counts(fused) == {layout: 1}, kind.__name__
        if "loss" in stock:
            torch.testing.assert_close(result["loss"], stock["loss"])
        if layout == "dense":
            torch.testing.assert_close(result[list(stock)[-1]], stock[list(stock)[-1]])


def test_positional_labels_are_seen() -> None:
    model = fastbert.fuse(models.seeded(hf.BertForTokenClassification))
    mask = models.masks(5, 19)["right"]
    with torch.no_grad():
        model(models.ids(5, 19), mask, None, None, None, models.ids(5, 19, high=30))
    assert fused_counts(model) == {"dense": 1}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("padding", "dtype"), [("packed", torch.float16), ("dense", torch.float32)], ids=str)
def test_triton_in_the_interpreter(dtype: torch.dtype, padding: str) -> None:
    """The whole encoder through the Triton kernels."""
    model = models.seeded(hidden_size=64, num_attention_heads=2, intermediate_size=96)
    calls = padded_calls(3, 11, everywhere=padding == "dense")[2::3]  # padded on the right, and an empty one
    fused = compare(model, dtype, calls, padding)
    assert sum(fused_counts(fused).values()) == len(calls)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["packed", "dense"])
def test_on_a_gpu(dtype: torch.dtype, padding: str) -> None:
    model = models.seeded(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=4).cuda()
    calls = [
        (
            {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()},
            None if real is None else real.cuda(),
        )
        for call, real in padded_calls(9, 129, everywhere=padding == "dense")
    ]
    compare(model, dtype, calls, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    """There a LayerNorm returns float32, whatever the parameters are, and so does the encoder."""
    fused, stock, truth = models.three(models.seeded().cuda(), dtype)
    fastbert.fuse(fused)
    mask = models.masks(5, 19)["right"].cuda()
    call, real = {"input_ids": models.ids(5, 19).cuda(), "attention_mask": mask}, mask.bool()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        results = [m(**call).last_hidden_state[real] for m in (fused, stock)]
    with torch.no_grad():
        assert results[0].dtype == results[1].dtype == torch.float32
        assert_within_policy(*results, truth(**call).last_hidden_state[real])
    assert sum(fused_counts(fused).values()) == 1


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the name of every operator called from here on; each operator is one launch."""
    names: list[str] = []
    for name, function in list(ops.CPU_BACKEND.items()):
        monkeypatch.setitem(ops.CPU_BACKEND, name, lambda *a, _n=name, _f=function: (names.append(_n), _f(*a))[1])
    return names


def test_seven_operators_a_layer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded(num_hidden_layers=1))
    names = launches(monkeypatch)
    seen: list[str] = []

    class Record(TorchDispatchMode):
        knows_fastbert = True

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not function.is_view:
                seen.append(str(function))
            return function(*args, **(kwargs or {}))

    hidden, layout = torch.randn(1, 40, 128), packing.Packing(1, 40, 40)
    with torch.no_grad(), Record():
        model.encoder.layer[0](hidden, context=Context(layout))
    assert names == ["qkv_linear", "attention", "linear_add", "layer_norm", "linear_gelu", "linear_add", "layer_norm"]
    assert seen == [f"fastbert.{name}.default" for name in names]


def test_inference_frees_what_it_no_longer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the feed-forward, where memory peaks, Q, K, V and what attention returned are gone."""
    model = fastbert.fuse(models.seeded(num_hidden_layers=1))
    results: dict[str, StorageWeakRef] = {}
    gone: dict[str, bool] = {}
    for name in ("qkv_linear", "attention", "linear_gelu"):

        def backend(*args: Any, _name: str = name, _run: Any = ops.CPU_BACKEND[name]) -> Any:
            if _name == "linear_gelu":
                gone.update({name: result.expired() for name, result in results.items()})
            result = _run(*args)
            results[_name] = StorageWeakRef(result.untyped_storage())
            return result

        monkeypatch.setitem(ops.CPU_BACKEND, name, backend)
    with torch.no_grad():
        model(**models.ragged([5, 3]))
    assert gone == {"qkv_linear": True, "attention": True}


@pytest.mark.usefixtures("interpreted")
def test_every_operator_is_one_triton_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    model = fastbert.fuse(
        models.seeded(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32)
    )
    with torch.no_grad():
        model.encoder.layer[0](torch.randn(1, 5, 32), context=Context(packing.Packing(1, 5, 5)))
    assert len(launched) == 7


@pytest.mark.parametrize(
    ("padding", "kind", "expected"),
    [("packed", "right", 1), ("auto", "left", 1), ("dense", "right", 0), ("auto", "none", 0), ("packed", "none", 0)],
)
def test_host_synchronisations(monkeypatch: pytest.MonkeyPatch, padding: str, kind: str, expected: int) -> None:
    """Only `host_integers` reads from the device; a CPU is asked for more, which is left out here."""
    model = fastbert.fuse(models.seeded(hf.BertForTokenClassification), padding=padding)
    calls: list[int] = []
    real = packing.host_integers
    monkeypatch.setattr(packing, "host_integers", lambda values: (calls.append(len(values)), real(values))[1])
    monkeypatch.setattr(checks, "_check_ids", lambda *args: None)
    monkeypatch.setattr(plan, "_is_seen_to_be_full", lambda mask: False)
    reads = []

    class Reads(TorchDispatchMode):
        knows_fastbert = True

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
                reads.append(str(function))
            return function(*args, **(kwargs or {}))

    # The reference twins may read what they like: on a GPU it is the kernels that run.
    for name in ops.CPU_BACKEND.keys() - {"mask_layout"}:
        fake = ops.OPERATORS[name].fake
        monkeypatch.setitem(ops.CPU_BACKEND, name, lambda *args, _f=fake: _f(*args).zero_())
    with torch.no_grad(), Reads():
        model(input_ids=models.ids(5, 19), attention_mask=models.masks(5, 19)[kind])
    assert len(calls) == expected
    assert reads == []


@pytest.mark.gpu
def test_host_synchronisations_on_a_gpu() -> None:
    tokens, mask = models.ids(5, 19).cuda(), models.masks(5, 19)["right"].cuda()
    model = models.seeded(hf.BertForTokenClassification).cuda()
    for padding, arguments, allowed in (
        ("dense", {"attention_mask": mask}, 0),
        ("auto", {}, 0),
        ("packed", {"attention_mask": mask}, 1),
    ):
        fastbert.fuse(model, padding=padding)
        with torch.no_grad():
            model(tokens, **arguments)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with (
                    pytest.warns(UserWarning, match="synchronizing") if allowed else contextlib.nullcontext() as caught
                ):
                    if not allowed:
                        torch.cuda.set_sync_debug_mode("error")
                    model(tokens, **arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if allowed:
            assert len([w for w in caught if "synchronizing" in str(w.message)]) == allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_inference_is_batch_invariant(dtype: torch.dtype) -> None:
    """On a GPU a sequence's output is bitwise the same alone and in any batch."""
    model = fastbert.fuse(models.seeded(hidden_size=256, num_attention_heads=4).cuda().to(dtype), padding="packed")
    mask = models.masks(33, 129)["right"].cuda()
    tokens = models.ids(33, 129).cuda()
    together = outputs(model, input_ids=tokens, attention_mask=mask)["last_hidden_state"]
    for i in range(0, 33, 4):
        n = int(mask[i].sum())
        alone = outputs(model, input_ids=tokens[i : i + 1, :n])["last_hidden_state"]
        assert torch.equal(alone[0], together[i, :n])


@pytest.mark.usefixtures("interpreted")
def test_packed_inference_is_batch_invariant_in_the_interpreter() -> None:
    """Here only for the first sequence of a batch: NumPy's matmuls depend on where in a tile a row stands."""
    model = fastbert.fuse(models.seeded(hidden_size=64, num_attention_heads=2, intermediate_size=96), padding="packed")
    mask = models.masks(4, 37)["right"]
    tokens = models.ids(4, 37)
    n = int(mask[0].sum())
    alone = outputs(model, input_ids=tokens[:1, :n])["last_hidden_state"]
    for batch in (2, 4):
        together = outputs(model, input_ids=tokens[:batch], attention_mask=mask[:batch])["last_hidden_state"]
        assert torch.equal(alone[0], together[0, :n])
