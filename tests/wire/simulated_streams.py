"""Plain sockets of `simulation`, for data channels: bytes move between two ends in pieces, when a step reads them."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from typing import Any

from tests.wire.simulated_network import Choices

CAPACITY_BYTES = 3000  # the most bytes under way in one direction: less than a chunk
PIECES = (1 << 16, 1000, 21, 1)  # the limits on the bytes of one read


class Listener:
    """A listening socket."""

    def __init__(self, streams: Streams, port: int) -> None:
        self.port, self.waiting = port, deque[Stream]()
        streams.listeners[port] = self

    def setblocking(self, flag: bool) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def accept(self) -> tuple[Stream, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.popleft(), ("127.0.0.1", 1)

    @property
    def readable(self) -> bool:
        """Whether a connection waits to be accepted."""
        return bool(self.waiting)

    writable = False


class Stream:
    """One end of a connection."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.arrived = streams, bytearray()
        self.other: Stream | None = None
        self.is_stranger = False
        self.closed = self.ended = False  # closed by this side; ended by the other side or by the network
        streams.ends.append(self)

    def setblocking(self, flag: bool) -> None:
        pass

    def setsockopt(self, *option: Any) -> None:
        pass

    def getsockopt(self, level: int, option: int) -> int:
        return 0 if self.other is not None and not self.ended else errno.ECONNREFUSED

    def connect_ex(self, address: tuple[str, int]) -> int:
        listener = self.streams.listeners.get(address[1])
        if listener is None:
            return errno.ECONNREFUSED
        self.other = Stream(self.streams)
        self.other.other = self
        listener.waiting.append(self.other)
        return errno.EINPROGRESS

    def send(self, data: Any, flags: int = 0) -> int:
        return self.sendmsg([data])

    def sendmsg(self, views: Sequence[Any]) -> int:
        if self.other is None or self.ended or self.other.closed:
            raise BrokenPipeError
        data = b"".join(bytes(view) for view in views)
        space = CAPACITY_BYTES - len(self.other.arrived)
        if space <= 0:
            raise BlockingIOError
        self.other.arrived += data[:space]
        return min(space, len(data))

    def recv(self, size: int) -> bytes:
        if not self.arrived:
            if self.ended:
                return b""
            raise BlockingIOError
        size = min(size, self.streams.piece())
        data = bytes(self.arrived[:size])
        del self.arrived[:size]
        return data

    def recv_into(self, view: Any) -> int:
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def recvmsg_into(self, views: Sequence[Any]) -> tuple[int]:
        data = self.recv(sum(len(view) for view in views))
        left = data
        for view in views:
            view[: len(left[: len(view)])] = left[: len(view)]
            left = left[len(view) :]
        return (len(data),)

    def close(self) -> None:
        self.closed = True
        if self.other is not None:
            self.other.ended = True
        self.streams.ends = [end for end in self.streams.ends if end is not self]

    def cut(self) -> None:
        """End the connection, as the network does; bytes under way are lost."""
        for end in (self, self.other):
            if end is not None:
                end.ended = True
                end.arrived.clear()

    @property
    def readable(self) -> bool:
        """Whether bytes have come, or the stream has ended."""
        return bool(self.arrived) or self.ended

    @property
    def writable(self) -> bool:
        """Whether there is room, or an error to report."""
        return self.ended or self.other is None or len(self.other.arrived) < CAPACITY_BYTES


class Streams:
    """All plain sockets of the simulation."""

    def __init__(self, choices: Choices) -> None:
        self.ends: list[Stream] = []
        self.listeners: dict[int, Listener] = {}
        self._choices = choices

    def piece(self) -> int:
        """Choose the limit on the bytes of the next read."""
        return PIECES[self._choices.below(len(PIECES))]

    def connect(self, port: int) -> Stream:
        """Open a stranger's connection."""
        stream = Stream(self)
        stream.connect_ex(("127.0.0.1", port))
        stream.is_stranger = True
        return stream

    def tcp_socket(self, host: str) -> Stream:
        """Make a socket, as `IoLoop.tcp_socket` does."""
        return Stream(self)

    def tcp_listener(self, host: str, port: int) -> Listener:
        """Make a listener, as `IoLoop.tcp_listener` does."""
        return Listener(self, port or 9000 + len(self.listeners))
