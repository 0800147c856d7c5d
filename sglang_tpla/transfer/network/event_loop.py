"""The I/O thread: owns every socket of an agent, runs what other threads post, and survives any one handler's error.

An exception in a handler is the agent's to report (`on_error`) and the loop goes on. If the loop itself
cannot go on, `on_death` is told why: nothing ends silently.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

MAX_SOCKETS = 65535  # the most that ZMQ allows; a connection takes three, and its default of 1,023 ends at 341


class IoLoop:
    """One daemon thread around a poller; the sockets and the time of an agent come from here."""

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
        """Start the thread; ``on_error`` hears of exceptions that it outlives, ``on_death`` of the one that ends it."""
        self._tick_s, self._on_tick, self._on_error, self._on_death = tick_s, on_tick, on_error, on_death
        self.thread.start()

    def tcp_socket(self, host: str) -> socket.socket:
        """Return a plain socket that can be connected to a host."""
        return socket.socket(_family(host), socket.SOCK_STREAM)

    def tcp_listener(self, host: str, port: int) -> socket.socket:
        """Return a plain socket that listens on a host's address, or on every address for "*".

        Raises:
            OSError: nothing can listen there.
        """
        return socket.create_server(("" if host == "*" else host, port), family=_family(host))

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run ``function(*args)`` in the thread, in order. From any thread; ignored after the end."""
        self._posted.append((function, args))
        with self._guard:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def add(self, socket: zmq.Socket, handler: Callable[[zmq.Socket], None]) -> None:
        """Call ``handler(socket)`` when it can be read. In the thread, or before it starts."""
        self._handlers[socket] = handler
        self._poller.register(socket, zmq.POLLIN)

    def remove(self, socket: zmq.Socket, linger_ms: int = 0) -> None:
        """Stop polling a socket and close it. In the thread."""
        if self._handlers.pop(socket, None) is not None:
            self._poller.unregister(socket)
        socket.close(linger=linger_ms)

    def add_stream(self, stream: socket.socket, handler: Callable[[], None]) -> None:
        """Call ``handler()`` when a plain socket can be read (see also `watch`). As `add`."""
        self._streams[stream.fileno()] = stream, handler
        self._poller.register(stream.fileno(), zmq.POLLIN)

    def watch(self, stream: socket.socket, writable: bool) -> None:
        """Also call a plain socket's handler when it can be written, or no longer. In the thread."""
        self._poller.register(stream.fileno(), zmq.POLLIN | (zmq.POLLOUT if writable else 0))

    def rest(self, stream: socket.socket) -> None:
        """Do not ask a plain socket again until it is watched. In the thread."""
        self._poller.register(stream.fileno(), 0)

    def remove_stream(self, stream: socket.socket) -> None:
        """Stop polling a plain socket, before it is closed. In the thread."""
        if self._streams.pop(stream.fileno(), None) is not None:
            self._poller.unregister(stream.fileno())

    def stop(self) -> None:
        """End the thread, close every socket, free the context. From another thread."""
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
        """Free what was opened, at the loop's end or where it will not be started."""
        for polled in list(self._handlers):
            polled.close(linger=linger_ms)
        self._handlers.clear()
        self.context.destroy(linger=linger_ms)  # what was said last goes before the streams' end is seen
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
