"""The threads of an agent: the device that each works on, and the work that is done before they begin."""

import contextlib
import threading

import pytest
import torch

from sglang_tpla.config import Settings
from sglang_tpla.transfer.memory import native
from sglang_tpla.transfer.workers import Workers
from tests.wire import rig


def test_every_thread_works_on_the_gpu_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that begins on GPU 0 would take memory of a GPU that is another rank's."""
    device, chosen = torch.device("cuda", 5), dict[str, torch.device]()
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.setdefault(threading.current_thread().name, device)
    )
    workers = Workers("decode", Settings("decode"), 3, device)
    with contextlib.closing(workers):
        workers.start(lambda: None, lambda: None, lambda: None, lambda reason: None)
        rig.wait(lambda: len(chosen) == workers.alive == 5, "all threads to choose their device")
    assert set(chosen.values()) == {device}


def test_the_library_is_there_before_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compile it takes seconds, in which an agent's I/O thread would answer nobody."""
    asked, compiled = list[str](), native.compiled
    monkeypatch.setattr(
        native, "compiled", lambda compiler: asked.append(threading.current_thread().name) or compiled(compiler)
    )
    native.library.cache_clear()
    prefill, decode = rig.prefill_rank(), rig.decode_rank(host="far")
    with rig.serving(prefill, decode):
        rig.transfer(prefill, decode)
    assert asked == [threading.current_thread().name]


def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Anybody can connect to a prefill rank's ports; each connection is counted."""
    workers, now = Workers("prefill", Settings("prefill"), 0, torch.device("cpu")), 0.0
    workers.io.now = lambda: now
    for _ in range(10_000):
        workers.drop("refused", "a connection without a key")
    workers.drop("malformed_dropped", "a frame of another kind")
    assert workers.counts["refused"] == 10_000
    assert caplog.text.count("without a key") == 100 and caplog.text.count("not logged for a while") == 1
    assert "a frame of another kind" in caplog.text
    now = 61.0
    workers.drop("refused", "a connection a minute later")
    assert "a connection a minute later" in caplog.text
    workers.io.free()
