"""Inside the decode agent: registration, credits, and what becomes of each chunk.

A chunk is written only under its room's ``writes`` lock while the room is alive, once, and acknowledged after
that; the metadata row is written after the last chunk, and only then does the room succeed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_tpla.config import Settings
from sglang_tpla.transfer import frames
from sglang_tpla.transfer.agent import Agent, endpoint, seconds_since
from sglang_tpla.transfer.chunks import Part
from sglang_tpla.transfer.projection import Projection
from sglang_tpla.transfer.receiving import Address, Arrival, Connection, Link, Room, Source
from sglang_tpla.transfer.registration import dtype_name
from sglang_tpla.transfer.rows import RowWriter
from sglang_tpla.transfer.types import CachePool, MetadataRows, RoomState, TransferError

WINDOW_CHUNKS = 8  # of one room in flight, where staging has room for several such rooms


class DecodeFetching(Agent):
    """State and message handling of `DecodeAgent`."""

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
        groups: int,
        logger: logging.Logger | None = None,
    ) -> None:
        super().__init__(settings, rank, size, logger)
        self._pool, self._metadata, self._projection, self._groups = pool, metadata, projection, groups
        first, widths = pool.first_layer, pool.widths
        if projection is not None and (
            projection.widths != widths
            or projection.first_layer != first
            or projection.latent_dim != pool.latent_dim
        ):
            raise TransferError(
                f"the projection is for layers {projection.first_layer}... with "
                f"d={projection.latent_dim}, widths "
                f"{projection.widths[:4]}..., the pool holds layers {first}... "
                f"with d={pool.latent_dim}, widths "
                f"{widths[:4]}...; use the artifact this server was started with"
            )
        self._shared = tuple(projection.shared) if projection is not None else widths
        self._writer = RowWriter(pool)
        self._hello = frames.Hello(
            versions=frames.PROTOCOL_VERSIONS,
            agent=self._agent_id,
            model_hash=model_hash,
            rank=rank,
            size=size,
            host="",
            max_chunk_bytes=self._chunk_bytes,
            layout=frames.CacheLayout(
                first_layer=first,
                latent_dim=pool.latent_dim,
                rope_dim=pool.rope_dim,
                dtype=dtype_name(pool),
                page_size=pool.page_size,
                widths=widths,
                shared=self._shared,
                metadata_bytes=metadata.item_bytes,
            ),
            projection=projection.content_hash if projection is not None else "",
            common=projection.common_hash if projection is not None else "",
        )
        self._rooms: dict[int, Room] = {}
        self._connections: dict[Address, Connection] = {}
        self._generation = time.time_ns()  # grows over restarts too
        self._arrivals: deque[Arrival] = deque()
        self._completed: deque[Room] = deque()
        self._hungry: OrderedDict[Source, Room] = (
            OrderedDict()
        )  # want more credit than they have, oldest first
        self._staging_used_bytes = 0
        window = max(2 * self._chunk_bytes, settings.staging_bytes // 8)
        self._window_bytes = min(window, WINDOW_CHUNKS * self._chunk_bytes, settings.staging_bytes)
        self.on_peer_lost: Callable[[str, int], None] | None = None
        self._start()

    # Connections

    def _connection(self, address: Address) -> Connection:
        """The connection to an address; a new one where there is none that can be used."""
        connection = self._connections.get(address)
        if connection is not None and connection.link is Link.REFUSED:
            if time.monotonic() - connection.last_seen <= self._settings.peer_timeout_s:
                return connection
            connection = None  # the server there may have changed: ask again
        if connection is None or connection.link is Link.LOST:
            connection = self._connections[address] = Connection(address, uuid.uuid4().bytes)
            self._io.post(self._dial, connection)
        return connection

    def _dial(self, connection: Connection) -> None:
        socket = self._io.context.socket(zmq.DEALER)
        self._configure(socket, max(self._chunk_bytes, frames.MAX_METADATA_BYTES) + frames.MAX_HEADER_BYTES)
        socket.setsockopt(zmq.IDENTITY, connection.identity)
        socket.setsockopt(zmq.IPV6, int(":" in connection.address[0]))
        connection.socket = socket
        connection.monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._io.add(connection.monitor, lambda monitor: self._disconnected(connection, monitor))
        self._io.add(socket, lambda _: self._receive(connection))
        try:
            socket.connect(endpoint(*connection.address))
        except zmq.ZMQError as error:
            self._give_up(connection, f"{connection.name} cannot be connected to: {error}")
            return
        connection.last_seen = time.monotonic()
        self._send_now(connection, self._hello, None)

    def _disconnected(self, connection: Connection, monitor: zmq.Socket) -> None:
        recv_monitor_message(monitor, zmq.NOBLOCK)
        self._give_up(
            connection, (f"the connection to the {connection.name} broke; the request can be retried")
        )

    def _give_up(self, connection: Connection, reason: str, link: Link = Link.LOST) -> None:
        """End a connection; its rooms fail. I/O thread only."""
        with self._lock:
            if connection.link in (Link.LOST, Link.REFUSED):
                return
            connection.link, connection.reason, connection.last_seen = link, reason, time.monotonic()
            self._counts["refused" if link is Link.REFUSED else "peers_lost"] += 1
            if link is Link.LOST and self._connections.get(connection.address) is connection:
                del self._connections[connection.address]
            rooms = [
                entry
                for entry in self._rooms.values()
                for source in entry.sources.values()
                if source.connection is connection and not source.dummy and not entry.state.ended
            ]
        self._log.warning("decode rank %d: %s", self._rank, reason)
        self._hang_up(connection)
        for entry in rooms:
            self._fail_from_io(entry, reason)
        if self.on_peer_lost is not None and link is Link.LOST:
            try:
                self.on_peer_lost(*connection.address)
            except Exception as error:
                self._handler_failed("on_peer_lost", error)

    def _hang_up(self, connection: Connection, linger_ms: int = 0) -> None:
        socket, connection.socket = connection.socket, None
        if socket is not None:
            if connection.monitor is not None:
                socket.disable_monitor()
                self._io.remove(connection.monitor)
                connection.monitor = None
            self._io.remove(socket, linger_ms)

    # Messages in (I/O thread)

    def _receive(self, connection: Connection) -> None:
        for _ in range(64):
            if connection.socket is None:
                return
            parts = self._receive_parts(connection.socket)
            if parts is None:
                return
            parsed = self._parse(parts, connection.name)
            if parsed is None:
                continue
            message, payload = parsed
            connection.last_seen = time.monotonic()
            try:
                self._handle(connection, message, payload)
            except Exception as error:
                self._handler_failed(f"message {type(message).__name__} from {connection.name}", error)
                with self._lock:
                    entry = self._rooms.get(getattr(message, "room", -1))
                if entry is not None and connection.address in entry.sources:
                    self._fail_from_io(entry, f"internal error on {type(message).__name__}: {error!r}")

    def _handle(self, connection: Connection, message: frames.Message, payload: zmq.Frame | None) -> None:
        match message:
            case frames.Chunk() if payload is not None:
                self._take_chunk(connection, message, payload)
            case frames.Pong():
                pass
            case frames.Want() | frames.Finish() | frames.Abort():
                with self._work:
                    entry = self._rooms.get(message.room)
                    source = entry.sources.get(connection.address) if entry is not None else None
                    if (
                        entry is None
                        or source is None
                        or entry.state.ended
                        or entry.generation != message.generation
                    ):
                        self._counts["late_dropped"] += 1
                        return
                if isinstance(message, frames.Abort):
                    if not source.dummy:
                        self._fail_from_io(entry, f"{connection.name}: {message.reason}")
                elif isinstance(message, frames.Finish) and payload is not None:
                    self._take_finish(entry, source, message, payload)
                elif isinstance(message, frames.Want):
                    with self._work:
                        source.wanted_bytes = max(source.wanted_bytes, message.total_bytes)
                        self._hungry.setdefault(source, entry)
                        self._grant()
            case frames.Welcome():
                if message.need_projection:
                    self._upload(connection)
                else:
                    self._registered(connection)
            case frames.Registered():
                self._registered(connection)
            case frames.Refused():
                self._give_up(connection, message.reason, Link.REFUSED)
            case frames.Unregistered():
                self._give_up(connection, f"the {connection.name} restarted; the request can be retried")
            case frames.Goodbye():
                self._give_up(connection, f"the {connection.name} closed: {message.reason}")
            case frames.Ping():
                self._send_now(connection, frames.Pong(message.number), None)
            case _:
                name = type(message).__name__
                self._drop("malformed_dropped", f"{name} is not for a decode rank ({connection.name})")

    def _upload(self, connection: Connection) -> None:
        if self._projection is None:
            self._give_up(connection, f"the {connection.name} asked for a projection where there is none")
            return
        key = self._projection.content_hash
        for index, data in enumerate(self._projection.layer_bytes):
            self._send_now(connection, frames.ProjectionLayer(key, index, frames.checksum(data)), data)

    def _registered(self, connection: Connection) -> None:
        with self._lock:
            connection.link = Link.REGISTERED
            for entry in list(self._rooms.values()):
                if connection.address in entry.sources:
                    self._advance(entry)

    def _take_chunk(self, connection: Connection, chunk: frames.Chunk, payload: zmq.Frame) -> None:
        size = payload.buffer.nbytes
        with self._work:
            entry = self._rooms.get(chunk.room)
            source = entry.sources.get(connection.address) if entry is not None else None
            if entry is None or source is None or entry.state.ended or entry.generation != chunk.generation:
                self._counts["late_dropped"] += 1
                return
            if chunk.sequence in source.applied or chunk.sequence in source.pending:
                self._counts["replays_dropped"] += 1
                return
            first = chunk.first_layer - self._pool.first_layer
            layers = range(first, first + chunk.layers)
            wrong = self._wrong_chunk(entry, source, chunk, layers, size)
            if not wrong:
                source.pending.add(chunk.sequence)
                source.received_bytes += size
                entry.wire_bytes += size
                entry.progress = time.monotonic()
                self._counts["wire_bytes"] += size
                self._arrivals.append(Arrival(entry, source, chunk, payload, size, layers))
                self._work.notify_all()
                return
            self._counts["malformed_dropped"] += 1
        self._fail_from_io(entry, f"{connection.name} sent chunk {chunk.sequence} {wrong}")

    def _wrong_chunk(self, entry: Room, source: Source, chunk: frames.Chunk, layers: range, size: int) -> str:
        if source.dummy or entry.requested is None:
            return "that was not asked for"
        if layers.start < 0 or layers.stop > len(self._pool.layers):
            return f"for layers {layers.start}...{layers.stop - 1} of {len(self._pool.layers)}"
        if chunk.part not in tuple(Part):
            return f"with unknown part {chunk.part}"
        if chunk.first_token + chunk.tokens > entry.slots.size:
            return f"for tokens up to {chunk.first_token + chunk.tokens} where pages hold {entry.slots.size}"
        expected = self._writer.payload_bytes(layers, chunk.tokens, self._shared, Part(chunk.part))
        if size != expected:
            return f"of {size} bytes where {expected} were due"
        if source.received_bytes + size > source.granted_bytes:
            return f"beyond its credit of {source.granted_bytes} bytes"
        return ""

    def _take_finish(self, entry: Room, source: Source, message: frames.Finish, payload: zmq.Frame) -> None:
        metadata = payload.bytes
        pages = -(-message.tokens // self._pool.page_size)
        wrong = ""
        if frames.checksum(metadata) != message.checksum:
            wrong = "metadata that does not match its checksum"
        elif metadata and len(metadata) != self._metadata.row_bytes:
            wrong = f"a metadata row of {len(metadata)} bytes where {self._metadata.row_bytes} were due"
        elif pages * self._pool.page_size != entry.slots.size or entry.num_tokens not in (-1, message.tokens):
            asked = (
                entry.num_tokens
                if entry.num_tokens >= 0
                else (f"{entry.slots.size} or a part of the last page")
            )
            wrong = f"{message.tokens} tokens where {asked} were asked for"
        if wrong:
            self._fail_from_io(entry, f"{source.connection.name} finished with {wrong}")
            return
        with self._work:
            source.chunks, source.tokens, source.metadata = message.chunks, message.tokens, metadata
            entry.progress = time.monotonic()
            self._completed.append(entry)
            self._work.notify_all()

    # Rooms

    def _advance(self, entry: Room) -> None:
        """Move a room on as far as its connections and its request allow. Under the lock."""
        if entry.state.ended:
            return
        real = [source for source in entry.sources.values() if not source.dummy]
        for source in real:
            if source.connection.link in (Link.REFUSED, Link.LOST):
                self._fail(entry, source.connection.reason)
                return
        ready = all(source.connection.link is Link.REGISTERED for source in real)
        if entry.state is RoomState.BOOTSTRAPPING and ready:
            entry.state = RoomState.WAITING
        if entry.requested is None:
            return
        if entry.state is RoomState.WAITING:
            entry.state = RoomState.TRANSFERRING
        for source in entry.sources.values():
            if not source.asked and source.connection.link is Link.REGISTERED:
                source.asked = True
                message = frames.Request(
                    entry.room,
                    entry.generation,
                    entry.expected_ranks,
                    entry.prefix_tokens,
                    entry.num_tokens,
                    source.dummy,
                )
                self._put(source.connection, message)

    def _fail_from_io(self, entry: Room, reason: str) -> None:
        """Fail a room without holding the agent's lock while a write ends."""
        entry.end_writes()
        with self._lock:
            if not entry.state.ended:
                self._fail(entry, reason)

    def _fail(self, entry: Room, reason: str) -> None:
        """Fail a room whose writes have ended (or that never had any) and tell its prefill ranks."""
        for source in entry.sources.values():
            if source.connection.link in (Link.REGISTERED, Link.CONNECTING):
                self._put(
                    source.connection, frames.Abort(entry.room, entry.generation, frames.sentence(reason))
                )
        self._end(entry, RoomState.FAILED, reason)
        self._counts["rooms_failed"] += 1

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
            seconds=round(seconds_since(entry.requested, entry.ended), 6),
            result="success" if state is RoomState.SUCCESS else reason,
            resent=entry.resent,
        )

    def _fail_all(self, reason: str) -> None:
        for entry in list(self._rooms.values()):
            if not entry.state.ended:
                entry.alive = False
                self._fail(entry, reason)

    def _grant(self) -> None:
        """Hand out staging, oldest wish first, a whole chunk's worth at a time. Under the lock."""
        granted: dict[Source, Room] = {}
        for source, entry in list(self._hungry.items()):
            while (missing := source.wanted_bytes - source.granted_bytes) > 0:
                quantum = min(self._chunk_bytes, missing)
                if source.outstanding_bytes + quantum > self._window_bytes:
                    break
                if self._staging_used_bytes + quantum > self._settings.staging_bytes:
                    break
                source.granted_bytes += quantum
                self._staging_used_bytes += quantum
                granted[source] = entry
            if missing <= 0:
                del self._hungry[source]
            elif self._staging_used_bytes + min(self._chunk_bytes, missing) > self._settings.staging_bytes:
                break  # the oldest waits for the next bytes that come free
        for source, entry in granted.items():
            self._put(source.connection, frames.Credit(entry.room, entry.generation, source.granted_bytes))

    # Writing (worker thread)

    def _work_once(self) -> bool:
        with self._work:
            if self._closing:
                return False
            if not self._arrivals and not self._completed:
                self._work.wait(0.5)
                return True
            arrival = self._arrivals.popleft() if self._arrivals else None
            entry = arrival.room if arrival is not None else self._completed.popleft()
        try:
            if arrival is not None:
                self._apply(arrival)
            self._complete(entry)
        except Exception as error:
            self._handler_failed(f"write of room {entry.room}", error)
            self._fail_from_io(entry, f"internal error while writing: {error!r}")
        return True

    def _apply(self, arrival: Arrival) -> None:
        entry, source, chunk = arrival.room, arrival.source, arrival.chunk
        payload = arrival.payload.buffer
        sound = frames.checksum(payload) == chunk.checksum
        written = False
        if sound:
            slots = entry.slots[chunk.first_token : chunk.first_token + chunk.tokens]
            with entry.writes:
                if entry.alive:
                    self._writer.write(arrival.layers, slots, self._shared, Part(chunk.part), payload)
                    written = True
        del payload
        with self._work:
            source.pending.discard(chunk.sequence)
            if entry.state.ended:
                self._counts["late_dropped"] += 1
                return
            self._staging_used_bytes -= arrival.size
            source.released_bytes += arrival.size
            if not sound:
                self._counts["checksum_failures"] += 1
                self._counts["resent"] += 1
                entry.resent += 1
                self._log.warning(
                    "decode rank %d: chunk %d of room %d came damaged from the %s; asking for it again",
                    self._rank,
                    chunk.sequence,
                    entry.room,
                    source.connection.name,
                )
                self._put(source.connection, frames.Nack(entry.room, entry.generation, chunk.sequence))
            elif written:
                source.applied.add(chunk.sequence)
                self._counts["chunks"] += 1
                self._put(source.connection, frames.Ack(entry.room, entry.generation, (chunk.sequence,)))
            self._grant()

    def _complete(self, entry: Room) -> None:
        """Write the metadata row and succeed, once every source is complete."""
        with self._work:
            if entry.state.ended or not all(source.complete for source in entry.sources.values()):
                return
            rows = [source.metadata for source in entry.sources.values() if source.metadata]
        with entry.writes:
            if not entry.alive:
                return
            if rows:
                self._metadata.write(entry.metadata_row, rows[-1])
            entry.alive = False  # all that was due has been written
        with self._work:
            if entry.state.ended:
                return
            for source in entry.sources.values():
                if not source.dummy:
                    self._put(source.connection, frames.Done(entry.room, entry.generation))
            self._end(entry, RoomState.SUCCESS, "")
            self._counts["rooms_succeeded"] += 1

    # Time, sending (I/O thread)

    def _tick(self) -> None:
        now = time.monotonic()
        limit, patience = self._settings.peer_timeout_s, self._settings.transfer_timeout_s
        with self._lock:
            connections = list(self._connections.values())
            late = [
                entry
                for entry in self._rooms.values()
                if not entry.state.ended and now - entry.progress > patience
            ]
        for connection in connections:
            if connection.link in (Link.REFUSED, Link.LOST) or connection.socket is None:
                continue
            if now - connection.last_seen > limit:
                did = "answer" if connection.link is Link.CONNECTING else "show a sign of life"
                self._give_up(connection, f"the {connection.name} did not {did} for {limit:g} s")
            elif (
                connection.link is Link.REGISTERED
                and now - connection.last_ping >= self._settings.heartbeat_s
            ):
                connection.last_ping = now
                connection.pings += 1
                self._send_now(connection, frames.Ping(connection.pings), None)
        for entry in late:
            self._fail_from_io(entry, f"no progress for {patience:g} s in {entry.state.name}")

    def _put(self, connection: Connection, message: frames.Message) -> None:
        """Queue a message; any thread."""
        self._io.post(self._send_now, connection, message, None)

    def _send_now(self, connection: Connection, message: frames.Message, payload: bytes | None) -> None:
        if connection.socket is None:
            return
        parts = [frames.encode(message)] + ([] if payload is None else [payload])
        try:
            connection.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            self._give_up(connection, f"the {connection.name} does not read; its queue is full")

    def _say_goodbye(self) -> None:
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            if connection.socket is not None:
                self._send_now(connection, frames.Goodbye(f"decode rank {self._rank} closes"), None)
                self._hang_up(connection, linger_ms=100)
