"""What the training scripts share: their arguments, reading files, a Trainer that stops at a loss that isn't finite,
resuming, and what a run leaves in --output:

    arguments.json   what it was started with
    checkpoint-N/    the last two of the Trainer's checkpoints; the same command goes on from the newest whole one
    model/           the trained model and its tokenizer
    metrics.json     the metrics, the number of steps and the loss of the last one
    loss.png         the loss of every step
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, ProgressCallback, TrainerState, TrainingArguments

import fastbert

# The curve's smooth line averages a run's losses over this share of it.
SMOOTHED = 0.05


# Arguments


def _number(kind: Callable[[str], Any], low: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}; expected {what}")
        return value

    return parse


count = _number(int, 0, "an integer of at least 1")
_amount = _number(float, 0, "a number above 0")
_length = _number(int, 7, "an integer of at least 8")
_seed = _number(int, -1, "an integer of at least 0")


def parser(
    doc: str | None, *, epochs: float = 3, batch_size: int = 32, lr: float = 5e-5, max_length: int = 128
) -> argparse.ArgumentParser:
    """The arguments every script takes; `doc` is its docstring, the rest its defaults."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, metavar="PATH_OR_ID", help="BERT checkpoint in Hugging Face format")
    made.add_argument("--train", required=True, metavar="FILE", type=Path)
    made.add_argument("--eval", required=True, metavar="FILE", type=Path, help="held-out data, of the same format")
    made.add_argument("--output", required=True, metavar="DIR", type=Path)
    length = made.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_amount, default=epochs, help="passes over --train (default: %(default)s)")
    length.add_argument("--steps", type=count, help="optimizer steps, in place of --epochs")
    made.add_argument("--batch-size", type=count, default=batch_size, help="(default: %(default)s)")
    made.add_argument("--max-length", type=_length, default=max_length, help="tokens (default: %(default)s)")
    made.add_argument("--lr", type=_amount, default=lr, help="peak learning rate (default: %(default)s)")
    made.add_argument("--seed", type=_seed, default=0)
    made.add_argument("--save-steps", type=count, default=200, help="steps between checkpoints (default: %(default)s)")
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--stock", action="store_true", help="leave the model unfused, to compare")
    return made


# Files


def malformed(path: Path, where: int | str, expected: str) -> SystemExit:
    """The error for bad data, to be raised: file, line (or place), and what was expected there."""
    return SystemExit(f"{path}:{where}: {expected}")


def read(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise malformed(path, line, "expected UTF-8 text") from None
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; expected a file that can be read") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line of a UTF-8 file, blank ones too."""
    yield from enumerate(read(path).split("\n"), 1)


def write_json(path: Path, value: Any) -> None:
    """Writes `value`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


# Running


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint in `output`: one that a killed process had finished writing.

    The Trainer writes the state last, so a checkpoint that has it has the rest.
    """
    whole = {}
    for state in output.glob("checkpoint-*/trainer_state.json"):
        try:
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
        except json.JSONDecodeError:
            continue
    return whole[max(whole)] if whole else None


def begin(args: argparse.Namespace) -> Path | None:
    """Opens --output, seeds torch, and returns the checkpoint to go on from, or None at the start of a run."""
    longest = AutoConfig.from_pretrained(args.model).max_position_embeddings
    if args.max_length > longest:
        raise SystemExit(f"--max-length is {args.max_length}; {args.model} has positions for {longest} tokens")
    args.output.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) for name, value in sorted(vars(args).items()) if name != "output" and value is not None}
    record, checkpoint = args.output / "arguments.json", last_checkpoint(args.output)
    if checkpoint is None:
        write_json(record, given)
    else:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        differ = [name for name in sorted({*given, *earlier}) if given.get(name) != earlier.get(name)]
        if differ:
            was = ", ".join(f"--{name.replace('_', '-')} {earlier.get(name)}" for name in differ)
            raise SystemExit(f"{args.output} holds a run started with {was}; name another --output, or remove it")
        print(f"Going on from {checkpoint}")
    transformers.set_seed(args.seed)
    transformers.logging.disable_progress_bar()  # those of loading and saving; training keeps its own
    return checkpoint


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """What the command line says, in the Trainer's words."""
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=0.1,  # of all steps
        weight_decay=0.01,
        bf16=args.bf16,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        seed=args.seed,
        logging_steps=1,
        save_steps=args.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
    )


class LossOnBar(ProgressCallback):
    """The progress bar, with the loss of the last step on it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class Trainer(transformers.Trainer):
    """transformers' Trainer; a training loss that isn't finite stops it before it reaches the weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.add_callback(LossOnBar)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and not torch.isfinite(loss).all():
            done = self.state.global_step
            raise FloatingPointError(
                f"the loss is {loss.mean().item()} at step {done + 1}; the weights are those of step {done}"
            )
        return (loss, outputs) if return_outputs else loss


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains to the end, from `checkpoint` on; does nothing where that is the end (its weights are in the model)."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def finish(args: argparse.Namespace, trainer: Trainer, metrics: dict[str, float], loss: str) -> None:
    """Leaves model, metrics and curve in --output, and prints the metrics and what ran fused.

    Args:
        metrics: by name.
        loss: what the loss is, in nats, for the title of the curve.
    """
    trainer.save_model(str(args.output / "model"))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    plot(args.output / "loss.png", losses, loss)
    metrics = {**metrics, "steps": trainer.state.global_step, "final_loss": losses[max(losses)]}
    write_json(args.output / "metrics.json", metrics)
    print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))
    model = trainer.accelerator.unwrap_model(trainer.model)
    print("fastbert: " + "; ".join(line.strip() for line in str(fastbert.explain(model)).splitlines()))


def plot(path: Path, losses: dict[int, float], label: str) -> None:
    """The loss over the steps as PNG: every step's and, in a long run, their running mean."""
    steps, values = list(losses), torch.tensor(list(losses.values()), dtype=torch.float64)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    window = int(len(steps) * SMOOTHED)
    axes.plot(steps, values, color="C0", marker="." if len(steps) == 1 else "", alpha=0.35 if window > 1 else 1)
    if window > 1:
        means = values.unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], means, color="C0", label=f"mean of the last {window} steps")
        axes.legend()
    axes.set(title=f"Training loss: {label}", xlabel="optimizer step", ylabel="loss, nats")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# Data


class Examples(Dataset[Any]):
    """A list as a dataset."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def batches(items: Sequence[Any], size: int, what: str) -> Iterator[Sequence[Any]]:
    """`items` in order, `size` at a time, with a progress bar named `what`."""
    for start in tqdm(range(0, len(items), size), desc=what):
        yield items[start : start + size]


def pair(tokenizer: Any, first: list[int], second: list[int]) -> dict[str, list[int]]:
    """`[CLS] first [SEP] second [SEP]` as a model's inputs, from token ids."""
    sep = [tokenizer.sep_token_id]
    first, second = [tokenizer.cls_token_id, *first, *sep], second + sep
    return {
        "input_ids": first + second,
        "token_type_ids": [0] * len(first) + [1] * len(second),
        "attention_mask": [1] * (len(first) + len(second)),
    }


def choose(candidates: Tensor, counts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Marks `counts` (B,) of the true positions of `candidates` (B, S) bool in each row, drawn uniformly: (B, S) bool.

    Without a `generator` the draw is torch's own, which the Trainer keeps in its checkpoints.
    """
    device = candidates.device if generator is None else generator.device
    scores = torch.rand(candidates.shape, generator=generator, device=device).to(candidates.device)
    ranks = scores.masked_fill(~candidates, 2.0).argsort(1).argsort(1)
    return (ranks < counts[:, None]) & candidates
