"""Moving rows between a paged pool and a packed payload.

On the CPU rows are moved as opaque items, so every dtype is copied bit by bit. On a GPU gather, projection and the
copy to pinned memory run on a stream of their own, ordered after the engine's by an event, and so do the copy from
pinned memory and the scatter; a call returns when the device is done, and several threads may call at a time. A
projection is applied to all layers of a chunk in one batched product.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.chunks import Rectangle
from sglang_tpla.transfer.memory.copy import copy_pieces
from sglang_tpla.transfer.memory.iovec import (
    Block,
    Layers,
    Pieces,
    cut_blocks,
    find_spans,
    one_piece,
    worth_it,
)
from sglang_tpla.transfer.memory.projection import Stack
from sglang_tpla.transfer.room import CachePool


def byte_rows(layer: torch.Tensor) -> np.ndarray:
    """A CPU layer as uint8 ``[slots, row_bytes]``, sharing its memory."""
    return layer.view(torch.uint8).numpy()


def _items(rows: np.ndarray) -> np.ndarray:
    """uint8 ``[n, bytes]`` as n opaque items, sharing its memory: one copy an item instead of one a value."""
    return rows.view(np.dtype((np.void, rows.shape[1])))[:, 0]


def gather_rows(rows: np.ndarray, slots: np.ndarray, packed: np.ndarray) -> None:
    """Copy uint8 ``rows[slots]`` to ``packed`` ``[len(slots), bytes]``."""
    if not rows.flags.c_contiguous:  # np.take would copy all of it first
        packed[:] = rows[slots]
    elif slots.size and rows.shape[1]:
        np.take(_items(rows), slots, out=_items(packed), mode="clip")  # "raise" would copy through a buffer


def scatter_rows(rows: np.ndarray, slots: np.ndarray, packed: np.ndarray) -> None:
    """Copy ``packed`` ``[len(slots), bytes]`` to uint8 ``rows[slots]``."""
    if slots.size and rows.shape[1]:
        _items(rows)[slots] = _items(packed)


def gather_block(rows: np.ndarray, slots: np.ndarray, block: Block, packed: np.ndarray) -> None:
    """`gather_rows` of one block of a payload."""
    if not block.runs:
        gather_rows(rows, slots[block.rows], packed[block.rows])
    for slot, row, count in block.runs:
        packed[row : row + count] = rows[slot : slot + count]


def scatter_block(rows: np.ndarray, slots: np.ndarray, block: Block, packed: np.ndarray) -> None:
    """`scatter_rows` of one block of a payload."""
    if not block.runs:
        scatter_rows(rows, slots[block.rows], packed[block.rows])
    for slot, row, count in block.runs:
        rows[slot : slot + count] = packed[row : row + count]


def _dense(layers: Sequence[np.ndarray] | None) -> Layers | None:
    """The layers of a CPU pool in which neighbouring slots lie side by side."""
    dense = layers is not None and all(rows.flags.c_contiguous for rows in layers)
    return Layers(layers) if layers is not None and dense else None


def as_tensor(data: np.ndarray) -> torch.Tensor:
    """uint8 ``[n]`` that shares the memory of ``data``, which the caller keeps alive. Only for reading: torch knows no
    tensors that cannot be written, and warns of arrays that cannot.
    """
    return torch.frombuffer((ctypes.c_uint8 * data.size).from_address(data.ctypes.data), dtype=torch.uint8)


def project_stack(
    rows: torch.Tensor,
    stack: Stack,
    latent_dim: int,
    part: Part,
    out: torch.Tensor,
    row_format: RowFormat = RowFormat.PLAIN,
) -> None:
    """Project a batch of layers and encode one part of the result.

    Args:
        rows: ``[layers, tokens, d + rope]``.
        stack: their matrices; the product is float32.
        part: which columns.
        out: ``[layers, tokens, part's items]`` in the receiver's format: rounded once.
    """
    columns = {Part.FULL: slice(None), Part.COMMON: slice(stack.shared), Part.OWN: slice(stack.shared, None)}
    z = stack.z[:, :, columns[part]]  # [layers, d, w of the part]
    latent, k_rope = rows[..., :latent_dim].to(torch.float32), rows[..., latent_dim:]
    row_format.encode(torch.bmm(latent, z), k_rope, stack.shared, part, out)


class RowReader:
    """Gathers (and projects) rectangles of a prefill pool into packed payloads."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._rows = None if self._stream else [byte_rows(layer) for layer in pool.layers]
        self._dense = _dense(self._rows)

    def ready_events(self, after: Any) -> tuple[Any, ...]:
        """Events before which rows must not be read: on a GPU one after all that the calling thread has queued so far,
        and ``after``, if there is one.
        """
        events: tuple[Any, ...] = () if after is None else (after,)
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.pool.device))
            events += (event,)
        return events

    def wait(self, ready: tuple[Any, ...]) -> None:
        """Return when rows in memory of this host may be read; on a GPU `read` waits on its own stream."""
        if self._stream is None:
            for event in ready:
                event.synchronize()

    def in_place(self, slots: np.ndarray) -> bool:
        """True if raw rows of ``slots`` can be sent from where they lie: `pieces` of them are few and long."""
        row_bytes = self.pool.layers[0].shape[1] * self.pool.dtype.itemsize
        return self._dense is not None and worth_it(find_spans(slots), slots.size, row_bytes)

    def pieces(self, rectangle: Rectangle, spans: np.ndarray) -> Pieces:
        """The raw rows of a rectangle where they lie in the pool, in the payload's order; ``spans`` are its tokens'
        slots (`runs.find_spans`).
        """
        assert self._dense is not None
        first = rectangle.first_layer - self.pool.first_layer
        return self._dense.pieces(range(first, first + rectangle.layers), spans)

    def read(
        self,
        rectangle: Rectangle,
        slots: np.ndarray,
        stacks: Sequence[Stack] | None,
        part: Part,
        out: np.ndarray,
        ready: tuple[Any, ...] = (),
        row_format: RowFormat = RowFormat.PLAIN,
    ) -> bytes | None:
        """Fill ``out`` (uint8 ``[payload_bytes]``, pinned where the pool is on a GPU) with a rectangle; the checksum of
        ``out``, where it was taken on the way.

        Args:
            slots: pool slots of the rectangle's tokens.
            stacks: the projection of the rectangle's layers on the pool's device, or None for the raw latent.
            part: which columns.
            ready: `ready_events` of the rows.
            row_format: the receiver's.
        """
        first = rectangle.first_layer - self.pool.first_layer
        layers = range(first, first + rectangle.layers)
        if stacks is None and part is Part.OWN:
            return None  # the raw latent is common to all ranks
        if self._stream is not None:
            self._read_cuda(layers, slots, stacks, part, out, ready, row_format)
            return None
        assert self._rows is not None
        if stacks is None and row_format is RowFormat.PLAIN:
            if self.in_place(slots):
                return copy_pieces(self.pieces(rectangle, find_spans(slots)), one_piece(out))
            packed = out.reshape(len(layers), slots.size, -1)
            checksum = frames.running_checksum()
            blocks = cut_blocks(slots, packed.shape[2])
            for position, layer in enumerate(layers):
                for block in blocks:
                    gather_block(self._rows[layer], slots, block, packed[position])
                    checksum.update(packed[position, block.rows].data)
            return checksum.digest()
        rows = torch.empty(len(layers), slots.size, self.pool.layers[first].shape[1], dtype=self.pool.dtype)
        for position, layer in enumerate(layers):
            gather_rows(self._rows[layer], slots, byte_rows(rows[position]))
        packed_rows = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
        self._encode(rows, stacks, part, packed_rows, row_format)
        return None

    def _read_cuda(
        self,
        layers: range,
        slots: np.ndarray,
        stacks: Sequence[Stack] | None,
        part: Part,
        out: np.ndarray,
        ready: tuple[Any, ...],
        row_format: RowFormat,
    ) -> None:
        assert self._stream is not None
        target = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
        with torch.cuda.stream(self._stream):
            for event in ready:
                self._stream.wait_event(event)
            # pinned: a copy from pageable memory would wait for all that was queued before it
            index = torch.from_numpy(slots).pin_memory().to(self.pool.device, non_blocking=True)
            width = self.pool.layers[layers.start].shape[1]
            rows = torch.empty(len(layers), slots.size, width, dtype=self.pool.dtype, device=self.pool.device)
            for layer, target_rows in zip(layers, rows.unbind(), strict=True):
                torch.index_select(self.pool.layers[layer], 0, index, out=target_rows)
            packed = rows.view(-1)
            if stacks is not None or row_format is not RowFormat.PLAIN:
                packed = torch.empty(target.numel(), dtype=target.dtype, device=self.pool.device)
                self._encode(rows, stacks, part, packed, row_format)
            target.copy_(packed, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()

    def _encode(
        self,
        rows: torch.Tensor,
        stacks: Sequence[Stack] | None,
        part: Part,
        packed: torch.Tensor,
        row_format: RowFormat,
    ) -> None:
        """Fill ``packed`` (flat) with rows ``[layers, tokens, d + rope]``, projected where there are stacks."""
        d = self.pool.latent_dim
        if stacks is None:
            row_format.encode(rows[..., :d], rows[..., d:], d, part, packed.view(*rows.shape[:2], -1))
            return
        position = start = 0
        for stack in stacks:
            count = stack.z.shape[0]
            items = row_format.part_items(stack.z.shape[2], stack.shared, self.pool.rope_dim, part)
            size = count * rows.shape[1] * items
            if items:
                out = packed[start : start + size].view(count, rows.shape[1], items)
                project_stack(rows[position : position + count], stack, d, part, out, row_format)
            position += count
            start += size


class RowWriter:
    """Scatters payloads into a decode pool."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._rows = None if self._stream else [byte_rows(layer) for layer in pool.layers]
        self._dense = _dense(self._rows)
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}
        self._own = threading.local()  # ``pinned``: grows to the largest payload of a thread

    def columns(self, layer: int, shared: int, part: Part) -> tuple[tuple[int, int], ...]:
        """Column ranges of one pool layer (by index) that a part fills."""
        pool = self.pool
        return pool.row_format.columns(pool.widths[layer], shared, pool.rope_dim, part)

    def payload_bytes(self, rectangle_layers: range, tokens: int, shared: Sequence[int], part: Part) -> int:
        """Bytes a rectangle of pool layers (by index) must have."""
        item = self.pool.dtype.itemsize
        return sum(
            (stop - start) * tokens * item
            for layer in rectangle_layers
            for start, stop in self.columns(layer, shared[layer], part)
        )

    def pieces(self, layers: range, spans: np.ndarray, part: Part) -> Pieces | None:
        """Where a payload's bytes belong in the pool, in order; None where they are not long pieces of it.

        ``spans`` are its tokens' slots (`runs.find_spans`).
        """
        if self._rows is None or self._dense is None or part is not Part.FULL:
            return None
        if not worth_it(spans, int(spans[:, 1].sum()), min(self._rows[layer].shape[1] for layer in layers)):
            return None
        return self._dense.pieces(layers, spans)

    def write(
        self, layers: range, slots: np.ndarray, shared: Sequence[int], part: Part, payload: memoryview
    ) -> bytes:
        """Write a payload to the rows ``slots`` of the pool layers ``layers`` (by index); returns when it is
        there, with the checksum of what was written; nothing if that was not taken on the way.
        """
        data = np.frombuffer(payload, dtype=np.uint8)
        item = self.pool.dtype.itemsize
        if self._stream is not None:
            return self._write_cuda(layers, slots, shared, part, data)
        assert self._rows is not None
        pieces = self.pieces(layers, find_spans(slots), part)
        if pieces is not None:
            return copy_pieces(one_piece(data), pieces)
        start = 0
        checksum = frames.running_checksum()
        blocks: dict[int, list[Block]] = {}  # by the bytes of a row
        for layer in layers:
            columns = self.columns(layer, shared[layer], part)
            width = sum(stop - first for first, stop in columns) * item
            packed = data[start : start + slots.size * width].reshape(slots.size, width)
            start += packed.size
            if width not in blocks:
                blocks[width] = cut_blocks(slots, width)
            for block in blocks[width]:
                taken = 0
                for first, stop in columns:
                    size = (stop - first) * item
                    target = self._rows[layer][:, first * item : stop * item]
                    scatter_block(target, slots, block, packed[:, taken : taken + size])
                    taken += size
                checksum.update(packed[block.rows].data)
        return checksum.digest()

    def _write_cuda(
        self, layers: range, slots: np.ndarray, shared: Sequence[int], part: Part, data: np.ndarray
    ) -> bytes:
        host, digest = as_tensor(data), b""
        if not host.is_pinned():
            host = self._pinned(data.size)
            digest = copy_pieces(one_piece(data), one_piece(host.numpy()))
        with torch.cuda.stream(self._stream):
            device = host.to(self.pool.device, non_blocking=True).view(self.pool.dtype)
            index = torch.from_numpy(slots).pin_memory().to(self.pool.device, non_blocking=True)
            start = 0
            for columns, run in groupby(layers, lambda layer: self.columns(layer, shared[layer], part)):
                alike = tuple(run)
                if not columns:
                    continue
                widths = [stop - first for first, stop in columns]
                size = len(alike) * slots.size * sum(widths)
                packed = device[start : start + size].view(len(alike), slots.size, sum(widths))
                start += size
                for (first, stop), values in zip(columns, packed.split(widths, dim=2), strict=True):
                    for layer, layer_values in zip(alike, values.unbind(), strict=True):
                        self._column_view(layer, first, stop).index_copy_(0, index, layer_values)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()  # what another process may write over is checked when it has been read, not before
        return digest

    def _column_view(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Columns of a pool layer, made once: each call into torch gives the interpreter away and waits for it."""
        key = (layer, first, stop)
        if key not in self._views:
            self._views[key] = self.pool.layers[layer][:, first:stop]
        return self._views[key]

    def _pinned(self, size_bytes: int) -> torch.Tensor:
        """Memory that the device can read by itself; good until this thread's next payload."""
        pinned: torch.Tensor | None = getattr(self._own, "pinned", None)
        if pinned is None or pinned.numel() < size_bytes:
            with torch.cuda.device(
                self.pool.device
            ):  # a thread's own is GPU 0, and pinning would wake that one
                pinned = self._own.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return pinned[:size_bytes]
