"""Real servers for the end-to-end tests: the launcher's own command line, loopback ports, logs in a folder.

A server is a process group; `stop` and the end of the test session leave none of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
START_S = float(os.environ.get("TEST_START_S", "300"))  # raise it on a busy machine
# Flags of every CPU server of these tests; float32 makes greedy answers reproducible.
COMMON = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "20000")


class ServerFailed(AssertionError):
    """A server that ended or did not come up; the message carries the end of its log."""


@dataclass
class Server:
    """One started command.

    Args:
        name: for messages and the log's name.
        command: after the interpreter.
        port: HTTP port.
        log: where stdout and stderr go.
        env: added to the environment.
        host: where it listens.
        bootstrap: the port of a prefill server's bootstrap server.
        largest_file_bytes: the system refuses it larger files, those in memory included (EFBIG).
    """

    name: str
    command: tuple[str, ...]
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    bootstrap: int = 0
    largest_file_bytes: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> Server:
        environment = {**os.environ, **self.env, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        limit = ["prlimit", f"--fsize={self.largest_file_bytes}"] if self.largest_file_bytes else []
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*limit, sys.executable, *self.command],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        return self

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:400] for line in text[-lines:] if "server_args=" not in line)

    def wait(self, timeout_s: float = START_S) -> Server:
        """Wait until the server is healthy, or the router knows its workers; show the end of the log on failure."""
        assert self.process is not None
        path = "/readiness" if self.name == "router" else "/health"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    return self
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        raise ServerFailed(f"{self.name} did not answer {path} within {timeout_s} s:\n{self.tail()}")

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def schedulers(self) -> list[psutil.Process]:
        return [p for p in self.tree() if "scheduler" in " ".join([p.name(), *p.cmdline()]).lower()]

    def kill(self) -> None:
        """Send SIGKILL to the whole group, as a power failure would end it."""
        assert self.process is not None
        tree = self.tree()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=20)
        self.process.wait(20)

    def stop(self) -> None:
        """End the server with SIGKILL, however far its start came, because SGLang waits 15 s after SIGTERM."""
        if self.process is not None:
            self.kill()

    def get(self, path: str, timeout_s: float = 30) -> Any:
        response = httpx.get(self.url + path, timeout=timeout_s)
        response.raise_for_status()
        return response.json()

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 240) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout_s)

    def generate(self, prompt: str | list[int], tokens: int, timeout_s: float = 240, **extra: Any) -> dict[str, Any]:
        """Ask /generate greedily, and fail on any other answer than 200."""
        response = self.post("/generate", request_body(prompt, tokens, **extra), timeout_s)
        assert response.status_code == 200, f"{self.name}: {response.status_code} {response.text[:500]}\n{self.tail()}"
        return response.json()


@contextlib.contextmanager
def running(*servers: Server, timeout_s: float = START_S) -> Iterator[None]:
    """Start servers together, wait until each is healthy, and stop them at the end."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait(timeout_s)
        yield


def request_body(prompt: str | list[int] | list[str], tokens: int, **extra: Any) -> dict[str, Any]:
    text = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], str))
    return {
        "text" if text else "input_ids": prompt,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **extra,
    }


def launcher(
    role: str, model: str | Path, log: Path, *args: str, common: Sequence[str] = COMMON, host: str = "127.0.0.1"
) -> Server:
    """Return a server of ours that is not started yet, at free ports."""
    port, bootstrap = free_ports(2)
    own = ("--disaggregation-bootstrap-port", str(bootstrap)) if role == "prefill" else ()
    command = (
        "-m", "sglang_tpla.launch", "--role", role, "--model-path", str(model), *common, "--host", host,
        "--port", str(port), *own, *args,
    )  # fmt: skip
    return Server(role, command, port, log, host=host, bootstrap=bootstrap)


def stock(model: str, log: Path, *args: str) -> Server:
    """Return stock SGLang on the CPU reference platform, with none of our hooks, the CPU's included."""
    env = {
        "SGLANG_PLATFORM": "sglang_tpla_cpu",
        "SGLANG_PLUGINS": "none",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0",
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
    }
    (port,) = free_ports(1)
    command = ("-m", "sglang.launch_server", "--model-path", model, *COMMON, "--port", str(port), *args)
    return Server("stock", command, port, log, env)


def router(log: Path, prefill: Server, decode: Server) -> Server:
    """Return the real sglang_router in front of one prefill and one decode server."""
    port, prometheus = free_ports(2)
    command = (
        "-m", "sglang_tpla.launch", "--role", "router", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(prometheus), "--prefill", prefill.url, str(prefill.bootstrap), "--decode", decode.url,
    )  # fmt: skip
    return Server("router", command, port, log)


def transfer_lines(server: Server) -> list[dict[str, Any]]:
    """Return the structured log lines of a server's transfers."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if " transfer {" in line]
    return [json.loads(line[line.index("transfer {") + len("transfer ") :]) for line in lines]


def counters(server: Server) -> dict[str, Any]:
    """Return the counters of rank 0's agent."""
    (agent,) = server.get("/server_info")["internal_states"][0]["tpla_transfer"]
    return agent


def idle(server: Server) -> dict[str, Any]:
    """Return the resources that the server still holds, with the agent's rooms and staging."""
    state = server.get("/server_info")["internal_states"][0]
    (agent,) = state["tpla_transfer"]
    held = {k: v for k, v in state["tpla_scheduler"].items() if k != "cached_tokens"}
    return held | {"rooms": agent["rooms"], "staging": agent["staging_used_bytes"]}


def until_running(decode: Server, call: concurrent.futures.Future[Any]) -> None:
    """Wait until the server decodes a request; ``call`` asks for it and must not have ended."""
    while not idle(decode)["running_batch"]:
        assert not call.done(), call.result()


def wait_idle(*servers: Server, timeout_s: float = 60) -> None:
    """Wait until queues, rooms, staging and cache slots are at zero; on failure, show those that are not."""
    deadline = time.monotonic() + timeout_s
    while any(any(idle(server).values()) for server in servers):
        assert time.monotonic() < deadline, [(server.name, idle(server)) for server in servers]
