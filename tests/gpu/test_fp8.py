"""The FP8 kernels on a GPU: decode against the float32 reference over the same rows, the write against its twin."""

import pytest
import torch
from decode_case import SCALE, Case, errors_of_replays, random_case, relative_error
from write_case import fp8_write_case, same_rows

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.attention.fp8.decode import Fp8Decode
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
BAR = 3e-3
LENGTHS = [0, 5001, 1, 129, 64, 0, 20011, 63]


def run(case: Case, max_batch: int | None = None) -> torch.Tensor:
    kernel = Fp8Decode(case.shape, SCALE, max_batch or case.table.batch, DEVICE)
    kernel.plan(case.table, case.lengths)
    return kernel.run(case.q_latent, case.q_rope, case.kv_cache, torch.full_like(case.q_latent, float("nan")))


@pytest.mark.parametrize(
    ("width", "shared", "heads", "query_len", "page"),
    [
        (64, 0, 8, 1, 1), (96, 64, 17, 2, 64), (128, 64, 64, 1, 1), (160, 64, 5, 4, 16), (192, 20, 64, 1, 64),
        (224, 128, 128, 1, 1), (256, 64, 32, 1, 1), (320, 128, 24, 3, 1), (416, 416, 16, 1, 64), (480, 224, 128, 1, 1),
        (512, 512, 16, 1, 1),
    ],
)  # fmt: skip
def test_right(width: int, shared: int, heads: int, query_len: int, page: int) -> None:
    shape = DecodeShape(width, heads, 64, query_len, page, fp8_shared=shared)
    case = random_case(shape, LENGTHS, seed=width)
    out = run(case, max_batch=11)
    assert relative_error(out, case.reference()) <= BAR
    assert torch.equal(out, run(case, max_batch=11))  # results repeat to the last bit


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_queries_and_rows_far_from_one(size: float) -> None:
    """Tiny and huge queries against huge and tiny rows exceed float16 unless they are scaled."""
    shape = DecodeShape(160, 16, 64, fp8_shared=64)
    case = random_case(shape, [700, 33], seed=5)
    case.q_latent.mul_(size)
    scales = case.kv_cache.view(torch.float32)[:, (160 + 128) // 4 :][:, :2]
    scales.mul_(1 / size)
    assert relative_error(run(case), case.reference()) <= BAR


def test_a_graph_stays_right_when_its_inputs_are_refilled() -> None:
    shape = DecodeShape(256, 32, 64, fp8_shared=64)
    case = random_case(shape, [1000, 7, 0, 4096], seed=1)
    kernel = Fp8Decode(shape, SCALE, 8, DEVICE)
    for lengths, error in errors_of_replays(kernel, case, [[1, 7, 0, 2048], [999, 0, 0, 4096]]):
        assert error <= BAR, lengths


@pytest.mark.parametrize(("tokens", "d", "w", "shared"), [
    (1, 512, 256, 64), (7, 512, 320, 128), (19, 512, 192, 0), (128, 512, 256, 64), (5, 512, None, 512),
    (33, 256, 160, 20),
])  # fmt: skip
@pytest.mark.parametrize("rotate", [None, "pairs", "halves"])
def test_written_rows_are_the_twins(tokens: int, d: int, w: int | None, shared: int, rotate: str | None) -> None:
    case, twin = (fp8_write_case(tokens, d, w, 64, rotate is not None, torch.bfloat16, 3, "cuda", 16) for _ in "ab")
    write(case.write(1e-6, rotate, fp8_shared=shared))
    reference.write(twin.write(1e-6, rotate, fp8_shared=shared))
    assert same_rows(case, twin, 64) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_rows_are_the_twins(dtype: torch.dtype) -> None:
    case, twin = (fp8_write_case(37, 320, None, 64, False, dtype, 4, "cuda") for _ in "ab")
    z, key = (torch.randn(37, 320, device="cuda").to(dtype), torch.randn(37, 64, device="cuda").to(torch.bfloat16))
    write(CacheWrite(z, key, case.slots, case.cache, fp8_shared=128))
    reference.write(CacheWrite(z, key, twin.slots, twin.cache, fp8_shared=128))
    assert same_rows(case, twin, 64) is None


def test_what_does_not_fit_is_refused() -> None:
    case = random_case(DecodeShape(64, 8, 64, fp8_shared=0), [5], seed=2)
    kernel = Fp8Decode(case.shape, SCALE, 1, DEVICE)
    kernel.plan(case.table, case.lengths)
    with pytest.raises(AttentionInputError, match="contiguous"):
        kernel.run(case.q_latent, case.q_rope, torch.cat([case.kv_cache] * 2, -1)[:, : case.shape.cache_dim])
    with pytest.raises(AttentionInputError, match=r"torch.uint8"):
        kernel.run(case.q_latent, case.q_rope, case.kv_cache.view(torch.float8_e4m3fn))
    with pytest.raises(AttentionInputError, match="width 72"):
        Fp8Decode(DecodeShape(72, 8, 64, fp8_shared=0), SCALE, 1, DEVICE)
