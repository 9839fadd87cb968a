"""How float32 is multiplied, by each of the ways that PyTorch has to say it; each in a process of its own."""

from __future__ import annotations

from tests import fresh

SETTINGS = [
    ("", "ieee"),
    ("torch.set_float32_matmul_precision('high')", "tf32"),
    ("torch.set_float32_matmul_precision('medium')", "tf32"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'ieee'", "ieee"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ("torch.backends.fp32_precision = 'ieee'; torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')", "ieee"),
]
CODE = """
import os, sys, torch, fastbert
from benchmarks import stub
from fastbert.runtime import graphs
from fastbert import ops
from fastbert.kernels import launch

def look():
    assert launch.input_precision(torch.bfloat16) == "ieee"
    x = torch.zeros(16, 64)
    q = x.view(16, 1, 64)
    with torch.inference_mode(), stub.device() as gpu:
        ops.linear(x, x, None)
        ops.attention(q, q, q, None, None, 16, 0.1, None, None)
    found = {c.constexprs["INPUT_PRECISION"] for c in gpu.compilations} | {launch.input_precision(torch.float32)}
    assert graphs.bucket_of(3, 1, 3).precision == launch.float32_precision()
    print(*found, flush=True)

for setting in sys.argv[1:]:
    if not os.fork():  # what is set can't all be taken back
        exec(setting)
        look()
        os._exit(0)
    os.wait()
"""


def test_float32_is_multiplied_as_pytorch_is_set_to() -> None:
    """Also where the getters of one way fail, as another has been used."""
    done = fresh.run("-c", CODE, *(setting for setting, _ in SETTINGS))
    assert done.stdout.split() == [expected for _, expected in SETTINGS], done.stderr
