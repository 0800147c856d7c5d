"""Moving rows between a paged pool and a packed payload.

On the CPU rows are moved as opaque items, so every dtype is copied bit by bit. `device_rows` moves rows of a pool on a
GPU. Several threads may call at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.chunks import Rectangle, layers_of
from sglang_tpla.transfer.memory import row_kernels_reference
from sglang_tpla.transfer.memory.copy import copy_pieces
from sglang_tpla.transfer.memory.device_rows import DeviceReader, DeviceWriter
from sglang_tpla.transfer.memory.iovec import IoVec, Layers, blocks, find_extents, one_piece, worth_it
from sglang_tpla.transfer.memory.layer_table import LayerTable
from sglang_tpla.transfer.memory.part_of_rows import make_part
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.room import TransferError

Reading = Callable[[], bytes | None]  # waits for a chunk; returns its checksum if that was computed on the way


def byte_rows(layer: torch.Tensor) -> np.ndarray:
    """View a CPU layer as uint8 ``[slots, row_bytes]``, sharing its memory."""
    return layer.view(torch.uint8).numpy()


def _items(rows: np.ndarray) -> np.ndarray:
    """View uint8 ``[n, bytes]`` as n opaque items, so that numpy copies one item at a time and not one value."""
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


def _dense(layers: Sequence[np.ndarray] | None) -> Layers | None:
    """Look up the layers of a CPU pool. Return None without one, or if successive slots do not lie side by side."""
    if layers is None or not all(rows.flags.c_contiguous for rows in layers):
        return None
    return Layers(layers)


class RowReader:
    """Gathers (and projects) rectangles of a prefill pool into packed payloads."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._device = DeviceReader(pool) if pool.device.type == "cuda" else None
        self._rows = None if self._device else [byte_rows(layer) for layer in pool.layers]
        self._make = partial(make_part, row_kernels_reference, LayerTable(pool.layers), pool.latent_dim)
        self._dense = _dense(self._rows)

    def ready_events(self, after: Any) -> tuple[Any, ...]:
        """Return the events to wait for before reading rows: ``after``, and the work that this thread has queued."""
        events: tuple[Any, ...] = () if after is None else (after,)
        return events if self._device is None else (*events, self._device.now())

    def wait(self, ready: tuple[Any, ...]) -> None:
        """Wait until rows in host memory may be read. For rows on a GPU, `read` lets its streams wait instead."""
        if self._device is None:
            for event in ready:
                event.synchronize()

    def prepare(self, row_format: RowFormat, stacks: Sequence[torch.Tensor] | None) -> None:
        """Compile the kernels that the first chunk of such rows would wait for."""
        if self._device is not None:
            self._device.prepare(row_format, stacks)

    def in_place(self, slots: np.ndarray) -> bool:
        """Return whether raw rows of ``slots`` can be sent straight from the pool, as few, long `pieces`."""
        row_bytes = self.pool.layers[0].shape[1] * self.pool.dtype.itemsize
        return self._dense is not None and worth_it(find_extents(slots), slots.size, row_bytes)

    def pieces(self, rectangle: Rectangle, extents: np.ndarray) -> IoVec:
        """Return the places of a rectangle's raw rows in the pool, in the payload's order, given `find_extents`."""
        assert self._dense is not None
        return self._dense.pieces(layers_of(rectangle), extents)

    def read(
        self,
        rectangle: Rectangle,
        slots: np.ndarray,
        stacks: Sequence[torch.Tensor] | None,
        part: Part,
        out: np.ndarray,
        row_format: RowFormat,
        ready: tuple[Any, ...] = (),
    ) -> Reading:
        """Fill ``out`` (uint8 ``[payload_bytes]``, pinned for a pool on a GPU) with a rectangle, or queue that work.
        Return a function that waits for it.

        Args:
            slots: pool slots of the rectangle's tokens.
            stacks: the projection of the rectangle's layers on the pool's device, or None for the raw latent.
            part: the part of the rows to read.
            row_format: the receiver's rows of the rectangle's layers.
            ready: `ready_events` of the rows.

        Raises:
            TransferError: these rows cannot hold a value; the returned function raises it too.
        """
        layers = layers_of(rectangle)
        if stacks is None and part is Part.OWN:
            return lambda: None  # the raw latent is common to all ranks
        if self._device is not None:
            filled = self._device.read(layers, slots, stacks, part, out, row_format, ready)
            return lambda: self._require_finite(filled(), layers)
        digest = self._read_host(layers, slots, stacks, part, out, row_format)
        return lambda: digest

    def _read_host(
        self,
        layers: range,
        slots: np.ndarray,
        stacks: Sequence[torch.Tensor] | None,
        part: Part,
        out: np.ndarray,
        row_format: RowFormat,
    ) -> bytes | None:
        assert self._rows is not None
        if stacks is not None or row_format.encoded:
            packed = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
            wrong = self._make(layers, torch.from_numpy(slots), stacks, part, packed, row_format)
            self._require_finite(wrong is None or not wrong.any(), layers)
            return None
        if self._dense is not None and self.in_place(slots):
            return copy_pieces(self._dense.pieces(layers, find_extents(slots)), one_piece(out))
        rows = out.reshape(len(layers), slots.size, -1)
        checksum = messages.running_checksum()
        for position, layer in enumerate(layers):
            for block in blocks(slots.size, rows.shape[2]):
                gather_rows(self._rows[layer], slots[block], rows[position, block])
                checksum.update(rows[position, block].data)
        return checksum.digest()

    def _require_finite(self, finite: bool, layers: range) -> None:
        """Refuse values that rows in bytes cannot hold.

        Raises:
            TransferError: a value is not finite.
        """
        if not finite:
            raise TransferError(
                f"the prompt's cache has values that are not finite among layers {layers.start}...{layers.stop - 1}, "
                "which no rounded row can hold; look for what made them in the prefill server's log"
            )


class RowWriter:
    """Scatters payloads into a decode pool."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._device = DeviceWriter(pool) if pool.device.type == "cuda" else None
        self._rows = None if self._device else [byte_rows(layer) for layer in pool.layers]
        self._dense = _dense(self._rows)

    def pieces(self, layers: range, extents: np.ndarray, part: Part) -> IoVec | None:
        """Return the places of a payload's bytes in the pool, in order, or None if they are not a few long pieces.

        ``extents`` are the slots of the payload's tokens (`iovec.find_extents`).
        """
        if self._rows is None or self._dense is None or part is not Part.FULL:
            return None
        if not worth_it(extents, int(extents[:, 1].sum()), min(self._rows[layer].shape[1] for layer in layers)):
            return None
        return self._dense.pieces(layers, extents)

    def write(self, layers: range, slots: np.ndarray, part: Part, payload: memoryview, after: Any = None) -> bytes:
        """Write a payload to the rows ``slots`` of the pool layers ``layers`` (by index), not before the event
        ``after``. After the write, return the checksum of the written bytes, or nothing if that was not computed on the
        way.
        """
        data = np.frombuffer(payload, dtype=np.uint8)
        item = self.pool.dtype.itemsize
        if self._device is not None:
            return self._device.write(layers, slots, part, data, after)
        if after is not None:
            after.synchronize()
        assert self._rows is not None
        pieces = self.pieces(layers, find_extents(slots), part)
        if pieces is not None:
            return copy_pieces(one_piece(data), pieces)
        start = 0
        checksum = messages.running_checksum()
        for layer in layers:
            layer_rows = self.pool.row_format.layers[layer]
            width = layer_rows.part_items(part) * item
            packed = data[start : start + slots.size * width].reshape(slots.size, width)
            start += packed.size
            for block in blocks(slots.size, width):
                for field in layer_rows.fields(part):
                    target = self._rows[layer][:, field.start * item : field.stop * item]
                    source = packed[:, field.payload * item : (field.payload + field.size) * item]
                    scatter_rows(target, slots[block], source[block])
                checksum.update(packed[block].data)
        return checksum.digest()
