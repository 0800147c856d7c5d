"""New tokens in the TPLA layer, one of a decode step or several to verify, in every layout, against the formula.

Every rank is SGLang's own module, built, loaded and folded as in a server, with the backend of ``--attention-backend
tpla``. The sum over ranks stands for the all-reduce, and the test does the reduce-scatter of ``--tpla-o-proj scatter``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.parts import Part
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from tests.host.engine_parts import stub_runner
from tests.host.layer_artifacts import OneGroup, SketchedArtifact, exact_maps, random_maps, views_of
from tests.host.layer_ranks import (
    HEADS,
    HIDDEN,
    Q_RANK,
    ROPE,
    D,
    V,
    build_rank,
    decode_step,
    formula,
    make_weights,
    page_table,
    random_step,
)

WIDTH = 11  # of plain rows
LENGTHS = [31, 4, 6, 17]  # with the new tokens
LAYOUTS = ((1, 1, 2), (2, 2, 4), (4, 2, 3), (4, 4, 2), (8, 4, 4), (8, 8, 3))  # ranks, groups, new tokens


class Plain:
    """Plain rows of random maps."""

    far = 2e-5

    def __init__(self, groups: int, generator: torch.Generator) -> None:
        self.maps = random_maps(groups, WIDTH, generator)
        self.artifact, self.views = OneGroup(self.maps), views_of(self.maps)

    def cache(self, group: int, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        return torch.cat((latent @ self.maps[group][0], rope), dim=-1)

    def format(self, group: int) -> RowFormat:
        return RowFormat.plain((WIDTH,), (WIDTH,), ROPE)


class Sketched:
    """Sketched rows of maps that lose nothing but rounding."""

    # The formula rounds in the same places; a code that falls on the other side of a boundary changes little.
    far = 2e-3

    def __init__(self, rows: SketchedRows, generator: torch.Generator) -> None:
        self.rows = rows
        self.maps = exact_maps(rows, generator)
        self.artifact = SketchedArtifact(self.maps)

    def views(self, *rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return [(view.key, view.value, view.k_rope) for view in self.maps.views(*rows)]

    def cache(self, group: int, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        kind = GroupRows(self.rows, group)
        packed = torch.empty(len(latent), kind.row_items, dtype=torch.uint8)
        kind.encode(torch.cat([latent @ self.maps.z[group], latent @ self.maps.sketch], 1), rope, Part.FULL, packed)
        return packed

    def format(self, group: int) -> RowFormat:
        return RowFormat((GroupRows(self.rows, group),))


def run_rank(
    attention: Any, kind: Plain | Sketched, group: int, x: torch.Tensor, lengths: list[int], past: Any
) -> torch.Tensor:
    """Return one rank's part of the answer, over a pool with the rows of the past and NaN in every other place."""
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    slots = page_table(lengths)
    example = kind.cache(group, *past[0])
    cache = torch.empty(slots.numel() + 8, 1, example.shape[1], dtype=example.dtype)
    cache.view(torch.uint8).fill_(255)
    for request, rows in enumerate(past):
        cache[slots[request, : len(rows[0])], 0] = kind.cache(group, *rows)
    if isinstance(kind, Sketched):
        cache = cache.view(torch.float8_e4m3fn)

    def write(layer: Any, place: torch.Tensor, row: torch.Tensor, value: torch.Tensor) -> None:
        cache[place] = row

    pool = SimpleNamespace(get_key_buffer=lambda layer_id: cache, set_kv_buffer=write)
    requests = SimpleNamespace(req_to_token=slots.to(torch.int32), size=len(lengths))
    runner = stub_runner(
        requests, pool, cache.dtype, len(x) // len(lengths), scaling=attention.scaling, qk_rope_head_dim=ROPE,
        num_attention_heads=attention.num_local_heads,
        hf_text_config=SimpleNamespace(kv_lora_rank=D, num_hidden_layers=1),
    )  # fmt: skip
    return decode_step(attention, TplaDecodeBackend(runner), x, lengths, slots)


@pytest.mark.parametrize("heads", ["replicate", "scatter"])
@pytest.mark.parametrize(
    ("size", "rows", "new"),
    [
        *LAYOUTS,
        *((size, SketchedRows.of(D, g, D if g == 1 else 0, ROPE), new) for size, g, new in LAYOUTS),
        (1, SketchedRows.of(D, 1, D, ROPE), 1),
        (2, SketchedRows.of(D, 1, D, ROPE), 1),
        (2, SketchedRows.of(D, 2, 8, ROPE), 1),
        (4, SketchedRows.of(D, 2, 8, ROPE, sketch_bits=2, rope_bits=8), 1),
        (4, SketchedRows.of(D, 4, 0, ROPE, sketch_bits=3), 1),
        (2, SketchedRows.of(D, 2, D, ROPE), 1),
    ],
    ids=str,
)
def test_every_new_token_is_the_formulas(
    engine: None, monkeypatch: pytest.MonkeyPatch, one_write: bool, size: int, rows: int | SketchedRows, new: int,
    heads: str,
) -> None:  # fmt: skip
    """``rows``: the sketched rows, or the number of groups of plain rows."""
    from sglang_tpla.host.attention import backend
    from sglang_tpla.host.model import attention_layer

    groups = rows if isinstance(rows, int) else rows.groups
    generator = torch.Generator().manual_seed(size + groups)
    weights, lengths = make_weights(Q_RANK, generator), LENGTHS if new > 1 else [31, 1, 6, 8]
    kind = Plain(rows, generator) if isinstance(rows, int) else Sketched(rows, generator)
    x, past = random_step(lengths, generator, new=new)
    expected = formula(x, lengths, past, weights, kind.views)
    sent: list[torch.Tensor] = []  # [h, tokens, v] of each rank

    def keep(values: torch.Tensor, among: int) -> torch.Tensor:
        assert among == groups
        sent.append(values)
        return values[: len(values) // groups]

    monkeypatch.setattr(attention_layer, "sum_over_groups", keep)
    parts, projections = [], []
    for rank in range(size):
        of_rank = kind.format(rank % groups)
        monkeypatch.setattr(backend, "row_format", lambda *model, found=of_rank: found)
        attention = build_rank(
            rank, size, groups, kind.artifact, weights, Q_RANK, True, torch.float32, monkeypatch, heads
        )
        assert attention.num_local_heads == HEADS * groups // size
        # With "scatter" a rank holds plain TP's part of o_proj: the heads that the rank has after the sum.
        assert attention.o_proj.weight.shape == (HIDDEN, HEADS * V // size * (1 if heads == "scatter" else groups))
        parts.append(run_rank(attention, kind, rank % groups, x, lengths, past))
        projections.append(attention.o_proj)
    if sent:  # the reduce-scatter
        for rank, o_proj in enumerate(projections):
            first = rank - rank % groups
            summed = torch.stack(sent[first : first + groups]).sum(0).chunk(groups)[rank % groups]
            parts[rank] = o_proj(summed.transpose(0, 1).flatten(1))[0]
    assert bool(sent) == (heads == "scatter" and groups > 1)
    error = (sum(parts) - expected).norm() / expected.norm()
    assert error < kind.far, f"relative error {error:.2e}"


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
