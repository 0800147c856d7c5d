"""Moving rows between a pool on a GPU and a packed payload in host memory.

Kernels and copies run on separate streams, ordered after the engine's by an event; several threads may call at a time.
A read returns when its work is queued, and gives the caller a function that waits for it: a prompt's kernels leave a
multiprocessor free only now and then, and several chunks, one on each stream, wait for that moment together. A write
returns when the device is done.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.memory import row_kernels
from sglang_tpla.transfer.memory.copy import copy_pieces
from sglang_tpla.transfer.memory.iovec import one_piece
from sglang_tpla.transfer.memory.layer_table import LayerTable
from sglang_tpla.transfer.memory.part_of_rows import make_part
from sglang_tpla.transfer.memory.pool import CachePool

STREAMS = 3  # streams that chunks are read on; each keeps the memory of its largest projection, some 70 MB


def _on_device(slots: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy slots to the device from pinned memory, because a copy from other memory would wait for all queued work."""
    return torch.from_numpy(slots).pin_memory().to(device, non_blocking=True)


def _only_read(data: np.ndarray) -> torch.Tensor:
    """View ``data``, which the caller keeps alive, as a uint8 tensor ``[n]`` that nobody may write. Torch has no
    read-only tensors, and warns about read-only arrays.
    """
    return torch.frombuffer((ctypes.c_uint8 * data.size).from_address(data.ctypes.data), dtype=torch.uint8)


class DeviceReader:
    """Makes chunks of a prefill pool's rows."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._make = partial(make_part, row_kernels, LayerTable(pool.layers), pool.latent_dim)
        # high priority, so that a chunk's few small kernels run before the next prompt's large ones
        streams = [torch.cuda.Stream(pool.device, priority=-1) for _ in range(STREAMS)]
        self._streams = itertools.cycle(streams)

    def now(self) -> Any:
        """Return an event that follows the work that this thread has queued."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.pool.device))
        return event

    def prepare(self, row_format: RowFormat, stacks: Sequence[torch.Tensor] | None) -> None:
        """Compile the kernels for chunks of these rows, so that the first request need not wait for that."""
        with torch.cuda.stream(next(self._streams)):
            for tokens, part in itertools.product((1, row_kernels.FEW_TOKENS + 1), Part):
                slots = torch.zeros(tokens, dtype=torch.int64, device=self.pool.device)
                items = tokens * sum(rows.part_items(part) for rows in row_format.layers)
                packed = torch.empty(items, dtype=row_format.item_dtype(self.pool.dtype), device=self.pool.device)
                self._make(range(len(self.pool.layers)), slots, stacks, part, packed, row_format)

    def read(
        self,
        layers: range,
        slots: np.ndarray,
        stacks: Sequence[torch.Tensor] | None,
        part: Part,
        out: np.ndarray,
        row_format: RowFormat,
        ready: tuple[Any, ...],
    ) -> Callable[[], bool]:
        """Queue the work that fills pinned ``out`` (`rows.RowReader.read`).

        Returns:
            A function that waits until ``out`` is filled, and returns False if a value is not finite that must be.
        """
        stream = next(self._streams)
        target = torch.from_numpy(out).view(row_format.item_dtype(self.pool.dtype))
        with torch.cuda.stream(stream):
            for event in ready:
                stream.wait_event(event)
            packed = torch.empty(target.numel(), dtype=target.dtype, device=self.pool.device)
            wrong = self._make(layers, _on_device(slots, self.pool.device), stacks, part, packed, row_format)
            # copied on this stream, because the thread's current stream also waits for other users' work
            found = None if wrong is None else wrong.to("cpu", non_blocking=True)
            target.copy_(packed, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)

        def wait(_kept: object = stacks) -> bool:  # the projection must not be freed while kernels read it
            done.synchronize()
            return found is None or not found.any()

        return wait


class DeviceWriter:
    """Writes payloads into a decode pool."""

    def __init__(self, pool: CachePool) -> None:
        self.pool = pool
        self._table = LayerTable(pool.layers)
        # each thread has a ``stream``, and ``pinned`` memory that grows to its largest payload
        self._own = threading.local()
        self._prepare()

    def _stream(self) -> torch.cuda.Stream:
        """Return this thread's own stream, of high priority: its few small kernels run before those of a decode step,
        and would otherwise wait for the step's whole graph.
        """
        if getattr(self._own, "stream", None) is None:
            self._own.stream = torch.cuda.Stream(self.pool.device, priority=-1)
        stream: torch.cuda.Stream = self._own.stream
        return stream

    def _prepare(self) -> None:
        """Compile the kernels, on temporary rows."""
        with torch.cuda.stream(self._stream()):
            slots = torch.zeros(1, dtype=torch.int64, device=self.pool.device)
            for rows, part in itertools.product(set(self.pool.row_format.layers), Part):
                nobodys = torch.empty(1, rows.row_items, dtype=self.pool.dtype, device=self.pool.device)
                payload = nobodys.new_empty(1, 1, rows.part_items(part))
                if fields := rows.fields(part):
                    row_kernels.scatter(LayerTable([nobodys]), range(1), slots, fields, payload)
        self._stream().synchronize()

    def write(self, layers: range, slots: np.ndarray, part: Part, data: np.ndarray, after: Any) -> bytes:
        """Write a payload (`rows.RowWriter.write`). Return the checksum of the written bytes, or nothing if that was
        not computed on the way.
        """
        host, digest = _only_read(data), b""
        if not host.is_pinned():
            host = self._pinned(data.size)
            digest = copy_pieces(one_piece(data), one_piece(host.numpy()))
        stream = self._stream()
        with torch.cuda.stream(stream):
            try:
                payload = host.to(self.pool.device, non_blocking=True).view(self.pool.dtype)
                index = _on_device(slots, self.pool.device)
                if after is not None:
                    stream.wait_event(after)
                start = 0
                for rows, run in groupby(layers, self.pool.row_format.layers.__getitem__):
                    alike = list(run)
                    size = len(alike) * slots.size * rows.part_items(part)
                    if size and (fields := rows.fields(part)):
                        values = payload[start : start + size].view(len(alike), slots.size, -1)
                        row_kernels.scatter(self._table, range(alike[0], alike[-1] + 1), index, fields, values)
                    start += size
            finally:
                # The caller's check must follow the read, because another process may overwrite shared memory. After
                # an error too nothing may be queued that writes here: the pages are another request's soon.
                done = torch.cuda.Event(blocking=True)
                done.record(stream)
                done.synchronize()
        return digest

    def _pinned(self, size_bytes: int) -> torch.Tensor:
        """Return pinned memory, which is valid until this thread's next payload."""
        pinned: torch.Tensor | None = getattr(self._own, "pinned", None)
        if pinned is None or pinned.numel() < size_bytes:
            pinned = self._own.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return pinned[:size_bytes]
