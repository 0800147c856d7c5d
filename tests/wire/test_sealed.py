"""Transfers with keys through a network that reads, changes, repeats and breaks: rows stay secret and right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from sglang_tpla.transfer import keys, messages
from sglang_tpla.transfer.network import data_listener, sealing
from sglang_tpla.transfer.network.security import KEYS_VARIABLE, Security
from sglang_tpla.transfer.room import RoomState
from tests.wire import rig
from tests.wire.fakes import FakePrefill
from tests.wire.proxy import FaultProxy
from tests.wire.test_channel import PAGES, payload_bytes, transfer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys, named by the environment."""
    keys.main([str(tmp_path / "keys")])
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys that were handed out."""
    handed: list[bytes] = []

    def make() -> bytes:
        handed.append(sealing.new_key())
        return handed[-1]

    monkeypatch.setattr(data_listener, "new_key", make)
    return handed


@pytest.fixture
def prefill() -> Iterator[rig.PrefillRank]:
    item = rig.prefill_rank()
    with contextlib.closing(item.agent):
        yield item


@pytest.fixture
def decode() -> Iterator[rig.DecodeRank]:
    item = rig.decode_rank(host="far")
    with contextlib.closing(item.agent):
        yield item


@pytest.fixture
def data(prefill: rig.PrefillRank) -> Iterator[FaultProxy]:
    """The network that data channels go through."""
    with contextlib.closing(FaultProxy(rig.data_port(prefill))) as proxy:
        rig.data_port(prefill, proxy.port)
        yield proxy


class Once:
    """Does something to one piece of bytes, some pieces after the first."""

    def __init__(self, spoil: object, after: int = 5) -> None:
        self.spoil, self.left = spoil, after
        self.done = 0

    def __call__(self, piece: bytes) -> bytes:
        self.left -= 1
        if self.left or len(piece) < 200:
            self.left += self.left == 0
            return piece
        self.done += 1
        return self.spoil(piece)


def test_whoever_listens_reads_no_rows_and_no_headers(
    prefill: rig.PrefillRank, decode: rig.DecodeRank, data: FaultProxy
) -> None:
    heard: list[bytes] = []
    data.tamper = lambda piece: heard.append(piece) or piece
    transfer(prefill, decode, 1)
    said = b"".join(heard)
    assert len(said) > payload_bytes(decode)
    for agent in (prefill.agent, decode.agent):
        assert agent.stats().data_channels == agent.stats().sealed_channels == 1
    assert messages.PREFIX not in said
    rows = prefill.pool.layers[0][prefill.pool.slots(rig.pages(2, PAGES))].view(torch.uint8).numpy()
    assert not any(row.tobytes()[:16] in said for row in rows)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda piece: bytes([*piece[:100], piece[100] ^ 1, *piece[101:]]),
        lambda piece: piece + piece,
        lambda piece: piece[100:] + piece[:100],
        lambda piece: piece[:-50],
        lambda piece: piece + b"more",
        lambda piece: b"",
    ],
    ids=["a flipped bit", "repeated", "changed places", "cut", "more", "left out"],
)
def test_what_the_network_changes_does_not_count(
    spoil: object, prefill: rig.PrefillRank, decode: rig.DecodeRank, data: FaultProxy
) -> None:
    data.tamper = once = Once(spoil)
    transfer(prefill, decode, 1)
    assert once.done == 1
    stats = decode.agent.stats()
    assert stats.checksum_failures + stats.malformed_dropped + stats.resumed > 0
    assert stats.internal_errors == prefill.agent.stats().internal_errors == 0


def test_each_channel_has_a_key_of_its_own(
    prefill: rig.PrefillRank, decode: rig.DecodeRank, data: FaultProxy, given: list[bytes]
) -> None:
    for room in (1, 2, 3):
        transfer(prefill, decode, room)
        data.cut()
        rig.wait(lambda room=room: decode.agent.stats().resumed == room, "the connection")
    transfer(prefill, decode, 4)
    assert len(given) == len(set(given)) >= 4
    assert {len(key) for key in given} == {32}


def test_keys_that_do_not_go_together_fail_rooms_with_the_reason(
    prefill: rig.PrefillRank, decode: rig.DecodeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = data_listener.DataListener.offer

    def mixed_up(listener: data_listener.DataListener, identity: bytes) -> messages.DataChannel:
        good = offer(listener, identity)
        return messages.DataChannel(good.port, good.token, sealing.new_key())

    with monkeypatch.context() as patch:
        patch.setattr(data_listener.DataListener, "offer", mixed_up)
        prefill.agent.open_room(1)
        rig.ask(decode, [prefill.peer], 1, rig.pages(1, 9))
        prefill.agent.send(1, rig.pages(2, 9), last=True, metadata_row=0)
        assert rig.ended(decode.agent, 1) == RoomState.FAILED
        assert "the header of chunk 0 of a sealed channel does not open: it has another key" in (
            decode.agent.failure(1)
        )
        assert rig.ended(prefill.agent, 1) == RoomState.FAILED
    assert decode.agent.stats().malformed_dropped > 0
    rig.wait(lambda: decode.agent.stats().peers == 1, "the connection")
    transfer(prefill, decode, 2)


def test_a_decode_rank_with_keys_takes_no_channel_without_one(
    folder: Path, decode: rig.DecodeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    security, socket = Security.from_environment("prefill"), zmq.Context.socket

    def with_keys(context: zmq.Context, kind: int) -> zmq.Socket:
        made = socket(context, kind)
        if kind == zmq.ROUTER:
            security.apply_server(made)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(zmq.Context, "socket", with_keys)
        fake = FakePrefill()
    with contextlib.closing(fake):
        decode.agent.open_room(1, [fake.peer])
        fake.welcome()
        assert rig.ended(decode.agent, 1) == RoomState.FAILED
        assert "offers a data channel without a key" in decode.agent.failure(1)


@pytest.mark.parametrize("hosts", [("far",) * 4, ("far", "far", "away", "away"), (None, None, "far", "far")])
@pytest.mark.parametrize("fp8", [False, True])
def test_ranks_of_two_groups_get_their_slices(
    hosts: tuple[str | None, ...], fp8: bool, prefill: rig.PrefillRank
) -> None:
    """Chunks that travel once to a host, and are read there by its other ranks, by checksum."""
    decodes = [
        rig.decode_rank(rig.projection(rank % 2, 48), rank=rank, size=4, host=host, fp8=fp8)
        for rank, host in enumerate(hosts)
    ]
    with contextlib.ExitStack() as stack:
        for decode in decodes:
            stack.enter_context(contextlib.closing(decode.agent))
        for room in (1, 2):
            prefill.agent.open_room(room)
            for decode in decodes:
                rig.ask(decode, [prefill.peer], room, rig.pages(room, 20), expected=4)
            prefill.agent.send(room, rig.pages(room + 1, 20), last=True, metadata_row=0)
            for decode in decodes:
                assert rig.ended(decode.agent, room) == RoomState.SUCCESS, decode.agent.failure(room)
                rig.check_rows(prefill, decode, rig.pages(room + 1, 20), rig.pages(room, 20), 20 * rig.PAGE)
        assert sum(decode.agent.stats().checksum_failures for decode in decodes) == 0
