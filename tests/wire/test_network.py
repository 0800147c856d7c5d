"""A bad network: each room ends right to the last bit or fails with a reason, and the next request is right."""

import contextlib
import random
from collections.abc import Iterator

import pytest

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig
from tests.wire.proxy import FaultProxy, Spoiler

pytestmark = [
    pytest.mark.usefixtures("rows_kind"),  # each test runs with plain and with sketched rows
    pytest.mark.parametrize("decode", [None, "far"], ids=["near", "far"], indirect=True),
]


PAGES = 90  # 29 KiB a layer: a dozen chunks


@pytest.fixture
def proxy(prefill: rig.PrefillRank) -> Iterator[FaultProxy]:
    with contextlib.closing(rig.through(prefill)) as item:
        yield item


def begin(prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank, room: int) -> None:
    """Open a room and hand over its first half."""
    prefill.agent.open_room(room)
    rig.ask(decode, [proxy.peer], room, rig.pages(room, PAGES))
    prefill.agent.send(room, rig.pages(room + 1, PAGES)[:40], last=False)


def finish(prefill: rig.PrefillRank, decode: rig.DecodeRank, room: int) -> None:
    """Hand over the other half, and check the whole room."""
    prefill.agent.send(room, rig.pages(room + 1, PAGES)[40:], last=True, metadata_row=2)
    rig.succeed(room, decode, prefill)
    rig.check_rows(prefill, decode, rig.pages(room + 1, PAGES), rig.pages(room, PAGES), PAGES * rig.PAGE)
    assert decode.metadata.read(3) == prefill.metadata.read(2)
    rig.close(room, prefill, decode)


def at_rest(*items: rig.PrefillRank | rig.DecodeRank) -> None:
    """Check that nothing is left, and that both threads live."""
    rig.idle(*items)
    assert all(item.agent.stats().threads_alive == 2 for item in items)


def test_cut_connections_are_taken_up_again(
    prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank
) -> None:
    moments = random.Random(7)
    for room in range(20):
        begin(prefill, proxy, decode, room)
        start, wait_for = proxy.forwarded_bytes, moments.randrange(1, 12000)
        if decode.agent.metric(room).shared_memory_bytes == 0:
            rig.wait(lambda s=start, w=wait_for: proxy.forwarded_bytes - s > min(w, 500), "some bytes")
        proxy.cut()
        finish(prefill, decode, room)
    assert decode.agent.stats().resumed >= 15
    at_rest(prefill, decode)


def test_network_away_for_less_than_the_timeout(
    prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank
) -> None:
    begin(prefill, proxy, decode, 1)
    proxy.refusing = True
    proxy.cut()
    rig.wait(lambda: decode.agent.stats().peers == 0, "the break to be seen")
    proxy.refusing = False
    finish(prefill, decode, 1)
    at_rest(prefill, decode)


@pytest.mark.parametrize("how", ["cut", "half open"])
def test_network_away_for_longer_than_the_timeout(
    how: str, prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank
) -> None:
    begin(prefill, proxy, decode, 1)
    rig.wait(lambda: decode.agent.metric(1).chunks > 0, "a chunk")
    if how == "cut":
        proxy.refusing = True
        proxy.cut()
    else:
        proxy.flowing.clear()
    rig.fail(1, "did not come back for 2 s" if how == "cut" else "", decode)
    rig.fail(1, "was lost: no sign of life for 2 s" if how == "cut" else "", prefill)
    if how == "cut":
        proxy.refusing = False
    else:
        proxy.cut()
        proxy.flowing.set()
    rig.close(1, prefill, decode)
    begin(prefill, proxy, decode, 2)
    finish(prefill, decode, 2)
    at_rest(prefill, decode)


def test_flipped_bit_in_the_greeting(prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank) -> None:
    """Damage while a connection is re-established harms no later request: a spoiled name once looked like a restart."""
    for round_, position in enumerate(range(100, 180, 5)):
        begin(prefill, proxy, decode, 2 * round_)
        passed = 0

        def tamper(data: bytes, position: int = position) -> bytes:
            nonlocal passed
            at, passed = position - passed, passed + len(data)
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data

        proxy.tamper = tamper
        proxy.cut()
        prefill.agent.send(2 * round_, rig.pages(2 * round_ + 1, PAGES)[40:], last=True, metadata_row=2)
        rig.ended(decode.agent, 2 * round_)
        proxy.tamper = None
        proxy.cut()
        rig.close(2 * round_, decode, prefill)
        begin(prefill, proxy, decode, 2 * round_ + 1)
        finish(prefill, decode, 2 * round_ + 1)
    at_rest(prefill, decode)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that are made from now on fail a room after 3 s without progress."""
    monkeypatch.setattr(rig, "SETTINGS", rig.settings(transfer_timeout_s=3.0))


@pytest.mark.usefixtures("impatient")
def test_spoiled_streams(prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank) -> None:
    """Twenty rooms go through a proxy that spoils one piece in fifty, either way, four rooms for each kind of damage:
    damaged payloads are asked for again, and broken framing breaks the connection.
    """
    right = spoiled = 0
    for room in range(20):
        kind = ("drop", "duplicate", "reorder", "truncate", "flip")[room % 5]
        begin(prefill, proxy, decode, room)
        down, up = Spoiler(kind, 2 * room, 0.02), Spoiler(kind, 2 * room + 1, 0.02)
        proxy.tamper, proxy.tamper_up = down, up
        prefill.agent.send(room, rig.pages(room + 1, PAGES)[40:], last=True, metadata_row=2)
        if rig.ended(decode.agent, room) == RoomState.SUCCESS:  # otherwise the room failed in time
            right += 1
            rig.check_rows(prefill, decode, rig.pages(room + 1, PAGES), rig.pages(room, PAGES), PAGES * rig.PAGE)
            assert decode.metadata.read(3) == prefill.metadata.read(2)
        proxy.tamper = proxy.tamper_up = None
        proxy.cut()  # otherwise ranks would wait for a spoiled greeting until the timeout
        spoiled += down.spoiled + up.spoiled
        decode.agent.close_room(room)
        rig.ended(prefill.agent, room)
        prefill.agent.close_room(room)
    assert right > 10
    assert spoiled > 0
    proxy.cut()
    begin(prefill, proxy, decode, 100)
    finish(prefill, decode, 100)
    at_rest(prefill, decode)
