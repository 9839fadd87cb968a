"""A made-up encoder, as somebody else would write one: LayerNorm first, rotary positions, a gated feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple


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
        places: int = 0,
        quirk: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`places`: rows of a table of positions. `quirk`: what its adapter does not say."""
        self.places, self.quirk = places, quirk
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size, self.dropout = num_attention_heads, intermediate_size, dropout
        super().__init__(**kwargs)


class QuillEmbeddings(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        if config.places:
            self.places = nn.Embedding(config.places, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        rows = self.tokens(input_ids)
        if "places" in self._modules:
            given = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
            rows = rows + self.places(given)
        return self.norm(rows)


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
        self.quirk, self.rate = config.quirk, config.dropout

    def forward(self, x: Tensor, mask: Tensor | None, cosine: Tensor, sine: Tensor) -> Tensor:
        qkv = self.wqkv(x)
        if self.quirk == "queries, keys and values of each head side by side":
            q, k, v = qkv.view(*x.shape[:2], -1, 3, self.width).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.view(*x.shape[:2], 3, -1, self.width).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        scores = q @ k.transpose(2, 3) / (self.width**0.5 if self.quirk != "a scale" else self.width)
        if self.quirk == "a window":
            rows = torch.arange(x.shape[1])
            scores = scores.masked_fill((rows - rows[:, None]).abs() > 40, torch.finfo(scores.dtype).min)
        if mask is not None:
            keep = mask if mask.dtype == torch.bool else mask == 0
            scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(-1)
        if self.quirk == "a rate":
            probabilities = nn.functional.dropout(probabilities, self.rate, self.training)
        else:
            probabilities = self.drop(probabilities)
        mixed = probabilities @ v
        if self.quirk == "dropout of values":
            mixed = probabilities @ self.drop(v)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class QuillGate(nn.Module):
    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = nn.GELU() if config.quirk == "a GELU by tanh" else nn.SiLU()
        self.quirk = config.quirk
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated, factor = self.wi(x).chunk(2, -1)
        if self.quirk == "a GELU by tanh":
            return self.wo(nn.functional.gelu(activated, approximate="tanh") * factor)
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
        self.quirk = config.quirk

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rates = 10000.0 ** -(torch.arange(0, self.width, 2, device=positions.device) / self.width)
        angles = positions[..., None].float() * rates
        angles = torch.cat((angles, angles), -1).detach()
        return angles.cos(), angles.sin()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        cosine, sine = (part[:, None].to(hidden_states.dtype) for part in self.rotation(position_ids))
        seen = [hidden_states]
        for i, block in enumerate(self.blocks):
            turned = (cosine, sine) if i != 1 or self.quirk != "a layer without positions" else (cosine**0, sine * 0)
            hidden_states = block(hidden_states, attention_mask, *turned)
            seen.append(hidden_states)
        collected = tuple(seen) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states), hidden_states=collected)


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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        extra_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if self.config.quirk == "positions of the mask" and attention_mask is not None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        rows = self.embed(input_ids, position_ids)
        if extra_rows is not None:
            rows = rows + extra_rows
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=rows, attention_mask=attention_mask)
        return self.stack(rows, attention_mask=mask, position_ids=position_ids, **kwargs)


class QuillForRanking(PreTrainedModel):
    config_class = QuillConfig
    base_model_prefix = "quill"

    def __init__(self, config: QuillConfig) -> None:
        super().__init__(config)
        self.quill = QuillModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        rows = self.quill(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        row = rows.mean(1) if self.config.quirk == "a mean over all rows" else rows[:, 0]
        return self.score(row.to(self.score.weight.dtype))


class QuillForTagging(PreTrainedModel):
    config_class = QuillConfig
    base_model_prefix = "quill"

    def __init__(self, config: QuillConfig) -> None:
        super().__init__(config)
        self.quill = QuillModel(config)
        self.tags = nn.Linear(config.hidden_size, 5)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> TokenClassifierOutput:
        logits = self.tags(self.quill(input_ids, **kwargs).last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)
