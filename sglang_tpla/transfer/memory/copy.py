"""Copy, check, send and receive payloads in pieces (`iovec.IoVec`): in C if `native` is compiled, else in Python.

An object of this module serves one payload, and only one thread uses it at a time.
"""

import ctypes
import os
import socket

import numpy as np
import xxhash

from sglang_tpla.transfer.memory import native
from sglang_tpla.transfer.memory.iovec import Cursor, IoVec

MIN_NATIVE_BYTES = 241  # native.c lacks XXH3's other formulas for shorter payloads
END = np.zeros((1, 2), dtype=np.uint64)  # the entry that ends a list of pieces
MAX_PIECES = 1024  # the limit of one system call: IOV_MAX
WAY_FIELDS = 4  # fields of native.c's Way, which records how far a payload has moved
UNCHECKED = b"unchecked"
SEND_BYTES, SEND_PIECES = 1 << 20, 64  # limits of one system call


class Checksum:
    """A running xxh3 (64 bits, big-endian: `messages.checksum`) of ``size_bytes`` in C, at least `MIN_NATIVE_BYTES`."""

    def __init__(self, library: ctypes.CDLL, size_bytes: int) -> None:
        self._library = library
        self._memory = ctypes.create_string_buffer(library.checksum_bytes())
        self.pointer: int | None = ctypes.addressof(self._memory)
        library.checksum_start(self.pointer, size_bytes)

    def digest(self) -> bytes:
        return int(self._library.checksum_end(self.pointer)).to_bytes(8, "big")


def _library(size_bytes: int) -> ctypes.CDLL | None:
    return native.library() if size_bytes >= MIN_NATIVE_BYTES else None


def _listed(pieces: IoVec) -> np.ndarray:
    return np.concatenate((pieces.table, END))


def check_pieces(pieces: IoVec) -> bytes:
    library = _library(pieces.size_bytes)
    if library is not None:
        checksum, table = Checksum(library, pieces.size_bytes), _listed(pieces)
        library.check_pieces(checksum.pointer, table.ctypes.data)
        return checksum.digest()
    running = xxhash.xxh3_64()
    for view in pieces.views:
        running.update(view)
    return running.digest()


def copy_pieces(source: IoVec, target: IoVec) -> bytes:
    """Copy a payload into other pieces of the same total size. Return the checksum of the copied bytes."""
    library = _library(source.size_bytes)
    if library is not None:
        checksum = Checksum(library, source.size_bytes)
        tables = [_listed(pieces) for pieces in (source, target)]
        library.copy_pieces(checksum.pointer, *(table.ctypes.data for table in tables))
        return checksum.digest()
    running, cursor = xxhash.xxh3_64(), Cursor(target)
    for view in source.views:
        done = 0
        while done < view.nbytes:
            (place,) = cursor.ahead(view.nbytes - done, 1)
            piece = view[done : done + place.nbytes]
            place[:] = piece
            running.update(piece)
            cursor.advance(place.nbytes)
            done += place.nbytes
    return running.digest()


class SocketCopy:
    """Moves a payload from a socket into its pieces (`receive`), or from the pieces into a socket (`send`).

    The checksum is computed on the way, in both directions.

    Args:
        digest: the payload's checksum if it is known already, `UNCHECKED` if it is not needed, or empty to compute it.
    """

    def __init__(self, pieces: IoVec, digest: bytes = b"") -> None:
        self.left_bytes = pieces.size_bytes
        self._pieces, self._digest = pieces, digest  # the pieces keep the memory alive
        self._library = _library(pieces.size_bytes)
        self._checksum: Checksum | None = None
        if self._library is not None:
            self._checksum = None if digest else Checksum(self._library, pieces.size_bytes)
            self._sum = self._checksum.pointer if self._checksum is not None else None
            self._table, self._way = pieces.table.copy(), (ctypes.c_uint64 * WAY_FIELDS)()  # C changes both
            self._place = self._sum, self._table.ctypes.data, ctypes.addressof(self._way)
        else:
            self._running, self._cursor = xxhash.xxh3_64(), Cursor(pieces)

    def digest(self) -> bytes:
        """Return the checksum of the payload, once all of it has moved."""
        if self._digest:
            return self._digest
        return self._checksum.digest() if self._checksum is not None else self._running.digest()

    def _advance(self, size_bytes: int) -> None:
        """Advance by the bytes that have moved, and add them to the checksum, without C."""
        left = size_bytes
        for view in self._cursor.ahead(size_bytes, MAX_PIECES) if size_bytes and not self._digest else ():
            self._running.update(view[:left])
            left -= min(left, view.nbytes)
        self._cursor.advance(size_bytes)

    def receive(self, stream: socket.socket, limit_bytes: int) -> int:
        """Take the bytes that a non-blocking socket has, up to about ``limit_bytes``. Return how many, 0 at the end of
        the stream.

        Raises:
            BlockingIOError: the socket has nothing now.
            OSError: the connection is gone.
        """
        if self._library is None:
            size = stream.recvmsg_into(self._cursor.ahead(limit_bytes, MAX_PIECES))[0]
            self._advance(size)
        else:
            size = self._library.receive_pieces(*self._place, stream.fileno(), len(self._table), limit_bytes)
            if size < 0:
                raise _error(-size)
        self.left_bytes -= size
        return size

    def send(self, stream: socket.socket) -> int:
        """Send as much as a socket takes now. Return how many bytes.

        Raises:
            BlockingIOError: the socket takes nothing now.
            OSError: the connection is gone.
        """
        if self._library is None:
            sent = stream.sendmsg(self._cursor.ahead(SEND_BYTES, SEND_PIECES))
            self._advance(sent)
        else:
            sent = self._library.send_pieces(*self._place, stream.fileno(), len(self._table))
            if sent < 0:
                raise _error(-sent)
        self.left_bytes -= sent
        return sent


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))  # Python makes this a BlockingIOError for EAGAIN
