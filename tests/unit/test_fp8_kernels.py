"""FP8 rows written and read by the kernels in Triton's interpreter, and by their twins, at odd sizes."""

from functools import partial

import pytest
import torch
from decode_case import SCALE, random_case
from write_case import random_write

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.fp8.decode import column_blocks
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable
from sglang_tpla.attention.reference import ReferenceDecode
from sglang_tpla.cache_rows.fp8 import row_bytes
from tests.fp8_reference import assert_row, read_row
from tests.triton_interpreter import interpret

INTERPRETED = """
import sys, torch
from decode_case import SCALE, random_case, relative_error
from write_case import fp8_write_case, same_rows
from sglang_tpla.attention.cache_write import fp8 as fp8_write
from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.fp8.decode import Fp8Decode, Tiling
from sglang_tpla.attention.interface import DecodeShape
for width, rope, heads, query_len, page, shared, lengths in (
    (80, 32, 3, 1, 1, 32, [1, 70, 0, 33]),
    (96, 8, 5, 3, 4, 0, [2, 90, 17]),
    (64, 64, 2, 1, 1, 64, [5, 40]),
    (160, 64, 9, 2, 1, 20, [33]),
):
    shape = DecodeShape(width, heads, rope, query_len, page, torch.float32, shared)
    case = random_case(shape, lengths, seed=width, device="cpu")
    kernel = Fp8Decode(shape, SCALE, len(lengths) + 1, "cpu", Tiling(16, 16, 4, 2))
    kernel.plan(case.table, case.lengths)
    out = kernel.run(case.q_latent, case.q_rope, case.kv_cache, torch.full_like(case.q_latent, float("nan")))
    error = relative_error(out, case.reference())
    if not error <= 1e-5:
        sys.exit(f"{shape}: error {error}")
for tokens in (1, 3, 19):
    for d, w, rope, shared in ((40, 32, 8, 16), (130, 48, 8, 0), (32, None, 16, 32), (70, 64, 16, 20)):
        for rotate in (None, "pairs", "halves"):
            case, twin = (fp8_write_case(tokens, d, w, rope, rotate is not None, torch.float32, 7) for _ in "ab")
            fp8_write.launch(case.write(1e-5, rotate, fp8_shared=shared))
            reference.write(twin.write(1e-5, rotate, fp8_shared=shared))
            if (wrong := same_rows(case, twin, rope, True)) is not None:
                sys.exit(f"write of {tokens} x {d} -> {w}, r {shared}, {rotate}: {wrong}")
    z, key = torch.randn(tokens, 48), torch.randn(tokens, 8)
    case, twin = (fp8_write_case(tokens, 48, None, 8, False, torch.float32, 9) for _ in "ab")
    fp8_write.launch(CacheWrite(z, key, case.slots, case.cache, fp8_shared=16))
    reference.write(CacheWrite(z, key, twin.slots, twin.cache, fp8_shared=16))
    if (wrong := same_rows(case, twin, 8, True)) is not None:
        sys.exit(f"write of {tokens} given rows: {wrong}")
"""


def test_kernels_in_the_interpreter() -> None:
    interpret(INTERPRETED)


@pytest.mark.parametrize("shared", [0, 20, 48])
@pytest.mark.parametrize("query_len", [1, 3])
def test_the_twin_is_the_formula_over_rows_read_byte_by_byte(shared: int, query_len: int) -> None:
    shape = DecodeShape(48, 3, 16, query_len, 2, torch.float32, shared)
    case = random_case(shape, [7, 0, 1, 20], seed=shared, device="cpu")
    twin = ReferenceDecode(shape, SCALE)
    twin.plan(case.table, case.lengths)
    out = twin.run(case.q_latent, case.q_rope, case.kv_cache)
    for request, length in enumerate(case.lengths.tolist()):
        at = int(case.table.starts[request])
        pages = case.table.indices[at : at + -(-length // 2)].tolist()
        slots = [2 * page + half for page in pages for half in (0, 1)][:length]
        read = partial(read_row, w=48, rope=16, shared=shared)
        rows = [read(bytes(case.kv_cache[slot].tolist())) for slot in slots]
        for j in range(query_len):
            token, seen = request * query_len + j, length - query_len + 1 + j
            if seen < 1:
                assert not out[token].any()
                continue
            z = torch.stack([torch.from_numpy(value) for value, _ in rows[:seen]])
            key = torch.stack([torch.from_numpy(turned).double() for _, turned in rows[:seen]])
            score = case.q_latent[token].double() @ z.T + case.q_rope[token].double() @ key.T
            expected = (SCALE * score).softmax(-1) @ z
            torch.testing.assert_close(out[token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w", [None, 48])
def test_written_rows_are_quantised_from_the_float32_projection(w: int | None) -> None:
    case = random_write(5, 64, w, 16, rotated=False, dtype=torch.bfloat16, seed=3)
    width = 64 if w is None else w
    cache = torch.full((len(case.cache), 1, row_bytes(width, 16)), 255, dtype=torch.uint8)
    reference.write(case.write(1e-5, cache=cache, fp8_shared=20))
    wide = torch.nn.functional.rms_norm(case.latent.float(), (64,), case.weight.float(), 1e-5)
    z = wide.bfloat16().double()
    z = z if case.z is None else z @ case.z.double()
    for token, slot in enumerate(case.slots.tolist()):
        row = bytes(cache[slot, 0].tolist())
        assert_row(row, z[token].numpy(), case.k_rope[token].float().numpy(), 20)
    others = torch.ones(len(cache), dtype=torch.bool)
    others[case.slots] = False
    assert (cache[others] == 255).all()


@pytest.mark.parametrize(
    ("shared", "w", "blocks"),
    [(0, 512, (0, 0, 512, 0)), (64, 160, (64, 0, 64, 32)), (32, 80, (32, 0, 32, 16)), (512, 512, (512, 0, 0, 0)),
     (128, 480, (128, 0, 256, 96)), (20, 64, (20, 0, 32, 12)), (96, 96, (64, 32, 0, 0)), (8, 64, (8, 0, 32, 24))],
)  # fmt: skip
def test_column_blocks_cover_every_column(shared: int, w: int, blocks: tuple[int, ...]) -> None:
    found = column_blocks(shared, w)
    assert sum(found) == w and sum(found[:2]) == shared
    assert found == blocks or min(size for size in blocks if size) < 16


def test_refusals() -> None:
    cache = torch.zeros(4, 96, dtype=torch.uint8)
    z, key, slots = torch.zeros(2, 48), torch.zeros(2, 16), torch.tensor([0, 1])
    with pytest.raises(
        AttentionInputError, match=r"cache must be torch.uint8 \[4, 96\] for 2 tokens; got torch.float32"
    ):
        CacheWrite(z, key, slots, cache.float(), fp8_shared=16)
    with pytest.raises(AttentionInputError, match="slots must be"):
        CacheWrite(z, key, slots[:1], cache, fp8_shared=16)
    with pytest.raises(AttentionInputError, match=r"fp8_shared must lie in 0...48; got 49"):
        DecodeShape(48, 2, 16, fp8_shared=49)
    with pytest.raises(AttentionInputError, match=r"multiple of 16 values, got width 40.*--kv-cache-dtype auto"):
        DecodeShape(40, 2, 16, fp8_shared=0)
    twin = ReferenceDecode(DecodeShape(48, 2, 16, dtype=torch.float32, fp8_shared=0), 1.0)
    empty = torch.zeros(0, dtype=torch.int32)
    twin.plan(PageTable(empty, empty), empty)
    with pytest.raises(AttentionInputError, match=r"kv_cache must be torch.uint8 \[4, 96\]"):
        twin.run(torch.zeros(0, 2, 48), torch.zeros(0, 2, 16), torch.zeros(4, 64))
