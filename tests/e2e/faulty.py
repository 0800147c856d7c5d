"""A prefill and two decode servers with a bad network between them, and the checks after a fault.

Prefill and the first decode server have two ranks each; the second decode server has one rank and plain MLA (g = 1).
All traffic between them goes through proxies: the connections of each prefill rank, and the bootstrap server. The
system refuses shared memory to the prefill server.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import re
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.prompts import source
from tests.e2e.servers import START_S, Server, counters, launcher, running, wait_idle
from tests.e2e.traffic import Answer, Pair
from tests.ports import neighbouring_ports
from tests.wire.proxy import FaultProxy, Spoiler

PEER_TIMEOUT_S = 10.0
TRANSFER_TIMEOUT_S = 40.0
TRANSFER = ("--tpla-peer-timeout-s", str(PEER_TIMEOUT_S), "--tpla-transfer-timeout-s", str(TRANSFER_TIMEOUT_S),
            "--tpla-chunk-bytes", "65536", "--enable-metrics")  # fmt: skip
FAULTS = (*Spoiler.KINDS, "half-open", "cut")
HARMLESS = ("delay", "throttle", "cut")  # these must not fail a request
MOST_CUTS = 40  # in a row; a machine that is too slow for a chunk between two cuts goes on after these
SPOILED = 0.004  # of the pieces of 4,096 bytes: about every fifth chunk
# Prompts of some 400 to 1,050 tokens each: several chunks of 64 KiB, no common prefix.
PROMPTS = [source(seed=50 + n, characters=c) for n, c in enumerate((1200, 3500, 2500))]
TOKENS = 8
SLOW = 3e5  # bytes a second: no long prompt arrives before its test acts on it
POOL_TOKENS = 4000  # of a decode server, so that the next request gets the pages of the one before
SERIES_FILE = re.compile(r"/(gauge|counter|histogram|summary)\w*\.db$")
GROWTH_BYTES = 256 << 20  # of a process, over all the faults of a test
Kinds = collections.Counter[str]
Held = dict[int, tuple[Kinds, Kinds, int]]


def resources(server: Server, but_to: Collection[int] = ()) -> Held:
    """Return each rank's threads by name, file handles by kind (but for connections to some ports), and bytes."""
    return {p.pid: (threads(p.pid), handles(p.pid, but_to), p.memory_info().rss) for p in server.schedulers()}


def threads(pid: int) -> Kinds:
    """Return the names of a process's threads."""
    kinds = Kinds()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            kinds[(task / "comm").read_text().strip()] += 1
    return kinds


def handles(pid: int, but_to: Collection[int] = ()) -> Kinds:
    """Return open files and connections, except of some ports and of the files of prometheus_client's first use."""
    kinds = Kinds()
    connections = psutil.Process(pid).net_connections(kind="tcp")
    ends = {
        str(end.fd): f"{end.status} {end.laddr.port} to {end.raddr.port if end.raddr else '-'}" for end in connections
    }
    left_out = {str(end.fd) for end in connections if end.raddr and end.raddr.port in but_to}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str(link.readlink())
            if not SERIES_FILE.search(target) and link.name not in left_out:
                kinds[ends.get(link.name) or re.sub(r"\d+", "#", target)] += 1
    return kinds


def growth(before: Held, after: Held) -> list[str]:
    """Return the resources that processes which survived a fault hold beyond those of before."""
    found = []
    for pid in before.keys() & after.keys():
        for what, old, new in zip(("threads", "handles"), before[pid], after[pid], strict=False):
            assert isinstance(old, collections.Counter) and isinstance(new, collections.Counter)
            if new.total() > old.total():
                found.append(f"process {pid}: {new.total()} {what} where {old.total()} were: {new - old} came")
        if after[pid][2] > before[pid][2] + GROWTH_BYTES:
            found.append(f"process {pid}: {before[pid][2]} bytes before, {after[pid][2]} after")
    return found


def series(server: Server) -> dict[str, dict[int, float]]:
    """Return the transfer agents' Prometheus series as scraped: by name, by rank."""
    found: dict[str, dict[int, float]] = {}
    for line in httpx.get(server.url + "/metrics", timeout=30).text.splitlines():
        if line.startswith("sglang_tpla:") and 'rank="' in line:
            name, rest = line.removeprefix("sglang_tpla:").split("{", 1)
            rank = int(rest.split('rank="', 1)[1].split('"', 1)[0])
            found.setdefault(name, {})[rank] = float(rest.rsplit(" ", 1)[1])
    return found


def until_in_flight(
    server: Server, call: concurrent.futures.Future[Any], arrived: int | None = None, rooms: int = 1
) -> None:
    """Wait until the server has that many rooms open while ``call`` is under way.

    The network has to be slow enough that no room can end between two looks at it.

    Args:
        arrived: if given, the number of chunks before ``call`` was made; another chunk must have come since.

    """
    deadline = time.monotonic() + 120
    while True:
        agent = counters(server)
        if agent["rooms"] >= rooms and (arrived is None or agent["chunks"] > arrived):
            return
        assert not call.done(), f"it ended before {server.name} was seen with {rooms} rooms: {call.result()}"
        assert time.monotonic() < deadline, (server.name, agent)


@contextlib.contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """Stop a process with SIGSTOP, and continue it at the end."""
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@dataclass
class Faulty:
    """The servers, and the proxies in front of the prefill ranks and of the bootstrap server."""

    prefill: Server
    decode: Server
    single: Server
    proxies: list[FaultProxy]
    door: FaultProxy  # to the bootstrap server
    # by decode server, in the order of PROMPTS
    expected: dict[str, list[Answer]] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, model: str, artifact: str, logs: Path, *prefill_arguments: str, patience_s: float = START_S
    ) -> Iterator[Faulty]:
        """Start the servers, learn their answers on a good network, and end them."""
        listen, shown = neighbouring_ports(4), neighbouring_ports(4)
        prefill = launcher("prefill", model, logs / "faulty-prefill.log", "--chunked-prefill-size", "128", "--tp", "2",
                           *TRANSFER, "--tpla-listen-port", str(listen), "--tpla-advertise", f"127.0.0.1:{shown}",
                           *prefill_arguments)  # fmt: skip
        prefill.largest_file_bytes = 128 << 20  # less than a segment, so that everything goes through the proxies
        pool = ("--max-total-tokens", str(POOL_TOKENS))
        two = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", artifact)
        decode = launcher("decode", model, logs / "faulty-decode.log", *two, *TRANSFER, *pool)
        single = launcher("decode", model, logs / "faulty-single.log", "--tpla-groups", "1", *TRANSFER, *pool)
        single.name = "single"
        with contextlib.ExitStack() as stack:
            proxies = [
                stack.enter_context(contextlib.closing(FaultProxy(listen + n, listen + n + 1, shown + n)))
                for n in (0, 2)  # each rank's connections and data channels
            ]
            door = stack.enter_context(contextlib.closing(FaultProxy(prefill.bootstrap)))
            faulty = cls(prefill, decode, single, proxies, door)
            stack.enter_context(running(*faulty.servers, timeout_s=patience_s))
            faulty.expected = {
                route.decode.name: [faulty.ask_patiently(route, prompt) for prompt in PROMPTS]
                for route in (faulty.route, faulty.side)
            }
            yield faulty

    @property
    def servers(self) -> tuple[Server, Server, Server]:
        """All three servers."""
        return self.prefill, self.decode, self.single

    @property
    def route(self) -> Pair:
        """The way to the decode server with two ranks."""
        return Pair(self.prefill, self.decode, self.door.port)

    @property
    def side(self) -> Pair:
        """The way to the decode server with one rank."""
        return Pair(self.prefill, self.single, self.door.port)

    def ask_patiently(self, route: Pair, prompt: Any) -> Answer:
        """Return the answer to a prompt that prefill has not cached; one request may fail where a connection broke."""
        deadline = time.monotonic() + 60
        while True:
            assert httpx.post(self.prefill.url + "/flush_cache", timeout=30).status_code == 200
            answer = route.ask(prompt, TOKENS)
            if not answer.failure:
                return answer
            assert time.monotonic() < deadline, answer.failure
            wait_idle(*self.servers)

    def held(self) -> list[Held]:
        """Return the `resources` of all servers, once every connection has its data channel again."""
        deadline = time.monotonic() + 30
        while (now := series(self.prefill))["data_channels"] != now["peers"] or set(now["peers"].values()) != {3}:
            assert time.monotonic() < deadline, now
            time.sleep(0.2)
        return [self._resources(server) for server in self.servers]

    def _resources(self, server: Server) -> Held:
        """Return the `resources` without SGLang's connection to the bootstrap server, which stays from the first on."""
        return resources(server, (self.door.port,))

    def ask_all(self) -> list[Answer]:
        """Send every prompt at once."""
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(lambda prompt: self.route.ask(prompt, TOKENS), PROMPTS))

    @contextlib.contextmanager
    def network(self, fault: str, seed: int = 0, bytes_per_s: float = Spoiler.BYTES_PER_S) -> Iterator[None]:
        """Give the network a fault, and heal it afterwards."""
        stop = threading.Event()

        def disturb() -> None:
            for _ in range(MOST_CUTS):
                if stop.wait(0.4 if fault == "cut" else 2.0):
                    break
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
                proxy.tamper = Spoiler(fault, 10 * seed + number, chance, bytes_per_s)
                proxy.tamper_up = Spoiler(fault, 10 * seed + number + 5, chance, bytes_per_s)
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

    @contextlib.contextmanager
    def network_gone(self) -> Iterator[None]:
        """Keep connections open and let nothing through; at the end the connections work again."""
        for proxy in self.proxies:
            proxy.flowing.clear()
        try:
            yield
        finally:
            for proxy in self.proxies:
                proxy.flowing.set()

    def check(self, answers: Sequence[Answer], fault: str) -> int:
        """Check that every answer is right or gives a reason for its failure, and return the number of right ones."""
        for answer, expected in zip(answers, self.expected[self.decode.name], strict=True):
            if fault in HARMLESS:
                assert not answer.failure, (fault, answer)
            assert answer.failure or answer.same_text(expected), (fault, answer, expected)
        return sum(not answer.failure for answer in answers)

    def at_rest(self, before: Sequence[Held] = ()) -> None:
        """Check that the servers hold nothing, answer to the last bit as at the start, and have grown by nothing."""
        wait_idle(*self.servers)
        for server in self.servers:
            assert httpx.get(server.url + "/health", timeout=30).status_code == 200
            self._all_ranks_at_rest(server)
        for route in (self.route, self.side):
            answer = self.ask_patiently(route, PROMPTS[0])
            assert answer == self.expected[route.decode.name][0], route.decode.name
            wait_idle(*self.servers)
        deadline = time.monotonic() + 20
        while grown := [text for held, server in zip(before, self.servers, strict=False)
                        for text in growth(held, self._resources(server))]:  # fmt: skip
            assert time.monotonic() < deadline, grown

    @staticmethod
    def _all_ranks_at_rest(server: Server) -> None:
        """Check by the series, which are a second old at most, that every rank is at rest, not only the first."""
        deadline = time.monotonic() + 20
        while True:
            now = series(server)
            wrong = {
                name: now.get(name)
                for name, value in (("rooms", 0), ("staging_used_bytes", 0), ("threads_alive", 2),
                                    ("internal_errors_total", 0))
                if set(now.get(name, {-1: -1}).values()) != {value}
            }  # fmt: skip
            if not wrong:
                return
            assert time.monotonic() < deadline, (server.name, wrong)
            time.sleep(0.2)
