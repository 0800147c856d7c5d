"""The projections that decode ranks have registered with a prefill agent, layer by layer.

Everything runs under the agent's lock.
"""

from collections.abc import Collection

import numpy as np
import torch

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory import row_kernels, row_kernels_reference
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.projection import IDENTITY_HASH, projection_digest, stack_layers
from sglang_tpla.transfer.prefill.state import Peer, SenderProjection, Upload

MAX_PROJECTIONS = 64


class Projections:
    """Keeps registered projections by content hash, cut to the layers of this rank's pool."""

    def __init__(self, pool: CachePool) -> None:
        self._table = {IDENTITY_HASH: SenderProjection(None)}
        self._layers = len(pool.layers)
        self._device = pool.device
        self._weights = (row_kernels if pool.device.type == "cuda" else row_kernels_reference).weights

    def begin(self, peer: Peer) -> None:
        """Give a rank its projection if that is registered, or begin its upload."""
        layout = peer.hello.layout
        peer.projection = self._table.get(peer.hello.projection or IDENTITY_HASH)
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
            upload.kept.append(torch.from_numpy(values).to(self._device))
        if upload.next_index < len(layout.widths):
            return ""
        peer.upload = None
        key = peer.hello.projection
        if upload.digest.hexdigest() != key:
            return f"the projection does not have the hash {key[:12]} it was announced with"
        if key not in self._table:
            used = {other.hello.projection for other in peers} | {IDENTITY_HASH}
            self._table = {other: kept for other, kept in self._table.items() if other in used}
            if len(self._table) > MAX_PROJECTIONS:
                return f"this rank keeps at most {MAX_PROJECTIONS} projections; close unused decode servers"
            stacks = stack_layers(upload.kept, peer.row_format.layers)
            self._table[key] = SenderProjection(tuple(map(self._weights, stacks)))
        peer.projection = self._table[key]
        return ""
