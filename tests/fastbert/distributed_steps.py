"""Two processes on CPU train a fused model with DDP and FSDP2, and save what came of it.

python -m tests.fastbert.distributed_steps FILE
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert import modeling_bert as hf

import fastbert
from tests import models

STEPS = 3
MODES = ("ddp", "ddp, accumulating", "fsdp2", "fsdp2 in bfloat16")


def model() -> Any:
    return models.seeded(
        hf.BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()


def batch(step: int, rows: slice = slice(None)) -> dict[str, Any]:
    call = {
        "input_ids": models.ids(8, 23, seed=step),
        "attention_mask": models.masks(8, 23)["right"],
        "labels": models.ids(8, high=4, seed=step),
    }
    return {name: value[rows] for name, value in call.items()}


def train(rank: int, mode: str) -> dict[str, Any]:
    fused = fastbert.fuse(model())
    if mode.startswith("ddp"):
        wrapped: Any = DistributedDataParallel(fused, find_unused_parameters=True)
    else:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bfloat16" in mode else MixedPrecisionPolicy()
        for layer in fused.bert.encoder.layer:
            fully_shard(layer, mp_policy=policy)
        wrapped = fully_shard(fused, mp_policy=policy)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    first = 4 * rank
    for step in range(STEPS):
        if "accumulating" in mode:  # two halves of the rank's share, the first without communication
            with wrapped.no_sync():
                (wrapped(**batch(step, slice(first, first + 2))).loss / 2).backward()
            (wrapped(**batch(step, slice(first + 2, first + 4))).loss / 2).backward()
        else:
            wrapped(**batch(step, slice(first, first + 4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = fastbert.explain(fused).encoders[0]
    parameters = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in fused.named_parameters()
    }
    return {"parameters": parameters, "fused": said.fused_calls, "stock": said.stock_calls, "layers": said.layers}


def work(rank: int, rendezvous: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {mode: train(rank, mode) for mode in MODES}
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1] + ".rendezvous", sys.argv[1]), nprocs=2)
