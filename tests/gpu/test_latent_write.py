"""The cache-writing kernel against its twin, in one launch each, at odd sizes and on odd rows."""

import sys
from pathlib import Path

import pytest
import torch

from sglang_tpla.attention import reference
from sglang_tpla.attention.latent_write import write_latent

sys.path.insert(0, str(Path(__file__).parent))
from decode_case import relative_error
from write_case import random_write

pytestmark = pytest.mark.gpu
# of the written rows; bfloat16: a value on the border between two may round either way
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("d", "w", "rope", "rotate"),
    [
        (512, 256, 64, "pairs"),
        (512, 176, 64, "halves"),
        (512, None, 64, "pairs"),
        (500, 100, 20, None),
        (96, 33, 2, "halves"),
    ],
)
def test_kernel_equals_twin(d: int, w: int | None, rope: int, rotate: str | None, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 7, 8, 9, 33, 128):
        ours, twin = (
            random_write(tokens, d, w, rope, rotate is not None, dtype, tokens, "cuda") for _ in range(2)
        )
        write_latent(*ours.arguments(1e-6), neox=rotate == "halves")
        reference.write_latent(*twin.arguments(1e-6), neox=rotate == "halves")
        assert torch.equal(ours.cache.isnan(), twin.cache.isnan())
        if tokens:
            error = relative_error(ours.cache[ours.slots], twin.cache[ours.slots].float())
            assert error <= TOLERANCE[dtype], (tokens, error)


def test_in_a_graph_new_slots_are_followed() -> None:
    case, twin = (random_write(4, 512, 256, 64, True, torch.bfloat16, 3, "cuda") for _ in range(2))
    write_latent(*case.arguments(1e-6))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_latent(*case.arguments(1e-6))
    case.cache.fill_(float("nan"))
    for tensor in (case.slots, twin.slots):
        tensor.copy_(torch.tensor([3, 0, 22, 7]))
    graph.replay()
    reference.write_latent(*twin.arguments(1e-6))
    assert torch.equal(case.cache.isnan(), twin.cache.isnan())
    assert relative_error(case.cache[case.slots], twin.cache[case.slots].float()) <= 1e-3
