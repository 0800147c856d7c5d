"""Stand-ins for sockets, threads and the clock in `simulation`: a network whose deliveries the choices decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import zmq


class Choices:
    """Takes decisions from a string of bytes. When the string is used up, every decision is the first option."""

    def __init__(self, data: bytes) -> None:
        self._data, self._next = data, 0

    @property
    def left(self) -> bool:
        """Whether the string is not used up yet."""
        return self._next < len(self._data)

    def below(self, count: int) -> int:
        """Choose one of 0 ... count - 1; count is at most 256."""
        return self.take(1)[0] % count if self.left else 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; fewer at the end."""
        self._next += count
        return self._data[self._next - count : self._next]


class Frame:
    """A received ZMQ frame."""

    def __init__(self, data: bytes, more: bool) -> None:
        self.bytes, self.buffer, self.more = data, memoryview(data), more

    def get(self, what: str) -> str:
        """Return the address of the frame's sender, as ZMQ does."""
        return "127.0.0.1"


class Socket:
    """Stands in for a ZMQ socket: it sends messages to the network, and returns the frames that have arrived."""

    def __init__(self, network: Network) -> None:
        self.network, self.arrived, self.peer = network, deque[Frame](), ""
        self.options: dict[int, Any] = {}
        self.identity = b""

    def setsockopt(self, option: int, value: Any) -> None:
        self.options[option] = value

    def getsockopt(self, option: int) -> int:
        return 0

    def getsockopt_string(self, option: int) -> str:
        return self.peer

    def bind(self, endpoint: str) -> None:
        self.peer = f"{endpoint.removesuffix('*')}{len(self.network.routers) + 1}"
        self.network.routers[self.peer] = self

    def connect(self, endpoint: str) -> None:
        self.peer, self.identity = endpoint, self.options[zmq.IDENTITY]
        self.network.dealers[self.identity] = self

    def get_monitor_socket(self, events: int) -> Socket:
        return Socket(self.network)

    def disable_monitor(self) -> None:
        pass

    def recv(self, flags: int, copy: bool = False) -> Frame:
        if not self.arrived:
            raise zmq.Again
        return self.arrived.popleft()

    def send_multipart(self, parts: Any, flags: int = 0, copy: bool = True, track: bool = False) -> None:
        whole = [bytes(part) for part in parts]
        if self.identity:
            self.network.up.setdefault(self.identity, deque()).append(whole)
        elif whole[0] in self.network.dealers:
            self.network.down.setdefault(whole[0], deque()).append(whole[1:])
        else:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)

    def close(self, linger: int = 0) -> None:
        if self.identity:
            self.network.drop(self.identity)


class Loop:
    """Stands in for `IoLoop`: posted calls run when the simulation calls `run`."""

    def __init__(self, network: Network, streams: Any, clock: Clock) -> None:
        self.now, self.tcp_socket, self.tcp_listener = clock, streams.tcp_socket, streams.tcp_listener
        self.posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.context = mock.Mock()
        self.context.socket = lambda kind: Socket(network)
        self.thread = mock.Mock()
        self.thread.is_alive = lambda: True
        self.handlers: dict[Socket, Callable[[Socket], None]] = {}
        self.streams: dict[Any, tuple[Callable[[], None], bool]] = {}  # plain sockets; True: also watch for writing

    def post(self, function: Callable[..., None], *args: Any) -> None:
        self.posted.append((function, args))

    def add(self, socket: Socket, handler: Callable[[Socket], None]) -> None:
        self.handlers[socket] = handler

    def remove(self, socket: Socket, linger_ms: int = 0) -> None:
        self.handlers.pop(socket, None)
        socket.close()

    def add_stream(self, stream: Any, handler: Callable[[], None]) -> None:
        self.streams[stream] = handler, False

    def watch(self, stream: Any, writable: bool) -> None:
        if stream in self.streams:
            self.streams[stream] = self.streams[stream][0], writable

    def remove_stream(self, stream: Any) -> None:
        self.streams.pop(stream, None)

    def ready(self) -> list[Callable[[], None]]:
        """Return the handlers of the plain sockets that a poller would report now."""
        return [
            handler
            for stream, (handler, writable) in list(self.streams.items())
            if stream.readable or (writable and stream.writable)
        ]

    def run(self) -> None:
        while self.posted:
            function, args = self.posted.popleft()
            function(*args)


class Network:
    """Connections with messages under way, in order and without loss until they are cut."""

    def __init__(self) -> None:
        self.routers: dict[str, Socket] = {}
        self.dealers: dict[bytes, Socket] = {}
        self.up: dict[bytes, deque[list[bytes]]] = {}
        self.down: dict[bytes, deque[list[bytes]]] = {}

    def drop(self, identity: bytes) -> None:
        """Forget a connection and the messages under way on it."""
        for table in (self.dealers, self.up, self.down):
            table.pop(identity, None)

    def deliver(self, identity: bytes, upwards: bool) -> Socket | None:
        """Move one message. Return the socket that can be read now."""
        queue = (self.up if upwards else self.down).get(identity)
        dealer = self.dealers.get(identity)
        if not queue or dealer is None:
            return None
        parts = queue.popleft()
        target = self.routers.get(dealer.peer) if upwards else dealer
        if target is None:
            return None
        if upwards:
            parts = [identity, *parts]
        target.arrived.extend(Frame(part, n < len(parts) - 1) for n, part in enumerate(parts))
        return target


class Clock:
    """Simulated seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now
