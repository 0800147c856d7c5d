"""Prometheus series ``sglang_tpla:*`` of this process's agents, beside SGLang's own.

Engine processes serve their metrics in multiprocess mode, where a scrape cannot ask an agent: `AgentPublisher` copies
each agent's `AgentStats` into ordinary gauges and counters, and the durations of its transfers into a histogram. The
series of all processes are merged, each under its own ``role`` and ``rank``. Each rank counts the transfers that it
took part in: sum over ``role="prefill"`` for the bytes sent, over ``role="decode"`` for the bytes that ranks received.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sglang_tpla.transfer.decode.agent import DecodeAgent
from sglang_tpla.transfer.prefill.agent import PrefillAgent

GAUGES = {
    "rooms": "Rooms alive or held",
    "peers": "Peers up",
    "data_channels": "Data channels that stand; a peer on another host that has none gets no rows",
    "staging_used_bytes": "Staging memory in use",
    "staging_limit_bytes": "Ceiling of staging memory",
    "threads_alive": "Threads of the agent that are alive (2; 5 with a cache on a GPU)",
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
LATENCY = "transfer_latency_seconds"
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LABELS = ("role", "rank")

logger = logging.getLogger(__name__)


class AgentPublisher:
    """Copies agents' statistics into ordinary series every ``period_s`` seconds, for multiprocess mode.

    Make it after the engine has set ``PROMETHEUS_MULTIPROC_DIR``; `close` ends its thread after a last copy.
    """

    def __init__(
        self,
        agents: Callable[[], Sequence[PrefillAgent | DecodeAgent]],
        where: CollectorRegistry = REGISTRY,
        period_s: float = 1.0,
    ) -> None:
        self._agents, self._period_s = agents, period_s
        self._gauges = {
            name: Gauge(f"sglang_tpla:{name}", text, LABELS, registry=where, multiprocess_mode="livemostrecent")
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"sglang_tpla:{name}", text, LABELS, registry=where) for name, text in COUNTERS.items()
        }
        self._latency = Histogram(
            f"sglang_tpla:{LATENCY}",
            "Seconds from first send or request to success, of each transfer",
            LABELS,
            registry=where,
            buckets=LATENCY_BUCKETS_S,
        )
        self._told: dict[tuple[str, str, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpla-metrics", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        for agent in self._agents():
            stats, labels = agent.stats(), (agent.role, str(agent.rank))
            for name, gauge in self._gauges.items():
                gauge.labels(*labels).set(getattr(stats, name))
            for name, counter in self._counters.items():
                key, value = (name, *labels), float(getattr(stats, name))
                # made at the first copy, because a rate needs the zero before the first one
                series = counter.labels(*labels)
                if value > (told := self._told.get(key, 0.0)):
                    series.inc(value - told)
                    self._told[key] = value
            latency = self._latency.labels(*labels)
            while agent.durations:
                latency.observe(agent.durations.popleft())

    def close(self) -> None:
        """Copy the statistics a last time, and end the thread."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        said = ""
        while not self._stop.wait(self._period_s):
            wrong = ""
            try:
                self.publish()
            except Exception as error:  # a new series takes a file, for which there may be no room for a while
                wrong = f"the series sglang_tpla:* are not up to date: {error!r}"
            if wrong and wrong != said:
                logger.warning("%s", wrong)
            said = wrong
        self.publish()
