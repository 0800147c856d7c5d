"""A bad network: what was begun is finished to the last bit or fails with a reason, and the next request is
right.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig
from tests.wire.proxy import FaultProxy, Spoiler

pytestmark = pytest.mark.usefixtures("rows_kind")  # each test with plain and with sketched rows


PAGES = 90  # 29 KiB a layer: a dozen chunks


@pytest.fixture
def prefill() -> Iterator[rig.PrefillRank]:
    item = rig.prefill_rank()
    with contextlib.closing(item.agent):
        yield item


@pytest.fixture
def proxy(prefill: rig.PrefillRank) -> Iterator[FaultProxy]:
    with contextlib.closing(rig.through(prefill)) as item:
        yield item


@pytest.fixture(params=[None, "far"], ids=["near", "far"])
def decode(request: pytest.FixtureRequest) -> Iterator[rig.DecodeRank]:
    item = rig.decode_rank(host=request.param)
    with contextlib.closing(item.agent):
        yield item


def begin(prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank, room: int) -> None:
    """Half of a room."""
    prefill.agent.open_room(room)
    rig.ask(decode, [proxy.peer], room, rig.pages(room, PAGES))
    prefill.agent.send(room, rig.pages(room + 1, PAGES)[:40], last=False)


def finish(prefill: rig.PrefillRank, decode: rig.DecodeRank, room: int) -> None:
    """The other half, and a check of all of it."""
    prefill.agent.send(room, rig.pages(room + 1, PAGES)[40:], last=True, metadata_row=2)
    assert rig.ended(decode.agent, room) == RoomState.SUCCESS, decode.agent.failure(room)
    assert rig.ended(prefill.agent, room) == RoomState.SUCCESS, prefill.agent.failure(room)
    rig.check_rows(prefill, decode, rig.pages(room + 1, PAGES), rig.pages(room, PAGES), PAGES * rig.PAGE)
    assert decode.metadata.read(3) == prefill.metadata.read(2)
    for item in (prefill, decode):
        item.agent.close_room(room)


def at_rest(*items: rig.PrefillRank | rig.DecodeRank) -> None:
    """Nothing is left, and both threads live."""
    for item in items:
        rig.wait(lambda agent=item.agent: agent.stats().staging_used_bytes == 0, "staging to be free")
        stats = item.agent.stats()
        assert (stats.rooms, stats.threads_alive, stats.internal_errors) == (0, 2, 0)


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


def test_network_away_for_longer_than_the_timeout(
    prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank
) -> None:
    begin(prefill, proxy, decode, 1)
    rig.wait(lambda: decode.agent.metric(1).chunks > 0, "a chunk")
    proxy.refusing = True
    proxy.cut()
    assert rig.ended(decode.agent, 1) == RoomState.FAILED
    assert "did not come back for 2 s" in decode.agent.failure(1)
    assert rig.ended(prefill.agent, 1) == RoomState.FAILED
    assert "was lost: no sign of life for 2 s" in prefill.agent.failure(1)
    for item in (prefill, decode):
        item.agent.close_room(1)
    proxy.refusing = False
    begin(prefill, proxy, decode, 2)
    finish(prefill, decode, 2)
    at_rest(prefill, decode)


def test_half_open_connection(prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank) -> None:
    begin(prefill, proxy, decode, 1)
    rig.wait(lambda: decode.agent.metric(1).chunks > 0, "a chunk")
    proxy.flowing.clear()
    assert rig.ended(decode.agent, 1) == RoomState.FAILED
    assert rig.ended(prefill.agent, 1) == RoomState.FAILED
    proxy.cut()
    proxy.flowing.set()
    for item in (prefill, decode):
        item.agent.close_room(1)
    begin(prefill, proxy, decode, 2)
    finish(prefill, decode, 2)
    at_rest(prefill, decode)


def test_flipped_bit_in_the_greeting(
    prefill: rig.PrefillRank, proxy: FaultProxy, decode: rig.DecodeRank
) -> None:
    """Damage while a connection is taken up again harms no later request: a spoiled name once looked like a restart."""
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
        for item in (decode, prefill):
            item.agent.close_room(2 * round_)
        begin(prefill, proxy, decode, 2 * round_ + 1)
        finish(prefill, decode, 2 * round_ + 1)
    at_rest(prefill, decode)


@pytest.mark.parametrize("host", [None, "far"], ids=["near", "far"])
def test_spoiled_streams(host: str | None) -> None:
    """Damage anywhere in the streams: payloads are asked for again, broken framing breaks the connection."""
    prefill, decode = (
        rig.prefill_rank(transfer_timeout_s=3.0),
        rig.decode_rank(host=host, transfer_timeout_s=3.0),
    )
    with contextlib.ExitStack() as stack:
        for item in (prefill, decode):
            stack.enter_context(contextlib.closing(item.agent))
        damage(prefill, decode, stack.enter_context(contextlib.closing(rig.through(prefill))))


def damage(prefill: rig.PrefillRank, decode: rig.DecodeRank, proxy: FaultProxy) -> None:
    """Twenty rooms through a proxy that spoils one piece in fifty, either way, four rooms for each kind of damage."""
    right = spoiled = 0
    for room in range(20):
        kind = ("drop", "duplicate", "reorder", "truncate", "flip")[room % 5]
        begin(prefill, proxy, decode, room)
        down, up = Spoiler(kind, 2 * room, 0.02), Spoiler(kind, 2 * room + 1, 0.02)
        proxy.tamper, proxy.tamper_up = down, up
        prefill.agent.send(room, rig.pages(room + 1, PAGES)[40:], last=True, metadata_row=2)
        if rig.ended(decode.agent, room) == RoomState.SUCCESS:  # else it failed in time: never a wrong row
            right += 1
            rig.check_rows(
                prefill, decode, rig.pages(room + 1, PAGES), rig.pages(room, PAGES), PAGES * rig.PAGE
            )
            assert decode.metadata.read(3) == prefill.metadata.read(2)
        proxy.tamper = proxy.tamper_up = None
        proxy.cut()  # a spoiled greeting would be waited for until the timeout
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
