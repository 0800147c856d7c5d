"""The choice of a room's lanes: every byte travels once to each host whose ranks share memory."""

from collections import defaultdict
from collections.abc import Callable

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer.memory.projection import IDENTITY_HASH
from sglang_tpla.transfer.prefill.state import ChunkPlan, Lane, Room, RoomRequest, Route, SenderProjection


def form_lanes(
    room: Room,
    make_plan: Callable[[SenderProjection, Part, int, RowFormat, tuple[int, int]], ChunkPlan],
    agent: str,
    host: str,
    chunk_bytes: int,
) -> list[Lane]:
    """Return the lanes of a room to all ranks that get data.

    Args:
        make_plan: returns the room's existing or new plan for a projection, part, chunk size, row format and share.
        agent: id of this prefill agent, whose shared segment ranks may have mapped.
        host: identity of this host.
        chunk_bytes: this agent's largest chunk.
    """
    requests = [request for request in room.requests.values() if request.destination is not None]
    if not requests:
        return []
    limit = min(chunk_bytes, *(request.peer.hello.max_chunk_bytes for request in requests))
    by_host: dict[tuple[object, ...], list[RoomRequest]] = defaultdict(list)
    for request in requests:
        hello = request.peer.hello
        if hello.host == host and agent in request.peer.mapped:
            together: object = Route.LOCAL
        elif _read_each_other(request, requests):
            together = Route.RELAY
        else:
            together = hello.agent
        # ranks cannot share chunks if their requests name different shares of the sending or their row formats differ
        key = (hello.host, together, _share(request), request.peer.row_format.of_any_group)
        by_host[key].append(request)
    lanes = []
    for place, members in by_host.items():
        for part, takers in _parts(members):
            projection = takers[0].peer.projection
            assert projection is not None
            shared = Route.RELAY if len(takers) > 1 else Route.DIRECT
            route = Route.LOCAL if place[1] is Route.LOCAL else shared
            rows = takers[0].peer.row_format
            kind = rows.of_any_group if part is Part.COMMON else rows
            plan = make_plan(projection, part, limit, kind, _share(takers[0]))
            destinations = [taker.destination for taker in takers if taker.destination is not None]
            lanes.append(Lane(room, plan, destinations, route))
    return lanes


def _share(request: RoomRequest) -> tuple[int, int]:
    """Return this rank's index among the prefill ranks with the same layers, and their number."""
    return request.message.share_index, request.message.share_count


def _read_each_other(request: RoomRequest, requests: list[RoomRequest]) -> bool:
    """Return whether the colocated ranks of a request's host can all read each other's shared segments."""
    group = [other.peer for other in requests if other.peer.hello.host == request.peer.hello.host]
    return len(group) > 1 and all(
        peer is other or other.hello.agent in peer.mapped for peer in group for other in group
    )


def _parts(members: list[RoomRequest]) -> list[tuple[Part, list[RoomRequest]]]:
    """Return the parts and their takers: whole rows if all want the same, else the common part and each group's own."""
    by_projection: dict[str, list[RoomRequest]] = defaultdict(list)
    for request in members:
        by_projection[request.peer.hello.projection or IDENTITY_HASH].append(request)
    by_common: dict[str, list[list[RoomRequest]]] = defaultdict(list)
    for key, group in by_projection.items():
        by_common[group[0].peer.hello.common or key].append(group)
    parts = []
    for groups in by_common.values():
        if len(groups) == 1:
            parts.append((Part.FULL, groups[0]))
            continue
        parts.append((Part.COMMON, [request for group in groups for request in group]))
        parts += [(Part.OWN, group) for group in groups]
    return parts
