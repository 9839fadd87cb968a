"""Two processes on CPU train a model, fused and stock, in each distributed way: `python -m ... FILE` saves the ends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.models.bert import modeling_bert as hf

import fastbert
from tests import models
from tests.compat.environments import ABSENT

STEPS = 2
KINDS = {
    "deberta v1": ("deberta", "DebertaForSequenceClassification"),
    "deberta": ("deberta_v2", "DebertaV2ForSequenceClassification"),
    "modernbert": ("modernbert", "ModernBertForSequenceClassification"),
    "esm": ("esm", "EsmForSequenceClassification"),
}
"""Families beside BERT, as modes name them."""
BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def model(mode: str) -> Any:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family := next((name for name in KINDS if name in mode), None):
        from tests.fastbert import test_families as families

        return families.seeded(*KINDS[family], **families.NO_DROPOUT).train()
    if "loss only" in mode:
        return models.seeded(hf.BertForMaskedLM, tie_word_embeddings="tied" in mode, **rates).train()
    return models.seeded(hf.BertForSequenceClassification, **rates).train()


def batch(mode: str, step: int, rows: slice = slice(None)) -> dict[str, Any]:
    mask = models.masks(8, 23)["right"]
    assert mask is not None
    call = {
        "input_ids": models.ids(8, 23, seed=step),
        "attention_mask": mask,
        "labels": models.ids(8, high=4, seed=step),
    }
    if "loss only" in mode:  # the first token of each sequence: as many in either rank's share
        call["labels"] = torch.full((8, 23), -100)
        call["labels"][:, 0] = models.ids(8, seed=step)
    return {name: value[rows] for name, value in call.items()}


# What is done to a model before it is wrapped, here and by the test, whose one process takes the whole batch.


def freeze(model: Any) -> Any:
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    return model


def leave_one_out(model: Any) -> Any:
    torch.manual_seed(0)
    model.unused = nn.Linear(3, 3)
    return model


def adapt(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))


def checkpoint(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def by_layer(model: Any, *parts: str, **how: Any) -> Any:
    """FSDP2 of every layer, then of the submodules named, then of the rest."""
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel) and m.base_model is m)
    for layer in next(m for m in base.modules() if isinstance(m, nn.ModuleList)):
        fully_shard(layer, **how)
    for part in parts:
        fully_shard(base.get_submodule(part), **how)
    return fully_shard(model, **how)


def gather_head(model: Any) -> Any:
    """FSDP2, the head by itself and in bfloat16: its parameters stay gathered after an evaluation."""
    fully_shard(model.cls, mp_policy=BFLOAT16, reshard_after_forward=False)
    return by_layer(model)


def whole(model: Any, **how: Any) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **how)


def same(model: Any) -> Any:
    return model


# name: (what is done before wrapping, wrapping, why it runs stock or None)
MODES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str | None]] = {
    "ddp": (same, DistributedDataParallel, None),
    "ddp, no_sync": (same, DistributedDataParallel, None),
    "ddp, unused": (leave_one_out, lambda m: DistributedDataParallel(m, find_unused_parameters=True), None),
    "ddp, checkpointed": (checkpoint, DistributedDataParallel, None),
    "fsdp2": (same, by_layer, None),
    "ddp, deberta": (same, DistributedDataParallel, None),
    "fsdp2, deberta": (same, by_layer, None),
    "fsdp2, deberta v1": (same, by_layer, None),
    "ddp, modernbert": (same, DistributedDataParallel, None),
    "fsdp2, modernbert, checkpointed": (checkpoint, by_layer, None),
    "fsdp2, esm": (same, by_layer, None),
    "fsdp2, modernbert, bfloat16": (same, lambda m: by_layer(m, mp_policy=BFLOAT16), None),
    "fsdp2, bfloat16": (same, lambda m: by_layer(m, mp_policy=BFLOAT16), None),
    "fsdp2, every part": (same, lambda m: by_layer(m, "embeddings", "encoder"), None),
    "fsdp2, replicated": (
        same,
        lambda m: by_layer(m, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("r", "s"))),
        None,
    ),
    "fsdp2, checkpointed": (checkpoint, by_layer, None),
    "fsdp2, frozen": (freeze, by_layer, None),
    "fsdp2, lora": (adapt, by_layer, None),
    "fsdp2, loss only, tied": (same, by_layer, None),
    "fsdp2, loss only, head in bfloat16": (same, gather_head, None),
    "fsdp2 before fuse": (same, by_layer, "no layer can run fused: fully_shard came before fuse"),
    "fsdp1": (same, lambda m: whole(m, use_orig_params=True), None),
    "fsdp1, flat": (same, whole, "its parameters are elsewhere (a replica of torch.nn.DataParallel, FSDP1)"),
    "fsdp1, by layer": (
        same,
        lambda m: whole(m, auto_wrap_policy=ModuleWrapPolicy({hf.BertLayer}), use_orig_params=True),
        None,
    ),
}

if "esm" in ABSENT.get(transformers.__version__, ()):
    del MODES["fsdp2, esm"]


def named(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are trained, gathered, under the names they have in one process."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            yield name.replace("_fsdp_wrapped_module.", "").removeprefix("module."), whole.detach().clone()


def train(rank: int, mode: str, fused: bool) -> dict[str, Any]:
    prepare, wrap, _ = MODES[mode]
    inner, loss_only = prepare(model(mode)), "loss only" in mode
    if fused and mode != "fsdp2 before fuse":
        fastbert.fuse(inner, loss_only=loss_only)
    wrapped = wrap(inner)
    if fused:
        fastbert.fuse(inner, loss_only=loss_only)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    first = 4 * rank
    for step in range(STEPS):
        if "head" in mode:
            with torch.no_grad():
                wrapped(**batch(mode, step))
        if "no_sync" in mode:  # two halves of the rank's share, the first without communication
            with wrapped.no_sync():
                (wrapped(**batch(mode, step, slice(first, first + 2))).loss / 2).backward()
            (wrapped(**batch(mode, step, slice(first + 2, first + 4))).loss / 2).backward()
        else:
            wrapped(**batch(mode, step, slice(first, first + 4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = fastbert.explain(inner).encoders[0]
    gathered: AbstractContextManager[Any] = nullcontext()
    if mode.startswith("fsdp1"):
        gathered = FullyShardedDataParallel.summon_full_params(wrapped)
    with gathered:
        parameters = dict(named(wrapped))
    losses = []
    with torch.no_grad():
        losses.append(wrapped(**batch(mode, 0)).loss)
        fastbert.unfuse(inner)
        losses.append(wrapped(**batch(mode, 0)).loss)
    return {"parameters": parameters, "said": said, "losses": losses}


def work(rank: int, rendezvous: str, file: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {mode: [train(rank, mode, fused) for fused in (True, False)] for mode in MODES}
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, before any thread is started: what is imported here isn't once more in each.
    mp.start_processes(work, (sys.argv[1] + ".rendezvous", sys.argv[1]), nprocs=2, start_method="fork")
