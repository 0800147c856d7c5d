"""Decode servers with sketched rows against the plain PyTorch model token by token, their bytes, prefixes and aborts.

All decode servers use the shared prefill server, whose own cache is float32.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.pipeline import layer_costs, sketched_form
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.measure.text import TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.forward import LayerMaps, PlainModel
from sglang_tpla.reference_model.sketched_layer import SketchedMaps
from tests.e2e.model_answers import said_and_due
from tests.e2e.prompts import encoded, short_prompts
from tests.e2e.servers import Server, launcher, running, transfer_lines, wait_idle
from tests.e2e.traffic import Pair

LAYERS, LATENT, ROPE = 4, 128, 32
# A value between two codes may be rounded to either, and the rows of all later layers then differ a little. Most tokens
# are within NEAR, and the others differ little compared with the effect of rounding itself.
NEAR, OUTLIERS, BESIDE = 5e-3, 0.05, 0.25


@contextlib.contextmanager
def decode_server(model: str, log: Path, *flags: str) -> Iterator[Server]:
    """Start a decode server that keeps the caches of ended requests for later requests with the same prefix."""
    server = launcher("decode", model, log, "--disaggregation-decode-enable-radix-cache", *flags)
    with running(server):
        yield server


def whole_latent(model: PlainModel) -> list[LayerMaps]:
    """Return one group's maps: the latent rotated, rounded to 8 bits, and rotated back."""
    turn = rotation(LATENT, model.dtype)
    rows = SketchedRows.of(LATENT, 1, LATENT, ROPE)
    return [SketchedMaps(rows, [turn], turn[:, :0], [turn.T], [turn.T])] * LAYERS


def follow_the_model(pair: Pair, model: PlainModel, maps: Sequence[LayerMaps]) -> None:
    """Check that the server's logprob of every greedy token is that of the plain model with rows rounded alike."""
    apart, rounding = [], []
    for ids in encoded(model.checkpoint.path, short_prompts(8, seed=3)):
        said, rounded, exact = said_and_due(pair, model, ids, 32, maps, None)
        apart.append((said - rounded).abs())
        rounding.append((exact - rounded).abs())
    off, cost = torch.cat(apart), torch.cat(rounding)
    found = f"mean {off.mean():.5f}, largest {off.max():.4f}; rounding costs {cost.mean():.5f}, {cost.max():.4f}"
    assert (off > NEAR).float().mean() <= OUTLIERS and off.mean() <= BESIDE * cost.mean(), found


def check(trio: Any, decode: Server, model: PlainModel, maps: Sequence[LayerMaps], wire_bytes: int) -> None:
    """Check parity, the bytes of every transfer, a cached prefix, an abort, and an idle server at the end.

    Args:
        wire_bytes: bytes of a token, over all layers and ranks.
    """
    pair, before = Pair(trio.prefill, decode), len(transfer_lines(trio.prefill))
    follow_the_model(pair, model, maps)
    prompt = [(7 * n) % 500 + 10 for n in range(300)]
    first = pair.generate(prompt, 16, return_logprob=True)[1]
    again = pair.generate(prompt, 16, return_logprob=True)[1]
    assert again["meta_info"]["cached_tokens"] >= len(prompt) - 1
    assert again["output_ids"] == first["output_ids"]
    moved = transfer_lines(trio.prefill)[before:]
    assert len(moved) == 10 and all(line["bytes"] == line["tokens"] * wire_bytes for line in moved)
    assert moved[-2]["tokens"] == len(prompt) and moved[-1]["tokens"] <= 1  # the prefix was cached
    pair.leave(prompt[::-1], 2000, after_s=20)
    wait_idle(trio.prefill, decode)
    assert pair.generate(prompt, 16)[1]["output_ids"] == first["output_ids"]


def test_plain_mla_with_an_8_bit_cache(trio: Any, nano_mla: str, logs: Path) -> None:
    model = PlainModel(nano_mla)
    with decode_server(nano_mla, logs / "decode-8-bit.log", "--tp", "1", "--tpla-rows", "sketched") as decode:
        tpla = decode.get("/server_info")["tpla"]
        row_bytes = LATENT + 2 * ROPE + 8
        assert (tpla["rows"], tpla["groups"], tpla["widths"]) == ("sketched", 1, [LATENT] * LAYERS)
        assert tpla["cache_bytes_per_token_and_rank"] == LAYERS * row_bytes
        check(trio, decode, model, whole_latent(model), LAYERS * row_bytes)


def by_layer(folder: str, path: Path, rope_bits: int) -> str:
    """Make an artifact of two groups whose layers differ in shared columns, sketch bits and bytes."""
    model = PlainModel(folder)
    text = read_text(TextPlan(calibration_tokens=4096, held_out_tokens=0), model.checkpoint)
    statistics = collect_statistics(model, text, 0, show_progress=False)
    rows = [
        SketchedRows.of(LATENT, 2, shared, ROPE, sketch_bits=bits, rope_bits=rope_bits)
        for shared, bits in ((64, 2), (16, 4), (LATENT, 4), (96, 3))
    ]
    costs = layer_costs(statistics, model.checkpoint)
    sketched_form(statistics, model.spec, costs, rows).save(path)
    return str(path)


@pytest.fixture(scope="module")
def rows_by_layer(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return by_layer(nano_mla, tmp_path_factory.mktemp("by-layer") / "artifact.safetensors", 16)


@pytest.fixture(scope="module")
def rows_with_8_bit_keys(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return by_layer(nano_mla, tmp_path_factory.mktemp("8-bit-keys") / "artifact.safetensors", 8)


@pytest.mark.parametrize(
    ("layers", "ranks"),
    [
        ("rows_by_layer", 2),
        pytest.param("rows_with_8_bit_keys", 2, marks=pytest.mark.slow),
        pytest.param("sketched_artifact", 4, marks=pytest.mark.slow),
    ],
)
def test_two_groups(
    trio: Any, request: pytest.FixtureRequest, nano_mla: str, logs: Path, layers: str, ranks: int
) -> None:
    path = request.getfixturevalue(layers)
    artifact, model = Artifact.load(path), PlainModel(nano_mla)
    flags = ["--tp", str(ranks), "--tpla-groups", "2", "--tpla-artifact", path]
    with decode_server(nano_mla, logs / f"decode-{layers}-{ranks}.log", *flags) as decode:
        tpla = decode.get("/server_info")["tpla"]
        rows = [artifact.meta.rows(layer) for layer in range(LAYERS)]
        assert tpla["rows"] == "sketched"
        assert tpla["sketch_bits"] == [kind.sketch_bits for kind in rows if kind.own]
        assert tpla["cache_bytes_per_token_and_rank"] == sum(kind.row_bytes for kind in rows)
        wire = sum(kind.common_bytes + 2 * kind.own_bytes for kind in rows)
        check(trio, decode, model, model_maps(artifact, model), wire)
