"""The answers of TPLA servers against the plain PyTorch model: prompt exact, every later token through the slices.

The servers compute on shards, from caches that crossed the wire; the plain model has neither.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact, build
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.model_answers import said_and_due
from tests.e2e.prompts import encoded, short_prompts
from tests.e2e.servers import launcher, running
from tests.e2e.traffic import Pair

TOKENS = 32


def mixed_widths(path: str, folder: Path) -> Path:
    """Make an artifact of four widths with the shipped provenance: coordinates dealt out, the last layer exact."""
    shipped = Artifact.load(path)
    d, maps, widths = shipped.meta.latent_dim, [], []
    shared = (96, 64, 110, d)
    for r in shared:
        groups = []
        for group in range(2):
            columns = [*range(r), *range(r + group, d, 2)]
            z = torch.eye(d)[:, columns]
            weight = torch.tensor([0.5 if c < r else 1.0 for c in columns])
            groups.append((z, z.T, z.T * weight[:, None]))
        maps.append(groups)
        widths.append(groups[0][0].shape[1])
    meta = msgspec.structs.replace(
        shipped.meta, transform="identity", shared_dims=shared, widths=tuple(widths), error_report=None
    )
    build(meta, maps).save(folder / "mixed.safetensors")
    return folder / "mixed.safetensors"


def assert_answers_follow_the_formula(
    pair: Pair, artifact: Artifact, model_path: str, prompts: int = 8, new_tokens: int = TOKENS
) -> None:
    """Check that the server's logprob of every greedy token is the plain TPLA model's.

    The comparison must tell TPLA from plain MLA, so that servers of plain MLA would fail it.
    """
    model = PlainModel(model_path)
    maps = model_maps(artifact, model)
    differs = 0
    for ids in encoded(model_path, short_prompts(prompts, seed=3)):
        said, expected, otherwise = said_and_due(pair, model, ids, new_tokens, maps, None)
        torch.testing.assert_close(said, expected, rtol=0, atol=2e-3)
        differs += int(((otherwise - expected).abs() > 1e-2).any())
    assert differs >= prompts // 2


def test_shipped_artifact(trio: Any, nano_mla: str, nano_artifact: str) -> None:
    assert_answers_follow_the_formula(trio.pair, Artifact.load(nano_artifact), nano_mla)


@pytest.mark.parametrize(("ranks", "groups"), [(4, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_layers_of_different_width_head_shards_and_summed_heads(
    trio: Any, nano_mla: str, nano_artifact: str, logs: Path, tmp_path: Path, ranks: int, groups: int
) -> None:
    """The groups' head outputs are summed before ``o_proj``; the shared servers hold ``o_proj`` g times instead."""
    path = mixed_widths(nano_artifact, tmp_path)
    decode = launcher(
        "decode", nano_mla, logs / "decode-mixed.log", "--tp", str(ranks),
        "--tpla-groups", str(groups), "--tpla-artifact", str(path), "--tpla-o-proj", "scatter",
    )  # fmt: skip
    with running(decode):
        tpla = decode.get("/server_info")["tpla"]
        assert (tpla["head_shards"], tpla["widths"]) == (ranks // groups, [112, 96, 119, 128])
        assert tpla["cache_bytes_per_token_and_rank"] == 4 * sum(w + 32 for w in tpla["widths"])
        assert_answers_follow_the_formula(Pair(trio.prefill, decode), Artifact.load(path), nano_mla)
