"""The lanes of a prefill agent: the choice of the next chunk, and the receipts for chunks that were sent.

Nothing waits and nothing is sent here: messages to decode ranks are put into `Outgoing`, chunks are handed out as jobs.
Everything runs under the agent's lock.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.chunks import share_of
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.staging import Slot, Staging
from sglang_tpla.transfer.prefill.routes import form_lanes
from sglang_tpla.transfer.prefill.state import (
    ChunkJob,
    ChunkPlan,
    Destination,
    Lane,
    Outgoing,
    Peer,
    Relay,
    Room,
    Route,
    SenderProjection,
    Span,
)

# Limits on one rank's chunks that wait to be read (LOCAL, per thread that makes chunks) or to be taken by the socket of
# its data channel. More chunks would be made faster than they go, and would leave the processor's caches before that.
LOCAL_CHUNKS = 4
CHUNKS_AHEAD = 3


class Lanes:
    """The lanes of all rooms, with the credit and the staging that hold chunks back.

    Args:
        pool: the pool that chunks are read from.
        peers: the registered decode ranks, each of which has a share of staging.
        agent, host, chunk_bytes: this agent's id, its host's identity and its largest chunk.
        makers: the number of threads that make chunks.
        has_channel: returns whether chunks can be sent to a connection.
        wake: called when a thread that waits for a chunk may find one.
    """

    def __init__(
        self, pool: CachePool, staging: Staging, peers: Mapping[bytes, Peer], out: Outgoing, counts: Counter[str], *,
        agent: str, host: str, chunk_bytes: int, makers: int,
        has_channel: Callable[[bytes], bool], wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.staging = staging
        self._pool, self._peers, self._out, self._counts = pool, peers, out, counts
        self._agent, self._host, self._chunk_bytes = agent, host, chunk_bytes
        self._local_chunks = LOCAL_CHUNKS * makers
        self._has_channel, self._wake = has_channel, wake
        # ranks whose lanes have chunks to send, and these lanes; the first one has the next turn
        self.ready: OrderedDict[Peer, OrderedDict[Lane, None]] = OrderedDict()

    # Calls of rooms

    def form(self, room: Room) -> None:
        """Lay out the lanes of a room, once every rank has asked and said which shared segments it can read."""
        waits = any(taker.peer.maps_answered < taker.peer.maps_asked for taker in room.destinations)
        if room.formed or waits or not room.complete:
            return
        room.formed = True

        def make_plan(
            projection: SenderProjection, part: Part, limit: int, row_format: RowFormat, share: tuple[int, int]
        ) -> ChunkPlan:
            wanted = (projection, part, limit, row_format, share_of(len(self._pool.layers), *share))
            for plan in room.plans:
                if (plan.projection, plan.part, plan.max_bytes, plan.row_format, plan.share) == wanted:
                    return plan
            plan = ChunkPlan(*wanted)
            for span in room.spans:
                plan.extend(self._pool, span)
            room.plans.append(plan)
            return plan

        room.lanes = form_lanes(room, make_plan, self._agent, self._host, self._chunk_bytes)
        for lane in room.lanes:
            for destination in lane.takers:
                destination.lanes.append(lane)

    def too_many_chunks(self, room: Room) -> str:
        """Return why a room's chunks cannot be numbered, or nothing.

        A rank that came back could not say which of them it has: its Resume would be malformed, and it would connect
        anew until the room's deadline, together with the rooms of all its neighbours.
        """
        for plan in room.plans:
            if len(plan.rectangles) > messages.MAX_SEQUENCES:
                return (
                    f"a prompt of {room.tokens} tokens takes {len(plan.rectangles)} chunks of at most {plan.max_bytes} "
                    f"bytes, and a room has at most {messages.MAX_SEQUENCES}; raise --tpla-chunk-bytes"
                )
        return ""

    def proceed(self, room: Room) -> None:
        """Queue the chunks of a room that are ready, announce their bytes, and finish the room after its last rows."""
        if not room.formed:
            return
        for lane in room.lanes:
            if lane.planned < len(lane.plan.rectangles):
                self._plan_more(lane)
                self._queue(lane)
        for destination in room.destinations:
            self._announce(destination)
            if room.last and not destination.finish_sent:
                destination.finish_sent = True
                self._finish(destination)
        self._wake()

    def _plan_more(self, lane: Lane) -> None:
        """Queue the chunks that have been added to a lane's plan."""
        for sequence in range(lane.planned, len(lane.plan.rectangles)):
            lane.ahead[sequence % len(lane.ahead)].append(sequence)
            for taker in lane.takers:
                taker.due += 1
            if lane.route is not Route.LOCAL:
                lane.leader(sequence).wanted_bytes += lane.plan.size(sequence)
        lane.planned = len(lane.plan.rectangles)

    def extend(self, room: Room, span: Span) -> None:
        """Add a span of rows to a room and its plans."""
        room.spans.append(span)
        room.tokens += len(span.slots)
        for plan in room.plans:
            plan.extend(self._pool, span)

    def end(self, room: Room) -> None:
        """Drop all chunks of a room that has ended, and release those that ranks keep in their shared segments."""
        for lane in room.lanes:
            self._unqueue(lane)
            for relay in lane.relays.values():
                self._release(relay)
            lane.relays.clear()
        for destination in room.destinations:
            for chunk in list(destination.unacked):
                destination.settle(chunk)
        room.spans.clear()
        self._wake()

    def _queue(self, lane: Lane) -> None:
        if lane.heads():
            self.ready.setdefault(lane.takers[0].peer, OrderedDict())[lane] = None

    def _unqueue(self, lane: Lane) -> None:
        peer = lane.takers[0].peer
        ready = self.ready.get(peer, OrderedDict())
        ready.pop(lane, None)
        if not ready:
            self.ready.pop(peer, None)

    def _announce(self, destination: Destination) -> None:
        if destination.wanted_bytes > destination.announced_bytes:
            destination.announced_bytes = destination.wanted_bytes
            room_id, generation = destination.room.room_id, destination.generation
            self._out.put(destination.peer.identity, messages.Want(room_id, generation, destination.wanted_bytes))

    def _finish(self, destination: Destination) -> None:
        room = destination.room
        digest = messages.checksum(room.metadata)
        message = messages.Finish(room.room_id, destination.generation, destination.due, room.tokens, digest)
        self._out.put(destination.peer.identity, message, room.metadata)

    # Messages of ranks

    def credit(self, destination: Destination, total_bytes: int) -> None:
        """Raise a rank's credit to ``total_bytes``, counted over the whole room."""
        destination.credit_bytes = max(destination.credit_bytes, total_bytes)

    def confirm(self, destination: Destination) -> None:
        """Settle all chunks of a rank that has confirmed its room: their Acks may have been lost with a connection."""
        for part, sequence in list(destination.unacked):
            destination.settle((part, sequence))
            if (lane := destination.lane(part)) is not None:
                self._has(lane, sequence, destination)
        for lane in destination.lanes:
            again = [sequence for sequence, other in lane.repeat if other is destination]
            lane.repeat = deque(item for item in lane.repeat if item[1] is not destination)
            for sequence in again:
                self._has(lane, sequence, destination)
        destination.acked, destination.confirmed = destination.due, True

    def receipt(self, destination: Destination, message: messages.Ack | messages.Nack | messages.Stored) -> str:
        """Handle an Ack, a Stored or a Nack of one chunk. Return why the room must fail, or nothing."""
        lane, sequence = destination.lane(message.part), message.sequence
        stored = message.offset if isinstance(message, messages.Stored) else None
        if lane is None or not destination.settle((message.part, sequence)):
            self._counts["replays_dropped"] += 1
            if stored is not None:
                self._out.put(destination.peer.identity, messages.Release((stored,)))
        elif isinstance(message, messages.Nack):
            self._count_resent(destination)
            destination.damaged += 1
            if destination.damaged > max(8, destination.due):
                return f"{destination.peer.name} got too many damaged chunks ({destination.damaged})"
            self._repeat(lane, sequence, destination)
            self._has_read(lane, sequence, destination)
        else:
            destination.acked += 1
            self._has(lane, sequence, destination, stored)
        self.staging.reap()
        return ""

    def _has(self, lane: Lane, sequence: int, taker: Destination, stored: int | None = None) -> None:
        """Note that a rank has a chunk. If the rank was the first of its host, share the chunk with the others."""
        if lane.route is not Route.RELAY or sequence in lane.relays:
            self._has_read(lane, sequence, taker)
            return
        others = {other for other in lane.takers if other is not taker}
        if stored is None:  # the rank's shared segment is full, or it has none
            lane.relays[sequence] = None
            for other in others:
                self._repeat(lane, sequence, other)
            return
        lane.relays[sequence] = Relay(taker, stored, others)
        for other in others:
            self.share(lane, sequence, other, taker.peer.hello.agent, stored)

    def _has_read(self, lane: Lane, sequence: int, taker: Destination) -> None:
        """Note that a rank no longer reads a chunk in shared memory, and free the chunk after its last reader."""
        relay = lane.relays.get(sequence)
        if relay is not None:
            relay.readers.discard(taker)
            if not relay.readers:
                lane.relays[sequence] = None
                self._release(relay)

    def _release(self, relay: Relay | None) -> None:
        if relay is not None:
            self._out.put(relay.leader.peer.identity, messages.Release((relay.offset,)))

    def _repeat(self, lane: Lane, sequence: int, destination: Destination) -> None:
        """Queue a chunk for one rank once more."""
        lane.repeat.append((sequence, destination))
        if lane.route is not Route.LOCAL:
            destination.wanted_bytes += lane.plan.size(sequence)
            self._announce(destination)
        self._queue(lane)

    def _count_resent(self, destination: Destination) -> None:
        destination.resent += 1
        self._counts["resent"] += 1

    def share(self, lane: Lane, sequence: int, taker: Destination, agent: str, offset: int) -> None:
        """Tell a rank where in an agent's shared segment a chunk lies."""
        rectangle = lane.plan.rectangles[sequence]
        message = messages.Share(
            room=lane.room.room_id,
            generation=taker.generation,
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
        taker.unacked.setdefault((message.part, sequence), None)
        self._out.put(taker.peer.identity, message)

    # Connections that break and come back

    def take_over(self, old: Peer, new: Peer, destinations: list[Destination]) -> None:
        """Move the rooms of a rank that has come back as another identity. They wait for the rank's Resume."""
        if old in self.ready:
            self.ready[new] = self.ready.pop(old)
        for destination in destinations:
            destination.paused = True
            self._forget_kept(destination)

    def _forget_kept(self, leader: Destination) -> None:
        """Forget the chunks that a returning rank kept for others: it has freed them, and late readers ask again."""
        for lane in leader.lanes:
            for sequence, relay in lane.relays.items():
                if relay is not None and relay.leader is leader:
                    lane.relays[sequence] = None

    def resume(self, destination: Destination, message: messages.Resume) -> None:
        """Queue the chunks that a rank lacks, now that its connection is back."""
        destination.paused = False
        bitmaps = dict(message.applied)
        self._forget_kept(destination)
        for part, sequence in list(destination.unacked):
            lane = destination.lane(part)
            if lane is None or not destination.settle((part, sequence)):
                continue
            bits = bitmaps.get(part, b"")
            if sequence // 8 < len(bits) and bits[sequence // 8] >> (sequence % 8) & 1:
                destination.acked += 1
                self._has(lane, sequence, destination)
            else:
                self._count_resent(destination)
                lane.repeat.append((sequence, destination))
                self._has_read(lane, sequence, destination)  # the rank that keeps the chunk need not wait for this one
        destination.credit_bytes = destination.sent_bytes = message.credit_bytes
        destination.wanted_bytes, destination.announced_bytes = message.credit_bytes, 0
        for lane in destination.lanes:
            destination.wanted_bytes += lane.left_bytes(destination)
            self._queue(lane)
        self._announce(destination)
        if destination.finish_sent:
            self._finish(destination)
        self._wake()

    # The next chunk

    def next_job(self) -> ChunkJob | None:
        """Return the next chunk that some rank can take. Ranks take turns, and so do each rank's lanes."""
        self.staging.reap()
        cap = max(1, self.staging.slots // (len(self._peers) + 1))
        for peer, ready in list(self.ready.items()):
            for lane in list(ready):
                heads = lane.heads()
                if not heads:
                    self._unqueue(lane)
                found = next((head for head in heads if self._can_take(lane, *head, cap)), None)
                if found is None:
                    continue
                sequence, takers = found
                slot = self.staging.hold() if self._in_place(lane, sequence) else self.staging.take()
                if slot is None:
                    return None
                ready.move_to_end(lane)
                self.ready.move_to_end(peer)
                job = ChunkJob(sequence, slot, [])
                self._deliver(job, lane, takers)
                if not lane.repeat:
                    self._deliver_elsewhere(job, cap)
                return job
        return None

    def _can_take(self, lane: Lane, sequence: int, takers: list[Destination], cap: int) -> bool:
        if any(taker.paused or taker.peer.away or taker.peer.slots_held >= cap for taker in takers):
            return False
        if lane.route is Route.LOCAL:
            return all(len(taker.unacked) < self._local_chunks for taker in takers)
        if any(taker.peer.queued >= CHUNKS_AHEAD or not self._has_channel(taker.peer.identity) for taker in takers):
            return False
        size = lane.plan.size(sequence)
        enough = all(taker.credit_bytes - taker.sent_bytes >= size for taker in takers)
        if enough:
            lane.starved.discard(sequence)
        elif sequence not in lane.starved:
            self._counts["credit_waits"] += 1
            lane.starved.add(sequence)
        return enough

    def _in_place(self, lane: Lane, sequence: int) -> bool:
        """Return whether a chunk can be sent from its rows in the pool, which do not change until the room ends."""
        plan = lane.plan
        return (
            lane.route is not Route.LOCAL
            and plan.projection.stacks is None
            and not plan.row_format.encoded
            and plan.spans[sequence].in_place
        )

    def _deliver(self, job: ChunkJob, lane: Lane, takers: list[Destination]) -> None:
        """Mark a chunk as under way to some ranks."""
        lane.take(job.sequence, takers)
        chunk, slot = (int(lane.plan.part), job.sequence), job.slot
        for taker in takers:
            job.peers[taker] = taker.peer
            taker.unacked[chunk] = None
            if slot.buffer.size:
                taker.peer.slots_held += 1
                slot.holders.append(taker.peer.release_slot)
            if lane.route is Route.LOCAL:
                taker.unacked[chunk] = slot
                slot.pending += 1  # until the rank has read it
            else:
                taker.sent_bytes += lane.plan.size(job.sequence)
        job.deliveries.append((lane, list(takers)))

    def _deliver_elsewhere(self, job: ChunkJob, cap: int) -> None:
        """Mark the same chunk as under way to ranks of other hosts whose lanes can take it now."""
        first = job.deliveries[0][0]
        for other in first.room.lanes:
            if other is first or other.plan is not first.plan or other.repeat:
                continue
            takers = next((takers for sequence, takers in other.heads() if sequence == job.sequence), None)
            if takers is None or not self._can_take(other, job.sequence, takers, cap):
                continue
            if job.slot.buffer.size or self._in_place(other, job.sequence):
                self._deliver(job, other, takers)

    def hand_over(self, slot: Slot, peer: Peer) -> None:
        """Count a chunk as held by a rank's data channel until `let_go`."""
        slot.pending += 1
        peer.queued += 1

    def let_go(self, slot: Slot, peer: Peer) -> None:
        """Release the hold of a data channel that has sent a chunk, or has ended with the chunk still queued."""
        slot.pending -= 1
        peer.queued -= 1
        self._wake()
