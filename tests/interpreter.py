"""Triton's interpreter as the tests run it: matmuls rounded once, and no work that is dropped or done before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest


def round_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Sums matmuls in float64: NumPy's are as exact as the BLAS of this CPU.

    Without AVX-512 they have up to 1.6 times the error of torch's, which sets the bound; a kernel is judged, not they.
    """
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        x, y, z = (operand.data for operand in (a, b, accumulator))
        if not all(np.issubdtype(operand.dtype, np.floating) for operand in (x, y, z)):
            return plain(self, a, b, accumulator, *options)  # bits of FP8 numbers or of bfloat16, or integers
        total = np.matmul(x.astype(np.float64), y.astype(np.float64)) + z
        return interpreter.TensorHandle(total.astype(z.dtype), accumulator.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def patch_the_language_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Once a launch for each module of functions: Triton puts the same in place again at every call of a function."""
    prepare, patch_lang = interpreter.GridExecutor.__init__, interpreter._patch_lang
    done: set[int] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        prepare(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        seen = id(function.__globals__)
        if seen in done:
            return None  # whoever calls a function asks for nothing; the launch, which does, is the first to come here
        done.add(seen)
        return patch_lang(function)

    patch.setattr(interpreter.GridExecutor, "__init__", launched)
    patch.setattr(interpreter, "_patch_lang", patch_once)


def check_nothing_in_vain(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Without `debug` Triton works out whether each sum of integers overflows, and drops what it found."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


def look_types_up_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """NumPy's type of each of Triton's: a table that is made anew at each look."""
    plain, found = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_type(of: Any) -> Any:
        kept = found.get(of.name)
        if kept is None:
            kept = found[of.name] = plain(of)
        return kept

    patch.setattr(interpreter, "_get_np_dtype", numpy_type)


def make_types_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """What follows from types alone: of a block its size and name, of a value its shape, of two operands their sum's.

    Triton works it out at each operation, from constexpr in tuples of its own: most of the time of a launch. Nothing
    changes a type once it is made, or its shape.
    """
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    make_block, make_value, unwrap = core.block_type.__init__, core.tensor.__init__, core._unwrap_if_constexpr
    broadcast, promote, cast = semantic.broadcast_impl_value, semantic.computation_type_impl, semantic.cast
    blocks, values, promoted = dict[Any, Any](), dict[str, Any](), dict[Any, Any]()
    themselves = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in themselves else unwrap(value)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(unwrapped, shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in values:
            make_value(self, handle, type)
            values[type.name] = dict(vars(self))
        vars(self).update(values[type.name], handle=handle, type=type, dtype=type.scalar)

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        same = one.is_block() and other.is_block() and one.shape.values == other.shape.values
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def computation_type(self: Any, one: Any, one_is_scalar: bool, other: Any, *rest: bool) -> Any:
        key = (one.name, one_is_scalar, other.name, *rest)
        if key not in promoted:
            promoted[key] = promote(self, one, one_is_scalar, other, *rest)
        return promoted[key]

    def cast_value(self: Any, value: Any, dtype: Any, *rounding: Any, **more: Any) -> Any:
        return value if value.type.scalar is dtype.scalar and not more else cast(self, value, dtype, *rounding, **more)

    patch.setattr(core, "_unwrap_if_constexpr", unwrapped)
    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(semantic, "broadcast_impl_value", broadcast_values)
    patch.setattr(semantic, "computation_type_impl", computation_type)
    patch.setattr(semantic, "cast", cast_value)


@contextmanager
def patched() -> Iterator[None]:
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        for change in (round_once, patch_the_language_once, check_nothing_in_vain, look_types_up_once, make_types_once):
            change(patch, interpreter)
        yield
