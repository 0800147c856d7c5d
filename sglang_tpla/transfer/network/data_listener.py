"""A prefill agent's port for data channels, and the binding of each channel to its connection.

The token in a connection's Welcome binds one channel to that connection, once. The channel uses the key of the same
Welcome, if there is one. Everything here runs on the agent's I/O thread.
"""

import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from sglang_tpla.transfer.messages import CHANNEL_TOKEN_BYTES, DataChannel
from sglang_tpla.transfer.network.data_channel import PREAMBLE, PREAMBLE_BYTES, OutgoingChunk, SendQueue, set_up
from sglang_tpla.transfer.network.event_loop import IoLoop
from sglang_tpla.transfer.network.sealing import Seal, new_key

MAX_PENDING = 256  # connections that have not sent a token yet
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # this machine has no room for a connection


@dataclass(eq=False)
class PendingConnection:
    """A connection that has not sent its whole token yet."""

    stream: socket.socket
    arrived: float
    said: bytes = b""


class DataListener:
    """Accepts data channels.

    Args:
        io: the agent's loop.
        host: the address that the agent listens on.
        port: the port for data channels, or 0 to let the system choose.
        timeout_s: the time after which a pending connection, or a silent network, is given up.
        sealed: whether chunks are sealed, with a key for each offer.
        on_refused: called with the reason for each connection that is turned away.
        on_bound: called when a connection has got its channel.
        on_lost: called with the connection whose channel has ended, and the reason.

    Raises:
        OSError: the port cannot be bound.
    """

    def __init__(
        self,
        io: IoLoop,
        host: str,
        port: int,
        timeout_s: float,
        sealed: bool,
        on_refused: Callable[[str], None],
        on_bound: Callable[[], None],
        on_lost: Callable[[bytes, str], None],
    ) -> None:
        self._io, self._timeout_s, self.sealed = io, timeout_s, sealed
        self._on_refused, self._on_bound, self._on_lost = on_refused, on_bound, on_lost
        self._listener = io.tcp_listener(host, port)
        self._listener.setblocking(False)
        self.announced_port: int = self._listener.getsockname()[1]
        self._pending: list[PendingConnection] = []
        self._offers: dict[bytes, tuple[bytes, bytes | None]] = {}  # by token: the connection's identity, and the key
        self._channels: dict[bytes, SendQueue] = {}  # by identity
        self._resting = False
        io.add_stream(self._listener, self._accept)

    def offer(self, identity: bytes) -> DataChannel:
        """Return the offer of a channel that a connection's Welcome carries. An earlier offer or channel ends."""
        self.withdraw(identity)
        token, key = secrets.token_bytes(CHANNEL_TOKEN_BYTES), new_key() if self.sealed else None
        self._offers[token] = identity, key
        return DataChannel(self.announced_port, token, key)

    def withdraw(self, identity: bytes) -> None:
        """End the offer and the channel of a connection that is over."""
        for token in [token for token, (whose, _) in self._offers.items() if whose == identity]:
            del self._offers[token]
        queue = self._channels.pop(identity, None)
        if queue is not None:
            self._io.remove_stream(queue.stream)
            queue.close()

    def send(self, identity: bytes, chunk: OutgoingChunk) -> bool:
        """Send a chunk on the connection's channel. Return whether it has one."""
        queue = self._channels.get(identity)
        if queue is None:
            return False
        queue.push(chunk)
        self._flush(identity, queue)
        return True

    @property
    def bound_channels(self) -> int:
        """The number of connections that have a channel. Any thread may ask."""
        return len(self._channels)

    def bound(self, identity: bytes) -> bool:
        """Return whether a connection has a channel. Any thread may ask."""
        return identity in self._channels

    def expire(self, now: float) -> None:
        """Turn away the pending connections that said nothing in time. Accept again if there was no room."""
        if self._resting:
            self._resting = False
            self._io.watch(self._listener, writable=False)
        for pending in [item for item in self._pending if now - item.arrived > self._timeout_s]:
            self._turn_away(pending, "said nothing in time")

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError as error:
            if error.errno in NO_ROOM:  # the connection stays in the backlog, and the loop would spin on it
                self._resting = True
                self._io.rest(self._listener)
            return
        set_up(stream, self._timeout_s)
        pending = PendingConnection(stream, self._io.now())
        self._pending.append(pending)
        self._io.add_stream(stream, lambda: self._listen_to(pending))
        if len(self._pending) > MAX_PENDING:
            self._turn_away(self._pending[0], f"was the oldest of {MAX_PENDING} that had said nothing")

    def _listen_to(self, pending: PendingConnection) -> None:
        try:
            data = pending.stream.recv(PREAMBLE_BYTES - len(pending.said))
        except BlockingIOError:
            return
        except OSError as error:
            self._turn_away(pending, str(error))
            return
        pending.said += data
        if not data or pending.said[: len(PREAMBLE)] != PREAMBLE[: len(pending.said)]:
            self._turn_away(pending, f"said {pending.said!r}, where {PREAMBLE!r} and a token were due")
            return
        if len(pending.said) < PREAMBLE_BYTES:
            return
        offer = self._offers.pop(pending.said[len(PREAMBLE) :], None)
        if offer is None:
            self._turn_away(pending, "came with a token that was not given out, or has been used")
            return
        self._pending.remove(pending)
        self._io.remove_stream(pending.stream)
        identity, key = offer
        queue = self._channels[identity] = SendQueue(pending.stream, None if key is None else Seal(key))
        self._io.add_stream(queue.stream, lambda: self._ready(identity, queue))
        self._on_bound()

    def _turn_away(self, pending: PendingConnection, why: str) -> None:
        self._pending.remove(pending)
        self._io.remove_stream(pending.stream)
        pending.stream.close()
        self._on_refused(f"a data channel that {why}")

    def _ready(self, identity: bytes, queue: SendQueue) -> None:
        try:
            said = queue.stream.recv(1)
        except BlockingIOError:
            self._flush(identity, queue)
            return
        except OSError as error:
            self._lose(identity, str(error))
            return
        self._lose(identity, "it was closed" if not said else "bytes came on it")

    def _flush(self, identity: bytes, queue: SendQueue) -> None:
        try:
            queue.flush()
        except OSError as error:
            self._lose(identity, str(error))
            return
        self._io.watch(queue.stream, writable=bool(queue))

    def _lose(self, identity: bytes, why: str) -> None:
        self.withdraw(identity)
        self._on_lost(identity, why)
