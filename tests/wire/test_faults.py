"""Dead, stopped, restarted and lying peers: rooms fail with a reason, survivors serve on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.transfer import workers
from sglang_tpla.transfer.decode import receiver
from sglang_tpla.transfer.memory import rows
from sglang_tpla.transfer.prefill import sender
from sglang_tpla.transfer.room import RoomState, TransferError
from tests.ports import neighbouring_ports
from tests.wire import rig

pytestmark = pytest.mark.usefixtures("rows_kind")  # each test runs with plain and with sketched rows


ROOT = Path(__file__).resolve().parents[2]


class Child:
    """Runs `tests.wire.child` in a process."""

    def __init__(self, role: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.wire.child", role, str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.port = int(self.readline().split()[1])

    def readline(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child has ended"
        return line.strip()

    def say(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.readline()

    def end(self) -> None:
        """Kill the process and free its pipes."""
        self.process.kill()
        self.process.communicate()


def transfer(prefill: rig.PrefillRank, decode: rig.DecodeRank, room: int) -> None:
    """Make a whole transfer, check it, and close its room."""
    rig.transfer(prefill, decode, room, count=30)
    rig.close(room, prefill, decode)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_decode_rank_dies_or_stops_in_mid_transfer(
    how: signal.Signals, prefill: rig.PrefillRank, decode: rig.DecodeRank
) -> None:
    child = Child("decode", prefill.agent.address[1])
    with contextlib.ExitStack() as stack:
        stack.callback(child.end)
        rooms = range(10, 14)
        for room in rooms:
            prefill.agent.open_room(room)
            child.say(f"ask {room}")
            rig.wait(lambda room=room: prefill.agent.poll(room) == RoomState.WAITING, "the request")
        os.kill(child.process.pid, how)
        for room in rooms:
            prefill.agent.send(room, rig.pages(2, 30), last=False)
        for room in range(20, 30):
            transfer(prefill, decode, room)  # others are served meanwhile
            assert prefill.agent.stats().staging_used_bytes <= rig.SETTINGS.staging_bytes
        for room in rooms:
            rig.fail(room, "decode rank 1 of 2", prefill)
            rig.fail(room, "was lost", prefill)
            rig.close(room, prefill)
        rig.wait(lambda: prefill.agent.stats().staging_used_bytes == 0, "staging to be free")
        assert prefill.agent.stats().peers == 1
        if how is signal.SIGSTOP:
            os.kill(child.process.pid, signal.SIGCONT)
            prefill.agent.open_room(99)
            rig.wait(lambda: child.say("state 13") == "FAILED", "the stopped rank to learn of it")
            child.say("ask 99")
            prefill.agent.send(99, rig.pages(2, 60), last=True, metadata_row=0)
            rig.succeed(99, prefill)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_prefill_rank_dies_and_comes_back_on_the_same_address(how: signal.Signals, decode: rig.DecodeRank) -> None:
    lost: list[tuple[str, int]] = []
    decode.agent.connections._on_peer_lost = lambda host, port: lost.append((host, port))
    child = Child("prefill", neighbouring_ports(2))  # nothing else takes these ports before the rank is back
    with contextlib.ExitStack() as stack:
        stack.callback(child.end)
        peer = ("127.0.0.1", child.port, False)
        child.say("open 5")
        rig.ask(decode, [peer], 5, rig.pages(1, 60))
        born = time.monotonic()
        child.say("send 5 part")
        rig.wait(lambda: decode.agent.metric(5).chunks > 0, "the first chunk")
        os.kill(child.process.pid, how)
        rig.fail(5, f"prefill rank at 127.0.0.1:{child.port}", decode)
        rig.wait(lambda: lost == [("127.0.0.1", child.port)], "the callback")
        decode.agent.close_room(5)
        child.end()
        child = Child("prefill", child.port)
        stack.callback(child.end)
        decode.agent.open_room(7, [peer], born)  # its other half died with the earlier process
        rig.fail(7, "started after this request came", decode)
        child.say("open 6")
        rig.ask(decode, [peer], 6, rig.pages(1, 60))
        child.say("send 6 last")
        rig.succeed(6, decode)
        assert decode.agent.stats().staging_used_bytes == 0


def test_nobody_listens(decode: rig.DecodeRank) -> None:
    decode.agent.open_room(1, [("127.0.0.1", 9, False)])
    rig.fail(1, "the prefill rank at 127.0.0.1:9 did not answer for 2 s", decode)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_hash": "other"}, "model: prefill has model, decode has other"),
        ({"dtype": torch.float32}, "cache dtype: prefill has bfloat16, decode has float32"),
        ({"page_size": 8}, "page size: prefill has 4, decode has 8"),
        ({"chunk_bytes": 4096.0, "staging_bytes": 4096.0}, ""),
    ],
)
def test_refusals_say_what_is_wrong(changes: dict, said: str, prefill: rig.PrefillRank, rows_kind: str) -> None:
    if rows_kind == "sketched" and "dtype" in changes:
        said = ""  # prefill makes sketched rows from any dtype
    if "chunk_bytes" in changes:
        changes = {key: int(value) for key, value in changes.items()}
    decode = rig.decode_rank(**changes)
    with contextlib.closing(decode.agent):
        if not said:  # small chunks are no reason to refuse
            transfer(prefill, decode, 1)
            return
        decode.agent.open_room(1, [prefill.peer])
        rig.fail(1, said, decode)
        assert f"127.0.0.1:{prefill.agent.address[1]} refused decode rank 0" in decode.agent.failure(1)
        decode.agent.close_room(1)
        decode.agent.open_room(2, [prefill.peer])
        assert decode.agent.poll(2) == RoomState.FAILED
        assert prefill.agent.stats().refused == 1


def test_an_ended_thread_is_not_silent(prefill: rig.PrefillRank, decode: rig.DecodeRank) -> None:
    prefill.agent.open_room(1)
    prefill.agent.workers.died(RuntimeError("the loop broke"))
    assert prefill.agent.poll(1) == RoomState.FAILED
    assert "the loop broke" in prefill.agent.failure(1)
    with pytest.raises(Exception, match="the loop broke"):
        prefill.agent.open_room(2)


def test_an_error_while_gathering_fails_the_room_alone(
    prefill: rig.PrefillRank, decode: rig.DecodeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [(prefill.agent.sender.reader, "read", decode), (decode.agent.receiver._writer, "write", prefill)]
    for room, (part, method, other) in enumerate(parts, 1):
        with monkeypatch.context() as patch:
            patch.setattr(part, method, lambda *args: 1 / 0)
            rig.begin([prefill], [decode], room, rig.pages(2, 3), [rig.pages(1, 3)])
            rig.fail(room, "division by zero", other)
    assert prefill.agent.stats().internal_errors == decode.agent.stats().internal_errors == 1
    transfer(prefill, decode, 3)


def test_more_stopped_ranks_than_slots_hold_the_others_up_until_they_are_given_up() -> None:
    prefill, well = rig.prefill_rank(staging_bytes=2 * rig.SETTINGS.chunk_bytes), rig.decode_rank()
    stopped = [rig.decode_rank() for _ in range(3)]
    going_on = threading.Event()
    with rig.serving(prefill, well, *stopped), contextlib.ExitStack() as stack:
        stack.callback(going_on.set)
        for room, decode in enumerate(stopped, 1):
            prefill.agent.open_room(room)
            rig.ask(decode, [prefill.peer], room, rig.pages(room, 90))
            decode.agent.workers.io.post(going_on.wait)
            prefill.agent.send(room, rig.pages(room, 90), last=False)
        stats = prefill.agent.stats
        rig.wait(lambda: stats().staging_used_bytes == stats().staging_limit_bytes, "all slots to be taken")
        transfer(prefill, well, 9)
        for room in range(1, 4):
            rig.fail(room, "was lost: no sign of life", prefill)


def test_rows_refused_after_they_were_queued_fail_the_room_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reports rows that cannot be sent only after it has read them; the checkers that wait for it pass it on."""

    def refuse() -> None:
        raise TransferError("values that are not finite")

    monkeypatch.setitem(workers.CHECKERS, "cpu", 1)
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        with monkeypatch.context() as patch:
            patch.setattr(rows.RowReader, "read", lambda *given: refuse)
            rig.begin([prefill], [decode], 1, rig.pages(2, 3), [rig.pages(1, 3)])
            rig.fail(1, "values that are not finite", prefill, decode)
        rig.wait(lambda: prefill.agent.stats().staging_used_bytes == 0, "staging to be free")
        assert prefill.agent.stats().internal_errors == 0
        transfer(prefill, decode, 2)


def test_rows_that_could_not_be_prepared_travel_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checker compiles a GPU's kernels for each rank that registers. An error there ends neither checker nor rank."""
    asked = []

    def prepare(reader: rows.RowReader, row_format: RowFormat, stacks: object) -> None:
        asked.append((row_format.widths, stacks is not None))
        raise RuntimeError("no compiler")

    monkeypatch.setitem(workers.CHECKERS, "cpu", 1)
    monkeypatch.setattr(rows.RowReader, "prepare", prepare)
    prefill, plain, sliced = rig.prefill_rank(), rig.decode_rank(), rig.decode_rank(rig.projection(0))
    with rig.serving(prefill, plain, sliced):
        transfer(prefill, plain, 1)
        transfer(prefill, sliced, 2)
        rig.wait(lambda: prefill.agent.stats().internal_errors == 2, "both errors to be counted")
        assert {widths for widths, _ in asked} == {plain.pool.widths, sliced.pool.widths}
        assert (sliced.pool.widths, True) in asked
        assert prefill.agent.stats().threads_alive == 3


def test_an_error_while_checking_fails_the_room_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkers raise an error: prefill's in one room, decode's in the next."""
    monkeypatch.setitem(workers.CHECKERS, "cpu", 1)
    rig.check_apart(monkeypatch)
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    with rig.serving(prefill, decode):
        for room, (module, broken) in enumerate([(sender, prefill), (receiver, decode)], 1):
            with monkeypatch.context() as patch:
                patch.setattr(module, "check_pieces", lambda pieces: 1 / 0)
                rig.begin([prefill], [decode], room, rig.pages(2, 3), [rig.pages(1, 3)])
                rig.fail(room, "division by zero", prefill, decode)
                assert broken.agent.stats().internal_errors == 1
        rig.wait(lambda: prefill.agent.stats().staging_used_bytes == 0, "staging to be free")
        assert prefill.agent.stats().threads_alive == decode.agent.stats().threads_alive == 3
        transfer(prefill, decode, 3)


def test_kernels_that_are_compiled_hold_no_room_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One checker at a time compiles kernels of ranks that register; the other one goes on checking chunks."""
    compiled, prepared = threading.Event(), list[object]()
    monkeypatch.setitem(workers.CHECKERS, "cpu", 2)
    monkeypatch.setattr(rows.RowReader, "prepare", lambda *rank: prepared.append(compiled.wait(60)))
    prefill, decodes = rig.prefill_rank(), [rig.decode_rank(), rig.decode_rank(), rig.decode_rank()]
    with rig.serving(prefill, *decodes):
        for room, decode in enumerate(decodes):
            transfer(prefill, decode, room)
        assert not prepared
        compiled.set()
        rig.wait(lambda: prepared == [True] * len(decodes), "all kernels")
