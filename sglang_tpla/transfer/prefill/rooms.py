"""Inside the prefill agent: rooms, requests for them, and what becomes of each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict, deque

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.chunks import share_of
from sglang_tpla.transfer.prefill.lanes import form_lanes
from sglang_tpla.transfer.prefill.peers import PrefillGreeting
from sglang_tpla.transfer.prefill.state import (
    Ask,
    Lane,
    Mode,
    Peer,
    Plan,
    Relay,
    Room,
    SenderProjection,
    Stream,
)
from sglang_tpla.transfer.room import RoomState
from sglang_tpla.transfer.workers import remember, seconds_since

MAX_HELD_REQUESTS = 16384  # of one peer, for rooms that the scheduler has not opened


class PrefillServing(PrefillGreeting):
    """Rooms of `PrefillAgent`. Everything here runs under the agent's lock."""

    def _prepare(self) -> None:
        self._rooms: dict[int, Room] = {}
        self._last_opened = -math.inf  # when the scheduler last opened a room
        self._held: dict[int, dict[bytes, Ask]] = {}
        self._aborted: OrderedDict[tuple[int, str], tuple[int, str, float]] = OrderedDict()
        self._ended: OrderedDict[tuple[int, str], int] = OrderedDict()
        # rooms that failed before every rank had spoken: who had, why, and when
        self._orphans: OrderedDict[int, tuple[set[str], str, float]] = OrderedDict()

    # Messages

    def _handle_room(self, peer: Peer, message: frames.Message) -> None:
        match message:
            case frames.Request():
                self._take_request(peer, message)
            case frames.Abort():
                self._take_abort(peer, message)
            case frames.Expected():
                for room in message.rooms:
                    if (entry := self._rooms.get(room)) is not None:
                        entry.sought = self._io.now()
            case frames.Resume():
                stream = self._stream(peer, message.room, message.generation)
                if stream is not None:
                    self._take_resume(stream, message)
            case frames.Credit() | frames.Ack() | frames.Nack() | frames.Stored() | frames.Done():
                stream = self._stream(peer, message.room, message.generation)
                if stream is not None:
                    self._take_progress(stream, message)
                    return
                self._counts["late_dropped"] += 1
                if isinstance(message, frames.Stored):
                    self._put(peer.identity, frames.Release((message.offset,)))
            case _:
                name = type(message).__name__
                self._drop("malformed_dropped", f"{name} is not for a prefill rank ({peer.name})")

    def _room_failed(self, identity: bytes, room: int, message: frames.Message, error: Exception) -> None:
        entry = self._rooms.get(room)
        if entry is not None and identity in entry.asks and not entry.state.ended:
            self._fail(entry, f"internal error on {type(message).__name__}: {error!r}")

    def _take_request(self, peer: Peer, message: frames.Request) -> None:
        if peer.projection is None or message.share_index >= message.share_count:
            why = f"request for room {message.room} of {peer.name} before registration or with a wrong share"
            self._drop("malformed_dropped", why)
            return
        ask = Ask(
            peer,
            message.generation,
            message.expected_ranks,
            message.prefix_tokens,
            message.num_tokens,
            message.dummy,
            message.share_index,
            message.share_count,
            self._io.now(),
        )
        if message.generation <= self._ended.get((message.room, peer.hello.agent), -1):
            self._counts["replays_dropped"] += 1
            text = "this room has ended on the prefill rank"
            self._put(peer.identity, frames.Abort(message.room, message.generation, text))
            return
        entry = self._rooms.get(message.room)
        if entry is not None and not entry.state.ended:
            old = entry.asks.get(peer.identity)
            if old is None:
                self._bind(entry, ask)
                return
            if old.generation >= message.generation:
                self._counts["replays_dropped"] += 1
                return
            self._fail(entry, f"{peer.name} asked for the room anew (generation {message.generation})")
        elif (reason := self._orphaned(message.room, peer)) is not None:
            self._remember_end((message.room, peer.hello.agent), message.generation)
            text = frames.sentence(reason)
            self._put(peer.identity, frames.Abort(message.room, message.generation, text))
            return
        if peer.held_requests >= MAX_HELD_REQUESTS:
            text = (
                f"{peer.name} has {MAX_HELD_REQUESTS} requests for rooms that no prefill request has opened"
            )
            self._put(peer.identity, frames.Abort(message.room, message.generation, text))
            return
        held = self._held.setdefault(message.room, {})
        earlier = held.get(peer.identity)
        if earlier is not None and earlier.generation >= message.generation:
            self._counts["replays_dropped"] += 1
            return
        peer.held_requests += earlier is None
        held[peer.identity] = ask

    def _take_abort(self, peer: Peer, message: frames.Abort) -> None:
        key = (message.room, peer.hello.agent)
        if message.generation <= self._ended.get(key, -1):
            return
        reason = f"aborted by {peer.name}: {message.reason}"
        held = self._held.get(message.room, {})
        ask = held.get(peer.identity)
        if ask is not None and ask.generation <= message.generation:
            del held[peer.identity]
            peer.held_requests -= 1
            if not held:
                del self._held[message.room]
        entry = self._rooms.get(message.room)
        if entry is not None and not entry.state.ended:
            bound = entry.asks.get(peer.identity)
            if bound is None and self._orphaned(message.room, peer) is not None:
                self._remember_end(key, message.generation)
                return
            if bound is None or bound.generation <= message.generation:
                self._remember_end(key, message.generation)
                entry.aborted_by.add(peer.hello.agent)
                self._fail(entry, reason, but=peer)
                return
        if self._orphaned(message.room, peer) is not None:
            self._remember_end(key, message.generation)
        else:
            remember(self._aborted, key, (message.generation, reason, self._io.now()))

    def _orphaned(self, room: int, peer: Peer) -> str | None:
        """Why the room failed that this rank now speaks of for the first time, or None if it did not."""
        spoken, reason, _ = self._orphans.get(room, (set(), "", 0.0))
        if not reason or peer.hello.agent in spoken:
            return None
        spoken.add(peer.hello.agent)
        return reason

    def _take_progress(
        self, stream: Stream, message: frames.Credit | frames.Ack | frames.Nack | frames.Stored | frames.Done
    ) -> None:
        entry = stream.room
        match message:
            case frames.Credit():
                stream.credit_bytes = max(stream.credit_bytes, message.total_bytes)
            case frames.Done():
                if stream.finish_sent and all(lane.all_sent for lane in stream.lanes):
                    entry.progress = self._io.now()
                    self._confirm(stream)
                    self._conclude(entry)
                else:
                    self._fail(entry, f"{stream.peer.name} confirmed chunks that were not sent")
            case _:
                self._take_receipt(stream, message)
                self._staging.reap()
        self._work.notify()

    def _confirm(self, stream: Stream) -> None:
        """A rank has everything, also what it has not acknowledged: that may have been lost with a
        connection.
        """
        for part, sequence in list(stream.unacked):
            stream.settle((part, sequence))
            if (lane := stream.lane(part)) is not None:
                self._has(lane, sequence, stream)
        for lane in stream.lanes:
            again = [sequence for sequence, other in lane.repeat if other is stream]
            lane.repeat = deque(item for item in lane.repeat if item[1] is not stream)
            for sequence in again:
                self._has(lane, sequence, stream)
        stream.acked, stream.confirmed = stream.due, True

    def _take_receipt(self, stream: Stream, message: frames.Ack | frames.Nack | frames.Stored) -> None:
        """What a rank says of one chunk: it has it, it also keeps it for others, or it came damaged."""
        lane, sequence = stream.lane(message.part), message.sequence
        stored = message.offset if isinstance(message, frames.Stored) else None
        if lane is None or not stream.settle((message.part, sequence)):
            self._counts["replays_dropped"] += 1
            if stored is not None:
                self._put(stream.peer.identity, frames.Release((stored,)))
            return
        damaged = isinstance(message, frames.Nack)
        if damaged:
            stream.resent += 1
            self._counts["resent"] += 1
            stream.damaged += 1
            if stream.damaged > max(8, stream.due):
                text = f"{stream.peer.name} got too many damaged chunks ({stream.damaged})"
                self._fail(stream.room, text)
                return
            self._repeat(lane, sequence, stream)
            self._read_by(lane, sequence, stream)
        else:
            stream.acked += 1
            stream.room.progress = self._io.now()
            self._has(lane, sequence, stream, stored)

    def _has(self, lane: Lane, sequence: int, stream: Stream, stored: int | None = None) -> None:
        """A rank has a chunk: if it was the first of its host, the others get it now."""
        if lane.mode is Mode.RELAY and sequence not in lane.relays:
            self._pass_on(lane, sequence, stream, stored)
        else:
            self._read_by(lane, sequence, stream)

    def _read_by(self, lane: Lane, sequence: int, stream: Stream) -> None:
        """A rank no longer reads a chunk in an arena: free it if it was the last."""
        relay = lane.relays.get(sequence)
        if relay is not None:
            relay.readers.discard(stream)
            if not relay.readers:
                lane.relays[sequence] = None
                self._put(relay.leader.peer.identity, frames.Release((relay.offset,)))

    @abstractmethod
    def _take_resume(self, stream: Stream, message: frames.Resume) -> None:
        """A rank that is back says what it has."""

    def _pass_on(self, lane: Lane, sequence: int, leader: Stream, offset: int | None) -> None:
        """A chunk has reached its host: let the other ranks read it there, or send it to each."""
        others = {taker for taker in lane.takers if taker is not leader}
        if offset is None:  # the leader's arena is full, or it has none
            lane.relays[sequence] = None
            for other in others:
                self._repeat(lane, sequence, other)
            return
        lane.relays[sequence] = Relay(leader, offset, others)
        for other in others:
            self._share(lane, sequence, other, leader.peer.hello.agent, offset)

    def _repeat(self, lane: Lane, sequence: int, stream: Stream) -> None:
        """Send a chunk (again) to one rank."""
        lane.repeat.append((sequence, stream))
        if lane.mode is not Mode.LOCAL:
            stream.wanted_bytes += lane.plan.size(sequence)
            self._want(stream)
        self._ready(lane)

    def _share(self, lane: Lane, sequence: int, stream: Stream, agent: str, offset: int) -> None:
        """Tell a rank where in an arena a chunk lies."""
        rectangle = lane.plan.rectangles[sequence]
        message = frames.Share(
            room=lane.room.room,
            generation=stream.generation,
            part=int(lane.plan.part),
            sequence=sequence,
            first_layer=rectangle.first_layer,
            layers=rectangle.layers,
            first_token=rectangle.first_token,
            tokens=rectangle.tokens,
            checksum=lane.plan.digests[sequence],
            agent=agent,
            offset=offset,
            size_bytes=rectangle.payload_bytes,
        )
        stream.unacked.setdefault((message.part, sequence), None)
        self._put(stream.peer.identity, message)

    # Rooms

    def _stream(self, peer: Peer, room: int, generation: int) -> Stream | None:
        entry = self._rooms.get(room)
        ask = entry.asks.get(peer.identity) if entry is not None and not entry.state.ended else None
        return ask.stream if ask is not None and ask.generation == generation else None

    def _bind(self, entry: Room, ask: Ask) -> None:
        """Give a room a decode rank's request."""
        expected = entry.expected_ranks
        entry.asks[ask.peer.identity] = ask
        entry.progress = self._io.now()
        prefixes = sorted({other.prefix_tokens for other in entry.asks.values() if not other.dummy})
        if expected is not None and expected != ask.expected_ranks:
            self._fail(entry, f"decode ranks disagree on how many ask: {expected} and {ask.expected_ranks}")
        elif len(entry.asks) > ask.expected_ranks:
            self._fail(entry, f"{len(entry.asks)} decode ranks asked, {ask.expected_ranks} were expected")
        elif len(prefixes) > 1:
            self._fail(entry, f"decode ranks disagree on the cached prefix: {prefixes} tokens")
        if entry.state.ended:
            return
        if not ask.dummy:
            ask.stream = Stream(entry, ask.peer, ask.generation)
        if entry.complete:
            entry.state = RoomState.TRANSFERRING if entry.segments else RoomState.WAITING
            self._form(entry)

    def _form(self, entry: Room) -> None:
        """Lay out the lanes of a room, once every rank has asked and said which arenas it can read."""
        waiting = any(stream.peer.maps_answered < stream.peer.maps_asked for stream in entry.streams)
        if entry.formed or waiting or not entry.complete:
            return
        entry.formed = True

        def make_plan(
            projection: SenderProjection,
            part: Part,
            limit: int,
            row_format: RowFormat,
            share: tuple[int, int],
        ) -> Plan:
            wanted = (projection, part, limit, row_format, share_of(len(self._pool.layers), *share))
            for plan in entry.plans:
                if (plan.projection, plan.part, plan.max_bytes, plan.row_format, plan.share) == wanted:
                    return plan
            plan = Plan(*wanted)
            for segment in entry.segments:
                plan.extend(self._pool, segment)
            entry.plans.append(plan)
            return plan

        entry.lanes = form_lanes(entry, make_plan, self._agent_id, self._host, self._chunk_bytes)
        self._proceed(entry)

    def _maps_changed(self, peer: Peer) -> None:
        for entry in list(self._rooms.values()):
            if peer.identity in entry.asks and not entry.formed and not entry.state.ended:
                self._form(entry)

    def _proceed(self, entry: Room) -> None:
        """Announce and queue what a room's lanes have to send; tell the ranks what is due after the last
        rows.
        """
        if not entry.formed:
            return
        for lane in entry.lanes:
            if lane.planned < len(lane.plan.rectangles):
                lane.plan_more()
                self._ready(lane)
        for stream in entry.streams:
            self._want(stream)
            if entry.last and not stream.finish_sent:
                stream.finish_sent = True
                self._send_finish(stream)
        self._conclude(entry)
        self._work.notify()

    def _send_finish(self, stream: Stream) -> None:
        entry = stream.room
        digest = frames.checksum(entry.metadata)
        message = frames.Finish(entry.room, stream.generation, stream.due, entry.tokens, digest)
        self._put(stream.peer.identity, message, entry.metadata)

    def _ready(self, lane: Lane) -> None:
        if lane.heads():
            lane.takers[0].peer.ready[id(lane)] = lane

    def _want(self, stream: Stream) -> None:
        if stream.wanted_bytes > stream.wanted_told:
            stream.wanted_told = stream.wanted_bytes
            message = frames.Want(stream.room.room, stream.generation, stream.wanted_bytes)
            self._put(stream.peer.identity, message)

    def _conclude(self, entry: Room) -> None:
        """SUCCESS, once every rank that gets data has confirmed."""
        if entry.state.ended or not entry.complete or not entry.last:
            return
        if all(stream.confirmed for stream in entry.streams):
            self._end(entry, RoomState.SUCCESS, "")
            self._threads.took(seconds_since(entry.first_send, entry.ended or 0.0))

    def _fail(self, entry: Room, reason: str, but: Peer | None = None) -> None:
        """Fail a room and tell its decode ranks (but the one that asked for it)."""
        for ask in entry.asks.values():
            if ask.peer is not but and ask.peer.identity in self._peers:
                message = frames.Abort(entry.room, ask.generation, frames.sentence(reason))
                self._put(ask.peer.identity, message)
        self._end(entry, RoomState.FAILED, reason)
        self._counts["rooms_failed"] += 1

    def _end(self, entry: Room, state: RoomState, reason: str) -> None:
        ended = self._io.now()
        entry.state, entry.reason, entry.ended = state, reason, ended
        for lane in entry.lanes:
            lane.takers[0].peer.ready.pop(id(lane), None)
            for relay in lane.relays.values():
                if relay is not None:
                    self._put(relay.leader.peer.identity, frames.Release((relay.offset,)))
            lane.relays.clear()
        for ask in entry.asks.values():
            self._remember_end((entry.room, ask.peer.hello.agent), ask.generation)
        if state is RoomState.FAILED and not entry.complete:
            agents = {ask.peer.hello.agent for ask in entry.asks.values()}
            remember(self._orphans, entry.room, (agents | entry.aborted_by, reason, entry.ended))
        streams = entry.streams
        for stream in streams:
            for chunk in list(stream.unacked):
                stream.settle(chunk)
        entry.segments.clear()
        self._work.notify()
        self._log_transfer(
            room=entry.room,
            peer=[stream.peer.name for stream in streams],
            tokens=entry.tokens,
            chunks=sum(stream.acked for stream in streams),
            bytes=entry.wire_bytes,
            shared_memory_bytes=entry.shared_memory_bytes,
            seconds=round(seconds_since(entry.first_send, ended), 6),
            after_prefill_seconds=round(seconds_since(entry.last_send, ended), 6),
            result="success" if state is RoomState.SUCCESS else reason,
            resent=sum(stream.resent for stream in streams),
        )

    def _forget(self, entry: Room) -> None:
        if self._rooms.get(entry.room) is entry:
            del self._rooms[entry.room]

    def _fail_all(self, reason: str) -> None:
        for entry in list(self._rooms.values()):
            if not entry.state.ended:
                self._fail(entry, reason)
        self._held.clear()

    def _take_aborted(self, entry: Room, held: dict[bytes, Ask]) -> str:
        """The reason of an abort that came before this room was opened; each is used once."""
        newest = {ask.peer.hello.agent: ask.generation for ask in held.values()}
        found = ""
        for key in [key for key in self._aborted if key[0] == entry.room]:
            generation, reason, _ = self._aborted.pop(key)
            self._remember_end(key, generation)
            entry.aborted_by.add(key[1])
            if newest.get(key[1], -1) <= generation:
                found = reason
        return found

    def _remember_end(self, key: tuple[int, str], generation: int) -> None:
        remember(self._ended, key, max(generation, self._ended.get(key, -1)))

    def _drop_rooms(self, peer: Peer, reason: str) -> None:
        for room in [room for room, asks in self._held.items() if peer.identity in asks]:
            del self._held[room][peer.identity]
            if not self._held[room]:
                del self._held[room]
        for entry in list(self._rooms.values()):
            if peer.identity in entry.asks and not entry.state.ended:
                stream = entry.asks[peer.identity].stream
                if stream is None or not stream.confirmed:
                    self._fail(entry, f"{peer.name} was lost: {reason}")

    # Time (I/O thread)

    def _tick(self) -> None:
        now = self._io.now()
        with self._work:
            self._expire_peers(now)
            self._ask_again(now)
            self._expire_rooms(now)
            if self._staging.reap():
                self._work.notify()

    def _expire_rooms(self, now: float) -> None:
        patience = self._settings.transfer_timeout_s
        for room, asks in list(self._held.items()):
            for identity, ask in list(asks.items()):
                # the scheduler opens rooms as requests come: if it has opened others since, this one's never came
                passed_over = self._last_opened - ask.arrived > self._settings.room_timeout_s
                if passed_over or now - ask.arrived > patience:
                    del asks[identity]
                    ask.peer.held_requests -= 1
                    waited = self._settings.room_timeout_s if passed_over else patience
                    text = f"no prefill request opened this room within {waited:g} s"
                    self._put(identity, frames.Abort(room, ask.generation, text))
            if not asks:
                del self._held[room]
        while self._aborted and now - next(iter(self._aborted.values()))[2] > patience:
            self._aborted.popitem(last=False)
        while self._orphans and now - next(iter(self._orphans.values()))[2] > patience:
            self._orphans.popitem(last=False)
        for entry in list(self._rooms.values()):
            if not entry.state.ended and not entry.asks and (reason := self._unwanted(entry, now)):
                self._fail(entry, reason)
            waiting_for_rows = entry.state is RoomState.WAITING
            if not entry.state.ended and not waiting_for_rows and now - entry.progress > patience:
                asked = f"{len(entry.asks)} of {entry.expected_ranks or 'unknown'} decode ranks had asked"
                self._fail(entry, f"no progress for {patience:g} s in {entry.state.name}; {asked}")

    def _unwanted(self, entry: Room, now: float) -> str:
        """Why no decode rank will ask for a room that none has asked for yet; empty while one may."""
        patience = self._settings.room_timeout_s
        if now - entry.sought > patience:
            return (
                f"no decode rank has asked for this room within {patience:g} s: the decode server that the request was "
                "given to has ended, cannot be reached, or refused it"
            )
        fresh = now - entry.opened <= 2 * self._settings.heartbeat_s or entry.sought > entry.opened
        wrong = [peer.limits.objection(entry.prompt_tokens) for peer in self._peers.values()]
        if fresh or not wrong or None in wrong:
            return ""
        return f"no decode server that is registered here can serve this request: {wrong[0]}"
