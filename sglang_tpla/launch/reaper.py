"""End every process of a supervised deployment when the supervisor ends, for whatever reason.

    python -m sglang_tpla.launch.reaper

The supervisor holds the other end of this process's standard input, and writes ``foreign NODE ...`` for the shared
memory that existed before its own children (this process may start later than they do), ``folder PATH`` for the folder
of temporary files, and ``session PID`` for each child, which leads its own session. When that pipe closes, because the
supervisor ended or was killed, this process ends every process of those sessions, and removes the folders and the
shared memory that those processes had mapped. SGLang leaves a segment behind at each start, under a name that only its
processes know, so the reaper looks at their mappings.

Signals meant for the supervisor do not reach this process, which leads its own session and ignores them. This process
needs Linux.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

TERM_GRACE_S = 5.0
ORPHAN_GRACE_S = 1.0
LOOK_EVERY_S = 1.0
POLL_S = 0.05
SHARED_MEMORY = Path("/dev/shm")
GONE = (FileNotFoundError, ProcessLookupError, PermissionError, psutil.Error)
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # such processes only wait for their parent


def held_segments(pid: int) -> set[int]:
    """Return the index nodes of the shared memory that a process has mapped or is about to map.

    Names would not do: a semaphore is mapped under a temporary name, and linked to its final name afterwards.
    """
    process = Path("/proc") / str(pid)
    device = SHARED_MEMORY.stat().st_dev
    held: set[int] = set()
    with contextlib.suppress(*GONE):
        held |= {int(node) for node in re.findall(rb" (\d+) +/dev/shm/", (process / "maps").read_bytes())}
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(*GONE):
                status = descriptor.stat()
                if status.st_dev == device and stat.S_ISREG(status.st_mode):
                    held.add(status.st_ino)
    return held


def leads_session(pid: int) -> bool:
    with contextlib.suppress(*GONE):
        return os.getsid(pid) == pid
    return False


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those processes that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def segments() -> dict[int, Path]:
    """Return every file in shared memory by its index node."""
    found = {}
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(*GONE):
            found[path.stat().st_ino] = path
    return found


class Reaper:
    """The processes, folders and shared memory of the deployment, and their end."""

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.folders: list[str] = []
        self.held: set[int] = set()
        self.foreign: set[int] = set()

    def note(self, line: str) -> None:
        """Take one line of the supervisor.

        Raises:
            ValueError: a line that is none of ``session PID``, ``folder PATH`` and ``foreign NODE ...``.
        """
        kind, _, value = line.partition(" ")
        if kind == "session":
            self.sessions.add(int(value))
        elif kind == "folder":
            self.folders.append(value)
        elif kind == "foreign":
            self.foreign.update(int(node) for node in value.split())
        else:
            raise ValueError(f"expected 'session PID', 'folder PATH' or 'foreign NODE ...'; got {line!r}")

    def living(self) -> list[int]:
        """Return the processes of the deployment, without this one."""
        return [process.pid for process in psutil.process_iter() if process.pid != os.getpid() and self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        """Return whether a process lives in one of the sessions, or was started with one of the temporary folders."""
        with contextlib.suppress(*GONE):
            return process.status() not in ENDED and (
                os.getsid(process.pid) in self.sessions or process.environ().get("TMPDIR") in self.folders
            )
        return False

    def look(self) -> None:
        """Remember the shared memory that the processes hold."""
        for pid in self.living():
            self.held |= held_segments(pid) - self.foreign

    def segments(self) -> list[Path]:
        """Return the deployment's shared memory that still exists."""
        return [path for node, path in segments().items() if node in self.held]

    def wait_for_end(self, descriptor: int) -> None:
        """Read the supervisor's lines until it closes them."""
        pending = b""
        while True:
            if not select.select([descriptor], [], [], LOOK_EVERY_S)[0]:
                self.look()
                continue
            received = os.read(descriptor, 65536)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                self.note(os.fsdecode(line))

    def frozen_look(self, number: signal.Signals) -> None:
        """Stop the processes, look at them, then send them a signal, so that they map no memory after the look.

        SIGTERM goes only to the leaders of the sessions, which end their own children.
        """
        living = self.living()
        send(living, signal.SIGSTOP)
        self.look()
        leaders = [pid for pid in living if leads_session(pid)]
        send(leaders if number == signal.SIGTERM else living, number)
        send(living, signal.SIGCONT)

    def end(self, grace_s: float = TERM_GRACE_S) -> None:
        """Ask the session leaders to end, end every process that still lives, then remove their memory and folders."""
        self.frozen_look(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while living := self.living():
            if not any(leads_session(pid) for pid in living):
                # A session without its leader has little to tidy up.
                deadline = min(deadline, time.monotonic() + ORPHAN_GRACE_S)
            if time.monotonic() >= deadline:
                self.frozen_look(signal.SIGKILL)
            time.sleep(POLL_S)
        for segment in self.segments():
            segment.unlink(missing_ok=True)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Wait for the supervisor's end, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    reaper = Reaper()
    try:
        reaper.wait_for_end(sys.stdin.fileno())
    finally:
        reaper.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
