"""The wire format to the byte, and the refusal of other bytes."""

import msgspec
import pytest
import xxhash

from sglang_tpla.transfer import messages

DIGEST = bytes(range(8))
# These are the arrays; a header is HEAD, the array's digest and the array. A changed byte is a new protocol version.
HEAD = "54504c4102"
GOLDEN = [
    (
        messages.Hello(
            versions=(1, 1),
            agent="a1",
            model_hash="m1",
            rank=3,
            size=8,
            host="h1",
            max_chunk_bytes=4194304,
            layout=messages.CacheLayout(
                first_layer=0,
                latent_dim=512,
                rope_dim=64,
                dtype="bfloat16",
                page_size=64,
                widths=(320, 288),
                shared=(128, 64),
                metadata_bytes=(64, 512),
            ),
            projection="p1",
            common="c1",
            segment=messages.Segment(agent="a1", pid=77, descriptor=5, size_bytes=268435456, token=DIGEST),
        ),
        "9c01920101a26131a26d310308a26831ce004000009800cd020040a862666c6f617431364092cd0140cd012092cc80409240cd0200a27031a2633195a261314d05ce10000000c4080001020304050607",
    ),
    (
        messages.Welcome(
            version=3,
            agent="a2",
            host="h1",
            first_layer=0,
            layers=61,
            need_projection=False,
            segment=None,
            data=messages.DataChannel(port=30001, token=bytes(range(16)), key=bytes(range(32))),
            age_ms=1000,
            context_tokens=4096,
            pool_tokens=65536,
        ),
        "9c0203a26132a26831003dc2c093cd7531c410000102030405060708090a0b0c0d0e0f"
        "c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fcd03e8cd1000ce00010000",
    ),
    (messages.Refused(reason="no"), "9203a26e6f"),
    (messages.ProjectionLayer(projection="p1", index=60, checksum=DIGEST), "9404a270313cc4080001020304050607"),
    (messages.Ping(number=1), "920501"),
    (messages.Pong(number=1099511627776), "9206cf0000010000000000"),
    (messages.Unregistered(), "9107"),
    (
        messages.Request(
            room=9223372036854775807,
            generation=7,
            expected_ranks=8,
            prefix_tokens=64,
            num_tokens=-1,
            dummy=False,
            share_index=1,
            share_count=2,
        ),
        "9908cf7fffffffffffffff070840ffc20102",
    ),
    (messages.Want(room=1, generation=2, total_bytes=3), "9409010203"),
    (messages.Credit(room=1, generation=2, total_bytes=8589934592), "940a0102cf0000000200000000"),
    (
        messages.Chunk(
            room=1,
            generation=2,
            part=0,
            sequence=3,
            relay=True,
            first_layer=5,
            layers=6,
            first_token=7,
            tokens=8,
            checksum=DIGEST,
        ),
        "9b0b01020003c305060708c4080001020304050607",
    ),
    (messages.Ack(room=1, generation=2, part=0, sequence=4), "950c01020004"),
    (messages.Nack(room=1, generation=2, part=1, sequence=3), "950d01020103"),
    (messages.Finish(room=1, generation=2, chunks=3, tokens=4, checksum=DIGEST), "960e01020304c4080001020304050607"),
    (messages.Done(room=1, generation=2), "930f0102"),
    (messages.Abort(room=1, generation=2, reason="why"), "94100102a3776879"),
    (messages.Registered(projection="p1"), "9211a27031"),
    (messages.Goodbye(reason="bye"), "9212a3627965"),
    (
        messages.Colocated(
            number=3, segments=(messages.Segment(agent="a3", pid=78, descriptor=6, size_bytes=268435456, token=DIGEST),)
        ),
        "9313039195a261334e06ce10000000c4080001020304050607",
    ),
    (messages.Mapped(number=3, agents=("a2", "a3")), "93140392a26132a26133"),
    (
        messages.Share(
            room=1,
            generation=2,
            part=1,
            sequence=3,
            first_layer=5,
            layers=6,
            first_token=7,
            tokens=8,
            checksum=DIGEST,
            agent="a3",
            offset=1048576,
            size_bytes=4096,
        ),
        "9d150102010305060708c4080001020304050607a26133ce00100000cd1000",
    ),
    (messages.Stored(room=1, generation=2, part=1, sequence=3, offset=1048576), "961601020103ce00100000"),
    (messages.Release(offsets=(0, 1048576)), "92179200ce00100000"),
    (
        messages.Resume(room=1, generation=2, credit_bytes=4194304, applied=((0, b"\x07"), (2, b"\x01\x80"))),
        "95180102ce00400000929200c401079202c4020180",
    ),
    (messages.Expected(rooms=(1, 9223372036854775807)), "92199201cf7fffffffffffffff"),
    (messages.Capacity(context_tokens=4096, pool_tokens=65536), "931acd1000ce00010000"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda item: type(item).__name__)
def test_golden_bytes(message: messages.Message, golden: str) -> None:
    body = bytes.fromhex(golden)
    header = bytes.fromhex(HEAD) + xxhash.xxh3_64(body, seed=2).digest() + body
    assert messages.encode(message) == header
    has_payload = isinstance(message, messages.WITH_PAYLOAD)
    assert messages.decode(header, has_payload) == message


def test_golden_bytes_of_an_offer_without_a_key() -> None:
    offer = messages.DataChannel(port=30001, token=bytes(range(16)), key=None)
    assert msgspec.msgpack.encode(offer).hex() == "93cd7531c410000102030405060708090a0b0c0d0e0fc0"
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([1, bytes(16), bytes(16)]), type=messages.DataChannel)


def test_golden_header() -> None:
    assert messages.encode(messages.Ping(number=1)).hex() == "54504c41024837781e65543da4920501"


def test_any_flipped_bit_is_seen() -> None:
    """A header is read as it was written or not at all, even if the bit is in the digest or before the array."""
    header = messages.encode(GOLDEN[10][0])
    for bit in range(8 * len(header)):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(messages.FrameError):
            messages.decode(bytes(damaged), True)


def test_every_message_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(messages.Message.__args__)
    tags = [msgspec.msgpack.decode(bytes.fromhex(golden))[0] for _, golden in GOLDEN]
    assert sorted(tags) == list(range(1, len(GOLDEN) + 1))


def test_checksum_is_xxh3() -> None:
    assert messages.checksum(b"").hex() == "2d06800538d394c2"  # from the algorithm's own test vectors


def test_refused_is_read_in_any_framing_version() -> None:
    data = messages.seal(msgspec.msgpack.encode(messages.Refused("speak 9")), version=9)
    assert messages.decode(data, False) == messages.Refused("speak 9")
    data = messages.seal(msgspec.msgpack.encode(messages.Ping(1)), version=9)
    with pytest.raises(messages.FramingVersionError, match="framing version is 2; got 9"):
        messages.decode(data, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no prompt", "no prompt"),
        ("x" * 3000, "x" * 2045 + "..."),
        ("a half character \ud800, which JSON has", "a half character \\ud800, which JSON has"),
        ("\ud800" * 2048, "\\ud800" * 340 + "\\ud80..."),
    ],
)
def test_any_reason_can_be_sent(text: str, said: str) -> None:
    message = messages.Abort(1, 2, messages.sentence(text))
    assert message.reason == said
    assert messages.decode(messages.encode(message), False) == message


@pytest.mark.parametrize(
    ("header", "payload", "said"),
    [
        (b"", False, "starts with"),
        (b"GET / HTTP/1.1", False, "starts with"),
        (messages.encode(messages.Ping(1)), True, "comes without a payload"),
        (messages.encode(messages.Finish(1, 2, 3, 4, DIGEST)), False, "comes with a payload"),
        (messages.encode(messages.Ping(1)) + b"\x00", False, "damaged"),
        (messages.seal(msgspec.msgpack.encode(messages.Ping(1)) + b"\x00"), False, "trailing"),
        (messages.seal(msgspec.msgpack.encode([5, -1])), False, "malformed"),
        (messages.seal(msgspec.msgpack.encode([5, 1.5])), False, "malformed"),
        (messages.seal(msgspec.msgpack.encode([23, []])), False, "malformed"),
        (messages.seal(msgspec.msgpack.encode([3, "x" * 3000])), False, "malformed"),
        (messages.seal(msgspec.msgpack.encode([15, 1, 2, 3])), False, "malformed"),
        (messages.PREFIX + bytes(messages.MAX_HEADER_BYTES), False, "at most"),
    ],
)
def test_what_is_not_a_frame(header: bytes, payload: bool, said: str) -> None:
    with pytest.raises(messages.FrameError, match=said):
        messages.decode(header, payload)
