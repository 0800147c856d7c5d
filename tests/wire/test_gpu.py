"""Pools on a GPU: the same transfers, to and from device memory."""

import pytest
import torch

from sglang_tpla.transfer.memory import row_kernels
from sglang_tpla.transfer.room import RoomState
from tests.wire import rig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("host", rig.HOSTS)
def test_rows_are_made_after_their_projection(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is computed while a decode server registers holds the kernels up that make its projection."""
    weights = row_kernels.weights

    def held_up(z: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(1_000_000_000)
        return weights(z)

    monkeypatch.setattr(row_kernels, "weights", held_up)
    prefill, decode = rig.prefill_rank(device="cuda"), rig.decode_rank(rig.projection(0), device="cuda", host=host)
    with rig.serving(prefill, decode):
        rig.transfer(prefill, decode, count=9)


@pytest.mark.parametrize("host", rig.HOSTS)
def test_rows_are_written_after_steps_that_still_write_there(host: str | None) -> None:
    """SGLang frees slots into which a step that is under way on the engine's stream still writes."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank(device="cuda", host=host)
    steps = torch.cuda.Stream()
    with rig.serving(prefill, decode):
        rig.transfer(prefill, decode, 1)  # so that the next one is fast
        rig.close(1, prefill, decode)
        source, target = rig.pages(0, 90), rig.pages(1, 90)
        prefill.agent.open_room(2)
        decode.agent.open_room(2, [prefill.peer])
        rig.wait(lambda: decode.agent.poll(2) == RoomState.WAITING, "registration")
        torch.cuda.synchronize()
        with torch.cuda.stream(steps):
            torch.cuda._sleep(1_000_000_000)  # cycles: half a second, longer than the transfer
            for layer in decode.pool.layers:
                layer.fill_(3)
        step = steps.record_event()
        decode.agent.request(2, target, metadata_row=3, expected_ranks=1, after=step)
        rig.send(prefill, 2, source)
        rig.succeed(2, prefill, decode)
        assert step.query()
        rig.check_rows(prefill, decode, source, target, 90 * rig.PAGE)


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
