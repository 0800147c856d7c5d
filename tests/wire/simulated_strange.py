"""Steps of `simulation` that no honest agent takes: damaged bytes, invented messages, strangers."""

from abc import abstractmethod
from collections import deque
from typing import Any

import msgspec

from sglang_tpla.transfer import messages
from tests.wire.simulated_network import Choices, Network
from tests.wire.simulated_ranks import ROOMS, Decode
from tests.wire.simulated_streams import Streams


class Strange:
    """Steps of a `Simulation`."""

    choices: Choices
    network: Network
    streams: Streams
    agents: list[Any]
    decodes: list[Decode]
    doubtful: set[int]  # rooms that a strange message may have named

    @abstractmethod
    def _deliver(self, identity: bytes, upwards: bool) -> bool:
        """Deliver the next message of a connection. Return whether there was one."""

    def odd_bytes(self) -> None:
        """Put bytes that no agent sends into a data channel, or damage bytes that are under way."""
        if not self.streams.ends:
            return
        end = self.streams.ends[self.choices.below(len(self.streams.ends))]
        if end.arrived and self.choices.below(2):
            end.arrived[self.choices.below(min(256, len(end.arrived)))] ^= 1 << self.choices.below(8)
        else:
            end.arrived += self.choices.take(1 + self.choices.below(24))

    def stranger(self) -> None:
        """Connect a stranger to a port of data channels. The stranger sends something or nothing, and stays or goes."""
        ports = list(self.streams.listeners)
        stream = self.streams.connect(ports[self.choices.below(len(ports))])
        kinds = (b"", b"TPLD", b"TPLD\x03" + bytes(16), b"GET / HTTP/1.1\r\n\r\n")
        stream.send(kinds[self.choices.below(len(kinds))] + self.choices.take(self.choices.below(4)))
        if self.choices.below(2):
            stream.close()

    def garbage(self) -> None:
        """Send frames that are no message on a connection in use; any message lost with them must come again."""
        upwards, data = bool(self.choices.below(2)), self.choices.take(1 + self.choices.below(24))
        kinds = [[data], [messages.seal(data)], [messages.PREFIX + data], [data, data], [data] * 3]
        self._inject(upwards, kinds[self.choices.below(len(kinds))])

    def odd_message(self) -> None:
        """Send a well-formed message with fields from small ranges, as a peer that errs or lies could."""
        upwards = bool(self.choices.below(2))
        kinds = list(messages.Message.__args__)
        kind = kinds[self.choices.below(len(kinds))]
        values = {name: self._value(name) for name in kind.__struct_fields__}
        if isinstance(room_id := values.get("room"), int):
            self.doubtful.add(room_id)
        else:
            self.doubtful.update(range(ROOMS))
        body = msgspec.msgpack.encode([kind.__struct_config__.tag, *values.values()])
        parts = [messages.seal(body)]
        if kind in messages.WITH_PAYLOAD:
            size = (0, 32, 2048, 4096, 256)[self.choices.below(5)]
            payload = bytes([self.choices.below(256)]) * size
            if self.choices.below(4):
                values["checksum"] = messages.checksum(payload)
                parts = [messages.seal(msgspec.msgpack.encode([kind.__struct_config__.tag, *values.values()]))]
            parts.append(payload)
        self._inject(upwards, parts)

    def _value(self, name: str) -> Any:
        pick = self.choices.below
        generations = [room.generation for decode in self.decodes for room in decode.agent.rooms.table.values()] + [
            0,
            2**62,
        ]
        agents = [agent.workers.agent_id for agent in self.agents] + ["stranger"]
        hello = self.decodes[pick(len(self.decodes))].agent.connections._hello
        special = {
            "room": lambda: pick(ROOMS),
            "generation": lambda: generations[pick(len(generations))],
            "versions": lambda: [(1, 1), (0, 9), (5, 5)][pick(3)],
            "version": lambda: pick(3),
            "agent": lambda: agents[pick(len(agents))],
            "agents": lambda: [agents[pick(len(agents))] for _ in range(pick(3))],
            "model_hash": lambda: "m" if pick(8) else "other",
            "host": lambda: hello.host if pick(2) else "far",
            "layout": lambda: hello.layout,
            "projection": lambda: hello.projection if pick(4) else "x",
            "common": lambda: hello.common,
            "segment": lambda: hello.segment if pick(2) else None,
            "segments": lambda: [hello.segment] * pick(3),
            "checksum": lambda: b"\x00" * 8,
            "reason": lambda: "why not",
            "relay": lambda: bool(pick(2)),
            "dummy": lambda: not pick(4),
            "need_projection": lambda: bool(pick(2)),
            "offsets": lambda: [4096 * pick(5) for _ in range(1 + pick(2))],
            "applied": lambda: [(pick(4), self.choices.take(pick(3))) for _ in range(pick(4))],
            "max_chunk_bytes": lambda: (4096, 1, 300, 2**31 - 1)[pick(4)],
            "num_tokens": lambda: pick(60) - 1,
        }
        if name in special:
            return special[name]()
        return (0, 1, 2, 3, 16, 4096, 16384, 2**31 - 1)[pick(8)]

    def _inject(self, upwards: bool, parts: list[bytes]) -> None:
        identities = list(self.network.dealers)
        if not identities:
            return
        identity = identities[self.choices.below(len(identities))]
        (self.network.up if upwards else self.network.down).setdefault(identity, deque()).appendleft(parts)
        self._deliver(identity, upwards)
