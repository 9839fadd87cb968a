"""What can be asked for by name. Nothing is imported here, so that the command line can tell it at once."""

DTYPES = ("float32", "bfloat16", "float16")
SHAPES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
"""Of models by their size, as fields of a config."""
WORKLOADS = ("squad", "sentences", "search", "dense16", "dense128", "dense384", "dense512", "uniform254")
"""What each is: `cases.workload`."""
PEERS = (
    "graphs",
    "graphs-pdl",
    "fp8",
    "fp8-graphs",
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "torch-varlen",
    "flash-attn",
    "onnxruntime",
    "openvino",
)
"""What each is: `peers.PEERS`."""
