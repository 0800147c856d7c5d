"""The series report what happened, also with several ranks."""

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from sglang_tpla.transfer.metrics import COUNTERS, GAUGES, LATENCY, AgentPublisher
from sglang_tpla.transfer.prefill.agent import PrefillAgent
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


def test_series_go_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A new series takes a file; with too many open files there is none for a while."""
    prefill, asked, served = rig.prefill_rank(), list[None](), threading.Event()

    def agents() -> list[PrefillAgent]:
        asked.append(None)
        if len(asked) < 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        served.set()
        return [prefill.agent]

    with rig.serving(prefill), contextlib.closing(AgentPublisher(agents, registry := CollectorRegistry(), 0.001)):
        assert served.wait(10)
    assert registry.get_sample_value("sglang_tpla:threads_alive", {"role": "prefill", "rank": "0"}) is not None
    assert caplog.text.count("Too many open files") == 1
