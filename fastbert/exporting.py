"""What torch.export makes of a fused model: the stock code, which every tool knows, or fastbert's operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

FUSED = False
"""Whether torch.export takes the fused code at this moment."""


@contextlib.contextmanager
def fused_export() -> Iterator[None]:
    """Within it, torch.export of a fused model records fastbert's operators; outside, the stock code.

    For AOTInductor, and whoever else runs the program in a Python that has imported fastbert.ops. Tools that look for
    torch's own operators (exporters to ONNX and OpenVINO, quantization by torchao, ExecuTorch) take the program that
    torch.export records outside of it.

    with fastbert.fused_export():
        program = torch.export.export(model, (), call)
    """
    global FUSED
    before, FUSED = FUSED, True
    try:
        yield
    finally:
        FUSED = before
