"""Decode-phase accuracy of the shipped artifact on held-out text, compared with the transforms that it replaces."""

import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.calibrate import pipeline
from sglang_tpla.calibrate.sketch_layout import sketched_rows
from sglang_tpla.measure.decode_error import measure, model_maps
from sglang_tpla.measure.text import TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.forward import PlainModel
from tests.shipped import ARTIFACT


def test_shipped_artifact_is_within_its_bar(nano_model: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    """The KL a token is at most 0.02 over 8,192 decoded tokens, and far below that of the paper's transforms."""
    text = read_text(TextPlan(calibration_tokens=8192, held_out_tokens=8192), nano_model.checkpoint)
    shipped = Artifact.load(ARTIFACT)
    assert shipped.meta.seed == 0  # so that this text was held out from it
    statistics = collect_statistics(nano_model, text, 0, show_progress=False)
    artifacts = {"shipped": shipped}
    for transform in ("pca", "hadamard", "identity"):
        artifacts[transform] = pipeline.closed_form(statistics, nano_model.checkpoint, transform, 2, [0] * 4, "scalar")
    few = text.held_out[: len(text.held_out) // 4]  # far apart as they are
    (whole,) = measure(nano_model, text.held_out, [model_maps(shipped, nano_model)], 512)
    found = measure(nano_model, few, [model_maps(a, nano_model) for a in artifacts.values()], 512)
    kl = {name: errors.report().kl_mean for name, errors in zip(artifacts, found, strict=True)}
    with capsys.disabled():
        print("\nKL a token, prompt exact:", {name: round(value, 4) for name, value in kl.items()})
    assert whole.kl.numel() >= 8000
    assert whole.report().kl_mean <= 0.02
    assert kl["shipped"] < 0.2 * kl["pca"] < kl["hadamard"] < kl["identity"]


def test_sketched_rows_are_near_exact_at_half_the_bytes(nano_model: PlainModel) -> None:
    """One group (plain MLA with an 8-bit cache), two and four. The bounds leave room for the noise of 4,096 tokens."""
    text = read_text(TextPlan(calibration_tokens=16384, held_out_tokens=4096), nano_model.checkpoint)
    statistics = collect_statistics(nano_model, text, 0, show_progress=False)
    spec = nano_model.spec
    rows = [sketched_rows(128, 32, groups, shared, 4, 16) for groups, shared in ((1, 128), (2, 32), (4, 32))]
    costs = pipeline.layer_costs(statistics, nano_model.checkpoint)
    artifacts = [pipeline.sketched_form(statistics, spec, costs, [layer] * spec.layers) for layer in rows]
    found = measure(nano_model, text.held_out, [model_maps(artifact, nano_model) for artifact in artifacts], 512)
    assert [layer.row_bytes / 320 for layer in rows] == [0.625, 0.55, 0.5125]
    for errors, bound in zip(found, (0.0003, 0.0006, 0.0006), strict=True):
        report = errors.report()
        assert report.kl_mean < bound and report.top1_agreement > 0.98


def test_error_report_is_reproduced(nano_model: PlainModel) -> None:
    shipped = Artifact.load(ARTIFACT)
    report = shipped.meta.error_report
    assert report is not None
    assert report.tokens >= 8000
    text = read_text(TextPlan(calibration_tokens=1, held_out_tokens=1024), nano_model.checkpoint)
    (errors,) = measure(nano_model, text.held_out, [model_maps(shipped, nano_model)], 512)
    assert errors.report().kl_mean == pytest.approx(report.kl_mean, rel=0.6)


def test_exact_maps_measure_no_error(nano_model: PlainModel) -> None:
    eye = torch.eye(nano_model.spec.latent_dim)
    maps = [[(eye, eye, eye / 2)] * 2] * nano_model.spec.layers
    tokens = torch.randint(3, 4096, (1, 96), generator=torch.Generator().manual_seed(0))
    (errors,) = measure(nano_model, tokens, [maps], 48)
    report = errors.report()
    assert report.kl_mean < 1e-6
    assert report.top1_agreement == 1
    assert report.perplexity_ratio == pytest.approx(1, abs=1e-5)
