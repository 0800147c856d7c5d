"""Sender-side staging: fixed slots that the socket reads straight from.

A slot is taken for one chunk, filled, handed to the socket without a copy, and free again when ZMQ has let go
of it (its tracker says so). The ceiling is the memory of all slots; nothing is allocated beyond it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import zmq


class Slot:
    """One chunk's worth of staging."""

    __slots__ = ("buffer", "holders", "pending", "trackers", "view")

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.view: memoryview = buffer.data  # what the socket reads
        self.pending = 0  # frames not yet handed to the socket
        self.trackers: list[zmq.MessageTracker] = []
        self.holders: list[Callable[[], None]] = []  # told when the slot is free again


class Staging:
    """A pool of slots. Not thread-safe: the agent's lock guards it."""

    def __init__(self, limit_bytes: int, slot_bytes: int, pinned: bool = False) -> None:
        self.slot_bytes = slot_bytes
        self.slots = max(1, limit_bytes // slot_bytes)
        size = self.slots * slot_bytes
        if pinned:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            memory = np.empty(size, dtype=np.uint8)  # committed page by page as slots are first used
        self._free = [
            Slot(memory[index * slot_bytes : (index + 1) * slot_bytes])
            for index in reversed(range(self.slots))
        ]
        self._busy: list[Slot] = []

    @property
    def used_bytes(self) -> int:
        """Bytes in slots that are taken."""
        return len(self._busy) * self.slot_bytes

    @property
    def limit_bytes(self) -> int:
        """Bytes in all slots."""
        return self.slots * self.slot_bytes

    def take(self) -> Slot | None:
        """A free slot, or None."""
        if not self._free:
            self.reap()
        if not self._free:
            return None
        slot = self._free.pop()
        slot.pending = 1  # the taker's own hold
        self._busy.append(slot)
        return slot

    def reap(self) -> bool:
        """Free the slots that nobody holds any more; True if there was one."""
        still = []
        freed = False
        for slot in self._busy:
            if slot.pending == 0 and all(tracker.done for tracker in slot.trackers):
                slot.trackers.clear()
                for holder in slot.holders:
                    holder()
                slot.holders.clear()
                self._free.append(slot)
                freed = True
            else:
                still.append(slot)
        self._busy = still
        return freed
