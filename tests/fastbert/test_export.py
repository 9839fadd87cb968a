"""Exported programs: torch's own operators for other tools, fastbert's for those who ask for them."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.export import export

import fastbert
from tests import fresh, models
from tests.fastbert.test_families import FAMILIES, adapter, seeded


def call(rows: int = 3, length: int = 17) -> dict[str, Any]:
    return {"input_ids": models.ids(rows, length, high=90) + 5, "attention_mask": models.masks(rows, length)["right"]}


def operators(program: Any) -> set[str]:
    return {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


def pair(family: str) -> tuple[Any, Any]:
    """(stock, fused)"""
    if family == "bert":
        stock = models.seeded(num_hidden_layers=1)
    else:
        stock = seeded(family, adapter(family).base.__name__, num_hidden_layers=1)
    return stock, fastbert.fuse(copy.deepcopy(stock))


QUICK = ("bert", "deberta", "eurobert", "modernbert")
"""torch.export replaces math.pow, whose name the code of the second and the third reads."""


@pytest.mark.parametrize(
    ("family", "strict"),
    [
        pytest.param(family, strict, marks=[] if family in QUICK and not strict else [pytest.mark.slow])
        for family in FAMILIES
        for strict in (False, True)
    ],
)
def test_a_program_is_stocks_unless_asked_for(family: str, strict: bool) -> None:
    stock, fused = pair(family)
    with torch.no_grad():
        programs = [export(model, (), call(), strict=strict) for model in (stock, fused)]
        theirs, ours = ([str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs)
        assert ours == theirs
        assert not any("fastbert" in name for name in operators(programs[1].run_decompositions()))
        assert torch.equal(programs[1].module()(**call())[0], stock(**call())[0])
        with fastbert.fused_export(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="torch.export records")
            asked = export(fused, (), call(), strict=strict)
        assert "fastbert" in operators(asked)
        torch.testing.assert_close(asked.module()(**call())[0], stock(**call())[0], rtol=1e-4, atol=1e-5)
        assert "fastbert" not in operators(export(fused, (), call(), strict=strict))


def test_what_is_asked_for_ends_with_its_block() -> None:
    _, fused = pair("bert")
    with torch.no_grad():
        with fastbert.fused_export():
            with pytest.raises(ZeroDivisionError), fastbert.fused_export():
                raise ZeroDivisionError
            assert "fastbert" in operators(export(fused, (), call()))
        assert "fastbert" not in operators(export(fused, (), call()))


class Patching(torch.nn.Module):
    """Around a model, a square in place of every power of numbers, for as long as it is called."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Any:
        with mock.patch.object(math, "pow", lambda x, _: x * x):
            return self.model(**given)


@pytest.mark.parametrize("when", ["before the export", "in it"])
def test_what_others_replace_is_foreign_in_an_export_too(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so what torch puts there as it traces. Strictly, torch replaces nothing."""
    stock, fused = pair("deberta")
    if when == "in it":
        stock, fused = Patching(stock), Patching(fused)
    else:
        monkeypatch.setattr(math, "pow", lambda x, _: x * x)
    with torch.no_grad(), fastbert.fused_export():
        with pytest.warns(RuntimeWarning, match="records the stock code of the model: math.pow is .*<lambda>"):
            program = export(fused, (), call(), strict=when != "in it")
        assert "fastbert" not in operators(program)
        torch.testing.assert_close(program.module()(**call())[0], stock(**call())[0])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("layers", "what"), [(1, "the model: no layer can run fused"), (2, "some layers")])
def test_stock_code_that_is_recorded_is_told(layers: int, what: str, strict: bool) -> None:
    fused = fastbert.fuse(models.seeded(num_hidden_layers=layers))
    fused.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        with fastbert.fused_export(), pytest.warns(RuntimeWarning, match=f"records the stock code of {what}: .*dense"):
            program = export(fused, (), call(), strict=strict)
        assert sum(str(node.target).startswith("fastbert.attention") for node in program.graph.nodes) == layers - 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="torch.export records")
            export(fused, (), call(), strict=strict)


ELSEWHERE = """
import sys, torch, transformers.modeling_outputs  # which tells torch what a model returns
call, expected = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(**call)[0]
assert "fastbert" not in sys.modules
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""


def test_a_saved_program_runs_where_there_is_no_fastbert(tmp_path: Path) -> None:
    """With other lengths and another padding than it was exported with."""
    stock, fused = pair("bert")
    rows, length = (torch.export.Dim(name, min=2, max=40) for name in ("rows", "length"))
    other = call(5, 23)
    with torch.no_grad():
        shapes = {name: {0: rows, 1: length} for name in call()}
        program = export(fused, (), call(), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "model.pt2")
        torch.save((other, stock(**other)[0]), tmp_path / "call.pt")
    done = fresh.run("-c", ELSEWHERE, tmp_path / "model.pt2", tmp_path / "call.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_split_into_stages() -> None:
    """torch.distributed.pipelining takes a model apart by an exported program: its stages are stock's."""
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    stock = models.seeded()
    fused = fastbert.fuse(copy.deepcopy(stock))
    cut = {"encoder.layer.1": pipelining.SplitPoint.BEGINNING}
    with torch.no_grad():
        pipe = pipelining.pipeline(fused, (), mb_kwargs=call(), split_spec=cut)
        stages = [pipe.get_stage_module(i) for i in range(pipe.num_stages)]
        names = [
            str(n.target) for stage in stages for m in stage.modules() for n in getattr(m, "graph", stage.graph).nodes
        ]
        found = pipe(**call())[0]
    assert len(stages) == 2 and len(names) > 100 and not any("fastbert" in name for name in names)
    torch.testing.assert_close(found, stock(**call())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ExportedProgram", "OnnxExporter"])
def test_to_onnx(way: str, tmp_path: Path) -> None:
    """By torch from an exported program, and by transformers' own exporter."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    stock, fused = pair("bert")
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        if way == "ExportedProgram":
            torch.onnx.export(export(fused, (), call()), f=str(file), verbose=False)
        else:
            exporters = pytest.importorskip("transformers.exporters")
            exporters.OnnxExporter().export(fused, call(), config=exporters.OnnxConfig(output_path=str(file)))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        given = {each.name: call()[each.name].numpy() for each in session.get_inputs()}
        ours = torch.from_numpy(session.run(None, given)[0])
        torch.testing.assert_close(ours, stock(**call())[0], rtol=1e-4, atol=1e-5)
