"""A TCP proxy between decode and prefill that damages, delays and cuts their traffic as networks do."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable

Tamper = Callable[[bytes], bytes]


class Spoiler:
    """Spoils some of the pieces of bytes that pass, all in the same way.

    Args:
        kind: ``drop``, ``delay``, ``duplicate``, ``reorder``, ``truncate``, ``flip`` or ``throttle``.
        seed: seeds the choice of pieces.
        chance: the probability that a piece is spoiled; every piece is throttled.
        bytes_per_s: the rate of a throttled connection.
    """

    KINDS = ("drop", "delay", "duplicate", "reorder", "truncate", "flip", "throttle")
    DELAY_S = 0.05
    BYTES_PER_S = 2e6

    def __init__(self, kind: str, seed: int, chance: float, bytes_per_s: float = BYTES_PER_S) -> None:
        self._kind, self._random, self._chance = kind, random.Random(seed), chance
        self._bytes_per_s = bytes_per_s
        self.spoiled = 0

    def __call__(self, data: bytes) -> bytes:
        if self._kind != "throttle" and self._random.random() > self._chance:
            return data
        self.spoiled += 1
        half = len(data) // 2
        match self._kind:
            case "drop":
                return b""
            case "delay":
                time.sleep(self.DELAY_S)
            case "duplicate":
                return data + data
            case "reorder":
                return data[half:] + data[:half]
            case "truncate":
                return data[:half]
            case "flip":
                bits = bytearray(data)
                bits[self._random.randrange(len(bits))] ^= 1 << self._random.randrange(8)
                return bytes(bits)
            case "throttle":
                time.sleep(len(data) / self._bytes_per_s)
        return data


class FaultProxy:
    """Forwards connections to ``port``, and connections to the proxy's own ``data_port`` to the given ``data_port``.

    The proxy listens on ``listen_port``, and for the data port on the port after it; 0 lets the system choose. Its
    methods and attributes switch faults on and off.

    Attributes:
        flowing: while cleared, nothing is forwarded, and connections stay open.
        refusing: while set, new connections are closed at once.
        tamper: applied to each piece of bytes from prefill to decode.
        tamper_up: applied to each piece of bytes from decode to prefill.
    """

    def __init__(self, port: int, data_port: int = 0, listen_port: int = 0) -> None:
        servers = [
            (socket.create_server(("127.0.0.1", own)), target)
            for target, own in ((port, listen_port), (data_port, listen_port and listen_port + 1))
            if target
        ]
        self._servers = [server for server, _ in servers]
        self.port, self.data_port = self._servers[0].getsockname()[1], self._servers[-1].getsockname()[1]
        self.flowing = threading.Event()
        self.flowing.set()
        self.refusing = False
        self.tamper: Tamper | None = None
        self.tamper_up: Tamper | None = None
        self.forwarded_bytes = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ended: list[tuple[socket.socket, socket.socket]] = []  # once for each direction that has ended
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()
        for server, target in servers:
            self._start(self._accept, server, target)

    @property
    def peer(self) -> tuple[str, int, bool]:
        """The proxy as a sending peer of ``open_room``."""
        return ("127.0.0.1", self.port, False)

    def cut(self) -> None:
        with self._guard:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self.refusing = True
        self.flowing.set()
        for server in self._servers:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        self.cut()
        with self._guard:
            threads = list(self._threads)
        for thread in threads:
            thread.join(5)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        with self._guard:
            self._threads.append(thread)

    def _accept(self, server: socket.socket, target: int) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", target))
            except OSError:  # nothing listens there now
                near.close()
                continue
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
                tamper = self.tamper if from_prefill else self.tamper_up
                sink.sendall(data if tamper is None else tamper(data))
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._guard:  # the direction that ends last closes both sockets
            pair = (sink, source) if from_prefill else (source, sink)
            self._ended.append(pair)
            if self._ended.count(pair) < 2:
                return
            self._ended = [other for other in self._ended if other != pair]
            self._pairs = [other for other in self._pairs if other != pair]
            self._threads = [thread for thread in self._threads if thread.is_alive()]
        for end in pair:
            end.close()
