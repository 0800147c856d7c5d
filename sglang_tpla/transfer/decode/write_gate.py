"""A gate that keeps anything from being written into a room's pages once the room has ended."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class WriteGate:
    """Admits any thread's writes to one room's pages and metadata row: several at a time, none after the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._ended = False

    @contextmanager
    def one(self, *, last: bool = False) -> Iterator[bool]:
        """Admit one write, or yield False if no more writes are allowed. No write follows the ``last`` one."""
        with self._changed:
            allowed = not self._ended
            self._ended = self._ended or last
            self._under_way += allowed
        try:
            yield allowed
        finally:
            with self._changed:
                self._under_way -= allowed
                self._changed.notify_all()

    def end(self) -> None:
        """Admit no more writes, and wait for those under way."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._under_way)
