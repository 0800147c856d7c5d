"""The kernels that make and place a GPU's chunks are compared with their twins in Triton's interpreter.

`test_transfer_chunks` and the transfers of ``wire/`` test the twins.
"""

import contextlib

import numpy as np
import pytest
import torch

from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.transfer.memory import device_rows
from sglang_tpla.transfer.memory.device_rows import DeviceWriter
from sglang_tpla.transfer.memory.layer_table import LayerTable
from sglang_tpla.transfer.memory.pool import CachePool
from tests.triton_interpreter import interpret

SCRIPT = """
import sys
import torch
from row_kernels_case import DEEPSEEK, SMALL, unseen, wrong_chunk
cases = [(case, 3) for case in SMALL] + [(case, 67) for case in (SMALL[1], SMALL[7])] + [(DEEPSEEK[3], 1)]
for (rows, projected), tokens in cases:
    if (wrong := wrong_chunk(rows, projected, tokens, torch.float32, "cpu", few=0.002)) is not None:
        sys.exit(wrong)
if (wrong := unseen(2, torch.float32, "cpu")) is not None:
    sys.exit(wrong)
"""


def test_kernels_do_as_their_twins_do() -> None:
    pytest.importorskip("triton")
    interpret(SCRIPT)


def test_nothing_is_written_after_an_error_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages belong to another request soon, and a kernel that was launched before the error may still be queued."""
    queued: list[object] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            pass

        def record(self, stream: object) -> None:
            pass

        def synchronize(self) -> None:
            queued.clear()

    def launch(*given: object) -> None:
        if queued:
            raise RuntimeError("out of memory")
        queued.append(given)

    pool = CachePool([torch.zeros(8, width + 16) for width in (40, 40, 20)], 64, 16, 4)  # two launches for a chunk
    writer = DeviceWriter.__new__(DeviceWriter)
    writer.pool, writer._table = pool, LayerTable(pool.layers)
    monkeypatch.setattr(writer, "_stream", lambda: None)
    monkeypatch.setattr(writer, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(device_rows, "_on_device", lambda slots, device: torch.from_numpy(slots))
    monkeypatch.setattr(device_rows.row_kernels, "scatter", launch)
    payload = np.ones(pool.payload_bytes(range(3), 2, Part.FULL), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="out of memory"):
        writer.write(range(3), np.array([1, 2]), Part.FULL, payload, None)
    assert not queued
