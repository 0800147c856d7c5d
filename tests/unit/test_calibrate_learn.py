"""Learned maps, the closed-form refit, resumption after a kill, and statistics from elsewhere."""

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import torch.nn.functional as F

from sglang_tpla.artifact.artifact import Artifact, ArtifactError
from sglang_tpla.calibrate import pipeline
from sglang_tpla.calibrate.__main__ import main
from sglang_tpla.calibrate.learn_layer import LearnedLayer, LearnPlan, learn_layer, output_error
from sglang_tpla.calibrate.learn_model import forget_finished, learn_model
from sglang_tpla.calibrate.refit_values import refit_values
from sglang_tpla.calibrate.transforms import Maps, TransformError
from sglang_tpla.measure.layer_inputs import batch_of, sample, walk
from sglang_tpla.measure.statistics import LayerMoments, Statistics, StatisticsError, combine
from sglang_tpla.measure.text import Text, TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.forward import Attention, AttentionInputs, PlainModel
from tests.shipped import ENVIRONMENT, NANO, command

PLAN = LearnPlan(steps=12, highest_rate=2e-4, sequences=2, queries=64, first_query=64, warmup_steps=2)


@pytest.fixture(scope="module")
def text(nano_model: PlainModel) -> Text:
    plan = TextPlan(calibration_tokens=4096, held_out_tokens=128, prompt_tokens=128, continuation_tokens=128)
    return read_text(plan, nano_model.checkpoint)


@pytest.fixture(scope="module")
def statistics(nano_model: PlainModel, text: Text) -> Statistics:
    return collect_statistics(nano_model, text, 0, show_progress=False)


@pytest.fixture(scope="module")
def start(nano_model: PlainModel, statistics: Statistics) -> Artifact:
    return pipeline.closed_form(statistics, nano_model.checkpoint, "shared", 2, [32] * 4)


class LastLayer(NamedTuple):
    """The last layer's attention, its inputs, the maps to start from, and the latents' covariance."""

    attention: Attention
    inputs: AttentionInputs
    maps: Maps
    covariance: torch.Tensor

    def learn(self, plan: LearnPlan, maps: Maps | None = None, shared: int = 32, **more: Any) -> LearnedLayer:
        start = self.maps if maps is None else maps
        return learn_layer(self.attention, self.inputs, start, shared, self.covariance, plan, 3, **more)


@pytest.fixture(scope="module")
def last(nano_model: PlainModel, text: Text, start: Artifact, statistics: Statistics) -> LastLayer:
    *_, (layer, inputs) = walk(nano_model, text.calibration)
    assert layer == 3
    maps = [start.maps(3, group) for group in range(2)]
    return LastLayer(nano_model.layers[3].attention, inputs, maps, statistics.layers[3].covariance)


def test_sampled_output_error_equals_the_model_s_own_attention(last: LastLayer) -> None:
    positions = torch.tensor([[70, 127, 200]])
    batch = batch_of(last.attention, last.inputs, torch.tensor([5]), positions)
    found = output_error(last.attention, batch, last.maps)
    # Compute the same from the forward's own attention over the whole sequence.
    inputs = AttentionInputs(*(values[5:6] for values in vars(last.inputs).values()))
    exact = last.attention(inputs)[0, positions[0]]
    sliced = last.attention(inputs, last.maps)[0, positions[0]]
    expected = (sliced - exact).pow(2).sum() / exact.pow(2).sum()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


def test_learning_lowers_the_layer_s_error_and_keeps_shared_bits(last: LastLayer) -> None:
    learned = last.learn(replace(PLAN, steps=60, highest_rate=4e-4, queries=96, warmup_steps=5))
    assert learned.error_after < 0.97 * learned.error_before
    (first, _, _), (second, _, _) = learned.maps
    assert torch.equal(first[:, :32], second[:, :32])
    assert not torch.equal(first[:, 32:], second[:, 32:])


def test_a_layer_that_would_get_worse_or_is_exact_stays(last: LastLayer) -> None:
    kept = last.learn(replace(PLAN, rate=50.0, highest_rate=50.0))
    assert kept.error_after == kept.error_before
    for ours, theirs in zip(kept.maps, last.maps, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    eye = torch.eye(128)
    assert last.learn(PLAN, [(eye, eye, eye / 2)] * 2, 128).error_before < 1e-8


def test_a_dead_layer_is_exact(last: LastLayer) -> None:
    """The error relative to nothing was NaN: all steps were in vain, and a finished layer's file could not be read."""
    dead = replace(last.attention, o=torch.zeros_like(last.attention.o))
    learned = last._replace(attention=dead).learn(PLAN)
    assert (learned.error_before, learned.error_after) == (0, 0)


def test_the_step_size_that_a_layer_bears_is_taken(last: LastLayer) -> None:
    plan = replace(PLAN, steps=40, queries=96, trial_steps=10)
    wild = last.learn(replace(plan, trial_scales=(1000.0,)))
    assert wild.error_after == wild.error_before
    tried: list[int] = []
    tame = last.learn(replace(plan, trial_scales=(1000.0, 1.0)), progress=tried.append)
    assert tame.error_after < 0.99 * tame.error_before
    assert sum(tried) == 2 * 10 + 40


@pytest.mark.parametrize(
    ("field", "value"), [("steps", -1), ("sequences", 0), ("queries", 0), ("trial_scales", ()), ("rate", 0.0)]
)
def test_a_plan_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(TransformError, match=field):
        replace(PLAN, **{field: value})


def test_refit_is_least_squares(last: LastLayer) -> None:
    attention, maps = last.attention, last.maps
    generator = torch.Generator().manual_seed(0)
    size = {"sequences": 2, "queries": 32, "first_query": 64}
    batches = [sample(attention, last.inputs, generator, **size) for _ in range(6)]
    refitted, before, after = refit_values(attention, batches, maps, iterations=15)
    assert after < before
    direct = sum(_squares(attention, batch, refitted)[0] for batch in batches)
    energy = sum(_squares(attention, batch, refitted)[1] for batch in batches)
    assert direct / energy == pytest.approx(after, rel=1e-3)
    for (z, a, _), (new_z, new_a, _) in zip(maps, refitted, strict=True):
        assert torch.equal(z, new_z)
        assert torch.equal(a, new_a)
    # More iterations do no worse: conjugate gradients go beyond the first descent.
    _, _, further = refit_values(attention, batches, maps, iterations=30)
    assert further <= after


def _squares(attention, batch, maps) -> tuple[float, float]:
    scale = attention.spec.scale
    rope = batch.rope_scores(scale)
    latent = batch.latent[:, None]
    exact = (scale * batch.absorbed @ latent.transpose(-1, -2) + rope).softmax(-1) @ latent
    found = 0
    for z, a, b in maps:
        scores = scale * batch.absorbed @ (latent @ z @ a).transpose(-1, -2) + rope
        found = found + scores.softmax(-1) @ (latent @ z @ b)

    def out(context: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.einsum("bhqd,hvd->bqhv", context, attention.w_uv).flatten(2), attention.o)

    return (out(found) - out(exact)).pow(2).sum().item(), out(exact).pow(2).sum().item()


def test_resumed_run_ends_with_the_same_bits(
    nano_model: PlainModel,
    statistics: Statistics,
    start: Artifact,
    text: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = replace(PLAN, trial_steps=4)

    def learn(folder: Path, plan: LearnPlan = short) -> Artifact:
        return learn_model(nano_model, start, statistics, text.calibration, plan, folder)

    whole = learn(tmp_path / "whole")
    forget_finished(tmp_path / "whole", 4)
    assert not (tmp_path / "whole").exists()
    changed = [not torch.equal(whole.maps(la, 0)[1], start.maps(la, 0)[1]) for la in range(4)]
    assert sum(changed) >= 2, "these steps must improve some layers, or this test shows nothing"

    class Stop(Exception):
        pass

    def stop_after(count: int, plan: LearnPlan = short) -> None:
        layers = iter([learn_layer] * count)

        def stopping(*arguments, **keywords):
            for learn_one in layers:
                return learn_one(*arguments, **keywords)
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr("sglang_tpla.calibrate.learn_model.learn_layer", stopping)
            with pytest.raises(Stop):
                learn(tmp_path / "cut", plan)

    stop_after(2)
    (folder,) = (tmp_path / "cut").iterdir()
    forget_finished(tmp_path / "cut", 4)
    kept = sorted(folder.iterdir())
    assert [file.name for file in kept] == ["layer-0.safetensors", "layer-1.safetensors"]

    # A damaged finished layer is named, not used.
    finished = kept[1].read_bytes()
    kept[1].write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match="layer 1"):
        learn(tmp_path / "cut")
    kept[1].write_bytes(finished)
    # Other settings do not take the finished layers: they begin with the first layer.
    stop_after(0, replace(short, seed=1))
    resumed = learn(tmp_path / "cut")
    assert resumed.content_hash == whole.content_hash
    forget_finished(tmp_path / "cut", 4)
    assert not folder.exists()


def test_a_report_that_fails_costs_no_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an artifact that cannot be written: the layers are kept until it is."""
    out = tmp_path / "learned.safetensors"
    few = ["--tokens", "256", "--held-out-tokens", "32", "--prompt-tokens", "64", "--continuation-tokens", "32"]
    learn = ["--model-path", str(NANO), "--transform", "learned", "--learn-steps", "1", *few, "--out", str(out)]

    def stopped(*_: object, **__: object) -> Artifact:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "with_report", stopped)
        assert main(learn) == 2
    monkeypatch.setattr("sglang_tpla.calibrate.learn_model.learn_layer", stopped)
    assert main(learn) == 0
    assert list(tmp_path.iterdir()) == [out] and Artifact.load(out).meta.transform == "learned"


@pytest.mark.slow
def test_killed_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    learn = [
        *command("calibrate", "--model-path", NANO, "--transform", "learned", "--learn-steps", 3, "--tokens", 512),
        *("--held-out-tokens", "0", "--prompt-tokens", "128", "--continuation-tokens", "128", "--quiet", "--out"),
    ]
    process = subprocess.Popen([*learn, out], env=ENVIRONMENT)
    work = tmp_path / "learned.safetensors.work"
    try:
        while process.poll() is None and not list(work.glob("*/layer-1.safetensors")):
            time.sleep(0.02)  # this only polls: the kill must come while layers are still missing
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    assert not out.exists()
    for target in (out, tmp_path / "again.safetensors"):
        subprocess.run([*learn, target], env=ENVIRONMENT, check=True)
    assert Artifact.load(out).content_hash == Artifact.load(tmp_path / "again.safetensors").content_hash
    assert Artifact.load(out).meta.transform == "learned"
    assert not work.exists()


def test_from_statistics_alone_gives_the_same_maps(
    nano_model: PlainModel, statistics: Statistics, start: Artifact, tmp_path: Path
) -> None:
    statistics.save(tmp_path / "stats")
    loaded = combine([Statistics.load(tmp_path / "stats")])
    again = pipeline.closed_form(loaded, nano_model.checkpoint, "shared", 2, [32] * 4)
    assert again.content_hash == start.content_hash


def test_statistics_of_ranks_and_servers_are_put_together(statistics: Statistics) -> None:
    def part(heads: slice, rows: float, first: int) -> Statistics:
        layers = [
            LayerMoments(
                moments.latent_sum * rows,
                moments.latent_outer * rows,
                moments.query_outer[heads] * rows,
                moments.latent_count * rows,
                moments.query_count * rows,
            )
            for moments in statistics.layers
        ]
        return Statistics(msgspec.structs.replace(statistics.meta, first_head=first), layers)

    joined = combine([part(slice(4, 8), 1, 4), part(slice(0, 4), 0.25, 0), part(slice(0, 4), 0.75, 0)])
    for ours, theirs in zip(joined.layers, statistics.layers, strict=True):
        torch.testing.assert_close(ours.covariance, theirs.covariance)
        torch.testing.assert_close(ours.query_outer, theirs.query_outer)
    with pytest.raises(StatisticsError, match="heads from 0"):
        combine([part(slice(4, 8), 1, 4)])
    other = Statistics(msgspec.structs.replace(statistics.meta, weights_hash="x" * 64), statistics.layers)
    with pytest.raises(StatisticsError, match="different models"):
        combine([statistics, other])


def test_statistics_of_another_model_are_refused(nano_model: PlainModel, statistics: Statistics) -> None:
    other = Statistics(msgspec.structs.replace(statistics.meta, weights_hash="x" * 64), statistics.layers)
    with pytest.raises(StatisticsError, match="collect them from this model"):
        pipeline.closed_form(other, nano_model.checkpoint, "shared", 2, [32] * 4)


def test_one_layer_at_a_time_gives_the_same_statistics(text: Text, statistics: Statistics) -> None:
    frugal = PlainModel(NANO, resident=False)
    found = collect_statistics(frugal, text, 0, show_progress=False)
    for ours, theirs in zip(found.layers, statistics.layers, strict=True):
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.query_outer, theirs.query_outer, rtol=1e-4, atol=1e-3)
