"""What tests of the command line share."""

from __future__ import annotations

import pytest

from fastbert.cli import bench


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the benchmark's model and machine small."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(bench.SHAPES, "minilm", shape)
    monkeypatch.setattr(bench.Machine, "__init__", lambda self, device: setattr(self, "bytes_per_s", 1e10))
    monkeypatch.setattr(bench.Machine, "flops_per_s", lambda self, dtype: 1e11)
