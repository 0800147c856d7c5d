"""The supervisor with small real servers: it handles failures, and nothing outlives it, however it ends."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import psutil
import pytest

from sglang_tpla.launch.roles import Process
from sglang_tpla.launch.supervisor import ChildDied, StartTimeout, Supervisor
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]

# This is the worst kind of server: it ignores SIGTERM, starts a child that does so too and outlives it, leaves a socket
# file and a temporary file, and maps shared memory whose name nobody else knows.
SERVER = textwrap.dedent(
    """
    import http.server, mmap, os, signal, socket, subprocess, sys, tempfile, uuid

    if sys.argv[2:] != ["polite"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    child = subprocess.Popen([sys.executable, "-c", sleeper])
    tempfile.NamedTemporaryFile(delete=False)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(tempfile.gettempdir() + "/socket-" + uuid.uuid4().hex[:8])
    path = "/dev/shm/test_supervisor_" + os.environ.get("TEST_SEGMENTS", "") + uuid.uuid4().hex
    with open(path + "_first_name", "wb+") as file:
        file.truncate(4096)
        shared = mmap.mmap(file.fileno(), 4096)
    os.link(path + "_first_name", path)
    os.unlink(path + "_first_name")  # as the C library does for a semaphore
    print("shared memory", path, "child", child.pid, flush=True)

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
    """
)

# This supervisor runs in a separate process, to be killed.
SUPERVISED = textwrap.dedent(
    """
    import sys
    from sglang_tpla.launch.roles import Process
    from sglang_tpla.launch.supervisor import supervise

    program, *ports = sys.argv[1:]
    sys.exit(supervise([
        Process(role, (sys.executable, "-c", program, port, "polite"), {}, f"http://127.0.0.1:{port}")
        for role, port in zip(("prefill", "decode", "router"), ports)
    ], None, 60))
    """
)


def server(role: str, port: int, program: str = SERVER) -> Process:
    return Process(role, (sys.executable, "-c", program, str(port)), {}, f"http://127.0.0.1:{port}")


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def remains(log: Path) -> list[str]:
    """Return the things that a server reported to have made and that still exist."""
    words = log.read_text().split("\n")[0].split()
    path, child = words[2], int(words[4])
    return [path] * Path(path).exists() + [f"process {child}"] * alive(child)


def quiet(names: str, waited_s: float) -> None:
    """Ignore the supervisor's report."""


def test_everything_is_gone_after_an_orderly_end(tmp_path: Path) -> None:
    with Supervisor(str(tmp_path)) as supervisor:
        for role in ("prefill", "decode"):
            process = server(role, free_ports(1)[0])
            supervisor.start(process)
            supervisor.wait_healthy({role: process.url}, 60, quiet)
        supervisor.check()
        folder = supervisor.folder
        assert len(list(folder.glob("socket-*"))) == 2
        assert all(len(remains(tmp_path / f"{role}.log")) == 2 for role in ("prefill", "decode"))
    assert not folder.exists()
    assert not any(remains(tmp_path / f"{role}.log") for role in ("prefill", "decode"))


def test_a_dead_child_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Supervisor(str(tmp_path)) as supervisor:
        supervisor.start(server("decode", 1, "print('no memory for the pool'); raise SystemExit(7)"))
        with pytest.raises(ChildDied, match=r"the decode process ended with 7; .*\nno memory for the pool"):
            supervisor.wait_healthy({"decode": f"http://127.0.0.1:{free_ports(1)[0]}"}, 60, quiet)


def test_a_crash_leaves_no_shared_memory(tmp_path: Path) -> None:
    """The reaper saw the segment of a server that has crashed, and removes it at the end."""
    with Supervisor(str(tmp_path)) as supervisor:
        process = server("prefill", free_ports(1)[0])
        supervisor.start(process)
        supervisor.wait_healthy({"prefill": process.url}, 60, quiet)
        log = tmp_path / "prefill.log"
        wait_until_seen(supervisor)
        supervisor.children["prefill"].kill()
        supervisor.children["prefill"].wait(60)
        assert len(remains(log)) == 2
        with pytest.raises(ChildDied, match="the prefill process was ended by SIGKILL"):
            supervisor.check()
    assert not remains(log)


def wait_until_seen(supervisor: Supervisor) -> None:
    """Return once the reaper has looked at the processes: it has then read more bytes and sleeps again.

    A wait for the disk is a different state, which neither begins nor ends a look.
    """
    assert supervisor._reaper is not None
    reaper = psutil.Process(supervisor._reaper.pid)

    def bytes_read_asleep() -> int:
        while True:
            before = reaper.io_counters().read_chars
            if reaper.status() == psutil.STATUS_SLEEPING and reaper.io_counters().read_chars == before:
                return before
            supervisor.check()

    before = bytes_read_asleep()
    while bytes_read_asleep() == before:
        supervisor.check()


def test_a_server_that_is_never_healthy_is_named(tmp_path: Path) -> None:
    with Supervisor(str(tmp_path)) as supervisor:
        process = server("decode", free_ports(1)[0])
        supervisor.start(process)
        supervisor.wait_healthy({"decode": process.url}, 60, quiet)
        with pytest.raises(StartTimeout, match="decode not healthy after 0 s"):
            supervisor.wait_healthy({"decode": f"http://127.0.0.1:{free_ports(1)[0]}"}, 0.2, quiet)
    assert not remains(tmp_path / "decode.log")


def test_a_reaper_that_comes_up_late_finds_all(tmp_path: Path) -> None:
    with Supervisor(str(tmp_path)) as supervisor:
        assert supervisor._reaper is not None
        supervisor._reaper.send_signal(signal.SIGSTOP)
        process = server("decode", free_ports(1)[0])
        supervisor.start(process)
        supervisor.wait_healthy({"decode": process.url}, 60, quiet)
        supervisor._reaper.send_signal(signal.SIGCONT)
    assert not remains(tmp_path / "decode.log")


@pytest.mark.parametrize("when", ["while starting", "when ready"])
def test_a_reaper_that_was_killed_is_replaced(when: str, tmp_path: Path) -> None:
    """The supervisor names the killed reaper and still ends everything, instead of waiting for its children."""
    with Supervisor(str(tmp_path)) as supervisor:
        assert supervisor._reaper is not None
        folder, process = supervisor.folder, server("decode", free_ports(1)[0])
        if when == "when ready":
            supervisor.start(process)
            supervisor.wait_healthy({"decode": process.url}, 60, quiet)
        supervisor._reaper.kill()
        supervisor._reaper.wait(60)
        if when == "while starting":
            supervisor.start(process)
        with pytest.raises(ChildDied, match="the reaper process was ended by SIGKILL"):
            supervisor.check()
        child = supervisor.children["decode"]
    assert child.poll() is not None
    assert not folder.exists()
    assert when == "while starting" or not remains(tmp_path / "decode.log")


def test_logs_are_kept_when_asked(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        supervisor.start(server("decode", 1, "print('last words')"))
        supervisor.children["decode"].wait(60)
        kept = supervisor.save_logs()
    try:
        assert (kept / "decode.log").read_text() == "last words\n"
    finally:
        (kept / "decode.log").unlink()
        kept.rmdir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("when", ["while starting", "when ready"])
def test_nothing_outlives_a_signal(number: signal.Signals, when: str, tmp_path: Path) -> None:
    """After a signal ends the supervisor, at the start or later, processes, files and shared memory are gone."""
    ports = [str(port) for port in free_ports(3)]
    own = uuid.uuid4().hex + "_"  # other tests may run servers of the same kind at the same time
    environ = {**os.environ, "TMPDIR": str(tmp_path), "TEST_SEGMENTS": own}
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, SERVER, *ports], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environ
    )
    assert supervisor.stderr is not None
    wanted = "up after" if when == "while starting" else "ready at"
    for line in supervisor.stderr:
        if wanted in line:
            break
    logs = list(tmp_path.glob("tpla-*/log/*.log"))
    said = [log.read_text().split("\n")[0].split() for log in logs]
    supervisor.send_signal(number)
    assert supervisor.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    # The reaper holds this pipe open until it has finished.
    supervisor.stderr.read()
    supervisor.stderr.close()
    assert len(said) >= 2
    for words in filter(None, said):
        assert not Path(words[2]).exists()
        assert not alive(int(words[4]))
    assert not list(tmp_path.iterdir())
    assert not list(Path("/dev/shm").glob(f"test_supervisor_{own}*"))


def supervised(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run three processes of a program to their end under a supervisor whose temporary files are in ``folder``."""
    return subprocess.run(
        [sys.executable, "-c", SUPERVISED, program, "1", "2", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        timeout=300,
    )


def test_the_exit_code_and_the_logs_of_a_failure(tmp_path: Path) -> None:
    program = "import sys; print('cannot bind'); sys.exit(5)"
    done = supervised(program, tmp_path)
    assert done.returncode == 1
    assert "ended with 5" in done.stderr
    assert "cannot bind" in done.stderr
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("sglang_tpla-log-")
    # The first of the three to end is named; the others may have been stopped before they printed anything.
    (role,) = re.findall(r"the (\w+) process ended with 5", done.stderr)
    assert (kept / f"{role}.log").read_text() == "cannot bind\n"


def test_logs_that_somebody_removed_are_named(tmp_path: Path) -> None:
    """The supervisor still reports a failure, a later process has a log, and no traceback hides either."""
    program = (
        "import os, shutil, sys, tempfile; shutil.rmtree(tempfile.gettempdir() + '/log', ignore_errors=True); "
        "print('last words'); sys.exit(5)"
    )
    done = supervised(program, tmp_path)
    assert done.returncode == 1
    assert "process ended with 5" in done.stderr and "Traceback" not in done.stderr
    with Supervisor(str(tmp_path / "gone")) as supervisor:
        (tmp_path / "gone").rmdir()
        supervisor.start(server("router", 1, "print('here')"))
        supervisor.children["router"].wait(60)
        assert (tmp_path / "gone" / "router.log").read_text() == "here\n"
