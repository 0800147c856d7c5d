"""The Hopper decode kernel against the float32 reference, with fresh random inputs and poisoned outputs."""

import random

import pytest
import torch
from decode_case import (
    BAR,
    LENGTHS,
    REFILLS,
    SCALE,
    assert_right_and_repeated,
    errors_of_replays,
    random_case,
    relative_error,
    run_hopper,
)
from plan_twin import plan_parts

from sglang_tpla.attention.backends import choose
from sglang_tpla.attention.hopper.decode import HopperDecode
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")


@pytest.mark.parametrize("latent_dim", range(64, 513, 32))
def test_right_at_every_width(latent_dim: int) -> None:
    """The kernel is right for every combination of heads, query length and page size, over lengths with odd ends."""
    dice = random.Random(latent_dim)
    for heads in (8, 16, 32, 64, 128):
        for query_len in (1, 2, 3, 4):
            page_size = dice.choice((1, 64))
            lengths = dice.choice(LENGTHS)
            case = random_case(DecodeShape(latent_dim, heads, 64, query_len, page_size), lengths, dice.randrange(2**31))
            error = relative_error(run_hopper(case), case.reference())
            assert error <= BAR, (latent_dim, heads, query_len, page_size, lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(("latent_dim", "heads"), [(256, 32), (128, 64), (256, 128), (512, 16)])
def test_bit_identical_on_repetition(latent_dim: int, heads: int, lengths: list[int]) -> None:
    case = random_case(DecodeShape(latent_dim, heads), lengths, 7)
    assert_right_and_repeated(case)


def test_device_plan_equals_its_twin() -> None:
    dice = random.Random(3)
    kernel = HopperDecode(DecodeShape(128, 16), SCALE, 300, DEVICE)
    batches = [*LENGTHS, [32768] * 16, [4096] * 128, [131072], [0, 0], [dice.randrange(9000) for _ in range(299)]]
    batches += [
        [dice.choice((0, 1, 64, 65, dice.randrange(70000))) for _ in range(dice.randrange(1, 60))] for _ in range(40)
    ]
    for lengths in batches:
        tensor = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
        kernel.plan(PageTable.from_csr(indptr, tensor), tensor)
        twin = plan_parts(lengths, kernel.parts)
        assert [tuple(row) for row in kernel._part_begin[:, :3].tolist()] == list(twin.part_begin)
        assert kernel._split_start[: len(lengths) + 1].tolist() == list(twin.split_start)


def test_cuda_graph_follows_refilled_lengths() -> None:
    case = random_case(DecodeShape(256, 32), [3000] * 8, 11)
    for lengths, error in errors_of_replays(HopperDecode(case.shape, SCALE, 8, DEVICE), case, REFILLS):
        assert error <= BAR, lengths


def test_newest_rows_may_be_written_by_the_kernel_before() -> None:
    """The kernel before lets its successor start early; it is a run of this kernel that outputs the newest rows."""
    writer_case = random_case(DecodeShape(128, 8), [60_000], 13)
    writer = HopperDecode(writer_case.shape, SCALE, 1, DEVICE)
    writer.plan(writer_case.table, writer_case.lengths)
    shape = DecodeShape(128, 16, query_len=4, page_size=64)
    case = random_case(shape, [900, 316, 70], 14)
    page = case.table.indices[case.table.starts[1] + 316 // 64].item()
    # These are tokens 312 to 315, and four slots that nothing uses.
    rows = case.kv_cache[page * 64 + 56 : page * 64 + 64]
    kernel = HopperDecode(shape, SCALE, 3, DEVICE)
    kernel.plan(case.table, case.lengths)
    out = torch.empty_like(case.q_latent)
    written = rows[:, :128].unsqueeze(0)  # [1, 8 heads, 128]
    for _ in range(3):
        rows[:, :128] = float("nan")
        out.fill_(float("nan"))
        writer.run(writer_case.q_latent, writer_case.q_rope, writer_case.kv_cache, written)
        kernel.run(case.q_latent, case.q_rope, case.kv_cache, out)
        assert relative_error(out, case.reference()) <= BAR


def test_req_to_token_rows_and_strided_queries() -> None:
    """The kernel takes SGLang's form of page table, and queries that a batched product leaves transposed."""
    shape = DecodeShape(192, 16)
    case = random_case(shape, [700, 33, 900], 5)
    width = 1000
    req_to_token = torch.zeros(6, width, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([4, 0, 2], device=DEVICE)
    for i, row in enumerate(rows.tolist()):
        start, length = case.table.starts[i].item(), case.lengths[i].item()
        req_to_token[row, :length] = case.table.indices[start : start + length]
    kernel = HopperDecode(shape, SCALE, 3, DEVICE)
    kernel.plan(PageTable.from_req_to_token(req_to_token, rows), case.lengths)
    transposed = case.q_latent.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    out = kernel.run(transposed, case.q_rope, case.kv_cache.unsqueeze(1))
    assert relative_error(out, case.reference()) <= BAR


def test_misaligned_rows_are_refused() -> None:
    case = random_case(DecodeShape(64, 8), [10], 1)
    kernel = HopperDecode(case.shape, SCALE, 1, DEVICE)
    kernel.plan(case.table, case.lengths)
    wide = torch.zeros(1, 8, 68, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(AttentionInputError, match="16-byte"):
        kernel.run(wide[..., 4:], case.q_rope, case.kv_cache)


@pytest.mark.parametrize("page_size", [1, 64])
def test_flashinfer_at_full_width(page_size: int) -> None:
    pytest.importorskip("flashinfer")
    from sglang_tpla.attention.flashinfer import FlashInferDecode

    case = random_case(DecodeShape(512, 16, page_size=page_size), [1000, 77, 4096], 2)
    assert choose(case.shape, (9, 0)) == "flashinfer_fa3"
    flashinfer = FlashInferDecode(case.shape, SCALE, DEVICE, "fa3")
    flashinfer.plan(case.table, case.lengths)
    error = relative_error(flashinfer.run(case.q_latent, case.q_rope, case.kv_cache.nan_to_num()), case.reference())
    assert error <= BAR
