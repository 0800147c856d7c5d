"""The kernel that writes sketched rows against its twin, at DeepSeek's sizes and at odd ones, and in a CUDA graph."""

import pytest
import torch
from sketched_case import DEEPSEEK, KINDS, difference, difference_of_odd_values, unseen
from write_case import random_write

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.cache_write.write import write
from sglang_tpla.cache_rows.layer_rows import GroupRows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", [*KINDS, *DEEPSEEK], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [None, "pairs", "halves"])
def test_written_rows_are_the_twins(kind: GroupRows, dtype: torch.dtype, rotate: str | None) -> None:
    for tokens in (1, 7, 19, 130):
        assert difference(kind, tokens, rotate, dtype, "cuda", few=0.005) is None
    assert difference_of_odd_values(kind, "cuda") is None
    assert unseen(kind, "cuda") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [KINDS[0], DEEPSEEK[0]], ids=str)
def test_rows_of_one_group_are_the_norms(kind: GroupRows, dtype: torch.dtype) -> None:
    for tokens in (1, 19, 128):
        assert difference(kind, tokens, "pairs", dtype, "cuda", few=0.005, projected=False) is None


def test_in_a_graph_new_slots_are_followed() -> None:
    kind = DEEPSEEK[1]
    rows = kind.rows
    case, twin = (random_write(4, 512, kind.columns, 64, True, torch.bfloat16, 3, "cuda") for _ in "ab")
    caches = [torch.full((24, 1, rows.row_bytes), 255, dtype=torch.uint8, device="cuda") for _ in "ab"]
    write(case.write(1e-6, "pairs", cache=caches[0], sketched=kind))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(case.write(1e-6, "pairs", cache=caches[0], sketched=kind))
    caches[0].fill_(255)
    for tensor in (case.slots, twin.slots):
        tensor.copy_(torch.tensor([3, 0, 22, 7]))
    graph.replay()
    reference.write(twin.write(1e-6, "pairs", cache=caches[1], sketched=kind))
    assert (caches[0] != caches[1]).float().mean() < 0.01
