"""A rank stopped with SIGSTOP: its own requests fail with a reason, all others are served, and the rank recovers."""

import concurrent.futures
import time

import psutil
import pytest

from tests.e2e.faulty import PEER_TIMEOUT_S, PROMPTS, SLOW, TOKENS, Faulty, series, stopped, until_in_flight
from tests.e2e.servers import Server
from tests.e2e.traffic import Load, Pair


def serve_meanwhile(faulty: Faulty, halted: psutil.Process, stuck: Pair, others: Pair, seconds: float) -> None:
    """Stop a process; requests of ``others`` are all right, one of ``stuck`` ends, and all is as before."""
    before = faulty.held()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with Load([others], PROMPTS, faulty.expected, TOKENS) as load, stopped(halted):
            call = pool.submit(stuck.ask, PROMPTS[1], TOKENS)
            end, start = time.monotonic() + seconds, load.right[others.decode.name]
            while time.monotonic() < end or load.right[others.decode.name] < start + 3:
                assert time.monotonic() < end + 60, f"nobody else is served: {load.failures}"
                time.sleep(0.1)
        answer = call.result()
    assert not load.failures[others.decode.name], load.failures
    assert answer.failure or answer.same_text(faulty.expected[stuck.decode.name][1]), answer
    faulty.at_rest(before)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(2 * PEER_TIMEOUT_S, id="longer than the heartbeat"), pytest.param(60, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_decode_rank_stopped(faulty: Faulty, rank: int, seconds: float) -> None:
    """One of two ranks stops; the other decode server's requests all succeed meanwhile."""
    lost = sum(series(faulty.prefill)["peers_lost_total"].values())
    serve_meanwhile(faulty, _rank(faulty.decode, rank), faulty.route, faulty.side, seconds)
    assert sum(series(faulty.prefill)["peers_lost_total"].values()) > lost


def test_decode_rank_stopped_for_a_moment(faulty: Faulty) -> None:
    """The rank stops for less than the heartbeat's patience: nothing fails, not even requests under way."""
    before = faulty.held()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, faulty.network("throttle", bytes_per_s=SLOW):
        call = pool.submit(faulty.ask_all)
        until_in_flight(faulty.decode, call)
        with stopped(_rank(faulty.decode, 1)):
            time.sleep(PEER_TIMEOUT_S / 3)
        answers = call.result()
    assert faulty.check(answers, "delay") == len(PROMPTS)
    faulty.at_rest(before)


def test_prefill_rank_stopped(faulty: Faulty) -> None:
    """Requests of both decode servers end within their deadlines, right or with a reason; then it serves again."""
    before = faulty.held()
    watched = ((faulty.decode, 1), (faulty.single, 0))  # the ranks that are served by the stopped one
    lost = [series(server)["peers_lost_total"][rank] for server, rank in watched]
    with concurrent.futures.ThreadPoolExecutor(2) as pool, stopped(_rank(faulty.prefill, 1)):
        calls = [pool.submit(route.ask, PROMPTS[1], TOKENS) for route in (faulty.route, faulty.side)]
        deadline = time.monotonic() + 90
        while any(
            series(server)["peers_lost_total"][rank] == old for (server, rank), old in zip(watched, lost, strict=True)
        ):
            assert time.monotonic() < deadline
    for call, route in zip(calls, (faulty.route, faulty.side), strict=True):
        answer = call.result()
        assert answer.failure or answer.same_text(faulty.expected[route.decode.name][1]), answer
    faulty.at_rest(before)


def _rank(server: Server, rank: int) -> psutil.Process:
    (found,) = [p for p in server.schedulers() if f"_TP{rank}" in "".join(p.cmdline())]
    return found
