"""`fastbert profile`: every call in its row and its layer, costs as counted, times that are somebody's, plots to look
at; and a trace of a GPU, made up here and read by the same code."""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertTokenizer, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel
from transformers.models.bert import modeling_bert as hf
from transformers.models.distilbert import modeling_distilbert

import fastbert
from fastbert import ops
from fastbert.cli.__main__ import main
from fastbert.measure import cases, counts, machine, profile, tables, trace
from fastbert.measure.counts import Cost
from fastbert.runtime import plan
from fastbert.usage import UsageError
from tests import models

LAYERS = 2
LENGTHS = (5, 9, 3)
SMALL = "fastbert::mask_layout"  # once a forward: too little to be listed where other operators take long
AROUND = {
    "fastbert::embedding_layer_norm",
    "fastbert::embedding_layer_norm_backward",
    "fastbert::pack",
    "fastbert::unpack",
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model and the machine small, and the runs few."""
    shape = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(cases.SHAPES, "minilm", shape)
    deberta = {**cases.SHAPES["deberta-v3-xsmall"], **shape, "vocab_size": 99}
    monkeypatch.setitem(cases.SHAPES, "deberta-v3-xsmall", deberta)
    monkeypatch.setattr(machine.Machine, "__init__", lambda self, device: setattr(self, "bytes_per_s", 1e10))
    monkeypatch.setattr(machine.Machine, "flops_per_s", lambda self, dtype: 1e11)
    monkeypatch.setattr(profile, "MOST_RUNS", 3)


def profiled(folder: Path, *arguments: str, batch: tuple[str, ...] = ("--lengths", "5,9,3")) -> dict[str, Any]:
    """The record of a profile of the small model."""
    file = folder / "record.json"
    model = () if {"--model", "--size"} & {*arguments} else ("--size", "minilm")
    assert main(["profile", "--device", "cpu", *model, *batch, "--json", str(file), *arguments]) == 0
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def rows(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["operator"]: row for row in run["operators"]}


def check(record: dict[str, Any]) -> None:
    """What is so of every record."""
    assert record["device"] == "cpu"
    assert record["commit"] == machine.commit()
    assert (record["lengths"], record["real_tokens"], record["padded_tokens"]) == (list(LENGTHS), 17, 27)
    for run in record["runs"]:
        assert sum(row["share"] for row in run["operators"]) == pytest.approx(1)
        assert run["p20_s"] <= run["wall_s"] <= run["p80_s"]
        assert run["tokens_per_s"] * run["wall_s"] == pytest.approx(17)
        assert (run["host_synchronisations"], run["copies_to_host"]) == (None, None)
        assert 0 < run["gap_s"] < run["profiled_s"]
        assert run["disturbed"] == (not 0.8 <= run["profiled_s"] / run["wall_s"] <= 1.25)
        for row in run["operators"]:
            assert row["flops_per_s"] * row["seconds"] == pytest.approx(row["flops"])
            assert row["bytes_per_s"] * row["seconds"] == pytest.approx(row["bytes"])
            floor = max(row["flops"] / 1e11, row["bytes"] / 1e10)
            assert row["fraction_of_floor"] * row["seconds"] == pytest.approx(floor)
            assert sum(row["layers"].values()) == pytest.approx(row["seconds"])


def test_a_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = profiled(tmp_path, "--trace", str(tmp_path / "trace.json"), "--plot", str(tmp_path / "plots"))
    check(record)
    assert record["what"] == "BertModel forward"
    (run,) = record["runs"]
    found = rows(run)
    calls = {
        "fastbert::embedding_layer_norm": 1,
        "fastbert::qkv_linear": LAYERS,
        "fastbert::attention": LAYERS,
        "fastbert::linear_add": 2 * LAYERS,
        "fastbert::layer_norm": 2 * LAYERS,
        "fastbert::linear_gelu": LAYERS,
        "fastbert::unpack": 1,
    }
    assert {
        name: row["calls"] for name, row in found.items() if name.startswith("fastbert::") and name != SMALL
    } == calls
    assert found["aten::addmm"]["calls"] == 1  # of the pooler
    ours = [row for name, row in found.items() if name in calls.keys() - AROUND]
    least = counts.encoder(hf.BertConfig(**cases.SHAPES["minilm"]), LENGTHS, torch.float32)
    assert record["encoder"] == least._asdict()
    assert (sum(row["flops"] for row in ours), sum(row["bytes"] for row in ours)) == least
    assert all(set(row["layers"]) == {"0", "1"} for row in ours)
    assert all(set(found[name]["layers"]) == {"outside"} for name in calls.keys() & AROUND)
    assert run["fraction_of_floor"] * run["wall_s"] == pytest.approx(max(least.flops / 1e11, least.bytes / 1e10))

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    traced = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    runs = 3 + 1  # one to warm up
    assert {name: traced[name] for name in calls} == {name: runs * n for name, n in calls.items()}
    assert (traced["layer 1"], traced[trace.RUN]) == (runs, 3)

    said = capsys.readouterr().out
    assert "forward of minilm, float32, b3, 17 tokens" in said
    listed = {name for name in calls if found[name]["share"] >= tables.LEAST_SHARE}
    assert {name for name in calls if name in said} == listed
    assert "100.0%" in said and "host synchronisations" in said and "MiB" in said

    for name in ("roofline", "layers"):
        picture = pytest.importorskip("matplotlib.image").imread(tmp_path / "plots" / f"{name}.png")[..., :3]
        assert picture.shape[1] == 900
        colors, pixels = numpy.unique((picture.reshape(-1, 3) * 255).round(), axis=0, return_counts=True)
        vivid = (colors.max(1) - colors.min(1) > 60) & (pixels > 30)
        assert vivid.sum() >= len(calls), f"{name}.png"


def test_a_training_step_against_stock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = profiled(tmp_path, "--train", "--compare", "stock", "--dtype", "float32", "--plot", str(tmp_path))
    check(record)
    fused, stock = record["runs"]
    assert (fused["run"], stock["run"]) == ("fused", "stock")
    assert record["ratio_to_stock"] == stock["wall_s"] / fused["wall_s"]
    found = rows(fused)
    calls = {
        "fastbert::embedding_layer_norm": 1,
        "fastbert::qkv_linear": LAYERS,
        "fastbert::attention_forward": LAYERS,
        "fastbert::linear": LAYERS,
        "fastbert::add_layer_norm": 2 * LAYERS,
        "fastbert::feed_forward": LAYERS,
        "fastbert::unpack": 1,
        "fastbert::pack": 1,
        "fastbert::add_layer_norm_backward": 2 * LAYERS,
        "fastbert::linear_gelu_backward": LAYERS,
        "fastbert::attention_backward": LAYERS,
        "fastbert::embedding_layer_norm_backward": 1,
    }
    assert {
        name: row["calls"] for name, row in found.items() if name.startswith("fastbert::") and name != SMALL
    } == calls
    inside = {*calls.keys() - AROUND, "aten::mm"}
    assert found["aten::mm"]["calls"] == 7 * LAYERS
    assert all(set(found[name]["layers"]) == {"0", "1"} for name in inside)
    assert all(set(found[name]["layers"]) == {"outside"} for name in calls.keys() & AROUND)
    assert sum(found[name]["flops"] for name in inside) == record["encoder"]["flops"]

    model = cases.build("minilm", torch.float32, torch.device("cpu")).train()
    with FlopCounterMode(display=False) as counter:
        model(**cases.Workload("", LENGTHS).inputs(torch.device("cpu"))).last_hidden_state.sum().backward()
    assert sum(row["flops"] for row in stock["operators"]) == counter.get_total_flops()
    assert rows(stock)["aten::addmm"]["calls"] == 6 * LAYERS + 1
    assert {file.name for file in tmp_path.glob("*.png")} == {
        *("roofline.png", "layers.png", "stock-roofline.png", "stock-layers.png")
    }
    assert f"x stock                {record['ratio_to_stock']:.2f}" in capsys.readouterr().out


def test_time_is_found_where_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some in the feed-forward of one layer, some in its backward, some where no operator is."""
    right, pack, backward, calls = ops.feed_forward, plan.pack_mask, ops.linear_gelu_backward, Counter[str]()

    def slow(name: str, seconds: float, layer: int, call: Any) -> Any:
        def slowed(*args: Any) -> Any:
            calls[name] += 1
            if calls[name] % LAYERS == layer:
                time.sleep(seconds)
            return call(*args)

        return slowed

    monkeypatch.setattr(ops, "feed_forward", slow("forward", 0.02, 0, right))  # the second of two
    monkeypatch.setattr(ops, "linear_gelu_backward", slow("backward", 0.03, 0, backward))  # which is of the first layer
    monkeypatch.setattr(plan, "pack_mask", lambda *args: time.sleep(0.04) or pack(*args))
    model = fastbert.fuse(cases.build("minilm", torch.float32, torch.device("cpu")))
    (found,) = profile.measure({"fused": model}, cases.Workload("", LENGTHS), True)
    by_name = {row.operator: row.layers for row in found.trace.rows}
    forward, back = by_name["fastbert::feed_forward"], by_name["fastbert::linear_gelu_backward"]
    assert forward[1] > forward[0] + 0.015
    assert back[0] > back[1] + 0.025
    assert 0.04 < found.trace.gap_s < found.trace.run_s - 0.05
    assert found.wall_s > 0.09


def test_nothing_stays_annotated() -> None:
    model = fastbert.fuse(models.seeded())
    before = {name: getattr(ops, name) for name in ops.OPERATORS}
    kind = type(model.encoder.layer[0])
    with trace.annotated(model):
        assert ops.linear is not before["linear"]
        assert "__call__" in vars(kind)
    assert before == {name: getattr(ops, name) for name in ops.OPERATORS}
    assert "__call__" not in vars(kind)


def test_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer, in its own dtype, with a vocabulary below the ids that benchmarks draw."""
    models.seeded(hf.BertForSequenceClassification).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    record = profiled(tmp_path, "--model", str(tmp_path / "checkpoint"), batch=("--batch", "4", "--lengths", "6"))
    assert (record["dtype"], record["lengths"]) == ("bfloat16", [6] * 4)
    assert rows(record["runs"][0])["fastbert::qkv_linear"]["calls"] == 2
    monkeypatch.setattr(cases, "workload", lambda name, batch=2: cases.Workload(name, (len(name),) * batch))
    assert profiled(tmp_path, batch=())["lengths"] == [len("squad")] * 2
    assert profiled(tmp_path, batch=("--workload", "dense128", "--batch", "3"))["lengths"] == [len("dense128")] * 3


@pytest.mark.parametrize("step", [[], ["--train"]], ids=["forward", "step"])
def test_a_checkpoint_of_another_family(step: list[str], tmp_path: Path) -> None:
    config = modeling_distilbert.DistilBertConfig(vocab_size=99, dim=64, n_layers=2, n_heads=2, hidden_dim=128)
    modeling_distilbert.DistilBertModel(config).save_pretrained(tmp_path / "checkpoint")
    record = profiled(tmp_path, "--model", str(tmp_path / "checkpoint"), *step)
    assert record["encoder"]["flops"] >= 2 * sum(2 * n * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 64 * n * n for n in LENGTHS)
    assert rows(record["runs"][0])["fastbert::qkv_linear"]["calls"] == 2


@pytest.mark.slow
def test_deberta_and_stock_of_any_length(tmp_path: Path) -> None:
    """Its stock layers return more than hidden states; 700 tokens are no more than it has positions for."""
    record = profiled(
        tmp_path, "--size", "deberta-v3-xsmall", "--train", "--compare", "stock", batch=("--lengths", "700,3")
    )
    fused, stock = map(rows, record["runs"])
    assert record["what"] == "DebertaV2Model training step"
    assert fused["fastbert::disentangled_attention_backward"]["calls"] == 2
    assert {"0", "1"} == set(stock["aten::mm"]["layers"]) - {"outside"}


def test_a_trace_of_a_cpu_beside_other_load() -> None:
    """Five runs of two layers; in each of three another operator is held up for long, and the median is none of it."""
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, ts: float, dur: float) -> float:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}})
        return ts + dur

    for run, held in enumerate((None, 0, 1, "outside", None)):
        at = begun = 1e6 * (run + 1)
        for layer in range(2):
            within = add("cpu_op", "aten::mm", at + 10, 100 + 5000 * (held == layer))
            add("user_annotation", f"layer {layer}", at + 5, within - at)
            at = within + 20
        at = add("cpu_op", "aten::add", at, 40 + 7000 * (held == "outside"))
        add("user_annotation", trace.RUN, begun, at + 10 - begun)
    costs = {"aten::mm": Cost(10, 20), "aten::add": Cost(1, 2)}
    found = trace.read(events, costs, torch.device("cpu"))
    matmul, add_ = found.rows
    assert (matmul.operator, matmul.calls, matmul.cost) == ("aten::mm", 2, (10, 20))
    assert matmul.layers == {0: pytest.approx(100e-6), 1: pytest.approx(100e-6)}
    assert (add_.calls, add_.seconds) == (1, pytest.approx(40e-6))
    assert (found.gap_s, found.run_s) == (pytest.approx(70e-6), pytest.approx(5310e-6))
    assert found.busy_s == pytest.approx(5240e-6)


@pytest.mark.parametrize(("times", "told"), [(1.2, False), (1.3, True), (0.85, False), (0.75, True)])
def test_a_trace_that_took_longer_is_warned_of(times: float, told: bool) -> None:
    found = trace.Trace([trace.Row("aten::mm", Cost(1, 1), 1, {None: 0.5})], 2 * times, 0.5, 0.5, None, None)
    run = profile.Profile("fused", [2.0] * 3, None, found).to_dict(1, 1.0, machine.Rates(1e11, 1e10))
    said = tables.table(run, "forward")
    assert (f"takes {times:.2f} times as long: what operators take misleads" in said) == told == run["disturbed"]


def pipeline(folder: Path, head: str = "BertModel") -> str:
    """A checkpoint that sentence-transformers loads: of a tokenizer and that head."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "drums",
        "beat",
        "across",
        "the",
        "river",
        "nobody",
        "listens",
    ]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=100)
    models.seeded(getattr(hf, head), vocab_size=len(tokenizer), num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages of a call of the model's own method add up to it, over the tokens that its tokenizer gives."""
    pytest.importorskip("sentence_transformers")
    (tmp_path / "lines.txt").write_text("drums beat across the river\n\nnobody listens\n")
    record = profiled(
        *(tmp_path, "--model", pipeline(tmp_path / "checkpoint"), "--batch", "2", "--compare", "stock"),
        batch=("--texts", str(tmp_path / "lines.txt")),
    )
    assert (record["what"], record["workload"]) == ("BertModel encode", "lines.txt b2")
    assert (record["lengths"], record["padded_tokens"]) == ([7, 4, 2], 2 * 7 + 2)
    assert [run["run"] for run in record["runs"]] == ["fused", "stock"]
    for run in record["runs"]:
        assert list(run["stages"]) == ["tokenise", "host", "device", "rest"]
        assert all(seconds >= 0 for seconds in run["stages"].values())
        assert run["stages"]["tokenise"] > 0 < run["stages"]["device"]
        assert sum(run["stages"].values()) == pytest.approx(run["wall_s"])
    fused, stock = map(rows, record["runs"])
    assert fused["fastbert::qkv_linear"]["calls"] == 2 * 2  # of two layers in two forwards
    assert not any(name.startswith("fastbert::") for name in stock)
    said = capsys.readouterr().out
    assert "encode of checkpoint, float32, lines.txt b2, 13 tokens" in said
    assert said.count("stages                 tokenise ") == 2


def test_time_of_a_pipeline_is_found_where_it_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    st = pytest.importorskip("sentence_transformers")
    model = fastbert.fuse(st.SentenceTransformer(pipeline(tmp_path), device="cpu"))

    def slow(seconds: float, call: Any) -> Any:
        return lambda *args, **kwargs: time.sleep(seconds) or call(*args, **kwargs)

    model.preprocess, model.forward = slow(0.03, model.preprocess), slow(0.06, model.forward)
    monkeypatch.setattr(st.SentenceTransformer, "encode", slow(0.09, st.SentenceTransformer.encode))
    (found,) = profile.measure_texts({"fused": model}, ["drums beat", "nobody", "the river"], 2)
    stages = found.stages
    assert stages is not None
    # Of two batches. Nothing is counted twice, so that time in another's place would be missing in its own.
    assert sum(stages.values()) == pytest.approx(found.wall_s)
    assert stages["tokenise"] > 0.06
    assert stages["host"] > 0.09  # operators took more while they were traced
    assert stages["rest"] > 0.09


def test_pairs_go_through_predict(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "pairs.tsv").write_text("drums\tbeat across\nriver\tnobody\n")
    model = pipeline(tmp_path / "checkpoint", "BertForSequenceClassification")
    record = profiled(tmp_path, "--model", model, batch=("--texts", str(tmp_path / "pairs.tsv")))
    assert (record["what"], sorted(record["lengths"])) == ("BertModel predict", [5, 6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{model}", "--texts", "{folder}/none.txt"], "--texts {folder}/none.txt: No such file"),
        (["--model", "{model}", "--texts", "{folder}/empty.txt"], "--texts {folder}/empty.txt: holds no line"),
        (["--model", "{model}", "--texts", "{folder}/bytes.txt"], "--texts {folder}/bytes.txt: 'utf-8' codec"),
        (["--model", "{model}", "--texts", "{folder}/a.txt"], "--texts {folder}/a.txt, line 2: has no tab"),
        (["--texts", "{folder}/a.txt"], "--texts is given without --model"),
        (["--model", "{model}", "--train", "--texts", "{folder}/a.txt"], "--texts is given with --train"),
        (["--model", "{model}", "--batch", "0", "--texts", "{folder}/a.txt"], "--batch is 0; expected 1 to"),
        (["--model", "{folder}/nowhere", "--texts", "{folder}/a.txt"], "--model {folder}/nowhere: no such folder"),
    ],
)
def test_texts_that_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    for name, data in (("empty.txt", b""), ("bytes.txt", b"\xff\n"), ("a.txt", b"a\tb\nc\n")):
        (tmp_path / name).write_bytes(data)
    places = {"folder": tmp_path, "model": pipeline(tmp_path / "model", "BertForSequenceClassification")}
    capsys.readouterr()
    assert main(["profile", "--device", "cpu", *(argument.format(**places) for argument in arguments)]) == 2
    assert capsys.readouterr().err.startswith(f"fastbert profile: {message.format(**places)}")


def test_a_trace_of_a_gpu() -> None:
    """Two runs of an operator of two kernels, one of torch's in the thread of the backward, a kernel of nobody's and a
    wait; before them a launch that counts nowhere. Kernels run later than what launches them."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {}}]
    launched = 0

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    def launch(name: str, at: float, start: float, dur: float, tid: int = 1, cat: str = "kernel") -> None:
        nonlocal launched
        launched += 1
        runtime = ("cuda_driver", "cuLaunchKernelEx") if name.endswith("_kernel") else ("cuda_runtime", "cudaLaunch")
        add(*runtime, at, 2, tid, correlation=launched)
        add(cat, name, start, dur, 7, correlation=launched)

    launch("warm_kernel", 10, 20, 1000)
    for t in (10_000, 20_000):
        add("user_annotation", trace.RUN, t, 400)
        add("gpu_user_annotation", trace.RUN, t, 900, 7)
        add("user_annotation", "layer 0", t + 10, 90)
        add("user_annotation", "fastbert::attention_backward", t + 20, 60)
        add("cpu_op", "fastbert::attention_backward", t + 21, 58)
        add("cpu_op", "aten::empty", t + 22, 1)  # in an operator: none of its own
        launch("attention_backward_q_kernel", t + 30, t + 100, 50)
        launch("attention_backward_kv_kernel", t + 50, t + 150, 100)
        add("user_annotation", "backward of layer 1", t + 110, 0, 2)
        add("cpu_op", "aten::mm", t + 120, 30, 2)
        launch("sm90_xmma_gemm", t + 125, t + 300, 200, 2)  # 50 after the last one
        launch("vectorized_elementwise", t + 210, t + 400, 200)  # 100 of it beside the GEMM
        launch("Memcpy DtoH (Device -> Pageable)", t + 215, t + 700, 10, cat="gpu_memcpy")  # 100 after
        add("cuda_runtime", "cudaStreamSynchronize", t + 220, 100, correlation=0)
        add("cuda_runtime", "cudaDeviceSynchronize", t + 500, 10, correlation=0)  # the profiler's own
    costs = {"fastbert::attention_backward": Cost(10, 20), "aten::mm": Cost(30, 40), "aten::empty": Cost(0, 0)}
    found = trace.read(events, costs, torch.device("cuda"))
    by_name = {row.operator: row for row in found.rows}
    assert list(by_name) == [
        *("aten::mm", "vectorized_elementwise", "fastbert::attention_backward", "Memcpy DtoH (Device -> Pageable)")
    ]
    attention, gemm = by_name["fastbert::attention_backward"], by_name["aten::mm"]
    assert (attention.calls, attention.seconds, attention.cost) == (1, pytest.approx(150e-6), (10, 20))
    assert attention.kernels == {
        "attention_backward_q_kernel": (1, pytest.approx(50e-6)),
        "attention_backward_kv_kernel": (1, pytest.approx(100e-6)),
    }
    assert attention.layers == {0: pytest.approx(150e-6)}
    assert (gemm.calls, gemm.seconds, gemm.layers) == (1, pytest.approx(200e-6), {1: pytest.approx(200e-6)})
    assert (by_name["vectorized_elementwise"].calls, by_name["vectorized_elementwise"].cost) == (1, (0, 0))
    assert found.gap_s == pytest.approx(150e-6)
    assert found.run_s == pytest.approx(710e-6)
    assert (found.synchronisations, found.copies_to_host) == (1, 1)
    of_the_host = [event for event in events if event.get("cat") not in ("kernel", "gpu_memcpy")]
    with pytest.raises(UsageError, match="the profiler saw no kernel"):
        trace.read(of_the_host, costs, torch.device("cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "--lengths 0: holds 0; expected more than 0"),
        (["--lengths", "12,-3"], "--lengths 12,-3: holds -3; expected more than 0"),
        (["--lengths", "12,x"], "--lengths 12,x: expected integers between commas"),
        (["--lengths", "12,513"], "--lengths 12,513: holds 513; expected at most max_position_embeddings, 512"),
        (["--batch", "2", "--lengths", "3,4"], "--batch is given with 2 --lengths"),
        (["--batch", "0", "--lengths", "3"], "--batch is 0; expected 1 to 262144"),
        (["--batch", "99999999999999", "--lengths", "3"], "--batch is 99999999999999; expected 1 to 262144"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--json", "{file}/no/where.json"], "--json {file}/no/where.json: Not a directory"),
        (["--trace", "{folder}/nowhere/trace.json"], "--trace {folder}/nowhere/trace.json: No such file"),
        (["--json", "{folder}"], "--json {folder}: Is a directory"),
        (["--plot", "{file}/plots"], "--plot {file}/plots: Not a directory"),
        (["--model", "{folder}/nowhere"], "--model {folder}/nowhere: no such folder"),
        (["--model", "{folder}"], "--model {folder}: "),
        (["--model", "no/such-model-anywhere"], "--model no/such-model-anywhere: "),
    ],
)
def test_refuses_before_it_measures(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profile, "measure", None)
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    assert main(["profile", *(argument.format(**places) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastbert profile: {message.format(**places)}")
    assert said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--size", "base", "--model", "x"], "argument --model: not allowed with argument --size"),
        (["--lengths", "3", "--workload", "squad"], "argument --workload: not allowed with argument --lengths"),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["profile", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_a_model_that_is_none_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DistilBertModel(DistilBertConfig(vocab_size=8, dim=8, n_heads=1, n_layers=1, hidden_dim=8)).save_pretrained(
        tmp_path
    )
    assert main(["profile", "--model", str(tmp_path), "--lengths", "3", "--device", "cpu"]) == 2
    assert f"fastbert profile: --model {tmp_path}: " in capsys.readouterr().err


def test_positions_after_that_of_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=12, **sizes)).save_pretrained(tmp_path)
    capsys.readouterr()
    command = ["profile", "--model", str(tmp_path), "--device", "cpu", "--lengths"]
    assert main([*command, "11"]) == 2
    assert "--lengths 11: holds 11; the model has positions for 10" in capsys.readouterr().err
    assert main([*command, "10,3"]) == 0


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(["profile", "--plot", "anywhere"]) == 2
    assert "pip install 'fastbert-triton[bench]'" in capsys.readouterr().err
    assert not Path("anywhere").exists()


def test_refuses_to_profile_stock_as_fused() -> None:
    model = fastbert.fuse(cases.build("minilm", torch.float32, torch.device("cpu")))
    model.encoder.layer[0].intermediate.register_forward_hook(lambda *args: None)
    model.encoder.layer[1].intermediate.register_forward_hook(lambda *args: None)
    with pytest.raises(UsageError, match="the model runs stock: "):
        profile.measure({"fused": model}, cases.Workload("", LENGTHS), False)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_on_a_gpu(train: bool, tmp_path: Path) -> None:
    arguments = ["--train"] if train else []
    record = profiled(tmp_path, "--device", "cuda", "--dtype", "float16", "--compare", "stock", *arguments)
    fused, stock = record["runs"]
    found = rows(fused)
    attention = found["fastbert::attention_forward" if train else "fastbert::attention"]
    assert attention["calls"] == LAYERS
    assert attention["kernels"]["attention_kernel"]["launches"] == LAYERS
    linear = found["fastbert::feed_forward" if train else "fastbert::linear_gelu"]
    assert linear["kernels"]["linear_kernel"]["launches"] == (2 if train else 1) * LAYERS
    if train:
        assert set(found["fastbert::attention_backward"]["kernels"]) == {
            "attention_backward_kv_kernel",
            "attention_backward_q_kernel",
        }
        assert set(found["fastbert::attention_backward"]["layers"]) == {"0", "1"}
    # Packing waits once; what torch's own backward of an embedding waits for is torch's.
    assert fused["host_synchronisations"] == 1 or (train and fused["host_synchronisations"] > 1)
    assert fused["copies_to_host"] >= 1
    for run in (fused, stock):
        assert sum(row["share"] for row in run["operators"]) == pytest.approx(1)
        assert 0 < run["gap_s"] < run["profiled_s"]
        assert all(row["kernels"] for row in run["operators"])
