"""Which lanes a room's chunks take: every byte once to each host, where its ranks share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.memory.projection import IDENTITY_HASH
from sglang_tpla.transfer.prefill.state import Ask, Lane, Mode, Plan, Room, SenderProjection


def form_lanes(
    room: Room,
    make_plan: Callable[[SenderProjection, Part, int, RowFormat, tuple[int, int]], Plan],
    agent: str,
    host: str,
    chunk_bytes: int,
) -> list[Lane]:
    """Lanes for all ranks of a room that get data.

    Args:
        make_plan: an existing or new plan of the room for a projection, part, chunk size, row format and
            share.
        agent: this prefill agent, whose arena ranks may have mapped.
        host: identity of this host.
        chunk_bytes: this agent's largest chunk.
    """
    asks = [ask for ask in room.asks.values() if ask.stream is not None]
    if not asks:
        return []
    limit = min(chunk_bytes, *(ask.peer.hello.max_chunk_bytes for ask in asks))
    by_host: dict[tuple[object, ...], list[Ask]] = defaultdict(list)
    for ask in asks:
        hello = ask.peer.hello
        if hello.host == host and agent in ask.peer.mapped:
            together: object = Mode.LOCAL
        elif _maps_neighbours(ask, asks):
            together = Mode.RELAY
        else:
            together = hello.agent
        # ranks whose requests share the sending differently, or whose rows do not look alike, cannot share chunks
        key = (hello.host, together, ask.share_index, ask.share_count, ask.peer.row_format.of_any_group)
        by_host[key].append(ask)
    lanes = []
    for place, members in by_host.items():
        for part, takers in _parts(members):
            projection = takers[0].peer.projection
            assert projection is not None
            mode = Mode.LOCAL if place[1] is Mode.LOCAL else Mode.RELAY if len(takers) > 1 else Mode.DIRECT
            streams = [ask.stream for ask in takers if ask.stream is not None]
            share = takers[0].share_index, takers[0].share_count
            rows = takers[0].peer.row_format
            kind = rows.of_any_group if part is Part.COMMON else rows
            plan = make_plan(projection, part, limit, kind, share)
            lane = Lane(room, plan, streams, mode)
            for stream in streams:
                stream.lanes.append(lane)
            lanes.append(lane)
    return lanes


def _maps_neighbours(ask: Ask, asks: list[Ask]) -> bool:
    """True if the ranks of this host can all read each other's arenas."""
    group = [other.peer for other in asks if other.peer.hello.host == ask.peer.hello.host]
    return len(group) > 1 and all(
        peer is other or other.hello.agent in peer.mapped for peer in group for other in group
    )


def _parts(members: list[Ask]) -> list[tuple[Part, list[Ask]]]:
    """Who takes which part: one whole row if all want the same, else the common part once and each group's
    own.
    """
    by_projection: dict[str, list[Ask]] = defaultdict(list)
    for ask in members:
        by_projection[ask.peer.hello.projection or IDENTITY_HASH].append(ask)
    by_common: dict[str, list[list[Ask]]] = defaultdict(list)
    for key, group in by_projection.items():
        by_common[group[0].peer.hello.common or key].append(group)
    parts = []
    for groups in by_common.values():
        if len(groups) == 1:
            parts.append((Part.FULL, groups[0]))
            continue
        parts.append((Part.COMMON, [ask for group in groups for ask in group]))
        parts += [(Part.OWN, group) for group in groups]
    return parts
