"""Prometheus series ``sglang_tpla:*`` of this process's agents, beside SGLang's own.

`AgentCollector` reads each agent's `AgentStats` when it is scraped. Engine processes serve their metrics in
multiprocess mode, where collectors are not read; `AgentPublisher` therefore copies the same numbers into
ordinary gauges and counters, which are merged over processes, each under its own ``role`` and ``rank``.
Transfers are counted on the rank that took part: sum over ``role="prefill"`` for what was sent, over
``role="decode"`` for what each rank received.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang_tpla.transfer.types import AgentStats

GAUGES = {
    "rooms": "Rooms alive or held",
    "peers": "Peers up",
    "staging_used_bytes": "Staging memory in use",
    "staging_limit_bytes": "Ceiling of staging memory",
    "threads_alive": "Threads of the agent that are alive (2)",
}
COUNTERS = {
    "wire_bytes": "Payload bytes that moved",
    "shared_memory_bytes": "Payload bytes that moved through shared memory",
    "chunks": "Chunks sent or applied",
    "resent": "Chunks sent once more",
    "checksum_failures": "Chunks that came damaged",
    "late_dropped": "Messages of ended rooms",
    "replays_dropped": "Messages that came twice",
    "malformed_dropped": "Frames that are not of the protocol",
    "unknown_peer": "Messages of peers that never registered",
    "refused": "Registrations and connections refused",
    "credit_waits": "Times that a lane of chunks began to wait for credit",
    "resumed": "Broken connections that were taken up again",
    "peers_lost": "Peers given up",
    "rooms_succeeded": "Rooms that ended well",
    "rooms_failed": "Rooms that failed",
    "projections_computed": "Chunks that were projected",
    "internal_errors": "Exceptions that were caught",
    "transfer_seconds": "Seconds from first send or request to success, summed over rooms",
}
LABELS = ("role", "rank")


class Agent(Protocol):
    """What is read of an agent."""

    role: str
    rank: int

    def stats(self) -> AgentStats:
        """Counters and gauges."""
        ...


class AgentCollector(Collector):
    """Series of all agents, read at each scrape; register it with a single-process registry."""

    def __init__(self, agents: Callable[[], Sequence[Agent]]) -> None:
        self._agents = agents

    def collect(self) -> Iterator[Metric]:
        """One family a statistic, one sample an agent."""
        read = [((agent.role, str(agent.rank)), agent.stats()) for agent in self._agents()]
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"sglang_tpla:{name}", text, labels=LABELS)
            for labels, stats in read:
                gauge.add_metric(labels, getattr(stats, name))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"sglang_tpla:{name}", text, labels=LABELS)
            for labels, stats in read:
                counter.add_metric(labels, getattr(stats, name))
            yield counter


class AgentPublisher:
    """Copies agents' statistics into ordinary series every ``period_s`` seconds, for multiprocess mode.

    Make it after the engine has set ``PROMETHEUS_MULTIPROC_DIR``; `close` ends its thread after a last copy.
    """

    def __init__(
        self,
        agents: Callable[[], Sequence[Agent]],
        registry: CollectorRegistry | None = None,
        period_s: float = 1.0,
    ) -> None:
        from prometheus_client import REGISTRY

        where = registry or REGISTRY
        self._agents, self._period_s = agents, period_s
        self._gauges = {
            name: Gauge(
                f"sglang_tpla:{name}", text, LABELS, registry=where, multiprocess_mode="livemostrecent"
            )
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"sglang_tpla:{name}", text, LABELS, registry=where)
            for name, text in COUNTERS.items()
        }
        self._told: dict[tuple[str, str, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpla-metrics", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Copy now."""
        for agent in self._agents():
            stats, labels = agent.stats(), (agent.role, str(agent.rank))
            for name, gauge in self._gauges.items():
                gauge.labels(*labels).set(getattr(stats, name))
            for name, counter in self._counters.items():
                key, value = (name, *labels), float(getattr(stats, name))
                series = counter.labels(
                    *labels
                )  # there from the first copy on: rates need the zero before a one
                if value > (told := self._told.get(key, 0.0)):
                    series.inc(value - told)
                    self._told[key] = value

    def close(self) -> None:
        """Copy a last time and end."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.publish()
        self.publish()
