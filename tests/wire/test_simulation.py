"""Interleavings of whole agents: random ones (``make fuzz`` runs more), and every one that has failed before."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.decode.connections import MAX_UNANSWERED
from tests.wire.simulated_ranks import SETTINGS
from tests.wire.simulated_steps import HOSTS
from tests.wire.simulation import Kind, Simulation, begun, simulate

# the choices that fuzzing found, with the error that each one showed
FINDS: list[tuple[Kind, str]] = [
    *((kind, "") for kind in Kind),
    # two ranks of a host had given their credit to different prefill ranks, and each next chunk waited for the other's
    (Kind.CUTS, "8034" + "00" * 6 + "0101" + "00" * 88 + "0100010000" + "0000"),
    # prefill ranks differed in chunk sizes and steps, and rows of a room that succeeded had not been written
    (
        Kind.CUTS,
        "a2df6af1d8303e61cdc4bb86c3d1c427103c344c4189eb2f1e7bd5d47e446fcec2a3d811736110e5781bcccea696762e6116c6e9c92d99bf"
        "358c2e0718822ce47ca8c74107e66cb0e4b2b3f4d58d82ca6386d2c96e760e819b85c924c3597164c4a6058a00581a22b22de50472433d2e"
        "44fed8b6b8357e44cd3129903ac1d45597a242fdf11f8f2b1a39f3c3e693114351dcbed407e3e6b605b99e8306dda748a61e029a8a3f415b"
        "024a146cf0d98a98e1cf999661f967bdafdf0e7337420c13f8f5d40f6ce079d1b987376f0787",
    ),
    # a rank was done before it had a connection for its dummy request to a prefill rank that sends it nothing
    (
        Kind.CUTS,
        "f3ec021e86578404a624f9db073d091865576ac6ac0ca46a9343acaacd542a3d52f737eaa88ecc85a1cdf4216d898a0c0fe89ac9bc957071"
        "4c28c82c20f482c8f73f434e363d0323e0030a250c945a6f4e00281b12b099c7dbb9f9911394fd734f0e11cceafe3475f0c0d9414ce96f6c"
        "be904780286a",
    ),
    # chunks to be sent once more waited behind one for another rank, which had no credit to give
    (
        Kind.CUTS,
        "fcab6dfae707e457cebdac99f7e55c866be7e10ead777f2c25b71c1d1934af189ba512570c5448da7576567c763f8aa287f6e5a58eaaa4bc"
        "fd886b8c70543cc7918ab9c505fbf416f479c04c4af4ff455ab99cbe6e10a448c2ec62440d8f4a491346f450024b54e64cbd4ac28bfb0422"
        "b171720e2b5fb2b1b068c90a5dae0414d440dd4c375361",
    ),
    # the first rank of its host was done, its receipt for a chunk was lost, and the chunk was never passed on
    (Kind.CUTS, "010181887328cd1c4d26257f6927eeb994d68bae5ee6ac5caa4dd683d0c95cc82743de1e43996a8615dc19bcfc5c8efa"),
    # a dial that nobody answered, long before any room wanted the channel, failed the first room that did
    (
        Kind.FAULTS,
        "01824d58558b2c11a1461c737841b8dbb8adc313f9e459e9ebac522fcf028c95681d05ebe731343263356561613232666134643631613863"
        "62383661313637303834303133fafaf15542",
    ),
]


@pytest.mark.parametrize(("kind", "data"), FINDS)
def test_finds(kind: Kind, data: str) -> None:
    simulate(bytes.fromhex(data), kind)
    with begun(bytes.fromhex(data), sealed=True) as simulation:
        simulation.run(kind)


def test_a_room_that_only_begins_anew_ends_in_time() -> None:
    """A connection that comes back each time and breaks before a chunk is through makes no progress."""
    with begun(b"") as simulation:
        for _ in range(4):
            simulation.advance()
        begin = simulation.clock.now
        entries = [agent.rooms.table[0] for agent in simulation.agents]
        assert not any(room.state.ended for room in entries)
        while simulation.clock.now <= begin + SETTINGS.transfer_timeout_s:
            simulation.clock.now += 0.3
            simulation.cut_all()
            for _ in range(4):  # Hello, Welcome, Resume, credit; nobody works, so no chunk is made
                simulation.deliver_all()
        simulation.cut_all()
        assert all("no progress for 20 s" in room.reason for room in entries), [room.reason for room in entries]
        assert all(agent.stats().resumed > 50 for agent in simulation.agents)
        simulation.rest()


def test_a_connection_that_breaks_before_its_first_answer_is_dialled_again() -> None:
    with begun(b"") as simulation:
        simulation._each(simulation._step, [0])
        simulation._post()
        for _ in range(MAX_UNANSWERED - 1):
            simulation.cut_all()
        simulation.finish(0)
        simulation.rest()


def test_a_connection_that_never_lasts_until_an_answer_is_given_up() -> None:
    with begun(b"") as simulation:
        simulation._each(simulation._step, [0])
        simulation._post()
        for _ in range(MAX_UNANSWERED):
            simulation.cut_all()
        for decode in simulation.decodes:
            assert "broke 3 times before it answered; check that both sides have keys" in decode.agent.failure(0)
        simulation.rest()


def test_an_abort_that_was_lost_is_said_again() -> None:
    """A prefill rank learns of the abort when the connection is back, and not by the deadline of the room."""
    with begun(b"") as simulation:
        for _ in range(4):
            simulation.advance()
        decode, prefills = simulation.decodes[0], simulation.prefills
        decode.agent.abort(0, "changed its mind")
        for identity in [line.identity for line in decode.agent.connections.table.values()]:
            simulation._cut(identity)  # before it is sent
        simulation._post()
        assert not any(agent.poll(0).ended for agent in prefills)
        simulation._tick()
        simulation._settle()
        assert all("changed its mind" in agent.failure(0) for agent in prefills)
        simulation.rest()


@contextlib.contextmanager
def kept_for_colocated_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """End a room with success, but without any Release for the retained chunks."""
    with begun(bytes([0, HOSTS.index(("a", "a"))])) as simulation:
        for agent in simulation.prefills:

            def put(identity: bytes, message: Any, *more: Any, put: Any = agent.router.send) -> None:
                if not isinstance(message, messages.Release):
                    put(identity, message, *more)

            monkeypatch.setattr(agent.router, "send", put)
        simulation.finish(0)
        assert any(decode.agent.stats().staging_used_bytes for decode in simulation.decodes)
        yield simulation
        assert not any(decode.agent.stats().staging_used_bytes for decode in simulation.decodes)


def test_a_release_that_was_lost_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_for_colocated_ranks(monkeypatch) as simulation:
        simulation._expire()


def test_a_release_that_came_damaged_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged message ends its connection even if no room is under way, because it may have been a Release."""
    with kept_for_colocated_ranks(monkeypatch) as simulation:
        for identity in list(simulation.network.dealers):
            simulation.network.down.setdefault(identity, deque()).append([b"damaged"])
        simulation.deliver_all()
        simulation._tick()
        simulation._settle()


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_chunk_in_the_making_while_its_connection_breaks_goes_once(hosts: tuple[str | None, ...]) -> None:
    """A GPU may still compute a chunk when its rank is back, and another thread then makes the same chunk again."""
    with begun(bytes([0, HOSTS.index(hosts)])) as simulation:
        simulation._each(simulation._step, [0])
        simulation._until(lambda: all(d.agent.poll(0).name == "WAITING" for d in simulation.decodes))
        for agent in (*simulation.agents, *simulation.prefills):  # prefill ranks hand over all rows in two steps
            simulation._step(agent, 0)
        simulation._post()
        for _ in range(3):  # requests, wants and credit
            simulation.deliver_all()
        prefill = simulation.prefills[0]
        with prefill.workers.lock:
            first = prefill.sender.next_work()
        assert first is not None
        simulation.cut_all()
        for _ in range(6):  # until the rank is back, with credit
            simulation.deliver_all()
        with prefill.workers.lock:
            others = list(iter(prefill.sender.next_work, None))
        for work in (first, *others):
            work()
        simulation.finish(0)
        simulation.rest()


@pytest.mark.parametrize("kind", Kind)
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=100, max_size=600))
def test_random_interleavings(kind: Kind, data: bytes) -> None:
    simulate(data, kind)
