"""Moving rows between a paged pool and a packed payload.

On the CPU rows are moved as opaque items, so every dtype is copied bit by bit. On a GPU gather, projection and the
copy to pinned memory run on streams of their own, ordered after the engine's by an event, and so do the copy from
pinned memory and the scatter; several threads may call at a time. A reading call returns when its work is queued, and
another one waits for it: a prompt's kernels leave a multiprocessor free now and then, and chunks wait for that moment
together, one on each stream. A writing call returns when the device is done. A projection is applied to all layers of
a chunk in one batched product.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.parts import Field, Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.chunks import Rectangle
from sglang_tpla.transfer.memory.copy import copy_pieces
from sglang_tpla.transfer.memory.iovec import IoVec, Layers, blocks, find_extents, one_piece, worth_it
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.room import TransferError

STREAMS = 3  # that chunks are read on; each keeps the memory of its largest projection, some 400 MB
Reading = Callable[[], bytes | None]  # waits for a chunk; returns its checksum, where it was taken on the way


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
    """Look up the layers of a CPU pool whose successive slots lie side by side; None where they do not."""
    if layers is None or not all(rows.flags.c_contiguous for rows in layers):
        return None
    return Layers(layers)


def as_tensor(data: np.ndarray) -> torch.Tensor:
    """View ``data``, which the caller keeps alive, as a uint8 tensor ``[n]``. It is only for reading: torch has no
    tensors that cannot be written, and warns of arrays that cannot.
    """
    return torch.frombuffer((ctypes.c_uint8 * data.size).from_address(data.ctypes.data), dtype=torch.uint8)


def _all_finite(rows: torch.Tensor) -> torch.Tensor:
    """Return whether all of ``[layers, tokens, items]`` are finite: a value that is not makes its sum so as well."""
    return torch.isfinite(rows.sum(dim=(1, 2), dtype=torch.float64)).all()


class RowReader:
    """Gathers (and projects) rectangles of a prefill pool into packed payloads."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        # a chunk's few small kernels go before the next prompt's large ones
        self._streams = (
            itertools.cycle([torch.cuda.Stream(pool.device, priority=-1) for _ in range(STREAMS)])
            if pool.device.type == "cuda"
            else None
        )
        self._rows = None if self._streams else [byte_rows(layer) for layer in pool.layers]
        self._dense = _dense(self._rows)

    def ready_events(self, after: Any) -> tuple[Any, ...]:
        """Return events before which rows must not be read: ``after``, and the work that this thread has queued."""
        events: tuple[Any, ...] = () if after is None else (after,)
        if self._streams is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.pool.device))
            events += (event,)
        return events

    def wait(self, ready: tuple[Any, ...]) -> None:
        """Return when rows in memory of this host may be read; on a GPU `read` has its streams wait."""
        if self._streams is None:
            for event in ready:
                event.synchronize()

    def in_place(self, slots: np.ndarray) -> bool:
        """Return whether raw rows of ``slots`` can be sent from where they lie: as few, long `pieces`."""
        row_bytes = self.pool.layers[0].shape[1] * self.pool.dtype.itemsize
        return self._dense is not None and worth_it(find_extents(slots), slots.size, row_bytes)

    def pieces(self, rectangle: Rectangle, extents: np.ndarray) -> IoVec:
        """Return a rectangle's raw rows where they lie in the pool, in the payload's order, given `find_extents`."""
        assert self._dense is not None
        first = rectangle.first_layer - self.pool.first_layer
        return self._dense.pieces(range(first, first + rectangle.layers), extents)

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
        """Fill ``out`` (uint8 ``[payload_bytes]``, pinned where the pool is on a GPU) with a rectangle, or queue that.

        Args:
            slots: pool slots of the rectangle's tokens.
            stacks: the projection of the rectangle's layers on the pool's device, or None for the raw latent.
            part: which columns.
            row_format: the receiver's rows of the rectangle's layers.
            ready: `ready_events` of the rows.

        Raises:
            TransferError: as well as from the function that it returns: a value that these rows cannot hold.
        """
        first = rectangle.first_layer - self.pool.first_layer
        layers = range(first, first + rectangle.layers)
        if stacks is None and part is Part.OWN:
            return lambda: None  # the raw latent is common to all ranks
        if self._streams is not None:
            return self._read_cuda(layers, slots, stacks, part, out, row_format, ready)
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
        if stacks is None and not row_format.encoded:
            if self._dense is not None and self.in_place(slots):
                return copy_pieces(self._dense.pieces(layers, find_extents(slots)), one_piece(out))
            packed = out.reshape(len(layers), slots.size, -1)
            checksum = messages.running_checksum()
            for position, layer in enumerate(layers):
                for block in blocks(slots.size, packed.shape[2]):
                    gather_rows(self._rows[layer], slots[block], packed[position, block])
                    checksum.update(packed[position, block].data)
            return checksum.digest()
        rows = torch.empty(len(layers), slots.size, self.pool.layers[layers.start].shape[1], dtype=self.pool.dtype)
        for position, layer in enumerate(layers):
            gather_rows(self._rows[layer], slots, byte_rows(rows[position]))
        packed_rows = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
        if row_format.encoded:
            self._require_finite(_all_finite(rows), layers)
        self._encode(rows, stacks, part, packed_rows, row_format)
        return None

    def _require_finite(self, finite: torch.Tensor, layers: range) -> None:
        """Refuse what rows in bytes cannot hold.

        Raises:
            TransferError: a value is not finite.
        """
        if not bool(finite):
            first = self.pool.first_layer + layers.start
            raise TransferError(
                f"the prompt's cache has values that are not finite among layers {first}...{first + len(layers) - 1}, "
                "which no rounded row can hold; look for what made them in the prefill server's log"
            )

    def _read_cuda(
        self,
        layers: range,
        slots: np.ndarray,
        stacks: Sequence[torch.Tensor] | None,
        part: Part,
        out: np.ndarray,
        row_format: RowFormat,
        ready: tuple[Any, ...],
    ) -> Reading:
        assert self._streams is not None
        stream = next(self._streams)
        target = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
        with torch.cuda.stream(stream):
            for event in ready:
                stream.wait_event(event)
            # pinned: a copy from pageable memory would wait for all that was queued before it
            index = torch.from_numpy(slots).pin_memory().to(self.pool.device, non_blocking=True)
            width = self.pool.layers[layers.start].shape[1]
            rows = torch.empty(len(layers), slots.size, width, dtype=self.pool.dtype, device=self.pool.device)
            for layer, target_rows in zip(layers, rows.unbind(), strict=True):
                torch.index_select(self.pool.layers[layer], 0, index, out=target_rows)
            packed = rows.view(-1)
            finite = None
            if row_format.encoded:  # to the host on this stream: the thread's own waits for whoever else uses it
                finite = _all_finite(rows).to("cpu", non_blocking=True)
            if stacks is not None or row_format.encoded:
                packed = torch.empty(target.numel(), dtype=target.dtype, device=self.pool.device)
                self._encode(rows, stacks, part, packed, row_format)
            target.copy_(packed, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)

        def wait() -> None:
            done.synchronize()
            if finite is not None:
                self._require_finite(finite, layers)

        return wait

    def _encode(
        self,
        rows: torch.Tensor,
        stacks: Sequence[torch.Tensor] | None,
        part: Part,
        packed: torch.Tensor,
        row_format: RowFormat,
    ) -> None:
        """Fill ``packed`` (flat) with rows ``[layers, tokens, d + rope]``, projected where there are stacks."""
        d = self.pool.latent_dim
        position = start = 0
        alike = [(len(list(run)), None) for _, run in groupby(row_format.layers)]
        for count, stack in alike if stacks is None else [(len(stack), stack) for stack in stacks]:
            layer_rows = row_format.layers[position]
            items = layer_rows.part_items(part)
            size = count * rows.shape[1] * items
            if items:
                batch = rows[position : position + count]
                latent = batch[..., :d]
                if stack is not None:
                    pieces = [stack[:, :, columns] for columns in layer_rows.part_columns(part)]
                    z = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)  # [layers, d, columns of the part]
                    latent = torch.bmm(latent.to(torch.float32), z)
                out = packed[start : start + size].view(count, rows.shape[1], items)  # rounded once
                layer_rows.encode(latent, batch[..., d:], part, out)
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
        self._places: dict[tuple[Field, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._own = threading.local()  # ``pinned``: grows to the largest payload of a thread

    def pieces(self, layers: range, extents: np.ndarray, part: Part) -> IoVec | None:
        """Return where a payload's bytes belong in the pool, in order; None where these are not long pieces of it.

        ``extents`` are its tokens' slots (`iovec.find_extents`).
        """
        if self._rows is None or self._dense is None or part is not Part.FULL:
            return None
        if not worth_it(extents, int(extents[:, 1].sum()), min(self._rows[layer].shape[1] for layer in layers)):
            return None
        return self._dense.pieces(layers, extents)

    def write(self, layers: range, slots: np.ndarray, part: Part, payload: memoryview) -> bytes:
        """Write a payload to the rows ``slots`` of the pool layers ``layers`` (by index). Return, once it is there, the
        checksum of what was written, or nothing if that was not taken on the way.
        """
        data = np.frombuffer(payload, dtype=np.uint8)
        item = self.pool.dtype.itemsize
        if self._stream is not None:
            return self._write_cuda(layers, slots, part, data)
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

    def _write_cuda(self, layers: range, slots: np.ndarray, part: Part, data: np.ndarray) -> bytes:
        host, digest = as_tensor(data), b""
        if not host.is_pinned():
            host = self._pinned(data.size)
            digest = copy_pieces(one_piece(data), one_piece(host.numpy()))
        with torch.cuda.stream(self._stream):
            device = host.to(self.pool.device, non_blocking=True).view(self.pool.dtype)
            index = torch.from_numpy(slots).pin_memory().to(self.pool.device, non_blocking=True)
            start = 0
            for layer_rows, run in groupby(layers, self.pool.row_format.layers.__getitem__):
                alike, items = tuple(run), layer_rows.part_items(part)
                size = len(alike) * slots.size * items
                packed = device[start : start + size].view(len(alike), slots.size, items)
                start += size
                fields = layer_rows.fields(part)
                for layer, values in zip(alike, packed.unbind(), strict=True):
                    self._scatter(layer, index, fields, values)
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()  # what another process may write over is checked when it has been read, not before
        return digest

    def _scatter(self, layer: int, index: torch.Tensor, fields: tuple[Field, ...], values: torch.Tensor) -> None:
        """Write ``[tokens, items]`` of a payload to the fields of one layer's rows."""
        if len(fields) <= 2:
            for field in fields:
                source = values[:, field.payload : field.payload + field.size]
                self._column_view(layer, field.start, field.stop).index_copy_(0, index, source)
            return
        to, taken = self._columns(fields)  # many short fields: one launch
        self.pool.layers[layer].index_put_((index[:, None], to), values[:, taken])

    def _columns(self, fields: tuple[Field, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of a row that fields fill, and their places in the payload, each ``[columns]``."""
        if fields not in self._places:
            pairs = [(field.start + i, field.payload + i) for field in fields for i in range(field.size)]
            self._places[fields] = tuple(torch.tensor(pairs, device=self.pool.device).unbind(1))  # type: ignore[assignment]
        return self._places[fields]

    def _column_view(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Return columns of a pool layer; the view is made once, because each call into torch waits for the GIL."""
        key = (layer, first, stop)
        if key not in self._views:
            self._views[key] = self.pool.layers[layer][:, first:stop]
        return self._views[key]

    def _pinned(self, size_bytes: int) -> torch.Tensor:
        """Return memory that the device can read by itself; it is good until this thread's next payload."""
        pinned: torch.Tensor | None = getattr(self._own, "pinned", None)
        if pinned is None or pinned.numel() < size_bytes:
            with torch.cuda.device(self.pool.device):  # a thread's own is GPU 0, and pinning would wake that one
                pinned = self._own.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return pinned[:size_bytes]
