"""What is in a checkpoint: its variables by name, shape and dtype, each read when it is asked for."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..usage import UsageError, in_a_line, refused
from ..version import install
from . import names

if TYPE_CHECKING:
    import h5py
    from tensorflow.train import CheckpointReader

FORMATS = {"tensorflow": "a TensorFlow checkpoint", "h5": "weights of Keras", "bin": "a PyTorch state dict"}


@dataclass
class Variable:
    """One variable of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: none of torch's."""
    read: Callable[[], Tensor]
    """Its values; raises UsageError where they can't be read."""
    to: str | None = None
    """Its name in PyTorch, in a model with a head; None: it is not known."""
    transposed: bool = False
    reason: str | None = None
    """Why it is left out, where it is."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in PyTorch."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def kind(self) -> str:
        """The name of its dtype."""
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Source:
    """A checkpoint: where it is, and what is in it."""

    format: str
    file: Path
    """What is named in errors: the prefix of a TensorFlow checkpoint."""
    notes: list[str] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.file.parent


_TORCH, _KERAS = "pytorch_model.bin", "tf_model.h5"
_PREFIX = re.compile(r"(.+)\.(?:index|data-\d+-of-\d+)$")


def find(path: Path) -> Source:
    """The checkpoint that `path` is, or holds. Raises UsageError: there is none, or more than one."""
    if path.is_dir():
        return _find_in(path)
    if path.is_file():
        name = path.name
        if name.endswith((".h5", ".h5.index.json")):
            return Source("h5", path)
        if name.endswith((".bin", ".bin.index.json")):
            return Source("bin", path)
        if match := _PREFIX.match(name):
            return Source("tensorflow", path.with_name(match[1]))
        raise UsageError(f"{path}: expected a TensorFlow checkpoint, {_KERAS}, {_TORCH}, or a folder that holds one")
    if os.path.exists(f"{path}.index"):
        return Source("tensorflow", path)
    raise UsageError(f"{path}: no such file or folder, nor a checkpoint of that prefix")


def _find_in(folder: Path) -> Source:
    with refused(f"{folder}", kinds=OSError):
        there = sorted(entry.name for entry in folder.iterdir())
    found = []
    for form, name in (("h5", _KERAS), ("bin", _TORCH)):
        found += [Source(form, folder / each) for each in (name, f"{name}.index.json") if each in there][:1]
    prefixes = [name.removesuffix(".index") for name in there if name.endswith(".index")]
    notes = []
    if len(prefixes) > 1 and "checkpoint" in there:  # which TensorFlow writes beside them, with the last one's name
        told = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
        last = re.search(r'^model_checkpoint_path: "(?:.*/)?([^/"]+)"', told, re.M)
        if last and last[1] in prefixes:
            notes = [f"of {len(prefixes)} checkpoints the last, {last[1]}"]
            prefixes = [last[1]]
    found += [Source("tensorflow", folder / prefix, list(notes)) for prefix in prefixes]
    safe = [name for name in there if re.match(r"model\.safetensors(\.index\.json)?$", name)]
    if safe:
        raise UsageError(
            f"{folder}: holds {safe[0]}, which from_pretrained loads as it is; expected one without, or a file"
        )
    if "saved_model.pb" in there:
        raise UsageError(f"{folder}: is a SavedModel, which is code; expected a checkpoint")
    if not found:
        raise UsageError(f"{folder}: expected a TensorFlow checkpoint (*.index), {_KERAS} or {_TORCH} in it")
    if len(found) > 1:
        raise UsageError(f"{folder}: holds {', '.join(each.file.name for each in found)}; expected the path of one")
    return found[0]


def load(source: Source) -> None:
    """Fills in what is in a checkpoint. Raises UsageError: it is not whole, or what reads it isn't installed."""
    source.variables = list({"tensorflow": _tensorflow, "h5": _keras, "bin": _state_dict}[source.format](source))
    if not source.variables:
        raise UsageError(f"{source.file}: holds no variables")


def _reading(file: Path, name: str, read: Callable[[], object]) -> Callable[[], Tensor]:
    """`read`, with an error that names the variable, and a tensor of the array or number that it returns."""

    def values() -> Tensor:
        with refused(f"{file}: {name} can't be read, the file is damaged or cut"):
            found = np.asarray(read())
            if found.dtype.name == "bfloat16":  # which NumPy knows from ml_dtypes alone
                tensor = torch.from_numpy(found.view("int16")).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(found)
        return tensor

    return values


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _tensorflow(source: Source) -> Iterator[Variable]:
    try:
        import tensorflow as tf
    except ImportError as error:
        told = f"a TensorFlow checkpoint takes tensorflow to read, which is not installed: {install('tensorflow')}"
        raise UsageError(f"{source.file}: {told}") from error
    with refused(f"{source.file}: is no TensorFlow checkpoint, or damaged, or a file of it is missing"):
        reader = tf.train.load_checkpoint(str(source.file))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        called = _full_names(reader) if "_CHECKPOINTABLE_OBJECT_GRAPH" in shapes else {}
    for key in sorted(shapes):
        name = called.get(key, key)
        place = None if (reason := names.slot(key) or names.slot(name)) else names.of_google(name)
        if place is None and reason is None and name.startswith("tf"):
            place = names.of_keras(name)
        read = _reading(source.file, name, partial(reader.get_tensor, key))
        variable = Variable(name, tuple(shapes[key]), _dtype(dtypes[key].name), read, reason=reason)
        if place:
            variable.to, variable.transposed = place
        elif reason and variable.dtype is not None:
            variable.read()  # so that it is checked, too: a file that is cut may miss the optimizer's variables alone
        yield variable


def _full_names(reader: CheckpointReader) -> dict[str, str]:
    """The variables' own names, by their keys in a checkpoint of objects (`tf.train.Checkpoint`)."""
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    graph = TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    attributes = (attribute for node in graph.nodes for attribute in node.attributes)
    return {each.checkpoint_key: each.full_name for each in attributes if each.full_name}


def _shards(source: Source) -> dict[Path, set[str]]:
    """The files of a checkpoint, and the names that its index says are in each; of one without an index, none."""
    if not source.file.name.endswith(".index.json"):
        return {source.file: set()}
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError)
    with refused(f"{source.file}: is no index of shards", kinds=kinds):
        listed = json.loads(source.file.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, set[str]] = {}
        for name, file in listed.items():
            if os.path.basename(file) != file:
                raise UsageError(f"{source.file}: names {file!r}; expected a file beside it")
            found.setdefault(source.folder / file, set()).add(name)
    for file in found:
        if not file.is_file():
            raise UsageError(f"{file}: no such file, which {source.file.name} names")
    return found


def _check_listed(file: Path, index: Path, listed: set[str], there: set[str]) -> None:
    """Raises UsageError where a shard doesn't hold what its index says."""
    for name in sorted((listed or there) ^ there)[:1]:
        other = "is not in it" if name not in there else "is in it, and not there"
        raise UsageError(f"{file}: is not the shard that {index.name} tells of: {name} {other}")


def _keras(source: Source) -> Iterator[Variable]:
    try:
        import h5py
    except ImportError as error:
        told = f"takes h5py to read, which is not installed: {install('h5')}"
        raise UsageError(f"{source.file}: {told}") from error
    for file, listed in _shards(source).items():
        with refused(f"{file}: is no HDF5 file of Keras, or damaged"):
            opened = h5py.File(file, "r")
            found = list(_keras_weights(opened))
        listed = {name.partition("/")[2] for name in listed}  # of shards the names begin after the model's own
        _check_listed(file, source.file, listed, {name for _, name, _ in found})
        for level, name, dataset in found:
            to, transposed = names.of_keras(level + name.partition(" in ")[0])
            kind = _dtype(dataset.dtype.name)
            read = _reading(file, name, partial(dataset.__getitem__, ()))
            yield Variable(name, tuple(dataset.shape), kind, read, to, transposed)


def _keras_weights(file: h5py.File) -> Iterator[tuple[str, str, h5py.Dataset]]:
    """(what comes before its name, name, dataset) of each weight, in the order that the file tells."""
    import h5py

    found = []
    for layer in _strings(file, "layer_names"):
        group = file[layer]
        if isinstance(group, h5py.Dataset):  # a shard: transformers wrote the weights alone, without the model's name
            found.append(("model/", layer, group))
        else:
            for name in _strings(group, "weight_names"):
                again = any(name == each for _, each, _ in found)  # a head that is tied holds the embeddings, too
                found.append(("", f"{name} in {layer}" if again else name, group[name]))
    for level, name, dataset in found:
        elsewhere = not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual
        if elsewhere or dataset.file.filename != file.filename:
            raise UsageError(f"{file.filename}: the values of {name} are not in it")
        yield level, name, dataset


def _strings(group: h5py.Group, name: str) -> list[str]:
    """An attribute of names; Keras cuts long ones into name0, name1, ..."""
    if name in group.attrs:
        found = list(group.attrs[name])
    else:
        found, part = [], 0
        while f"{name}{part}" in group.attrs:
            found += list(group.attrs[f"{name}{part}"])
            part += 1
        if not part:
            told = f"{group.name} has no attribute {name}; expected weights that Keras saved"
            raise UsageError(f"{group.file.filename}: {told}")
    return [each.decode() if isinstance(each, bytes) else str(each) for each in found]


def _state_dict(source: Source) -> Iterator[Variable]:
    for file, listed in _shards(source).items():
        tensors = _load_torch(file)
        _check_listed(file, source.file, listed, set(tensors))
        wrapped = all(name.startswith("module.") for name in tensors)  # saved from within DistributedDataParallel
        for name, tensor in tensors.items():
            to = names.of_old_torch(name.removeprefix("module.") if wrapped else name)
            yield Variable(name, tuple(tensor.shape), tensor.dtype, partial(_same, tensor), to)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _load_torch(file: Path) -> dict[str, Tensor]:
    """A state dict, its values left in the file where that can be. Raises UsageError: it isn't one, or is damaged."""
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch looks at no checksum
                    raise UsageError(f"{file}: {damaged} in it is damaged: its checksum differs")
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UsageError:
        raise
    except Exception as error:  # as above; what asks for code too
        told = in_a_line(error).split(" Please file an issue")[0].split(". (1) In PyTorch 2.6")[0]
        raise UsageError(f"{file}: is no state dict of tensors, or damaged: {told}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        held = f"a dict of {', '.join(map(str, list(found)[:3]))}" if isinstance(found, dict) else type(found).__name__
        raise UsageError(f"{file}: holds {held}; expected tensors by their names")
    return {str(name): tensor for name, tensor in found.items()}
