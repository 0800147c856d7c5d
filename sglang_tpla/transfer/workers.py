"""The threads of an agent, its lock and its counters, and the rule that nothing fails in silence.

Lock order: no thread waits for a room's write gate (decode only) while it holds the agent's lock. Any thread may take
the agent's lock for a short time.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
import zmq

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory import native
from sglang_tpla.transfer.memory.shared_memory import SharedSegment, host_identity
from sglang_tpla.transfer.network.event_loop import IoLoop
from sglang_tpla.transfer.room import RoomState, TransferError, TransferMetric

FIRST_SLOTS = 2  # staging slots whose memory is reserved at the start
# The threads that make or write chunks. More threads are slower, because each call into torch releases the GIL and all
# of them wait to get it back (benchmarks/results/h200/NOTES.md). Checkers wait for a GPU's copies and check the bytes,
# for which they do not need the GIL.
WORKERS = {"cpu": 1, "cuda": 2}
CHECKERS = {"cpu": 0, "cuda": 2}
SPARE_CORES = 4  # with so many cores, workers check chunks in a CPU pool, so that the I/O thread only moves them
MAX_DURATIONS = 16384  # durations kept until they are published
LINES, LINES_S = 100, 60.0  # the log lines about one kind of dropped messages within that time


class AnyRoom(Protocol):
    """The attributes that rooms of both agents have."""

    state: RoomState
    reason: str


RoomT = TypeVar("RoomT", bound=AnyRoom)


class Workers:
    """The threads of one agent, with its lock, counters, time and log. Any thread may call any method.

    Args:
        device: the pool's.
        io: the loop of the I/O thread; a simulation hands in its own.
    """

    def __init__(
        self, role: str, settings: Settings, rank: int, device: torch.device, io: IoLoop | None = None
    ) -> None:
        self.role, self.rank, self.settings = role, rank, settings.on(device.type)
        self.log = logging.getLogger("sglang_tpla.transfer")
        self.agent_id = uuid.uuid4().hex
        self.chunk_bytes = min(self.settings.chunk_bytes, self.settings.staging_bytes // 2)
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)  # notified when there is work
        self.counts: Counter[str] = Counter()
        self._lines: dict[str, deque[float]] = {}  # by counter: when the last lines were logged
        self.transfer_seconds = 0.0
        # seconds of each room that succeeded, until they are published
        self.durations: deque[float] = deque(maxlen=MAX_DURATIONS)
        self.death: str | None = None
        self.closing = False
        self.io = io or IoLoop(f"tpla-{role}-io-{rank}")
        self.checks_aside = len(os.sched_getaffinity(0)) >= SPARE_CORES
        self.size = WORKERS[device.type]  # threads that make or write chunks
        self._device = device
        self._checks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._preparations: deque[Callable[[], None]] = deque()  # the first one is under way
        self._checkers = self._threads("check", CHECKERS[device.type], self._check)
        self._workers = self._threads("work", self.size, self._work)

    def _threads(self, name: str, count: int, run: Callable[[], None]) -> list[threading.Thread]:
        names = [f"tpla-{self.role}-{name}-{self.rank}-{number}" for number in range(count)]
        return [threading.Thread(target=self._run, args=(run,), name=name, daemon=True) for name in names]

    def make_segment(self) -> SharedSegment | None:
        """Return shared memory for staging, with a few slots reserved; None if the settings or the system forbid it."""
        if not self.settings.shared_memory:
            return None
        slots = self.settings.staging_bytes // self.chunk_bytes
        size_bytes, segment = slots * self.chunk_bytes, None
        try:
            segment = SharedSegment(self.agent_id, size_bytes)
            segment.reserve(0, min(slots, FIRST_SLOTS) * self.chunk_bytes)
        except (OSError, AttributeError) as error:
            if segment is not None:
                segment.close()
            self.log.warning(
                "no shared memory of %d bytes (%s): payloads go through sockets; raise the limit on memory or file "
                "sizes",
                size_bytes,
                error,
            )
            return None
        return segment

    def host_identity(self) -> str:
        """Return a text that identifies this host, or this agent alone if shared memory is not wanted."""
        return host_identity() if self.settings.shared_memory else self.agent_id

    def start(
        self,
        next_work: Callable[[], Callable[[], None] | None],
        tick: Callable[[], None],
        say_goodbye: Callable[[], None],
        fail_all: Callable[[str], None],
    ) -> None:
        """Start all threads.

        Args:
            next_work: returns the next piece of work, or None, under the lock; a worker thread runs it without.
            tick: handles deadlines and heartbeats, on the I/O thread.
            say_goodbye: tells the peers that the agent closes, on the I/O thread.
            fail_all: fails every room that has not ended, with a reason.
        """
        native.library()  # compiled now, because the first chunk would hold up the I/O thread and its heartbeats
        self.next_work = next_work
        self._say_goodbye, self._fail_all = say_goodbye, fail_all
        self.io.post(self._use_device)
        self.io.start(min(self.settings.heartbeat_s / 2, 0.25), tick, self.handler_failed, self.died)
        for thread in (*self._workers, *self._checkers):
            thread.start()

    def close(self) -> None:
        """End all threads and free every socket; rooms that are still alive fail. May be called twice."""
        with self.work:
            already = self.closing
            self.closing = True
            self.work.notify_all()
        if not already:
            self.io.post(self._say_goodbye)
        self._join(self._workers)
        if not already:
            for _ in self._checkers:  # queued after the last chunk that a worker has left to the checkers
                self._checks.put(None)
        self._join(self._checkers)
        self.io.stop()
        with self.lock:
            self._fail_all(f"the {self.role} agent was closed")

    @staticmethod
    def _join(threads: list[threading.Thread]) -> None:
        for thread in threads:
            if thread.is_alive() and threading.current_thread() is not thread:
                thread.join(5.0)

    @property
    def alive(self) -> int:
        return sum(thread.is_alive() for thread in (self.io.thread, *self._workers, *self._checkers))

    def _use_device(self) -> None:
        """Make the pool's GPU this thread's. A thread begins with GPU 0, to which torch goes back after each use of a
        stream of another GPU: each rank would then take the memory of a CUDA context there, some 0.5 GB.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _run(self, run: Callable[[], None]) -> None:
        try:
            self._use_device()
            run()
        except BaseException as error:
            self.died(error)

    def _work(self) -> None:
        while True:
            with self.work:
                if self.closing:
                    return
                work = self.next_work()
                if work is None:
                    self.work.wait(0.5)
                    continue
            work()

    def _check(self) -> None:
        while (check := self._checks.get()) is not None:
            check()

    def aside(self, check: Callable[[], None]) -> None:
        """Let a checker thread run ``check``, or run it now if there are no checkers."""
        if self._checkers:
            self._checks.put(check)
        else:
            check()

    def prepare(self, preparation: Callable[[], None]) -> None:
        """Let a checker run ``preparation``, which may take long, after those before it.

        Only one checker does so at a time, because the chunks of other rooms wait for the others.
        """
        with self.lock:
            self._preparations.append(preparation)
            if len(self._preparations) == 1:
                self.aside(self._prepare)

    def _prepare(self) -> None:
        more = True
        while more:
            self._preparations[0]()
            with self.lock:
                self._preparations.popleft()
                more = bool(self._preparations) and not self.closing

    def died(self, error: BaseException) -> None:
        """Fail every room and every later call, because a thread has ended."""
        name = threading.current_thread().name
        self.log.critical("transfer thread %s ended", name, exc_info=error)
        with self.work:
            self.death = f"transfer thread {name} of {self.role} rank {self.rank} ended: {error!r}"
            self._fail_all(self.death)
            self.work.notify_all()

    def handler_failed(self, what: str, error: BaseException) -> None:
        """Count and log an exception that did not end its thread."""
        with self.lock:
            self.counts["internal_errors"] += 1
        self.log.error("transfer %s failed on %s rank %d", what, self.role, self.rank, exc_info=error)

    def check_alive(self) -> None:
        """Refuse a call that no thread would carry out.

        Raises:
            TransferError: a thread has ended, or the agent was closed.
        """
        if self.death is not None:
            raise TransferError(self.death + "; restart this process")
        if self.closing:
            raise TransferError(f"the {self.role} agent of rank {self.rank} was closed")

    def opened(self, rooms: Mapping[int, RoomT], room_id: int) -> RoomT:
        """Return a room that a scheduler has opened.

        Raises:
            TransferError: the room is not open.
        """
        room = rooms.get(room_id)
        if room is None:
            raise TransferError(f"room {room_id} is not open on {self.role} rank {self.rank}; call open_room first")
        return room

    def check_closed(self, rooms: Mapping[int, AnyRoom], room_id: int) -> None:
        """Refuse to open a room that is open and has not ended.

        Raises:
            TransferError: the room is open.
        """
        room = rooms.get(room_id)
        if room is not None and not room.state.ended:
            raise TransferError(
                f"room {room_id} is open on {self.role} rank {self.rank}; close it before opening it anew"
            )

    def drop(self, counter: str, why: str) -> None:
        """Count and log a message or connection that is dropped. Strangers cannot fill the log: see `LINES`."""
        now = self.io.now()
        with self.lock:
            self.counts[counter] += 1
            lines = self._lines.setdefault(counter, deque(maxlen=LINES))
            if len(lines) == LINES and now - lines[0] < LINES_S:
                return
            lines.append(now)
            last = len(lines) == LINES and now - lines[0] < LINES_S
        more = "; more like this are counted, and not logged for a while" if last else ""
        self.log.warning("transfer dropped on %s rank %d: %s%s", self.role, self.rank, why, more)

    def parse(
        self, parts: list[zmq.Frame], sender: str, on_other_version: Callable[[str], None]
    ) -> tuple[messages.Message, zmq.Frame | None] | None:
        """Return the header and the payload of a message, or None after counting and logging a malformed one."""
        try:
            if not 1 <= len(parts) <= 2:
                raise messages.FrameError(f"a message has a header and at most one payload; got {len(parts)} frames")
            message = messages.decode(parts[0].buffer, len(parts) == 2)
        except messages.FrameError as error:
            self.drop("malformed_dropped", f"malformed frame from {sender}: {error}")
            if isinstance(error, messages.FramingVersionError):
                on_other_version(str(error))
            return None
        return message, parts[1] if len(parts) == 2 else None

    def took(self, seconds: float) -> None:
        """Count a room that succeeded after ``seconds``. The caller holds the lock."""
        self.counts["rooms_succeeded"] += 1
        self.transfer_seconds += seconds
        self.durations.append(seconds)

    def log_transfer(
        self, room_id: int, room: AnyRoom, peers: list[str], metric: TransferMetric, **more: float
    ) -> None:
        """Log one line for a transfer that has ended; ``at`` is the time of day in seconds since 1970."""
        line = {
            "role": self.role,
            "rank": self.rank,
            "at": round(time.time(), 6),
            "room": room_id,
            "peer": peers,
            "tokens": metric.tokens,
            "chunks": metric.chunks,
            "bytes": metric.wire_bytes,
            "shared_memory_bytes": metric.shared_memory_bytes,
            "seconds": round(metric.seconds, 6),
            **more,
            "result": "success" if room.state is RoomState.SUCCESS else room.reason,
            "resent": metric.resent,
        }
        self.log.info("transfer %s", json.dumps(line))


def seconds_since(start: float | None, end: float) -> float:
    """Return the seconds from ``start`` to ``end``, or 0 if nothing has started."""
    return 0.0 if start is None else end - start
