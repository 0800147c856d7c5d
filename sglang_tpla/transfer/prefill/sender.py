"""The sender of a prefill agent: it gathers, projects, checksums and sends off the next chunk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory.copy import check_pieces
from sglang_tpla.transfer.memory.iovec import IoVec, one_piece
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.projection import cut_stacks
from sglang_tpla.transfer.memory.rows import Reading, RowReader
from sglang_tpla.transfer.network.data_channel import OutgoingChunk
from sglang_tpla.transfer.prefill.lanes import Lanes
from sglang_tpla.transfer.prefill.rooms import Rooms
from sglang_tpla.transfer.prefill.router import Router
from sglang_tpla.transfer.prefill.state import ChunkJob, Destination, Lane, Peer, Room, Route
from sglang_tpla.transfer.room import TransferError
from sglang_tpla.transfer.workers import Workers


class Sender:
    """Makes and sends chunks on the worker and checker threads. Only `_send_chunk` runs on the I/O thread."""

    def __init__(self, workers: Workers, router: Router, rooms: Rooms, lanes: Lanes, pool: CachePool) -> None:
        self._workers, self._router, self._rooms, self._lanes = workers, router, rooms, lanes
        self.reader = RowReader(pool)

    def prepare(self, peer: Peer) -> None:
        """Let a checker prepare a rank's kernels, for which its first chunk would wait. The projection has come."""
        self._workers.prepare(partial(self._prepare, peer))

    def _prepare(self, peer: Peer) -> None:
        try:
            if peer.projection is not None:
                self.reader.prepare(peer.row_format, peer.projection.stacks)
        except Exception as error:
            self._workers.handler_failed("preparation", error)

    def next_work(self) -> Callable[[], None] | None:
        """Take a chunk to make. The caller holds the lock."""
        job = self._lanes.next_job()
        if job is None:
            return None
        self._workers.work.notify()  # there may be one more, for another thread
        return partial(self._work_on, job)

    def _work_on(self, job: ChunkJob) -> None:
        with self._failing(job):
            pieces, reading = self._make(job)
            if job.slot.buffer.size:
                self._workers.aside(partial(self._finish, job, pieces, reading))
            else:
                self._deliver(job, pieces, reading() or b"")

    def _finish(self, job: ChunkJob, pieces: IoVec, reading: Reading) -> None:
        """Wait until a job's slot is filled, compute the checksum unless `read` did, and send the chunk."""
        with self._failing(job):
            digest = reading() or (check_pieces(pieces) if self._needs_digest(job) else b"")
            self._deliver(job, pieces, digest)

    @contextmanager
    def _failing(self, job: ChunkJob) -> Iterator[None]:
        """Fail the rooms that wait for a chunk if making it raises an exception, and log the exception."""
        try:
            yield
        except Exception as error:
            reason = str(error)
            if not isinstance(error, TransferError):  # a TransferError says what is wrong with the rows themselves
                self._workers.handler_failed("gather", error)
                reason = f"internal error while gathering: {error!r}"
            with self._router.turn() as now:
                job.slot.pending -= 1
                for lane, _ in job.deliveries:
                    self._rooms.fail(lane.room, reason, now)

    def _needs_digest(self, job: ChunkJob) -> bool:
        """Return whether a receiver checks a chunk by its checksum; a sealed chunk has a tag instead."""
        direct = all(lane.route is Route.DIRECT for lane, _ in job.deliveries)
        return not (self._router.listener.sealed and direct)

    def _make(self, job: ChunkJob) -> tuple[IoVec, Reading]:
        """Begin to fill the job's slot, if it has memory. Return the payload's place and a call that waits for it."""
        plan = job.plan
        rectangle, span = plan.rectangles[job.sequence], plan.spans[job.sequence]
        first = rectangle.first_layer
        stacks = plan.projection.stacks
        start = rectangle.first_token - span.first_token
        ready = (*span.ready, *plan.projection.ready)
        self.reader.wait(ready)
        if not job.slot.buffer.size:
            pieces = self.reader.pieces(rectangle, span.slots.extents(start, rectangle.tokens))
            if self._router.listener.sealed:
                checks = self._needs_digest(job)
            else:  # `data_channel` computes the checksum while sending, unless the chunk would wait in a queue anyway
                waits = any(taker.peer.queued for _, takers in job.deliveries for taker in takers)
                checks = waits and self._workers.checks_aside
            return pieces, partial(check_pieces, pieces) if checks else lambda: None
        payload = job.slot.buffer[: rectangle.payload_bytes]
        reading = self.reader.read(
            rectangle,
            span.slots.part(start, rectangle.tokens),
            None if stacks is None else cut_stacks(stacks, first, rectangle.layers),
            plan.part,
            payload,
            plan.row_format.part(first, rectangle.layers),
            ready,
        )
        return one_piece(payload), reading

    def _deliver(self, job: ChunkJob, pieces: IoVec, digest: bytes) -> None:
        with self._router.turn():
            if digest:
                job.plan.digests[job.sequence] = digest
            self._workers.counts["projections_computed"] += job.plan.projection.stacks is not None
            for lane, takers in job.deliveries:
                # If a rank's connection broke meanwhile, another job sends it the chunk, on its new credit.
                chunk = (int(lane.plan.part), job.sequence)
                takers = [taker for taker in takers if chunk in taker.unacked and taker.peer is job.peers[taker]]
                if takers and not lane.room.state.ended:
                    self._send(job, lane, takers, pieces, digest)
            job.slot.pending -= 1

    def _send(self, job: ChunkJob, lane: Lane, takers: list[Destination], pieces: IoVec, digest: bytes) -> None:
        rectangle = lane.plan.rectangles[job.sequence]
        self._workers.counts["chunks"] += 1
        if lane.route is Route.LOCAL:
            self._count_bytes(lane.room, rectangle.payload_bytes, shared=True)
            for taker in takers:
                self._lanes.share(lane, job.sequence, taker, self._workers.agent_id, job.slot.offset)
            return
        for taker in takers:
            message = messages.Chunk(
                room=lane.room.room_id,
                generation=taker.generation,
                part=int(lane.plan.part),
                sequence=job.sequence,
                relay=lane.route is Route.RELAY and job.sequence not in lane.relays,
                first_layer=rectangle.first_layer,
                layers=rectangle.layers,
                first_token=rectangle.first_token,
                tokens=rectangle.tokens,
                checksum=digest or bytes(messages.CHECKSUM_BYTES),
            )
            self._lanes.hand_over(job.slot, taker.peer)
            self._count_bytes(lane.room, rectangle.payload_bytes, shared=False)
            self._workers.io.post(self._send_chunk, taker.peer, job, lane, message, pieces, digest)

    def _count_bytes(self, room: Room, size_bytes: int, *, shared: bool) -> None:
        room.wire_bytes += size_bytes
        self._workers.counts["wire_bytes"] += size_bytes
        if shared:
            room.shared_memory_bytes += size_bytes
            self._workers.counts["shared_memory_bytes"] += size_bytes

    def _send_chunk(
        self, peer: Peer, job: ChunkJob, lane: Lane, message: messages.Chunk, pieces: IoVec, digest: bytes
    ) -> None:
        """Hand a chunk to the rank's data channel. If the channel has ended, the rank asks again when it is back."""

        def done(digest: bytes) -> None:
            with self._workers.lock:
                if digest:
                    lane.plan.digests[job.sequence] = digest
                self._lanes.let_go(job.slot, peer)

        chunk = OutgoingChunk(
            messages.encode(message), pieces, digest, wanted=lambda: not lane.room.state.ended, done=done
        )
        if not self._router.listener.send(peer.identity, chunk):
            done(b"")
