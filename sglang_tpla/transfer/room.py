"""Rooms as the engine sees them: their states, limits and statistics. Sizes are in bytes, times in seconds."""

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from sglang_tpla.errors import SglangTplaError


class TransferError(SglangTplaError, RuntimeError):
    """A transfer call that cannot work. The text says what was expected, what came, where, and what to do."""


MAX_ROOM_ID = 2**63 - 1
REFUSED = "refused the request: "  # marks a reason for which the request's client is answered with 400
OTHER_PROMPT = REFUSED + (
    "the two servers have prompts of different lengths in one room; let every request have a room of its own, and both "
    "servers the same tokenizer and chat template"
)
MAX_REMEMBERED = 65536  # entries in a table of ended rooms


def remember(table: OrderedDict[Any, Any], key: object, value: object) -> None:
    """Keep a value in a table, and forget the oldest value if there are too many."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def check_room_id(room_id: int) -> None:
    """Refuse a room id that no message can carry.

    Raises:
        TransferError: the id is no integer in the range that the message names.
    """
    if not isinstance(room_id, int) or not 0 <= room_id <= MAX_ROOM_ID:
        raise TransferError(f"a room id (bootstrap_room) must be an integer in 0...{MAX_ROOM_ID}; got {room_id!r}")


@dataclass(frozen=True)
class Limits:
    """The longest prompt that a server can serve; 0 if the server does not say."""

    context_tokens: int = 0  # tokens that fit in the context length
    pool_tokens: int = 0  # tokens that fit in the cache

    def unsupported_reason(self, tokens: int) -> str | None:
        """Return why a prompt of ``tokens`` tokens cannot be served, or None."""
        for limit, what in ((self.context_tokens, "context length"), (self.pool_tokens, "cache")):
            if limit and tokens > limit:
                return f"a prompt of {tokens} tokens does not fit in its {what}, which takes {limit}"
        return None


NO_LIMITS = Limits()


class RoomState(enum.IntEnum):
    """The state of a room; the numbers are those of SGLang's ``KVPoll``."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING = 2
    TRANSFERRING = 3
    SUCCESS = 4

    @property
    def ended(self) -> bool:
        """True in the two final states."""
        return self in (RoomState.FAILED, RoomState.SUCCESS)


@dataclass(frozen=True)
class TransferMetric:
    """One room so far: payload bytes that moved (on prefill once for each host), how many of them through shared memory
    instead of the network, seconds from first send (or request) to the end, chunks, tokens, resends.
    """

    wire_bytes: int = 0
    shared_memory_bytes: int = 0
    seconds: float = 0.0
    chunks: int = 0
    tokens: int = 0
    resent: int = 0


@dataclass(frozen=True)
class AgentStats:
    """Counters since the agent started, and current gauges."""

    rooms: int = 0
    peers: int = 0
    data_channels: int = 0
    sealed_channels: int = 0
    staging_used_bytes: int = 0
    staging_limit_bytes: int = 0
    threads_alive: int = 0
    wire_bytes: int = 0
    shared_memory_bytes: int = 0
    chunks: int = 0
    resent: int = 0
    checksum_failures: int = 0
    late_dropped: int = 0
    replays_dropped: int = 0
    malformed_dropped: int = 0
    unknown_peer: int = 0
    refused: int = 0
    credit_waits: int = 0
    peers_lost: int = 0
    resumed: int = 0
    rooms_succeeded: int = 0
    rooms_failed: int = 0
    projections_computed: int = 0
    internal_errors: int = 0
    transfer_seconds: float = 0.0
