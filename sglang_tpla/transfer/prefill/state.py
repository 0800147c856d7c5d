"""The state of a prefill agent: peers, rooms, and the lanes by which a room's chunks reach the ranks that want them.

A *lane* is a run of chunks that one or more ranks of a host all want (the whole row, its common part, or a group's
own part), so that the chunks travel to that host once:

    LOCAL   the ranks are on this host: they read the chunk from this agent's shared segment
    DIRECT  one rank: the chunk travels to it
    RELAY   several ranks of another host: the chunk travels to one of them (they take turns), which keeps it in its
            shared segment for the others

A lane waits only for its own credit and its own ranks, so a stalled rank stalls only its own rooms.

Any part of the agent may read an attribute, under the agent's lock; a comment names the one module that writes it.
Worker threads read the lists of a `ChunkPlan` without the lock, because these lists only grow.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.chunks import Rectangle, cut, enough_bytes
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.staging import Slot
from sglang_tpla.transfer.messages import Hello, Message, Request
from sglang_tpla.transfer.room import NO_LIMITS, Limits, RoomState

ChunkId = tuple[int, int]  # part, sequence


class Route(enum.Enum):
    LOCAL = "local"
    DIRECT = "direct"
    RELAY = "relay"


class Outgoing:
    """Messages to decode ranks, by ZMQ routing id. `Router.turn` sends them when it gives the agent's lock back."""

    def __init__(self) -> None:
        self._messages: list[tuple[bytes, Message, bytes | None]] = []

    def put(self, identity: bytes, message: Message, payload: bytes | None = None) -> None:
        self._messages.append((identity, message, payload))

    def take(self) -> list[tuple[bytes, Message, bytes | None]]:
        """Return all messages in order, and forget them."""
        messages, self._messages = self._messages, []
        return messages


@dataclass(eq=False)
class SenderProjection:
    """A registered projection, cut to this rank's layers."""

    # the `projection.stack_layers`, each converted by `weights` of the pool's kernels; None for the raw latent
    stacks: tuple[torch.Tensor, ...] | None
    ready: tuple[Any, ...] = ()  # events before which they must not be read


@dataclass(eq=False)
class Upload:
    """A projection that a rank is uploading, layer by layer."""

    digest: Any
    next_index: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Peer:
    """One connection of one decode rank."""

    # peers.py writes these
    identity: bytes  # its ZMQ routing id, fresh for each connection
    hello: Hello
    last_seen: float
    announced: RowFormat  # the rows of all its layers
    row_format: RowFormat  # the rows of the layers in this prefill rank's pool
    away: bool = False  # its connection is gone; it may come back under another identity
    limits: Limits = NO_LIMITS
    maps_asked: int = 0  # number of the newest list of shared segments that was sent to the peer
    maps_asked_at: float = 0.0
    maps_answered: int = -1
    mapped: frozenset[str] = frozenset()  # agents whose shared segments the peer reads
    # projections.py
    projection: SenderProjection | None = None
    upload: Upload | None = None
    # rooms.py
    early_requests: int = 0  # for rooms that the scheduler has not opened
    # lanes.py
    slots_held: int = 0  # staging slots held by chunks for this peer
    queued: int = 0  # chunks for the peer's data channel that the socket has not taken yet

    def release_slot(self) -> None:
        """Count a staging slot that held a chunk for this peer as free."""
        self.slots_held -= 1

    @property
    def name(self) -> str:
        return f"decode rank {self.hello.rank} of {self.hello.size} ({self.hello.agent[:8]})"


@dataclass(eq=False)
class Span:
    """The rows of one ``send`` call."""

    first_token: int
    slots: Slots
    ready: tuple[Any, ...]  # events before which the rows must not be read
    in_place: bool  # raw rows can be sent from the pool without a copy


@dataclass(eq=False)
class ChunkPlan:
    """The numbered chunks of a room for one projection and part; lanes.py extends it with every ``send``."""

    projection: SenderProjection
    part: Part
    max_bytes: int
    row_format: RowFormat
    share: range  # the layers that this rank sends, by index in its pool
    rectangles: list[Rectangle] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # of each rectangle
    digests: dict[int, bytes] = field(default_factory=dict)  # sender.py writes the checksums of chunks it has made

    def extend(self, pool: CachePool, span: Span) -> None:
        """Number the chunks of another span."""
        items = self.row_format.part_items(self.part)[self.share.start : self.share.stop]
        item_bytes, tokens = self.row_format.item_dtype(pool.dtype).itemsize, len(span.slots)
        most = min(self.max_bytes, enough_bytes(sum(items) * tokens * item_bytes, pool.device.type))
        new = cut(self.share.start, items, span.first_token, tokens, item_bytes, most)
        self.rectangles += new
        self.spans += [span] * len(new)

    def size(self, sequence: int) -> int:
        return self.rectangles[sequence].payload_bytes


@dataclass(eq=False)
class Destination:
    """One rank's part in a room. Only lanes.py writes it, except for ``peer``."""

    room: Room
    peer: Peer  # rooms.py writes it when the rank is back on another connection
    generation: int
    lanes: list[Lane] = field(default_factory=list)
    due: int = 0  # chunks planned for this rank so far
    acked: int = 0
    resent: int = 0
    damaged: int = 0
    credit_bytes: int = 0
    sent_bytes: int = 0
    wanted_bytes: int = 0
    announced_bytes: int = 0
    # chunks under way; a LOCAL chunk with the slot of this agent that it is read from
    unacked: dict[ChunkId, Slot | None] = field(default_factory=dict)
    finish_sent: bool = False
    confirmed: bool = False
    paused: bool = False  # the rank is back, but its Resume has not come yet

    def lane(self, part: int) -> Lane | None:
        """Return the lane that carries a part to this rank, or None."""
        return next((lane for lane in self.lanes if lane.plan.part == part), None)

    def settle(self, chunk: ChunkId) -> bool:
        """Remove a chunk from those under way and let go of its slot. Return whether the chunk was under way."""
        if chunk not in self.unacked:
            return False
        slot = self.unacked.pop(chunk)
        if slot is not None:
            slot.pending -= 1
        return True


@dataclass(eq=False)
class Relay:
    """A chunk that lies in a decode rank's shared segment until the others have read it."""

    leader: Destination
    offset: int
    readers: set[Destination]


@dataclass(eq=False)
class Lane:
    """Chunks of one plan to the ranks of one host. Only lanes.py writes it."""

    room: Room
    plan: ChunkPlan
    takers: list[Destination]
    route: Route
    planned: int = 0
    ahead: list[deque[int]] = field(init=False)  # the chunks not sent yet, for each rank that they travel to
    starved: set[int] = field(default_factory=set)  # chunks that wait for credit
    # chunks to send once more, to one rank
    repeat: deque[tuple[int, Destination]] = field(default_factory=deque)
    relays: dict[int, Relay | None] = field(default_factory=dict)  # chunks passed on; None: no longer kept

    def __post_init__(self) -> None:
        self.ahead = [deque() for _ in (self.takers[:1] if self.route is Route.LOCAL else self.takers)]

    def leader(self, sequence: int) -> Destination:
        """Return the rank to which a chunk travels."""
        return self.takers[sequence % len(self.takers)]

    @property
    def all_sent(self) -> bool:
        """Whether every planned chunk was sent at least once."""
        return not any(self.ahead)

    def left_bytes(self, destination: Destination) -> int:
        """Return the chunk bytes that must still travel to a rank."""
        if self.route is Route.LOCAL:
            return 0
        left = [sequence for sequence, other in self.repeat if other is destination]
        left += self.ahead[self.takers.index(destination)]
        return sum(self.plan.size(sequence) for sequence in left)

    def heads(self) -> list[tuple[int, list[Destination]]]:
        """Return the chunks that may go next, with their ranks: one for each rank, so that no rank waits."""
        again: dict[Destination, int] = {}
        for sequence, destination in self.repeat:
            again.setdefault(destination, sequence)
        return [(sequence, [destination]) for destination, sequence in again.items()] + [
            (queue[0], self.takers if self.route is Route.LOCAL else [self.leader(queue[0])])
            for queue in self.ahead
            if queue
        ]

    def take(self, sequence: int, takers: list[Destination]) -> None:
        """Take one of the chunks that `heads` named."""
        if (sequence, takers[0]) in self.repeat:
            self.repeat.remove((sequence, takers[0]))
        else:
            self.ahead[sequence % len(self.ahead)].popleft()


@dataclass(eq=False)
class ChunkJob:
    """One chunk to make, and the lanes that it goes to now: lanes of several hosts may take the same chunk."""

    sequence: int
    slot: Slot  # has no memory if the chunk is sent from the pool
    deliveries: list[tuple[Lane, list[Destination]]]
    # each rank's connection when the job was made; on a later connection the rank gets the chunk by another job
    peers: dict[Destination, Peer] = field(default_factory=dict)

    @property
    def plan(self) -> ChunkPlan:
        return self.deliveries[0][0].plan


@dataclass(eq=False)
class RoomRequest:
    """A decode rank's Request for one room. Only rooms.py writes it."""

    peer: Peer
    message: Request
    arrived: float
    destination: Destination | None = None  # set when the request is bound to a room; a dummy has none


@dataclass(eq=False)
class Room:
    """One incarnation of a room, from ``open_room`` to ``close_room``."""

    # rooms.py writes these
    room_id: int
    prompt_tokens: int  # of the whole request; 0: not known
    opened: float
    progress: float  # when a request, rows, a receipt for a chunk, or a Done last came
    sought: float  # when a decode rank last named the room in Expected; at first, when it was opened
    state: RoomState = RoomState.BOOTSTRAPPING
    reason: str = ""
    requests: dict[bytes, RoomRequest] = field(default_factory=dict)  # by the peer's identity
    aborted_by: set[str] = field(default_factory=set)  # agents
    last: bool = False
    metadata: bytes = b""
    first_send: float | None = None
    last_send: float | None = None  # when the last rows were handed over and prefill had computed the whole prompt
    ended: float | None = None
    # lanes.py
    spans: list[Span] = field(default_factory=list)
    tokens: int = 0
    plans: list[ChunkPlan] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    formed: bool = False  # the lanes are laid out
    # sender.py
    wire_bytes: int = 0
    shared_memory_bytes: int = 0

    @property
    def destinations(self) -> list[Destination]:
        """The destinations of all ranks that get data."""
        found = (request.destination for request in self.requests.values())
        return [destination for destination in found if destination is not None]

    @property
    def messages(self) -> list[Request]:
        return [request.message for request in self.requests.values()]

    @property
    def expected_ranks(self) -> int | None:
        """The number of ranks that will ask; None before one has asked."""
        return next((asks.expected_ranks for asks in self.messages), None)

    @property
    def complete(self) -> bool:
        """Whether every expected rank has asked."""
        return bool(self.requests) and len(self.requests) >= (self.expected_ranks or 1)
