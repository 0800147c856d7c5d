"""The I/O thread: owns every socket of an agent, runs the calls that other threads post, and survives their errors.

The agent reports an exception in a handler (`on_error`), and the loop goes on. If the loop itself cannot go on,
`on_death` gets the reason, so that nothing ends silently.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

MAX_SOCKETS = 65535  # ZMQ's maximum; a connection takes three, and ZMQ's default of 1,023 would allow only 341


class IoLoop:
    """One daemon thread around a poller. An agent gets its sockets and its time from here."""

    def __init__(self, name: str) -> None:
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self.now = time.monotonic
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handlers: dict[zmq.Socket, Callable[[zmq.Socket], None]] = {}
        self._streams: dict[int, tuple[socket.socket, Callable[[], None]]] = {}  # by file descriptor
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._stopping = False
        self._closed = False
        self._guard = threading.Lock()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(
        self,
        tick_s: float,
        on_tick: Callable[[], None],
        on_error: Callable[[str, BaseException], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        """Start the thread. ``on_error`` gets the exceptions that it survives, ``on_death`` the one that ends it."""
        self._tick_s, self._on_tick, self._on_error, self._on_death = tick_s, on_tick, on_error, on_death
        self.thread.start()

    def tcp_socket(self, host: str) -> socket.socket:
        """Return a plain socket that can be connected to a host."""
        return socket.socket(_family(host), socket.SOCK_STREAM)

    def tcp_listener(self, host: str, port: int) -> socket.socket:
        """Return a plain socket that listens on a host's address, or on every address for "*".

        Raises:
            OSError: the port cannot be bound.
        """
        return socket.create_server(("" if host == "*" else host, port), family=_family(host))

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run ``function(*args)`` in the thread, in order. Any thread may call this; after the end it does nothing."""
        self._posted.append((function, args))
        with self._guard:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def add(self, socket: zmq.Socket, handler: Callable[[zmq.Socket], None]) -> None:
        """Call ``handler(socket)`` when a ZMQ socket can be read. Call this in the thread, or before it starts."""
        self._handlers[socket] = handler
        self._poller.register(socket, zmq.POLLIN)

    def remove(self, socket: zmq.Socket, linger_ms: int = 0) -> None:
        """Stop polling a socket and close it. Call this in the thread."""
        if self._handlers.pop(socket, None) is not None:
            self._poller.unregister(socket)
        socket.close(linger=linger_ms)

    def add_stream(self, stream: socket.socket, handler: Callable[[], None]) -> None:
        """Call ``handler()`` when a plain socket can be read (see also `watch`). Same threads as `add`."""
        self._streams[stream.fileno()] = stream, handler
        self._poller.register(stream.fileno(), zmq.POLLIN)

    def watch(self, stream: socket.socket, writable: bool) -> None:
        """Also call a plain socket's handler when it is writable, or stop doing so. Call this in the thread."""
        self._poller.register(stream.fileno(), zmq.POLLIN | (zmq.POLLOUT if writable else 0))

    def rest(self, stream: socket.socket) -> None:
        """Do not poll a plain socket until `watch` is called for it. Call this in the thread."""
        self._poller.register(stream.fileno(), 0)

    def remove_stream(self, stream: socket.socket) -> None:
        """Stop polling a plain socket, before it is closed. Call this in the thread."""
        if self._streams.pop(stream.fileno(), None) is not None:
            self._poller.unregister(stream.fileno())

    def stop(self) -> None:
        """End the thread, close every socket and free the context. Call this from another thread."""
        self._stopping = True
        self.post(lambda: None)
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join(5.0)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._on_death(error)
        finally:
            self.free(linger_ms=100)

    def free(self, linger_ms: int = 0) -> None:
        """Free all sockets, at the loop's end or if the loop will not be started."""
        for polled in list(self._handlers):
            polled.close(linger=linger_ms)
        self._handlers.clear()
        self.context.destroy(linger=linger_ms)  # first, so that last messages go before peers see the streams end
        for stream, _ in self._streams.values():
            stream.close()
        self._streams.clear()
        with self._guard:
            self._closed = True
            os.close(self._wake)

    def _serve(self) -> None:
        next_tick = time.monotonic()
        while True:
            self._run_posted()
            if self._stopping:
                return
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + self._tick_s
                self._guarded("tick", self._on_tick)
                continue
            for ready, _ in self._poller.poll(max(1, int((next_tick - now) * 1000))):
                if ready == self._wake:
                    os.eventfd_read(self._wake)
                elif (handler := self._handlers.get(ready)) is not None:
                    self._guarded("receive", handler, ready)
                elif (entry := self._streams.get(ready)) is not None:
                    self._guarded("stream", entry[1])

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            function, args = self._posted.popleft()
            self._guarded("send", function, *args)

    def _guarded(self, what: str, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            self._on_error(what, error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
