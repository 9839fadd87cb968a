"""Trains a translator of two BERTs, an encoder and a decoder, and measures token accuracy and BLEU.

    python examples/translation.py --model google-bert/bert-base-multilingual-cased \\
        --train train.tsv --eval held_out.tsv --output runs/translation

Files: a line `source TAB target`. Both halves start from --model; the decoder's cross-attention starts at random.
fastbert fuses the encoder; the decoder, causal and with a cache, runs stock.
Metrics, on --eval: token_accuracy, the share of target tokens (and the end) that are most likely given the source and
the true tokens before; bleu, 0 to 100, of greedy translations: corpus BLEU-4, one reference, not smoothed, over the
words, split at spaces, of texts that have been through the tokenizer. It isn't comparable with sacreBLEU's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, EncoderDecoderModel

import fastbert

SHOWN = 3


def read(path: Path) -> list[tuple[str, str]]:
    """(source, target) of every line."""
    made = []
    for number, line in common.lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip():
            raise common.malformed(
                path, number, f"expected `source TAB target`, found {len(fields)} field(s): {line!r}"
            )
        made.append((fields[0], fields[1]))
    if not made:
        raise common.malformed(path, 1, "expected lines `source TAB target`, found none")
    return made


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4, 0 to 100 (Papineni et al. 2002), over words split at spaces; 0 where no 4 words in a row match."""
    right, given = [0] * 4, [0] * 4
    length = wanted = 0
    for translation, reference in zip(translations, references, strict=True):
        words, truth = translation.split(), reference.split()
        length, wanted = length + len(words), wanted + len(truth)
        for n in range(1, 5):
            grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            there = Counter(tuple(truth[i : i + n]) for i in range(len(truth) - n + 1))
            right[n - 1] += (grams & there).total()
            given[n - 1] += grams.total()
    if not min(right):
        return 0.0
    precision = math.exp(sum(math.log(r / g) for r, g in zip(right, given, strict=True)) / 4)
    return 100 * precision * min(1.0, math.exp(1 - wanted / length))


@torch.inference_mode()
def evaluate(
    trainer: common.Trainer, pairs: list[tuple[str, str]], examples: list[dict[str, Any]], args: Any
) -> dict[str, float]:
    """Token accuracy and BLEU; prints some translations."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    right = tokens = 0
    translations, references = [], []
    for batch in common.batches(examples, args.batch_size, "held-out"):
        inputs = trainer.data_collator(batch).to(model.device)
        labels = inputs["labels"]
        with trainer.accelerator.autocast():
            best = model(**inputs).logits.argmax(2)
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            written = model.generate(**given, max_new_tokens=args.max_length, do_sample=False)
        right += ((best == labels) & (labels != -100)).sum().item()
        tokens += (labels != -100).sum().item()
        translations += tokenizer.batch_decode(written, skip_special_tokens=True)
        references += tokenizer.batch_decode([item["labels"] for item in batch], skip_special_tokens=True)
    for (source, _), translation in list(zip(pairs, translations, strict=True))[:SHOWN]:
        print(f"{source} -> {translation}")
    return {"token_accuracy": right / tokens, "bleu": bleu(translations, references)}


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, epochs=10).parse_args(argv)
    train, held_out = read(args.train), read(args.eval)

    checkpoint = common.begin(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if checkpoint is None:
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(
            args.model, args.model, encoder_dtype="float32", decoder_dtype="float32"
        )
        for settings in (model.config, model.generation_config):
            settings.decoder_start_token_id = tokenizer.cls_token_id
            settings.eos_token_id = tokenizer.sep_token_id
            settings.pad_token_id = tokenizer.pad_token_id
    else:
        model = EncoderDecoderModel.from_pretrained(checkpoint, dtype="float32")
    if not args.stock:
        fastbert.fuse(model)

    def examples(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        sources, targets = (
            tokenizer(list(s), truncation=True, max_length=args.max_length) for s in zip(*pairs, strict=True)
        )
        # The decoder starts from [CLS] by itself; its labels begin with the first token.
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels[1:]}
            for ids, mask, labels in zip(sources.input_ids, sources.attention_mask, targets.input_ids, strict=True)
        ]

    trainer = common.Trainer(
        model,
        common.training_arguments(args),
        train_dataset=common.Examples(examples(train)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    common.train(trainer, checkpoint)
    metrics = evaluate(trainer, held_out, examples(held_out), args)
    common.finish(args, trainer, metrics, "cross-entropy of a target token")


if __name__ == "__main__":
    main()
