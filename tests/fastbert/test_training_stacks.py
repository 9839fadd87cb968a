"""What people train with, around a fused model: each does what it does around stock, and forwards run fused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as hf

import fastbert
from tests import models
from tests.fastbert import distributed_steps

KIND = hf.BertForSequenceClassification
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def batch(seed: int = 0, rows: int = 6) -> dict[str, Any]:
    return {
        "input_ids": models.ids(rows, 23, seed=seed),
        "attention_mask": models.masks(rows, 23)["right"],
        "labels": models.ids(rows, high=4, seed=seed),
    }


def pair(**changes: Any) -> tuple[Any, Any]:
    """The same model fused and stock, in training mode, without dropout unless `changes` says so."""
    stock = models.seeded(KIND, **{**NO_DROPOUT, **changes}).train()
    return fastbert.fuse(copy.deepcopy(stock)), stock


def fused_calls(model: Any) -> dict[str, int]:
    said = fastbert.explain(model).encoders[0]
    assert not said.stock_calls
    assert not said.layers
    return said.fused_calls


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Of a step in float32: within a few hundred roundings of the largest element."""
    assert a.keys() == b.keys()
    for name in a:
        scale = b[name].abs().max().item()
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=rtol * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_drop_the_same_again(reentrant: bool, frozen: bool) -> None:
    found = []
    for checkpointed in (True, False):
        model = fastbert.fuse(models.seeded(KIND)).train()
        model.bert.embeddings.requires_grad_(not frozen)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(5)
        model(**batch()).loss.backward()
        assert fused_calls(model) == {"packed": 1}
        found.append(gradients(model))
    assert len(found[0]) > 30
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loop_with_accumulation_clipping_and_a_scaler(optimizer: str, dtype: torch.dtype) -> None:
    losses: list[list[float]] = []
    fused, stock = pair()
    for model in (fused, stock):
        losses.append([])
        stepper = torch.optim.AdamW(model.parameters(), lr=1e-3, **{optimizer: True})
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(4):
            for part in range(2):
                with torch.autocast("cpu", dtype):
                    loss = model(**batch(part)).loss / 2
                scaler.scale(loss).backward()
                losses[-1].append(loss.item())
            scaler.unscale_(stepper)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(stepper)
            scaler.update()
            stepper.zero_grad(set_to_none=True)
        assert scaler.get_scale() > 1
    assert losses[1][-1] < 0.8 * losses[1][1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert fused_calls(fused) == {"packed": 8}


def test_one_module_twice_in_a_graph_and_the_graph_kept() -> None:
    found = []
    for model in pair():
        loss = model(**batch(0)).loss * 2 + model(**batch(1)).loss
        loss.backward(retain_graph=True)
        once = gradients(model)
        loss.backward()
        torch.testing.assert_close(gradients(model)["classifier.weight"], 2 * once["classifier.weight"])
        found.append(once)
    assert_same(*found)


def test_inputs_embeds_that_need_gradients() -> None:
    found = []
    for model in pair():
        model.requires_grad_(False)
        embeds = torch.randn(6, 23, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        call = batch() | {"inputs_embeds": embeds}
        del call["input_ids"]
        model(**call).loss.backward()
        found.append({"inputs_embeds": embeds.grad})
    assert found[0]["inputs_embeds"].abs().max() > 0
    assert_same(*found)


def test_second_derivatives_are_refused_by_name() -> None:
    model, _ = pair()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(NotImplementedError, match=r"second derivatives are not implemented.*unfuse"):
        torch.autograd.grad(model(**batch()).loss, parameters, create_graph=True)


def test_torch_func() -> None:
    fused, stock = pair()
    stock(**batch()).loss.backward()
    expected = gradients(stock)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in fused.named_parameters()}
    torch.func.functional_call(fused, leaves, (), batch()).loss.backward()
    assert fused_calls(fused) == {"packed": 1}
    assert_same({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, expected)
    detached = {name: p.detach() for name, p in leaves.items()}
    found = torch.func.grad(lambda p: torch.func.functional_call(fused, p, (), batch()).loss)(detached)
    assert_same({name: found[name] for name in expected}, expected)  # stock code, inside a transform
    assert fastbert.explain(fused).encoders[0].stock_calls == {"a transform of torch.func": 1}


def test_fuse_and_unfuse_in_the_middle_of_training() -> None:
    fused, stock = pair()
    steppers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (fused, stock)]
    for step in range(4):
        for model, stepper in zip((fused, stock), steppers, strict=True):
            model(**batch(step)).loss.backward()
            stepper.step()
            stepper.zero_grad()
        (fastbert.unfuse if step % 2 == 0 else fastbert.fuse)(fused)
        fused.eval()
        with torch.no_grad():
            torch.testing.assert_close(fused(**batch(9)).logits, stock(**batch(9)).logits, rtol=1e-3, atol=1e-3)
        fused.train()
    assert_same(*({n: p.detach() for n, p in m.named_parameters()} for m in (fused, stock)), rtol=1e-2)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora(targets: Any, checkpointed: bool) -> None:
    from peft import LoraConfig, get_peft_model

    found, outs = [], []
    for model in pair():
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4, init_lora_weights=False)
        adapted = get_peft_model(model, config)
        if checkpointed:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted(**batch()).loss.backward()
        found.append(gradients(adapted))
        outs.append(adapted.merge_and_unload().eval()(**batch()).logits.detach())
    assert any("lora_A" in name for name in found[0])
    assert_same(*found)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_lora_runs_fused_and_drops() -> None:
    from peft import LoraConfig, get_peft_model

    fused, _ = pair()
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", r=4, lora_dropout=0.5, init_lora_weights=False
    )
    adapted = get_peft_model(fused, config).train()
    losses = [adapted(**batch()).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert fused_calls(adapted) == {"packed": 2}


def loop(model: Any, folder: Path, **arguments: Any) -> list[float]:
    """Losses of a few steps of transformers' Trainer, with an evaluation and a resumed run among them."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 16

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {name: value[i % 6] for name, value in batch(i // 6).items()}

    def trainer(steps: int) -> Trainer:
        settings = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
            **arguments,
        )
        return Trainer(model, settings, train_dataset=Rows(), eval_dataset=Rows(), data_collator=default_data_collator)

    trainer(2).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    return [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    fused, stock = pair()
    losses = [loop(model, tmp_path / str(i), **arguments) for i, model in enumerate((fused, stock))]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "bf16" in arguments else 1e-3)
    assert set(fused_calls(fused)) == {"packed"}


def test_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    ends = []
    for model in pair():
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        wrapped, stepper = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch(step)).loss)
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                stepper.zero_grad()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
        if model.bert.encoder.__class__ is not hf.BertEncoder:
            assert fused_calls(model) == {"packed": 4}
    assert_same(*ends, rtol=1e-2)


def test_two_processes(tmp_path: Path) -> None:
    """DDP, and FSDP2 layer by layer, reach the parameters of one process on both shares."""
    command = [sys.executable, "-m", "tests.fastbert.distributed_steps", str(tmp_path / "found")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found")
    stock = distributed_steps.model()
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    for step in range(distributed_steps.STEPS):
        stock(**distributed_steps.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: p.detach() for name, p in stock.named_parameters()}
    for mode in distributed_steps.MODES:
        assert found[mode]["fused"] == {"packed": 6 if "accumulating" in mode else 3}, mode
        assert not found[mode]["stock"] and not found[mode]["layers"], mode
        assert_same(found[mode]["parameters"], expected, rtol=2e-2 if "bfloat16" in mode else 1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_compile_without_a_graph_break(masked: bool) -> None:
    torch.compiler.reset()
    fused, stock = pair()
    calls = [batch(), batch(1)]
    for call in calls:
        if not masked:
            del call["attention_mask"]
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for call in calls:
        fused.zero_grad()
        stock.zero_grad()
        compiled(**call).loss.backward()
        stock(**call).loss.backward()
        assert_same(gradients(fused), gradients(stock))


def test_compile_with_dropout_and_other_lengths() -> None:
    torch.compiler.reset()
    fused, _ = pair(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    compiled = torch.compile(fused, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for length in (23, 17, 9):
            call = {name: x[:, :length] if x.dim() > 1 else x for name, x in batch().items()}
            losses = [compiled(**call).loss for _ in range(2)]
            losses[0].backward()
            assert losses[0] != losses[1]
    assert all(g.isfinite().all() for g in gradients(fused).values())


def test_sentence_transformers_loss(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    models.seeded(vocab_size=15, **NO_DROPOUT).save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    found = []
    for fuse in (True, False):
        model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").train()
        if fuse:
            fastbert.fuse(model)
        texts = (["a b c", "d", "e f g h i j a b c d e"], ["c b", "d d d d", "j i h g f e"])
        features = [dict(model.tokenizer(part, padding=True, return_tensors="pt")) for part in texts]
        MultipleNegativesRankingLoss(model)(features, None).backward()
        found.append(gradients(model))
        if fuse:
            assert sum(fused_calls(model).values()) == 2
    assert_same(*found)
