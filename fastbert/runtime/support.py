"""What the fast path covers: pure predicates. Each returns the reason it can't be taken, or None where it can."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash

from .. import exporting, ops
from ..version import warn_of_newer
from . import known
from .registry import embeddings_of, encoder_of, family_of, layers_of, stack_of, table_of, wrapped_encoder_of
from .wrappers import is_rewritten, is_transparent, is_wrapper, reached, unwrapped, wrapped

warn_of_newer("transformers", transformers.__version__)

# More than 65,535 sequences share out attention's work by a list, which takes milliseconds to make of this many.
MAX_SEQUENCES = 2**18

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Attention implementations known to compute plain softmax attention, the only kind the kernels stand in for.
_FLASH_ATTENTION = {f"flash_attention_{version}" for version in (2, 3, 4)}
# Kernels of the Hub, whose names transformers writes in place of these where a package is missing.
_FLASH_ATTENTION |= set(getattr(flash, "FLASH_ATTN_KERNEL_FALLBACK", {}).values())
PLAIN_ATTENTION = {None, "eager", "sdpa", "flex_attention"} | _FLASH_ATTENTION

# Where linear layers come from that are called as they are: each maps the last dimension alone, so they are indifferent
# to how rows are laid out. Not so all adapters of PEFT: some route by a mean over tokens.
_ADAPTERS = ("adalora", "boft", "ia3", "loha", "lokr", "lora", "oft", "vera")
ROWWISE_LINEARS = {f"peft.tuners.{name}.layer" for name in _ADAPTERS}


# What the kernels are compiled and tested for: the oldest triton, and the oldest NVIDIA GPU, which has bfloat16.
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)

CACHES = ("past_key_values", "cache")
"""What calls name a cache of keys and values: before transformers 5.24, and since."""


def triton_is_unsuitable() -> str | None:
    """Why the kernels can't be compiled here."""
    try:
        version = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "triton is not installed"
    except (ImportError, OSError) as error:  # built for another Python, or for another system
        return f"triton can't be imported: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@torch.compiler.assume_constant_result
def gpu_is_unsuitable(index: int) -> str | None:
    """Why the kernels can't run on a GPU; a warning says so, the first time."""
    return _gpu_is_unsuitable(index)


@functools.cache  # by a function of its own: torch.compile would look through it
def _gpu_is_unsuitable(index: int) -> str | None:
    reason = triton_is_unsuitable()
    if reason is None and torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_GPU:
            older, oldest = (".".join(map(str, pair)) for pair in (capability, OLDEST_GPU))
            reason = f"a GPU of compute capability {older}; the kernels take {oldest} or newer"
    if reason is not None:
        warnings.warn(f"fastbert runs the stock code on cuda:{index}: {reason}", RuntimeWarning, stacklevel=3)
    return reason


# Hooks that neither read nor change what a module computes: transformers' output capturing, FSDP's gathering of
# parameters, and what makes the output of frozen embeddings need gradients (`FusedEmbeddings` does it in its place).
_CAPTURING, _GATHERING = "transformers.utils.output_capturing", "torch.distributed.fsdp."
_GRADIENT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def is_capturing(hook: object) -> bool:
    """Whether a hook is one by which transformers records outputs."""
    return (getattr(hook, "__module__", None) or "") == _CAPTURING  # a built-in has none


def is_harmless(hook: object, called: bool) -> bool:
    module = getattr(hook, "__module__", None) or ""
    if is_capturing(hook) or (called and module.startswith(_GATHERING)):
        return True
    return getattr(hook, "__name__", "") in _GRADIENT_HOOKS and module.startswith(("transformers.", "peft."))


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward of `module` alone to move its inputs to where its weights are.

    So it does where a model is spread over devices (`device_map`); what it offloads has its weights elsewhere, and a
    custom hook, derived from accelerate's, may change anything.
    """
    attributes = module.__dict__
    hook, forward = attributes.get("_hf_hook"), attributes.get("forward")
    ours = isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"
    if not ours or type(hook) is not sys.modules["accelerate.hooks"].AlignDevicesHook or hook.offload or hook.no_grad:
        return False
    return getattr(attributes.get("_old_forward"), "__func__", None) is type(module).forward


def is_hooked(module: nn.Module, called: bool = False) -> bool:
    """Whether anything watches or changes what `module` computes, but for hooks known to be harmless.

    FSDP's are where the module is `called`; where only its children are used, they would not run.
    """
    attributes = module.__dict__
    if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
        return True
    own = type(module)
    if torch.compiler.is_dynamo_compiling():  # it guards what is read of a module, and not what its dictionary lacks
        callable(module.forward)
    replaced = "forward" in attributes and not is_placed(module) and not is_wrapper(module)
    if replaced and not (called and is_transparent(attributes["forward"], own.forward)):
        return True
    before, after = attributes["_forward_pre_hooks"], attributes["_forward_hooks"]
    return bool(before or after) and any(not is_harmless(hook, called) for hook in (*before.values(), *after.values()))


def is_a(x: object, module: str, name: str) -> bool:
    """isinstance, without importing a module that nobody has: then x can't be one."""
    return module in sys.modules and isinstance(x, getattr(sys.modules[module], name))


def is_fake(x: object) -> bool:
    """Whether `x` is a tensor without values, as torch.export and estimators of memory have them."""
    return is_a(x, "torch._subclasses.fake_tensor", "FakeTensor")


def is_faked() -> bool:
    """Whether results of operators have no values: within FakeTensorMode, or traced. Nothing made there is kept."""
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY))


_OWN_FUNCTIONS = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]


def is_custom(x: object) -> bool:
    """Whether `x` is of a tensor subclass whose own `__torch_function__` may change functions of torch."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    own = getattr(type(x), "__torch_function__", None)
    return isinstance(x, Tensor) and getattr(own, "__func__", own) not in _OWN_FUNCTIONS


def _is_sharded(parameter: Any) -> bool:
    """Whether FSDP2 holds this parameter in shards, replicated or not: it is plain within its forward.

    One that tensor parallelism divides, too, is not: it has a second placement, and FSDP's comes first.
    """
    if not is_a(parameter, "torch.distributed.tensor", "DTensor"):
        return False
    placements = parameter.placements
    return len(placements) == 1 or (len(placements) == 2 and placements[0].is_replicate())


def is_plain(module: nn.Module, kind: type[nn.Module], sharded: bool = False) -> bool:
    """Whether `module` is exactly a `kind`, so that its parameters say all that it does.

    `sharded` allows for parameters that will be plain by the time its forward is entered.
    """
    if type(module) is not kind or is_hooked(module):
        return False
    parameters = module.__dict__["_parameters"]
    if parameters.get("weight") is None:  # FSDP1 may hold them elsewhere, and DataParallel's replicas have none
        return False
    return all(parameter is None or is_readable(parameter, sharded) for parameter in parameters.values())


def is_readable(parameter: object, sharded: bool = False) -> bool:
    """Whether a parameter is its numbers and nothing else; `sharded` as `is_plain` has it."""
    plain = type(parameter) is nn.Parameter or type(parameter) is Tensor or is_fake(parameter)
    return plain or (sharded and _is_sharded(parameter))


def is_rowwise(linear: Any, sharded: bool) -> bool:
    """Whether `linear` is an adapter around a plain linear layer, unwatched, that treats every row by itself.

    `sharded` as `is_plain` has it.
    """
    if type(linear).__module__ not in ROWWISE_LINEARS or not isinstance(getattr(linear, "base_layer", None), nn.Linear):
        return False
    return is_plain(linear.base_layer, nn.Linear, sharded) and not any(is_hooked(module) for module in linear.modules())


def _is_decoder(config: object) -> bool:
    return bool(getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False))


def model_is_unsupported(model: PreTrainedModel) -> str | None:
    """Why no call of `model`, a base model of a registered family, can run fused."""
    config, family = model.config, family_of(model)
    if family.unsupported is not None:
        return family.unsupported
    if type(model) is not family.base and type(model).forward is not family.fused[family.base].forward:
        return f"{type(model).__name__} is a custom class; supported: {family.base.__name__} itself"
    if _is_decoder(config):
        return "it is a decoder (config.is_decoder or config.add_cross_attention)"
    encoder = type(encoder_of(model))
    if encoder is not family.encoder and encoder.forward is not family.fused[family.encoder].forward:
        return f"its encoder is a {encoder.__name__}, not {family.encoder.__name__}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not 16 <= head_dim <= 128:
        return f"its head dimension is {head_dim}; supported: 16 to 128"
    if not len(layers_of(model)):
        return "it has no layers"
    return None


def sees_arguments(module: nn.Module) -> bool:
    """Whether a hook of `module` is shown what it is called with, by position and by name, or may change it."""
    attributes = module.__dict__
    before, after = attributes["_forward_pre_hooks"], attributes["_forward_hooks_with_kwargs"]
    if not before and not after:
        return False
    hooks = [*before.values(), *(attributes["_forward_hooks"][key] for key in after)]
    return any(not is_harmless(hook, called=True) for hook in hooks)


def named(module: object) -> str:
    """A module's class as reasons name it."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def activation_is_unsupported(activation: Any) -> str | None:
    """Why an activation may be none that works element by element."""
    kind = type(activation)
    if kind not in known.ELEMENTWISE and kind.__module__ != "transformers.activations":
        return f"a custom {named(activation)}"
    if is_hooked(activation):
        return f"a {named(activation)} that has hooks"
    act = activation.__dict__.get("act")
    if act is not None and not known.is_own_act(act):
        return f"a {named(activation)} whose `act` has been replaced"
    return None


def oddity(module: object) -> str:
    """What a reason says of a module that isn't plain beside its class."""
    if not isinstance(module, nn.Module):
        return ""
    if is_hooked(module):
        return " with hooks" if "forward" not in module.__dict__ else " whose forward has been replaced"
    if "weight" not in module._parameters:
        return ""
    weight = module._parameters["weight"]
    return "" if type(weight) is nn.Parameter else f" whose weight is a {named(weight)}"


def embeddings_are_unsupported(embeddings: Any, sharded: bool = False) -> str | None:
    """Why an embeddings module runs its stock code; `sharded` as `is_plain` has it."""
    return tables_are_unsupported(embeddings, sharded) or needs_stock(embeddings.word_embeddings.weight)


def tables_are_unsupported(embeddings: nn.Module, sharded: bool = False) -> str | None:
    """The same, whatever the state of torch."""
    more = getattr(embeddings, "use_task_id", False)  # of the classes that have it, it adds a fourth table
    wanted = ("token_type_embeddings", "position_embeddings", "LayerNorm")
    if more or any(getattr(embeddings, name, None) is None for name in wanted):
        return "there is a kernel for tables of words, types and positions, with LayerNorm, not for these"
    names = ("word_embeddings", "token_type_embeddings", "position_embeddings")
    tables = [getattr(embeddings, name) for name in names]
    for name, table in zip(names, tables, strict=True):
        if not is_plain(table, nn.Embedding, sharded) or table.max_norm is not None:
            return f"{name} is replaced, hooked or renormalised: a {type(table).__name__}"
    if any(table.sparse or table.scale_grad_by_freq for table in tables) or any(
        table.padding_idx is not None for table in tables[1:2]
    ):
        return "an embedding table with sparse or scaled gradients, or one of types with a padding_idx"
    norm: Any = getattr(embeddings, "LayerNorm", None)
    if not is_plain(norm, nn.LayerNorm, sharded) or norm.bias is None:
        return f"its LayerNorm is replaced or hooked: a {type(norm).__name__}"
    weights = [table.weight for table in tables] + [embeddings.LayerNorm.weight]
    if any(w.dtype != weights[0].dtype or w.device != weights[0].device for w in weights):
        return "its parameters differ in dtype or device"
    if {(table.embedding_dim,) for table in tables} != {tuple(norm.normalized_shape)} or any(
        w.dim() == 2 and w.shape[1:] != norm.normalized_shape
        for w in weights[:-1]  # else a shard
    ):
        return "its tables and its LayerNorm differ in width"
    return None


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way, whose tensors may have no values to read."""
    return torch._C._functorch.maybe_current_level() is not None


DISABLED = "FASTBERT_DISABLE is set"


def is_disabled() -> bool:
    """Whether the environment has every call run stock."""
    return os.environ.get("FASTBERT_DISABLE", "0") not in ("", "0")


def needs_stock(sample: Tensor) -> str | None:
    """Why the state of torch at this moment rules the kernels out for modules whose parameters are like `sample`."""
    if is_disabled():
        return DISABLED
    if torch.compiler.is_exporting() and not exporting.FUSED:
        return "torch.export, outside of fastbert.fused_export()"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if is_transformed():
        return "a transform of torch.func"
    device = sample.device.type
    if device not in ("cpu", "cuda"):
        return f"device {device}"
    if torch.is_autocast_enabled(device) and (dtype := torch.get_autocast_dtype(device)) not in DTYPES:
        return f"torch.autocast to {dtype}"
    if sample.dtype not in DTYPES:
        return f"dtype {sample.dtype}"
    if device == "cuda" and (reason := gpu_is_unsuitable(sample.device.index or 0)):
        return reason
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "tracing for export"
    if module_globals._has_any_global_hook():
        return "global module hooks"
    if torch._C._len_torch_function_stack() and (mode := _foreign_mode(device)) is not None:
        return mode
    if (active := ops.foreign_dispatch_mode()) is not None:
        return f"a {named(active)}, which may count or replace torch's operators"
    return None


def _foreign_mode(device: str) -> str | None:
    """What an active TorchFunctionMode may do: one not of torch, or of context parallelism, or of another device."""
    for mode in _get_current_function_mode_stack():
        module = type(mode).__module__
        if not module.startswith("torch.") or module.startswith("torch.distributed."):
            return f"a {named(mode)}, which may replace what functions of torch compute"
        if isinstance(mode, DeviceContext) and mode.device.type not in ("cpu", device):
            return f"the default device is {mode.device.type}, where the model is on {device}"
    return None


def fp8_is_unsupported(device: torch.device) -> str | None:
    """Why FP8 (e4m3) GEMMs can't run on `device`; on a CPU they are simulated."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.version.hip:
        return "an AMD GPU, whose FP8 numbers are others"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}; FP8 takes 8.9 or higher"
    return None


def int8_is_unsupported(device: torch.device) -> str | None:
    """Why int8 GEMMs can't run on `device`, or are slow there."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.version.hip:
        return "an AMD GPU, for which its kernels are not built"
    major, minor = torch.cuda.get_device_capability(device)
    if 8 <= major <= 9:
        return None
    why = "whose tensor cores are slow at it; precision='fp8' is for them" if major > 9 else "it takes 8.0 to 9.0"
    return f"{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}: {why}"


def is_asked(model: nn.Module, call: Mapping[str, object], name: str) -> bool:
    """Whether a call wants an output, by its argument's name; None, as of MPNet's heads, leaves it to the config."""
    asked = call.get(name)
    return bool(getattr(model.config, name, False) if asked is None else asked)


def maps_are_unsupported(model: nn.Module, call: Mapping[str, object]) -> str | None:
    """Why a call that asks for its attention maps runs stock."""
    family = family_of(model)
    if not family.returns_maps:
        return "output_attentions"
    parts = [unwrapped(layer).get_submodule(".".join(family.layout.attention.module)) for layer in layers_of(model)]
    for module in (model, *parts):
        implementation = getattr(module.__dict__.get("config"), "_attn_implementation", None)
        if implementation not in ("eager", None):
            return f"output_attentions, of which {implementation!r} attention gives none"
    if (reason := no_maps_now(model, call)) is not None:
        return f"output_attentions {reason}"
    embeds = call.get("inputs_embeds")
    needs = isinstance(embeds, Tensor) and embeds.requires_grad
    if torch.is_grad_enabled() and (needs or any(p.requires_grad for p in model.parameters())):
        return "output_attentions with gradients, which maps have none of: call it under torch.no_grad()"
    return None


def no_maps_now(model: nn.Module, call: Mapping[str, object]) -> str | None:
    """Why no attention map can be computed of a call at this moment."""
    if call.get("cu_seq_lens_q") is not None:
        return "of a flattened call (cu_seq_lens_q)"
    if torch.compiler.is_compiling():
        return "in torch.compile or torch.export"
    parameter = first_parameter(model)
    if parameter is not None and torch.is_autocast_enabled(parameter.device.type):
        return "under torch.autocast"
    return None


def is_unmixable(model: nn.Module, call: Mapping[str, object], stock: str | None, hooked: bool) -> str | None:
    """Why a call runs stock of a base model whose encoder has more to do than to call its layers, by its family.

    It collects hidden states itself, or a layer is called with more than others know: `stock` says why one of them runs
    stock, `hooked` whether one has a hook.
    """
    family = family_of(model)
    if not family.records_hidden_states and family.run is None and is_asked(model, call, "output_hidden_states"):
        return "output_hidden_states"
    if family.run is None and family.tables is None and not family.loops:
        return None
    if hooked and stock is None:
        i = [any(is_hooked(each, called=True) for each in wrapped(layer)) for layer in layers_of(model)].index(True)
        stock = f"{stack_of(model).name(i)} has a hook"
    return stock and f"{stock}, and layers take what only their own encoder gives: all run stock"


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first of a module's parameters, at a fraction of what `module.parameters()` costs; None where it has none."""
    for parameter in module.__dict__["_parameters"].values():
        if parameter is not None:
            return parameter
    children = (child for child in module.__dict__["_modules"].values() if child is not None)
    return next((found for found in map(first_parameter, children) if found is not None), None)


def is_flash(model: PreTrainedModel) -> bool:
    """Whether stock attention is one of those that keep the sequences of a flattened call apart."""
    return model.config._attn_implementation in _FLASH_ATTENTION


def forward_is_replaced(model: nn.Module) -> str | None:
    """Why calls of a base model may go past its class's forward: one of its own isn't known to end there."""
    forward = model.__dict__.get("forward")
    if forward is None or torch.compiler.is_compiling() or type(model).forward in reached(forward):
        return None
    return (
        f"its forward is {known.said(forward)}, not known to end in that of {type(model).__name__}; replace it after "
        "fastbert.fuse, by one that holds the forward it calls"
    )


def own_method(module: nn.Module, called: tuple[str, ...]) -> str | None:
    """The first of the methods `called`, by name, that `module` has for its own, in place of its class's; or None."""
    return next((name for name in called if name in module.__dict__), None)


def method_is_replaced(model: nn.Module) -> str | None:
    """Which method of a base model or of its encoder is not its class's."""
    for module in (model, encoder_of(model)):
        if (name := own_method(module, type(module).called)) is not None:
            return f"{name} of its {type(module).__name__} is {known.said(module.__dict__[name])}"
    return None


def judged_implementation(model: PreTrainedModel) -> str | None:
    """The attention implementation of a base model, where the code of it is to be torch's or transformers' own.

    A kernel of the Hub brings a function of its own; one that isn't known is a reason by itself.
    """
    implementation: str | None = model.config._attn_implementation
    return implementation if implementation in PLAIN_ATTENTION - _FLASH_ATTENTION else None


def foreign_code(model: nn.Module) -> str | None:
    """What of the code that a fused base model stands in for is not torch's or transformers' own."""
    return known.foreign(family_of(model).name, judged_implementation(model))


def call_is_unsupported(model: nn.Module, call: Mapping[str, Any]) -> str | None:
    """Why this call of a base model, with these arguments by name, runs stock."""
    config = model.config
    if _is_decoder(config):
        return "it is a decoder (config.is_decoder or config.add_cross_attention)"
    if (refuses := family_of(model).refuses) is not None and (reason := refuses(model)) is not None:
        return str(reason)
    if is_asked(model, call, "output_attentions") and (reason := maps_are_unsupported(model, call)):
        return reason
    for name in (*CACHES, "encoder_hidden_states", "encoder_attention_mask"):
        if call.get(name) is not None:
            return name
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() == 4):
        return "an attention_mask that is not 2-D"
    first = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if mask is not None and first is not None and mask.dim() == 2 and mask.shape[0] == 1 < first.shape[0]:
        return "an attention_mask of one row for more sequences"
    if call["is_causal"] if "is_causal" in call else getattr(config, "is_causal", False):
        return "is_causal"
    family, encoder = family_of(model), encoder_of(model)
    for name in family.unknown_arguments:
        if call.get(name) is not None:
            return f"{name}, which its adapter does not name"
    cu_seqlens = call.get("cu_seq_lens_q")
    if first is not None and (first.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1) > MAX_SEQUENCES:
        return f"more than {MAX_SEQUENCES} sequences"
    implementation = config._attn_implementation
    if implementation not in PLAIN_ATTENTION:
        return f"attention implementation {implementation!r}"
    infers_sequences = is_flash(model) and mask is None and cu_seqlens is None
    if infers_sequences and call.get("position_ids") is not None:
        return "flash attention that reads the sequences from position_ids"
    embeds = call.get("inputs_embeds")
    parameter = first_parameter(encoder)
    if parameter is None:
        return "its parameters are elsewhere (a replica of torch.nn.DataParallel, FSDP1)"
    norm = getattr(embeddings_of(model), "LayerNorm", None)  # custom embeddings may have none
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        weight = parameter
    if _is_sharded(parameter):  # FSDP may gather it in another dtype: that of what is gathered already
        parameter = weight
    for name in family.ids.values():
        table = table_of(embeddings_of(model), name)
        attributes = {} if table is None else table.__dict__
        if is_custom(attributes.get("weight", attributes.get("_parameters", {}).get("weight"))):
            return f"{name or 'the table of words'} is a tensor of a custom subclass"
    if is_custom(embeds):
        return "inputs_embeds is a tensor of a custom subclass"
    if family.tables is not None:
        for name, own in encoder.__dict__["_modules"].items():  # what tables are made of
            if name != family.stack[-1] and own is not None and any(map(is_custom, own.parameters())):
                return f"{name} of the encoder has a parameter of a custom tensor subclass"
    dtypes = {parameter.dtype, weight.dtype} | (set() if embeds is None else {embeds.dtype})
    if len(dtypes) > 1:
        return f"mixed dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if reason := needs_stock(parameter) or forward_is_replaced(model) or method_is_replaced(model):
        return reason
    if encoder is not model and is_hooked(encoder, called=True):
        hooks = encoder._forward_pre_hooks or encoder._forward_hooks or encoder._backward_hooks
        if "forward" in encoder.__dict__ and not (hooks or encoder._backward_pre_hooks):
            return f"forward of its {type(encoder).__name__} is {known.said(encoder.__dict__['forward'])}"
        return "the encoder has hooks"
    if family.final_norm is not None:
        norm = encoder.__dict__["_modules"].get(family.final_norm)
        kind = family.layout.norm
        if not is_plain(norm, kind, sharded=True):
            expected = "nn.LayerNorm" if kind is nn.LayerNorm else kind.__name__
            return f"{family.final_norm} of the encoder is a {named(norm)}{oddity(norm)}, not a plain {expected}"
    if family.projection is not None:
        linear = encoder.__dict__["_modules"].get(family.projection)
        if not is_plain(linear, nn.Linear, sharded=True) and not is_rowwise(linear, sharded=True):
            return f"{family.projection} of the encoder is a {named(linear)}{oddity(linear)}, not a plain nn.Linear"
        inside = first_parameter(stack_of(model).held)
        if inside is not None and inside.dtype != parameter.dtype:
            return f"mixed dtypes: {family.projection} of the encoder is {parameter.dtype}, a layer {inside.dtype}"
    for name, kind in family.makes_tables.items():
        own = encoder.__dict__["_modules"].get(name)
        if type(own) is not kind or is_hooked(own):
            return f"{name} of the encoder is a {named(own)}{oddity(own)}"
    if any(is_rewritten(module) for module in wrapped(wrapped_encoder_of(model)) if is_wrapper(module)):
        return "the encoder is in a wrapper whose forward has been replaced"
    return None
