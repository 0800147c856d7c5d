"""FP8 rows: the sender quantises its float32 projection into exactly the receiver's bytes, and only these travel."""

import pytest
import torch

from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.room import RoomState, TransferError
from tests.wire import rig


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize(("groups", "shared"), [(1, 64), (2, 16), (2, 0), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_the_senders_bytes(dtype: torch.dtype, groups: int, shared: int, host: str | None) -> None:
    """Four ranks of one host: shared columns, key and their scale once, each group's own columns and scale once."""
    width, count, pages = shared + (rig.LATENT - shared) // groups, 4, 20
    width += -width % 16
    prefill = rig.prefill_rank(dtype)
    ranks = [
        rig.decode_rank(
            rig.projection(rank % groups, width, shared) if groups > 1 else None,
            rank=rank, size=count, host=host, fp8=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=pages, cuts=(12,))
        per_token = prefill.agent.metric(1).wire_bytes / (rig.LAYERS * pages * rig.PAGE)
        whole = width + 2 * rig.ROPE + 16
        once = whole if groups == 1 else shared + 2 * rig.ROPE + 4 + groups * (width - shared + 4)
        assert per_token == (count * whole if host == "" else once)


def test_one_prefill_rank_serves_plain_and_fp8_rows_side_by_side() -> None:
    """The same projection, cached in both formats, in one room: no chunk is taken for the other's."""
    prefill = rig.prefill_rank()
    z = rig.projection(0, 48, 16)
    ranks = [rig.decode_rank(z, rank=rank, size=2, fp8=bool(rank)) for rank in range(2)]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=9)


def test_a_prefill_rank_with_an_fp8_cache_of_its_own_is_refused() -> None:
    prefill, decode = rig.prefill_rank(torch.float8_e4m3fn), rig.decode_rank(rig.projection(0, 48), fp8=True)
    with rig.serving(prefill, decode):
        decode.agent.open_room(1, [prefill.peer])
        assert rig.ended(decode.agent, 1) == RoomState.FAILED
        reason = decode.agent.failure(1)
        assert "float8_e4m3fn" in reason and "fp8_rows" in reason and "fp8_e4m3 on decode alone" in reason


def test_pools_that_hold_no_fp8_rows() -> None:
    from sglang_tpla.cache_rows.row_format import RowFormat

    with pytest.raises(TransferError, match="holds bytes"):
        CachePool([torch.zeros(4, 96)], 64, 16, 1, encoding=RowFormat.fp8([48], [48], 16))
    with pytest.raises(TransferError, match="multiple of 16 values, got width 40"):
        CachePool([torch.zeros(4, 40 + 48, dtype=torch.uint8)], 64, 16, 1, encoding=RowFormat.fp8([40], [40], 16))
