"""The decode ranks of `simulation`: agents that work only when they are told to, and what their pools must hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.room import CachePool, MetadataRows
from sglang_tpla.transfer.workers import Workers

LAYERS, LATENT, ROPE, PAGE, PAGES = 3, 56, 8, 4, 24
ROOMS = 3
SETTINGS = Settings(
    role="prefill",
    chunk_bytes=4096,
    staging_bytes=16384,
    heartbeat_s=1.0,
    peer_timeout_s=5.0,
    transfer_timeout_s=20.0,
)


class Failure(AssertionError):
    """Something that must hold did not."""


def threads(agent: Any) -> Workers:
    """What an agent runs on."""
    return agent.workers if agent.role == "decode" else agent._threads


def rooms(agent: Any) -> dict[int, Any]:
    """An agent's rooms, by id."""
    return agent.rooms.table if agent.role == "decode" else agent._rooms


def work_once(agent: Any) -> None:
    """A piece of an agent's work."""
    (agent.receiver.work_once if agent.role == "decode" else agent._work_once)()


def tick(agent: Any) -> None:
    """Let an agent look at the clock."""
    (agent.tick if agent.role == "decode" else agent._tick)()


def no_threads(workers: Any) -> None:
    """Let an agent work only when it is told to, before its sockets are made."""
    workers.work.wait = lambda timeout=None: True
    workers.start = lambda: None
    workers.threads = [mock.Mock()]
    workers.threads[0].is_alive = lambda: True

    def failed(what: str, error: BaseException) -> None:
        raise Failure(f"{what}: {error!r}") from error

    workers.handler_failed = failed


class Decode:
    """A decode agent, the pages its rooms own, and what its pool must hold elsewhere."""

    def __init__(
        self, rank: int, projection: Projection | None, hosts: Sequence[str | None], settings: Settings
    ) -> None:
        widths = (LATENT,) * LAYERS if projection is None else projection.widths
        generator = torch.Generator().manual_seed(100 + rank)
        layers = [torch.randn(PAGES * PAGE, width + ROPE, generator=generator) for width in widths]
        self.pool = CachePool(layers, LATENT, ROPE, PAGE)
        self.metadata = MetadataRows([np.zeros((2 * ROOMS, 32), dtype=np.uint8)])
        self.projection = projection
        self.agent = DecodeAgent(
            self.pool, self.metadata, projection, model_hash="m", settings=settings, rank=rank, size=len(hosts),
            host_id=hosts[rank], logger=mock.Mock(),
        )  # fmt: skip
        self.owned: dict[int, np.ndarray] = {}  # by room
        self.held = [layer.clone() for layer in layers]

    def poison(self, room: int) -> None:
        """What a room must not leave behind, in its pages and its metadata row."""
        slots = torch.from_numpy(self.pool.slots(self.owned[room]))
        for layer in self.pool.layers:
            layer[slots] = math.nan
        self.metadata.write(room, b"\xff" * self.metadata.row_bytes)

    def free(self, room: int) -> None:
        """The room no longer owns its pages: from now on they must stay as they are."""
        pages = self.owned.pop(room, None)
        if pages is not None:
            slots = torch.from_numpy(self.pool.slots(pages))
            for held, layer in zip(self.held, self.pool.layers, strict=True):
                held[slots] = layer[slots]

    def check(self) -> None:
        """No row has changed that nobody owns."""
        mine = np.ones(PAGES * PAGE, dtype=bool)
        for pages in self.owned.values():
            mine[self.pool.slots(pages)] = False
        for held, layer in zip(self.held, self.pool.layers, strict=True):
            # bit by bit: what a strange message wrote may be no number
            if not np.array_equal(held.numpy()[mine].view(np.int32), layer.numpy()[mine].view(np.int32)):
                raise Failure("a row changed that no live room owns")
