"""What goes wrong outside of the library: stock runs with one warning, or it is said what is wrong; nothing changes."""

from __future__ import annotations

import copy
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import fuse, ops
from fastbert.runtime import support
from fastbert.version import TRIED, warn_of_newer
from tests import fresh, models


def call() -> dict[str, torch.Tensor]:
    return {"input_ids": models.ids(5, 17), "attention_mask": models.masks(5, 17)["right"]}


def last(model: Any, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**(arguments or call()))[0]


def state(model: Any) -> list[Any]:
    """All that fuse may change, of every module."""
    return [
        (
            type(m),
            sorted(m.__dict__),
            list(m._forward_pre_hooks.values()),
            [key in m._forward_pre_hooks_with_kwargs for key in m._forward_pre_hooks],
            len(m._forward_pre_hooks_with_kwargs),
        )
        for m in model.modules()
    ]


# The machine isn't one for the kernels.


class Sample:
    """A parameter on a GPU, as far as `needs_stock` looks."""

    device, dtype = torch.device("cuda:0"), torch.float16


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """Asks why a parameter on a GPU of compute capability 8.0 would run stock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    support._gpu_is_unsuitable.cache_clear()
    yield lambda: support.needs_stock(Sample())  # type: ignore[arg-type]
    support._gpu_is_unsuitable.cache_clear()


def test_a_gpu_for_the_kernels(on_a_gpu: Callable[[], str | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_a_gpu() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setitem(sys.modules, "triton", None), "triton is not installed"),
        (lambda patch: patch.setattr("triton.__version__", "3.5.1"), "triton 3.5.1 is older than 3.6"),
        (
            lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5)),
            "a GPU of compute capability 7.5; the kernels take 8.0 or newer",
        ),
    ],
    ids=["no triton", "an old triton", "a GPU without bfloat16"],
)
def test_a_machine_not_for_the_kernels_runs_stock_with_one_warning(
    change: Any, reason: str, on_a_gpu: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [on_a_gpu(), on_a_gpu()] == [reason, reason]
    assert [str(warning.message) for warning in told] == [f"fastbert runs the stock code on cuda:0: {reason}"]


def test_a_triton_that_is_broken(on_a_gpu: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(support.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning):
        assert on_a_gpu() == "triton can't be imported: libtriton.so: undefined symbol"


def test_whether_a_gpu_is_suitable_is_a_constant_to_the_compiler() -> None:
    """Which neither sees into the import nor breaks the graph."""
    support._gpu_is_unsuitable.cache_clear()

    def one_if_it_is(x: torch.Tensor) -> torch.Tensor:
        return x + (support.gpu_is_unsuitable(0) is None)

    assert torch.compile(one_if_it_is, fullgraph=True, backend="eager")(torch.zeros(())) == 1


def test_the_switch_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every head, whose losses are stock's, too: no operator of the library runs."""
    ran = []
    for name, run in ops.CPU_BACKEND.items():
        monkeypatch.setitem(ops.CPU_BACKEND, name, lambda *a, _n=name, _r=run: (ran.append(_n), _r(*a))[1])
    for kind in models.HEADS:
        stock = models.seeded(kind)
        fused = fastbert.fuse(copy.deepcopy(stock), loss_only=True)
        monkeypatch.setenv("FASTBERT_DISABLE", "1")
        arguments = {**call(), "labels": models.ids(5, 17)} if kind is hf.BertForMaskedLM else call()
        if kind is hf.BertForMultipleChoice:
            arguments = {name: value[None] for name, value in arguments.items()}
        with torch.no_grad():
            for found, expected in zip(fused(**arguments).values(), stock(**arguments).values(), strict=True):
                assert torch.equal(found, expected), kind
        assert ran == [], kind
        monkeypatch.setenv("FASTBERT_DISABLE", "0")
        last(fused, **arguments)
        assert ran != [], kind
        ran.clear()


# A kernel doesn't compile, memory runs out.


def wrong(x_ptr, n):  # a kernel that names what there is not
    undefined(x_ptr, n)  # noqa: F821


def test_a_kernel_that_does_not_compile_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    def compiles(x: torch.Tensor, *rest: Any) -> None:
        source = ASTSource(JITFunction(wrong), {"x_ptr": "*fp32", "n": "i32"})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))

    monkeypatch.setattr(ops.registry, "kernel", lambda name: compiles)
    with pytest.raises(RuntimeError) as raised:
        ops.registry.run_kernel("linear", [torch.zeros(2, 2)])
    told = str(raised.value)
    assert told.startswith("the kernel of fastbert::linear could not be compiled for cpu (torch.float32): ")
    assert "undefined is not defined" in told
    assert "FASTBERT_DISABLE=1" in told
    assert isinstance(raised.value.__cause__, triton.CompilationError)


def test_an_error_of_a_launcher_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> None:
        raise ValueError("x has shape (1, 2)")

    monkeypatch.setattr(ops.registry, "kernel", lambda name: refuses)
    with pytest.raises(ValueError, match=r"^x has shape \(1, 2\)$"):
        ops.registry.run_kernel("linear", [torch.zeros(2, 2)])


@pytest.mark.gpu
def test_a_kernel_that_does_not_compile_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    broken = triton.jit(wrong)
    monkeypatch.setattr(ops.registry, "kernel", lambda name: lambda x, *rest: broken[(1,)](x, 3))
    model = fastbert.fuse(models.seeded().half().cuda())
    with pytest.raises(RuntimeError, match=r"could not be compiled for cuda:0 \(torch.float16\).*FASTBERT_DISABLE=1"):
        last(model, **{name: value.cuda() for name, value in call().items()})


@pytest.mark.parametrize(
    ("error", "trains"),
    [(torch.OutOfMemoryError("CUDA out of memory"), True), (KeyboardInterrupt(), False)],
    ids=["out of memory", "interrupted"],
)
def test_a_forward_that_breaks_off_leaves_the_model_whole(
    error: BaseException, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its operators: the error is the one raised, and the next call gives what it gave before."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = fastbert.fuse(models.seeded(num_hidden_layers=1, **rates).train(trains))
    before, weights = last(model), {name: value.clone() for name, value in model.state_dict().items()}
    left = [0]
    for name, run in ops.CPU_BACKEND.items():

        def breaks_off(*args: Any, _run: Any = run) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise error
            return _run(*args)

        monkeypatch.setitem(ops.CPU_BACKEND, name, breaks_off)
    for at in range(1, 100):
        left[0] = at
        try:
            model(**call())[0].sum().backward()
            break
        except type(error):
            model.zero_grad()
        left[0] = 0
        assert torch.equal(last(model), before)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert at > 8  # every operator of a layer has been the one


# fuse breaks off.


def run_lines(what: Any, stop: int | None = None) -> list[int]:
    """Calls `what`, interrupted where the `stop`th line of fuse.py is to run; the lines it ran."""
    lines: list[int] = []

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != fuse.__code__.co_filename:
            return None
        if event == "line":
            if len(lines) == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
            lines.append(frame.f_lineno)
        return watch

    tracer = sys.gettrace()
    sys.settrace(watch)
    try:
        what()
    finally:
        sys.settrace(tracer)
    return lines


@pytest.mark.parametrize("what", [fastbert.fuse, fastbert.unfuse])
def test_fuse_and_unfuse_are_atomic(what: Any) -> None:
    """Interrupted at the first or the last run of any of their lines, the model is as it was or done, and answers."""
    arguments = {"loss_only": True} if what is fastbert.fuse else {}
    start = models.seeded(hf.BertForMaskedLM, num_hidden_layers=1)
    if what is fastbert.unfuse:
        fastbert.fuse(start, loss_only=True)
    start.register_forward_pre_hook(shown)  # one of the user's, which stays
    done = copy.deepcopy(start)
    lines = run_lines(lambda: what(done, **arguments))
    expected = last(done)
    stops = {lines.index(line) for line in lines} | {len(lines) - 1 - lines[::-1].index(line) for line in lines}
    whole = 0
    for stop in sorted(stops):
        model = copy.deepcopy(start)
        with pytest.raises(KeyboardInterrupt):
            run_lines(lambda model=model: what(model, **arguments), stop)
        found = state(model)
        assert found in (state(start), state(done)), lines[stop]
        whole += found == state(done)
        if stop % 7 == 0:
            assert torch.equal(last(what(model, **arguments)), expected)
    assert len(stops) > 25
    assert whole < len(stops) / 4


def shown(*args: Any) -> None:
    """A hook."""


def test_a_model_that_is_fused_stays_so_where_fusing_again_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.fuse(models.seeded(hf.BertForMaskedLM), padding="dense")
    last(model)
    before = state(model), fastbert.explain(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(sys.modules["fastbert.fuse"], "_add_hook", fails)
    with pytest.raises(MemoryError):
        fastbert.fuse(model, padding="packed")
    assert (state(model), fastbert.explain(model)) == before


# Processes, threads, signals.


def test_threads_fuse_models_of_their_own() -> None:
    stock = models.seeded()
    copies = [copy.deepcopy(stock) for _ in range(8)]
    expected = last(fastbert.fuse(copy.deepcopy(stock)))
    found: list[Any] = [None] * len(copies)

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = last(fastbert.fuse(fastbert.unfuse(fastbert.fuse(copies[i]))))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(copies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found)


FORK = """
import os, signal, sys, torch
import fastbert
from fastbert.runtime import settings
from tests import models
torch.set_num_threads(1)  # as a DataLoader's workers have it; OpenMP's own threads don't outlive a fork
model = fastbert.fuse(models.seeded())
ids = models.ids(3, 9)
with torch.no_grad():
    expected = model(ids)[0]
    settings._COUNTING.acquire()  # another thread is counting a call as this one forks
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(model(ids)[0], expected) else 1)
    settings._COUNTING.release()
    assert os.waitpid(child, 0)[1] == 0, "the child hung or was wrong"
    assert torch.equal(model(ids)[0], expected)
"""


def test_a_fork_goes_on_with_the_model() -> None:
    run_python(FORK)


def run_python(code: str) -> None:
    done = fresh.run("-c", code)
    assert done.returncode == 0, done.stderr


NEWER_TRANSFORMERS = """
import warnings
from transformers.models.bert import modeling_bert
from transformers.models.electra import modeling_electra
import transformers  # which makes itself anew as its models are first imported
transformers.__version__ = "5.99.0.dev0"
del modeling_electra.ElectraLayer  # as a release that renamed it
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastbert
    import fastbert.runtime.encoder
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = modeling_bert.BertModel(transformers.BertConfig(**sizes))
    for _ in range(2):
        fastbert.fuse(bert)
        fastbert.unfuse(bert)
    fastbert.fuse(bert)
    bert(input_ids=modeling_bert.torch.ones(1, 2, dtype=modeling_bert.torch.int64))
    assert "ran fused" in str(fastbert.explain(bert)), fastbert.explain(bert)
    electra = modeling_electra.ElectraPreTrainedModel(transformers.ElectraConfig(**sizes, embedding_size=16))
    try:
        fastbert.fuse(electra)
    except fastbert.UnsupportedModelError:
        pass
    else:
        raise AssertionError("fused what its adapter can't be made of")
said = [str(one.message) for one in caught if "fastbert" in str(one.message)]
assert len(said) == 2, said
assert said[0].startswith("transformers 5.99.0.dev0 is newer than 5."), said
assert said[1].startswith("fastbert runs models of electra on their stock code"), said
assert "ElectraLayer" in said[1], said
"""


def test_a_transformers_newer_than_those_tried_is_taken_with_one_warning() -> None:
    """What it changed runs stock: here a class that the adapter of a family is made of, which has gone."""
    run_python(NEWER_TRANSFORMERS)


def test_an_adapter_that_fails_under_a_version_that_was_tried_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, package: str) -> None:
        raise AttributeError("ElectraLayer")

    model = models.seeded()
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(AttributeError, match="ElectraLayer"):
        fastbert.fuse(model)


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("5.24.0", False),
        ("5.24.9", False),
        ("5.9.0", False),
        ("5.25.0.dev0", True),
        ("5.100rc1", True),
        ("6.0.0", True),
    ],
)
def test_which_transformers_is_newer_than_those_tried(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, version: str, newer: bool
) -> None:
    monkeypatch.setitem(TRIED, "transformers", ("5.4.0", "5.24.0"))
    warn_of_newer("transformers", version)
    assert [str(one.message).partition(" is newer")[0] for one in recwarn] == [f"transformers {version}"] * newer


FORK_AFTER_CUDA = """
import os, signal, torch
import fastbert
from tests import models
model = fastbert.fuse(models.seeded().cuda())
ids = models.ids(3, 9).cuda()
with torch.no_grad():
    expected = model(ids)[0]
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            model(ids)
        except RuntimeError as error:
            os._exit(0 if "spawn" in str(error) or "initialization" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0, "the child hung, or ran, or said something else"
    assert torch.equal(model(ids)[0], expected)
"""


@pytest.mark.gpu
def test_a_fork_after_cuda_is_told_so() -> None:
    run_python(FORK_AFTER_CUDA)


def forever(model: Any) -> None:
    while True:
        last(model)


def test_an_interrupt_in_the_middle_of_a_forward() -> None:
    """A real one, from outside, at a moment nobody chose; several times over."""
    model = fastbert.fuse(models.seeded())
    before = last(model)
    for delay in (0.003, 0.01, 0.02, 0.04):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, delay)
        with pytest.raises(KeyboardInterrupt):
            forever(model)
        assert torch.equal(last(model), before)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
