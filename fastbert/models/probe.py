"""What a family is tried on as it is registered: whether its description fits its classes, whether fused is stock."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..explain import explain
from ..fuse import fuse
from ..layers.attention import Attention
from ..layers.embeddings import first_position
from ..layers.feed_forward import FeedForward
from ..layers.gemm import Path, child
from ..layers.layer import Layer
from ..numerics import relative_error
from ..runtime import known
from ..runtime.packing import Packing
from ..runtime.readers import a, parameter_names
from ..runtime.registry import encoder_of, layers_of, stack_of, stack_within, table_of
from ..runtime.support import is_plain
from .family import IDS, Family

_TOLERANCE = 1e-4
"""Relative, in float32, where a wrong layer is off by tenths."""


def hands_nothing_on(model: torch.nn.Module, family: Family) -> str | None:
    """Why a base model on the meta device can't be given a plan: its stock forward keeps it from its encoder.

    None, too, where that can't be tried: then `check_taken` finds it, in a call.
    """
    seen: list[object] = []
    hook = encoder_of(model).register_forward_pre_hook(
        lambda encoder, args, kwargs: seen.append(kwargs.get("plan")), with_kwargs=True
    )
    error: Exception | None = None
    ids = {next(iter(family.ids)): torch.zeros(1, 2, dtype=torch.int64, device="meta")}
    stock: Any = family.base
    try:
        with torch.no_grad():
            stock.forward(model, **ids, plan="of a probe")
    except Exception as raised:  # whatever it raises: it looked at values, which there are none of, or takes no names
        error = raised
    finally:
        hook.remove()
    if seen == ["of a probe"] or (not seen and not isinstance(error, TypeError)):
        return None
    kind = stock.__name__
    where = f"the {kind} of transformers {transformers.__version__}" if known.is_transformers(stock) else f"{kind}"
    why = "" if error is None else f": {error}"
    return f"{where} does not hand its keyword arguments on to its encoder{why}"


def check_description(family: Family) -> None:
    """Holds what a family says of its classes against a small stock model.

    Raises:
        ValueError: they don't fit; the field of `Family` is named, or of the half of its layout.
    """
    base: Any = family.base
    _check_fields(family)
    with torch.device("meta"):
        model = base(family.config(**family.sizes))
    if len(family.stack) < (1 if family.loops else 2):
        raise ValueError(
            f"Family.stack is {family.stack}; expected a path through the encoder to its layers, or, where "
            "Family.encoder is the base model's class, as it calls its layers itself, to the layers"
        )
    for field, path in (("embeddings_at", family.embeddings_at), ("stack", family.stack)):
        _at(model, path, f"Family.{field}", base.__name__)
    encoder, held = _at(model, family.stack[:-1], "", ""), _at(model, family.stack, "", "")
    embeddings = _at(model, family.embeddings_at, "", "")
    if not isinstance(held, nn.ModuleList) or not len(held):
        raise ValueError(f"Family.stack leads to {_a(held)}; expected an nn.ModuleList with layers")
    stack = stack_within(family, encoder)
    if stack.lost is not None:
        raise ValueError(f"Family.order leads to no layers of {_a(encoder)}: {stack.lost}")
    layers = stack.layers
    for name, group in stack.groups().items():
        if type(group) not in (family.group, nn.ModuleList):
            expected = "an nn.ModuleList" if family.group is None else f"{a(family.group)}, or an nn.ModuleList"
            raise ValueError(f"Family.order leads through {name}, {_a(group)}; expected {expected}")
    for field, module, kind in (
        ("encoder", encoder, family.encoder),
        ("layer", layers[0], family.layer),
        ("embeddings", embeddings, family.embeddings),
    ):
        if type(module) is not kind:
            raise ValueError(f"Family.{field} is {kind.__name__}; the model has {_a(module)} there")
    if not family.ids:
        raise ValueError("Family.ids is empty; expected the argument of the words' ids, and its table")
    words = next(iter(family.ids.values()))
    if words is None or not isinstance(table_of(embeddings, words), nn.Embedding):
        raise ValueError(f"Family.ids names {words!r} as the table of words; {_a(embeddings)} has no such nn.Embedding")
    for name, table in family.ids.items():
        found = table_of(embeddings, table)
        if (
            table is None or table == IDS.get(name) or isinstance(found, nn.Embedding)
        ):  # what is left as it was may miss
            continue
        if found is not None or not _reads(embeddings, table):  # whether there is one may hang on the config
            raise ValueError(f"Family.ids names {table!r} as the table of {name}; {_a(embeddings)} has none there")
    if family.final_norm is not None and not is_plain(
        encoder._modules.get(family.final_norm) or nn.Identity(), family.layout.norm
    ):
        expected = "nn.LayerNorm" if family.layout.norm is nn.LayerNorm else family.layout.norm.__name__
        raise ValueError(f"Family.final_norm is {family.final_norm!r}; {_a(encoder)} has no such {expected}")
    if family.projection is not None and not is_plain(encoder._modules.get(family.projection), nn.Linear):
        raise ValueError(f"Family.projection is {family.projection!r}; {_a(encoder)} has no such nn.Linear")
    _check_layout(family.layout, layers[0])


def _check_fields(family: Family) -> None:
    """Whether fields have the types that they are given as."""
    paths: dict[str, object] = {f"Family.{name}": getattr(family, name) for name in ("embeddings_at", "stack")}
    for half in family.layout.halves():
        for field, (_, value) in zip(fields(half), vars(half).items(), strict=True):
            if "Path" in str(field.type) and field.name != "kinds":
                paths[f"{type(half).__name__}.{field.name}"] = value
        paths.update({f"a path in {type(half).__name__}.kinds": path for path in half.kinds})
    for name, path in paths.items():
        if path is not None and not (isinstance(path, tuple) and all(isinstance(each, str) for each in path)):
            example = f"({path!r},)" if isinstance(path, str) else "('attention', 'output')"
            raise ValueError(f"{name} is {path!r}; expected a tuple of names, as {example}")
    for name in ("heads", "others", "parts"):
        for kind in getattr(family, name):
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ValueError(f"Family.{name} has {kind!r}; expected classes of modules")
    if not (isinstance(family.output, type) and issubclass(family.output, ModelOutput)):
        raise ValueError(f"Family.output is {family.output!r}; expected a class derived from transformers' ModelOutput")


def _reads(module: nn.Module, name: str) -> bool:
    """Whether the code of a module's class, or of those that it is derived from, reads or sets an attribute."""
    functions = (each for kind in type(module).__mro__ for each in vars(kind).values())
    return any(name in each.__code__.co_names for each in functions if isinstance(each, FunctionType))


def _a(module: nn.Module) -> str:
    return a(type(module))


def _at(module: nn.Module, path: Path, field: str, owner: str) -> Any:
    """The submodule or attribute at a path."""
    for i, name in enumerate(path):
        if not hasattr(module, name):
            raise ValueError(f"{field} is {'.'.join(path)}; {'.'.join((owner, *path[:i]))} has no {name}")
        module = getattr(module, name)
    return module


def _check_layout(layout: Layer, layer: nn.Module) -> None:
    attention, feed_forward = layout.attention, layout.feed_forward
    owner = type(layer).__name__
    if feed_forward.is_gated and feed_forward.gate is not None:
        raise ValueError("FeedForward.is_gated and FeedForward.gate are both given; expected one of the two")
    head_dim = getattr(_at(layer, attention.module, "Attention.module", owner), attention.head_dim, None)
    if not isinstance(head_dim, int):
        place = ".".join((owner, *attention.module))
        raise ValueError(f"Attention.head_dim is {attention.head_dim!r}; {place} has no such number")
    _at(layer, feed_forward.activation, "FeedForward.activation", owner)
    halves = (("Attention", attention), ("FeedForward", feed_forward))
    known_parameters: set[int] = set()
    paths: list[Path] = [attention.module, feed_forward.activation]
    for name, half in halves:
        for path in (path for group in half.gemms().values() for path in group):
            linear = _at(layer, path, f"{name}: a linear layer", owner)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name}: {'.'.join(path)} is {_a(linear)}; expected an nn.Linear")
            known_parameters |= {id(p) for p in linear.parameters()}
            paths.append(path)
        norm = _at(layer, half.norm, f"{name}.norm", owner)
        paths.append(half.norm)
        if layout.pre_norm and type(norm) is nn.Identity:
            continue
        if not isinstance(norm, layout.norm) or norm.weight is None:
            raise ValueError(f"{name}.norm is {_a(norm)}; expected {a(layout.norm)} with a weight")
        known_parameters |= {id(p) for p in norm.parameters()}
    for name, half in halves:
        for path in filter(None, half.dropout_paths()):
            dropout = _at(layer, path, f"{name}: a dropout", owner)
            if type(dropout) not in (nn.Dropout, nn.Identity) and not isinstance(dropout, (int, float)):
                raise ValueError(f"{name}: {'.'.join(path)} is {_a(dropout)}; expected an nn.Dropout, or a rate")
            paths.append(path)
        for path, kind in half.kinds.items():
            if type(found := _at(layer, path, f"{name}.kinds", owner)) is not kind:
                raise ValueError(f"{name}.kinds: {'.'.join(path)} is {_a(found)}, not {kind.__name__}")
    known_parameters |= {id(p) for p in attention.parameters(layer)}
    _check_widths(layout, layer, head_dim)
    stood_in_for = {*attention.kinds, *feed_forward.kinds}
    for path in paths:
        for end in range(1, len(path)):
            if path[:end] not in stood_in_for:
                kind = _at(layer, path[:end], "", "")
                raise ValueError(
                    f"{'.'.join(path[:end])} is {_a(kind)}, in the kinds of no half: the fused layer stands in for its "
                    "code, and has to see when somebody replaces it"
                )
    for name, parameter in layer.named_parameters():
        if id(parameter) not in known_parameters:
            raise ValueError(f"{owner} has {name}, a parameter of nothing that either half names")


def _check_widths(layout: Layer, layer: nn.Module, head_dim: int) -> None:
    def outputs(half: Attention | FeedForward, name: str) -> int:
        return sum(child(layer, *path).out_features for path in half.gemms()[name])

    attention, feed_forward = layout.halves()
    attended = child(layer, *attention.output).in_features
    if attended % head_dim or outputs(attention, "qkv") != 3 * attended:
        raise ValueError(
            f"Attention: queries, keys and values have {outputs(attention, 'qkv')} columns; expected three times the "
            f"{attended} that its output takes, in heads of {head_dim}"
        )
    raised = child(layer, *feed_forward.down).in_features * (2 if feed_forward.is_gated else 1)
    for name in ("up", "gate"):
        if name in feed_forward.gemms() and outputs(feed_forward, name) != raised:
            found = outputs(feed_forward, name)
            raise ValueError(
                f"FeedForward.{name} gives {found} columns; expected {raised}, by FeedForward.down and is_gated"
            )


class _Call(NamedTuple):
    """A call that is tried."""

    what: str
    """As errors have it, after "in a call"."""
    arguments: dict[str, Any]
    real: Tensor
    """(B, S) bool, real tokens."""
    hint: str = ""
    """What else may be wrong, if this one departs and others don't."""


def try_family(family: Family) -> None:
    """Compares small models with random weights fused and stock.

    The base model, in both layouts, over paddings, lengths, positions and given embeddings, with gradients, and with
    all dropped at one place after the other; and heads, as they read padding or don't.

    Raises:
        ValueError: they differ, or nothing of it runs fused.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        stock = _small(family, family.base)
        calls = list(_calls(stock, family))
        _check_tables(stock, family, calls[0])
        _check_activation(stock, family, calls[0])
        for padding in ("packed", "dense"):
            fused = fuse(copy.deepcopy(stock), padding=padding)
            for call in calls:
                _compare(stock, fused, call, padding)
            (encoder,) = explain(fused).encoders
            if not encoder.fused_calls:
                told = encoder.stock_calls or encoder.reason
                raise ValueError(f"{family.base.__name__} is not registered: a small model of it runs stock: {told}")
            _compare_sequences(stock, fused, family)
            _compare_gradients(stock, fused, calls[0], padding)
        family.returns_maps = family.returns_maps and _returns_maps(copy.deepcopy(stock), calls[:4])
        _try_dropout(family, calls[0])
        for kind in family.heads:
            _try_head(family, kind)


def _small(family: Family, kind: Callable[..., PreTrainedModel], **changes: object) -> PreTrainedModel:
    """A small stock model with random weights."""
    model = kind(family.config(**{**family.sizes, **changes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return model


def _departs(model: nn.Module, what: str, hint: str = "") -> ValueError:
    name = type(model).__name__
    return ValueError(f"{name} is not registered: fused, it departs from stock: {what}{hint and f'; {hint}'}")


_MASKS = {
    "with padding": ([1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8),
    "with padding on the left": ([0] * 5 + [1] * 4, [1] * 9, [0] * 8 + [1]),
    "with holes in its mask": ([1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0], [1] * 9),
    "with a sequence without a real token": ([1] * 9, [0] * 9, [1, 1, 0, 0, 0, 0, 0, 0, 0]),
}
_OF_THE_MASK = "if its positions come from the mask, it can't be fused"
_HINTS = {
    "with padding": "its layout, tables or final_norm says something else than its code",
    "with padding on the left": _OF_THE_MASK,
    "with holes in its mask": _OF_THE_MASK,
    "with a sequence without a real token": "see Family.spreads_empty",
}


def _calls(stock: nn.Module, family: Family) -> Iterator[_Call]:
    """Those that stock can be called with, the one with padding first."""
    base: Any = family.base
    words, *others = family.ids
    rows = {name: _rows(stock, family, name) for name in family.ids}

    def ids(batch: int, seqlen: int) -> dict[str, Tensor]:
        given = {words: torch.randint(1, rows[words], (batch, seqlen))}
        return given | {n: torch.randint(rows[n], (batch, seqlen)) for n in others if n != "position_ids"}

    found = []
    for what, mask in _MASKS.items():
        real = torch.tensor(mask)
        arguments = ids(*real.shape)
        arguments[words] = torch.where(real.bool(), arguments[words], 0)
        found.append(_Call(what, {**arguments, "attention_mask": real}, real.bool(), _HINTS.get(what, "")))
    padded = found[0]
    real = torch.ones(2, 7, dtype=torch.bool)
    found.append(_Call("without a mask", ids(2, 7), real))
    hint = "Family.run returns hidden_states as the encoder does"
    found.append(_Call("for hidden states", {**padded.arguments, "output_hidden_states": True}, padded.real, hint))
    for length in (300, 70, 30):
        real = torch.arange(length) < torch.tensor([[length], [length // 2], [length - 3]])
        found.append(_Call(f"of {length} tokens a sequence", {**ids(3, length), "attention_mask": real.long()}, real))
    names = parameter_names(base)
    if "position_ids" in names or "position_ids" in family.ids:
        hint = "tables have to be made of position_ids where they are given"
        for what, shape in (("position_ids for all", (1, 9)), ("position_ids for each", (3, 9))):
            positions = torch.randint(max(rows.get("position_ids", 9), 9), shape)
            found.append(
                _Call(f"with {what} sequence", {**padded.arguments, "position_ids": positions}, padded.real, hint)
            )
    if "inputs_embeds" in names:
        embeds = torch.randn(*padded.real.shape, _width(stock, family))
        arguments = {name: value for name, value in padded.arguments.items() if name != words}
        found.append(_Call("with inputs_embeds", {**arguments, "inputs_embeds": embeds}, padded.real))
    try:
        with torch.no_grad():
            stock(**padded.arguments)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(padded.arguments)
        what = f"{base.__name__} can't be called with {given}"
        raise ValueError(f"{what}: {error}; see Family.ids, and Family.sizes") from error
    yield padded
    for call in found[1:]:
        if _stock_takes(stock, call):
            yield call


def _rows(stock: nn.Module, family: Family, name: str) -> int:
    """How many values an argument of ids has: rows of its table; 2, where it has none."""
    table = family.ids[name]
    embeddings = _at(stock, family.embeddings_at, "", "")
    found = table_of(embeddings, table)
    return 2 if found is None else int(found.num_embeddings)


def _width(stock: nn.Module, family: Family) -> int:
    """Of the embeddings of words."""
    table = table_of(_at(stock, family.embeddings_at, "", ""), next(iter(family.ids.values())))
    return int(table.embedding_dim)


def _stock_takes(stock: nn.Module, call: _Call) -> bool:
    """Whether stock runs that call; what it raises is its own to say."""
    try:
        with torch.no_grad():
            stock(**call.arguments)
    except (IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _tensors(result: object) -> dict[str, Tensor]:
    """The tensors of a model's output, by name."""
    if isinstance(result, Tensor):
        return {"output": result}
    if not isinstance(result, (Mapping, tuple, list)):
        return {}
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    found = {}
    for name, value in items:
        inner = (
            {"": value} if isinstance(value, Tensor) else _tensors(value) if isinstance(value, (tuple, list)) else {}
        )
        found.update({f"{name}{rest and f'.{rest}'}": tensor for rest, tensor in inner.items()})
    return found


def _compare(stock: nn.Module, fused: nn.Module, call: _Call, layout: str) -> None:
    """Raises ValueError where the outputs of a call differ: at real tokens; at all of them, where `layout` is dense."""
    where = f"{layout}, in a call {call.what}"
    with torch.no_grad():
        expected = _tensors(stock(**call.arguments))
        try:
            found = _tensors(fused(**call.arguments))
        except Exception as raised:  # whatever it is, stock does not raise it
            raise _departs(stock, f"it raises {type(raised).__name__}, {where}: {raised}", call.hint) from raised
    if missing := sorted(expected.keys() ^ found.keys()):
        raise _departs(stock, f"{', '.join(missing)} given by one of the two alone, {where}", call.hint)
    for name, tensor in expected.items():
        ours, truth = found[name], tensor
        if layout != "dense" and truth.shape[: call.real.dim()] == call.real.shape:
            ours, truth = ours[call.real], truth[call.real]
        elif layout != "dense" and truth.shape[:1] == call.real.shape[:1]:
            some = call.real.any(1)
            ours, truth = ours[some], truth[some]
        error = relative_error(ours, truth.double()) if ours.shape == truth.shape else float("inf")
        if not error <= _TOLERANCE:
            name = "hidden states" if name in ("last_hidden_state", "output", "0") else name
            raise _departs(stock, f"its {name} by {error:.1e}, {where}", call.hint)


def _returns_maps(stock: PreTrainedModel, calls: list[_Call]) -> bool:
    """Whether a fused model, dense, returns the attention maps that `stock` does; where not, such calls run stock."""
    stock.config._attn_implementation = "eager"  # all of its modules have this config
    fused = fuse(copy.deepcopy(stock), padding="dense")
    for call in calls:
        tried = call._replace(arguments={**call.arguments, "output_attentions": True})
        if not _stock_takes(stock, tried):
            return False
        with torch.no_grad():
            expected = _tensors(stock(**tried.arguments))
        if not any(name.startswith("attentions") for name in expected):
            return False
        try:
            _compare(stock, fused, tried, "dense")
        except ValueError:  # as it raises where they differ
            return False
    return True


def _compare_sequences(stock: nn.Module, fused: nn.Module, family: Family) -> None:
    """The flattened call, where sequences lie end to end: each as stock has it alone."""
    if family.embeds_padded:  # it is refused
        return
    lengths, words = (5, 9, 1, 7), next(iter(family.ids))
    ids = torch.randint(2, _rows(stock, family, words), (1, sum(lengths)))  # 0 and 1 may be padding's
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    call: dict[str, object] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    if family.ids.get("position_ids") is not None:
        call["position_ids"] = positions + first_position(_at(stock, family.embeddings_at, "", ""))
    with torch.no_grad():
        try:
            found = _tensors(fused(**{words: ids}, **call))
        except TypeError:  # it takes no arguments of such names
            return
        expected = [next(iter(_tensors(stock(**{words: part})).values())) for part in ids.split(lengths, 1)]
    error = relative_error(next(iter(found.values())), torch.cat(expected, 1).double())
    if not error <= _TOLERANCE:
        raise _departs(stock, f"its hidden states by {error:.1e}, in a flattened call, with cu_seq_lens_q")


def _compare_gradients(stock: PreTrainedModel, fused: nn.Module, call: _Call, layout: str) -> None:
    # A LayerNorm's sum over a row says nothing of the row.
    weights = torch.randn(stock.config.hidden_size) * call.real[..., None]
    found = []
    for model in (stock, fused):
        with torch.enable_grad():
            (next(iter(_tensors(model(**call.arguments)).values())) * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        model.zero_grad(set_to_none=True)
    gradients, own = found
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Some are zero but for rounding, as that of the keys' bias.
        size = max(gradient.norm().item(), largest / 1000)
        error = ((own[name] - gradient).norm() / size).item() if name in own else 1.0
        if not error <= 10 * _TOLERANCE:
            raise _departs(stock, f"the gradient of {name} by {error:.1e}, {layout}")


def _check_tables(stock: nn.Module, family: Family, call: _Call) -> None:
    """Looks at the tables that the family makes, in two dtypes and both layouts."""
    made, attention = family.tables, family.layout.attention
    if made is None:
        for field in ("bias", "rotary"):
            if (name := getattr(attention, field)) not in (None, family.handed):
                raise ValueError(f"Attention.{field} is {name!r}; Family.tables, which is to make it, is None")
        return
    layer = layers_of(stock)[0]
    module = child(layer, *attention.module)
    head_dim = getattr(module, attention.head_dim)
    heads = child(layer, *attention.output).in_features // head_dim

    def check(
        encoder: nn.Module, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None
    ) -> Mapping[str, object]:
        tables, rows = made(encoder, hidden_states, packing, position_ids), hidden_states.shape[:2].numel()
        for field, shapes, dtypes in (
            ("bias", [(heads, 2 * packing.max_seqlen - 1)], (torch.float32,)),
            ("rotary", [(rows, head_dim)] * 2, (torch.float32, torch.bfloat16)),
        ):
            if (name := getattr(attention, field)) is None:
                continue
            found = tables.get(name)
            if attention.kind is not None and isinstance(found, dict):
                found = found.get(getattr(layer, attention.kind))
            found = list(found) if isinstance(found, (tuple, list)) else [found]
            told = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"{x!r}" for x in found]
            fits = len(found) == len(shapes) and all(isinstance(x, Tensor) and x.dtype in dtypes for x in found)
            if not fits or [tuple(x.shape) for x in found] != shapes:
                expected = ", ".join(f"{shape} {dtypes[0]}" for shape in shapes)
                raise ValueError(
                    f"Family.tables gave {', '.join(told)} for {name!r}, Attention.{field}; expected {expected}"
                )
        return tables

    family.tables = check
    try:
        for padding in ("packed", "dense"):
            for dtype in (torch.float32, torch.bfloat16):
                with torch.no_grad():
                    fuse(copy.deepcopy(stock).to(dtype), padding=padding)(**call.arguments)
    finally:
        family.tables = made


def _check_activation(stock: nn.Module, family: Family, call: _Call) -> None:
    """Looks at what every layer makes of its first linear layer for its last one.

    Two kinds of GELU differ by less than what rounding may add up to in hidden states.
    """
    half, seen = family.layout.feed_forward, {}
    for layer in layers_of(stock):
        first, last = half.up if half.gate is None else half.gate, half.down
        hooks = [
            child(layer, *path).register_forward_hook(
                lambda _, args, out, path=path: seen.update({path: (args[0], out)})
            )
            for path in {first, half.up, last}
        ]
        with torch.no_grad():
            stock(**call.arguments)
        for hook in hooks:
            hook.remove()
        if len(seen) < len(hooks):  # whose weights it reads without calling them
            return
        expected, factor = seen[first][1], seen[half.up][1]
        if half.is_gated:
            expected, factor = expected.chunk(2, -1)
        with torch.no_grad():
            expected = half.activation_of(layer)(expected)
        expected = expected * factor if half.is_gated or half.gate is not None else expected
        taken = seen[last][0]
        error = relative_error(taken, expected.double()) if taken.shape == expected.shape else float("inf")
        if not error <= _TOLERANCE / 10:
            name, said = type(layer).__name__, half.function or ".".join(half.activation)
            raise ValueError(
                f"FeedForward.activation is {said}; what {name} hands to {'.'.join(last)} is "
                f"off by {error:.1e} from what that makes of {'.'.join(first)}"
            )


class _Dropped(TorchFunctionMode):
    """Notes what is dropped, and drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, Tensor | None]] = []
        """(rate, what it drops elements of), None for the probabilities of `scaled_dot_product_attention`."""

    def __torch_function__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.dropout:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            if given.get("training", True):
                self.seen.append((given.get("p", 0.5), given["input"]))
            return given["input"]
        if function is nn.functional.scaled_dot_product_attention and kwargs.get("dropout_p"):
            self.seen.append((kwargs["dropout_p"], None))
            kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


def _check_places(stock: nn.Module, family: Family, call: _Call) -> None:
    """Looks at what each dropout of the layout drops, by a rate of its own: `stock` in training, without others."""
    attention, feed_forward = family.layout.halves()
    halves = ((attention.dropout_paths()[1], attention.output), (feed_forward.down_dropout, feed_forward.down))
    layer, ends = layers_of(stock)[0], []
    hooks = [child(layer, *end).register_forward_hook(lambda _, __, out: ends.append(out)) for _, end in halves]
    rates = {
        path: (i + 1) / 16 for i, path in enumerate((attention.dropout_paths()[0], *(place for place, _ in halves)))
    }
    for path, rate in rates.items():
        if path is not None:
            _set_rate(stock, path, rate)
    with torch.no_grad(), _Dropped() as dropped:
        stock(**call.arguments)
    for hook in hooks:
        hook.remove()
    for i, (path, rate) in enumerate(rates.items()):
        if path is None:
            continue
        _set_rate(stock, path, 0.0)
        found = [x for p, x in dropped.seen if p == rate]
        if i:
            right = bool(found) and found[0] is not None and torch.equal(found[0], ends[i - 1])
            what = f"what {'.'.join(halves[i - 1][1])} gives"
        else:
            right, what = bool(found), "attention's probabilities"
            for x in found:
                right = right and (x is None or bool(torch.allclose(x.sum(-1), torch.ones(()), atol=1e-5)))
        if not right:
            raise ValueError(f"{'.'.join(path)} is not the dropout of {what}, in {type(layer).__name__}")


def _has(layer: nn.Module, path: Path) -> bool:
    """Whether there is a dropout; whether a layer has one may hang on its config."""
    return hasattr(child(layer, *path[:-1]), path[-1])


def _set_rate(model: nn.Module, path: Path, rate: float) -> None:
    """Sets a dropout of every layer."""
    for layer in layers_of(model):
        holder = child(layer, *path[:-1])
        dropout = getattr(holder, path[-1])
        if isinstance(dropout, nn.Dropout):
            dropout.p = rate
        else:
            setattr(holder, path[-1], rate)


def _try_dropout(family: Family, call: _Call) -> None:
    """Looks for dropout that the layout leaves out, then has everything dropped, at one of its places at a time."""
    config = family.config(**family.sizes)
    rates = {n: 0.5 for n, v in vars(config).items() if "drop" in n and isinstance(v, (int, float)) and v is not False}
    stock = _small(family, family.base, **rates).train()
    for module in stack_of(stock).held.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    layer = layers_of(stock)[0]
    paths = [path for half in family.layout.halves() for path in half.dropout_paths()]
    places = [path for path in paths if path is not None and _has(layer, path)]
    for path in places:
        _set_rate(stock, path, 0.0)
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    encoder = encoder_of(stock)
    if family.after_first(encoder) is not None:  # which calls modules of the encoder
        for module in (
            each for child in encoder.children() if child is not stack_of(stock).held for each in child.modules()
        ):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    within = {id(module) for module in stack_of(stock).held.modules()}
    beside = [each for each in stock.modules() if isinstance(each, nn.Dropout) and id(each) not in within]
    for module in beside if family.loops else ():  # the encoder is the model, its embeddings too
        module.p = 0.0
    hook = encoder.register_forward_hook(lambda _, args, kwargs, __: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        stock(**call.arguments)
        hook.remove()
        args, kwargs = seen[0]
        once, twice = (next(iter(_tensors(encoder(*args, **kwargs)).values())) for _ in range(2))
    if not torch.equal(once, twice):
        raise ValueError(f"{type(encoder).__name__} drops something in training that neither half names")
    for module in beside:
        module.p = 0.0
    with torch.no_grad():
        once, twice = (next(iter(_tensors(stock(**call.arguments)).values())) for _ in range(2))
    if not torch.equal(once, twice):  # of its embeddings, which run as they are
        return
    _check_places(stock, family, call)
    for path in places:
        _set_rate(stock, path, 1.0)
        tried = call._replace(what=f"in training where {'.'.join(path)} drops all")
        _compare(stock, fuse(copy.deepcopy(stock)), tried, "packed")
        _set_rate(stock, path, 0.0)


def _try_head(family: Family, kind: type[PreTrainedModel]) -> None:
    try:
        stock = _small(family, kind)
    except Exception as error:  # whatever it needs of its config
        raise ValueError(f"Family.sizes make no {kind.__name__}: {error}") from error
    if not any(isinstance(module, family.base) for module in stock.modules()):
        raise ValueError(f"Family.heads has {kind.__name__}, which holds no {family.base.__name__}")
    fused, words = fuse(copy.deepcopy(stock)), next(iter(family.ids))
    hint = "Family.heads says which rows it reads"
    for what, mask in list(_MASKS.items())[:3]:
        real = torch.tensor(mask)
        ids = torch.where(real.bool(), torch.randint(1, _rows(stock.base_model, family, words), real.shape), 0)
        call = _Call(what, {words: ids, "attention_mask": real}, real.bool(), hint)
        first, all_labelled = real[:, 0] * 0, torch.randint(2, real.shape)
        for told, more in (
            ("", {}),
            (" and labels", {"labels": first}),
            (" and labels of real tokens", {"labels": torch.where(real.bool(), all_labelled, -100)}),
            (" and labels of all tokens", {"labels": all_labelled}),
            (" and a span", {"start_positions": first, "end_positions": first}),
        ):
            tried = call._replace(what=what + told, arguments={**call.arguments, **more})
            if _stock_takes(stock, tried):
                _compare(stock, fused, tried, "auto")
