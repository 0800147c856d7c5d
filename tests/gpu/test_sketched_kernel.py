"""The Hopper kernels of sketched rows against float32 on the unpacked rows, with random inputs and poisoned outputs."""

import random
from dataclasses import replace

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

from sglang_tpla.attention.hopper.decode import HopperDecode, variant_for
from sglang_tpla.attention.hopper.sketched import SketchedVariant
from sglang_tpla.attention.hopper.sketched_tiles import TiledVariant
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows

pytestmark = pytest.mark.gpu


def even(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales as the bfloat16 that the format allows, whose last bit is zero."""
    return (scales.to(torch.bfloat16).view(torch.int16) & ~1).view(torch.bfloat16)


DEVICE = torch.device("cuda:0")
# (d, g, r): widths from 64 to 512 at odd multiples of 16, with and without padding; shared columns end inside a step.
LAYOUTS = (
    (512, 1, 0), (512, 2, 64), (512, 4, 64), (512, 8, 64), (512, 8, 0), (512, 2, 416), (256, 2, 32), (448, 1, 0),
    (512, 16, 128), (424, 2, 40), (456, 4, 8), (512, 2, 96), (512, 2, 384), (512, 4, 320),
)  # fmt: skip
# (g, r, heads) of every form: turned values, values by query rows, and tiles.
FORMS = ((1, 0, 16), (2, 64, 32), (4, 64, 64), (8, 64, 128), (2, 64, 64))
# Layouts of w_pad 272 to 320, which the form that unpacks tiles serves from 49 query rows on. Sketches end in a piece.
TILED_LAYOUTS = ((512, 2, 32), (512, 2, 64), (512, 2, 96), (448, 2, 112))


@pytest.mark.parametrize(("d", "groups", "shared"), LAYOUTS)
def test_right_for_every_layout(d: int, groups: int, shared: int) -> None:
    """Sketches of 2, 3 and 4 bits and keys of 8 and 16 bits are right with random heads, query lengths and pages."""
    dice = random.Random(d + groups + shared)
    for bits in (2, 3, 4):
        for rope_bits in (8, 16):
            rows = SketchedRows.of(d, groups, shared, 64, sketch_bits=bits, rope_bits=rope_bits)
            if rows.row_bytes % 16:  # rows shorter than 256 bytes are refused, see below
                continue
            for heads in dice.sample((8, 16, 32, 64, 128), 2):
                query_len, page_size, lengths = dice.randint(1, 4), dice.choice((1, 64)), dice.choice(LENGTHS)
                shape = DecodeShape.of_sketched(rows, heads, query_len, page_size)
                case = random_case(shape, lengths, dice.randrange(2**31))
                error = relative_error(run_hopper(case), case.reference())
                assert error <= BAR, (rows, heads, query_len, page_size, lengths)


@pytest.mark.parametrize(("d", "groups", "shared"), TILED_LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tiles_are_right(d: int, groups: int, shared: int, bits: int) -> None:
    """Every layout is right with keys of 8 and 16 bits and 49 to 128 query rows."""
    dice = random.Random(100 * shared + bits)
    for rope_bits in (8, 16):
        rows = SketchedRows.of(d, groups, shared, 64, sketch_bits=bits, rope_bits=rope_bits)
        for heads, query_len in ((52, 1), (64, 1), (128, 1), (16, 4), (32, 3)):
            page_size, lengths = dice.choice((1, 64)), dice.choice(LENGTHS)
            shape = DecodeShape.of_sketched(rows, heads, query_len, page_size)
            assert isinstance(variant_for(shape), TiledVariant)
            case = random_case(shape, lengths, dice.randrange(2**31))
            error = relative_error(run_hopper(case), case.reference())
            assert error <= BAR, (rows, heads, query_len, page_size, lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(("groups", "heads"), [(1, 16), (2, 32), (2, 64), (2, 128), (4, 64), (8, 128)])
def test_bit_identical_on_repetition(groups: int, heads: int, lengths: list[int]) -> None:
    case = random_case(DecodeShape.of_sketched(SketchedRows.of(512, groups, 64, 64), heads), lengths, 7)
    assert_right_and_repeated(case)


@pytest.mark.parametrize(
    ("d", "groups", "shared", "heads", "query_len"),
    [(512, 1, 0, 16, 1), (512, 2, 64, 16, 2), (512, 2, 64, 32, 2), (512, 4, 64, 64, 1), (424, 2, 40, 128, 3)],
)
def test_scores_far_above_all_before(d: int, groups: int, shared: int, heads: int, query_len: int) -> None:
    """Keys grow towards the end, so either warpgroup raises the reference again and again, in every form."""
    rows = SketchedRows.of(d, groups, shared, 64)
    case = random_case(DecodeShape.of_sketched(rows, heads, query_len), [900, 64, 2000] * 8, 3)
    scales = case.kv_cache[:, rows.scales_offset :].view(torch.bfloat16)
    for request, length in enumerate(case.lengths.tolist()):
        slots = case.table.indices[case.table.starts[request].item() :][:length].long()
        growth = torch.logspace(-1.5, 1, length, device=DEVICE).unsqueeze(1)
        scales[slots] = even(scales[slots].float() * growth)
    assert_right_and_repeated(case)


def test_one_warpgroup_lags() -> None:
    """A few scores are far above all earlier ones, so a warpgroup of scores lags, and stages come free unevenly."""
    rows = SketchedRows.of(424, 2, 40, 64)
    shape = DecodeShape.of_sketched(rows, 128, 3)
    assert isinstance(variant_for(shape), SketchedVariant) and variant_for(shape).stages % 2  # a stage changes hands
    assert_right_and_repeated(random_case(shape, LENGTHS[-1], 4242), more=400)


@pytest.mark.parametrize("token", [70, 130, 899])
@pytest.mark.parametrize(("groups", "shared", "heads"), FORMS)
def test_one_score_outweighs_all(groups: int, shared: int, heads: int, token: int) -> None:
    """For a third of the heads, one score is hundreds above all others, so the warpgroups' references are far apart."""
    rows = SketchedRows.of(512, groups, shared, 64)
    case = random_case(DecodeShape.of_sketched(rows, heads), [900] * 64, 9)
    scales = case.kv_cache[:, rows.scales_offset :].view(torch.bfloat16)
    slots = case.table.indices[case.table.starts.long() + token].long()
    scales[slots, :3] = scales[slots, :3] * 2.0**7
    assert_right_and_repeated(case, more=3)


@pytest.mark.parametrize("heads", [16, 64])
def test_neighbours_of_very_different_size(heads: int) -> None:
    """A token may be up to 2^16 times as large as its neighbour, and queries attend to all tokens equally."""
    rows = SketchedRows.of(512, 2, 64, 64)
    case = random_case(DecodeShape.of_sketched(rows, heads), [900, 64], 8)
    scales = case.kv_cache[:, rows.scales_offset :].view(torch.bfloat16)
    powers = 2.0 ** torch.randint(-16, 1, (len(scales), 1), device=DEVICE)
    scales[:, :3] = (scales[:, :3].float() * powers).to(torch.bfloat16)
    # A query of zeros attends to all tokens equally, and lengths of 1 leave a single token, which may be small.
    case = replace(case, q_latent=case.q_latent * 0.0, q_rope=case.q_rope * 0.0, lengths=case.lengths.clamp(max=1))
    assert relative_error(run_hopper(case), case.reference()) <= BAR


@pytest.mark.parametrize(("groups", "heads"), [(4, 16), (2, 64)])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_queries_of_any_size(factor: float, groups: int, heads: int) -> None:
    """Queries may exceed float16's range if the keys bring the scores back into it."""
    rows = SketchedRows.of(512, groups, 64, 64)
    case = random_case(DecodeShape.of_sketched(rows, heads), [700, 130], 5)
    scales = case.kv_cache[:, rows.scales_offset :].view(torch.bfloat16)
    scales[:, :3] = (scales[:, :3].float() / factor).to(torch.bfloat16)
    key = case.kv_cache[:, rows.rope_offset : rows.rope_offset + rows.rope_bytes].view(torch.bfloat16)
    key.copy_((key.float() / factor).to(torch.bfloat16))
    case = replace(case, q_latent=case.q_latent * factor, q_rope=case.q_rope * factor)
    right = case.reference()
    assert right.isfinite().all()
    assert relative_error(run_hopper(case) * factor, right * factor) <= BAR


@pytest.mark.parametrize("heads", [32, 64])
def test_cuda_graph_follows_refilled_lengths(heads: int) -> None:
    case = random_case(DecodeShape.of_sketched(SketchedRows.of(512, 2, 64, 64), heads), [3000] * 8, 11)
    for lengths, error in errors_of_replays(HopperDecode(case.shape, SCALE, 8, DEVICE), case, REFILLS):
        assert error <= BAR, lengths


def test_short_rows_are_refused() -> None:
    rows = SketchedRows.of(128, 2, 32, 64, sketch_bits=3)
    with pytest.raises(AttentionInputError, match="shorter than 256"):
        HopperDecode(DecodeShape.of_sketched(rows, 16), SCALE, 1, DEVICE)
