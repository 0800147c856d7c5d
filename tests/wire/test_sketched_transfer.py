"""Sketched rows: the sender encodes exactly the receiver's bytes; the common part travels once to a host."""

import msgspec
import numpy as np
import pytest
import torch

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.transfer.memory.pool import CachePool
from sglang_tpla.transfer.memory.projection import Projection
from sglang_tpla.transfer.prefill.compatibility import mismatch
from sglang_tpla.transfer.room import TransferError
from tests.wire import rig
from tests.wire.fakes import hello


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize(
    ("groups", "shared", "bits", "rope_bits"),
    [(1, 64, (4, 4, 4), 16), (2, 16, (4, 4, 2), 16), (2, 0, (3, 3, 3), 8), (4, 32, (4, 2, 4), 8),
     (8, 0, (4, 4, 4), 16), (2, 64, (4, 4, 4), 16)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_the_senders_bytes(
    dtype: torch.dtype, groups: int, shared: int, bits: tuple[int, ...], rope_bits: int, host: str | None
) -> None:
    """Eight ranks of one host get sketches, key and shared columns (both roundings) once, own columns once a group."""
    count, pages = 8, 20
    prefill = rig.prefill_rank(dtype)
    projections = [rig.sketched_projection(group, groups, shared, bits, rope_bits) for group in range(groups)]
    ranks = [rig.decode_rank(projections[rank % groups], rank=rank, size=count, host=host) for rank in range(count)]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=pages, cuts=(pages // 2,))
        per_token = prefill.agent.metric(1).wire_bytes / (pages * rig.PAGE)
        whole = sum(rows.row_items for rows in ranks[0].pool.row_format.layers)
        n = (rig.LATENT - shared) // groups
        turns = 2 if n else 1  # shared columns and keys of bytes come in the roundings of even and of odd groups
        key = rig.ROPE * (turns if rope_bits == 8 else 2)
        parts = sum(turns * shared + key + groups * n * b // 8 + 6 + groups * (n + 2 if n else 0) for b in bits)
        assert per_token == (count * whole if host == "" else whole if groups == 1 else parts)


@pytest.mark.parametrize("host", rig.HOSTS)
def test_padding_is_there_however_a_row_came(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part brings the padding; rows that come whole have it."""
    monkeypatch.setattr(rig, "LATENT", 336)
    z = [rig.sketched_projection(group, 2, 64, (4, 3, 4), 8) for group in range(2)]
    assert z[0].sketched is not None
    assert all(isinstance(kind, GroupRows) and kind.rows.w_pad == kind.rows.w + 8 for kind in z[0].sketched.layers)
    prefill = rig.prefill_rank(torch.float32)
    ranks = [rig.decode_rank(z[rank % 2], rank=rank, size=4, host=host) for rank in range(4)]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=4, cuts=(2,))  # the check reads the rows byte by byte


@pytest.mark.parametrize("host", rig.HOSTS)
@pytest.mark.parametrize("rope_bits", [16, 8])
@pytest.mark.parametrize(("groups", "shared"), [(2, 16), (3, 16), (4, 32), (2, 64)])
def test_decode_writes_a_new_token_as_prefill_sends_it(
    groups: int, shared: int, rope_bits: int, host: str | None
) -> None:
    """The rows of each group are equal bit by bit, whether they came whole or in two parts.

    Sums of small whole numbers are exact in float32 in any order, so that a projection has only one result.
    """
    prefill, count = rig.prefill_rank(torch.float32), 8
    whole = torch.Generator().manual_seed(groups)
    for layer in prefill.pool.layers:
        layer[:, : rig.LATENT] = torch.randint(-40, 41, (len(layer), rig.LATENT), generator=whole)
    ranks = []
    for rank in range(2 * groups):
        z = rig.sketched_projection(rank % groups, groups, shared, (4, 2, 4), rope_bits)
        matrices = [(8 * matrix).round() for matrix in z.matrices]
        z = Projection(matrices, list(z.shared), sketched=z.sketched)
        ranks.append(rig.decode_rank(z, rank=rank, size=2 * groups, host=host))
    source, targets = rig.pages(50, count), [rig.pages(rank, count) for rank in range(len(ranks))]
    with rig.serving(prefill, *ranks):
        rig.begin([prefill], ranks, 1, source, targets, (3,))
        rig.succeed(1, prefill, *ranks)
        sent_from = torch.from_numpy(prefill.pool.slots(source))
        for rank, target in zip(ranks, targets, strict=True):
            assert rank.projection is not None
            slots = torch.from_numpy(rank.pool.slots(target))
            for index, (cache, kind) in enumerate(zip(rank.pool.layers, rank.pool.row_format.layers, strict=True)):
                assert isinstance(kind, GroupRows)
                latent, key = prefill.pool.layers[index][sent_from].split([rig.LATENT, rig.ROPE], dim=-1)
                written = torch.zeros_like(cache)
                columns = latent @ rank.projection.matrices[index]
                reference.write(CacheWrite(columns, key, slots, written, sketched=kind))
                if not kind.rows.own:  # without own columns, no part brings their scale and nothing reads it
                    place = kind.rows.scales_offset + 2
                    written[:, place : place + 2] = cache[:, place : place + 2]
                assert torch.equal(cache[slots], written[slots]), (index, kind)


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_all_ranks_of_a_host_get_no_more_than_plain_mla(groups: int) -> None:
    """With DeepSeek's 512 + 64, all ranks together get at most one bfloat16 row, 1,152 bytes, per token and layer."""
    rows = SketchedRows.of(512, groups, 64, 64)
    assert (rows.row_bytes if groups == 1 else rows.common_bytes + groups * rows.own_bytes) <= 1152


def test_plain_and_sketched_servers_are_served_side_by_side() -> None:
    prefill = rig.prefill_rank()
    kinds = [rig.projection(0, 48, 16), rig.sketched_projection(0), rig.sketched_projection(1), None]
    ranks = [rig.decode_rank(z, rank=rank, size=len(kinds)) for rank, z in enumerate(kinds)]
    with rig.serving(prefill, *ranks):
        rig.transfer(prefill, ranks, count=9, cuts=(4,))


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-30])
def test_rows_of_zeros_and_of_one_huge_value(value: float) -> None:
    prefill, decode = rig.prefill_rank(torch.float32), rig.decode_rank(rig.sketched_projection(1))
    with rig.serving(prefill, decode):
        for layer in prefill.pool.layers:
            layer[:, :] = 0
            layer[:, 0] = value / 16  # projected columns stay within float32
        rig.transfer(prefill, decode, count=4, cuts=(2,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [3, rig.LATENT + 1])
def test_a_value_that_is_not_finite_fails_its_request_alone(value: float, column: int) -> None:
    prefill, decode = rig.prefill_rank(), rig.decode_rank(rig.sketched_projection(0))
    with rig.serving(prefill, decode):
        source = rig.pages(50, 4)
        slot = int(prefill.pool.slots(source)[5])
        before = prefill.pool.layers[1][slot, column].clone()
        prefill.pool.layers[1][slot, column] = value
        rig.begin([prefill], [decode], 1, source, [rig.pages(0, 4)], (2,))
        rig.fail(1, "not finite", prefill, decode)
        prefill.pool.layers[1][slot, column] = before
        rig.begin([prefill], [decode], 2, source, [rig.pages(0, 4)], (2,))
        rig.succeed(2, prefill, decode)


def test_what_is_announced_is_read_back_and_what_is_not_sound_is_refused() -> None:
    z = rig.sketched_projection(1, 4, 32, (4, 2, 4), 8)
    assert z.sketched is not None
    name = z.sketched.name(torch.uint8)
    assert name == "sketched_rows groups=4 group=1 sketch_bits=4,2,4 rope_bits=8*3"
    assert RowFormat.announced(name, rig.LATENT, z.widths, z.shared, rig.ROPE) == z.sketched
    for bad in (
        "sketched_rows", name.replace("4,2,4", "4,2"), name.replace("4,2,4", "5*3"), name.replace("8*3", "8*999999999"),
        name.replace("groups=4", "groups=3"), name.replace("4,2,4", ",,"), name.replace("groups=4", "groups=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r".") as raised:
            RowFormat.announced(bad, rig.LATENT, z.widths, z.shared, rig.ROPE)
        assert str(raised.value)


def test_a_rank_that_takes_a_row_and_not_what_groups_have_in_common_is_refused() -> None:
    """Both roundings of many shared columns are longer than a row."""
    rows = SketchedRows.of(rig.LATENT, 2, 48, rig.ROPE)
    assert rows.common_bytes > rows.row_bytes
    kinds = RowFormat.sketched([rows] * rig.LAYERS, 0)
    layout = msgspec.structs.replace(
        hello().layout, dtype=kinds.name(torch.uint8), widths=kinds.widths, shared=kinds.shared
    )
    prefill = rig.prefill_rank()
    for most, refused in ((rows.common_bytes - 1, True), (rows.common_bytes, False)):
        asks = hello(layout=layout, projection="0" * 64, max_chunk_bytes=most)
        said = mismatch(asks, prefill.pool, prefill.metadata, "model")
        assert (said is not None) == refused
        assert said is None or f"has {rows.common_bytes} bytes, the decode rank takes {most}; raise chunk_bytes" in said
    prefill.agent.close()


def test_a_prefill_rank_with_rows_in_bytes_of_its_own_is_refused() -> None:
    prefill, decode = rig.prefill_rank(torch.float8_e4m3fn), rig.decode_rank(rig.sketched_projection(0))
    with rig.serving(prefill, decode):
        decode.agent.open_room(1, [prefill.peer])
        rig.fail(1, "cache dtype: prefill has float8_e4m3fn, decode has sketched_rows groups=2", decode)


def test_projections_and_pools_that_do_not_go_with_the_rows() -> None:
    z = rig.sketched_projection(0)
    assert z.sketched is not None
    with pytest.raises(TransferError, match="sketch of all groups"):
        Projection(list(z.matrices[:2]), z.shared[:2], sketched=z.sketched)
    with pytest.raises(TransferError, match="holds bytes"):
        CachePool([torch.zeros(4, rows.row_items) for rows in z.sketched.layers], 64, 16, 1, encoding=z.sketched)
    layers = [torch.zeros(4, rows.row_items + 1, dtype=torch.uint8) for rows in z.sketched.layers]
    with pytest.raises(TransferError, match=r"must be \[slots, "):
        CachePool(layers, 64, 16, 1, encoding=z.sketched)


def test_groups_have_one_common_part_and_different_projections() -> None:
    first, second = rig.sketched_projection(0), rig.sketched_projection(1)
    assert first.common_hash == second.common_hash and first.content_hash != second.content_hash
    other = rig.sketched_projection(1, sketch_bits=(4, 4, 4))  # the same matrices in other rows
    assert all(torch.equal(a, b) for a, b in zip(second.matrices, other.matrices, strict=True))
    assert other.common_hash != second.common_hash and other.content_hash != second.content_hash
    assert np.unique([z.content_hash for z in (first, second, other)]).size == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_drafts_layer_travels_whole_behind_rows_in_bytes(dtype: torch.dtype) -> None:
    """A draft's layer arrives bit by bit in a pool of bytes, behind sketched layers."""
    prefill = rig.prefill_rank(dtype)
    ranks = []
    for rank in range(2):
        z, kept = rig.sketched_projection(rank), rig.LAYERS - 1
        assert z.sketched is not None
        rows = z.sketched.part(0, kept).with_whole_latents(1, rig.LATENT, rig.ROPE, dtype)
        matrices = [*z.matrices[:kept], torch.eye(rig.LATENT)]
        projection = Projection(matrices, rows.shared, sketched=rows)
        name = rows.name(torch.uint8)
        assert RowFormat.announced(name, rig.LATENT, rows.widths, rows.shared, rig.ROPE) == rows
        ranks.append(rig.decode_rank(projection, rank=rank, size=2))
    source, targets = rig.pages(50, 9), [rig.pages(rank, 9) for rank in range(2)]
    with rig.serving(prefill, *ranks):
        rig.begin([prefill], ranks, 1, source, targets, (4,))
        rig.succeed(1, prefill, *ranks)
        sent = prefill.pool.layers[-1][torch.from_numpy(prefill.pool.slots(source))].view(torch.uint8)
        for decode, target in zip(ranks, targets, strict=True):
            place = torch.from_numpy(decode.pool.slots(target))
            assert torch.equal(decode.pool.layers[-1][place], sent)


def test_whole_layers_that_are_announced_wrong_are_refused() -> None:
    kept = RowFormat.sketched([SketchedRows.of(64, 2, 16, 16)] * 2, 1)
    whole = kept.with_whole_latents(1, 64, 16, torch.bfloat16)
    name = whole.name(torch.uint8)
    sketched = "sketched_rows groups=2 group=1 sketch_bits=4*2 rope_bits=16*2"
    assert name == f"{sketched} whole_layers=1 whole_dtype=bfloat16"
    assert RowFormat.announced(name, 64, whole.widths, whole.shared, 16) == whole
    changes = {"=1": ("=3", "=0"), "bfloat16": ("int8",), sketched: ("bfloat16", f"{sketched} x")}
    bad_names = [name.replace(old, new) for old, news in changes.items() for new in news]
    for bad, widths in [(name, (48, 48, 48)), *((bad, whole.widths) for bad in bad_names)]:
        with pytest.raises(ValueError, match=r"."):
            RowFormat.announced(bad, 64, widths, whole.shared, 16)


def test_a_decode_rank_that_announces_retired_rows_is_told_what_to_use() -> None:
    """The rank is told so whatever else is wrong with its Hello, and before it is registered."""
    prefill = rig.prefill_rank()
    for name in ("fp8_rows", "fp8_rows whole_layers=1 whole_dtype=bfloat16"):
        asks = hello(layout=msgspec.structs.replace(hello().layout, dtype=name, metadata_bytes=(1,)))
        said = mismatch(asks, prefill.pool, prefill.metadata, "another model")
        assert said is not None and said.startswith(f"row format: decode announces {name}, which asks for FP8 rows")
        assert "were retired" in said and said.endswith("use --tpla-rows sketched on decode")
    prefill.agent.close()
