"""Inside the prefill agent: the port of data channels, and which connection each channel belongs to.

A channel is bound to a registered connection by the cookie that its Welcome named, once; with it goes the key of that
Welcome, if there is one. Everything here runs on the agent's I/O thread.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from sglang_tpla.transfer.messages import CHANNEL_COOKIE_BYTES, DataChannel
from sglang_tpla.transfer.network.data_channel import (
    PREAMBLE,
    PREAMBLE_BYTES,
    OutgoingChunk,
    SendQueue,
    set_up,
)
from sglang_tpla.transfer.network.event_loop import IoLoop
from sglang_tpla.transfer.network.sealing import Seal, new_key

MAX_STRANGERS = 256  # connections that have not said whose they are


@dataclass(eq=False)
class PendingConnection:
    """A connection that has not said whose it is."""

    stream: socket.socket
    arrived: float
    said: bytes = b""


class DataListener:
    """Listens for data channels.

    Args:
        io: the agent's loop.
        host: where the agent listens.
        port: for data channels; 0 takes one that the system chooses.
        timeout_s: how long a stranger, and a silent network, is borne.
        sealed: chunks are sealed, with a key for each offer.
        on_refused: told of each connection that is turned away.
        on_bound: told when a connection's channel stands.
        on_lost: told of the connection whose channel ended while it was bound.

    Raises:
        OSError: nothing can listen there.
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
        self._strangers: list[PendingConnection] = []
        self._offers: dict[bytes, tuple[bytes, bytes | None]] = {}  # by cookie: whose it is, and its key
        self._channels: dict[bytes, SendQueue] = {}  # by identity
        io.add_stream(self._listener, self._accept)

    def offer(self, identity: bytes) -> DataChannel:
        """What a Welcome tells a connection; an earlier offer ends."""
        self.withdraw(identity)
        cookie, key = secrets.token_bytes(CHANNEL_COOKIE_BYTES), new_key() if self.sealed else None
        self._offers[cookie] = identity, key
        return DataChannel(self.announced_port, cookie, key)

    def withdraw(self, identity: bytes) -> None:
        """The connection is over: its offer and its channel end."""
        for cookie in [cookie for cookie, (whose, _) in self._offers.items() if whose == identity]:
            del self._offers[cookie]
        outbox = self._channels.pop(identity, None)
        if outbox is not None:
            self._io.remove_stream(outbox.stream)
            outbox.close()

    def send(self, identity: bytes, parcel: OutgoingChunk) -> bool:
        """Send a chunk on the connection's channel; False if it has none."""
        outbox = self._channels.get(identity)
        if outbox is None:
            return False
        outbox.push(parcel)
        self._flush(identity, outbox)
        return True

    @property
    def bound_channels(self) -> int:
        """How many connections have a channel. Any thread."""
        return len(self._channels)

    def bound(self, identity: bytes) -> bool:
        """True while a connection has a channel. Any thread."""
        return identity in self._channels

    def expire(self, now: float) -> None:
        """Turn away the strangers that said nothing in time."""
        for stranger in [item for item in self._strangers if now - item.arrived > self._timeout_s]:
            self._turn_away(stranger, "said nothing in time")

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError:
            return  # gone again, or no descriptors: the next one may do better
        set_up(stream, self._timeout_s)
        stranger = PendingConnection(stream, self._io.now())
        self._strangers.append(stranger)
        self._io.add_stream(stream, lambda: self._listen_to(stranger))
        if len(self._strangers) > MAX_STRANGERS:
            self._turn_away(self._strangers[0], f"was the oldest of {MAX_STRANGERS} that had said nothing")

    def _listen_to(self, stranger: PendingConnection) -> None:
        try:
            data = stranger.stream.recv(PREAMBLE_BYTES - len(stranger.said))
        except BlockingIOError:
            return
        except OSError as error:
            self._turn_away(stranger, str(error))
            return
        stranger.said += data
        if not data or stranger.said[: len(PREAMBLE)] != PREAMBLE[: len(stranger.said)]:
            self._turn_away(stranger, f"said {stranger.said!r}, where {PREAMBLE!r} and a cookie were due")
            return
        if len(stranger.said) < PREAMBLE_BYTES:
            return
        offer = self._offers.pop(stranger.said[len(PREAMBLE) :], None)
        if offer is None:
            self._turn_away(stranger, "came with a cookie that was not given out, or has been used")
            return
        self._strangers.remove(stranger)
        self._io.remove_stream(stranger.stream)
        identity, key = offer
        outbox = self._channels[identity] = SendQueue(stranger.stream, None if key is None else Seal(key))
        self._io.add_stream(outbox.stream, lambda: self._ready(identity, outbox))
        self._on_bound()

    def _turn_away(self, stranger: PendingConnection, why: str) -> None:
        self._strangers.remove(stranger)
        self._io.remove_stream(stranger.stream)
        stranger.stream.close()
        self._on_refused(f"a data channel that {why}")

    def _ready(self, identity: bytes, outbox: SendQueue) -> None:
        try:
            said = outbox.stream.recv(1)
        except BlockingIOError:
            self._flush(identity, outbox)
            return
        except OSError as error:
            self._lose(identity, str(error))
            return
        self._lose(identity, "it was closed" if not said else "bytes came on it")

    def _flush(self, identity: bytes, outbox: SendQueue) -> None:
        try:
            outbox.flush()
        except OSError as error:
            self._lose(identity, str(error))
            return
        self._io.watch(outbox.stream, writable=bool(outbox))

    def _lose(self, identity: bytes, why: str) -> None:
        self.withdraw(identity)
        self._on_lost(identity, why)
