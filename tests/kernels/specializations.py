"""What launches of many batch shapes compile, without a GPU: nothing is compiled or launched, only chosen.

    python -m tests.kernels.specializations [--arch sm_90]

runs two layers of BERT in bfloat16, embeddings and all, over batches of many shapes and masks, and prints a JSON
line for everything it would compile: the kernel, the values of its constexprs, the shape it was first met at, and how
the model ran: in inference, in training steps with dropout, and in inference with programmatic dependent launch.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

import fastbert
from benchmarks import stub
from fastbert.kernels import launch
from tests.kernels.aot import TARGETS

SHAPES = [
    (1, 1),
    (1, 2),
    (1, 16),
    (1, 17),
    (1, 128),
    (2, 128),
    (3, 7),
    (8, 512),
    (16, 33),
    (32, 384),
    (5, 100),
    (64, 64),
]


def run(arch: str, how: str) -> None:
    train = how == "training"
    launch.DEPENDENT[arch] = how == "dependent"
    width = 256 if train else 1024  # GEMMs of gradients are torch's, on this CPU
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    model = fastbert.fuse(hf.BertModel(BertConfig(vocab_size=64, num_hidden_layers=2, **sizes)).train(train).bfloat16())
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(not train), stub.device(arch) as gpu:
        for shape in SHAPES:
            ids = torch.ones(shape, dtype=torch.int64)
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
            masks: list[Any] = [None, (torch.arange(shape[1]) < lengths).long(), torch.zeros_like(ids)]
            for mask in masks:
                result = model(ids, attention_mask=mask).last_hidden_state
                if train:
                    result.sum().backward()
                for found in gpu.compilations:
                    options = found.options
                    configuration = {"num_warps": options.num_warps, "num_stages": options.num_stages}
                    row = {"how": how, "kernel": found.kernel, "constexprs": {**found.constexprs, **configuration}}
                    print(json.dumps({**row, "dependent": options.launch_pdl, "shape": shape}))
                gpu.compilations.clear()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="sm_90", choices=TARGETS)
    given = parser.parse_args()
    for how in ("inference", "training", "dependent"):
        run(given.arch, how)


if __name__ == "__main__":
    main()
