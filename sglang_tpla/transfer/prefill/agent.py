"""The prefill side: one agent per rank, which has a ROUTER socket and sends chunks out of the latent pool.

The scheduler opens rooms and hands over pages; decode ranks ask for rooms and grant credit. The agent owns its parts:

    Workers  threads, lock, counters
    Router   the sockets that decode ranks connect to (I/O thread); hands messages to the Peers
    Peers    the registered ranks, and the `Projections` that they brought; hand messages about rooms to the Rooms
    Rooms    the states of rooms, and the effect of each request and receipt on them
    Lanes    the choice of the next chunk, and which rank has which chunks
    Sender   makes that chunk from the pool and sends it off (worker threads)

Public calls return at once, from any thread, and raise `TransferError` for misuse or when a thread of the agent has
ended.
"""

from typing import Any

import numpy as np

from sglang_tpla.config import Settings
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.staging import Staging, pin, unpin
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.prefill.lanes import Lanes
from sglang_tpla.transfer.prefill.peers import Peers
from sglang_tpla.transfer.prefill.rooms import Rooms
from sglang_tpla.transfer.prefill.router import Router
from sglang_tpla.transfer.prefill.sender import Sender
from sglang_tpla.transfer.prefill.state import Outgoing, Peer, Room, Span
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


class PrefillAgent:
    """Serves one prefill rank's latent cache to decode ranks.

    The agent listens on ``address`` from construction to `close`. Data channels come to the port after it.

    Args:
        bind_port: the port to listen on, or 0 to let the system choose.
        advertised_port: the port where decode ranks reach the agent (data channels: the next one), if not bind_port.
        limits: the longest prompt that this server accepts.
    """

    role = "prefill"

    def __init__(
        self,
        pool: CachePool,
        metadata: MetadataRows,
        *,
        model_hash: str,
        settings: Settings,
        bind_host: str,
        rank: int,
        bind_port: int = 0,
        advertised_port: int = 0,
        limits: Limits = NO_LIMITS,
        workers: Workers | None = None,
    ) -> None:
        security = Security.from_environment(self.role)
        security.check(bind_host, "listening on")
        workers = workers or Workers(self.role, settings, rank, pool.device)
        self.workers, self.rank, self.durations = workers, rank, workers.durations
        _check_pool(pool, workers.chunk_bytes)
        self._pool, self._metadata = pool, metadata
        out, table = Outgoing(), dict[bytes, Peer]()
        self.router = Router(workers, security, out, bind_host, bind_port, advertised_port)
        self.address = self.router.address
        self.segment = workers.make_segment()
        # without shared memory, the system commits these pages one by one as slots are first used
        slots_bytes = workers.settings.staging_bytes // workers.chunk_bytes * workers.chunk_bytes
        memory = self.segment.data if self.segment is not None else np.empty(slots_bytes, dtype=np.uint8)
        self._pinned = memory if pool.device.type == "cuda" else None
        if self._pinned is not None:
            try:
                pin(self._pinned)
            except RuntimeError:
                workers.io.free()
                if self.segment is not None:
                    self.segment.close()
                raise
        reserve = [] if self.segment is None else [self.segment.reserve]
        host, wake = workers.host_identity(), workers.work.notify
        self.lanes = Lanes(
            pool, Staging(memory, workers.chunk_bytes, *reserve), table, out, workers.counts,
            agent=workers.agent_id, host=host, chunk_bytes=workers.chunk_bytes, makers=workers.size,
            has_channel=self.router.listener.bound, wake=wake,
        )  # fmt: skip
        self.rooms = Rooms(
            workers.settings, self.lanes, table, out, workers.counts, drop=workers.drop, wake=wake, ended=self._log_end
        )  # fmt: skip
        self.sender = Sender(workers, self.router, self.rooms, self.lanes, pool)
        self.peers = Peers(
            table, self.rooms, workers, self.router.listener, out, pool, metadata, name=self.router.name,
            model_hash=model_hash, host=host, limits=limits, prepare=self.sender.prepare,
            segment=self.segment.announcement if self.segment is not None else None,
        )  # fmt: skip
        self.router.serve(self.peers, self.rooms)
        workers.start(self.sender.next_work, self._tick, self.router.say_goodbye, self._fail_all)

    def close(self) -> None:
        """End all threads and free sockets and staging; rooms that are still alive fail. May be called twice."""
        self.workers.close()
        if self._pinned is not None:
            unpin(self._pinned.ctypes.data)
            self._pinned = None
        if self.segment is not None:
            self.segment.close()

    def open_room(self, room_id: int, prompt_tokens: int = 0) -> None:
        """Open a room for a request of ``prompt_tokens`` tokens (0: not known).

        Requests that came earlier are bound to the room. The room fails at once if a decode rank aborted it earlier.

        Raises:
            TransferError: the room is open and has not ended, or its id is out of range.
        """
        check_room_id(room_id)
        with self.router.turn() as now:
            self.workers.check_alive()
            self.workers.check_closed(self.rooms.table, room_id)
            self.rooms.open(room_id, prompt_tokens, now)

    def note_idle(self) -> None:
        """Note that the scheduler has no request left whose room it could open. Called often, so it takes no lock."""
        self.rooms.caught_up(self.workers.io.now())

    def send(
        self,
        room_id: int,
        pages: np.ndarray,
        *,
        last: bool,
        metadata_row: int | None = None,
        num_tokens: int | None = None,
        after: Any = None,
    ) -> None:
        """Append rows to a room and send them as credit comes; does not block.

        Args:
            pages: page numbers, int32 ``[n]``, after those of earlier calls; they stay valid until the room ends.
            last: no more rows follow; ``metadata_row`` is copied now.
            metadata_row: row of the metadata buffers, with ``last``.
            num_tokens: tokens of this call, if its last page is not full.
            after: event (``wait``, ``synchronize``) of another stream that writes rows of this call.

        Raises:
            TransferError: unknown room, pages outside the pool, rows after the last, or no metadata row.
        """
        slots = self._pool.slots(pages, num_tokens)
        if last and metadata_row is None and self._metadata.buffers:
            raise TransferError(f"the last send of room {room_id} needs metadata_row; got None")
        metadata = self._metadata.read(metadata_row) if last and metadata_row is not None else b""
        ready, in_place = self.sender.reader.ready_events(after), self.sender.reader.in_place(slots)
        with self.router.turn() as now:
            self.workers.check_alive()
            room = self._open(room_id)
            if room.state.ended:
                return  # the scheduler learns from poll()
            if room.last:
                raise TransferError(f"room {room_id} got rows after its last send")
            self.rooms.send(room, Span(room.tokens, Slots(slots), ready, in_place), last, metadata, now)

    def decline(self, room_id: int, reason: str) -> None:
        """Tell the decode ranks that ask for a room why the scheduler refused its request."""
        self.open_room(room_id)
        self.abort(room_id, reason)
        self.close_room(room_id)

    def poll(self, room_id: int) -> RoomState:
        """Return the state of a room: BOOTSTRAPPING until every expected rank has asked, WAITING for rows,
        TRANSFERRING, SUCCESS when every rank has confirmed; FAILED (`failure`).
        """
        with self.workers.lock:
            return RoomState.FAILED if self.workers.death is not None else self._open(room_id).state

    def failure(self, room_id: int) -> str:
        """Return why a room failed, or nothing if it has not."""
        with self.workers.lock:
            return self.workers.death or self._open(room_id).reason

    def suspicion(self, room_id: int) -> str:
        """Return why this rank is about to give up a room that nobody has asked for, or nothing if it is not."""
        soon = self.workers.io.now() + 2 * self.workers.settings.heartbeat_s
        with self.workers.lock:
            return self.rooms.unwanted_reason(self._open(room_id), soon)

    def prefix_tokens(self, room_id: int) -> int:
        """Return how many tokens decode has cached, after which the pages of `send` start; 0 before any request."""
        with self.workers.lock:
            return next((asks.prefix_tokens for asks in self._open(room_id).messages if not asks.dummy), 0)

    def metric(self, room_id: int) -> TransferMetric:
        """Return the bytes sent to all ranks so far and the seconds from the first send to the confirmation."""
        with self.workers.lock:
            return self._metric(self._open(room_id))

    def _metric(self, room: Room) -> TransferMetric:
        return TransferMetric(
            wire_bytes=room.wire_bytes,
            shared_memory_bytes=room.shared_memory_bytes,
            seconds=seconds_since(room.first_send, room.ended or self.workers.io.now()),
            chunks=sum(destination.acked for destination in room.destinations),
            tokens=room.tokens,
            resent=sum(destination.resent for destination in room.destinations),
        )

    def abort(self, room_id: int, reason: str) -> None:
        """Fail a room and tell its decode ranks, unless it is unknown or has ended."""
        with self.router.turn() as now:
            room = self.rooms.table.get(room_id)
            if room is not None:
                self.rooms.fail(room, reason, now)

    def close_room(self, room_id: int) -> None:
        """Forget a room, and abort it if it has not ended."""
        with self.router.turn() as now:
            room = self.rooms.table.pop(room_id, None)
            if room is not None:
                self.rooms.fail(room, "closed by the prefill scheduler before it ended", now)

    def stats(self) -> AgentStats:
        with self.workers.lock:
            staging = self.lanes.staging
            staging.reap()
            return AgentStats(
                rooms=len(self.rooms.table) + len(self.rooms.early_requests),
                peers=len(self.peers.table),
                data_channels=self.router.listener.bound_channels,
                sealed_channels=self.router.listener.bound_channels if self.router.listener.sealed else 0,
                staging_used_bytes=staging.used_bytes,
                staging_limit_bytes=staging.limit_bytes,
                threads_alive=self.workers.alive,
                transfer_seconds=self.workers.transfer_seconds,
                **self.workers.counts,
            )

    def _open(self, room_id: int) -> Room:
        return self.workers.opened(self.rooms.table, room_id)

    def _tick(self) -> None:
        with self.router.turn() as now:
            self.peers.expire(now)
            self.rooms.expire(now)
            if self.lanes.staging.reap():
                self.workers.work.notify()

    def _fail_all(self, reason: str) -> None:
        with self.router.turn() as now:
            self.rooms.fail_all(reason, now)

    def _log_end(self, room: Room) -> None:
        metric = self._metric(room)
        if room.state is RoomState.SUCCESS:
            self.workers.took(metric.seconds)
        peers = [destination.peer.name for destination in room.destinations]
        after = round(seconds_since(room.last_send, room.ended or 0.0), 6)
        self.workers.log_transfer(room.room_id, room, peers, metric, after_prefill_seconds=after)


def _check_pool(pool: CachePool, chunk_bytes: int) -> None:
    """Refuse a pool that a prefill rank cannot have.

    Raises:
        TransferError: rows are not whole latents, or do not fit in a chunk; the message has widths and bytes.
    """
    row_bytes = (pool.latent_dim + pool.rope_dim) * pool.dtype.itemsize
    if any(width != pool.latent_dim for width in pool.widths) or row_bytes > chunk_bytes:
        raise TransferError(
            f"a prefill pool holds whole latents of {pool.latent_dim} values, got widths {set(pool.widths)}; one row "
            f"of {row_bytes} bytes must fit in a chunk of {chunk_bytes} (raise chunk_bytes, staging_bytes)"
        )
