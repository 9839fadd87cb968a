"""The operators `fastbert::*`: one function each says its schema, contract, shapes and gradient.

How is in `registry`. A call goes to the Triton kernel for CUDA and ROCm tensors, and to `fastbert.kernels.cpu` for CPU
tensors. Operators without a gradient are for inference, and refuse what needs one; one is differentiable once.
"""

from ..kernels import cpu_prepacked as cpu_prepacked
from . import registry as registry
from .attentions import attention as attention
from .attentions import attention_backward as attention_backward
from .attentions import attention_forward as attention_forward
from .attentions import attention_map as attention_map
from .attentions import attention_tiles as attention_tiles
from .attentions import rotate as rotate
from .disentangled import disentangled_attention as disentangled_attention
from .disentangled import disentangled_attention_backward as disentangled_attention_backward
from .disentangled import disentangled_attention_map as disentangled_attention_map
from .embeddings import embedding_layer_norm as embedding_layer_norm
from .embeddings import embedding_layer_norm_backward as embedding_layer_norm_backward
from .fp8 import attention_fp8 as attention_fp8
from .fp8 import layer_norm_fp8 as layer_norm_fp8
from .fp8 import linear_add_fp8 as linear_add_fp8
from .fp8 import linear_fp8 as linear_fp8
from .fp8 import linear_gelu_fp8 as linear_gelu_fp8
from .fp8 import quantize_fp8 as quantize_fp8
from .int8 import int8_packed_bytes as int8_packed_bytes
from .int8 import int8_weight_limit as int8_weight_limit
from .int8 import layer_norm_int8 as layer_norm_int8
from .int8 import linear_add_int8 as linear_add_int8
from .int8 import linear_gelu_int8 as linear_gelu_int8
from .int8 import linear_gelu_quantize_int8 as linear_gelu_quantize_int8
from .int8 import linear_int8 as linear_int8
from .int8 import quantize_int8 as quantize_int8
from .linears import feed_forward as feed_forward
from .linears import gated_feed_forward as gated_feed_forward
from .linears import linear as linear
from .linears import linear_add as linear_add
from .linears import linear_gated as linear_gated
from .linears import linear_gated_backward as linear_gated_backward
from .linears import linear_gelu as linear_gelu
from .linears import linear_gelu_backward as linear_gelu_backward
from .linears import qkv_linear as qkv_linear
from .losses import linear_cross_entropy as linear_cross_entropy
from .losses import linear_cross_entropy_backward as linear_cross_entropy_backward
from .norms import add_layer_norm as add_layer_norm
from .norms import add_layer_norm_backward as add_layer_norm_backward
from .norms import layer_norm as layer_norm
from .norms import rms_norm as rms_norm
from .padding import mask_layout as mask_layout
from .padding import pack as pack
from .padding import unpack as unpack
from .registry import CPU_BACKEND as CPU_BACKEND
from .registry import DIFFERENTIABLE as DIFFERENTIABLE
from .registry import OPERATORS as OPERATORS
from .registry import foreign_dispatch_mode as foreign_dispatch_mode
