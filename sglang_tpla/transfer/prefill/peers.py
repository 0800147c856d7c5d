"""The decode ranks that have registered with a prefill agent, and the facts that each has announced.

Nothing waits and nothing is sent here: messages to decode ranks are put into `Outgoing`. Everything runs under the
agent's lock, and on the I/O thread.
"""

import logging
from collections.abc import Callable

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.network.data_listener import DataListener
from sglang_tpla.transfer.prefill.compatibility import agreed_version, announced_rows, mismatch
from sglang_tpla.transfer.prefill.projections import Projections
from sglang_tpla.transfer.prefill.rooms import Rooms
from sglang_tpla.transfer.prefill.state import Outgoing, Peer
from sglang_tpla.transfer.room import Limits
from sglang_tpla.transfer.workers import Workers

MAX_PEERS = 4096


class Peers:
    """Registers decode ranks, and introduces colocated ones to each other.

    Args:
        table: the registered ranks by ZMQ routing id; other parts of the agent read it.
        rooms: handles messages about rooms, and ranks that are lost or back.
        listener: accepts the ranks' data channels.
        name: the name of this rank in messages.
        limits: the longest prompt that this server accepts.
        prepare: called with each rank whose projection is complete.
        segment: the shared segment of this agent, if it has one.
    """

    def __init__(
        self, table: dict[bytes, Peer], rooms: Rooms, workers: Workers, listener: DataListener, out: Outgoing,
        pool: CachePool, metadata: MetadataRows, *,
        name: str, model_hash: str, host: str, limits: Limits, prepare: Callable[[Peer], None],
        segment: messages.Segment | None,
    ) -> None:  # fmt: skip
        self.table, self._rooms, self._workers, self._listener, self._out = (table, rooms, workers, listener, out)
        self._pool, self._metadata, self._projections = pool, metadata, Projections(pool)
        self._name, self._model_hash, self._host, self._segment = name, model_hash, host, segment
        self.limits, self._prepare, self._began = limits, prepare, workers.io.now()

    # Events of connections

    def message(self, identity: bytes, message: messages.Message, payload: memoryview | None, now: float) -> None:
        if isinstance(message, messages.Hello):
            self._greet(identity, message, now)
            return
        peer = self.table.get(identity)
        if peer is None:
            name = type(message).__name__
            self._workers.drop("unknown_peer", f"{name} from unregistered peer {identity.hex()[:8]}")
            self._out.put(identity, messages.Unregistered())
            return
        peer.last_seen, peer.away = now, False
        match message:
            case messages.Ping():
                self._out.put(identity, messages.Pong(message.number))
            case messages.Pong():
                pass
            case messages.ProjectionLayer() if payload is not None:
                self._take_layer(peer, message, payload, now)
            case messages.Mapped():
                if message.number >= peer.maps_answered:
                    peer.maps_answered, peer.mapped = message.number, frozenset(message.agents)
                    self._rooms.mapped(peer, now)
            case messages.Capacity():
                peer.limits = Limits(message.context_tokens, message.pool_tokens)
            case messages.Goodbye():
                self.lose(peer, f"closed: {message.reason}", now)
            case _:
                self._rooms.message(peer, message, now)

    def damaged(self, identity: bytes) -> None:
        """Make a peer connect anew after a malformed message, so that the lost message comes again."""
        peer = self.table.get(identity)
        if peer is not None and self._rooms.uses(peer):
            self._out.put(identity, messages.Unregistered())

    def channel_lost(self, identity: bytes, why: str) -> None:
        """Make a rank connect anew after its data channel has ended: chunks in flight are lost, and none can follow."""
        peer = self.table.get(identity)
        if peer is not None:
            level = logging.WARNING if self._rooms.uses(peer) else logging.DEBUG  # a rank that closes hangs up too
            text = "prefill rank %d: data channel of %s ended: %s"
            self._workers.log.log(level, text, self._workers.rank, peer.name, why)
            self._out.put(identity, messages.Unregistered())

    def not_sent(self, identity: bytes, full: bool, now: float) -> None:
        """Handle a message that could not be sent: the connection is away for a while, or its queue is ``full``."""
        peer = self.table.get(identity)
        if peer is not None and full:
            self._workers.counts["peers_lost"] += 1
            self.lose(peer, "its queue is full and it does not read", now)
        elif peer is not None:
            peer.away = True  # until the peer comes back or `expire` gives it up

    # Registration

    def _greet(self, identity: bytes, hello: messages.Hello, now: float) -> None:
        reason = mismatch(hello, self._pool, self._metadata, self._model_hash)
        if reason is None and identity not in self.table and len(self.table) >= MAX_PEERS:
            reason = f"peers: this rank serves at most {MAX_PEERS}; close unused decode servers"
        if reason is not None:
            self._workers.counts["refused"] += 1
            text = f"{self._name} refused decode rank {hello.rank}: {reason}"
            self._workers.log.warning("%s", text)
            self._out.put(identity, messages.Refused(messages.sentence(text)))
            return
        if (old := self.table.get(identity)) is not None:
            self.lose(old, "registered anew", now)
        layout = hello.layout
        announced = announced_rows(layout)
        sent = announced.part(0, len(self._pool.layers))
        peer = Peer(identity, hello, now, announced, sent)
        self._projections.begin(peer)
        before = next((other for other in self.table.values() if other.hello.agent == hello.agent), None)
        self.table[identity] = peer
        if before is not None:
            del self.table[before.identity]
            self._listener.withdraw(before.identity)
            self._workers.counts["resumed"] += 1
            self._rooms.take_over(before, peer)
        version = agreed_version(hello.versions)
        assert version is not None
        welcome = messages.Welcome(
            version=version,
            agent=self._workers.agent_id,
            host=self._host,
            first_layer=0,
            layers=len(self._pool.layers),
            need_projection=peer.projection is None,
            segment=self._segment,
            data=self._listener.offer(identity),
            age_ms=int(1000 * (now - self._began)),
            context_tokens=self.limits.context_tokens,
            pool_tokens=self.limits.pool_tokens,
        )
        self._out.put(identity, welcome)
        if peer.projection is not None:
            self._prepare(peer)
        self._introduce(hello.host, now)

    def _take_layer(self, peer: Peer, message: messages.ProjectionLayer, payload: memoryview, now: float) -> None:
        if not self._projections.awaits(peer, message):
            why = f"projection layer {message.index} of {peer.name} was not expected"
            self._workers.drop("malformed_dropped", why)
            return
        wrong = self._projections.take(peer, message, payload, self.table.values())
        if wrong:
            self._workers.counts["refused"] += 1
            self._workers.log.warning("prefill rank %d refused %s: %s", self._workers.rank, peer.name, wrong)
            self._out.put(peer.identity, messages.Refused(messages.sentence(wrong)))
            self.lose(peer, wrong, now)
        elif peer.projection is not None:
            self._out.put(peer.identity, messages.Registered(peer.hello.projection))
            self._prepare(peer)

    def lose(self, peer: Peer, reason: str, now: float) -> None:
        """Forget a connection and fail its rooms."""
        del self.table[peer.identity]
        self._listener.withdraw(peer.identity)
        self._workers.log.info("prefill rank %d: %s is gone: %s", self._workers.rank, peer.name, reason)
        self._rooms.lost(peer, reason, now)
        self._introduce(peer.hello.host, now)

    # Colocated ranks

    def _introduce(self, host: str, now: float) -> None:
        """Tell the ranks of a host about each other's shared segments, unless they read this rank's segment."""
        for peer in self._colocated(host):
            peer.maps_asked += 1
            self._name_others(peer, now)

    def _colocated(self, host: str) -> list[Peer]:
        """Return the ranks of a host that read each other's shared segments."""
        if not host or (host == self._host and self._segment is not None):
            return []
        return [peer for peer in self.table.values() if peer.hello.host == host]

    def _name_others(self, peer: Peer, now: float) -> None:
        others = [other for other in self._colocated(peer.hello.host) if other is not peer]
        segments = [other.hello.segment for other in others if other.hello.segment is not None]
        peer.maps_asked_at = now
        message = messages.Colocated(peer.maps_asked, tuple(segments[: messages.MAX_COLOCATED]))
        self._out.put(peer.identity, message)

    # Time

    def expire(self, now: float) -> None:
        """Give up silent ranks. Ask again for a missing Mapped, which may be lost: no room starts without it."""
        limit = self._workers.settings.peer_timeout_s
        self._listener.expire(now)
        for peer in list(self.table.values()):
            if now - peer.last_seen > limit:
                self._workers.counts["peers_lost"] += 1
                text = f"no sign of life for {limit:g} s"
                self._workers.log.warning("prefill rank %d: %s: %s", self._workers.rank, peer.name, text)
                self.lose(peer, text, now)
        for peer in self.table.values():
            unanswered = peer.maps_answered < peer.maps_asked
            if unanswered and now - peer.maps_asked_at > self._workers.settings.heartbeat_s:
                self._name_others(peer, now)
