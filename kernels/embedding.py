"""The embedding layer: three gathers, their sum and LayerNorm, in one launch.

`embedding_layer_norm` and `embedding_layer_norm_backward` are the Triton twins of the functions of those names in
`reference`.

Ids are checked on the device, by an assertion that names the argument, so that nothing has to be copied to the host
first: CUDA reports it at the next synchronization, as for an id out of range in torch.nn.Embedding. No table is read
out of bounds in any case, and where assertions do nothing (the interpreter) the row comes back as NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .compiled import Constants, run
from .layer_norm import _backward_plan, normalize, normalize_backward


@triton.jit
def gather(table_ptr, row, in_range, cols, width):
    """Columns `cols` of one row of a table in float32: zero past `width`; else NaN where the row is not `in_range`."""
    # As a number of columns: in a mask, triton 3.9's interpreter takes no condition that is a scalar.
    present = tl.where(in_range, width, 0)
    value = tl.load(table_ptr + row * width + cols, mask=cols < present, other=0.0).to(tl.float32)
    return tl.where((cols >= present) & (cols < width), float("nan"), value)


@triton.jit
def _embed(
    word_ptr,
    token_type_ptr,
    position_ptr,
    word,
    token_type,
    position,
    word_in_range,
    token_type_in_range,
    position_in_range,
    cols,
    width,
):
    """The sum of one row of each table, in float32."""
    x = gather(word_ptr, word, word_in_range, cols, width)
    x += gather(token_type_ptr, token_type, token_type_in_range, cols, width)
    x += gather(position_ptr, position, position_in_range, cols, width)
    return x


# debug: device assertions are compiled in.
@triton.jit(
    debug=True,
    do_not_specialize=["eps"],
    do_not_specialize_on_alignment=["input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr"],
)
def embedding_kernel(
    input_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    word_ptr,  # (words, width), contiguous, as are the other tables
    token_type_ptr,
    position_ptr,
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    out_ptr,  # (T, width), contiguous
    words,
    token_types,
    positions,
    width,
    eps,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.load(input_ids_ptr + row)
    token_type = tl.load(token_type_ids_ptr + row)
    position = tl.load(position_ids_ptr + row)
    word_in_range = (word >= 0) & (word < words)
    token_type_in_range = (token_type >= 0) & (token_type < token_types)
    position_in_range = (position >= 0) & (position < positions)
    tl.device_assert(word_in_range, "input_ids: an id is negative or not below the vocabulary size")
    tl.device_assert(token_type_in_range, "token_type_ids: an id is negative or not below the number of token types")
    tl.device_assert(position_in_range, "position_ids: an id is negative or not below the number of positions")

    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    x = _embed(
        word_ptr,
        token_type_ptr,
        position_ptr,
        word,
        token_type,
        position,
        word_in_range,
        token_type_in_range,
        position_in_range,
        cols,
        width,
    )
    y = normalize(x, mask, weight_ptr, bias_ptr, cols, width, eps)
    tl.store(out_ptr + row * width + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "eps"],
    do_not_specialize_on_alignment=["input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr"],
)
def embedding_backward_kernel(
    grad_ptr,  # (rows, width), contiguous
    input_ids_ptr,  # (rows,) int64, as are the next two; within their tables, or the forward had failed
    token_type_ids_ptr,
    position_ids_ptr,
    word_ptr,  # (words, width), contiguous, as are the other tables
    token_type_ptr,
    position_ptr,
    weight_ptr,  # (width,)
    dtotal_ptr,  # (rows, width), contiguous
    dweight_ptr,  # (programs, width) float32: sums over the rows of a program
    dbias_ptr,  # the same
    rows,
    words,
    token_types,
    positions,
    width,
    eps,
    ROWS: tl.constexpr,  # of a program
    BLOCK_H: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_H)
    mask = cols < width
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_H], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(0, tl.minimum(rows - first, ROWS).to(tl.int32)):
        row = first + i
        word = tl.load(input_ids_ptr + row)
        token_type = tl.load(token_type_ids_ptr + row)
        position = tl.load(position_ids_ptr + row)
        x = _embed(
            word_ptr,
            token_type_ptr,
            position_ptr,
            word,
            token_type,
            position,
            (word >= 0) & (word < words),
            (token_type >= 0) & (token_type < token_types),
            (position >= 0) & (position < positions),
            cols,
            width,
        )
        grad = tl.load(grad_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        dtotal, of_weight = normalize_backward(x, grad, mask, weight, width, eps)
        dweight += of_weight
        dbias += grad
        tl.store(dtotal_ptr + row * width + cols, dtotal.to(dtotal_ptr.dtype.element_ty), mask=mask)
    offs = tl.program_id(0).to(tl.int64) * width + cols
    tl.store(dweight_ptr + offs, dweight, mask=mask)
    tl.store(dbias_ptr + offs, dbias, mask=mask)


@launch.planned
def _plan(choose: launch.Choose, dtype: torch.dtype, width: int) -> Constants:
    config = choose(dtype, width)
    # debug also turns on a check of every integer addition; the assertions above are the only ones wanted.
    return Constants(BLOCK_H=config.block_n, num_warps=config.num_warps, sanitize_overflow=False)


def _check(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    *vectors: tuple[str, Tensor],
) -> None:
    (rows,), width = input_ids.shape, word.shape[1]
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {(rows,)}, the shape of input_ids")
    for name, table in (("token_type", token_type), ("position", position)):
        if table.ndim != 2 or table.shape[1] != width:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; expected (_, {width}), rows as wide as word's")
    for name, vector in vectors:
        if vector.shape != (width,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected {(width,)}")


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int = -1,
    position_padding_idx: int = -1,
) -> Tensor:
    """`layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])`, sums in float32.

    Ids are (T,) int64; the tables (vocabulary, H), (types, H), (positions, H); weight and bias (H,) -> (T, H). An id
    out of range fails an assertion on the device. `padding_idx` and `position_padding_idx` are the rows of `word`
    and `position` without a gradient, -1 for none.

    Raises:
        ValueError: shapes that don't fit together.
    """
    _check(input_ids, token_type_ids, position_ids, word, token_type, position, ("weight", weight), ("bias", bias))
    (rows,), width = input_ids.shape, word.shape[1]
    out = torch.empty(rows, width, dtype=word.dtype, device=word.device)
    if out.numel() == 0:
        return out
    tensors = input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias
    numbers = word.shape[0], token_type.shape[0], position.shape[0], width, float(eps)
    constants = _plan(launch.row_config, word.dtype, width)
    run(embedding_kernel, (rows, 1, 1), (*map(launch.contiguous, tensors), out, *numbers), constants)
    return out


def embedding_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `embedding_layer_norm` by the sum of the three rows, (T, H), the weight and the bias. Deterministic.

    Raises:
        ValueError: shapes that don't fit together.
    """
    _check(input_ids, token_type_ids, position_ids, word, token_type, position, ("weight", weight))
    (rows,), width = input_ids.shape, word.shape[1]
    if grad.shape != (rows, width):
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected {(rows, width)}")
    dtotal = torch.empty(rows, width, dtype=word.dtype, device=word.device)
    config, constants = _backward_plan(launch.row_backward_config, word.dtype, width)
    programs = -(-rows // config.block_m)
    dweight, dbias = (torch.empty(programs, width, dtype=torch.float32, device=word.device) for _ in range(2))
    if dtotal.numel():
        tensors = grad, input_ids, token_type_ids, position_ids, word, token_type, position, weight
        numbers = rows, word.shape[0], token_type.shape[0], position.shape[0], width, float(eps)
        arguments = (*map(launch.contiguous, tensors), dtotal, dweight, dbias, *numbers)
        run(embedding_backward_kernel, (programs, 1, 1), arguments, constants)
    return dtotal, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)
