"""The states of a prefill agent's rooms, and the effect of each event on them.

Nothing waits and nothing is sent here: methods take ``now``, and messages to decode ranks are put into `Outgoing`.

Everything runs under the agent's lock.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.prefill.ended_rooms import EndedRooms
from sglang_tpla.transfer.prefill.lanes import Lanes
from sglang_tpla.transfer.prefill.state import Destination, Outgoing, Peer, Room, RoomRequest, Span
from sglang_tpla.transfer.room import OTHER_PROMPT, REFUSED, RoomState

MAX_EARLY_REQUESTS = 16384  # from one peer, for rooms that the scheduler has not opened

Progress = messages.Resume | messages.Credit | messages.Ack | messages.Nack | messages.Stored | messages.Done


class Rooms:
    """The rooms that the scheduler has opened and not closed, and decode ranks' requests for other rooms.

    Args:
        peers: the registered decode ranks.
        drop: counts and logs a dropped message.
        wake: called when a thread that waits for a chunk may find one.
        ended: called with each room that has ended, for the log.
    """

    def __init__(
        self, settings: Settings, lanes: Lanes, peers: Mapping[bytes, Peer], out: Outgoing, counts: Counter[str], *,
        drop: Callable[[str, str], None], wake: Callable[[], None], ended: Callable[[Room], None],
    ) -> None:  # fmt: skip
        self.table: dict[int, Room] = {}
        self.early_requests: dict[int, dict[bytes, RoomRequest]] = {}  # requests for rooms that are not open
        self._ended_rooms = EndedRooms()
        self._caught_up = -math.inf  # when the scheduler last had opened a room for every request that it got
        self._settings, self._lanes, self._peers, self._out = settings, lanes, peers, out
        self._counts, self._drop, self._wake, self._ended = counts, drop, wake, ended

    # Calls of the scheduler

    def open(self, room_id: int, prompt_tokens: int, now: float) -> None:
        """Open a room: bind the requests that came earlier, and fail the room if an abort came earlier."""
        room = self.table[room_id] = Room(room_id, prompt_tokens, opened=now, progress=now, sought=now)
        self._caught_up = now
        early = self.early_requests.pop(room_id, {})
        newest = {request.peer.hello.agent: request.message.generation for request in early.values()}
        aborted = ""
        for agent, (generation, reason) in self._ended_rooms.take_early_aborts(room_id).items():
            self._ended_rooms.end(room_id, agent, generation)
            room.aborted_by.add(agent)
            if newest.get(agent, -1) <= generation:
                aborted = reason
        for request in early.values():
            request.peer.early_requests -= 1
            self._bind(room, request, now)
        if aborted:
            self.fail(room, aborted, now)

    def caught_up(self, now: float) -> None:
        """Note that the scheduler has no request left whose room it could open. Needs no lock."""
        self._caught_up = now

    def send(self, room: Room, span: Span, last: bool, metadata: bytes, now: float) -> None:
        """Add rows to a room. The ``last`` rows bring the metadata row, and none follow them."""
        self._lanes.extend(room, span)
        room.progress = now
        room.first_send = room.first_send or now
        room.last_send = now if last else None
        room.last, room.metadata = last, metadata
        if room.complete:
            room.state = RoomState.TRANSFERRING
        self._advance(room, now)

    # Events of peers

    def message(self, peer: Peer, message: messages.Message, now: float) -> None:
        match message:
            case messages.Request():
                self._take_request(peer, message, now)
            case messages.Abort():
                self._take_abort(peer, message, now)
            case messages.Expected():
                for room_id in message.rooms:
                    if (room := self.table.get(room_id)) is not None:
                        room.sought = now
            case _ if isinstance(message, Progress):
                destination = self._destination(peer, message.room, message.generation)
                if destination is not None:
                    self._take_progress(destination, message, now)
                elif not isinstance(message, messages.Resume):
                    self._counts["late_dropped"] += 1
                    if isinstance(message, messages.Stored):
                        self._out.put(peer.identity, messages.Release((message.offset,)))
            case _:
                name = type(message).__name__
                self._drop("malformed_dropped", f"{name} is not for a prefill rank ({peer.name})")

    def mapped(self, peer: Peer, now: float) -> None:
        """Start the rooms that have waited for a rank to say which shared segments it can read."""
        for room in list(self.table.values()):
            if peer.identity in room.requests and not room.formed and not room.state.ended:
                self._advance(room, now)

    def uses(self, peer: Peer) -> bool:
        """Return whether a room that has not ended needs a peer's connection."""
        return any(
            destination.peer is peer and not destination.confirmed and not room.state.ended
            for room in self.table.values()
            for destination in room.destinations
        )

    def take_over(self, old: Peer, new: Peer) -> None:
        """Move the rooms of a rank that has come back under another identity."""
        new.early_requests = old.early_requests
        destinations = []
        for requests in [room.requests for room in self.table.values()] + list(self.early_requests.values()):
            if old.identity in requests:
                request = requests[new.identity] = requests.pop(old.identity)
                request.peer = new
                if request.destination is not None:
                    request.destination.peer = new
                    destinations.append(request.destination)
        self._lanes.take_over(old, new, destinations)

    def lost(self, peer: Peer, reason: str, now: float) -> None:
        """Fail every room that a rank has not confirmed, because the rank is gone for good."""
        for room_id in [room_id for room_id, early in self.early_requests.items() if peer.identity in early]:
            self._drop_early(room_id, peer)
        for room in list(self.table.values()):
            request = room.requests.get(peer.identity)
            if request is not None and not (request.destination and request.destination.confirmed):
                self.fail(room, f"{peer.name} was lost: {reason}", now)

    def failed(self, identity: bytes, room_id: int, message: messages.Message, error: Exception, now: float) -> None:
        """Fail the room of a message whose handling raised an exception."""
        room = self.table.get(room_id)
        if room is not None and identity in room.requests:
            self.fail(room, f"internal error on {type(message).__name__}: {error!r}", now)

    # Messages

    def _take_request(self, peer: Peer, message: messages.Request, now: float) -> None:
        if peer.projection is None or message.share_index >= message.share_count:
            why = f"request for room {message.room} of {peer.name} before registration or with a wrong share"
            self._drop("malformed_dropped", why)
            return
        request = RoomRequest(peer, message, now)
        agent = peer.hello.agent
        if self._ended_rooms.has_ended(message.room, agent, message.generation):
            self._counts["replays_dropped"] += 1
            self._answer_abort(message, peer, "this room has ended on the prefill rank")
            return
        room = self.table.get(message.room)
        if room is not None and not room.state.ended:
            old = room.requests.get(peer.identity)
            if old is None:
                self._bind(room, request, now)
                return
            if old.message.generation >= message.generation:
                self._counts["replays_dropped"] += 1
                return
            self.fail(room, f"{peer.name} asked for the room anew (generation {message.generation})", now)
        elif (reason := self._ended_rooms.failed_unbound(message.room, agent)) is not None:
            self._ended_rooms.end(message.room, agent, message.generation)
            self._answer_abort(message, peer, reason)
            return
        if peer.early_requests >= MAX_EARLY_REQUESTS:
            why = f"{peer.name} has {MAX_EARLY_REQUESTS} requests for rooms that no prefill request has opened"
            self._answer_abort(message, peer, why)
            return
        early = self.early_requests.setdefault(message.room, {})
        before = early.get(peer.identity)
        if before is not None and before.message.generation >= message.generation:
            self._counts["replays_dropped"] += 1
            return
        peer.early_requests += before is None
        early[peer.identity] = request

    def _answer_abort(self, message: messages.Request, peer: Peer, reason: str) -> None:
        self._out.put(peer.identity, messages.Abort(message.room, message.generation, messages.sentence(reason)))

    def _take_abort(self, peer: Peer, message: messages.Abort, now: float) -> None:
        room_id, agent, generation = message.room, peer.hello.agent, message.generation
        ended = self._ended_rooms
        if ended.has_ended(room_id, agent, generation):
            return
        reason = f"aborted by {peer.name}: {message.reason}"
        early = self.early_requests.get(room_id, {}).get(peer.identity)
        if early is not None and early.message.generation <= generation:
            self._drop_early(room_id, peer)
        room = self.table.get(room_id)
        if room is not None and not room.state.ended:
            bound = room.requests.get(peer.identity)
            if bound is None and ended.failed_unbound(room_id, agent) is not None:
                ended.end(room_id, agent, generation)
                return
            if bound is None or bound.message.generation <= generation:
                ended.end(room_id, agent, generation)
                room.aborted_by.add(agent)
                self.fail(room, reason, now, but=peer)
                return
        if ended.failed_unbound(room_id, agent) is not None:
            ended.end(room_id, agent, generation)
        else:
            ended.abort_early(room_id, agent, generation, reason, now)

    def _take_progress(self, destination: Destination, message: Progress, now: float) -> None:
        room, acked, wrong = destination.room, destination.acked, ""
        match message:
            case messages.Resume():
                self._lanes.resume(destination, message)
            case messages.Credit():
                self._lanes.credit(destination, message.total_bytes)
            case messages.Done():
                if destination.finish_sent and all(lane.all_sent for lane in destination.lanes):
                    room.progress = now
                    self._lanes.confirm(destination)
                    self._conclude(room, now)
                else:
                    wrong = f"{destination.peer.name} confirmed chunks that were not sent"
            case _:
                wrong = self._lanes.receipt(destination, message)
        if destination.acked > acked:
            room.progress = now
        if wrong:
            self.fail(room, wrong, now)
        self._wake()

    # The life of a room

    def _destination(self, peer: Peer, room_id: int, generation: int) -> Destination | None:
        room = self.table.get(room_id)
        request = room.requests.get(peer.identity) if room is not None and not room.state.ended else None
        return request.destination if request is not None and request.message.generation == generation else None

    def _bind(self, room: Room, request: RoomRequest, now: float) -> None:
        """Bind a decode rank's request to a room, or fail the room if the request contradicts the others."""
        expected, asks = room.expected_ranks, request.message
        if room.state.ended:  # an earlier request made the room fail while `open` bound them
            self._ended_rooms.end(room.room_id, request.peer.hello.agent, asks.generation)
            self._answer_abort(asks, request.peer, room.reason)
            return
        room.requests[request.peer.identity] = request
        room.progress = now
        asked = len(room.requests)
        prefixes = sorted({other.prefix_tokens for other in room.messages if not other.dummy})
        if expected not in (None, asks.expected_ranks):
            wrong = f"decode ranks disagree on how many ask: {expected} and {asks.expected_ranks}"
        elif asked > asks.expected_ranks:
            wrong = f"{asked} decode ranks asked, {asks.expected_ranks} were expected"
        elif len(prefixes) > 1:
            wrong = f"decode ranks disagree on the cached prefix: {prefixes} tokens"
        elif room.prompt_tokens and prefixes and prefixes[0] > room.prompt_tokens:
            # the scheduler would have nothing to send, and never say that this was all
            cached = f"{prefixes[0]} tokens are cached at decode"
            wrong = f"{cached} where the prompt has {room.prompt_tokens}: {OTHER_PROMPT}"
        else:
            wrong = ""
        if wrong:
            self.fail(room, wrong, now)
        if room.state.ended:
            return
        if not asks.dummy:
            request.destination = Destination(room, request.peer, asks.generation)
        if room.complete:
            room.state = RoomState.TRANSFERRING if room.spans else RoomState.WAITING
            self._advance(room, now)

    def _advance(self, room: Room, now: float) -> None:
        """Advance a room as far as its requests and rows allow."""
        self._lanes.form(room)
        if wrong := self._lanes.too_many_chunks(room):
            self.fail(room, wrong, now)
            return
        self._lanes.proceed(room)
        self._conclude(room, now)

    def _conclude(self, room: Room, now: float) -> None:
        """End a room with success once every rank that gets data has confirmed it."""
        done = room.complete and room.last and all(other.confirmed for other in room.destinations)
        if done and not room.state.ended:
            self._end(room, RoomState.SUCCESS, "", now)

    def fail(self, room: Room, reason: str, now: float, but: Peer | None = None) -> None:
        """Fail a room that has not ended, and tell its decode ranks, except ``but``, which sent the abort."""
        if room.state.ended:
            return
        for request in room.requests.values():
            if request.peer is not but and request.peer.identity in self._peers:
                message = messages.Abort(room.room_id, request.message.generation, messages.sentence(reason))
                self._out.put(request.peer.identity, message)
        if not room.complete:
            agents = {request.peer.hello.agent for request in room.requests.values()}
            self._ended_rooms.fail_unbound(room.room_id, agents | room.aborted_by, reason, now)
        self._end(room, RoomState.FAILED, reason, now)
        self._counts["rooms_failed"] += 1

    def _end(self, room: Room, state: RoomState, reason: str, now: float) -> None:
        room.state, room.reason, room.ended = state, reason, now
        for request in room.requests.values():
            self._ended_rooms.end(room.room_id, request.peer.hello.agent, request.message.generation)
        self._lanes.end(room)
        self._ended(room)

    def fail_all(self, reason: str, now: float) -> None:
        """Fail every room, because the agent ends. Drop all early requests."""
        for room in list(self.table.values()):
            self.fail(room, reason, now)
        self.early_requests.clear()

    def _drop_early(self, room_id: int, peer: Peer) -> None:
        early = self.early_requests[room_id]
        del early[peer.identity]
        peer.early_requests -= 1
        if not early:
            del self.early_requests[room_id]

    # Time

    def expire(self, now: float) -> None:
        """Give up the rooms and the requests that have waited too long."""
        patience = self._settings.transfer_timeout_s
        for room_id, early in list(self.early_requests.items()):
            for identity, request in list(early.items()):
                # The scheduler opens rooms as requests come. If it has opened another room since, or has none left to
                # open, the prefill half of this request never came.
                passed_over = self._caught_up - request.arrived > self._settings.room_timeout_s
                if passed_over or now - request.arrived > patience:
                    waited = self._settings.room_timeout_s if passed_over else patience
                    text = f"no prefill request opened this room within {waited:g} s"
                    self._drop_early(room_id, request.peer)
                    self._out.put(identity, messages.Abort(room_id, request.message.generation, text))
        self._ended_rooms.expire(now, patience)
        for room in list(self.table.values()):
            if reason := self.unwanted_reason(room, now):
                self.fail(room, reason, now)
            if room.state is not RoomState.WAITING and now - room.progress > patience:
                asked = f"{len(room.requests)} of {room.expected_ranks or 'unknown'} decode ranks had asked"
                self.fail(room, f"no progress for {patience:g} s in {room.state.name}; {asked}", now)

    def unwanted_reason(self, room: Room, now: float) -> str:
        """Return why no decode rank will ever ask for a room, or nothing if one has asked or still may."""
        patience = self._settings.room_timeout_s
        if room.state.ended or room.requests:
            return ""
        if now - room.sought > patience:
            return (
                f"no decode rank has asked for this room within {patience:g} s: the decode server that the request was "
                "given to has ended, cannot be reached, or refused it"
            )
        fresh = now - room.opened <= 2 * self._settings.heartbeat_s or room.sought > room.opened
        wrong = [peer.limits.unsupported_reason(room.prompt_tokens) for peer in self._peers.values()]
        if fresh or not wrong or None in wrong:
            return ""
        return f"every decode server that is registered here {REFUSED}{wrong[0]}"
