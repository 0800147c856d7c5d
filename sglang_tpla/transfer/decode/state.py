"""What a decode agent remembers: connections, rooms, and for each (room, prefill rank) a source of numbered
chunks.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import zmq

from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.decode.coverage import Coverage
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.staging import Slot
from sglang_tpla.transfer.network.data_channel import ChunkReader
from sglang_tpla.transfer.room import NO_LIMITS, Limits, RoomState

Address = tuple[str, int]
ChunkId = tuple[int, int]  # part, sequence


class Link(enum.Enum):
    """State of a connection."""

    CONNECTING = "connecting"
    REGISTERED = "registered"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(eq=False)
class Connection:
    """One DEALER socket to one prefill rank, with an identity of its own."""

    address: Address
    identity: bytes
    last_seen: float
    socket: zmq.Socket | None = None
    monitor: zmq.Socket | None = None
    inbox: ChunkReader[frames.Chunk] | None = None  # the data channel, where there is one
    data_port: int = 0  # of the data channel that was offered last
    dialled: float = 0.0  # when the data channel was
    without_channel: float | None = None  # since when none has lasted until a chunk had come on it
    channel_error: str = ""  # why the last one ended
    link: Link = Link.CONNECTING
    reason: str = ""
    agent: str = ""
    began: float = 0.0  # when the prefill agent did, by this process's clock
    limits: Limits = NO_LIMITS  # of the prefill rank
    told_at: float = 0.0  # when it was last told which rooms wait here
    layers: tuple[int, int] = (0, 0)  # first layer and number of layers that the prefill rank holds
    unanswered: int = 0  # times that it broke before the prefill rank had ever answered
    broken_since: float | None = None  # monotonic; None while the connection holds
    # what the prefill rank was told of rooms that have ended, and when: it is said again when the connection is back
    said: deque[tuple[frames.Message, float]] = field(default_factory=lambda: deque(maxlen=1024))
    arenas: dict[str, memoryview] = field(default_factory=dict)  # by agent: its own and the neighbours'
    last_ping: float = 0.0
    pings: int = 0

    @property
    def name(self) -> str:
        """For messages and logs."""
        return f"prefill rank at {self.address[0]}:{self.address[1]}"


@dataclass(eq=False)
class Source:
    """One prefill rank's part in a room."""

    connection: Connection
    dummy: bool
    asked: bool = False
    share: tuple[int, int] = (0, 1)  # which of the prefill ranks with the same layers it is, and of how many
    wanted_bytes: int = 0
    granted_bytes: int = 0
    received_bytes: int = 0
    released_bytes: int = 0
    pending: set[ChunkId] = field(default_factory=set)
    applied: set[ChunkId] = field(default_factory=set)
    claims: dict[ChunkId, tuple[int, int, int, int]] = field(
        default_factory=dict
    )  # each chunk's layers and tokens
    chunks: int | None = None
    tokens: int = 0
    metadata: bytes = b""

    @property
    def outstanding_bytes(self) -> int:
        """Credit that staging must be kept free for, and chunks in it."""
        return self.granted_bytes - self.released_bytes

    @property
    def complete(self) -> bool:
        """True when every announced chunk is in the pool, and no other chunk has begun to come; a dummy was asked."""
        if self.dummy:
            return self.asked or self.connection.link in (Link.LOST, Link.REFUSED)
        return self.chunks is not None and len(self.applied) == len(self.claims) == self.chunks


class Writes:
    """Writes into the pages and the metadata row of one room: several at a time, none after the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._ended = False

    @contextmanager
    def one(self, *, last: bool = False) -> Iterator[bool]:
        """One write; False where none is allowed any more. None follows the last one."""
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
        """Allow no more, and wait for those under way."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._under_way)


@dataclass(eq=False)
class Room:
    """One generation of a room on a decode rank."""

    room: int
    generation: int
    sources: dict[Address, Source]
    born: float  # when its request came
    prompt_tokens: int  # of the whole request; 0: not known
    progress: float  # when rows were asked for, or a chunk last came that was not there
    state: RoomState = RoomState.BOOTSTRAPPING
    reason: str = ""
    slots: Slots = field(default_factory=lambda: Slots(np.empty(0, dtype=np.int64)))
    metadata_row: int = -1
    expected_ranks: int = 1
    prefix_tokens: int = 0
    num_tokens: int = -1
    coverage: Coverage | None = None  # from the request on
    requested: float | None = None
    ended: float | None = None
    wire_bytes: int = 0
    shared_memory_bytes: int = 0
    resent: int = 0
    writes: Writes = field(default_factory=Writes)


@dataclass(eq=False)
class Arrival:
    """A chunk in staging, or in an arena that this rank reads."""

    room: Room
    source: Source
    chunk: frames.Chunk | frames.Share
    payload: memoryview
    credit_bytes: int  # of staging that it holds; none in an arena
    layers: range  # of the pool, by index


@dataclass(eq=False)
class Kept:
    """A payload in this rank's arena, for its neighbours."""

    room: Room
    connection: Connection
    slot: Slot
    size_bytes: int
    since: float
