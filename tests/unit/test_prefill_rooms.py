"""Rooms and lanes of the prefill side alone, without threads and sockets; the test sets the time."""

from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory.iovec import Slots
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.staging import Staging
from sglang_tpla.transfer.prefill import rooms
from sglang_tpla.transfer.prefill.ended_rooms import EndedRooms
from sglang_tpla.transfer.prefill.lanes import Lanes
from sglang_tpla.transfer.prefill.rooms import Rooms
from sglang_tpla.transfer.prefill.state import Outgoing, Peer, Room, SenderProjection, Span
from sglang_tpla.transfer.room import REFUSED, RoomState

LAYERS, WIDTH, ROPE, PAGE, CHUNK_BYTES = 2, 4, 2, 4, 4 * 6 * 4
SETTINGS = Settings(role="prefill", transfer_timeout_s=20.0)


class Rank:
    """The state of a prefill agent, and decode ranks of one other host, which read each other's memory."""

    def __init__(self, *names: str) -> None:
        pool = CachePool([torch.zeros(8 * PAGE, WIDTH + ROPE) for _ in range(LAYERS)], WIDTH, ROPE, PAGE)
        self.out, self.peers, self.counts = Outgoing(), dict[bytes, Peer](), Counter[str]()
        self.ended: list[Room] = []
        layout = messages.CacheLayout(
            first_layer=0, latent_dim=WIDTH, rope_dim=ROPE, dtype="float32", page_size=PAGE, widths=pool.widths,
            shared=pool.row_format.shared, metadata_bytes=(),
        )  # fmt: skip
        for name in names:
            hello = messages.Hello(
                versions=messages.PROTOCOL_VERSIONS, agent=name, model_hash="m", rank=0, size=len(names), host="far",
                max_chunk_bytes=CHUNK_BYTES, layout=layout, projection="", common="", segment=None,
            )  # fmt: skip
            peer = Peer(name.encode(), hello, 0.0, pool.row_format, pool.row_format)
            peer.projection, peer.maps_answered, peer.mapped = PLAIN, 0, frozenset(names)
            self.peers[peer.identity] = peer
        self.lanes = Lanes(
            pool, Staging(np.zeros(8 * CHUNK_BYTES, dtype=np.uint8), CHUNK_BYTES), self.peers, self.out, self.counts,
            agent="prefill", host="here", chunk_bytes=CHUNK_BYTES, makers=1, has_channel=lambda _: True,
            wake=lambda: None,
        )  # fmt: skip
        self.rooms = Rooms(
            SETTINGS, self.lanes, self.peers, self.out, self.counts, drop=lambda *_: None, wake=lambda: None,
            ended=self.ended.append,
        )  # fmt: skip

    def hear(self, name: str, message: Any, now: float = 0.0) -> None:
        """Handle a message from a decode rank."""
        self.rooms.message(self.peers[name.encode()], message, now)

    def said(self, name: str) -> list[Any]:
        """Return the messages for a decode rank since the last call, and drop those for other ranks."""
        return [message for identity, message, _ in self.out.take() if identity == name.encode()]

    def send_all(self, room_id: int, now: float = 0.0) -> None:
        """Send one page of rows, the last of the room."""
        span = Span(0, Slots(np.arange(PAGE)), (), in_place=False)
        self.rooms.send(self.rooms.table[room_id], span, True, b"row", now)

    def chunks(self) -> list[tuple[int, list[str]]]:
        """Return all chunks that can go now: their sequence, and the ranks that get them."""
        found = []
        while (job := self.lanes.next_job()) is not None:
            job.plan.digests[job.sequence] = bytes(8)
            job.slot.pending -= 1
            found += [(job.sequence, [taker.peer.hello.agent for taker in takers]) for _, takers in job.deliveries]
        return found


PLAIN = SenderProjection(None)


def request(ranks: int) -> messages.Request:
    """Return a request for room 1, for which ``ranks`` decode ranks ask."""
    return messages.Request(1, 5, ranks, 0, PAGE, False, 0, 1)


def test_a_room_from_its_request_to_its_end() -> None:
    rank = Rank("a")
    rank.hear("a", request(1), 1.0)
    rank.rooms.open(1, PAGE, 2.0)
    room = rank.rooms.table[1]
    assert room.state is RoomState.WAITING and rank.said("a") == []
    rank.send_all(1, 3.0)
    want, finish = rank.said("a")
    assert (want.total_bytes, finish.chunks, room.first_send) == (2 * CHUNK_BYTES, 2, 3.0)
    assert rank.chunks() == []  # no credit yet
    rank.hear("a", messages.Credit(1, 5, CHUNK_BYTES), 4.0)
    assert rank.chunks() == [(0, ["a"])]
    rank.hear("a", messages.Credit(1, 5, 2 * CHUNK_BYTES), 5.0)
    assert rank.chunks() == [(1, ["a"])] and room.progress == 3.0
    rank.hear("a", messages.Ack(1, 5, 0, 0), 6.0)
    assert room.progress == 6.0 and not room.state.ended
    rank.hear("a", messages.Done(1, 5), 7.0)
    assert room.state is RoomState.SUCCESS and room.ended == 7.0 and rank.ended == [room]
    assert not rank.lanes.ready and not rank.peers[b"a"].slots_held


def test_the_time_is_what_the_caller_says() -> None:
    rank = Rank("a")
    rank.hear("a", request(2), 1.0)
    rank.rooms.open(1, PAGE, 2.0)
    rank.rooms.expire(22.0)
    assert not rank.rooms.table[1].state.ended
    rank.rooms.expire(22.1)
    assert rank.rooms.table[1].reason == ("no progress for 20 s in BOOTSTRAPPING; 1 of 2 decode ranks had asked")
    assert [type(message) for message in rank.said("a")] == [messages.Abort]


@pytest.mark.parametrize(
    ("expected", "prefixes", "why"),
    [
        ((3, 3, 3), (0, 1, 0), "disagree on the cached prefix: [0, 1] tokens"),
        ((2, 3, 2), (0, 0, 0), "disagree on how many ask: 2 and 3"),
        ((1, 1, 1), (0, 0, 0), "2 decode ranks asked, 1 were expected"),
    ],
)
def test_every_rank_is_told_once_that_requests_do_not_go_together(
    expected: tuple[int, ...], prefixes: tuple[int, ...], why: str
) -> None:
    """This includes a request that is looked at, when the room opens, after an earlier one has failed the room."""
    rank = Rank("a", "b", "c")
    for name, ranks, prefix in zip("abc", expected, prefixes, strict=True):
        rank.hear(name, messages.Request(1, 5, ranks, prefix, PAGE, False, 0, 1))
    rank.rooms.open(1, PAGE, 0.0)
    assert why in rank.rooms.table[1].reason and len(rank.ended) == 1
    told = rank.out.take()
    assert sorted(identity for identity, *_ in told) == [b"a", b"b", b"c"]
    assert all(type(message) is messages.Abort and why in message.reason for _, message, _ in told)
    assert not rank.rooms.early_requests


@pytest.mark.parametrize(("prefix", "said"), [(PAGE, ""), (PAGE + 1, f"{PAGE + 1} tokens are cached at decode")])
def test_a_prefix_longer_than_the_prompt_is_another_prompts(prefix: int, said: str) -> None:
    """A scheduler that has nothing to send would not send the end either."""
    rank = Rank("a")
    rank.rooms.open(1, PAGE, 0.0)
    rank.hear("a", messages.Request(1, 5, 1, prefix, PAGE, False, 0, 1), 1.0)
    assert rank.rooms.table[1].reason.startswith(said)
    assert [type(message) for message in rank.said("a")] == [messages.Abort] * bool(said)
    assert (REFUSED in rank.rooms.table[1].reason) is bool(said)


@pytest.mark.parametrize(("most", "state"), [(2, RoomState.TRANSFERRING), (1, RoomState.FAILED)])
def test_more_chunks_than_a_rank_could_say_that_it_has_fail_their_room(
    most: int, state: RoomState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_SEQUENCES", most)
    rank = Rank("a")
    rank.hear("a", request(1), 1.0)
    rank.rooms.open(1, PAGE, 2.0)
    rank.send_all(1, 3.0)
    room = rank.rooms.table[1]
    assert room.state is state
    if state is RoomState.FAILED:
        assert "takes 2 chunks of at most 96 bytes, and a room has at most 1; raise --tpla-chunk-bytes" in room.reason
        assert [type(message) for message in rank.said("a")] == [messages.Abort] and not rank.lanes.ready


def test_a_chunk_is_repeated_when_the_first_rank_of_its_host_is_done_and_gone() -> None:
    """A lane follows its first rank; if that rank has all chunks and leaves, it must not hold up the others."""
    rank = Rank("a", "b")
    rank.rooms.open(1, PAGE, 0.0)
    for name in ("a", "b"):
        rank.hear(name, request(2))
        rank.hear(name, messages.Credit(1, 5, 10 * CHUNK_BYTES))
    rank.send_all(1)
    assert rank.chunks() == [(0, ["a"]), (1, ["b"])]
    rank.hear("a", messages.Stored(1, 5, 0, 0, 64))
    rank.hear("b", messages.Stored(1, 5, 0, 1, 128))
    rank.out.take()
    rank.hear("a", messages.Done(1, 5))
    gone = rank.peers.pop(b"a")
    rank.rooms.lost(gone, "closed", 1.0)
    assert not rank.rooms.table[1].state.ended
    rank.hear("b", messages.Nack(1, 5, 0, 0))  # b could no longer read the memory of a
    assert rank.chunks() == [(0, ["b"])]
    rank.hear("b", messages.Done(1, 5))
    assert rank.rooms.table[1].state is RoomState.SUCCESS


def test_an_abort_that_comes_before_its_room_counts_once_and_not_for_ever() -> None:
    ended = EndedRooms()
    ended.abort_early(1, "a", 5, "changed its mind", now=10.0)
    ended.abort_early(2, "a", 6, "changed its mind", now=11.0)
    ended.expire(30.5, 20.0)
    assert ended.take_early_aborts(1) == {}
    assert ended.take_early_aborts(2) == {"a": (6, "changed its mind")}
    assert ended.take_early_aborts(2) == {}


def test_each_agent_is_told_once_why_a_room_failed_that_it_had_not_spoken_of() -> None:
    ended = EndedRooms()
    ended.fail_unbound(1, {"a"}, "too long", now=0.0)
    assert ended.failed_unbound(1, "a") is None
    assert ended.failed_unbound(1, "b") == "too long"
    assert ended.failed_unbound(1, "b") is None


def test_requests_for_rooms_that_nobody_has_opened_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for one rank. The next request is refused, until a room is opened or given up."""
    monkeypatch.setattr(rooms, "MAX_EARLY_REQUESTS", 2)
    rank = Rank("a", "b")

    def ask(name: str, room_id: int) -> list[Any]:
        rank.hear(name, msgspec.structs.replace(request(1), room=room_id))
        return rank.said(name)

    assert [ask("a", room_id) for room_id in (1, 2)] == [[], []]
    (refusal,) = ask("a", 3)
    assert refusal.room == 3 and "has 2 requests for rooms that no prefill request" in refusal.reason
    assert ask("b", 3) == []
    rank.rooms.open(1, PAGE, 1.0)
    assert ask("a", 4) == [] and len(ask("a", 5)) == 1
    rank.hear("a", messages.Abort(4, 5, "no longer wanted"))
    assert ask("a", 6) == []
