"""The cost of rounding a layer's sketched rows, from the layer's second moments. Layouts are chosen by this cost.

An error of the latent is counted in squared nats of a score. On three small models, a mean of 0.001 squared nats cost
some 0.0003 nats of KL a token, whichever part of a row it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.sketched import LARGEST_CODE, SketchedRows
from sglang_tpla.calibrate.transforms import Basis, score_basis
from sglang_tpla.measure.statistics import LayerMoments

ATTENDED_SPREAD = 0.25
# These are mean square rounding errors as a share of the mean square: by bits, for a Gaussian's best uniform levels;
# and for bytes, if the largest of some hundred values is 2.8 times their root mean square.
DISTORTION = {2: 0.1188, 3: 0.03744, 4: 0.01154}
BYTE_DISTORTION = 2.8**2 / (12 * LARGEST_CODE**2)
TINY = 1e-30


@dataclass(frozen=True)
class LayerCosts:
    """The costs of errors of a layer's columns, in squared nats of a score.

    Args:
        basis: columns of mean square 1, in order of score energy.
        in_scores: cost of errors that affect scores alone, diagonal, [d, d].
        in_both: cost of errors that affect scores and values, [d, d].
    """

    basis: Basis
    in_scores: torch.Tensor
    in_both: torch.Tensor

    @classmethod
    def of(cls, moments: LayerMoments, w_uk: torch.Tensor, w_uv: torch.Tensor, scale: float) -> LayerCosts:
        """Return the costs, float64, from a layer's statistics, its kv_b_proj's halves and the softmax scale."""
        queries = moments.absorbed_queries(w_uk) * scale**2
        basis = score_basis(moments.latent_outer / max(moments.latent_count, 1), queries)
        value = w_uv.double()
        values = torch.einsum("hvd,hve->de", value, value) / len(value)
        spread = ATTENDED_SPREAD * (values * moments.covariance).sum()
        # If all values are alike, their spread is no unit for their errors, and scores alone decide. A tiny unit would
        # make this layer's cost outweigh that of all others when layouts are chosen.
        values = values / spread if spread > TINY else torch.zeros_like(values)
        in_scores, in_values = (basis.inverse @ cost @ basis.inverse.T for cost in (queries, values))
        return cls(basis, in_scores, in_scores + in_values)

    def sketch(self, rows: SketchedRows) -> float:
        """Return the variance that the sketch's rounding adds to a score."""
        if not rows.own:
            return 0.0
        left = self.in_scores.diagonal()[rows.shared :].clamp_min(0).sqrt().sum().item()
        others = (rows.groups - 1) / rows.groups
        return others * DISTORTION[rows.sketch_bits] * left**2 / (rows.latent_dim - rows.shared)

    def columns(self, rows: SketchedRows) -> float:
        """Return the cost of rounding shared and own columns to 8 bits."""
        parts = [list(range(rows.shared)), *own_columns(rows)]
        return BYTE_DISTORTION * sum(self._part(picked) for picked in parts if picked)

    def _part(self, picked: Sequence[int]) -> float:
        roots = torch.linalg.eigvalsh(self.in_both[picked][:, picked]).clamp_min(0).sqrt()
        return roots.sum().item() ** 2 / len(picked)


def own_columns(rows: SketchedRows) -> list[list[int]]:
    """Return the own columns of each group, dealt out in turn."""
    return [list(range(rows.shared + group, rows.latent_dim, rows.groups)) for group in range(rows.groups)]
