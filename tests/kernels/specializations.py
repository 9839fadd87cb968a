"""What launches of many batch shapes compile, without a GPU: nothing is compiled or launched, only chosen.

    python -m tests.kernels.specializations [--arch sm_90] [--dependent]

runs a layer of BERT-large in bfloat16 in inference, embeddings and all, over batches of many shapes and masks, and
prints a JSON line for everything it would compile: the kernel, the values of its constexprs, and the shape it was first
met at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")

import torch
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastbert
from fastbert import ops
from fastbert.kernels import launch
from tests.kernels.aot import TARGETS

SHAPES = [
    (1, 1),
    (1, 2),
    (1, 16),
    (1, 17),
    (1, 128),
    (2, 128),
    (3, 7),
    (8, 512),
    (16, 33),
    (32, 384),
    (5, 100),
    (64, 64),
]


class Driver:
    """A device that nothing runs on."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGETS[self.arch]


class Compiled:
    """In place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="sm_90", choices=TARGETS)
    parser.add_argument("--dependent", action="store_true", help="with programmatic dependent launch")
    given = parser.parse_args()
    arch = given.arch
    if given.dependent:
        launch.DEPENDENT.add(arch)
    shape: tuple[int, ...] = ()

    def compile_none(
        self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, *rest: Any
    ) -> Any:
        values = {str(self.arg_names[path[0]]): str(value) for path, value in constexprs.items()}
        configuration = {"num_warps": options.num_warps, "num_stages": options.num_stages}
        row = {"kernel": self.__name__, "constexprs": {**values, **configuration}, "dependent": options.launch_pdl}
        print(json.dumps({**row, "shape": shape}))
        compiled = self.device_caches[device][0][key] = Compiled()
        return compiled

    driver.set_active(Driver(arch))
    JITFunction._do_compile = compile_none
    for name, (file, _) in ops._OPERATORS.items():
        module = importlib.import_module(f"fastbert.kernels.{file}")
        for place in (launch, module):
            if hasattr(place, "architecture"):
                place.architecture = lambda device: arch
        ops.CPU_BACKEND[name] = getattr(module, name)
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = fastbert.fuse(hf.BertModel(BertConfig(vocab_size=64, **sizes)).eval().bfloat16())
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for shape in SHAPES:
            ids = torch.ones(shape, dtype=torch.int64)
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
            masks: list[Any] = [None, (torch.arange(shape[1]) < lengths).long(), torch.zeros_like(ids)]
            for mask in masks:
                model(ids, attention_mask=mask)


if __name__ == "__main__":
    main()
