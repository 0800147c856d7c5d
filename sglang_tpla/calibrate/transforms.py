"""Closed-form slicing maps of one layer from its second moments.

Every transform is a basis of the latent space, dealt out to the groups, and two maps back:

    Z_i [d, w]  the group's basis columns: z_i = c Z_i
    A_i [w, d]  centred regression of the whole latent c on z_i. A constant key shifts all scores of a query by the
                same amount, which the softmax ignores, so the mean needs no separate term.
    B_i [w, d]  rows of the inverse basis; those of shared columns count 1/g in each group, so that
                sum_i Z_i B_i = I and the output is exact wherever the groups' probabilities are exact.

Bases: ``identity``, ``hadamard`` (seeded signs, spreads energy evenly), ``pca`` (the paper's: eigenvectors of the
latent's covariance), ``shared`` (ours: whitened latent, directions ordered by score energy S_K^1/2 S_Q S_K^1/2; every
group keeps the first r, and the rest is dealt out in blocks). Settings out of range, and a latent that has no such
basis, raise `TransformError`.
"""

from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.errors import SglangTplaError
from sglang_tpla.measure.statistics import LayerMoments

TRANSFORMS = ("identity", "hadamard", "pca", "shared")
Maps = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# Directions with less variance than this share of the largest are rounding noise.
_RELATIVE_FLOOR = 1e-10


class TransformError(SglangTplaError, ValueError):
    """Settings give no transform; the message says what was expected, what came, and what to do."""


@dataclass(frozen=True)
class Basis:
    """An invertible basis: columns of ``forward`` [d, d] are kept values, rows of ``inverse`` [d, d] undo them.

    Columns are in order of importance.
    """

    forward: torch.Tensor
    inverse: torch.Tensor


def check_settings(transform: str, groups: int, shared_dims: int, latent_dim: int) -> None:
    """Refuse settings before any work.

    Raises:
        TransformError: groups or shared dims are out of range, the transform shares no dims, or the latent has no such
            transform.
    """
    if not 1 <= groups <= latent_dim:
        raise TransformError(f"expected 1 <= --groups <= {latent_dim}, got {groups}")
    if not 0 <= shared_dims <= latent_dim:
        raise TransformError(f"expected 0 <= --shared-dims <= {latent_dim}, got {shared_dims}")
    if shared_dims and transform not in ("shared", "learned"):
        raise TransformError(f"--shared-dims {shared_dims} needs --transform shared, got {transform!r}")
    if transform == "hadamard":
        check_hadamard(latent_dim)


def layer_maps(
    transform: str,
    moments: LayerMoments,
    w_uk: torch.Tensor,
    groups: int,
    shared_dims: int,
    seed: int,
    key_map: str = "regression",
) -> Maps:
    """Make the maps (Z, A, B) of each group, float64.

    Args:
        transform: one of ``TRANSFORMS``.
        moments: the layer's statistics.
        w_uk: key half of kv_b_proj, [H, n, d].
        groups: g.
        shared_dims: r, columns that every group keeps; only ``shared`` takes any.
        seed: decides Hadamard's signs.
        key_map: ``regression``, or ``scalar`` for the paper's map: the slice's rows of the inverse basis, times g for
            Hadamard, whose slices each hold 1/g of the energy.
    """
    latent_dim = moments.latent_sum.shape[0]
    check_settings(transform, groups, shared_dims, latent_dim)
    basis = make_basis(transform, moments, w_uk, seed)
    columns = deal(latent_dim, groups, shared_dims)
    maps = maps_from_basis(basis, moments.covariance, columns, shared_dims)
    if key_map == "regression":
        return maps
    if key_map != "scalar":
        raise TransformError(f"expected --key-map regression or scalar, got {key_map!r}")
    factor = groups if transform == "hadamard" else 1
    shares = torch.ones(maps[0][0].shape[1], 1, dtype=torch.float64)
    shares[:shared_dims] = groups  # undo the 1/g that shared columns count in B
    return [(z, b * shares * factor, b) for z, _, b in maps]


def make_basis(transform: str, moments: LayerMoments, w_uk: torch.Tensor, seed: int) -> Basis:
    covariance = moments.covariance
    latent_dim = covariance.shape[0]
    if transform == "identity":
        eye = torch.eye(latent_dim, dtype=torch.float64)
        return Basis(eye, eye)
    if transform == "hadamard":
        turned = hadamard(latent_dim, seed)
        return Basis(turned, turned.T)
    if transform == "pca":
        vectors = torch.linalg.eigh(covariance)[1].flip(1)
        return Basis(vectors, vectors.T)
    if transform == "shared":
        return score_basis(covariance, moments.absorbed_queries(w_uk))
    raise TransformError(f"expected --transform to be one of {', '.join(TRANSFORMS)}, got {transform!r}")


def score_basis(covariance: torch.Tensor, query_moment: torch.Tensor) -> Basis:
    """Order whitened directions by score energy; both arguments and both results are [d, d]."""
    values, vectors = torch.linalg.eigh(covariance)
    # Latents that are all zero have no largest variance; a small floor keeps their errors cheap beside other layers'.
    values = values.clamp_min(_RELATIVE_FLOOR * (values[-1] if values[-1] > 0 else 1))
    root = (vectors * values.sqrt()) @ vectors.T
    root_inverse = (vectors / values.sqrt()) @ vectors.T
    energy = root @ query_moment @ root
    vectors = torch.linalg.eigh((energy + energy.T) / 2)[1].flip(1)
    return Basis(root_inverse @ vectors, vectors.T @ root)


def check_hadamard(size: int) -> None:
    if size & (size - 1):
        raise TransformError(f"hadamard needs a latent dimension that is a power of two, got {size}; use pca")


def hadamard(size: int, seed: int) -> torch.Tensor:
    """Return an orthogonal matrix [size, size]: Hadamard's with seeded signs of its rows."""
    check_hadamard(size)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs.double()[:, None] * rotation(size)


def deal(latent_dim: int, groups: int, shared_dims: int) -> list[list[int]]:
    """Deal the basis columns out to the groups: each gets the first ``shared_dims``, then a block of the rest.

    The rest is dealt in blocks of the ordered basis, not column by column: a group with a poor score does harm in
    proportion to the values that it carries, so the first group should have both the good scores and the large values.
    On a checkpoint of latent width 256, blocks halve the error at g = 2 against dealing column by column.
    """
    rest = list(range(shared_dims, latent_dim))
    per_group = -(-len(rest) // groups)
    blocks = [rest[group * per_group : (group + 1) * per_group] for group in range(groups)]
    return [list(range(shared_dims)) + block for block in blocks]


def maps_from_basis(basis: Basis, covariance: torch.Tensor, columns: list[list[int]], shared_dims: int) -> Maps:
    """Make the maps of each group from its basis columns; short groups are padded with zero columns."""
    groups = len(columns)
    width = max(map(len, columns))
    latent_dim = basis.forward.shape[0]
    maps: Maps = []
    for picked in columns:
        z = torch.zeros(latent_dim, width, dtype=torch.float64)
        b = torch.zeros(width, latent_dim, dtype=torch.float64)
        a = torch.zeros(width, latent_dim, dtype=torch.float64)
        used = len(picked)
        z[:, :used] = basis.forward[:, picked]
        b[:used] = basis.inverse[picked]
        b[:shared_dims] /= groups
        # If all columns are kept, the inverse is known exactly; a regression would round.
        if used:  # blocks of equal size may end before the last groups
            a[:used] = basis.inverse if used == latent_dim else regression(z[:, :used], covariance)
        maps.append((z, a, b))
    return maps


def regression(z: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Return the linear map [w, d] that best predicts the centred latent from the slice z = c Z; Z is [d, w].

    A column that never varies predicts nothing, so its row is close to zero.
    """
    cross = z.T @ covariance  # [w, d]
    gram = cross @ z
    gram = (gram + gram.T) / 2
    # Rounding makes a small variance of either sign out of none. Without this ridge, a column that never varied could
    # get a row of any size, and text in which the column varies a little would be served with that row.
    rounding = torch.finfo(gram.dtype).eps * covariance.diagonal().abs().sum() * z.square().sum(0).max()
    ridge = torch.maximum(gram.diagonal().mean() * _RELATIVE_FLOOR, rounding)
    if ridge == 0:  # no latent varies at all
        return torch.zeros_like(cross)
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype), cross)
