"""The decode layer with sketched rows inside SGLang's own attention module: T ranks together are the formula.

Every rank is built, loaded and folded as in a server, writes its new token's row and attends through the engine's
backend. The formula of `layer_ranks` knows whole weights, and the rows' values from the reference model.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.reference_model.sketched_layer import SketchedMaps
from tests.host.engine_parts import stub_runner
from tests.host.layer_artifacts import SketchedArtifact, exact_maps
from tests.host.layer_ranks import (
    HEADS,
    Q_RANK,
    ROPE,
    D,
    build_rank,
    decode_step,
    formula,
    make_weights,
    page_table,
    random_step,
)


@pytest.mark.parametrize("groups", [1, 2])
def test_maps_are_on_the_cpu_whatever_the_default_device(
    engine: None, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    """SGLang builds layers with the GPU as the default device."""
    from sglang_tpla.host.model import rows as of_model

    monkeypatch.setattr(of_model, "artifact", lambda: None)
    rows = SketchedRows.of(D, groups, 8, ROPE)
    maps = exact_maps(rows, torch.Generator().manual_seed(1))
    part = SimpleNamespace(artifact=SketchedArtifact(maps) if groups > 1 else None, group=0)
    expected = of_model.layer_maps(part, 0, D, ROPE)
    with torch.device("meta"):
        found = of_model.layer_maps(part, 0, D, ROPE)
    for name in ("projection", "key_map", "value_map"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def run_rank(attention: Any, x: Any, lengths: Any, past: Any, kind: GroupRows, maps: SketchedMaps) -> torch.Tensor:
    """Run one decode step of one rank over its past tokens' rows, with the backend of ``--attention-backend tpla``."""
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    slots = page_table(lengths)
    cache = torch.full((slots.numel() + 8, 1, kind.row_items), 255, dtype=torch.uint8)
    for request, (latent, rope) in enumerate(past):
        z = torch.cat([latent @ maps.z[kind.group], latent @ maps.sketch], 1)
        packed = torch.empty(len(latent), kind.row_items, dtype=torch.uint8)
        kind.encode(z, rope, Part.FULL, packed)
        cache[slots[request, : len(latent)], 0] = packed
    pool = SimpleNamespace(get_key_buffer=lambda layer_id: cache.view(torch.float8_e4m3fn))
    requests = SimpleNamespace(req_to_token=slots.to(torch.int32), size=len(lengths))
    runner = stub_runner(
        requests, pool, torch.float8_e4m3fn, scaling=attention.scaling, num_attention_heads=attention.num_local_heads,
        qk_rope_head_dim=ROPE, hf_text_config=SimpleNamespace(kv_lora_rank=D, num_hidden_layers=1),
    )  # fmt: skip
    return decode_step(attention, TplaDecodeBackend(runner), x, lengths, slots)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (1, SketchedRows.of(D, 1, D, ROPE)),
        (2, SketchedRows.of(D, 1, D, ROPE)),
        (2, SketchedRows.of(D, 2, 8, ROPE)),
        (4, SketchedRows.of(D, 2, 8, ROPE, sketch_bits=2, rope_bits=8)),
        (4, SketchedRows.of(D, 4, 0, ROPE, sketch_bits=3)),
        (2, SketchedRows.of(D, 2, D, ROPE)),
    ],
    ids=str,
)
def test_sum_over_ranks_is_the_formula(
    engine: None, monkeypatch: pytest.MonkeyPatch, one_write: bool, size: int, rows: SketchedRows
) -> None:
    from sglang_tpla.host.attention import backend

    generator = torch.Generator().manual_seed(size)
    weights, lengths = make_weights(Q_RANK, generator), [31, 1, 6, 8]
    maps = exact_maps(rows, generator)
    x, past = random_step(lengths, generator)
    expected = formula(x, lengths, past, weights, lambda *rows: [(v.key, v.value, v.k_rope) for v in maps.views(*rows)])
    total = torch.zeros_like(expected)
    for rank in range(size):
        kind = GroupRows(rows, rank % rows.groups)
        of_rank = RowFormat((kind,))
        monkeypatch.setattr(backend, "row_format", lambda *model, found=of_rank: found)
        attention = build_rank(
            rank, size, rows.groups, SketchedArtifact(maps), weights, Q_RANK, True, torch.float32, monkeypatch
        )
        assert attention.num_local_heads == HEADS * rows.groups // size
        total += run_rank(attention, x, lengths, past, kind, maps)
    error = (total - expected).norm() / expected.norm()
    # the formula rounds in the same places; a code on the other side of a boundary moves little
    assert error < 2e-3, f"relative error {error:.2e}"
