"""Credit: how many bytes each prefill rank may send. This module only counts bytes of staging; it never waits or sends.

Everything runs under the agent's lock.
"""

from collections import OrderedDict

from sglang_tpla.transfer.decode.state import Room, Source

# Bounds of one room's window if staging is large enough for several such rooms. One chunk in flight is too few: others
# should be on their way while one is acknowledged, and a chunk seldom fills the credit of a whole chunk that it got.
MIN_WINDOW_CHUNKS, WINDOW_CHUNKS = 4, 8


class Credits:
    """Hands out staging to the sources of rooms."""

    def __init__(self, limit_bytes: int, chunk_bytes: int) -> None:
        self.used_bytes = 0
        self.waiters: OrderedDict[Source, Room] = OrderedDict()  # sources that want more credit, oldest first
        self._limit_bytes, self._chunk_bytes = limit_bytes, chunk_bytes
        few, most = MIN_WINDOW_CHUNKS * chunk_bytes, WINDOW_CHUNKS * chunk_bytes
        self._window_bytes = min(max(few, limit_bytes // 8), most, max(2 * chunk_bytes, limit_bytes // 4))

    def want(self, room: Room, source: Source, total_bytes: int) -> None:
        """Note how many bytes a prefill rank has ready or has sent, in all."""
        source.wanted_bytes = max(source.wanted_bytes, total_bytes)
        self.waiters.setdefault(source, room)

    def covers(self, source: Source, size_bytes: int) -> bool:
        """Return whether a prefill rank's credit covers ``size_bytes`` more."""
        return source.received_bytes + size_bytes <= source.granted_bytes

    def receive(self, source: Source, size_bytes: int) -> None:
        """Use credit up for bytes that come, or have come."""
        source.received_bytes += size_bytes

    def unreceive(self, source: Source, size_bytes: int) -> None:
        """Count bytes as lost with their channel, because the chunk comes again."""
        source.received_bytes -= size_bytes

    def free(self, source: Source, size_bytes: int, *, retained: bool = False) -> None:
        """Free the staging of a chunk that is in its place, unless the chunk is retained for the colocated ranks."""
        source.released_bytes += size_bytes
        if not retained:
            self.used_bytes -= size_bytes

    def free_retained(self, size_bytes: int) -> None:
        """Free the staging of a retained chunk."""
        self.used_bytes -= size_bytes

    def void(self, source: Source) -> None:
        """Take back the credit given on a broken connection. Both sides count from the bytes that have come."""
        self.waiters.pop(source, None)
        self.used_bytes -= source.granted_bytes - source.received_bytes  # sent and lost, or never sent
        source.granted_bytes = source.wanted_bytes = source.received_bytes

    def end(self, source: Source) -> None:
        """Free all staging that a source holds, at the end of its room."""
        self.waiters.pop(source, None)
        self.used_bytes -= source.outstanding_bytes
        source.released_bytes = source.granted_bytes

    def grant(self) -> dict[Source, Room]:
        """Hand out staging, oldest wish first, a whole chunk's worth at a time. Return the sources that got some."""
        granted: dict[Source, Room] = {}
        for source, room in list(self.waiters.items()):
            missing = source.wanted_bytes - source.granted_bytes
            if missing > 0 and 2 * source.outstanding_bytes > self._window_bytes:
                continue  # each message has a price: wait until several chunks' worth can go in one
            while (missing := source.wanted_bytes - source.granted_bytes) > 0:
                quantum = min(self._chunk_bytes, missing)
                if source.outstanding_bytes + quantum > self._window_bytes:
                    break
                if self.used_bytes + quantum > self._limit_bytes:
                    break
                source.granted_bytes += quantum
                self.used_bytes += quantum
                granted[source] = room
            if missing <= 0:
                del self.waiters[source]
            elif self.used_bytes + min(self._chunk_bytes, missing) > self._limit_bytes:
                break  # the oldest gets the next bytes that come free
        return granted
