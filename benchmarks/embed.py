"""`fastbert embed` against its bare encoder: `python benchmarks/embed.py [TEXTS.txt --model PATH_OR_ID]`.

The command runs as people run it, over the lines of a file, repeated to `--lines`, or over texts and a model made up as
encode.py does; the bare encoder is the same fused
model over the same tokens, made beforehand. They take turns of a few seconds, the one stopped while the other runs, so
that what else the machine does slows both alike. Time counts from where the model is loaded. Told, too, is the resident
memory of the command. Exit status: 0, 1 (less than 0.9 of the bare encoder's tokens/s, or memory that grows).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encode
import numpy as np
import torch

from fastbert.checkpoints import default_device, load_tokenizer
from fastbert.embed import tokens
from fastbert.embed.batches import batch_tokens_on
from fastbert.embed.encoder import Encoder, Recipe, load
from fastbert.measure.cases import SHAPES, build, workload

TURN_S = 3.0
SHARD_ROWS = 8192  # as the command has them
LEAST_RATIO = 0.9
MOST_GROWTH_MIB = 32.0


class Command:
    """`fastbert embed` in a process of its own, which runs while it is given a turn."""

    def __init__(self, arguments: list[str], output: Path) -> None:
        command = [sys.executable, "-m", "fastbert.cli", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        self.stopped, self.resident = 0.0, [0.0]
        while not (output / "manifest.json").exists() and self.process.poll() is None:
            time.sleep(0.01)
        self._stopped_at = time.monotonic()
        self._signal(signal.SIGSTOP)

    def _signal(self, which: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, which)

    def turn(self) -> None:
        """Lets it run a while, and stops it again."""
        self._signal(signal.SIGCONT)
        begun = time.monotonic()
        self.stopped += begun - self._stopped_at
        while self.process.poll() is None and time.monotonic() - begun < TURN_S:
            time.sleep(0.1)
            self._look()
        self._stopped_at = time.monotonic()
        self._signal(signal.SIGSTOP)

    def _look(self) -> None:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        except OSError:  # it has just ended
            return
        self.resident += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")]

    def finish(self) -> dict[str, Any]:
        """Its totals, with the seconds it ran."""
        while self.process.poll() is None:
            self.turn()
        assert self.process.stdout is not None
        summary: dict[str, Any] = json.loads(self.process.stdout.read())
        return {**summary, "seconds": summary["seconds"] - self.stopped}

    def end(self) -> None:
        """Ends it, if it runs."""
        self._signal(signal.SIGKILL)
        self.process.wait()


class Bare(Encoder):
    """The encoder alone, which gives the command a turn between its batches."""

    def __init__(self, model: Any, recipe: Recipe, batch_tokens: int, command: Command) -> None:
        super().__init__(model, recipe, batch_tokens)
        self.command, self.seconds, self.tokens = command, 0.0, 0

    def batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        begun = time.monotonic()
        for chosen in super().batches(lengths):
            yield chosen
            if time.monotonic() - begun > TURN_S:
                self.seconds += time.monotonic() - begun
                self.command.turn()
                begun = time.monotonic()
        self.seconds += time.monotonic() - begun
        self.tokens += int(lengths.sum())


def main() -> int:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("texts", type=Path, nargs="?", metavar="FILE", help="UTF-8, a text a line; default: made up")
    own.add_argument("--model", metavar="PATH_OR_ID", help="default: seeded weights, of --size")
    own.add_argument("--size", choices=list(SHAPES), default="large")
    own.add_argument("--lines", type=int, default=100_000)
    own.add_argument("--dtype", default="float32")
    own.add_argument("--batch-tokens", type=int, help="default: that of fastbert embed")
    given = own.parse_args()
    if given.texts is not None:
        lines = given.texts.read_text(encoding="utf-8").splitlines()
    else:
        lines = encode.texts_of(workload("search", 512))
    texts = [lines[i % len(lines)] for i in range(given.lines)]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.txt", Path(folder) / "out"
        source.write_text("\n".join(texts) + "\n", encoding="utf-8")
        name = given.model
        if name is None:
            name = str(Path(folder) / "model")
            build(given.size, torch.float32, torch.device("cpu")).save_pretrained(name)
            encode.save_tokenizer(Path(name))
        arguments = ["embed", str(source), "--model", name, "--output", str(output), "--dtype", given.dtype]
        arguments += ["--json"] + (["--batch-tokens", str(given.batch_tokens)] if given.batch_tokens else [])
        device = default_device(None)
        tokens._tokenizer = load_tokenizer(name)
        model, recipe, longest = load(name, tokens._tokenizer, device, dtype=given.dtype)
        command = Command(arguments, output)
        try:
            encoder = Bare(model, recipe, given.batch_tokens or batch_tokens_on(device), command)
            for first in range(0, len(texts), SHARD_ROWS):
                encoder(tokens.tokenise(texts[first : first + SHARD_ROWS], longest))
            summary = command.finish()
        finally:
            command.end()
    speed, bare = summary["tokens"] / summary["seconds"], encoder.tokens / encoder.seconds
    half, resident = len(command.resident) // 2, command.resident
    growth = max(resident[half:]) - max(resident[half // 2 : half])
    print(
        f"{summary['rows']:,} rows, {summary['tokens']:,} tokens, {given.dtype}, {device}, {torch.get_num_threads()} "
        f"threads: {speed:,.0f} tokens/s, {speed / bare:.3f} of the bare encoder's {bare:,.0f}; "
        f"resident {max(resident):,.0f} MiB, {growth:+.1f} MiB in the second half"
    )
    return int(speed < LEAST_RATIO * bare or growth > MOST_GROWTH_MIB)


if __name__ == "__main__":
    sys.exit(main())
