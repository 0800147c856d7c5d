"""The prefill side: one agent a rank, a ROUTER socket, and chunks out of the latent pool.

The scheduler opens rooms and hands over pages; decode ranks ask for rooms and grant credit. The I/O thread
answers and sends (`greeting`, `serving`), the worker thread gathers, projects and checksums (`dispatch`).
Public calls return at once, from any thread, and raise `TransferError` for misuse or when a thread of the
agent has ended.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.prefill.sender import PrefillDispatch
from sglang_tpla.transfer.prefill.state import Room, Segment
from sglang_tpla.transfer.room import AgentStats, RoomState, TransferError, TransferMetric, check_room
from sglang_tpla.transfer.workers import seconds_since


class PrefillAgent(PrefillDispatch):
    """Serves one prefill rank's latent cache to decode ranks.

    ``PrefillAgent(pool, metadata, *, model_hash, settings, bind_host, rank, size, bind_port=0, advertised_port=0,
    host_id=None, security=None, logger=None)``; listens on ``address`` (a port that the system chose, where
    ``bind_port`` is 0) from construction to `close`. Data channels come to the port after ``bind_port``, which decode
    ranks reach at ``advertised_port`` + 1, if that is given.
    """

    def open_room(self, room: int, prompt_tokens: int = 0) -> None:
        """The scheduler has created a sender for ``room``, of a request with so many tokens (0: not known).

        Requests that came earlier are bound to it; if a decode rank aborted it earlier, it fails at once.

        Raises:
            TransferError: the room is open and has not ended, or its id is out of range.
        """
        check_room(room)
        with self._work:
            self._check_alive()
            old = self._rooms.get(room)
            if old is not None and not old.state.ended:
                raise TransferError(
                    f"room {room} is open on prefill rank {self._rank}; close it before opening it anew"
                )
            if old is not None:
                self._forget(old)
            entry = self._rooms[room] = Room(room, now := self._io.now(), prompt_tokens, now, now)
            self._last_opened = now
            held = self._held.pop(room, {})
            aborted = self._take_aborted(entry, held)
            for ask in held.values():
                ask.peer.held_requests -= 1
                self._bind(entry, ask)
            if aborted:
                self._fail(entry, aborted)

    def send(
        self,
        room: int,
        pages: np.ndarray,
        *,
        last: bool,
        metadata_row: int | None = None,
        num_tokens: int | None = None,
        after: Any = None,
    ) -> None:
        """Append rows to a room and send them as credit comes; does not block.

        Args:
            pages: page numbers, int32 ``[n]``, after those of earlier calls; they stay valid until the room
            ends. last: no more rows follow; ``metadata_row`` is copied now. metadata_row: row of the metadata
            buffers, with ``last``. num_tokens: tokens of this call, where its last page is not full.
            after: event (``wait``, ``synchronize``) of another stream that writes rows of this call.

        Raises:
            TransferError: unknown room, pages outside the pool, rows after the last, or no metadata row.
        """
        slots = self._pool.slots(pages, num_tokens)
        if last and metadata_row is None and self._metadata.buffers:
            raise TransferError(f"the last send of room {room} needs metadata_row; got None")
        metadata = self._metadata.read(metadata_row) if last and metadata_row is not None else b""
        ready, in_place = self._reader.ready_events(after), self._reader.in_place(slots)
        with self._work:
            self._check_alive()
            entry = self._open(room)
            if entry.state.ended:
                return  # the scheduler learns from poll()
            if entry.last:
                raise TransferError(f"room {room} got rows after its last send")
            segment = Segment(entry.tokens, Slots(slots), ready, in_place)
            entry.segments.append(segment)
            entry.tokens += slots.size
            entry.progress = self._io.now()
            entry.first_send = entry.first_send or entry.progress
            entry.last_send = entry.progress if last else None
            entry.last, entry.metadata = last, metadata
            for plan in entry.plans:
                plan.extend(self._pool, segment)
            if entry.complete:
                entry.state = RoomState.TRANSFERRING
            self._proceed(entry)
            self._conclude(entry)

    def decline(self, room: int, reason: str) -> None:
        """The scheduler refused a request: decode ranks that speak of its room are told why."""
        self.open_room(room)
        self.abort(room, reason)
        self.close_room(room)

    def suspicion(self, room: int) -> str:
        """Why this rank is about to give up a room that nobody has asked for; empty if it is not."""
        with self._lock:
            entry = self._open(room)
            soon = self._io.now() + 2 * self._settings.heartbeat_s
            return "" if entry.state.ended or entry.asks else self._unwanted(entry, soon)

    def prefix_tokens(self, room: int) -> int:
        """Tokens that decode has cached already; pages given to `send` start after them. 0 before any
        request.
        """
        with self._lock:
            return next((ask.prefix_tokens for ask in self._open(room).asks.values() if not ask.dummy), 0)

    def metric(self, room: int) -> TransferMetric:
        """Bytes on the wire to all ranks so far, and seconds from first send to confirmation."""
        with self._lock:
            entry = self._open(room)
            return TransferMetric(
                wire_bytes=entry.wire_bytes,
                shared_memory_bytes=entry.shared_memory_bytes,
                seconds=seconds_since(entry.first_send, entry.ended or self._io.now()),
                chunks=sum(stream.acked for stream in entry.streams),
                tokens=entry.tokens,
                resent=sum(stream.resent for stream in entry.streams),
            )

    def abort(self, room: int, reason: str) -> None:
        """Fail a room and tell its decode ranks; nothing for an unknown or ended one."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is not None and not entry.state.ended:
                self._fail(entry, reason)

    def close_room(self, room: int) -> None:
        """Forget a room; one that has not ended is aborted first."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is None:
                return
            if not entry.state.ended:
                self._fail(entry, "closed by the prefill scheduler before it ended")
            self._forget(entry)

    def stats(self) -> AgentStats:
        """Counters and gauges of now."""
        with self._lock:
            self._staging.reap()
            return AgentStats(
                rooms=len(self._rooms) + len(self._held),
                peers=len(self._peers),
                data_channels=self._doorway.bound_channels,
                staging_used_bytes=self._staging.used_bytes,
                staging_limit_bytes=self._staging.limit_bytes,
                threads_alive=self._threads.alive,
                transfer_seconds=self._threads.transfer_seconds,
                **self._counts,
            )
