"""Fine-tunes BERT to classify sentences, and measures its accuracy.

    python examples/text_classification.py --model google-bert/bert-base-uncased \\
        --train sst2_train.tsv --eval sst2_dev.tsv --output runs/sst2

Files: a line `sentence TAB label`, as in SST-2; a label is any word. A first line `sentence TAB label` is a header.
Metric: accuracy, the share of --eval whose most likely label is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import common
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

import fastbert


def read(path: Path) -> tuple[list[str], list[str]]:
    """Sentences and their labels."""
    sentences, labels = [], []
    for number, line in common.lines(path):
        if not line.strip() or (number == 1 and line.strip() == "sentence\tlabel"):
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip():
            raise common.malformed(
                path, number, f"expected `sentence TAB label`, found {len(fields)} field(s): {line!r}"
            )
        sentences.append(fields[0])
        labels.append(fields[1].strip())
    if not sentences:
        raise common.malformed(path, 1, "expected lines `sentence TAB label`, found none")
    return sentences, labels


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    train, held_out = read(args.train), read(args.eval)
    names = sorted({*train[1]})
    unknown = {*held_out[1]} - {*names}
    if unknown:
        raise SystemExit(f"{args.eval}: expected the labels of {args.train}, found {', '.join(sorted(unknown))}, too")

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = BertForSequenceClassification.from_pretrained(
        checkpoint or args.model,
        dtype="float32",
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    if not args.stock:
        fastbert.fuse(model)

    def dataset(sentences: list[str], labels: list[str]) -> common.Examples:
        tokens = tokenizer(sentences, truncation=True, max_length=args.max_length)
        return common.Examples(
            [{**{key: tokens[key][i] for key in tokens}, "labels": names.index(n)} for i, n in enumerate(labels)]
        )

    trainer = common.Trainer(
        model,
        common.training_arguments(args),
        train_dataset=dataset(*train),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)
    found = trainer.predict(dataset(*held_out))
    accuracy = float((found.predictions.argmax(1) == found.label_ids).mean())
    common.finish(args, trainer, {"accuracy": accuracy}, "cross-entropy of a sentence's label")


if __name__ == "__main__":
    main()
