"""Inside the prefill agent: a worker thread picks the next chunk, gathers and projects it, and sends it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import Pieces, one_piece
from sglang_tpla.transfer.memory.projection import cut_stacks
from sglang_tpla.transfer.memory.staging import Slot
from sglang_tpla.transfer.network.data_channel import OutgoingChunk
from sglang_tpla.transfer.prefill.resuming import PrefillResuming
from sglang_tpla.transfer.prefill.state import Lane, Mode, Peer, Room, Stream
from sglang_tpla.transfer.room import TransferError

# Chunks of one rank that wait to be read (on this host, for each thread that makes some) or to be taken by the socket
# (of its data channel): more would be made faster than they go, and leave the processor's caches before they do.
LOCAL_CHUNKS = 4
CHUNKS_AHEAD = 3


@dataclass(eq=False)
class Load:
    """One chunk of a lane and the ranks it goes to now."""

    lane: Lane
    streams: list[Stream]


@dataclass(eq=False)
class Job:
    """One chunk to make, and where it goes: lanes of several hosts may take the same one."""

    sequence: int
    loads: list[Load]
    slot: Slot  # without memory where the chunk is sent from the pool


class PrefillDispatch(PrefillResuming):
    """The worker threads of `PrefillAgent`: each makes a chunk, waits for it and sends it off."""

    def _next_work(self) -> Callable[[], None] | None:
        job = self._next_job()
        if job is None:
            return None
        self._work.notify()  # there may be one more, for another thread
        return partial(self._work_on, job)

    def _work_on(self, job: Job) -> None:
        with self._failing(job):
            pieces, digest = self._make(job)
            if job.slot.buffer.size and not digest and self._needs_digest(job):
                self._aside(partial(self._check, job, pieces))
            else:
                self._deliver(job, pieces, digest)

    def _check(self, job: Job, pieces: Pieces) -> None:
        with self._failing(job):
            self._deliver(job, pieces, check_pieces(pieces))

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """What goes wrong in here fails the rooms that wait for the chunk, and is reported."""
        try:
            yield
        except Exception as error:
            reason = str(error)
            if not isinstance(error, TransferError):  # which says what is wrong with the rows themselves
                self._handler_failed("gather", error)
                reason = f"internal error while gathering: {error!r}"
            with self._work:
                job.slot.pending -= 1
                for load in job.loads:
                    if not load.lane.room.state.ended:
                        self._fail(load.lane.room, reason)

    def _next_job(self) -> Job | None:
        """The next chunk that some rank can take: peers in turn, and each peer's lanes in turn."""
        self._staging.reap()
        cap = max(1, self._staging.slots // (len(self._peers) + 1))
        for identity, peer in list(self._peers.items()):
            for key, lane in list(peer.ready.items()):
                heads = lane.heads()
                if not heads:
                    del peer.ready[key]
                found = next((head for head in heads if self._can_take(lane, *head, cap)), None)
                if found is None:
                    continue
                sequence, streams = found
                in_place = self._in_place(lane, sequence)
                slot = self._staging.hold() if in_place else self._staging.take()
                if slot is None:
                    return None
                peer.ready.move_to_end(key)
                self._peers.move_to_end(identity)
                loads = [self._load(lane, sequence, streams, slot)]
                if not lane.repeat:
                    loads += self._same_chunk(lane, sequence, slot, cap)
                return Job(sequence, loads, slot)
        return None

    def _can_take(self, lane: Lane, sequence: int, streams: list[Stream], cap: int) -> bool:
        if any(stream.paused or stream.peer.away or stream.peer.slots_held >= cap for stream in streams):
            return False
        if lane.mode is Mode.LOCAL:
            return all(len(stream.unacked) < LOCAL_CHUNKS * self._threads.size for stream in streams)
        if any(
            stream.peer.queued >= CHUNKS_AHEAD or not self._doorway.bound(stream.peer.identity)
            for stream in streams
        ):
            return False
        size = lane.plan.size(sequence)
        enough = all(stream.credit_bytes - stream.sent_bytes >= size for stream in streams)
        if enough:
            lane.starved.discard(sequence)
        elif sequence not in lane.starved:
            self._counts["credit_waits"] += 1
            lane.starved.add(sequence)
        return enough

    def _needs_digest(self, job: Job) -> bool:
        """True if somebody checks a chunk by its checksum: not where its tag is all that it goes with."""
        return not self._doorway.sealed or any(load.lane.mode is not Mode.DIRECT for load in job.loads)

    def _in_place(self, lane: Lane, sequence: int) -> bool:
        """True if a chunk can be sent from where its rows lie: they stay as they are until their room ends."""
        plan = lane.plan
        return (
            lane.mode is not Mode.LOCAL
            and plan.projection.stacks is None
            and not plan.row_format.encoded
            and plan.segments[sequence].in_place
        )

    def _load(self, lane: Lane, sequence: int, streams: list[Stream], slot: Slot) -> Load:
        """Mark a chunk as under way to some ranks."""
        lane.take(sequence, streams)
        chunk = (int(lane.plan.part), sequence)
        for stream in streams:
            stream.unacked[chunk] = None
            if slot.buffer.size:
                stream.peer.slots_held += 1
                slot.holders.append(stream.peer.release_slot)
            if lane.mode is Mode.LOCAL:
                stream.unacked[chunk] = slot
                slot.pending += 1  # until the rank has read it
            else:
                stream.sent_bytes += lane.plan.size(sequence)
        return Load(lane, list(streams))

    def _same_chunk(self, lane: Lane, sequence: int, slot: Slot, cap: int) -> list[Load]:
        """Lanes of the room on other hosts that want the same chunk and can take it now."""
        loads = []
        for other in lane.room.lanes:
            if other is lane or other.plan is not lane.plan or other.repeat:
                continue
            found = next((head for head in other.heads() if head[0] == sequence), None)
            if found is None or not self._can_take(other, sequence, found[1], cap):
                continue
            if slot.buffer.size or self._in_place(other, sequence):
                loads.append(self._load(other, sequence, found[1], slot))
        return loads

    def _make(self, job: Job) -> tuple[Pieces, bytes]:
        """Fill the job's slot, if it has memory: where the payload is, and its checksum, if it is known by now."""
        plan = job.loads[0].lane.plan
        rectangle, segment = plan.rectangles[job.sequence], plan.segments[job.sequence]
        first = rectangle.first_layer - self._pool.first_layer
        stacks = plan.projection.stacks
        start = rectangle.first_token - segment.first_token
        self._reader.wait(segment.ready)
        if not job.slot.buffer.size:
            pieces = self._reader.pieces(rectangle, segment.slots.spans(start, rectangle.tokens))
            if self._doorway.sealed:
                return pieces, check_pieces(pieces) if self._needs_digest(job) else b""
            # checked on its way (`channel`), unless it would only wait there
            waits = any(stream.peer.queued for load in job.loads for stream in load.streams)
            return pieces, check_pieces(pieces) if waits and self._checks_aside else b""
        payload = job.slot.buffer[: rectangle.payload_bytes]
        digest = self._reader.read(
            rectangle,
            segment.slots.part(start, rectangle.tokens),
            None if stacks is None else cut_stacks(stacks, first, rectangle.layers),
            plan.part,
            payload,
            segment.ready,
            plan.row_format.part(first, rectangle.layers),
        )
        return one_piece(payload), digest or b""

    def _deliver(self, job: Job, pieces: Pieces, digest: bytes) -> None:
        plan = job.loads[0].lane.plan
        with self._work:
            if digest:
                plan.digests[job.sequence] = digest
            self._counts["projections_computed"] += plan.projection.stacks is not None
            for load in job.loads:
                if not load.lane.room.state.ended:
                    self._send_load(load, job.sequence, digest, job.slot, pieces)
            job.slot.pending -= 1

    def _send_load(self, load: Load, sequence: int, digest: bytes, slot: Slot, pieces: Pieces) -> None:
        lane, room = load.lane, load.lane.room
        rectangle = lane.plan.rectangles[sequence]
        chunk = (int(lane.plan.part), sequence)
        # a rank whose connection broke meanwhile gets it again when it is back
        streams = [stream for stream in load.streams if chunk in stream.unacked and not stream.paused]
        if not streams:
            return
        self._counts["chunks"] += 1
        if lane.mode is Mode.LOCAL:
            self._count_bytes(room, rectangle.payload_bytes, shared=True)
            for stream in streams:
                self._share(lane, sequence, stream, self._agent_id, slot.offset)
            return
        for stream in streams:
            message = frames.Chunk(
                room=room.room,
                generation=stream.generation,
                part=int(lane.plan.part),
                sequence=sequence,
                relay=lane.mode is Mode.RELAY and sequence not in lane.relays,
                first_layer=rectangle.first_layer,
                layers=rectangle.layers,
                first_token=rectangle.first_token,
                tokens=rectangle.tokens,
                checksum=digest or bytes(frames.CHECKSUM_BYTES),
            )
            slot.pending += 1
            stream.peer.queued += 1
            self._count_bytes(room, rectangle.payload_bytes, shared=False)
            self._io.post(self._send_chunk, stream.peer, lane, message, slot, pieces, digest)

    def _let_go(self, slot: Slot, peer: Peer) -> None:
        with self._work:
            slot.pending -= 1
            peer.queued -= 1
            self._work.notify()

    def _count_bytes(self, room: Room, size: int, *, shared: bool) -> None:
        room.wire_bytes += size
        self._counts["wire_bytes"] += size
        if shared:
            room.shared_memory_bytes += size
            self._counts["shared_memory_bytes"] += size

    def _send_chunk(
        self, peer: Peer, lane: Lane, message: frames.Chunk, slot: Slot, pieces: Pieces, digest: bytes
    ) -> None:
        """Hand a chunk to the rank's data channel; if it has ended, the rank asks for what it lacks when it is back
        (I/O thread).
        """
        room = lane.room

        def done(digest: bytes) -> None:
            with self._lock:
                if digest:
                    lane.plan.digests[message.sequence] = digest
                self._let_go(slot, peer)

        outgoing = OutgoingChunk(
            frames.encode(message), pieces, digest, wanted=lambda: not room.state.ended, done=done
        )
        if not self._doorway.send(peer.identity, outgoing):
            self._let_go(slot, peer)
