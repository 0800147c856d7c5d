"""The engine's memory that a transfer agent reads or writes: the latent cache and the metadata rows.

Shapes: one layer of a pool is ``[slots, items]`` with contiguous rows, ``width + rope_dim`` items in plain rows and
bytes in those of another format (`row_format`); slot ``page * page_size + offset`` holds one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import ZERO_CODE
from sglang_tpla.transfer.room import TransferError


@dataclass(frozen=True)
class CachePool:
    """The latent cache of one rank.

    Args:
        layers: one tensor per layer, ``[slots, items]``, rows contiguous, all of one dtype and device.
        latent_dim: d of the model; on prefill every ``width_l`` equals it.
        rope_dim: rotary values at the end of each row.
        page_size: tokens per page.
        encoding: the format of each layer's rows; None for plain rows of the layers' own widths.

    Raises:
        TransferError: shapes, dtypes or devices do not fit together.
    """

    layers: Sequence[torch.Tensor]
    latent_dim: int
    rope_dim: int
    page_size: int
    encoding: RowFormat | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise TransferError("a cache pool needs at least one layer; got none")
        if self.latent_dim < 1 or self.rope_dim < 0 or self.page_size < 1:
            raise TransferError(
                "a cache pool needs latent_dim >= 1, rope_dim >= 0, page_size >= 1; got "
                f"{self.latent_dim}, {self.rope_dim}, {self.page_size}"
            )
        head = self.layers[0]
        if len(self.row_format.layers) != len(self.layers):
            raise TransferError(
                f"the pool's encoding is for {len(self.row_format.layers)} layers, and it has {len(self.layers)}"
            )
        if self.row_format.encoded and head.dtype != torch.uint8:
            name = self.row_format.name(head.dtype)
            raise TransferError(f"a pool of {name} holds bytes (uint8); got {head.dtype}")
        for index, (layer, rows) in enumerate(zip(self.layers, self.row_format.layers, strict=True)):
            if (
                layer.ndim != 2
                or layer.shape[1] != rows.row_items
                or not 1 <= rows.width <= self.latent_dim
                or layer.stride(-1) != 1
            ):
                raise TransferError(
                    f"layer {index} of the pool must be [slots, {rows.row_items}], for rope {self.rope_dim} and a "
                    f"width in 1...{self.latent_dim}, with contiguous rows; got {tuple(layer.shape)}, strides "
                    f"{layer.stride()}"
                )
            if (layer.dtype, layer.device, layer.shape[0]) != (head.dtype, head.device, head.shape[0]):
                raise TransferError(
                    f"layers of one pool share dtype, device and slots: layer 0 has {head.dtype}, {head.device}, "
                    f"{head.shape[0]}; layer {index} has {layer.dtype}, {layer.device}, {layer.shape[0]}"
                )

    @cached_property
    def row_format(self) -> RowFormat:
        if self.encoding is not None:
            return self.encoding
        widths = [layer.shape[-1] - self.rope_dim for layer in self.layers]
        return RowFormat.plain(widths, widths, self.rope_dim)

    def sharing(self, shared: Sequence[int]) -> CachePool:
        """Return the same pool with the first ``shared[l]`` columns of each layer common to every latent group."""
        return replace(self, encoding=self.row_format.sharing(shared))

    def part_items(self, layer: int, part: Part) -> int:
        """Return the items of one part of a row of a layer (by index)."""
        return self.row_format.layers[layer].part_items(part)

    def payload_bytes(self, layers: range, tokens: int, part: Part) -> int:
        """Return the size in bytes that a chunk of some layers (by index) must have."""
        return tokens * self.dtype.itemsize * sum(self.part_items(layer, part) for layer in layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of latent values per token in each layer."""
        return self.row_format.widths

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def num_pages(self) -> int:
        return self.layers[0].shape[0] // self.page_size

    def write_constants(self) -> None:
        """Write the padding of sketched rows, which no chunk brings. Call this before any chunk is received."""
        for layer, rows in zip(self.layers, self.row_format.layers, strict=True):
            if isinstance(rows, GroupRows) and rows.rows.w < rows.rows.w_pad:
                layer[:, rows.rows.w : rows.rows.w_pad] = ZERO_CODE

    def slots(self, pages: np.ndarray, num_tokens: int | None = None) -> np.ndarray:
        """Return the slots of the tokens in ``pages``, in order: int64 ``[num_tokens]``.

        Raises:
            TransferError: a page lies outside the pool, or ``num_tokens`` does not end in the last page.
        """
        pages = np.asarray(pages, dtype=np.int64).reshape(-1)
        if pages.size and (pages.min() < 0 or pages.max() >= self.num_pages):
            raise TransferError(f"pages must lie in 0...{self.num_pages - 1}; got {pages.min()}...{pages.max()}")
        capacity = pages.size * self.page_size
        tokens = capacity if num_tokens is None else num_tokens
        if not (0 <= tokens <= capacity and capacity - tokens < self.page_size):
            raise TransferError(
                f"{pages.size} pages of {self.page_size} tokens hold {max(0, capacity - self.page_size + 1)} to "
                f"{capacity} tokens; got num_tokens={num_tokens}"
            )
        slots = pages[:, None] * self.page_size + np.arange(self.page_size, dtype=np.int64)
        return np.ascontiguousarray(slots.reshape(-1)[:tokens])


@dataclass(frozen=True)
class MetadataRows:
    """The engine's metadata buffers: writable uint8 matrices ``[rows, item_bytes]``, views onto its memory.

    Raises:
        TransferError: a buffer has another type or shape.
    """

    buffers: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        for index, buffer in enumerate(self.buffers):
            if buffer.dtype != np.uint8 or buffer.ndim != 2 or not buffer.flags.writeable:
                raise TransferError(
                    f"metadata buffer {index} must be a writable uint8 matrix [rows, item_bytes]; got "
                    f"{buffer.dtype} {buffer.shape}, writable={buffer.flags.writeable}"
                )

    @property
    def item_bytes(self) -> tuple[int, ...]:
        """The bytes of one row in each buffer."""
        return tuple(buffer.shape[1] for buffer in self.buffers)

    @property
    def row_bytes(self) -> int:
        """The bytes of one row over all buffers."""
        return sum(self.item_bytes)

    def check(self, row: int) -> None:
        """Refuse a row that lies outside any buffer.

        Raises:
            TransferError: the row lies outside; the message names the rows that exist.
        """
        rows = min((buffer.shape[0] for buffer in self.buffers), default=0)
        if not 0 <= row < rows:
            raise TransferError(f"metadata row must lie in 0...{rows - 1}; got {row}")

    def read(self, row: int) -> bytes:
        """Copy one row, buffers one after another."""
        self.check(row)
        return b"".join(buffer[row].tobytes() for buffer in self.buffers)

    def write(self, row: int, data: bytes | memoryview) -> None:
        """Write one row, in the form that `read` returns."""
        self.check(row)
        source = np.frombuffer(data, dtype=np.uint8)
        if source.size != self.row_bytes:
            raise TransferError(f"a metadata row is {self.row_bytes} bytes; got {source.size}")
        start = 0
        for buffer in self.buffers:
            buffer[row] = source[start : start + buffer.shape[1]]
            start += buffer.shape[1]
