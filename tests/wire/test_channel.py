"""The data channel: chunks travel on no other way, no stranger gets in, and a rank without a channel is told why."""

import contextlib
import socket

import pytest

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.network.data_channel import PREAMBLE, SIZES
from sglang_tpla.transfer.room import TransferError
from tests.ports import neighbouring_ports
from tests.wire import rig
from tests.wire.fakes import FakeDecode, FakePrefill, hello
from tests.wire.proxy import FaultProxy

pytestmark = pytest.mark.usefixtures("rows_kind")  # each test runs with plain and with sketched rows

PAGES = 90


def payload_bytes(decode: rig.DecodeRank) -> int:
    """Return the fewest bytes that the rows of a transfer take on the wire."""
    return PAGES * rig.PAGE * sum(layer[0].nbytes for layer in decode.pool.layers)


def knock(prefill: rig.PrefillRank, *said: bytes) -> socket.socket:
    """Open a stranger's connection to the port of data channels."""
    stream = socket.create_connection(("127.0.0.1", rig.data_port(prefill)))
    stream.settimeout(10)
    for data in said:
        stream.sendall(data)
    return stream


def test_chunks_travel_on_the_channel_alone(prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy) -> None:
    with contextlib.closing(FaultProxy(prefill.agent.address[1])) as control:
        far.agent.connect("127.0.0.1", control.port)
        rig.wait(lambda: prefill.agent.router.listener._channels, "the channel")
        prefill.agent.open_room(1)
        rig.ask(far, [control.peer], 1, rig.pages(1, PAGES))
        before = control.forwarded_bytes  # these include a projection
        rig.send(prefill, 1, rig.pages(2, PAGES))
        rig.succeed(1, far)
        rig.check_rows(prefill, far, rig.pages(2, PAGES), rig.pages(1, PAGES), PAGES * rig.PAGE)
        assert data.forwarded_bytes > payload_bytes(far)
        assert control.forwarded_bytes - before < payload_bytes(far) / 8


def test_the_channel_comes_to_the_port_after_the_advertised_one() -> None:
    """Address translation maps two neighbouring ports of a rank to two neighbouring ones outside."""
    inside, outside = neighbouring_ports(2), neighbouring_ports(2)
    prefill, decode = rig.prefill_rank(port=inside, advertised_port=outside), rig.decode_rank(host="far")
    with rig.serving(prefill, decode), contextlib.closing(FaultProxy(inside, inside + 1, outside)) as translation:
        decode.agent.connect("127.0.0.1", outside)
        rig.wait(lambda: prefill.agent.router.listener._channels, "the channel")
        prefill.agent.open_room(1)
        rig.ask(decode, [("127.0.0.1", outside, False)], 1, rig.pages(1, PAGES))
        rig.send(prefill, 1, rig.pages(2, PAGES))
        rig.succeed(1, prefill, decode)
        rig.check_rows(prefill, decode, rig.pages(2, PAGES), rig.pages(1, PAGES), PAGES * rig.PAGE)
        assert translation.forwarded_bytes > payload_bytes(decode)
        assert prefill.agent.stats().refused == 0


def test_a_channel_that_ends_between_rooms_is_opened_again(
    prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy
) -> None:
    for room in (1, 2, 3, 4):
        rig.transfer(prefill, far, room)
        assert data.forwarded_bytes > room * payload_bytes(far)  # none went over ZMQ
        data.cut()
        rig.wait(lambda room=room: far.agent.stats().resumed == room, "the connection")
        (connection,) = far.agent.connections.table.values()
        new = [connection.identity]  # not the identity of the connection that was cut
        rig.wait(lambda new=new: list(prefill.agent.router.listener._channels) == new, "the channel")


def test_a_port_that_hangs_up_on_everybody_fails_rooms_with_the_reason(
    prefill: rig.PrefillRank, far: rig.DecodeRank, data: FaultProxy
) -> None:
    data.refusing = True
    fails(prefill, far, 1, " by ")  # closed or reset
    data.refusing = False
    rig.transfer(prefill, far, 2)


def fails(prefill: rig.PrefillRank, decode: rig.DecodeRank, room: int, why: str) -> None:
    """Check that a room whose rows cannot be fetched fails soon on both sides, with a reason that says what to do."""
    rig.begin([prefill], [decode], room, rig.pages(room + 1, PAGES), [rig.pages(room, PAGES)])
    for said in ("its data channel, port", "failed for 2 s", why, "let decode servers reach"):
        rig.fail(room, said, decode, prefill)
    assert decode.agent.stats().staging_used_bytes == prefill.agent.stats().staging_used_bytes == 0


def test_a_port_that_nobody_reaches_fails_rooms_with_the_reason(
    prefill: rig.PrefillRank, far: rig.DecodeRank, decode: rig.DecodeRank
) -> None:
    real = rig.data_port(prefill, neighbouring_ports(1))
    fails(prefill, far, 1, "Connection refused")
    rig.transfer(prefill, decode, 2)  # by shared memory
    assert decode.agent.stats().resumed == 0
    rig.data_port(prefill, real)
    rig.transfer(prefill, far, 3)


def test_a_data_port_that_is_taken_is_no_start() -> None:
    port = neighbouring_ports(2)
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        pytest.raises(TransferError, match=f"cannot listen on 127.0.0.1:{port + 1}, .*free the port after {port}"),
    ):
        rig.prefill_rank(port=port)


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n", PREAMBLE + bytes(16), PREAMBLE[:4] + b"\xff" + bytes(16), b"T" + bytes(3)],
    ids=["another protocol", "a token of nobody", "another version", "damaged"],
)
def test_strangers_are_turned_away_and_counted(prefill: rig.PrefillRank, far: rig.DecodeRank, said: bytes) -> None:
    before = prefill.agent.stats().refused
    with knock(prefill, said) as stream:
        with contextlib.suppress(ConnectionResetError):
            assert stream.recv(1) == b""
        rig.wait(lambda: prefill.agent.stats().refused == before + 1, "the refusal to be counted")
    rig.transfer(prefill, far)


def test_strangers_who_say_nothing_do_not_stay(prefill: rig.PrefillRank) -> None:
    with knock(prefill) as silent, knock(prefill, PREAMBLE) as slow:
        assert silent.recv(1) == slow.recv(1) == b""  # after peer_timeout_s
    rig.wait(lambda: prefill.agent.stats().refused == 2, "both to be counted")


def test_a_token_serves_once_and_ends_with_its_connection(prefill: rig.PrefillRank) -> None:
    with contextlib.closing(FakeDecode(prefill.agent.address[1])) as fake:
        fake.say(hello(host="far"))
        welcome = fake.expect(messages.Welcome)[0]
        with knock(prefill, PREAMBLE + welcome.data.token) as first:
            rig.wait(lambda: prefill.agent.router.listener._channels, "the channel")
            with knock(prefill, PREAMBLE + welcome.data.token) as second:
                assert second.recv(1) == b""
            fake.say(messages.Goodbye("enough"))
            assert first.recv(1) == b""
        fake.say(hello(host="far"))
        token = fake.expect(messages.Welcome)[0].data.token
        fake.say(messages.Goodbye("enough"))
        rig.wait(lambda: prefill.agent.stats().peers == 0, "the goodbye")
        with knock(prefill, PREAMBLE + token) as late:
            assert late.recv(1) == b""
    rig.wait(lambda: prefill.agent.stats().refused == 2, "both to be counted")


GOOD = messages.encode(messages.Chunk(1, 1, 0, 0, False, 0, 1, 0, 1, messages.checksum(b"")))
PING = messages.encode(messages.Ping(1))
HOSTILE = {
    "sizes": SIZES.pack(2**32 - 1, 2**32 - 1),
    "more than a chunk": SIZES.pack(len(GOOD), rig.SETTINGS.chunk_bytes + 1) + GOOD,
    "a header that is none": SIZES.pack(20, 1) + bytes(21),
    "another message": SIZES.pack(len(PING), 1) + PING + b"x",
}


@pytest.mark.parametrize("said", HOSTILE.values(), ids=HOSTILE)
def test_what_no_prefill_rank_would_send_ends_the_channel(said: bytes) -> None:
    decode = rig.decode_rank(peer_timeout_s=5.0)
    with rig.serving(decode), contextlib.closing(FakePrefill()) as fake:
        decode.agent.connect("127.0.0.1", fake.port)
        fake.welcome()
        stream = fake.channel()
        stream.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            assert stream.recv(1) == b""
        fake.welcome()  # on a new connection
        rig.wait(lambda: decode.agent.stats().peers == 1, "the connection to go on")
        fake.expect(messages.Ping)
        assert decode.agent.stats().malformed_dropped == 1
        assert decode.agent.stats().internal_errors == 0
        assert decode.agent.stats().threads_alive == 2
