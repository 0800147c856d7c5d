"""Chunks that are received in place and sent from the pool, among them chunks that stop half way or come damaged."""

import contextlib
import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sglang_tpla.transfer import messages, workers
from sglang_tpla.transfer.decode import in_place
from sglang_tpla.transfer.memory import copy, iovec, native
from sglang_tpla.transfer.network import data_channel
from sglang_tpla.transfer.network.data_channel import PREAMBLE, SIZES
from sglang_tpla.transfer.room import RoomState
from tests.wire import rig
from tests.wire.fakes import FakeDecode, FakePrefill, hello
from tests.wire.test_channel import PAGES

TOKENS = 2 * rig.PAGE
ROW = bytes(sum(rig.ITEM_BYTES))


class Sender:
    """A prefill rank by hand, with one decode agent and its data channel."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.decode = rig.decode_rank(rig.even_rows(), peer_timeout_s=5.0)
        self.size = rig.LAYERS * TOKENS * self.decode.row_bytes  # the bytes of both pages
        stack.enter_context(contextlib.closing(self.decode.agent))
        self.fake = stack.enter_context(contextlib.closing(FakePrefill()))

    def connect(self) -> None:
        """Welcome the agent, with a data channel."""
        self.fake.welcome()
        self.stream = self.fake.channel()

    def open(self, room: int) -> messages.Request:
        """Open a room that asks for two pages, and get credit for two chunks."""
        self.decode.agent.open_room(room, [self.fake.peer])
        if not hasattr(self, "stream"):
            self.connect()
        rig.wait(lambda: self.decode.agent.poll(room) == RoomState.WAITING, "registration")
        self.decode.agent.request(room, rig.pages(1, 2), metadata_row=0, expected_ranks=1)
        request = self.fake.expect(messages.Request)
        self.credit(request, 2 * self.size)
        return request

    def credit(self, request: messages.Request, total_bytes: int) -> None:
        """Get credit for ``total_bytes`` in all."""
        self.fake.say(messages.Want(request.room, request.generation, total_bytes))
        while self.fake.expect(messages.Credit).total_bytes < total_bytes:
            pass

    def payload(self, seed: int) -> bytes:
        """Return bytes for both pages, none of them 0."""
        return np.random.default_rng(seed).integers(1, 256, self.size, dtype=np.uint8).tobytes()

    def begin(self, request: messages.Request, payload: bytes, damaged: bytes | None = None) -> memoryview:
        """Send a header and the first half of a payload of both pages. Return the other half and the checksum."""
        digest, none = messages.checksum(payload), bytes(messages.CHECKSUM_BYTES)
        chunk = messages.Chunk(request.room, request.generation, 0, 0, False, 0, rig.LAYERS, 0, TOKENS, none)
        header, sent = messages.encode(chunk), damaged or payload
        half = len(sent) // 2 + 7  # in the middle of a row
        self.stream.sendall(SIZES.pack(len(header), len(sent)) + header + sent[:half])
        return memoryview(sent + digest)[half:]

    def finish(self, request: messages.Request) -> None:
        """End a room of one chunk."""
        message = messages.Finish(request.room, request.generation, 1, TOKENS, messages.checksum(ROW))
        self.fake.say(message, ROW)
        rig.succeed(request.room, self.decode)

    def rows(self) -> np.ndarray:
        """Return the pool's rows in both pages, as bytes."""
        slots = torch.from_numpy(self.decode.pool.slots(rig.pages(1, 2)))
        return torch.stack([layer[slots] for layer in self.decode.pool.layers]).view(torch.uint8).numpy()

    def half_is_there(self) -> bool:
        """Return whether the first half has come, except for the row in which it ends."""
        return bool(self.rows().reshape(-1)[self.size // 2 - 1])


@pytest.fixture(params=["checked on the way", "checked by a worker"])
def sender(request: pytest.FixtureRequest, rows_kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setattr(workers, "SPARE_CORES", 1 if "worker" in request.param else 1 << 20)
    with contextlib.ExitStack() as stack:
        yield Sender(stack)


def test_the_rest_of_a_chunk_of_an_aborted_room_is_written_nowhere(sender: Sender) -> None:
    request, sent = sender.open(1), sender.payload(1)
    rest = sender.begin(request, sent)
    rig.wait(sender.half_is_there, "the first half")
    sender.decode.agent.abort(1, "the user went away")
    slots = torch.from_numpy(sender.decode.pool.slots(rig.pages(1, 2)))
    for layer in sender.decode.pool.layers:
        layer[slots] = 42.0  # the pages' next owner
    owned = sender.rows()
    sender.stream.sendall(rest)
    rig.wait(lambda: sender.decode.agent.stats().late_dropped == 1, "the rest of the chunk")
    assert np.array_equal(sender.rows(), owned)
    assert sender.decode.agent.stats().staging_used_bytes == 0
    sender.decode.agent.close_room(1)

    request, sent = sender.open(2), sender.payload(2)  # the channel goes on
    sender.stream.sendall(sender.begin(request, sent))
    assert sender.fake.expect(messages.Ack).room == 2
    assert sender.rows().tobytes() == sent
    sender.finish(request)


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_found_and_written_over(sender: Sender, place: float) -> None:
    request, sent = sender.open(1), sender.payload(1)
    damaged = bytearray(sent)
    damaged[int(place * (sender.size - 1))] ^= 16
    sender.stream.sendall(sender.begin(request, sent, bytes(damaged)))
    assert sender.fake.expect(messages.Nack) == messages.Nack(1, request.generation, 0, 0)
    assert sender.rows().tobytes() == damaged
    assert sender.decode.agent.poll(1) == RoomState.TRANSFERRING
    sender.stream.sendall(sender.begin(request, sent))
    sender.fake.expect(messages.Ack)
    assert sender.rows().tobytes() == sent
    sender.finish(request)
    assert sender.decode.agent.stats().checksum_failures == 1
    assert sender.decode.agent.stats().staging_used_bytes == 0


def test_a_chunk_that_ends_half_way_comes_again_within_the_same_credit(sender: Sender) -> None:
    request, sent = sender.open(1), sender.payload(1)
    sender.begin(request, sender.payload(3))
    rig.wait(sender.half_is_there, "the first half")
    sender.stream.close()
    sender.connect()
    again = sender.fake.expect(messages.Request)
    resume = sender.fake.expect(messages.Resume)
    assert (again.generation, resume.applied, resume.credit_bytes) == (request.generation, (), 0)
    sender.credit(request, sender.size)
    sender.stream.sendall(sender.begin(request, sent))
    sender.fake.expect(messages.Ack)
    assert sender.rows().tobytes() == sent
    sender.finish(request)
    assert sender.decode.agent.stats().staging_used_bytes == 0


@pytest.mark.usefixtures("rows_kind")
@pytest.mark.parametrize("way", ["in extents", "row by row", "in extents, without C", "in extents, by workers"])
def test_every_way_is_right_to_the_last_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows come in another order than they lie in the pool."""
    if "without C" in way:
        monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(workers, "SPARE_CORES", 1 if "by workers" in way else 1 << 20)
    checked_aside = []
    monkeypatch.setattr(
        in_place, "check_pieces", lambda pieces: checked_aside.append(pieces) or copy.check_pieces(pieces)
    )
    if way == "row by row":
        monkeypatch.setattr(iovec, "MIN_EXTENT_BYTES", 1 << 20)
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host="far")
    with rig.serving(prefill, decode):
        decode.agent.connect(*prefill.agent.address)
        rig.wait(lambda: prefill.agent.router.listener._channels, "the channel")
        rig.transfer(prefill, decode)
        assert prefill.agent.stats().resent == 0
        assert bool(checked_aside) == ("by workers" in way)
        rig.wait(lambda: prefill.agent.stats().staging_used_bytes == 0, "staging to be free")
    assert PAGES * rig.PAGE > TOKENS


def test_rows_that_their_next_owner_wrote_on_the_way_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room ends in mid-payload and its pages are overwritten: the chunk under way gets a wrong checksum."""
    monkeypatch.setattr(data_channel, "BUFFER_BYTES", 4096)
    prefill = rig.prefill_rank(chunk_bytes=256 << 10, staging_bytes=1 << 20)
    pages = np.arange(PAGES, dtype=np.int32)
    with contextlib.closing(prefill.agent), contextlib.closing(FakeDecode(prefill.agent.address[1])) as fake:
        fake.say(hello(host="far", max_chunk_bytes=256 << 10))
        welcome, _ = fake.expect(messages.Welcome)
        fake.say(messages.Mapped(fake.expect(messages.Colocated)[0].number, ()))
        with socket.socket() as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stream.connect(("127.0.0.1", welcome.data.port))
            stream.sendall(PREAMBLE + welcome.data.token)
            rig.wait(lambda: prefill.agent.stats().data_channels == 1, "the channel")
            prefill.agent.open_room(1)
            fake.say(messages.Request(1, 1, 1, 0, PAGES * rig.PAGE, False, 0, 1))
            fake.say(messages.Credit(1, 1, 1 << 20))
            prefill.agent.send(1, pages, last=True, metadata_row=0)
            header_bytes, size_bytes = SIZES.unpack(stream.recv(SIZES.size, socket.MSG_WAITALL))
            stream.recv(header_bytes, socket.MSG_WAITALL)
            before = prefill.pool.layers[-1].clone()
            prefill.agent.abort(1, "its client left")
            prefill.pool.layers[-1].zero_()
            payload = stream.recv(size_bytes, socket.MSG_WAITALL)
            said = stream.recv(messages.CHECKSUM_BYTES, socket.MSG_WAITALL)
    rows = before[: PAGES * rig.PAGE].view(torch.uint8).numpy().tobytes()
    assert size_bytes == 3 * len(rows)
    assert not payload.endswith(rows[-100:])  # the last layer came with its new rows
    assert said != messages.checksum(payload)
