"""Fine-tunes BERT to find named entities, and measures entity-level precision, recall and F1.

    python examples/token_classification.py --model google-bert/bert-base-cased \\
        --train wnut17_train.conll --eval wnut17_dev.conll --output runs/wnut17

Files: CoNLL columns, a token a line and a blank line between sentences; the first column is the token, the last its
BIO tag (`O`, `B-person`, `I-person`). Columns are separated by tabs, or by spaces where a line has no tab.
Metric: as conlleval counts, an entity is right where its type and both its ends are; an `I-` after no entity of its
type begins one. Only a word's first piece is labelled. Words past --max-length pieces count as tagged `O`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from transformers import AutoTokenizer, BertForTokenClassification, DataCollatorForTokenClassification

import fastbert

IGNORED = -100


def read(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences, each as (tokens, tags)."""
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in common.lines(path):
        if not line.strip(" \t\ufeff"):  # a stray byte order mark is no token
            if sentences[-1][0]:
                sentences.append(([], []))
            continue
        columns = line.split("\t" if "\t" in line else " ")
        token, tag = columns[0], columns[-1].strip()
        prefix, _, kind = tag.partition("-")
        if len(columns) < 2 or not token or not (tag == "O" or (prefix in ("B", "I") and kind)):
            raise common.malformed(path, number, f"expected a token and its tag (O, B-... or I-...), found {line!r}")
        sentences[-1][0].append(token)
        sentences[-1][1].append(tag)
    if not sentences[-1][0]:
        sentences.pop()
    if not sentences:
        raise common.malformed(path, 1, "expected lines of tokens and tags, found none")
    return sentences


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, past the last) of every entity in a sentence's tags."""
    found, start = set(), 0
    open_kind = ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if open_kind and (prefix != "I" or kind != open_kind):
            found.add((open_kind, start, i))
            open_kind = ""
        if kind and not open_kind:
            open_kind, start = kind, i
    return found


def scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 over the entities of all sentences; 0 where there are none."""
    right = wanted = given = 0
    for true_tags, tags in zip(truth, predicted, strict=True):
        true_entities, found = entities(true_tags), entities(tags)
        right, wanted, given = right + len(true_entities & found), wanted + len(true_entities), given + len(found)
    return {
        "precision": right / given if given else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (given + wanted) if given + wanted else 0.0,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    train, held_out = read(args.train), read(args.eval)
    names = sorted({tag for _, tags in train for tag in tags} | {"O"})
    ids = {name: i for i, name in enumerate(names)}

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = BertForTokenClassification.from_pretrained(
        checkpoint or args.model, dtype="float32", id2label=dict(enumerate(names)), label2id=ids
    )
    if not args.stock:
        fastbert.fuse(model)

    def encode(words: list[str], tags: list[str] | None) -> tuple[dict[str, Any], list[int | None]]:
        """The model's inputs, with labels where `tags` are given, and the word of every piece that is labelled."""
        tokens = tokenizer(words, is_split_into_words=True, truncation=True, max_length=args.max_length)
        pieces = tokens.word_ids()
        first = [w if w != before else None for w, before in zip(pieces, [None, *pieces], strict=False)]
        item = dict(tokens)
        if tags is not None:
            item["labels"] = [IGNORED if w is None else ids[tags[w]] for w in first]
        return item, first

    trainer = common.Trainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples([encode(*sentence)[0] for sentence in train]),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)

    encoded = [encode(words, None) for words, _ in held_out]
    logits = trainer.predict(common.Examples([item for item, _ in encoded])).predictions
    predicted = []
    for (words, _), (_, first), best in zip(held_out, encoded, logits.argmax(2), strict=True):
        tags = ["O"] * len(words)
        for position, word in enumerate(first):
            if word is not None:
                tags[word] = names[best[position]]
        predicted.append(tags)
    common.finish(args, trainer, scores([tags for _, tags in held_out], predicted), "cross-entropy of a word's tag")


if __name__ == "__main__":
    main()
