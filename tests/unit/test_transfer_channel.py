"""The data channel's two ends on a socket pair: any cut of the stream, and bytes that violate the protocol."""

import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from sglang_tpla.transfer.messages import FrameError, checksum
from sglang_tpla.transfer.network.data_channel import (
    PREAMBLE,
    BufferPool,
    ChannelError,
    ChunkReader,
    OutgoingChunk,
    SendQueue,
)
from tests.unit.channel_ends import Pair, in_pieces, random_chunks, socket_pair

TOKEN = bytes(range(16))
HEADER = b"h" * 40


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket_pair() as ends:
        yield ends


def chunk_reader(stream: socket.socket, limit: int = 1 << 20) -> ChunkReader:
    reader = ChunkReader(stream, TOKEN, limit, BufferPool(), lambda header, _: (bytes(header), None))
    assert not reader.greeted
    assert reader.greet() and reader.greeted
    return reader


def chunk(header: bytes, payload: bytes, log: list[int], wanted: bool = True) -> OutgoingChunk:
    known = checksum(payload) if len(payload) % 2 else b""

    def done(digest: bytes) -> None:
        assert digest in (checksum(payload), b"")
        log.append(len(payload) if digest else -len(payload))

    return OutgoingChunk(header, in_pieces(payload, 2), known, wanted=lambda: wanted, done=done)


def test_the_token_is_said_first_and_once(pair: Pair) -> None:
    reader = chunk_reader(pair[0])
    assert pair[1].recv(100) == PREAMBLE + TOKEN
    assert reader.greet()
    with pytest.raises(BlockingIOError):
        pair[1].recv(100)


@pytest.mark.parametrize("budget_bytes", [1, 1000, 1 << 30])
def test_chunks_arrive_as_they_were_sent(pair: Pair, budget_bytes: int) -> None:
    sent, log = random_chunks(30), []
    queue, reader = SendQueue(pair[0]), chunk_reader(pair[1])
    for header, payload in sent:
        queue.push(chunk(header, payload, log))
    came = []
    while len(came) < len(sent):
        queue.flush()
        came += [(bytes(header), bytes(payload), tail) for header, payload, tail in reader.receive(budget_bytes)]
    assert came == [(header, payload, checksum(payload)) for header, payload in sent]
    assert log == [len(payload) for _, payload in sent]
    assert not queue
    total = sum(8 + len(header) + len(payload) + 8 for header, payload in sent)
    assert reader.received_bytes == total


def test_unwanted_chunks_are_left_out_and_begun_ones_finished(pair: Pair) -> None:
    log: list[int] = []
    queue, reader = SendQueue(pair[0]), chunk_reader(pair[1])
    begun = chunk(HEADER, b"a" * 100_000, log)
    queue.push(begun)
    queue.push(chunk(HEADER, b"b" * 50, log, wanted=False))
    queue.push(chunk(HEADER, b"c" * 70, log))
    queue.flush()
    assert begun.payload is not None and log == []
    begun.wanted = lambda: False
    came: list[tuple[bytes, bool]] = []
    while len(came) < 2:
        queue.flush()
        came += [(bytes(payload), tail == checksum(payload)) for _, payload, tail in reader.receive(1 << 20)]
    # A chunk that is no longer wanted before its end gets a wrong checksum.
    assert came == [(b"a" * 100_000, False), (b"c" * 70, True)]
    assert log == [100_000, -50, 70]


def test_a_closed_send_queue_gives_its_memory_back_once(pair: Pair) -> None:
    log: list[int] = []
    queue = SendQueue(pair[0])
    for size in (100_000, 2, 3):
        queue.push(chunk(HEADER, bytes(size), log))
    queue.flush()
    queue.close()
    queue.close()
    assert log == [-100_000, -2, -3]


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(13, 10), (0, 0), ((64 << 10) + 1, 10), (40, 0), (40, 1001), (2**32 - 1, 2**32 - 1)],
)
def test_sizes_out_of_range_end_the_channel(pair: Pair, header_bytes: int, payload_bytes: int) -> None:
    reader = chunk_reader(pair[1], limit=1000)
    pair[0].send(struct.pack(">II", header_bytes, payload_bytes) + bytes(100))
    with pytest.raises(FrameError, match=f"{header_bytes} bytes of header and {payload_bytes} of payload"):
        list(reader.receive(1 << 20))


def test_the_other_side_closing_ends_the_channel(pair: Pair) -> None:
    reader, queue = chunk_reader(pair[1]), SendQueue(pair[0])
    queue.push(chunk(HEADER, b"whole", []))
    queue.flush()
    pair[0].send(b"\x00\x00")
    assert pair[0].recv(100)  # read the greeting, or closing would reset the connection
    pair[0].close()
    got = reader.receive(1 << 20)
    assert bytes(next(got)[1]) == b"whole"
    with pytest.raises(ChannelError, match="closed by the other side"):
        next(got)


def test_memory_is_used_again_and_never_far_too_large() -> None:
    buffers = BufferPool()
    first = buffers.take(1000)
    address = np.frombuffer(first, dtype=np.uint8).ctypes.data
    buffers.give_back(first)
    again = buffers.take(600)
    assert np.frombuffer(again, dtype=np.uint8).ctypes.data == address and again.nbytes == 600
    buffers.give_back(again)
    small = buffers.take(10)
    assert small.obj.nbytes == 10  # reusing 1000 bytes for 10 would let small chunks exceed staging
    buffers.give_back(memoryview(b"not from here"))
    for _ in range(20):
        buffers.give_back(buffers.take(10))
