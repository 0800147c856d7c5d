"""What both agents are made of: an I/O thread, a worker thread, counters, and the rule that nothing fails in
silence.

Lock order: a room's own lock (decode only) is never taken while the agent's lock is held, and the agent's
lock may be taken by any thread for a short time.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import zmq

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.memory.shared_memory import ArenaMemory, host_identity, make_arena
from sglang_tpla.transfer.network.event_loop import IoLoop
from sglang_tpla.transfer.room import RoomState, TransferError

QUEUE_FRAMES = 16384  # high-water mark of a socket, in messages; credits bound the bytes
SOCKET_BUFFER_BYTES = 4 << 20  # the system may give less
MAX_PARTS = 3
FIRST_SLOTS = 2  # of staging, reserved at the start
# Threads that make or write chunks. More are slower: each call into torch gives the interpreter away, all wait for it
# (benchmarks/results/h200/NOTES.md). What a GPU copied is checked by others, which need no interpreter for that.
WORKERS = {"cpu": 1, "cuda": 2}
CHECKERS = {"cpu": 0, "cuda": 2}
SPARE_CORES = 4  # with as many, workers check what lies in a CPU pool, beside the I/O thread that moves it
MAX_DURATIONS = 16384  # kept for whoever publishes them
MAX_REMEMBERED = 65536  # in a table of what has ended


class AnyRoom(Protocol):
    """What both agents' rooms have."""

    state: RoomState
    reason: str


RoomT = TypeVar("RoomT", bound=AnyRoom)


class Agent(ABC, Generic[RoomT]):
    """Base of `PrefillAgent` and `DecodeAgent`."""

    role = ""
    _rooms: dict[int, RoomT]

    def __init__(
        self, settings: Settings, rank: int, size: int, logger: logging.Logger | None, device: str
    ) -> None:
        settings = settings.on(device)
        self._settings, self._rank, self._size = settings, rank, size
        self._log = logger or logging.getLogger("sglang_tpla.transfer")
        self._agent_id = uuid.uuid4().hex
        self._chunk_bytes = min(settings.chunk_bytes, settings.staging_bytes // 2)
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._counts: Counter[str] = Counter()
        self._transfer_seconds = 0.0
        self.durations: deque[float] = deque(
            maxlen=MAX_DURATIONS
        )  # of rooms that succeeded, for whoever publishes them
        self._death: str | None = None
        self._closing = False
        tick_s = min(settings.heartbeat_s / 2, 0.25)
        self._io = IoLoop(f"tpla-{self.role}-io-{rank}", tick_s, self._tick, self._handler_failed, self._died)
        self._checks_aside = len(os.sched_getaffinity(0)) >= SPARE_CORES
        self._workers = [
            threading.Thread(
                target=self._run_worker, name=f"tpla-{self.role}-work-{rank}-{number}", daemon=True
            )
            for number in range(WORKERS[device])
        ]
        self._checks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._checkers = [
            threading.Thread(
                target=self._run_checker, name=f"tpla-{self.role}-check-{rank}-{number}", daemon=True
            )
            for number in range(CHECKERS[device])
        ]

    def _make_arena(self) -> ArenaMemory | None:
        """Shared memory for staging, a few slots of it reserved, where the settings want it and there is some."""
        if not self._settings.shared_memory:
            return None
        slots = self._settings.staging_bytes // self._chunk_bytes
        reserved_bytes = min(slots, FIRST_SLOTS) * self._chunk_bytes
        return make_arena(self._agent_id, slots * self._chunk_bytes, reserved_bytes, self._log)

    def _host_identity(self, given: str | None) -> str:
        """What tells hosts apart; unlike all others where shared memory is not wanted."""
        if given is not None:
            return given
        return host_identity() if self._settings.shared_memory else self._agent_id

    def close(self) -> None:
        """End all threads and free every socket; rooms that are still alive fail. May be called twice."""
        with self._work:
            already = self._closing
            self._closing = True
            self._work.notify_all()
        if not already:
            self._io.post(self._say_goodbye)
            for _ in self._checkers:
                self._checks.put(None)
        for thread in (*self._workers, *self._checkers):
            if thread.is_alive() and threading.current_thread() is not thread:
                thread.join(5.0)
        self._io.stop()
        with self._lock:
            self._fail_all(f"the {self.role} agent was closed")

    @property
    def rank(self) -> int:
        """Of this agent among those of its server."""
        return self._rank

    def poll(self, room: int) -> RoomState:
        """State of a room.

        On prefill BOOTSTRAPPING until every expected rank has asked, WAITING for rows, TRANSFERRING, SUCCESS when every
        rank has confirmed. On decode BOOTSTRAPPING until every prefill rank has registered this one, WAITING for
        ``request``, TRANSFERRING, SUCCESS when every chunk and then the metadata row are in place. FAILED: see
        `failure`.

        Raises:
            TransferError: the room is not open.
        """
        with self._lock:
            return RoomState.FAILED if self._death is not None else self._open(room).state

    def failure(self, room: int) -> str:
        """Why a room failed; empty if it has not.

        Raises:
            TransferError: the room is not open.
        """
        with self._lock:
            return self._death or self._open(room).reason

    def _open(self, room: int) -> RoomT:
        entry = self._rooms.get(room)
        if entry is None:
            raise TransferError(
                f"room {room} is not open on {self.role} rank {self._rank}; call open_room first"
            )
        return entry

    # Threads

    def _start(self) -> None:
        self._io.start()
        for thread in (*self._workers, *self._checkers):
            thread.start()

    @property
    def _threads_alive(self) -> int:
        return sum(thread.is_alive() for thread in (self._io.thread, *self._workers, *self._checkers))

    def _run_worker(self) -> None:
        try:
            while self._work_once():
                pass
        except BaseException as error:
            self._died(error)

    def _run_checker(self) -> None:
        try:
            while (check := self._checks.get()) is not None:
                check()
        except BaseException as error:
            self._died(error)

    def _aside(self, check: Callable[[], None]) -> None:
        """Have a checker do this, or do it now where there are none."""
        if self._checkers:
            self._checks.put(check)
        else:
            check()

    @abstractmethod
    def _work_once(self) -> bool:
        """Wait for work and do one piece; False at the end."""

    @abstractmethod
    def _tick(self) -> None:
        """Deadlines and heartbeats, on the I/O thread."""

    @abstractmethod
    def _say_goodbye(self) -> None:
        """Tell the peers that this agent closes."""

    @abstractmethod
    def _fail_all(self, reason: str) -> None:
        """Fail every room that has not ended."""

    def _died(self, error: BaseException) -> None:
        name = threading.current_thread().name
        self._log.critical("transfer thread %s ended", name, exc_info=error)
        with self._work:
            self._death = f"transfer thread {name} of {self.role} rank {self._rank} ended: {error!r}"
            self._fail_all(self._death)
            self._work.notify_all()

    def _handler_failed(self, what: str, error: BaseException) -> None:
        with self._lock:
            self._counts["internal_errors"] += 1
        self._log.error("transfer %s failed on %s rank %d", what, self.role, self._rank, exc_info=error)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise TransferError(self._death + "; restart this process")
        if self._closing:
            raise TransferError(f"the {self.role} agent of rank {self._rank} was closed")

    # Sockets

    def _configure(self, socket: zmq.Socket, max_message_bytes: int) -> None:
        timeout_ms = int(self._settings.peer_timeout_s * 1000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
        socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
        socket.setsockopt(zmq.SNDBUF, SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.RCVBUF, SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(self._settings.heartbeat_s * 1000)))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout_ms)

    def _receive_parts(self, socket: zmq.Socket) -> list[zmq.Frame] | None:
        """One message without blocking, at most MAX_PARTS frames of it (one more says there was more), or
        None.
        """
        try:
            parts = [socket.recv(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            return None
        while parts[-1].more if len(parts) <= MAX_PARTS else socket.getsockopt(zmq.RCVMORE):
            part = socket.recv(zmq.NOBLOCK, copy=False)
            if len(parts) <= MAX_PARTS:
                parts.append(part)
        return parts

    def _parse(
        self, parts: list[zmq.Frame], sender: str, on_other_version: Callable[[str], None]
    ) -> tuple[frames.Message, zmq.Frame | None] | None:
        """Header and payload of a message, or None after counting and logging what was wrong with it."""
        try:
            if not 1 <= len(parts) <= 2:
                raise frames.FrameError(
                    f"a message has a header and at most one payload; got {len(parts)} frames"
                )
            message = frames.decode(parts[0].buffer, len(parts) == 2)
        except frames.FrameError as error:
            self._drop("malformed_dropped", f"malformed frame from {sender}: {error}")
            if isinstance(error, frames.FramingVersionError):
                on_other_version(str(error))
            return None
        return message, parts[1] if len(parts) == 2 else None

    def _drop(self, counter: str, why: str) -> None:
        with self._lock:
            self._counts[counter] += 1
        self._log.warning("transfer dropped on %s rank %d: %s", self.role, self._rank, why)

    def _took(self, seconds: float) -> None:
        """A room succeeded after so long."""
        self._transfer_seconds += seconds
        self.durations.append(seconds)

    def _log_transfer(self, **fields: Any) -> None:
        """One line for a transfer that ended; ``at`` is the time of day in seconds since 1970."""
        line = {"role": self.role, "rank": self._rank, "at": round(time.time(), 6), **fields}
        self._log.info("transfer %s", json.dumps(line))


def endpoint(host: str, port: int | str) -> str:
    """ZMQ address of a host (name, IPv4 or IPv6) and port."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def remember(table: OrderedDict[Any, Any], key: object, value: object) -> None:
    """Keep a value, and forget the oldest of too many."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def seconds_since(start: float | None, end: float | None) -> float:
    """Elapsed seconds, up to now while there is no end."""
    return 0.0 if start is None else (time.monotonic() if end is None else end) - start


Handler = Callable[..., None]
