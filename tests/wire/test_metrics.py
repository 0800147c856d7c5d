"""The series say what happened, also with several ranks."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from sglang_tpla.transfer.metrics import COUNTERS, GAUGES, AgentCollector, AgentPublisher
from sglang_tpla.transfer.types import RoomState
from tests.wire import rig

ROOT = Path(__file__).resolve().parents[2]


def test_series_after_a_transfer_to_two_ranks() -> None:
    prefill = rig.prefill_rank()
    ranks = [rig.decode_rank(rank=rank, size=2, host="") for rank in range(2)]
    agents = [prefill.agent, *(rank.agent for rank in ranks)]
    with contextlib.ExitStack() as stack:
        for agent in agents:
            stack.enter_context(contextlib.closing(agent))
        prefill.agent.open_room(1)
        for rank in ranks:
            rig.ask(rank, [prefill.peer], 1, rig.pages(1, 5), expected=2)
        prefill.agent.send(1, rig.pages(2, 5), last=True, metadata_row=0)
        for agent in agents:
            assert rig.ended(agent, 1) == RoomState.SUCCESS
        read, copied = CollectorRegistry(), CollectorRegistry()
        read.register(AgentCollector(lambda: agents))
        with contextlib.closing(AgentPublisher(lambda: agents, copied, period_s=60.0)) as publisher:
            publisher.publish()
            publisher.publish()  # counters grow by what is new
        size = 5 * rig.PAGE * rig.LAYERS * (rig.LATENT + rig.ROPE) * 2
        expected = {("prefill", "0"): 2 * size, ("decode", "0"): size, ("decode", "1"): size}
        for registry in (read, copied):
            for (role, rank), value in expected.items():
                labels = {"role": role, "rank": rank}
                assert registry.get_sample_value("sglang_tpla:wire_bytes_total", labels) == value
                assert registry.get_sample_value("sglang_tpla:rooms_succeeded_total", labels) == 1
                assert registry.get_sample_value("sglang_tpla:threads_alive", labels) == 2
            for name in GAUGES:
                labels = {"role": "prefill", "rank": "0"}
                assert registry.get_sample_value(f"sglang_tpla:{name}", labels) is not None
        for registry in (read, copied):  # a counter that has not counted yet is there as well
            for name in COUNTERS:
                labels = {"role": "prefill", "rank": "0"}
                assert registry.get_sample_value(f"sglang_tpla:{name}_total", labels) is not None, name


def test_dashboard_asks_for_series_that_exist() -> None:
    dashboard = json.loads((ROOT / "launch" / "monitoring" / "dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"sglang_tpla:(\w+)", target["expr"])
    }
    assert asked <= {*GAUGES, *(f"{name}_total" for name in COUNTERS)}
    assert len(asked) > 15
