"""Pools on a GPU: the same transfers, to and from device memory."""

import pytest
import torch

from tests.wire import rig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize("rows", ["raw", "slices", "sketched"])
@pytest.mark.parametrize(("source_device", "target_device"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
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
    with rig.serving(prefill, *ranks):
        for room in range(3):
            rig.transfer(prefill, ranks, room, count=40, cuts=(16,))
