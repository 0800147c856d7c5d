"""Nobody waits without a reason: a request that cannot be served fails soon, on both sides, and the reason says why."""

import contextlib
import time

import numpy as np
import pytest
import torch

from sglang_tpla.transfer.decode.connections import WELCOME_DELAY_S
from sglang_tpla.transfer.room import Limits, RoomState, TransferError
from tests.ports import neighbouring_ports
from tests.wire import rig
from tests.wire.simulated_ranks import LAYERS, SETTINGS
from tests.wire.simulation import Simulation, begun


def pass_time(simulation: Simulation, seconds: float) -> None:
    """Let time pass in steps of half a second, in each of which all agents tick and answer."""
    end = simulation.clock.now + seconds
    while simulation.clock.now < end:
        simulation.clock.now += 0.5
        simulation._tick()
        simulation._settle()


def test_a_room_that_no_decode_rank_knows_of_fails_soon() -> None:
    with begun(b"") as simulation:
        for agent in simulation.prefills:
            agent.open_room(0)
        pass_time(simulation, SETTINGS.room_timeout_s)
        assert not any(agent.poll(0).ended for agent in simulation.prefills)
        pass_time(simulation, 1.0)
        for agent in simulation.prefills:
            assert "no decode rank has asked for this room within 15 s" in agent.failure(0)


def test_a_room_that_waits_for_pages_does_not() -> None:
    """Decode ranks name the room until they ask for it."""
    with begun(b"") as simulation:
        simulation._each(simulation._step, [0])
        pass_time(simulation, SETTINGS.room_timeout_s + 2)
        assert all(agent.poll(0) is RoomState.BOOTSTRAPPING for agent in simulation.prefills)
        simulation.finish(0)
        simulation.rest()


def test_a_room_that_gets_no_pages_says_what_to_do() -> None:
    with begun(b"") as simulation:
        simulation._each(simulation._step, [0])
        pass_time(simulation, SETTINGS.transfer_timeout_s + 1)
        for decode in simulation.decodes:
            assert "had no place for the request" in decode.agent.failure(0)
            assert "--tpla-transfer-timeout-s" in decode.agent.failure(0)


def test_a_room_whose_decode_ranks_have_ended_fails_soon() -> None:
    """The decode ranks have named the room before, and stop naming it."""
    with begun(b"") as simulation:
        simulation._each(simulation._step, [0])
        pass_time(simulation, 2.0)
        for decode in simulation.decodes:
            decode.agent.close_room(0)
        pass_time(simulation, 0.5)
        for agent in simulation.prefills:
            assert "closed by the decode scheduler" in agent.failure(0)


def test_a_prompt_that_no_registered_decode_server_takes_fails_at_once() -> None:
    with begun(b"") as simulation:
        for decode in simulation.decodes:
            decode.agent.connections._limits = Limits(context_tokens=4096, pool_tokens=1000)
        simulation.finish(0)
        for agent in simulation.prefills:
            agent.open_room(1, prompt_tokens=1000)
            agent.open_room(2, prompt_tokens=1001)
        pass_time(simulation, 2.5 * SETTINGS.heartbeat_s)
        for agent in simulation.prefills:
            assert not agent.poll(1).ended and not agent.suspicion(1)
            assert "a prompt of 1001 tokens does not fit in its cache, which takes 1000" in agent.failure(2)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(context_tokens=99), "a prompt of 100 tokens does not fit in its context length, which takes 99"),
        (Limits(200, 50), "a prompt of 100 tokens does not fit in its cache, which takes 50"),
    ],
)
def test_a_prompt_that_prefill_does_not_take_fails_at_once_at_decode(limits: Limits, said: str) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    prefill.agent.peers.limits = limits
    with rig.serving(prefill, decode):
        decode.agent.open_room(1, [prefill.peer], prompt_tokens=100)
        rig.fail(1, said, decode)
        decode.agent.open_room(2, [prefill.peer], prompt_tokens=50)
        rig.wait(lambda: decode.agent.poll(2) is RoomState.WAITING, "one that fits")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_projection_that_takes_long_to_arrive_is_waited_for(restarted: bool) -> None:
    """On a slow link the layers of many ranks take longer than a silent rank is borne. Each layer counts as a sign."""
    with begun(b"\x01") as simulation:  # ranks with projections
        assert all(decode.projection is not None for decode in simulation.decodes)
        if restarted:  # the prefill ranks, which know no projection then
            simulation.finish(1)
            for agent in simulation.prefills:
                agent.workers.agent_id += " anew"
                agent.peers._projections._table.clear()
            simulation.cut_all()
        else:
            simulation._each(simulation._step, [0])
            simulation._post()
        simulation.deliver_all()  # Hello and Welcome
        if restarted:
            simulation._each(simulation._step, [0])
        for _ in range(2 * LAYERS + 1):
            for identity in list(simulation.network.dealers):
                simulation._deliver(identity, upwards=True)
            for identity in list(simulation.network.dealers):
                simulation._deliver(identity, upwards=False)
            simulation.clock.now += 0.45 * SETTINGS.peer_timeout_s
            simulation._tick()
        simulation._settle()
        for decode in simulation.decodes:
            assert decode.agent.poll(0) is RoomState.WAITING, decode.agent.failure(0)


@pytest.mark.parametrize(("reason", "said"), [("it is too long", "it is too long"), ("no tool \ud800", "tool \\ud800")])
def test_a_request_that_prefill_refused_is_told_why(reason: str, said: str) -> None:
    """The decode rank gets the reason, whatever text of its client the reason contains."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        prefill.agent.decline(1, reason)
        rig.ask(decode, [prefill.peer], 1, rig.pages(0, 2))
        rig.fail(1, said, decode)


def test_a_request_that_came_while_no_prefill_lived_fails_when_one_is_there() -> None:
    """The other half of the request reached nobody."""
    with contextlib.closing(rig.decode_rank(peer_timeout_s=20.0).agent) as decode:
        # nothing else takes these ports before the rank starts anew
        first = rig.prefill_rank(port=neighbouring_ports(2))
        address = first.agent.address
        first.agent.close()
        decode.open_room(1, [(*address, False)], born=time.monotonic() - 2 * WELCOME_DELAY_S)
        with contextlib.closing(rig.prefill_rank(port=address[1]).agent):
            rig.wait(lambda: decode.poll(1).ended, "the end of the request")
            assert "started after this request came; the request can be retried" in decode.failure(1)
            decode.open_room(2, [(*address, False)])
            rig.wait(lambda: decode.poll(2) is RoomState.WAITING, "the next one")


@pytest.mark.parametrize("idle", [False, True], ids=["other rooms opened", "nothing to do"])
def test_a_request_that_prefill_passed_over_fails_soon(idle: bool) -> None:
    """The other half never came: the scheduler has opened other rooms since, or has no room left to open."""
    with begun(b"") as simulation:
        simulation.finish(0)
        for decode in simulation.decodes:
            simulation._ask(decode, 1)
        simulation._until(lambda: all(d.agent.poll(1) is RoomState.WAITING for d in simulation.decodes))
        for decode in simulation.decodes:
            simulation._ask(decode, 1)
        pass_time(simulation, SETTINGS.room_timeout_s + 1)
        assert not any(decode.agent.poll(1).ended for decode in simulation.decodes)
        for agent in simulation.prefills:
            agent.note_idle() if idle else agent.open_room(2)
        pass_time(simulation, 1.0)
        for decode in simulation.decodes:
            assert "no prefill request opened this room within 15 s" in decode.agent.failure(1)


@pytest.mark.parametrize("room", [-1, 2**63, "7", None, 1.0])
def test_a_room_id_out_of_range_is_refused_where_it_is_opened(room: object) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        said = r"must be an integer in 0\.\.\.9223372036854775807; got " + repr(room)
        with pytest.raises(TransferError, match=said):
            prefill.agent.open_room(room)  # type: ignore[arg-type]
        with pytest.raises(TransferError, match=said):
            decode.agent.open_room(room, [prefill.peer])  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [rig.pages(1, 90), np.arange(90, dtype=np.int32)], ids=["scattered", "in a row"])
@pytest.mark.parametrize("host", rig.HOSTS)
def test_rows_are_written_after_the_event_that_they_wait_for(host: str | None, target: np.ndarray) -> None:
    """A step that was launched before its request's end was known still writes into slots that are free again."""
    prefill, decode, source = rig.prefill_rank(), rig.decode_rank(host=host), rig.pages(0, 90)

    class Step:
        def synchronize(self) -> None:
            if not written:
                written.append(int(target[5]) * rig.PAGE)
                for layer in decode.pool.layers:
                    layer[written[0]] = 3

    written: list[int] = []
    with rig.serving(prefill, decode):
        prefill.agent.open_room(1)
        decode.agent.open_room(1, [prefill.peer])
        rig.wait(lambda: decode.agent.poll(1) == RoomState.WAITING, "registration")
        decode.agent.request(1, target, metadata_row=3, expected_ranks=1, after=Step())
        rig.send(prefill, 1, source)
        rig.succeed(1, prefill, decode)
        assert written
        rig.check_rows(prefill, decode, source, target, 90 * rig.PAGE)


def test_rows_are_made_after_the_event_that_their_projection_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is computed while a decode server registers holds up what makes its projection."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank(rig.projection(0))
    made: list[torch.Tensor] = []

    class Made:
        def synchronize(self) -> None:
            for stack, values in zip(stacks, made, strict=True):
                stack.copy_(values)

    stacks: list[torch.Tensor] = []

    def late(z: torch.Tensor) -> torch.Tensor:
        made.append(z.clone())
        stacks.append(z.zero_())
        return z

    monkeypatch.setattr(prefill.agent.peers._projections, "_weights", late)
    monkeypatch.setattr(prefill.agent.peers._projections, "_queued", lambda: (Made(),))
    with rig.serving(prefill, decode):
        rig.transfer(prefill, decode, count=9)
        assert made


def test_rows_are_read_after_the_event_that_they_wait_for() -> None:
    """The step before may still be writing a cached prefix that is sent ahead."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    source, target, written = rig.pages(0, 6), rig.pages(1, 6), rig.WrittenLater(prefill)
    with rig.serving(prefill, decode):
        prefill.agent.open_room(1)
        prefill.agent.send(1, source, last=True, metadata_row=0, after=written)
        rig.ask(decode, [prefill.peer], 1, target)
        rig.succeed(1, decode)
        assert written.waited
        rig.check_rows(prefill, decode, source, target, 6 * rig.PAGE)
