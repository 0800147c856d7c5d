"""Start prefill, decode and router in order, watch them, and end them together.

Each child leads its own session and logs to a file. The children's temporary files, SGLang's sockets among them, are in
one folder. A reaper process (`sglang_tpla.launch.reaper`) ends the sessions and removes the folder once this process
closes its pipe or dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import httpx
import psutil
from rich.console import Console

from sglang_tpla.errors import SglangTplaError
from sglang_tpla.launch.reaper import GONE, segments
from sglang_tpla.launch.rendezvous import with_port
from sglang_tpla.launch.roles import Process

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2
ASK_EVERY_S = 1.0
LAST_LINES = 20
SAY_EVERY_S = 15.0  # used where there is no terminal to redraw
# A socket's path may have 107 bytes; SGLang's own names take some 20 of them.
LONGEST_FOLDER = 80


class ChildDied(SglangTplaError):
    """A server that ended while the others needed it; the message carries its last log lines."""


class StartTimeout(SglangTplaError):
    """A server that was not healthy in time; the message carries its last log lines."""


class StopRequested(BaseException):
    """A signal that asks this process to end; not an `Exception`, so that no handler takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def _prctl(option: int, value: int) -> None:
    """Set one of Linux's switches of this process (see prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, such as a `make` that is killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have ``handler`` take the stop signals."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Defer the stop signals, so that every child that starts is also recorded.

    Handlers defer the signals, because a mask applies to one thread and any thread may take a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    try:
        with _stop_signals(lambda number, frame: pending.append(number)):
            yield
    finally:
        if pending:
            signal.raise_signal(pending[0])


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP raise `StopRequested` in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(number)

    with _stop_signals(stop):
        yield


def _is_healthy(client: httpx.Client, url: str) -> bool:
    """Return whether a server answers 200; a server that does not answer yet is not healthy."""
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


class Supervisor:
    """Starts processes and ends them all; use it in a ``with`` statement.

    Args:
        log_dir: folder in which ``ROLE.log`` files stay; None keeps them only when a server fails.
    """

    def __init__(self, log_dir: str | None = None) -> None:
        self.keep_logs = log_dir is not None
        self.log_dir = Path(log_dir) if log_dir else None
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper: subprocess.Popen[str] | None = None
        self._told: list[str] = []  # all that a reaper must know
        self.folder = Path()

    def __enter__(self) -> Supervisor:
        try:
            self._prepare()
        except BaseException:
            # A signal that came meanwhile is raised here, and no __exit__ follows.
            with signals_held():
                self.stop()
            raise
        return self

    def _prepare(self) -> None:
        """Start the reaper and make the folder."""
        with signals_held():
            # Grandchildren that lose their parent become children of this process, which then buries them (`_bury`).
            _prctl(PR_SET_CHILD_SUBREAPER, 1)
            self._reaper = self._new_reaper()
            self._tell(" ".join(["foreign", *map(str, segments())]))
            short = tempfile.gettempdir()
            parent = short if len(short) < LONGEST_FOLDER else "/tmp"
            self.folder = Path(tempfile.mkdtemp(prefix="tpla-", dir=parent))
            self._tell(f"folder {self.folder}")
            self.log_dir = self.log_dir or self.folder / "log"
            self.log_dir.mkdir(parents=True, exist_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C from here on must not leave anything behind; the reaper finishes in any case.
        with signals_held():
            self.stop()

    @staticmethod
    def _new_reaper() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sglang_tpla.launch.reaper"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _tell(self, line: str) -> None:
        assert self._reaper is not None, "use the supervisor in a with statement"
        assert self._reaper.stdin is not None
        self._told.append(line)
        with contextlib.suppress(BrokenPipeError):  # a reaper that ended, which `check` reports
            self._reaper.stdin.write(line + "\n")
            self._reaper.stdin.flush()

    def log_of(self, name: str) -> Path:
        assert self.log_dir is not None
        return self.log_dir / f"{name}.log"

    def start(self, process: Process, name: str | None = None) -> None:
        """Start one process; its name is its role unless given."""
        name = name or process.role
        environment = process.full_environment(os.environ)
        environment["TMPDIR"] = str(self.folder)
        # When a child dies, its last lines must be in the log.
        environment.setdefault("PYTHONUNBUFFERED", "1")
        self.log_of(name).parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up meanwhile
        with signals_held(), self.log_of(name).open("ab") as log:
            child = subprocess.Popen(
                with_port(process.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self.children[name] = child
            self._tell(f"session {child.pid}")

    def last_lines(self, name: str) -> str:
        """Return the end of a child's log."""
        if not self.log_of(name).exists():
            return "(it keeps no log)"
        lines = self.log_of(name).read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if "GET /health" not in line][-LAST_LINES:])

    def check(self) -> None:
        """Raise if a child has ended.

        Raises:
            ChildDied: naming the child, its end and its last lines.
        """
        assert self._reaper is not None, "use the supervisor in a with statement"
        watched: dict[str, subprocess.Popen[Any]] = {**self.children, "reaper": self._reaper}
        for name, child in watched.items():
            code = child.poll()
            if code is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                raise ChildDied(f"the {name} process {how}; its last lines:\n{self.last_lines(name)}")

    def wait_healthy(self, urls: Mapping[str, str], timeout_s: float, on_wait: Callable[[str, float], None]) -> None:
        """Wait until each URL answers 200, watching all children.

        Args:
            urls: name to health URL.
            timeout_s: for all of them together.
            on_wait: called now and then with the missing servers' names and the seconds so far.

        Raises:
            ChildDied: a child that ended.
            StartTimeout: a server that was not healthy in time.
        """
        start_s = time.monotonic()
        waiting, ask_at_s = dict(urls), 0.0
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while waiting:
                self.check()
                waited_s = time.monotonic() - start_s
                if waited_s >= ask_at_s:
                    waiting = {name: url for name, url in waiting.items() if not _is_healthy(client, url)}
                    ask_at_s = waited_s + ASK_EVERY_S
                on_wait(", ".join(waiting), waited_s)
                if waiting and waited_s > timeout_s:
                    name = next(iter(waiting))
                    raise StartTimeout(
                        f"{', '.join(waiting)} not healthy after {timeout_s:.0f} s (--startup-timeout-s); "
                        f"the last lines of {name}:\n{self.last_lines(name)}"
                    )
                if waiting:
                    time.sleep(POLL_S)

    def watch(self) -> None:
        """Watch the children without returning, until one ends.

        Raises:
            ChildDied: naming the child, its end and its last lines.
        """
        while True:
            self.check()
            time.sleep(POLL_S)

    def save_logs(self) -> Path:
        """Keep the logs beyond this supervisor, and return their folder."""
        assert self.log_dir is not None
        if self.keep_logs:
            return self.log_dir
        kept = Path(tempfile.mkdtemp(prefix="sglang_tpla-log-"))
        shutil.copytree(self.log_dir, kept, dirs_exist_ok=True)
        return kept

    def stop(self) -> None:
        """End every child; nothing of theirs is left when this returns."""
        if self._reaper is None:
            return
        if self._end_with(self._reaper) != 0:
            # Somebody ended the reaper. Another one must end the children, because the wait below has no time limit.
            self._reaper, lines, self._told = self._new_reaper(), self._told, []
            for line in lines:
                self._tell(line)
            self._end_with(self._reaper)
        for child in self.children.values():
            child.wait()
        self._bury()
        self._reaper = None
        self._told.clear()
        self.children.clear()

    @staticmethod
    def _end_with(reaper: subprocess.Popen[str]) -> int:
        """Have a reaper end all children, and return its exit code."""
        assert reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            reaper.stdin.close()
        return reaper.wait()

    def _bury(self) -> None:
        """Collect the exit codes of grandchildren that outlived their parents, because not every init does."""
        sessions = {child.pid for child in self.children.values()}
        for process in psutil.Process().children():
            with contextlib.suppress(*GONE, ChildProcessError):
                if os.getsid(process.pid) in sessions:
                    os.waitpid(process.pid, 0)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)


def supervise(processes: Sequence[Process], log_dir: str | None, startup_timeout_s: float) -> int:
    """Run a prefill server, a decode server and a router until a signal or a failure, and return the exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        with stop_signals_raise(), Supervisor(log_dir) as supervisor:
            try:
                start_all(supervisor, processes, startup_timeout_s, console)
                console.print(f"ready at {processes[-1].url}; logs in {supervisor.log_dir}; Ctrl-C ends it")
                supervisor.watch()
            except (ChildDied, StartTimeout, OSError) as error:  # OSError: a log cannot be written
                console.print(f"error: {error}", markup=False, style="red")
                try:
                    console.print(f"all logs are in {supervisor.save_logs()}")
                except OSError as lost:  # somebody removed them, or the disk is full
                    console.print(f"error: the logs could not be kept: {lost}", markup=False, style="red")
                return 1
    except StopRequested as stop:
        console.print("stopped; nothing is left running")
        return 128 + stop.number
    return 0


def start_all(supervisor: Supervisor, processes: Sequence[Process], startup_timeout_s: float, console: Console) -> None:
    """Start the servers together, and the router once they are healthy.

    Raises:
        ChildDied: a server that ended.
        StartTimeout: a server that was not healthy in time.
    """
    servers = [process for process in processes if process.role != "router"]
    routers = [process for process in processes if process.role == "router"]
    said_s = 0.0
    with console.status("starting", spinner="line") as status:

        def show(names: str, waited_s: float) -> None:
            nonlocal said_s
            text = f"waiting for {names} ({waited_s:.0f} s)" if names else "ready"
            status.update(text)
            if not console.is_terminal and names and waited_s - said_s >= SAY_EVERY_S:
                said_s = waited_s
                console.print(text)

        for group in (servers, routers):
            start_s, said_s = time.monotonic(), 0.0
            for process in group:
                supervisor.start(process)
            # A router is healthy before it knows its workers, and ready only afterwards.
            path = "/readiness" if group is routers else "/health"
            supervisor.wait_healthy({p.role: p.url + path for p in group}, startup_timeout_s, show)
            names = " and ".join(process.role for process in group)
            console.print(f"{names} up after {time.monotonic() - start_s:.0f} s")
