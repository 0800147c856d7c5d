"""A bad network between real servers: afterwards they hold nothing, all threads live, and answers are bit-identical."""

import concurrent.futures
import time

import pytest

from sglang_tpla.transfer import messages
from tests.e2e.faulty import FAULTS, PEER_TIMEOUT_S, PROMPTS, SLOW, TOKENS, Faulty, until_in_flight
from tests.e2e.servers import counters
from tests.wire.fakes import FakeDecode, hello
from tests.wire.test_hostile import MALFORMED

# These take as long as the other faults and find the same errors as tests/wire, which tries them every time.
RARE = ("drop", "duplicate", "reorder", "truncate")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault in RARE else ()) for fault in FAULTS]
)
def test_bad_network(faulty: Faulty, fault: str) -> None:
    """Requests under way are right or fail with a reason; then all is as before, and the next answer is the same."""
    before = faulty.held()
    with faulty.network(fault):
        answers = faulty.ask_all()
    faulty.check(answers, fault)
    faulty.at_rest(before)


def test_network_gone_for_longer_than_the_heartbeat_and_back(faulty: Faulty) -> None:
    """Each side gives the other up, fails the requests under way, and later accepts the other side again."""
    before = faulty.held()
    lost = [counters(server)["peers_lost"] for server in faulty.servers]
    with concurrent.futures.ThreadPoolExecutor(1) as pool, faulty.network("throttle", bytes_per_s=SLOW):
        call = pool.submit(faulty.ask_all)
        for server in (faulty.decode, faulty.prefill):
            until_in_flight(server, call, rooms=len(PROMPTS))
        with faulty.network_gone():
            answers = call.result()  # every request ends by itself, while nothing comes through
            deadline = time.monotonic() + 60  # servers without a request under way notice in their own time
            while any(counters(s)["peers_lost"] <= old for s, old in zip(faulty.servers, lost, strict=True)):
                assert time.monotonic() < deadline
    assert all("rank" in answer.failure for answer in answers), answers
    faulty.at_rest(before)


def test_bootstrap_server_away(faulty: Faulty) -> None:
    """Requests under way, and later ones between servers that know each other, do not need the bootstrap server."""
    faulty.door.refusing = True
    faulty.door.cut()
    assert faulty.check(faulty.ask_all(), "cut") == len(PROMPTS)
    faulty.door.refusing = False
    faulty.at_rest()


def test_hostile_frames_at_a_serving_prefill_rank(faulty: Faulty) -> None:
    """A registered peer sends malformed frames of every kind, and strangers send messages, while it serves others."""
    before, at_start = faulty.held(), counters(faulty.prefill)
    (peer,) = {proxy.port for proxy in faulty.proxies[:1]}
    fakes = [FakeDecode(peer) for _ in range(2)]
    try:
        for kind in MALFORMED.values():
            for fake in fakes:
                fake.send(*kind)
                fake.say(hello(versions=(7, 9)))
                fake.say(messages.Request(1, 2, 1, 0, -1, False, 0, 1))
            answer = faulty.route.ask(PROMPTS[0], TOKENS)
            assert answer.same_text(faulty.expected["decode"][0]), answer
        for fake in fakes:
            assert "decode 7 to 9" in fake.expect(messages.Refused)[0].reason
    finally:
        for fake in fakes:
            fake.close()
    now = counters(faulty.prefill)
    grown = {name: now[name] - at_start[name] for name in ("malformed_dropped", "refused", "unknown_peer")}
    # An oversized message ends its connection, and the rest of the connection's messages are lost.
    assert grown["malformed_dropped"] >= len(MALFORMED) and grown["refused"] >= len(MALFORMED), grown
    assert grown["unknown_peer"] >= len(MALFORMED), grown
    faulty.at_rest(before)


@pytest.mark.slow
def test_network_gone_and_back_twenty_times(faulty: Faulty) -> None:
    """The network is gone for a moment, for less and for more than the heartbeat's patience, under requests."""
    before = faulty.held()
    for number in range(20):
        with faulty.network_gone():
            time.sleep(PEER_TIMEOUT_S * (0.1 + 0.1 * number))
        for answer in faulty.ask_all():
            assert answer.failure or answer.tokens
    faulty.at_rest(before)
