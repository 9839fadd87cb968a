"""Fine-tunes BERT to find the answer to a question in a passage, and measures exact match and F1.

    python examples/question_answering.py --model google-bert/bert-base-uncased \\
        --train train-v1.1.json --eval dev-v1.1.json --output runs/squad

Files: SQuAD v1.1 JSON. A passage that doesn't fit into --max-length tokens beside its question is read in windows that
overlap by --stride tokens; the best span of all windows is the answer.
Metric: as SQuAD's own evaluation script counts, in per cent: answers in lower case, without punctuation, articles and
superfluous spaces; the best of the reference answers; exact match and the F1 of the words in common.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
from transformers import AutoTokenizer, BertForQuestionAnswering, DataCollatorWithPadding

import fastbert

LONGEST = 30  # tokens in an answer
CANDIDATES = 20  # starts and ends looked at in each window


class Question(NamedTuple):
    """A question, its passage and its reference answers, each with its first character's place in the passage."""

    text: str
    context: str
    answers: list[tuple[str, int]]


def read(path: Path) -> list[Question]:
    """The questions of a SQuAD v1.1 file."""
    try:
        data = json.loads(common.read(path))
    except json.JSONDecodeError as error:
        raise common.malformed(path, error.lineno, f"expected JSON: {error.msg}") from None
    questions = []
    where = "data"
    try:
        for i, article in enumerate(data["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                for k, qa in enumerate(paragraph["qas"]):
                    where = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    answers = [(answer["text"], answer["answer_start"]) for answer in qa["answers"]]
                    questions.append(Question(qa["question"], paragraph["context"], answers))
                    if not answers:
                        raise common.malformed(path, where, "expected at least one answer, found none")
                    for text, start in answers:
                        there = paragraph["context"][start : start + len(text)]
                        if not text or there != text:
                            raise common.malformed(
                                path, where, f"expected the answer {text!r} at character {start}, found {there!r}"
                            )
    except (KeyError, TypeError) as error:
        raise common.malformed(path, f"at or after {where}", f"expected SQuAD v1.1's fields: {error!r}") from None
    if not questions:
        raise common.malformed(path, "data", "expected questions, found none")
    return questions


def normalize(text: str) -> str:
    """An answer as SQuAD compares it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, reference: str) -> float:
    """The F1 of the words two answers have in common."""
    words, wanted = normalize(answer).split(), normalize(reference).split()
    common_words = (Counter(words) & Counter(wanted)).total()
    return 2 * common_words / (len(words) + len(wanted)) if common_words else 0.0


def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in per cent, each answer's best over its references."""
    exact, overlap = 0.0, 0.0
    for answer, wanted in zip(answers, references, strict=True):
        exact += any(normalize(answer) == normalize(reference) for reference in wanted)
        overlap += max(f1(answer, reference) for reference in wanted)
    return {"exact_match": 100 * exact / len(answers), "f1": 100 * overlap / len(answers)}


class Window(NamedTuple):
    """A question and as much of its passage as fits."""

    question: int
    inputs: dict[str, Any]
    spans: list[tuple[int, int] | None]
    """Of each token, where it stands in the passage, in characters; None for tokens outside it."""


def windows(tokenizer: Any, questions: Sequence[Question], max_length: int, stride: int) -> list[Window]:
    """All windows of all questions."""
    tokens = tokenizer(
        # Spaces before a question are tokens to no one, but would count in the offsets.
        [question.text.strip() for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    questions_of, offsets = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
    made = []
    for i, question in enumerate(questions_of):
        spans = [span if part == 1 else None for span, part in zip(offsets[i], tokens.sequence_ids(i), strict=True)]
        made.append(Window(question, {key: tokens[key][i] for key in tokens}, spans))
    return made


def labelled(window: Window, question: Question) -> dict[str, Any]:
    """A window's inputs with the first and last token of the first answer; both 0, [CLS], where it isn't all there."""
    text, start = question.answers[0]
    end = start + len(text)
    inside = [i for i, span in enumerate(window.spans) if span and span[0] < end and span[1] > start]
    first = last = 0
    if inside and window.spans[inside[0]][0] <= start and window.spans[inside[-1]][1] >= end:  # type: ignore[index]
        first, last = inside[0], inside[-1]
    return {**window.inputs, "start_positions": first, "end_positions": last}


def best_span(window: Window, start: np.ndarray, end: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The score and place, in characters, of a window's best answer; start and end are its logits, one a token."""
    passage = np.array([span is not None for span in window.spans])
    start, end = (np.where(passage, logits[: len(passage)], -np.inf) for logits in (start, end))
    best = (-np.inf, (0, 0))
    for i in np.argsort(-start)[:CANDIDATES]:
        for j in np.argsort(-end)[:CANDIDATES]:
            if i <= j < i + LONGEST and start[i] + end[j] > best[0]:
                best = (float(start[i] + end[j]), (window.spans[i][0], window.spans[j][1]))
    return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, epochs=2, batch_size=16, max_length=384)
    parser.add_argument("--stride", type=common.count, default=128, help="tokens that windows overlap by")
    args = parser.parse_args(argv)
    train, held_out = read(args.train), read(args.eval)

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = max(len(tokenizer(question.text).input_ids) for question in [*train, *held_out]) + 1  # the last [SEP]
    if args.max_length <= longest + args.stride:
        raise SystemExit(
            f"--max-length is {args.max_length}; expected more than {longest + args.stride}: "
            f"the longest question ({longest} tokens, with [CLS] and [SEP]) and --stride"
        )
    model = BertForQuestionAnswering.from_pretrained(checkpoint or args.model, dtype="float32")
    if not args.stock:
        fastbert.fuse(model)

    made = windows(tokenizer, train, args.max_length, args.stride)
    trainer = common.Trainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples([labelled(window, train[window.question]) for window in made]),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)

    made = windows(tokenizer, held_out, args.max_length, args.stride)
    starts, ends = trainer.predict(common.Examples([window.inputs for window in made])).predictions
    best = [(-np.inf, (0, 0))] * len(held_out)
    for window, start, end in zip(made, starts, ends, strict=True):
        best[window.question] = max(best[window.question], best_span(window, start, end))
    answers = [q.context[first:last] for q, (_, (first, last)) in zip(held_out, best, strict=True)]
    metrics = scores(answers, [[text for text, _ in question.answers] for question in held_out])
    for question, answer in list(zip(held_out, answers, strict=True))[:3]:
        print(f"{question.text.strip()} -> {answer}")
    common.finish(args, trainer, metrics, "cross-entropy of where an answer begins and ends, mean of both")


if __name__ == "__main__":
    main()
