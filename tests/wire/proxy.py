"""A TCP proxy between decode and prefill that does to their bytes what networks do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

Tamper = Callable[[bytes], bytes]


class FaultProxy:
    """Forwards each connection to ``port``, and each to its own ``data_port`` to that one.

    Faults are switched by its methods and attributes.

    Attributes:
        frozen: while set, nothing is forwarded, and connections stay open.
        refusing: while set, new connections are closed at once.
        tamper: applied to each piece of bytes from prefill to decode.
    """

    def __init__(self, port: int, data_port: int = 0) -> None:
        servers = [(socket.create_server(("127.0.0.1", 0)), target) for target in (port, data_port) if target]
        self._servers = [server for server, _ in servers]
        self.port, self.data_port = self._servers[0].getsockname()[1], self._servers[-1].getsockname()[1]
        self.flowing = threading.Event()
        self.flowing.set()
        self.refusing = False
        self.tamper: Tamper | None = None
        self.forwarded_bytes = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()
        for server, target in servers:
            self._start(self._accept, server, target)

    @property
    def peer(self) -> tuple[str, int, bool]:
        """As a sending peer of ``open_room``."""
        return ("127.0.0.1", self.port, False)

    def cut(self) -> None:
        """Break every connection."""
        with self._guard:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """End the proxy."""
        self.refusing = True
        self.flowing.set()
        for server in self._servers:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, server: socket.socket, target: int) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", target))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                self._pairs.append((near, far))
            self._start(self._pump, near, far, False)
            self._start(self._pump, far, near, True)

    def _pump(self, source: socket.socket, sink: socket.socket, from_prefill: bool) -> None:
        try:
            while data := source.recv(4096):
                self.flowing.wait()
                if from_prefill:
                    self.forwarded_bytes += len(data)
                    if self.tamper is not None:
                        data = self.tamper(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
