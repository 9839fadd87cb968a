"""A made-up encoder, as somebody else would write one: LayerNorm first, rotary positions, a gated feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput


class QuillConfig(PretrainedConfig):
    model_type = "quill"

    def __init__(
        self,
        vocab_size: int = 100,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 96,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size, self.dropout = num_attention_heads, intermediate_size, dropout
        super().__init__(**kwargs)


class QuillEmbeddings(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tokens(input_ids))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine


class QuillAttention(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.width = config.hidden_size // config.num_attention_heads
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cosine: Tensor, sine: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).view(*x.shape[:2], 3, -1, self.width).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        scores = q @ k.transpose(2, 3) / self.width**0.5
        if mask is not None:
            keep = mask if mask.dtype == torch.bool else mask == 0
            scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        mixed = self.drop(scores.softmax(-1)) @ v
        return self.wo(mixed.transpose(1, 2).flatten(2))


class QuillGate(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = nn.SiLU()
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated, factor = self.wi(x).chunk(2, -1)
        return self.wo(self.act(activated) * factor)


class QuillBlock(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, bias=False)
        self.attn = QuillAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = QuillGate(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, cosine, sine)
        return x + self.drop(self.mlp(self.norm2(x)))


class QuillEncoder(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([QuillBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.width = config.hidden_size // config.num_attention_heads

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rates = 10000.0 ** -(torch.arange(0, self.width, 2, device=positions.device) / self.width)
        angles = positions[..., None].float() * rates
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        cosine, sine = self.rotation(torch.arange(hidden_states.shape[1], device=hidden_states.device))
        cosine, sine = cosine.to(hidden_states.dtype), sine.to(hidden_states.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, cosine, sine)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class QuillModel(PreTrainedModel):
    config_class = QuillConfig
    base_model_prefix = "quill"
    _supports_sdpa = True

    def __init__(self, config: QuillConfig) -> None:
        super().__init__(config)
        self.embed = QuillEmbeddings(config)
        self.stack = QuillEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        rows = self.embed(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=rows, attention_mask=attention_mask)
        return self.stack(rows, attention_mask=mask, **kwargs)


class QuillForRanking(PreTrainedModel):
    config_class = QuillConfig
    base_model_prefix = "quill"

    def __init__(self, config: QuillConfig) -> None:
        super().__init__(config)
        self.quill = QuillModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self.score(self.quill(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state[:, 0])
