"""The default sizes of sketched rows: the cost of rounding, and the layouts that follow from it."""

import pytest
import torch

from sglang_tpla.artifact.fold import fold_key_map
from sglang_tpla.cache_rows.shared_columns import default_shared, shared_choices
from sglang_tpla.cache_rows.sketched import SketchedRows, quantise_sketch, sketch_values
from sglang_tpla.calibrate.rounding_cost import DISTORTION, LayerCosts
from sglang_tpla.calibrate.sketch_layout import (
    QUIET,
    sketch_noise,
    sketched_rows,
    usual_rows,
)
from sglang_tpla.calibrate.sketch_maps import layer_sketched_maps
from sglang_tpla.calibrate.transforms import Basis, TransformError
from sglang_tpla.measure.statistics import LayerMoments
from sglang_tpla.reference_model.sketched_layer import rounded


def layers(energies: torch.Tensor) -> list[LayerCosts]:
    """Return two layers whose columns cost scores the squares of ``energies``, and values nine times as much."""
    scores = torch.diag(energies.double().square())
    eye = torch.eye(len(energies), dtype=torch.float64)
    return [LayerCosts(Basis(eye, eye), scores, 10 * scores)] * 2


LOUD = layers(torch.linspace(0.8, 0.05, 128))


def test_the_choice_of_shared_columns() -> None:
    assert [default_shared(512, g) for g in (1, 2, 4, 8)] == [512, 64, 64, 64]
    assert [default_shared(128, g) for g in (2, 4, 8)] == [32, 32, 32]
    assert [default_shared(256, g) for g in (2, 4, 8)] == [64, 64, 64]
    assert (512 - default_shared(512, 3)) % 3 == 0
    assert default_shared(128, 16, 3) == 128  # the only other choice, none, cost a model of that size 0.07 nats
    for groups in (2, 3, 5, 8):
        for shared in shared_choices(512, groups):
            SketchedRows.of(512, groups, shared, 64)
    with pytest.raises(TransformError, match="nearest --shared-dims that 2 groups hold are \\[28, 32, 36\\]"):
        sketched_rows(128, 32, 2, 33, 4, 16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_costs_are_those_of_scores_and_values_that_rounding_moves(bits: int) -> None:
    d, heads, nope, tokens = 128, 2, 128, 4000
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(d, d, generator=generator) * torch.linspace(2, 0.3, d)[:, None]
    latent = torch.randn(tokens, d, generator=generator) @ spread
    queries = torch.randn(tokens, heads, nope, generator=generator)
    w_uk = torch.randn(heads, nope, d, generator=generator)
    w_uv = torch.randn(heads, nope, d, generator=generator)
    moments = LayerMoments.zeros(d, heads, nope)
    moments.update(latent, queries)
    costs = LayerCosts.of(moments, w_uk, w_uv, 1.0)
    rows = SketchedRows.of(d, 2, 64, 8, sketch_bits=bits)
    maps = layer_sketched_maps(costs, rows)
    absorbed = torch.einsum("thn,hnd->thd", queries[:200], w_uk).flatten(0, 1).double()
    latent = latent.double()
    columns = latent @ maps.sketch
    codes, scales = quantise_sketch(columns, bits)
    rounding = (sketch_values(codes, scales, bits) - columns).unflatten(-1, (2, rows.own))
    found = [
        (absorbed @ (rounding[:, 1 - group] @ maps.a[group][rows.w :]).T).square().mean().item() for group in range(2)
    ]
    # Few columns have smaller largest values, and so less error, than the many columns that the costs assume.
    few = torch.randn(tokens, columns.shape[1], generator=generator)
    share = (sketch_values(*quantise_sketch(few, bits), bits) - few).square().mean().item() / DISTORTION[bits]
    assert sum(found) / 2 == pytest.approx(costs.sketch(rows) * share, rel=0.1)
    # Columns at 8 bits: errors of values count like those of scores if keys differ by a quarter of their spread.
    values = torch.einsum("td,hvd->thv", latent, w_uv.double())
    apart = (values - values.mean(0)).square().sum(-1).mean() / 4
    total = 0.0
    for picked in (slice(rows.shared), slice(rows.shared, rows.w)):
        for group in range(2) if picked.start else (0,):
            kept = latent @ maps.z[group][:, picked]
            error = (rounded(kept) - kept) @ maps.a[group][picked]
            in_values = torch.einsum("td,hvd->thv", error, w_uv.double()).square().sum(-1).mean()
            total += ((absorbed @ error.T).square().mean() + in_values / apart).item()
    assert total == pytest.approx(costs.columns(rows), rel=0.2)


def alike(costs: list[LayerCosts], *settings: int | None, **more: int) -> SketchedRows:
    """Return the rows of all layers, which must be the same."""
    (rows,) = set(usual_rows(costs, *settings, **more))
    return rows


def test_a_layer_without_latents_has_maps_and_costs_nothing_beside_others() -> None:
    d, heads, nope, tokens = 64, 2, 16, 1000
    generator = torch.Generator().manual_seed(3)
    w_uk, w_uv = (torch.randn(heads, nope, d, generator=generator) for _ in range(2))

    def costs(latent: torch.Tensor) -> LayerCosts:
        moments = LayerMoments.zeros(d, heads, nope)
        moments.update(latent, torch.randn(tokens, heads, nope, generator=generator))
        return LayerCosts.of(moments, w_uk, w_uv, 0.1)

    dead, live = costs(torch.zeros(tokens, d)), costs(torch.randn(tokens, d, generator=generator))
    rows = SketchedRows.of(d, 2, 16, 8)
    maps = layer_sketched_maps(dead, rows)
    total = sum(z @ b for z, b in zip(maps.z, maps.b, strict=True))
    torch.testing.assert_close(total, torch.eye(d, dtype=torch.float64), atol=1e-9, rtol=0)
    assert dead.sketch(rows) < 1e-6 * live.sketch(rows)
    assert dead.columns(rows) < 1e-6 * live.columns(rows)


@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_key_maps_of_a_layer_without_queries_stay_within_float16(size: float) -> None:
    """Servers fold key maps into weights of the model's dtype, and infinity times a query of zero would be NaN."""
    d, heads, nope, tokens = 64, 2, 16, 1000
    generator = torch.Generator().manual_seed(3)
    moments = LayerMoments.zeros(d, heads, nope)
    queries = size * torch.randn(tokens, heads, nope, generator=generator)
    moments.update(torch.randn(tokens, d, generator=generator), queries)
    w_uk, w_uv = (torch.randn(heads, nope, d, generator=generator) for _ in range(2))
    maps = layer_sketched_maps(LayerCosts.of(moments, w_uk, w_uv, 0.1), SketchedRows.of(d, 2, 16, 8))
    for a in maps.a:
        assert fold_key_map(w_uk, a.float()).half().isfinite().all()


def test_a_quiet_model_shares_a_quarter_and_keeps_the_key() -> None:
    gentle = layers(0.02 * 0.99 ** torch.arange(128))
    for groups in (2, 4, 8):
        rows = alike(gentle, 32, groups)
        assert sketch_noise(gentle, rows) <= QUIET
        assert (rows.shared, rows.rope_bits, rows.sketch_bits) == (32, 16, 4)
    assert alike(gentle, 32, 2, rope_bits=8).shared == 32


def test_padding_is_put_to_use() -> None:
    even = layers(torch.full((512,), 0.01))
    rows = alike(even, 64, 2)
    assert rows.shared == 96 and rows.row_bytes == SketchedRows.of(512, 2, 64, 64).row_bytes == 544
    assert alike(even, 64, 4) == SketchedRows.of(512, 4, 64, 64)


def test_a_quiet_model_of_many_groups_or_odd_width_has_rows() -> None:
    for width, groups in ((128, 128), (72, 8), (97, 3)):  # none of these has blocks of eight columns
        assert alike(layers(torch.full((width,), 0.01)), 32, groups).groups == groups


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_bytes_go_where_rounding_costs_most(groups: int) -> None:
    steep = [layers(0.1 * decay ** torch.arange(256))[0] for decay in (0.9, 0.93, 0.97)]
    rows = usual_rows(steep, 64, groups)
    usual = alike(steep, 64, groups, 4)
    assert all(layer.rope_bits == 16 for layer in rows)
    assert sum(layer.row_bytes for layer in rows) / 3 <= 640 * {2: 0.56, 4: 0.52, 8: 0.5}[groups]

    def cost(of: list[SketchedRows]) -> float:  # the first layer's errors pass three layers of experts
        each = zip(steep, of, strict=True)
        return sum((3 - i) * (layer.columns(x) + layer.sketch(x)) for i, (layer, x) in enumerate(each))

    assert cost(rows) < 0.75 * cost([usual] * 3)
    # A requested setting holds in every layer.
    assert alike(steep, 64, groups, 3).sketch_bits == 3
    assert alike(steep, 64, groups, rope_bits=16) == usual


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_loud_model_spends_the_keys_second_byte_on_shared_columns(groups: int, bits: int) -> None:
    usual = alike(LOUD, 32, groups, bits, rope_bits=16)
    assert usual.shared == default_shared(128, groups, bits) and sketch_noise(LOUD, usual) > QUIET
    rows = alike(LOUD, 32, groups, bits)
    if (groups, bits) == (8, 3):  # here the format can share at most half of the columns
        assert rows == usual and rows.shared == 64
        return
    assert rows.rope_bits == 8 and usual.shared < rows.shared <= 96 and rows.row_bytes <= usual.row_bytes
    assert sketch_noise(LOUD, rows) < sketch_noise(LOUD, usual)
    # A request for 8 bits saves bytes.
    asked = alike(LOUD, 32, groups, bits, rope_bits=8)
    assert (
        asked.rope_bits == 8
        and usual.shared <= asked.shared <= max(48, usual.shared)
        and asked.row_bytes < rows.row_bytes
    )


def test_what_is_given_is_kept() -> None:
    rows = alike(LOUD, 32, 2, 3, shared_dims=64)
    assert rows == SketchedRows.of(128, 2, 64, 32, sketch_bits=3)
    assert alike(LOUD, 32, 2, 4, 8, 16) == SketchedRows.of(128, 2, 16, 32, rope_bits=8)
    one = alike(LOUD, 32, 1, 4)
    assert one == SketchedRows.of(128, 1, 128, 32) and sketch_noise(LOUD, one) == 0
    with pytest.raises(TransformError, match="--shared-dims"):
        alike(LOUD, 32, 2, 4, shared_dims=33)
