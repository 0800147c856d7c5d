"""Artifacts of one layer for tests of the decode layer: random maps of plain rows, and exact maps of sketched ones."""

import math
from types import SimpleNamespace

import torch

from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.reference_model.sketched_layer import SketchedMaps
from tests.host.layer_ranks import D


def random_maps(groups: int, width: int, generator: torch.Generator):
    return [
        tuple(torch.randn(*shape, generator=generator) / math.sqrt(D) for shape in ((D, width), (width, D), (width, D)))
        for _ in range(groups)
    ]


class OneGroup:
    """Stands for an artifact, with the maps of one layer."""

    def __init__(self, maps) -> None:
        self._maps = maps
        self.meta = SimpleNamespace(sketched=False)

    def maps(self, layer: int, group: int):
        return self._maps[group]


def views_of(maps):
    """The `formula`'s views of plain rows, whose keys and values are z A and z B."""
    return lambda keys, ropes: [(keys @ z @ a, keys @ z @ b, ropes) for z, a, b in maps]


class SketchedArtifact:
    """Stands for an artifact, with the maps of one layer."""

    def __init__(self, maps: SketchedMaps) -> None:
        self._maps = maps
        self.meta = SimpleNamespace(sketched=True, rows=lambda layer: maps.rows)

    def maps(self, layer: int, group: int) -> tuple[torch.Tensor, ...]:
        return self._maps.z[group], self._maps.a[group], self._maps.b[group]

    def sketch(self, layer: int) -> torch.Tensor:
        return self._maps.sketch


def exact_maps(rows: SketchedRows, generator: torch.Generator) -> SketchedMaps:
    """Make maps of a random basis that lose nothing but rounding; the sketch has its own scales."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    r, n, g = rows.shared, rows.own, rows.groups
    shared, own = basis[:, :r], [basis[:, r + i * n : r + (i + 1) * n] for i in range(g)]
    scales = 0.5 + torch.rand(g * n, generator=generator)
    sketch = torch.cat(own, 1) * scales
    back = torch.cat(own, 1) / scales  # [d, g n]
    z = [torch.cat([shared, part], 1) for part in own]
    a = []
    for i in range(g):
        others = [back[:, j * n : (j + 1) * n] for j in range(g) if j != i]
        a.append(torch.cat([shared, own[i], *others], 1).T.contiguous())
    b = [torch.cat([shared / g, part], 1).T.contiguous() for part in own]
    return SketchedMaps(rows, z, sketch, a, b)
