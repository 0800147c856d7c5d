"""FP8 rows: the sender quantises its float32 projection into exactly the receiver's bytes, and only these travel."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.room import RoomState, TransferError
from tests.wire import rig

HOSTS = [None, "far", ""]  # memory shared with prefill, among decode ranks only, not at all


@pytest.mark.parametrize("host", HOSTS)
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
    with contextlib.ExitStack() as stack:
        for item in (prefill, *ranks):
            stack.enter_context(contextlib.closing(item.agent))
        prefill.agent.open_room(1)
        targets = [rig.pages(rank, pages) for rank in range(count)]
        for rank, target in zip(ranks, targets, strict=True):
            rig.ask(rank, [prefill.peer], 1, target, expected=count)
        source = rig.pages(50, pages)
        prefill.agent.send(1, source[:12], last=False)
        prefill.agent.send(1, source[12:], last=True, metadata_row=0)
        for item in (prefill, *ranks):
            assert rig.ended(item.agent, 1) == RoomState.SUCCESS, item.agent.failure(1)
        for rank, target in zip(ranks, targets, strict=True):
            rig.check_rows(prefill, rank, source, target, pages * rig.PAGE)
        per_token = prefill.agent.metric(1).wire_bytes / (rig.LAYERS * pages * rig.PAGE)
        whole = width + 2 * rig.ROPE + 16
        once = whole if groups == 1 else shared + 2 * rig.ROPE + 4 + groups * (width - shared + 4)
        assert per_token == (count * whole if host == "" else once)


def test_one_prefill_rank_serves_plain_and_fp8_rows_side_by_side() -> None:
    """The same projection, cached in both formats, in one room: no chunk is taken for the other's."""
    prefill = rig.prefill_rank()
    z = rig.projection(0, 48, 16)
    ranks = [rig.decode_rank(z, rank=rank, size=2, fp8=bool(rank)) for rank in range(2)]
    with contextlib.ExitStack() as stack:
        for item in (prefill, *ranks):
            stack.enter_context(contextlib.closing(item.agent))
        prefill.agent.open_room(1)
        source, targets = rig.pages(5, 9), [rig.pages(rank, 9) for rank in range(2)]
        for rank, target in zip(ranks, targets, strict=True):
            rig.ask(rank, [prefill.peer], 1, target, expected=2)
        prefill.agent.send(1, source, last=True, metadata_row=0)
        for rank, target in zip(ranks, targets, strict=True):
            assert rig.ended(rank.agent, 1) == RoomState.SUCCESS, rank.agent.failure(1)
            rig.check_rows(prefill, rank, source, target, 9 * rig.PAGE)


def test_a_prefill_rank_with_an_fp8_cache_of_its_own_is_refused() -> None:
    prefill, decode = rig.prefill_rank(torch.float8_e4m3fn), rig.decode_rank(rig.projection(0, 48), fp8=True)
    with contextlib.closing(prefill.agent), contextlib.closing(decode.agent):
        decode.agent.open_room(1, [prefill.peer])
        assert rig.ended(decode.agent, 1) == RoomState.FAILED
        reason = decode.agent.failure(1)
        assert "float8_e4m3fn" in reason and "fp8_rows" in reason and "fp8_e4m3 on decode alone" in reason


def test_pools_that_hold_no_fp8_rows() -> None:
    from sglang_tpla.cache_rows.row_format import RowFormat

    with pytest.raises(TransferError, match="holds bytes"):
        CachePool([torch.zeros(4, 96)], 64, 16, 1, encoding=RowFormat.fp8([48], [48], 16))
    with pytest.raises(TransferError, match="multiple of 16 values, got width 40"):
        CachePool(
            [torch.zeros(4, 40 + 48, dtype=torch.uint8)], 64, 16, 1, encoding=RowFormat.fp8([40], [40], 16)
        )
