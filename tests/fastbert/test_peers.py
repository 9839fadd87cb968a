"""The candidates of `fastbert bench --peers`: what they compute is what stock does, and what can't run says why."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

from benchmarks import report
from fastbert.kernels import launch
from fastbert.measure import bench, cases, peers
from fastbert.measure.names import PEERS
from tests import models

ON_A_GPU = ("graphs", "graphs-pdl", "fp8", "reduce-overhead", "max-autotune", "torch-varlen", "flash-attn")


def run(names: Any, dtype: torch.dtype, train: bool = False, size: str = "minilm") -> dict[str, dict[str, Any]]:
    work = [cases.Workload("three", (3, 19, 7)), cases.Workload("one", (11,))]
    records = bench.run(work, [size], [dtype], device=torch.device("cpu"), repeats=3, peers=tuple(names), train=train)
    return {f"{record['workload']} {record['candidate']}": record for record in records}


def test_the_command_line_knows_them_all() -> None:
    assert tuple(peers.PEERS) == PEERS


@pytest.mark.usefixtures("tiny")
def test_peers_on_a_cpu() -> None:
    """Checked against float64 by the benchmark itself, on a batch and on another shape; then timed."""
    names = "prepacked", "eager", "compile", "onnxruntime", "openvino"
    records = run(names, torch.float32)
    for case, name in itertools.product(("three", "one"), names):
        record = records[f"{case} {peers.PEERS[name][0]}"]
        assert (record["status"], record["repeats"]) == ("ok", 3), name
        assert 0 < record["error"] < 1e-6, name
        assert record["ratio_to_stock"] > 0, name


@pytest.mark.usefixtures("tiny")
def test_int8_of_others() -> None:
    """Near enough to have computed the model, in fewer bits; of a truth that they are not held to."""
    names = "int8", "onnxruntime-int8", "dynamic-int8"
    records = run(names, torch.float32)
    for case, name in itertools.product(("three", "one"), names):
        record = records[f"{case} {peers.PEERS[name][0]}"]
        assert (record["status"], record["repeats"]) == ("ok", 3), name
        assert 1e-4 < record["error"] < 0.05, name
    for package, name in {"nncf": "openvino-int8", "torchao": "torchao-int8"}.items():
        if importlib.util.find_spec(package) is None:
            record = run([name], torch.float32)[f"one {peers.PEERS[name][0]}"]
            assert record["status"] == f"UNAVAILABLE: {package} is not installed"


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


@pytest.fixture
def disentangled_flash(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of that name, which runs stock over what it packs, with a key projection of its own in training."""

    class Optimized(deberta.DebertaV2Encoder):
        def forward_packed(self, rows: Tensor, starts: Tensor, longest: int, **more: Any) -> BaseModelOutput:
            assert (starts.dtype, longest) == (torch.int32, more["packed_info"].max_seqlen)
            mask = torch.arange(longest) < starts.diff()[:, None]
            padded = rows.new_zeros(*mask.shape, rows.shape[1])
            padded[mask] = rows
            return BaseModelOutput(last_hidden_state=self(padded, mask.long()).last_hidden_state[mask])

    def optimize(model: Any, backend: str, inference: bool) -> Any:
        assert backend == "torch"
        model.encoder.__class__ = Optimized
        if not inference:
            module = model.encoder.layer[0].attention.self.key_proj
            module.weight = nn.Parameter(module.weight.detach().clone())
        return model

    def pack(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Any]:
        info = types.SimpleNamespace(max_seqlen=int(mask.sum(1).max()))
        return rows[mask.bool()], F.pad(mask.sum(1).cumsum(0), (1, 0)).int(), info

    def unpack(rows: Tensor, starts: Tensor, width: int, packed_info: Any) -> tuple[Tensor, None]:
        mask = torch.arange(width) < starts.diff()[:, None]
        padded = rows.new_zeros(*mask.shape, rows.shape[1])
        padded[mask] = rows
        return padded, None

    module = types.ModuleType("disentangled_flash")
    module.__spec__ = importlib.machinery.ModuleSpec("disentangled_flash", None)
    module.optimize_deberta, module.pack_padded_with_info, module.unpack_packed = optimize, pack, unpack  # type: ignore
    monkeypatch.setitem(sys.modules, "disentangled_flash", module)
    return module


@pytest.mark.usefixtures("tiny", "disentangled_flash")
@pytest.mark.parametrize(
    ("size", "train"),
    [
        ("deberta-v3-xsmall", True),
        ("deberta-v2-xlarge", False),
        pytest.param("deberta-v3-xsmall", False, marks=pytest.mark.slow),
        pytest.param("deberta-v2-xlarge", True, marks=pytest.mark.slow),
    ],
)
def test_deberta_and_its_peers(size: str, train: bool) -> None:
    """Outputs, or gradients with those of positions, against float64; time and what it costs, of both."""
    records = run(["disentangled-flash", "eager", "torch-varlen", "flashdeberta"], torch.float32, train, size)
    for case, name in itertools.product(("three", "one"), ("stock", "fused", "disentangled-flash", "stock eager")):
        record = records[f"{case} {name}"]
        assert (record["status"], record["repeats"]) == ("ok", 3)
        assert 0 < record["error"] < 1e-6
        assert record["what"] == f"DebertaV2Model {'training step' if train else 'forward'}"
        assert record["flops"] > 0
    for name, reason in (
        ("flashdeberta", "flashdeberta is not installed"),
        ("stock packed, torch varlen", "it has no attention by distance"),
    ):
        assert records[f"one {name}"]["status"] == f"UNAVAILABLE: {reason}"
    assert "| forward |" in report.measured(records.values()) or train


@pytest.mark.usefixtures("tiny", "disentangled_flash")
def test_a_peer_that_is_wrong_is_not_timed(disentangled_flash: Any) -> None:
    """And one that leaves the model as it is runs nothing of its own."""
    unpack = disentangled_flash.unpack_packed
    disentangled_flash.unpack_packed = lambda *args, **more: (unpack(*args, **more)[0] * 1.001, None)
    (record,) = (
        r
        for r in run(["disentangled-flash"], torch.float32, size="deberta-v3-xsmall").values()
        if "three" in r["workload"] and "flash" in r["candidate"]
    )
    assert record["status"].startswith("FAILED: ")
    disentangled_flash.optimize_deberta = lambda model, **_: model
    record = run(["disentangled-flash"], torch.float32, size="deberta-v3-xsmall")["one disentangled-flash"]
    assert record["status"] == "UNAVAILABLE: it has no kernels for this model"
    record = run(["disentangled-flash"], torch.float32)["one disentangled-flash"]
    assert record["status"] == "UNAVAILABLE: it is for DeBERTa"


@pytest.fixture
def packed_encoders(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of that name, whose `pack` has a live model run stock over one sequence at a time, as on a GPU."""

    def pack(model: Any) -> Any:
        stock = model.forward

        def forward(input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
            alone = [stock(row[mask.bool()][None])[0][0] for row, mask in zip(input_ids, attention_mask, strict=True)]
            return BaseModelOutput(last_hidden_state=nn.utils.rnn.pad_sequence(alone, batch_first=True))

        model.forward = forward
        return model

    def build(model: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "device", torch.device("cuda"))
            return peers._packed_encoders(model)

    module = types.ModuleType("packed_encoders")
    module.__spec__ = importlib.machinery.ModuleSpec("packed_encoders", None)
    module.pack = pack  # type: ignore
    monkeypatch.setitem(sys.modules, "packed_encoders", module)
    monkeypatch.setitem(peers.PEERS, "packed-encoders", ("packed-encoders", build))
    return module


@pytest.mark.usefixtures("tiny", "packed_encoders")
@pytest.mark.parametrize("train", [False, True])
def test_modernbert_and_its_peer(train: bool) -> None:
    records = run(["packed-encoders"], torch.bfloat16, train, "modernbert-base")
    for case, name in itertools.product(("three", "one"), ("stock", "fused", "packed-encoders")):
        record = records[f"{case} {name}"]
        assert (record["status"], record["repeats"]) == ("ok", 3)
        assert 0 < record["error"] < 0.02
        assert record["what"] == f"ModernBertModel {'training step' if train else 'forward'}"


@pytest.mark.usefixtures("tiny")
def test_packed_encoders_where_it_cannot_run(packed_encoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, another dtype, a CPU, no package; and one that is wrong is not timed."""

    def status(dtype: torch.dtype = torch.bfloat16, size: str = "modernbert-base") -> str:
        return str(run(["packed-encoders"], dtype, size=size)["three packed-encoders"]["status"])

    pack = packed_encoders.pack

    def wrong(model: Any) -> Any:
        pack(model).final_norm.register_forward_hook(lambda module, args, out: 1.05 * out)
        return model

    packed_encoders.pack = wrong
    assert status().startswith("FAILED: ")
    assert status(torch.float32) == "UNAVAILABLE: packed-encoders is for bfloat16 on CUDA"
    assert status(size="minilm") == "UNAVAILABLE: it is for ModernBERT"
    monkeypatch.setitem(peers.PEERS, "packed-encoders", ("packed-encoders", peers._packed_encoders))
    assert status() == "UNAVAILABLE: packed-encoders is for bfloat16 on CUDA"
    monkeypatch.delitem(sys.modules, "packed_encoders")
    assert status() == "UNAVAILABLE: packed-encoders is not installed"


@pytest.mark.usefixtures("tiny")
def test_8_bits_are_judged_by_their_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are further from float64 than stock may be, and within the bound of stock with FP8 GEMMs."""
    monkeypatch.setattr(peers, "not_in_fp8", lambda device: None)
    record = run(["fp8"], torch.float32)["three fused in fp8"]
    assert (record["status"], record["repeats"], record["flops"], record["mfu"]) == ("ok", 3, None, None)
    assert 1e-3 < record["error"] < 0.2
    monkeypatch.setitem(bench.numerics.SLACKS, "fp8", 0.1)
    assert "exceeds the bound for fp8" in run(["fp8"], torch.float32)["three fused in fp8"]["status"]


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
        found, exact = (m(**call).last_hidden_state[mask.bool()] for m in (peers.openvino(model), truth))
    assert found.dtype == torch.bfloat16
    assert 0 < (found.double() - exact).norm() / exact.norm() < 0.02
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
