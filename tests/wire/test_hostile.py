"""Frames that no agent would send: each is counted and answered or dropped, and nothing else happens."""

import contextlib
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.room import RoomState
from tests.wire import rig
from tests.wire.fakes import TOKEN, FakeDecode, FakePrefill, hello, welcome

DIGEST = messages.checksum(b"")


@pytest.fixture(scope="module")
def prefill() -> Iterator[rig.PrefillRank]:
    item = rig.prefill_rank(peer_timeout_s=5.0)
    with contextlib.closing(item.agent):
        yield item


@pytest.fixture
def fake(prefill: rig.PrefillRank) -> Iterator[FakeDecode]:
    with contextlib.closing(FakeDecode(prefill.agent.address[1])) as item:
        yield item


@pytest.fixture
def decode(rows_kind: str) -> Iterator[rig.DecodeRank]:
    item = rig.decode_rank(rig.even_rows(), peer_timeout_s=5.0)
    with rig.serving(item):
        yield item


@pytest.fixture
def server() -> Iterator[FakePrefill]:
    """A fake prefill rank for ``decode``."""
    with contextlib.closing(FakePrefill()) as item:
        yield item


def still_serves(prefill: rig.PrefillRank) -> None:
    """Check that a whole transfer to a new decode rank is right, and that both threads live."""
    decode = rig.decode_rank()
    with contextlib.closing(decode.agent):
        rig.transfer(prefill, decode, 12345, count=9)
        prefill.agent.close_room(12345)
    assert prefill.agent.stats().threads_alive == 2
    assert prefill.agent.stats().internal_errors == 0


GOOD = messages.encode(messages.Request(1, 2, 1, 0, -1, False, 0, 1))
MALFORMED = {
    "empty": [b""],
    "text": [b"hello"],
    "prefix alone": [messages.PREFIX],
    "truncated": [GOOD[:-1]],
    "longer": [GOOD + b"\x00"],
    "unknown tag": [messages.seal(b"\x92\x7f\x01")],
    "no tag": [messages.seal(b"\x90")],
    "a map": [messages.seal(b"\x80")],
    "wrong type": [messages.seal(b"\x99\x08\xa1x\x02\x01\x00\xff\xc2\x00\x01")],
    "negative room": [messages.seal(b"\x99\x08\xff\x02\x01\x00\xff\xc2\x00\x01")],
    "one field more": [messages.seal(b"\x9a\x08\x01\x02\x01\x00\xff\xc2\x00\x01\x00")],
    "damaged framing version": [b"TPLA\x09" + GOOD[5:]],
    "damaged field": [GOOD[:-1] + b"\x02"],
    "payload that must not be": [GOOD, b"payload"],
    "no payload": [messages.encode(messages.ProjectionLayer("x", 0, DIGEST))],
    "three frames": [GOOD, b"", b""],
    "a thousand frames": [GOOD] * 1000,
    "a header too large": [messages.seal(b"\x91" + b"\x00" * messages.MAX_HEADER_BYTES)],
    "deep nesting": [messages.seal(b"\x91" * 5000)],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_frame_at_prefill(what: str, prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    fake.register()
    before = prefill.agent.stats().malformed_dropped
    fake.send(*MALFORMED[what])
    fake.say(messages.Ping(77))
    assert fake.expect(messages.Pong)[0] == messages.Pong(77)
    assert prefill.agent.stats().malformed_dropped == before + 1


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_frame_at_decode(what: str, decode: rig.DecodeRank, server: FakePrefill) -> None:
    decode.agent.open_room(1, [server.peer])
    server.welcome()
    rig.wait(lambda: decode.agent.poll(1) == RoomState.WAITING, "registration")
    server.send(*MALFORMED[what])
    server.say(messages.Ping(78))
    assert server.expect(messages.Pong) == messages.Pong(78)
    assert decode.agent.stats().malformed_dropped == 1
    assert decode.agent.poll(1) == RoomState.WAITING


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_a_rank_that_does_not_say_what_it_can_read_is_asked_again(fake: FakeDecode, host: str) -> None:
    fake.register(host=host)
    asked = [fake.expect(messages.Colocated)[0] for _ in range(3)]
    assert len({message.number for message in asked}) == 1
    fake.say(messages.Mapped(asked[0].number, ()))
    fake.say(messages.Ping(3))
    fake.expect(messages.Pong)
    assert not fake.socket.poll(500)  # five heartbeats


def test_another_framing_version_is_refused_at_prefill(prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    before = prefill.agent.stats().refused
    fake.send(messages.seal(msgspec.msgpack.encode(hello()), version=9))
    (refusal, _) = fake.expect(messages.Refused)
    assert "framing version is 2; got 9: run the same release on both sides" in refusal.reason
    assert prefill.agent.stats().refused == before + 1


def test_another_framing_version_is_refused_at_decode(decode: rig.DecodeRank, server: FakePrefill) -> None:
    decode.agent.open_room(1, [server.peer])
    server.expect(messages.Hello)
    server.send(messages.seal(msgspec.msgpack.encode(messages.Ping(1)), version=9))
    rig.fail(1, "framing version is 2; got 9: run the same release on both sides", decode)
    assert decode.agent.stats().refused == 1


@pytest.mark.parametrize("versions", [(8, 9), (1, 2), (4, 4)])
def test_protocol_versions_without_a_common_one(
    versions: tuple[int, int], prefill: rig.PrefillRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode agent of another release is refused with the same reason on both sides, and leaves no room behind."""
    with monkeypatch.context() as patch:
        patch.setattr(messages, "PROTOCOL_VERSIONS", versions)
        decode = rig.decode_rank()
    said = f"prefill speaks 5 to 5, decode {versions[0]} to {versions[1]}; run the same release on both sides"
    with contextlib.closing(decode.agent):
        before = prefill.agent.stats().refused
        decode.agent.open_room(1, [prefill.peer])
        rig.fail(1, said, decode)
        assert (prefill.agent.stats().refused, decode.agent.stats().refused) == (before + 1, 1)
        decode.agent.close_room(1)
        assert decode.agent.stats().rooms == 0
    still_serves(prefill)


def test_credit_of_a_broken_connection_is_void(prefill: rig.PrefillRank) -> None:
    """Rows that are handed over between a rank's Hello and its Resume wait for credit that counts from Resume."""
    prefill.agent.open_room(60)
    request = messages.Request(60, 5, 1, 0, -1, False, 0, 1)
    with contextlib.closing(FakeDecode(prefill.agent.address[1])) as before:
        before.register(agent="comes back")
        before.say(messages.Mapped(0, ()))
        before.say(request)
        prefill.agent.send(60, rig.pages(1, 8), last=False)
        before.say(messages.Credit(60, 5, 10**6))
        before.expect(messages.Chunk)
    with contextlib.closing(FakeDecode(prefill.agent.address[1])) as after:
        after.register(agent="comes back")
        after.say(messages.Mapped(0, ()))
        prefill.agent.send(60, rig.pages(2, 8), last=True, metadata_row=0)
        after.say(messages.Ping(1))
        seen = [after.read()[0] for _ in range(2)]
        while seen[-1] != messages.Pong(1):
            seen.append(after.read()[0])
        rig.wait(lambda: prefill.agent.workers.work._waiters, "the worker to have nothing to do")
        after.say(messages.Ping(2))
        while seen[-1] != messages.Pong(2):
            seen.append(after.read()[0])
        assert not any(isinstance(message, messages.Chunk) for message in seen), seen
        after.say(request)
        after.say(messages.Resume(60, 5, 0, ()))
        after.say(messages.Credit(60, 5, 10**6))
        after.expect(messages.Chunk)
    prefill.agent.close_room(60)


def test_unknown_peer_is_told_to_register(prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    before = prefill.agent.stats().unknown_peer
    fake.say(messages.Request(1, 2, 1, 0, -1, False, 0, 1))
    assert fake.read()[0] == messages.Unregistered()
    assert prefill.agent.stats().unknown_peer == before + 1


def test_oversized_message_ends_its_own_connection_only(prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    fake.register()
    fake.send(GOOD, bytes(messages.MAX_PROJECTION_BYTES + 1))
    still_serves(prefill)


def test_half_a_pair_that_speculates_is_refused(fake: FakeDecode) -> None:
    """A draft model brings a layer and wider metadata rows. The rank names the reason that says what to do."""
    plain = hello().layout
    more = msgspec.structs.replace(
        plain,
        widths=(*plain.widths, rig.LATENT),
        shared=(*plain.shared, rig.LATENT),
        metadata_bytes=(*plain.metadata_bytes, 64),
    )
    fake.say(hello(layout=more))
    message, _ = fake.expect(messages.Refused)
    layers = rig.LAYERS
    assert f"speculative decoding: prefill holds {layers} layers, decode {layers + 1}" in message.reason
    assert "--speculative-algorithm to both or to neither" in message.reason


def test_projection_with_another_hash_is_refused(prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    z = rig.projection(0)
    layout = messages.CacheLayout(
        0, rig.LATENT, rig.ROPE, "bfloat16", rig.PAGE, z.widths, tuple(z.shared), rig.ITEM_BYTES
    )
    fake.register(layout=layout, projection="0" * 64)
    for index, data in enumerate(z.layer_bytes):
        fake.say(messages.ProjectionLayer("0" * 64, index, messages.checksum(data)), data)
    assert "does not have the hash 000000000000" in fake.expect(messages.Refused)[0].reason


@pytest.mark.parametrize("name", ["", "identity"])
def test_a_projection_is_not_used_for_other_rows_than_its_own(prefill: rig.PrefillRank, name: str) -> None:
    """A rank that names another's projection, or that of ranks without one, sends its own for rows of other widths."""
    owner = rig.decode_rank(rig.projection(0))
    with (
        contextlib.closing(owner.agent),
        contextlib.closing(FakeDecode(prefill.agent.address[1])) as fake,
    ):
        rig.transfer(prefill, owner, 77, count=1)
        rig.close(77, prefill, owner)
        other = rig.projection(0, width=30, shared=10)
        layout = msgspec.structs.replace(hello().layout, widths=other.widths, shared=tuple(other.shared))
        named = name or owner.projection.content_hash
        fake.say(hello(layout=layout, projection=named))
        assert fake.expect(messages.Welcome)[0].need_projection
        for index, data in enumerate(other.layer_bytes):
            fake.say(messages.ProjectionLayer(named, index, messages.checksum(data)), data)
        assert f"does not have the hash {named[:12]}" in fake.expect(messages.Refused)[0].reason


def test_replays_and_late_messages_are_counted(prefill: rig.PrefillRank, fake: FakeDecode) -> None:
    fake.register()
    before = prefill.agent.stats()
    fake.say(messages.Request(1, 5, 1, 0, -1, False, 0, 1))
    fake.say(messages.Request(1, 5, 1, 0, -1, False, 0, 1))
    fake.say(messages.Request(1, 4, 1, 0, -1, False, 0, 1))
    for message in (messages.Ack(1, 5, 0, 0), messages.Credit(9, 9, 9), messages.Done(1, 4), messages.Nack(2, 2, 0, 2)):
        fake.say(message)
    fake.say(messages.Ping(1))
    fake.expect(messages.Pong)
    after = prefill.agent.stats()
    assert after.replays_dropped - before.replays_dropped == 2
    assert after.late_dropped - before.late_dropped == 4
    fake.say(messages.Abort(1, 5, "enough"))


def serve(fake: FakePrefill, decode: rig.DecodeRank, room: int, wanted: int) -> messages.Request:
    """Let a decode agent ask the fake for two pages and grant it credit."""
    decode.agent.open_room(room, [fake.peer])
    if not fake.identity:
        fake.welcome()
    rig.wait(lambda: decode.agent.poll(room) == RoomState.WAITING, "registration")
    decode.agent.request(room, rig.pages(1, 2), metadata_row=0, expected_ranks=1)
    request = fake.expect(messages.Request)
    fake.say(messages.Want(room, request.generation, wanted))
    fake.expect(messages.Credit)
    return request


def chunk(request: messages.Request, payload: bytes, sequence: int = 0, **changes: object) -> messages.Chunk:
    """Make a sound chunk of one layer and four tokens, then change it."""
    fields = {
        "room": request.room,
        "generation": request.generation,
        "part": 0,
        "sequence": sequence,
        "relay": False,
        "first_layer": 0,
        "layers": 1,
        "first_token": 0,
        "tokens": 4,
        "checksum": messages.checksum(payload),
    }
    return messages.Chunk(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"first_layer": 2, "layers": 2}, "for layers 2...3 of 3"),
        ({"first_token": 5}, "for tokens up to 9 where pages hold 8"),
        ({"tokens": 3}, "of {4} bytes where {3} were due"),
        ({"part": 9}, "with unknown part 9"),
    ],
)
def test_chunk_outside_what_was_asked_fails_its_room(
    changes: dict, said: str, decode: rig.DecodeRank, server: FakePrefill
) -> None:
    payload = bytes(4 * decode.row_bytes)
    request = serve(server, decode, 1, 4 * decode.row_bytes)
    server.say(chunk(request, payload, **changes), payload)
    said = said.format(*(rows * decode.row_bytes for rows in range(5)))
    rig.fail(1, said, decode)
    assert said in server.expect(messages.Abort).reason


def test_a_second_welcome_does_not_fail_a_room_whose_rows_are_on_their_way(
    decode: rig.DecodeRank, server: FakePrefill
) -> None:
    """A room fails once its writes have ended. What prompts a prefill rank takes counts before rows are asked for."""
    decode.agent.open_room(1, [server.peer], prompt_tokens=40)
    server.welcome()
    rig.wait(lambda: decode.agent.poll(1) == RoomState.WAITING, "registration")
    decode.agent.request(1, rig.pages(1, 10), metadata_row=3, expected_ranks=1)
    server.expect(messages.Request)
    offer = messages.DataChannel(server.server.getsockname()[1], TOKEN, None)
    server.say(welcome(offer, context_tokens=39))
    server.say(messages.Ping(7))
    server.expect(messages.Pong)
    assert decode.agent.poll(1) == RoomState.TRANSFERRING, decode.agent.failure(1)
    decode.agent.close_room(1)
    decode.agent.open_room(2, [server.peer], prompt_tokens=40)
    rig.fail(2, "a prompt of 40 tokens does not fit", decode)


def test_chunk_beyond_its_credit_fails_its_room(decode: rig.DecodeRank, server: FakePrefill) -> None:
    payload = bytes(4 * decode.row_bytes)
    request = serve(server, decode, 1, 4 * decode.row_bytes - 1)
    server.say(chunk(request, payload), payload)
    rig.fail(1, f"beyond its credit of {4 * decode.row_bytes - 1} bytes", decode)


def test_damaged_replayed_late_and_unordered_chunks(decode: rig.DecodeRank, server: FakePrefill) -> None:
    late = serve(server, decode, 1, 4 * decode.row_bytes)
    decode.agent.close_room(1)
    request = serve(server, decode, 1, 36 * decode.row_bytes)
    payload, other = (bytes(range(256)) * 8)[: 12 * decode.row_bytes], bytes(12 * decode.row_bytes)
    server.say(chunk(late, other), other)  # a chunk of the generation before
    whole = {"layers": rig.LAYERS, "first_token": 4}
    server.say(chunk(request, payload, 1, checksum=DIGEST, **whole), payload)
    assert server.expect(messages.Nack) == messages.Nack(1, request.generation, 0, 1)
    server.say(messages.Want(1, request.generation, 48 * decode.row_bytes))
    server.expect(messages.Credit)
    server.say(chunk(request, payload, 1, **whole), payload)
    server.expect(messages.Ack)
    server.say(chunk(request, other, 1, **whole), other)  # a repeat with other rows
    server.say(chunk(request, payload, 0, layers=rig.LAYERS), payload)
    server.expect(messages.Ack)
    row = bytes(sum(rig.ITEM_BYTES))
    server.say(messages.Finish(1, request.generation, 2, 8, messages.checksum(row)), row)
    server.expect(messages.Done)
    assert rig.ended(decode.agent, 1) == RoomState.SUCCESS
    slots = decode.pool.slots(rig.pages(1, 2))
    for layer in range(rig.LAYERS):
        got = decode.pool.layers[layer][slots].view(torch.uint8).numpy().tobytes()
        assert got == payload[4 * layer * decode.row_bytes :][: 4 * decode.row_bytes] * 2
    stats = decode.agent.stats()
    assert (stats.checksum_failures, stats.late_dropped, stats.replays_dropped) == (1, 1, 1)
    assert stats.staging_used_bytes == 0


ALL = {"layers": rig.LAYERS}


@pytest.mark.parametrize(
    ("chunks", "announced", "said"),
    [
        ([(4, ALL)], 1, "12 of 24 rows were not among the chunks that the prefill ranks announced (first: row of"),
        ([(4, ALL)], 1, "row of layer 0, token 4)"),
        ([(4, ALL), (4, {"layers": 2, "first_token": 4})], 2, "4 of 24 rows were not among"),
        ([(8, ALL), (1, {"first_token": 7})], 2, "covers the row of layer 0, token 7, which another chunk had"),
        ([(4, ALL), (8, ALL)], 2, "covers the row of layer 0, token 0, which another chunk had"),
        ([], 0, "24 of 24 rows were not among the chunks"),
    ],
)
def test_chunks_that_are_not_the_request_once_fail_its_room(
    chunks: list[tuple[int, dict[str, int]]], announced: int, said: str, decode: rig.DecodeRank, server: FakePrefill
) -> None:
    """Each chunk by itself is sound, and there are as many as Finish says."""
    row = bytes(sum(rig.ITEM_BYTES))
    request = serve(server, decode, 1, 48 * decode.row_bytes)
    server.say(messages.Finish(1, request.generation, announced, 8, messages.checksum(row)), row)
    for sequence, (tokens, changes) in enumerate(chunks):
        payload = bytes(tokens * changes.get("layers", 1) * decode.row_bytes)
        server.say(chunk(request, payload, sequence, tokens=tokens, **changes), payload)
    rig.fail(1, said, decode)
    assert said in server.expect(messages.Abort).reason


def test_a_damaged_chunk_that_comes_again_for_other_rows_fails_its_room(
    decode: rig.DecodeRank, server: FakePrefill
) -> None:
    request, payload = serve(server, decode, 1, 12 * decode.row_bytes), bytes(4 * decode.row_bytes)
    server.say(chunk(request, payload, checksum=DIGEST), payload)
    server.expect(messages.Nack)
    server.say(chunk(request, payload, first_token=4), payload)
    rig.fail(1, "anew for other rows", decode)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"", f"a metadata row of 0 bytes where {sum(rig.ITEM_BYTES)} were due"),
        (bytes(sum(rig.ITEM_BYTES)), "metadata that does not match its checksum"),
    ],
)
def test_metadata_that_is_not_whole_and_sound_fails_its_room(
    row: bytes, said: str, decode: rig.DecodeRank, server: FakePrefill
) -> None:
    request = serve(server, decode, 1, 4 * decode.row_bytes)
    server.say(messages.Finish(1, request.generation, 0, 8, DIGEST), row)
    rig.fail(1, said, decode)


numbers = st.integers(0, 2**31 - 1) | st.integers(0, 3)
words = st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=16) | words,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(max_size=200)
    | st.builds(messages.seal, st.binary(max_size=200))
    | st.builds(
        lambda tag, body: messages.seal(msgspec.msgpack.encode([tag, *body])),
        st.integers(0, 20),
        st.lists(anything, max_size=11),
    ),
    payload=st.none() | st.binary(max_size=64),
)
def test_random_frames_end_nothing(
    prefill: rig.PrefillRank, fake: FakeDecode, header: bytes, payload: bytes | None
) -> None:
    fake.say(hello())
    fake.send(header, *([] if payload is None else [payload]))
    fake.say(hello())
    fake.say(messages.Ping(5))
    fake.expect(messages.Pong)
    stats = prefill.agent.stats()
    assert stats.threads_alive == 2
    assert stats.internal_errors == 0


def test_random_frames_leave_the_prefill_rank_serving(prefill: rig.PrefillRank) -> None:
    still_serves(prefill)
