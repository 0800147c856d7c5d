"""Choosing a layout under a bound: the walk over per-layer widths, a backend's widths, and the command."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.cache_rows.layer_rows import PlainRows
from sglang_tpla.calibrate.layout_search import Point, Search, table, widening_walk
from sglang_tpla.calibrate.sketch_search import SketchedSearch
from sglang_tpla.calibrate.transforms import TransformError
from sglang_tpla.config import slice_width
from tests.shipped import NANO, call_command


def test_walk_is_as_good_as_trying_everything() -> None:
    widths = [4, 6, 10]
    alone = [[0.9, 0.1, 0.05], [0.2, 0.15, 0.0], [0.01, 0.009, 0.008]]

    def cost(pick) -> tuple[int, float]:
        return sum(widths[c] for c in pick), sum(alone[layer][c] for layer, c in enumerate(pick))

    walk = widening_walk(alone, widths)
    assert walk[0] == [0, 0, 0]
    assert walk[-1] == [2, 2, 2]
    everything = [cost(pick) for pick in itertools.product(range(3), repeat=3)]
    for pick in walk:
        width, error = cost(pick)
        # Here gains fall as widths grow, so the greedy walk is optimal at each of its costs.
        assert error <= min(kl for w, kl in everything if w <= width) + 1e-12


@pytest.mark.parametrize(("latent", "groups"), [(128, 2), (512, 8), (512, 3)])
def test_only_served_widths_are_looked_at(latent: int, groups: int) -> None:
    wanted = Search(groups, 0.01, lambda width: width % 32 == 0 and width >= 64)
    choices = wanted.shared_choices(latent, groups)
    widths = [slice_width(latent, groups, shared) for shared in choices]
    assert widths == sorted(widths)
    assert all(width % 32 == 0 for width in widths)
    assert choices[-1] == latent
    assert len(choices) == len(set(choices)) >= 2
    with pytest.raises(TransformError, match="serves no slice width"):
        Search(2, 0.01, lambda width: False).shared_choices(128, 2)
    with pytest.raises(TransformError, match="--ranks of at least 2"):
        Search(1, 0.01, lambda width: True)
    assert Search(12, 0.01, lambda width: True).group_counts() == [2, 3, 4, 6, 12]


def test_table_leaves_out_what_is_beaten_on_both_counts() -> None:
    sizes = ((4, 46, 0.5), (2, 56, 0.6), (2, 66, 0.01))
    points = [Point(groups, (PlainRows(width, 0, 4),), kl) for groups, width, kl in sizes]
    text = table(points, points[2], 200)
    assert "0.60000" not in text
    assert text.count("<- chosen") == 1
    assert "70.0%" in text


def test_choices_of_sketched_rows_are_what_the_format_holds_in_order_of_size() -> None:
    for groups in (1, 2, 3, 8):
        choices = SketchedSearch().choices(512, 64, groups, 8)
        sizes = [rows.row_bytes for rows in choices]
        assert sizes == sorted(set(sizes))
        assert {rows.groups for rows in choices} == {groups} and {rows.rope_bits for rows in choices} == {8}
    bits = {rows.sketch_bits for rows in SketchedSearch().choices(512, 64, 2, 16)}
    assert bits == {2, 3, 4}
    (only,) = SketchedSearch(bits=(3,), shared=64).choices(512, 64, 2, 16)
    assert (only.shared, only.sketch_bits) == (64, 3)


def test_shared_columns_that_were_given_are_kept_or_the_layout_is_left_out() -> None:
    """Blocks of 150 columns are whole bytes only at 4 bits, and seven groups do not divide 512 - 212."""
    given = SketchedSearch(shared=212)
    assert [rows.sketch_bits for rows in given.choices(512, 64, 2, 16)] == [4]
    looked_at = {groups: rows for _, groups, rows in given.looked_at(512, 64, [2, 7])}
    assert set(looked_at) == {1, 2} and {rows.shared for rows in looked_at[2]} == {212}


def test_groups_are_those_that_divide_the_heads() -> None:
    """Six ranks at g = 2 would have three shards of four heads, and a server refuses to start with that."""
    assert Search(6, 0.1, lambda width: True, heads=4).group_counts() == [3, 6]
    assert Search(6, 0.1, lambda width: True).group_counts() == [2, 3, 6]


def test_command_keeps_the_bound_on_held_out_text(tmp_path: Path) -> None:
    sizes = ("--tokens", 4096, "--held-out-tokens", 512, "--prompt-tokens", 64, "--continuation-tokens", 64)
    asked = ("--model-path", NANO, "--out", tmp_path / "a", "--max-kl", 0.02, "--ranks", 2, *sizes)
    calibrate = partial(call_command, "calibrate", *asked)
    sketched = calibrate()
    assert sketched.returncode == 0, sketched.stderr
    assert "<- chosen" in sketched.stdout and "plain MLA in 8-bit rows" in sketched.stdout
    meta = Artifact.load(tmp_path / "a").meta
    assert meta.sketched and meta.error_report is not None and meta.error_report.kl_mean <= 0.02
    done = calibrate("--rows", "plain")
    assert done.returncode == 0, done.stderr
    assert "<- chosen" in done.stdout
    assert "plain MLA" in done.stdout
    artifact = Artifact.load(tmp_path / "a")
    report = artifact.meta.error_report
    assert report is not None
    assert report.kl_mean <= 0.02
    assert sum(artifact.meta.widths) < 4 * 128
    for layer, (shared, width) in enumerate(zip(artifact.meta.shared_dims, artifact.meta.widths, strict=True)):
        assert artifact.maps(layer, 1)[0].shape == (128, width)
        if shared == 128:
            assert torch.equal(artifact.maps(layer, 0)[0], artifact.maps(layer, 1)[0])
    for more, says in ((("--ranks", "1"), "--ranks of at least 2"), (("--from-stats", "x"), "--from-stats")):
        refused = calibrate(*more)
        assert refused.returncode == 2
        assert says in refused.stderr
