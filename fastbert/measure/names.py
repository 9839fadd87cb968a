"""What can be asked for by name. Nothing is imported here, so that the command line can tell it at once."""

from __future__ import annotations

from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def _deberta(hidden: int, layers: int, **more: object) -> dict[str, object]:
    """DeBERTa v2 and v3, heads 64 wide."""
    return {
        "model_type": "deberta-v2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        **more,
    }


def _modernbert(hidden: int, layers: int, intermediate: int) -> dict[str, object]:
    """ModernBERT, heads 64 wide, the window of two layers in three 128 tokens."""
    return {
        "model_type": "modernbert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": intermediate,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536},
    "xlm-r-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "deberta-v3-xsmall": _deberta(384, 12),
    "deberta-v3-small": _deberta(768, 6),
    "deberta-v3-base": _deberta(768, 12),
    "deberta-v3-large": _deberta(1024, 24),
    "deberta-v2-xlarge": _deberta(1536, 24, conv_kernel_size=3, conv_act="gelu"),
    "modernbert-base": _modernbert(768, 22, 1152),
    "modernbert-large": _modernbert(1024, 28, 2624),
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
