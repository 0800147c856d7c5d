"""Inside the prefill agent: what it does with each message, and how the worker picks and makes chunks."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zmq

from sglang_tpla.config import Settings
from sglang_tpla.transfer import frames
from sglang_tpla.transfer.agent import Agent, endpoint, seconds_since
from sglang_tpla.transfer.chunks import Part
from sglang_tpla.transfer.projection import IDENTITY_HASH
from sglang_tpla.transfer.registration import agreed_version, mismatch
from sglang_tpla.transfer.rows import RowReader
from sglang_tpla.transfer.sending import Ask, Peer, Plan, Room, SenderProjection, Stream, Upload
from sglang_tpla.transfer.staging import Slot, Staging
from sglang_tpla.transfer.types import CachePool, MetadataRows, RoomState, TransferError

MAX_HELD_REQUESTS = 16384  # of one peer, for rooms that the scheduler has not opened
MAX_REMEMBERED = 65536  # ends and aborts of rooms, oldest forgotten first
MAX_PROJECTIONS = 64
MAX_PEERS = 4096


@dataclass(eq=False)
class Job:
    """One chunk to make, and the streams that take it."""

    plan: Plan
    sequence: int
    streams: list[Stream]
    slot: Slot


class PrefillServing(Agent):
    """State and message handling of `PrefillAgent`."""

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
        size: int,
        bind_port: int = 0,
        logger: logging.Logger | None = None,
    ) -> None:
        super().__init__(settings, rank, size, logger)
        self._pool, self._metadata, self._model_hash = pool, metadata, model_hash
        row_bytes = (pool.latent_dim + pool.rope_dim) * pool.dtype.itemsize
        if any(width != pool.latent_dim for width in pool.widths) or row_bytes > self._chunk_bytes:
            raise TransferError(
                f"a prefill pool holds whole latents of {pool.latent_dim} values, "
                f"got widths {set(pool.widths)}; one "
                f"row of {row_bytes} bytes must fit in a chunk of {self._chunk_bytes} "
                "(raise chunk_bytes, staging_bytes)"
            )
        self._reader = RowReader(pool)
        self._staging = Staging(settings.staging_bytes, self._chunk_bytes, pinned=pool.device.type == "cuda")
        self._rooms: dict[int, Room] = {}
        self._held: dict[int, dict[bytes, Ask]] = {}
        self._aborted: OrderedDict[tuple[int, str], tuple[int, str, float]] = OrderedDict()
        self._ended: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._peers: OrderedDict[bytes, Peer] = OrderedDict()
        d, layers = pool.latent_dim, len(pool.layers)
        self._projections = {
            IDENTITY_HASH: SenderProjection(IDENTITY_HASH, (d,) * layers, (d,) * layers, None)
        }
        self._router = self._io.context.socket(zmq.ROUTER)
        self._configure(self._router, frames.MAX_PROJECTION_BYTES)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.IPV6, int(":" in bind_host))
        try:
            self._router.bind(endpoint(bind_host, bind_port or "*"))
        except zmq.ZMQError as error:
            self._io.context.destroy(linger=0)
            raise TransferError(
                f"cannot listen on {bind_host}:{bind_port or '*'}: {error}; set the host of this server"
            ) from error
        port = int(self._router.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self.address: tuple[str, int] = (bind_host, port)
        self._io.add(self._router, self._receive)
        self._start()

    # Messages in (I/O thread)

    def _receive(self, socket: zmq.Socket) -> None:
        for _ in range(64):  # then let the posted sends have a turn
            parts = self._receive_parts(socket)
            if parts is None:
                return
            identity = parts[0].bytes
            sender = f"peer {identity.hex()[:8]}"
            parsed = self._parse(parts[1:], sender)
            if parsed is None:
                continue
            message, payload = parsed
            with self._work:
                peer = self._peers.get(identity)
                try:
                    self._handle(identity, peer, message, payload)
                except Exception as error:
                    self._handler_failed(f"message {type(message).__name__} from {sender}", error)
                    entry = self._rooms.get(getattr(message, "room", -1))
                    if entry is not None and identity in entry.asks and not entry.state.ended:
                        self._fail(entry, f"internal error on {type(message).__name__}: {error!r}")

    def _handle(
        self, identity: bytes, peer: Peer | None, message: frames.Message, payload: zmq.Frame | None
    ) -> None:
        if isinstance(message, frames.Hello):
            self._greet(identity, message)
            return
        if peer is None:
            self._drop(
                "unknown_peer", (f"{type(message).__name__} from unregistered peer {identity.hex()[:8]}")
            )
            self._put(identity, frames.Unregistered())
            return
        peer.last_seen = time.monotonic()
        match message:
            case frames.Ping():
                self._put(identity, frames.Pong(message.number))
            case frames.ProjectionLayer() if payload is not None:
                self._take_layer(peer, message, payload)
            case frames.Request():
                self._take_request(peer, message)
            case frames.Abort():
                self._take_abort(peer, message)
            case frames.Credit() | frames.Ack() | frames.Nack() | frames.Done():
                stream = self._stream(peer, message.room, message.generation)
                if stream is None:
                    self._counts["late_dropped"] += 1
                else:
                    self._take_progress(stream, message)
            case frames.Goodbye():
                self._lose(peer, f"closed: {message.reason}")
            case frames.Pong():
                pass
            case _:
                self._drop(
                    "malformed_dropped", (f"{type(message).__name__} is not for a prefill rank ({peer.name})")
                )

    def _greet(self, identity: bytes, hello: frames.Hello) -> None:
        reason = mismatch(hello, self._pool, self._metadata, self._model_hash)
        if reason is None and identity not in self._peers and len(self._peers) >= MAX_PEERS:
            reason = f"peers: this rank serves at most {MAX_PEERS}; close unused decode servers"
        if reason is not None:
            self._counts["refused"] += 1
            text = (
                f"prefill rank {self._rank} at {self.address[0]}:{self.address[1]} "
                f"refused decode rank {hello.rank}: "
            )
            self._log.warning("%s", text + reason)
            self._put(identity, frames.Refused(frames.sentence(text + reason)))
            return
        if (old := self._peers.get(identity)) is not None:
            self._lose(old, "registered anew")
        peer = Peer(identity, hello, time.monotonic())
        key = hello.projection or IDENTITY_HASH
        peer.projection = self._projections.get(key)
        self._peers[identity] = peer
        if peer.projection is None:
            layout = hello.layout
            head = (
                f"projection {layout.first_layer} {layout.latent_dim} "
                f"{tuple(layout.widths)} {tuple(layout.shared)}"
            )
            peer.upload = Upload(layout, hashlib.sha256(head.encode()))
        version = agreed_version(hello.versions)
        assert version is not None
        self._put(identity, frames.Welcome(version, self._agent_id, peer.projection is None))

    def _take_layer(self, peer: Peer, message: frames.ProjectionLayer, payload: zmq.Frame) -> None:
        upload, layout = peer.upload, peer.hello.layout
        if (
            upload is None
            or message.projection != peer.hello.projection
            or message.index != upload.next_index
        ):
            self._drop(
                "malformed_dropped", (f"projection layer {message.index} of {peer.name} was not expected")
            )
            return
        width = layout.widths[message.index]
        data = payload.buffer
        if data.nbytes != layout.latent_dim * width * 4 or frames.checksum(data) != message.checksum:
            self._refuse(
                peer, (f"projection layer {message.index} came damaged or with a wrong size; connect again")
            )
            return
        upload.digest.update(data)
        upload.next_index += 1
        if layout.first_layer + message.index in range(
            self._pool.first_layer, self._pool.first_layer + len(self._pool.layers)
        ):
            values = np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(layout.latent_dim, width)
            upload.kept.append(torch.from_numpy(values).to(self._pool.device))
        if upload.next_index < len(layout.widths):
            return
        peer.upload = None
        key = peer.hello.projection
        if upload.digest.hexdigest() != key:
            self._refuse(
                peer,
                (f"the projection does not have the hash {key[:12]} it was announced with; connect again"),
            )
            return
        if key not in self._projections:
            self._drop_unused_projections()
            if len(self._projections) > MAX_PROJECTIONS:
                self._refuse(
                    peer,
                    (f"this rank keeps at most {MAX_PROJECTIONS} projections; close unused decode servers"),
                )
                return
            start = self._pool.first_layer - layout.first_layer
            stop = start + len(self._pool.layers)
            self._projections[key] = SenderProjection(
                key, tuple(layout.widths[start:stop]), tuple(layout.shared[start:stop]), upload.kept
            )
        peer.projection = self._projections[key]
        self._put(peer.identity, frames.Registered(key))

    def _drop_unused_projections(self) -> None:
        used = {peer.hello.projection for peer in self._peers.values()} | {IDENTITY_HASH}
        for key in [key for key in self._projections if key not in used]:
            del self._projections[key]

    def _refuse(self, peer: Peer, reason: str) -> None:
        self._counts["refused"] += 1
        self._log.warning("prefill rank %d refused %s: %s", self._rank, peer.name, reason)
        self._put(peer.identity, frames.Refused(frames.sentence(reason)))
        self._lose(peer, reason)

    def _take_request(self, peer: Peer, message: frames.Request) -> None:
        if peer.projection is None:
            self._drop(
                "malformed_dropped", (f"request for room {message.room} before registration of {peer.name}")
            )
            return
        ask = Ask(
            peer,
            message.generation,
            message.expected_ranks,
            message.prefix_tokens,
            message.num_tokens,
            message.dummy,
            time.monotonic(),
        )
        if message.generation <= self._ended.get((message.room, peer.hello.agent), -1):
            self._counts["replays_dropped"] += 1
            return
        entry = self._rooms.get(message.room)
        if entry is not None and not entry.state.ended:
            old = entry.asks.get(peer.identity)
            if old is None:
                self._bind(entry, ask)
                return
            if old.generation >= message.generation:
                self._counts["replays_dropped"] += 1
                return
            self._fail(entry, f"{peer.name} asked for the room anew (generation {message.generation})")
        if peer.held_requests >= MAX_HELD_REQUESTS:
            text = (
                f"{peer.name} has {MAX_HELD_REQUESTS} requests for rooms that no prefill request has opened"
            )
            self._put(peer.identity, frames.Abort(message.room, message.generation, text))
            return
        held = self._held.setdefault(message.room, {})
        if (earlier := held.get(peer.identity)) is not None and earlier.generation >= message.generation:
            self._counts["replays_dropped"] += 1
            return
        peer.held_requests += earlier is None
        held[peer.identity] = ask

    def _take_abort(self, peer: Peer, message: frames.Abort) -> None:
        key = (message.room, peer.hello.agent)
        if message.generation <= self._ended.get(key, -1):
            return
        reason = f"aborted by {peer.name}: {message.reason}"
        held = self._held.get(message.room, {})
        ask = held.get(peer.identity)
        if ask is not None and ask.generation <= message.generation:
            del held[peer.identity]
            peer.held_requests -= 1
            if not held:
                del self._held[message.room]
        entry = self._rooms.get(message.room)
        if entry is not None and not entry.state.ended:
            bound = entry.asks.get(peer.identity)
            if bound is None or bound.generation <= message.generation:
                self._remember_end(key, message.generation)
                self._fail(entry, reason, but=peer)
                return
        _remember(self._aborted, key, (message.generation, reason, time.monotonic()))

    def _take_progress(
        self, stream: Stream, message: frames.Credit | frames.Ack | frames.Nack | frames.Done
    ) -> None:
        entry = stream.room
        entry.progress = time.monotonic()
        match message:
            case frames.Credit():
                stream.credit_bytes = max(stream.credit_bytes, message.total_bytes)
            case frames.Ack():
                for sequence in message.sequences:
                    if sequence in stream.unacked:
                        stream.unacked.discard(sequence)
                        stream.acked += 1
                    else:
                        self._counts["replays_dropped"] += 1
                self._staging.reap()
            case frames.Nack():
                if message.sequence not in stream.unacked:
                    self._counts["replays_dropped"] += 1
                    return
                stream.unacked.discard(message.sequence)
                self._resend(stream, message.sequence)
            case frames.Done():
                if stream.finish_sent and not stream.unacked:
                    stream.confirmed = True
                    self._conclude(entry)
                else:
                    self._fail(entry, f"{stream.peer.name} confirmed chunks that were not sent")
        self._work.notify_all()

    def _resend(self, stream: Stream, sequence: int) -> None:
        stream.resend.append(sequence)
        stream.resent += 1
        stream.resend_bytes += stream.plan.rectangles[sequence].payload_bytes
        self._counts["resent"] += 1
        if stream.resent > max(8, len(stream.plan.rectangles)):
            self._fail(
                stream.room, (f"{stream.peer.name} got too many damaged chunks ({stream.resent} resent)")
            )
            return
        self._offer(stream)

    # Rooms (under the lock)

    def _stream(self, peer: Peer, room: int, generation: int) -> Stream | None:
        entry = self._rooms.get(room)
        ask = entry.asks.get(peer.identity) if entry is not None and not entry.state.ended else None
        return ask.stream if ask is not None and ask.generation == generation else None

    def _bind(self, entry: Room, ask: Ask) -> None:
        """Give a room a decode rank's request."""
        expected = entry.expected_ranks
        entry.asks[ask.peer.identity] = ask
        entry.progress = time.monotonic()
        real = [other for other in entry.asks.values() if not other.dummy]
        if expected is not None and expected != ask.expected_ranks:
            self._fail(entry, f"decode ranks disagree on how many ask: {expected} and {ask.expected_ranks}")
        elif len(entry.asks) > ask.expected_ranks:
            self._fail(
                entry, (f"{len(entry.asks)} decode ranks asked where {ask.expected_ranks} were expected")
            )
        elif len({other.prefix_tokens for other in real}) > 1:
            found = sorted({other.prefix_tokens for other in real})
            self._fail(entry, f"decode ranks disagree on the cached prefix: {found} tokens")
        if entry.state.ended:
            return
        if not ask.dummy:
            ask.stream = self._new_stream(entry, ask)
            self._offer(ask.stream)
        if entry.complete:
            entry.state = RoomState.TRANSFERRING if entry.segments else RoomState.WAITING
            self._conclude(entry)
        self._work.notify_all()

    def _new_stream(self, entry: Room, ask: Ask) -> Stream:
        projection = ask.peer.projection
        assert projection is not None
        limit = min(self._chunk_bytes, ask.peer.hello.max_chunk_bytes)
        key = (projection.content_hash, Part.FULL, limit)
        plan = entry.plans.get(key)
        if plan is None:
            plan = entry.plans[key] = Plan(projection, Part.FULL, limit)
            for segment in entry.segments:
                plan.extend(self._pool, segment)
        return Stream(entry, ask.peer, ask.generation, plan)

    def _offer(self, stream: Stream) -> None:
        """Announce a stream's bytes and queue it for the worker; finish it if there is nothing left."""
        if stream.peek() is not None:
            stream.peer.ready[stream.room.room] = stream
            self._put(
                stream.peer.identity,
                frames.Want(stream.room.room, stream.generation, stream.wanted_bytes),
            )
        self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        entry = stream.room
        if entry.last and not stream.finish_sent and stream.next == len(stream.plan.rectangles):
            stream.finish_sent = True
            message = frames.Finish(
                entry.room,
                stream.generation,
                len(stream.plan.rectangles),
                entry.tokens,
                frames.checksum(entry.metadata),
            )
            self._put(stream.peer.identity, message, entry.metadata)

    def _conclude(self, entry: Room) -> None:
        """SUCCESS, once every rank that gets data has confirmed."""
        if entry.state.ended or not entry.complete or not entry.last:
            return
        if all(stream.confirmed for stream in entry.streams):
            self._end(entry, RoomState.SUCCESS, "")
            self._counts["rooms_succeeded"] += 1

    def _fail(self, entry: Room, reason: str, but: Peer | None = None) -> None:
        """Fail a room and tell its decode ranks (but the one that asked for it)."""
        for ask in entry.asks.values():
            if ask.peer is not but and ask.peer.identity in self._peers:
                self._put(
                    ask.peer.identity, frames.Abort(entry.room, ask.generation, frames.sentence(reason))
                )
        self._end(entry, RoomState.FAILED, reason)
        self._counts["rooms_failed"] += 1

    def _end(self, entry: Room, state: RoomState, reason: str) -> None:
        entry.state, entry.reason, entry.ended = state, reason, time.monotonic()
        for ask in entry.asks.values():
            self._remember_end((entry.room, ask.peer.hello.agent), ask.generation)
            if ask.peer.ready.get(entry.room) is ask.stream:
                ask.peer.ready.pop(entry.room, None)
        entry.segments.clear()
        streams = entry.streams
        self._log_transfer(
            room=entry.room,
            peer=[stream.peer.name for stream in streams],
            tokens=entry.tokens,
            chunks=sum(stream.acked for stream in streams),
            bytes=entry.wire_bytes,
            seconds=round(seconds_since(entry.first_send, entry.ended), 6),
            result="success" if state is RoomState.SUCCESS else reason,
            resent=sum(stream.resent for stream in streams),
        )

    def _forget(self, entry: Room) -> None:
        if self._rooms.get(entry.room) is entry:
            del self._rooms[entry.room]

    def _fail_all(self, reason: str) -> None:
        for entry in list(self._rooms.values()):
            if not entry.state.ended:
                self._fail(entry, reason)
        self._held.clear()

    def _take_aborted(self, entry: Room, held: dict[bytes, Ask]) -> str:
        """The reason of an abort that came before this room was opened; each is used once."""
        newest = {ask.peer.hello.agent: ask.generation for ask in held.values()}
        found = ""
        for key in [key for key in self._aborted if key[0] == entry.room]:
            generation, reason, _ = self._aborted.pop(key)
            self._remember_end(key, generation)
            if newest.get(key[1], -1) <= generation:
                found = reason
        return found

    def _remember_end(self, key: tuple[int, str], generation: int) -> None:
        _remember(self._ended, key, max(generation, self._ended.get(key, -1)))

    # Peers and time (I/O thread)

    def _lose(self, peer: Peer, reason: str) -> None:
        """Forget a connection; its rooms fail."""
        if self._peers.pop(peer.identity, None) is None:
            return
        for room in [room for room, asks in self._held.items() if peer.identity in asks]:
            del self._held[room][peer.identity]
            if not self._held[room]:
                del self._held[room]
        for entry in list(self._rooms.values()):
            if peer.identity in entry.asks and not entry.state.ended:
                stream = entry.asks[peer.identity].stream
                if stream is None or not stream.confirmed:
                    self._fail(entry, f"{peer.name} was lost: {reason}")

    def _tick(self) -> None:
        now = time.monotonic()
        limit, patience = self._settings.peer_timeout_s, self._settings.transfer_timeout_s
        with self._work:
            for peer in list(self._peers.values()):
                if now - peer.last_seen > limit:
                    self._counts["peers_lost"] += 1
                    self._log.warning(
                        ("prefill rank %d: no sign of life from %s for %g s"), self._rank, peer.name, limit
                    )
                    self._lose(peer, f"no sign of life for {limit:g} s")
            for room, asks in list(self._held.items()):
                for identity, ask in list(asks.items()):
                    if now - ask.arrived > patience:
                        del asks[identity]
                        ask.peer.held_requests -= 1
                        text = f"no prefill request opened this room within {patience:g} s"
                        self._put(identity, frames.Abort(room, ask.generation, text))
                if not asks:
                    del self._held[room]
            while self._aborted and now - next(iter(self._aborted.values()))[2] > patience:
                self._aborted.popitem(last=False)
            for entry in list(self._rooms.values()):
                waiting_for_rows = entry.state is RoomState.WAITING
                if not entry.state.ended and not waiting_for_rows and now - entry.progress > patience:
                    asked = f"{len(entry.asks)} of {entry.expected_ranks or 'unknown'} decode ranks had asked"
                    self._fail(entry, f"no progress for {patience:g} s in {entry.state.name}; {asked}")
            if self._staging.reap():
                self._work.notify_all()

    def _put(self, identity: bytes, message: frames.Message, payload: bytes | None = None) -> None:
        """Queue a message; any thread."""
        self._io.post(self._send_now, identity, message, payload)

    def _send_now(self, identity: bytes, message: frames.Message, payload: bytes | None) -> None:
        parts = [identity, frames.encode(message)] + ([] if payload is None else [payload])
        self._send_parts(identity, parts)

    def _send_parts(
        self, identity: bytes, parts: Sequence[bytes | memoryview], track: bool = False
    ) -> zmq.MessageTracker | None:
        try:
            return self._router.send_multipart(parts, zmq.NOBLOCK, copy=not track, track=track)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            gone = error.errno == zmq.EHOSTUNREACH
            with self._work:
                peer = self._peers.get(identity)
                if peer is not None:
                    self._counts["peers_lost"] += 1
                    self._lose(
                        peer, "the connection is gone" if gone else "its queue is full and it does not read"
                    )
            return None

    def _send_chunk(self, stream: Stream, header: bytes, slot: Slot, size: int) -> None:
        tracker = None
        if not stream.room.state.ended:
            payload = slot.view[:size]
            tracker = self._send_parts(
                stream.peer.identity, [stream.peer.identity, header, payload], track=True
            )
        with self._lock:
            if tracker is not None:
                slot.trackers.append(tracker)
            slot.pending -= 1

    def _say_goodbye(self) -> None:
        with self._lock:
            identities = list(self._peers)
        for identity in identities:
            self._send_now(identity, frames.Goodbye(f"prefill rank {self._rank} closes"), None)

    # Chunks (worker thread)

    def _work_once(self) -> bool:
        with self._work:
            if self._closing:
                return False
            job = self._next_job()
            if job is None:
                self._work.wait(0.002 if self._staging.used_bytes else 0.5)
                return True
        try:
            self._make(job)
        except Exception as error:
            self._handler_failed("gather", error)
            with self._work:
                job.slot.pending = 0
                for stream in job.streams:
                    if not stream.room.state.ended:
                        self._fail(stream.room, f"internal error while gathering: {error!r}")
        return True

    def _next_job(self) -> Job | None:
        """The next chunk some stream has credit for: peers in turn, and each peer's rooms in turn."""
        cap = max(1, self._staging.slots // (len(self._peers) + 1))
        for identity, peer in list(self._peers.items()):
            if not peer.ready or peer.slots_held >= cap:
                continue
            for room, stream in list(peer.ready.items()):
                sequence = stream.peek()
                if sequence is None:
                    del peer.ready[room]
                    continue
                size = stream.plan.rectangles[sequence].payload_bytes
                if stream.credit_bytes - stream.sent_bytes < size:
                    self._counts["credit_waits"] += 1
                    continue
                slot = self._staging.take()
                if slot is None:
                    return None
                peer.ready.move_to_end(room)
                self._peers.move_to_end(identity)
                return self._reserve(stream, sequence, size, slot, cap)
        return None

    def _reserve(self, stream: Stream, sequence: int, size: int, slot: Slot, cap: int) -> Job:
        """Take a chunk for a stream, and for those of the room that want the same one now."""
        takers = [stream] + [
            other
            for other in stream.room.streams
            if other is not stream
            and other.plan is stream.plan
            and other.peek() == sequence
            and other.credit_bytes - other.sent_bytes >= size
            and other.peer.slots_held < cap
        ]
        for taker in takers:
            taker.advance(sequence)
            taker.peer.slots_held += 1
            slot.holders.append(taker.peer.release_slot)
        return Job(stream.plan, sequence, takers, slot)

    def _make(self, job: Job) -> None:
        rectangle, segment = job.plan.rectangles[job.sequence], job.plan.segments[job.sequence]
        projection = job.plan.projection
        layers = slice(
            rectangle.first_layer - self._pool.first_layer,
            rectangle.first_layer - self._pool.first_layer + rectangle.layers,
        )
        start = rectangle.first_token - segment.first_token
        payload = job.slot.buffer[: rectangle.payload_bytes]
        self._reader.read(
            rectangle,
            segment.slots[start : start + rectangle.tokens],
            None if projection.matrices is None else projection.matrices[layers],
            projection.shared[layers],
            job.plan.part,
            payload,
            segment.ready,
        )
        digest = frames.checksum(job.slot.view[: rectangle.payload_bytes])
        with self._work:
            self._counts["projections_computed"] += projection.matrices is not None
            for stream in job.streams:
                if stream.room.state.ended:
                    continue
                header = frames.encode(
                    frames.Chunk(
                        stream.room.room,
                        stream.generation,
                        job.sequence,
                        int(job.plan.part),
                        rectangle.first_layer,
                        rectangle.layers,
                        rectangle.first_token,
                        rectangle.tokens,
                        digest,
                    )
                )
                job.slot.pending += 1
                stream.room.wire_bytes += rectangle.payload_bytes
                self._counts["wire_bytes"] += rectangle.payload_bytes
                self._counts["chunks"] += 1
                self._io.post(self._send_chunk, stream, header, job.slot, rectangle.payload_bytes)
                self._finish(stream)
            job.slot.pending -= 1


def _remember(table: OrderedDict, key: tuple[int, str], value: object) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
