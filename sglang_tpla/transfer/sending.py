"""What a prefill agent remembers: peers, rooms, and for each (room, peer) a stream of numbered chunks.

A stream is independent of every other: it waits for its own credit only, so a stalled rank stalls its own
streams. Streams of one room with the same plan (ranks of one group) share a gathered chunk when both can take
it at once.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sglang_tpla.transfer.chunks import Part, Rectangle, cut, part_width
from sglang_tpla.transfer.frames import CacheLayout, Hello
from sglang_tpla.transfer.types import CachePool, RoomState


@dataclass(eq=False)
class SenderProjection:
    """A registered projection, cut to this rank's layers; ``matrices`` is None for the raw latent."""

    content_hash: str
    widths: tuple[int, ...]
    shared: tuple[int, ...]
    matrices: list[torch.Tensor] | None


@dataclass(eq=False)
class Upload:
    """A projection on its way in, layer by layer."""

    layout: CacheLayout
    digest: Any
    next_index: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Peer:
    """One connection of one decode rank; ``identity`` is its ZMQ routing id, fresh for each connection."""

    identity: bytes
    hello: Hello
    last_seen: float
    projection: SenderProjection | None = None
    upload: Upload | None = None
    slots_held: int = 0
    held_requests: int = 0
    ready: OrderedDict[int, Stream] = field(
        default_factory=OrderedDict
    )  # by room: streams with chunks to send

    def release_slot(self) -> None:
        """A staging slot that held a chunk for this peer is free again."""
        self.slots_held -= 1

    @property
    def name(self) -> str:
        """For messages and logs."""
        return f"decode rank {self.hello.rank} of {self.hello.size} ({self.hello.agent[:8]})"


@dataclass(eq=False)
class Segment:
    """The rows of one ``send`` call."""

    first_token: int
    slots: np.ndarray
    ready: Any


@dataclass(eq=False)
class Plan:
    """The numbered chunks of a room for one projection and part; grows with every ``send``."""

    projection: SenderProjection
    part: Part
    max_bytes: int
    rectangles: list[Rectangle] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)  # of each rectangle
    total_bytes: int = 0

    def extend(self, pool: CachePool, segment: Segment) -> None:
        """Number the chunks of another segment."""
        widths = [
            part_width(width, shared, pool.rope_dim, self.part)
            for width, shared in zip(self.projection.widths, self.projection.shared, strict=True)
        ]
        new = cut(
            pool.first_layer,
            widths,
            segment.first_token,
            segment.slots.size,
            pool.dtype.itemsize,
            self.max_bytes,
        )
        self.rectangles += new
        self.segments += [segment] * len(new)
        self.total_bytes += sum(rectangle.payload_bytes for rectangle in new)


@dataclass(eq=False)
class Stream:
    """Chunks of one room to one peer."""

    room: Room
    peer: Peer
    generation: int
    plan: Plan
    next: int = 0
    resend: deque[int] = field(default_factory=deque)
    credit_bytes: int = 0
    sent_bytes: int = 0
    resend_bytes: int = 0
    unacked: set[int] = field(default_factory=set)
    acked: int = 0
    resent: int = 0
    finish_sent: bool = False
    confirmed: bool = False

    def peek(self) -> int | None:
        """Number of the chunk to send next."""
        if self.resend:
            return self.resend[0]
        return self.next if self.next < len(self.plan.rectangles) else None

    def advance(self, sequence: int) -> None:
        """Mark a chunk as being sent."""
        if self.resend and self.resend[0] == sequence:
            self.resend.popleft()
        else:
            self.next += 1
        self.sent_bytes += self.plan.rectangles[sequence].payload_bytes
        self.unacked.add(sequence)

    @property
    def wanted_bytes(self) -> int:
        """Chunk bytes that are ready or sent so far, resends counted again."""
        return self.plan.total_bytes + self.resend_bytes


@dataclass(eq=False)
class Ask:
    """A decode rank's request for a room."""

    peer: Peer
    generation: int
    expected_ranks: int
    prefix_tokens: int
    num_tokens: int
    dummy: bool
    arrived: float
    stream: Stream | None = None


@dataclass(eq=False)
class Room:
    """One incarnation of a room, from ``open_room`` to ``close_room``."""

    room: int
    opened: float = field(default_factory=time.monotonic)
    state: RoomState = RoomState.BOOTSTRAPPING
    reason: str = ""
    asks: dict[bytes, Ask] = field(default_factory=dict)
    plans: dict[tuple[str, Part, int], Plan] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    tokens: int = 0
    last: bool = False
    metadata: bytes = b""
    wire_bytes: int = 0
    first_send: float | None = None
    ended: float | None = None
    progress: float = field(default_factory=time.monotonic)

    @property
    def streams(self) -> list[Stream]:
        """Streams of all ranks that get data."""
        return [ask.stream for ask in self.asks.values() if ask.stream is not None]

    @property
    def expected_ranks(self) -> int | None:
        """How many ranks will ask, once one has."""
        return next((ask.expected_ranks for ask in self.asks.values()), None)

    @property
    def complete(self) -> bool:
        """True when every expected rank has asked."""
        return bool(self.asks) and len(self.asks) >= (self.expected_ranks or 1)
