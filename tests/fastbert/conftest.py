"""What tests of the command line share."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from fastbert.embed import job, tokens
from fastbert.measure import cases, machine


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the benchmark's model and machine small."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(cases.SHAPES, "minilm", shape)
    for size in ("deberta-v3-xsmall", "deberta-v2-xlarge"):
        monkeypatch.setitem(cases.SHAPES, size, {**cases.SHAPES[size], **shape, "vocab_size": 30000})
    monkeypatch.setitem(cases.SHAPES, "modernbert-base", {**cases.SHAPES["modernbert-base"], **shape})
    monkeypatch.setattr(machine.Machine, "__init__", lambda self, device: setattr(self, "bytes_per_s", 1e10))
    monkeypatch.setattr(machine.Machine, "flops_per_s", lambda self, dtype: 1e11)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenises in this process: starting another takes seconds."""

    class Workers:
        _max_workers = 1

        def __init__(self, *_: Any, initargs: tuple[str], **__: Any) -> None:
            tokens._tokenizer = AutoTokenizer.from_pretrained(*initargs)

        def __enter__(self) -> Workers:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def shutdown(self, **_: Any) -> None:
            pass

        def submit(self, work: Any, *arguments: Any) -> Any:
            future: Any = job.concurrent.futures.Future()
            future.set_result(work(*arguments))
            return future

    monkeypatch.setattr(job.concurrent.futures, "ProcessPoolExecutor", Workers)
