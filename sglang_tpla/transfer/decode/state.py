"""What a decode agent remembers: connections, rooms, and for each (room, prefill rank) a source of numbered chunks.

Any part of the agent may read an attribute, under the agent's lock; the one module that writes it is named beside it.
"""

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.coverage import Coverage
from sglang_tpla.transfer.decode.write_gate import WriteGate
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.staging import Slot
from sglang_tpla.transfer.room import NO_LIMITS, Limits, RoomState

Address = tuple[str, int]
AnyChunk = messages.Chunk | messages.Share
ChunkId = tuple[int, int]  # part, sequence


def chunk_id(chunk: AnyChunk) -> ChunkId:
    """Return the name of a chunk among those of its source."""
    return chunk.part, chunk.sequence


class Link(enum.Enum):
    CONNECTING = "connecting"
    REGISTERED = "registered"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(eq=False)
class Connection:
    """One DEALER socket to one prefill rank, with an identity of its own, and its data channel."""

    # connections.py writes these, on the I/O thread
    address: Address
    identity: bytes
    last_seen: float
    socket: Any = None
    monitor: Any = None
    link: Link = Link.CONNECTING
    lost_reason: str = ""
    agent: str = ""
    began: float = 0.0  # when the prefill agent did, by this process's clock
    limits: Limits = NO_LIMITS  # of the prefill rank
    layers: tuple[int, int] = (0, 0)  # first layer and number of layers that the prefill rank holds
    unanswered: int = 0  # times that it broke before the prefill rank had ever answered
    broken_since: float | None = None  # monotonic; None while the connection holds
    # by agent: its own and the colocated ranks'
    segments: dict[str, memoryview] = field(default_factory=dict)
    last_ping: float = 0.0
    pings: int = 0
    # data_channels.py, on the I/O thread
    reader: Any = None  # the data channel's, while there is one
    data_port: int = 0  # of the data channel that was offered last
    dialled: float = 0.0  # when the data channel was dialled
    last_chunk: float = 0.0  # when a chunk last came
    without_channel: float | None = None  # since when none has lasted until a chunk had come on it
    starved_since: float | None = None  # since when a room has wanted rows that no channel brought
    channel_error: str = ""  # why the last data channel ended
    # rooms.py, under the lock
    told_at: float = 0.0  # when the prefill rank was last told which rooms wait here
    # messages that no answer confirms, and when they were sent: they are sent again when the connection is back
    said: deque[tuple[messages.Message, float]] = field(default_factory=lambda: deque(maxlen=1024))

    @property
    def name(self) -> str:
        return f"prefill rank at {self.address[0]}:{self.address[1]}"


@dataclass(eq=False)
class Source:
    """One prefill rank's part in a room."""

    # rooms.py writes these
    connection: Connection
    dummy: bool
    asked: bool = False
    share: tuple[int, int] = (0, 1)  # which of the prefill ranks with the same layers it is, and of how many
    pending: set[ChunkId] = field(default_factory=set)
    applied: set[ChunkId] = field(default_factory=set)
    # layers and tokens of chunks
    claims: dict[ChunkId, tuple[int, int, int, int]] = field(default_factory=dict)
    chunks: int | None = None  # in all, once the prefill rank has said so
    tokens: int = 0
    metadata: bytes = b""
    # credits.py
    wanted_bytes: int = 0
    granted_bytes: int = 0
    received_bytes: int = 0
    released_bytes: int = 0

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


@dataclass(eq=False)
class Room:
    """One generation of a room on a decode rank. Only rooms.py writes it."""

    room_id: int
    generation: int
    sources: dict[Address, Source]
    born: float  # when its request came
    prompt_tokens: int  # of the whole request; 0: not known
    progress: float  # when rows were asked for, or a chunk last came that was not there
    state: RoomState = RoomState.BOOTSTRAPPING
    reason: str = ""
    slots: Slots = field(default_factory=lambda: Slots(np.empty(0, dtype=np.int64)))
    metadata_row: int = -1
    after: Any = None  # an event before which no row must be written
    request: messages.Request | None = None  # to each prefill rank, but for its share
    coverage: Coverage | None = None  # from the request on
    requested: float | None = None
    ended: float | None = None
    wire_bytes: int = 0
    shared_memory_bytes: int = 0
    resent: int = 0
    writes: WriteGate = field(default_factory=WriteGate)


@dataclass(eq=False)
class StagedChunk:
    """A chunk in staging, or in shared memory that this rank reads."""

    room: Room
    source: Source
    chunk: AnyChunk
    payload: memoryview
    credit_bytes: int  # of staging that it holds; none in shared memory


@dataclass(eq=False)
class RetainedChunk:
    """A payload in this rank's shared segment, for the colocated ranks."""

    room: Room
    connection: Connection
    slot: Slot
    size_bytes: int
    since: float
