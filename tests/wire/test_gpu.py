"""Pools on a GPU: the same transfers, to and from device memory."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sglang_tpla.transfer.room import RoomState
from tests.wire import rig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("host", [None, "far", ""])
@pytest.mark.parametrize("rows", ["raw", "slices", "sketched"])
@pytest.mark.parametrize(
    ("source_device", "target_device"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")]
)
def test_rows_in_device_memory(source_device: str, target_device: str, rows: str, host: str | None) -> None:
    prefill = rig.prefill_rank(device=source_device)
    ranks = [
        rig.decode_rank(
            {"raw": None, "slices": rig.projection(rank), "sketched": rig.sketched_projection(rank)}[rows],
            rank=rank,
            size=2,
            host=host,
            device=target_device,
        )
        for rank in range(2)
    ]
    with contextlib.ExitStack() as stack:
        for item in (prefill, *ranks):
            stack.enter_context(contextlib.closing(item.agent))
        for room in range(3):
            prefill.agent.open_room(room)
            for rank in ranks:
                rig.ask(rank, [prefill.peer], room, rig.pages(room, 40), expected=2)
            prefill.agent.send(room, rig.pages(50, 40)[:16], last=False)
            prefill.agent.send(room, rig.pages(50, 40)[16:], last=True, metadata_row=0)
            for item in (prefill, *ranks):
                assert rig.ended(item.agent, room) == RoomState.SUCCESS, item.agent.failure(room)
            for rank in ranks:
                rig.check_rows(prefill, rank, rig.pages(50, 40), rig.pages(room, 40), 40 * rig.PAGE)
