"""What `fastbert bench --peers` times beside stock and fused: other ways to run the same model, in the same process.

A peer is made from a stock BertModel, DebertaV2Model or ModernBertModel and shares its weights where it can. It is
called as the model is, with padded ids and their mask, (B, S) int64, and returns what has `last_hidden_state`,
(B, S, hidden); rows of padding hold anything.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertModel, DebertaV2Model, ModernBertModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ..calibration import calibrate
from ..fuse import Precision, fuse
from ..kernels import launch
from ..runtime.packing import pack_mask
from ..runtime.support import fp8_is_unsupported, int8_is_unsupported
from ..version import install
from .cases import workload


class Unavailable(Exception):
    """A peer that can't run here, and why."""


def share(model: BertModel) -> BertModel:
    """A copy of `model` over the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _eager(model: BertModel) -> nn.Module:
    model = share(model)
    model.set_attn_implementation("eager")
    return model


def _compiled(mode: str) -> Callable[[BertModel], Callable[..., object]]:
    def build(model: BertModel) -> Callable[..., object]:
        if mode != "default" and model.device.type != "cuda":
            raise Unavailable(f'mode "{mode}" is for CUDA')
        return torch.compile(share(model), mode=mode)

    return build


class _Flattened(nn.Module):
    """Stock without padding: transformers' flattened call, over an attention function that takes it."""

    def __init__(self, model: BertModel, implementation: str) -> None:
        super().__init__()
        self.model = share(model)
        self.model.set_attn_implementation(implementation)

    @property
    def encoder(self) -> nn.Module:
        """Whose gradients are looked at."""
        encoder: nn.Module = self.model.encoder
        return encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        packing = pack_mask(attention_mask.bool()).packing
        lengths = {"max_length_q": packing.max_seqlen, "max_length_k": packing.max_seqlen}
        starts = {"cu_seq_lens_q": packing.cu_seqlens, "cu_seq_lens_k": packing.cu_seqlens}
        positions = (attention_mask.cumsum(1) - 1).flatten()[packing.indices]
        ids = input_ids.flatten()[packing.indices]
        rows = self.model(ids[None], position_ids=positions[None], **starts, **lengths).last_hidden_state[0]
        padded = rows.new_zeros(input_ids.numel(), rows.shape[1])
        padded[packing.indices] = rows
        return BaseModelOutput(last_hidden_state=padded.view(*input_ids.shape, -1))


def _varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **call: Any
) -> tuple[Tensor, None]:
    """torch's own attention over sequences laid end to end; query, key and value (1, heads, T, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    starts, longest = call["cu_seq_lens_q"], call["max_length_q"]
    # Its scale is that of BERT.
    out: Any = varlen_attn(query, key, value, starts, starts, longest, longest)
    return out[None], None


# By this name transformers finds it; it needs no mask made.
VARLEN = "fastbert_bench_varlen"
AttentionInterface.register(VARLEN, _varlen_attention)
AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)


def _need_bert(model: nn.Module) -> None:
    if not isinstance(model, BertModel):
        raise Unavailable("it has no attention by distance")


def _torch_varlen(model: BertModel) -> nn.Module:
    _need_bert(model)
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        raise Unavailable("torch's varlen attention is for 16-bit dtypes on CUDA")
    return _Flattened(model, VARLEN)


def _flash_attention(model: BertModel) -> nn.Module:
    _need_bert(model)
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        raise Unavailable("flash-attn is for 16-bit dtypes on CUDA")
    return _Flattened(model, "flash_attention_2")


class _HiddenStates(nn.Module):
    """What is exported: tensors in, one tensor out."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


class _Runtime(nn.Module):
    """A compiled graph: `call` takes ids and mask as numpy arrays and returns the last hidden states, in float32."""

    def __init__(self, call: Callable[[object, object], object], dtype: torch.dtype) -> None:
        super().__init__()
        self.call = call
        self.dtype = dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        hidden = torch.from_numpy(self.call(input_ids.numpy(), attention_mask.numpy()))
        return BaseModelOutput(last_hidden_state=hidden.to(self.dtype))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print of other people's models."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _example() -> dict[str, Tensor]:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 11:] = 0
    return {"input_ids": mask * 7, "attention_mask": mask}


def _need_cpu(model: BertModel, *packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"{' and '.join(missing)} not installed; {install('bench')}")
    if model.device.type != "cpu":
        raise Unavailable("compared on a CPU only")


def _onnx_runtime(model: BertModel, in_int8: bool = False) -> nn.Module:
    """Exported, then through ONNX Runtime's own optimiser for BERT: fused attention, GELU and skip LayerNorm.

    In int8 as its page on quantization advises for a transformer: dynamic, a scale for each output channel, and
    weights of 7 bits on a CPU without VNNI, where 8 would saturate.
    """
    _need_bert(model)
    _need_cpu(model, "onnx", "onnxruntime")
    if model.dtype != torch.float32:
        raise Unavailable(f"ONNX Runtime has no {str(model.dtype).removeprefix('torch.')} on a CPU")
    import onnxruntime
    from onnxruntime.transformers import optimizer

    config, example = model.config, _example()
    axes = {name: {0: "batch", 1: "length"} for name in (*example, "hidden")}
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        # By tracing: what the newer exporter makes of BERT, the optimiser does not recognise.
        torch.onnx.export(
            _HiddenStates(_eager(model)),
            tuple(example.values()),
            file,
            input_names=list(example),
            output_names=["hidden"],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=17,
        )
        fused = optimizer.optimize_model(
            file, model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        )
        if (found := fused.get_fused_operator_statistics()["Attention"]) != config.num_hidden_layers:
            raise RuntimeError(f"ONNX Runtime's optimiser found {found} attentions of {config.num_hidden_layers}")
        fused.save_model_to_file(file, use_external_data_format=True)
        if in_int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            given, file = file, os.path.join(folder, "int8.onnx")
            narrow = not torch.cpu._is_vnni_supported()
            quantize_dynamic(
                given,
                file,
                per_channel=True,
                reduce_range=narrow,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"DefaultTensorType": 1},  # float32, of the fused operators that have no shapes
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # whoever is timed next has the cores
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return _Runtime(lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0], model.dtype)


def openvino(model: BertModel, int8: Sequence[tuple[Tensor, Tensor]] | None = None) -> nn.Module:
    """In int8 as NNCF quantizes a transformer: static ranges, of batches of ids and masks (B, S)."""
    _need_cpu(model, "openvino")
    if model.dtype == torch.float16:
        raise Unavailable("OpenVINO has no float16 on a CPU")
    import openvino as runtime

    example = _example()
    with _quiet(), torch.no_grad():
        # From float32 weights, as its users do; what it computes in is the hint's.
        wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        graph = runtime.convert_model(_HiddenStates(wide), example_input=tuple(example.values()))
        if int8 is not None:
            import nncf

            rows = [tuple(value.numpy() for value in batch) for batch in int8]
            graph = nncf.quantize(graph, nncf.Dataset(rows, list), model_type=nncf.ModelType.TRANSFORMER)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[model.dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = runtime.compile_model(graph, "CPU", settings)
    return _Runtime(lambda ids, mask: compiled([ids, mask])[0], model.dtype)


def _openvino_int8(model: BertModel) -> nn.Module:
    if importlib.util.find_spec("nncf") is None:
        raise Unavailable("nncf is not installed")
    batches = [workload(name, 8).inputs(model.device) for name in ("squad", "sentences")]
    return openvino(model, [(batch["input_ids"], batch["attention_mask"]) for batch in batches])


def _graphs(model: BertModel) -> nn.Module:
    if model.device.type != "cuda":
        raise Unavailable("CUDA graphs are for CUDA")
    return fuse(share(model), cuda_graphs=True)


class _Dependent(nn.Module):
    """Fused with CUDA graphs, each kernel launched while the one before runs: `launch.DEPENDENT`, for its calls."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.arch = launch.architecture(model.device)
        if not self.arch.startswith("sm_") or int(self.arch.removeprefix("sm_")) < 90:
            raise Unavailable("programmatic dependent launch takes sm_90 or later")
        self.model = fuse(share(model), cuda_graphs=True)

    def forward(self, **batch: Tensor) -> ModelOutput:
        before = dict(launch.DEPENDENT)
        launch.DEPENDENT[self.arch] = True
        try:
            return self.model(**batch)
        finally:
            launch.DEPENDENT.clear()
            launch.DEPENDENT.update(before)


def not_in_fp8(device: torch.device) -> str | None:
    """Why FP8 is no faster on `device`, or None."""
    return "FP8 is simulated on a CPU" if device.type == "cpu" else fp8_is_unsupported(device)


def _fp8(cuda_graphs: bool) -> Callable[[BertModel], nn.Module]:
    def build(model: BertModel) -> nn.Module:
        if (reason := not_in_fp8(model.device)) is not None:
            raise Unavailable(reason)
        model = share(model)
        # Of random weights no GEMM deserves to be left out.
        calibrate(model, workload("squad", 8).inputs(model.device), tolerance=10.0)
        return fuse(model, precision="fp8", cuda_graphs=cuda_graphs)

    return build


def _prepacked(model: BertModel) -> nn.Module:
    if model.device.type != "cpu":
        raise Unavailable("weights are prepacked for CPUs")
    return fuse(share(model), prepack=True)


def _int8(model: BertModel) -> nn.Module:
    if (reason := int8_is_unsupported(model.device)) is not None:
        raise Unavailable(reason)
    return fuse(share(model), precision="int8")


def _dynamic(model: BertModel) -> nn.Module:
    """torch.ao's dynamic quantization of linear layers, over the eager model."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise Unavailable("torch.ao's dynamic quantization is for float32 models on a CPU")
    with _quiet():
        made: nn.Module = torch.ao.quantization.quantize_dynamic(share(model), {nn.Linear}, torch.qint8)
    return made


def _torchao(model: BertModel) -> nn.Module:
    """torchao's dynamic int8 of linear layers, compiled, as its page for CPUs advises."""
    if importlib.util.find_spec("torchao") is None:
        raise Unavailable("torchao is not installed")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = copy.deepcopy(model)
    with _quiet():
        quantize_(made, Int8DynamicActivationInt8WeightConfig())
    made.forward = torch.compile(made.forward, dynamic=True)
    return made


def _need(model: nn.Module, kind: type[nn.Module], called: str, package: str) -> None:
    if not isinstance(model, kind):
        raise Unavailable(f"it is for {called}")
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise Unavailable(f"{package} is not installed")


def _need_deberta(model: nn.Module, package: str) -> None:
    _need(model, DebertaV2Model, "DeBERTa", package)


class _DisentangledFlash(nn.Module):
    """disentangled-flash, packed: its kernels on a GPU, its PyTorch on a CPU."""

    def __init__(self, model: DebertaV2Model) -> None:
        super().__init__()
        _need_deberta(model, "disentangled-flash")
        self.model = model
        self.ways = nn.ModuleDict()  # for training it makes another model, some of whose parameters are its own
        self.eval()

    @property
    def encoder(self) -> nn.Module:
        """Whose gradients are looked at."""
        return self._way(True).encoder

    def _way(self, train: bool) -> Any:
        from disentangled_flash import optimize_deberta

        if str(train) not in self.ways:
            backend = "torch" if self.model.device.type == "cpu" else "triton"
            with torch.inference_mode(False):
                made = optimize_deberta(share(self.model).eval(), backend=backend, inference=not train)
            if type(made.encoder) is type(self.model.encoder):
                raise Unavailable("it has no kernels for this model")
            self.ways[str(train)] = made.train(self.training)
        return self.ways[str(train)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        from disentangled_flash import pack_padded_with_info, unpack_packed

        way = self._way(torch.is_grad_enabled())
        embedded = way.embeddings(input_ids=input_ids, mask=attention_mask)
        rows, starts, info = pack_padded_with_info(embedded, attention_mask)
        more = {"output_hidden_states": False, "packed_info": info}
        rows = way.encoder.forward_packed(rows, starts, info.max_seqlen, **more).last_hidden_state
        hidden, _ = unpack_packed(rows, starts, input_ids.shape[1], packed_info=info)
        return BaseModelOutput(last_hidden_state=hidden)


def _flash_deberta(model: DebertaV2Model) -> nn.Module:
    _need_deberta(model, "flashdeberta")
    if model.device.type != "cuda":
        raise Unavailable("flashdeberta is for CUDA")
    from flashdeberta import FlashDebertaV2Model

    made = FlashDebertaV2Model(copy.deepcopy(model.config)).to(model.device)  # on "meta" it would lose buffers
    made.load_state_dict(model.state_dict(), assign=True)
    return made.eval()


def _packed_encoders(model: ModernBertModel) -> nn.Module:
    """packed-encoders, which tries itself against stock first and raises beyond its own bound, a cosine of 0.997."""
    _need(model, ModernBertModel, "ModernBERT", "packed-encoders")
    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise Unavailable("packed-encoders is for bfloat16 on CUDA")
    from packed_encoders import pack

    made: nn.Module = pack(share(model).eval())
    return made


PEERS: dict[str, tuple[str, Callable[..., object]]] = {
    "prepacked": ("fused, prepacked", _prepacked),
    "graphs": ("fused + CUDA graphs", _graphs),
    "graphs-pdl": ("fused + CUDA graphs, dependent launches", _Dependent),
    "fp8": ("fused in fp8", _fp8(False)),
    "fp8-graphs": ("fused in fp8 + CUDA graphs", _fp8(True)),
    "int8": ("fused in int8", _int8),
    "eager": ("stock eager", _eager),
    "compile": ("stock + torch.compile", _compiled("default")),
    "reduce-overhead": ("stock + torch.compile reduce-overhead", _compiled("reduce-overhead")),
    "max-autotune": ("stock + torch.compile max-autotune", _compiled("max-autotune")),
    "torch-varlen": ("stock packed, torch varlen", _torch_varlen),
    "flash-attn": ("stock packed, flash-attn", _flash_attention),
    "onnxruntime": ("ONNX Runtime", _onnx_runtime),
    "openvino": ("OpenVINO", openvino),
    "onnxruntime-int8": ("ONNX Runtime, int8", functools.partial(_onnx_runtime, in_int8=True)),
    "openvino-int8": ("OpenVINO, int8", _openvino_int8),
    "dynamic-int8": ("torch.ao dynamic int8", _dynamic),
    "torchao-int8": ("torchao int8", _torchao),
    "disentangled-flash": ("disentangled-flash", _DisentangledFlash),
    "flashdeberta": ("flashdeberta", _flash_deberta),
    "packed-encoders": ("packed-encoders", _packed_encoders),
}
"""By the name on the command line: the name in records, and what makes one from a stock model or raises Unavailable."""

OTHERS_INT8 = ("onnxruntime-int8", "openvino-int8", "dynamic-int8", "torchao-int8")
INFERENCE_ONLY = (
    *("prepacked", "graphs", "graphs-pdl", "fp8", "fp8-graphs", "int8"),
    *("onnxruntime", "openvino", *OTHERS_INT8),
)
LOW_PRECISION: dict[str, Precision | None] = {
    PEERS["fp8"][0]: "fp8",
    PEERS["fp8-graphs"][0]: "fp8",
    PEERS["int8"][0]: "int8",
    **{PEERS[name][0]: None for name in OTHERS_INT8},
}
"""Those judged by the policy for FP8 or int8; None: by none, of others' quantized models."""
KEEP_MEMORY = tuple(PEERS[name][0] for name in INFERENCE_ONLY)
"""Those that keep what memory a call took, so that the growth of another one says nothing."""
