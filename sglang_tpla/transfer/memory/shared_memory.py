"""Shared memory without a name: a memfd that processes of the same host and user map through /proc.

Without a name there is nothing to clean up: the memory is freed when the last process that maps it ends, however it
ends. Pages are reserved before they are first written, so that a system without free memory raises an error here and no
signal later. A random token in the first bytes tells a mapped segment from another that happens to have the same
process and descriptor numbers (a different process-id namespace, a reused process id).
"""

import fcntl
import logging
import mmap
import os
import secrets
import socket
import weakref

import numpy as np
import torch

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory.staging import pin, unpin

HEADER_BYTES = 4096
TOKEN_BYTES = 8


def host_identity() -> str:
    """Return a name of this host, user and process-id namespace, equal for processes that can share segments."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"
    except OSError:
        return f"{socket.gethostname()}/{secrets.token_hex(8)}"  # unlike any other, so nothing is mapped


class SharedSegment:
    """This process's shared segment: ``data`` (uint8) behind a header page."""

    def __init__(self, agent: str, size_bytes: int) -> None:
        self._file = os.memfd_create("sglang-tpla", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, HEADER_BYTES + size_bytes)
        # seal the size, because a reader is killed if the memory that it maps shrinks
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self._file, HEADER_BYTES + size_bytes)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._map[:TOKEN_BYTES] = token
        self.data = np.frombuffer(self._map, dtype=np.uint8, offset=HEADER_BYTES)
        self.announcement = messages.Segment(agent, os.getpid(), self._file, size_bytes, token)

    def reserve(self, offset: int, size_bytes: int) -> None:
        """Reserve memory for a piece of ``data``.

        Raises:
            OSError: there is no memory left.
        """
        os.posix_fallocate(self._file, HEADER_BYTES + offset, size_bytes)

    def close(self) -> None:
        """Close the descriptor. The memory is freed with its last user."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def map_segment(segment: messages.Segment) -> np.ndarray | None:
    """Map another process's segment for reading (uint8, without its header). Return None if it cannot be mapped."""
    try:
        # the process may have ended, and its numbers may be a named pipe's, which would wait for a writer
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(f"/proc/{segment.pid}/fd/{segment.descriptor}", flags)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size != HEADER_BYTES + segment.size_bytes:
            return None
        if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return None
        memory = mmap.mmap(file, HEADER_BYTES + segment.size_bytes, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    if memory[:TOKEN_BYTES] != segment.token:
        return None
    return np.frombuffer(memory, dtype=np.uint8, offset=HEADER_BYTES)


def map_for(device: torch.device | None, segment: messages.Segment, logger: logging.Logger) -> memoryview | None:
    """Map a segment as `map_segment` does, and pin it, so that a GPU reads it without another copy."""
    data = map_segment(segment)
    if data is None:
        return None
    if device is not None and device.type == "cuda":
        try:
            with torch.cuda.device(device):
                pin(data)
        except RuntimeError as error:
            logger.warning("each chunk of agent %s is copied once more: %s", segment.agent, error)
        else:
            # the array dies with its last view, and before the mapping that it holds
            weakref.finalize(data, unpin, data.ctypes.data).atexit = False
    return data.data
