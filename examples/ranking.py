"""Trains a cross-encoder to rank responses in a dialogue, and measures recall@1 and mean reciprocal rank.

    python examples/ranking.py --model google-bert/bert-base-uncased \\
        --train train.jsonl --eval held_out.jsonl --output runs/ranking

Files: a JSON object a line, {"context": "...", "response": "...", "negatives": ["...", ...]}; "context" may be a list
of turns, and "negatives" be left out. Each response is ranked among --candidates: itself, the line's own negatives, and
as many responses of other lines as are missing, drawn once. The loss is the cross-entropy of the right one among them.
The model has one logit and loads in sentence-transformers' CrossEncoder.
Metrics, on --eval: recall@1, the share of lines whose response has the highest score, and mrr, the mean of one over its
rank; a tie counts against it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

import fastbert


class Dialogue(NamedTuple):
    """What was said, what was answered, and what would have been wrong to."""

    context: list[str]
    response: str
    negatives: list[str]


def read(path: Path) -> list[Dialogue]:
    """The dialogues of a file."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)

    made = []
    for number, line in common.lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise common.malformed(path, number, f"expected a JSON object: {error.msg}") from None
        if not isinstance(entry, dict):
            raise common.malformed(path, number, f"expected a JSON object, found {line!r}")
        context = entry.get("context")
        context = [context] if isinstance(context, str) else context
        if not context or not texts(context):
            raise common.malformed(path, number, 'expected "context", a text or a list of texts')
        if not texts([entry.get("response")]):
            raise common.malformed(path, number, 'expected "response", a text')
        if not texts(entry.get("negatives", [])):
            raise common.malformed(path, number, 'expected "negatives", a list of texts, or none')
        made.append(Dialogue(context, entry["response"], entry.get("negatives", [])))
    if not made:
        raise common.malformed(path, 1, "expected lines of JSON, found none")
    return made


def candidates(path: Path, dialogues: list[Dialogue], count: int, seed: int) -> list[list[str]]:
    """`count` responses for each dialogue, the right one first."""
    draw = random.Random(seed)
    everything = sorted({dialogue.response for dialogue in dialogues})
    made = []
    for dialogue in dialogues:
        own = [text for text in dict.fromkeys(dialogue.negatives) if text != dialogue.response]
        chosen = [dialogue.response, *draw.sample(own, min(len(own), count - 1))]
        # More than are missing, as some may be among the chosen; only so many that a long file takes no longer.
        others = draw.sample(everything, min(len(everything), 2 * count))
        chosen += [text for text in others if text not in chosen][: count - len(chosen)]
        if len(chosen) < count:
            raise SystemExit(f"{path}: expected {count} different responses (--candidates), found {len(everything)}")
        made.append(chosen)
    return made


def listwise(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The cross-entropy of the right candidate; logits (groups * candidates, 1), labels (groups,)."""
    return nn.functional.cross_entropy(outputs.logits.float().view(len(labels), -1), labels)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, batch_size=8)
    parser.add_argument("--candidates", type=common.count, default=10, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.candidates < 2:
        raise SystemExit(f"--candidates is {args.candidates}; expected at least 2")
    dialogues = {path: read(path) for path in (args.train, args.eval)}
    ranked = {path: candidates(path, found, args.candidates, args.seed) for path, found in dialogues.items()}

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = BertForSequenceClassification.from_pretrained(checkpoint or args.model, dtype="float32", num_labels=1)
    if not args.stock:
        fastbert.fuse(model)

    def groups(path: Path) -> list[list[dict[str, list[int]]]]:
        made = []
        for dialogue, responses in zip(dialogues[path], ranked[path], strict=True):
            context = tokenizer(f" {tokenizer.sep_token} ".join(dialogue.context), add_special_tokens=False).input_ids
            answers = tokenizer(responses, add_special_tokens=False, truncation=True, max_length=args.max_length // 2)
            # Of a long context the last turns matter most.
            rooms = [args.max_length - 3 - len(ids) for ids in answers.input_ids]
            answered = zip(answers.input_ids, rooms, strict=True)
            made.append([common.pair(tokenizer, context[-room:], ids) for ids, room in answered])
        return made

    pad = DataCollatorWithPadding(tokenizer)

    def collate(groups: list[list[dict[str, list[int]]]]) -> dict[str, Tensor]:
        return {
            **pad([item for group in groups for item in group]),
            "labels": torch.zeros(len(groups), dtype=torch.int64),
        }

    trainer = common.Trainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples(groups(args.train)),
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=listwise,
    )
    common.train(trainer, checkpoint)
    # One at a time: predictions of the Trainer come a row an example.
    single = [[item] for group in groups(args.eval) for item in group]
    scores = torch.from_numpy(trainer.predict(common.Examples(single)).predictions).view(-1, args.candidates)
    ranks = (scores >= scores[:, :1]).sum(1)
    metrics = {"recall@1": (ranks == 1).double().mean().item(), "mrr": (1 / ranks.double()).mean().item()}
    common.finish(args, trainer, metrics, f"cross-entropy of the right one of {args.candidates} responses")


if __name__ == "__main__":
    main()
