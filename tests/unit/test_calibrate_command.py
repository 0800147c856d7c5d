"""The calibration command: once as a user runs it, in a separate process, and otherwise through its function."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import weights_hash
from sglang_tpla.measure.outputs import is_artifact, is_statistics
from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.reference_model.checkpoint import Checkpoint
from tests.random_checkpoint import save
from tests.shipped import ARTIFACT, NANO, ROOT, SKETCHED_ARTIFACT, call_command, run_command

SMALL = ["--tokens", "2048", "--held-out-tokens", "128", "--prompt-tokens", "64", "--continuation-tokens", "64"]


NO_WIDTH = ("--attention-backend", "flashinfer_fa3")  # this backend serves only 512
calibrate = partial(call_command, "calibrate")


def test_makes_an_artifact_with_provenance_twice_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        asked = ("--model-path", NANO, "--groups", 4, "--out", tmp_path / name, "--seed", 5, *SMALL)
        done = run_command("calibrate", *asked)
        assert done.returncode == 0, done.stderr
        assert "KL" in done.stdout
        assert "statistics" in done.stderr
    artifact = Artifact.load(tmp_path / "one")
    assert artifact.content_hash == Artifact.load(tmp_path / "two").content_hash
    meta = artifact.meta
    assert (meta.transform, meta.groups, meta.widths) == ("shared", 4, (56,) * 4)
    assert (meta.shared_dims, meta.seed, meta.calibrated_tokens) == ((32,) * 4, 5, 2048)
    assert meta.corpus.endswith("stdlib")
    assert len(meta.corpus_hash) == 64
    assert meta.error_report is not None
    assert meta.error_report.tokens == 128
    artifact.check_model(Checkpoint(NANO).config, weights_hash(NANO), 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--groups", "0"], "--groups"),
        (["--rows", "fp8"], "--rows: fp8 asks for FP8 rows, which were retired"),
        (["--attention-backend", "fp8_triton"], "--attention-backend: fp8_triton asks for FP8 rows"),
        (["--shared-dims", "129"], "0 <= --shared-dims <= 128"),
        (["--transform", "pca", "--shared-dims", "8"], "needs --transform shared"),
        (["--transform", "fourier"], "--transform"),
        (["--corpus", "/nonexistent/text"], "/nonexistent/text"),
        (["--rows", "sketched", "--transform", "pca"], "--rows sketched takes --transform shared"),
        (["--rows", "sketched", "--shared-dims", "33"], "nearest --shared-dims that 2 groups hold are [28, 32, 36]"),
        (["--sketch-bits", "5"], "--sketch-bits"),
        (["--rows", "plain", "--sketch-bits", "3"], "those of sketched rows"),
        (["--max-kl", "nan", "--ranks", "2"], "a finite --max-kl above 0"),
        (["--max-kl", "0.1", "--ranks", "2", "--groups", "4"], "got --groups 4 as well: leave one out"),
        (["--max-kl", "9", "--ranks", "2", "--transform", "pca"], "got --transform pca: leave that out"),
        (["--max-kl", "9", "--ranks", "2", "--rows", "plain", "--key-map", "scalar"], "got --key-map scalar"),
        (["--max-kl", "9", "--ranks", "2", "--rows", "plain", "--shared-dims", "5"], "--shared-dims 5 in plain rows"),
        (["--max-kl", "9", "--ranks", "2", "--shared-dims", "33"], "nearest --shared-dims that 2 groups hold"),
        (["--max-kl", "9", "--ranks", str(10**15)], "--ranks of at least 2 and at most 4096"),
        (["--ranks", "2"], "--ranks is of --max-kl"),
        (["--from-stats", "x", "--corpus", "docs"], "no text is read: leave out --corpus and --tokens and --held-out"),
        (["--seed", str(10**15), "--transform", "learned"], "expected --seed to lie between"),
        (["--transform", "learned", "--learn-steps", "-1"], "expected steps of learning to be at least 0"),
        (["--max-kl", "9", "--ranks", "2", "--rows", "plain", *NO_WIDTH], "serves no slice width of a latent of 128"),
        (["--device", "cuda:77"], "a torch device that is here, got 'cuda:77'"),
        (["--out", "/tmp"], "got the folder /tmp"),
        (["--own-bits", "4"], "--own-bits"),
        (["--tokens", "0"], "at least 1"),
        (["--continuation-tokens", "1"], "expected --continuation-tokens to be at least 2 for an error report"),
        (["--tokens", "1000000000", "--corpus", str(ROOT / "docs")], "fewer tokens"),
        (["--model-path", "/nonexistent/model"], "config.json"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = calibrate("--model-path", NANO, "--out", tmp_path / "a", *SMALL, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "statistics:" not in done.stderr  # no text was read in vain
    assert not list(tmp_path.iterdir())


def test_maps_that_were_neither_learned_nor_refitted_are_called_what_they_are(tmp_path: Path) -> None:
    sizes = ("--tokens", 256, "--held-out-tokens", 0, "--prompt-tokens", 64, "--continuation-tokens", 64)
    asked = ("--model-path", NANO, "--out", tmp_path / "a", "--transform", "learned", "--learn-steps", 0, *sizes)
    for more, name in (((), "shared"), (("--refit-values",), "shared+refit")):
        done = calibrate(*asked, *more)
        assert done.returncode == 0, done.stderr
        assert Artifact.load(tmp_path / "a").meta.transform == name


def test_rows_are_sketched_unless_another_transform_or_format_is_asked_for(tmp_path: Path) -> None:
    stats = ("--tokens", "2048", "--held-out-tokens", "0")
    done = calibrate(
        *("--model-path", NANO, "--out", tmp_path / "a", "--sketch-bits", "2", "--rope-bits", "8"),
        *("--save-stats", tmp_path / "stats", *stats),
    )
    assert done.returncode == 0, done.stderr
    assert "140 bytes a token and layer (43.8% of plain MLA's in bf16)" in done.stdout
    meta = Artifact.load(tmp_path / "a").meta
    assert (meta.format_version, meta.sketch_bits, meta.rope_bits) == (2, (2,) * 4, 8)
    assert is_artifact(tmp_path / "a") and is_statistics(tmp_path / "stats")  # so both may be written again
    again = ("--model-path", NANO, "--from-stats", tmp_path / "stats", "--out")
    done = calibrate(*again, tmp_path / "b", "--sketch-bits", "2", "--rope-bits", "8")
    assert done.returncode == 0, done.stderr
    assert Artifact.load(tmp_path / "b").content_hash == Artifact.load(tmp_path / "a").content_hash
    (tmp_path / "link").symlink_to("stats")
    twice = (*again[:-1], tmp_path / "stats", tmp_path / "link", "--sketch-bits", "2", "--rope-bits", "8")
    done = calibrate(*twice, "--out", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    assert Artifact.load(tmp_path / "d").content_hash == Artifact.load(tmp_path / "a").content_hash
    for more in (("--rows", "plain"), ("--transform", "pca"), ("--groups", "1")):
        done = calibrate(*again, tmp_path / "c", *more)
        assert done.returncode == 0, done.stderr
        assert Artifact.load(tmp_path / "c").meta.format_version == 1


def test_statistics_that_leave_directions_of_the_latent_out_are_told(tmp_path: Path) -> None:
    """The text has the same few tokens over and over, like a server's statistics after a test of its answers."""
    done = calibrate(
        *("--model-path", NANO, "--out", tmp_path / "a", "--save-stats", tmp_path / "stats"),
        *("--tokens", "2048", "--held-out-tokens", "0"),
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    statistics = Statistics.load(tmp_path / "stats")
    layer = statistics.layers[2]
    values, vectors = torch.linalg.eigh(layer.latent_outer)
    values[:-50] = 0
    layer.latent_outer = (vectors * values) @ vectors.T
    statistics.save(tmp_path / "few")
    done = calibrate("--model-path", NANO, "--from-stats", tmp_path / "few", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "warning: 2048 tokens reach 50 of the latent's 128 directions in layer 2" in done.stderr


def test_the_shipped_artifact_is_of_the_shipped_model() -> None:
    sketched = Artifact.load(SKETCHED_ARTIFACT)
    sketched.check_model(Checkpoint(NANO).config, weights_hash(NANO), 2)
    assert sketched.meta.error_report is not None
    assert sketched.meta.error_report.kl_mean <= 0.0005
    assert sketched.meta.rows(0).row_bytes <= 0.56 * 2 * (128 + 32)
    artifact = Artifact.load(ARTIFACT)
    artifact.check_model(Checkpoint(NANO).config, weights_hash(NANO), 2)
    assert artifact.meta.widths == (80,) * 4
    for layer in range(4):
        total = sum(z @ b for z, _, b in (artifact.maps(layer, group) for group in range(2)))
        assert (total - torch.eye(128)).norm() / 128**0.5 < 0.35


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"model.layers.1.self_attn.kv_b_proj.weight": float("nan")}, "layer 2 of model gets queries or latents"),
        (
            {"model.layers.2.mlp.shared_experts.down_proj.weight": float("inf")},
            "layer 3 of model gets queries or latents",
        ),
        ({"lm_head.weight": float("nan")}, "the log-probabilities on the held-out text are not finite"),
        ({}, "the model knows 128 (vocab_size): expected the tokenizer that the model was trained with"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_error(broken: dict[str, float], says: str, tmp_path: Path) -> None:
    config, weights = Checkpoint(NANO).config, load_file(Path(NANO) / "model.safetensors")
    for name, value in broken.items():
        weights[name][0, 0] = value
    if not broken:
        config = config | {"vocab_size": 128}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:128].clone()
    folder = save(tmp_path / "model", config, weights, str(NANO))
    done = calibrate("--model-path", folder, "--groups", "2", "--out", tmp_path / "none", *SMALL)
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    assert done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr and "Traceback" not in done.stderr
