"""Sealed channels on a socket pair: the bytes on the wire, and that only sealed bytes open."""

import hashlib
import hmac
import socket
import struct
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sglang_tpla.transfer.memory import native
from sglang_tpla.transfer.messages import DAMAGED, OPENED, FrameError
from sglang_tpla.transfer.network import sealing
from sglang_tpla.transfer.network.data_channel import BufferPool, ChunkReader, OutgoingChunk, SendQueue
from sglang_tpla.transfer.network.sealing import Seal, new_key
from tests.unit.channel_ends import Pair, in_pieces, random_chunks, socket_pair

KEY = bytes(range(32))


@pytest.fixture(params=["in C", "in Python"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    if "Python" in request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    with socket_pair() as ends:
        yield ends


def chunk(header: bytes, payload: bytes, wanted: bool = True) -> OutgoingChunk:
    return OutgoingChunk(header, in_pieces(payload, 3), b"", wanted=lambda: wanted, done=lambda digest: None)


class InPlace:
    """Memory in pieces that receive chunks, as the pool does."""

    def __init__(self, size: int) -> None:
        self.memory = np.zeros(size, dtype=np.uint8)
        self.size_bytes = size

    def open_with(self, context: sealing.AEADDecryptionContext) -> None:
        self.intake = sealing.SealedIntake(in_pieces(self.memory, 3), context)

    def receive(self, stream: socket.socket) -> int:
        return self.intake.receive(stream)


def chunk_reader(stream: socket.socket, key: bytes = KEY, in_place: bool = False) -> ChunkReader:
    def announce(header: memoryview, size: int) -> tuple[bytes, InPlace | None]:
        return bytes(header), InPlace(size) if in_place else None

    reader = ChunkReader(stream, bytes(16), 1 << 20, BufferPool(), announce, Seal(key, 3))
    assert reader.greet()
    return reader


def sealed(chunks: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the bytes that the sending end writes for each chunk."""
    said = []
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        queue = SendQueue(near, Seal(KEY, 3))
        for header, payload in chunks:
            queue.push(chunk(header, payload))
            queue.flush()
            assert not queue
            said.append(far.recv(1 << 20))
    return said


def opened(stream: bytes, pair: Pair, key: bytes = KEY) -> list[tuple[bytes, bytes, bytes]]:
    """Return the chunks that the receiving end makes of bytes."""
    reader = chunk_reader(pair[1], key)
    pair[0].sendall(stream)
    return [(header, bytes(payload), tail) for header, payload, tail in reader.receive(1 << 30)]


CHUNKS = [(b"header of chunk %d" % n, b"rows of chunk %d" % n * (n + 1)) for n in range(8)]


def test_golden_bytes() -> None:
    """The first chunk's bytes are its sizes, header and tag, payload and tag."""
    (said,) = sealed([(b"a header of a chunk", b"rows")])
    assert said.hex() == (
        "0000001300000004"  # sizes: 19 and 4
        "6f9cddbbd448e6cf28c7cf15790cf2f1a72d3dc8d63808014a0973ac997e05a0c5893b67b9c88fa8027e7bff769c93bd13d159f48a6823"
    )


def test_the_wire_is_what_the_page_says() -> None:
    """This is PROTOCOL.md in one-shot AES-GCM and HMAC: nonces count up, and each key follows from the last."""
    key = KEY
    for number, ((header, payload), said) in enumerate(zip(CHUNKS, sealed(CHUNKS), strict=True)):
        if number and number % 3 == 0:
            key = hmac.new(key, b"tpla data channel: next key\x01", hashlib.sha256).digest()
        sizes = struct.pack(">II", len(header), len(payload))
        first, second = (2 * number).to_bytes(12, "big"), (2 * number + 1).to_bytes(12, "big")
        aes = AESGCM(key)
        assert said == sizes + aes.encrypt(first, header, sizes) + aes.encrypt(second, payload, header)


@pytest.mark.parametrize("in_place", [False, True], ids=["staged", "in place"])
@pytest.mark.parametrize("budget_bytes", [1, 1000, 1 << 30])
def test_chunks_arrive_as_they_were_sent(
    pair: Pair, budget_bytes: int, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "STEP_BYTES", 10_000)
    sent = random_chunks(20)
    queue, reader = SendQueue(pair[0], Seal(KEY, 3)), chunk_reader(pair[1], in_place=in_place)
    for header, payload in sent:
        queue.push(chunk(header, payload))
    came = []
    while len(came) < len(sent):
        queue.flush()
        for header, payload, tail in reader.receive(budget_bytes):
            rows = payload.memory if isinstance(payload, InPlace) else payload
            came.append((header, bytes(rows), tail))
    assert came == [(header, payload, OPENED) for header, payload in sent]
    assert reader.received_bytes == sum(8 + len(h) + 16 + len(p) + 16 for h, p in sent)


def test_what_nobody_wants_any_more_does_not_open(pair: Pair) -> None:
    queue, reader = SendQueue(pair[0], Seal(KEY, 3)), chunk_reader(pair[1])
    begun = chunk(b"h" * 20, b"a" * 100_000)
    for item in (begun, chunk(b"h" * 20, b"b" * 50, wanted=False), chunk(b"h" * 20, b"c" * 70)):
        queue.push(item)
    queue.flush()
    begun.wanted = lambda: False
    came: list[tuple[int, bytes]] = []
    while len(came) < 2:
        queue.flush()
        came += [(len(payload), tail) for _, payload, tail in reader.receive(1 << 20)]
    assert came == [(100_000, DAMAGED), (70, OPENED)]


@pytest.mark.parametrize(
    "order",
    [[0, 0], [0, 1, 1], [1], [0, 2, 1], [0, 2], [0, 1, 2, 0], [0, 1, 2, 3, 3]],
    ids=["repeated", "repeated later", "first left out", "changed places", "left out", "replayed", "under a new key"],
)
def test_chunks_open_once_and_in_order(order: list[int], pair: Pair) -> None:
    said = sealed(CHUNKS)
    with pytest.raises(FrameError, match=r"header of chunk [0-4] of a sealed channel does not open"):
        opened(b"".join(said[number] for number in order), pair)


def test_a_changed_byte_anywhere_is_seen(pair: Pair) -> None:
    """A change in the sizes, the header or its tag opens nothing; one in the payload or its tag damages the chunk."""
    good = sealed([(b"a header of a chunk", b"rows of it"), (b"the header of another", b"more")])
    whole, payload_at = b"".join(good), 8 + 19 + 16
    for place in range(len(good[0])):
        near, far = socket.socketpair()
        with near, far:
            far.setblocking(False)
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            try:
                came = opened(bytes(spoiled), (near, far))
            except FrameError:
                assert place < payload_at
                continue
            if place < 8:  # the changed size is in range: the reader waits for more bytes, which would not open
                assert came == []
            else:
                assert place >= payload_at
                assert [tail for _, _, tail in came] == [DAMAGED, OPENED]


@pytest.mark.parametrize("left", [0, 7, 8, 30, 42, 43, 50, 60])
def test_a_chunk_that_is_cut_off_is_none(left: int, pair: Pair) -> None:
    said = sealed([(b"a header of a chunk", b"rows of it" * 10)])[0]
    assert left < len(said)
    assert opened(said[:left], pair) == []


def test_parts_of_two_chunks_do_not_go_together(pair: Pair) -> None:
    """A payload belongs to its header, even under the same key."""
    first, second = sealed([(b"header of chunk 0!!", b"rows"), (b"header of chunk 1!!", b"ROWS")])
    cut = 8 + 19 + 16
    assert [tail for _, _, tail in opened(first[:cut] + second[cut:], pair)] == [DAMAGED]


@pytest.mark.parametrize("key", [bytes(32), KEY[::-1], bytes([KEY[0] ^ 1]) + KEY[1:]])
def test_another_key_opens_nothing(key: bytes, pair: Pair) -> None:
    with pytest.raises(FrameError, match="does not open: it has another key"):
        opened(sealed(CHUNKS)[0], pair, key)


def test_plain_chunks_are_not_taken_for_sealed_ones(pair: Pair) -> None:
    queue = SendQueue(pair[0])
    reader = chunk_reader(pair[1])
    queue.push(chunk(b"a header of a chunk", b"rows" * 20))
    queue.flush()
    with pytest.raises(FrameError, match="does not open"):
        list(reader.receive(1 << 20))


def test_no_nonce_serves_twice_under_a_key() -> None:
    used: list[tuple[bytes, bytes]] = []
    channels = [Seal(KEY, 5), Seal(new_key(), 5), Seal(new_key(), 5)]
    for seal in channels:
        for _ in range(23):
            sizes = struct.pack(">II", 1, 1)
            with mock.patch.object(seal, "_nonce", wraps=seal._nonce) as nonce:
                seal.seal_header(sizes, b"h")
                seal.seal_payload(b"h")
            used += [(seal._key, seal._nonce(call.args[0])) for call in nonce.call_args_list]
    assert len(used) == len(set(used)) == 3 * 23 * 2
    assert len({key for key, _ in used}) == 3 * 5  # 23 chunks, five per key


def test_an_old_key_does_not_open_what_comes_after_it() -> None:
    after = sealed(CHUNKS)[3]
    sizes, header = after[:8], after[8 : 8 + len(CHUNKS[3][0]) + 16]
    with pytest.raises(InvalidTag):
        AESGCM(KEY).decrypt((6).to_bytes(12, "big"), header, sizes)
