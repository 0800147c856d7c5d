"""An operator's view of real servers: series and log lines agree, and the dashboard's queries have answers."""

import re
import time

import httpx

from tests.dashboard import asked_series
from tests.e2e.faulty import PROMPTS, TOKENS, Faulty, series
from tests.e2e.servers import Server, transfer_lines, wait_idle


def told(server: Server, lines: int) -> dict[int, dict[str, float]]:
    """Return the sums over the log lines after the first ``lines``, by rank."""
    sums: dict[int, dict[str, float]] = {}
    for line in transfer_lines(server)[lines:]:
        rank = sums.setdefault(line["rank"], dict.fromkeys(("bytes", "seconds", "rooms", "resent"), 0))
        rank["rooms"] += line["result"] == "success"
        rank["seconds"] += line["seconds"] if line["result"] == "success" else 0
        for name in ("bytes", "resent"):
            rank[name] += line[name]
    return sums


NAMES = {
    "bytes": "wire_bytes_total",
    "seconds": "transfer_seconds_total",
    "rooms": "rooms_succeeded_total",
    "resent": "resent_total",
}


def test_series_of_every_rank_are_what_its_log_lines_add_up_to(faulty: Faulty) -> None:
    """Each transfer has one line a rank; two ranks' slices, and the rows that one of them relays, count once each."""
    wait_idle(*faulty.servers)
    time.sleep(2)  # series are copied each second
    lines = [len(transfer_lines(server)) for server in faulty.servers]
    before = [series(server) for server in faulty.servers]
    for prompt in PROMPTS:
        for route in (faulty.route, faulty.side):
            assert not route.ask(prompt, TOKENS).failure
    wait_idle(*faulty.servers)
    for server, old, first in zip(faulty.servers, before, lines, strict=True):
        said = told(server, first)
        deadline = time.monotonic() + 20
        while True:
            now = series(server)
            grown = {rank: {what: now[name][rank] - old[name][rank] for what, name in NAMES.items()} for rank in said}
            if all(abs(grown[rank][what] - said[rank][what]) < 0.01 * len(PROMPTS) for rank in said for what in NAMES):
                break
            assert time.monotonic() < deadline, (server.name, said, grown)
            time.sleep(0.2)
    sent = sum(told(faulty.prefill, lines[0])[rank]["bytes"] for rank in (0, 1))
    values = sent / sum(line["tokens"] for line in transfer_lines(faulty.single)[lines[2] :]) / 4 / 4
    # float32, four layers: the whole row for plain MLA, and two slices of 80, which share 32 columns and the rope.
    assert values <= 1.05 * (128 + 32 + 2 * 80 - 32 + 32), values


def test_the_dashboard_asks_for_series_that_real_servers_have(faulty: Faulty) -> None:
    """Every series in an expression is in the scrape of a prefill and of a decode server."""
    asked = asked_series()
    for server, not_there in ((faulty.prefill, set()), (faulty.decode, {"bootstrap_registrations_total"})):
        text = httpx.get(server.url + "/metrics", timeout=30).text
        scraped = set(re.findall(r"^sglang_tpla:(\w+)", text, re.MULTILINE))
        assert asked - scraped == not_there, server.name
