"""The steps that the ranks of `simulation` and their network can take, and the invariants that hold after each step."""

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.decode.connections import MAX_UNANSWERED
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.agent import PrefillAgent
from sglang_tpla.transfer.room import RoomState
from tests.wire.simulated_network import Choices, Clock, Loop, Network
from tests.wire.simulated_ranks import (
    LATENT,
    LAYERS,
    PAGE,
    PAGES,
    ROOMS,
    ROPE,
    SETTINGS,
    Decode,
    Failure,
    IdleWorkers,
)
from tests.wire.simulated_strange import Strange
from tests.wire.simulated_streams import Streams

# the hosts of the decode ranks; None: the host of the prefill ranks
HOSTS: tuple[tuple[str | None, ...], ...] = (
    (None, None), ("a", "a"), ("a", "b"), ("a", "a", "a", "a"), ("a", "a", "b", "b"), (None, None, "a", "a"),
)  # fmt: skip
# the words with which a rank accuses a peer of breaking the protocol
ACCUSATIONS = ("sent chunk", "finished with", "confirmed chunks", "too many damaged", "internal error")


class Kind(enum.Enum):
    """Which steps may happen."""

    CUTS = "cuts"  # connections break, and come back at once
    FAULTS = "faults"  # also aborts, and time passes
    STRANGE = "strange"  # also malformed messages, and well-formed ones that no agent would send


class Steps(Strange):
    """Two prefill ranks, and two or four decode ranks."""

    def __init__(self, choices: Choices, clock: Clock, streams: Streams) -> None:
        self.choices, self.clock, self.network, self.streams = choices, clock, Network(), streams
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(PAGES * PAGE, LATENT + ROPE, generator=generator) for _ in range(LAYERS)]
        row = np.arange(2 * ROOMS * 32, dtype=np.uint8).reshape(2 * ROOMS, 32)
        self.prefills: list[PrefillAgent] = []
        self.source = CachePool(layers, LATENT, ROPE, PAGE)
        how, hosts = choices.below(256), HOSTS[choices.below(len(HOSTS))]
        sliced = how % 2
        # in half of all cases, ranks differ in their chunk sizes, steps, shared memory and shares
        self.uneven = how >= 128
        self.steps = [2, self._odd(2, 1, 3, PAGES)]  # pages of each prefill rank's first send
        for rank in range(2):
            refused = bool(rank and self._odd(0, 1))
            settings = self._settings() if rank else SETTINGS
            agent = PrefillAgent(
                self.source, MetadataRows([row]), model_hash="m", bind_host="127.0.0.1", settings=settings, rank=rank,
                workers=self._workers("prefill", rank, settings, refused),
            )  # fmt: skip
            self.prefills.append(agent)
        own = ((16, 8, 16), (16, 0, 8), (0, 0, 0))[self._odd(0, 1, 2)]
        maps = [_projection(rank % 2, own) if sliced else None for rank in range(len(hosts))]
        self.decodes = []
        for rank in range(len(hosts)):
            refused = bool(rank == 1 and self._odd(0, 1))
            settings = self._settings() if rank else SETTINGS
            workers = self._workers("decode", rank, settings, refused)
            self.decodes.append(Decode(rank, maps[rank], hosts, settings, workers))
        self.agents: list[Any] = [*self.prefills, *(decode.agent for decode in self.decodes)]
        # one of the decode ranks may get all rows from one prefill rank
        self.peers = [[(*agent.address, False) for agent in self.prefills] for _ in self.decodes]
        if whole := self._odd(0, 1, 2):
            self.peers[1] = [(*agent.address, rank != whole - 1) for rank, agent in enumerate(self.prefills)]
        self.kind = Kind.CUTS
        # rooms that a strange message may have named: their rows may be anything
        self.doubtful: set[int] = set()

    def _odd(self, usual: int, *others: int) -> int:
        """Choose the usual value, or any of the values if ranks differ."""
        return (usual, *others)[self.choices.below(1 + len(others))] if self.uneven else usual

    def _settings(self) -> Settings:
        """Return the usual settings, or those of a rank whose chunks are smaller."""
        staging_bytes = self._odd(SETTINGS.staging_bytes, 6000, 4096)
        return replace(SETTINGS, staging_bytes=staging_bytes)

    def _workers(self, role: str, rank: int, settings: Settings, refused: bool) -> IdleWorkers:
        """Make threads that wait for the simulation. If ``refused``, the system has no shared memory left."""
        return IdleWorkers(role, settings, rank, Loop(self.network, self.streams, self.clock), not refused)

    # Steps

    def _post(self) -> None:
        for agent in self.agents:
            agent.workers.io.run()

    def deliver(self) -> None:
        identities = list(self.network.dealers)
        if identities:
            which, upwards = self.choices.below(len(identities)), bool(self.choices.below(2))
            self._deliver(identities[which], upwards)

    def _deliver(self, identity: bytes, upwards: bool) -> bool:
        socket = self.network.deliver(identity, upwards)
        if socket is None:
            return False
        for agent in self.agents:
            if socket in agent.workers.io.handlers:
                agent.workers.io.handlers[socket](socket)
        self._post()
        return True

    def deliver_all(self) -> None:
        for identity in list(self.network.dealers):
            for upwards in (True, False):
                for _ in range(len((self.network.up if upwards else self.network.down).get(identity, ()))):
                    self._deliver(identity, upwards)

            self._flow_once()

    def flow(self) -> None:
        """Move a piece of the bytes under way on one data channel."""
        ready = [handler for agent in self.agents for handler in agent.workers.io.ready()]
        if ready:
            ready[self.choices.below(len(ready))]()
            self._post()

    def _flow_once(self) -> bool:
        ready = [(agent, handler) for agent in self.agents for handler in agent.workers.io.ready()]
        for agent, handler in ready:
            if handler in agent.workers.io.ready():  # an earlier handler may have closed the socket
                handler()
                self._post()
        return bool(ready)

    def work(self) -> None:
        """Do a piece of work of one rank, or of each rank."""
        for agent in self._some():
            agent.workers.work_once()
        self._post()

    def advance(self) -> None:
        """Let all ranks take the next step of a room, and deliver the messages under way."""
        room_id = self.choices.below(ROOMS)
        for agent in self.agents:
            self._step(agent, room_id)
        self._post()
        self.deliver_all()
        self.deliver_all()

    def _step(self, agent: Any, room_id: int) -> None:
        if agent.role == "decode":
            self._ask(self.decodes[agent.rank], room_id)
        elif room_id not in agent.rooms.table:
            agent.open_room(room_id)
        else:
            self._send(agent, room_id)

    def _some(self) -> list[Any]:
        """Choose one agent, or all."""
        who = self.choices.below(len(self.agents) + 2)
        return self.agents if who >= len(self.agents) else [self.agents[who]]

    def request(self) -> None:
        """Take the next step of a room on ranks that can take one: open it, or ask for it."""
        room_id = self.choices.below(ROOMS)
        for agent in self._some():
            if agent.role == "decode":
                self._ask(self.decodes[agent.rank], room_id)
            elif room_id not in agent.rooms.table:
                agent.open_room(room_id)
        self._post()

    def _ask(self, decode: Decode, room_id: int) -> None:
        room = decode.agent.rooms.table.get(room_id)
        if room is None:
            decode.agent.open_room(room_id, self.peers[decode.agent.rank])
        elif room.state is RoomState.WAITING and room.requested is None:
            pages = _pages(room_id, len(decode.owned) + 7 * decode.agent.rank)
            taken = np.concatenate([np.empty(0, dtype=np.int32), *decode.owned.values()])
            pages = np.setdiff1d(np.arange(PAGES, dtype=np.int32), taken)[::-1][: pages.size].copy()
            decode.owned[room_id] = pages
            decode.poison(room_id)
            decode.agent.request(room_id, pages, metadata_row=room_id, expected_ranks=len(self.decodes))

    def send(self) -> None:
        """Hand over some or all rows of a room, on one prefill rank or both."""
        room_id, who = self.choices.below(ROOMS), self.choices.below(3)
        for rank in range(2) if who == 2 else (who,):
            self._send(self.prefills[rank], room_id)
        self._post()

    def _send(self, agent: PrefillAgent, room_id: int) -> None:
        """Hand over some pages first, then the others: the first rank takes two steps."""
        room = agent.rooms.table.get(room_id)
        if room is None or room.state.ended or room.last:
            return
        pages, first = _pages(room_id, 0), self.steps[agent.rank]
        last = room.tokens > 0 or first >= pages.size
        pages = pages[:first] if not room.tokens else pages[first:]
        # some requests do not fill their last page
        tokens = pages.size * PAGE - room_id % 2 if last else None
        agent.send(room_id, pages, last=last, metadata_row=room_id if last else None, num_tokens=tokens)

    def abort(self) -> None:
        """Let one rank's scheduler abort a room."""
        room_id, who = self.choices.below(ROOMS), self.choices.below(len(self.agents))
        self.agents[who].abort(room_id, "changed its mind")
        if who >= 2:
            self.decodes[who - 2].free(room_id)
        self._post()

    def close(self) -> None:
        """Let one scheduler, or all, forget a room."""
        room_id = self.choices.below(ROOMS)
        for agent in self._some():
            self._close(self.agents.index(agent), room_id)
        self._post()

    def _close(self, who: int, room_id: int) -> None:
        self.agents[who].close_room(room_id)
        if who >= 2:
            self.decodes[who - 2].free(room_id)

    def cut(self) -> None:
        """Break a connection; messages under way on it are lost."""
        identities = list(self.network.dealers)
        if self.kind is Kind.CUTS:
            # a connection that breaks too often before its first answer fails its rooms, so leave it alone
            identities = [
                line.identity
                for decode in self.decodes
                for line in decode.agent.connections.table.values()
                if line.socket and (line.agent or line.unanswered < MAX_UNANSWERED - 1)
            ]
        if not identities:
            return
        self._cut(identities[self.choices.below(len(identities))])
        self._post()

    def _cut(self, identity: bytes) -> None:
        self.network.drop(identity)
        for decode in self.decodes:
            for connection in list(decode.agent.connections.table.values()):
                if connection.identity == identity and connection.socket is not None:
                    decode.agent.connections.broken(connection)

    def cut_all(self) -> None:
        """Break every connection, and dial all of them anew."""
        for identity in list(self.network.dealers):
            self._cut(identity)
        self._tick()

    def cut_stream(self) -> None:
        """Break only a data channel; bytes under way on it are lost."""
        if self.streams.ends:
            self.streams.ends[self.choices.below(len(self.streams.ends))].cut()

    def tick(self) -> None:
        """Let time pass, mostly little."""
        long = (6.0, 21.0)[self.choices.below(2)] if self.choices.below(16) == 15 else 0.0
        self.clock.now += long or (0.3, 1.1, 2.5)[self.choices.below(3)]
        self._tick()

    def _tick(self) -> None:
        for agent in self.agents:
            agent.workers.tick()
        self._post()

    # Invariants

    def check(self) -> None:
        """Check the invariants that must hold after every step."""
        for agent in self.agents:
            stats = agent.stats()
            if not 0 <= stats.staging_used_bytes <= stats.staging_limit_bytes:
                raise Failure(f"staging of {agent.role} {agent.rank}: {stats.staging_used_bytes} bytes")
            for room in agent.rooms.table.values():
                if self.kind is not Kind.STRANGE and any(word in room.reason for word in ACCUSATIONS):
                    raise Failure(f"honest ranks accuse each other: {room.reason}")
        for decode in self.decodes:
            for room_id, room in list(decode.agent.rooms.table.items()):
                if room.state is RoomState.SUCCESS and room_id in decode.owned and room_id not in self.doubtful:
                    self._check_rows(decode, room_id)
                if room.state.ended:
                    decode.free(room_id)
            decode.check()

    def _check_rows(self, decode: Decode, room_id: int) -> None:
        pages = decode.owned[room_id]
        tokens = pages.size * PAGE - room_id % 2
        to_slots, rest = torch.from_numpy(decode.pool.slots(pages)).split([tokens, room_id % 2])
        from_slots = torch.from_numpy(self.source.slots(_pages(room_id, 0), tokens))
        for number, (layer, rows) in enumerate(zip(decode.pool.layers, self.source.layers, strict=True)):
            want, got = rows[from_slots], layer[to_slots]
            if decode.projection is not None:
                z = decode.projection.matrices[number].double()
                want = torch.cat(((want[:, :LATENT].double() @ z).float(), want[:, LATENT:]), dim=1)
            near = 1e-5 if decode.projection is not None else 0.0
            if not torch.allclose(want, got, rtol=near, atol=near):
                raise Failure(f"room {room_id} succeeded with wrong rows in layer {number}")
            if not layer[rest].isnan().all():
                raise Failure(f"room {room_id} wrote beyond its tokens in layer {number}")
        if decode.metadata.read(room_id) != bytes(range(32 * room_id, 32 * room_id + 32)):
            raise Failure(f"room {room_id} succeeded with wrong metadata")

    def close_all(self) -> None:
        """Give all shared memory back."""
        for agent in self.agents:
            if agent.segment is not None:
                agent.segment.close()


def _projection(group: int, columns: Sequence[int]) -> Projection:
    """Make the projection of one group, with ``columns[l]`` own columns in each layer."""
    common, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(10 + group)
    matrices = [
        torch.cat((torch.randn(LATENT, 8, generator=common), torch.randn(LATENT, count, generator=own)), dim=1)
        for count in columns
    ]
    return Projection(matrices, [8] * LAYERS)


def _pages(room_id: int, shift: int) -> np.ndarray:
    """Return the source pages of a room: 4, 6 or 8 of them."""
    return np.roll(np.arange(PAGES, dtype=np.int32), -3 * room_id - shift)[: 4 + 2 * (room_id % ROOMS)]
