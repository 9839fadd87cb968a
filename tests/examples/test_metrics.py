"""What the scripts measure and how they make their examples, against counts by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding

from tests.examples.conftest import script


@pytest.fixture
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


# Entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-x I-x O", {("x", 0, 2)}),
        ("B-x B-x", {("x", 0, 1), ("x", 1, 2)}),
        ("B-x I-y", {("x", 0, 1), ("y", 1, 2)}),
        ("O I-x I-x B-y", {("x", 1, 3), ("y", 3, 4)}),
        ("B-x O I-x", {("x", 0, 1), ("x", 2, 3)}),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_entities(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert script("token_classification").entities(tags.split()) == expected


def test_entity_scores() -> None:
    scores = script("token_classification").scores
    # Wanted: three. Given: four, of which the first is right, the second too short, the third of another type.
    truth = [["B-x", "I-x", "O", "B-y", "I-y"], ["B-x", "O"]]
    given = [["B-x", "I-x", "O", "B-y", "O"], ["B-y", "B-x"]]
    assert scores(truth, given) == {"precision": 1 / 4, "recall": 1 / 3, "f1": pytest.approx(2 / 7)}
    assert scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_columns(tmp_path: Path) -> None:
    read = script("token_classification").read
    path = tmp_path / "columns.conll"
    path.write_text("\ufeffU.N. NNP I-NP I-ORG\nof IN O O\n\t\nnew york\tB-LOC\n\ufeff\n\n", encoding="utf-8")
    assert read(path) == [(["U.N.", "of"], ["I-ORG", "O"]), (["new york"], ["B-LOC"])]


# Answers


def test_answers_are_compared_as_squad_does() -> None:
    qa = script("question_answering")
    assert qa.normalize("The  Cat's, a dog!") == "cats dog"
    assert qa.f1("the red cat", "a red dog") == 0.5
    assert qa.f1("red red cat", "red dog") == pytest.approx(2 * 1 / 5)
    assert qa.f1("dog", "cat") == qa.f1("", "cat") == 0.0
    answers, references = ["The cat.", "red dog", "x"], [["dog", "cat"], ["dog"], ["y", "z"]]
    assert qa.scores(answers, references) == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3) / 3),
    }


def test_windows_give_back_every_answer(tokenizer: Any) -> None:
    qa = script("question_answering")
    context = " ".join(f"the {a}  cat saw a {b} dog." for a in ("red", "big") for b in ("small", "green"))
    questions = [
        qa.Question("a cat ?", context, [(w, context.index(w))]) for w in ("red  cat", "green", "a small dog", ".")
    ]
    made = qa.windows(tokenizer, questions, 16, 5)
    assert len(made) > 2 * len(questions)
    found: dict[int, set[str]] = {i: set() for i in range(len(questions))}
    for window in made:
        item = qa.labelled(window, questions[window.question])
        first, last = item["start_positions"], item["end_positions"]
        assert (first == 0) == (last == 0)
        if first:
            start, end = (np.zeros(20, np.float32) for _ in range(2))  # as padded by the Trainer
            start[first] = end[last] = 3
            start[0] = end[1] = start[18] = end[19] = 9  # no places in the passage
            score, (i, j) = qa.best_span(window, start, end)
            assert score == 6
            found[window.question].add(context[i:j])
    assert found == {i: {question.answers[0][0]} for i, question in enumerate(questions)}
    # All of the passage is in one window or another.
    covered = {
        place for window in made if window.question == 0 for span in window.spans if span for place in range(*span)
    }
    assert {i for i, letter in enumerate(context) if letter != " "} <= covered


def test_a_span_ends_where_it_starts_or_later_and_is_short() -> None:
    qa = script("question_answering")
    window = qa.Window(0, {}, [None, *[(i, i + 1) for i in range(60)]])
    start, end = np.full(61, -20.0), np.zeros(61)
    start[0], start[3], start[10] = 99, 1, 5
    end[5], end[20], end[55] = 9, 1, 8  # 5 is before 10, and 55 too far from it
    assert qa.best_span(window, start, end) == (10, (2, 5))
    start[3] = -20
    assert qa.best_span(window, start, end) == (6, (9, 20))


# Translations


def test_bleu() -> None:
    bleu = script("translation").bleu
    assert bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)
    # 1- to 4-grams: 5/6, 3/5, 2/4, 1/3; as long as the reference.
    assert bleu(["a b c d x f"], ["a b c d e f"]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # Clipped, and short: 4/4, 3/3, 2/2, 1/1 of four words where six were wanted.
    assert bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4))
    # Counted over the corpus: 5/6, 4/4, 3/3, 2/2.
    assert bleu(["a b c d e", "x"], ["a b c d e", "y"]) == pytest.approx(100 * (5 / 6) ** 0.25)
    assert bleu(["the the the the"], ["the cat"]) == bleu([""], ["a"]) == 0.0


# Ranking


def test_candidates(tmp_path: Path) -> None:
    ranking = script("ranking")
    path = tmp_path / "dialogues.jsonl"
    entries = [
        {"context": ["a", "b"], "response": "r0", "negatives": ["r0", "n1", "n1", "n2"]},
        {"context": "c", "response": "r1", "negatives": ["n3", "n4", "n5", "n6", "n7"]},
        *({"context": "d", "response": f"r{i}"} for i in range(2, 9)),
        {"context": "e", "response": "r2"},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    dialogues = ranking.read(path)
    assert dialogues[0] == (["a", "b"], "r0", ["r0", "n1", "n1", "n2"])
    for seed in range(20):
        made = ranking.candidates(path, dialogues, 5, seed)
        for dialogue, chosen in zip(dialogues, made, strict=True):
            assert len({*chosen}) == len(chosen) == 5
            assert chosen[0] == dialogue.response
        assert {*made[0]} >= {"r0", "n1", "n2"}
        assert {*made[1][1:]} < {"n3", "n4", "n5", "n6", "n7"}
        assert {*made[5]} <= {f"r{i}" for i in range(9)}
    assert made == ranking.candidates(path, dialogues, 5, 19) != ranking.candidates(path, dialogues, 5, 18)


def test_ranks_count_ties_against_the_response(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = script("ranking")
    scores = torch.zeros(22, 3)
    scores[0] = torch.tensor([1.0, 0.5, 0.2])  # first
    scores[1] = torch.tensor([0.3, 0.5, 0.2])  # second; all others are tied, so third
    predictions = SimpleNamespace(predictions=scores.view(-1, 1).numpy())
    monkeypatch.setattr(ranking.common.Trainer, "predict", lambda self, dataset: predictions)
    ranking.main(command("ranking", "--steps=1"))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["recall@1"] == pytest.approx(1 / 22)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 20 / 3) / 22)


def test_listwise_loss() -> None:
    logits = torch.tensor([[0.0], [1.0], [2.0], [5.0], [1.0], [0.0]])
    loss = script("ranking").listwise(SimpleNamespace(logits=logits), torch.zeros(2, dtype=torch.int64))
    first, second = (1 + math.e + math.e**2), (math.e**5 + math.e + 1) / math.e**5
    assert loss.item() == pytest.approx((math.log(first) + math.log(second)) / 2)


# Masks and pairs


def test_choose_draws_the_number_asked_for_evenly() -> None:
    choose = script("common").choose
    candidates = torch.tensor([[0, 1, 1, 1, 1, 0]] * 4000).bool()
    counts = torch.arange(4000) % 5
    chosen = choose(candidates, counts, torch.Generator().manual_seed(0))
    assert chosen.sum(1).equal(counts)
    assert not chosen[:, [0, 5]].any()
    assert (chosen[:, 1:5].double().mean(0) - 0.5).abs().max() < 0.03


def test_mask_of_pretraining(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (400, 42), generator=generator)
    ids[:, 0], ids[:, 20], ids[:, 39], ids[:, 40:] = 2, 3, 3, 0
    ids[0, 1:39] = 3
    ids[0, 7] = 6
    masked = script("pretraining").mask(ids, tokenizer, generator)
    labels, inputs = masked["labels"], masked["input_ids"]
    chosen = labels != -100
    assert chosen[0].nonzero().tolist() == [[7]]  # at least one
    assert chosen[1:].sum(1).eq(round(0.15 * 37)).all()
    assert labels[chosen].equal(ids[chosen])
    assert not torch.isin(ids[chosen], torch.tensor([0, 1, 2, 3, 4])).any()
    assert inputs[~chosen].equal(ids[~chosen])
    total = chosen.sum().item()
    assert (inputs[chosen] == tokenizer.mask_token_id).sum().item() / total == pytest.approx(0.8, abs=0.03)
    assert (inputs[chosen] == ids[chosen]).sum().item() / total == pytest.approx(0.1, abs=0.03)


class Numbers:
    """A tokenizer of words that are numbers."""

    cls_token_id, sep_token_id = -1, -2

    def __call__(self, sentences: list[str], add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[int(word) for word in sentence.split()] for sentence in sentences])


def test_pairs() -> None:
    pretraining = script("pretraining")
    draw = random.Random(0)
    documents = []  # that count, each from a thousand of its own
    for i in range(200):
        words = iter(range(1000 * i, 1000 * i + 999))
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 12))]
        documents.append([" ".join(str(next(words)) for _ in range(size)) for size in sizes])
    made = pretraining.pairs(documents, Numbers(), 24, 0)
    everything = {int(word) for document in documents for sentence in document for word in sentence.split()}
    follows = 0
    for item in made:
        ids, types = item["input_ids"], item["token_type_ids"]
        assert len(ids) == len(types) == len(item["attention_mask"]) <= 24
        split = types.index(1)
        assert types == [0] * split + [1] * (len(ids) - split)
        assert (ids[0], ids[split - 1], ids[-1]) == (-1, -2, -2)
        first, second = ids[1 : split - 1], ids[split:-1]
        for part in (first, second):
            assert part == list(range(part[0], part[0] + len(part)))  # a text, unbroken
            assert {*part} <= everything
        if item["next_sentence_label"] == pretraining.FOLLOWS:
            follows += 1
            assert second[0] == first[-1] + 1
        else:
            assert second[0] // 1000 != first[0] // 1000
    assert 0.3 < follows / len(made) < 0.5  # the end of a document has nothing that follows
    assert {item["input_ids"][1] // 1000 for item in made} == {*range(200)}
    assert made == pretraining.pairs(documents, Numbers(), 24, 0)

    # Where all fits, nothing is left out: what was replaced has its turn later.
    whole = set()
    for item in pretraining.pairs(documents, Numbers(), 300, 0):
        split = item["token_type_ids"].index(1)
        whole |= {*item["input_ids"][: None if item["next_sentence_label"] == pretraining.FOLLOWS else split]}
    assert whole - {-1, -2} == everything


def test_the_same_text_gives_the_same_vocabulary() -> None:
    draw = random.Random(0)
    letters = "abcdefghijklmnop"
    documents = [[" ".join("".join(draw.choices(letters, k=5)) for _ in range(200))] for _ in range(2)]
    first, second = (script("pretraining").vocabulary(documents, 300) for _ in range(2))
    assert len(first) == 300
    assert first.get_vocab() == second.get_vocab()
    assert first.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    text = documents[0][0]
    assert first.decode(first(text).input_ids, skip_special_tokens=True) == text


# Writing


def test_mask_of_generation_is_even_over_how_many(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (4000, 6), generator=generator)
    ids[:, 0], ids[:, 5] = 2, 3
    masked = script("generation").mask(ids, tokenizer, generator)
    chosen = masked["labels"] != -100
    assert masked["labels"][chosen].equal(ids[chosen])
    assert masked["input_ids"].equal(ids.masked_fill(chosen, tokenizer.mask_token_id))
    shares = torch.bincount(chosen.sum(1), minlength=5) / 4000
    assert shares[0] == 0 and not chosen[:, [0, 5]].any()
    assert (shares[1:] - 0.25).abs().max() < 0.03


class Knows(nn.Module):
    """Gives the right tokens of `line` each a probability that depends on how many of its tokens are masked."""

    device = torch.device("cpu")

    def __init__(self, line: Tensor, size: int, mask: int, surprise: Tensor) -> None:
        super().__init__()
        self.line, self.size, self.mask, self.surprise = line, size, mask, surprise

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        masked = (input_ids == self.mask).sum(1)
        right = torch.exp(-self.surprise[masked])  # the rest is shared out evenly
        logits = ((1 - right) / (self.size - 1)).log()[:, None, None].expand(*input_ids.shape, self.size).clone()
        logits.scatter_(
            2,
            self.line[None, :, None].expand(len(input_ids), -1, 1),
            right.log()[:, None, None].expand(-1, len(self.line), 1),
        )
        return SimpleNamespace(logits=logits)


def test_the_bound_is_that_of_any_order(tokenizer: Any) -> None:
    # Of L tokens filled one by one, in random order, that filled with k masks left costs surprise[k]: the mean over k.
    line = torch.tensor([2, 6, 7, 8, 9, 3])
    surprise = torch.tensor([0.0, 0.1, 0.4, 1.5, 3.0])
    trainer = SimpleNamespace(
        model=Knows(line, len(tokenizer), tokenizer.mask_token_id, surprise),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        accelerator=SimpleNamespace(autocast=lambda: torch.no_grad()),
    )
    item = {"input_ids": line.tolist(), "attention_mask": [1] * 6}
    found = script("generation").evaluate(trainer, [item] * 2000, SimpleNamespace(seed=0, batch_size=500))
    assert found["loss"] == pytest.approx(surprise[1:].mean().item(), abs=0.05)
    assert found["perplexity_bound"] == pytest.approx(math.exp(found["loss"]))


def test_writing_fills_every_mask_and_keeps_the_prompt(tokenizer: Any) -> None:
    line = torch.tensor([2, 5, 6, 7, 8, 9, 3])
    sure = Knows(line, len(tokenizer), tokenizer.mask_token_id, torch.full((8,), 1e-6))
    text = script("generation").write(sure, tokenizer, "", [5, 5], torch.Generator().manual_seed(0))
    assert text == [tokenizer.decode(line[1:-1])] * 2
    unsure = Knows(line, len(tokenizer), tokenizer.mask_token_id, torch.full((8,), 9.0))
    written = script("generation").write(unsure, tokenizer, "the dog", [5, 5], torch.Generator().manual_seed(0))
    for ids in tokenizer(written).input_ids:
        assert len(ids) == len(line) and not {*ids[1:-1]} & {*tokenizer.all_special_ids}
        assert ids[1:3] == tokenizer.convert_tokens_to_ids(["the", "dog"])
    assert written[0] != written[1]
