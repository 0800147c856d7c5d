"""Inside the prefill agent: the ROUTER socket, registration of decode ranks, their projections and arenas."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import OrderedDict
from functools import partial

import numpy as np
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.memory.projection import IDENTITY_HASH, projection_digest, stack_layers
from sglang_tpla.transfer.memory.rows import RowReader
from sglang_tpla.transfer.memory.staging import Staging, pin, unpin
from sglang_tpla.transfer.network.control_socket import configure, endpoint, receive_parts
from sglang_tpla.transfer.network.data_listener import DataListener
from sglang_tpla.transfer.network.security import ZAP_ENDPOINT, Security
from sglang_tpla.transfer.prefill.compatibility import agreed_version, announced_rows, mismatch
from sglang_tpla.transfer.prefill.state import Peer, Room, SenderProjection, Upload
from sglang_tpla.transfer.room import NO_LIMITS, CachePool, Limits, MetadataRows, TransferError
from sglang_tpla.transfer.workers import Agent, Workers

MAX_PROJECTIONS = 64
MAX_PEERS = 4096


class PrefillGreeting(Agent[Room]):
    """Sockets and peers of `PrefillAgent`."""

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
        advertised_port: int = 0,
        host_id: str | None = None,
        limits: Limits = NO_LIMITS,
        security: Security | None = None,
        logger: logging.Logger | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._security = security if security is not None else Security.from_environment(self.role)
        self._security.check(bind_host, "listening on")
        super().__init__(settings, rank, size, logger, pool.device.type, workers)
        self._pool, self._metadata, self._model_hash = pool, metadata, model_hash
        self._limits, self._began = limits, self._io.now()
        row_bytes = (pool.latent_dim + pool.rope_dim) * pool.dtype.itemsize
        if any(width != pool.latent_dim for width in pool.widths) or row_bytes > self._chunk_bytes:
            raise TransferError(
                f"a prefill pool holds whole latents of {pool.latent_dim} "
                f"values, got widths {set(pool.widths)}; "
                f"one row of {row_bytes} bytes must fit in a chunk of "
                f"{self._chunk_bytes} (raise chunk_bytes, "
                "staging_bytes)"
            )
        self._reader = RowReader(pool)
        self._host = self._host_identity(host_id)
        slots_bytes = self._settings.staging_bytes // self._chunk_bytes * self._chunk_bytes
        self._arena = self._make_arena()
        # without shared memory: committed page by page as slots are first used
        memory = self._arena.data if self._arena is not None else np.empty(slots_bytes, dtype=np.uint8)
        self._pinned = memory if pool.device.type == "cuda" else None
        if self._pinned is not None:
            pin(self._pinned)
        reserve = [] if self._arena is None else [self._arena.reserve]
        self._staging = Staging(memory, self._chunk_bytes, *reserve)
        self._peers: OrderedDict[bytes, Peer] = OrderedDict()
        self._projections = {IDENTITY_HASH: SenderProjection(IDENTITY_HASH, None)}
        self._router = self._io.context.socket(zmq.ROUTER)
        configure(self._router, self._settings, frames.MAX_PROJECTION_BYTES)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.IPV6, int(":" in bind_host))
        self._security.apply_server(self._router)
        if self._security.secret is not None:
            guard = self._io.context.socket(zmq.REP)
            guard.bind(ZAP_ENDPOINT)
            self._io.add(guard, self._authenticate)
        try:
            self._router.bind(endpoint(bind_host, bind_port or "*"))
        except zmq.ZMQError as error:
            self._io.context.destroy(linger=0)
            raise TransferError(
                f"cannot listen on {bind_host}:{bind_port or '*'}: {error}; set the host of this server"
            ) from error
        port = int(self._router.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self.address: tuple[str, int] = (bind_host, port)
        try:
            self._doorway = self._open_doorway(bind_host, bind_port, advertised_port)
        except OSError as error:
            self._io.context.destroy(linger=0)
            raise TransferError(
                f"cannot listen on {bind_host}:{bind_port + 1 if bind_port else '*'}, where decode ranks fetch rows: "
                f"{error}; free the port after {bind_port or 'that of the transfers'} (--tpla-listen-port)"
            ) from error
        self._prepare()
        self._io.add(self._router, self._receive)
        # who has no key where one is due, or does not speak ZMQ's protocol, never gets as far as the allow-list
        failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._io.add(self._router.get_monitor_socket(failures), self._handshake_failed)
        self._start()

    def _open_doorway(self, host: str, bind_port: int, advertised_port: int) -> DataListener:
        """Data channels come to the port after ZMQ's, sealed where ZMQ encrypts."""

        def refused(what: str) -> None:
            self._drop("refused", what)

        def bound() -> None:
            with self._work:
                self._work.notify()  # chunks wait for it

        doorway = DataListener(
            self._io,
            host,
            bind_port and bind_port + 1,
            self._settings.peer_timeout_s,
            self._security.secret is not None,
            refused,
            bound,
            self._channel_lost,
        )
        doorway.announced_port = advertised_port + 1 if advertised_port else doorway.announced_port
        return doorway

    def _handshake_failed(self, monitor: zmq.Socket) -> None:
        recv_monitor_message(monitor, zmq.NOBLOCK)
        self._drop("refused", "a connection without a key where one is due, or of another protocol")

    def _channel_lost(self, identity: bytes, why: str) -> None:
        """What was on its way is lost with a channel, and no chunk goes without one: connect anew (I/O thread)."""
        with self._work:
            peer = self._peers.get(identity)
            if peer is not None:
                level = logging.WARNING if self._in_use(peer) else logging.DEBUG  # who closes hangs up too
                self._log.log(
                    level, "prefill rank %d: data channel of %s ended: %s", self._rank, peer.name, why
                )
                self._put(identity, frames.Unregistered())

    @abstractmethod
    def _prepare(self) -> None:
        """Set up what the subclass keeps, before the threads start."""

    def close(self) -> None:
        """End all threads and free socket and staging; rooms that are still alive fail."""
        super().close()
        if self._pinned is not None:
            unpin(self._pinned.ctypes.data)
            self._pinned = None
        if self._arena is not None:
            self._arena.close()

    def _authenticate(self, guard: zmq.Socket) -> None:
        """Answer ZMQ's question whether a key may connect (I/O thread)."""
        reply, known = self._security.answer(guard.recv_multipart())
        if not known:
            self._drop("refused", "a connection with a key that is not in the allow-list")
        guard.send_multipart(reply)

    # Messages in (I/O thread)

    def _receive(self, socket: zmq.Socket) -> None:
        for _ in range(64):  # then let the posted sends have a turn
            parts = receive_parts(socket)
            if parts is None:
                return
            identity = parts[0].bytes
            sender = f"peer {identity.hex()[:8]}"
            parsed = self._parse(parts[1:], sender, partial(self._refuse_version, identity))
            if parsed is None:
                with self._lock:
                    if (peer := self._peers.get(identity)) is not None and self._in_use(peer):
                        # what was lost comes again on a new connection
                        self._put(identity, frames.Unregistered())
                continue
            message, payload = parsed
            with self._work:
                peer = self._peers.get(identity)
                try:
                    self._handle(identity, peer, message, payload)
                except Exception as error:
                    self._handler_failed(f"message {type(message).__name__} from {sender}", error)
                    self._room_failed(identity, getattr(message, "room", -1), message, error)

    def _handle(
        self, identity: bytes, peer: Peer | None, message: frames.Message, payload: zmq.Frame | None
    ) -> None:
        if isinstance(message, frames.Hello):
            self._greet(identity, message)
            return
        if peer is None:
            name = type(message).__name__
            self._drop("unknown_peer", f"{name} from unregistered peer {identity.hex()[:8]}")
            self._put(identity, frames.Unregistered())
            return
        peer.last_seen = self._io.now()
        peer.away = False
        match message:
            case frames.Ping():
                self._put(identity, frames.Pong(message.number))
            case frames.Pong():
                pass
            case frames.ProjectionLayer() if payload is not None:
                self._take_layer(peer, message, payload)
            case frames.Mapped():
                if message.number >= peer.maps_answered:
                    peer.maps_answered, peer.mapped = message.number, frozenset(message.agents)
                    self._maps_changed(peer)
            case frames.Capacity():
                peer.limits = Limits(message.context_tokens, message.pool_tokens)
            case frames.Goodbye():
                self._lose(peer, f"closed: {message.reason}")
            case _:
                self._handle_room(peer, message)

    @abstractmethod
    def _handle_room(self, peer: Peer, message: frames.Message) -> None:
        """A message about a room."""

    @abstractmethod
    def _room_failed(self, identity: bytes, room: int, message: frames.Message, error: Exception) -> None:
        """A room's message could not be handled."""

    @abstractmethod
    def _maps_changed(self, peer: Peer) -> None:
        """A peer has said which arenas it can read."""

    @abstractmethod
    def _in_use(self, peer: Peer) -> bool:
        """True while a room needs the peer."""

    @abstractmethod
    def _take_over(self, old: Peer, new: Peer) -> None:
        """The rank of ``old`` is back as ``new``: its rooms go on."""

    @abstractmethod
    def _drop_rooms(self, peer: Peer, reason: str) -> None:
        """Every room of a lost peer fails."""

    # Registration

    def _greet(self, identity: bytes, hello: frames.Hello) -> None:
        reason = mismatch(hello, self._pool, self._metadata, self._model_hash)
        if reason is None and identity not in self._peers and len(self._peers) >= MAX_PEERS:
            reason = f"peers: this rank serves at most {MAX_PEERS}; close unused decode servers"
        if reason is not None:
            self._counts["refused"] += 1
            where = f"prefill rank {self._rank} at {self.address[0]}:{self.address[1]}"
            text = f"{where} refused decode rank {hello.rank}: {reason}"
            self._log.warning("%s", text)
            self._put(identity, frames.Refused(frames.sentence(text)))
            return
        if (old := self._peers.get(identity)) is not None:
            self._lose(old, "registered anew")
        layout = hello.layout
        announced = announced_rows(layout)
        sent = announced.part(self._pool.first_layer - layout.first_layer, len(self._pool.layers))
        peer = Peer(identity, hello, self._io.now(), announced, sent)
        before = next((old for old in self._peers.values() if old.hello.agent == hello.agent), None)
        peer.projection = self._projections.get(hello.projection or IDENTITY_HASH)
        if peer.projection is None:
            peer.upload = Upload(projection_digest(layout.first_layer, layout.latent_dim, announced))
        self._peers[identity] = peer
        if before is not None:
            del self._peers[before.identity]
            self._doorway.withdraw(before.identity)
            self._counts["resumed"] += 1
            self._take_over(before, peer)
        version = agreed_version(hello.versions)
        assert version is not None
        arena = self._arena.announcement if self._arena is not None else None
        welcome = frames.Welcome(
            version=version,
            agent=self._agent_id,
            host=self._host,
            first_layer=self._pool.first_layer,
            layers=len(self._pool.layers),
            need_projection=peer.projection is None,
            arena=arena,
            data=self._doorway.offer(identity),
            age_ms=int(1000 * (self._io.now() - self._began)),
            context_tokens=self._limits.context_tokens,
            pool_tokens=self._limits.pool_tokens,
        )
        self._put(identity, welcome)
        self._introduce(hello.host)

    def _introduce(self, host: str) -> None:
        """Tell the ranks of a host about each other's arenas, unless it is this one and they read this rank's."""
        for peer in self._neighbours(host):
            peer.maps_asked += 1
            self._name_neighbours(peer)

    def _neighbours(self, host: str) -> list[Peer]:
        """Ranks of a host that read each other's arenas."""
        if not host or (host == self._host and self._arena is not None):
            return []
        return [peer for peer in self._peers.values() if peer.hello.host == host]

    def _name_neighbours(self, peer: Peer) -> None:
        others = [other for other in self._neighbours(peer.hello.host) if other is not peer]
        arenas = [other.hello.arena for other in others if other.hello.arena is not None]
        peer.maps_asked_at = self._io.now()
        self._put(peer.identity, frames.Neighbours(peer.maps_asked, tuple(arenas[: frames.MAX_NEIGHBOURS])))

    def _ask_again(self, now: float) -> None:
        """No room of a rank starts before it has said what it can read: the question or its answer may be lost."""
        for peer in self._peers.values():
            unanswered = peer.maps_answered < peer.maps_asked
            if unanswered and now - peer.maps_asked_at > self._settings.heartbeat_s:
                self._name_neighbours(peer)

    def _take_layer(self, peer: Peer, message: frames.ProjectionLayer, payload: zmq.Frame) -> None:
        upload, layout = peer.upload, peer.hello.layout
        expected = peer.hello.projection, upload.next_index if upload is not None else -1
        if upload is None or (message.projection, message.index) != expected:
            why = f"projection layer {message.index} of {peer.name} was not expected"
            self._drop("malformed_dropped", why)
            return
        width = peer.announced.layers[message.index].columns
        data = payload.buffer
        if data.nbytes != layout.latent_dim * width * 4 or frames.checksum(data) != message.checksum:
            self._refuse(peer, f"projection layer {message.index} came damaged or cut; connect again")
            return
        upload.digest.update(data)
        upload.next_index += 1
        ours = range(self._pool.first_layer, self._pool.first_layer + len(self._pool.layers))
        if layout.first_layer + message.index in ours:
            values = np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(layout.latent_dim, width)
            upload.kept.append(torch.from_numpy(values).to(self._pool.device))
        if upload.next_index == len(layout.widths):
            self._finish_upload(peer, upload)

    def _finish_upload(self, peer: Peer, upload: Upload) -> None:
        peer.upload = None
        key = peer.hello.projection
        if upload.digest.hexdigest() != key:
            self._refuse(peer, f"the projection does not have the hash {key[:12]} it was announced with")
            return
        if key not in self._projections:
            used = {other.hello.projection for other in self._peers.values()} | {IDENTITY_HASH}
            for unused in [other for other in self._projections if other not in used]:
                del self._projections[unused]
            if len(self._projections) > MAX_PROJECTIONS:
                text = f"this rank keeps at most {MAX_PROJECTIONS} projections; close unused decode servers"
                self._refuse(peer, text)
                return
            stacks = stack_layers(upload.kept, peer.row_format.layers)
            self._projections[key] = SenderProjection(key, stacks)
        peer.projection = self._projections[key]
        self._put(peer.identity, frames.Registered(key))

    def _refuse_version(self, identity: bytes, reason: str) -> None:
        """A sound frame of another framing version came, from a peer that can read `Refused` all the same."""
        with self._lock:
            self._counts["refused"] += 1
        where = f"prefill rank {self._rank} at {self.address[0]}:{self.address[1]}"
        self._put(identity, frames.Refused(frames.sentence(f"{where} cannot read this peer: {reason}")))

    def _refuse(self, peer: Peer, reason: str) -> None:
        self._counts["refused"] += 1
        self._log.warning("prefill rank %d refused %s: %s", self._rank, peer.name, reason)
        self._put(peer.identity, frames.Refused(frames.sentence(reason)))
        self._lose(peer, reason)

    def _lose(self, peer: Peer, reason: str) -> None:
        """Forget a connection; its rooms fail."""
        if self._peers.pop(peer.identity, None) is None:
            return
        self._doorway.withdraw(peer.identity)
        self._log.info("prefill rank %d: %s is gone: %s", self._rank, peer.name, reason)
        self._drop_rooms(peer, reason)
        self._introduce(peer.hello.host)

    def _expire_peers(self, now: float) -> None:
        limit = self._settings.peer_timeout_s
        self._doorway.expire(now)
        for peer in list(self._peers.values()):
            if now - peer.last_seen > limit:
                self._counts["peers_lost"] += 1
                text = f"no sign of life for {limit:g} s"
                self._log.warning("prefill rank %d: %s: %s", self._rank, peer.name, text)
                self._lose(peer, text)

    # Sending

    def _put(self, identity: bytes, message: frames.Message, payload: bytes | None = None) -> None:
        """Queue a message; any thread."""
        self._io.post(self._send_now, identity, message, payload)

    def _send_now(self, identity: bytes, message: frames.Message, payload: bytes | None) -> None:
        parts = [identity, frames.encode(message)] + ([] if payload is None else [payload])
        try:
            self._router.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            with self._work:
                peer = self._peers.get(identity)
                if peer is not None and error.errno == zmq.EHOSTUNREACH:
                    peer.away = True  # until it comes back, or its time is up
                elif peer is not None:
                    self._counts["peers_lost"] += 1
                    self._lose(peer, "its queue is full and it does not read")

    def _say_goodbye(self) -> None:
        with self._lock:
            identities = list(self._peers)
        for identity in identities:
            self._send_now(identity, frames.Goodbye(f"prefill rank {self._rank} closes"), None)
