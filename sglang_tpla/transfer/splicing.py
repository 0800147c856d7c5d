"""Sending memory on a socket without copying it: ``vmsplice`` into a pipe, ``splice`` from there into the socket.

The system then holds the memory's pages themselves until the other side has acknowledged their bytes, and reads them
when it sends (on loopback: when the other side receives). Whoever sends must leave the memory as it is until then; the
checksum that is taken as the memory goes into the pipe shows when it did not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket

SPLICE_F_NONBLOCK, SPLICE_F_MORE = 2, 4
PIPE_BYTES = 1 << 20  # the most that a pipe of an ordinary user may have


class SplicingRefused(OSError):
    """The system does not splice this memory; nothing is under way in the pipe."""


_libc = ctypes.CDLL(None, use_errno=True)
_vmsplice = _libc.vmsplice
_vmsplice.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_vmsplice.restype = ctypes.c_ssize_t


class Splicer:
    """A pipe in front of a socket that does not block.

    Attributes:
        exit, entry: its ends.
        waiting_bytes: in the pipe.

    Raises:
        OSError: no descriptors left.
    """

    def __init__(self) -> None:
        self.exit, self.entry = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.waiting_bytes = 0
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.entry, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def fill(self, vector: int, pieces: int) -> int:
        """Put what ``pieces`` of ``struct iovec`` at ``vector`` name into the empty pipe: bytes.

        Raises:
            SplicingRefused: it has to be copied.
        """
        moved: int = _vmsplice(self.entry, vector, pieces, SPLICE_F_NONBLOCK)
        if moved < 0:
            code = ctypes.get_errno()
            raise SplicingRefused(code, os.strerror(code))
        self.waiting_bytes = moved
        return moved

    def drain(self, stream: socket.socket, *, more: bool) -> int:
        """Send what the socket takes now: bytes. ``more`` will follow.

        Raises:
            OSError: the connection is gone.
        """
        flags = SPLICE_F_NONBLOCK | (SPLICE_F_MORE if more else 0)
        try:
            sent = os.splice(self.exit, stream.fileno(), self.waiting_bytes, flags=flags)
        except BlockingIOError:
            return 0
        self.waiting_bytes -= sent
        return sent

    def close(self) -> None:
        """Close the pipe; called once."""
        os.close(self.exit)
        os.close(self.entry)
