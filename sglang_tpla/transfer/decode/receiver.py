"""Inside the decode agent: worker threads write chunks into the pool, but for those that came there by themselves
(`landing`), and check them.

A chunk is written only while its room's `Writes` allow it, once, and acknowledged after that; the metadata row is
written after the last chunk, and only then does the room succeed. What is checked is what was written: a damaged
chunk does not count and is written over when it comes again, and one in an arena whose place was used anew meanwhile
fails the check.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.landing import PoolLanding
from sglang_tpla.transfer.decode.rooms import DecodeFetching
from sglang_tpla.transfer.decode.state import Arrival, Kept, Room
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import one_piece
from sglang_tpla.transfer.room import RoomState
from sglang_tpla.transfer.workers import seconds_since


class DecodeScattering(DecodeFetching):
    """The worker threads of `DecodeAgent`."""

    def _work_once(self) -> bool:
        with self._work:
            if self._closing:
                return False
            if not self._arrivals and not self._completed:
                self._work.wait(0.5)
                return True
            arrival = self._arrivals.popleft() if self._arrivals else None
            entry = arrival.room if arrival is not None else self._completed.popleft()
        with self._failing(entry):
            if isinstance(arrival, Arrival):
                self._apply(arrival)
            elif arrival is not None:
                self._settle(arrival)
            else:
                self._complete(entry)
        return True

    @contextmanager
    def _failing(self, entry: Room) -> Iterator[None]:
        """What goes wrong in here fails the room, and is reported."""
        try:
            yield
        except Exception as error:
            self._handler_failed(f"write of room {entry.room}", error)
            self._fail_from_io(entry, f"internal error while writing: {error!r}")

    def _apply(self, arrival: Arrival) -> None:
        entry, chunk = arrival.room, arrival.chunk
        slots = entry.slots.part(chunk.first_token, chunk.tokens)
        digest = None  # of what was written
        with entry.writes.one() as allowed:
            if allowed:
                part = Part(chunk.part)
                digest = self._writer.write(arrival.layers, slots, part, arrival.payload)
        if digest is not None and chunk.checksum == frames.OPENED:
            self._written(arrival, frames.OPENED)
        elif digest == b"":
            self._aside(partial(self._check, arrival))
        else:
            self._written(arrival, digest)

    def _check(self, arrival: Arrival) -> None:
        with self._failing(arrival.room):
            data = np.frombuffer(arrival.payload, dtype=np.uint8)
            self._written(arrival, check_pieces(one_piece(data)))

    def _written(self, arrival: Arrival, digest: bytes | None) -> None:
        """A chunk was written, with this checksum; with none, its room had ended."""
        chunk, sound = arrival.chunk, digest == arrival.chunk.checksum
        kept = self._keep(arrival) if sound and isinstance(chunk, frames.Chunk) and chunk.relay else None
        self._account(arrival, digest, kept)
        self._spares.give_back(arrival.payload)
        self._complete(arrival.room)

    def _landed(self, landing: PoolLanding) -> None:
        """A chunk is in the pool, or what came of it when its room had ended is nowhere (I/O thread)."""
        with self._work:
            if not landing.room.state.ended:
                self._count_arrival(landing.room, landing.size_bytes)
            if landing.aside:
                self._arrivals.append(landing)
                self._work.notify()
                return
        with self._failing(landing.room):
            self._settle(landing)

    def _settle(self, landing: PoolLanding) -> None:
        self._account(landing, landing.digest(), None)
        self._complete(landing.room)

    def _account(self, arrival: Arrival | PoolLanding, digest: bytes | None, kept: Kept | None) -> None:
        """Acknowledge a chunk that was written, ask again for a damaged one, free its credit.

        ``digest`` is of what was written: None if the room had ended.
        """
        entry, source, chunk = arrival.room, arrival.source, arrival.chunk
        sound = digest == chunk.checksum
        with self._work:
            key = (chunk.part, chunk.sequence)
            source.pending.discard(key)
            if entry.state.ended:
                self._counts["late_dropped"] += 1
                if kept is not None:
                    kept.slot.pending = 0
                return
            source.released_bytes += arrival.credit_bytes
            if kept is None:
                self._staging_used_bytes -= arrival.credit_bytes
            if digest is not None and not sound:
                self._damaged(arrival)
            elif digest is not None:
                source.applied.add(key)
                self._counts["chunks"] += 1
                if kept is not None:
                    self._kept[kept.slot.offset] = kept
                    stored = frames.Stored(entry.room, entry.generation, *key, kept.slot.offset)
                    self._put(source.connection, stored)
                else:
                    self._put(source.connection, frames.Ack(entry.room, entry.generation, *key))
            self._grant()

    def _keep(self, arrival: Arrival) -> Kept | None:
        """Copy a payload into the arena for the neighbours; None if there is no place for it."""
        if self._kept_slots is None:
            return None
        with self._lock:
            slot = self._kept_slots.take()
        if slot is None:
            return None
        size = arrival.payload.nbytes
        slot.buffer[:size] = np.frombuffer(arrival.payload, dtype=np.uint8)
        return Kept(arrival.room, arrival.source.connection, slot, size, time.monotonic())

    def _damaged(self, arrival: Arrival | PoolLanding) -> None:
        """Ask for a chunk again. Under the lock."""
        entry, chunk, connection = arrival.room, arrival.chunk, arrival.source.connection
        self._counts["checksum_failures"] += 1
        self._counts["resent"] += 1
        entry.resent += 1
        self._log.warning(
            "decode rank %d: chunk %d of room %d came damaged from the %s; asking for it again",
            self._rank,
            chunk.sequence,
            entry.room,
            connection.name,
        )
        self._put(connection, frames.Nack(entry.room, entry.generation, chunk.part, chunk.sequence))

    def _complete(self, entry: Room) -> None:
        """Write the metadata row and succeed, once every source is complete."""
        with self._work:
            if entry.state.ended or not all(source.complete for source in entry.sources.values()):
                return
            sending = [source for source in entry.sources.values() if not source.dummy]
            missing = (
                entry.coverage.missing(sending[0].tokens) if entry.coverage is not None else "never asked"
            )
        if missing:
            self._fail_from_io(entry, missing)
            return
        with entry.writes.one(last=True) as allowed:  # all else that was due has been written
            if not allowed:
                return
            if self._metadata.buffers:
                self._metadata.write(entry.metadata_row, sending[-1].metadata)
        with self._work:
            if entry.state.ended:
                return
            for source in entry.sources.values():
                if not source.dummy:
                    self._tell_end(source.connection, frames.Done(entry.room, entry.generation))
            self._end(entry, RoomState.SUCCESS, "")
            self._counts["rooms_succeeded"] += 1
            self._took(seconds_since(entry.requested, entry.ended))
