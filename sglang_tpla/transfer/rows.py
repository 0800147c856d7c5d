"""Moving rows between a paged pool and a packed payload.

On the CPU rows are moved as integers of the widest size that divides them, so every dtype is copied bit by
bit, and runs of neighbouring slots move as blocks. On a GPU the gather, the projection and the copy to pinned
memory run on a stream of their own, ordered after the caller's by an event.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_tpla.transfer.chunks import Part, Rectangle, part_columns
from sglang_tpla.transfer.projection import project_latent
from sglang_tpla.transfer.types import CachePool

_UNITS: dict[int, Any] = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}
_MIN_RUN_TOKENS = 8  # below this mean run length one indexed copy beats a loop over blocks


def byte_rows(layer: torch.Tensor) -> np.ndarray:
    """A CPU layer as uint8 ``[slots, row_bytes]``, sharing its memory."""
    return layer.view(torch.uint8).numpy()


def _unit(*sizes_bytes: int) -> Any:
    return next(kind for size, kind in _UNITS.items() if all(value % size == 0 for value in sizes_bytes))


def _runs(slots: np.ndarray) -> list[tuple[int, int, int]] | None:
    """(position, slot, length) of neighbouring slots, or None where they are too scattered."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(slots) != 1) + 1))
    if starts.size * _MIN_RUN_TOKENS > slots.size and starts.size > 1:
        return None
    lengths = np.diff(np.concatenate((starts, [slots.size])))
    return [(int(p), int(slots[p]), int(n)) for p, n in zip(starts, lengths, strict=True)]


def copy_rows(rows: np.ndarray, slots: np.ndarray, packed: np.ndarray, into_pool: bool) -> None:
    """Move uint8 ``rows[slots]`` to (or from) ``packed`` ``[len(slots), bytes]``."""
    unit = _unit(
        rows.shape[1],
        packed.shape[1],
        rows.strides[0],
        packed.strides[0],
        rows.ctypes.data,
        packed.ctypes.data,
    )
    rows, packed = rows.view(unit), packed.view(unit)
    runs = _runs(slots)
    if runs is None:
        if into_pool:
            rows[slots] = packed
        else:
            packed[:] = rows[slots]
        return
    for position, slot, length in runs:
        if into_pool:
            rows[slot : slot + length] = packed[position : position + length]
        else:
            packed[position : position + length] = rows[slot : slot + length]


class RowReader:
    """Gathers (and projects) rectangles of a prefill pool into packed payloads."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._rows = None if self._stream else [byte_rows(layer) for layer in pool.layers]

    def ready_event(self) -> Any:
        """On a GPU, an event after all that the calling thread has queued so far; else None."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.pool.device))
        return event

    def read(
        self,
        rectangle: Rectangle,
        slots: np.ndarray,
        matrices: Sequence[torch.Tensor] | None,
        shared: Sequence[int],
        part: Part,
        out: np.ndarray,
        ready: Any = None,
    ) -> None:
        """Fill ``out`` (uint8 ``[payload_bytes]``) with a rectangle.

        Args:
            slots: pool slots of the rectangle's tokens.
            matrices: Z ``[d, w]`` of the rectangle's layers on the pool's device, or None for the raw latent.
            shared: shared columns of the rectangle's layers (w for the raw latent).
            part: which columns.
            ready: event of `ready_event` when the rows were complete.
        """
        if self._stream is None:
            self._read_cpu(rectangle, slots, matrices, shared, part, out)
            return
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            index = torch.from_numpy(slots).to(self.pool.device)
            start = 0
            for position in range(rectangle.layers):
                layer = self.pool.layers[rectangle.first_layer - self.pool.first_layer + position]
                packed = self._project(layer.index_select(0, index), matrices, shared, part, position)
                size = packed.numel() * packed.element_size()
                target = torch.from_numpy(out[start : start + size]).view(packed.dtype).view(packed.shape)
                target.copy_(packed, non_blocking=True)
                start += size
            done = torch.cuda.Event()
            done.record(self._stream)
        done.synchronize()

    def _read_cpu(
        self,
        rectangle: Rectangle,
        slots: np.ndarray,
        matrices: Sequence[torch.Tensor] | None,
        shared: Sequence[int],
        part: Part,
        out: np.ndarray,
    ) -> None:
        assert self._rows is not None
        start = 0
        for position in range(rectangle.layers):
            index = rectangle.first_layer - self.pool.first_layer + position
            rows = self._rows[index]
            if matrices is None:
                if part is Part.OWN:
                    continue  # the raw latent is common to all ranks
                size = slots.size * rows.shape[1]
                copy_rows(rows, slots, out[start : start + size].reshape(slots.size, -1), into_pool=False)
            else:
                raw = np.empty((slots.size, rows.shape[1]), dtype=np.uint8)
                copy_rows(rows, slots, raw, into_pool=False)
                gathered = torch.from_numpy(raw).view(self.pool.dtype)
                packed = self._project(gathered, matrices, shared, part, position)
                data = packed.contiguous().view(torch.uint8).numpy().reshape(-1)
                size = data.size
                out[start : start + size] = data
            start += size

    def _project(
        self,
        rows: torch.Tensor,  # [tokens, d + rope]
        matrices: Sequence[torch.Tensor] | None,
        shared: Sequence[int],
        part: Part,
        position: int,
    ) -> torch.Tensor:
        latent, rope = rows[:, : self.pool.latent_dim], rows[:, self.pool.latent_dim :]
        if matrices is None:
            return rows if part is not Part.OWN else rows[:, :0]
        z = matrices[position]
        if part is Part.OWN:
            return project_latent(latent, z[:, shared[position] :])
        if part is Part.COMMON:
            z = z[:, : shared[position]]
        return torch.cat((project_latent(latent, z), rope), dim=1)


class RowWriter:
    """Scatters payloads into a decode pool."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
        self._rows = None if self._stream else [byte_rows(layer) for layer in pool.layers]

    def columns(self, layer: int, shared: int, part: Part) -> tuple[tuple[int, int], ...]:
        """Column ranges of one pool layer (by index) that a part fills."""
        return part_columns(self.pool.widths[layer], shared, self.pool.rope_dim, part)

    def payload_bytes(self, rectangle_layers: range, tokens: int, shared: Sequence[int], part: Part) -> int:
        """Bytes a rectangle of pool layers (by index) must have."""
        item = self.pool.dtype.itemsize
        return sum(
            (stop - start) * tokens * item
            for layer in rectangle_layers
            for start, stop in self.columns(layer, shared[layer], part)
        )

    def write(
        self, layers: range, slots: np.ndarray, shared: Sequence[int], part: Part, payload: memoryview
    ) -> None:
        """Write a payload to the rows ``slots`` of the pool layers ``layers`` (by index); returns when it is
        there.
        """
        data = np.frombuffer(payload, dtype=np.uint8)
        item = self.pool.dtype.itemsize
        if self._stream is not None:
            self._write_cuda(layers, slots, shared, part, data)
            return
        assert self._rows is not None
        start = 0
        for layer in layers:
            columns = self.columns(layer, shared[layer], part)
            width = sum(stop - first for first, stop in columns) * item
            packed = data[start : start + slots.size * width].reshape(slots.size, width)
            start += packed.size
            taken = 0
            for first, stop in columns:
                size = (stop - first) * item
                target = self._rows[layer][:, first * item : stop * item]
                copy_rows(target, slots, packed[:, taken : taken + size], into_pool=True)
                taken += size

    def _write_cuda(
        self, layers: range, slots: np.ndarray, shared: Sequence[int], part: Part, data: np.ndarray
    ) -> None:
        pinned = torch.from_numpy(data.copy()).pin_memory()
        with torch.cuda.stream(self._stream):
            device = pinned.to(self.pool.device, non_blocking=True).view(self.pool.dtype)
            index = torch.from_numpy(slots).to(self.pool.device)
            start = 0
            for layer in layers:
                columns = self.columns(layer, shared[layer], part)
                width = sum(stop - first for first, stop in columns)
                packed = device[start : start + slots.size * width].view(slots.size, width)
                start += packed.numel()
                taken = 0
                for first, stop in columns:
                    self.pool.layers[layer][:, first:stop].index_copy_(
                        0, index, packed[:, taken : taken + stop - first]
                    )
                    taken += stop - first
            done = torch.cuda.Event()
            done.record(self._stream)
        done.synchronize()
