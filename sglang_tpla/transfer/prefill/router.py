"""A prefill agent's sockets: the ROUTER socket that decode ranks connect to, and the port of their data channels."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.network.control_socket import configure, endpoint, receive_parts
from sglang_tpla.transfer.network.data_listener import DataListener
from sglang_tpla.transfer.network.security import ZAP_ENDPOINT, Security
from sglang_tpla.transfer.prefill.peers import Peers
from sglang_tpla.transfer.prefill.rooms import Rooms
from sglang_tpla.transfer.prefill.state import Outgoing
from sglang_tpla.transfer.room import TransferError
from sglang_tpla.transfer.workers import Workers


class Router:
    """The sockets of a prefill agent. Only the I/O thread calls methods, except `turn`, which any thread may call.

    Args:
        bind_port: the port to listen on, or 0 to let the system choose; data channels come to the port after it.
        advertised_port: the port where decode ranks reach this agent, if it differs from ``bind_port``; else 0.

    Raises:
        TransferError: one of the ports cannot be bound.
    """

    def __init__(
        self, workers: Workers, security: Security, out: Outgoing,
        bind_host: str, bind_port: int, advertised_port: int,
    ) -> None:  # fmt: skip
        self._workers, self._security, self._out = workers, security, out
        self._peers: Peers
        self._rooms: Rooms
        self._socket = workers.io.context.socket(zmq.ROUTER)
        configure(self._socket, workers.settings, messages.MAX_PROJECTION_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.IPV6, int(":" in bind_host))
        security.apply_server(self._socket)
        if security.secret is not None:
            guard = workers.io.context.socket(zmq.REP)
            guard.bind(ZAP_ENDPOINT)
            workers.io.add(guard, self._authenticate)
        try:
            self._socket.bind(endpoint(bind_host, bind_port or "*"))
        except zmq.ZMQError as error:
            workers.io.free()
            raise TransferError(
                f"cannot listen on {bind_host}:{bind_port or '*'}: {error}; set the host of this server"
            ) from error
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self.address: tuple[str, int] = (bind_host, port)
        try:
            self.listener = DataListener(
                workers.io,
                bind_host,
                bind_port and bind_port + 1,
                workers.settings.peer_timeout_s,
                security.secret is not None,
                partial(workers.drop, "refused"),
                self._channel_bound,
                self._channel_lost,
            )
        except OSError as error:
            workers.io.free()
            raise TransferError(
                f"cannot listen on {bind_host}:{bind_port + 1 if bind_port else '*'}, where decode ranks fetch rows: "
                f"{error}; free the port after {bind_port or 'that of the transfers'} (--tpla-listen-port)"
            ) from error
        if advertised_port:
            self.listener.announced_port = advertised_port + 1

    @property
    def name(self) -> str:
        return f"prefill rank {self._workers.rank} at {self.address[0]}:{self.address[1]}"

    def serve(self, peers: Peers, rooms: Rooms) -> None:
        """Hand messages and lost channels to ``peers`` and ``rooms`` from now on. Call before the threads start."""
        self._peers, self._rooms = peers, rooms
        self._workers.io.add(self._socket, self._receive)
        # A peer without a required key, or of another protocol than ZMQ's, never gets as far as the allow-list.
        failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._workers.io.add(self._socket.get_monitor_socket(failures), self._handshake_failed)

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Hold the agent's lock while peers and rooms change, then send their messages. Yields the time."""
        with self._workers.work:
            try:
                yield self._workers.io.now()
            finally:
                for identity, message, payload in self._out.take():
                    self._workers.io.post(self.send, identity, message, payload)

    def _handshake_failed(self, monitor: zmq.Socket) -> None:
        recv_monitor_message(monitor, zmq.NOBLOCK)
        self._workers.drop("refused", "a connection without a key where one is due, or of another protocol")

    def _authenticate(self, guard: zmq.Socket) -> None:
        """Answer ZMQ's request to authenticate a key."""
        reply, known = self._security.answer(guard.recv_multipart())
        if not known:
            self._workers.drop("refused", "a connection with a key that is not in the allow-list")
        guard.send_multipart(reply)

    def _channel_bound(self) -> None:
        with self._workers.work:
            self._workers.work.notify()  # chunks may have waited for the channel

    def _channel_lost(self, identity: bytes, why: str) -> None:
        with self.turn():
            self._peers.channel_lost(identity, why)

    def _receive(self, socket: zmq.Socket) -> None:
        for _ in range(64):  # bounded, so that the posted sends have their turn
            parts = receive_parts(socket)
            if parts is None:
                return
            identity = parts[0].bytes
            sender = f"peer {identity.hex()[:8]}"
            parsed = self._workers.parse(parts[1:], sender, partial(self._refuse_version, identity))
            with self.turn() as now:
                if parsed is None:
                    self._peers.damaged(identity)
                    continue
                message, payload = parsed
                try:
                    self._peers.message(identity, message, None if payload is None else payload.buffer, now)
                except Exception as error:
                    self._workers.handler_failed(f"message {type(message).__name__} from {sender}", error)
                    self._rooms.failed(identity, getattr(message, "room", -1), message, error, now)

    def _refuse_version(self, identity: bytes, reason: str) -> None:
        """Refuse a peer whose frame has another framing version; `Refused` has the same form in all of them."""
        with self.turn():
            self._workers.counts["refused"] += 1
            text = f"{self.name} cannot read this peer: {reason}"
            self._out.put(identity, messages.Refused(messages.sentence(text)))

    def send(self, identity: bytes, message: messages.Message, payload: bytes | None = None) -> None:
        parts = [identity, messages.encode(message)] + ([] if payload is None else [payload])
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            with self.turn() as now:
                self._peers.not_sent(identity, error.errno == zmq.EAGAIN, now)

    def say_goodbye(self) -> None:
        """Tell every decode rank that this agent closes."""
        with self._workers.lock:
            identities = list(self._peers.table)
        for identity in identities:
            self.send(identity, messages.Goodbye(f"prefill rank {self._workers.rank} closes"))
