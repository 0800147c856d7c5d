"""The threads of an agent: the device that each works on."""

import contextlib
import threading

import pytest
import torch

from sglang_tpla.config import Settings
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
