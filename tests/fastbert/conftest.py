"""What tests of the command line share."""

from __future__ import annotations

import pytest

from fastbert.measure import cases, machine


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the benchmark's model and machine small."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(cases.SHAPES, "minilm", shape)
    for size in ("deberta-v3-xsmall", "deberta-v2-xlarge"):
        monkeypatch.setitem(cases.SHAPES, size, {**cases.SHAPES[size], **shape, "vocab_size": 30000})
    monkeypatch.setattr(machine.Machine, "__init__", lambda self, device: setattr(self, "bytes_per_s", 1e10))
    monkeypatch.setattr(machine.Machine, "flops_per_s", lambda self, dtype: 1e11)
