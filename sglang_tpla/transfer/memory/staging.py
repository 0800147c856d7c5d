"""Sender-side staging: fixed slots that the socket and the ranks of this host read straight from.

A slot is taken for one chunk and filled once. It is free again when nobody holds it: the maker, sockets that have not
taken it yet, and each rank of this host that has not yet acknowledged the chunk. The ceiling is the memory of all
slots; nothing is allocated beyond it. A chunk that is sent from where it lies in the pool has a slot without memory.
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
        self.buffer = buffer  # of no bytes where the chunk stays in the pool
        self.offset = offset
        self.reserved = False  # its memory is known to be there
        self.pending = 0  # holds of this process: the maker, frames not yet handed over, readers
        self.holders: list[Callable[[], None]] = []  # told when the slot is free again


class Staging:
    """A pool of slots. Not thread-safe: the agent's lock guards it.

    Args:
        memory: uint8.
        slot_bytes: of one slot.
        reserve: called with offset and size before a slot is first used; while it raises OSError there are no more
            slots than those that have memory.
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
                self.slots = self._reserved  # what there is, until there is more
                logger.warning("no memory for more than %d bytes of staging: %s", self.limit_bytes, error)
            return False
        slot.reserved = True
        self._reserved += 1
        self.slots = max(self.slots, self._reserved)
        return True

    def reap(self) -> bool:
        """Free the slots that nobody holds any more. Return whether there was one."""
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
    """Register host memory with CUDA, so that copies to and from the device run by themselves.

    Raises:
        RuntimeError: CUDA refused.
    """
    flags = PORTABLE if memory.flags.writeable else PORTABLE | READ_ONLY
    result = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, flags)
    if int(result) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed: {result}; lower staging_bytes")


def unpin(address: int) -> None:
    """Undo `pin` of the memory there: the address may be another's later, and CUDA refuses to register it twice.

    Raises:
        RuntimeError: CUDA refused.
    """
    result = torch.cuda.cudart().cudaHostUnregister(address)
    if int(result) != 0:
        raise RuntimeError(f"cudaHostUnregister failed: {result}")
