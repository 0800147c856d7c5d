"""The PyTorch twins of sketched rows are compared with rows read byte by byte and with the equation of attention.

The kernel that writes such rows is compared with its twin in Triton's interpreter.
"""

import pytest
import torch
from write_case import random_write

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable
from sglang_tpla.attention.reference import ReferenceDecode
from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.reference_model.rotary import rotate
from tests.sketched_reference import assert_row, read_row
from tests.triton_interpreter import interpret

KINDS = [
    GroupRows(SketchedRows.of(24, 1, 24, 6), 0),
    GroupRows(SketchedRows.of(24, 2, 8, 6), 1),
    GroupRows(SketchedRows.of(40, 4, 8, 4, sketch_bits=3, rope_bits=8), 2),
    GroupRows(SketchedRows.of(31, 3, 7, 2, sketch_bits=2), 0),
    GroupRows(SketchedRows.of(512, 8, 64, 64), 5),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_are_rounded_from_the_float32_projection(kind: GroupRows, dtype: torch.dtype) -> None:
    rows = kind.rows
    case = random_write(5, rows.latent_dim, kind.columns, rows.rope_dim, rotated=False, dtype=dtype, seed=3)
    cache = torch.full((len(case.cache), 1, rows.row_bytes), 255, dtype=torch.uint8)
    write(case.write(1e-5, cache=cache, sketched=kind))
    assert case.z is not None
    normed = torch.nn.functional.rms_norm(case.latent.float(), (rows.latent_dim,), case.weight.float(), 1e-5)
    z = normed.to(dtype).double() @ case.z.double()
    key = case.k_rope.bfloat16().double() if rows.rope_bits == 16 else case.k_rope.double()
    for token, slot in enumerate(case.slots.tolist()):
        assert_row(bytes(cache[slot, 0].tolist()), rows, kind.group, z[token].numpy(), key[token].numpy())
    others = torch.ones(len(cache), dtype=torch.bool)
    others[case.slots] = False
    assert (cache[others] == 255).all()
    again = torch.full_like(cache, 255)
    given = (normed.to(dtype).float() @ case.z, case.k_rope, case.slots, again)
    reference.write(CacheWrite(*given, sketched=kind))
    assert torch.equal(again, cache)  # a server writes rows so if the norm has been done


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("query_len", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [1, 5])
def test_attention_is_the_equation_over_rows_read_byte_by_byte(kind: GroupRows, query_len: int, heads: int) -> None:
    rows, scale, page = kind.rows, 0.2, 2
    shape = DecodeShape.of_rows(kind, heads, query_len=query_len, page_size=page, dtype=torch.float32)
    generator = torch.Generator().manual_seed(query_len)
    lengths = torch.tensor([7, 0, 1, 12], dtype=torch.int32)
    pages = torch.randperm(40, generator=generator).to(torch.int32)
    table = PageTable(pages, torch.arange(0, 40, 10, dtype=torch.int32), page)
    cache = torch.full((80, rows.row_bytes), 255, dtype=torch.uint8)
    z = torch.randn(80, kind.columns, generator=generator)
    key = torch.randn(80, rows.rope_dim, generator=generator)
    reference.write(CacheWrite(z, key, torch.arange(80), cache, sketched=kind))
    tokens = len(lengths) * query_len
    q_latent = torch.randn(tokens, heads, rows.score_columns, generator=generator)
    q_rope = torch.randn(tokens, heads, rows.rope_dim, generator=generator)
    twin = ReferenceDecode(shape, scale)
    twin.plan(table, lengths)
    out = twin.run(q_latent, q_rope, cache)
    assert out.shape == (tokens, heads, rows.w_pad)
    for request, length in enumerate(lengths.tolist()):
        slots = [int(pages[10 * request + t // page]) * page + t % page for t in range(length)]
        read = [read_row(bytes(cache[slot].tolist()), rows) for slot in slots]
        for j in range(query_len):
            token, seen = request * query_len + j, length - query_len + 1 + j
            if seen < 1:
                assert not out[token].any()
                continue
            latent = torch.stack([torch.from_numpy(row.latent) for row in read[:seen]])
            sketch = torch.stack([torch.from_numpy(row.sketched) for row in read[:seen]])
            turned = torch.stack([torch.from_numpy(row.rope) for row in read[:seen]])
            q = q_latent[token].double()
            score = q[:, : rows.w] @ latent.T + q[:, rows.w_pad :] @ sketch.T
            score += q_rope[token].double() @ turned.double().T
            expected = (scale * score).softmax(-1) @ latent
            torch.testing.assert_close(out[token, :, : rows.w].double(), expected, rtol=1e-4, atol=1e-5)
            assert not out[token, :, rows.w :].any()


@pytest.mark.parametrize("halves", [False, True])
def test_the_reference_models_keys_have_their_columns_where_a_cache_has_them(halves: bool) -> None:
    """The rounding of an 8-bit key depends on the column's number, so another order would give other rows."""
    key, angles = torch.randn(5, 12), torch.randn(5, 6)
    turned = rotate(key, angles.cos(), angles.sin(), halves)
    cached = reference.rotate_pairs(key, torch.cat([angles.cos(), angles.sin()], -1), neox=halves)
    torch.testing.assert_close(turned, cached)


@pytest.mark.parametrize("where", ["shared", "own", "another group's sketch", "key"])
def test_what_is_not_finite_is_seen_by_whoever_reads_the_row(where: str) -> None:
    """A decode step cannot refuse a row, so its result must not look sound."""
    kind = GroupRows(SketchedRows.of(24, 2, 8, 6, rope_bits=8), 0)
    rows, shape = kind.rows, DecodeShape.of_rows(kind, 2, dtype=torch.float32)
    z, key = torch.randn(3, kind.columns), torch.randn(3, rows.rope_dim)
    column = {"shared": 2, "own": rows.shared + 1, "another group's sketch": rows.w + rows.own + 3, "key": 0}[where]
    (key if where == "key" else z)[1, column] = float("nan")
    cache = torch.zeros(3, rows.row_bytes, dtype=torch.uint8)
    reference.write(CacheWrite(z, key, torch.arange(3), cache, sketched=kind))
    twin = ReferenceDecode(shape, 1.0)
    zero = torch.zeros(1, dtype=torch.int32)
    twin.plan(PageTable(torch.arange(3, dtype=torch.int32), zero), zero + 3)
    out = twin.run(torch.ones(1, 2, rows.score_columns), torch.ones(1, 2, rows.rope_dim), cache)
    assert out.isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    kind = KINDS[1]
    cache = torch.zeros(4, kind.row_items, dtype=torch.uint8)
    z, key, slots = torch.zeros(2, kind.columns), torch.zeros(2, 6), torch.tensor([0, 1])
    for changes, said in (
        ({"latent": z[:, 1:]}, "latent must be"),
        ({"cache": cache[:, 1:]}, "cache must be"),
        ({"cache": cache.float()}, "cache must be torch.uint8"),
        ({"slots": slots[:1]}, "slots must be"),
        ({"weight": torch.ones(24), "latent": torch.zeros(2, 24), "z": torch.zeros(24, 7)}, "z must be"),
    ):
        inputs = {"latent": z, "k_rope": key, "slots": slots, "cache": cache, "sketched": kind} | changes
        with pytest.raises(AttentionInputError, match=said):
            CacheWrite(**inputs)
    with pytest.raises(AttentionInputError, match="latent_dim"):
        DecodeShape(kind.rows.w_pad + 1, 2, 6, sketched=kind.rows)


INTERPRETED = """
import sys, torch
from sketched_case import KINDS, difference, difference_of_odd_values, unseen
for kind in KINDS:
    for tokens, rotate in ((1, "pairs"), (3, None), (19, "halves")):
        if (wrong := difference(kind, tokens, rotate, torch.float32, "cpu", few=0.002)) is not None:
            sys.exit(wrong)
    if (wrong := difference_of_odd_values(kind, "cpu") or unseen(kind, "cpu")) is not None:
        sys.exit(wrong)
for kind, tokens, projected in ((KINDS[0], 3, False), (KINDS[3], 67, True)):
    if (wrong := difference(kind, tokens, "pairs", torch.float32, "cpu", few=0.002, projected=projected)) is not None:
        sys.exit(wrong)
"""


def test_the_writing_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    interpret(INTERPRETED)
