"""The states of rooms, and the effect of each event on them. Nothing waits and nothing is sent here: methods take
``now`` where they need the time, and leave messages in `Rooms.out` and rooms that may be complete in `Rooms.finishing`.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.chunks import layers_of
from sglang_tpla.transfer.decode.coverage import Coverage
from sglang_tpla.transfer.decode.credits import Credits
from sglang_tpla.transfer.decode.state import Address, AnyChunk, Connection, Link, RetainedChunk, Room, Source, chunk_id
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.room import OTHER_PROMPT, REFUSED, RoomState


class Rooms:
    """The rooms that the scheduler has opened and not closed. Any thread that holds the agent's lock may call.

    Args:
        pool: the pool that chunks must fit.
        metadata_bytes: the size that a metadata row must have.
        generation: the last generation in use; a restarted agent must begin with a higher one.
        free_slots: called when places of the shared segment are no longer in use.
        ended: called with each room that has ended, for the log.
    """

    def __init__(
        self,
        pool: CachePool,
        metadata_bytes: int,
        settings: Settings,
        credits: Credits,
        counts: Counter[str],
        generation: int,
        free_slots: Callable[[], Any],
        ended: Callable[[Room], None],
    ) -> None:
        self.table: dict[int, Room] = {}
        self.retained: dict[int, RetainedChunk] = {}  # by offset in the shared segment
        self.out: deque[tuple[Connection, messages.Message]] = deque()
        self.finishing: deque[Room] = deque()
        self._pool, self._metadata_bytes = pool, metadata_bytes
        self._settings, self._credits, self._counts = settings, credits, counts
        self._generation, self._free_slots, self._ended = generation, free_slots, ended

    # Calls of the scheduler

    def open(self, room_id: int, sources: dict[Address, Source], born: float, prompt_tokens: int, now: float) -> None:
        """Begin a new generation of a room."""
        self._generation += 1
        room = self.table[room_id] = Room(room_id, self._generation, sources, born, prompt_tokens, now)
        self.advance(room, now)

    def request(
        self, room: Room, slots: Slots, metadata_row: int, after: Any, request: messages.Request, now: float
    ) -> None:
        """Ask for a room's rows as soon as its prefill ranks have registered this one."""
        room.slots, room.metadata_row, room.after, room.request = slots, metadata_row, after, request
        pool = self._pool
        room.coverage = Coverage(len(pool.layers), len(slots), pool.part_items)
        room.requested = room.progress = now
        self.advance(room, now)

    def advance(self, room: Room, now: float) -> None:
        """Advance a room as far as its connections and its request allow."""
        if room.state.ended:
            return
        real = [source for source in room.sources.values() if not source.dummy]
        for source in real:
            connection, linked = source.connection, source.connection.link is Link.REGISTERED
            if connection.link in (Link.REFUSED, Link.LOST):
                self.fail(room, connection.lost_reason, now)
                return
            if linked and not source.asked and room.born < connection.began:
                # the other half of the request went to an earlier process or to none, so nobody would answer
                why = f"the {connection.name} started after this request came; the request can be retried"
                self.fail(room, why, now)
                return
            # a room that has asked may be written, and what is said of limits came before
            if linked and not source.asked and (wrong := connection.limits.unsupported_reason(room.prompt_tokens)):
                self.fail(room, f"the {connection.name} {REFUSED}{wrong}", now)
                return
        ready = all(source.connection.link is Link.REGISTERED for source in real)
        if room.state is RoomState.BOOTSTRAPPING and ready:
            room.state = RoomState.WAITING
        if room.request is None:
            return
        if room.state is RoomState.WAITING:
            room.state = RoomState.TRANSFERRING
        for source in room.sources.values():
            if not source.asked and source.connection.link is Link.REGISTERED and (ready or source.dummy):
                self._ask(room, source, real, now)

    def _ask(self, room: Room, source: Source, real: list[Source], now: float) -> None:
        source.asked = True
        if source.dummy:  # the room does not wait for a dummy and may have ended before a broken connection is back
            self.finishing.append(room)
            self._say(source.connection, _request_of(room, source), now)
            return
        # prefill ranks with the same layers hold the same rows and share the sending
        layers = source.connection.layers
        alike = sorted(other.connection.address for other in real if other.connection.layers == layers)
        source.share = (alike.index(source.connection.address), len(alike))
        self._put(source.connection, _request_of(room, source))

    # Events of connections

    def registered(self, connection: Connection, resumed: bool, now: float) -> None:
        """Advance the rooms of a connection that has registered, for the first time or again."""
        if resumed:
            self._resume(connection, now)
        for room in list(self.table.values()):
            if connection.address in room.sources:
                self.advance(room, now)

    def _resume(self, connection: Connection, now: float) -> None:
        """Resume the rooms of a connection that was broken."""
        self._counts["resumed"] += 1
        for message, when in connection.said:
            if now - when < 2 * self._settings.peer_timeout_s:  # the message may have been lost
                self._put(connection, message)
        self.release(connection)
        for room in self.table.values():
            source = room.sources.get(connection.address)
            if source is None or source.connection is not connection or room.state.ended or not source.asked:
                continue
            self._credits.void(source)
            self._put(connection, _request_of(room, source))
            parts = sorted({part for part, _ in source.applied})
            applied = tuple((part, _bitmap(source, part)) for part in parts)
            resume = messages.Resume(room.room_id, room.generation, source.granted_bytes, applied)
            self._put(connection, resume)
        self.grant()

    def forget(self, connection: Connection) -> None:
        """Drop the retained chunks and unconfirmed messages of a connection that is gone for good, after its rooms."""
        connection.said.clear()
        self.release(connection)
        # no dummy request goes there any more, which a room may have waited for
        for room in self.table.values():
            source = room.sources.get(connection.address)
            if source is not None and source.connection is connection and source.dummy:
                self.finishing.append(room)

    def of(self, connection: Connection) -> list[Room]:
        """Return the rooms that have not ended and want rows from a connection."""
        return [
            room
            for room in self.table.values()
            for source in room.sources.values()
            if source.connection is connection and not source.dummy and not room.state.ended
        ]

    def starved(self, connection: Connection) -> list[Room]:
        """Return the rooms that wait for rows from a connection."""
        return [
            room
            for room in self.of(connection)
            if (source := room.sources[connection.address]).wanted_bytes > source.received_bytes
        ]

    def uses(self, connection: Connection) -> bool:
        """Return whether a room waits for a connection, or a chunk of it is retained for the colocated ranks."""
        return any(kept.connection is connection for kept in self.retained.values()) or any(
            source.connection is connection and source.asked and not room.state.ended
            for room in self.table.values()
            for source in room.sources.values()
        )

    def live(self, connection: Connection, room_id: int, generation: int) -> tuple[Room, Source] | None:
        """Return the room that a message is about, and the connection's part in it; None after the room's end."""
        room = self.table.get(room_id)
        source = room.sources.get(connection.address) if room is not None else None
        if room is None or source is None or room.state.ended or room.generation != generation:
            return None
        return (room, source) if source.connection is connection else None

    # Events of chunks

    def wrong_chunk(self, room: Room, source: Source, chunk: AnyChunk, size_bytes: int, credit_bytes: int) -> str:
        """Return the error in a chunk. If there is none, claim the chunk's rows and return an empty string."""
        layers = layers_of(chunk)
        if source.dummy or room.coverage is None:
            return "that was not asked for"
        if layers.stop > len(self._pool.layers):
            return f"for layers {layers.start}...{layers.stop - 1} of {len(self._pool.layers)}"
        if chunk.part not in tuple(Part):
            return f"with unknown part {chunk.part}"
        if chunk.first_token + chunk.tokens > len(room.slots):
            end = chunk.first_token + chunk.tokens
            return f"for tokens up to {end} where pages hold {len(room.slots)}: {OTHER_PROMPT}"
        part = Part(chunk.part)
        expected = self._pool.payload_bytes(layers, chunk.tokens, part)
        if size_bytes != expected:
            return f"of {size_bytes} bytes where {expected} were due"
        if not self._credits.covers(source, credit_bytes):
            return f"beyond its credit of {source.granted_bytes} bytes"
        key = chunk_id(chunk)
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
        """Note a chunk that is arriving or has come, and is not in the pool yet. Use its credit up."""
        source.pending.add(chunk_id(chunk))
        self._credits.receive(source, credit_bytes)

    def came(self, room: Room, size_bytes: int, now: float, *, shared: bool = False) -> None:
        """Count a chunk that has come whole for the first time, or can be read in shared memory."""
        room.progress = now
        room.wire_bytes += size_bytes
        self._counts["wire_bytes"] += size_bytes
        if shared:
            room.shared_memory_bytes += size_bytes
            self._counts["shared_memory_bytes"] += size_bytes

    def abandon(self, source: Source, chunk: AnyChunk, credit_bytes: int) -> None:
        """Forget a chunk whose channel ended in the middle of it: the chunk comes again, and its credit is lost."""
        source.pending.discard(chunk_id(chunk))
        self._credits.unreceive(source, credit_bytes)

    def replay(self, room: Room, source: Source, chunk: AnyChunk, credit_bytes: int) -> None:
        """Acknowledge a chunk that came before, because the first Ack may have been lost; it is not written again."""
        self._counts["replays_dropped"] += 1
        if self._credits.covers(source, credit_bytes):
            self._credits.receive(source, credit_bytes)
            self._credits.free(source, credit_bytes)
        if (key := chunk_id(chunk)) in source.applied:
            self._put(source.connection, messages.Ack(room.room_id, room.generation, *key))
        self.grant()

    def written(
        self,
        room: Room,
        source: Source,
        chunk: AnyChunk,
        credit_bytes: int,
        digest: bytes | None,
        retained: RetainedChunk | None,
    ) -> bool:
        """Acknowledge a written chunk, or ask again for a damaged one, and free its credit. Return False if damaged.

        ``digest`` is the checksum of the written payload, or None if the room had ended.
        """
        sound, key = digest == chunk.checksum, chunk_id(chunk)
        source.pending.discard(key)
        if room.state.ended:
            self._counts["late_dropped"] += 1
            if retained is not None:
                retained.slot.pending = 0
            return True
        self._credits.free(source, credit_bytes, retained=retained is not None)
        if digest is not None and not sound:
            self._counts["checksum_failures"] += 1
            self._counts["resent"] += 1
            room.resent += 1
            self._put(source.connection, nack(chunk))
        elif digest is not None:
            source.applied.add(key)
            self._counts["chunks"] += 1
            answer: messages.Message = messages.Ack(room.room_id, room.generation, *key)
            if retained is not None:
                self.retained[retained.slot.offset] = retained
                answer = messages.Stored(room.room_id, room.generation, *key, retained.slot.offset)
            self._put(source.connection, answer)
        self.grant()
        return digest is None or sound

    def finish(self, room: Room, source: Source, message: messages.Finish, metadata: bytes, now: float) -> str:
        """Accept a prefill rank's number of chunks and its metadata row. Return the error in them, or nothing."""
        page_size = self._pool.page_size
        pages = -(-message.tokens // page_size)
        told = [other for other in room.sources.values() if other.chunks is not None and other.tokens != message.tokens]
        if room.request is None:
            return "rows that were not asked for"
        if messages.checksum(metadata) != message.checksum:
            return "metadata that does not match its checksum"
        if len(metadata) != self._metadata_bytes:
            return f"a metadata row of {len(metadata)} bytes where {self._metadata_bytes} were due"
        if pages * page_size != len(room.slots):
            asked = f"{len(room.slots)} or a part of the last page were asked for"
            return f"{message.tokens} tokens where {asked}: {OTHER_PROMPT}"
        if len(source.claims) > message.chunks:
            return f"{message.chunks} chunks after {len(source.claims)} had come"
        if told:
            return f"{message.tokens} tokens where the {told[0].connection.name} had {told[0].tokens}"
        if source.chunks is None:
            room.progress = now
        source.chunks, source.tokens, source.metadata = message.chunks, message.tokens, metadata
        self.finishing.append(room)
        return ""

    def want(self, room: Room, source: Source, total_bytes: int) -> None:
        """Note how many bytes a prefill rank has ready, and grant what staging allows."""
        self._credits.want(room, source, total_bytes)
        self.grant()

    def grant(self) -> None:
        """Hand out the free staging."""
        for source, room in self._credits.grant().items():
            self._put(source.connection, messages.Credit(room.room_id, room.generation, source.granted_bytes))

    def release(self, connection: Connection, offsets: Collection[int] | None = None) -> None:
        """Free retained chunks that nobody reads any more: all those of a connection, or those at ``offsets``."""
        self._free_retained(
            lambda kept: kept.connection is connection and (offsets is None or kept.slot.offset in offsets)
        )

    def _free_retained(self, unread: Callable[[RetainedChunk], bool]) -> None:
        freed = [offset for offset, kept in self.retained.items() if unread(kept)]
        for offset in freed:
            kept = self.retained.pop(offset)
            kept.slot.pending = 0
            self._credits.free_retained(kept.size_bytes)
        if freed:
            self._free_slots()
            self.grant()

    # Ends

    def succeed(self, room: Room, now: float) -> None:
        """End a room whose rows and metadata row have been written."""
        for source in room.sources.values():
            if not source.dummy:
                self._say(source.connection, messages.Done(room.room_id, room.generation), now)
        self._end(room, RoomState.SUCCESS, "", now)

    def fail(self, room: Room, reason: str, now: float) -> None:
        """Fail a room whose writes have ended, or that never had any, and tell its prefill ranks."""
        for source in room.sources.values():
            if source.connection.link in (Link.REGISTERED, Link.CONNECTING):
                message = messages.Abort(room.room_id, room.generation, messages.sentence(reason))
                self._say(source.connection, message, now)
        self._end(room, RoomState.FAILED, reason, now)
        self._counts["rooms_failed"] += 1
        self._free_retained(lambda kept: kept.room is room)

    def _end(self, room: Room, state: RoomState, reason: str, now: float) -> None:
        room.state, room.reason, room.ended = state, reason, now
        for source in room.sources.values():
            self._credits.end(source)
        self.grant()
        self._ended(room)

    # Time

    def expire(self, now: float) -> list[Room]:
        """Return the rooms whose time is up, and free chunks retained so long that their Release may be lost."""
        patience = self._settings.transfer_timeout_s
        self._free_retained(lambda kept: now - kept.since > patience)
        self._name_expected(now)
        return [room for room in self.table.values() if not room.state.ended and now - room.progress > patience]

    def _name_expected(self, now: float) -> None:
        """Tell prefill ranks which rooms wait for pages here, so that they give up others sooner."""
        waiting: dict[int, tuple[Connection, list[int]]] = {}
        for room in self.table.values():
            for source in room.sources.values():
                if not (source.asked or room.state.ended):
                    waiting.setdefault(id(source.connection), (source.connection, []))[1].append(room.room_id)
        for connection, rooms in waiting.values():
            due = now - connection.told_at >= self._settings.heartbeat_s
            if due and connection.link is Link.REGISTERED:
                connection.told_at = now
                for start in range(0, len(rooms), messages.MAX_ROOMS):
                    named = tuple(rooms[start : start + messages.MAX_ROOMS])
                    self._put(connection, messages.Expected(named))

    # Messages out

    def _say(
        self, connection: Connection, message: messages.Request | messages.Done | messages.Abort, now: float
    ) -> None:
        """Send a message that no answer confirms. `_resume` repeats it if the connection breaks soon."""
        connection.said.append((message, now))
        self._put(connection, message)

    def _put(self, connection: Connection, message: messages.Message) -> None:
        self.out.append((connection, message))


def nack(chunk: AnyChunk) -> messages.Nack:
    """Return the message that asks for a chunk again."""
    return messages.Nack(chunk.room, chunk.generation, *chunk_id(chunk))


def _request_of(room: Room, source: Source) -> messages.Request:
    assert room.request is not None
    index, count = source.share
    return msgspec.structs.replace(room.request, dummy=source.dummy, share_index=index, share_count=count)


def _bitmap(source: Source, part: int) -> bytes:
    """Return the applied chunks of a part as a bitmap."""
    sequences = [sequence for other, sequence in source.applied if other == part]
    bits = bytearray(max(sequences) // 8 + 1)
    for sequence in sequences:
        bits[sequence // 8] |= 1 << (sequence % 8)
    return bytes(bits)
