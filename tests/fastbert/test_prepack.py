"""Weights laid out once for a CPU's GEMMs: within policy, of weights as they are, and no part of the model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import fuse
from fastbert.kernels import cpu, cpu_prepacked
from fastbert.layers import layer
from fastbert.numerics import assert_within_policy, relative_error
from tests import models
from tests.fastbert import test_families as families
from tests.fastbert.test_fp8 import call, explained, run

WEIGHTS = sum(p.numel() for p in models.seeded().encoder.parameters() if p.dim() == 2)


def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights that are laid out from now on."""
    seen: list[Any] = []
    cpu_prepacked._mkl_works()  # lays one out, once
    right = cpu_prepacked.pack
    monkeypatch.setattr(cpu_prepacked, "width", lambda shape, dtype: shape[1])  # which lays some out to try
    monkeypatch.setattr(cpu_prepacked, "pack", lambda weight, width: seen.append(weight) or right(weight, width))
    return seen


@pytest.mark.parametrize("native", [True, False], ids=["native", "in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [16, 37, 129, 600])
def test_products(rows: int, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, beside those of weights that are not laid out; with and without a bias."""
    if not native:
        monkeypatch.setattr(cpu, "_has_native_matmul", lambda dtype: dtype.itemsize != 2)
    elif not cpu._has_native_matmul(dtype):
        pytest.skip(f"this CPU has no instructions for {dtype}")
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 96), (80, 96), (80,), (rows, 80))
    )
    packed = cpu_prepacked.pack(weight)
    assert packed.nbytes() == 80 * 96 * (4 if not native else dtype.itemsize)
    wide = [t.double() for t in (x, weight, bias, residual)]
    for b, wide_b in ((bias, wide[2]), (None, None)):
        for found, plain, truth in (
            (cpu_prepacked.linear(x, packed, b), cpu.linear(x, weight, b), cpu.linear(*wide[:2], wide_b)),
            (
                cpu_prepacked.linear_gelu(x, packed, b, "tanh"),
                cpu.linear_gelu(x, weight, b, "tanh"),
                cpu.linear_gelu(*wide[:2], wide_b, "tanh"),
            ),
            (
                cpu_prepacked.linear_add(x, packed, b, residual),
                cpu.linear_add(x, weight, b, residual),
                cpu.linear_add(*wide[:2], wide_b, wide[3]),
            ),
        ):
            assert found.dtype is dtype
            assert_within_policy(found, plain, truth)


def test_few_rows_are_multiplied_by_the_weights_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sums are more exact there in float32: oneMKL's are others below 16 rows."""
    made(monkeypatch)
    model, plain, products = fuse(models.seeded(), prepack=True), fuse(models.seeded()), []
    right = cpu_prepacked._product
    monkeypatch.setattr(cpu_prepacked, "_product", lambda *given: products.append(given) or right(*given))
    for rows in (1, 15, 16):
        given = {"input_ids": models.ids(1, rows)}
        found, expected = run(model, **given), run(plain, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, expected) or rows == 16
        assert sum(x.shape[0] == rows and x.shape[1] >= 128 for x, *_ in products) == (8 if rows == 16 else 0)
    empty = {"input_ids": models.ids(2, 9), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    for dtype in (torch.float32, torch.bfloat16):
        out, expected = run(model.to(dtype), **empty), run(plain.to(dtype), **empty)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["packed", "dense"])
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in families.TWINS])
def test_families(family: str, padding: Any, dtype: torch.dtype) -> None:
    """Whole models, with masks of every kind; nothing is left out."""
    name = families.adapter(family).base.__name__
    model, stock, truth = models.three(families.seeded(family, name), dtype)
    fuse(model, padding=padding, prepack=True)
    with torch.inference_mode():
        for given, real in families.calls(family, name):
            found, plain, wide = (families.outputs(m, given, real) for m in (model, stock, truth))
            models.assert_all_within_policy(found, plain, wide, name)
        (encoder,) = fastbert.explain(model).encoders
    layouts = set(encoder.fused_calls)
    assert layouts <= {"packed, prepacked", "dense, prepacked"} and not encoder.stock_calls
    assert encoder.precision == "prepacked" and not encoder.not_quantized


def test_writes_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, by an optimizer, another parameter, another tensor in a parameter, and past torch's versions."""
    seen = made(monkeypatch)
    model, plain = fuse(models.seeded(), prepack=True), fuse(models.seeded())

    def check(writes: int) -> None:
        seen.clear()
        for _ in range(2):
            out, expected = run(model), run(plain)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert len(seen) == writes

    def both(write: Any) -> None:
        with torch.no_grad():
            for m in (model, plain):
                write(m.encoder.layer[1])

    check(8)
    both(lambda layer: layer.output.dense.weight.mul_(1.5))
    check(4)  # those of a layer
    both(lambda layer: layer.attention.self.key.bias.add_(1.0))
    check(4)
    both(lambda layer: layer.output.dense.weight[3, 5].add_(2.0))  # one element, of which no sample tells
    check(4)
    both(lambda layer: layer.intermediate.dense.weight.data.mul_(0.5))
    check(4)
    both(lambda layer: layer.output.dense.weight.detach().numpy().__imul__(2.0))
    check(4)
    both(lambda layer: setattr(layer.output.dense, "weight", nn.Parameter(layer.output.dense.weight + 0.1)))
    check(4)
    both(lambda layer: setattr(layer.output.dense.weight, "data", layer.output.dense.weight.data - 0.2))
    check(4)
    for lay in (lambda weight: weight.t().contiguous().t(), lambda weight: torch.cat([weight, weight], 1)[:, :256]):
        both(lambda layer, lay=lay: setattr(layer.output.dense, "weight", nn.Parameter(lay(layer.output.dense.weight))))
        check(4)  # rows that don't lie one after the other
        both(lambda layer: layer.output.dense.weight.data.mul_(2.0))
        check(4)
    state = models.seeded(seed=3).state_dict()
    for m in (model, plain):
        m.load_state_dict(state)
    check(8)
    for m in (model, plain):  # a step of training leaves no version with torch's fused optimizers
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, fused=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            m(**call()).last_hidden_state.square().mean().backward()
        optimizer.step()
        m.eval()
    check(8)


def test_layers_that_are_taken_out_leave_nothing() -> None:
    model = fuse(models.seeded(), prepack=True)
    out, state = run(model), model.encoder.fastbert.precision
    whole, removed = model.encoder.layer, StorageWeakRef(model.encoder.layer[1].output.dense.weight.untyped_storage())
    model.encoder.layer = whole[:1]
    assert not torch.equal(run(model), out)
    assert state.memory() == 4 * WEIGHTS // 2
    model.encoder.layer = whole
    assert torch.equal(run(model), out)
    assert state.memory() == 4 * WEIGHTS
    model.encoder.layer, whole = whole[:1], None
    run(model)
    gc.collect()
    assert removed.expired()


@pytest.mark.parametrize("given", [{"prepack": True}, {"precision": "int8"}], ids=str)
def test_traced_by_make_fx(given: dict[str, Any]) -> None:
    """What is traced reads the weights themselves, not whether they were written to."""
    model, plain = fuse(models.seeded(), **given), fuse(models.seeded())
    with torch.no_grad():
        for _ in range(2):
            traced = make_fx(lambda ids: model(ids).last_hidden_state)(models.ids(2, 20))
            model(models.ids(2, 20))
        for m in (model, plain):
            m.encoder.layer[1].output.dense.weight.mul_(2.0)
        ids = models.ids(2, 20, seed=4)
        torch.testing.assert_close(traced(ids), plain(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_what_is_bound_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are looked up once, and again when something of them has changed."""
    looked: list[Any] = []
    right = layer.Layer.bind
    monkeypatch.setattr(layer.Layer, "bind", lambda *given: looked.append(given) or right(*given))
    model = fuse(models.seeded(), prepack=True)
    run(model)
    assert len(looked) == 4  # as they are found, and by weights that are laid out
    looked.clear()
    assert torch.equal(run(model), run(model))
    assert not looked
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    changed = models.seeded()
    changed.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    torch.testing.assert_close(run(model), run(fuse(changed)), rtol=1e-4, atol=1e-4)
    assert looked
    hook = model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, out: 2 * out)
    doubled = fuse(changed)
    doubled.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(run(model), run(doubled), rtol=1e-4, atol=1e-4)
    hook.remove()


def test_without_inference_it_is_the_model() -> None:
    model, plain = fuse(models.seeded(), prepack=True), fuse(models.seeded())
    given = call()
    out, expected = (m(**given).last_hidden_state for m in (model, plain))
    assert torch.equal(out, expected)
    out.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**given).last_hidden_state, plain(**given).last_hidden_state)
    (encoder,) = fastbert.explain(model.train()).encoders
    assert encoder.quantized == "off: gradients are enabled, or it is training, autocast or torch.compile"
    assert encoder.fused_calls == {"packed": 2}
    assert model.encoder.fastbert.precision.memory() == 0


def test_nothing_of_it_is_in_the_model(tmp_path: Path) -> None:
    model = models.seeded()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    out = run(fuse(model, prepack=True))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    model.save_pretrained(tmp_path)
    assert torch.equal(run(fuse(hf.BertModel.from_pretrained(tmp_path).eval(), prepack=True)), out)
    pickled = pickle.dumps(model)
    assert len(pickled) < len(pickle.dumps(fuse(models.seeded()))) + 1000
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
        assert other.encoder.fastbert.precision.memory() == 0
        assert torch.equal(run(other), out)
        assert other.encoder.fastbert.precision.memory() == 4 * WEIGHTS
    how = "weights in the order that they are read in (in float32 for 16 rows or more)"
    line = f"prepacked: 8 of 8 GEMMs, {how}; {4 * WEIGHTS / 1e6:,.1f} MB beside"
    assert line in explained(model)
    state = model.encoder.fastbert.precision
    model.to(torch.bfloat16)
    assert state.memory() == 0
    assert run(model).dtype is torch.bfloat16
    assert state.memory() == (2 if cpu._has_native_matmul(torch.bfloat16) else 4) * WEIGHTS
    fastbert.unfuse(model.float())
    real = call()["attention_mask"].bool()
    assert relative_error(run(model)[real], out[real].double()) < 0.01


def test_it_is_refused_before_anything_changes() -> None:
    model = models.seeded()
    with pytest.raises(TypeError, match=r"^prepack is 'yes'; expected True or False$"):
        fuse(model, prepack="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prepack is True with precision='int8', which keeps copies of its own"):
        fuse(model, precision="int8", prepack=True)
    assert type(model) is hf.BertModel


def test_where_nothing_can_be_laid_out_it_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on a CPU; without oneMKL; for adapters, and weights that leave no trace of writes."""
    plain = run(fuse(models.seeded()))
    model = fuse(models.seeded(), prepack=True)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_prepacked, "_mkl_works", lambda: False)
        assert torch.equal(run(model), plain)
        assert "layer 0 qkv: PyTorch has no oneMKL here" in explained(model)
    assert "0 of 8 GEMMs" not in explained(model)
    where = model.encoder.fastbert.precision.unsupported(torch.device("cuda:1"))
    assert where == "it is for CPUs, and the model is on cuda:1"
    with torch.inference_mode():
        made_there = fuse(models.seeded(), prepack=True)
    assert torch.equal(run(made_there), plain)
    assert "its weight was made under torch.inference_mode" in explained(made_there)
    dense, seen = model.encoder.layer[0].output.dense, made(monkeypatch)
    with torch.inference_mode():
        dense.bias = nn.Parameter(dense.bias.clone(), requires_grad=False)
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-4)
    assert "layer 0 down: its bias was made under torch.inference_mode" in explained(model)
    seen.clear()
    run(model)
    assert not seen  # in every call, it would take longer than without
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(models.seeded(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    twin = fuse(copy.deepcopy(adapted).eval())
    fuse(adapted.eval(), prepack=True)
    torch.testing.assert_close(run(adapted), run(twin), rtol=1e-4, atol=1e-4)
    assert "layer 0 qkv: a Linear" in explained(adapted)


def test_a_library_whose_layout_is_for_a_number_of_rows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_prepacked._product

    def wrong(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return right(x, weight, bias) * (2 if x.shape[0] > cpu_prepacked.ROWS else 1)

    assert cpu_prepacked._mkl_works.__wrapped__()
    monkeypatch.setattr(cpu_prepacked, "_product", wrong)
    assert not cpu_prepacked._mkl_works.__wrapped__()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_sums_are_as_exact_with_more_threads() -> None:
    """Where oneMKL shares out columns among them and sums up fewer at a time, so does what is laid out."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1024, 1024, generator=generator), torch.randn(64, 1024, generator=generator)
    truth = x.double() @ weight.double().t()
    for count in (1, 2):
        torch.set_num_threads(count)
        width = cpu_prepacked.width(weight.shape, torch.float32)
        assert width in (1024, 512, 192)
        found = cpu_prepacked.linear(x, cpu_prepacked.pack(weight, width), None)
        assert relative_error(found, truth) <= 1.1 * relative_error(x @ weight.t(), truth)


@pytest.mark.parametrize("exact", [0, 40, 64, 128], ids=lambda n: f"{n} columns")
def test_a_layout_is_as_wide_as_is_exact(exact: int) -> None:
    """By a product whose sums of more columns at a time are off."""

    def multiply(x: Tensor, weight: Tensor, width: int) -> Tensor:
        return x @ weight.t() * (1 + (width > exact) * 1e-5)

    width = cpu.exact_width(80, 128, (64, 40), (16, 33), multiply)
    assert width == (exact or None)


@pytest.mark.usefixtures("threads")
def test_each_number_of_threads_has_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, products = made(monkeypatch), []
    widths: dict[int, int | None] = {1: 512, 2: 48, 3: None}
    monkeypatch.setattr(cpu_prepacked, "width", lambda shape, dtype: widths[torch.get_num_threads()])
    right = cpu_prepacked._product
    monkeypatch.setattr(cpu_prepacked, "_product", lambda *given: products.append(given) or right(*given))
    model, plain = fuse(models.seeded(), prepack=True), fuse(models.seeded())
    parts = {1: {1}, 2: {3, 6}, 3: set()}  # of 128 columns and of 256
    for count in (1, 2, 3, 2, 1):
        seen.clear(), products.clear()
        torch.set_num_threads(count)
        torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-4)
        assert {len(weight.parts) for _, weight, _ in products} == parts[count]
    assert not seen  # the third time it is there
    for count, rows in ((2, cpu_prepacked.ROWS), (2, cpu_prepacked.ROWS + 64), (1, cpu_prepacked.ROWS + 64)):
        products.clear()
        torch.set_num_threads(count)
        many = {"input_ids": models.ids(rows // 64, 64)}
        torch.testing.assert_close(run(model, **many), run(plain, **many), rtol=1e-4, atol=1e-4)
        assert bool(products) == (count == 1 or rows <= cpu_prepacked.ROWS)  # many rows are not added up in parts
    assert model.encoder.fastbert.precision.memory() == 2 * 4 * WEIGHTS  # both layouts


def test_threads_share_what_is_laid_out() -> None:
    model = fuse(models.seeded(), prepack=True)
    expected, found = run(fuse(models.seeded())), []

    def work() -> None:
        for _ in range(20):
            found.append(run(model))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(out, found[0]) for out in found)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_kinds_of_calls() -> None:
    """Flattened, by embeddings, with hidden states, traced by torch.jit, under torch.compile's eager backend."""
    model, plain = fuse(models.seeded(), prepack=True), fuse(models.seeded())
    for given in (models.ragged([5, 1, 30]), {**call(), "output_hidden_states": True}, {"input_ids": models.ids(1, 7)}):
        with torch.inference_mode():
            out, expected = (m(**given) for m in (model, plain))
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
        for a, b in zip(out.hidden_states or (), expected.hidden_states or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ids = models.ids(1, 7)
        compiled = torch.compile(model, backend="eager")(ids).last_hidden_state
        torch.testing.assert_close(compiled, plain(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_verify_and_benchmarks_know_it() -> None:
    batch = {"input_ids": models.ids(9, 37), "attention_mask": models.masks(9, 37)["right"]}
    report = fastbert.verify(models.seeded(hf.BertForTokenClassification), batch, prepack=True)
    assert report.ok, str(report)
    assert report.ran == {"packed": {"packed, prepacked": 1}, "dense": {"dense, prepacked": 1}}
    assert not report.not_fused
