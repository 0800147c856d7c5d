"""Closed-form maps of sketched rows of one layer, from its second moments.

The latent c is turned into t = c U, where U is the score-energy basis (`transforms.score_basis`) of the latent's second
moment, so that every column of t has mean square 1. The first r columns are shared, and the others are dealt out in
turn. The second moment takes the place of the covariance because a mean, too, costs resolution, and the second moment
puts most of the mean into the shared columns. A row rounds each part with one scale a token. A part x = t W R is
therefore weighted by a symmetric W and then rotated by R, which spreads its energy and its rounding evenly over its
columns. If an error of t costs E (a matrix), an error of x costs tr(W^2) tr(E W^-2), which is least at W = E^(1/4).

* Scores alone use the sketch: E is the queries' second moment, diagonal in this basis.
* Scores and values use the 8-bit columns. A head attends with probabilities p: an error of its score costs
  sum p^2 |v - o|^2, and an error of its values costs sum p^2 times the error's square, so E is the scores' part times
  the values' spread |v - o|^2, plus the values' part. Only ``ATTENDED_SPREAD`` of the spread over all tokens counts,
  because the tokens that one query attends to lie nearer to each other than any two tokens do.

The maps back are exact, so rounding is the only loss:

    key map   A_i = [shared^-1; own_i^-1; sketch_j^-1 for j != i]: c = [z_i | sketch] A_i but for rounding
    value map B_i = [shared^-1 / g; own_i^-1]: the groups' values add up to c
"""

import torch

from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.rounding_cost import LayerCosts, own_columns
from sglang_tpla.calibrate.transforms import Basis
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

_LEAST_COST = 1e-12  # share of the largest cost; a direction that costs nothing keeps a finite weight
_NO_COST = 1e-16  # square nats; cheaper directions count alike, so key maps stay within float16 even without any query


def layer_sketched_maps(costs: LayerCosts, rows: SketchedRows) -> SketchedMaps:
    """Return the maps of one layer, float64, for rows of these sizes."""
    basis = costs.basis

    def part(cost: torch.Tensor, picked: list[int]) -> Basis:
        """Return the columns ``picked``, weighted by the cost of their rounding, and rotated."""
        weight, unweight = _fourth_root(cost[picked][:, picked])
        turn = rotation(len(picked))
        return Basis(basis.forward[:, picked] @ weight @ turn, turn.T @ unweight @ basis.inverse[picked])

    columns = own_columns(rows)
    kept = part(costs.in_both, list(range(rows.shared)))
    own = [part(costs.in_both, picked) for picked in columns]
    sketch = [part(costs.in_scores, picked) for picked in columns]
    return SketchedMaps(
        rows=rows,
        z=[torch.cat([kept.forward, one.forward], 1) for one in own],
        sketch=torch.cat([block.forward for block in sketch], 1),
        a=[
            torch.cat([kept.inverse, one.inverse, *(block.inverse for j, block in enumerate(sketch) if j != i)])
            for i, one in enumerate(own)
        ],
        b=[torch.cat([kept.inverse / rows.groups, one.inverse]) for one in own],
    )


def _fourth_root(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fourth root of a symmetric matrix and that root's inverse."""
    if not len(cost):
        return cost, cost
    values, vectors = torch.linalg.eigh((cost + cost.T) / 2)
    roots = values.clamp_min(max(values[-1].item() * _LEAST_COST, _NO_COST)).pow(0.25)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
