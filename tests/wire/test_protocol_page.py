"""A decode rank that is written from PROTOCOL.md alone, without our classes, fetches a room from our prefill agent.
If the rank needs a fact that the page does not state, the page has a gap.
"""

import contextlib
import hashlib
import secrets
import socket
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash
import zmq
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig

ROOM, GENERATION, TOKENS, WIDTH, SHARED = 77, 5, 9 * rig.PAGE, 40, 16
CHUNK_BYTES = rig.SETTINGS.chunk_bytes
MATRIX = np.random.default_rng(0).standard_normal((rig.LATENT, WIDTH), dtype=np.float32)
HELLO, WELCOME, LAYER, PING, PONG, REQUEST, WANT, CREDIT = 1, 2, 4, 5, 6, 8, 9, 10
CHUNK, ACK, NACK, FINISH, DONE, REGISTERED, COLOCATED, MAPPED = 11, 12, 13, 14, 15, 17, 19, 20
CAPACITY = 26


def xxh3(data: bytes, seed: int = 0) -> bytes:
    return xxhash.xxh3_64_digest(data, seed)


def header(*fields: object) -> bytes:
    array = msgspec.msgpack.encode(fields)
    return b"TPLA\x02" + xxh3(array, 2) + array


def fields(frame: bytes) -> list[Any]:
    assert frame[:5] == b"TPLA\x02" and frame[5:13] == xxh3(frame[13:], 2)
    return list(msgspec.msgpack.decode(frame[13:]))


def exactly(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = stream.recv(size - len(data))
        assert piece, "the data channel ended"
        data += piece
    return bytes(data)


def next_chunk(stream: socket.socket, key: bytes | None, number: int) -> tuple[list[Any], bytes]:
    """Read one chunk of a data channel. Return the fields of its header, and its verified payload."""
    sizes = exactly(stream, 8)
    header_bytes, payload_bytes = struct.unpack(">II", sizes)
    if key is None:
        frame, payload = exactly(stream, header_bytes), exactly(stream, payload_bytes)
        assert exactly(stream, 8) == xxh3(payload)
    else:
        nonces = [(2 * number + which).to_bytes(12, "big") for which in (0, 1)]
        frame = AESGCM(key).decrypt(nonces[0], exactly(stream, header_bytes + 16), sizes)
        payload = AESGCM(key).decrypt(nonces[1], exactly(stream, payload_bytes + 16), frame)
    tag, *rest = fields(frame)
    assert tag == CHUNK
    return rest, payload


@pytest.mark.parametrize("sealed", [False, True])
def test_a_decode_rank_from_the_page(sealed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("key_folder") if sealed else None  # made before the rank, which reads the keys
    prefill = rig.prefill_rank(peer_timeout_s=20.0)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, 10_000)
    dealer.setsockopt(zmq.IDENTITY, secrets.token_bytes(16))
    if sealed:
        secret = (folder / "decode.secret").read_text().split()[0].encode()
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
        server = (folder / "prefill.public").read_text().split()[0].encode()
        dealer.setsockopt(zmq.CURVE_SERVERKEY, server)
    with contextlib.closing(prefill.agent), context, dealer:
        source = rig.pages(1, TOKENS // rig.PAGE)
        prefill.agent.open_room(ROOM)
        prefill.agent.send(ROOM, source, last=True, metadata_row=2)

        def say(*frames: bytes) -> None:
            dealer.send_multipart(frames)

        def hear(tag: int) -> tuple[list[Any], list[bytes]]:
            """Return the next message with a tag, and answer Ping and Colocated on the way."""
            while True:
                frame, *payload = dealer.recv_multipart()
                message = fields(frame)
                if message[0] == tag:
                    return message[1:], payload
                if message[0] == PING:
                    say(header(PONG, message[1]))
                if message[0] == COLOCATED:
                    say(header(MAPPED, message[1], ()))

        dealer.connect(f"tcp://127.0.0.1:{prefill.agent.address[1]}")
        widths, shared, matrix = (WIDTH,) * rig.LAYERS, (SHARED,) * rig.LAYERS, MATRIX.astype("<f4").tobytes()
        text = f"projection 0 {rig.LATENT} {widths} {shared}".encode()
        projection = hashlib.sha256(text + matrix * rig.LAYERS).hexdigest()
        columns = np.ascontiguousarray(MATRIX[:, :SHARED], dtype="<f4").tobytes()
        common = hashlib.sha256(f"common 0 {shared}".encode() + columns * rig.LAYERS).hexdigest()
        layout = (0, rig.LATENT, rig.ROPE, "bfloat16", rig.PAGE, widths, shared, rig.ITEM_BYTES)
        names = ("an agent", "model", 0, 1, "a host of its own")
        say(header(HELLO, (5, 5), *names, CHUNK_BYTES, layout, projection, common, None))
        (version, _, _, first, layers, need, _, (port, token, key), *_), _ = hear(WELCOME)
        assert (version, first, layers, need) == (5, 0, rig.LAYERS, True) and (key is not None) == sealed
        say(header(CAPACITY, 0, 0))
        say(header(MAPPED, 0, ()))
        for index in range(rig.LAYERS):
            say(header(LAYER, projection, index, xxh3(matrix)), matrix)
        assert hear(REGISTERED)[0] == [projection]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stream:
            stream.sendall(b"TPLD\x03" + token)
            say(header(REQUEST, ROOM, GENERATION, 1, 0, -1, False, 0, 1))
            total = hear(WANT)[0][2]
            say(header(CREDIT, ROOM, GENERATION, total))
            (_, _, chunks, tokens, digest), (metadata,) = hear(FINISH)
            assert tokens == TOKENS and digest == xxh3(metadata)
            pool = np.zeros((rig.LAYERS, TOKENS, WIDTH + rig.ROPE), dtype="<u2")
            came: set[int] = set()
            for number in range(chunks + 1):
                said, payload = next_chunk(stream, key, number)
                part, sequence, _, layer, count, token, rows = said[2:9]
                if number == 0:  # as if it were damaged
                    say(header(NACK, ROOM, GENERATION, part, sequence))
                    say(header(CREDIT, ROOM, GENERATION, total + len(payload)))
                    continue
                assert part == 0 and sequence not in came
                came.add(sequence)
                values = np.frombuffer(payload, dtype="<u2").reshape(count, rows, -1)
                pool[layer : layer + count, token : token + rows] = values
                say(header(ACK, ROOM, GENERATION, part, sequence))
            say(header(DONE, ROOM, GENERATION))
            assert rig.ended(prefill.agent, ROOM) == RoomState.SUCCESS, prefill.agent.failure(ROOM)
        assert metadata == prefill.metadata.read(2)
        slots = torch.from_numpy(prefill.pool.slots(source, TOKENS))
        for sent, got in zip(prefill.pool.layers, torch.from_numpy(pool.view(np.int16)), strict=True):
            rows, received = sent[slots], got.view(torch.bfloat16)
            want = rows[:, : rig.LATENT].double() @ torch.from_numpy(MATRIX).double()
            torch.testing.assert_close(received[:, :WIDTH].double(), want, rtol=2**-8, atol=2**-8)
            assert torch.equal(received[:, WIDTH:], rows[:, rig.LATENT :])
