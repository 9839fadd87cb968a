"""Teaches BERT to write by filling in masks, prints samples, and bounds its perplexity on held-out text.

    python examples/generation.py --model google-bert/bert-base-uncased \\
        --train train.txt --eval held_out.txt --output runs/generation --prompt "the weather"

Files: a text a line. BERT sees both ways, so it doesn't write from left to right: it is trained on lines of which any
number of tokens, from one to all, is masked, and writes by filling a line of masks, one token at a time, in random
order, each drawn from the model's own distribution.
Metrics, on --eval: loss, the mean over lines and random masks of the cross-entropy of the masked tokens, weighted by
the length of the line, in nats a token; and perplexity_bound, its exponential. Over a uniform number of masks that is
an upper bound of the perplexity of this way of writing, given the length (order-agnostic autoregressive models,
Hoogeboom et al. 2021); it isn't comparable with the perplexity of a model that reads from left to right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForMaskedLM, DataCollatorWithPadding

import fastbert

DRAWS = 4  # masks drawn of each held-out line


def read(path: Path) -> list[str]:
    """The texts of a file."""
    texts = [line.strip() for _, line in common.lines(path) if line.strip()]
    if not texts:
        raise common.malformed(path, 1, "expected lines of text, found none")
    return texts


def mask(ids: Tensor, tokenizer: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Token ids (B, S) int64 -> input_ids with 1 to all tokens of each line masked, and labels: -100 where not."""
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    candidates = ~torch.isin(ids, special)
    where = ids.device if generator is None else generator.device
    share = torch.rand(len(ids), generator=generator, device=where).to(ids.device)
    chosen = common.choose(candidates, (share * candidates.sum(1)).floor() + 1, generator)
    return {
        "input_ids": torch.where(chosen, tokenizer.mask_token_id, ids),
        "labels": torch.where(chosen, ids, -100),
    }


class MaskingTrainer(common.Trainer):
    """Masks each batch as it is used: drawn earlier, by a collator, masks would differ after a resume."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        masked = mask(inputs["input_ids"], self.processing_class)
        return super().compute_loss(model, {**inputs, **masked}, *args, **kwargs)


@torch.inference_mode()
def evaluate(trainer: common.Trainer, examples: list[dict[str, Any]], args: Any) -> dict[str, float]:
    """The loss and the bound of the perplexity."""
    model, generator = trainer.model.eval(), torch.Generator().manual_seed(args.seed)
    special = torch.tensor(trainer.processing_class.all_special_ids, device=model.device)
    total = tokens = 0.0
    for batch in common.batches(examples * DRAWS, args.batch_size, "held-out"):
        inputs = trainer.data_collator(batch).to(model.device)
        lengths = (~torch.isin(inputs["input_ids"], special)).sum(1)
        inputs.update(mask(inputs["input_ids"], trainer.processing_class, generator))
        labels = inputs.pop("labels")
        with trainer.accelerator.autocast():
            logits = model(**inputs).logits
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 at -100
        total += (losses.sum(1) / (labels != -100).sum(1) * lengths).sum().item()
        tokens += lengths.sum().item()
    return {"loss": total / tokens, "perplexity_bound": math.exp(total / tokens)}


@torch.inference_mode()
def write(model: Any, tokenizer: Any, prompt: str, lengths: Sequence[int], generator: torch.Generator) -> list[str]:
    """A text of each of `lengths` tokens, all of which begin with `prompt`."""
    begun = tokenizer(prompt, add_special_tokens=False).input_ids
    rows = [
        [
            tokenizer.cls_token_id,
            *begun,
            *[tokenizer.mask_token_id] * max(1, length - len(begun)),
            tokenizer.sep_token_id,
        ]
        for length in lengths
    ]
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    ids = inputs["input_ids"]  # stays on the CPU, as the generator does
    while (masked := ids == tokenizer.mask_token_id).any():
        rest = masked.any(1)
        inputs = {"input_ids": ids[rest], "attention_mask": (ids[rest] != tokenizer.pad_token_id).long()}
        logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits.float().cpu()
        logits[..., tokenizer.all_special_ids] = -torch.inf
        at = common.choose(masked[rest], torch.ones(int(rest.sum())), generator)
        whole = torch.zeros_like(masked)
        whole[rest] = at
        ids[whole] = torch.multinomial(logits[at].softmax(1), 1, generator=generator).squeeze(1)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, max_length=64)
    parser.add_argument("--prompt", default="", help="what samples begin with")
    parser.add_argument("--samples", type=common.count, default=4, help="how many to print (default: %(default)s)")
    args = parser.parse_args(argv)
    train, held_out = read(args.train), read(args.eval)

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = BertForMaskedLM.from_pretrained(checkpoint or args.model, dtype="float32")
    if not args.stock:
        fastbert.fuse(model, loss_only=True)

    def examples(path: Path, texts: list[str]) -> list[dict[str, Any]]:
        tokens = tokenizer(texts, truncation=True, max_length=args.max_length)
        made = [{key: tokens[key][i] for key in tokens} for i in range(len(texts))]
        made = [item for item in made if {*item["input_ids"]} - {*tokenizer.all_special_ids}]
        if not made:
            raise SystemExit(f"{path}: expected text in the vocabulary of {args.model}, found none")
        return made

    trainer = MaskingTrainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples(examples(args.train, train)),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)
    shown = examples(args.eval, held_out)
    metrics = evaluate(trainer, shown, args)
    generator = torch.Generator().manual_seed(args.seed)
    lengths = [len(shown[i]["input_ids"]) - 2 for i in torch.randint(len(shown), (args.samples,), generator=generator)]
    for text in write(trainer.model, tokenizer, args.prompt, lengths, generator):
        print(f"sample: {text}")
    common.finish(args, trainer, metrics, "cross-entropy of a masked token")


if __name__ == "__main__":
    main()
