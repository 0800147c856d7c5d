"""The kernel compiles for Hopper without a GPU, fits its shared memory, and keeps its accumulators in
registers.
"""

import re

import pytest

from sglang_tpla.attention.hopper.compile import KernelCompileError, cached_cubin, compile_cubin
from sglang_tpla.attention.hopper.decode import NAME, SHARED_LIMIT_BYTES, variant_for
from sglang_tpla.attention.interface import DecodeShape


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


@pytest.mark.parametrize(("latent_dim", "heads"), [(256, 32), (192, 128), (320, 16)])
def test_compiles_without_spills(latent_dim: int, heads: int) -> None:
    variant = variant_for(DecodeShape(latent_dim, heads))
    cubin, log = compile_cubin(variant.source(), variant.defines, NAME)
    assert cubin[:4] == b"\x7fELF"
    assert "C7510" not in log, "wgmma instructions were serialised"
    assert {int(count) for count in re.findall(r"(\d+) bytes spill stores", log)} == {0}


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
