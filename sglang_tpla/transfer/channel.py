"""The data channel: a plain TCP socket beside a registered ZMQ connection, for chunks only (PROTOCOL.md).

ZMQ allocates each message that comes in and hands it through two more threads; here the kernel copies straight out
of sender staging and straight into receiver staging that is used again while it is in the processor's caches. It is
offered only where ZMQ would not encrypt either. Both ends are used by the agent's I/O thread alone and never block.

    decode -> prefill   once: ``b"TPLD"``, version, the cookie that Welcome named: 21 bytes
    prefill -> decode   for each chunk: header bytes, payload bytes (two 32-bit big-endian numbers), header, payload
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sglang_tpla.transfer.frames import CHANNEL_COOKIE_BYTES, HEAD_BYTES, MAX_HEADER_BYTES, Buffer, FrameError
from sglang_tpla.transfer.security import is_loopback

PREAMBLE = b"TPLD\x01"
PREAMBLE_BYTES = len(PREAMBLE) + CHANNEL_COOKIE_BYTES
SIZES = struct.Struct(">II")
MAX_SPARE_BUFFERS = 8
BUFFER_BYTES = 4 << 20  # for sending and receiving; the system may give less
# On loopback nothing is ever far away, and what waits in smaller buffers stays in the processor's caches.
LOOPBACK_SEND_BYTES, LOOPBACK_RECEIVE_BYTES = 256 << 10, 1 << 20


class ChannelError(ConnectionError):
    """The data channel was closed, or could not be opened."""


def set_up(stream: socket.socket, host: str, timeout_s: float) -> None:
    """Options of either end: never block, send at once, give a silent network up after ``timeout_s``.

    ``host`` is the other side's address.
    """
    near = is_loopback(host)
    stream.setblocking(False)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOOPBACK_SEND_BYTES if near else BUFFER_BYTES)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOOPBACK_RECEIVE_BYTES if near else BUFFER_BYTES)


class Parcel:
    """One chunk on its way into a socket."""

    __slots__ = ("begun", "done", "views", "wanted")

    def __init__(self, parts: Sequence[Buffer], wanted: Callable[[], bool], done: Callable[[], None]) -> None:
        sizes = SIZES.pack(*(memoryview(part).nbytes for part in parts))
        self.views = [memoryview(part).cast("B") for part in (sizes, *parts)]
        self.begun = False
        self.wanted = wanted
        self.done = done


class Outbox:
    """The sending end: parcels in order, as the socket takes them.

    A parcel that is no longer wanted when its turn comes is left out, one that has begun is finished. ``done`` of each
    is called once, when its memory is no longer needed.
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
                try:
                    sent = self.stream.sendmsg(parcel.views)
                except BlockingIOError:
                    return
                self.sent_bytes += sent
                while parcel.views and sent >= parcel.views[0].nbytes:
                    sent -= parcel.views.pop(0).nbytes
                if parcel.views:
                    parcel.views[0] = parcel.views[0][sent:]
                    continue
            self._parcels.popleft().done()

    def close(self) -> None:
        """Close the socket and give all memory back."""
        self.stream.close()
        while self._parcels:
            self._parcels.popleft().done()


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


class Inbox:
    """The receiving end: cuts the stream into headers and payloads.

    Args:
        stream: not yet connected, or connected.
        cookie: told to the other side first.
        max_payload_bytes: a larger payload ends the channel before any memory is taken for it.
        spares: where payload memory comes from.
    """

    def __init__(self, stream: socket.socket, cookie: bytes, max_payload_bytes: int, spares: Spares) -> None:
        self.stream = stream
        self.received_bytes = 0
        self._greeting = PREAMBLE + cookie
        self._limit, self._spares = max_payload_bytes, spares
        self._sizes = bytearray(SIZES.size)
        self._header: memoryview | None = None  # of the chunk that is coming, once its sizes are known
        self._payload: memoryview | None = None  # and once its header is
        self._payload_bytes = 0
        self._target, self._filled = memoryview(self._sizes), 0  # what is read into

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

    def receive(self, budget_bytes: int) -> Iterator[tuple[memoryview, memoryview]]:
        """(header, payload) of chunks that are complete, until the socket has no more or some
        ``budget_bytes`` were read.

        Raises:
            OSError: the connection is gone.
            FrameError: sizes out of range.
        """
        end = self.received_bytes + budget_bytes
        while self.received_bytes < end:
            try:
                size = self.stream.recv_into(self._target[self._filled :])
            except (BlockingIOError, InterruptedError):
                return
            if not size:
                raise ChannelError("closed by the other side")
            self.received_bytes += size
            self._filled += size
            if self._filled < self._target.nbytes:
                continue
            header, payload = self._header, self._payload
            if header is None:
                self._expect_header()
            elif payload is None:
                self._payload = self._target = self._spares.take(self._payload_bytes)
                self._filled = 0
            else:
                self._header = self._payload = None
                self._target, self._filled = memoryview(self._sizes), 0
                yield header, payload

    def _expect_header(self) -> None:
        header_bytes, self._payload_bytes = SIZES.unpack(self._sizes)
        if not HEAD_BYTES < header_bytes <= MAX_HEADER_BYTES or not 0 < self._payload_bytes <= self._limit:
            raise FrameError(
                f"a chunk announced {header_bytes} bytes of header and {self._payload_bytes} of payload, where at most "
                f"{MAX_HEADER_BYTES} and {self._limit} are due"
            )
        self._header = self._target = memoryview(bytearray(header_bytes))
        self._filled = 0

    def close(self) -> None:
        """Close the socket."""
        self.stream.close()
