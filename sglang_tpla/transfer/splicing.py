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

from sglang_tpla.transfer.runs import Cursor

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

    def send(self, stream: socket.socket, cursor: Cursor) -> tuple[int, bool]:
        """Send what pipe and socket take now.

        Args:
            cursor: what has not gone into the pipe yet; moved on.

        Returns:
            The bytes that the socket took, and whether all of the payload has gone.

        Raises:
            SplicingRefused: it has to be copied.
            OSError: the connection is gone.
        """
        if not self._waiting_bytes:
            moved = _vmsplice(self._in, *cursor.vector(MAX_PIECES), SPLICE_F_NONBLOCK)
            if moved < 0:
                code = ctypes.get_errno()
                raise SplicingRefused(code, os.strerror(code))
            self._waiting_bytes = moved
            cursor.advance(moved)
        more = SPLICE_F_MORE if cursor else 0
        try:
            sent = os.splice(self._out, stream.fileno(), self._waiting_bytes, flags=SPLICE_F_NONBLOCK | more)
        except BlockingIOError:
            return 0, False
        self._waiting_bytes -= sent
        return sent, not cursor and not self._waiting_bytes

    def close(self) -> None:
        """Close the pipe; called once."""
        os.close(self._out)
        os.close(self._in)
