"""The torch.library operators: registered soundly, differentiated rightly, refused where they have no backward, routed
to the right backend."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert import ops
from fastbert.kernels import cpu

FP8 = ("quantize_fp8", "layer_norm_fp8", "attention_fp8", "linear_fp8", "linear_gelu_fp8", "linear_add_fp8")
INT8 = (
    *("quantize_int8", "layer_norm_int8"),
    *("linear_int8", "linear_gelu_int8", "linear_gelu_quantize_int8", "linear_add_int8"),
)
WITHOUT_NUMBERS = ("mask_layout", "attention_tiles")  # of real kind: nothing to differentiate
MAPS = ("attention_map", "disentangled_attention_map")
INFERENCE_ONLY = (
    *("linear_gelu", "linear_gated", "linear_add", "attention", "layer_norm", "rms_norm"),
    *(*MAPS, *FP8, *INT8),
)


def arguments(
    dtype: torch.dtype = torch.float32, device: str = "cpu", dropout: float = 0.3, head_dim: int = 16
) -> dict[str, tuple[Any, ...]]:
    """One sound call of every operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def integers(high: int, n: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=generator).to(device)

    wide, wider = 2 * head_dim, 3 * head_dim
    x, weight, bias = normal(9, wide), normal(wider, wide), normal(wider)
    qkv = normal(9, 3, 2, head_dim)
    sequences = (torch.tensor([0, 4, 9], dtype=torch.int32, device=device), None, 5, 0.25)
    norm = (normal(wide), normal(wide), 1e-12)
    drop = (dropout, torch.tensor([7], device=device) if dropout else None)
    ids = (integers(10, 9), integers(2, 9), torch.arange(9, device=device))
    tables = (normal(11, wide), normal(2, wide), normal(9, wide))
    tiles = ops.attention_tiles(sequences[0], 9)
    added = tiles, normal(2, 11).to(torch.promote_types(dtype, torch.float32))  # a bias with room for 6 tokens
    attended = ops.attention_forward(qkv, *sequences, *drop, *added)
    positions = (
        normal(8, 2, head_dim),
        normal(8, 2, head_dim),
        (torch.arange(-5, 6, device=device) + 4).clamp(0, 7).int(),
    )
    disentangled = ops.disentangled_attention(qkv, *positions, *sequences, *drop, tiles)
    places = torch.tensor([0, 2, 3, 5, 2, 3, 4, 5, 6], device=device)
    losses = (x, weight, bias, integers(wider, 9))
    fp8 = (*ops.quantize_fp8(x, None), *ops.quantize_fp8(weight, None), bias)
    values = (weight.float() * 40).round().clamp(-64, 64).to(torch.int8)
    int8 = (*ops.quantize_int8(x, None), values, norm[0].new_full((wider,), 1 / 40, dtype=torch.float32))
    int8 += (values.sum(1, dtype=torch.int32), bias)
    rows = (torch.tensor([0, 3, 8], device=device), torch.tensor([0, -1, -1, 1, -1, -1, -1, -1, 2], device=device))
    return {
        "linear": (x, weight, bias),
        "linear_gelu": (x, weight, bias, "tanh"),
        "linear_gated": (x, weight, bias, normal(wider, wide), None, "silu"),
        "linear_add": (x, weight, None, normal(9, wider)),
        "qkv_linear": (x, weight, bias, weight.clone(), None, weight.clone(), bias.clone()),
        "feed_forward": (x, weight, bias, normal(wide, wider), normal(wide), "none"),
        "gated_feed_forward": (x, weight, bias, normal(wider, wide), None, normal(wide, wider), normal(wide), "silu"),
        "linear_gated_backward": (normal(9, wide), normal(wide, wider), normal(9, 2 * wider), "gelu"),
        "linear_gelu_backward": (normal(9, wide), normal(wide, wider), normal(9, wider), "tanh"),
        "attention": (*qkv.unbind(1), *sequences, None, tiles),
        "attention_tiles": (sequences[0], 9),
        "attention_map": (*qkv.unbind(1)[:2], *sequences, places, 7, *reversed(added)),
        "attention_forward": (qkv, *sequences, *drop, *added),
        "attention_backward": (normal(9, 2, head_dim), qkv, *attended, *sequences, *drop, *added),
        "disentangled_attention": (qkv, *positions, *sequences, *drop, tiles),
        "disentangled_attention_map": (qkv, *positions, *sequences, places, 7, tiles),
        "disentangled_attention_backward": (
            *(normal(9, 2, head_dim), qkv, *positions, *disentangled),
            *(*sequences, *drop, tiles),
        ),
        "rotate": (qkv, normal(9, head_dim), normal(9, head_dim)),
        "layer_norm": (x, *norm),
        "rms_norm": (x, norm[0], norm[2]),
        "add_layer_norm": (x, normal(9, wide), *norm, *drop),
        "add_layer_norm_backward": (normal(9, wide), x, normal(9, wide), norm[0], norm[2], *drop),
        "embedding_layer_norm": (*ids, *tables, *norm, 10, 9),  # rows of padding that do not occur
        "embedding_layer_norm_backward": (normal(9, wide), *ids, *tables, norm[0], norm[2]),
        "linear_cross_entropy": losses,
        "linear_cross_entropy_backward": (normal(9).float(), *losses, ops.linear_cross_entropy(*losses)[1]),
        "quantize_fp8": (x, None),
        "layer_norm_fp8": (x, *norm, 0.25),
        "attention_fp8": (*qkv.unbind(1), *sequences, None, tiles, 0.25),
        "linear_fp8": (*fp8, dtype),
        "linear_gelu_fp8": (*fp8, dtype, "tanh", 0.25),
        "linear_add_fp8": (fp8[0], None, *fp8[2:], normal(9, wider)),
        "quantize_int8": (x, None),
        "layer_norm_int8": (x, *norm, norm[0].float()),
        "linear_int8": (*int8, dtype),
        "linear_gelu_int8": (*int8, dtype, "tanh"),
        "linear_gelu_quantize_int8": (*int8, dtype, "tanh", normal(wider).float()),
        "linear_add_int8": (*int8, normal(9, wider)),
        "mask_layout": (torch.ones(3, 3, dtype=torch.bool, device=device).tril(), integers(9, 9).view(3, 3) - 100),
        "pack": (x, *rows),
        "unpack": (normal(3, wide), *rows),
    }


def check_operator(name: str, args: tuple[Any, ...]) -> None:
    """torch's own checks; the one of the schema compares arguments in ways that FP8 numbers have no code for."""
    utilities: tuple[str, ...] = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    if args[0].dtype == torch.float8_e4m3fn:
        utilities = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fastbert, name).default, args, test_utils=utilities)


def differentiable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call, of leaves that need gradients."""
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def test_every_operator_is_covered() -> None:
    assert set(arguments()) == set(ops.OPERATORS)
    assert all(callable(getattr(ops, name)) for name in ops.OPERATORS)
    no_backward = {*WITHOUT_NUMBERS, *INFERENCE_ONLY, *(name for name in ops.OPERATORS if name.endswith("_backward"))}
    assert set(ops.OPERATORS) - no_backward == ops.DIFFERENTIABLE


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=() if i % 2 == j else pytest.mark.slow)
        for i, name in enumerate(sorted(ops.OPERATORS, key=lambda name: (name in ops.DIFFERENTIABLE, name)))
        for j, dtype in enumerate((torch.float32, torch.bfloat16))  # in turn
    ],
)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    args = arguments(dtype)[name]
    check_operator(name, args)
    if name in ops.DIFFERENTIABLE:
        check_operator(name, differentiable(args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, "cuda")[name]
    check_operator(name, args)
    if name in ops.DIFFERENTIABLE:
        check_operator(name, differentiable(args))


DROPPING = ("add_layer_norm", "attention_forward", "disentangled_attention")


@pytest.mark.parametrize(
    ("name", "dropout"), [*((name, 0.0) for name in sorted(ops.DIFFERENTIABLE)), *((name, 0.3) for name in DROPPING)]
)
def test_gradcheck(name: str, dropout: float) -> None:
    """Every gradient in float64 against finite differences; with dropout, of the elements the seed chose."""
    args = differentiable(arguments(torch.float64, dropout=dropout, head_dim=4)[name])
    assert torch.autograd.gradcheck(getattr(ops, name), args)


@pytest.mark.parametrize("wanted", [None, False])
def test_attention_in_training_with_a_bias_that_needs_no_gradient(wanted: bool | None) -> None:
    """Or without one: its gradient is not computed, and comes back empty."""
    calls = {name: arguments()[name] for name in ("attention_forward", "attention_backward")}
    if wanted is None:
        calls = {name: args[:-1] for name, args in calls.items()}
    else:
        calls["attention_backward"] += (wanted,)
    for name, args in calls.items():
        check_operator(name, args)
    assert ops.attention_backward(*calls["attention_backward"])[1].shape == (0,)
    qkv, *rest = calls["attention_forward"]
    seen = []

    class Record(TorchDispatchMode):
        knows_fastbert = True

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.fastbert.attention_backward.default:
                seen.append(result)
            return result

    out, _ = ops.attention_forward(qkv.requires_grad_(), *rest)
    with Record():
        (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(seen[0][0], dqkv) and seen[0][1].shape == (0,)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_of_attention_in_a_batch(wanted: bool, legacy: bool) -> None:
    """Those of its bias too, or not of it, each as on its own."""
    qkv, *rest, bias = differentiable(arguments()["attention_forward"])
    leaves = [qkv, bias.requires_grad_(wanted)][: 1 + wanted]
    out, _ = ops.attention_forward(qkv, *rest, bias)
    vectors = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0))

    def one(vector: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, vector, retain_graph=True)

    if legacy:
        found = torch.autograd.grad(out, leaves, vectors, is_grads_batched=True, retain_graph=True)
    else:
        found = torch.func.vmap(one)(vectors)
    expected = tuple(map(torch.stack, zip(*map(one, vectors), strict=True)))
    assert len(found) == len(leaves) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_dense_attention(masked: bool) -> None:
    qkv = torch.randn(12, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]) if masked else None
    for drop in ((0.0, None), (0.3, torch.tensor([7]))):
        assert torch.autograd.gradcheck(lambda x, d=drop: ops.attention_forward(x, None, mask, 4, 0.25, *d)[0], (qkv,))
        bias = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, b, d=drop: ops.attention_forward(x, None, mask, 4, 0.25, *d, None, b)[0], (qkv, bias)
        )


def test_dropout_drops_at_its_rate_and_scales_the_rest() -> None:
    ones, zeros, weight = torch.ones(400, 500), torch.zeros(400, 500), torch.ones(500)
    for rate in (0.1, 0.5):
        # The gradient of x through dropout alone is the mask: here, that of a sum before LayerNorm's.
        _, dresidual, _, _ = ops.add_layer_norm_backward(
            torch.randn(400, 500), ones, torch.randn(400, 500), weight, 1e-12, rate, torch.tensor([3])
        )
        dx = ops.add_layer_norm_backward(
            torch.randn(400, 500, generator=torch.Generator().manual_seed(0)),
            ones,
            zeros + torch.randn(400, 500, generator=torch.Generator().manual_seed(1)),
            weight,
            1e-12,
            rate,
            torch.tensor([3]),
        )
        ratio = dx[0] / dx[1]
        kept = ratio != 0
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - rate)))
        # 200,000 draws: four standard deviations.
        assert abs(kept.double().mean().item() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / kept.numel())
        assert dresidual.ne(0).all()


def test_attention_dropout_drops_at_its_rate_and_scales_the_rest() -> None:
    """Values that pick out the probabilities: uniform ones, of 1 / 64 each."""
    length, rate = 64, 0.25
    qkv = torch.zeros(2 * length, 3, 8, length)
    qkv[:, 2] = torch.eye(length).repeat(2, 1)[:, None]
    starts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    out, _ = ops.attention_forward(qkv, starts, None, length, 1.0, rate, torch.tensor([3]))
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - rate) / length))
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / kept.numel())
    first, second = kept.split(length)
    assert not torch.equal(first, second)
    assert not torch.equal(kept[:, 0], kept[:, 1])


@pytest.mark.parametrize("name", ["attention_forward", "add_layer_norm"])
def test_a_seed_says_what_is_dropped(name: str) -> None:
    args = arguments()[name][:5]  # what is before dropout in both

    def run(dropout: float, seed: int) -> Tensor:
        out = getattr(ops, name)(*args, dropout, torch.tensor([seed]))
        return out[0] if isinstance(out, tuple) else out

    state = torch.get_rng_state()
    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert torch.equal(torch.get_rng_state(), state)
    everything = run(1.0, 1)
    assert everything.isfinite().all()
    if name == "attention_forward":
        assert everything.eq(0).all()


@pytest.mark.parametrize("name", INFERENCE_ONLY)
def test_a_call_that_needs_gradients_is_refused(name: str) -> None:
    args = differentiable(arguments()[name])
    with pytest.raises(NotImplementedError, match=f"fastbert::{name} can't be differentiated"):
        getattr(ops, name)(*args)
    with torch.no_grad():
        assert not any(out.requires_grad for out in tree_leaves(getattr(ops, name)(*args)))


@pytest.mark.parametrize(
    "name", [n for n in sorted(ops.DIFFERENTIABLE) if f"{n.removesuffix('_forward')}_backward" in ops.OPERATORS]
)
def test_second_derivatives_are_refused(name: str) -> None:
    out = getattr(ops, name)(*(args := differentiable(arguments()[name])))
    out = out[0] if isinstance(out, tuple) else out
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(out.pow(2).sum(), inputs, create_graph=True)


def test_autocast_leaves_an_operator_alone() -> None:
    """Dtypes are chosen by who calls it; what it is made of must not be cast again."""
    for name, args in arguments(torch.bfloat16).items():
        expected = getattr(ops, name)(*args)
        with torch.autocast("cpu", torch.float16):
            torch.testing.assert_close(getattr(ops, name)(*args), expected, rtol=0, atol=0, equal_nan=True)


def test_cpu_tensors_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments()["linear"]
    monkeypatch.setitem(ops.CPU_BACKEND, "linear", lambda *args: torch.full((1,), 7.0))
    assert ops.linear(x, weight, bias).item() == 7


@pytest.mark.gpu
def test_operators_run_on_the_device_of_their_tensors() -> None:
    """Also where that is not the current device."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x, weight, bias = arguments(device=str(device))["linear"]
    torch.testing.assert_close(ops.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_plain_inference_goes_past_the_dispatcher_and_nothing_else_does() -> None:
    """The operator is what training, compilers and modes see; in plain inference its backend is called as it is."""
    dispatched = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            dispatched.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight, bias = arguments()["linear"]
    with torch.no_grad(), Record():
        ops.linear(x, weight, bias)
    assert dispatched == ["fastbert.linear.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.linear(x, weight, bias)
        with torch.inference_mode():
            ops.linear(x, weight, bias)
    names = [event.name for event in profile.events()]
    assert names.count("fastbert::linear") == 1
    assert names.count("aten::mm") == 2


def test_a_call_costs_one_frame_in_plain_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches wait for Python: between a layer and the CPU's code stands the operator, and asks the compiler."""
    frames: list[str] = []
    monkeypatch.setitem(ops.CPU_BACKEND, "linear", lambda *args: args[0])
    args = arguments()["linear"]
    with torch.inference_mode():
        sys.setprofile(lambda frame, event, _: frames.append(frame.f_code.co_name) if event == "call" else None)
        try:
            ops.linear(*args)
        finally:
            sys.setprofile(None)
    assert frames == ["call", "is_dynamo_compiling", "<lambda>"]


def test_an_operator_has_the_arguments_of_its_backends() -> None:
    for name in ops.OPERATORS:
        expected = list(inspect.signature(getattr(cpu, name)).parameters)
        assert list(inspect.signature(getattr(ops, name)).parameters) == expected, name
        assert [each.name for each in getattr(torch.ops.fastbert, name).default._schema.arguments] == expected, name
        assert getattr(ops, name).__doc__, name


def test_arguments_by_name() -> None:
    x, weight, bias = arguments()["linear"]
    with torch.no_grad():
        assert torch.equal(ops.linear(weight=weight, bias=bias, x=x), ops.linear(x, weight, bias))
