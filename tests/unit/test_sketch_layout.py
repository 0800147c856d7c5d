"""Sizes of sketched rows that nobody gave: the noise that decides, and what comes of it."""

from __future__ import annotations

import pytest
import torch

from sglang_tpla.cache_rows.sketched import SketchedRows, quantise_sketch, sketch_values
from sglang_tpla.calibrate.sketch_layout import (
    QUIET,
    default_shared,
    shared_choices,
    sketch_noise,
    sketched_rows,
    usual_rows,
)
from sglang_tpla.calibrate.sketch_maps import LayerWeights, layer_sketched_maps, score_energies
from sglang_tpla.calibrate.transforms import TransformError
from sglang_tpla.measure.statistics import LayerMoments

LOUD = [torch.linspace(8, 0.5, 128, dtype=torch.float64)] * 2
QUIET_ENERGIES = [torch.full((128,), 0.1, dtype=torch.float64)] * 2
SCALE = 0.1


def test_the_choice_of_shared_columns() -> None:
    assert [default_shared(512, g) for g in (1, 2, 4, 8)] == [512, 64, 64, 64]
    assert [default_shared(128, g) for g in (2, 4, 8)] == [32, 32, 32]
    assert [default_shared(256, g) for g in (2, 4, 8)] == [64, 64, 64]
    assert (512 - default_shared(512, 3)) % 3 == 0
    for groups in (2, 3, 5, 8):
        for shared in shared_choices(512, groups):
            SketchedRows.of(512, groups, shared, 64)
    with pytest.raises(TransformError, match="nearest --shared-dims that 2 groups hold are \\[28, 32, 36\\]"):
        sketched_rows(128, 32, 2, 33, 4, 16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_noise_is_that_of_scores_through_the_sketch_alone(bits: int) -> None:
    d, heads, nope, tokens = 128, 2, 128, 4000
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(d, d, generator=generator) * torch.linspace(2, 0.3, d)[:, None]
    latent = torch.randn(tokens, d, generator=generator) @ spread
    queries = torch.randn(tokens, heads, nope, generator=generator)
    w_uk = torch.randn(heads, nope, d, generator=generator)
    moments = LayerMoments.zeros(d, heads, nope)
    moments.update(latent, queries)
    weights = LayerWeights(w_uk, torch.randn(heads, nope, d, generator=generator), 1.0)
    rows = SketchedRows.of(d, 2, 64, 8, sketch_bits=bits)
    maps = layer_sketched_maps(moments, weights, rows)
    absorbed = torch.einsum("thn,hnd->thd", queries[:200], w_uk).flatten(0, 1).double()
    columns = latent.double() @ maps.sketch
    codes, scales = quantise_sketch(columns, bits)
    rounding = (sketch_values(codes, scales, bits) - columns).unflatten(-1, (2, rows.own))
    found = [
        (absorbed @ (rounding[:, 1 - group] @ maps.a[group][rows.w :]).T).square().mean().item()
        for group in range(2)
    ]
    assert sum(found) / 2 == pytest.approx(
        sketch_noise([score_energies(moments, weights)], rows, 1.0), rel=0.1
    )


def test_a_quiet_model_shares_a_quarter_and_keeps_the_key() -> None:
    for groups in (2, 4, 8):
        rows = usual_rows(QUIET_ENERGIES, SCALE, 32, groups, 4)
        assert sketch_noise(QUIET_ENERGIES, rows, SCALE) <= QUIET
        assert (rows.shared, rows.rope_bits) == (32, 16)
    assert usual_rows(QUIET_ENERGIES, SCALE, 32, 2, 4, rope_bits=8).shared == 32


def test_padding_is_put_to_use() -> None:
    energies = [torch.full((512,), 0.1, dtype=torch.float64)]
    rows = usual_rows(energies, SCALE, 64, 2, 4)
    assert rows.shared == 96 and rows.row_bytes == SketchedRows.of(512, 2, 64, 64).row_bytes == 544
    assert usual_rows(energies, SCALE, 64, 4, 4) == SketchedRows.of(512, 4, 64, 64)


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_loud_model_spends_the_keys_second_byte_on_shared_columns(groups: int, bits: int) -> None:
    usual = usual_rows(LOUD, SCALE, 32, groups, bits, rope_bits=16)
    assert usual.shared == default_shared(128, groups, bits) and sketch_noise(LOUD, usual, SCALE) > QUIET
    rows = usual_rows(LOUD, SCALE, 32, groups, bits)
    if (groups, bits) == (8, 3):  # the format holds no more than a half shared
        assert rows == usual and rows.shared == 64
        return
    assert rows.rope_bits == 8 and usual.shared < rows.shared <= 96 and rows.row_bytes <= usual.row_bytes
    assert sketch_noise(LOUD, rows, SCALE) < sketch_noise(LOUD, usual, SCALE)
    # asked for 8 bits, it saves bytes
    asked = usual_rows(LOUD, SCALE, 32, groups, bits, rope_bits=8)
    assert (
        asked.rope_bits == 8
        and usual.shared <= asked.shared <= max(48, usual.shared)
        and asked.row_bytes < rows.row_bytes
    )


def test_what_is_given_is_kept() -> None:
    rows = usual_rows(LOUD, SCALE, 32, 2, 3, shared_dims=64)
    assert rows == SketchedRows.of(128, 2, 64, 32, sketch_bits=3)
    assert usual_rows(LOUD, SCALE, 32, 2, 4, 8, 16) == SketchedRows.of(128, 2, 16, 32, rope_bits=8)
    one = usual_rows(LOUD, SCALE, 32, 1, 4)
    assert one == SketchedRows.of(128, 1, 128, 32) and sketch_noise(LOUD, one, SCALE) == 0
    with pytest.raises(TransformError, match="--shared-dims"):
        usual_rows(LOUD, SCALE, 32, 2, 4, shared_dims=33)
