"""A prefill and a decode server of two ranks each with a bad network between them, and what must hold after a fault."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.prompts import source
from tests.e2e.servers import Server, free_ports, launcher, request_body, wait_idle
from tests.wire.proxy import FaultProxy, Spoiler

PEER_TIMEOUT_S = 6.0
TRANSFER = (
    "--tpla-peer-timeout-s",
    str(PEER_TIMEOUT_S),
    "--tpla-transfer-timeout-s",
    "60",
    "--tpla-chunk-bytes",
    "65536",
)
FAULTS = (*Spoiler.KINDS, "half-open", "cut")
HARMLESS = ("delay", "throttle", "cut")  # these must not fail a request
SPOILED = 0.004  # of the pieces of 4,096 bytes: about every fifth chunk
# some 300 to 1,500 tokens each: several chunks of 64 KiB, no common prefix
PROMPTS = [source(seed=50 + n, characters=c) for n, c in enumerate((1200, 5000, 2500))]
TOKENS = 8
GROWTH_BYTES = 256 << 20  # of a process, over all the faults of a test
rooms = itertools.count(200_000)
Held = dict[int, tuple[int, int, int]]


def neighbouring_ports(count: int) -> int:
    """The first of some free ports in a row."""
    while True:
        (first,) = free_ports(1)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def resources(server: Server) -> Held:
    """Threads, file handles and resident bytes of each rank process."""
    return {p.pid: (p.num_threads(), p.num_fds(), p.memory_info().rss) for p in server.schedulers()}


def growth(before: Held, after: Held) -> list[str]:
    """What processes that lived through it hold more than before."""
    pairs = [(pid, before[pid], new) for pid, new in after.items() if pid in before]
    return [
        f"process {pid}: {old} before, {new} after"
        for pid, old, new in pairs
        if old[0] < new[0] or old[1] < new[1] or old[2] + GROWTH_BYTES < new[2]
    ]


def counters(server: Server) -> dict[str, Any]:
    """Of the agent of rank 0."""
    (agent,) = server.get("/server_info")["internal_states"][0]["tpla_transfer"]
    return agent


@dataclass
class Answer:
    """What a decode server said: tokens and their log-probabilities, or why there are none."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    failure: str = ""


@dataclass
class Faulty:
    """Two servers and the proxies in front of the prefill ranks and of the bootstrap server."""

    prefill: Server
    decode: Server
    proxies: list[FaultProxy]
    door: FaultProxy  # to the bootstrap server
    expected: list[Answer] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def start(cls, model: str, artifact: str, logs: Path, *prefill_arguments: str) -> Iterator[Faulty]:
        """Start both, learn what they answer on a good network, and end both."""
        ports, listen, shown = free_ports(3), neighbouring_ports(2), neighbouring_ports(2)
        prefill = launcher("prefill", model, ports[0], logs / "faulty-prefill.log", "--disaggregation-bootstrap-port",
                           str(ports[1]), "--chunked-prefill-size", "128", "--tp", "2", *TRANSFER,
                           "--tpla-listen-port", str(listen), "--tpla-advertise", f"127.0.0.1:{shown}",
                           "--tpla-shared-memory", "0", *prefill_arguments)  # fmt: skip
        decode = launcher("decode", model, ports[2], logs / "faulty-decode.log", "--tp", "2", "--tpla-groups", "2",
                          "--tpla-artifact", artifact, *TRANSFER)  # fmt: skip
        with contextlib.ExitStack() as stack:
            proxies = [
                stack.enter_context(contextlib.closing(FaultProxy(listen + rank, listen_port=shown + rank)))
                for rank in range(2)
            ]
            door = stack.enter_context(contextlib.closing(FaultProxy(ports[1])))
            for server in (prefill, decode):
                stack.callback(server.stop)
                server.start()
            for server in (prefill, decode):
                server.wait()
            faulty = cls(prefill, decode, proxies, door)
            faulty.expected = [faulty.ask(prompt) for prompt in PROMPTS]
            assert not any(answer.failure for answer in faulty.expected), faulty.expected
            yield faulty

    def bodies(self, prompt: Any, tokens: int = TOKENS, **extra: Any) -> dict[str, Any]:
        """One request as the router would send it to both."""
        place = {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.door.port,
            "bootstrap_room": next(rooms),
        }
        return request_body(prompt, tokens, return_logprob=True, **extra) | place

    def ask(self, prompt: Any, decode: Server | None = None, tokens: int = TOKENS, **extra: Any) -> Answer:
        """Send one request to prefill and to a decode server, and read the latter's answer."""
        body = self.bodies(prompt, tokens, **extra)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            calls = [
                pool.submit(server.post, "/generate", body, 200)
                for server in (self.prefill, decode or self.decode)
            ]
            first, answer = (call.result() for call in calls)
        if answer.status_code != 200 or answer.json()["meta_info"]["finish_reason"]["type"] == "abort":
            return Answer(failure=answer.text)
        assert answer.json()["meta_info"]["completion_tokens"] == tokens, (first.text, answer.text)
        values = answer.json()["meta_info"]["output_token_logprobs"]
        return Answer(tuple(token for _, token, _ in values), tuple(value for value, _, _ in values))

    def ask_all(self) -> list[Answer]:
        """Every prompt at once."""
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(self.ask, PROMPTS))

    @contextlib.contextmanager
    def network(self, fault: str, seed: int = 0) -> Iterator[None]:
        """A network with a fault; a good one again afterwards."""
        stop = threading.Event()

        def disturb() -> None:
            while not stop.wait(0.4 if fault == "cut" else 2.0):
                for proxy in self.proxies:
                    if fault == "cut":
                        proxy.cut()
                    else:
                        proxy.flowing.clear()
            for proxy in self.proxies:
                if not proxy.flowing.is_set():
                    proxy.cut()
                    proxy.flowing.set()

        helper = threading.Thread(target=disturb) if fault in ("cut", "half-open") else None
        for number, proxy in enumerate(self.proxies):
            if helper is None:
                chance = 0.05 if fault == "delay" else SPOILED
                proxy.tamper = Spoiler(fault, 10 * seed + number, chance)
                proxy.tamper_up = Spoiler(fault, 10 * seed + number + 5, chance)
        if helper is not None:
            helper.start()
        try:
            yield
        finally:
            stop.set()
            for proxy in self.proxies:
                proxy.tamper = proxy.tamper_up = None
            if helper is not None:
                helper.join()

    def check(self, answers: Sequence[Answer], fault: str) -> int:
        """Every answer is right or says why there is none; how many are right."""
        for answer, expected in zip(answers, self.expected, strict=True):
            if fault in HARMLESS:
                assert not answer.failure, (fault, answer)
            assert answer.failure or answer.tokens == expected.tokens, (fault, answer, expected)
        return sum(not answer.failure for answer in answers)

    def at_rest(self, before: Sequence[Held] = ()) -> None:
        """Both servers hold nothing, live on with no more than before, and answer to the last bit as at the start."""
        wait_idle(self.prefill, self.decode)
        for server in (self.prefill, self.decode):
            assert httpx.get(server.url + "/health", timeout=30).status_code == 200
            agent = counters(server)
            assert (agent["threads_alive"], agent["internal_errors"]) == (2, 0), agent
        assert httpx.post(self.prefill.url + "/flush_cache", timeout=30).status_code == 200
        deadline = time.monotonic() + 30
        while (
            answer := self.ask(PROMPTS[0])
        ).failure:  # a connection that just broke may take one request along
            assert time.monotonic() < deadline, answer.failure
        assert answer == self.expected[0]
        wait_idle(self.prefill, self.decode)
        deadline = time.monotonic() + 20
        while grown := [text for held, server in zip(before, (self.prefill, self.decode), strict=False)
                        for text in growth(held, resources(server))]:  # fmt: skip
            assert time.monotonic() < deadline, grown
