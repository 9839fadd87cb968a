"""Every script, run from its command line: what it leaves, how it goes on after a kill, what stops it."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import fresh
from tests.examples.conftest import EXAMPLES, SCRIPTS, script

METRICS = {
    "text_classification": {"accuracy": (0, 1)},
    "token_classification": {"precision": (0, 1), "recall": (0, 1), "f1": (0, 1)},
    "question_answering": {"exact_match": (0, 100), "f1": (0, 100)},
    "pretraining": {"mlm_loss": (0.1, 10), "mlm_accuracy": (0, 1), "nsp_accuracy": (0, 1)},
    "translation": {"token_accuracy": (0, 1), "bleu": (0, 100)},
    "ranking": {"recall@1": (0, 1), "mrr": (1 / 3, 1)},
    "generation": {"loss": (0.1, 10), "perplexity_bound": (1, 100)},
}

# On a CPU a run that went on equals an unbroken one bit for bit; a GPU adds up gradients in no fixed order.
NOISE = 1e-3 if torch.cuda.is_available() else 0.0


class Killed(BaseException):
    """What a test stops a run with; nothing catches it."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Any) -> None:
    """Makes `do` of the loss of training step `step`, counted from 1, before the script's Trainer sees it."""
    compute = transformers.Trainer.compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = compute(self, model, *args, **kwargs)
        if model.training and self.state.global_step == step - 1:
            loss = do(loss)
        return loss, outputs

    monkeypatch.setattr(transformers.Trainer, "compute_loss", compute_loss)


def killed(loss: Any) -> Any:
    raise Killed


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())


def losses(output: Path) -> list[float]:
    (newest,) = output.glob("checkpoint-7/trainer_state.json")
    return [entry["loss"] for entry in json.loads(newest.read_text())["log_history"] if "loss" in entry]


def assert_same_run(one: Path, other: Path) -> None:
    assert len(losses(one)) == 7
    assert losses(one) == pytest.approx(losses(other), rel=NOISE, abs=0)
    assert metrics(one) == pytest.approx(metrics(other), rel=NOISE, abs=0)
    weights, others = (load_file(output / "model" / "model.safetensors") for output in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=NOISE, atol=NOISE)


# Of the kills: that of a script whose epochs end between checkpoints, and of those that draw numbers for their batches.
KILLED = ("text_classification", "pretraining", "ranking")


@pytest.mark.parametrize(
    ("name", "kills"),
    [(name, name in KILLED) for name in SCRIPTS]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in SCRIPTS if name not in KILLED],
)
def test_runs_and_goes_on_after_a_kill(
    name: str,
    kills: bool,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = script(name).main
    main(command(name, output="whole"))
    printed = capsys.readouterr().out.splitlines()
    found = metrics(tmp_path / "whole")
    assert found.keys() == {*METRICS[name], "steps", "final_loss"}
    for metric, (low, high) in METRICS[name].items():
        assert low <= found[metric] <= high
        assert f"{metric}: {found[metric]:.6g}" in printed
    assert found["steps"] == 7
    assert found["final_loss"] == losses(tmp_path / "whole")[-1]
    assert re.match(r"fastbert: (bert|encoder): fused .*; ran fused, (packed|dense): \d+", printed[-1])
    assert "dense, not packed" not in printed[-1]  # every reader is known
    assert "ran fused, packed" in printed[-1]
    curve = pytest.importorskip("matplotlib.image").imread(tmp_path / "whole" / "loss.png")
    assert curve.shape == (480, 840, 4)
    assert (curve[100:400, 100:800, :3].std(-1) > 0.1).sum() > 100  # a coloured line, inside the axes

    if not kills:
        return
    # Within an epoch and, of the scripts with six batches, at its end.
    for step, checkpoint in ((5, None), (7, 3), (None, 6)):
        with monkeypatch.context() as patch, pytest.raises(Killed) if step else contextlib.nullcontext():
            at_step(patch, step or 0, killed)
            main(command(name))
        printed = capsys.readouterr().out
        assert (f"Going on from {tmp_path / 'run' / f'checkpoint-{checkpoint}'}\n" in printed) == (
            checkpoint is not None
        )
        assert (tmp_path / "run" / "metrics.json").exists() == (step is None)
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    # Once more: nothing is left to do, and the metrics are those of the same weights.
    with monkeypatch.context() as patch:
        at_step(patch, 8, killed)
        main(command(name))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Dies as its second checkpoint has everything but the state, which is written last.
DIES = """
import os, signal, sys
import transformers
save = transformers.TrainerState.save_to_json
def die(self, path):
    if self.global_step == 6:
        with open(path, "w") as file:
            file.write('{"global_step": 6, "log')
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
transformers.TrainerState.save_to_json = die
import text_classification
text_classification.main(sys.argv[1:])
"""


def test_kill_9_as_a_checkpoint_is_written(command: Any, tmp_path: Path) -> None:
    environment = fresh.environment(PYTHONPATH=f"{EXAMPLES}:{EXAMPLES.parent}", OMP_NUM_THREADS="1")
    arguments = command("text_classification")
    died = fresh.run("-c", DIES, *arguments, env=environment)
    assert died.returncode == -9, died.stderr
    assert (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").exists()
    # The rest as a user has it, from a folder of its own.
    done = fresh.run(EXAMPLES / "text_classification.py", *arguments, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-3" in done.stdout
    assert "7/7" in done.stderr  # the progress bar
    assert "loss=" in done.stderr
    script("text_classification").main(command("text_classification", output="whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("name", "value"), [(name, float(("nan", "inf")[i % 2])) for i, name in enumerate(SCRIPTS)])
def test_a_loss_that_is_not_finite_stops_the_run(
    name: str, value: float, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (taken.append(1), step(*args, **kwargs))[1])
    at_step(monkeypatch, 5, lambda loss: loss * value)
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 5; the weights are those of step 4"):
        script(name).main(command(name))
    assert len(taken) == 4
    assert not (tmp_path / "run" / "metrics.json").exists()


MALFORMED = [
    ("text_classification", "good film\t1\nbad film 0\n", "2: expected `sentence TAB label`, found 1 field"),
    ("text_classification", "good\t1\n\t0\n", "2: expected `sentence TAB label`"),
    ("text_classification", "\n", "1: expected lines"),
    ("token_classification", "the\tO\ncat\tB-animal\n\ncat\n", r"4: expected a token and its tag .* found 'cat'"),
    ("token_classification", "cat\tanimal\n", "1: expected a token and its tag"),
    ("token_classification", "", "1: expected lines"),
    ("question_answering", '{"data":\n [}', "2: expected JSON"),
    ("question_answering", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "at or after data: .*'qas'"),
    (
        "question_answering",
        '{"data": [{"paragraphs": [{"context": "the cat", "qas": [{"question": "?", "answers": '
        '[{"text": "cat", "answer_start": 3}]}]}]}]}',
        r"data\[0\].paragraphs\[0\].qas\[0\]: expected the answer 'cat' at character 3, found ' ca'",
    ),
    ("question_answering", '{"data": []}', "data: expected questions"),
    ("pretraining", "one.\ntwo.\n", "1: expected documents separated by blank lines, at least 2; found 1"),
    ("translation", "the cat\tdie Katze\nthe dog\n", "2: expected `source TAB target`, found 1 field"),
    ("translation", "", "1: expected lines"),
    ("ranking", '{"context": "a", "response": "b"}\n{"context": "a"\n', "2: expected a JSON object"),
    ("ranking", '{"context": "a"}\n', '1: expected "response"'),
    ("ranking", '{"context": [], "response": "b"}\n', '1: expected "context"'),
    ("ranking", '{"context": "a", "response": "b", "negatives": "c"}\n', '1: expected "negatives"'),
    ("ranking", '{"context": "a", "response": "b"}\n', r"expected 3 different responses \(--candidates\), found 1"),
    ("generation", "\n\n", "1: expected lines of text"),
    ("generation", b"fine\n\xff\n", "2: expected UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_malformed_files(
    name: str, content: str | bytes, message: str, which: str, command: Any, tmp_path: Path
) -> None:
    path = tmp_path / "malformed"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit, match=f"^{re.escape(str(path))}:.*{message}"):
        script(name).main(command(name, f"--{which}={path}"))
    assert not (tmp_path / "run").exists()  # nothing was begun


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_file(name: str, command: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: No such file or directory"):
        script(name).main(command(name, f"--eval={tmp_path / 'nowhere'}"))


def test_labels_that_training_has_not_seen(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "eval.tsv"
    path.write_text("the cat\tmaybe\n")
    with pytest.raises(SystemExit, match=r"eval.tsv: expected the labels of .*train.tsv, found maybe"):
        script("text_classification").main(command("text_classification", f"--eval={path}"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lr=0", "'0'; expected a number above 0"),
        ("--batch-size=1.5", "'1.5'; expected an integer of at least 1"),
        ("--max-length=7", "'7'; expected an integer of at least 8"),
        ("--seed=-1", "'-1'; expected an integer of at least 0"),
        ("--epochs=2", "not allowed with argument --steps"),
    ],
)
def test_bad_arguments(argument: str, message: str, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("text_classification").main(command("text_classification", argument))
    assert message in capsys.readouterr().err


def test_lengths_that_do_not_fit(command: Any) -> None:
    with pytest.raises(SystemExit, match=r"--max-length is 65; .* has positions for 64 tokens"):
        script("text_classification").main(command("text_classification", "--max-length=65"))
    with pytest.raises(SystemExit, match="--max-length is 16; expected more than 16"):
        script("question_answering").main(command("question_answering", "--stride=10"))
    script("question_answering").main(command("question_answering", "--stride=9", "--steps=1"))


def test_other_arguments_in_the_same_output_are_refused(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    main = script("text_classification").main
    for step, lr in ((3, 0.002), (4, 0.001)):  # the first leaves no checkpoint, so nothing to mix up
        with monkeypatch.context() as patch:
            at_step(patch, step, killed)
            with pytest.raises(Killed):
                main(command("text_classification", f"--lr={lr}"))
    with pytest.raises(SystemExit, match=r"holds a run started with --lr 0.001; name another --output"):
        main(command("text_classification", "--lr=0.002"))


@pytest.mark.parametrize("option", ["--stock", "--bf16"])
def test_stock_and_bf16(option: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("text_classification").main(command("text_classification", option))
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("not fused" in last) == (option == "--stock")
    assert ("ran fused" in last) == (option == "--bf16")
    assert metrics(tmp_path / "run")["steps"] == 7


def test_the_ranker_loads_as_a_cross_encoder(command: Any, tmp_path: Path) -> None:
    script("ranking").main(command("ranking"))
    ranker = pytest.importorskip("sentence_transformers").CrossEncoder(str(tmp_path / "run" / "model"))
    assert ranker.predict([("the cat saw a bird .", "the bird ran ."), ("a", "b")]).shape == (2,)
