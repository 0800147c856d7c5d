"""Aborts, reused rooms and late requests: no write after an abort, and the next request is right."""

import contextlib
import os
import random
import threading

import numpy as np
import pytest
import torch

from sglang_tpla.transfer import workers
from sglang_tpla.transfer.decode import receiver
from sglang_tpla.transfer.memory import copy
from sglang_tpla.transfer.prefill import sender
from sglang_tpla.transfer.room import OTHER_PROMPT, RoomState, TransferError
from tests.wire import rig

pytestmark = pytest.mark.usefixtures("rows_kind")  # each test runs with plain and with sketched rows


@pytest.fixture(params=[None, "far"], ids=["near", "far"])
def pair(request):
    """A prefill and a decode rank, on one host or on two."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host=request.param)
    with rig.serving(prefill, decode):
        yield prefill, decode


def complete(prefill: rig.PrefillRank, decode: rig.DecodeRank, room: int) -> None:
    """Make a whole transfer, and check it."""
    rig.transfer(prefill, decode, room, count=5)
    rig.close(room, prefill, decode)


def test_no_write_after_an_abort(pair) -> None:
    """Abort 500 rooms at random moments."""
    assert abort_at_random_moments(*pair, times=500) > 50


@pytest.mark.parametrize("checkers", [0, 2])
def test_no_write_after_an_abort_with_several_threads(checkers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abort rooms with several threads, as on a GPU. Checkers, if there are any, wait for rows and check them alone."""
    monkeypatch.setitem(workers.WORKERS, "cpu", 4)
    monkeypatch.setitem(workers.CHECKERS, "cpu", checkers)
    checked = []
    if checkers:
        rig.check_apart(monkeypatch)
        for module in (sender, receiver):
            monkeypatch.setattr(module, "check_pieces", lambda it: checked.append(it) or copy.check_pieces(it))
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        threads = 5 + checkers
        assert prefill.agent.stats().threads_alive == decode.agent.stats().threads_alive == threads
        assert abort_at_random_moments(prefill, decode, times=100) > 10
    assert bool(checked) == bool(checkers)
    assert not any(thread.is_alive() for side in (prefill, decode) for thread in side.agent.workers._checkers)


def abort_at_random_moments(prefill: rig.PrefillRank, decode: rig.DecodeRank, times: int) -> int:
    """Abort rooms whose reused pages must keep what their next owner wrote; return how many were aborted in time."""
    moments = random.Random(5)
    aborted = 0
    for room in range(times):
        destination = rig.pages(room, 24)
        rig.begin([prefill], [decode], room, rig.pages(room + 1, 24), [destination])
        for _ in range(moments.randrange(60)):
            decode.agent.poll(room)
        decode.agent.abort(room, "the user went away")
        slots = torch.from_numpy(decode.pool.slots(destination))
        marks = [torch.full((slots.numel(), layer.shape[1]), float(room % 100)) for layer in decode.pool.layers]
        for layer, mark in zip(decode.pool.layers, marks, strict=True):
            layer[slots] = mark.to(layer.dtype)
        rig.ended(prefill.agent, room)  # its chunks are under way or dropped
        if decode.agent.poll(room) == RoomState.FAILED:
            aborted += 1
        for layer, mark in zip(decode.pool.layers, marks, strict=True):
            assert torch.equal(layer[slots], mark.to(layer.dtype)), f"room {room} was written after its abort"
        rig.close(room, prefill, decode)
    complete(prefill, decode, 1000)
    rig.idle(prefill, decode)
    return aborted


def test_abort_by_prefill_reaches_decode(pair) -> None:
    prefill, decode = pair
    prefill.agent.open_room(1)
    rig.ask(decode, [prefill.peer], 1, rig.pages(1, 4))
    rig.wait(lambda: prefill.agent.poll(1) == RoomState.WAITING, "the request")
    prefill.agent.abort(1, "prefill was cancelled")
    rig.fail(1, "prefill was cancelled", decode, prefill)


@pytest.mark.parametrize("host", rig.HOSTS)
def test_abort_of_one_rank_fails_the_room_on_all(host: str | None) -> None:
    prefill = rig.prefill_rank()
    ranks = [rig.decode_rank(rank=rank, size=4, host=host) for rank in range(4)]
    with rig.serving(prefill, *ranks):
        prefill.agent.open_room(1)
        for rank in ranks:
            rig.ask(rank, [prefill.peer], 1, rig.pages(1, 4), expected=4)
        prefill.agent.send(1, rig.pages(2, 2), last=False)
        ranks[2].agent.abort(1, "rank 2 gave up")
        rig.fail(1, "rank 2 gave up", prefill, *ranks)
        rig.close(1, prefill, *ranks)
        rig.transfer(prefill, ranks, 1, count=4)


def test_abort_before_the_prefill_request_fails_it_when_it_comes(pair) -> None:
    prefill, decode = pair
    rig.ask(decode, [prefill.peer], 7, rig.pages(1, 4))
    rig.wait(lambda: prefill.agent.stats().rooms == 1, "the held request")
    decode.agent.close_room(7)
    rig.wait(lambda: prefill.agent.stats().rooms == 0, "the abort")
    prefill.agent.open_room(7)
    assert prefill.agent.poll(7) == RoomState.FAILED
    assert "aborted by decode rank 0" in prefill.agent.failure(7)
    prefill.agent.close_room(7)
    complete(prefill, decode, 7)


def test_room_reused_right_after_an_abort_by_decode(pair) -> None:
    prefill, decode = pair
    for _ in range(30):
        rig.begin([prefill], [decode], 3, rig.pages(2, 20), [rig.pages(1, 20)])
        decode.agent.close_room(3)
        rig.ask(decode, [prefill.peer], 3, rig.pages(4, 6))  # the new request overtakes the prefill scheduler
        rig.ended(prefill.agent, 3)
        prefill.agent.close_room(3)
        prefill.agent.open_room(3)
        prefill.agent.send(3, rig.pages(5, 6), last=True, metadata_row=2)
        rig.succeed(3, decode, prefill)
        rig.check_rows(prefill, decode, rig.pages(5, 6), rig.pages(4, 6), 6 * rig.PAGE)
        assert decode.metadata.read(3) == prefill.metadata.read(2)
        rig.close(3, prefill, decode)


def test_request_that_comes_after_the_room_failed_is_told_why(pair) -> None:
    prefill, decode = pair
    prefill.agent.open_room(7)
    prefill.agent.abort(7, "prefill was cancelled early")
    prefill.agent.close_room(7)
    rig.ask(decode, [prefill.peer], 7, rig.pages(1, 4))
    rig.fail(7, "prefill was cancelled early", decode)
    decode.agent.close_room(7)
    complete(prefill, decode, 7)


def test_request_is_held_until_the_scheduler_opens_the_room(pair) -> None:
    prefill, decode = pair
    rig.ask(decode, [prefill.peer], 7, rig.pages(1, 4))
    rig.wait(lambda: prefill.agent.stats().rooms == 1, "the held request")
    prefill.agent.open_room(7)
    assert prefill.agent.poll(7) == RoomState.WAITING
    prefill.agent.send(7, rig.pages(2, 4), last=True, metadata_row=0)
    rig.succeed(7, decode)


def test_held_request_and_idle_room_expire() -> None:
    prefill = rig.prefill_rank(transfer_timeout_s=0.5)
    decode = rig.decode_rank()
    with rig.serving(prefill, decode):
        prefill.agent.open_room(8)
        rig.ask(decode, [prefill.peer], 7, rig.pages(1, 4))
        rig.fail(7, "no prefill request opened this room within 0.5 s", decode)
        rig.fail(8, "0 of unknown decode ranks had asked", prefill)


def test_wrong_number_of_rows_fails_with_the_numbers(pair) -> None:
    """Both ranks blame the request, because its two halves have prompts of different lengths."""
    prefill, decode = pair
    for room, sent, asked, said in (
        (7, 3, 4, "12 tokens where 16 or a part of the last page were asked for"),
        (8, 4, 3, ""),  # the reason names the rows or their number, whichever comes first
    ):
        rig.begin([prefill], [decode], room, rig.pages(2, sent), [rig.pages(1, asked)])
        rig.fail(room, f"{said}: {OTHER_PROMPT}", decode, prefill)


def test_misuse_is_one_clear_error(pair) -> None:
    prefill, decode = pair
    with pytest.raises(TransferError, match="room 1 is not open on prefill rank 0; call open_room first"):
        prefill.agent.poll(1)
    with pytest.raises(TransferError, match="room 1 is not open on decode rank 0"):
        decode.agent.request(1, rig.pages(1, 2), metadata_row=0, expected_ranks=1)
    prefill.agent.open_room(1)
    with pytest.raises(TransferError, match="is open on prefill rank 0"):
        prefill.agent.open_room(1)
    with pytest.raises(TransferError, match=r"pages must lie in 0\.\.\.95; got 96\.\.\.96"):
        prefill.agent.send(1, np.array([96], dtype=np.int32), last=False)
    with pytest.raises(TransferError, match="needs metadata_row"):
        prefill.agent.send(1, rig.pages(1, 1), last=True)
    with pytest.raises(TransferError, match=r"1 pages of 4 tokens hold 1 to 4 tokens; got num_tokens=9"):
        prefill.agent.send(1, rig.pages(1, 1), last=False, num_tokens=9)
    decode.agent.open_room(1, [prefill.peer])
    with pytest.raises(TransferError, match=r"metadata row must lie in 0\.\.\.7; got 8"):
        decode.agent.request(1, rig.pages(1, 2), metadata_row=8, expected_ranks=1)
    prefill.agent.close()
    with pytest.raises(TransferError, match="was closed"):
        prefill.agent.open_room(2)


def test_closing_leaves_no_thread_socket_or_handle() -> None:
    def handles() -> set[str]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/self/fd/{name}"))
        return found

    def once() -> None:
        prefill, decode = rig.prefill_rank(), rig.decode_rank()
        complete(prefill, decode, 3)
        decode.agent.close()
        prefill.agent.close()

    once()  # ZeroMQ opens some handles only once
    before, threads = handles(), set(threading.enumerate())
    for _ in range(5):
        once()
    assert set(threading.enumerate()) <= threads
    assert len(handles()) <= len(before)
