"""CUDA graphs of the stack of layers, in inference: one launch in place of seven a layer.

A graph repeats launches with the same sizes and addresses. So a call is rounded up to a bucket of tokens, sequences and
longest length; its rows are copied into buffers that the graph of the bucket reads, and the result is copied out, so
that nothing handed out is written to again. Rows beyond the tokens are sequences of their own: they hold numbers, as
others do, and no other sequence sees them. A bucket is captured when it is met for the second time. What tables are
made of row by row, positions or a rotation that the base model has made, is copied as rows are.

What a graph was captured from may change: weights are replaced, modules, hooks. Looking costs as much as a small batch
takes on the device, and the device is busy meanwhile: so first the graph is replayed, then everything is compared
with what it was, and where anything differs the result is dropped and the call planned again (`Stale`). Until then the
graphs hold on to the memory that they read. Weights updated in place are what a replay reads; in FP8, of which it
reads copies, that is a change as any other.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import launch
from ..layers.context import Context
from ..layers.copies import Copies
from ..layers.layer import FusedLayer
from .coverage import Snapshot
from .packing import Packing, tiles_of
from .registry import Stack, stack_in
from .support import is_hooked

MAX_TOKENS = 8192
"""More tokens keep a GPU busy for longer than the host takes to launch."""
MAX_SEQUENCES = 1024
MAX_GRAPHS = 64
"""Graphs an encoder keeps: the least recently used goes. They share the memory of what they compute in between."""
MAX_BUCKETS = 1024
"""Buckets met once that an encoder remembers."""
FILLER = 64
"""Tokens of a sequence that fills up a bucket; also the smallest bucket of tokens and of lengths."""


Tables = Callable[[nn.Module, Tensor, Packing, tuple[Tensor, ...]], Mapping[str, object]]
"""(encoder, rows, their layout, what comes beside them) -> `Context.tables`; it holds the encoder by nothing."""


class Stale(Exception):
    """What a call was planned from has changed since it was looked at: it is to be planned again."""


class Bucket(NamedTuple):
    """What the sizes of a call are rounded up to, and what else is fixed in a graph."""

    tokens: int
    sequences: int
    """With those that fill up."""
    longest: int
    precision: str
    """`launch.float32_precision()`."""
    batch_invariant: bool
    """As `fastbert.set_batch_invariant` has it."""
    beside: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    """Of what comes beside the rows: of each the shape of a row's, and the dtype."""


def bucket_of(tokens: int, sequences: int, longest: int) -> Bucket:
    """The bucket of a call: at most a quarter more tokens, a multiple of FILLER; powers of two of the other two.

    And as many sequences more as it takes to fill up the tokens with FILLER each.
    """
    step = max(FILLER, (1 << (tokens - 1).bit_length()) // 8)
    length = max(FILLER, 1 << (longest - 1).bit_length())
    whole = -(-tokens // step) * step
    count = (1 << (sequences - 1).bit_length()) + step // FILLER
    return Bucket(whole, count, length, launch.float32_precision(), launch.batch_invariant)


def _makers(encoder: nn.Module) -> list[nn.Module]:
    """Its submodules that tables are made by."""
    family = type(encoder).family  # type: ignore[attr-defined]
    return [encoder.get_submodule(name) for name in family.makes_tables]


def _said(encoder: nn.Module) -> tuple[object, ...]:
    """The config that such tables are made by, and what it says; nothing of other families."""
    family = type(encoder).family  # type: ignore[attr-defined]
    config = encoder.config if family.makes_tables or family.handed is not None else None
    return () if config is None else (config, *vars(config).values())


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


class Fingerprint:
    """What decides how layers compute, as it was: a `Snapshot`, and where parameters lie."""

    def __init__(self, encoder: nn.Module, stack: Stack, versions: bool) -> None:
        """`versions`: a parameter that has been written to is another one, too."""
        self._stack = stack
        self._kinds: tuple[Callable[[Tensor], object], ...] = (Tensor.data_ptr, Tensor.size, Tensor.stride)
        self._kinds += (_version,) if versions else ()
        groups: list[list[nn.Module]] = [[module] for module in (stack.held, *stack.groups().values())]
        groups += [list(layer.modules()) for layer in stack.layers]
        family = type(encoder).family  # type: ignore[attr-defined]
        self._makers, self._said = _makers(encoder), _said(encoder)
        if self._makers:
            groups += [[module] for maker in self._makers for module in maker.modules()]
        elif family.tables is not None:  # which are made of it
            others = (module for child in encoder.children() if child is not stack.held for module in child.modules())
            groups.append([encoder, *others])
        self._snapshot = Snapshot(groups)
        self._layouts = self._look()
        # Until `holds` has said no a graph may be replayed: the memory it reads stays.
        self._memory = [tensor.detach() for tensor in self._read()]

    def holds(self, encoder: nn.Module) -> bool:
        """Whether nothing of it has changed."""
        stack = stack_in(encoder)
        if stack.held is not self._stack.held or stack.calls != self._stack.calls:
            return False
        if _makers(encoder) != self._makers or _said(encoder) != self._said:
            return False
        return self._snapshot.holds() and self._look() == self._layouts

    def _read(self) -> list[Tensor]:
        """Parameters, and buffers that tables are made of."""
        return [*self._snapshot.parameters, *chain.from_iterable(maker.buffers() for maker in self._makers)]

    def _look(self) -> list[list[object]]:
        tensors = self._read()
        return [list(map(kind, tensors)) for kind in self._kinds]


_DOES_MORE = "its encoder does more than to call its layers"


def _tables_of(encoder: nn.Module, device: torch.device, longest: int) -> Tables | None:
    """What makes the tables of a graph; None where none is captured."""
    family = type(encoder).family  # type: ignore[attr-defined]
    if family.handed is not None:
        return lambda encoder, rows, packing, beside: {family.handed: beside or None}
    if family.tables is None:
        return lambda *_: {}
    made: Tables | None = family.graph_tables(encoder, device, longest)
    return made


def _is_open(encoder: nn.Module, stack: Stack) -> str | None:
    """Why more than parameters, as they are now, decides what layers compute; None where nothing does."""
    held, layers = stack.held, stack.layers
    if _tables_of(encoder, next(held.parameters()).device, 1) is None:
        return _DOES_MORE
    if not all(isinstance(layer, FusedLayer) for layer in layers):
        return "a layer is wrapped"
    for module in held.modules():
        if module.training:
            return "a layer is in training mode"
        if is_hooked(module) or "forward" in vars(module):
            return "a layer has hooks"
    if not all(layer.layout.bind(layer).is_static() for layer in layers):
        return "a layer has an adapter, or an activation other than GELU and SiLU"
    if any(type(parameter) is not nn.Parameter for parameter in held.parameters()):
        return "parameters of a kind of their own"
    return None


class Cuda:
    """What graphs ask of the device: captures, and order between streams. Tests put a stand-in in its place."""

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def refuses(self, x: Tensor) -> str | None:
        """Why a call with rows like `x` can't use graphs at this moment."""
        if not x.is_cuda:
            return f"the model is on the {x.device.type}"
        return "inside the capture of another graph" if torch.cuda.is_current_stream_capturing() else None

    def guard(self, x: Tensor) -> AbstractContextManager[object]:
        """Makes the device of `x` the current one."""
        return torch.cuda.device(x.device)

    def begin(self, *buffers: Tensor) -> None:
        """The current stream waits for the last use of the buffers, on whatever stream that was."""
        stream = torch.cuda.current_stream()
        if stream != self._stream:
            if self._done is not None:
                stream.wait_event(self._done)
            for buffer in buffers:
                buffer.record_stream(stream)
            self._stream = stream

    def end(self) -> None:
        """Marks the end of a use of the buffers."""
        assert self._stream is not None
        if self._done is None:
            self._done = torch.cuda.Event()
        self._done.record(self._stream)

    def finish(self) -> None:
        """Waits until the device is done with the buffers."""
        if self._done is not None:
            self._done.synchronize()

    def pool(self) -> Any:
        """A pool of memory for graphs to share; one in which a graph is still alive when the next is captured."""
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        """The graph of `run`, which is run once before: that compiles and loads its kernels."""
        current = torch.cuda.current_stream()
        if self._side is None:
            self._side = torch.cuda.Stream()
        self._side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):  # which also takes us back to ours where the end of a capture fails
            run()
            # What other threads do meanwhile is not an error of theirs or ours.
            with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
                run()
        current.wait_stream(self._side)
        return graph


# A device can't be synchronized while a stream of it is captured, and every capture begins with that.
_CAPTURING = threading.Lock()


class Graphs:
    """The graphs of one encoder. A copy of it, or one that was pickled, begins with none.

    Threads and streams take turns: they share the buffers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def _forget(self) -> None:
        self._device = Cuda()
        self._broken: str | None = None
        self._fingerprint: Fingerprint | None = None
        self._graphs: OrderedDict[Bucket, torch.cuda.CUDAGraph] = OrderedDict()
        """By bucket, the least recently used first."""
        self._tables: dict[Bucket, object] = {}
        """What has made each one's tables, and holds what else they read."""
        self._met: OrderedDict[Bucket, None] = OrderedDict()
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None
        """Rows (MAX_TOKENS, H); cu_seqlens; and multiples of FILLER, of which the end of cu_seqlens is made."""
        self._written: object = None
        """What cu_seqlens holds, where it is of sequences of one length."""
        self._beside: dict[tuple[tuple[torch.Size, torch.dtype], ...], tuple[Tensor, ...]] = {}
        """By `Bucket.beside`, what comes beside rows: (MAX_TOKENS, ...) each."""
        self._pool: Any = None
        self._quantized: object = None
        """What holds the quantized weights that graphs read."""

    def drop(self, fingerprint: Fingerprint | None = None) -> None:
        """Frees the graphs and their memory, when the device is done with them; where one is given, only its own."""
        with self._lock:
            if fingerprint is None or fingerprint is self._fingerprint:
                self._device.finish()
                self._forget()

    def expects(self) -> bool:
        """Whether a call at this moment may be planned as the last one was, to be compared later: see `run`."""
        return self._fingerprint is not None and self._state() is None

    def refuses(self, encoder: nn.Module) -> str | None:
        """Why an ordinary call at this moment would not be a graph's; None where it would."""
        stack = stack_in(encoder)
        return self._refuses(encoder, next(stack.held.parameters())) or _is_open(encoder, stack)

    def _refuses(self, encoder: Any, x: Tensor) -> str | None:
        """The same of calls with rows like `x`, whatever the layers are."""
        family = type(encoder).family
        if family.tables is not None and family.graph_tables is None:
            return _DOES_MORE
        return self._state() or self._broken or self._device.refuses(x)

    def _state(self) -> str | None:
        if torch.compiler.is_compiling():
            return "torch.compile"
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            return "torch.autocast"
        return "a dispatch mode of torch" if torch._C._len_torch_dispatch_stack() else None

    def _refuses_call(self, encoder: nn.Module, x: Tensor, plan: Any) -> str | None:
        packing: Packing = plan.packing
        if reason := self._refuses(encoder, x):
            return reason
        if type(x) is not Tensor:
            return f"hidden states of type {type(x).__name__}"
        if any(plan.stock_layers):
            return "a layer runs stock"
        if plan.seeds is not None:
            return "dropout"
        if plan.maps is not None:
            return "attention maps are wanted"
        if plan.watched:
            return "hidden states are asked for, or watched by hooks"
        if packing.key_mask is not None:
            return "padding is masked, not dropped"
        if x.shape[0] * x.shape[1] > MAX_TOKENS:
            return f"more than {MAX_TOKENS} tokens"
        if _sequences(packing) > MAX_SEQUENCES:
            return f"more than {MAX_SEQUENCES} sequences"
        return None

    def run(
        self,
        encoder: nn.Module,
        x: Tensor,
        plan: Any,
        precision: Copies | None,
        beside: Callable[[], tuple[Tensor, ...]],
    ) -> Tensor | None:
        """The result of a call by a graph, or None where it has to run eagerly.

        Args:
            encoder: the fused encoder.
            x: (1, T, H) or (B, S, H), hidden states as `plan` lays them out.
            plan: the `fastbert.runtime.plan.Plan` of the call.
            precision: of the encoder, where the call is one in FP8 or int8.
            beside: makes what comes beside the rows of `x`, (T, ...) or (B * S, ...) each.

        Returns:
            (B, S, H), or (1, T, H) of a flattened call: its own memory. Where a final norm is to come, laid out as `x`.

        Raises:
            Stale: `plan` was assumed, and that was wrong.
        """
        counts, stack = plan.settings.counts, stack_in(encoder)
        reason, result = self._refuses_call(encoder, x, plan), None
        with self._lock:
            fingerprint = self._fingerprint
            if reason is None and fingerprint is None and not plan.assumed:
                reason = _is_open(encoder, stack)
                if reason is None:
                    fingerprint = self._fingerprint = Fingerprint(encoder, stack, precision is not None)
            if reason is None and fingerprint is not None:
                with self._device.guard(x):
                    result, reason = self._run(encoder, x, plan.packing, precision, beside())
        # The device is at work by now.
        if (result is not None or plan.assumed) and not (fingerprint is not None and fingerprint.holds(encoder)):
            counts.add(counts.graphs, "dropped: the model has changed")
            self.drop(fingerprint)
            if plan.assumed:
                raise Stale
            return None
        counts.add(counts.graphs, f"eager: {reason}" if result is None else str(reason))
        return result

    def _run(
        self, encoder: nn.Module, x: Tensor, packing: Packing, precision: Copies | None, beside: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, str]:
        """The result, or None; and what there is to count."""
        family = type(encoder).family  # type: ignore[attr-defined]
        bucket = bucket_of(x.shape[0] * x.shape[1], _sequences(packing), packing.max_seqlen)
        bucket = bucket._replace(beside=tuple([(each.shape[1:], each.dtype) for each in beside]))
        graph, what = self._graphs.get(bucket), "replayed"
        if graph is not None:
            self._graphs.move_to_end(bucket)
        elif (tables := _tables_of(encoder, x.device, bucket.longest)) is None:
            return None, "its sequences are too long for scores by position"
        elif bucket not in self._met:
            self._met[bucket] = None
            if len(self._met) > MAX_BUCKETS:
                self._met.popitem(last=False)
            return None, "the first call of its size"
        else:
            try:
                graph, what = self._capture(encoder, tables, x, packing, bucket, precision, beside), "captured"
            except RuntimeError as error:  # out of memory, or what the driver refuses to capture
                self._device.finish()
                self._forget()
                self._broken = f"a capture failed: {error}"
                warnings.warn(f"fastbert runs without CUDA graphs: {self._broken}", stacklevel=2)
                return None, self._broken
        try:
            self._write(x, packing, bucket, beside)
            graph.replay()
            assert self._buffers is not None
            rows = self._buffers[0][: x.shape[0] * x.shape[1]]
            as_laid_out = packing.indices is None or family.final_norm is not None
            result = rows.clone().view_as(x) if as_laid_out else packing.unpack(rows[None])
        finally:
            self._device.end()
        return result, what

    def _write(self, x: Tensor, packing: Packing, bucket: Bucket, beside: tuple[Tensor, ...]) -> None:
        """Hands a call to the graphs: rows, and where sequences start, those that fill up behind them."""
        assert self._buffers is not None
        rows, cu_seqlens, steps = self._buffers
        self._device.begin(rows, cu_seqlens, steps, *chain.from_iterable(self._beside.values()))
        tokens, sequences = x.shape[0] * x.shape[1], _sequences(packing)
        rows[:tokens].copy_(x.flatten(0, 1))
        for buffer, own in zip(self._beside[bucket.beside], beside, strict=True):
            buffer[:tokens].copy_(own)
        same = None if packing.cu_seqlens is not None else (bucket, packing.batch, packing.seqlen)
        if same is None or same != self._written:
            self._written = None
            starts = packing.cu_seqlens
            if starts is None:
                starts = torch.arange(0, tokens + 1, packing.seqlen, dtype=torch.int32, device=x.device)
            cu_seqlens[: sequences + 1].copy_(starts)
            rest = cu_seqlens[sequences + 1 : bucket.sequences + 1]
            torch.add(steps[: len(rest)], tokens, out=rest)
            rest.clamp_(max=bucket.tokens)
            self._written = same

    def _capture(
        self,
        encoder: nn.Module,
        tables: Tables,
        x: Tensor,
        packing: Packing,
        bucket: Bucket,
        precision: Copies | None,
        beside: tuple[Tensor, ...],
    ) -> torch.cuda.CUDAGraph:
        stack = stack_in(encoder)
        layers, calls = stack.layers, stack.calls
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be written to later
            if self._buffers is None:
                most = MAX_SEQUENCES + MAX_TOKENS // FILLER
                rows = x.new_zeros(MAX_TOKENS, x.shape[2])
                steps = torch.arange(FILLER, most * FILLER, FILLER, dtype=torch.int32, device=x.device)
                self._buffers = rows, torch.zeros(most, dtype=torch.int32, device=x.device), steps
            if bucket.beside not in self._beside:
                made = [x.new_zeros(MAX_TOKENS, *shape, dtype=dtype) for shape, dtype in bucket.beside]
                self._beside[bucket.beside] = tuple(made)
            rows, cu_seqlens, _ = self._buffers
            whole, given = rows[: bucket.tokens], tuple([each[: bucket.tokens] for each in self._beside[bucket.beside]])
            starts = cu_seqlens[: bucket.sequences + 1]
            layout = Packing(1, bucket.tokens, bucket.longest, starts)

            # Quantized weights are made before the capture, and kept: they are memory that the graph reads.
            bound: Any = [None] * len(calls)
            if precision is not None:
                bound = precision.bind(list(layers), [False] * len(layers), calls=calls)
            self._quantized = bound

            def run() -> None:
                hidden_states = whole[None]
                # At each replay: lengths differ, and weights may have been written to.
                tiles = tiles_of(starts, bucket.tokens)
                context = Context(layout._replace(tiles=tiles), tables(encoder, hidden_states, layout, given))
                for i, own in zip(calls, bound, strict=True):
                    hidden_states = layers[i](hidden_states, context=context, bound=own)
                whole.copy_(hidden_states[0])

            while len(self._graphs) >= MAX_GRAPHS:
                self._device.finish()
                self._tables.pop(self._graphs.popitem(last=False)[0])
            if not self._graphs:  # a pool is gone with the last graph in it
                self._pool = self._device.pool()
            self._write(x, packing, bucket, beside)
            with _CAPTURING:
                graph = self._device.capture(run, self._pool)
            self._graphs[bucket], self._tables[bucket] = graph, tables
            return graph


def _sequences(packing: Packing) -> int:
    return packing.batch if packing.cu_seqlens is None else len(packing.cu_seqlens) - 1
