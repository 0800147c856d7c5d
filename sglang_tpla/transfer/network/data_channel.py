"""The data channel: a plain TCP socket beside a registered ZMQ connection, for chunks only (PROTOCOL.md).

ZMQ allocates each message that comes in and hands it through two more threads; here the kernel takes payloads straight
out of the sender's memory and copies them straight into the pool (`landing`), or into receiver staging that is used
again while it is in the processor's caches. It is offered only where ZMQ would not encrypt either. Both ends are
used by the agent's I/O thread alone and never block.

    decode -> prefill   once: ``b"TPLD"``, version, the cookie that Welcome named: 21 bytes
    prefill -> decode   for each chunk: header bytes, payload bytes (two 32-bit big-endian numbers), header, payload,
                        the payload's checksum (8 bytes)

The checksum comes last so that either end takes it of what it moves, step by step, while that is in its core's caches.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

from sglang_tpla.errors import SglangTplaError
from sglang_tpla.transfer.memory.copy import Outgoing
from sglang_tpla.transfer.memory.iovec import Pieces
from sglang_tpla.transfer.messages import (
    CHANNEL_COOKIE_BYTES,
    CHECKSUM_BYTES,
    HEAD_BYTES,
    MAX_HEADER_BYTES,
    FrameError,
)

PREAMBLE = b"TPLD\x02"
PREAMBLE_BYTES = len(PREAMBLE) + CHANNEL_COOKIE_BYTES
SIZES = struct.Struct(">II")
MAX_SPARE_BUFFERS = 8
WAKE_BYTES = 1 << 20  # of a payload, before its receiver wakes up
KEEPALIVES = 3  # of a silent network before it is given up
BUFFER_BYTES = 4 << 20  # for sending and receiving; the system may give less


class ChannelError(SglangTplaError, ConnectionError):
    """The data channel was closed, or could not be opened."""


def set_up(stream: socket.socket, timeout_s: float) -> None:
    """Options of either end: never block, send at once, give a silent network up after ``timeout_s``, also where
    nothing is sent.
    """
    stream.setblocking(False)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        stream.setsockopt(socket.IPPROTO_TCP, option, max(1, int(timeout_s / KEEPALIVES)))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def wrong(digest: bytes) -> bytes:
    """A checksum that is not this one."""
    return bytes(byte ^ 0xFF for byte in digest)


class Parcel:
    """One chunk on its way into a socket.

    Args:
        header: copied when it is sent.
        payload: left as it is until ``done``, or until nobody wants it any more.
        digest: its checksum, where that is known already.
        wanted: asked before it is begun, and after the last byte: what nobody wants any more may have changed on its
            way, and goes with a wrong checksum.
        done: called once with the checksum, when the socket has taken all of it; with nothing, if it was left out.
    """

    __slots__ = ("begun", "digest", "done", "head", "payload", "tail", "wanted")

    def __init__(
        self,
        header: bytes,
        payload: Pieces,
        digest: bytes,
        wanted: Callable[[], bool],
        done: Callable[[bytes], None],
    ) -> None:
        self.head = memoryview(SIZES.pack(len(header), payload.size_bytes) + header)
        self.payload = Outgoing(payload, digest)
        self.digest = b""  # once all of the payload has gone
        self.tail = memoryview(b"")
        self.begun = False
        self.wanted = wanted
        self.done = done


class Outbox:
    """The sending end: parcels in order, as the socket takes them.

    A parcel that is no longer wanted when its turn comes is left out, one that has begun is finished.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.sent_bytes = 0
        self._parcels: deque[Parcel] = deque()

    def __bool__(self) -> bool:
        return bool(self._parcels)

    def push(self, parcel: Parcel) -> None:
        """Queue a parcel; `flush` sends it."""
        self._parcels.append(parcel)

    def flush(self) -> None:
        """Send what the socket takes now. Raises OSError when the connection is gone."""
        while self._parcels:
            parcel = self._parcels[0]
            if parcel.begun or parcel.wanted():
                parcel.begun = True
                if not self._send(parcel):
                    return
            self._parcels.popleft()
            parcel.done(parcel.digest)

    def _send(self, parcel: Parcel) -> bool:
        """Send of a parcel what the socket takes now; True when that was the end of it."""
        try:
            while parcel.head:
                sent = self.stream.send(parcel.head, socket.MSG_MORE)
                self.sent_bytes += sent
                parcel.head = parcel.head[sent:]
            if not parcel.digest:
                while parcel.payload.left_bytes:
                    self.sent_bytes += parcel.payload.send(self.stream)
                parcel.digest = parcel.payload.digest()
                parcel.tail = memoryview(parcel.digest if parcel.wanted() else wrong(parcel.digest))
            while parcel.tail:
                sent = self.stream.send(parcel.tail)
                self.sent_bytes += sent
                parcel.tail = parcel.tail[sent:]
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the socket and give all memory back."""
        self.stream.close()
        while self._parcels:
            self._parcels.popleft().done(b"")


class Landing(Protocol):
    """Where a payload goes instead of staging."""

    size_bytes: int

    def receive(self, stream: socket.socket) -> int:
        """Take some of it from a socket: bytes, 0 at the end of the stream. Raises BlockingIOError, OSError."""
        ...


HeaderT = TypeVar("HeaderT")


class Spares:
    """Payload buffers, the one used last first: its memory is mapped and may still be cached. Thread-safe."""

    def __init__(self) -> None:
        self._buffers: deque[np.ndarray] = deque(maxlen=MAX_SPARE_BUFFERS)

    def take(self, size: int) -> memoryview:
        """Memory for ``size`` bytes, at most twice as large."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = None
        if buffer is None or not size <= buffer.size <= 2 * size:
            buffer = np.empty(size, dtype=np.uint8)
        return buffer.data[:size]

    def give_back(self, view: memoryview) -> None:
        """Take the memory of a view that came from `take` back; nothing for other memory (an arena's is read-only)."""
        if isinstance(view.obj, np.ndarray) and not view.readonly:
            self._buffers.append(view.obj)


class Inbox(Generic[HeaderT]):
    """The receiving end: cuts the stream into headers and payloads.

    Args:
        stream: not yet connected, or connected.
        cookie: told to the other side first.
        max_payload_bytes: a larger payload ends the channel before any memory is taken for it.
        spares: where payload memory comes from.
        announce: told of each header and the bytes that follow; returns what the header says, and where the payload
            is to land, or None for staging.
    """

    def __init__(
        self,
        stream: socket.socket,
        cookie: bytes,
        max_payload_bytes: int,
        spares: Spares,
        announce: Callable[[memoryview, int], tuple[HeaderT, Landing | None]],
    ) -> None:
        self.stream = stream
        self.received_bytes = 0
        self.landing: Landing | None = None  # what is coming goes there
        self._greeting = PREAMBLE + cookie
        self._limit, self._spares, self._announce = max_payload_bytes, spares, announce
        self._sizes = bytearray(SIZES.size)
        self._header: memoryview | None = None  # of the chunk that is coming, once its sizes are known
        self._said: HeaderT | None = None  # and what it says, once it is whole
        self._payload_bytes = 0
        self._payload: memoryview | Landing | None = None  # come whole, but for its checksum
        self._tail: bytearray | None = None
        self._low_water = 1
        self._target, self._filled, self._due_bytes = memoryview(self._sizes), 0, SIZES.size

    @property
    def greeted(self) -> bool:
        """True once the other side was told whose channel this is."""
        return not self._greeting

    def greet(self) -> bool:
        """Say who this is, once the connection stands; False while it does not. Raises OSError."""
        if self._greeting:
            error = self.stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise ChannelError(os.strerror(error))
            try:
                sent = self.stream.send(self._greeting)
            except (BlockingIOError, InterruptedError):
                return False
            self._greeting = self._greeting[sent:]
        return self.greeted

    def receive(self, budget_bytes: int) -> Iterator[tuple[HeaderT, memoryview | Landing, bytes]]:
        """(what the header says, payload or where it landed, the checksum that was sent) of chunks that are complete,
        until the socket has no more or some ``budget_bytes`` were read.

        Raises:
            OSError: the connection is gone.
            FrameError: sizes out of range, or what ``announce`` finds.
        """
        end = self.received_bytes + budget_bytes
        while self.received_bytes < end:
            try:
                if self.landing is not None and self._tail is None:
                    size = self.landing.receive(self.stream)
                else:
                    size = self.stream.recv_into(self._target[self._filled :])
            except (BlockingIOError, InterruptedError):
                return
            if not size:
                raise ChannelError("closed by the other side")
            self.received_bytes += size
            self._filled += size
            if self._filled < self._due_bytes:
                self._wait_for(self._due_bytes - self._filled)
                continue
            if self._header is None:
                self._expect_header()
            elif self._said is None:
                self._said, self.landing = self._announce(self._header, self._payload_bytes)
                if self.landing is None:
                    self._target = self._spares.take(self._payload_bytes)
                self._filled, self._due_bytes = 0, self._payload_bytes
                self._wait_for(self._payload_bytes)
            elif self._tail is None:
                self._payload, self._tail = self.landing or self._target, bytearray(CHECKSUM_BYTES)
                self._target, self._filled, self._due_bytes = memoryview(self._tail), 0, CHECKSUM_BYTES
                self._wait_for(1)
            else:
                said, payload, tail = self._said, self._payload, bytes(self._tail)
                self._header = self._said = self.landing = self._tail = self._payload = None
                self._target, self._filled, self._due_bytes = memoryview(self._sizes), 0, SIZES.size
                if payload is not None:
                    yield said, payload, tail

    def _wait_for(self, size_bytes: int) -> None:
        """Have the socket be called readable when so much (or much) is there: each wake-up has a price."""
        size_bytes = min(size_bytes, WAKE_BYTES)
        if size_bytes != self._low_water:
            self._low_water = size_bytes
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)

    def _expect_header(self) -> None:
        header_bytes, self._payload_bytes = SIZES.unpack(self._sizes)
        if not HEAD_BYTES < header_bytes <= MAX_HEADER_BYTES or not 0 < self._payload_bytes <= self._limit:
            raise FrameError(
                f"a chunk announced {header_bytes} bytes of header and {self._payload_bytes} of payload, where at most "
                f"{MAX_HEADER_BYTES} and {self._limit} are due"
            )
        self._header = self._target = memoryview(bytearray(header_bytes))
        self._filled, self._due_bytes = 0, header_bytes

    def close(self) -> None:
        """Close the socket."""
        self.stream.close()
