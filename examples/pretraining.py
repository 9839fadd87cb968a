"""Pretrains BERT from scratch on plain text: its own WordPiece vocabulary, masked words and sentence pairs.

    python examples/pretraining.py --model google-bert/bert-base-uncased \\
        --train train.txt --eval held_out.txt --output runs/pretraining --epochs 40

Files: a sentence a line, and a blank line between documents (at least two). Of --model only config.json is used.
1. A WordPiece vocabulary of --vocabulary pieces is trained on --train; it is saved with the model.
2. Neighbouring sentences fill examples of up to --max-length tokens, split in two; the second half of one in two is
   replaced by a text from another document (next sentence prediction). Pairs are drawn once.
3. In every step 15 % of the tokens are chosen anew; 80 % of these become [MASK], 10 % any token, 10 % stay.
Metrics, on --eval, masked once: mlm_loss (cross-entropy, nats a masked token), mlm_accuracy, nsp_accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import common
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, BertTokenizer, DataCollatorWithPadding

import fastbert

MASKED = 0.15
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FOLLOWS, RANDOM = 0, 1  # transformers' labels of next sentence prediction


def read(path: Path) -> list[list[str]]:
    """Documents, each a list of sentences."""
    documents: list[list[str]] = [[]]
    for _, line in common.lines(path):
        if line.strip():
            documents[-1].append(line.strip())
        elif documents[-1]:
            documents.append([])
    documents = [document for document in documents if document]
    if len(documents) < 2:
        raise common.malformed(
            path, 1, f"expected documents separated by blank lines, at least 2; found {len(documents)}"
        )
    return documents


def vocabulary(documents: list[list[str]], size: int) -> Any:
    """A WordPiece tokenizer of `size` pieces (more where the text has more letters), trained on `documents`."""
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sentences = [wordpiece.normalizer.normalize_str(sentence) for document in documents for sentence in document]
    words = {word for sentence in sentences for word, _ in wordpiece.pre_tokenizer.pre_tokenize_str(sentence)}
    # The trainer numbers single characters in no fixed order, and pieces that are as frequent as each other by
    # those numbers: named beforehand, they make the same text give the same vocabulary.
    single = sorted({word[0] for word in words}) + sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL + single)
    wordpiece.train_from_iterator(sentences, trainer)
    return BertTokenizer(vocab=wordpiece.get_vocab())


def pairs(documents: list[list[str]], tokenizer: Any, max_length: int, seed: int) -> list[dict[str, Any]]:
    """Examples for next sentence prediction, not masked yet."""
    draw = random.Random(seed)
    room = max_length - 3  # [CLS] and two [SEP]
    texts = [tokenizer(document, add_special_tokens=False).input_ids for document in documents]
    made = []
    for number, sentences in enumerate(texts):
        place = 0
        while place < len(sentences):
            chunk = [sentences[place]]
            while place + len(chunk) < len(sentences) and sum(map(len, chunk)) < room:
                chunk.append(sentences[place + len(chunk)])
            cut = draw.randint(1, max(1, len(chunk) - 1))
            first, second = list(chain(*chunk[:cut])), list(chain(*chunk[cut:]))
            label = FOLLOWS
            if not second or draw.random() < 0.5:
                label = RANDOM
                other = texts[(number + draw.randrange(1, len(texts))) % len(texts)]
                second = list(chain(*other[draw.randrange(len(other)) :]))
                place += cut  # what was replaced comes first in the next one
            else:
                place += len(chunk)
            # Trimmed at the far ends, so that the two still meet where the text was cut.
            kept = max(room - len(second), room // 2)
            first = first[-kept:]
            made.append({**common.pair(tokenizer, first, second[: room - len(first)]), "next_sentence_label": label})
    return made


def mask(ids: Tensor, tokenizer: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Token ids (B, S) int64 -> input_ids with tokens masked, and labels: the token where masked, elsewhere -100."""
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    candidates = ~torch.isin(ids, special)
    chosen = common.choose(candidates, (candidates.sum(1) * MASKED).round().clamp(min=1), generator)
    where = ids.device if generator is None else generator.device
    fate = torch.rand(ids.shape, generator=generator, device=where).to(ids.device)
    anything = torch.randint(len(tokenizer), ids.shape, generator=generator, device=where).to(ids.device)
    masked = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    masked = torch.where(chosen & (fate >= 0.9), anything, masked)
    return {"input_ids": masked, "labels": torch.where(chosen, ids, -100)}


class MaskingTrainer(common.Trainer):
    """Masks each batch as it is used: drawn earlier, by a collator, masks would differ after a resume."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        masked = mask(inputs["input_ids"], self.processing_class)
        return super().compute_loss(model, {**inputs, **masked}, *args, **kwargs)


@torch.inference_mode()
def evaluate(trainer: common.Trainer, examples: list[dict[str, Any]], args: Any) -> dict[str, float]:
    """Loss and accuracy on masked tokens, and accuracy on sentence pairs."""
    model, generator = trainer.model.eval(), torch.Generator().manual_seed(args.seed)
    loss = right = masked = pairs_right = 0.0
    for batch in common.batches(examples, args.batch_size, "held-out"):
        inputs = trainer.data_collator(batch).to(model.device)
        follows = inputs.pop("next_sentence_label")
        inputs.update(mask(inputs["input_ids"], trainer.processing_class, generator))
        labels = inputs.pop("labels")
        with trainer.accelerator.autocast():
            outputs = model(**inputs)
        logits, wanted = outputs.prediction_logits[labels != -100].float(), labels[labels != -100]
        loss += nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(1) == wanted).sum().item()
        masked += len(wanted)
        pairs_right += (outputs.seq_relationship_logits.argmax(1) == follows).sum().item()
    return {"mlm_loss": loss / masked, "mlm_accuracy": right / masked, "nsp_accuracy": pairs_right / len(examples)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, epochs=10, lr=1e-4)
    parser.add_argument("--vocabulary", type=common.count, default=8192, help="pieces (default: %(default)s)")
    args = parser.parse_args(argv)
    train, held_out = read(args.train), read(args.eval)

    checkpoint = common.begin(args)
    if checkpoint is None:
        tokenizer = vocabulary(train, args.vocabulary)
        config = BertConfig.from_pretrained(args.model)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        model = BertForPreTraining(config)
    else:
        tokenizer = BertTokenizer.from_pretrained(checkpoint)
        model = BertForPreTraining.from_pretrained(checkpoint, dtype="float32")
    if not args.stock:
        fastbert.fuse(model, loss_only=True)

    trainer = MaskingTrainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples(pairs(train, tokenizer, args.max_length, args.seed)),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)
    metrics = evaluate(trainer, pairs(held_out, tokenizer, args.max_length, args.seed), args)
    common.finish(args, trainer, metrics, "cross-entropy of a masked token + that of a sentence pair")


if __name__ == "__main__":
    main()
