"""The faults of the soak: each begins, holds for a while, and is healed; the load goes on through all of them."""

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.e2e.faulty import FAULTS, PEER_TIMEOUT_S, Faulty, stopped
from tests.e2e.servers import Server
from tests.e2e.traffic import Pair
from tests.soak.work import Case, storm

START_S = 1200.0  # on a machine that does other things as well


@dataclass
class Site:
    """All servers of the soak: `Faulty`'s three, and a prefill server that shares memory with the decode servers."""

    faulty: Faulty
    near: Server

    @property
    def servers(self) -> tuple[Server, ...]:
        """All four."""
        return (*self.faulty.servers, self.near)

    @property
    def routes(self) -> list[Pair]:
        """Each prefill server with each decode server."""
        near = [Pair(self.near, server) for server in (self.faulty.decode, self.faulty.single)]
        return [self.faulty.route, self.faulty.side, *near]


def bad_network(kind: str) -> Callable[[Site, random.Random], None]:
    """One of the proxy's faults for some seconds."""

    def disturb(site: Site, chooser: random.Random) -> None:
        with site.faulty.network(kind, chooser.randrange(10**6)):
            time.sleep(chooser.uniform(4, 9))

    return disturb


def network_gone(site: Site, chooser: random.Random) -> None:
    """For longer than the heartbeat's patience, and back."""
    with site.faulty.network_gone():
        time.sleep(PEER_TIMEOUT_S * chooser.uniform(1.2, 2))


def bootstrap_away(site: Site, chooser: random.Random) -> None:
    """Nobody answers at the bootstrap server."""
    site.faulty.door.refusing = True
    site.faulty.door.cut()
    time.sleep(chooser.uniform(4, 10))
    site.faulty.door.refusing = False


def stop_rank(of: str, shorter: bool) -> Callable[[Site, random.Random], None]:
    """SIGSTOP of one rank, for less or more than the peers' patience."""

    def disturb(site: Site, chooser: random.Random) -> None:
        server = chooser.choice([s for s in site.servers if ("prefill" in s.command) is (of == "prefill")])
        with stopped(chooser.choice(server.schedulers())):
            time.sleep(PEER_TIMEOUT_S * (chooser.uniform(0.3, 0.7) if shorter else chooser.uniform(1.3, 2.5)))

    return disturb


def kill(of: str) -> Callable[[Site, random.Random], None]:
    """SIGKILL of a whole server, which then starts anew at the same addresses."""

    def disturb(site: Site, chooser: random.Random) -> None:
        server = chooser.choice([s for s in site.servers if ("prefill" in s.command) is (of == "prefill")])
        server.kill()
        server.start().wait(timeout_s=START_S)

    return disturb


def restart(site: Site, chooser: random.Random) -> None:
    """SIGTERM, as an operator would."""
    server = chooser.choice(site.servers)
    assert server.process is not None
    server.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(40)
    server.kill()  # what is left of it
    server.start().wait(timeout_s=START_S)


def abort_storm(cases: Sequence[Case]) -> Callable[[Site, random.Random], None]:
    """Many long requests given up at once, on every route."""

    def disturb(site: Site, chooser: random.Random) -> None:
        for route in site.routes:
            storm(route, cases, 8)

    return disturb


def all_faults(cases: Sequence[Case]) -> dict[str, Callable[[Site, random.Random], None]]:
    """By name, as the table shows them."""
    found = {f"network: {kind}": bad_network(kind) for kind in FAULTS}
    found["network gone for longer than the heartbeat's patience, and back"] = network_gone
    found["bootstrap server away"] = bootstrap_away
    for of in ("prefill", "decode"):
        found[f"{of} rank stopped (SIGSTOP), shorter than the patience"] = stop_rank(of, shorter=True)
        found[f"{of} rank stopped (SIGSTOP), longer than the patience"] = stop_rank(of, shorter=False)
        found[f"{of} killed (SIGKILL), restarted on the same address"] = kill(of)
    found["a server restarted (SIGTERM)"] = restart
    found["storm of 32 aborts"] = abort_storm(cases)
    return found
