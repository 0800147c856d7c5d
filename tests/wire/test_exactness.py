"""Rows that arrive are those that were sent: raw to the bit, projected by the formula, for every T and P."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig

HOSTS = [None, "far", ""]  # memory shared with prefill, among decode ranks only, not at all


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [1, 4, 63, 200])
def test_raw_rows_arrive_to_the_bit(dtype: torch.dtype, tokens: int, host: str | None) -> None:
    prefill, decode = rig.prefill_rank(dtype), rig.decode_rank(None, dtype, host=host)
    with contextlib.closing(prefill.agent), contextlib.closing(decode.agent):
        count = -(-tokens // rig.PAGE)
        source, destination = rig.pages(1, count), rig.pages(2, count)
        untouched = rig.pages(2, rig.PAGES)[count:]
        prefill.agent.open_room(5)
        rig.ask(decode, [prefill.peer], 5, destination)
        prefill.agent.send(5, source, last=True, metadata_row=6, num_tokens=tokens)
        assert rig.ended(decode.agent, 5) == RoomState.SUCCESS, decode.agent.failure(5)
        assert rig.ended(prefill.agent, 5) == RoomState.SUCCESS, prefill.agent.failure(5)
        rig.check_rows(prefill, decode, source, destination, tokens)
        assert decode.metadata.read(3) == prefill.metadata.read(6)
        for layer in decode.pool.layers:
            assert not layer[torch.from_numpy(decode.pool.slots(untouched))].view(torch.uint8).any()
        row_bytes = rig.LAYERS * (rig.LATENT + rig.ROPE) * dtype.itemsize
        for metric in (prefill.agent.metric(5), decode.agent.metric(5)):
            moved = (metric.wire_bytes, metric.shared_memory_bytes)
            assert moved == (tokens * row_bytes, tokens * row_bytes if host is None else 0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("prefills", [1, 2])
def test_every_rank_gets_its_slice(prefills: int, ranks: int, groups: int, host: str | None) -> None:
    senders = [rig.prefill_rank(rank=rank) for rank in range(prefills)]
    receivers = [
        rig.decode_rank(
            rig.projection(rank % groups) if groups > 1 else None, rank=rank, size=ranks, host=host
        )
        for rank in range(ranks)
    ]
    with contextlib.ExitStack() as stack:
        for item in (*senders, *receivers):
            stack.enter_context(contextlib.closing(item.agent))
        source = rig.pages(3, 40)
        targets = [rig.pages(10 + rank, 40) for rank in range(ranks)]
        for sender in senders:
            sender.agent.open_room(9)
        served_by = [rank * prefills // ranks if ranks >= prefills else 0 for rank in range(ranks)]
        for rank, receiver in enumerate(receivers):
            peers = [
                (*sender.agent.address, index != served_by[rank])
                for index, sender in enumerate(senders)
                if index == served_by[rank] or ranks < prefills
            ]
            expected = served_by.count(served_by[rank]) if ranks >= prefills else ranks
            rig.ask(receiver, peers, 9, targets[rank], expected=expected)
        for sender in senders:
            rig.wait(lambda agent=sender.agent: agent.poll(9) == RoomState.WAITING, "all requests")
            sender.agent.send(9, source[:16], last=False)
            sender.agent.send(9, source[16:24], last=False)
            sender.agent.send(9, source[24:], last=True, metadata_row=1, num_tokens=16 * rig.PAGE - 3)
        for item in (*senders, *receivers):
            assert rig.ended(item.agent, 9) == RoomState.SUCCESS, item.agent.failure(9)
        for rank, receiver in enumerate(receivers):
            sender = senders[served_by[rank]]
            rig.check_rows(sender, receiver, source, targets[rank], 40 * rig.PAGE - 3)
            assert receiver.metadata.read(3) == sender.metadata.read(1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("groups", "shared"), [(1, 0), (2, 16), (2, 0), (4, 16), (8, 8)])
def test_every_byte_travels_once_to_a_host(groups: int, shared: int, host: str | None) -> None:
    """Eight ranks of one host: the shared columns and the rope once, each group's own columns once."""
    width = shared + (rig.LATENT - shared) // groups
    prefill = rig.prefill_rank()
    ranks = [
        rig.decode_rank(
            rig.projection(rank % groups, width, shared) if groups > 1 else None, rank=rank, size=8, host=host
        )
        for rank in range(8)
    ]
    with contextlib.ExitStack() as stack:
        for item in (prefill, *ranks):
            stack.enter_context(contextlib.closing(item.agent))
        prefill.agent.open_room(1)
        targets = [rig.pages(rank, 20) for rank in range(8)]
        for rank, target in zip(ranks, targets, strict=True):
            rig.ask(rank, [prefill.peer], 1, target, expected=8)
        source = rig.pages(50, 20)
        prefill.agent.send(1, source[:12], last=False)
        prefill.agent.send(1, source[12:], last=True, metadata_row=0)
        for item in (prefill, *ranks):
            assert rig.ended(item.agent, 1) == RoomState.SUCCESS, item.agent.failure(1)
        for rank, target in zip(ranks, targets, strict=True):
            rig.check_rows(prefill, rank, source, target, 20 * rig.PAGE)
        metric = prefill.agent.metric(1)
        per_token = metric.wire_bytes / (2 * rig.LAYERS * 20 * rig.PAGE)
        once = rig.LATENT + rig.ROPE if groups == 1 else shared + groups * (width - shared) + rig.ROPE
        apart = 8 * ((rig.LATENT if groups == 1 else width) + rig.ROPE)
        assert per_token == (apart if host == "" else once)
        assert metric.shared_memory_bytes == (metric.wire_bytes if host is None else 0)
        rig.wait(
            lambda: all(rank.agent.stats().staging_used_bytes == 0 for rank in ranks), "segments to be free"
        )


@pytest.mark.parametrize("host", HOSTS)
def test_prefill_ranks_share_the_sending(host: str | None) -> None:
    senders = [rig.prefill_rank(rank=rank) for rank in range(2)]
    ranks = [rig.decode_rank(rig.projection(rank % 2), rank=rank, size=4, host=host) for rank in range(4)]
    with contextlib.ExitStack() as stack:
        for item in (*senders, *ranks):
            stack.enter_context(contextlib.closing(item.agent))
        targets = [rig.pages(rank, 30) for rank in range(4)]
        for sender in senders:
            sender.agent.open_room(1)
        for rank, target in zip(ranks, targets, strict=True):
            rig.ask(rank, [sender.peer for sender in senders], 1, target, expected=4)
        for sender in senders:
            sender.agent.send(1, rig.pages(50, 30), last=True, metadata_row=0)
        for item in (*senders, *ranks):
            assert rig.ended(item.agent, 1) == RoomState.SUCCESS, item.agent.failure(1)
        for rank, target in zip(ranks, targets, strict=True):
            rig.check_rows(senders[0], rank, rig.pages(50, 30), target, 30 * rig.PAGE)
        moved = [sender.agent.metric(1).wire_bytes for sender in senders]
        assert min(moved) > 0.3 * max(moved)
        if host != "":
            assert sum(moved) == 2 * rig.LAYERS * 30 * rig.PAGE * (16 + 2 * 24 + rig.ROPE)


def test_cached_prefix_is_announced_and_not_sent() -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with contextlib.closing(prefill.agent), contextlib.closing(decode.agent):
        source, destination = rig.pages(1, 6), rig.pages(2, 6)
        prefill.agent.open_room(2)
        rig.ask(decode, [prefill.peer], 2, destination, prefix=32)
        rig.wait(lambda: prefill.agent.poll(2) == RoomState.WAITING, "the request")
        assert prefill.agent.prefix_tokens(2) == 32
        prefill.agent.send(2, source, last=True, metadata_row=0)
        assert rig.ended(decode.agent, 2) == RoomState.SUCCESS
        rig.check_rows(prefill, decode, source, destination, 24)


def test_everything_cached_sends_the_metadata_row_alone() -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with contextlib.closing(prefill.agent), contextlib.closing(decode.agent):
        nothing = np.empty(0, dtype=np.int32)
        prefill.agent.open_room(2)
        rig.ask(decode, [prefill.peer], 2, nothing, prefix=32)
        prefill.agent.send(2, nothing, last=True, metadata_row=4)
        assert rig.ended(decode.agent, 2) == RoomState.SUCCESS
        assert rig.ended(prefill.agent, 2) == RoomState.SUCCESS
        assert decode.metadata.read(3) == prefill.metadata.read(4)


def test_rooms_to_an_all_dummy_prefill_rank_succeed_without_sending() -> None:
    sender, idle, decode = rig.prefill_rank(), rig.prefill_rank(rank=1), rig.decode_rank()
    with contextlib.closing(sender.agent), contextlib.closing(idle.agent), contextlib.closing(decode.agent):
        source, destination = rig.pages(1, 6), rig.pages(2, 6)
        for item in (sender, idle):
            item.agent.open_room(4)
        rig.ask(decode, [sender.peer, (*idle.agent.address, True)], 4, destination)
        for item in (sender, idle):
            item.agent.send(4, source, last=True, metadata_row=0)
        for item in (sender, idle, decode):
            assert rig.ended(item.agent, 4) == RoomState.SUCCESS, item.agent.failure(4)
        assert idle.agent.stats().wire_bytes == 0
        rig.check_rows(sender, decode, source, destination, 24)


@pytest.mark.parametrize("host", HOSTS)
def test_many_rooms_at_once_stay_within_staging(host: str | None) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host=host)
    limit = rig.SETTINGS.staging_bytes
    with contextlib.closing(prefill.agent), contextlib.closing(decode.agent):
        rooms = range(100, 132)
        for room in rooms:
            prefill.agent.open_room(room)
            decode.agent.open_room(room, [prefill.peer])
        for index, room in enumerate(rooms):
            # three pages a room: every room has slots of its own
            target = np.arange(3 * index, 3 * index + 3, dtype=np.int32)
            rig.wait(lambda room=room: decode.agent.poll(room) == RoomState.WAITING, "registration")
            decode.agent.request(room, target, metadata_row=index % 8, expected_ranks=1)
        for index, room in enumerate(rooms):
            prefill.agent.send(room, rig.pages(index, 3), last=True, metadata_row=0)
        high = 0

        def all_ended() -> bool:
            nonlocal high
            for agent in (prefill.agent, decode.agent):
                high = max(high, agent.stats().staging_used_bytes)
            return all(decode.agent.poll(room).ended and prefill.agent.poll(room).ended for room in rooms)

        rig.wait(all_ended, "all rooms")
        assert high <= limit
        for index, room in enumerate(rooms):
            assert decode.agent.poll(room) == RoomState.SUCCESS
            target = np.arange(3 * index, 3 * index + 3, dtype=np.int32)
            rig.check_rows(prefill, decode, rig.pages(index, 3), target, 3 * rig.PAGE)
            prefill.agent.close_room(room)
            decode.agent.close_room(room)
        rig.wait(lambda: prefill.agent.stats().staging_used_bytes == 0, "staging to be free")
        assert prefill.agent.stats().rooms == decode.agent.stats().rooms == 0
        assert decode.agent.stats().staging_used_bytes == 0
