"""Which class of transformers takes a checkpoint's variables, and which of them it has no place for."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from ..usage import UsageError, refused
from . import TASKS
from .config import Config, stem
from .sources import Source

_UNTRAINED = ("pre-training", "masked-lm", "next-sentence", "base")
"""Tasks of pre-training, whose heads mean the same in each: where one has no place for all, another may be taken."""

Shapes = dict[str, tuple[int, ...]]

_LABELS = re.compile(r"^(classifier|qa_outputs)(\.out_proj)?\.bias$")


@dataclass
class Target:
    """A class, its parameters as they are stored, and every name of theirs."""

    kind: type[PreTrainedModel]
    shapes: Shapes
    """By the name that is stored: the first of those that are tied."""
    stored: dict[str, str]
    """The name that is stored, by every name, in the form of a model with a head."""

    @property
    def name(self) -> str:
        return self.kind.__name__

    def missing(self, has: Shapes) -> list[str]:
        """Parameters that nothing fills."""
        filled = {self.stored[name] for name in has if name in self.stored}
        return [name for name in self.shapes if name not in filled]

    def extra(self, has: Shapes) -> list[str]:
        """Names without a place."""
        return [name for name in has if name not in self.stored]

    def fits(self, has: Shapes) -> bool:
        """Whether the shapes are right, where names are."""
        return all(self.shapes[self.stored[name]] == shape for name, shape in has.items() if name in self.stored)


def _target(kind: type[PreTrainedModel], settings: PretrainedConfig) -> Target:
    """Raises UsageError: the settings don't fit each other."""
    with refused(f"{kind.__name__} can't be made of it", "config"), torch.device("meta"):  # in whatever way
        model = kind(copy.deepcopy(settings))
    prefix = "" if hasattr(model, kind.base_model_prefix) else f"{kind.base_model_prefix}."
    first: dict[int, str] = {}
    shapes, stored = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored[prefix + name] = first.setdefault(id(tensor), name)
        shapes[stored[prefix + name]] = tuple(tensor.shape)
    return Target(kind, shapes, stored)


def choose(source: Source, config: Config, task: str | None) -> tuple[PretrainedConfig, Target]:
    """The settings and the class; variables that it has no place for are left out, with the reason.

    Raises:
        UsageError: a parameter is not filled; a variable is of no class of the family.
    """
    _finish_names(source, config)
    settings = config.settings(source)
    refuse_unknown(source, [each.name for each in source.variables if not each.to and not each.reason])
    weights = {each.to: each for each in source.variables if each.to and not each.reason}
    has = {name: each.stored_shape for name, each in weights.items() if name}
    _set_labels(source, config, settings, has)
    targets: dict[str, Target] = {}
    failed: dict[str, UsageError] = {}
    for name, end in TASKS.items():
        if kind := getattr(transformers, stem(config.kind) + end, None):
            try:
                targets[name] = _target(kind, settings)
            except UsageError as error:  # question answering may ask for two labels
                failed[name] = error
    if task is not None:
        if task in failed:
            raise failed[task]
        if task not in targets:
            raise UsageError(f"is {task}; expected one of {', '.join(targets)}, that its family has", "task")
        target = targets[task]
    elif config.architecture is not None:
        target = _named(source, config, targets, settings, has)
    elif targets:
        target = _fitting(source, targets, has)
    else:
        raise failed["base"]
    if missing := target.missing(has):
        fits = [f"{name} ({each.name})" for name, each in targets.items() if not each.missing(has)]
        told = f"{source.file}: has no variable for {some(missing)} of {target.name}"
        raise UsageError(told + (f"; it has all for {', '.join(fits)}" if fits else ""), "task" if task else "")
    known = {name for each in targets.values() for name in each.stored}
    extra = target.extra(has)
    refuse_unknown(source, [weights[name].name for name in extra if name not in known])
    for variable in source.variables:
        if variable.to in extra and not variable.reason:
            variable.reason = f"{target.name} has no {variable.to}"
    return settings, target


def _finish_names(source: Source, config: Config) -> None:
    """Brings names into the form of a model with a head, and takes out buffers that were once stored."""
    prefix = getattr(transformers, f"{stem(config.kind)}Model").base_model_prefix
    weights = [each for each in source.variables if each.to and not each.reason]
    if not any(f"{each.to}".startswith(f"{prefix}.") for each in weights):  # saved from the base model
        for variable in weights:
            variable.to = f"{prefix}.{variable.to}"
    for variable in weights:
        if f"{variable.to}".endswith("embeddings.position_ids"):
            made = torch.arange(max(variable.shape, default=0))
            if not torch.equal(variable.read().long().flatten(), made):
                raise UsageError(f"{source.file}: {variable.name} is not 0, 1, 2, ..., which the model counts by")
            variable.reason = "0, 1, 2, ...: the model makes it itself"
    layers = {int(n) for each in weights for n in re.findall(r"\.layer\.(\d+)\.", f"{each.to}")}
    told = config.said.get("num_hidden_layers", config.said.get("n_layers"))
    if layers and told != max(layers) + 1:
        raise config.wrong(f"says {told} for num_hidden_layers; {source.file.name} has layers 0 to {max(layers)}")


def refuse_unknown(source: Source, names: list[str]) -> None:
    if names:
        told = "no parameter of such a model is known by that name; expected one, or to be told to leave it out"
        raise UsageError(f"{source.file}: {some(names)}: {told}")


def some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _set_labels(source: Source, config: Config, settings: PretrainedConfig, has: Shapes) -> None:
    """As many labels as the head has, where the config doesn't say."""
    (number,) = next((shape for name, shape in has.items() if _LABELS.match(name) and len(shape) == 1), (0,))
    told = config.says("num_labels", "_num_labels", "id2label", "label2id")
    if number and not told and number != settings.num_labels:
        settings.num_labels = number
        source.notes.append(f"the config says no num_labels; {number} by the head's bias")


def _named(
    source: Source, config: Config, targets: dict[str, Target], settings: PretrainedConfig, has: Shapes
) -> Target:
    """The class that the config names; or one of pre-training that has a place for all, where that one has not."""
    name = config.architecture
    kind = getattr(transformers, f"{name}", None)
    if kind is None or getattr(kind, "config_class", None) is not config.kind:
        raise config.wrong(f"says {name} in architectures; expected a class of {config.kind.__name__}, or a task")
    target = next((each for each in targets.values() if each.name == name), None) or _target(kind, settings)
    extra = target.extra(has)
    if extra and not target.missing(has):
        for other in (targets[each] for each in _UNTRAINED if each in targets):
            if not other.missing(has) and not other.extra(has):
                source.notes.append(f"{name}, which the config names, has no {some(extra, 1)}: {other.name} has all")
                return other
    return target


def _fitting(source: Source, targets: dict[str, Target], has: Shapes) -> Target:
    """The first class that takes all variables; else, of those that are filled, the one that leaves out fewest."""
    filled = [name for name, target in targets.items() if not target.missing(has)]
    filled = [name for name in filled if targets[name].fits(has)] or filled
    if not filled:
        return min(targets.values(), key=lambda target: len(target.missing(has)))
    fewest = min(len(targets[name].extra(has)) for name in filled)
    first, *others = [name for name in filled if len(targets[name].extra(has)) == fewest]
    if source.format == "tensorflow" and first == "sequence-classification":
        others.append("token-classification")  # whose checkpoints have a pooler, too, that it doesn't use
    told = f", as it may be {' or '.join(others)}: name the task then" if others else ""
    source.notes.append(f"the config names no class; {targets[first].name} by the variables{told}")
    return targets[first]
