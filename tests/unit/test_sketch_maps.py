"""Maps of sketched rows are exact but for rounding, equal one group's if all columns are shared, and fit the file."""

from pathlib import Path

import msgspec
import pytest
import torch

from sglang_tpla.artifact.artifact import SKETCHED_VERSION, Artifact, ArtifactError, build
from sglang_tpla.cache_rows.sketched import SketchedRows, pack_rows, unpack_rows
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.sketch_maps import layer_sketched_maps
from sglang_tpla.measure.statistics import LayerMoments
from sglang_tpla.reference_model.sketched_layer import SketchedMaps
from tests.unit.test_artifact import make_meta

ROOT = Path(__file__).resolve().parents[2]
D, H, N, ROPE = 32, 3, 6, 8


def make_layer(rows: SketchedRows) -> tuple[SketchedMaps, torch.Tensor, torch.Tensor]:
    """Return maps of a layer with an uneven spectrum, its latents [tokens, D], and absorbed queries."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(D, D, generator=generator) * torch.linspace(2, 0.05, D)[:, None]
    latent = torch.randn(2000, D, generator=generator) @ spread + torch.randn(D, generator=generator)
    queries = torch.randn(2000, H, N, generator=generator)
    w_uk = torch.randn(H, N, D, generator=generator)
    moments = LayerMoments.zeros(D, H, N)
    moments.update(latent, queries)
    absorbed = torch.einsum("thn,hnd->thd", queries, w_uk)
    w_uv = torch.randn(H, N, D, generator=generator)
    maps = layer_sketched_maps(LayerCosts.of(moments, w_uk, w_uv, N**-0.5), rows)
    return maps, latent.double(), absorbed.double()


SHAPES = [
    SketchedRows.of(D, 2, 8, ROPE),
    SketchedRows.of(D, 4, 8, ROPE, sketch_bits=4),
    SketchedRows.of(D, 3, 8, ROPE, sketch_bits=2),
    SketchedRows.of(D, 2, D, ROPE),
    SketchedRows.of(D, 1, 0, ROPE),
]


@pytest.mark.parametrize("rows", SHAPES)
def test_maps_are_exact_but_for_rounding(rows: SketchedRows) -> None:
    maps, latent, _ = make_layer(rows)
    blocks = (latent @ maps.sketch).unflatten(-1, (rows.groups, rows.own))
    total = torch.zeros_like(latent)
    for group in range(rows.groups):
        kept = latent @ maps.z[group]
        others = torch.cat([blocks[:, :group], blocks[:, group + 1 :]], 1).flatten(1)
        assert maps.a[group].shape == (rows.w + rows.sketch_columns, D)
        assert torch.allclose(torch.cat([kept, others], 1) @ maps.a[group], latent, atol=1e-6)
        total += kept @ maps.b[group]
        assert torch.equal(maps.z[group][:, : rows.shared], maps.z[0][:, : rows.shared])
    assert torch.allclose(total, latent, atol=1e-6)


@pytest.mark.parametrize("rows", SHAPES)
def test_the_reference_sees_what_packed_rows_stand_for(rows: SketchedRows) -> None:
    maps, latent, _ = make_layer(rows)
    latent, k_rope = latent[:50].float(), torch.randn(50, ROPE, generator=torch.Generator().manual_seed(2))
    maps = maps.to(latent.device, torch.float32)
    for group, view in enumerate(maps.views(latent[None], k_rope[None])):
        shared, own = (latent @ maps.z[group]).split([rows.shared, rows.own], -1)
        packed = pack_rows(rows, group, shared, own, latent @ maps.sketch, k_rope)
        found = unpack_rows(rows, packed)
        kept = found.latent[:, : rows.w]
        key = torch.cat([kept, found.sketch], -1) @ maps.a[group]
        # A product of another shape may round differently, and then a code may become its neighbour.
        assert (view.key[0] - key).abs().mean() < 1e-3 * key.abs().mean()
        assert (view.value[0] - kept @ maps.b[group]).abs().mean() < 1e-3 * key.abs().mean()
        assert torch.equal(view.k_rope[0], found.k_rope)


def test_groups_that_share_all_columns_equal_one_group() -> None:
    one, latent, _ = make_layer(SketchedRows.of(D, 1, 0, ROPE))
    four, *_ = make_layer(SketchedRows.of(D, 4, D, ROPE))
    k_rope = torch.randn(1, 2000, ROPE)
    (alone,) = one.views(latent[None], k_rope)
    views = list(four.views(latent[None], k_rope))
    assert all(torch.equal(view.key, alone.key) for view in views)
    assert torch.allclose(sum(view.value for view in views), alone.value, atol=1e-6)  # type: ignore[arg-type]


def test_sketched_columns_cost_scores_alike() -> None:
    rows = SketchedRows.of(D, 2, 8, ROPE, sketch_bits=2)
    maps, latent, absorbed = make_layer(rows)
    exact = absorbed.flatten(0, 1)[:500] @ latent.T
    noise = []
    for view in maps.views(latent[None], torch.zeros(1, len(latent), ROPE)):
        error = absorbed.flatten(0, 1)[:500] @ view.key[0].T - exact
        noise.append((error.square().mean() / exact.square().mean()).item())
    # Two bits of the weak columns leave the score nearly exact, and neither group is much worse than the other.
    assert max(noise) < 0.01 and max(noise) < 3 * min(noise)


def make_sketched() -> Artifact:
    rows = [SketchedRows.of(D, 2, 8, 4, rope_bits=8), SketchedRows.of(D, 2, D, 4, sketch_bits=2, rope_bits=8)]
    layers = [make_layer(layer)[0] for layer in rows]
    meta = make_meta(
        format_version=SKETCHED_VERSION,
        latent_dim=D,
        rope_dim=4,
        shared_dims=(8, D),
        widths=(20, D),
        sketch_bits=(4, 2),
        rope_bits=8,
    )
    maps = [list(zip(layer.z, layer.a, layer.b, strict=True)) for layer in layers]
    return build(meta, maps, [layer.sketch for layer in layers])


def test_a_file_of_version_2_is_read_as_it_was_written(tmp_path: Path) -> None:
    artifact = make_sketched()
    artifact.save(tmp_path / "a")
    loaded = Artifact.load(tmp_path / "a")
    assert loaded.content_hash == artifact.content_hash
    assert loaded.meta.rows(0) == SketchedRows.of(D, 2, 8, 4, rope_bits=8)
    assert torch.equal(loaded.sketch(0), artifact.sketch(0)) and loaded.sketch(1).shape == (D, 0)
    assert "layers.1.sketch" not in loaded.tensors


def test_contradictions_of_version_2_are_refused() -> None:
    artifact = make_sketched()
    for changes, says in (
        ({"sketch_bits": (4,)}, "sketch_bits a layer"),
        ({"sketch_bits": (5, 4)}, "sketch bits among"),
        ({"rope_bits": 4}, "rope bits among"),
        ({"format_version": 1}, "expected sketch_bits a layer"),
        ({"widths": (21, D)}, "r \\+ g n = d"),
    ):
        with pytest.raises(ArtifactError, match=says):
            Artifact(msgspec.structs.replace(artifact.meta, **changes), artifact.tensors)
    tensors = dict(artifact.tensors)
    tensors["layers.0.sketch"] = tensors["layers.0.sketch"][:, 1:].contiguous()
    with pytest.raises(ArtifactError, match=r"layers\.0\.sketch"):
        Artifact(artifact.meta, tensors)
    del tensors["layers.0.sketch"]
    with pytest.raises(ArtifactError, match="missing"):
        Artifact(artifact.meta, tensors)


def test_the_page_on_artifacts_checks_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    exec(compile(program, "docs/artifact.md", "exec"), {})
    assert "format 2 nano-mla g = 2" in capsys.readouterr().out
