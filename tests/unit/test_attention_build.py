"""The kernel compiles for Hopper without a GPU, fits its shared memory, and keeps its accumulators in registers."""

import itertools
import re

import pytest

from sglang_tpla.attention.hopper.compile import KernelCompileError, cached_cubin, compile_cubin
from sglang_tpla.attention.hopper.decode import SHARED_LIMIT_BYTES, AnyVariant, variant_for
from sglang_tpla.attention.hopper.sketched import SketchedVariant, unsupported_reason
from sglang_tpla.attention.hopper.sketched_tiles import TiledVariant
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows


@pytest.mark.parametrize("latent_dim", range(64, 513, 32))
@pytest.mark.parametrize(("heads", "query_len"), [(8, 1), (64, 1), (128, 1), (128, 4)])
def test_variant_fits(latent_dim: int, heads: int, query_len: int) -> None:
    variant = variant_for(DecodeShape(latent_dim, heads, query_len=query_len))
    assert variant.stages >= 2
    assert variant.shared_bytes <= SHARED_LIMIT_BYTES
    assert variant.out_columns <= 256
    assert (variant.mode == "width") == (latent_dim > 256)
    covered = variant.out_columns * (2 if variant.mode == "width" else 1)
    assert covered >= latent_dim


def spilled_bytes(variant: AnyVariant) -> int:
    """Compile a variant, check that wgmma is not serialised, and return the most bytes that one kernel spills."""
    cubin, log = compile_cubin(variant.source(), variant.defines, f"{variant.name}.cu")
    assert cubin[:4] == b"\x7fELF"
    assert "C7510" not in log and "C7520" not in log, "wgmma instructions were serialised"
    return max(int(count) for count in re.findall(r"(\d+) bytes spill stores", log))


@pytest.mark.parametrize(("latent_dim", "heads"), [(256, 32), (192, 128), (320, 16)])
def test_compiles_without_spills(latent_dim: int, heads: int) -> None:
    variant = variant_for(DecodeShape(latent_dim, heads))
    assert spilled_bytes(variant) == 0


def test_a_wrong_kernel_says_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_TPLA_CACHE", str(tmp_path))
    with pytest.raises(KernelCompileError, match="nonsense"):
        cached_cubin("nonsense;", {}, "wrong.cu")
    assert not list(tmp_path.rglob("*.cubin"))


def test_the_cache_returns_what_was_compiled(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_TPLA_CACHE", str(tmp_path))
    source = 'extern "C" __global__ void one(int* x) { *x = VALUE; }'
    first = cached_cubin(source, {"VALUE": 1}, "one.cu")
    assert cached_cubin(source, {"VALUE": 1}, "one.cu") == first
    cached_cubin(source, {"VALUE": 2}, "one.cu")
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


SKETCHED = [(1, 0, 16), (1, 0, 128), (2, 64, 32), (4, 64, 64), (8, 64, 128), (2, 416, 8)]


@pytest.mark.parametrize(("groups", "shared", "heads"), SKETCHED)
@pytest.mark.parametrize("query_len", [1, 4])
def test_sketched_variant_fits(groups: int, shared: int, heads: int, query_len: int) -> None:
    variant = variant_for(DecodeShape.of_sketched(SketchedRows.of(512, groups, shared, 64), heads, query_len))
    assert isinstance(variant, SketchedVariant | TiledVariant)
    assert variant.fits
    assert isinstance(variant, TiledVariant) == (shared == 64 and heads * query_len == 128 and groups == 2)
    blocks = -(-heads * query_len // variant.rows)
    assert blocks * variant.rows >= heads * query_len


@pytest.mark.parametrize("groups", [2, 3, 4, 8, 16])
def test_every_shape_has_a_form_that_fits(groups: int) -> None:
    """This includes shapes whose ring, or values by query rows, leave no room for 64 query rows."""
    for shared, bits, rope_bits in itertools.product(range(0, 512, 8), (2, 4), (8, 16)):
        if (512 - shared) % (8 * groups):
            continue
        rows = SketchedRows.of(512, groups, shared, 64, sketch_bits=bits, rope_bits=rope_bits)
        for heads, query_len in itertools.product((8, 16, 48, 128), (1, 4)):
            if unsupported_reason(rows) is None:
                variant = variant_for(DecodeShape.of_sketched(rows, heads, query_len))
                assert isinstance(variant, SketchedVariant | TiledVariant) and variant.fits, (rows, heads, query_len)


def test_rows_that_fit_no_block_are_refused() -> None:
    rows = SketchedRows.of(8192, 16, 0, 64)
    with pytest.raises(AttentionInputError, match="do not fit the 232448 bytes"):
        variant_for(DecodeShape.of_sketched(rows, 16))


@pytest.mark.parametrize(
    ("groups", "heads", "bits", "rope_bits", "row_values"),
    [(2, 32, 4, 16, False), (4, 32, 3, 8, False), (8, 128, 4, 16, True)],  # the second begins four sums with a product
)
def test_sketched_kernel_compiles(groups: int, heads: int, bits: int, rope_bits: int, row_values: bool) -> None:
    rows = SketchedRows.of(512, groups, 64, 64, sketch_bits=bits, rope_bits=rope_bits)
    variant = variant_for(DecodeShape.of_sketched(rows, heads))
    assert isinstance(variant, SketchedVariant)
    assert variant.row_values == row_values
    assert spilled_bytes(variant) == 0


@pytest.mark.parametrize(("groups", "shared", "bits", "rope_bits"), [(2, 64, 4, 16), (2, 96, 3, 16), (2, 128, 4, 8)])
def test_tiled_kernel_compiles(groups: int, shared: int, bits: int, rope_bits: int) -> None:
    rows = SketchedRows.of(512, groups, shared, 64, sketch_bits=bits, rope_bits=rope_bits)
    variant = variant_for(DecodeShape.of_sketched(rows, 64))
    assert isinstance(variant, TiledVariant)
    assert spilled_bytes(variant) < 256, "the loops spill, too"
