"""The decode side: one agent a rank, a DEALER socket for each prefill rank, and chunks into the paged pool.

The scheduler opens rooms and hands over pages; prefill ranks send what credit allows. The I/O thread keeps
frames in staging, the worker thread checks and scatters them (`scattering`). Public calls return
at once (`abort` and `close_room` wait for a write in progress, at most one chunk), from any thread, and raise
`TransferError` for misuse or when a thread of the agent has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from sglang_tpla.transfer.decode.coverage import Coverage
from sglang_tpla.transfer.decode.receiver import DecodeScattering
from sglang_tpla.transfer.decode.state import Link, Room, Source
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.room import AgentStats, TransferError, TransferMetric, check_room
from sglang_tpla.transfer.workers import seconds_since


class DecodeAgent(DecodeScattering):
    """Fetches latent caches for one decode rank.

    ``DecodeAgent(pool, metadata, projection, *, model_hash, settings, rank, size, groups, host_id=None,
    security=None, logger=None)``; ``host_id`` overrides what tells hosts apart;
    ``projection`` is None where the pool holds the whole latent. ``on_peer_lost(host, port)`` is called, from
    the I/O thread, once for each prefill rank whose connection breaks or that is given up: ask anew where it
    is.
    """

    def connect(self, host: str, port: int) -> None:
        """Register with a prefill rank unless that is done or under way; does not block."""
        with self._lock:
            self._check_alive()
            self._connection((host, port))

    def open_room(
        self,
        room: int,
        peers: Sequence[tuple[str, int, bool]],
        born: float | None = None,
        prompt_tokens: int = 0,
    ) -> None:
        """Begin a new generation of a room with prefill ranks ``(host, port, is_dummy)``; connects where
        needed.

        Args:
            born: when its request came (`time.monotonic`; None: now); it fails where a prefill rank began later.
            prompt_tokens: of the whole request (0: not known); it fails where a prefill rank cannot take as many.

        Raises:
            TransferError: no peers, all of them dummies, the room is open and has not ended, or its id is out of range.
        """
        check_room(room)
        with self._lock:
            self._check_alive()
            if all(dummy for _, _, dummy in peers):
                raise TransferError(f"room {room} needs a prefill rank that sends; got {list(peers)}")
            old = self._rooms.get(room)
            if old is not None and not old.state.ended:
                raise TransferError(
                    f"room {room} is open on decode rank {self._rank}; close it before opening it anew"
                )
            self._generation += 1
            now = time.monotonic()
            sources = {
                (host, port): Source(self._connection((host, port)), dummy) for host, port, dummy in peers
            }
            entry = self._rooms[room] = Room(
                room, self._generation, sources, now if born is None else born, prompt_tokens, now
            )
            self._advance(entry)

    def request(
        self,
        room: int,
        pages: np.ndarray,
        *,
        metadata_row: int,
        expected_ranks: int,
        prefix_tokens: int = 0,
        num_tokens: int | None = None,
    ) -> None:
        """Ask for a room's rows.

        Args:
            pages: where they go, int32 ``[n]``, after the cached prefix; the agent may write there until the
            room
                ends or is aborted or closed.
            metadata_row: row of the metadata buffers to fill, last.
            expected_ranks: how many decode ranks ask each prefill rank for this room.
            prefix_tokens: tokens that are cached here already and are not sent.
            num_tokens: tokens after the prefix, where the last page is not full; None to learn it from
            prefill.

        Raises:
            TransferError: unknown room, asked twice, or pages outside the pool.
        """
        slots = self._pool.slots(pages, None)
        self._pool.slots(pages, num_tokens)
        if self._metadata.buffers:
            self._metadata.check(metadata_row)
        with self._lock:
            self._check_alive()
            entry = self._open(room)
            if entry.requested is not None:
                raise TransferError(f"room {room} was asked for already on decode rank {self._rank}")
            entry.slots, entry.metadata_row, entry.expected_ranks = Slots(slots), metadata_row, expected_ranks
            entry.prefix_tokens, entry.num_tokens = prefix_tokens, -1 if num_tokens is None else num_tokens
            entry.coverage = Coverage(
                len(self._pool.layers), slots.size, self._part_items, self._pool.first_layer
            )
            entry.requested = entry.progress = time.monotonic()
            self._advance(entry)

    def suspicion(self, room: int) -> str:
        """Why this rank is about to give up a room: it has nothing to say before it does."""
        return ""

    def metric(self, room: int) -> TransferMetric:
        """Bytes received so far, and seconds from request to the end."""
        with self._lock:
            entry = self._open(room)
            return TransferMetric(
                wire_bytes=entry.wire_bytes,
                shared_memory_bytes=entry.shared_memory_bytes,
                seconds=seconds_since(entry.requested, entry.ended),
                chunks=sum(len(source.applied) for source in entry.sources.values()),
                tokens=max(source.tokens for source in entry.sources.values()),
                resent=entry.resent,
            )

    def abort(self, room: int, reason: str) -> None:
        """Fail a room and tell its prefill ranks; after the return nothing is written for it any more."""
        with self._lock:
            entry = self._rooms.get(room)
        if entry is None:
            return
        entry.writes.end()
        with self._lock:
            if not entry.state.ended:
                self._fail(entry, reason)

    def close_room(self, room: int) -> None:
        """Forget a room, aborting it if it has not ended; when it returns, nothing is written for it any
        more.
        """
        self.abort(room, "closed by the decode scheduler before it ended")
        with self._lock:
            self._rooms.pop(room, None)

    def stats(self) -> AgentStats:
        """Counters and gauges of now."""
        with self._lock:
            inboxes = [inbox for one in self._connections.values() if (inbox := one.inbox) and inbox.greeted]
            return AgentStats(
                rooms=len(self._rooms),
                peers=sum(connection.link is Link.REGISTERED for connection in self._connections.values()),
                data_channels=len(inboxes),
                sealed_channels=sum(inbox.sealed for inbox in inboxes),
                staging_used_bytes=self._staging_used_bytes,
                staging_limit_bytes=self._settings.staging_bytes,
                threads_alive=self._threads_alive,
                transfer_seconds=self._transfer_seconds,
                **self._counts,
            )
