"""Transfers with keys through a network that reads, changes, repeats and breaks: rows stay secret and right."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zmq

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.network import data_listener, sealing
from sglang_tpla.transfer.network.security import Security
from tests.wire import rig
from tests.wire.fakes import FakePrefill
from tests.wire.proxy import FaultProxy
from tests.wire.test_channel import PAGES, payload_bytes

pytestmark = pytest.mark.usefixtures("key_folder")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The list of the keys that are handed out."""
    handed: list[bytes] = []

    def make() -> bytes:
        handed.append(sealing.new_key())
        return handed[-1]

    monkeypatch.setattr(data_listener, "new_key", make)
    return handed


class Once:
    """Spoils one piece of bytes, some pieces after the first."""

    def __init__(self, spoil: object) -> None:
        self.spoil, self.left = spoil, 5
        self.done = 0

    def __call__(self, piece: bytes) -> bytes:
        self.left -= 1
        if self.left or len(piece) < 200:
            self.left += self.left == 0
            return piece
        self.done += 1
        return self.spoil(piece)


def test_whoever_listens_reads_no_rows_and_no_headers(
    prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy
) -> None:
    heard: list[bytes] = []
    data.tamper = lambda piece: heard.append(piece) or piece
    rig.transfer(prefill, far, 1)
    said = b"".join(heard)
    assert len(said) > payload_bytes(far)
    for agent in (prefill.agent, far.agent):
        assert agent.stats().data_channels == agent.stats().sealed_channels == 1
    assert messages.PREFIX not in said
    rows = prefill.pool.layers[0][prefill.pool.slots(rig.pages(51, PAGES))].view(torch.uint8).numpy()
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
    spoil: object, prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy
) -> None:
    data.tamper = once = Once(spoil)
    rig.transfer(prefill, far, 1)
    assert once.done == 1
    stats = far.agent.stats()
    assert stats.checksum_failures + stats.malformed_dropped + stats.resumed > 0
    assert stats.internal_errors == prefill.agent.stats().internal_errors == 0


def test_each_channel_has_a_key_of_its_own(
    prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy, given: list[bytes]
) -> None:
    for room in (1, 2, 3):
        rig.transfer(prefill, far, room)
        data.cut()
        rig.wait(lambda room=room: far.agent.stats().resumed == room, "the connection")
    rig.transfer(prefill, far, 4)
    assert len(given) == len(set(given)) >= 4
    assert {len(key) for key in given} == {32}


def test_keys_that_do_not_go_together_fail_rooms_with_the_reason(
    prefill: rig.PrefillRank, far: rig.DecodeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = data_listener.DataListener.offer

    def mixed_up(listener: data_listener.DataListener, identity: bytes) -> messages.DataChannel:
        good = offer(listener, identity)
        return messages.DataChannel(good.port, good.token, sealing.new_key())

    with monkeypatch.context() as patch:
        patch.setattr(data_listener.DataListener, "offer", mixed_up)
        rig.begin([prefill], [far], 1, rig.pages(2, 9), [rig.pages(1, 9)])
        rig.fail(1, "the header of chunk 0 of a sealed channel does not open: it has another key", far)
        rig.fail(1, "", prefill)
    assert far.agent.stats().malformed_dropped > 0
    rig.wait(lambda: far.agent.stats().peers == 1, "the connection")
    rig.transfer(prefill, far, 2)


def test_a_decode_rank_with_keys_takes_no_channel_without_one(
    key_folder: Path, far: rig.DecodeRank, monkeypatch: pytest.MonkeyPatch
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
        far.agent.open_room(1, [fake.peer])
        fake.welcome()
        rig.fail(1, "offers a data channel without a key", far)


@pytest.mark.parametrize("hosts", [("far",) * 4, ("far", "far", "away", "away"), (None, None, "far", "far")])
@pytest.mark.parametrize("make", [lambda group: rig.projection(group, 48), rig.sketched_projection])
def test_ranks_of_two_groups_get_their_slices(
    hosts: tuple[str | None, ...], make: Callable[[int], Projection], prefill: rig.PrefillRank
) -> None:
    """Chunks travel once to a host, where its other ranks read them from shared memory, checked by checksum."""
    decodes = [rig.decode_rank(make(rank % 2), rank=rank, size=4, host=host) for rank, host in enumerate(hosts)]
    with rig.serving(*decodes):
        for room in (1, 2):
            rig.transfer(prefill, decodes, room, count=20)
        assert sum(decode.agent.stats().checksum_failures for decode in decodes) == 0
