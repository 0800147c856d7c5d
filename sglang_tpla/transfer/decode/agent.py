"""The decode side: one agent per rank, which has a DEALER socket to each prefill rank and fills the paged pool.

The scheduler opens rooms and hands over pages; prefill ranks send as much as credit allows. The agent owns its parts:

    Workers      threads, lock, counters
    Connections  sockets to prefill ranks, and their DataChannels; reports messages and chunks to the Receiver
    Receiver     writes chunks into the pool and checks them; reports events to the Rooms
    Rooms        the states of rooms, and the effect of each event on them
    Credits      how many bytes each prefill rank may send
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.connections import Connections
from sglang_tpla.transfer.decode.credits import Credits
from sglang_tpla.transfer.decode.receiver import Receiver
from sglang_tpla.transfer.decode.rooms import Rooms
from sglang_tpla.transfer.decode.state import Link, Room, Source
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.memory.staging import Staging
from sglang_tpla.transfer.network.data_channel import BufferPool
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.room import (
    NO_LIMITS,
    AgentStats,
    Limits,
    RoomState,
    TransferError,
    TransferMetric,
    check_room_id,
)
from sglang_tpla.transfer.workers import Workers, seconds_since


class DecodeAgent:
    """Fetches latent caches for one decode rank. Any thread may call any public method: all return at once (`abort` and
    `close_room` wait for a write in progress, at most one chunk) and raise `TransferError` for misuse or when a thread
    of the agent has ended.

    Args:
        projection: the maps for the prefill ranks to apply; None if the pool holds the whole latent.
        host_id: overrides the identity of this host.
        limits: the longest prompt that this server accepts.
        on_peer_lost: called with host and port, from the I/O thread, once for each prefill rank whose connection breaks
            or that is given up, so that the caller looks up its address anew.
    """

    role = "decode"

    def __init__(
        self,
        pool: CachePool,
        metadata: MetadataRows,
        projection: Projection | None,
        *,
        model_hash: str,
        settings: Settings,
        rank: int,
        size: int,
        host_id: str | None = None,
        limits: Limits = NO_LIMITS,
        on_peer_lost: Callable[[str, int], None] = lambda host, port: None,
        workers: Workers | None = None,
    ) -> None:
        security = Security.from_environment(self.role)
        if projection is not None and len(projection.shared) == len(pool.layers):
            pool = pool.sharing(projection.shared)
        _check_projection(pool, projection)
        pool.write_constants()
        self._pool, self._metadata = pool, metadata
        workers = workers or Workers(self.role, settings, rank, pool.device)
        self.workers = workers
        self.segment = workers.make_segment()
        slots = None
        if self.segment is not None:
            slots = Staging(self.segment.data, workers.chunk_bytes, self.segment.reserve)
        hello = messages.Hello(
            versions=messages.PROTOCOL_VERSIONS,
            agent=workers.agent_id,
            model_hash=model_hash,
            rank=rank,
            size=size,
            host=workers.host_identity() if host_id is None else host_id,
            max_chunk_bytes=workers.chunk_bytes,
            layout=messages.CacheLayout(
                first_layer=0,
                latent_dim=pool.latent_dim,
                rope_dim=pool.rope_dim,
                dtype=pool.row_format.name(pool.dtype),
                page_size=pool.page_size,
                widths=pool.widths,
                shared=pool.row_format.shared,
                metadata_bytes=metadata.item_bytes,
            ),
            projection=projection.content_hash if projection is not None else "",
            common=projection.common_hash if projection is not None else "",
            segment=self.segment.announcement if self.segment is not None else None,
        )
        buffers = BufferPool()
        self.credits = Credits(workers.settings.staging_bytes, workers.chunk_bytes)
        self.rooms = Rooms(
            pool, metadata.row_bytes, workers.settings, self.credits, workers.counts, time.time_ns(),
            free_slots=lambda: slots is not None and slots.reap(), ended=self._log_end,
        )  # fmt: skip
        self.receiver = Receiver(
            workers, self.rooms, pool, metadata, slots, buffers,
            put=lambda connection, message: self.connections.put(connection, message),
        )  # fmt: skip
        self.connections = Connections(
            workers, self.receiver, security, hello, limits, projection, pool.device, buffers, on_peer_lost
        )
        self.rank, self.durations = rank, workers.durations
        workers.start(self.receiver.next_work, self._tick, self.connections.say_goodbye, self._fail_all)

    def close(self) -> None:
        """End all threads and free sockets and staging; rooms that are still alive fail. May be called twice."""
        self.workers.close()
        self.connections.close()
        if self.segment is not None:
            self.segment.close()

    def connect(self, host: str, port: int) -> None:
        """Register with a prefill rank unless that is done or under way; does not block."""
        with self.workers.lock:
            self.workers.check_alive()
            self.connections.connection((host, port))

    def open_room(
        self, room_id: int, peers: Sequence[tuple[str, int, bool]], born: float | None = None, prompt_tokens: int = 0
    ) -> None:
        """Begin a new generation of a room with prefill ranks ``(host, port, is_dummy)``, connecting where needed.

        Args:
            born: when the request came (`time.monotonic`; None: now); the room fails if a prefill rank started later.
            prompt_tokens: length of the whole prompt (0: not known); the room fails if a prefill rank cannot take it.

        Raises:
            TransferError: no peers, all of them dummies, the room is open and has not ended, or its id is out of range.
        """
        check_room_id(room_id)
        with self.receiver.turn() as now:
            self.workers.check_alive()
            if all(dummy for _, _, dummy in peers):
                raise TransferError(f"room {room_id} needs a prefill rank that sends; got {list(peers)}")
            self.workers.check_closed(self.rooms.table, room_id)
            sources = {
                (host, port): Source(self.connections.connection((host, port)), dummy) for host, port, dummy in peers
            }
            self.rooms.open(room_id, sources, now if born is None else born, prompt_tokens, now)

    def request(
        self,
        room_id: int,
        pages: np.ndarray,
        *,
        metadata_row: int,
        expected_ranks: int,
        prefix_tokens: int = 0,
        after: Any = None,
    ) -> None:
        """Ask for a room's rows.

        Args:
            pages: where the rows go, int32 ``[n]``, after the cached prefix; the agent may write there until the room
                ends or is aborted or closed.
            metadata_row: row of the metadata buffers to fill, last.
            expected_ranks: how many decode ranks ask each prefill rank for this room.
            prefix_tokens: tokens that are cached here already and are not sent.
            after: event (``wait``, ``synchronize``) of another stream that may still write rows of these pages, which
                were another request's.

        Raises:
            TransferError: unknown room, asked twice, or pages outside the pool.
        """
        slots = self._pool.slots(pages)
        if self._metadata.buffers:
            self._metadata.check(metadata_row)
        with self.receiver.turn() as now:
            self.workers.check_alive()
            room = self._open(room_id)
            if room.request is not None:
                raise TransferError(f"room {room_id} was asked for already on decode rank {self.rank}")
            unknown = -1  # prefill's Finish says how full the last page is
            request = messages.Request(room_id, room.generation, expected_ranks, prefix_tokens, unknown, False, 0, 1)
            self.rooms.request(room, Slots(slots), metadata_row, after, request, now)

    def poll(self, room_id: int) -> RoomState:
        """Return the state of a room: BOOTSTRAPPING until every prefill rank has registered this one, WAITING until
        ``request``, TRANSFERRING, SUCCESS when every chunk and then the metadata row are written; FAILED (`failure`).
        """
        with self.workers.lock:
            return RoomState.FAILED if self.workers.death is not None else self._open(room_id).state

    def failure(self, room_id: int) -> str:
        """Return why a room failed, or nothing if it has not."""
        with self.workers.lock:
            return self.workers.death or self._open(room_id).reason

    def metric(self, room_id: int) -> TransferMetric:
        """Return the bytes received so far and the seconds from the request to the end."""
        with self.workers.lock:
            return self._metric(self._open(room_id))

    def _metric(self, room: Room) -> TransferMetric:
        return TransferMetric(
            wire_bytes=room.wire_bytes,
            shared_memory_bytes=room.shared_memory_bytes,
            seconds=seconds_since(room.requested, room.ended or self.workers.io.now()),
            chunks=sum(len(source.applied) for source in room.sources.values()),
            tokens=max(source.tokens for source in room.sources.values()),
            resent=room.resent,
        )

    def abort(self, room_id: int, reason: str) -> None:
        """Fail a room and tell its prefill ranks. Nothing is written for the room once this returns."""
        with self.workers.lock:
            room = self.rooms.table.get(room_id)
        if room is not None:
            self.receiver.fail(room, reason)

    def close_room(self, room_id: int) -> None:
        """Forget a room, and abort it if it has not ended. Nothing is written for the room once this returns."""
        self.abort(room_id, "closed by the decode scheduler before it ended")
        with self.workers.lock:
            self.rooms.table.pop(room_id, None)

    def stats(self) -> AgentStats:
        with self.workers.lock:
            lines = list(self.connections.table.values())
            readers = [line.reader for line in lines if line.reader is not None and line.reader.greeted]
            return AgentStats(
                rooms=len(self.rooms.table),
                peers=sum(line.link is Link.REGISTERED for line in lines),
                data_channels=len(readers),
                sealed_channels=sum(reader.sealed for reader in readers),
                staging_used_bytes=self.credits.used_bytes,
                staging_limit_bytes=self.workers.settings.staging_bytes,
                threads_alive=self.workers.alive,
                transfer_seconds=self.workers.transfer_seconds,
                **self.workers.counts,
            )

    def _tick(self) -> None:
        with self.receiver.turn() as now:
            late = self.rooms.expire(now)
        self.connections.expire(now)
        for room in late:
            why = f"no progress for {self.workers.settings.transfer_timeout_s:g} s in {room.state.name}"
            if room.state is RoomState.WAITING:
                why += (
                    "; this decode server's cache had no place for the request: send it fewer requests, or raise "
                    "--tpla-transfer-timeout-s"
                )
            self.receiver.fail(room, why)

    def _open(self, room_id: int) -> Room:
        return self.workers.opened(self.rooms.table, room_id)

    def _fail_all(self, reason: str) -> None:
        for room in list(self.rooms.table.values()):
            if not room.state.ended:
                self.receiver.fail(room, reason)

    def _log_end(self, room: Room) -> None:
        peers = [source.connection.name for source in room.sources.values() if not source.dummy]
        self.workers.log_transfer(room.room_id, room, peers, self._metric(room))


def _check_projection(pool: CachePool, projection: Projection | None) -> None:
    """Refuse a projection that is not for this pool.

    Raises:
        TransferError: the two differ; the message names both.
    """
    if projection is None:
        return
    theirs = (projection.latent_dim, projection.widths)
    ours = (pool.latent_dim, pool.widths)
    if theirs != ours or projection.sketched not in (None, pool.row_format):
        raise TransferError(
            f"the projection is for {len(projection.widths)} layers with d={projection.latent_dim} and widths "
            f"{projection.widths[:4]}..., the pool holds {len(pool.layers)} with d={pool.latent_dim} and widths "
            f"{pool.widths[:4]}...; use the artifact this server was started with"
        )
