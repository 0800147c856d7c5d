"""The decode ranks of `simulation`: agents that work only when they are told to, and checks of their pools."""

import math
from collections.abc import Callable, Sequence
from typing import cast
from unittest import mock

import numpy as np
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.memory.shared_memory import SharedSegment
from sglang_tpla.transfer.network.event_loop import IoLoop
from sglang_tpla.transfer.workers import Workers
from tests.wire.simulated_network import Loop

LAYERS, LATENT, ROPE, PAGE, PAGES = 3, 56, 8, 4, 24
ROOMS = 3
SETTINGS = Settings(
    role="prefill", chunk_bytes=4096, staging_bytes=16384, heartbeat_s=1.0, peer_timeout_s=5.0, transfer_timeout_s=20.0
)


class Failure(AssertionError):
    """An invariant does not hold."""


class IdleWorkers(Workers):
    """The threads of an agent that works only when it is told to."""

    def __init__(self, role: str, settings: Settings, rank: int, loop: Loop, shared_memory: bool) -> None:
        super().__init__(role, settings, rank, torch.device("cpu"), cast(IoLoop, loop))
        self.log, self._shared_memory = mock.Mock(), shared_memory

    def start(
        self,
        next_work: Callable[[], Callable[[], None] | None],
        tick: Callable[[], None],
        say_goodbye: Callable[[], None],
        fail_all: Callable[[str], None],
    ) -> None:
        """Keep the functions and start no thread."""
        self.next_work, self.tick = next_work, tick

    def make_segment(self) -> SharedSegment | None:
        """Return None if the simulated system has no shared memory left."""
        return super().make_segment() if self._shared_memory else None

    def handler_failed(self, what: str, error: BaseException) -> None:
        """Fail the case: no exception may leave a handler."""
        raise Failure(f"{what}: {error!r}") from error

    def work_once(self) -> None:
        """Do a piece of work, if there is one."""
        with self.work:
            work = self.next_work()
        if work is not None:
            work()


class Decode:
    """A decode agent, the pages that its rooms own, and the rows that its pool must hold elsewhere."""

    def __init__(
        self,
        rank: int,
        projection: Projection | None,
        hosts: Sequence[str | None],
        settings: Settings,
        workers: IdleWorkers,
    ) -> None:
        widths = (LATENT,) * LAYERS if projection is None else projection.widths
        generator = torch.Generator().manual_seed(100 + rank)
        layers = [torch.randn(PAGES * PAGE, width + ROPE, generator=generator) for width in widths]
        self.pool = CachePool(layers, LATENT, ROPE, PAGE)
        self.metadata = MetadataRows([np.zeros((2 * ROOMS, 32), dtype=np.uint8)])
        self.projection = projection
        self.agent = DecodeAgent(
            self.pool, self.metadata, projection, model_hash="m", settings=settings, rank=rank, size=len(hosts),
            host_id=hosts[rank], workers=workers,
        )  # fmt: skip
        self.owned: dict[int, np.ndarray] = {}  # by room
        self.held = [layer.clone() for layer in layers]

    def poison(self, room_id: int) -> None:
        """Fill a room's pages and its metadata row with values that the transfer must overwrite."""
        slots = torch.from_numpy(self.pool.slots(self.owned[room_id]))
        for layer in self.pool.layers:
            layer[slots] = math.nan
        self.metadata.write(room_id, b"\xff" * self.metadata.row_bytes)

    def free(self, room_id: int) -> None:
        """Take a room's pages away. From now on their rows must not change."""
        pages = self.owned.pop(room_id, None)
        if pages is not None:
            slots = torch.from_numpy(self.pool.slots(pages))
            for held, layer in zip(self.held, self.pool.layers, strict=True):
                held[slots] = layer[slots]

    def check(self) -> None:
        """Check that no row has changed that no room owns."""
        mine = np.ones(PAGES * PAGE, dtype=bool)
        for pages in self.owned.values():
            mine[self.pool.slots(pages)] = False
        for held, layer in zip(self.held, self.pool.layers, strict=True):
            # bit by bit, because a strange message may have written NaNs
            if not np.array_equal(held.numpy()[mine].view(np.int32), layer.numpy()[mine].view(np.int32)):
                raise Failure("a row changed that no live room owns")
