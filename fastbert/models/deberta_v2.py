"""DeBERTa v2 and v3: attention to content and to positions by distance.

Its model hands no arguments on to its encoder, so that the fused one has a forward of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from ..layers.disentangled import Disentangled, Relative
from ..layers.feed_forward import FeedForward
from ..layers.layer import Layer
from ..layers.norm import part_is_replaced
from ..runtime.packing import Packing
from ..runtime.plan import Plan
from ..runtime.readers import FIRST, LABELS, SPANS
from ..runtime.registry import encoder_of
from ..runtime.support import is_faked, is_plain
from .classes import predictions, register
from .family import Family
from .heads import Vocabulary

_LAYOUT = Layer(
    Disentangled(
        query=("attention", "self", "query_proj"),
        key=("attention", "self", "key_proj"),
        value=("attention", "self", "value_proj"),
        kinds={
            ("attention",): hf.DebertaV2Attention,
            ("attention", "self"): hf.DisentangledSelfAttention,
            ("attention", "output"): hf.DebertaV2SelfOutput,
        },
    ),
    FeedForward(kinds={("intermediate",): hf.DebertaV2Intermediate, ("output",): hf.DebertaV2Output}),
)


_BUCKETS = hf.make_log_bucket_position  # as it was: tables are kept, and what replaces it later may be gone again


def _slots_reach(longest: int, buckets: int, furthest: int, span: int) -> int:
    """The R of `_slots` for sequences up to `longest`: beyond a distance of R - 1 each sign has one slot."""
    rounded, middle = -(-longest // 128) * 128, buckets // 2
    if not isinstance(longest, int):  # not known yet
        return rounded
    if buckets <= 0 or furthest <= 0:
        return min(rounded, span + 1)
    if middle < 2 or furthest - 1 <= middle:
        return rounded
    # A distance is in the last bucket once its logarithm is; by a hundredth of a bucket more, however it is rounded.
    buckets_out = (span - middle - 1 + 0.01) / (middle - 1)
    return min(rounded, math.ceil(middle * ((furthest - 1) / middle) ** buckets_out) + 1)


def _slots(reach: int, buckets: int, furthest: int, span: int, device: torch.device) -> Tensor:
    """(2 R - 1,) int32: of distances of query and key from 1 - R to R - 1, R `reach`, as stock has them."""
    distances = torch.arange(1 - reach, reach, device=device)
    if buckets > 0 and furthest > 0:
        distances = _BUCKETS(distances, buckets, furthest).to(torch.int64)
    return (distances + span).clamp(0, 2 * span - 1).int()


@functools.lru_cache(64)
def _kept_slots(reach: int, buckets: int, furthest: int, span: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _slots(reach, buckets, furthest, span, device)


def tables(
    encoder: hf.DebertaV2Encoder, hidden_states: Tensor, packing: Packing, position_ids: Tensor | None
) -> dict[str, object]:
    """Embeddings of positions, and the slots of distances; whatever position_ids are, as stock."""
    if not encoder.relative_attention:
        return {"relative": None}
    return {"relative": relative(encoder, encoder.position_buckets, hidden_states.device, packing.max_seqlen)}


def graph_tables(
    encoder: hf.DebertaV2Encoder, device: torch.device, longest: int
) -> Callable[..., Mapping[str, object]] | None:
    """`Family.graph_tables`: by a convolution's place in a row GPUs choose how to add up, so that there are none."""
    if encoder.conv is not None:
        return None
    return made_in_a_graph(encoder, getattr(encoder, "position_buckets", -1), device, longest)


def made_in_a_graph(
    encoder: hf.DebertaV2Encoder, buckets: int, device: torch.device, longest: int
) -> Callable[..., Mapping[str, object]] | None:
    """Of `graph_tables`."""
    if not encoder.relative_attention:
        return lambda *_: {"relative": None}
    span, slots = _span(encoder, buckets), _kept_slots(*_place(encoder, buckets, device, longest))
    if longest > _LONGEST_IN_A_GRAPH or not _is_of_weights(encoder):
        return None
    return lambda encoder, *_: {"relative": Relative(_embeddings(encoder, span), slots, None)}


_LONGEST_IN_A_GRAPH = 1024
"""Graphs hold on to the memory of scores by position, which grows with it: 0.5 GB for 16 heads and 8,192 tokens."""


def _span(encoder: hf.DebertaV2Encoder, buckets: int) -> int:
    return buckets if buckets > 0 else encoder.max_relative_positions


def _place(
    encoder: hf.DebertaV2Encoder, buckets: int, device: torch.device, longest: int
) -> tuple[int, int, int, int, torch.device]:
    """What slots are made for."""
    kind = buckets, encoder.max_relative_positions, _span(encoder, buckets)
    return _slots_reach(longest, *kind), *kind, device


def _embeddings(encoder: hf.DebertaV2Encoder, span: int) -> Tensor:
    """(2 span, H): of positions."""
    embeddings: Tensor = encoder.get_rel_embedding()
    if embeddings.shape[0] < 2 * span:
        raise RuntimeError(f"rel_embeddings has {embeddings.shape[0]} rows; expected at least {2 * span}")
    return embeddings[: 2 * span]


def _is_of_weights(encoder: hf.DebertaV2Encoder) -> bool:
    """Whether parameters say all that embeddings of positions are."""
    weight, norm = encoder.rel_embeddings.weight, encoder._modules.get("LayerNorm")
    return type(weight) in (Tensor, nn.Parameter) and (norm is None or is_plain(norm, nn.LayerNorm))


def relative(encoder: hf.DebertaV2Encoder, buckets: int, device: torch.device, longest: int) -> Relative:
    """Of `tables`."""
    span, place = _span(encoder, buckets), _place(encoder, buckets, device, longest)

    def make() -> Tensor:
        return _embeddings(encoder, span)

    passing = torch.compiler.is_compiling() or is_faked()  # what is made then is for then
    slots = _slots(*place) if passing else _kept_slots(*place)
    keeps = not (torch.is_grad_enabled() or passing or torch.is_autocast_enabled(device.type))
    if not (keeps and _is_of_weights(encoder)):
        return Relative(make(), slots, None)
    weight, norm = encoder.rel_embeddings.weight, encoder._modules.get("LayerNorm")
    parameters = (weight,) if norm is None else (weight, norm.weight, norm.bias)
    said = span, tuple(getattr(encoder, "norm_rel_ebd", ())), None if norm is None else norm.eps
    derived = encoder.fastbert.coverage.derived
    return Relative(derived.get("positions", parameters, make, said, watched=True), slots, derived)


def shared(encoder: hf.DebertaV2Encoder) -> dict[str, object]:
    """`Family.shared`."""
    if not encoder.relative_attention:
        return {"relative_attention": False}
    buckets = encoder.position_buckets
    return {"relative_attention": True, "pos_ebd_size": buckets if buckets > 0 else encoder.max_relative_positions}


def _mask_rows(plan: Plan) -> Tensor | None:
    """What the mask says of every row, (1, T) or (B, S) as they are laid out; None: they are all real."""
    mask, indices = plan.mask, plan.packing.indices
    return mask if mask is None or indices is None else mask.flatten()[indices][None]


def embed(model: hf.DebertaV2Model, call: Mapping[str, object], plan: Plan) -> Tensor:
    """The first hidden states of a call, as `plan` lays them out: rows are multiplied by what their mask says."""
    given: Any = {name: call.get(name) for name in ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")}
    mask = plan.mask if plan.foreign else _mask_rows(plan)
    if plan.foreign or plan.watched:  # somebody sees the arguments, or may: stock's
        values = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
        if mask is None:
            mask = torch.ones(values.shape[:2], device=values.device)
        if given["token_type_ids"] is None:
            given["token_type_ids"] = torch.zeros(values.shape[:2], dtype=torch.long, device=values.device)
    rows: Tensor = model.embeddings(mask=mask, **given)
    return rows


def run(model: hf.DebertaV2Model, call: dict[str, object], plan: Plan) -> object:
    """`Family.run`."""
    result = model.encoder(embed(model, call, plan), plan=plan)
    whole = call.get("return_dict")
    return result if (model.config.return_dict if whole is None else whole) else result.to_tuple()


def _reach(conv: hf.ConvLayer) -> int | None:
    """How many rows a convolution sees to each side, zeros beyond the ends; None: it is another than stock makes."""
    own = conv.conv
    reach = own.dilation[0] * (own.kernel_size[0] - 1) // 2
    as_made = own.stride == (1,) and own.padding == (reach,) and own.padding_mode == "zeros"
    return reach if as_made and own.kernel_size[0] % 2 else None


def _convolve(encoder: hf.DebertaV2Encoder, first: Tensor, hidden_states: Tensor, plan: Plan) -> Tensor:
    """The convolution after the first layer, in which every row sees its neighbours: zeros beyond a sequence's ends."""
    mask, starts = _mask_rows(plan), plan.packing.cu_seqlens
    if mask is None:
        mask = hidden_states.new_ones(hidden_states.shape[:2])
    if starts is None:
        convolved: Tensor = encoder.conv(first, hidden_states, mask)
        return convolved
    gap = _reach(encoder.conv)
    assert gap is not None  # else the call is refused
    # As many zeros between two sequences: nothing is read from the device.
    rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    before = torch.bucketize(rows, starts[1:].to(rows), right=True)  # sequences
    places, whole = rows + gap * before, len(rows) + gap * max(plan.packing.batch - 1, 0)
    apart = (x.new_zeros(1, whole, *x.shape[2:]).index_copy(1, places, x) for x in (first, hidden_states, mask))
    rows_apart: Tensor = encoder.conv(*apart)
    return rows_apart.index_select(1, places)


def _after_first(encoder: hf.DebertaV2Encoder) -> Callable[..., Tensor] | None:
    """`Family.after_first`."""
    return None if encoder.conv is None else _convolve


def vocabulary(model: hf.DebertaV2ForMaskedLM) -> Vocabulary:
    if (
        not model.legacy
    ):  # it multiplies with the table of words, which is no linear layer: not from labelled rows alone
        return Vocabulary(lambda x: x, model.lm_predictions)
    return predictions(model)


_CONVOLUTION = hf.ConvLayer.forward
_PARTS = {"conv": nn.Conv1d, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}


def refuses(model: hf.DebertaV2Model) -> str | None:
    """`Family.refuses`. Rows of a convolution lie otherwise than stock's, packed: it must be the family's own."""
    if model.z_steps > 1:
        return f"z_steps is {model.z_steps}"
    conv = encoder_of(model).__dict__["_modules"].get("conv")
    if conv is None:
        return None
    if hf.ConvLayer.forward is not _CONVOLUTION:
        return "the forward of ConvLayer has been replaced"
    reason = part_is_replaced("encoder.conv", conv, hf.ConvLayer)
    for name, kind in _PARTS.items() if reason is None else ():
        reason = reason or part_is_replaced(f"encoder.conv.{name}", conv.__dict__["_modules"].get(name), kind)
    return reason or (None if _reach(conv) is not None else "encoder.conv.conv is not as stock makes it")


SIZES = {
    "vocab_size": 16,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 16,
    "max_position_embeddings": 512,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 48,
}

FAMILY = register(
    Family(
        hf,
        hf.DebertaV2Model,
        hf.DebertaV2Encoder,
        hf.DebertaV2Layer,
        _LAYOUT,
        hf.DebertaV2Embeddings,
        hf.DebertaV2Config,
        output=BaseModelOutput,
        tables=tables,
        graph_tables=graph_tables,
        shared=shared,
        run=run,
        after_first=_after_first,
        takes_square_mask=False,
        refuses=refuses,
        heads={
            hf.DebertaV2ForMaskedLM: LABELS,
            hf.DebertaV2ForMultipleChoice: FIRST,
            hf.DebertaV2ForQuestionAnswering: SPANS,
            hf.DebertaV2ForSequenceClassification: FIRST,
            hf.DebertaV2ForTokenClassification: LABELS,
        },
        parts=(
            hf.ContextPooler,
            hf.DebertaV2LMPredictionHead,
            hf.DebertaV2OnlyMLMHead,
            hf.LegacyDebertaV2LMPredictionHead,
            hf.LegacyDebertaV2OnlyMLMHead,
            hf.LegacyDebertaV2PredictionHeadTransform,
        ),
        vocabularies={hf.DebertaV2ForMaskedLM: vocabulary},
        sizes=SIZES,
    ),
    __name__,
)
