"""Aborts on real servers, with pages and rooms reused at once: on one side or both, one at a time or in a storm."""

import concurrent.futures
import random
import time
from collections.abc import Iterator

import pytest

from tests.e2e.faulty import PROMPTS, SLOW, TOKENS, Faulty, series, until_in_flight
from tests.e2e.prompts import source
from tests.e2e.servers import counters, transfer_lines, wait_idle
from tests.e2e.traffic import Answer

VICTIM = source(seed=90, characters=9_000)  # more than half of the decode server's pool
HEIR = source(seed=91, characters=7_000)  # more than the free part of the pool beside VICTIM
NEARLY = 1e-3


@pytest.fixture
def heir(faulty: Faulty) -> Iterator[Answer]:
    """The right answer to the request that follows each abort; prefill has its cache, and the servers end at rest."""
    before = faulty.held()
    for prompt in (VICTIM, HEIR):
        assert not faulty.route.ask(prompt, TOKENS).failure
    yield faulty.route.ask(HEIR, TOKENS)
    faulty.at_rest(before)


@pytest.mark.parametrize("times", [16, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_pages_reused_at_once_after_an_abort_in_mid_transfer(faulty: Faulty, heir: Answer, times: int) -> None:
    """No late write: the next request takes the pages while chunks of the aborted one are under way, and is right.

    Prefill has both prompts in its cache, so that a request is only a transfer. The network is slow, so that aborts
    come in the middle of the transfer. The decode server's pool does not hold both prompts.
    """
    chooser = random.Random(times)
    late = [counters(server)["late_dropped"] for server in (faulty.prefill, faulty.decode)]
    in_the_middle = 0
    with faulty.network("throttle"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number in range(times):
            rid = f"victim-{times}-{number}"
            call = pool.submit(faulty.route.ask, VICTIM, TOKENS, rid=rid)
            while not counters(faulty.decode)["rooms"] and not call.done():
                pass
            time.sleep(chooser.uniform(0, 0.5))
            where = chooser.choice(((faulty.decode,), (faulty.prefill,), (faulty.prefill, faulty.decode)))
            faulty.route.abort(rid, *where)
            assert faulty.route.ask(HEIR, TOKENS).same_text(heir, NEARLY), number
            in_the_middle += bool(call.result().failure)
    assert in_the_middle > times // 2
    grown = [counters(s)["late_dropped"] - old for s, old in zip((faulty.prefill, faulty.decode), late, strict=True)]
    assert all(grown), grown  # chunks of aborted rooms did come, and so did their receipts


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_each_rank_ends_its_own_part_of_an_aborted_room(faulty: Faulty, heir: Answer, side: str) -> None:
    """An abort on one side reaches every rank of the other side, and each rank ends the room by itself and says so."""
    lines = {server.name: len(transfer_lines(server)) for server in (faulty.prefill, faulty.decode)}
    failed = {server.name: series(server)["rooms_failed_total"] for server in (faulty.prefill, faulty.decode)}
    # The cache must not arrive before the abort, however slow this machine is.
    with faulty.network("throttle", bytes_per_s=SLOW / 6), concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(faulty.route.ask, VICTIM, TOKENS, rid=f"fan-out-{side}")
        until_in_flight(faulty.decode, call)
        faulty.route.abort(f"fan-out-{side}", getattr(faulty, side))
        assert call.result().failure
    wait_idle(*faulty.servers)
    for server in (faulty.prefill, faulty.decode):
        new = transfer_lines(server)[lines[server.name] :]
        assert sorted(line["rank"] for line in new) == [0, 1], new
        assert all(line["result"] != "success" for line in new), new
        deadline = time.monotonic() + 10
        while any(series(server)["rooms_failed_total"][rank] != failed[server.name][rank] + 1 for rank in (0, 1)):
            assert time.monotonic() < deadline, (failed, series(server)["rooms_failed_total"])


def test_storm_of_aborts(faulty: Faulty, heir: Answer) -> None:
    """Twenty requests with sends in flight are given up within a second on either side, to both decode servers."""
    chooser = random.Random(7)
    prompts = [VICTIM, HEIR, *PROMPTS]
    with faulty.network("throttle"), concurrent.futures.ThreadPoolExecutor(20) as pool:
        calls = []
        for number in range(20):
            route = (faulty.route, faulty.side)[number % 2]
            calls.append((route, pool.submit(route.ask, prompts[number % 5], 200, rid=f"storm-{number}")))
        until_in_flight(faulty.decode, calls[-1][1])
        for number, (route, _) in enumerate(calls):
            time.sleep(chooser.uniform(0, 0.1))
            route.abort(f"storm-{number}", route.decode, route.prefill)
        for _, call in calls:
            answer = call.result()
            assert answer.failure or len(answer.tokens) == 200, answer


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_room_reused_with_chunks_of_the_old_one_in_flight(faulty: Faulty, heir: Answer, times: int) -> None:
    """A client repeats its request with the same room number right after an abort."""
    with faulty.network("throttle", bytes_per_s=SLOW), concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number in range(times):
            place, rid = faulty.route.place(), f"reuse-{times}-{number}"
            call = pool.submit(faulty.route.ask, VICTIM, TOKENS, rid=rid, **place)
            until_in_flight(faulty.decode, call)
            faulty.route.abort(rid, faulty.prefill, faulty.decode)
            assert call.result().failure
            answer = faulty.route.ask(HEIR, TOKENS, **place)
            assert answer.same_text(heir, NEARLY), answer
