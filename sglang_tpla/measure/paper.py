"""The paper's recipe (arXiv 2508.15881), for comparison only: PCA, and RMSNorm over each rank's slice.

In the paper, a rank holds a slice of the rotated raw latent and norms it by the slice's mean square; a constant share
relates that to the whole latent's mean square. With u = c / rms(c) the latent before RMSNorm's weight gamma:

    z_i = u U_i * sqrt(E[mean_i]) / sqrt(mean_i),   mean_i = mean square of u U_i,   maps back: U_i^T diag(gamma)

U is the PCA of u, dealt out in blocks. A channel whose gamma is zero is ignored, because it reaches neither scores nor
values. No serving code uses this recipe: the map is not linear and the norm is inexact.
"""

from collections.abc import Callable

import torch

from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel


def paper_layers(model: PlainModel, statistics: Statistics, groups: int) -> list[LayerMaps]:
    """Return maps of every layer by the paper's recipe; each Z is a function from latents [B, S, d] to slices."""
    layers: list[LayerMaps] = []
    for layer, moments in zip(model.layers, statistics.layers, strict=True):
        gamma = layer.attention.kv_norm.double().cpu()
        second = moments.latent_outer.cpu() / max(moments.latent_count, 1)
        undone = torch.where(gamma == 0, 0, 1 / gamma)
        second = second * undone[:, None] * undone[None, :]  # the second moment of u
        basis = torch.linalg.eigh(second)[1].flip(1)
        width = -(-gamma.shape[0] // groups)
        maps = []
        for columns in basis.split(width, 1):
            share = (columns * (second @ columns)).sum() / columns.shape[1]
            back = (columns.T * gamma).to(model.device, model.dtype)
            forward = (columns * undone[:, None]).to(model.device, model.dtype)
            # Rounding may make the share negative in directions that the text never takes.
            maps.append((_local_norm(forward, max(share.item(), 0.0) ** 0.5), back, back))
        layers.append(maps)
    return layers


def _local_norm(forward: torch.Tensor, rms: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def slices(latent: torch.Tensor) -> torch.Tensor:
        raw = latent @ forward
        return raw * (rms * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + 1e-12))

    return slices
