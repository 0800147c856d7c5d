"""Inside the decode agent: rooms, credits, and what it does with each message about a room."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.connections import DecodeDialing
from sglang_tpla.transfer.decode.landing import PoolLanding
from sglang_tpla.transfer.decode.state import Arrival, Connection, Kept, Link, Room, Source
from sglang_tpla.transfer.room import RoomState
from sglang_tpla.transfer.workers import seconds_since

# Of one room in flight, where staging has room for several such rooms: more are on their way while one is acknowledged,
# and a chunk seldom fills the whole chunk's worth of credit that it was given.
MIN_WINDOW_CHUNKS, WINDOW_CHUNKS = 4, 8


class DecodeFetching(DecodeDialing):
    """Rooms of `DecodeAgent`."""

    def _prepare(self) -> None:
        self._rooms: dict[int, Room] = {}
        self._generation = time.time_ns()  # grows over restarts too
        self._arrivals: deque[Arrival | PoolLanding] = deque()
        self._completed: deque[Room] = deque()
        self._hungry: OrderedDict[Source, Room] = OrderedDict()  # want more than granted, oldest first
        self._kept: dict[int, Kept] = {}  # by offset in the arena
        self._staging_used_bytes = 0
        limit = self._settings.staging_bytes
        few, most = MIN_WINDOW_CHUNKS * self._chunk_bytes, WINDOW_CHUNKS * self._chunk_bytes
        self._window_bytes = min(max(few, limit // 8), most, max(2 * self._chunk_bytes, limit // 4))

    # Messages in (I/O thread)

    def _handle_room(
        self, connection: Connection, message: frames.Message, payload: memoryview | None
    ) -> None:
        if isinstance(message, frames.Release):
            with self._lock:
                offsets = [
                    offset
                    for offset in message.offsets
                    if (kept := self._kept.get(offset)) is not None and kept.connection is connection
                ]
                self._release(offsets)
            return
        if not isinstance(message, frames.Chunk | frames.Share | frames.Want | frames.Finish | frames.Abort):
            name = type(message).__name__
            self._drop("malformed_dropped", f"{name} is not for a decode rank ({connection.name})")
            return
        with self._lock:
            found = self._live_source(connection, message.room, message.generation)
            if found is None:
                self._counts["late_dropped"] += 1
                return
        entry, source = found
        match message:
            case frames.Abort():
                if not source.dummy:
                    self._fail_from_io(entry, f"{connection.name}: {message.reason}")
            case frames.Want():
                with self._lock:
                    source.wanted_bytes = max(source.wanted_bytes, message.total_bytes)
                    self._hungry.setdefault(source, entry)
                    self._grant()
                self._seek_channel(connection)
            case frames.Finish() if payload is not None:
                self._take_finish(entry, source, message, payload)
            case frames.Chunk() if payload is not None:
                self._take_chunk(entry, source, message, payload, payload.nbytes)
            case frames.Share():
                arena = connection.arenas.get(message.agent)
                end = message.offset + message.size_bytes
                if arena is None or end > arena.nbytes:
                    self._counts["checksum_failures"] += 1
                    self._put(connection, _nack(message))
                else:
                    self._take_chunk(entry, source, message, arena[message.offset : end], 0)

    def _live_source(self, connection: Connection, room: int, generation: int) -> tuple[Room, Source] | None:
        """The room that a message of a connection is about, and the connection's part in it. Under the lock."""
        entry = self._rooms.get(room)
        source = entry.sources.get(connection.address) if entry is not None else None
        if (
            entry is None
            or source is None
            or entry.state.ended
            or entry.generation != generation
            or source.connection is not connection
        ):
            return None
        return entry, source

    def _room_failed(
        self, connection: Connection, room: int, message: frames.Message, error: Exception
    ) -> None:
        with self._lock:
            entry = self._rooms.get(room)
        if entry is not None and connection.address in entry.sources:
            self._fail_from_io(entry, f"internal error on {type(message).__name__}: {error!r}")

    def _take_chunk(
        self,
        entry: Room,
        source: Source,
        chunk: frames.Chunk | frames.Share,
        payload: memoryview,
        credit_bytes: int,
    ) -> None:
        with self._work:
            if entry.state.ended:
                self._counts["late_dropped"] += 1
                return
            key = (chunk.part, chunk.sequence)
            if key in source.applied or key in source.pending:
                self._take_replay(entry, source, chunk, credit_bytes)
                return
            layers = self._layers_of(chunk)
            wrong = self._wrong_chunk(
                entry, source, chunk, layers, payload.nbytes, credit_bytes
            ) or self._claim(entry, source, chunk, layers)
            if not wrong:
                source.pending.add(key)
                source.received_bytes += credit_bytes
                self._count_arrival(entry, payload.nbytes)
                if not credit_bytes:
                    entry.shared_memory_bytes += payload.nbytes
                    self._counts["shared_memory_bytes"] += payload.nbytes
                self._arrivals.append(Arrival(entry, source, chunk, payload, credit_bytes, layers))
                self._work.notify()
                return
            self._counts["malformed_dropped"] += 1
        self._fail_from_io(entry, f"{source.connection.name} sent chunk {chunk.sequence} {wrong}")

    def _layers_of(self, chunk: frames.Chunk | frames.Share) -> range:
        """Layers of a chunk, by index in the pool."""
        first = chunk.first_layer - self._pool.first_layer
        return range(first, first + chunk.layers)

    def _count_arrival(self, entry: Room, size_bytes: int) -> None:
        entry.progress = time.monotonic()
        entry.wire_bytes += size_bytes
        self._counts["wire_bytes"] += size_bytes

    def _place(self, connection: Connection, chunk: frames.Chunk, size_bytes: int) -> PoolLanding | None:
        """A chunk lands in the pool if nothing is wrong with it and nobody else needs its payload."""
        key = (chunk.part, chunk.sequence)
        with self._lock:
            found = self._live_source(connection, chunk.room, chunk.generation)
            if found is None or chunk.relay:
                return None
            entry, source = found
            if key in source.applied or key in source.pending:
                return None
            layers = self._layers_of(chunk)
            if self._wrong_chunk(entry, source, chunk, layers, size_bytes, size_bytes):
                return None
            spans = entry.slots.spans(chunk.first_token, chunk.tokens)
            pieces = self._writer.pieces(layers, spans, Part(chunk.part))
            if pieces is None or self._claim(entry, source, chunk, layers):
                return None
            source.pending.add(key)
            source.received_bytes += size_bytes
            more = source.received_bytes < source.wanted_bytes  # the last one would only wait for its check
            return PoolLanding(entry, source, chunk, pieces, more and self._checks_aside)

    def _abandon(self, landing: PoolLanding) -> None:
        """A channel ended in the middle of a chunk: it comes again, and its credit counts as lost with the channel."""
        source, chunk = landing.source, landing.chunk
        with self._lock:
            source.pending.discard((chunk.part, chunk.sequence))
            source.received_bytes -= landing.size_bytes

    def _take_replay(
        self, entry: Room, source: Source, chunk: frames.Chunk | frames.Share, credit_bytes: int
    ) -> None:
        """A chunk that came before: acknowledge it (that may have been lost), do not write it."""
        self._counts["replays_dropped"] += 1
        if source.received_bytes + credit_bytes <= source.granted_bytes:
            source.received_bytes += credit_bytes
            source.released_bytes += credit_bytes
            self._staging_used_bytes -= credit_bytes
        if (chunk.part, chunk.sequence) in source.applied:
            message = frames.Ack(entry.room, entry.generation, chunk.part, chunk.sequence)
            self._put(source.connection, message)
        self._grant()

    def _wrong_chunk(
        self,
        entry: Room,
        source: Source,
        chunk: frames.Chunk | frames.Share,
        layers: range,
        size: int,
        credit_bytes: int,
    ) -> str:
        if source.dummy or entry.requested is None:
            return "that was not asked for"
        if layers.start < 0 or layers.stop > len(self._pool.layers):
            return f"for layers {layers.start}...{layers.stop - 1} of {len(self._pool.layers)}"
        if chunk.part not in tuple(Part):
            return f"with unknown part {chunk.part}"
        if chunk.first_token + chunk.tokens > len(entry.slots):
            return f"for tokens up to {chunk.first_token + chunk.tokens} where pages hold {len(entry.slots)}"
        expected = self._writer.payload_bytes(layers, chunk.tokens, Part(chunk.part))
        if size != expected:
            return f"of {size} bytes where {expected} were due"
        if source.received_bytes + credit_bytes > source.granted_bytes:
            return f"beyond its credit of {source.granted_bytes} bytes"
        return ""

    def _claim(self, entry: Room, source: Source, chunk: frames.Chunk | frames.Share, layers: range) -> str:
        """What is wrong with the rows that a chunk says it has: no other has them, and it has the same each time."""
        assert entry.coverage is not None
        key = (chunk.part, chunk.sequence)
        rows = (chunk.first_layer, chunk.layers, chunk.first_token, chunk.tokens)
        before = source.claims.get(key)
        if before is not None:
            return "" if before == rows else f"anew for other rows (layers, tokens: {rows} after {before})"
        if source.chunks is not None and len(source.claims) >= source.chunks:
            return f"beyond the {source.chunks} that it had announced"
        wrong = entry.coverage.claim(layers, chunk.first_token, chunk.tokens, Part(chunk.part))
        if not wrong:
            source.claims[key] = rows
        return wrong

    def _part_items(self, layer: int, part: Part) -> int:
        """Items of one part of a row of a layer."""
        return self._pool.row_format.layers[layer].part_items(part)

    def _take_finish(self, entry: Room, source: Source, message: frames.Finish, payload: memoryview) -> None:
        metadata = bytes(payload)
        pages = -(-message.tokens // self._pool.page_size)
        wrong = ""
        if frames.checksum(metadata) != message.checksum:
            wrong = "metadata that does not match its checksum"
        elif len(metadata) != self._metadata.row_bytes:
            wrong = f"a metadata row of {len(metadata)} bytes where {self._metadata.row_bytes} were due"
        elif pages * self._pool.page_size != len(entry.slots) or entry.num_tokens not in (-1, message.tokens):
            part = f"{len(entry.slots)} or a part of the last page"
            asked = entry.num_tokens if entry.num_tokens >= 0 else part
            wrong = f"{message.tokens} tokens where {asked} were asked for"
        elif len(source.claims) > message.chunks:
            wrong = f"{message.chunks} chunks after {len(source.claims)} had come"
        elif told := [
            s for s in entry.sources.values() if s.chunks is not None and s.tokens != message.tokens
        ]:
            wrong = f"{message.tokens} tokens where the {told[0].connection.name} had {told[0].tokens}"
        if wrong:
            self._fail_from_io(entry, f"{source.connection.name} finished with {wrong}")
            return
        with self._work:
            if source.chunks is None:
                entry.progress = time.monotonic()
            source.chunks, source.tokens, source.metadata = message.chunks, message.tokens, metadata
            self._completed.append(entry)
            self._work.notify()

    # Rooms

    def _starved(self, connection: Connection) -> list[Room]:
        with self._lock:
            return [
                entry
                for entry in self._rooms.values()
                for source in entry.sources.values()
                if source.connection is connection
                and not entry.state.ended
                and source.wanted_bytes > source.received_bytes
            ]

    def _in_use(self, connection: Connection) -> bool:
        with self._lock:
            return any(kept.connection is connection for kept in self._kept.values()) or any(
                source.connection is connection and source.asked and not entry.state.ended
                for entry in self._rooms.values()
                for source in entry.sources.values()
            )

    def _resume(self, connection: Connection) -> None:
        """Go on with the rooms of a connection that was broken. Under the lock."""
        now = time.monotonic()
        for message, when in connection.said:
            if now - when < 2 * self._settings.peer_timeout_s:  # it may have been lost
                self._put(connection, message)
        self._release([offset for offset, kept in self._kept.items() if kept.connection is connection])
        for entry in list(self._rooms.values()):
            source = entry.sources.get(connection.address)
            if source is None or source.connection is not connection or entry.state.ended or not source.asked:
                continue
            self._hungry.pop(source, None)
            lost = source.granted_bytes - source.received_bytes  # sent and lost, or never sent
            self._staging_used_bytes -= lost
            source.granted_bytes = source.wanted_bytes = source.received_bytes
            self._put(connection, self._request_message(entry, source))
            parts = sorted({part for part, _ in source.applied})
            applied = tuple((part, _bitmap(source, part)) for part in parts)
            resume = frames.Resume(entry.room, entry.generation, source.granted_bytes, applied)
            self._put(connection, resume)
        self._grant()

    def _link_up(self, connection: Connection) -> None:
        for entry in list(self._rooms.values()):
            if connection.address in entry.sources:
                self._advance(entry)

    def _advance(self, entry: Room) -> None:
        """Move a room on as far as its connections and its request allow. Under the lock."""
        if entry.state.ended:
            return
        real = [source for source in entry.sources.values() if not source.dummy]
        for source in real:
            if source.connection.link in (Link.REFUSED, Link.LOST):
                self._fail(entry, source.connection.reason)
                return
            connection, linked = source.connection, source.connection.link is Link.REGISTERED
            if linked and not source.asked and entry.born < connection.began:
                # its other half went to a process before, or to none, and nobody would answer until the deadline
                why = f"the {connection.name} started after this request came; the request can be retried"
                self._fail(entry, why)
                return
            if linked and (wrong := connection.limits.objection(entry.prompt_tokens)):
                self._fail(entry, f"the {connection.name} cannot serve this request: {wrong}")
                return
        ready = all(source.connection.link is Link.REGISTERED for source in real)
        if entry.state is RoomState.BOOTSTRAPPING and ready:
            entry.state = RoomState.WAITING
        if entry.requested is None:
            return
        if entry.state is RoomState.WAITING:
            entry.state = RoomState.TRANSFERRING
        for source in entry.sources.values():
            linked = source.connection.link is Link.REGISTERED
            if not source.asked and linked and (ready or source.dummy):
                source.asked = True
                # prefill ranks with the same layers hold the same rows and share the sending
                alike = sorted(
                    other.connection.address
                    for other in real
                    if other.connection.layers == source.connection.layers
                )
                if not source.dummy:
                    source.share = (alike.index(source.connection.address), len(alike))
                request = self._request_message(entry, source)
                self._put(source.connection, request)
                if (
                    source.dummy
                ):  # the room does not wait for it, and may have ended when the connection is back
                    source.connection.said.append((request, time.monotonic()))
                    self._completed.append(entry)
                    self._work.notify()

    def _request_message(self, entry: Room, source: Source) -> frames.Request:
        return frames.Request(
            room=entry.room,
            generation=entry.generation,
            expected_ranks=entry.expected_ranks,
            prefix_tokens=entry.prefix_tokens,
            num_tokens=entry.num_tokens,
            dummy=source.dummy,
            share_index=source.share[0],
            share_count=source.share[1],
        )

    def _fail_from_io(self, entry: Room, reason: str) -> None:
        """Fail a room without holding the agent's lock while a write ends."""
        entry.writes.end()
        with self._lock:
            if not entry.state.ended:
                self._fail(entry, reason)

    def _fail(self, entry: Room, reason: str) -> None:
        """Fail a room whose writes have ended (or that never had any) and tell its prefill ranks."""
        for source in entry.sources.values():
            if source.connection.link in (Link.REGISTERED, Link.CONNECTING):
                message = frames.Abort(entry.room, entry.generation, frames.sentence(reason))
                self._tell_end(source.connection, message)
        self._end(entry, RoomState.FAILED, reason)
        self._counts["rooms_failed"] += 1
        self._release([offset for offset, kept in self._kept.items() if kept.room is entry])

    def _end(self, entry: Room, state: RoomState, reason: str) -> None:
        entry.state, entry.reason, entry.ended = state, reason, time.monotonic()
        for source in entry.sources.values():
            self._hungry.pop(source, None)
            self._staging_used_bytes -= source.outstanding_bytes
            source.released_bytes = source.granted_bytes
        self._grant()
        self._log_transfer(
            room=entry.room,
            peer=[source.connection.name for source in entry.sources.values() if not source.dummy],
            tokens=max(source.tokens for source in entry.sources.values()),
            chunks=sum(len(source.applied) for source in entry.sources.values()),
            bytes=entry.wire_bytes,
            shared_memory_bytes=entry.shared_memory_bytes,
            seconds=round(seconds_since(entry.requested, entry.ended), 6),
            result="success" if state is RoomState.SUCCESS else reason,
            resent=entry.resent,
        )

    def _fail_all(self, reason: str) -> None:
        for entry in list(self._rooms.values()):
            if not entry.state.ended:
                entry.writes.end()
                self._fail(entry, reason)

    def _drop_rooms(self, connection: Connection, reason: str) -> None:
        with self._lock:
            rooms = [
                entry
                for entry in self._rooms.values()
                for source in entry.sources.values()
                if source.connection is connection and not source.dummy and not entry.state.ended
            ]
        for entry in rooms:
            self._fail_from_io(entry, reason)
        with self._lock:
            self._release([offset for offset, kept in self._kept.items() if kept.connection is connection])

    def _release(self, offsets: list[int]) -> None:
        """Free places of the arena that nobody reads any more. Under the lock."""
        for offset in offsets:
            kept = self._kept.pop(offset)
            kept.slot.pending = 0
            self._staging_used_bytes -= kept.size_bytes
        if offsets and self._kept_slots is not None:
            self._kept_slots.reap()
            self._grant()

    def _grant(self) -> None:
        """Hand out staging, oldest wish first, a whole chunk's worth at a time. Under the lock."""
        granted: dict[Source, Room] = {}
        limit = self._settings.staging_bytes
        for source, entry in list(self._hungry.items()):
            missing = source.wanted_bytes - source.granted_bytes
            if missing > 0 and 2 * source.outstanding_bytes > self._window_bytes:
                continue  # several chunks' worth at once, later: each message has a price
            while (missing := source.wanted_bytes - source.granted_bytes) > 0:
                quantum = min(self._chunk_bytes, missing)
                if source.outstanding_bytes + quantum > self._window_bytes:
                    break
                if self._staging_used_bytes + quantum > limit:
                    break
                source.granted_bytes += quantum
                self._staging_used_bytes += quantum
                granted[source] = entry
            if missing <= 0:
                del self._hungry[source]
            elif self._staging_used_bytes + min(self._chunk_bytes, missing) > limit:
                break  # the oldest waits for the next bytes that come free
        for source, entry in granted.items():
            self._put(source.connection, frames.Credit(entry.room, entry.generation, source.granted_bytes))

    # Time (I/O thread)

    def _name_expected(self, now: float) -> None:
        """Tell prefill ranks which rooms wait for pages here: they give up others sooner. Under the lock."""
        waiting: dict[int, tuple[Connection, list[int]]] = {}
        for entry in self._rooms.values():
            for source in entry.sources.values():
                due = now - source.connection.told_at >= self._settings.heartbeat_s
                if due and not (source.asked or entry.state.ended):
                    waiting.setdefault(id(source.connection), (source.connection, []))[1].append(entry.room)
        for connection, rooms in waiting.values():
            if connection.link is Link.REGISTERED:
                connection.told_at = now
                for start in range(0, len(rooms), frames.MAX_ROOMS):
                    self._put(connection, frames.Expected(tuple(rooms[start : start + frames.MAX_ROOMS])))

    def _tick(self) -> None:
        now = time.monotonic()
        patience = self._settings.transfer_timeout_s
        with self._lock:
            late = [
                entry
                for entry in self._rooms.values()
                if not entry.state.ended and now - entry.progress > patience
            ]
            # what said that nobody reads these any more was lost; who does all the same asks for them again
            self._release([offset for offset, kept in self._kept.items() if now - kept.since > patience])
            self._name_expected(now)
        self._expire_connections(now)
        for entry in late:
            self._fail_from_io(entry, f"no progress for {patience:g} s in {entry.state.name}")


def _bitmap(source: Source, part: int) -> bytes:
    """Applied chunks of a part, a bit each."""
    sequences = [sequence for other, sequence in source.applied if other == part]
    bits = bytearray(max(sequences) // 8 + 1)
    for sequence in sequences:
        bits[sequence // 8] |= 1 << (sequence % 8)
    return bytes(bits)


def _nack(chunk: frames.Chunk | frames.Share) -> frames.Nack:
    return frames.Nack(chunk.room, chunk.generation, chunk.part, chunk.sequence)
