"""Deliberate faults, planted one at a time in a copy of the tree: is each caught, and by which test?

    make mutants        # or: python -m tests.mutations [NAME ...]

Each is run against the part of `make test` beside it, until its first failure. Exit status: 0 all caught, 1 not. That
every fault can still be planted is checked by `make test` itself (tests/test_house.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIFE = "tests/fastbert/test_life.py"
KERNELS = "tests/kernels/test_properties.py"
PROMISE = "tests/fastbert/test_promise.py"
STATES = "tests/fastbert/test_families.py -k leaves_nothing"
MAPS = "tests/fastbert/test_attention_maps.py"


class Fault(NamedTuple):
    """What stands in a file, once, and what is put in its place; the tests that are to notice."""

    file: str
    old: str
    new: str
    tests: str


FAULTS = {
    "a map's heads with the bias of others": Fault(
        "fastbert/layers/attention.py",
        "None if bias is None else bias[heads]",
        "None if bias is None else bias[: len(heads)]",
        MAPS,
    ),
    "a map of padding as of other rows": Fault(
        "fastbert/layers/disentangled.py",
        "return found if mask is None else found.masked_fill_",
        "return found if mask is None or heads is None else found.masked_fill_",
        MAPS,
    ),
    "maps in the order of layers turned": Fault(
        "fastbert/runtime/encoder.py",
        "            self.kept.append(found)\n",
        "            self.kept.insert(0, found)\n",
        MAPS,
    ),
    "a map without its place": Fault(
        "fastbert/layers/context.py",
        "None if packing.cu_seqlens is None else packing.positions(device)",
        "None",
        MAPS,
    ),
    "a dropped mask": Fault(
        "kernels/attention.py",
        "    if key_mask is None:\n        return batch, None, tiles\n",
        "    return batch, None, tiles\n",
        KERNELS,
    ),
    "a swapped stride": Fault(
        "kernels/attention.py",
        "        stride_qt,\n        stride_qh,\n        stride_kt,\n        stride_kh,\n        stride_vt,",
        "        stride_qh,\n        stride_qt,\n        stride_kt,\n        stride_kh,\n        stride_vt,",
        KERNELS,
    ),
    "scale off by sqrt(2)": Fault(
        "fastbert/layers/attention.py",
        'scale = float(getattr(module, "scaling"',
        'scale = 2**0.5 * float(getattr(module, "scaling"',
        LIFE,
    ),
    "eps wrong": Fault(
        "fastbert/layers/layer.py",
        "return ops.add_layer_norm(added, x, *half.norm, rate",
        "return ops.add_layer_norm(added, x, half.norm.weight, half.norm.bias, 1e-5, rate",
        LIFE,
    ),
    "one sequence leaks into the next": Fault(
        "kernels/attention.py",
        "length = (tl.load(cu_seqlens_ptr + sequence + 1) - row).to(tl.int32)\n    else:\n",
        "length = (tl.load(cu_seqlens_ptr + sequence + 1) - row + 1).to(tl.int32)\n    else:\n",
        KERNELS,
    ),
    "dropout's scale": Fault(
        "kernels/dropout.py",
        "return 0.0 if dropout == 1 else 1 / (1 - dropout)",
        "return 0.0 if dropout == 1 else 1.0",
        "tests/kernels/test_dropout.py tests/kernels/test_layer_norm.py",
    ),
    "tanh for erf": Fault(
        "fastbert/layers/feed_forward.py", '("GELUActivation", "none")', '("GELUActivation", "tanh")', LIFE
    ),
    "stale fused weights": Fault(
        "fastbert/layers/gemm.py",
        "tuple(p for linear in linears for p in (linear.weight, linear.bias))",
        "tuple(p for l in linears for p in (l.__dict__.setdefault('_kept', l.weight.detach().clone()), l.bias))",
        LIFE,
    ),
    "LoRA ignored": Fault(
        "fastbert/layers/gemm.py",
        "[linear(x) for linear in self.linears]",
        '[getattr(linear, "base_layer", linear)(x) for linear in self.linears]',
        "tests/fastbert/test_fuse.py::test_lora_adapters",
    ),
    "a length off by one": Fault(
        "fastbert/runtime/packing.py",
        "packing = Packing(batch, seqlen, longest, cu_seqlens,",
        "packing = Packing(batch, seqlen, longest - 1, cu_seqlens,",
        "tests/fastbert/test_packing.py",
    ),
    "DeBERTa: distances turned round": Fault(
        "fastbert/models/deberta_v2.py",
        "return (distances + span).clamp(",
        "return (span - distances).clamp(",
        "tests/fastbert/test_deberta.py -k lengths",
    ),
    "DeBERTa: a scale without positions": Fault(
        "fastbert/layers/disentangled.py",
        "scale = float((head_dim * (1 + terms)) ** -0.5)",
        "scale = float(head_dim**-0.5)",
        "tests/fastbert/test_deberta.py -k lengths",
    ),
    "DeBERTa: a mask that is no factor": Fault(
        "fastbert/models/deberta_v2.py",
        "model.embeddings(mask=mask, **given)",
        "model.embeddings(mask=None if mask is None else mask.bool(), **given)",
        "tests/fastbert/test_deberta.py -k factor",
    ),
    # One for each kind of situation that docs/trust.md has under a letter.
    "A: readers that aren't known": Fault(
        "fastbert/runtime/plan.py",
        "        if around.unknown is not None:\n            return UNKNOWN, around\n",
        "",
        f"{PROMISE} -k Neighbours",
    ),
    "B: custom embeddings": Fault(
        "fastbert/runtime/plan.py",
        "foreign = decided is None and embeddings_are_foreign(model) is not None",
        "foreign = False",
        f"{PROMISE} -k embeddings",
    ),
    "B: the switch after the checks": Fault(
        "fastbert/runtime/plan.py",
        "    if is_disabled():\n        call",
        "    if False:\n        call",
        "tests/fastbert/test_embeddings.py -k disabled",
    ),
    "C: replaced code": Fault(
        "fastbert/runtime/support.py",
        "    return known.foreign(",
        "    return None and known.foreign(",
        f"{PROMISE} -k patch",
    ),
    "D: hooks of layers": Fault(
        "fastbert/runtime/coverage.py",
        "    hooked = any(",
        "    hooked = False and any(",
        "tests/fastbert/test_hooks.py",
    ),
    "C: lists changed in place": Fault(
        "fastbert/runtime/coverage.py",
        "if type(value) in (list, dict, set) and",
        "if False and",
        "tests/fastbert/test_deberta.py -k unnoticed",
    ),
    "C: what functions are made of": Fault(
        "fastbert/runtime/known.py",
        "*self._kept, *cells, *named]",
        "]",
        "tests/fastbert/test_known.py -k made_of",
    ),
    "C: functions that torch's call": Fault(
        "fastbert/runtime/known.py",
        "            self._names[owner] = tuple(sorted({*names, *more}))",
        "            self._names[owner] = names",
        "tests/fastbert/test_known.py",
    ),
    "C: methods of tensors": Fault(
        "fastbert/runtime/known.py",
        "        for name in methods:\n",
        "        for name in ():\n",
        "tests/fastbert/test_known.py",
    ),
    "C: a flag of a layer": Fault(
        "fastbert/layers/attention.py",
        'for flag in ("is_causal", "is_cross_attention"):',
        'for flag in ("is_causal",):',
        "tests/fastbert/test_coverage.py -k unread",
    ),
    "D: a table that somebody sees": Fault(
        "fastbert/models/mpnet.py",
        "        refuses=_refuses,\n",
        "",
        "tests/fastbert/test_changed_calls.py -k beside",
    ),
    "D: a convolution that somebody sees": Fault(
        "fastbert/models/deberta_v2.py",
        'part_is_replaced("encoder.conv", conv, hf.ConvLayer)',
        "None",
        "tests/fastbert/test_changed_calls.py -k beside",
    ),
    "B: embeddings that a convolution reads": Fault(
        "fastbert/runtime/plan.py",
        "watched or family_of(model).after_first(encoder_of(model)) is not None",
        "watched",
        "tests/fastbert/test_changed_calls.py -k beside",
    ),
    "C: losses of heads": Fault(
        "fastbert/models/classes.py",
        "stood_in_for, (*heads, *family.parts))",
        "stood_in_for)",
        "tests/fastbert/test_known.py -k loss",
    ),
    "C: a loss that is a module": Fault(
        "fastbert/models/distilbert.py",
        ", parts, model.mlm_loss_fct)",
        ", parts)",
        "tests/fastbert/test_known.py -k loss",
    ),
    "C: a loss function of a model's own": Fault(
        "fastbert/runtime/known.py",
        " and head.loss_function not in _LOSSES",
        " and False",
        "tests/fastbert/test_known.py -k loss_function",
    ),
    "D: what hooks change meanwhile": Fault(
        "fastbert/runtime/encoder.py",
        "            if looks and not stock:\n",
        "            if False:\n",
        "tests/fastbert/test_hooks.py -k later",
    ),
    "D: a decision kept too long": Fault(
        "fastbert/runtime/plan.py",
        "if not settings.coverage.still(model, seen) or known",
        "if known",
        "tests/fastbert/test_coverage.py -k decision",
    ),
    "D: a decision kept in another state of torch": Fault(
        "fastbert/runtime/plan.py",
        "if needs_stock(kept.parameter) is not None or ",
        "if ",
        "tests/fastbert/test_coverage.py -k decision",
    ),
    "E: exported for other tools": Fault(
        "fastbert/runtime/support.py",
        "if torch.compiler.is_exporting() and not exporting.FUSED:",
        "if torch.compiler.is_exporting() and False:",
        "tests/fastbert/test_export.py",
    ),
    "F: wrapped forwards": Fault(
        "fastbert/fuse.py",
        "module.__dict__[name] = redirect(before, {own: target}, seen)",
        "module.__dict__[name] = before",
        f"{PROMISE} -k around",
    ),
    "G: tensors without values": Fault(
        "fastbert/runtime/packing.py",
        "    if torch.compiler.is_compiling() or is_fake(x):\n        return False\n",
        "    return not torch.compiler.is_compiling()\n",
        "tests/fastbert/test_embeddings.py -k fake",
    ),
    "G: made of tensors without values": Fault(
        "fastbert/models/deberta_v2.py",
        "torch.compiler.is_compiling() or is_faked()",
        "torch.compiler.is_compiling()",
        STATES,
    ),
    "G: made in inference mode": Fault(
        "fastbert/layers/norm.py",
        "    with torch.inference_mode(False), _disable_current_modes():\n        return",
        "    return",
        STATES,
    ),
    "G: another default device": Fault(
        "fastbert/runtime/support.py",
        'if isinstance(mode, DeviceContext) and mode.device.type not in ("cpu", device):',
        "if False:",
        STATES,
    ),
    "H: reasons without a module": Fault(
        "fastbert/runtime/support.py",
        'return f"{kind.__module__}.{kind.__qualname__}"',
        "return kind.__name__",
        "tests/fastbert/test_known.py -k reasons",
    ),
    "I: a plan that isn't taken": Fault(
        "fastbert/models/classes.py",
        "check_taken(self, plan)",
        "check_taken(self, None)",
        "tests/fastbert/test_readers.py -k plan",
    ),
    "J: noise at padding": Fault(
        "fastbert/sensitivity.py",
        "torch.where(mask[..., None] != 0, hidden, noise)",
        "torch.where(mask[..., None] != 0, hidden, 0 * noise)",
        "tests/fastbert/test_sensitivity.py -k named",
    ),
    "K: wrapped layers": Fault(
        "fastbert/layers/layer.py",
        "    layer = unwrapped(layer)\n",
        "",
        "tests/fastbert/test_wrappers.py",
    ),
    "L: a vmap in the backward": Fault(
        "fastbert/ops/registry.py",
        'torch.library.register_vmap(f"fastbert::{name}", _one_by_one(name), lib=_LIBRARY)',
        "pass",
        "tests/fastbert/test_transforms.py -k batch",
    ),
    "M: sharded tables": Fault(
        "fastbert/runtime/arguments.py",
        "width = table_of(embeddings, next(iter(names.values()))).embedding_dim",
        "width = tables[next(iter(names.values()))].weight.shape[-1]",
        "tests/fastbert/test_embeddings.py -k sharded",
    ),
    "N: explained otherwise": Fault(
        "fastbert/explain.py",
        "reason, seen, _, watched = decide(base, settings, {}, foreign is not None)",
        "(_, seen, _, watched), reason = decide(base, settings, {}, foreign is not None), None",
        f"{PROMISE} -k patch",
    ),
    "L: a mode around the backward": Fault(
        "fastbert/ops/registry.py",
        "        if (mode := foreign_dispatch_mode()) is not None:\n",
        "        if (mode := None) is not None:\n",
        "tests/fastbert/test_changed_calls.py -k backward",
    ),
    "N: counted again": Fault(
        "fastbert/runtime/settings.py",
        " and torch._C._current_graph_task_id() == -1:",
        ":",
        "tests/fastbert/test_wrappers.py -k counted",
    ),
    "A: shallow copies": Fault(
        "fastbert/runtime/readers.py",
        "    if any(references > _ONE for references in _references(around)):\n        return [ShallowCopy()]\n",
        "",
        "tests/fastbert/test_readers.py -k shallow",
    ),
    "O: a hook without names": Fault(
        "fastbert/runtime/readers.py",
        "return None if kwargs is None else hook(module, args, kwargs)",
        "return hook(module, args, kwargs)",
        "tests/fastbert/test_threads.py -k any_line",
    ),
    "O: unfused meanwhile": Fault(
        "fastbert/runtime/encoder.py",
        "plan.settings if isinstance(plan, Plan) else getattr(self, ",
        "getattr(self, ",
        "tests/fastbert/test_threads.py",
    ),
}


def plant(fault: Fault, root: Path) -> None:
    """Puts a fault into the tree at `root`; raises ValueError where it can't be."""
    file = root / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} holds {fault.old!r} {text.count(fault.old)} times; expected once")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def caught_by(fault: Fault) -> str | None:
    """The first test that fails with a fault, or None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "results", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        plant(fault, copy)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rf", *fault.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return found[1]
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return None


def main(names: list[str]) -> int:
    missed = 0
    for name in names or FAULTS:
        test = caught_by(FAULTS[name])
        missed += test is None
        print(f"{name:<34}{FAULTS[name].file:<24}{test or 'NOT CAUGHT'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
