"""Sending memory on a socket without copying it: ``vmsplice`` into a pipe, ``splice`` from there into the socket.

The system then holds the memory's pages themselves until the other side has acknowledged their bytes, and reads them
when it sends (on loopback: when the other side receives). Whoever sends must leave the memory as it is until then; the
checksum that was taken before shows when it did not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket

import numpy as np

SPLICE_F_NONBLOCK, SPLICE_F_MORE = 2, 4
PIPE_BYTES = 1 << 20  # the most that a pipe of an ordinary user may have
MAX_PIECES = 1024  # of one call: IOV_MAX


class SplicingRefused(OSError):
    """The system does not splice this memory; nothing is under way in the pipe."""


_libc = ctypes.CDLL(None, use_errno=True)
_vmsplice = _libc.vmsplice
_vmsplice.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_vmsplice.restype = ctypes.c_ssize_t


class Splicer:
    """A pipe in front of a socket that does not block.

    Raises:
        OSError: no descriptors left.
    """

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waiting_bytes = 0  # in the pipe
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, stream: socket.socket, table: np.ndarray) -> tuple[np.ndarray, int, bool]:
        """Send what pipe and socket take now.

        Args:
            table: addresses and sizes of what is left of the memory, uint64 ``[pieces, 2]``; changed in place.

        Returns:
            What is left of it (outside the pipe), the bytes that the socket took, and whether all of them have gone.

        Raises:
            SplicingRefused: it has to be copied.
            OSError: the connection is gone.
        """
        if not self._waiting_bytes:
            moved = _vmsplice(self._in, table.ctypes.data, min(len(table), MAX_PIECES), SPLICE_F_NONBLOCK)
            if moved < 0:
                code = ctypes.get_errno()
                raise SplicingRefused(code, os.strerror(code))
            self._waiting_bytes = moved
            table = advance(table, moved)
        more = SPLICE_F_MORE if table.size else 0
        try:
            sent = os.splice(self._out, stream.fileno(), self._waiting_bytes, flags=SPLICE_F_NONBLOCK | more)
        except BlockingIOError:
            return table, 0, False
        self._waiting_bytes -= sent
        return table, sent, not table.size and not self._waiting_bytes

    def close(self) -> None:
        """Close the pipe; called once."""
        os.close(self._out)
        os.close(self._in)


def advance(table: np.ndarray, size_bytes: int) -> np.ndarray:
    """What is left of some pieces after their first ``size_bytes``; the first piece left is changed in place."""
    ends = np.cumsum(table[:, 1])
    gone = int(np.searchsorted(ends, np.uint64(size_bytes), side="right"))
    left = table[gone:]
    if left.size:
        into = np.uint64(size_bytes - (int(ends[gone - 1]) if gone else 0))
        left[0] += np.array((into, 0), dtype=np.uint64)
        left[0, 1] -= into
    return left
