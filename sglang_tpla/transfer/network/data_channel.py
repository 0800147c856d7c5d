"""The data channel: a TCP socket beside a registered ZMQ connection, for chunks only (PROTOCOL.md).

ZMQ allocates each message that comes in and passes it through two more threads. Here the kernel reads payloads straight
from the sender's memory and copies them straight into the pool (`decode.in_place`), or into receiver staging that is
reused while it is in the processor's caches. If the ZMQ connection is encrypted, its Welcome names a key, and chunks
are sealed with that key (`sealing`). Only the agent's I/O thread uses either end, and neither end blocks.

    decode -> prefill   once: ``b"TPLD"``, version, the token that Welcome named: 21 bytes
    prefill -> decode   for each chunk: header bytes, payload bytes (two 32-bit big-endian numbers), header, payload,
                        the payload's checksum (8 bytes)
               sealed   the same numbers, header and its tag (16 bytes), payload, its tag (16 bytes)

The checksum or tag comes last, so that each end computes it step by step while the bytes that it moves are in its
core's caches.
"""

import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext

from sglang_tpla.errors import SglangTplaError
from sglang_tpla.transfer.memory.copy import SocketCopy
from sglang_tpla.transfer.memory.iovec import IoVec, one_piece
from sglang_tpla.transfer.messages import (
    CHANNEL_TOKEN_BYTES,
    CHECKSUM_BYTES,
    DAMAGED,
    HEAD_BYTES,
    MAX_HEADER_BYTES,
    OPENED,
    Chunk,
    FrameError,
)
from sglang_tpla.transfer.network.sealing import STEP_BYTES, TAG_BYTES, Seal, SealedIntake, SealedOutgoing, is_proved

PREAMBLE = b"TPLD\x03"
PREAMBLE_BYTES = len(PREAMBLE) + CHANNEL_TOKEN_BYTES
SIZES = struct.Struct(">II")
MAX_BUFFERS = 8
WAKE_BYTES = 1 << 20  # payload bytes that must be there before a receiver is woken
KEEPALIVES = 3  # keepalives without an answer before a silent network is given up
BUFFER_BYTES = 4 << 20  # for sending and receiving; the system may give less


class ChannelError(SglangTplaError, ConnectionError):
    """The data channel was closed, or could not be opened."""


def keepalive_s(timeout_s: float) -> int:
    """Return the seconds between keepalives such that a network silent for ``timeout_s`` is given up."""
    return max(1, int(timeout_s / KEEPALIVES))


def set_up(stream: socket.socket, timeout_s: float) -> None:
    """Set the options of either end: never block, send at once, and give up a silent network after ``timeout_s``."""
    stream.setblocking(False)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        stream.setsockopt(socket.IPPROTO_TCP, option, keepalive_s(timeout_s))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def wrong(digest: bytes) -> bytes:
    """Return a checksum that differs from this one."""
    return bytes(byte ^ 0xFF for byte in digest)


@dataclass(eq=False, slots=True)
class OutgoingChunk:
    """One chunk on its way into a socket.

    Args:
        header: copied when it is sent.
        pieces: the payload. Its bytes must not change until ``done`` is called or ``wanted`` returns False.
        known: the payload's checksum if it is known already, else empty.
        wanted: asked before the first byte and after the last. A chunk that is no longer wanted may have changed while
            it was sent, so it goes with a wrong checksum or tag.
        done: called once, when the socket has taken all of the chunk, with the checksum if that is known; or with
            nothing, if the chunk was left out.
    """

    header: bytes
    pieces: IoVec
    known: bytes
    wanted: Callable[[], bool]
    done: Callable[[bytes], None]
    head: memoryview = field(init=False)  # set when sending begins
    payload: SocketCopy | SealedOutgoing | None = None
    tail: memoryview | None = None  # set when all of the payload has been sent
    digest: bytes = b""


class SendQueue:
    """The sending end: sends chunks in order, as the socket takes them.

    A chunk that is no longer wanted when its turn comes is left out. A chunk that has been begun is finished.

    Args:
        seal: seals the chunks; None to send them as they are.
    """

    def __init__(self, stream: socket.socket, seal: Seal | None = None) -> None:
        self.stream = stream
        self._seal = seal
        self._scratch = np.empty(STEP_BYTES if seal is not None else 0, dtype=np.uint8)
        self._chunks: deque[OutgoingChunk] = deque()

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def push(self, chunk: OutgoingChunk) -> None:
        """Queue a chunk; `flush` sends it."""
        self._chunks.append(chunk)

    def flush(self) -> None:
        """Send as much as the socket takes now. Raises OSError when the connection is gone."""
        while self._chunks:
            chunk = self._chunks[0]
            if chunk.payload is not None or chunk.wanted():
                payload = chunk.payload or self._begin(chunk)
                if not self._send(chunk, payload):
                    return
            self._chunks.popleft()
            chunk.done(chunk.digest)

    def _begin(self, chunk: OutgoingChunk) -> SocketCopy | SealedOutgoing:
        header, pieces = chunk.header, chunk.pieces
        sizes = SIZES.pack(len(header), pieces.size_bytes)
        payload: SocketCopy | SealedOutgoing
        if self._seal is None:
            chunk.head, payload = memoryview(sizes + header), SocketCopy(pieces, chunk.known)
        else:
            chunk.head = memoryview(sizes + self._seal.seal_header(sizes, header))
            payload = SealedOutgoing(pieces, self._seal.seal_payload(header), self._scratch)
        chunk.payload = payload
        return payload

    def _send(self, chunk: OutgoingChunk, payload: SocketCopy | SealedOutgoing) -> bool:
        """Send as much of a chunk as the socket takes now. Return whether all of it has been sent."""
        try:
            while chunk.head:
                sent = self.stream.send(chunk.head, socket.MSG_MORE)
                chunk.head = chunk.head[sent:]
            while payload.left_bytes:
                payload.send(self.stream)
            if chunk.tail is None:
                digest = payload.digest()
                chunk.digest = digest if self._seal is None else chunk.known
                chunk.tail = memoryview(digest if chunk.wanted() else wrong(digest))
            while chunk.tail:
                sent = self.stream.send(chunk.tail)
                chunk.tail = chunk.tail[sent:]
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the socket and give all memory back."""
        self.stream.close()
        while self._chunks:
            self._chunks.popleft().done(b"")


class InPlace(Protocol):
    """A place that a payload goes to instead of staging."""

    size_bytes: int

    def receive(self, stream: socket.socket) -> int:
        """Take some of the payload from a socket. Return how many bytes, 0 at the stream's end.

        Raises BlockingIOError if there is nothing now, OSError if the connection is gone.
        """
        ...

    def open_with(self, context: AEADDecryptionContext) -> None:
        """Decrypt the bytes that come from now on with ``context``."""
        ...


class BufferPool:
    """Payload buffers. The buffer used last is taken first: its memory is mapped and may be cached. Thread-safe."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=MAX_BUFFERS)

    def take(self, size: int) -> memoryview:
        """Return ``size`` bytes of memory, from a buffer of at most twice that size."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = None
        if buffer is None or not size <= buffer.size <= 2 * size:
            buffer = np.empty(size, dtype=np.uint8)
        return buffer.data[:size]

    def give_back(self, view: memoryview) -> None:
        """Take back the memory of a view that came from `take`; ignore other memory (a segment's is read-only)."""
        if isinstance(view.obj, np.ndarray) and not view.readonly:
            self._free.append(view.obj)


class ChunkReader:
    """The receiving end: cuts the stream into headers and payloads.

    Args:
        stream: a socket, connected or about to be.
        token: sent to the other side first.
        max_payload_bytes: a larger payload ends the channel before any memory is taken for it.
        buffers: the source of staging memory.
        announce: called with each header and the size of its payload; returns the decoded header, and the payload's
            place, or None for staging.
        seal: opens the chunks; None if they come as they are.
    """

    def __init__(
        self,
        stream: socket.socket,
        token: bytes,
        max_payload_bytes: int,
        buffers: BufferPool,
        announce: Callable[[memoryview, int], tuple[Chunk, InPlace | None]],
        seal: Seal | None = None,
    ) -> None:
        self.stream = stream
        self.sealed = seal is not None
        self.received_bytes = 0
        self.in_place: InPlace | None = None  # the place of the payload that is coming, unless it is staged
        self._greeting = PREAMBLE + token
        self._limit, self._buffers, self._announce, self._seal = max_payload_bytes, buffers, announce, seal
        self._sizes = bytearray(SIZES.size)
        self._header: memoryview | None = None  # the header of the chunk that is coming, once its sizes are known
        self._said: Chunk | None = None  # the decoded header, once it is whole
        self._payload_bytes = 0
        self._payload: memoryview | InPlace | None = None  # the payload, once it is whole and only the tail is missing
        self._opening: AEADDecryptionContext | None = None  # set for a sealed payload
        self._intake: SealedIntake | None = None  # set for a sealed payload that goes into staging
        self._tail: bytearray | None = None
        self._low_water = 1
        self._target, self._filled, self._due_bytes = memoryview(self._sizes), 0, SIZES.size

    @property
    def greeted(self) -> bool:
        """Whether the token has been sent to the other side."""
        return not self._greeting

    def greet(self) -> bool:
        """Send the token once the connection is up. Return whether all of it has been sent. Raises OSError."""
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

    def receive(self, budget_bytes: int) -> Iterator[tuple[Chunk, memoryview | InPlace, bytes]]:
        """Yield each complete chunk until the socket has no more or about ``budget_bytes`` were read: the decoded
        header, the payload or the payload's place, and the checksum that was sent. For a sealed chunk, OPENED or
        DAMAGED takes the checksum's place.

        Raises:
            OSError: the connection is gone.
            FrameError: sizes out of range, a header that does not open, or an error that ``announce`` finds.
        """
        end = self.received_bytes + budget_bytes
        while self.received_bytes < end:
            try:
                size = self._take()
            except (BlockingIOError, InterruptedError):
                return
            if not size:
                raise ChannelError("closed by the other side")
            self.received_bytes += size
            self._filled += size
            if self._filled < self._due_bytes:
                self._wait_for(self._due_bytes - self._filled)
            elif self._header is None:
                self._expect_header()
            elif self._said is None:
                self._expect_payload(self._header)
            elif self._tail is None:
                self._payload = self.in_place or self._target
                self._tail = bytearray(CHECKSUM_BYTES if self._seal is None else TAG_BYTES)
                self._expect(memoryview(self._tail), len(self._tail))
                self._wait_for(1)
            else:
                said, payload, tail = self._said, self._payload, bytes(self._tail)
                if self._opening is not None:
                    tail = OPENED if is_proved(self._opening, tail) else DAMAGED
                self._header = self._said = self.in_place = self._tail = self._payload = None
                self._opening = self._intake = None
                self._expect(memoryview(self._sizes), SIZES.size)
                if payload is not None:
                    yield said, payload, tail

    def _take(self) -> int:
        """Take some of the bytes due. Return how many, 0 at the end of the stream. Raises BlockingIOError, OSError."""
        payload = self.in_place or self._intake
        if payload is not None and self._said is not None and self._tail is None:
            return payload.receive(self.stream)
        return self.stream.recv_into(self._target[self._filled :])

    def _expect(self, target: memoryview, size_bytes: int) -> None:
        self._target, self._filled, self._due_bytes = target, 0, size_bytes

    def _wait_for(self, size_bytes: int) -> None:
        """Let the poller report the socket only when so many bytes (or `WAKE_BYTES`) are there: a wake-up is costly."""
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
        whole_bytes = header_bytes + (0 if self._seal is None else TAG_BYTES)
        self._header = memoryview(bytearray(whole_bytes))
        self._expect(self._header, whole_bytes)

    def _expect_payload(self, header: memoryview) -> None:
        if self._seal is not None:
            header = memoryview(self._seal.open_header(bytes(self._sizes), header))
        self._said, self.in_place = self._announce(header, self._payload_bytes)
        target = self._target
        if self.in_place is None:
            target = self._buffers.take(self._payload_bytes)
        self._expect(target, self._payload_bytes)
        if self._seal is not None:
            self._opening = self._seal.open_payload(bytes(header))
            if self.in_place is not None:
                self.in_place.open_with(self._opening)
            else:
                staged = one_piece(np.frombuffer(target, dtype=np.uint8))
                self._intake = SealedIntake(staged, self._opening)
        self._wait_for(self._payload_bytes)

    def close(self) -> None:
        self.stream.close()
