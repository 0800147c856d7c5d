"""Closed-form maps of sketched rows of one layer, from its second moments.

t = c U with U the score-energy basis (``transforms.score_basis``) of the latent's second moment, so that every column
has mean square 1; the first r columns are shared, the others are dealt out in turn. (Not of its covariance: a mean
costs resolution like anything else, and this way most of it lies in the shared columns.) A part of a row is rounded
with one scale a token, so a part x = t W R is weighted by a symmetric W first and rotated then, which spreads its
energy and its rounding evenly over its columns. Where an error of t costs E (a matrix), x's costs
tr(W^2) tr(E W^-2), least at W = E^(1/4).

* The sketch takes part in scores alone: E is what queries make of t, diagonal in this basis.
* The 8-bit columns take part in scores and values. Of a head that attends with probabilities p, an error of the score
  costs sum p^2 |v - o|^2 and one of the values sum p^2 times its square, so that E is the score's part times the
  values' spread |v - o|^2, plus the values' part. Of their spread over all tokens ``ATTENDED_SPREAD`` is counted, as
  the tokens that one query attends to are less far from each other than any two.

The maps back are exact, so all that is lost is rounding:

    key map   A_i = [shared^-1; own_i^-1; sketch_j^-1 for j != i]: c = [z_i | sketch] A_i but for rounding
    value map B_i = [shared^-1 / g; own_i^-1]: the groups' values add up to c
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.transforms import Basis, score_basis
from sglang_tpla.measure.statistics import LayerMoments
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

ATTENDED_SPREAD = 0.25
_LEAST_COST = 1e-12  # of the largest: a direction that costs nothing keeps a finite weight
_TINY = 1e-30


@dataclass(frozen=True)
class LayerWeights:
    """The halves of a layer's kv_b_proj, ``key`` [H, n, d] and ``value`` [H, v, d], and the softmax scale."""

    key: torch.Tensor
    value: torch.Tensor
    scale: float


def score_energies(moments: LayerMoments, weights: LayerWeights) -> torch.Tensor:
    """What queries make of each column of the layer's basis: their root mean square, descending, [d]."""
    queries, basis = _basis(moments, weights)
    return torch.einsum("jd,de,je->j", basis.inverse, queries, basis.inverse).clamp_min(0).sqrt()


def _basis(moments: LayerMoments, weights: LayerWeights) -> tuple[torch.Tensor, Basis]:
    queries = moments.absorbed_queries(weights.key)
    return queries, score_basis(moments.latent_outer / max(moments.latent_count, 1), queries)


def layer_sketched_maps(moments: LayerMoments, weights: LayerWeights, rows: SketchedRows) -> SketchedMaps:
    """Maps of one layer, float64.

    Args:
        moments: the layer's statistics.
        weights: the layer's weights that read a latent.
        rows: sizes of the rows.
    """
    queries, basis = _basis(moments, weights)
    value = weights.value.double()
    values = torch.einsum("hvd,hve->de", value, value) / len(value)
    spread = ATTENDED_SPREAD * (values * moments.covariance).sum()
    in_scores = basis.inverse @ queries @ basis.inverse.T
    in_both = basis.inverse @ (weights.scale**2 * spread * queries + values) @ basis.inverse.T

    def part(cost: torch.Tensor, picked: list[int]) -> Basis:
        """The columns ``picked``, weighted by what their rounding costs, and rotated."""
        weight, unweight = _fourth_root(cost[picked][:, picked])
        turn = rotation(len(picked))
        return Basis(basis.forward[:, picked] @ weight @ turn, turn.T @ unweight @ basis.inverse[picked])

    shared, groups = rows.shared, rows.groups
    columns = [list(range(shared + group, rows.latent_dim, groups)) for group in range(groups)]
    kept = part(in_both, list(range(shared)))
    own = [part(in_both, picked) for picked in columns]
    sketch = [part(in_scores, picked) for picked in columns]
    return SketchedMaps(
        rows=rows,
        z=[torch.cat([kept.forward, one.forward], 1) for one in own],
        sketch=torch.cat([block.forward for block in sketch], 1),
        a=[
            torch.cat(
                [kept.inverse, one.inverse, *(block.inverse for j, block in enumerate(sketch) if j != i)]
            )
            for i, one in enumerate(own)
        ],
        b=[torch.cat([kept.inverse / groups, one.inverse]) for one in own],
    )


def _fourth_root(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fourth root of a symmetric matrix and that root's inverse."""
    if not len(cost):
        return cost, cost
    values, vectors = torch.linalg.eigh((cost + cost.T) / 2)
    roots = values.clamp_min(max(values[-1].item() * _LEAST_COST, _TINY)).pow(0.25)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
