"""The benchmarks of the headline and of served requests, without servers: graphs, arrivals, client, error messages."""

import argparse
import json
import os
from pathlib import Path

import headline
import pytest
import serving
import v3_shaped
from serving_client import Client, ClientFailed

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import weights_hash

FAKE_CLIENT = """
import json, sys
def cli_main():
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    print("noise on stdout")
    if flags["--seed"] == "0":
        raise SystemExit(2)
    open(flags["--output-file"], "a").write(json.dumps({"seed": flags["--seed"]}) + "\\n")
"""


@pytest.mark.parametrize("most", [1, 4, 12, 48, 200])
def test_every_batch_has_a_graph_that_pads_it_by_no_more_than_a_third(most: int) -> None:
    sizes = serving.graph_batches(most)
    assert sizes == sorted(set(sizes))
    for batch in range(1, most + 1):
        padded = min(size for size in sizes if size >= batch)
        assert padded <= max(batch + 1, batch * 4 / 3), (batch, padded)


def test_a_rate_and_its_seconds_make_the_requests() -> None:
    args = argparse.Namespace(prompts=12, seconds=10.0)
    assert [serving.requests_at(rate, args) for rate in ("inf", "0.8", "1.6", "0.01")] == [12, 8, 12, 2]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Return the client's process, with a stand-in for SGLang's module."""
    package = tmp_path / "modules" / "sglang" / "benchmark"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "serving.py").write_text(FAKE_CLIENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")]))
    return Client(tmp_path / "client.log")


def test_one_process_serves_many_runs_and_outlives_one_that_fails(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    try:
        assert client.run(["--seed", "1"], out) == {"seed": "1"}
        with pytest.raises(ClientFailed, match="SystemExit: 2"):
            client.run(["--seed", "0"], out)
        assert client.run(["--seed", "2"], out) == {"seed": "2"}
        assert "noise" in (tmp_path / "client.log").read_text()
        client._process.kill()
        client._process.wait()
        with pytest.raises(ClientFailed, match="its log"):
            client.run(["--seed", "3"], out)
    finally:
        client.stop()


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("Traceback (most recent call last):\n  raise\nValueError: no scales\nwarning: leaks", "ValueError: no scales"),
        ("a.b.CustomError: x\ntorch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out"),
        ("loading\nKilled", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_why_a_method_failed_comes_from_its_log(tmp_path: Path, log: str, why: str) -> None:
    job = object.__new__(headline.Job)
    job.log = tmp_path / "log"
    job.log.write_text(log)
    assert job.last_error().startswith(f"ended early: {why}")


def test_a_checkpoint_of_identity_alone_is_known_by_its_artifacts(tmp_path: Path) -> None:
    model, sizes = tmp_path / "model", {"heads": 2, "hidden": 64, "query_latent": 32, "intermediate": 64}
    v3_shaped.write_checkpoint(model, v3_shaped.Shape(3, 128, **sizes), only_identity=True)
    for write, name in ((v3_shaped.write_artifact, "plain"), (v3_shaped.write_sketched_artifact, "sketched")):
        write(tmp_path / name, model, 2)
        Artifact.load(tmp_path / name).check_model(
            json.loads((model / "config.json").read_text()), weights_hash(model), 2
        )
