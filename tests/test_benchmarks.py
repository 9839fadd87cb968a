"""The benchmark suites, whole, at a reduced size: everything runs, and is checked before it is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import archive as suite_archive
from fastbert.measure import cases, machine, records

ROOT = Path(__file__).resolve().parent.parent
# On a CPU as its users run it, not in the interpreter.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(arguments: str, *paths: str) -> None:
    command = [sys.executable, "-m", *arguments.split(), *paths]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_host() -> None:
    run("benchmarks.host --layers 2 --calls 4")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    command = f"pytest benchmarks -q --size minilm --workload search --dtype {dtype}"
    run(command, f"--benchmark-json={file}", "--records", str(tmp_path / "records"))
    found = json.loads(file.read_text())["benchmarks"]
    groups = {one["group"].split(",")[0] for one in found}
    assert len(found) == 2 * len(groups) >= 26
    for one in found:
        assert one["stats"]["median"] > 0
        assert one["extra_info"]["bytes"] > 0
        assert (one["extra_info"]["flops"] > 0) == one["group"].startswith(("linear", "attention", "qkv"))
    (kept,) = (tmp_path / "records").rglob("*.json")
    written = records.load(kept)
    assert sorted(r["what"].removeprefix("operator ") for r in written) == sorted(2 * list(groups))
    medians = {one["stats"]["median"] for one in found}
    assert {r["median_s"] for r in written} == medians
    assert all(r["ratio_to_stock"] == 1 for r in written if r["candidate"] == "stock")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["", "--train"])
def test_models(step: str, tmp_path: Path) -> None:
    peers = "eager" if step else "all"  # compiling a training step for a CPU takes minutes
    arguments = f"--size minilm --repeats 3 --workload search --batch 1 16 --peers {peers} {step} --output"
    run(f"fastbert.cli bench {arguments}", str(tmp_path))
    (file,) = tmp_path.rglob("*.json")
    timed = {(r["workload"], r["candidate"]) for r in records.load(file) if r["status"] == "ok"}
    ways = ["stock", "fused", "stock eager"] + ([] if step else ["stock + torch.compile", "ONNX Runtime", "OpenVINO"])
    assert timed >= {(workload, way) for workload in ("search b1", "search b16") for way in ways}


@pytest.mark.slow
def test_encode(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/encode.py", "--batch", "4", "--repeats", "3", "--output", str(tmp_path)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = records.load(next(tmp_path.rglob("*.json")))
    ways = [("corpus", "stock"), ("corpus", "fused"), ("corpus", "fused, fastbert.encode")]
    ways += [("calls", "stock"), ("calls", "fused")]
    assert [(r["what"].split(", ")[1], r["candidate"]) for r in found] == ways
    assert all(r["ideal_ratio"] > 1 and r["repeats"] == 3 for r in found)
    assert found[0]["ideal_ratio"] < found[3]["ideal_ratio"]  # sorted by length there is less padding


@pytest.mark.slow
def test_encode_of_all_kinds_and_peers(tmp_path: Path) -> None:
    """Where the time went adds up; other runtimes answer for an embedder and for a head."""
    ways = ["query 16", "queries", "rerank", "tag", "late queries", "late documents", "sparse"]
    command = [sys.executable, "benchmarks/encode.py", "--batch", "2", "--repeats", "1", "--output", str(tmp_path)]
    command += ["--peers", "openvino", "--what", *ways]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = records.load(next(tmp_path.rglob("*.json")))
    runs = {(r["what"].removeprefix("encode, "), r["candidate"]) for r in found}
    assert runs >= {(way, candidate) for way in ways for candidate in ("stock", "fused")}
    assert runs >= {(way, "OpenVINO") for way in ("query 16", "queries", "rerank", "late documents")}
    for record in found:
        if record["candidate"] in ("stock", "fused"):
            assert min(record["stages"].values()) > 0
            assert record["stages"]["model"] > record["stages"]["rest"]


def test_texts_that_are_made_up_are_words_the_tokenizer_knows(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from transformers import AutoTokenizer

    from benchmarks import encode

    encode.save_tokenizer(tmp_path)
    tokenizer, item = AutoTokenizer.from_pretrained(tmp_path), cases.workload("search", 16)
    found = tokenizer(encode.texts_of(item))["input_ids"]
    assert tuple(map(len, found)) == item.lengths
    assert tokenizer.unk_token_id not in {each for ids in found for each in ids}
    assert len({each for ids in found for each in ids}) > 50


def test_padding_is_what_the_model_takes_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLM-R's is token 1, by which it numbers positions: a short text beside a long one is as it is alone."""
    pytest.importorskip("sentence_transformers")
    from benchmarks import encode

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(cases.SHAPES, "xlm-r-large", {**cases.SHAPES["xlm-r-large"], **shape, "vocab_size": 2000})
    model = encode.encoder("xlm-r-large", torch.float32, torch.device("cpu"))
    texts = encode.texts_of(cases.Workload("", (9, 30)))
    features = model.preprocess(texts)
    assert features["input_ids"][0, 9:].tolist() == [1] * 21
    assert features["attention_mask"].sum(1).tolist() == [9, 30]
    beside, alone = encode.values("embedder", model, texts)[0], encode.values("embedder", model, texts[:1])[0]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_embed() -> None:
    """The command and its bare encoder take turns, to the end; a run this short says nothing about their ratio."""
    command = [sys.executable, "benchmarks/embed.py", "--size", "minilm", "--lines", "300"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert re.match(r"300 rows, 27,957 tokens, float32, cpu, .* of the bare encoder's .* resident ", done.stdout)


@pytest.fixture
def suite() -> Any:
    """The module benchmarks/suite.py."""
    spec = importlib.util.spec_from_file_location("suite", ROOT / "benchmarks" / "suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def steps(suite: Any, file: Path, **codes: str) -> tuple[Any, ...]:
    """Steps that append their names to `file`, and then run some code; "tests" is one of tests."""

    def noted(name: str, code: str) -> str:
        return shlex.join(["-c", f"open({str(file)!r}, 'a').write('{name} ')\n{code}"])

    return tuple(
        suite.Step(f"{suite.TESTS}{name}" if name.startswith("tests") else name, 1.0, noted(name, code))
        for name, code in codes.items()
    )


def test_every_step_is_a_command(suite: Any, tmp_path: Path) -> None:
    """Each is one that its parser takes."""
    from fastbert.cli.__main__ import parser

    for step in (*suite.ON_A_GPU, *suite.ON_A_CPU):
        words = suite.command(step, 1.0, tmp_path)
        if words[1].startswith("benchmarks/"):
            assert (ROOT / words[1]).is_file()  # whose tests run it
            continue
        assert words[1] == "-m"
        if words[2] == "fastbert.cli":
            parser().parse_args(words[3:])
        else:
            assert words[2:4] == ["pytest", "-q"]
            assert any((ROOT / word).is_dir() for word in words[4:])
    names = [step.name for step in suite.ON_A_GPU]
    assert len(set(names)) == len(names)
    # The headline before anything else, and what is timed next before the tests of something else.
    assert names[:4] == ["first", "tests: bfloat16", "throughput", "latency"]
    assert names.index("throughput") < names.index("tests: kernels")


def test_every_gpu_test_is_in_a_step(suite: Any) -> None:
    """The steps of tests take all folders: one by name, the other all but that one; and one some of both."""
    paths = [shlex.split(step.command) for step in suite.ON_A_GPU if step.name.startswith(suite.TESTS)]
    assert all(words[words.index("--gates") - 1] == "gpu" for words in paths)
    assert [words[words.index("--gates") + 2 :] for words in paths] == [
        ["--covering", "*.bfloat16", "--covering", "dropout.*", "--covering", "graphs.*", "tests"],
        ["tests/kernels"],
        ["tests", "--ignore", "tests/kernels"],
    ]


def test_tests_for_a_gpu_have_workers_and_each_a_time_limit(suite: Any, tmp_path: Path) -> None:
    """Shorter than their step's, so that one that hangs is ended, told and passed over."""
    for step in suite.ON_A_GPU:
        words = suite.command(step, step.minutes, tmp_path)
        if step.name.startswith(suite.TESTS):
            assert int(words[words.index("-n") + 1]) >= 1
            assert int(words[words.index("--timeout") + 1]) < 60 * step.minutes
            assert words[words.index("--timeout-method") + 1] == "thread"
        else:
            assert "--timeout" not in words


@pytest.mark.slow
def test_the_steps_of_a_gpu_run(suite: Any, tmp_path: Path) -> None:
    """Their commands, at a reduced size, on this machine: what can't run here says so, and records are written."""
    ran = 0
    for step in suite.ON_A_GPU:
        words = suite.command(step, 0.5, tmp_path)
        if words[2:4] not in (["fastbert.cli", "bench"], ["fastbert.cli", "profile"]):
            continue
        less = ["--dtype", "float32", *(["--lengths", "128"] if "--lengths" in words else ["--batch", "2"])]
        sizes = {"deberta": "deberta-v3-xsmall", "modernbert": "modernbert-base"}
        less += ["--size", sizes.get(step.name.partition(" ")[0], "minilm"), "--device", "cpu"]
        less += ["--workload", "dense128"] if "dense8192" in words else []
        less += ["--repeats", "3"] if "bench" in words and "--cold" not in words else []
        if "--peers" in words:  # compiling takes minutes here
            less += ["--peers", "torch-varlen"]
        done = subprocess.run(
            [*words, *less], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{step.name}: {done.stdout}{done.stderr}"
        ran += 1
    assert ran > 10
    assert len(list(tmp_path.glob("profile-*.json"))) == 5
    assert len(list(tmp_path.rglob("*/*.json"))) >= 1


def test_the_suite_goes_on_where_it_stopped(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    flag = tmp_path / "flag"
    fails = f"import os, sys; sys.exit(not os.path.exists({str(flag)!r}))"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, tests="pass", one="pass", two=fails, three="pass"))
    arguments = ["--output", str(tmp_path / "out"), "--minutes", "2"]
    assert suite.main(arguments) == 1
    assert ran.read_text() == "tests one two three "
    flag.touch()
    assert suite.main(arguments) == 0
    assert ran.read_text() == "tests one two three two "
    assert suite.main([*arguments, "--only", "three"]) == 0
    assert ran.read_text() == "tests one two three two three "
    right = suite.key
    monkeypatch.setattr(suite, "key", lambda step: "other sources" if step.name == "one" else right(step))
    assert suite.main(arguments) == 0
    assert ran.read_text() == "tests one two three two three one "


def test_a_step_starts_over_where_its_own_sources_change(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {step.name: step for step in suite.ON_A_GPU}
    before = {name: suite.key(step) for name, step in named.items()}

    def changed(*files: str) -> set[str]:
        right = suite.gates.key

        def key(file: Path) -> str:
            reached = {path.relative_to(ROOT).as_posix() for path in suite.gates.sources(file)}
            return "changed" if reached & set(files) else right(file)

        with monkeypatch.context() as patch:
            patch.setattr(suite.gates, "key", key)
            return {name for name, step in named.items() if suite.key(step) != before[name]}

    tests = {name for name in named if name.startswith(suite.TESTS)}
    assert changed("tests/kernels/test_linear.py") == tests
    profiles = {name for name in named if name.startswith("profile")} | {"deberta long"}
    assert changed("fastbert/measure/profile.py") == profiles | tests
    assert changed("kernels/linear.py") == set(named)
    assert changed("benchmarks/encode.py") == {"encode"} | tests  # one of which imports it
    assert changed("benchmarks/suite.py") == set()


IN_FP8 = ("BertModel forward", "fused in fp8", "bfloat16")
IN_16 = ("BertModel forward", "fused", "bfloat16")


def note(suite: Any, output: Path, **outcomes: str) -> None:
    """Notes an outcome for gates of an operation in bfloat16, by tests of this file."""
    log = suite.gates.Log(output / "gates.jsonl", "tests")
    checks = {f"tests/test_benchmarks.py::{name}": [f"{name}.bfloat16"] for name in outcomes}
    log.plan(checks)
    for name, outcome in outcomes.items():
        if outcome != "planned":
            log.note(f"tests/test_benchmarks.py::{name}", outcome)


@pytest.fixture
def on_a_gpu(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite.gates, "place", lambda: "a GPU")


@pytest.mark.usefixtures("on_a_gpu")
def test_red_closes_what_needs_it_and_nothing_else(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A red test does not stop the steps after it; what it covers is not timed, here or by the step itself."""
    ran, out = tmp_path / "ran", tmp_path / "out"
    tells = "import os; print(os.environ['FASTBERT_GATES'])"
    tests, one, two, three = steps(suite, ran, tests="import sys; sys.exit(1)", one="pass", two=tells, three="pass")
    two = dataclasses.replace(two, rows=(IN_16,))
    three = dataclasses.replace(three, rows=(IN_FP8,))
    monkeypatch.setattr(suite, "ON_A_GPU", (tests, one, two, three))
    operations = dict.fromkeys(("embedding", "padding", "linear", "attention", "layer_norm", "model"), "passed")
    note(suite, out, **operations, fp8="failed")
    assert suite.main(["--output", str(out)]) == 1
    assert ran.read_text() == "tests one two "
    assert "three: closed, red: fp8.bfloat16" in capsys.readouterr().err
    told = json.loads((out / "logs" / "two.log").read_text())
    assert (told["fp8.bfloat16"], told["linear.bfloat16"]) == ("red", "green")
    assert json.loads((out / "progress.json").read_text())["steps"] == {
        "tests: tests": "failed",
        "one": "done",
        "two": "done",
        "three": "closed",
    }
    note(suite, out, fp8="passed")  # mended
    assert suite.main(["--output", str(out), "--only", "three"]) == 0
    assert ran.read_text() == "tests one two three "
    note(suite, out, attention="failed")
    assert suite.main(["--output", str(out), "--only", "two", "one"]) == 1
    assert ran.read_text() == "tests one two three one "


@pytest.mark.usefixtures("on_a_gpu")
def test_a_step_is_done_once_none_of_its_rows_is_closed(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that measured some rows, while others had a red gate: not run again while that is red, but once it isn't."""
    ran, out = tmp_path / "ran", tmp_path / "out"
    one, two = steps(suite, ran, one="pass", two="pass")
    monkeypatch.setattr(suite, "ON_A_GPU", (dataclasses.replace(one, rows=(IN_16, IN_FP8)), two))
    note(suite, out, fp8="failed")
    for expected in ("one two ", "one two "):
        assert suite.main(["--output", str(out)]) == 0
        assert ran.read_text() == expected
    note(suite, out, fp8="passed")
    for _ in range(2):
        assert suite.main(["--output", str(out)]) == 0
        assert ran.read_text() == "one two one "
    note(suite, out, fp8="failed")  # what it measured while that was green it keeps
    assert suite.main(["--output", str(out)]) == 0
    assert ran.read_text() == "one two one "


def test_a_step_whose_package_is_not_installed_is_left_out(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    one, two = steps(suite, ran, one="pass", two="pass")
    monkeypatch.setattr(suite, "ON_A_CPU", (dataclasses.replace(one, needs="no_such_package"), two))
    for expected in ("two ", "two "):
        assert suite.main(["--output", str(tmp_path / "out")]) == 0
        assert ran.read_text() == expected
        assert "== one: left out, no_such_package is not installed" in capsys.readouterr().err
    monkeypatch.setattr(suite, "ON_A_CPU", (dataclasses.replace(one, needs="pytest"), two))
    assert suite.main(["--output", str(tmp_path / "out")]) == 0
    assert ran.read_text() == "two one "


def test_steps_name_the_packages_that_a_bare_machine_lacks(suite: Any) -> None:
    needs = {step.name: step.needs for step in (*suite.ON_A_GPU, *suite.ON_A_CPU) if step.needs}
    texts, timed = "sentence_transformers", "pytest_benchmark"
    expected = {"operators": timed, "operators, bfloat16": timed, "encode": texts, "embed": texts}
    assert needs == expected


@pytest.mark.usefixtures("on_a_gpu")
def test_rows_are_judged_again_when_their_tests_have_run(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured before, they say so; afterwards what became of their gates. Another commit's stay as they are."""
    out = tmp_path / "out"
    record = records.load(next((ROOT / "benchmarks" / "results").glob("*/*.json")))[0]
    record |= {
        "what": "operator linear",
        "candidate": "fused",
        "dtype": "bfloat16",
        "gates": "not run: linear.bfloat16",
    }
    monkeypatch.setattr(machine, "commit", lambda: "abc1234")
    for name, commit in (("ours", "abc1234"), ("theirs", "def5678")):
        records.write(out / "gpu" / f"{name}.json", [{**record, "commit": commit}])
    monkeypatch.setattr(suite, "ON_A_GPU", steps(suite, tmp_path / "ran", one="pass"))

    def said(name: str) -> str:
        return str(records.load(out / "gpu" / f"{name}.json")[0]["gates"])

    for outcome, state in (
        ("planned", "not run: linear.bfloat16"),
        ("passed", "green"),
        ("failed", "red: linear.bfloat16"),
    ):
        note(suite, out, linear=outcome)
        assert suite.main(["--output", str(out), "--only", "one"]) == 0
        assert said("ours") == state
    assert said("theirs") == "not run: linear.bfloat16"


@pytest.mark.usefixtures("on_a_gpu")
def test_tests_without_workers_go_on_behind_one_that_broke_the_device(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    code = f"import sys; sys.exit(2 if open({str(ran)!r}).read().count('tests') < 3 else 0)"
    monkeypatch.setattr(suite, "ON_A_GPU", steps(suite, ran, tests=code, one="pass"))
    assert suite.main(["--output", str(tmp_path / "out")]) == 0
    assert ran.read_text() == "tests tests tests one "


def test_steps_have_caches_of_their_own_and_logs(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    told = "import os; print(os.environ['XDG_CACHE_HOME'], os.environ['TRITON_CACHE_DIR'])"
    one, two = steps(suite, tmp_path / "ran", one=told, two=told)
    monkeypatch.setattr(suite, "ON_A_CPU", (one, dataclasses.replace(two, cache="tuned")))
    assert suite.main(["--output", str(out)]) == 0
    shared = out / "cache" / "triton"
    assert (out / "logs" / "one.log").read_text().split() == [str(out / "cache" / "shipped"), str(shared)]
    assert (out / "logs" / "two.log").read_text().split() == [str(out / "cache" / "tuned"), str(shared)]
    tuning = {step.name: step.cache for step in suite.ON_A_GPU if step.cache != "shipped"}
    assert tuning == {"tune": "tuned", "tuned": "tuned"}


def test_the_suite_goes_on_elsewhere_by_its_progress_file(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, one="pass", two="import sys; sys.exit(1)"))
    assert suite.main(["--output", str(tmp_path / "here")]) == 1
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "progress.json").write_bytes((tmp_path / "here" / "progress.json").read_bytes())
    assert suite.main(["--output", str(tmp_path / "there")]) == 1
    assert ran.read_text() == "one two two "
    (tmp_path / "there" / "progress.json").write_text("cut o")
    assert suite.main(["--output", str(tmp_path / "there")]) == 1  # unreadable: all over again
    assert ran.read_text() == "one two two one two "


@pytest.mark.usefixtures("on_a_gpu")
def test_list(suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--list", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(suite.ON_A_GPU)
    assert all("not begun" in line for line in said)
    assert said[0].startswith("first ")


def test_a_step_that_is_out_of_time_itself_goes_on_next_time(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As first.py is, whose exit status says so: it is not done, and nothing has failed."""
    ran = tmp_path / "ran"
    code = f"import sys; sys.exit(3 if open({str(ran)!r}).read().count('one') < 2 else 0)"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, one=code, two="pass"))
    assert suite.main(["--output", str(tmp_path / "out")]) == 3
    assert suite.main(["--output", str(tmp_path / "out")]) == 0
    assert ran.read_text() == "one two one "


def test_the_suite_keeps_to_its_time(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    waits = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open({str(ran)!r}, 'a').write('kept ')"
    monkeypatch.setattr(suite, "ON_A_CPU", steps(suite, ran, one=waits, two="pass"))
    monkeypatch.setattr(suite, "LEAST_S", 1.0)
    assert suite.main(["--output", str(tmp_path / "out"), "--minutes", "0.06"]) == 3
    assert ran.read_text() == "one kept "
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["steps"] == {"one": "cut"}


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


LEAVES = """
import pathlib, subprocess, sys
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path({file!r}).write_text(str(left.pid))
"""


def test_what_a_step_left_running_ends_with_it(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold the GPU, and the output of its step."""
    file, start = tmp_path / "pid", time.monotonic()
    one, two = steps(suite, tmp_path / "ran", one=LEAVES.format(file=str(file)), two="pass")
    monkeypatch.setattr(suite, "ON_A_CPU", (one, two))
    assert suite.main(["--output", str(tmp_path / "out")]) == 0
    assert time.monotonic() - start < suite.GRACE_S
    assert not lives(int(file.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="by a signal that Linux has")
def test_a_step_ends_with_a_suite_that_is_killed(tmp_path: Path) -> None:
    file = str(tmp_path / "pid")
    waits = f"import os, pathlib, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(300)"
    code = (
        "import sys; from benchmarks import suite; "
        f"suite.ON_A_CPU = (suite.Step('one', 9.0, {shlex.join(['-c', waits])!r}),); sys.exit(suite.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, "--output", str(tmp_path / "out"), "--minutes", "5"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    step, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while lives(step) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(step)


def test_ending_the_suite_ends_its_step(tmp_path: Path) -> None:
    """A benchmark that is measuring is interrupted, and has kept what it wrote."""
    arguments = ["--only", "cold", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "benchmarks/suite.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"== cold"):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130


DRY = """
import sys, pathlib
from benchmarks import suite

out = sys.argv[sys.argv.index("--output") + 1]
MEASURE = '''
import json, pathlib, sys, time
step, out = sys.argv[1], pathlib.Path(sys.argv[2])
done = out / "gpu" / (step + ".json")
rows = json.loads(done.read_text()) if done.exists() else []
while len(rows) < 5:  # a record every 0.2 s, the file replaced whole
    time.sleep(0.2)
    rows.append({"step": step, "row": len(rows)})
    done.parent.mkdir(exist_ok=True)
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(rows))
    partial.replace(done)
print(step, "measured")
'''
(pathlib.Path(out).parent / "measure.py").write_text(MEASURE)
names = [f"step{i}" for i in range(4)]
suite.ON_A_CPU = tuple(suite.Step(n, 1.0, f"{pathlib.Path(out).parent / 'measure.py'} {n} {out}") for n in names)
suite.PACKED_EVERY_S = 0.02
suite.key = lambda step: step.name
sys.exit(suite.main(sys.argv[1:]))
"""


def test_killed_at_any_second_what_was_measured_is_in_the_archives(tmp_path: Path) -> None:
    """By force, at moments drawn at random, each time on a new machine that has the last one's archives alone."""
    (tmp_path / "dry.py").write_text(DRY)
    chance, rows, runs = random.Random(0), 0, 0
    packed = tmp_path / "packed"
    status = None
    while status is None and runs < 40:
        runs += 1
        machine = tmp_path / f"machine{runs}"
        machine.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "dry.py"), "--output", str(machine / "out"), "--archive", str(packed)],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) and not line.startswith(b"== step"):
            pass
        try:
            status = process.wait(0.3 + chance.random() if runs < 4 else 60)
        except subprocess.TimeoutExpired:
            on_the_machine = sum(len(json.loads(file.read_text())) for file in machine.glob("out/gpu/*.json"))
            process.kill()
            process.wait()
            again = tmp_path / f"unpacked{runs}"
            suite_archive.restore(packed, again)
            kept = sum(len(json.loads(file.read_text())) for file in again.glob("gpu/*.json"))
            assert kept >= max(rows, on_the_machine - 4)  # the last fifth of a second's, at most
            rows = kept
    assert runs > 1
    assert status == 0
    suite_archive.restore(packed, tmp_path / "end")
    for i in range(4):
        found = json.loads((tmp_path / "end" / "gpu" / f"step{i}.json").read_text())
        assert [each["row"] for each in found] == [0, 1, 2, 3, 4]
    assert set(json.loads((tmp_path / "end" / "progress.json").read_text())["steps"].values()) == {"done"}
    assert (tmp_path / "end" / "logs" / "step3.log").read_text() == "step3 measured\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_ending_the_suite_packs_what_there_is(number: int, tmp_path: Path) -> None:
    (tmp_path / "dry.py").write_text(
        DRY.replace("PACKED_EVERY_S = 0.02", "PACKED_EVERY_S = 600").replace(
            "sys.exit(suite.main",
            "import signal\nfor n in (15, 1): signal.signal(n, signal.default_int_handler)\nsys.exit(suite.main",
        )
    )
    process = subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / "dry.py"),
            "--output",
            str(tmp_path / "out"),
            "--archive",
            str(tmp_path / "packed"),
        ],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) and not line.startswith(b"== step1"):
        pass
    begun = tmp_path / "out" / "gpu" / "step1.json"  # which no archive has yet
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(60)
    suite_archive.restore(tmp_path / "packed", tmp_path / "end")
    assert len(json.loads((tmp_path / "end" / "gpu" / "step0.json").read_text())) == 5
    assert json.loads((tmp_path / "end" / "gpu" / "step1.json").read_text())


def test_the_sanitizer_is_asked_for_the_kernels_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that notes what it is given; without it, or a GPU, the step says so and is done."""
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "benchmarks" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 0
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/given\nexit {sanitize.FAULT}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["tests/kernels"]) == sanitize.FAULT
    given = (tmp_path / "given").read_text().split()
    assert given[:3] == ["1", "--tool", "memcheck"]
    assert given[-3:] == ["-m", "gpu", "tests/kernels"]


def test_quality_reads_and_judges_as_it_says(tmp_path: Path) -> None:
    """Labels by name, whatever others a file has; means over real tokens alone; classes that a line can part."""
    from benchmarks import quality

    file = tmp_path / "texts.tsv"
    file.write_text("one\tgood\n\ntwo\tbad\n", encoding="utf-8")
    assert quality.lines(file) == (["one", "two"], ["good", "bad"])
    file.write_text("one\ntwo\tbad\n", encoding="utf-8")
    assert quality.lines(file) == (["one", "two"], None)
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9e9, 9e9]]])
    found = quality.mean_of_tokens(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))
    rows = torch.tensor([[0.0, 1.0], [0.2, 1.0], [1.0, 0.0], [1.0, 0.1]])
    weights = quality.classifier(rows, torch.tensor([1, 1, 0, 0]))
    guessed = (torch.nn.functional.pad(rows.double(), (0, 1), value=1.0) @ weights).argmax(1)
    assert guessed.tolist() == [1, 1, 0, 0]
