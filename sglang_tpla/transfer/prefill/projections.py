"""The projections that decode ranks have registered with a prefill agent, layer by layer.

Everything runs under the agent's lock.
"""

import contextlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory import row_kernels, row_kernels_reference
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.projection import projection_digest, stack_layers
from sglang_tpla.transfer.prefill.state import Peer, SenderProjection, Upload

MAX_PROJECTIONS = 64


class Projections:
    """Keeps registered projections by content hash and rows, cut to the layers of this rank's pool.

    A rank that names the hash of another rank's projection uploads no layer by which its rows could be checked. Found
    by hash alone, kernels would read the other rank's matrices as if they had this rank's columns.
    """

    def __init__(self, pool: CachePool) -> None:
        self._identity = SenderProjection(None)
        self._table: dict[tuple[str, RowFormat], SenderProjection] = {}
        self._layers = len(pool.layers)
        self._device = pool.device
        # what makes a projection goes before a prompt's kernels, as chunks do
        self._stream = torch.cuda.Stream(pool.device, priority=-1) if pool.device.type == "cuda" else None
        self._weights = (row_kernels if pool.device.type == "cuda" else row_kernels_reference).weights

    def begin(self, peer: Peer) -> None:
        """Give a rank its projection if that is registered, or begin its upload."""
        layout = peer.hello.layout
        peer.projection = self._table.get(_key(peer)) if peer.hello.projection else self._identity
        if peer.projection is None:
            peer.upload = Upload(projection_digest(layout.latent_dim, peer.announced))

    def awaits(self, peer: Peer, message: messages.ProjectionLayer) -> bool:
        """Return whether a layer is the next one that a rank has to send."""
        upload = peer.upload
        return upload is not None and (message.projection, message.index) == (peer.hello.projection, upload.next_index)

    def take(self, peer: Peer, message: messages.ProjectionLayer, data: memoryview, peers: Collection[Peer]) -> str:
        """Take the next layer of a rank's projection. The last layer registers it.

        Args:
            peers: all registered ranks; projections that none of them uses are dropped.

        Returns:
            The error in the layer or the projection, or an empty string.
        """
        upload, layout = peer.upload, peer.hello.layout
        assert upload is not None
        width = peer.announced.layers[message.index].columns
        if data.nbytes != layout.latent_dim * width * 4 or messages.checksum(data) != message.checksum:
            return f"projection layer {message.index} came damaged or cut; connect again"
        upload.digest.update(data)
        upload.next_index += 1
        if message.index < self._layers:
            values = np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(layout.latent_dim, width)
            with self._queue():
                upload.kept.append(torch.from_numpy(values).to(self._device))
        if upload.next_index < len(layout.widths):
            return ""
        peer.upload = None
        key = _key(peer)
        if upload.digest.hexdigest() != peer.hello.projection:
            return f"the projection does not have the hash {key[0][:12]} it was announced with"
        if key not in self._table:
            used = {_key(other) for other in peers}
            self._table = {other: kept for other, kept in self._table.items() if other in used}
            if len(self._table) >= MAX_PROJECTIONS:
                return f"this rank keeps at most {MAX_PROJECTIONS} projections; close unused decode servers"
            with self._queue():
                stacks = stack_layers(upload.kept, peer.row_format.layers)
                self._table[key] = SenderProjection(tuple(map(self._weights, stacks)), self._queued())
        peer.projection = self._table[key]
        return ""

    def _queue(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _queued(self) -> tuple[Any, ...]:
        """Return events behind all that was queued: a prompt that is computed meanwhile holds it up for long."""
        return () if self._stream is None else (self._stream.record_event(),)


def _key(peer: Peer) -> tuple[str, RowFormat]:
    return peer.hello.projection, peer.announced
