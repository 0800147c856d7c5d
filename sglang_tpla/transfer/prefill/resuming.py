"""Inside the prefill agent: what becomes of a rank's rooms when its connection breaks and comes back."""

from __future__ import annotations

from sglang_tpla.transfer import messages as frames
from sglang_tpla.transfer.prefill.rooms import PrefillServing
from sglang_tpla.transfer.prefill.state import Peer, Stream


class PrefillResuming(PrefillServing):
    """Taking up broken connections in `PrefillAgent`. Everything here runs under the agent's lock."""

    def _in_use(self, peer: Peer) -> bool:
        return any(
            stream.peer is peer and not stream.confirmed and not entry.state.ended
            for entry in self._rooms.values()
            for stream in entry.streams
        )

    def _take_over(self, old: Peer, new: Peer) -> None:
        """A rank has come back under another identity: its rooms go on."""
        new.ready, new.held_requests = old.ready, old.held_requests
        for asks in [entry.asks for entry in self._rooms.values()] + list(self._held.values()):
            if old.identity in asks:
                ask = asks.pop(old.identity)
                ask.peer = new
                asks[new.identity] = ask
                if ask.stream is not None:
                    ask.stream.peer, ask.stream.paused = new, True
                    self._forget_arena(ask.stream)

    def _forget_arena(self, leader: Stream) -> None:
        """A rank that is back frees what it kept for others; whoever had not read it asks again."""
        for lane in leader.lanes:
            for sequence, relay in lane.relays.items():
                if relay is not None and relay.leader is leader:
                    lane.relays[sequence] = None

    def _take_resume(self, stream: Stream, message: frames.Resume) -> None:
        """Send again what a rank has not got, now that its connection is back."""
        stream.paused = False
        bitmaps = dict(message.applied)
        self._forget_arena(stream)
        for part, sequence in list(stream.unacked):
            lost = stream.lane(part)
            if lost is None or not stream.settle((part, sequence)):
                continue
            bits = bitmaps.get(part, b"")
            if sequence // 8 < len(bits) and bits[sequence // 8] >> (sequence % 8) & 1:
                stream.acked += 1
                stream.room.progress = self._io.now()
                self._has(lost, sequence, stream)
            else:
                self._counts["resent"] += 1
                stream.resent += 1
                lost.repeat.append((sequence, stream))
                self._read_by(lost, sequence, stream)  # whoever keeps it need not wait for that
        stream.credit_bytes = stream.sent_bytes = stream.wanted_bytes = message.credit_bytes
        stream.wanted_told = 0
        for lane in stream.lanes:
            stream.wanted_bytes += lane.left_bytes(stream)
            self._ready(lane)
        self._want(stream)
        if stream.finish_sent:
            self._send_finish(stream)
        self._work.notify()
