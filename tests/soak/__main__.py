"""Mixed load on real servers with random faults, every answer checked, nothing left behind: ``make soak``.

Two prefill servers (one of two ranks behind a bad network, one that shares memory with decode) serve two decode servers
(two ranks with g = 2, one rank with plain MLA). Threads send prompts of one to several thousand tokens, alone, streamed
and in batches, some with shared beginnings, and some clients leave. Meanwhile faults come one after another, in random
order, every kind once a round. An answer is right when it has, token by token, what the same server said on a quiet day
(greedy, float32); a request may fail, with a reason, only under a fault or shortly after it. After every few faults the
load pauses and nothing may be left: pages, rooms, staging, queues, threads, file handles, memory.

``--seed`` repeats the prompts, the requests and the order and length of faults; what meets what is the machine's.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.faulty import TRANSFER, Faulty, Held, growth, resources, series
from tests.e2e.servers import ROOT, counters, launcher, wait_idle
from tests.soak.disturb import START_S, Site, all_faults
from tests.soak.work import Case, Faults, Tally, Watch, Workers, quiet_answers

RECOVER_S = 120.0
FAULTS_A_REST = 6
CALM_S = 4.0  # of load between two faults


def say(text: str) -> None:
    """With the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


class Soak:
    """One run.

    Args:
        site: the servers.
        cases: prompts with their answers.
        seed: of load and faults.
    """

    def __init__(self, site: Site, cases: list[Case], seed: int, threads: int) -> None:
        self.site, self.cases, self.faults, self.tally = site, cases, Faults(), Tally()
        self.random = random.Random(f"faults {seed}")
        self.watch = Watch(self.faults)
        self.workers = Workers(threads, seed, site.routes, cases, self.faults, self.tally)
        self.tried: Counter[str] = Counter()
        self.baseline: Held = {}
        self.memory: dict[str, list[int]] = {}
        self.rests = 0

    def run(self, seconds: float) -> None:
        """Load and faults for so long; ends at rest."""
        kinds = all_faults(self.cases)
        end = time.monotonic() + seconds
        self.workers.resume()
        time.sleep(CALM_S * 2)
        self.recover()  # every route has been taken, also on a busy machine
        self.rest()  # what the first load made each process hold is the baseline
        queue: list[str] = []
        while time.monotonic() < end:
            queue = queue or self.random.sample(sorted(kinds), len(kinds))
            name = queue.pop()
            say(name)
            self.faults.begin()
            kinds[name](self.site, self.random)
            self.recover()
            self.faults.end()
            self.tried[name] += 1
            time.sleep(CALM_S)
            if sum(self.tried.values()) % FAULTS_A_REST == 0:
                self.rest()
        self.rest()
        self.workers.pause()
        self.workers.stop()
        self.watch.stop()

    def recover(self) -> None:
        """Until every route gives a right answer."""
        deadline = time.monotonic() + RECOVER_S
        case = min(self.cases, key=lambda case: len(case.prompt))
        for route in self.site.routes:
            while True:
                answer = route.ask(case.prompt, case.tokens)
                if answer.same_text(case.expected[route.decode.name]):
                    break
                if time.monotonic() > deadline:
                    self.tally.problem(f"no recovery of {route.prefill.name} to {route.decode.name}: {answer}")
                    return
                time.sleep(0.5)

    def rest(self) -> None:
        """Pause the load and look at what is left."""
        self.workers.pause()
        self.rests += 1
        try:
            wait_idle(*self.site.servers, timeout_s=90)
            self._agents_well()
            self._nothing_grew()
        except AssertionError as error:
            self.tally.problem(f"not at rest: {error}")
        say(f"at rest; {dict(self.tally.counts)}, {len(self.tally.problems)} problems")
        self.workers.resume()

    def _agents_well(self) -> None:
        for server in self.site.servers:
            agent = counters(server)
            assert (agent["threads_alive"], agent["internal_errors"]) == (2, 0), (server.name, agent)
            deadline = time.monotonic() + 10
            while any((now := series(server))["rooms"].values()) or any(now["staging_used_bytes"].values()):
                assert time.monotonic() < deadline, (server.name, now["rooms"], now["staging_used_bytes"])
                time.sleep(0.5)

    def _nothing_grew(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            now: Held = {}
            for server in self.site.servers:
                # SGLang keeps the connection of its first question to a bootstrap server, one for each
                now |= resources(server, (self.site.faulty.door.port, self.site.near.bootstrap))
            grown = growth(self.baseline, now)
            if not grown or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        for server in self.site.servers:
            for place, (pid, held) in enumerate(sorted(resources(server).items())):
                self.memory.setdefault(f"{server.name} {place} (process {pid})", []).append(held[2] >> 20)
        self.baseline = {pid: self.baseline.get(pid, held) for pid, held in now.items()}
        assert not grown, grown

    def last_word(self) -> dict[str, Any]:
        """Everything, for the record."""
        agents = {server.name: counters(server) for server in self.site.servers}
        return {
            "faults": dict(sorted(self.tried.items())),
            "machine_stood_still": self.watch.times,
            "requests": dict(self.tally.counts),
            "tokens_checked": self.tally.tokens_checked,
            "reasons": dict(self.tally.reasons.most_common()),
            "rests": self.rests,
            "problems": self.tally.problems,
            "resident_MiB_at_rests": self.memory,
            "agents": agents,
        }


def errors_in(log: Path) -> list[str]:
    """Lines of a server's log that speak of faults of the program."""
    words = ("Traceback", "failed on prefill rank", "failed on decode rank", "transfer thread", "Scheduler hit an")
    return [line[:300] for line in log.read_text(errors="replace").splitlines() if any(word in line for word in words)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of load, after the servers are up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=5, help="requests under way at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "soak.json")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a new temporary one)")
    args = parser.parse_args(arguments)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="sglang-tpla-soak-"))
    logs.mkdir(parents=True, exist_ok=True)
    model = str(ROOT / "examples" / "nano-mla")
    artifact = str(ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
    # The prefill server without a proxy, which shares memory with the decode servers.
    near = launcher("prefill", model, logs / "near-prefill.log", "--chunked-prefill-size", "512", *TRANSFER)
    near.name = "near"
    say(f"starting four servers; logs in {logs}")
    with contextlib.ExitStack() as stack:
        stack.callback(near.stop)
        near.start()
        faulty = stack.enter_context(Faulty.start(model, artifact, logs, patience_s=START_S))
        near.wait(timeout_s=START_S)
        site = Site(faulty, near)
        cases = quiet_answers([faulty.route, faulty.side], args.seed, say)
        soak = Soak(site, cases, args.seed, args.threads)
        start = time.monotonic()
        soak.run(args.minutes * 60)
        minutes = (time.monotonic() - start) / 60
        result = soak.last_word()
        result["errors_in_logs"] = {
            server.name: errors_in(server.log) for server in site.servers if errors_in(server.log)
        }
    machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
    result = {"minutes": round(minutes, 1), "seed": args.seed, "threads": args.threads, "machine": machine} | result
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print_tables(result)
    print(f"written to {args.out}")
    return 1 if result["problems"] else 0


def print_tables(result: dict[str, Any]) -> None:
    """What happened, for people."""
    for title in ("faults", "requests", "reasons", "errors_in_logs"):
        print(f"\n{title}")
        for name, value in result[title].items():
            print(f"  {value!s:>6}  {name}")
    print(
        f"\n{result['tokens_checked']} tokens checked, {result['rests']} rests; "
        f"the machine stood still {result['machine_stood_still']} times; {len(result['problems'])} problems"
    )
    for problem in result["problems"][:20]:
        print(f"  {problem[:1000]}")


if __name__ == "__main__":
    sys.exit(main())
