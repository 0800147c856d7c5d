"""The state of a decode agent: connections, rooms, and for each (room, prefill rank) a source of numbered chunks.

Any part of the agent may read an attribute, under the agent's lock; a comment names the one module that writes it.
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
    """One DEALER socket to one prefill rank, with a random identity, and its data channel."""

    # connections.py writes these, on the I/O thread
    address: Address
    identity: bytes
    last_seen: float
    socket: Any = None
    monitor: Any = None
    link: Link = Link.CONNECTING
    lost_reason: str = ""
    agent: str = ""
    began: float = 0.0  # when the prefill agent started, by this process's clock
    limits: Limits = NO_LIMITS  # of the prefill rank
    layers: tuple[int, int] = (0, 0)  # first layer and number of layers that the prefill rank holds
    unanswered: int = 0  # times that the connection broke before the prefill rank had ever answered
    broken_since: float | None = None  # monotonic; None while the connection holds
    # mapped segments by agent: the prefill rank's and the colocated ranks'
    segments: dict[str, memoryview] = field(default_factory=dict)
    last_ping: float = 0.0
    pings: int = 0
    # data_channels.py, on the I/O thread
    reader: Any = None  # the data channel's `ChunkReader`, while there is a channel
    data_port: int = 0  # of the data channel that was offered last
    dialled: float = 0.0  # when the data channel was dialled
    last_chunk: float = 0.0  # when a chunk last came
    without_channel: float | None = None  # since when no channel has lasted until a whole chunk came
    starved_since: float | None = None  # since when a room has wanted rows that no channel brought
    channel_error: str = ""  # why the last data channel ended
    # rooms.py, under the lock
    told_at: float = 0.0  # when the prefill rank was last told which rooms wait here
    # messages that no answer confirms, with the times they were sent, to be repeated when the connection is back
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
    share: tuple[int, int] = (0, 1)  # this rank's index among the prefill ranks with the same layers, and their number
    pending: set[ChunkId] = field(default_factory=set)
    applied: set[ChunkId] = field(default_factory=set)
    # first layer, layers, first token and tokens of each chunk
    claims: dict[ChunkId, tuple[int, int, int, int]] = field(default_factory=dict)
    chunks: int | None = None  # the total, once the prefill rank has announced it
    tokens: int = 0
    metadata: bytes = b""
    # credits.py
    wanted_bytes: int = 0
    granted_bytes: int = 0
    received_bytes: int = 0
    released_bytes: int = 0

    @property
    def outstanding_bytes(self) -> int:
        """The bytes of staging that are kept free for granted credit or hold a chunk."""
        return self.granted_bytes - self.released_bytes

    @property
    def complete(self) -> bool:
        """True when every announced chunk is in the pool and no other has begun to come. A dummy is complete once it
        was asked or is gone.
        """
        if self.dummy:
            return self.asked or self.connection.link in (Link.LOST, Link.REFUSED)
        return self.chunks is not None and len(self.applied) == len(self.claims) == self.chunks


@dataclass(eq=False)
class Room:
    """One generation of a room on a decode rank. Only rooms.py writes it."""

    room_id: int
    generation: int
    sources: dict[Address, Source]
    born: float  # when the request came
    prompt_tokens: int  # of the whole request; 0: not known
    progress: float  # when rows were asked for, or a new chunk or a first Finish last came
    state: RoomState = RoomState.BOOTSTRAPPING
    reason: str = ""
    slots: Slots = field(default_factory=lambda: Slots(np.empty(0, dtype=np.int64)))
    metadata_row: int = -1
    after: Any = None  # an event; rows may only be written after it
    request: messages.Request | None = None  # for every prefill rank, before its `dummy` and share are filled in
    coverage: Coverage | None = None  # None before the request
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
    credit_bytes: int  # the staging that the chunk holds; 0 in shared memory


@dataclass(eq=False)
class RetainedChunk:
    """A payload in this rank's shared segment, for the colocated ranks."""

    room: Room
    connection: Connection
    slot: Slot
    size_bytes: int
    since: float
