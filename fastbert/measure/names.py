"""What can be asked for by name. Nothing is imported here, so that the command line can tell it at once."""

from __future__ import annotations

from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def _sizes(hidden: int, layers: int, head_dim: int = 64, intermediate: int | None = None) -> dict[str, object]:
    """`intermediate`: default: four times as wide."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "intermediate_size": intermediate or 4 * hidden,
    }


def _deberta(hidden: int, layers: int, **more: object) -> dict[str, object]:
    """DeBERTa v2 and v3."""
    return {
        "model_type": "deberta-v2",
        **_sizes(hidden, layers),
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "large": _sizes(1024, 24),
    "base": _sizes(768, 12),
    "minilm": _sizes(384, 6, head_dim=32),
    "small": _sizes(384, 12, head_dim=32),
    "xlm-r-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        **_sizes(1024, 24),
    },
    "deberta-v3-xsmall": _deberta(384, 12),
    "deberta-v3-small": _deberta(768, 6),
    "deberta-v3-base": _deberta(768, 12),
    "deberta-v3-large": _deberta(1024, 24),
    "deberta-v2-xlarge": _deberta(1536, 24, conv_kernel_size=3, conv_act="gelu"),
    # The window of two layers in three is 128 tokens.
    "modernbert-base": {"model_type": "modernbert", **_sizes(768, 22, intermediate=1152)},
    "modernbert-large": {"model_type": "modernbert", **_sizes(1024, 28, intermediate=2624)},
}
"""Of models by their size, as fields of a config: BERT's where there is no model_type."""
WORKLOADS = (
    *("squad", "sentences", "search", "dense16", "dense128", "dense384", "dense512", "dense8192", "uniform254"),
    "padded512",
)
"""What each is: `cases.workload`."""
PEERS = (
    "prepacked",
    "graphs",
    "graphs-pdl",
    "fp8",
    "fp8-graphs",
    "int8",
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "torch-varlen",
    "flash-attn",
    "onnxruntime",
    "openvino",
    "onnxruntime-int8",
    "openvino-int8",
    "dynamic-int8",
    "torchao-int8",
    "disentangled-flash",
    "flashdeberta",
    "packed-encoders",
)
"""What each is: `peers.PEERS`."""
