"""Rows that arrive are those that were sent: raw to the bit, projected by the formula, for every T and P."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from sglang_tpla.transfer.types import RoomState
from tests.wire import rig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [1, 4, 63, 200])
def test_raw_rows_arrive_to_the_bit(dtype: torch.dtype, tokens: int) -> None:
    prefill, decode = rig.prefill_rank(dtype), rig.decode_rank(None, dtype)
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
        assert prefill.agent.metric(5).wire_bytes == tokens * row_bytes
        assert decode.agent.metric(5).wire_bytes == tokens * row_bytes


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("prefills", [1, 2])
def test_every_rank_gets_its_slice(prefills: int, ranks: int, groups: int) -> None:
    if ranks % groups:
        pytest.skip("groups divide ranks")
    senders = [rig.prefill_rank(rank=rank, size=prefills) for rank in range(prefills)]
    receivers = [
        rig.decode_rank(rig.projection(rank % groups) if groups > 1 else None, rank=rank, size=ranks)
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


def test_ranks_of_a_group_share_one_projection() -> None:
    sender = rig.prefill_rank()
    receivers = [rig.decode_rank(rig.projection(0), rank=rank, size=4) for rank in range(4)]
    with contextlib.ExitStack() as stack:
        for item in (sender, *receivers):
            stack.enter_context(contextlib.closing(item.agent))
        sender.agent.open_room(1)
        for rank, receiver in enumerate(receivers):
            rig.ask(receiver, [sender.peer], 1, rig.pages(rank, 2), expected=4)
        sender.agent.send(1, rig.pages(50, 2), last=True, metadata_row=0)
        assert rig.ended(sender.agent, 1) == RoomState.SUCCESS
        stats = sender.agent.stats()
        assert stats.chunks == 4 * stats.projections_computed or stats.projections_computed <= 4
        assert stats.chunks >= 4


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
    sender, idle, decode = rig.prefill_rank(), rig.prefill_rank(rank=1, size=2), rig.decode_rank()
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


def test_many_rooms_at_once_stay_within_staging() -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
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
