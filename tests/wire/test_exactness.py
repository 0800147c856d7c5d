"""Received rows equal the sent rows, raw ones to the bit and projected ones by the formula, for every T and P."""

import socket

import numpy as np
import pytest
import torch

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [1, 4, 63, 200])
def test_raw_rows_arrive_to_the_bit(dtype: torch.dtype, tokens: int, host: str | None) -> None:
    prefill, decode = rig.prefill_rank(dtype), rig.decode_rank(None, dtype, host=host)
    with rig.serving(prefill, decode):
        count = -(-tokens // rig.PAGE)
        source, destination = rig.pages(1, count), rig.pages(2, count)
        untouched = rig.pages(2, rig.PAGES)[count:]
        prefill.agent.open_room(5)
        rig.ask(decode, [prefill.peer], 5, destination)
        rig.send(prefill, 5, source, tokens=tokens, metadata_row=6)
        rig.succeed(5, prefill, decode)
        rig.check_rows(prefill, decode, source, destination, tokens)
        assert decode.metadata.read(3) == prefill.metadata.read(6)
        for layer in decode.pool.layers:
            assert not layer[torch.from_numpy(decode.pool.slots(untouched))].view(torch.uint8).any()
        row_bytes = rig.LAYERS * (rig.LATENT + rig.ROPE) * dtype.itemsize
        for metric in (prefill.agent.metric(5), decode.agent.metric(5)):
            moved = (metric.wire_bytes, metric.shared_memory_bytes)
            assert moved == (tokens * row_bytes, tokens * row_bytes if host is None else 0)


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("prefills", [1, 2])
def test_every_rank_gets_its_slice(prefills: int, ranks: int, groups: int, host: str | None) -> None:
    senders = [rig.prefill_rank(rank=rank) for rank in range(prefills)]
    receivers = [
        rig.decode_rank(rig.projection(rank % groups) if groups > 1 else None, rank=rank, size=ranks, host=host)
        for rank in range(ranks)
    ]
    with rig.serving(*senders, *receivers):
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
            rig.send(sender, 9, source, (16, 24), tokens=40 * rig.PAGE - 3, metadata_row=1)
        rig.succeed(9, *senders, *receivers)
        for rank, receiver in enumerate(receivers):
            sender = senders[served_by[rank]]
            rig.check_rows(sender, receiver, source, targets[rank], 40 * rig.PAGE - 3)
            assert receiver.metadata.read(3) == sender.metadata.read(1)


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize(("groups", "shared"), [(1, 0), (2, 16), (2, 0), (4, 16), (8, 8)])
def test_every_byte_travels_once_to_a_host(groups: int, shared: int, host: str | None) -> None:
    """Eight ranks of one host get the shared columns and the rope once, and each group's own columns once."""
    width = shared + (rig.LATENT - shared) // groups
    prefill = rig.prefill_rank()
    ranks = [
        rig.decode_rank(
            rig.projection(rank % groups, width, shared) if groups > 1 else None, rank=rank, size=8, host=host
        )
        for rank in range(8)
    ]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=20, cuts=(12,))
        metric = prefill.agent.metric(1)
        per_token = metric.wire_bytes / (2 * rig.LAYERS * 20 * rig.PAGE)
        once = rig.LATENT + rig.ROPE if groups == 1 else shared + groups * (width - shared) + rig.ROPE
        apart = 8 * ((rig.LATENT if groups == 1 else width) + rig.ROPE)
        assert per_token == (apart if host == "" else once)
        assert metric.shared_memory_bytes == (metric.wire_bytes if host is None else 0)
        rig.wait(lambda: all(rank.agent.stats().staging_used_bytes == 0 for rank in ranks), "segments to be free")


@pytest.mark.parametrize("host", rig.HOSTS)
def test_prefill_ranks_share_the_sending(host: str | None) -> None:
    senders = [rig.prefill_rank(rank=rank) for rank in range(2)]
    ranks = [rig.decode_rank(rig.projection(rank % 2), rank=rank, size=4, host=host) for rank in range(4)]
    with rig.serving(*senders, *ranks):
        rig.transfer(senders, ranks, count=30)
        moved = [sender.agent.metric(1).wire_bytes for sender in senders]
        assert min(moved) > 0.3 * max(moved)
        if host != "":
            assert sum(moved) == 2 * rig.LAYERS * 30 * rig.PAGE * (16 + 2 * 24 + rig.ROPE)


def test_cached_prefix_is_announced_and_not_sent(prefill: rig.PrefillRank, decode: rig.DecodeRank) -> None:
    source, destination = rig.pages(1, 6), rig.pages(2, 6)
    prefill.agent.open_room(2)
    rig.ask(decode, [prefill.peer], 2, destination, prefix=32)
    rig.wait(lambda: prefill.agent.poll(2) == RoomState.WAITING, "the request")
    assert prefill.agent.prefix_tokens(2) == 32
    rig.send(prefill, 2, source)
    rig.succeed(2, decode)
    rig.check_rows(prefill, decode, source, destination, 24)


def test_everything_cached_sends_the_metadata_row_alone(prefill: rig.PrefillRank, decode: rig.DecodeRank) -> None:
    nothing = np.empty(0, dtype=np.int32)
    prefill.agent.open_room(2)
    rig.ask(decode, [prefill.peer], 2, nothing, prefix=32)
    prefill.agent.send(2, nothing, last=True, metadata_row=4)
    rig.succeed(2, prefill, decode)
    assert decode.metadata.read(3) == prefill.metadata.read(4)


def test_rooms_to_an_all_dummy_prefill_rank_succeed_without_sending() -> None:
    sender, idle, decode = rig.prefill_rank(), rig.prefill_rank(rank=1), rig.decode_rank()
    with rig.serving(sender, idle, decode):
        source, destination = rig.pages(1, 6), rig.pages(2, 6)
        for item in (sender, idle):
            item.agent.open_room(4)
        rig.ask(decode, [sender.peer, (*idle.agent.address, True)], 4, destination)
        for item in (sender, idle):
            rig.send(item, 4, source)
        rig.succeed(4, sender, idle, decode)
        assert idle.agent.stats().wire_bytes == 0
        rig.check_rows(sender, decode, source, destination, 24)


def test_a_dummy_prefill_rank_that_never_answers_is_not_waited_for_after_it_is_given_up() -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode), socket.create_server(("127.0.0.1", 0)) as silent:
        source, destination = rig.pages(1, 6), rig.pages(2, 6)
        prefill.agent.open_room(4)
        rig.ask(decode, [prefill.peer, (*silent.getsockname(), True)], 4, destination)
        rig.send(prefill, 4, source)
        rig.wait(lambda: decode.agent.metric(4).tokens == 24, "the last message")
        assert decode.agent.poll(4) == RoomState.TRANSFERRING
        rig.wait(lambda: decode.agent.stats().peers_lost == 1, "the end of the silent rank's patience")
        rig.wait(lambda: decode.agent.poll(4).ended, "the room's end", timeout_s=10.0)  # long before its deadline
        rig.succeed(4, prefill, decode)
        rig.check_rows(prefill, decode, source, destination, 24)


@pytest.mark.parametrize("host", rig.HOSTS)
def test_many_rooms_at_once_stay_within_staging(host: str | None) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host=host)
    limit = rig.SETTINGS.staging_bytes
    with rig.serving(prefill, decode):
        rooms = range(100, 132)
        for room in rooms:
            prefill.agent.open_room(room)
            decode.agent.open_room(room, [prefill.peer])
        for index, room in enumerate(rooms):
            # three pages a room, so that no two rooms share slots
            target = np.arange(3 * index, 3 * index + 3, dtype=np.int32)
            rig.wait(lambda room=room: decode.agent.poll(room) == RoomState.WAITING, "registration")
            decode.agent.request(room, target, metadata_row=index % 8, expected_ranks=1)
        for index, room in enumerate(rooms):
            rig.send(prefill, room, rig.pages(index, 3))
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
            rig.close(room, prefill, decode)
        rig.idle(prefill, decode)
