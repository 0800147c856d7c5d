"""The series report what happened, also with several ranks."""

import contextlib
from pathlib import Path

from prometheus_client import CollectorRegistry

from sglang_tpla.transfer.metrics import COUNTERS, GAUGES, LATENCY, AgentPublisher
from tests.dashboard import asked_series
from tests.wire import rig

ROOT = Path(__file__).resolve().parents[2]


def test_series_after_a_transfer_to_two_ranks() -> None:
    prefill = rig.prefill_rank()
    ranks = [rig.decode_rank(rank=rank, size=2, host="") for rank in range(2)]
    agents = [prefill.agent, *(rank.agent for rank in ranks)]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=5)
        registry = CollectorRegistry()
        with contextlib.closing(AgentPublisher(lambda: agents, registry, period_s=60.0)) as publisher:
            publisher.publish()
            publisher.publish()  # counters grow only by new events
    size = 5 * rig.PAGE * rig.LAYERS * (rig.LATENT + rig.ROPE) * 2
    expected = {("prefill", "0"): 2 * size, ("decode", "0"): size, ("decode", "1"): size}
    for (role, rank), value in expected.items():
        labels = {"role": role, "rank": rank}

        def read(name: str, where: dict[str, str] = labels) -> float | None:
            return registry.get_sample_value(f"sglang_tpla:{name}", where)

        assert read("wire_bytes_total") == value
        assert read("rooms_succeeded_total") == read(f"{LATENCY}_count") == 1
        assert read("transfer_seconds_total") == read(f"{LATENCY}_sum")
        assert read("threads_alive") == 2
        # a counter at zero exists as well
        assert None not in [read(name) for name in GAUGES] + [read(f"{name}_total") for name in COUNTERS]


def test_dashboard_asks_for_series_that_exist() -> None:
    asked = asked_series()
    registrations = "bootstrap_registrations_total"  # a series of the bootstrap server
    assert asked <= {*GAUGES, *(f"{name}_total" for name in COUNTERS), f"{LATENCY}_bucket", registrations}
    assert len(asked) > 15
