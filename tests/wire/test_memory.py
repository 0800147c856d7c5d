"""Shared memory that is refused or runs out: transfers stay right, through sockets or with less staging."""

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_tpla.transfer import messages
from sglang_tpla.transfer.memory import iovec
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.shared_memory import HEADER_BYTES, map_segment
from sglang_tpla.transfer.prefill import agent
from sglang_tpla.transfer.room import RoomState
from tests.ports import neighbouring_ports
from tests.wire import rig
from tests.wire.fakes import FakePrefill

pytestmark = pytest.mark.usefixtures("rows_kind")  # each test runs with plain and with sketched rows


@contextlib.contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, memory files included (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def transfers(prefill: rig.PrefillRank, decodes: list[rig.DecodeRank]) -> None:
    """Move several rooms at once to all ranks, and check that all are right and that nothing is left of them."""
    rooms = 6
    at = np.split(rig.pages(7, 12 * rooms), rooms)
    for room in range(rooms):
        prefill.agent.open_room(room)
        for decode in decodes:
            rig.ask(decode, [prefill.peer], room, at[room], expected=len(decodes), metadata_row=room)
        prefill.agent.send(room, rig.pages(room, 12), last=True, metadata_row=room)
    for room in range(rooms):
        rig.succeed(room, prefill, *decodes)
        for decode in decodes:
            assert decode.metadata.read(room) == prefill.metadata.read(room)
            rig.check_rows(prefill, decode, rig.pages(room, 12), at[room], 12 * rig.PAGE)
        rig.close(room, prefill, *decodes)
    rig.idle(prefill, *decodes)


@pytest.mark.parametrize("host", [None, "far"], ids=["near", "far"])
@pytest.mark.parametrize("who", ["prefill", "decode", "both"])
def test_no_shared_memory_at_the_start(who: str, host: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with no_file_above(64 << 10) if who != "decode" else contextlib.nullcontext():
        prefill = rig.prefill_rank()
    with no_file_above(64 << 10) if who != "prefill" else contextlib.nullcontext():
        decodes = [rig.decode_rank(rank=rank, size=2, host=host) for rank in range(2)]
    with rig.serving(prefill, *decodes):
        assert "no shared memory of 131072 bytes ([Errno 27] File too large)" in caplog.text
        transfers(prefill, decodes)
        # decode ranks can read prefill's segment, or one rank the other's
        other = who == "prefill" or (who, host) == ("decode", None)
        assert any(decode.agent.stats().shared_memory_bytes > 0 for decode in decodes) is other


@pytest.mark.parametrize("host", [None, "far"], ids=["near", "far"])
def test_shared_memory_runs_out(
    host: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a few slots the system has no memory left, so that fewer chunks are in flight at a time."""
    reserve, refused = os.posix_fallocate, list[int]()

    def full_after_three(file: int, offset: int, size_bytes: int) -> None:
        if offset + size_bytes > HEADER_BYTES + 3 * rig.SETTINGS.chunk_bytes:
            refused.append(offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full_after_three)
    monkeypatch.setattr(iovec, "MIN_EXTENT_BYTES", 1 << 20)  # otherwise the channel would need no staging
    prefill = rig.prefill_rank()
    staging = prefill.agent.lanes.staging
    reap, all_slots = staging.reap, staging.slots
    # otherwise a slow machine might never have four chunks under way
    monkeypatch.setattr(staging, "reap", lambda: staging.slots < all_slots and reap())
    decodes = [rig.decode_rank(rank=rank, size=2, host=host) for rank in range(2)]
    with rig.serving(prefill, *decodes):
        transfers(prefill, decodes)
        assert prefill.agent.stats().staging_limit_bytes == 3 * rig.SETTINGS.chunk_bytes
        assert refused
        assert "no memory for more than 24576 bytes of staging: [Errno 28] No space left" in caplog.text
        monkeypatch.undo()  # there is memory again
        transfers(prefill, decodes)


def test_a_segment_whose_process_is_another_one_keeps_nobody_waiting(tmp_path: Path) -> None:
    """The announced numbers lead to a named pipe to which nobody writes."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    stale = messages.Segment("gone", os.getpid(), reader, 4096, b"token 8b")
    mapped: list[object] = []
    thread = threading.Thread(target=lambda: mapped.append(map_segment(stale)), daemon=True)
    thread.start()
    thread.join(10)
    os.close(reader)
    assert mapped == [None]


def test_memory_that_cuda_refuses_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank reports the error and does not start. Another rank can have its ports while the error is still held."""

    def refuse(memory: np.ndarray) -> None:
        raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed: lower staging_bytes")

    port = neighbouring_ports(2)
    with monkeypatch.context() as patch:
        patch.setattr(CachePool, "device", torch.device("cuda"))
        patch.setattr(agent, "pin", refuse)
        with pytest.raises(RuntimeError, match="lower staging_bytes") as refused:
            rig.prefill_rank(port=port)
    rig.prefill_rank(port=port).agent.close()
    assert refused.traceback


def test_places_in_shared_memory_are_used_again() -> None:
    """Ranks of another host that pass chunks on touch no more of their segments than they use at a time."""
    prefill = rig.prefill_rank()
    decodes = [rig.decode_rank(rank=rank, size=2, host="far", staging_bytes=4 << 20) for rank in range(2)]
    with rig.serving(prefill, *decodes):
        for _ in range(10):
            transfers(prefill, decodes)
        for decode in decodes:
            assert 0 < decode.agent.receiver._slots._reserved < 40  # the 60 rooms have some hundred chunks


def test_shared_memory_can_be_switched_off() -> None:
    prefill, decode = rig.prefill_rank(shared_memory=0), rig.decode_rank()
    with rig.serving(prefill, decode):
        transfers(prefill, [decode])
        assert decode.agent.stats().wire_bytes > 0 == decode.agent.stats().shared_memory_bytes


@pytest.mark.parametrize(("staging_chunks", "granted_chunks"), [(256, 8), (16, 4), (8, 2)])
def test_a_room_gets_credit_for_some_chunks_at_once(staging_chunks: int, granted_chunks: int) -> None:
    """A room gets credit for eight chunks of large staging, four of small staging, and at most a quarter of it."""
    chunk = 64 << 10
    decode = rig.decode_rank(host="far", chunk_bytes=chunk, staging_bytes=staging_chunks * chunk)
    with contextlib.closing(decode.agent), contextlib.closing(FakePrefill()) as fake:
        decode.agent.open_room(1, [fake.peer])
        fake.welcome()
        rig.wait(lambda: decode.agent.poll(1) == RoomState.WAITING, "registration")
        decode.agent.request(1, rig.pages(1, 2), metadata_row=0, expected_ranks=1)
        request = fake.expect(messages.Request)
        fake.say(messages.Want(1, request.generation, 100 * chunk))
        assert fake.expect(messages.Credit).total_bytes == granted_chunks * chunk
        assert decode.agent.stats().staging_used_bytes == granted_chunks * chunk
