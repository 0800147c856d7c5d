"""Whole agents without threads, sockets or a clock. A string of bytes decides the interleaving of deliveries, work,
cuts, aborts and strange messages; hypothesis, a coverage-guided fuzzer or a test that replays a find supplies it.

Two prefill ranks (identical copies) serve two or four decode ranks. These invariants must hold, whatever happens:

- no exception leaves a handler, and no counter of internal errors moves;
- staging never exceeds its ceiling, and is never negative;
- a row of a decode pool changes only while a live room owns its page;
- a room that succeeds has the source's rows and metadata in pages that were poisoned before, whatever the ranks of the
  prefill server differ in: chunk size, steps, shared memory, shares;
- honest ranks never accuse each other of breaking the protocol;
- if connections break and nothing worse happens, every room succeeds; else every room ends in time;
- after all rooms are closed nothing is held, and the next request is right.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from sglang_tpla.transfer.decode.state import Link
from sglang_tpla.transfer.room import RoomState
from tests.wire.simulated_network import Choices, Clock
from tests.wire.simulated_ranks import ROOMS, SETTINGS, Failure
from tests.wire.simulated_steps import Kind, Steps
from tests.wire.simulated_streams import Streams


class Simulation(Steps):
    """One case, which `run` runs from beginning to end."""

    def run(self, kind: Kind) -> None:
        """Take the steps that the choices select, then check that everything comes to rest and works."""
        self.kind = kind
        usual = [
            self.advance,
            self.advance,
            self.deliver,
            self.flow,
            self.deliver_all,
            self.work,
            self.work,
            self.request,
            self.send,
        ]
        faults = [self.cut, self.cut_stream, self._tick]
        if kind is not Kind.CUTS:
            faults = [self.abort, self.close, self.cut, self.cut_stream, self.tick]
        if kind is Kind.STRANGE:
            faults += [self.garbage, self.odd_message, self.odd_message, self.odd_bytes, self.stranger]
        while self.choices.left:
            steps = usual if self.choices.below(10) else faults
            steps[self.choices.below(len(steps))]()
            self.check()
        if kind is Kind.CUTS:
            self.finish(*range(ROOMS))
        else:
            self._expire()
        self.rest()

    def _expire(self) -> None:
        """Let time pass without any scheduler: every room ends, except for those that wait for a scheduler's rows."""
        for _ in range(int(SETTINGS.transfer_timeout_s + SETTINGS.peer_timeout_s) + 1):
            self.clock.now += 1.0
            self._tick()
            self._settle()
        for agent in self.agents:
            for room_id, room in agent.rooms.table.items():
                if not (room.state.ended or (agent.role == "prefill" and room.state is RoomState.WAITING)):
                    raise Failure(f"room {room_id} goes on for ever on {agent.role} {agent.rank}: {room.state.name}")

    def rest(self) -> None:
        """Close every room, let all agents come to rest, and check that nothing is held and the next requests work."""
        for room_id in range(ROOMS):
            for who in range(len(self.agents)):
                self._close(who, room_id)
        for seconds in (0.0, 1.0, 1.0, *[4.0] * 6):  # longer than any patience, short enough for heartbeats
            self.clock.now += seconds
            self._tick()
            self._settle()
        self.check()
        for agent in self.agents:
            stats = agent.stats()
            if (stats.rooms, stats.staging_used_bytes, stats.internal_errors) != (0, 0, 0):
                raise Failure(f"at rest, {agent.role} {agent.rank} holds {stats}")
        for agent in self.prefills:
            for peer in agent.peers.table.values():
                if peer.early_requests or peer.slots_held:
                    raise Failure(f"at rest, {peer.name} holds {peer.early_requests}, {peer.slots_held}")
            if agent.lanes.ready:
                raise Failure(f"at rest, prefill {agent.rank} has lanes with chunks to send: {agent.lanes.ready}")
        for decode in self.decodes:
            if decode.agent.rooms.retained or decode.agent.credits.waiters:
                raise Failure(f"at rest, decode {decode.agent.rank} keeps {decode.agent.rooms.retained}")
        self._check_streams()
        first = 0
        if self.doubtful:  # a peer may have lied about itself; the Hello that it sends on a new connection is right
            self.doubtful.clear()
            first = ROOMS
            self.cut_all()
            self._until(self._linked)
        for room_id in range(first, first + ROOMS):
            self.finish(room_id)

    def _check_streams(self) -> None:
        """Check that every open end is a channel of a live connection, and that closed sockets are not polled."""
        used = {id(channel.stream) for agent in self.prefills for channel in agent.router.listener._channels.values()}
        for decode in self.decodes:
            used |= {id(c.reader.stream) for c in decode.agent.connections.table.values() if c.reader is not None}
        left = [end for end in self.streams.ends if id(end) not in used and not end.is_stranger]
        if left:
            raise Failure(f"at rest, {len(left)} data channels are open that nobody uses")
        for agent in self.agents:
            if any(stream.closed for stream in agent.workers.io.streams if hasattr(stream, "closed")):
                raise Failure(f"at rest, {agent.role} {agent.rank} polls a closed socket")

    def _linked(self) -> bool:
        links = [c.link for decode in self.decodes for c in decode.agent.connections.table.values()]
        return Link.CONNECTING not in links

    def _settle(self) -> None:
        """Deliver and work until nothing is left to do."""
        for _ in range(400):
            before = sum(len(queue) for table in (self.network.up, self.network.down) for queue in table.values())
            self.deliver_all()
            for agent in self.agents:
                for _ in range(4):
                    agent.workers.work_once()
            self._post()
            flowed = self._flow_once()
            if not before and not flowed and not any(self.network.up.values()) and not any(self.network.down.values()):
                return
        raise Failure("messages without end")

    def finish(self, *room_ids: int) -> None:
        """Take all steps that rooms still need, and check that the rooms succeed."""

        def step(agent: Any, room_id: int) -> None:
            if room_id not in agent.rooms.table or agent.role == "decode":
                self._step(agent, room_id)

        self._each(step, room_ids)
        self._until(lambda: all(d.agent.poll(r) is not RoomState.BOOTSTRAPPING for d in self.decodes for r in room_ids))
        for _ in range(2):
            self._each(self._step, room_ids)
        self._until(lambda: all(agent.poll(room_id).ended for agent in self.agents for room_id in room_ids))
        for agent in self.agents:
            for room_id in room_ids:
                if agent.poll(room_id) is not RoomState.SUCCESS:
                    raise Failure(f"a request failed on {agent.role} {agent.rank}: {agent.failure(room_id)}")
        self.check()

    def _each(self, step: Callable[[Any, int], None], room_ids: Sequence[int]) -> None:
        for agent in self.agents:
            for room_id in room_ids:
                step(agent, room_id)

    def _until(self, done: Callable[[], bool]) -> None:
        for _ in range(30):
            self._post()
            self._settle()
            if done():
                return
            self.clock.now += 0.3
            self._tick()
        states = [
            (a.role, a.rank, {r: (e.state.name, e.reason) for r, e in a.rooms.table.items()}) for a in self.agents
        ]
        raise Failure(f"a request does not get on: {states}")


@contextlib.contextmanager
def begun(data: bytes, sealed: bool = False) -> Iterator[Simulation]:
    """Make ranks that have done nothing yet, with data channels that are sealed or not."""
    clock, choices = Clock(), Choices(data)
    streams = Streams(choices)
    # native.c works only on the system's sockets
    with mock.patch("sglang_tpla.transfer.memory.native.library", return_value=None):
        simulation = Simulation(choices, clock, streams)
        for agent in simulation.prefills:
            agent.router.listener.sealed = sealed
        try:
            yield simulation
        finally:
            simulation.close_all()


def simulate(data: bytes, kind: Kind) -> None:
    """Run one case.

    Args:
        data: all decisions; channels are sealed if its length is odd.
        kind: the steps that may happen.

    Raises:
        Failure: an invariant did not hold, or an agent raised an exception.
    """
    with begun(data, bool(len(data) % 2)) as simulation:
        simulation.run(kind)


if __name__ == "__main__":  # python -m tests.wire.simulation cuts|faults|strange HEX...: run finds again
    import sys

    for text in sys.argv[2:]:
        start = time.time()
        simulate(bytes.fromhex(text), Kind(sys.argv[1]))
        print("held", round(time.time() - start, 3))
