"""The artifact file reads back as it was written, and damaged or foreign files are refused."""

import json
import random
import re
import resource
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_tpla.artifact.artifact import FORMAT_VERSION, Artifact, ArtifactError, ArtifactMeta, ErrorReport, build
from sglang_tpla.artifact.fold import fold_key_map, fold_value_map
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.reference_model.config_file import read_config
from tests.random_checkpoint import save
from tests.shipped import NANO, SKETCHED_ARTIFACT

D, W, R = 8, 5, 2
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": D,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}


def make_meta(**changes: object) -> ArtifactMeta:
    report = ErrorReport(
        tokens=10,
        prompt_tokens=5,
        continuation_tokens=5,
        kl_mean=0.01,
        kl_p95=0.02,
        kl_p99=0.03,
        perplexity_mla=5.0,
        perplexity_tpla=5.1,
        perplexity_ratio=1.02,
        top1_agreement=0.97,
    )
    meta = ArtifactMeta(
        format_version=FORMAT_VERSION,
        model_name="toy",
        config_hash=config_hash(CONFIG),
        weights_hash="w" * 64,
        transform="shared",
        groups=2,
        num_layers=2,
        latent_dim=D,
        rope_dim=4,
        shared_dims=(R, D),
        widths=(W, D),
        calibrated_tokens=100,
        corpus="toy-text",
        corpus_hash="c" * 64,
        seed=3,
        created_by="sglang_tpla test",
        error_report=report,
    )
    return msgspec.structs.replace(meta, **changes)


def make_artifact() -> Artifact:
    generator = torch.Generator().manual_seed(0)
    maps = []
    for width, shared in ((W, R), (D, D)):
        common = torch.randn(D, shared, generator=generator)
        layer = []
        for _ in range(2):
            z = torch.cat([common, torch.randn(D, width - shared, generator=generator)], 1)
            a, b = torch.randn(2, width, D, generator=generator)
            layer.append((z, a, b))
        maps.append(layer)
    return build(make_meta(), maps)


def rewrite(path: Path, change) -> None:
    """Store the file again after ``change(tensors, metadata)``."""
    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def test_round_trip(tmp_path: Path) -> None:
    artifact = make_artifact()
    artifact.save(tmp_path / "a.safetensors")
    loaded = Artifact.load(tmp_path / "a.safetensors")
    assert loaded.meta == artifact.meta
    for layer in range(2):
        for group in range(2):
            for ours, theirs in zip(artifact.maps(layer, group), loaded.maps(layer, group), strict=True):
                assert torch.equal(ours, theirs)
    assert loaded.content_hash == artifact.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """No bit of the file can change unnoticed, not even the bits of numbers, which would still be numbers."""
    path = tmp_path / "a.safetensors"
    make_artifact().save(path)
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            Artifact.load(path)
    path.write_bytes(whole)
    Artifact.load(path)


def test_a_file_without_a_hash_loads(tmp_path: Path) -> None:
    make_artifact().save(tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", lambda tensors, metadata: metadata.pop("content_hash"))
    assert Artifact.load(tmp_path / "a.safetensors").content_hash == make_artifact().content_hash


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers.1.groups.0.A", "layers.1.groups.1.A"),
        ("layers.1.groups.0.B", "layers.1.groups.1.B"),
        ("layers.0.sketch", "layers.1.sketch"),
    ],
)
def test_sketched_maps_without_a_hash_must_give_the_latent_back(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "a.safetensors"
    shutil.copy(SKETCHED_ARTIFACT, path)
    rewrite(path, lambda tensors, metadata: metadata.pop("content_hash"))
    Artifact.load(path)

    def swap(tensors, metadata):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    rewrite(path, swap)
    with pytest.raises(ArtifactError, match="give the latent back"):
        Artifact.load(path)


def test_content_hash_follows_every_part(tmp_path: Path) -> None:
    artifact = make_artifact()
    hashes = {artifact.content_hash, build(make_meta(seed=4), _maps(artifact)).content_hash}
    for which in range(3):
        maps = _maps(artifact)
        maps[1][1][which][0, -1] += 1e-3 if which else 0.0
        if which == 0:
            maps[0][1][0][0, -1] += 1e-3  # this column is not shared
        hashes.add(build(artifact.meta, maps).content_hash)
    assert len(hashes) == 5


def _maps(artifact: Artifact) -> list[list[tuple[torch.Tensor, ...]]]:
    return [[tuple(t.clone() for t in artifact.maps(la, g)) for g in range(2)] for la in range(2)]


def multiplied(row: int, column: int, factor: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row, column] *= factor
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("layers.1.groups.0.B", None, r"missing \['layers.1.groups.0.B'\]"),
        ("layers.2.groups.0.B", lambda absent: torch.zeros(W, D), "not known"),
        ("layers.0.groups.1.A", lambda a: torch.zeros(W, D + 1), r"A as float32 \(5, 8\), got .*\(5, 9\)"),
        ("layers.0.groups.1.A", torch.Tensor.bfloat16, "bfloat16"),
        ("layers.0.groups.0.Z", multiplied(0, W - 1, float("nan")), "0.Z has values that are not finite"),
        ("layers.0.groups.1.Z", multiplied(3, R - 1, 1.0000002), "of layer 0 differ between groups 0 and 1"),
        ("format_version", lambda version: "3", "format version 3"),
        ("colour", lambda absent: '"blue"', "colour"),
        ("groups", lambda groups: '"2"', "groups"),
        ("groups", lambda groups: "{", "damaged"),
        ("groups", lambda groups: str(2**62), f"tensors of {2**62} groups, got"),  # a name each would fill the memory
        ("weights_hash", None, "weights_hash"),
        ("widths", lambda widths: json.dumps([W]), "one of widths a layer"),
    ],
)
def test_damage_is_refused(tmp_path: Path, name: str, change, says: str) -> None:
    path = tmp_path / "a.safetensors"
    make_artifact().save(path)

    def damage(tensors, metadata):
        stored = tensors if name.startswith("layers.") else metadata
        before = stored.pop(name, None)
        if change is not None:
            stored[name] = change(before)

    rewrite(path, damage)
    with pytest.raises(ArtifactError, match=says):
        Artifact.load(path)


def test_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ArtifactError, match=r"sglang_tpla.calibrate"):
        Artifact.load(path)
    make_artifact().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        Artifact.load(path)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """As which the commands report it; the file of an earlier run stays as it was."""
    (path := tmp_path / "a.safetensors").write_bytes(b"earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{path} cannot be written: "):
            make_artifact().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_another_model_is_refused() -> None:
    artifact = make_artifact()
    artifact.check_model(CONFIG, "w" * 64, 2)
    with pytest.raises(ArtifactError, match="--tpla-groups 2"):
        artifact.check_model(CONFIG, "w" * 64, 4)
    with pytest.raises(ArtifactError, match="attention configuration"):
        artifact.check_model({**CONFIG, "num_attention_heads": 8}, "w" * 64, 2)
    with pytest.raises(ArtifactError, match="other weights"):
        artifact.check_model(CONFIG, "v" * 64, 2)


@pytest.mark.parametrize(
    ("field", "key", "found"),
    [("rope_dim", "qk_rope_head_dim", 8), ("latent_dim", "kv_lora_rank", 16), ("num_layers", "num_hidden_layers", 3)],
)
def test_sizes_that_are_not_the_models_are_refused(field: str, key: str, found: int, tmp_path: Path) -> None:
    """The file may claim any configuration hash; only its sizes can be checked against the model."""
    path = tmp_path / "a.safetensors"
    other = CONFIG | {key: found}
    make_artifact().save(path)

    def forge(tensors, metadata):
        del metadata["content_hash"]
        metadata["config_hash"] = json.dumps(config_hash(other))

    rewrite(path, forge)
    (tmp_path / "config.json").write_text(json.dumps(other))
    got = getattr(make_meta(), field)
    said = re.escape(
        f"{path}: expected {field} {found}, as the model's config in {tmp_path / 'config.json'} says, got {field} "
        f"{got}; take this model's artifact"
    )
    artifact = Artifact.load(path)
    for check in (lambda config: artifact.check_model(config, "w" * 64, 2), artifact.check_sizes):
        with pytest.raises(ArtifactError, match=said):
            check(read_config(tmp_path))
    artifact.check_sizes(CONFIG)


def test_config_hash_sees_attention_and_nothing_else() -> None:
    base = config_hash(CONFIG)
    assert config_hash({**CONFIG, "vocab_size": 7, "architectures": ["X"], "torch_dtype": "float16"}) == base
    assert config_hash({**CONFIG, "rope_theta": 10000, "rms_norm_eps": 1e-6}) == base
    assert config_hash({**CONFIG, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}) == base
    assert config_hash({**CONFIG, "q_lora_rank": 16}) != base
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0}
    stretched = config_hash({**CONFIG, "rope_scaling": yarn})
    assert stretched != base
    same = {"rope_type": "yarn", "factor": 40.0, "mscale": 1, "rope_theta": 10000.0}
    assert config_hash({**CONFIG, "rope_parameters": same}) == stretched


def test_weights_hash_reads_what_it_says(tmp_path: Path) -> None:
    base, weights = weights_hash(NANO), load_file(NANO / "model.safetensors")
    config = json.loads((NANO / "config.json").read_text())
    assert weights_hash(save(tmp_path / "two shards", config, weights, str(NANO))) == base
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    # The first 64 KiB of [512, 128] bf16 are 256 rows.
    for row, same in ((300, True), (255, False)):
        weights[name] = load_file(NANO / "model.safetensors")[name]
        weights[name][row, 0] += 1
        assert (weights_hash(save(tmp_path / str(row), config, weights, str(NANO))) == base) is same


@pytest.mark.parametrize(("heads", "nope", "d", "w", "v"), [(3, 5, 17, 7, 4), (1, 1, 2, 1, 1), (8, 32, 128, 80, 32)])
def test_scores_and_outputs(heads: int, nope: int, d: int, w: int, v: int) -> None:
    torch.manual_seed(heads)
    w_kc, w_vc = torch.randn(heads, nope, d), torch.randn(heads, d, v)
    a, b = torch.randn(w, d), torch.randn(w, d)
    q, z, p = torch.randn(heads, nope), torch.randn(9, w), torch.randn(heads, 9)

    scores = torch.einsum("hn,hnw,tw->ht", q, fold_key_map(w_kc, a), z)
    torch.testing.assert_close(scores, torch.einsum("hn,hnd,td->ht", q, w_kc, z @ a), rtol=1e-4, atol=1e-4)
    outputs = torch.einsum("ht,tw,hwv->hv", p, z, fold_value_map(w_vc, b))
    torch.testing.assert_close(outputs, torch.einsum("ht,td,hdv->hv", p, z @ b, w_vc), rtol=1e-4, atol=1e-4)


def test_scale_of_quantised_weights() -> None:
    w_kc = torch.randn(2, 3, 4)
    a = torch.eye(4)
    torch.testing.assert_close(fold_key_map(w_kc, a, 0.5), w_kc * 0.5)
    torch.testing.assert_close(fold_value_map(w_kc.transpose(1, 2), a, 0.5), w_kc.transpose(1, 2) * 0.5)
