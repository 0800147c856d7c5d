"""Sender-side staging: fixed slots that the socket and the ranks of this host read straight from.

A slot is taken for one chunk and filled once. The slot is free again when nobody holds it: neither the maker, nor a
data channel that has not sent the chunk yet, nor a rank of this host that has not acknowledged the chunk yet. Staging
never exceeds the memory of all slots. A chunk that is sent straight from the pool has a slot without memory.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch

logger = logging.getLogger(__name__)
NO_MEMORY = np.empty(0, dtype=np.uint8)


class Slot:
    """One chunk's worth of staging, at ``offset`` of the whole."""

    __slots__ = ("buffer", "holders", "offset", "pending", "reserved")

    def __init__(self, buffer: np.ndarray, offset: int) -> None:
        self.buffer = buffer  # empty if the chunk stays in the pool
        self.offset = offset
        self.reserved = False  # True once memory is reserved for the slot
        self.pending = 0  # the number of holders: the maker, data channels, readers
        self.holders: list[Callable[[], None]] = []  # called when the slot is free again


class Staging:
    """A pool of slots. Not thread-safe: the agent's lock guards it.

    Args:
        memory: uint8 ``[bytes]``.
        slot_bytes: the size of one slot.
        reserve: called with offset and size before a slot is first used; while it raises OSError, only the slots that
            have memory count.
    """

    def __init__(
        self, memory: np.ndarray, slot_bytes: int, reserve: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self.slot_bytes = slot_bytes
        self._reserve, self._reserved = reserve, 0
        self.slots = memory.size // slot_bytes
        self._free = [
            Slot(memory[start : start + slot_bytes], start)
            for start in reversed(range(0, self.slots * slot_bytes, slot_bytes))
        ]
        self._busy: list[Slot] = []

    @property
    def used_bytes(self) -> int:
        """The bytes of the slots that are taken."""
        return sum(bool(slot.buffer.size) for slot in self._busy) * self.slot_bytes

    @property
    def limit_bytes(self) -> int:
        return self.slots * self.slot_bytes

    def take(self) -> Slot | None:
        """Take the free slot that was used last, so that no more memory is touched than is in use, or return None."""
        if not self._free:
            self.reap()
        if not self._free or not self._has_memory(self._free[-1]):
            return None
        slot = self._free.pop()
        slot.pending = 1  # the taker's own hold
        self._busy.append(slot)
        return slot

    def hold(self) -> Slot:
        """Return a slot without memory, for a chunk that stays in the pool."""
        slot = Slot(NO_MEMORY, 0)
        slot.pending = 1  # the taker's own hold
        self._busy.append(slot)
        return slot

    def _has_memory(self, slot: Slot) -> bool:
        """Reserve a slot's memory before its first use. Return whether there is any."""
        if slot.reserved:
            return True
        try:
            self._reserve(slot.offset, self.slot_bytes)
        except OSError as error:
            if self.slots != self._reserved:
                self.slots = self._reserved  # until a later reservation succeeds
                logger.warning("no memory for more than %d bytes of staging: %s", self.limit_bytes, error)
            return False
        slot.reserved = True
        self._reserved += 1
        self.slots = max(self.slots, self._reserved)
        return True

    def reap(self) -> bool:
        """Free the slots that nobody holds any more. Return whether there were any."""
        still = []
        freed = False
        for slot in self._busy:
            if slot.pending == 0:
                for holder in slot.holders:
                    holder()
                slot.holders.clear()
                if slot.buffer.size:
                    self._free.append(slot)
                freed = True
            else:
                still.append(slot)
        self._busy = still
        return freed


PORTABLE, READ_ONLY = 1, 8  # cudaHostRegister's flags


def pin(memory: np.ndarray) -> None:
    """Register host memory with CUDA, so that copies to and from the device run asynchronously.

    Raises:
        RuntimeError: CUDA refused.
    """
    flags = PORTABLE if memory.flags.writeable else PORTABLE | READ_ONLY
    result = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, flags)
    if int(result) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed: {result}; lower staging_bytes")


def unpin(address: int) -> None:
    """Undo `pin` of the memory at an address, which may be reused later: CUDA refuses to register it twice.

    Raises:
        RuntimeError: CUDA refused.
    """
    result = torch.cuda.cudart().cudaHostUnregister(address)
    if int(result) != 0:
        raise RuntimeError(f"cudaHostUnregister failed: {result}")
