"""What torch.export makes of a fused model: the stock code, which every tool knows, or fastbert's operators."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

FUSED = False
"""Whether torch.export takes the fused code at this moment."""


@contextlib.contextmanager
def fused_export() -> Iterator[None]:
    """Within it, torch.export of a fused model records fastbert's operators; outside, the stock code.

    A warning names what is recorded stock all the same. For AOTInductor, and whoever else runs the program in a Python
    that has imported fastbert.ops. Tools that look for torch's own operators (exporters to ONNX and OpenVINO,
    quantization by torchao, ExecuTorch) take the program that torch.export records outside of it.

    with fastbert.fused_export():
        program = torch.export.export(model, (), call)
    """
    global FUSED
    before, FUSED = FUSED, True
    try:
        yield
    finally:
        FUSED = before


def tell_of_stock(what: str, reason: str) -> None:
    """Warns that torch.export, asked for the fused code, records stock code of `what`; elsewhere it does nothing."""
    if FUSED and torch.compiler.is_exporting():
        _warn(what, reason)


@torch.compiler.assume_constant_result
def _warn(what: str, reason: str) -> None:
    warnings.warn(f"torch.export records the stock code of {what}: {reason}", RuntimeWarning, stacklevel=4)
