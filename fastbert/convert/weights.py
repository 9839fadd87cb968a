"""The values: read one by one, brought into PyTorch's layout, and written in files of safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from ..usage import UsageError
from .classes import Target
from .sources import Source, Variable

FILE_BYTES = 5 * 10**9
"""What a file of weights holds at most; as much is in memory at a time."""

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size", "embedding_size"),
    *("num_labels", "num_attention_heads", "relative_attention_num_buckets", "task_type_vocab_size"),
)


def write_weights(
    source: Source, target: Target, folder: Path, settings: PretrainedConfig
) -> tuple[dict[str, dict[str, object]], torch.dtype]:
    """Fills every parameter, file by file. Returns what came of each variable, and the dtype: the widest there is.

    Raises:
        UsageError: a variable has another shape, can't be read, isn't finite, or differs from one it is tied to.
    """
    used: dict[str, list[Variable]] = {name: [] for name in target.shapes}
    dtype: torch.dtype | None = None
    for variable in (each for each in source.variables if not each.reason):
        name = target.stored[f"{variable.to}"]
        _check_shape(source, variable, target.shapes[name], settings)
        if variable.dtype is None or not variable.dtype.is_floating_point:
            raise UsageError(f"{source.file}: {variable.name} is of {variable.kind}; expected floating point")
        dtype = variable.dtype if dtype is None else torch.promote_types(dtype, variable.dtype)
        used[name].append(variable)
    assert dtype is not None
    files = list(_split({name: size(shape) * dtype.itemsize for name, shape in target.shapes.items()}))
    index: dict[str, str] = {}
    for i, members in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        save_file({name: _fill(source, used[name], dtype) for name in members}, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # as the umask has it; safetensors lets nobody else read
        index |= dict.fromkeys(members, file)
    if len(files) > 1:
        total = sum(map(size, target.shapes.values())) * dtype.itemsize
        told = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(told + "\n", encoding="utf-8")
    return {each.name: _about(each, name) for name, members in used.items() for each in members}, dtype


def size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _about(variable: Variable, name: str) -> dict[str, object]:
    told: dict[str, object] = {"to": name, "shape": list(variable.shape), "dtype": variable.kind}
    return {**told, "transposed": True} if variable.transposed else told


def _split(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The parameters of each file, in their order."""
    members: list[str] = []
    for name in sizes:
        if members and sum(sizes[each] for each in members) + sizes[name] > FILE_BYTES:
            yield members
            members = []
        members.append(name)
    yield members


def _check_shape(source: Source, variable: Variable, shape: tuple[int, ...], settings: PretrainedConfig) -> None:
    there = variable.stored_shape
    if there == shape:
        return
    expected = shape[::-1] if variable.transposed else shape
    differ = {wanted for found, wanted in zip(there, shape, strict=False) if found != wanted}
    sizes = {name: getattr(settings, name, None) for name in _SIZES}
    by = " or ".join(f"{name} {value}" for name, value in sizes.items() if value in differ)
    told = f"{variable.name} has shape {variable.shape}; expected {expected}"
    raise UsageError(f"{source.file}: {told}{f', by the config: {by}' if by else ''}")


def _fill(source: Source, variables: list[Variable], dtype: torch.dtype) -> Tensor:
    """The values of a parameter: of the first of `variables`, to which the others have to be equal."""
    first, *others = variables
    value = _values(source, first, dtype)
    if not torch.isfinite(value).all():
        raise UsageError(f"{source.file}: {first.name} holds NaN or infinity; expected numbers")
    for variable in others:
        if not torch.equal(_values(source, variable, dtype), value):
            told = f"{variable.name} differs from {first.name}; expected the same values"
            raise UsageError(f"{source.file}: {told}, or tie_word_embeddings false in the config, where it is of these")
    return value


def _values(source: Source, variable: Variable, dtype: torch.dtype) -> Tensor:
    found = variable.read()
    if tuple(found.shape) != variable.shape:
        raise UsageError(f"{source.file}: {variable.name} has shape {tuple(found.shape)}; expected {variable.shape}")
    return (found.T if variable.transposed else found).to(dtype).contiguous()
