"""The algebra of the closed-form maps, on statistics with a known, uneven spectrum."""

import pytest
import torch

from sglang_tpla.calibrate.transforms import (
    TRANSFORMS,
    TransformError,
    check_settings,
    deal,
    hadamard,
    layer_maps,
    regression,
)
from sglang_tpla.measure.statistics import LayerMoments

D, H, N = 16, 3, 6


def make_moments() -> tuple[LayerMoments, torch.Tensor, torch.Tensor]:
    """Return moments, the key weights [H, n, d], and the latents [tokens, d] of the moments."""
    tokens, generator = 4000, torch.Generator().manual_seed(0)
    spread = torch.randn(D, D, generator=generator) * torch.linspace(2, 0.05, D)[:, None]
    latent = torch.randn(tokens, D, generator=generator) @ spread + torch.randn(D, generator=generator)
    queries = torch.randn(tokens, H, N, generator=generator) * torch.linspace(1, 0.1, N)
    w_uk = torch.randn(H, N, D, generator=generator)
    moments = LayerMoments.zeros(D, H, N)
    moments.update(latent, queries)
    return moments, w_uk, latent


def shared_dims(transform: str) -> int:
    return 5 if transform == "shared" else 0


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7])  # blocks of three columns leave the last of seven groups none
def test_value_maps_sum_to_the_identity(transform: str, groups: int) -> None:
    moments, w_uk, _ = make_moments()
    maps = layer_maps(transform, moments, w_uk, groups, shared_dims(transform), seed=0)
    total = sum(z @ b for z, _, b in maps)
    torch.testing.assert_close(total, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("transform", "groups"), [(name, 1) for name in TRANSFORMS] + [("shared", 2), ("shared", 4)])
def test_whole_slices_are_exact(transform: str, groups: int) -> None:
    moments, w_uk, latent = make_moments()
    kept = D if transform == "shared" else 0
    maps = layer_maps(transform, moments, w_uk, groups, kept, seed=0)
    for z, a, _ in maps:
        assert z.shape == (D, D)
        torch.testing.assert_close(latent.double() @ z @ a, latent.double(), atol=1e-8, rtol=0)


def test_one_identity_group_is_the_identity_to_the_bit() -> None:
    moments, w_uk, _ = make_moments()
    ((z, a, b),) = layer_maps("identity", moments, w_uk, 1, 0, seed=0)
    for found in (z, a, b):
        assert torch.equal(found, torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_regression_is_never_worse_than_any_scalar(transform: str) -> None:
    moments, w_uk, latent = make_moments()
    maps = layer_maps(transform, moments, w_uk, 2, shared_dims(transform), seed=0)
    centred = latent.double() - latent.double().mean(0)
    for z, a, b in maps:
        slices = centred @ z
        best = (centred - slices @ a).pow(2).sum()
        for scalar in (0.5, 1.0, 2.0, 4.0):
            assert best <= (centred - scalar * slices @ b).pow(2).sum() * (1 + 1e-9)


def test_regression_equals_least_squares_with_an_intercept() -> None:
    moments, _, latent = make_moments()
    z = torch.randn(D, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slices = latent.double() @ z
    design = torch.cat([slices, torch.ones(len(slices), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, latent.double()).solution[:-1]
    torch.testing.assert_close(regression(z, moments.covariance), expected, atol=1e-5, rtol=1e-4)


def test_shared_columns_are_the_same_bits_and_come_first() -> None:
    moments, w_uk, _ = make_moments()
    maps = layer_maps("shared", moments, w_uk, 4, 5, seed=0)
    assert all(z.shape == (D, 5 + 3) for z, _, _ in maps)
    for z, _, _ in maps[1:]:
        assert torch.equal(z[:, :5], maps[0][0][:, :5])
    # With 11 directions over 4 groups, one group is short and padded.
    padded = [z for z, a, b in maps if not z[:, -1].any()]
    assert len(padded) == 1
    for z, a, b in maps:
        if not z[:, -1].any():
            assert not a[-1].any()
            assert not b[-1].any()


def test_shared_beats_pca_on_the_scores_it_is_made_for() -> None:
    moments, w_uk, _ = make_moments()
    queries = moments.absorbed_queries(w_uk)

    # The energy of a group's score error is trace((I - Z A)^T C (I - Z A) Q).
    def score_error(maps) -> float:
        total = 0.0
        for z, a, _ in maps:
            rest = torch.eye(D, dtype=torch.float64) - z @ a
            total += torch.trace(rest.T @ moments.covariance @ rest @ queries).item()
        return total

    ours = layer_maps("shared", moments, w_uk, 2, 4, seed=0)
    theirs = layer_maps("pca", moments, w_uk, 2, 0, seed=0)
    assert score_error(ours) < 0.5 * score_error(theirs)


def test_hadamard_is_orthogonal_and_follows_its_seed() -> None:
    matrix = hadamard(D, 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(D, dtype=torch.float64))
    assert torch.equal(matrix, hadamard(D, 3))
    assert not torch.equal(matrix, hadamard(D, 4))
    with pytest.raises(TransformError, match="power of two"):
        hadamard(12, 0)
    with pytest.raises(TransformError, match="power of two, got 96"):  # raised before any statistics are collected
        check_settings("hadamard", 2, 0, 96)


@pytest.mark.parametrize(("groups", "shared"), [(1, 0), (2, 3), (3, 4), (4, 16), (5, 1)])
def test_every_column_is_dealt_once(groups: int, shared: int) -> None:
    dealt = deal(D, groups, shared)
    assert all(columns[:shared] == list(range(shared)) for columns in dealt)
    rest = sorted(column for columns in dealt for column in columns[shared:])
    assert rest == list(range(shared, D))
    assert max(map(len, dealt)) == shared + -(-(D - shared) // groups)


def test_maps_are_deterministic() -> None:
    for transform in TRANSFORMS:
        moments, w_uk, _ = make_moments()
        first = layer_maps(transform, moments, w_uk, 2, shared_dims(transform), seed=7)
        again = layer_maps(transform, *make_moments()[:2], 2, shared_dims(transform), seed=7)
        for ours, theirs in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_latents_that_leave_a_group_without_variance_have_maps(transform: str, rank: int) -> None:
    """A dead layer's latents are zero; latents that lie on a line leave later groups only rounding noise."""
    tokens, generator = 4000, torch.Generator().manual_seed(1)
    latent = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, D, generator=generator)
    moments = LayerMoments.zeros(D, H, N)
    moments.update(latent, torch.randn(tokens, H, N, generator=generator))
    w_uk = torch.randn(H, N, D, generator=generator)
    for groups in (1, 2, 4):
        maps = layer_maps(transform, moments, w_uk, groups, min(shared_dims(transform), 3), seed=0)
        assert all(part.isfinite().all() for triple in maps for part in triple)
        total = sum(z @ b for z, _, b in maps)
        torch.testing.assert_close(total, torch.eye(D, dtype=torch.float64), atol=1e-6, rtol=0)
        if transform in ("pca", "shared"):  # the first group has all the variance
            z, a, _ = maps[0]
            centred = latent.double() - latent.double().mean(0)
            torch.testing.assert_close(centred @ z @ a, centred, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["a dead channel", "channels twice"])
def test_noise_of_the_arithmetic_makes_no_keys(kind: str) -> None:
    """A column without variance once had a row of tens of thousands; float16 overflowed, and other text was swamped."""
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(4000, D // 2, generator=generator)
    latent = torch.cat([half, half], 1)
    if kind == "a dead channel":
        latent = torch.randn(4000, D, generator=generator)
        latent[:, 5] = 0
    moments = LayerMoments.zeros(D, H, N)
    moments.update(latent, torch.randn(4000, H, N, generator=generator))
    w_uk = torch.randn(H, N, D, generator=generator)
    for _, a, _ in layer_maps("shared", moments, w_uk, 2, 5, seed=0):
        assert a.abs().max() < 2


def test_bad_settings_are_refused() -> None:
    moments, w_uk, _ = make_moments()
    with pytest.raises(TransformError, match="one of identity, hadamard, pca, shared"):
        layer_maps("fourier", moments, w_uk, 2, 0, seed=0)
    with pytest.raises(TransformError, match="0 <= --shared-dims <= 16"):
        layer_maps("shared", moments, w_uk, 2, 17, seed=0)
    with pytest.raises(TransformError, match="needs --transform shared"):
        layer_maps("pca", moments, w_uk, 2, 4, seed=0)
    with pytest.raises(TransformError, match="regression or scalar"):
        layer_maps("pca", moments, w_uk, 2, 0, seed=0, key_map="magic")
