"""Both ends of a data channel on a socket pair, and chunks to send over it."""

import contextlib
import socket
from collections.abc import Iterator

import numpy as np

from sglang_tpla.transfer.memory.iovec import IoVec, one_piece

Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def socket_pair() -> Iterator[Pair]:
    """Yield two connected sockets that do not block, with small buffers."""
    near, far = socket.socketpair()
    with near, far:
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        yield near, far


def in_pieces(payload: bytes | np.ndarray, count: int) -> IoVec:
    """Cut a payload into ``count`` pieces, whose ends are not at page boundaries."""
    memory = np.frombuffer(payload, dtype=np.uint8) if isinstance(payload, bytes) else payload
    parts = [one_piece(part) for part in np.array_split(memory, count) if part.size]
    return IoVec(np.concatenate([part.table for part in parts]), memory)


def random_chunks(count: int) -> list[tuple[bytes, bytes]]:
    """Return headers and payloads of random sizes."""
    random = np.random.default_rng(0)
    sizes = [(int(random.integers(14, 300)), int(random.integers(1, 60000))) for _ in range(count)]
    return [(random.bytes(header), random.bytes(payload)) for header, payload in sizes]
