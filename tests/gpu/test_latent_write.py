"""The cache-writing kernel against its twin, in one launch each, at odd sizes and on odd rows."""

import pytest
import torch
from decode_case import relative_error
from write_case import random_write

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.write import write

pytestmark = pytest.mark.gpu
# Tolerances of the written rows; in bfloat16 a value on the border between two may round either way.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("d", "w", "rope", "rotate", "heads"),
    [
        (512, 64, 64, "pairs", 128),
        (512, 128, 64, "pairs", 64),
        (512, 256, 64, "pairs", 32),
        (512, 320, 64, "pairs", 0),
        (512, 512, 64, "pairs", 16),
        (512, 176, 64, "halves", 24),
        (512, None, 64, "pairs", 16),
        (500, 100, 20, None, 5),
        (96, 33, 2, "halves", 3),
    ],
)
def test_kernel_equals_twin(
    d: int, w: int | None, rope: int, rotate: str | None, heads: int, dtype: torch.dtype
) -> None:
    for tokens in (0, 1, 2, 7, 8, 9, 33, 100, 128):
        ours, twin = (
            random_write(tokens, d, w, rope, rotate is not None, dtype, tokens, "cuda", heads) for _ in range(2)
        )
        write(ours.write(1e-6, rotate))
        reference.write(twin.write(1e-6, rotate))
        assert torch.equal(ours.cache.isnan(), twin.cache.isnan())
        if tokens:
            error = relative_error(ours.cache[ours.slots], twin.cache[ours.slots].float())
            assert error <= TOLERANCE[dtype], (tokens, error)
        if tokens and heads:
            assert ours.q_rope is not None and twin.q_rope is not None
            error = relative_error(ours.q_rope, twin.q_rope.float())
            assert error <= TOLERANCE[dtype], (tokens, error)


@pytest.mark.parametrize("page_size", [1, 64])
def test_slots_of_pages_and_32_bit_slots(page_size: int) -> None:
    """Rows go into the slots that an allocator of whole pages hands out, in a pool of more than 2^31 values."""
    rows = 2**31 // 320 + 4096
    cache = torch.empty(rows, 1, 320, dtype=torch.bfloat16, device="cuda")
    case = random_write(33, 512, 256, 64, True, torch.bfloat16, page_size, "cuda", 32)
    pages = torch.randperm(rows // page_size, device="cuda")[:33]
    pages[0] = rows // page_size - 1
    slots = (pages * page_size + page_size - 1).int()
    write(case.write(1e-6, slots=slots, cache=cache))
    twin = random_write(33, 512, 256, 64, True, torch.bfloat16, page_size, "cuda", 32)
    reference.write(twin.write(1e-6))
    assert relative_error(cache[slots.long()], twin.cache[twin.slots].float()) <= 1e-3


def test_in_a_graph_new_slots_are_followed() -> None:
    case, twin = (random_write(4, 512, 256, 64, True, torch.bfloat16, 3, "cuda") for _ in range(2))
    write(case.write(1e-6))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(case.write(1e-6))
    case.cache.fill_(float("nan"))
    for tensor in (case.slots, twin.slots):
        tensor.copy_(torch.tensor([3, 0, 22, 7]))
    graph.replay()
    reference.write(twin.write(1e-6))
    assert torch.equal(case.cache.isnan(), twin.cache.isnan())
    assert relative_error(case.cache[case.slots], twin.cache[case.slots].float()) <= 1e-3
