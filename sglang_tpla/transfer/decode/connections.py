"""A decode agent's connections: a DEALER socket to each prefill rank, registration, and the segments it can read."""

import uuid
from collections.abc import Callable
from functools import partial

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.data_channels import DataChannels
from sglang_tpla.transfer.decode.receiver import Receiver
from sglang_tpla.transfer.decode.state import Address, Connection, Link
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.memory.shared_memory import map_for
from sglang_tpla.transfer.network.control_socket import configure, endpoint, receive_parts
from sglang_tpla.transfer.network.data_channel import BufferPool
from sglang_tpla.transfer.network.security import Security
from sglang_tpla.transfer.room import Limits
from sglang_tpla.transfer.workers import Workers

MAX_UNANSWERED = 3
WELCOME_DELAY_S = 1.0  # the longest time that a Welcome is assumed to take


class Connections:
    """The sockets to prefill ranks, and the shared memory of other ranks that this process can read.

    Everything runs on the I/O thread, except for `connection` (any thread, under the lock) and `put` (any thread).
    """

    def __init__(
        self,
        workers: Workers,
        receiver: Receiver,
        security: Security,
        hello: messages.Hello,
        limits: Limits,
        projection: Projection | None,
        device: torch.device,
        buffers: BufferPool,
        on_peer_lost: Callable[[str, int], None],
    ) -> None:
        self.table: dict[Address, Connection] = {}
        self._workers, self._receiver, self._security = workers, receiver, security
        self._io, self._lock, self._log = workers.io, workers.lock, workers.log
        self._settings, self._rank = workers.settings, workers.rank
        self._hello, self._limits, self._projection, self._device = hello, limits, projection, device
        self._on_peer_lost = on_peer_lost
        self._maps: dict[bytes, memoryview | None] = {}  # segments by token; None: cannot be mapped
        self._channels = DataChannels(workers, receiver, self, security.secret is not None, buffers)

    def close(self) -> None:
        """Unmap all shared memory, once the I/O thread has ended."""
        self._maps.clear()

    def connection(self, address: Address) -> Connection:
        """Return the connection to an address, or make one if there is none to use. The caller holds the lock."""
        connection = self.table.get(address)
        if connection is not None and connection.link is Link.REFUSED:
            if self._io.now() - connection.last_seen <= self._settings.peer_timeout_s:
                return connection
            connection = None  # the server there may have changed: ask again
        if connection is None or connection.link is Link.LOST:
            self._security.check(address[0], "connecting to")
            connection = Connection(address, uuid.uuid4().bytes, self._io.now())
            self.table[address] = connection
            self._io.post(self._dial, connection)
        return connection

    def _dial(self, connection: Connection) -> None:
        if self._workers.closing:
            return
        try:
            dealer = connection.socket = self._io.context.socket(zmq.DEALER)
            configure(dealer, self._settings, messages.MAX_METADATA_BYTES + messages.MAX_HEADER_BYTES)
            dealer.setsockopt(zmq.IDENTITY, connection.identity)
            dealer.setsockopt(zmq.IPV6, int(":" in connection.address[0]))
            self._security.apply_client(dealer)
            connection.monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._io.add(connection.monitor, lambda monitor: self._disconnected(connection, monitor))
            self._io.add(dealer, lambda _: self.receive(connection))
            dealer.connect(endpoint(*connection.address))
        except zmq.ZMQError as error:  # an impossible address, or too many open files
            self.give_up(connection, f"the {connection.name} cannot be connected to: {error}")
            return
        connection.last_seen = self._io.now()
        self._send_now(connection, self._hello, None)

    def _disconnected(self, connection: Connection, monitor: zmq.Socket) -> None:
        recv_monitor_message(monitor, zmq.NOBLOCK)
        self.receive(connection)  # a Goodbye may be waiting to be read
        if connection.monitor is monitor:
            self.broken(connection)

    def broken(self, connection: Connection) -> None:
        """Connect again so that rooms resume: for `peer_timeout_s`, or `MAX_UNANSWERED` times to a rank that never
        answered.
        """
        connection.unanswered += not connection.agent
        if connection.unanswered == MAX_UNANSWERED:
            self.give_up(
                connection,
                f"the connection to the {connection.name} broke {MAX_UNANSWERED} times before it answered; check that "
                "both sides have keys that go together (--tpla-keys) or both have none",
            )
            return
        with self._lock:
            connection.link = Link.CONNECTING
            first = connection.broken_since is None
            if first:
                connection.broken_since = self._io.now()
        self._hang_up(connection)  # the next tick dials anew, under another identity
        if first:
            self._log.warning("decode rank %d: the %s broke the connection", self._rank, connection.name)
            self._tell_lost(connection)  # the prefill rank may come back at another address

    def give_up(self, connection: Connection, reason: str, link: Link = Link.LOST) -> None:
        """End a connection and fail its rooms."""
        with self._lock:
            if connection.link in (Link.LOST, Link.REFUSED):
                return
            connection.link, connection.lost_reason = link, reason
            connection.last_seen = self._io.now()
            self._workers.counts["refused" if link is Link.REFUSED else "peers_lost"] += 1
            if link is Link.LOST and self.table.get(connection.address) is connection:
                del self.table[connection.address]
            connection.segments.clear()
            self._forget_maps()
        self._log.warning("decode rank %d: %s", self._rank, reason)
        self._hang_up(connection)
        self._receiver.lost(connection, reason)
        if link is Link.LOST and connection.broken_since is None:
            self._tell_lost(connection)

    def _refuse(self, connection: Connection, version: str) -> None:
        reason = f"the {connection.name} speaks another framing version: {version}"
        self.give_up(connection, reason, Link.REFUSED)

    def _tell_lost(self, connection: Connection) -> None:
        try:
            self._on_peer_lost(*connection.address)
        except Exception as error:
            self._workers.handler_failed("on_peer_lost", error)

    def _hang_up(self, connection: Connection, linger_ms: int = 0) -> None:
        self._channels.end(connection)
        dealer, connection.socket = connection.socket, None
        if dealer is not None:
            if connection.monitor is not None:
                dealer.disable_monitor()
                self._io.remove(connection.monitor)
                connection.monitor = None
            self._io.remove(dealer, linger_ms)

    # Messages in (I/O thread)

    def receive(self, connection: Connection) -> None:
        """Handle the messages that have come from a prefill rank."""
        for _ in range(64):
            if connection.socket is None:
                return
            parts = receive_parts(connection.socket)
            if parts is None:
                return
            parsed = self._workers.parse(parts, connection.name, partial(self._refuse, connection))
            if parsed is None:
                if connection.broken_since is not None or self._receiver.uses(connection):
                    self.broken(connection)  # lost messages come again on a new connection
                continue
            message, payload = parsed
            if isinstance(message, messages.Chunk):
                self._workers.drop(
                    "malformed_dropped", f"a chunk of the {connection.name} came beside its data channel"
                )
                continue
            if isinstance(message, messages.Welcome):
                self._channels.dial(connection, parts[0], message.data)
                if connection.socket is None:
                    return
            self.take(connection, message, None if payload is None else payload.buffer)

    def take(self, connection: Connection, message: messages.Message, payload: memoryview | None) -> None:
        """Handle one message, or a chunk that has come into staging."""
        connection.last_seen = self._io.now()
        try:
            self._handle(connection, message, payload)
        except Exception as error:
            self._workers.handler_failed(f"{type(message).__name__} from the {connection.name}", error)

    def _handle(self, connection: Connection, message: messages.Message, payload: memoryview | None) -> None:
        match message:
            case messages.Pong():
                pass
            case messages.Ping():
                self._send_now(connection, messages.Pong(message.number), None)
            case messages.Welcome():
                self._welcomed(connection, message)
            case messages.Registered():
                self._registered(connection)
            case messages.Colocated():
                self._map_all(connection, message.number, message.segments)
            case messages.Refused():
                self.give_up(connection, message.reason, Link.REFUSED)
            case messages.Unregistered():
                self.broken(connection)
            case messages.Goodbye():
                self.give_up(connection, f"the {connection.name} closed: {message.reason}")
            case _:
                self._receiver.message(connection, message, payload)
                if isinstance(message, messages.Want):
                    self._channels.seek(connection)

    # Registration

    def _welcomed(self, connection: Connection, message: messages.Welcome) -> None:
        if connection.agent not in ("", message.agent):
            self._receiver.lost(connection, f"the {connection.name} restarted; the request can be retried")
            connection.broken_since = None  # what broke was the connection to another process
        # The agent knows nothing of requests from before it began. A slow Welcome makes the agent look younger than it
        # is, so a second is allowed for that.
        began = self._io.now() - message.age_ms / 1000 - WELCOME_DELAY_S
        connection.began = min(connection.began, began) if connection.agent == message.agent else began
        connection.limits = Limits(message.context_tokens, message.pool_tokens)
        connection.agent = message.agent
        self._send_now(connection, messages.Capacity(self._limits.context_tokens, self._limits.pool_tokens), None)
        connection.layers = (message.first_layer, message.layers)
        near = message.segment is not None and message.host == self._hello.host
        self._map_all(connection, 0, (message.segment,) if near and message.segment is not None else ())
        if not message.need_projection:
            self._registered(connection)
        elif self._projection is None:
            self.give_up(connection, f"the {connection.name} asked for a projection where there is none")
        else:
            key = self._projection.content_hash
            for index, data in enumerate(self._projection.layer_bytes):
                digest = messages.checksum(data)
                self._send_now(connection, messages.ProjectionLayer(key, index, digest), data)
                self._ping(connection)  # the prefill rank says nothing else before the last layer has come

    def _registered(self, connection: Connection) -> None:
        with self._lock:
            connection.link = Link.REGISTERED
            resumed, connection.broken_since = connection.broken_since is not None, None
        self._receiver.registered(connection, resumed)

    def _map_all(self, connection: Connection, number: int, segments: tuple[messages.Segment, ...]) -> None:
        """Map the listed segments and say which can be read. All earlier ones go, except the prefill rank's own."""
        own = connection.segments.get(connection.agent)
        connection.segments = {} if own is None else {connection.agent: own}
        for segment in segments:
            if segment.token not in self._maps:
                near = segment.agent == connection.agent  # worth pinning: all chunks of that rank are read from there
                self._maps[segment.token] = map_for(self._device if near else None, segment, self._log)
            view = self._maps[segment.token]
            if view is not None:
                connection.segments[segment.agent] = view
        self._forget_maps()
        self._send_now(connection, messages.Mapped(number, tuple(connection.segments)), None)

    def _forget_maps(self) -> None:
        """Unmap the segments that no connection uses any more."""
        with self._lock:  # the scheduler may add a connection meanwhile
            used = {id(view) for other in self.table.values() for view in other.segments.values()}
        self._maps = {token: view for token, view in self._maps.items() if view is not None and id(view) in used}

    # Time, sending (I/O thread)

    def expire(self, now: float) -> None:
        """Dial broken connections again, ping, and give up the ranks that show no sign of life."""
        with self._lock:
            connections = list(self.table.values())
        limit = self._settings.peer_timeout_s
        for connection in connections:
            if connection.link in (Link.REFUSED, Link.LOST):
                continue
            if connection.broken_since is not None:
                if now - connection.broken_since > limit:
                    text = f"the connection to the {connection.name} broke and did not come back for {limit:g} s"
                    self.give_up(connection, text)
                elif connection.socket is None:
                    connection.identity = uuid.uuid4().bytes
                    self._dial(connection)
                continue
            if connection.socket is None:
                continue
            self._channels.expire(connection, now)
            if now - max(connection.last_seen, connection.last_chunk) > limit:
                did = "answer" if connection.link is Link.CONNECTING else "show a sign of life"
                self.give_up(connection, f"the {connection.name} did not {did} for {limit:g} s")
                continue
            due = now - connection.last_ping >= self._settings.heartbeat_s
            if due and connection.link is Link.REGISTERED:
                connection.last_ping = now
                self._ping(connection)

    def _ping(self, connection: Connection) -> None:
        connection.pings += 1
        self._send_now(connection, messages.Ping(connection.pings), None)

    def put(self, connection: Connection, message: messages.Message) -> None:
        """Queue a message. Any thread may call this."""
        self._io.post(self._send_now, connection, message, None)

    def _send_now(self, connection: Connection, message: messages.Message, payload: bytes | None) -> None:
        if connection.socket is None:
            return
        parts = [messages.encode(message)] + ([] if payload is None else [payload])
        try:
            connection.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            # A connection that has just ended takes nothing either. Its monitor reports the end next, and the
            # connection is dialled anew.
            if connection.monitor is None or not connection.monitor.poll(0):
                self.give_up(connection, f"the {connection.name} does not read; its queue is full")

    def say_goodbye(self) -> None:
        """Tell every prefill rank that this one closes."""
        with self._lock:
            connections = list(self.table.values())
        for connection in connections:
            if connection.socket is not None:
                self._send_now(connection, messages.Goodbye(f"decode rank {self._rank} closes"), None)
                self._hang_up(connection, linger_ms=100)
