"""SGLang's attention backends that may decode a slice, and a server's default."""

import pytest
import torch

from sglang_tpla.attention.backends import BackendRefusal
from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.host.attention.supported import (
    engine_unsupported_reason,
    preferred_backend,
    require_engine_backend,
    triton_serves,
)

HOPPER, AMPERE, CPU = (9, 0), (8, 0), None
SKETCHED = SketchedRows.of(512, 2, 64, 64)


@pytest.mark.parametrize(
    ("name", "shape", "capability", "words"),
    [
        ("flashinfer", DecodeShape(160, 16), HOPPER, "use --attention-backend tpla or triton or torch_native"),
        ("flashinfer", DecodeShape(160, 16), AMPERE, "silently.*use --attention-backend triton"),
        ("fa3", DecodeShape(160, 16), HOPPER, "latent widths"),
        ("fa3", DecodeShape(256, 16), AMPERE, "compute capability 9.0"),
        ("tpla", DecodeShape(80, 8, rope_dim=32), HOPPER, "pad the slice"),
        ("tpla", DecodeShape(160, 16, dtype=torch.float8_e4m3fn), HOPPER, "dtype"),
        ("tpla", DecodeShape(160, 16), AMPERE, "needs compute capability 9.0"),
        ("triton", DecodeShape(128, 8, rope_dim=32), HOPPER, "same power of two.*torch_native"),
        ("triton", DecodeShape(80, 8), CPU, "use --attention-backend tpla or torch_native,"),
        ("cutlass_mla", DecodeShape(512, 16), HOPPER, "never measured"),
        ("tpla", DecodeShape.of_sketched(SKETCHED, 16), AMPERE, r"; use plain rows \(an artifact of --rows plain\)$"),
    ],
)
def test_refused_with_what_to_use_instead(
    name: str, shape: DecodeShape, capability: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(BackendRefusal, match=words):
        require_engine_backend(name, shape, capability)


def test_our_kernel_serves_pools_of_any_page_size() -> None:
    assert engine_unsupported_reason("tpla", DecodeShape(160, 16, page_size=16), HOPPER) is None


@pytest.mark.parametrize(
    ("latent_dim", "rope_dim", "serves"),
    [(512, 64, True), (256, 32, True), (80, 32, True), (160, 64, True), (320, 64, True), (128, 32, False),
     (256, 64, False), (128, 64, False), (64, 64, False), (544, 32, False)],
)  # fmt: skip
def test_triton_compiles_where_its_two_blocks_are_one(latent_dim: int, rope_dim: int, serves: bool) -> None:
    assert triton_serves(latent_dim, rope_dim) is serves


@pytest.mark.parametrize(
    ("shapes", "capability", "stock", "expected"),
    [
        ([DecodeShape(512, 16)], HOPPER, "fa3", "fa3"),
        ([DecodeShape(320, 32)], HOPPER, "fa3", "fa3"),
        ([DecodeShape(192, 64)], HOPPER, "fa3", "tpla"),
        ([DecodeShape(160, 16), DecodeShape(512, 16)], HOPPER, "fa3", "tpla"),
        ([DecodeShape(80, 8, rope_dim=32)], HOPPER, "fa3", "triton"),
        ([DecodeShape(256, 4)], HOPPER, "fa3", "fa3"),  # too few heads for our kernel
        ([DecodeShape(160, 4)], HOPPER, "fa3", "triton"),
        # 128 and 192 columns round up to different powers of two.
        ([DecodeShape(128, 4)], HOPPER, "fa3", "torch_native"),
        ([DecodeShape(160, 16)], AMPERE, "flashinfer", "triton"),
        ([DecodeShape(256, 16)], AMPERE, "flashinfer", "flashinfer"),
        ([DecodeShape(80, 8, rope_dim=32, dtype=torch.float32)], CPU, "torch_native", "torch_native"),
    ],
)
def test_default(shapes: list[DecodeShape], capability: tuple[int, int] | None, stock: str, expected: str) -> None:
    assert preferred_backend(shapes, capability, stock) == expected
    for shape in shapes:
        require_engine_backend(expected, shape, capability)
