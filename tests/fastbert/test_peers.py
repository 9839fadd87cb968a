"""The candidates of `fastbert bench --peers`: what they compute is what stock does, and what can't run says why."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from fastbert.kernels import launch
from fastbert.measure import bench, cases, peers
from fastbert.measure.names import PEERS
from tests import models

ON_A_GPU = ("graphs", "graphs-pdl", "fp8", "reduce-overhead", "max-autotune", "torch-varlen", "flash-attn")


def run(names: Any, dtype: torch.dtype, train: bool = False) -> dict[str, dict[str, Any]]:
    work = [cases.Workload("three", (3, 19, 7)), cases.Workload("one", (11,))]
    records = bench.run(
        work, ["minilm"], [dtype], device=torch.device("cpu"), repeats=3, peers=tuple(names), train=train
    )
    return {f"{record['workload']} {record['candidate']}": record for record in records}


def test_the_command_line_knows_them_all() -> None:
    assert tuple(peers.PEERS) == PEERS


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["eager", "compile", "onnxruntime", "openvino"])
def test_peers_on_a_cpu(name: str) -> None:
    """Checked against float64 by the benchmark itself, on a batch and on another shape; then timed."""
    records = run([name], torch.float32)
    for case in ("three", "one"):
        record = records[f"{case} {peers.PEERS[name][0]}"]
        assert (record["status"], record["repeats"]) == ("ok", 3)
        assert 0 < record["error"] < 1e-6
        assert record["ratio_to_stock"] > 0


@pytest.mark.usefixtures("tiny")
def test_peers_that_cannot_run_say_why() -> None:
    records = run(ON_A_GPU, torch.float32)
    reasons = [records[f"three {peers.PEERS[name][0]}"]["status"] for name in ON_A_GPU]
    assert reasons == [
        "UNAVAILABLE: CUDA graphs are for CUDA",
        "UNAVAILABLE: programmatic dependent launch takes sm_90 or later",
        "UNAVAILABLE: FP8 is simulated on a CPU",
        'UNAVAILABLE: mode "reduce-overhead" is for CUDA',
        'UNAVAILABLE: mode "max-autotune" is for CUDA',
        "UNAVAILABLE: torch's varlen attention is for 16-bit dtypes on CUDA",
        "UNAVAILABLE: flash-attn is not installed",
    ]
    assert report.measured(records.values()).count("flash-attn, float32: UNAVAILABLE: flash-attn is not installed") == 1
    assert report.readme(records.values()).count("\n| ") == 2  # a row for each case
    assert records["three fused"]["status"] == "ok"
    (record,) = (
        r for r in run(["onnxruntime"], torch.bfloat16).values() if r["workload"] == "one" and "ONNX" in r["candidate"]
    )
    assert record["status"] == "UNAVAILABLE: ONNX Runtime has no bfloat16 on a CPU"


def test_dependent_launches_are_of_one_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_100")
    model = peers._Dependent(models.seeded().eval())
    seen: list[dict[str, bool]] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(dict(launch.DEPENDENT)))
    model(input_ids=models.ids(2, 5))
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=models.ids(2, 5) - 10**6)
    assert seen == [{"sm_90": False, "sm_100": True}] * 2
    assert launch.DEPENDENT == {"sm_90": False, "sm_100": False}


@pytest.mark.usefixtures("tiny")
def test_8_bits_are_judged_by_their_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are further from float64 than stock may be, and within the bound of stock with FP8 GEMMs."""
    monkeypatch.setattr(peers, "not_in_fp8", lambda device: None)
    record = run(["fp8"], torch.float32)["three fused in fp8"]
    assert (record["status"], record["repeats"], record["flops"], record["mfu"]) == ("ok", 3, None, None)
    assert 1e-3 < record["error"] < 0.2
    monkeypatch.setattr(bench.numerics, "FP8_SLACK", 0.1)
    assert "exceeds the bound for FP8" in run(["fp8"], torch.float32)["three fused in fp8"]["status"]


@pytest.mark.usefixtures("tiny")
def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    record = run(["openvino"], torch.float32)["one OpenVINO"]
    assert record["status"] == "UNAVAILABLE: openvino not installed; pip install 'fastbert-triton[bench]'"


@pytest.mark.usefixtures("tiny")
def test_peers_in_training() -> None:
    records = run(["eager", "openvino"], torch.float32, train=True)
    assert (records["three stock eager"]["status"], records["three stock eager"]["repeats"]) == ("ok", 3)
    assert records["three OpenVINO"]["status"] == "UNAVAILABLE: it is for inference"


def test_openvino_in_bfloat16() -> None:
    """It is given float32 copies of the weights, and computes in bfloat16 where the processor has it."""
    _, model, truth = models.three(models.seeded(), torch.bfloat16)
    mask = models.masks(5, 19)["right"]
    call = {"input_ids": models.ids(5, 19), "attention_mask": mask}
    with torch.no_grad():
        found, exact = (m(**call).last_hidden_state[mask.bool()].double() for m in (peers._openvino(model), truth))
    assert peers._openvino(model)(**call).last_hidden_state.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() / exact.norm() < 0.02
    assert model.dtype == torch.bfloat16


def varlen(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *_: Any) -> Tensor:
    """What torch's own does, on a CPU: (T, heads, head_dim), each sequence by itself."""
    parts = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        rows = (x[None, start:end].transpose(1, 2) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*rows).transpose(1, 2)[0])
    return torch.cat(parts)


def test_stock_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    model = models.seeded().eval()
    mask = models.masks(5, 19)["right"]
    call = {"input_ids": models.ids(5, 19), "attention_mask": mask}
    packed = peers._Flattened(model, peers.VARLEN)
    with torch.no_grad():
        found, stock = packed(**call).last_hidden_state, model(**call).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], stock[mask.bool()])
    assert model.config._attn_implementation == "sdpa"  # the model it was made from is left alone
    assert {p.data_ptr() for p in packed.parameters()} == {p.data_ptr() for p in model.parameters()}
