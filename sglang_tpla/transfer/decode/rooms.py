"""Inside the decode agent: the state of rooms, and what each event makes of it. Nothing waits and nothing is sent here:
methods take ``now`` where they need the time, and messages to prefill ranks are put into `Rooms.out`.

Everything runs under the agent's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.credits import Credits
from sglang_tpla.transfer.decode.state import (
    Address,
    Connection,
    Link,
    PoolShape,
    RetainedChunk,
    Room,
    Source,
    StagedChunk,
)
from sglang_tpla.transfer.room import RoomState

if TYPE_CHECKING:
    from sglang_tpla.transfer.decode.in_place import InPlaceChunk

AnyChunk = frames.Chunk | frames.Share


class Rooms:
    """Every room that the scheduler has opened and not closed.

    Args:
        shape: of the pool that chunks are for.
        free_slots: called when places of the arena are no longer in use.
        ended: told of every room that has, for the log.
    """

    def __init__(
        self,
        shape: PoolShape,
        settings: Settings,
        credits: Credits,
        counts: Counter[str],
        generation: int,
        free_slots: Callable[[], Any],
        ended: Callable[[Room], None],
    ) -> None:
        self.table: dict[int, Room] = {}
        self.retained: dict[int, RetainedChunk] = {}  # by offset in the arena
        self.out: list[tuple[Connection, frames.Message]] = []
        self._shape, self._settings, self._credits, self._counts = shape, settings, credits, counts
        self._generation = generation  # grows over restarts too
        self._free_slots, self._ended = free_slots, ended

    # What the scheduler does

    def open(
        self, room_id: int, sources: dict[Address, Source], born: float, prompt_tokens: int, now: float
    ) -> Room:
        """Begin a new generation of a room."""
        self._generation += 1
        room = self.table[room_id] = Room(room_id, self._generation, sources, born, prompt_tokens, now)
        self.advance(room, now)
        return room

    def advance(self, room: Room, now: float) -> bool:
        """Move a room on as far as its connections and its request allow; True where it may be complete."""
        if room.state.ended:
            return False
        real = [source for source in room.sources.values() if not source.dummy]
        for source in real:
            connection, linked = source.connection, source.connection.link is Link.REGISTERED
            if connection.link in (Link.REFUSED, Link.LOST):
                self.fail(room, connection.reason, now)
                return False
            if linked and not source.asked and room.born < connection.began:
                # its other half went to a process before, or to none, and nobody would answer until the deadline
                why = f"the {connection.name} started after this request came; the request can be retried"
                self.fail(room, why, now)
                return False
            if linked and (wrong := connection.limits.objection(room.prompt_tokens)):
                self.fail(room, f"the {connection.name} cannot serve this request: {wrong}", now)
                return False
        ready = all(source.connection.link is Link.REGISTERED for source in real)
        if room.state is RoomState.BOOTSTRAPPING and ready:
            room.state = RoomState.WAITING
        if room.requested is None:
            return False
        if room.state is RoomState.WAITING:
            room.state = RoomState.TRANSFERRING
        return self._ask(room, real, ready, now)

    def _ask(self, room: Room, real: list[Source], ready: bool, now: float) -> bool:
        asked_a_dummy = False
        for source in room.sources.values():
            linked = source.connection.link is Link.REGISTERED
            if source.asked or not linked or not (ready or source.dummy):
                continue
            source.asked = True
            # prefill ranks with the same layers hold the same rows and share the sending
            alike = sorted(
                other.connection.address
                for other in real
                if other.connection.layers == source.connection.layers
            )
            if not source.dummy:
                source.share = (alike.index(source.connection.address), len(alike))
            request = _request_message(room, source)
            self._put(source.connection, request)
            if source.dummy:  # the room does not wait for it, and may have ended when the connection is back
                source.connection.said.append((request, now))
                asked_a_dummy = True
        return asked_a_dummy

    # What connections do

    def resume(self, connection: Connection, now: float) -> None:
        """Go on with the rooms of a connection that was broken."""
        for message, when in connection.said:
            if now - when < 2 * self._settings.peer_timeout_s:  # it may have been lost
                self._put(connection, message)
        self.release([offset for offset, kept in self.retained.items() if kept.connection is connection])
        for room in self.table.values():
            source = room.sources.get(connection.address)
            if source is None or source.connection is not connection or room.state.ended or not source.asked:
                continue
            self._credits.void(source)
            self._put(connection, _request_message(room, source))
            parts = sorted({part for part, _ in source.applied})
            applied = tuple((part, _bitmap(source, part)) for part in parts)
            resume = frames.Resume(room.room_id, room.generation, source.granted_bytes, applied)
            self._put(connection, resume)
        self.grant()

    def of(self, connection: Connection) -> list[Room]:
        """Rooms that go on and want rows from a connection."""
        return [
            room
            for room in self.table.values()
            for source in room.sources.values()
            if source.connection is connection and not source.dummy and not room.state.ended
        ]

    def starved(self, connection: Connection) -> list[Room]:
        """Rooms that want rows that have not come over a connection."""
        return [
            room
            for room in self.of(connection)
            if (source := room.sources[connection.address]).wanted_bytes > source.received_bytes
        ]

    def uses(self, connection: Connection) -> bool:
        """Whether a room that is not complete waits for a connection, or something is kept for its neighbours."""
        return any(kept.connection is connection for kept in self.retained.values()) or any(
            source.connection is connection and source.asked and not room.state.ended
            for room in self.table.values()
            for source in room.sources.values()
        )

    def live(self, connection: Connection, room_id: int, generation: int) -> tuple[Room, Source] | None:
        """The room that a message of a connection is about, and the connection's part in it."""
        room = self.table.get(room_id)
        source = room.sources.get(connection.address) if room is not None else None
        if room is None or source is None or room.state.ended or room.generation != generation:
            return None
        return (room, source) if source.connection is connection else None

    # What chunks do

    def wrong_chunk(
        self, room: Room, source: Source, chunk: AnyChunk, size_bytes: int, credit_bytes: int
    ) -> str:
        """What is wrong with a chunk; if nothing is, its rows are its own from now on."""
        layers = self._shape.layers_of(chunk.first_layer, chunk.layers)
        if source.dummy or room.coverage is None:
            return "that was not asked for"
        if layers.start < 0 or layers.stop > self._shape.layers:
            return f"for layers {layers.start}...{layers.stop - 1} of {self._shape.layers}"
        if chunk.part not in tuple(Part):
            return f"with unknown part {chunk.part}"
        if chunk.first_token + chunk.tokens > len(room.slots):
            return f"for tokens up to {chunk.first_token + chunk.tokens} where pages hold {len(room.slots)}"
        part = Part(chunk.part)
        expected = self._shape.payload_bytes(layers, chunk.tokens, part)
        if size_bytes != expected:
            return f"of {size_bytes} bytes where {expected} were due"
        if source.received_bytes + credit_bytes > source.granted_bytes:
            return f"beyond its credit of {source.granted_bytes} bytes"
        key = (chunk.part, chunk.sequence)
        rows = (chunk.first_layer, chunk.layers, chunk.first_token, chunk.tokens)
        before = source.claims.get(key)
        if before is not None:
            return "" if before == rows else f"anew for other rows (layers, tokens: {rows} after {before})"
        if source.chunks is not None and len(source.claims) >= source.chunks:
            return f"beyond the {source.chunks} that it had announced"
        wrong = room.coverage.claim(layers, chunk.first_token, chunk.tokens, part)
        if not wrong:
            source.claims[key] = rows
        return wrong

    def begin(self, source: Source, chunk: AnyChunk, credit_bytes: int) -> None:
        """A chunk comes, or has come, and is not in its place yet."""
        source.pending.add((chunk.part, chunk.sequence))
        source.received_bytes += credit_bytes

    def arrived(self, room: Room, size_bytes: int, now: float) -> None:
        """A chunk that was not there before has come whole."""
        room.progress = now
        room.wire_bytes += size_bytes
        self._counts["wire_bytes"] += size_bytes

    def abandoned(self, source: Source, chunk: AnyChunk, size_bytes: int) -> None:
        """A channel ended in the middle of a chunk: it comes again, and its credit counts as lost with the channel."""
        source.pending.discard((chunk.part, chunk.sequence))
        source.received_bytes -= size_bytes

    def replay(self, room: Room, source: Source, chunk: AnyChunk, credit_bytes: int) -> None:
        """A chunk came that had come before: acknowledge it (that may have been lost), do not write it."""
        self._counts["replays_dropped"] += 1
        if source.received_bytes + credit_bytes <= source.granted_bytes:
            source.received_bytes += credit_bytes
            self._credits.free(source, credit_bytes)
        if (chunk.part, chunk.sequence) in source.applied:
            message = frames.Ack(room.room_id, room.generation, chunk.part, chunk.sequence)
            self._put(source.connection, message)
        self.grant()

    def account(
        self, arrival: StagedChunk | InPlaceChunk, digest: bytes | None, retained: RetainedChunk | None
    ) -> bool:
        """Acknowledge a chunk that was written, ask again for a damaged one, free its credit; False where it came
        damaged.

        ``digest`` is of what was written: None if the room had ended.
        """
        room, source, chunk = arrival.room, arrival.source, arrival.chunk
        sound, key = digest == chunk.checksum, (chunk.part, chunk.sequence)
        source.pending.discard(key)
        if room.state.ended:
            self._counts["late_dropped"] += 1
            if retained is not None:
                retained.slot.pending = 0
            return True
        self._credits.free(source, arrival.credit_bytes, retained=retained is not None)
        answer: frames.Message | None = None
        if digest is not None and not sound:
            self._counts["checksum_failures"] += 1
            self._counts["resent"] += 1
            room.resent += 1
            answer = nack(chunk)
        elif digest is not None:
            source.applied.add(key)
            self._counts["chunks"] += 1
            answer = frames.Ack(room.room_id, room.generation, *key)
            if retained is not None:
                self.retained[retained.slot.offset] = retained
                answer = frames.Stored(room.room_id, room.generation, *key, retained.slot.offset)
        if answer is not None:
            self._put(source.connection, answer)
        self.grant()
        return digest is None or sound

    def finish(self, room: Room, source: Source, message: frames.Finish, metadata: bytes, now: float) -> str:
        """A prefill rank says how many chunks there are in all; what is wrong with that."""
        page_size = self._shape.page_size
        pages = -(-message.tokens // page_size)
        told = [
            other
            for other in room.sources.values()
            if other.chunks is not None and other.tokens != message.tokens
        ]
        if room.coverage is None:
            return "rows that were not asked for"
        if frames.checksum(metadata) != message.checksum:
            return "metadata that does not match its checksum"
        if len(metadata) != self._shape.metadata_bytes:
            return f"a metadata row of {len(metadata)} bytes where {self._shape.metadata_bytes} were due"
        if pages * page_size != len(room.slots) or room.num_tokens not in (-1, message.tokens):
            part = f"{len(room.slots)} or a part of the last page"
            asked = room.num_tokens if room.num_tokens >= 0 else part
            return f"{message.tokens} tokens where {asked} were asked for"
        if len(source.claims) > message.chunks:
            return f"{message.chunks} chunks after {len(source.claims)} had come"
        if told:
            return f"{message.tokens} tokens where the {told[0].connection.name} had {told[0].tokens}"
        if source.chunks is None:
            room.progress = now
        source.chunks, source.tokens, source.metadata = message.chunks, message.tokens, metadata
        return ""

    def want(self, room: Room, source: Source, total_bytes: int) -> None:
        """A prefill rank has so many bytes ready."""
        self._credits.want(room, source, total_bytes)
        self.grant()

    def grant(self) -> None:
        """Hand out what staging has free."""
        for source, room in self._credits.grant().items():
            self._put(source.connection, frames.Credit(room.room_id, room.generation, source.granted_bytes))

    def release(self, offsets: Collection[int]) -> None:
        """Free places of the arena that nobody reads any more."""
        for offset in offsets:
            kept = self.retained.pop(offset)
            kept.slot.pending = 0
            self._credits.used_bytes -= kept.size_bytes
        if offsets:
            self._free_slots()
            self.grant()

    def release_of(self, connection: Connection, offsets: Collection[int] | None = None) -> None:
        """As `release`, of what came over one connection, whole or some of it."""
        wanted = self.retained if offsets is None else offsets
        self.release(
            [
                offset
                for offset in wanted
                if (kept := self.retained.get(offset)) is not None and kept.connection is connection
            ]
        )

    # Ends

    def succeed(self, room: Room, now: float) -> None:
        """All is in its place."""
        for source in room.sources.values():
            if not source.dummy:
                self._tell_end(source.connection, frames.Done(room.room_id, room.generation), now)
        self._end(room, RoomState.SUCCESS, "", now)

    def fail(self, room: Room, reason: str, now: float) -> None:
        """Fail a room whose writes have ended (or that never had any) and tell its prefill ranks."""
        for source in room.sources.values():
            if source.connection.link in (Link.REGISTERED, Link.CONNECTING):
                message = frames.Abort(room.room_id, room.generation, frames.sentence(reason))
                self._tell_end(source.connection, message, now)
        self._end(room, RoomState.FAILED, reason, now)
        self._counts["rooms_failed"] += 1
        self.release([offset for offset, kept in self.retained.items() if kept.room is room])

    def _end(self, room: Room, state: RoomState, reason: str, now: float) -> None:
        room.state, room.reason, room.ended = state, reason, now
        for source in room.sources.values():
            self._credits.end(source)
        self.grant()
        self._ended(room)

    # Time

    def expire(self, now: float) -> list[Room]:
        """Rooms whose time is up. What said that nobody reads a chunk in the arena any more may have been lost: such
        places are freed, and who reads them all the same asks again.
        """
        patience = self._settings.transfer_timeout_s
        self.release([offset for offset, kept in self.retained.items() if now - kept.since > patience])
        self._name_expected(now)
        return [
            room for room in self.table.values() if not room.state.ended and now - room.progress > patience
        ]

    def _name_expected(self, now: float) -> None:
        """Tell prefill ranks which rooms wait for pages here: they give up others sooner."""
        waiting: dict[int, tuple[Connection, list[int]]] = {}
        for room in self.table.values():
            for source in room.sources.values():
                due = now - source.connection.told_at >= self._settings.heartbeat_s
                if due and not (source.asked or room.state.ended):
                    waiting.setdefault(id(source.connection), (source.connection, []))[1].append(room.room_id)
        for connection, rooms in waiting.values():
            if connection.link is Link.REGISTERED:
                connection.told_at = now
                for start in range(0, len(rooms), frames.MAX_ROOMS):
                    named = tuple(rooms[start : start + frames.MAX_ROOMS])
                    self._put(connection, frames.Expected(named))

    # Messages out

    def _tell_end(self, connection: Connection, message: frames.Done | frames.Abort, now: float) -> None:
        """Say how a room ended; once more when the connection is back, if it breaks soon."""
        connection.said.append((message, now))
        self._put(connection, message)

    def _put(self, connection: Connection, message: frames.Message) -> None:
        self.out.append((connection, message))


def nack(chunk: AnyChunk) -> frames.Nack:
    """Ask for a chunk again."""
    return frames.Nack(chunk.room, chunk.generation, chunk.part, chunk.sequence)


def _request_message(room: Room, source: Source) -> frames.Request:
    return frames.Request(
        room=room.room_id,
        generation=room.generation,
        expected_ranks=room.expected_ranks,
        prefix_tokens=room.prefix_tokens,
        num_tokens=room.num_tokens,
        dummy=source.dummy,
        share_index=source.share[0],
        share_count=source.share[1],
    )


def _bitmap(source: Source, part: int) -> bytes:
    """Applied chunks of a part, a bit each."""
    sequences = [sequence for other, sequence in source.applied if other == part]
    bits = bytearray(max(sequences) // 8 + 1)
    for sequence in sequences:
        bits[sequence // 8] |= 1 << (sequence % 8)
    return bytes(bits)
